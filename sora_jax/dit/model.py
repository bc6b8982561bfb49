"""The diffusion transformer: spacetime patches of noisy latents in, velocity out.

    latents -> patches -> [ self-attention, cross-attention to the text, feed-forward ] x layers -> patches -> velocity

Every patch attends to every other across space and time. The noise level, one per latent frame, modulates each
block. The structure is that of Wan 2.1 and 2.2 (arXiv:2503.20314, published as `WanTransformer3DModel`), which
descends from DiT (arXiv:2212.09748).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sora_jax.dit.positions import rotary_angles, rotate
from sora_jax.mesh import constrain

REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the diffusion transformer.

    Attributes:
      latent_channels: Z of the latents, in and out.
      heads, head_width: K, E; the width D is K * E.
      feed_forward: M.
      layers: number of blocks.
      text_width: width of the text features.
      patch: (frames, rows, columns) of latents per token.
      frequency_width: sinusoids that describe the noise level.
      epsilon: of the norms.
      remat: what the backward pass keeps, a name in `REMAT_POLICIES`.
      condition_channels: channels beside the latents that say which frames are given and what they show (Wan's
        image-to-video); they are read and not written.
      image_width: width of the features of an image that are attended to beside the text; 0 if there are none.
      image_positions: a learned position for each of so many image features (first and last frame); 0 for none.
    """

    latent_channels: int
    heads: int
    head_width: int
    feed_forward: int
    layers: int
    text_width: int
    patch: tuple[int, int, int] = (1, 2, 2)
    frequency_width: int = 256
    epsilon: float = 1e-6
    remat: str = "none"
    condition_channels: int = 0
    image_width: int = 0
    image_positions: int = 0

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; it can be {', '.join(REMAT_POLICIES)}")
        if self.patch[0] != 1:
            raise ValueError("a patch spans one latent frame: the noise level is given per frame")

    @property
    def width(self) -> int:
        """D."""
        return self.heads * self.head_width


class Modulation(NamedTuple):
    """What the noise level does to one branch of a block; each (B, F, 1, D) float32."""

    shift: jax.Array
    scale: jax.Array
    gate: jax.Array | None = None


def modulate(x_BFSD: jax.Array, modulation: Modulation) -> jax.Array:
    """The output of a layer norm, scaled and shifted frame by frame (S tokens in each)."""
    return x_BFSD * (1 + modulation.scale) + modulation.shift


def layer_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """Zero mean and unit variance over the width, float32, nothing learned."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def level_features(level: jax.Array, width: int) -> jax.Array:
    """Sinusoids of 1000 * level: (...) -> (..., width), cosines first (as in DDPM, arXiv:2006.11239)."""
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(width // 2) / (width // 2))
    angle = 1000.0 * level.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def dense(features: int, axes: tuple, name: str, dtype=jnp.float32, init=None) -> nn.Dense:
    """A dense layer whose kernel carries the logical names `axes`."""
    init = init or nn.initializers.xavier_uniform()
    return nn.Dense(
        features,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-1:]),
        dtype=dtype,
        name=name,
    )


def affine_norm(epsilon: float, name: str) -> nn.LayerNorm:
    """A layer norm with a learned scale and bias."""
    return nn.LayerNorm(
        epsilon,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (None,)),
        name=name,
    )


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the whole width, computed in float32."""

    epsilon: float
    axis: str = "heads"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon) * scale).astype(x.dtype)


def attend(q_BNKE: jax.Array, k_BLKE: jax.Array, v_BLKE: jax.Array, block: int = 1024) -> jax.Array:
    """Softmax attention, (B, N, K, E); many queries go in blocks, so that memory is linear in their number."""
    B, N, K, E = q_BNKE.shape
    if N <= 2 * block:
        return jax.nn.dot_product_attention(q_BNKE, k_BLKE, v_BLKE)
    blocks = -(-N // block)
    q = jnp.pad(q_BNKE, ((0, 0), (0, blocks * block - N), (0, 0), (0, 0))).reshape(B, blocks, block, K, E)
    # Scores are computed again on the way back: keeping them is what the blocks avoid.
    one = jax.checkpoint(lambda q: jax.nn.dot_product_attention(q, k_BLKE, v_BLKE))
    out = jax.lax.map(one, q.swapaxes(0, 1)).swapaxes(0, 1)
    return out.reshape(B, blocks * block, K, E)[:, :N]


class Attention(nn.Module):
    """Multi-head attention of `x` to `context`, queries and keys RMS-normed, and turned if angles are given.

    An `image` is a second context with keys and values of its own; what the queries find in both is added.
    """

    config: DiTConfig
    out_init: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BND: jax.Array,
        context_BLD: jax.Array,
        angles_NE: jax.Array | None = None,
        image_BLD: jax.Array | None = None,
    ) -> jax.Array:
        config, into = self.config, ("width", "heads")

        def heads(y):
            return y.reshape(*y.shape[:-1], config.heads, config.head_width)

        def keys_and_values(context, key, value):
            k = RMSNorm(config.epsilon, name=f"{key}_norm")(dense(config.width, into, key, self.dtype)(context))
            return heads(k), heads(dense(config.width, into, value, self.dtype)(context))

        q = heads(RMSNorm(config.epsilon, name="query_norm")(dense(config.width, into, "query", self.dtype)(x_BND)))
        k, v = keys_and_values(context_BLD, "key", "value")
        if angles_NE is not None:
            q, k = rotate(q, angles_NE), rotate(k, angles_NE)
        out_BNKE = attend(q, k, v)
        if image_BLD is not None:
            out_BNKE += attend(q, *keys_and_values(image_BLD, "image_key", "image_value"))
        return dense(config.width, ("heads", "width"), "out", self.dtype, self.out_init)(out_BNKE.reshape(x_BND.shape))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward. The residual stream and the modulation are float32."""

    config: DiTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BND, level_BF6D, text_BLD, angles_NE, image_BLD=None):
        config, dtype = self.config, self.dtype
        B, N, D = x_BND.shape
        F = level_BF6D.shape[1]

        def by_frame(x):
            return x.reshape(B, F, N // F, D)

        def by_token(x):
            return constrain(x.reshape(B, N, D), "batch", "tokens", None)

        # Gates come from zero-initialised parameters (and so do the outputs of the one branch without a gate): a
        # fresh block is the identity.
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, None))
        table = self.param("modulation", init, (6, D))
        parts = jnp.moveaxis(level_BF6D + table, 2, 0)[:, :, :, None]
        attention, feed_forward = Modulation(*parts[:3]), Modulation(*parts[3:])

        h = by_token(modulate(by_frame(layer_norm(x_BND, config.epsilon)), attention)).astype(dtype)
        h = Attention(config, nn.initializers.xavier_uniform(), dtype, name="self_attention")(h, h, angles_NE)
        x_BND += by_token(by_frame(h.astype(jnp.float32)) * attention.gate)

        cross_attention = Attention(config, nn.initializers.zeros, dtype, name="cross_attention")
        h = affine_norm(config.epsilon, "cross_norm")(x_BND).astype(dtype)
        h = cross_attention(h, text_BLD, image_BLD=image_BLD)
        x_BND += h.astype(jnp.float32)

        h = by_token(modulate(by_frame(layer_norm(x_BND, config.epsilon)), feed_forward)).astype(dtype)
        h = dense(config.feed_forward, ("width", "feed_forward"), "up", dtype)(h)
        h = dense(D, ("feed_forward", "width"), "down", dtype)(nn.gelu(h, approximate=True))
        x_BND += by_token(by_frame(h.astype(jnp.float32)) * feed_forward.gate)
        self.sow("intermediates", "tokens", x_BND)  # kept only for those who ask
        return x_BND, None


class ImageEmbedding(nn.Module):
    """Features of one or two images to the width of the DiT: (B, L, image_width) -> (B, L, D)."""

    config: DiTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image_BLD: jax.Array) -> jax.Array:
        config = self.config
        if config.image_positions:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None, None))
            image_BLD += self.param("positions", init, (config.image_positions, config.image_width))

        norm_in = affine_norm(1e-5, "norm_in")(image_BLD)
        h = dense(config.image_width, (None, None), "up", self.dtype)(norm_in.astype(self.dtype))
        h = dense(config.width, (None, "width"), "down", self.dtype)(nn.gelu(h, approximate=False))
        return affine_norm(1e-5, "norm_out")(h.astype(jnp.float32)).astype(self.dtype)


class DiT(nn.Module):
    """Noisy latents, the noise level of each latent frame, and text features to the velocity.

    Call: (latents_BFYXZ float32, level_BF float32 in [0, 1], text_BLD) -> velocity_BFYXZ float32. Configurations that
    ask for them also take condition_BFYXC, C being `condition_channels`, and image_BLD, D being `image_width`.
    Y and X are multiples of the patch. The text is not masked: padding is zeros, as Wan has it. Applied with
    `mutable=["intermediates"]` it also gives the tokens after each block, (layers, B, N, D).
    """

    config: DiTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        latents_BFYXZ: jax.Array,
        level_BF: jax.Array,
        text_BLD: jax.Array,
        condition_BFYXC: jax.Array | None = None,
        image_BLD: jax.Array | None = None,
    ) -> jax.Array:
        config, dtype = self.config, self.dtype
        B, F, Y, X, Z = latents_BFYXZ.shape
        _, py, px = config.patch
        rows, columns, D = Y // py, X // px, config.width

        if config.condition_channels:
            latents_BFYXZ = jnp.concatenate([latents_BFYXZ, condition_BFYXC], axis=-1)
        patches = latents_BFYXZ.reshape(B, F, rows, py, columns, px, -1).transpose(0, 1, 2, 4, 3, 5, 6)
        x_BND = dense(D, (None, "width"), "patches_in")(patches.reshape(B, F * rows * columns, -1))
        x_BND = constrain(x_BND, "batch", "tokens", None)

        normal = nn.initializers.normal(0.02)
        level = dense(D, (None, "width"), "level_in", init=normal)(level_features(level_BF, config.frequency_width))
        level_BFD = dense(D, ("width", None), "level_out", init=normal)(nn.silu(level))
        level_BF6D = dense(6 * D, ("width", None), "level_modulation", init=nn.initializers.zeros)(nn.silu(level_BFD))
        level_BF6D = level_BF6D.reshape(B, F, 6, D)

        text = dense(D, (None, "width"), "text_in", dtype)(text_BLD.astype(dtype))
        text_BLD = dense(D, ("width", None), "text_out", dtype)(nn.gelu(text, approximate=True))
        image_BLD = ImageEmbedding(config, dtype, name="image")(image_BLD) if config.image_width else None

        blocks = nn.scan(
            nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * 4,
            length=config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        angles = jnp.asarray(rotary_angles(F, rows, columns, config.head_width))
        x_BND, _ = blocks(config, dtype, name="blocks")(x_BND, level_BF6D, text_BLD, angles, image_BLD)

        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, None))
        table = self.param("modulation_out", init, (2, D))
        shift, scale = jnp.split(table + level_BFD[:, :, None], 2, axis=2)
        x = modulate(layer_norm(x_BND, config.epsilon).reshape(B, F, -1, D), Modulation(shift, scale))
        x = dense(py * px * Z, ("width", None), "patches_out", init=nn.initializers.zeros)(x)
        x = x.reshape(B, F, rows, columns, py, px, Z).transpose(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(B, F, Y, X, Z)
