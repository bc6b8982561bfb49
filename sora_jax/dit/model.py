"""The diffusion transformer: spacetime patches of noisy latents in, velocity out.

    latents -> patches -> [ self-attention, cross-attention to the text, feed-forward ] x layers -> patches -> velocity

Every patch attends to every other across space and time. The noise level, one per latent frame, modulates each
block. The structure is that of Wan 2.1 and 2.2 (arXiv:2503.20314, published as `WanTransformer3DModel`), which
descends from DiT (arXiv:2212.09748).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sora_jax import mesh as mesh_lib
from sora_jax.attention import cross_attention, heads_first, heads_last, self_attention
from sora_jax.dit.positions import rotary_angles, rotate
from sora_jax.layers import Dense, LayerNorm, RMSNorm, check_sizes, layer_norm

# What the backward pass finds of a block and does not compute again: everything, what products without a batch
# dimension gave, the tokens that went in ("full"), or those, in the host's memory meanwhile ("offload").
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["tokens"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
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
        check_sizes(self, "latent_channels", "heads", "head_width", "feed_forward", "layers", "text_width", "patch")
        if self.head_width % 2 or self.head_width < 6:
            raise ValueError(
                f"head_width is {self.head_width}; it must be even and at least 6: rotary positions turn pairs of "
                "channels, by time, row and column"
            )
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


def level_features(level: jax.Array, width: int) -> jax.Array:
    """Sinusoids of 1000 * level: (...) -> (..., width), cosines first (as in DDPM, arXiv:2006.11239)."""
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(width // 2) / (width // 2))
    angle = 1000.0 * level.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Attention(nn.Module):
    """Multi-head attention of the tokens to a context, queries and keys RMS-normed.

    With angles (see `positions.py`) the context is the tokens themselves, and both are turned. An `image` is a second
    context with keys and values of its own; what the queries find in both is added.
    """

    config: DiTConfig
    init: Any
    dtype: Any = jnp.float32
    kernel: str = "auto"

    @nn.compact
    def __call__(
        self,
        x_BFSD: jax.Array,
        context: jax.Array,
        angles: tuple | None = None,
        image_BLD: jax.Array | None = None,
        tokens: int | None = None,
    ) -> jax.Array:
        config, into = self.config, ("width", "heads")

        def heads(y):
            if y.ndim == 4:
                return heads_first(y, config.heads)
            return y.reshape(*y.shape[:-1], config.heads, config.head_width).swapaxes(1, 2)

        def normed(x, name):
            y = Dense(config.width, into, self.dtype, name=name)(x)
            return heads(RMSNorm(config.epsilon, "heads", name=f"{name}_norm")(y))

        def value(x, name):
            return heads(Dense(config.width, into, self.dtype, name=name)(x))

        q, k, v = normed(x_BFSD, "query"), normed(context, "key"), value(context, "value")
        if angles is not None:
            out_BKFSE = self_attention(rotate(q, angles), rotate(k, angles), v, tokens, self.kernel)
        else:
            out_BKFSE = cross_attention(q, k, v, self.kernel)
        if image_BLD is not None:
            k, v = normed(image_BLD, "image_key"), value(image_BLD, "image_value")
            out_BKFSE += cross_attention(q, k, v, self.kernel)
        out = Dense(config.width, ("heads", "width"), self.dtype, self.init, name="out")
        return out(heads_last(out_BKFSE))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward. Norms, modulation and sums are computed in float32."""

    config: DiTConfig
    dtype: Any = jnp.float32
    kernel: str = "auto"
    tokens: int | None = None  # of the S in a frame; the others only fill up

    @nn.compact
    def __call__(self, x_BFSD, level_BF6D, text_BLD, angles, image_BLD=None):
        config, dtype, D = self.config, self.dtype, x_BFSD.shape[-1]
        x_BFSD = checkpoint_name(x_BFSD, "tokens")  # for the remat policy "offload"

        # Gates come from zero-initialised parameters (and so do the outputs of the one branch without a gate): a
        # fresh block is the identity.
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, None))
        table = self.param("modulation", init, (6, D))
        parts = jnp.moveaxis(level_BF6D + table, 2, 0)[:, :, :, None]
        attention, feed_forward = Modulation(*parts[:3]), Modulation(*parts[3:])

        def add(x_BFSD, h_BFSD, gate=1.0):
            return by_tokens((x_BFSD.astype(jnp.float32) + h_BFSD.astype(jnp.float32) * gate).astype(dtype))

        h = modulate(layer_norm(x_BFSD, config.epsilon), attention).astype(dtype)
        attend = Attention(config, nn.initializers.xavier_uniform(), dtype, self.kernel, name="self_attention")
        x_BFSD = add(x_BFSD, attend(h, h, angles, tokens=self.tokens), attention.gate)

        h = LayerNorm(config.epsilon, name="cross_norm")(x_BFSD).astype(dtype)
        attend = Attention(config, nn.initializers.zeros, dtype, self.kernel, name="cross_attention")
        x_BFSD = add(x_BFSD, attend(h, text_BLD, image_BLD=image_BLD))

        h = modulate(layer_norm(x_BFSD, config.epsilon), feed_forward).astype(dtype)
        h = Dense(config.feed_forward, ("width", "feed_forward"), dtype, name="up")(h)
        h = Dense(D, ("feed_forward", "width"), dtype, name="down")(nn.gelu(h, approximate=True))
        return add(x_BFSD, h, feed_forward.gate)


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

        h = LayerNorm(1e-5, name="norm_in")(image_BLD).astype(self.dtype)
        h = nn.gelu(Dense(config.image_width, (None, None), self.dtype, name="up")(h), approximate=False)
        h = Dense(config.width, (None, "width"), self.dtype, name="down")(h)
        return LayerNorm(1e-5, name="norm_out")(h).astype(self.dtype)


class DiT(nn.Module):
    """Noisy latents, the noise level of each latent frame, and text features to the velocity.

    Call: (latents_BFYXZ float32, level_BF float32 in [0, 1], text_BLD) -> velocity_BFYXZ float32. Configurations that
    ask for them also take condition_BFYXC, C being `condition_channels`, and image_BLD, D being `image_width`.
    Y and X are multiples of the patch. The text is not masked: padding is zeros, as Wan has it.

    Attributes:
      dtype: of the large products.
      kernel: of attention (see `attention.py`).
      keep_after: after so many blocks, 1 to `layers`, the tokens (B, F, S, D) are kept as "tokens" of the collection
        "intermediates", for those who ask for it; 0 keeps none.
    """

    config: DiTConfig
    dtype: Any = jnp.float32
    kernel: str = "auto"
    keep_after: int = 0

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
        x_BFSC = patches.reshape(B, F, rows * columns, -1)
        # Each device of the mesh gets the same number of tokens of a frame.
        tokens, fill = rows * columns, -(rows * columns) % mesh_lib.shares("tokens")
        x_BFSC = by_tokens(jnp.pad(x_BFSC, ((0, 0), (0, 0), (0, fill), (0, 0))))
        x_BFSD = by_tokens(Dense(D, (None, "width"), name="patches_in")(x_BFSC).astype(dtype))
        time_FE, space_SE = rotary_angles(F, rows, columns, config.head_width)
        angles = (time_FE, np.pad(space_SE, ((0, fill), (0, 0))))

        # In float32 on every platform, as the published pipelines keep it: all else is scaled by what comes out.
        dense, normal = partial(Dense, precision="highest"), nn.initializers.normal(0.02)
        level = level_features(level_BF, config.frequency_width)
        level = dense(D, (None, "width"), init=normal, name="level_in")(level)
        level_BFD = dense(D, ("width", None), init=normal, name="level_out")(nn.silu(level))
        modulation = dense(6 * D, ("width", None), init=nn.initializers.zeros, name="level_modulation")
        level_BF6D = modulation(nn.silu(level_BFD)).reshape(B, F, 6, D)

        text = Dense(D, (None, "width"), dtype, name="text_in")(text_BLD)
        text_BLD = Dense(D, ("width", None), dtype, name="text_out")(nn.gelu(text, approximate=True))
        image_BLD = ImageEmbedding(config, dtype, name="image")(image_BLD) if config.image_width else None

        def step(block, carry, number, *given):
            x_BFSD, kept_BFSD = carry
            x_BFSD = block(x_BFSD, *given)
            if self.keep_after:  # outside of what the backward pass computes again: one array for all blocks
                kept_BFSD = jnp.where(number == self.keep_after, x_BFSD, kept_BFSD)
            return (x_BFSD, kept_BFSD), None

        block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        scan = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 4),
            length=config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        carry = x_BFSD, x_BFSD if self.keep_after else None
        numbers = jnp.arange(1, config.layers + 1)
        block = block(config, dtype, self.kernel, tokens, name="blocks")
        (x_BFSD, kept_BFSD), _ = scan(block, carry, numbers, level_BF6D, text_BLD, angles, image_BLD)
        if self.keep_after:
            self.sow("intermediates", "tokens", kept_BFSD)

        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, None))
        table = self.param("modulation_out", init, (2, D))
        shift, scale = jnp.split(table + level_BFD[:, :, None], 2, axis=2)
        x = modulate(layer_norm(x_BFSD, config.epsilon), Modulation(shift, scale))
        x = Dense(py * px * Z, ("width", None), init=nn.initializers.zeros, name="patches_out")(x)
        x = x[:, :, :tokens].reshape(B, F, rows, columns, py, px, Z).transpose(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(B, F, Y, X, Z)


def by_tokens(x_BFSD: jax.Array) -> jax.Array:
    """Each device has its tokens of every frame."""
    return mesh_lib.constrain(x_BFSD, "batch", None, "tokens", None)
