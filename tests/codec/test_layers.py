"""The parts of the codec, each against a literal statement of what it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.codec import layers


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("time,space", [(1, 2), (2, 1), (2, 2)])
def test_channels_to_space_inverts_space_to_channels(time, space):
    x = normal(2, 4, 4, 6, 3)
    folded = layers.space_to_channels(x, time, space)
    assert folded.shape == (2, 4 // time, 4 // space, 6 // space, 3 * time * space**2)
    np.testing.assert_array_equal(layers.channels_to_space(folded, time, space), x)


def test_space_to_channels_orders_by_channel_then_time_then_row_then_column():
    # Each element is its own address (channel, time, row, column) in binary, so the order can be read off.
    c, t, h, w = np.meshgrid(*[np.arange(2)] * 4, indexing="ij")
    x_THWC = (8 * c + 4 * t + 2 * h + w).transpose(1, 2, 3, 0)
    folded = layers.space_to_channels(jnp.asarray(x_THWC[None]), 2, 2)
    np.testing.assert_array_equal(folded[0, 0, 0, 0], np.arange(16))


@pytest.mark.parametrize(
    "frames,kernel,stride_t,stride,padding",
    [
        # One frame comes out, a pair, a pair and one, two pairs.
        (3, (3, 3, 3), 1, 1, None),
        (4, (3, 3, 3), 1, 1, None),
        (5, (3, 3, 3), 1, 1, None),
        (6, (3, 3, 3), 1, 1, None),
        (5, (1, 3, 3), 1, 2, ((0, 1), (0, 1))),
        (5, (3, 1, 1), 2, 1, None),
        (5, (1, 1, 1), 1, 1, None),
    ],
)
def test_convolve_equals_a_three_dimensional_convolution(frames, kernel, stride_t, stride, padding):
    x, k = normal(2, frames, 6, 4, 3), normal(*kernel, 3, 5, seed=1)
    space = padding or tuple((size // 2, size // 2) for size in kernel[1:])

    def literal(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (stride_t, stride, stride), ((0, 0), *space), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    def actual(x, k):
        return layers.convolve(x, k, stride_t, stride, padding)

    np.testing.assert_allclose(actual(x, k), literal(x, k), rtol=1e-5, atol=1e-5)
    gradients = [jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1))(x, k) for f in (actual, literal)]
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_convolving_doubled_frames_equals_doubling_and_convolving():
    x, k = normal(2, 3, 4, 5, 3), normal(1, 3, 3, 3, 6, seed=1)

    def literal(x, k):
        return layers.convolve(x.repeat(2, axis=2).repeat(2, axis=3), k)

    np.testing.assert_allclose(layers.convolve_doubled(x, k), literal(x, k), rtol=1e-5, atol=1e-5)
    functions = (layers.convolve_doubled, literal)
    gradients = [jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1))(x, k) for f in functions]
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_convolve_of_too_few_frames_has_no_frames():
    assert layers.convolve(normal(2, 2, 4, 4, 3), normal(3, 1, 1, 3, 5)).shape == (2, 0, 4, 4, 5)


@pytest.mark.parametrize("time,space,features,frames", [(2, 2, 8, 5), (1, 2, 6, 2), (1, 1, 3, 2)])
def test_average_shortcut_equals_a_literal_loop(time, space, features, frames):
    x = normal(1, frames, 4, 4, 3)
    if frames % time:  # a first chunk: the lone first frame gets a zero frame before it
        x_padded = np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)
    else:
        x_padded = x
    _, T, H, W, C = x_padded.shape
    expected = np.zeros((1, T // time, H // space, W // space, features))
    group = C * time * space**2 // features
    for t, h, w in np.ndindex(*expected.shape[1:4]):
        block = [
            x_padded[0, t * time + dt, h * space + dh, w * space + dw, c]
            for c in range(C)
            for dt in range(time)
            for dh in range(space)
            for dw in range(space)
        ]
        for f in range(features):
            expected[0, t, h, w, f] = sum(block[f * group : (f + 1) * group]) / group
    np.testing.assert_allclose(layers.average_shortcut(x, features, time, space), expected, atol=1e-6)


@pytest.mark.parametrize("time,space,features,first", [(2, 2, 4, True), (2, 2, 4, False), (1, 2, 2, True)])
def test_repeat_shortcut_equals_a_literal_loop(time, space, features, first):
    x = normal(1, 3, 2, 2, 8)
    _, T, H, W, C = x.shape
    expected = np.zeros((1, T * time, H * space, W * space, features))
    repeats = features * time * space**2 // C
    for t, h, w, f in np.ndindex(*expected.shape[1:]):
        place = ((f * time + t % time) * space + h % space) * space + w % space
        expected[0, t, h, w, f] = x[0, t // time, h // space, w // space, place // repeats]
    if first:  # the first latent frame stands for one frame, not for a group
        expected = expected[:, time - 1 :]
    np.testing.assert_array_equal(layers.repeat_shortcut(x, features, time, space, first), expected)


def test_fresh_residual_block_is_the_identity():
    x = normal(1, 2, 4, 4, 4)
    block = layers.ResidualBlock(4)
    y, _ = jax.jit(lambda key, x: block.init_with_output(key, x, True))(jax.random.key(0), x)
    np.testing.assert_array_equal(y, x)


def test_fresh_frame_attention_is_the_identity():
    x = normal(1, 2, 2, 2, 4)
    attention = layers.FrameAttention()
    y, _ = jax.jit(attention.init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(y, x)


def test_norm_gives_unit_mean_square_at_any_scale():
    x = 100.0 * normal(2, 3, 16)
    y, _ = jax.jit(layers.ChannelNorm().init_with_output)(jax.random.key(0), x)
    np.testing.assert_allclose(jnp.mean(y**2, axis=-1), 1.0, rtol=1e-5)
