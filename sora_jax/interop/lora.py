"""Low-rank adaptations (LoRA, arXiv:2106.09685) of a transformer, merged into its parameters as these are read.

    kernel + scale * alpha / rank * up @ down

Two layouts of safetensors are common, and both are read:

    transformer.blocks.0.attn1.to_q.lora_A.weight           as diffusers and peft save them
    diffusion_model.blocks.0.self_attn.q.lora_down.weight   by Wan's own names, with .alpha beside it; also written
    lora_unet_blocks_0_self_attn_q.lora_down.weight         with underscores

Beside the matrices, files may hold whole differences of weights (.diff), of biases (.diff_b) and of the tables of
modulation (.diff_m), and all of them are added. diffusers (as of 0.42) leaves some out: those of norms, as the files
that have any have zeros there; those of tables; those of whole weights other than the last layer's; and those of the
modulation's bias in files that do not change its weight.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from sora_jax.dit import DiTConfig
from sora_jax.errors import InputError, one_line
from sora_jax.interop import names
from sora_jax.tensors import FORMATS, Tensor, TensorFile


class _Change(NamedTuple):
    """What is added to one layer: `scale` times up @ down to its kernel, and the rest as it is; names of tensors."""

    file: TensorFile
    down: str | None = None  # (rank, in)
    up: str | None = None  # (out, rank)
    scale: float = 1.0
    diff: str | None = None  # to the whole weight
    diff_b: str | None = None  # to the bias
    diff_m: str | None = None  # to the table of modulation

    def shape(self, leaf: str) -> tuple[int, ...] | None:
        """Of what is added to a weight, such as (out, in), to a bias or a table; None if nothing is."""
        shapes = self.file.shapes
        if leaf == "weight" and self.down is not None:
            return shapes[self.up][0], shapes[self.down][1]
        name = self._whole(leaf)
        return None if name is None else shapes[name]

    def _whole(self, leaf: str) -> str | None:
        return {"weight": self.diff, "bias": self.diff_b, "scale_shift_table": self.diff_m}.get(leaf)

    def read(self, leaf: str) -> np.ndarray:
        """What is added, in double precision: it is rounded once."""
        name = self._whole(leaf)
        diff = 0.0 if name is None else self.file.read(name).astype(np.float64)
        if leaf != "weight" or self.down is None:
            return diff
        down, up = (self.file.read(name).astype(np.float64) for name in (self.down, self.up))
        return self.scale * up @ down + diff


_SUFFIX = re.compile(r"\.(?:(lora_A|lora_down)|(lora_B|lora_up))(?:\.default)?\.weight$|\.(alpha|diff|diff_b|diff_m)$")
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
    (r"^img_emb\.proj\.0$", "condition_embedder.image_embedder.norm1"),
    (r"^img_emb\.proj\.4$", "condition_embedder.image_embedder.norm2"),
    (r"^img_emb\.proj\.1$", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3$", "condition_embedder.image_embedder.ff.net.2"),
    (r"attn(\d)\.norm_k_img$", r"attn\1.norm_added_k"),
    (r"\.norm3$", ".norm2"),  # of the cross-attention, the only one with weights
    (r"^head\.head$", "proj_out"),
    (r"^head$", ""),  # its table of modulation stands at the top
)


def merge(config: DiTConfig, params: Any, path: str | Path, scale: float = 1.0, low: bool = False) -> Any:
    """The transformer's parameters, `Tensor`s, with the adaptation in `path` added when they are read.

    Args:
      low: whether this is the transformer for low noise levels; a file may have parts for both.

    Raises:
      InputError: the file is damaged, or does not fit this transformer in all its parts.
    """
    path = Path(path)
    changes = _read(TensorFile(path), low)
    flat = traverse_util.flatten_dict(params, sep=".")
    used = set()
    for ours, tensor in flat.items():
        source = names.dit(config, ours)
        here = tensor.shape[1:] if source.stacked else tensor.shape
        added = {}
        for layer, theirs in enumerate(source.names):
            module, _, leaf = theirs.rpartition(".")
            change = changes.get(module)
            shape = change.shape(leaf) if change else None
            if change and leaf in ("weight", "bias", "scale_shift_table"):
                used.add(module)
            if shape is None:
                continue
            if not _fits(shape, source.convert, here):
                raise InputError(f"{path}: it changes {theirs} as {list(shape)}; here it is {list(here[::-1])}")
            added[layer] = partial(_added, change, leaf, source.convert, scale)
        if added:
            flat[ours] = dataclasses.replace(tensor, pieces=partial(_pieces, tensor, added, source.stacked))
    if left := changes.keys() - used:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise InputError(f"{path}: it changes {min(left)}{more}, which this transformer does not have")
    return traverse_util.unflatten_dict(flat, sep=".")


def _fits(shape: tuple[int, ...], convert: Callable, here: tuple[int, ...]) -> bool:
    """Whether what has this shape in a file is, converted, of the shape that the parameter has here."""
    try:
        return convert(np.broadcast_to(np.int8(0), shape)).shape == here
    except (ValueError, IndexError):
        return False


def _added(change: _Change, leaf: str, convert: Callable, scale: float) -> np.ndarray:
    return convert(scale * change.read(leaf))


def _pieces(tensor: Tensor, added: dict[int, Callable], stacked: bool) -> Iterator[np.ndarray]:
    """The pieces of a parameter with what is `added` to it, or to some of its layers; float32."""
    whole, start = None if stacked else added[0](), 0
    for piece in tensor.pieces():
        piece = piece.astype(np.float32)
        if stacked:
            for layer in range(start, start + len(piece)):
                if layer in added:
                    piece[layer - start] += added[layer]()
        else:
            piece += whole[start : start + len(piece)]
        start += len(piece)
        yield piece


def _read(file: TensorFile, low: bool) -> dict[str, _Change]:
    """Changes by the published name of the layer."""
    path, tensors = file.path, list(file.shapes)
    for name, format in file.formats.items():
        if format not in FORMATS:
            raise InputError(f"{path}: {name} is {format}, which cannot be read")
    if all(any(name.startswith(part) for name in tensors) for part in _PARTS):
        tensors = [name for name in tensors if name.startswith(_PARTS[low])]
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        suffix = _SUFFIX.search(name)
        if not suffix:
            raise InputError(f"{path}: {name} is no part of a low-rank adaptation that can be read")
        role = "down" if suffix[1] else "up" if suffix[2] else suffix[3]
        parts = found.setdefault(_module(name[: suffix.start()]), {})
        if role in parts:
            raise InputError(f"{path}: {name} is there twice, under two names")
        parts[role] = name
    if not found:
        raise InputError(f"{path} holds no low-rank adaptation")
    alpha, by_root = _scaling(path, file.metadata, _PARTS[low])
    changes = {}
    for module, parts in found.items():
        scale, down, up = 1.0, *(file.shapes.get(parts.get(role)) for role in ("down", "up"))
        if down is not None or up is not None:
            if down is None or up is None or len(down) != 2 or len(up) != 2 or up[1] != down[0]:
                raise InputError(f"{path}: {module} needs a lower and an upper matrix of one rank")
            rank = down[0]
            own = float(file.read(parts["alpha"]).reshape(-1)[0]) if "alpha" in parts else None
            top = own if own is not None else rank if alpha is None else alpha
            scale = top / (rank**0.5 if by_root else rank)
        changes[module] = _Change(
            file, parts.get("down"), parts.get("up"), scale, *(parts.get(role) for role in ("diff", "diff_b", "diff_m"))
        )
    return changes


def _scaling(path: Path, metadata: dict[str, str], part: str) -> tuple[float | None, bool]:
    """Alpha where the file's metadata have one for all layers, and whether it is divided by the rank's root.

    Files for pipelines with two transformers have those of each; what has no such prefix is for both.
    """
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        other = next(one for one in _PARTS if one != part)
        mine = sorted(config, key=lambda name: name.startswith(part))  # the last of a name counts
        if any(name.startswith(part) for name in config):
            mine = [name for name in mine if not name.startswith(other)]
        values = {name.rpartition(".")[2]: config[name] for name in mine}
        alpha = None if values.get("lora_alpha") is None else float(values["lora_alpha"])
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its metadata are damaged: {one_line(error)}") from error
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
