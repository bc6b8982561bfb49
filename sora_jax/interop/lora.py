"""Low-rank adaptations (LoRA, arXiv:2106.09685) of a transformer, merged into its parameters as these are read.

    kernel + scale * alpha / rank * up @ down

Two layouts of safetensors are common, and both are read:

    transformer.blocks.0.attn1.to_q.lora_A.weight           as diffusers and peft save them
    diffusion_model.blocks.0.self_attn.q.lora_down.weight   by Wan's own names, with .alpha beside it; also written
    lora_unet_blocks_0_self_attn_q.lora_down.weight         with underscores

Other trainers put other prefixes before these names, or several. Beside the matrices, files may hold what is added to
the bias with the same scale (.lora_B.bias), and whole differences of weights (.diff), of biases (.diff_b) and of the
tables of modulation (.diff_m, or .modulation.diff), and all of them are added. diffusers (as of 0.42) leaves some out:
those of norms, as the files that have any have zeros there; those of tables; those of whole weights other than the last
layer's; and those of biases without matrices beside them, of other layers than the blocks' and the last one (of the
layers of text and time it refuses such files).
"""

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from sora_jax.dit import DiTConfig
from sora_jax.errors import InputError, one_line
from sora_jax.interop import names
from sora_jax.json_files import read_json
from sora_jax.tensors import FORMATS, Tensor, TensorFile


class _Term(NamedTuple):
    """Added to a published tensor: `scale` times a tensor of the file, or times the product of an upper and a lower."""

    file: TensorFile
    scale: float
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [self.file.shapes[name] for name in self.names]
        return shapes[0][:1] + shapes[-1][1:]

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """What is added, in double precision: it is rounded once."""
        arrays = (self.file.read(name).astype(np.float64) for name in self.names)
        # Those of a convolution have more axes than two.
        return self.scale * reduce(np.matmul, (array.reshape(len(array), -1) for array in arrays)).reshape(shape)


class _Alphas(NamedTuple):
    """What a file's metadata say of alpha: that of all layers (None is their rank), those by name, and what divides."""

    every: float | None
    named: dict[str, float]
    by_root: bool

    def of(self, layer: str, rank: int) -> float:
        """As in peft, the first that is the layer's name or its end counts, or with ^ the name alone; else the rank."""
        for name, alpha in self.named.items():
            if layer == name.removeprefix("^") or layer.endswith(f".{name}"):
                return alpha
        return rank if self.every is None else self.every


_ROLES = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora_B.bias": "bias",
    "lora_up.bias": "bias",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
}
_ALPHA_FORMATS = re.compile(r"BF16|F(16|32|64)|[IU]\d+")
_PARTS = ("transformer.", "transformer_2.")  # prefixes in files for pipelines with two transformers
_PREFIX = re.compile(r"(?:base_model\.model\.|diffusion_model\.|pipe\.dit\.|(transformer\.|transformer_2\.))*")
_TABLES = ("scale_shift_table", "pos_embed")  # parameters without a module
_IMAGE = re.compile(r"image_embedder|add_[kv]_proj|norm_added_k")  # only in models that see an image
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
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
)


def merge(
    config: DiTConfig, params: Any, path: str | Path, scale: float = 1.0, low: bool = False
) -> tuple[Any, list[str]]:
    """The transformer's parameters, `Tensor`s, with the adaptation in `path` added when they are read.

    Files made for Wan 2.1's models that see an image by an encoder are used with Wan 2.2's, which have none: what they
    change there is left out, as diffusers does, unless it is all they have.

    Args:
      low: whether this is the transformer for low noise levels; a file may have parts for both.

    Returns:
      the parameters, and the published names of what was left out.

    Raises:
      InputError: the file is damaged, or does not fit this transformer in all its parts, or the scale is no finite
        number; when it is read, also if what it adds is not finite.
    """
    path = Path(path)
    if not isinstance(scale, int | float | np.number) or not math.isfinite(scale):
        raise InputError(f"the scale of {path} must be a finite number, not {scale!r}")
    changes = _read(TensorFile(path), low)
    unseen = [] if config.image_width else sorted(filter(_IMAGE.search, changes))
    if len(unseen) < len(changes):
        changes = {name: terms for name, terms in changes.items() if name not in unseen}
    flat = traverse_util.flatten_dict(params, sep=".")
    for ours, tensor in flat.items():
        source = names.dit(config, ours)
        added = {}
        for layer, theirs in enumerate(source.names):
            shape = source.layout.published(tensor.shape[1:] if source.stacked else tensor.shape)
            terms = changes.pop(theirs, [])
            for term in terms:
                if term.shape not in (shape, (shape[0], math.prod(shape[1:]))):
                    raise InputError(f"{path}: it changes {theirs} as {list(term.shape)}; here it is {list(shape)}")
            if terms:
                added[layer] = partial(_added, path, theirs, terms, shape, source.layout.convert, scale)
        if added:
            flat[ours] = dataclasses.replace(tensor, pieces=partial(_pieces, tensor, added, source.stacked))
    if changes:
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        why = ": it is made for a model that sees an image (Wan 2.1 I2V)" if unseen else ""
        raise InputError(f"{path}: it changes {min(changes)}{more}, which this transformer does not have{why}")
    return traverse_util.unflatten_dict(flat, sep="."), unseen


def _added(
    path: Path, theirs: str, terms: list[_Term], shape: tuple[int, ...], convert: Callable, scale: float
) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        added = (scale * sum(term.read(shape) for term in terms)).astype(np.float32)
    if not np.isfinite(added).all():
        raise InputError(f"{path}: what it adds to {theirs} is not finite")
    return convert(added)


def is_for_both(path: str | Path) -> bool:
    """Whether a file has parts for each of two transformers."""
    return set(_PARTS) <= {_PREFIX.match(name)[1] for name in TensorFile(Path(path)).shapes}


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


def _read(file: TensorFile, low: bool) -> dict[str, list[_Term]]:
    """What is added, by the published name of the tensor."""
    path, mine, other = file.path, _PARTS[low], _PARTS[not low]
    parts = {name: _PREFIX.match(name)[1] for name in file.shapes}
    if mine in parts.values():
        parts = {name: part for name, part in parts.items() if part != other}
    elif other in parts.values() and not low:
        raise InputError(f"{path} is for the second of two transformers: give it as --lora-low to a model that has two")
    found: dict[str, dict[str, str]] = {}
    for name in parts:
        module, role = _split(path, name)
        roles, format = found.setdefault(module, {}), file.formats[name]
        if format not in FORMATS and not (role == "alpha" and _ALPHA_FORMATS.fullmatch(format)):
            raise InputError(f"{path}: {name} is {format}, which cannot be read")
        if role in roles:
            raise InputError(f"{path}: {name} is there twice, under two names")
        roles[role] = name
    if not found:
        raise InputError(f"{path} holds no low-rank adaptation")
    alphas = _alphas(file, mine)
    changes = defaultdict(list)
    for module, roles in found.items():
        weight = module if module.endswith(_TABLES) else f"{module}.weight"
        bias = f"{module}.bias"
        if roles.keys() & {"down", "up", "bias", "alpha"}:
            scale = _scale(file, module, roles, alphas)
            changes[weight].append(_Term(file, scale, (roles["up"], roles["down"])))
            if "bias" in roles:
                changes[bias].append(_Term(file, scale, (roles["bias"],)))
        for role, theirs in (("diff", weight), ("diff_b", bias)):
            if role in roles:
                changes[theirs].append(_Term(file, 1.0, (roles[role],)))
    return changes


def _scale(file: TensorFile, module: str, roles: dict[str, str], alphas: _Alphas) -> float:
    """Of the product of a layer's matrices; the metadata's `alphas` count where the file has none beside them."""
    down, up = (file.shapes.get(roles.get(role), ()) for role in ("down", "up"))
    if len(down) < 2 or len(up) < 2 or not down[0] == math.prod(up[1:]) > 0:
        has = ", ".join(f"{role} {list(file.shapes[name])}" for role, name in roles.items())
        raise InputError(f"{file.path}: {module} needs a lower and an upper matrix of one rank above 0; it has {has}")
    rank = down[0]
    if name := roles.get("alpha"):
        if math.prod(file.shapes[name]) != 1:
            raise InputError(f"{file.path}: {name} has the shape {list(file.shapes[name])}; it must be one number")
        alpha = float(file.read(name).item())
    else:
        alpha = alphas.of(_PREFIX.sub("", roles["down"], count=1).partition(".lora_")[0], rank)
    return alpha / (rank**0.5 if alphas.by_root else rank)


def _alphas(file: TensorFile, part: str) -> _Alphas:
    """Those of one part, where the metadata are of parts; peft writes a file of its own for them."""
    path, beside = file.path, file.path.with_name("adapter_config.json")
    try:
        if path.name == "adapter_model.safetensors" and beside.exists():
            path, config = beside, read_json(beside)
        else:
            config = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
        prefix = next((one for one in (part, *_PARTS) if any(name.startswith(one) for name in config)), "")
        values = {name.removeprefix(prefix): value for name, value in config.items() if name.startswith(prefix)}
        every = None if values.get("lora_alpha") is None else float(values["lora_alpha"])
        named = {name: float(alpha) for name, alpha in (values.get("alpha_pattern") or {}).items()}
        for name, alpha in {"lora_alpha": every or 0, **named}.items():
            if not math.isfinite(alpha):
                raise ValueError(f"{name} is {alpha}")
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: its metadata are damaged: {one_line(error)}") from error
    for name in named:
        if not re.fullmatch(r"\^?[\w.]+", name):  # peft takes any regular expression; matching one may never end
            raise InputError(f"{path}: alpha_pattern has {name!r}; only names of layers and their ends can be read")
    return _Alphas(every, named, bool(values.get("use_rslora")))


def _split(path: Path, name: str) -> tuple[str, str]:
    """The published name of the layer, or of the table, that a tensor of the file belongs to, and its role there."""
    plain = _PREFIX.sub("", name, count=1).replace(".default.", ".").replace(".diff_m", ".modulation.diff")
    suffix = next((suffix for suffix in _ROLES if plain.endswith(f".{suffix}")), None)
    if suffix is None:
        raise InputError(f"{path}: {name} is no part of a low-rank adaptation that can be read")
    module = plain.removesuffix(f".{suffix}")
    if module.startswith("lora_unet_"):
        module = re.sub(r"^lora_unet_+", "", module)
        module = re.sub(r"^blocks_(\d+)_", r"blocks.\1.", module)
        dotted = "self_attn|cross_attn|ffn|text_embedding|time_embedding|time_projection|head|img_emb|proj"
        module = re.sub(f"({dotted})_", r"\1.", module)
    for pattern, ours in _WAN_NAMES:
        module = re.sub(pattern, ours, module)
    return module, _ROLES[suffix]
