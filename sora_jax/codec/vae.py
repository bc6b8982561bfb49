"""The codec: a causal 3-D VAE after Wan 2.1 and 2.2. The first frame is coded alone, then groups of four.

    video_BTHWC in [-1, 1] --encode--> latents_BFYXZ, about unit variance per channel --decode--> video_BTHWC

With stride 4 in time, 1 + 4k frames become 1 + k latent frames; an image is a one-frame video.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sora_jax.codec import layers
from sora_jax.layers import check_sizes


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of the codec.

    Attributes:
      latent_channels: Z.
      width: channels of the first encoder level.
      decoder_width: the same for the decoder's last level.
      multipliers: width of each level as a multiple of `width`; one spatial halving between levels.
      downsample_time: for each of those halvings, whether it also halves time.
      blocks: residual blocks per encoder level (the decoder has one more).
      patch: side of the pixel patches folded into channels before the first convolution.
      residual: the shortcuts of the Wan 2.2 codec around each level.
      latents_mean, latents_std: per-channel statistics that `encode` removes and `decode` restores.
    """

    latent_channels: int
    width: int
    decoder_width: int
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    downsample_time: tuple[bool, ...] = (False, True, True)
    blocks: int = 2
    patch: int = 1
    residual: bool = False
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    def __post_init__(self):
        check_sizes(self, "latent_channels", "width", "decoder_width", "multipliers", "blocks", "patch")
        if len(self.downsample_time) != len(self.multipliers) - 1:
            raise ValueError("downsample_time needs one entry for each step between two multipliers")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise ValueError(f"{name} needs {self.latent_channels} entries, or none")
            if not all(map(math.isfinite, getattr(self, name))):
                raise ValueError(f"{name} must be finite numbers")
        if min(self.latents_std, default=1.0) <= 0:
            raise ValueError("latents_std must be above 0")

    @property
    def stride_time(self) -> int:
        """Pixel frames per latent frame, after the first."""
        return 2 ** sum(self.downsample_time)

    @property
    def stride_space(self) -> int:
        """Pixels per latent position, along rows and along columns."""
        return self.patch * 2 ** len(self.downsample_time)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, Y, X, Z) of a video of 1 + stride_time * k frames."""
        stride = self.stride_space
        return 1 + (frames - 1) // self.stride_time, height // stride, width // stride, self.latent_channels


class Encoder(nn.Module):
    config: CodecConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, first: bool) -> jax.Array:
        config, dtype = self.config, self.dtype
        x = layers.CausalConv(config.width, dtype=dtype, name="conv_in")(x_BTHWC, first)
        for level, multiplier in enumerate(config.multipliers):
            features, entry = config.width * multiplier, x
            for block in range(config.blocks):
                x = layers.ResidualBlock(features, dtype=dtype, name=f"level{level}_block{block}")(x, first)
            down = level < len(config.downsample_time)
            time = down and config.downsample_time[level]
            if down:
                x = layers.Downsample(time, dtype=dtype, name=f"level{level}_down")(x, first)
            if config.residual:
                x += layers.average_shortcut(entry, features, 2 if time else 1, 2 if down else 1)
        x = Middle(dtype=dtype, name="middle")(x, first)
        x = nn.silu(layers.ChannelNorm(name="norm_out")(x))
        return layers.CausalConv(2 * config.latent_channels, dtype=dtype, name="conv_out")(x, first)


class Decoder(nn.Module):
    config: CodecConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z_BFYXZ: jax.Array, first: bool) -> jax.Array:
        config, dtype = self.config, self.dtype
        width, multipliers = config.decoder_width, config.multipliers[::-1]
        x = layers.CausalConv(width * multipliers[0], dtype=dtype, name="conv_in")(z_BFYXZ, first)
        x = Middle(dtype=dtype, name="middle")(x, first)
        for level, multiplier in enumerate(multipliers):
            features, entry = width * multiplier, x
            for block in range(config.blocks + 1):
                x = layers.ResidualBlock(features, dtype=dtype, name=f"level{level}_block{block}")(x, first)
            if level == len(config.downsample_time):
                continue
            time = config.downsample_time[::-1][level]
            # Wan 2.1 halves the width in the upsampling convolution, Wan 2.2 in the next block.
            upsample = layers.Upsample(features if config.residual else features // 2, time, dtype=dtype)
            x = upsample.copy(name=f"level{level}_up")(x, first)
            if config.residual:
                x += layers.repeat_shortcut(entry, features, 2 if time else 1, 2, first)
        x = nn.silu(layers.ChannelNorm(name="norm_out")(x))
        return layers.CausalConv(3 * config.patch**2, dtype=dtype, name="conv_out")(x, first)


class Middle(nn.Module):
    """Residual block, attention within each frame, residual block."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        x = layers.ResidualBlock(x.shape[-1], dtype=self.dtype, name="block0")(x, first)
        x = layers.FrameAttention(dtype=self.dtype, name="attention")(x)
        return layers.ResidualBlock(x.shape[-1], dtype=self.dtype, name="block1")(x, first)


class Codec(nn.Module):
    """The video VAE. Call its methods through `apply(..., method="encode")`."""

    config: CodecConfig
    dtype: Any = jnp.float32

    def setup(self):
        Z = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant = layers.CausalConv(2 * Z, (1, 1, 1), dtype=self.dtype)
        self.post_quant = layers.CausalConv(Z, (1, 1, 1), dtype=self.dtype)

    def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
        """Reconstructs a clip; initialises every parameter."""
        return self.decode(self.encode(video_BTHWC))

    def posterior(self, video_BTHWC: jax.Array, first: bool = True) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance of the latents, (B, F, Y, X, Z) float32, before normalisation."""
        x = layers.space_to_channels(video_BTHWC, 1, self.config.patch)
        if self.config.patch > 1:  # the published patches run through columns first
            x = _swap_patch_axes(x, self.config.patch)
        moments = self.quant(self.encoder(x, first), first).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def encode(self, video_BTHWC: jax.Array, first: bool = True) -> jax.Array:
        """Video in [-1, 1] to normalised latents (the posterior's mean), (B, F, Y, X, Z) float32.

        `first` says that the video starts here: 1 + stride_time * k frames, otherwise stride_time * k, with the
        collection "stream" from the chunk before. H and W are multiples of `stride_space`.
        """
        mean, std = self._statistics()
        return (self.posterior(video_BTHWC, first)[0] - mean) / std

    def decode(self, latents_BFYXZ: jax.Array, first: bool = True) -> jax.Array:
        """Normalised latents to video in [-1, 1], (B, T, H, W, 3) float32; `first` as in `encode`."""
        mean, std = self._statistics()
        return jnp.clip(self.reconstruct(latents_BFYXZ * std + mean, first), -1.0, 1.0)

    def reconstruct(self, z_BFYXZ: jax.Array, first: bool = True) -> jax.Array:
        """Latents as the posterior has them to video, not clipped: what training compares with the frames."""
        x = self.decoder(self.post_quant(z_BFYXZ, first), first).astype(jnp.float32)
        if self.config.patch > 1:
            x = _swap_patch_axes(x, self.config.patch)
        return layers.channels_to_space(x, 1, self.config.patch)

    def _statistics(self) -> tuple[jax.Array, jax.Array]:
        zeros, ones = (0.0,), (1.0,)
        return jnp.array(self.config.latents_mean or zeros), jnp.array(self.config.latents_std or ones)


def _swap_patch_axes(x: jax.Array, patch: int) -> jax.Array:
    """Exchanges row and column inside the channel order (C, row, column)."""
    return x.reshape(*x.shape[:-1], -1, patch, patch).swapaxes(-1, -2).reshape(x.shape)


def piece(codec: Codec, params, state: dict, chunk: jax.Array, first: bool, method: str) -> tuple[jax.Array, dict]:
    """Encodes or decodes the next piece of a video: the result, and the state for the piece after it.

    Args:
      state: empty for the first piece.
      chunk: for `method="encode"` 1 + stride_time * k frames first, then stride_time * k; for `method="decode"` any
        number of latent frames. Batch, rows and columns stay the same.
    """
    variables = {"params": params, "stream": state}
    out, mutated = codec.apply(variables, chunk, first, method=method, mutable=["stream"])
    return out, mutated["stream"]


def stream(run: Callable[..., tuple[jax.Array, dict]], params, chunks: Iterable[jax.Array]) -> Iterator[jax.Array]:
    """Encodes or decodes chunk by chunk with memory that does not grow with duration; chunks as `piece` has them.

    Args:
      run: (params, state, chunk, first) -> the result and the state for the next chunk: `piece`, compiled.

    Yields:
      the result of each chunk; together they equal the result of the whole clip to float32 rounding.
    """
    state = {}
    for number, chunk in enumerate(chunks):
        out, state = run(params, state, chunk, number == 0)
        yield out


def psnr(a: jax.Array, b: jax.Array, peak: float = 2.0) -> jax.Array:
    """Peak signal-to-noise ratio in dB over all elements; `peak` is the range (2 for [-1, 1])."""
    return 10 * (2 * math.log10(peak) - jnp.log10(jnp.mean((a - b) ** 2)))
