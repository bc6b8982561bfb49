"""Text to video with diffusion transformers in JAX.

    import sora_jax
    generator = sora_jax.load()
    generator.generate("a red ball rolls behind a gray wall", seed=0).save("ball.mp4")

Names are imported on first use, so that `import sora_jax` itself costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Generator": "sora_jax.generate",
    "InputError": "sora_jax.errors",
    "Video": "sora_jax.video",
    "load": "sora_jax.models",
    "read_video": "sora_jax.video",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sora_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
