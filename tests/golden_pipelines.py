"""The models of `golden`, and their pipelines run as `golden/make.py` ran the public ones."""

from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.generate import Generator

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("t2v", "ti2v", "a14b", "i2v", "flf", "i2v-a14b")


def expected(kind: str) -> dict[str, np.ndarray]:
    """What `golden/make.py` gave and got."""
    with np.load(GOLDEN / kind / "expected.npz") as values:
        return dict(values)


def options(kind: str, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """Those with which `expected["frames"]` were made, beside what is common to all."""
    given = {name: expected[name] for name in ("image", "last_image") if name in expected and kind != "ti2v"}
    if kind != "flf":
        given.pop("last_image", None)
    return given | ({"guidance_low": 2.0} if kind.endswith("a14b") else {})


def run(generator: Generator, noise: np.ndarray, guidance: float = 4.0, **options) -> np.ndarray:
    """Frames, uint8 (T, H, W, 3)."""
    stride = generator.config.codec.stride_space
    return generator.generate(
        "a red ball rolls behind a gray wall",
        negative_prompt="a blue cube",
        noise=noise,
        size=(8 * stride, 4 * stride),
        frames=9,
        steps=6,
        guidance=guidance,
        progress=False,
        **options,
    ).frames
