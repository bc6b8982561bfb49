"""The encoder of the T5 family (arXiv:1910.10683; UMT5, arXiv:2304.09151), as Wan uses it to read prompts.

RMS norms without bias, no biases anywhere, relative position buckets, a gated feed-forward with GELU, and no scaling
of the attention scores: the initialisation of the queries stands in for it.
"""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.layers import Dense, RMSNorm, check_sizes
from sora_jax.text.tokenizer import PAD


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder.

    Attributes:
      vocabulary_size: number of token ids.
      width: D. heads, head_width: K, E (K * E need not be D). feed_forward: M.
      layers: number of blocks.
      length: L, tokens per prompt; shorter ones are padded.
      buckets, max_distance: relative positions; half the buckets look back, half ahead.
      shared_positions: one table of position biases for all blocks (T5), or one per block (UMT5).
      tokenizer: "bytes", or "file": the tokenizer.json beside the parameters.
    """

    vocabulary_size: int
    width: int
    heads: int
    head_width: int
    feed_forward: int
    layers: int
    length: int
    buckets: int = 32
    max_distance: int = 128
    shared_positions: bool = False
    tokenizer: str = "bytes"

    def __post_init__(self):
        check_sizes(self, "vocabulary_size", "width", "heads", "head_width", "feed_forward", "layers", "length")
        if self.tokenizer not in ("bytes", "file"):
            raise ValueError(f"tokenizer is {self.tokenizer!r}; it can be 'bytes' or 'file'")


def position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each (query, key) pair, (L, L) int32: exact when near, logarithmic when far."""
    offset_LL = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    distance_LL = np.abs(offset_LL)
    far_LL = exact + np.log(np.maximum(distance_LL, 1) / exact) / math.log(max_distance / exact) * (half - exact)
    far_LL = np.minimum(far_LL.astype(np.int32), half - 1)
    return np.where(distance_LL < exact, distance_LL, far_LL) + half * (offset_LL > 0)


class PositionBias(nn.Module):
    """A learned bias per head and bucket: (K, L, L) float32."""

    config: TextConfig

    @nn.compact
    def __call__(self, length: int) -> jax.Array:
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.1), (None, "heads"))
        table = self.param("table", init, (config.buckets, config.heads))
        return table[position_buckets(length, config.buckets, config.max_distance)].transpose(2, 0, 1)


class EncoderBlock(nn.Module):
    """Self-attention, then the gated feed-forward, each added to its input."""

    config: TextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask_B11L: jax.Array, shared_bias: jax.Array | None):
        config = self.config
        D, M, inner = config.width, config.feed_forward, config.heads * config.head_width
        B, L, _ = x_BLD.shape

        def dense(features, axes, std, name):
            return Dense(features, axes, self.dtype, nn.initializers.normal(std), use_bias=False, name=name)

        into, out_of = ("width", "heads"), ("heads", "width")
        bias_KLL = PositionBias(config, name="positions")(L) if shared_bias is None else shared_bias
        h = RMSNorm(name="attention_norm")(x_BLD)
        q = dense(inner, into, (D * config.head_width) ** -0.5, "query")(h)
        k = dense(inner, into, D**-0.5, "key")(h)
        v = dense(inner, into, D**-0.5, "value")(h)
        q, k, v = (y.reshape(B, L, config.heads, config.head_width) for y in (q, k, v))
        h = jax.nn.dot_product_attention(q, k, v, bias=bias_KLL[None].astype(q.dtype), mask=mask_B11L, scale=1.0)
        x_BLD += dense(D, out_of, inner**-0.5, "out")(h.reshape(B, L, inner))

        h = RMSNorm(name="feed_forward_norm")(x_BLD)
        gate = nn.gelu(dense(M, ("width", "feed_forward"), D**-0.5, "gate")(h), approximate=True)
        h = gate * dense(M, ("width", "feed_forward"), D**-0.5, "up")(h)
        return x_BLD + dense(D, ("feed_forward", "width"), M**-0.5, "down")(h), None


class T5Encoder(nn.Module):
    """Token ids (B, L) int32, padded with 0, to features (B, L, D) float32 that are zero at the padding.

    Only zeros at the end of a row are padding: a prompt may hold the token itself, and it is read like others.
    """

    config: TextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "width"))
        table = self.param("embedding", init, (config.vocabulary_size, config.width))
        mask_BL = jax.lax.cummax(ids_BL, axis=1, reverse=True) != PAD  # true of what anything but padding follows
        shared = PositionBias(config, name="positions")(ids_BL.shape[1]) if config.shared_positions else None
        blocks = nn.scan(
            EncoderBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BLD, _ = blocks(config, self.dtype, name="blocks")(
            table[ids_BL].astype(self.dtype), mask_BL[:, None, None, :], shared
        )
        return RMSNorm(name="norm")(x_BLD).astype(jnp.float32) * mask_BL[:, :, None]
