"""The parts of the causal video VAE: convolutions that never look ahead in time, and resampling in space and time.

Every layer that looks back in time follows one protocol. It is called with `first=True` when `x` starts with
the first frame of a video, and with `first=False` when `x` continues one; the frames it must remember between
calls live in the Flax collection "stream". A whole clip is then simply one long first chunk: the streaming form
and the whole-clip form are the same code.

The structure is that of the Wan 2.1 and 2.2 video VAEs (arXiv:2503.20314, published as `AutoencoderKLWan`).
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sora_jax.attention import cross_attention
from sora_jax.layers import Dense
from sora_jax.mesh import constrain, gathered

Initializer = Any
Dtype = Any
Padding = tuple[tuple[int, int], tuple[int, int]]  # of rows and columns, before and after


def remember(module: nn.Module, x_BTHWC: jax.Array, frames: int, first: bool, zeros: int) -> jax.Array:
    """Puts the past before `x`, and keeps the last `frames` frames as the past of the next chunk.

    The past of a first chunk is `zeros` empty frames. Nothing is kept unless "stream" is a mutable collection.
    """
    B, _, *rest = x_BTHWC.shape
    past = jnp.zeros((B, zeros, *rest), x_BTHWC.dtype) if first else module.get_variable("stream", "past")
    x_BTHWC = jnp.concatenate([past, x_BTHWC], axis=1)
    if module.is_mutable_collection("stream"):
        module.put_variable("stream", "past", x_BTHWC[:, -frames:])
    return x_BTHWC


def _convolve_2d(x_NHWC: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x_NHWC, kernel, (stride, stride), padding, dimension_numbers=names)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_2d_on_cpu(x_NHWC: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """`_convolve_2d`, with gradients that CPUs are fast at: XLA has fast convolutions there for small kernels alone.

    As a convolution, the gradient of the kernel has one as large as the frames.
    """
    return _convolve_2d(x_NHWC, kernel, stride, padding)


def _convolve_2d_forward(x_NHWC, kernel, stride, padding):
    return _convolve_2d(x_NHWC, kernel, stride, padding), (x_NHWC, kernel)


def _convolve_2d_backward(stride, padding, kept, change_NHWC):
    x_NHWC, kernel = kept
    kh, kw = kernel.shape[:2]
    if stride == 1:
        flipped, (rows, columns) = kernel[::-1, ::-1].swapaxes(2, 3), padding
        mirrored = ((kh - 1 - rows[0], kh - 1 - rows[1]), (kw - 1 - columns[0], kw - 1 - columns[1]))
        x_change = _convolve_2d(change_NHWC, flipped, 1, mirrored)
    else:
        (x_change,) = jax.vjp(lambda x: _convolve_2d(x, kernel, stride, padding), x_NHWC)[1](change_NHWC)
    padded = jnp.pad(x_NHWC, ((0, 0), *padding, (0, 0)))
    H, W = (stride * (side - 1) + 1 for side in change_NHWC.shape[1:3])

    def of_tap(row, column):
        met = padded[:, row : row + H : stride, column : column + W : stride]
        return jnp.einsum("nhwc,nhwf->cf", met, change_NHWC)

    taps = [jnp.stack([of_tap(row, column) for column in range(kw)]) for row in range(kh)]
    return x_change, jnp.stack(taps)


_convolve_2d_on_cpu.defvjp(_convolve_2d_forward, _convolve_2d_backward)


@partial(jax.jit, static_argnames=("stride_t", "stride", "padding"))  # traced once for each shape
def convolve(x_BTHWC: jax.Array, kernel: jax.Array, stride_t: int = 1, stride: int = 1, padding=None) -> jax.Array:
    """Convolution with `kernel` (time, rows, columns, in, out): no padding in time, by default "same" in space.

    Written as 2-D convolutions of frames: on CPUs that is 2 to 3 times faster than XLA's 3-D convolution, forwards and
    backwards (`experiments/benchmark.py` prints both). Of three taps in float32, two frames take 4 convolutions, not 6.
    On TPUs XLA's own takes less memory (decoding 480x832 with Wan 2.1, by the compiler: 6.9 against 8.2 GiB).
    """
    B, T, H, W, C = x_BTHWC.shape
    kt, kh, kw, _, features = kernel.shape
    T = max((T - kt) // stride_t + 1, 0)
    if T == 0:
        return jnp.zeros((B, 0, H // stride, W // stride, features), x_BTHWC.dtype)
    padding = padding or ((kh // 2, kh // 2), (kw // 2, kw // 2))

    def frames(x_BTHWC, kernel, convolve_2d=_convolve_2d_on_cpu):
        y = convolve_2d(x_BTHWC.reshape(-1, H, W, C), kernel, stride, padding)
        return y.reshape(B, -1, *y.shape[1:])

    def by_taps(x_BTHWC, kernel, frames=frames):
        T = (x_BTHWC.shape[1] - kt) // stride_t + 1
        return sum(frames(x_BTHWC[:, t : t + (T - 1) * stride_t + 1 : stride_t], kernel[t]) for t in range(kt))

    def by_pairs(x_BTHWC, kernel):
        # Winograd's minimal filtering F(2, 3) (arXiv:1509.09308, 4.1) over time: y0 = x0 g0 + x1 g1 + x2 g2 and
        # y1 = x1 g0 + x2 g1 + x3 g2 from four products.
        pairs = T // 2
        x0, x1, x2, x3 = (x_BTHWC[:, t : t + 2 * pairs - 1 : 2] for t in range(4))
        g0, g1, g2 = kernel
        first, last = frames(x0 - x2, g0), frames(x1 - x3, g2)
        total, difference = frames(x1 + x2, (g0 + g1 + g2) / 2), frames(x2 - x1, (g0 - g1 + g2) / 2)
        y = jnp.stack([first + total + difference, total - difference - last], axis=2)
        y = y.reshape(B, 2 * pairs, *y.shape[3:])
        return jnp.concatenate([y, by_taps(x_BTHWC[:, -3:], kernel)], axis=1) if T % 2 else y

    def at_once(x_BTHWC, kernel):
        strides, names = (stride_t, stride, stride), ("NDHWC", "DHWIO", "NDHWC")
        return lax.conv_general_dilated(x_BTHWC, kernel, strides, ((0, 0), *padding), dimension_numbers=names)

    pairs = (kt, stride_t) == (3, 1) and T > 1 and x_BTHWC.dtype == jnp.float32
    elsewhere = partial(by_taps, frames=partial(frames, convolve_2d=_convolve_2d))
    branches = dict(cpu=by_pairs if pairs else by_taps, tpu=at_once, default=elsewhere)
    return by_rows(lax.platform_dependent(by_rows(x_BTHWC), kernel, **branches))


def convolve_doubled(x_BTHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` of frames (B, T, H, W, in) with rows and columns doubled: kernel (1, 3, 3, in, out), stride 1.

    On CPUs the frames are not doubled. Of the three taps along an axis two would meet the same input: each of the four
    kinds of output (even and odd rows and columns) is a convolution with two taps an axis, 16 products in place of 36.
    On TPUs that would take a fifth more memory (decoding 480x832 with Wan 2.1, by the compiler: 8.2 against 6.9 GiB).
    """

    def merge(kernel, axis, odd):
        before, here, after = jnp.split(kernel, 3, axis)
        return jnp.concatenate([before + here, after] if odd else [before, here + after], axis)

    def outputs(x_BTHWC, kernel, odd_row, odd_column):
        padding = ((1 - odd_row, odd_row), (1 - odd_column, odd_column))
        return convolve(x_BTHWC, merge(merge(kernel, 1, odd_row), 2, odd_column), padding=padding)

    def by_outputs(x_BTHWC, kernel):
        rows = [jnp.stack([outputs(x_BTHWC, kernel, row, column) for column in (0, 1)], axis=4) for row in (0, 1)]
        B, T, H, W, _, features = rows[0].shape
        return jnp.stack(rows, axis=3).reshape(B, T, 2 * H, 2 * W, features)

    def by_doubling(x_BTHWC, kernel):
        return convolve(x_BTHWC.repeat(2, axis=2).repeat(2, axis=3), kernel)

    return lax.platform_dependent(x_BTHWC, kernel, cpu=by_outputs, default=by_doubling)


def by_rows(x_BTHWC: jax.Array) -> jax.Array:
    """Each device has some rows of every frame; for a convolution the compiler exchanges those at the edges.

    Two rows stay together: of convolutions that are split over two devices and summed, XLA's partitioner then gives as
    many times the sum as there are shares of the batch (jax 0.10.2, on CPUs).
    """
    return constrain(x_BTHWC, "batch", None, "rows" if x_BTHWC.shape[2] > 2 else None, None, None)


def _kernel_and_bias(module: nn.Module, shape: tuple[int, ...], init: Initializer, prefix: str = ""):
    axes = (None,) * (len(shape) - 1) + ("codec_channels",)
    kernel = module.param(prefix + "kernel", nn.with_logical_partitioning(init, axes), shape)
    bias = module.param(prefix + "bias", nn.with_logical_partitioning(nn.initializers.zeros, axes[-1:]), shape[-1:])
    return gathered(kernel.astype(module.dtype), *axes), gathered(bias.astype(module.dtype), *axes[-1:])


class CausalConv(nn.Module):
    """Convolution over time, rows and columns; output frame t sees input frames <= t only.

    Attributes:
      features: output channels.
      kernel: (time, rows, columns); rows and columns are zero-padded to keep their number.
    """

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, first: bool) -> jax.Array:
        kernel, bias = _kernel_and_bias(self, (*self.kernel, x_BTHWC.shape[-1], self.features), self.kernel_init)
        x_BTHWC = x_BTHWC.astype(self.dtype)
        frames = self.kernel[0] - 1
        if not frames:
            return convolve(x_BTHWC, kernel) + bias
        remembered_BTHWC = remember(self, x_BTHWC, frames, first, zeros=frames)
        if not first:
            return convolve(remembered_BTHWC, kernel) + bias
        # Before the first frame there are only zeros: it takes one tap. An even number is left, for pairs.
        alone, rest = convolve(x_BTHWC[:, :1], kernel[-1:]), convolve(remembered_BTHWC[:, 1:], kernel)
        return jnp.concatenate([alone, rest], axis=1) + bias


class ChannelNorm(nn.Module):
    """normalize(x) * sqrt(C) * scale over the channels: (..., C) -> (..., C), computed in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (None,)), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
        inverse = lax.rsqrt(jnp.maximum(square, 1e-24))  # the published layer bounds the norm by 1e-12
        return (x32 * inverse * (x.shape[-1] ** 0.5) * scale).astype(x.dtype)


class ResidualBlock(nn.Module):
    """Norm, silu, convolution, twice, added to the input (through a 1x1x1 convolution where the width changes)."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, first: bool) -> jax.Array:
        h = CausalConv(self.features, dtype=self.dtype, name="conv1")(
            nn.silu(ChannelNorm(name="norm1")(x_BTHWC)), first
        )
        # The last convolution starts at zero: a fresh block of constant width is the identity.
        conv2 = CausalConv(self.features, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv2")
        h = conv2(nn.silu(ChannelNorm(name="norm2")(h)), first)
        if x_BTHWC.shape[-1] != self.features:
            x_BTHWC = CausalConv(self.features, (1, 1, 1), dtype=self.dtype, name="shortcut")(x_BTHWC, first)
        return x_BTHWC + h


class FrameAttention(nn.Module):
    """Single-head attention among the positions of one frame; frames do not see one another."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        B, T, H, W, C = x_BTHWC.shape
        axes = (None, "codec_channels")
        h = ChannelNorm(name="norm")(x_BTHWC)
        qkv = Dense(3 * C, axes, self.dtype, nn.initializers.lecun_normal(), name="qkv")(h)
        q, k, v = jnp.split(qkv.reshape(B * T, 1, H * W, 3 * C), 3, axis=-1)
        attended = cross_attention(q[:, :, None], k, v).reshape(B, T, H, W, C)
        return x_BTHWC + by_rows(Dense(C, axes, self.dtype, nn.initializers.zeros, name="out")(attended))


class Downsample(nn.Module):
    """Halves rows and columns; with `time` also frames, 1 + 2k -> 1 + k, where the first frame stands alone."""

    time: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, first: bool) -> jax.Array:
        C = x_BTHWC.shape[-1]
        init = nn.initializers.lecun_normal()
        kernel, bias = _kernel_and_bias(self, (1, 3, 3, C, C), init)
        # Zeros below and to the right only, as published.
        x_BTHWC = convolve(x_BTHWC.astype(self.dtype), kernel, stride=2, padding=((0, 1), (0, 1))) + bias
        if not self.time:
            return x_BTHWC
        kernel, bias = _kernel_and_bias(self, (3, 1, 1, C, C), init, "time_")
        head_BTHWC = x_BTHWC[:, : 1 if first else 0]
        x_BTHWC = remember(self, x_BTHWC, 1, first, zeros=0)
        return jnp.concatenate([head_BTHWC, convolve(x_BTHWC, kernel, stride_t=2) + bias], axis=1)


class Upsample(nn.Module):
    """Doubles rows and columns; with `time` also frames, 1 + k -> 1 + 2k, where the first frame stands alone."""

    features: int
    time: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, first: bool) -> jax.Array:
        B, _, H, W, C = x_BTHWC.shape
        init = nn.initializers.lecun_normal()
        x_BTHWC = x_BTHWC.astype(self.dtype)
        if self.time:
            kernel, bias = _kernel_and_bias(self, (3, 1, 1, C, 2 * C), init, "time_")
            alone = 1 if first else 0
            head_BTHWC, x_BTHWC = x_BTHWC[:, :alone], x_BTHWC[:, alone:]
            T = x_BTHWC.shape[1]
            # As published, the doubling does not see the first frame: its past starts at zero after it.
            pairs = convolve(remember(self, x_BTHWC, 2, first, zeros=2), kernel) + bias
            pairs = pairs.reshape(B, T, H, W, 2, C).transpose(0, 1, 4, 2, 3, 5).reshape(B, 2 * T, H, W, C)
            x_BTHWC = jnp.concatenate([head_BTHWC, pairs], axis=1)
        kernel, bias = _kernel_and_bias(self, (1, 3, 3, C, self.features), init)
        return convolve_doubled(x_BTHWC, kernel) + bias


def space_to_channels(x_BTHWC: jax.Array, time: int, space: int) -> jax.Array:
    """(B, T*time, H*space, W*space, C) -> (B, T, H, W, C*time*space*space); channel order (C, time, row, column)."""
    B, T, H, W, C = x_BTHWC.shape
    x = x_BTHWC.reshape(B, T // time, time, H // space, space, W // space, space, C)
    return x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, T // time, H // space, W // space, C * time * space**2)


def channels_to_space(x_BTHWC: jax.Array, time: int, space: int) -> jax.Array:
    """The inverse of `space_to_channels`."""
    B, T, H, W, C = x_BTHWC.shape
    x = x_BTHWC.reshape(B, T, H, W, C // (time * space**2), time, space, space)
    return x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, T * time, H * space, W * space, -1)


def average_shortcut(x_BTHWC: jax.Array, features: int, time: int, space: int) -> jax.Array:
    """The parameter-free downsampling of the Wan 2.2 VAE: blocks to channels, then means of channel groups."""
    # A first chunk has 1 + 2k frames: the lone first frame is averaged with a zero frame before it, as published.
    x_BTHWC = jnp.pad(x_BTHWC, ((0, 0), (-x_BTHWC.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x_BTHWC = space_to_channels(x_BTHWC, time, space)
    return x_BTHWC.reshape(*x_BTHWC.shape[:-1], features, -1).mean(axis=-1)


def repeat_shortcut(x_BTHWC: jax.Array, features: int, time: int, space: int, first: bool) -> jax.Array:
    """The parameter-free upsampling of the Wan 2.2 VAE: channels repeated, then spread over the block."""
    repeats = features * time * space**2 // x_BTHWC.shape[-1]
    x_BTHWC = channels_to_space(x_BTHWC.repeat(repeats, axis=-1), time, space)
    return x_BTHWC[:, time - 1 :] if first else x_BTHWC
