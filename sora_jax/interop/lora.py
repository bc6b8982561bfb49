"""Low-rank adaptations (LoRA, arXiv:2106.09685) of a transformer, merged into its parameters at load.

    kernel + scale * alpha / rank * up @ down

Two layouts of safetensors are common, and both are read:

    transformer.blocks.0.attn1.to_q.lora_A.weight           as diffusers and peft save them
    diffusion_model.blocks.0.self_attn.q.lora_down.weight   by Wan's own names, with .alpha beside it; also written
    lora_unet_blocks_0_self_attn_q.lora_down.weight         with underscores

Beside the matrices, files may hold whole differences of weights (.diff) and of biases (.diff_b).
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from sora_jax.dit import DiTConfig
from sora_jax.errors import InputError
from sora_jax.interop import names


class _Change(NamedTuple):
    """What is added to one layer: `scale` times up @ down to its kernel, and the rest as it is."""

    down: np.ndarray | None = None  # (rank, in)
    up: np.ndarray | None = None  # (out, rank)
    scale: float = 1.0
    diff: np.ndarray | None = None  # to the whole weight
    diff_b: np.ndarray | None = None  # to the bias


_SUFFIX = re.compile(r"\.(?:(lora_A|lora_down)|(lora_B|lora_up))(?:\.default)?\.weight$|\.(alpha|diff|diff_b)$")
_PARTS = ("transformer.", "transformer_2.")  # prefixes in files for pipelines with two transformers
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
    (r"^img_emb\.proj\.1$", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3$", "condition_embedder.image_embedder.ff.net.2"),
    (r"attn(\d)\.norm_k_img$", r"attn\1.norm_added_k"),
    (r"\.norm3$", ".norm2"),  # of the cross-attention, the only one with weights
    (r"^head\.head$", "proj_out"),
)


def merge(config: DiTConfig, params: Any, path: str | Path, scale: float = 1.0, low: bool = False) -> Any:
    """The transformer's parameters with the adaptation in `path` added.

    Args:
      low: whether this is the transformer for low noise levels; a file may have parts for both.

    Raises:
      InputError: the file is damaged, or does not fit this transformer in all its parts.
    """
    path = Path(path)
    changes = _read(path, low)
    flat = traverse_util.flatten_dict(params, sep=".")
    del params
    used = set()
    for ours in list(flat):
        source = names.dit(config, ours)
        for layer, theirs in enumerate(source.names):
            module, _, leaf = theirs.rpartition(".")
            change = changes.get(module)
            if change is None or leaf not in ("weight", "bias"):
                continue
            used.add(module)
            added = _weight(change) if leaf == "weight" else change.diff_b
            if added is None:
                continue
            here = flat[ours].shape[1:] if source.stacked else flat[ours].shape
            if added.T.shape != here:
                raise InputError(f"{path}: it changes {theirs} as {list(added.shape)}; here it is {list(here[::-1])}")
            added = np.asarray(source.convert(scale * added), np.float32)
            # The old array is given up: a transformer does not fit twice.
            flat[ours] = _add(jnp.asarray(flat.pop(ours)), added, layer if source.stacked else None)
    if left := changes.keys() - used:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise InputError(f"{path}: it changes {min(left)}{more}, which this transformer does not have")
    return traverse_util.unflatten_dict(flat, sep=".")


@partial(jax.jit, donate_argnums=0)
def _add(parameter, added, layer):
    place = slice(None) if layer is None else layer
    return parameter.at[place].set((parameter[place].astype(jnp.float32) + added).astype(parameter.dtype))


def _weight(change: _Change) -> np.ndarray | None:
    """What is added to the weight, (out, in), in double precision: it is rounded once."""
    if change.down is None:
        return change.diff
    product = change.scale * change.up.astype(np.float64) @ change.down.astype(np.float64)
    return product if change.diff is None else product + change.diff


def _read(path: Path, low: bool) -> dict[str, _Change]:
    """Changes by the published name of the layer."""
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise InputError(f"{path} is a pickle, which is never read: convert it to safetensors")
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            for name in file.keys():
                if file.get_slice(name).get_dtype() not in ("F32", "F16", "BF16"):
                    raise InputError(f"{path}: {name} is {file.get_slice(name).get_dtype()}, which cannot be read")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or 'no such file'}") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if all(any(name.startswith(part) for name in tensors) for part in _PARTS):
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(_PARTS[low])}
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        suffix = _SUFFIX.search(name)
        if not suffix:
            raise InputError(f"{path}: {name} is no part of a low-rank adaptation that can be read")
        role = "down" if suffix[1] else "up" if suffix[2] else suffix[3]
        parts = found.setdefault(_module(name[: suffix.start()]), {})
        if role in parts:
            raise InputError(f"{path}: {name} is there twice, under two names")
        parts[role] = tensor
    if not found:
        raise InputError(f"{path} holds no low-rank adaptation")
    alpha, by_root = _scaling(path, metadata)
    changes = {}
    for module, parts in found.items():
        down, up = parts.get("down"), parts.get("up")
        scale = 1.0
        if down is not None or up is not None:
            if down is None or up is None or down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
                raise InputError(f"{path}: {module} needs a lower and an upper matrix of one rank")
            rank = down.shape[0]
            top = float(parts["alpha"].reshape(-1)[0]) if "alpha" in parts else rank if alpha is None else alpha
            scale = top / (rank**0.5 if by_root else rank)
        changes[module] = _Change(down, up, scale, parts.get("diff"), parts.get("diff_b"))
    return changes


def _scaling(path: Path, metadata: dict[str, str]) -> tuple[float | None, bool]:
    """Alpha where the file's metadata have one for all layers, and whether it is divided by the rank's root."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        values = {name.rpartition(".")[2]: value for name, value in config.items()}
        alpha = None if values.get("lora_alpha") is None else float(values["lora_alpha"])
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its metadata are damaged: {' '.join(str(error).split())[:200]}") from error
    if values.get("alpha_pattern"):
        raise InputError(f"{path}: an alpha for each layer in the metadata cannot be read")
    return alpha, bool(values.get("use_rslora"))


def _module(name: str) -> str:
    name = re.sub(r"^(transformer|transformer_2|diffusion_model|base_model\.model)\.", "", name)
    if name.startswith("lora_unet_"):
        name = name.removeprefix("lora_unet_")
        name = re.sub(r"^blocks_(\d+)_", r"blocks.\1.", name)
        name = re.sub(r"(self_attn|cross_attn|ffn|text_embedding|time_embedding|time_projection|head)_", r"\1.", name)
    for pattern, ours in _WAN_NAMES:
        name = re.sub(pattern, ours, name)
    return name
