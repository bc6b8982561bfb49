"""Low-rank adaptations (LoRA, arXiv:2106.09685) of a transformer, merged into its parameters at load.

    kernel + scale * alpha / rank * up @ down

Two layouts of safetensors are common, and both are read:

    transformer.blocks.0.attn1.to_q.lora_A.weight           as diffusers and peft save them
    diffusion_model.blocks.0.self_attn.q.lora_down.weight   by Wan's own names, with .alpha beside it; also written
    lora_unet_blocks_0_self_attn_q.lora_down.weight         with underscores
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from sora_jax.dit import DiTConfig
from sora_jax.errors import InputError
from sora_jax.interop import names


class _Change(NamedTuple):
    down: np.ndarray  # (rank, in)
    up: np.ndarray  # (out, rank)
    alpha: float


_SUFFIX = re.compile(r"\.(?:(lora_A|lora_down)|(lora_B|lora_up))(?:\.default)?\.weight$|\.(alpha)$")
_WAN_NAMES = (
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(attn\d)\.(q|k|v)$", r"\1.to_\2"),
    (r"(attn\d)\.o$", r"\1.to_out.0"),
    (r"(attn\d)\.(k|v)_img$", r"\1.add_\2_proj"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"),
    (r"\.ffn\.2$", ".ffn.net.2"),
    (r"^text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1$", "condition_embedder.time_proj"),
    (r"^head\.head$", "proj_out"),
)


def merge(config: DiTConfig, params: Any, path: str | Path, scale: float = 1.0) -> Any:
    """The transformer's parameters with the adaptation in `path` added.

    Raises:
      InputError: the file is damaged, or does not fit this transformer in all its parts.
    """
    path = Path(path)
    changes = _read(path)
    flat = traverse_util.flatten_dict(params, sep=".")
    for ours in [name for name in flat if name.endswith("kernel")]:
        source = names.dit(config, ours)
        for layer, theirs in enumerate(source.names):
            module = theirs.removesuffix(".weight")
            if module not in changes:
                continue
            change = changes.pop(module)
            # In double precision, once; the sum is rounded to the precision of the parameter.
            product = change.up.astype(np.float64) @ change.down.astype(np.float64)
            product *= scale * change.alpha / change.down.shape[0]
            kernel = flat[ours][layer] if source.stacked else flat[ours]
            if product.T.shape != kernel.shape:
                here = list(kernel.shape[::-1])
                raise InputError(f"{path}: it changes {module} as {list(product.shape)}; here it is {here}")
            merged = (kernel.astype(jnp.float32) + source.convert(product).astype(np.float32)).astype(kernel.dtype)
            flat[ours] = jnp.asarray(flat[ours]).at[layer].set(merged) if source.stacked else merged
    if changes:
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        raise InputError(f"{path}: it changes {min(changes)}{more}, which this transformer does not have")
    return traverse_util.unflatten_dict(flat, sep=".")


def _read(path: Path) -> dict[str, _Change]:
    """Changes by the published name of the module."""
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise InputError(f"{path} is a pickle, which is never read: convert it to safetensors")
    try:
        with safetensors.safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or 'no such file'}") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        suffix = _SUFFIX.search(name)
        if not suffix:
            raise InputError(f"{path}: {name} is no part of a low-rank adaptation that can be read")
        role = "down" if suffix[1] else "up" if suffix[2] else "alpha"
        parts.setdefault(_module(name[: suffix.start()]), {})[role] = tensor
    changes = {}
    for module, found in parts.items():
        down, up = found.get("down"), found.get("up")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise InputError(f"{path}: {module} needs a lower and an upper matrix of one rank")
        changes[module] = _Change(down, up, float(found.get("alpha", down.shape[0])))
    if not changes:
        raise InputError(f"{path} holds no low-rank adaptation")
    return changes


def _module(name: str) -> str:
    name = re.sub(r"^(transformer|transformer_2|diffusion_model|base_model\.model)\.", "", name)
    if name.startswith("lora_unet_"):
        name = name.removeprefix("lora_unet_")
        name = re.sub(r"^blocks_(\d+)_", r"blocks.\1.", name)
        name = re.sub(r"(self_attn|cross_attn|ffn|text_embedding|time_embedding|time_projection|head)_", r"\1.", name)
    for pattern, ours in _WAN_NAMES:
        name = re.sub(pattern, ours, name)
    return name
