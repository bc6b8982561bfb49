"""The names that published checkpoints give to our parameters, and how their tensors are laid out.

`text`, `codec`, `dit` and `vision` map the name of each parameter to its `Source`. The published classes are
`UMT5EncoderModel`, `AutoencoderKLWan`, `WanTransformer3DModel` and `CLIPVisionModel`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sora_jax.codec import CodecConfig
from sora_jax.dit import DiTConfig
from sora_jax.vision import VisionConfig


class Layout(NamedTuple):
    """How a published tensor lies: what makes a parameter of ours of it, and its shape, from that of the parameter."""

    convert: Callable
    published: Callable


class Source(NamedTuple):
    """Where a parameter comes from: the tensor of that name, or one tensor for each layer, stacked."""

    names: tuple[str, ...]
    stacked: bool
    layout: Layout  # of one published tensor, and (that layer of) our parameter


AS_IS = Layout(lambda x: x, lambda shape: shape)
_FIRST = Layout(lambda x: x[0], lambda shape: (1, *shape))
_LINEAR = Layout(lambda x: x.transpose(1, 0), lambda shape: shape[::-1])  # (out, in) -> (in, out)
# (out, in, time, rows, columns) -> (time, rows, columns, in, out)
_CONVOLUTION = Layout(lambda x: x.transpose(2, 3, 4, 1, 0), lambda shape: (*shape[:2:-1], *shape[:3]))
# (out, in, rows, columns) -> (1, rows, columns, in, out)
_CONVOLUTION_2D = Layout(lambda x: x.transpose(2, 3, 1, 0)[None], lambda shape: (*shape[:2:-1], *shape[1:3]))
_POINTWISE = Layout(lambda x: x[:, :, 0, 0].transpose(1, 0), lambda shape: (*shape[::-1], 1, 1))  # likewise, 1 x 1


def _scale(axes):
    """(channels, 1, ..., 1) -> (channels)."""
    return Layout(lambda x: x.reshape(-1), lambda shape: shape + (1,) * axes)


def _patches(channels, *patch):
    """(width, channels, ...) with the axes of a patch -> (numbers of a patch, channels last; width)."""

    def convert(x):
        return x.transpose(*range(2, x.ndim), 1, 0).reshape(-1, x.shape[0])

    return Layout(convert, lambda shape: (shape[-1], channels, *patch))


def _order_of_halves(width, head_width):
    """Rotary pairs (2i, 2i + 1) of every head to (i, i + E/2)."""
    return np.arange(width).reshape(-1, head_width // 2, 2).swapaxes(1, 2).reshape(-1)


def _halves(layout, head_width):
    """The same, with the halves of each head in the place of its pairs."""
    return layout._replace(convert=lambda x: layout.convert(x[_order_of_halves(len(x), head_width)]))


_DIT = {
    "patches_in": "patch_embedding",
    "patches_out": "proj_out",
    "level_in": "condition_embedder.time_embedder.linear_1",
    "level_out": "condition_embedder.time_embedder.linear_2",
    "level_modulation": "condition_embedder.time_proj",
    "text_in": "condition_embedder.text_embedder.linear_1",
    "text_out": "condition_embedder.text_embedder.linear_2",
    "modulation_out": "scale_shift_table",
    "image.positions": "condition_embedder.image_embedder.pos_embed",
    "image.norm_in": "condition_embedder.image_embedder.norm1",
    "image.up": "condition_embedder.image_embedder.ff.net.0.proj",
    "image.down": "condition_embedder.image_embedder.ff.net.2",
    "image.norm_out": "condition_embedder.image_embedder.norm2",
    "blocks.modulation": "blocks.{}.scale_shift_table",
    "blocks.self_attention": "blocks.{}.attn1",
    "blocks.cross_attention": "blocks.{}.attn2",
    "blocks.cross_norm": "blocks.{}.norm2",
    "blocks.up": "blocks.{}.ffn.net.0.proj",
    "blocks.down": "blocks.{}.ffn.net.2",
}
_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "query_norm": "norm_q",
    "key_norm": "norm_k",
    "image_key": "add_k_proj",
    "image_value": "add_v_proj",
    "image_key_norm": "norm_added_k",
}
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias", "table": "weight"}


def dit(config: DiTConfig, name: str) -> Source:
    """The source of the DiT's parameter `name`, path joined by "."."""
    prefix = max((p for p in _DIT if name == p or name.startswith(p + ".")), key=len)
    parts = name[len(prefix) :].split(".")[1:]
    if parts:
        *module, leaf = parts
        parts = [_ATTENTION[part] for part in module] + [_LEAF[leaf]]
    theirs = ".".join([_DIT[prefix], *parts])
    turned = re.match(r"blocks\.self_attention\.(query|key)", name) is not None
    if theirs == "patch_embedding.weight":
        layout = _patches(config.latent_channels + config.condition_channels, *config.patch)
    elif name.endswith("kernel"):
        layout = _LINEAR
    else:  # the tables of modulation and positions have a leading axis of one
        layout = AS_IS if parts else _FIRST
    return _source(theirs, config.layers, _halves(layout, config.head_width) if turned else layout)


_TEXT = {
    "embedding": "shared.weight",
    "norm.scale": "encoder.final_layer_norm.weight",
    "blocks.positions.table": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight",
    "blocks.attention_norm.scale": "encoder.block.{}.layer.0.layer_norm.weight",
    "blocks.query.kernel": "encoder.block.{}.layer.0.SelfAttention.q.weight",
    "blocks.key.kernel": "encoder.block.{}.layer.0.SelfAttention.k.weight",
    "blocks.value.kernel": "encoder.block.{}.layer.0.SelfAttention.v.weight",
    "blocks.out.kernel": "encoder.block.{}.layer.0.SelfAttention.o.weight",
    "blocks.feed_forward_norm.scale": "encoder.block.{}.layer.1.layer_norm.weight",
    "blocks.gate.kernel": "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight",
    "blocks.up.kernel": "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight",
    "blocks.down.kernel": "encoder.block.{}.layer.1.DenseReluDense.wo.weight",
}
TEXT_COPIES = {"encoder.embed_tokens.weight": "shared.weight"}  # the embedding once more, or in place of it


def text(layers: int, name: str) -> Source:
    """The source of the text encoder's parameter `name`."""
    return _source(_TEXT[name], layers, _LINEAR if name.endswith("kernel") else AS_IS)


_VISION = {
    "class": "embeddings.class_embedding",
    "patches_kernel": "embeddings.patch_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    "norm_in": "pre_layrnorm",
    "blocks.attention_norm": "encoder.layers.{}.layer_norm1",
    "blocks.query": "encoder.layers.{}.self_attn.q_proj",
    "blocks.key": "encoder.layers.{}.self_attn.k_proj",
    "blocks.value": "encoder.layers.{}.self_attn.v_proj",
    "blocks.out": "encoder.layers.{}.self_attn.out_proj",
    "blocks.feed_forward_norm": "encoder.layers.{}.layer_norm2",
    "blocks.up": "encoder.layers.{}.mlp.fc1",
    "blocks.down": "encoder.layers.{}.mlp.fc2",
}


def vision(config: VisionConfig, name: str) -> Source:
    """The source of the image encoder's parameter `name`."""
    if name in _VISION:
        layout = _patches(3, config.patch, config.patch) if name == "patches_kernel" else AS_IS
        return _source(_VISION[name], config.layers, layout)
    module, leaf = name.rsplit(".", 1)
    return _source(f"{_VISION[module]}.{_LEAF[leaf]}", config.layers, _LINEAR if leaf == "kernel" else AS_IS)


def is_after_vision(layers: int, name: str) -> bool:
    """Whether the published image encoder needs this tensor only for what comes after the features."""
    after = ("post_layernorm.", "visual_projection.", f"encoder.layers.{layers}.")
    return name.startswith(after)


def codec(config: CodecConfig, name: str) -> Source:
    """The source of the codec's parameter `name`."""
    *path, leaf = name.split(".")
    theirs = ".".join(_codec_module(config, path, leaf.startswith("time_")))
    leaf = leaf.removeprefix("time_")
    if leaf == "scale":
        return _source(f"{theirs}.gamma", 0, _scale(2 if "attention" in path else 3))
    if leaf == "bias":
        return _source(f"{theirs}.bias", 0, AS_IS)
    is_2d = path[-1].endswith(("_up", "_down")) and not theirs.endswith("time_conv")
    layout = _POINTWISE if "attention" in path else _CONVOLUTION_2D if is_2d else _CONVOLUTION
    return _source(f"{theirs}.weight", 0, layout)


def _codec_module(config: CodecConfig, path: list[str], time: bool) -> list[str]:
    if path[0] in ("quant", "post_quant"):
        return [f"{path[0]}_conv"]
    half, *rest = path
    if rest[0] == "middle":
        part = {"block0": "resnets.0", "block1": "resnets.1", "attention": "attentions.0"}[rest[1]]
        last = {"qkv": "to_qkv", "out": "proj"}
        return [half, "mid_block", part, *(last.get(name, name) for name in rest[2:])]
    found = re.fullmatch(r"level(\d+)_(up|down|block(\d+))", rest[0])
    if not found:
        return path  # conv_in, conv_out, norm_out
    level, kind, block = int(found[1]), found[2], int(found[3] or 0)
    inner = ["conv_shortcut" if name == "shortcut" else name for name in rest[1:]]
    resample = ["time_conv"] if time else ["resample", "1"]
    if half == "decoder":
        if kind == "up":
            return [half, f"up_blocks.{level}", "upsampler" if config.residual else "upsamplers.0", *resample]
        return [half, f"up_blocks.{level}", f"resnets.{block}", *inner]
    if config.residual:
        if kind == "down":
            return [half, f"down_blocks.{level}", "downsampler", *resample]
        return [half, f"down_blocks.{level}", f"resnets.{block}", *inner]
    # Wan 2.1 counts the residual blocks and downsamplings of all levels in one list.
    number = level * (config.blocks + 1) + (config.blocks if kind == "down" else block)
    return [half, f"down_blocks.{number}", *(resample if kind == "down" else inner)]


def _source(theirs: str, layers: int, layout: Layout) -> Source:
    if "{}" in theirs:
        return Source(tuple(theirs.format(layer) for layer in range(layers)), True, layout)
    return Source((theirs,), False, layout)
