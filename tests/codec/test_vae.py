"""The codec as a whole: causal, the same in one piece as in chunks, and an image is a one-frame video."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chunks import in_chunks
from flax.core import meta

from sora_jax.codec import Codec, CodecConfig
from sora_jax.codec.vae import psnr

PLAIN = CodecConfig(4, width=4, decoder_width=4, multipliers=(1, 2, 2), downsample_time=(True, True), blocks=1)
RESIDUAL = dataclasses.replace(PLAIN, patch=2, residual=True)
FRAMES, LATENT_FRAMES = 13, 4


class Case:
    """A codec with random parameters (fresh ones hide half of it behind zeros), and the whole clip coded once."""

    def __init__(self, config):
        random = np.random.default_rng(0)
        self.config, self.codec = config, Codec(config)
        self.side = 2 * config.stride_space
        self.video = random.uniform(-1, 1, (1, FRAMES, self.side, self.side, 3)).astype(np.float32)
        self.latents = random.normal(size=(1, LATENT_FRAMES, 2, 2, 4)).astype(np.float32)
        shapes = jax.eval_shape(self.codec.init, jax.random.key(0), self.video)["params"]
        self.params = jax.tree.map(
            lambda leaf: (random.normal(size=leaf.shape) / max(np.prod(leaf.shape[:-1]), 4) ** 0.5).astype(np.float32),
            meta.unbox(shapes),
        )
        self.encoded, self.encode_gradients = self._gradients("encode", self.video)
        self.decoded, self.decode_gradients = self._gradients("reconstruct", self.latents)

    def apply(self, method, x):
        return jax.jit(lambda p, x: self.codec.apply({"params": p}, x, method=method))(self.params, x)

    def _gradients(self, method, x):
        """The output, and for each of its frames the gradient of a random projection of it to the input."""

        @jax.jit
        def run(params, x, weights):
            y, pullback = jax.vjp(lambda x: self.codec.apply({"params": params}, x, method=method), x)
            frames = y.shape[1]
            # On the diagonal: frame t alone is projected.
            projection = weights[: y.size].reshape(1, *y.shape)
            cotangents = jnp.eye(frames)[:, None, :, None, None, None] * projection
            return y, jax.lax.map(lambda c: pullback(c)[0], cotangents)

        weights = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
        return jax.tree.map(np.asarray, run(self.params, x, weights))


@pytest.fixture(scope="module", params=[PLAIN, RESIDUAL], ids=["plain, patch 1", "residual, patch 2"])
def case(request):
    # These tests compile much and compute little.
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield Case(request.param)
    jax.config.update("jax_disable_most_optimizations", before)


def test_encoding_never_looks_ahead(case):
    for frame, gradient_BTHWC in enumerate(case.encode_gradients):
        last = frame * case.config.stride_time  # of the pixel frames that this latent frame may depend on
        assert not gradient_BTHWC[:, last + 1 :].any()
        assert gradient_BTHWC[:, last].any()
        assert gradient_BTHWC[:, max(last - 3, 0)].any()  # the whole group of four counts


def test_decoding_never_looks_ahead(case):
    for frame, gradient_BFYXZ in enumerate(case.decode_gradients):
        last = -(-frame // case.config.stride_time)
        assert not gradient_BFYXZ[:, last + 1 :].any()
        assert gradient_BFYXZ[:, last].any()


@pytest.mark.parametrize("lengths", [(1, 8, 4)])
def test_streamed_encoding_equals_the_whole_clip(case, lengths):
    chunks = np.split(case.video, np.cumsum(lengths)[:-1], axis=1)
    streamed = in_chunks(case.codec, case.params, chunks, "encode")
    np.testing.assert_allclose(streamed, case.encoded, atol=1e-5)


@pytest.mark.parametrize("lengths", [(2, 1, 1)])
def test_streamed_decoding_equals_the_whole_clip(case, lengths):
    chunks = np.split(case.latents, np.cumsum(lengths)[:-1], axis=1)
    streamed = in_chunks(case.codec, case.params, chunks, "decode")
    np.testing.assert_allclose(streamed, np.clip(case.decoded, -1, 1), atol=1e-5)


def test_an_image_is_the_first_frame_of_a_video(case):
    np.testing.assert_allclose(case.apply("encode", case.video[:, :1]), case.encoded[:, :1], atol=1e-5)
    np.testing.assert_allclose(case.apply("reconstruct", case.latents[:, :1]), case.decoded[:, :1], atol=1e-5)


@pytest.mark.parametrize("method,first,later", [("encode", 1, (4, 8, 4)), ("decode", 1, (1, 3, 1))])
def test_the_memory_of_a_stream_does_not_grow(case, method, first, later):
    whole = case.video if method == "encode" else case.latents

    def run(state, frames, is_first):
        x = jax.ShapeDtypeStruct((1, frames, *whole.shape[2:]), np.float32)
        return jax.eval_shape(
            lambda state, x: case.codec.apply(
                {"params": case.params, "stream": state}, x, is_first, method=method, mutable=["stream"]
            )[1]["stream"],
            state,
            x,
        )

    state, states = run({}, first, True), []
    for frames in later:
        state = run(state, frames, False)
        states.append(state)
    assert jax.tree.leaves(states[0])
    assert all(state == states[0] for state in states)


def test_shapes(case):
    config = case.config
    assert config.stride_time == 4
    assert config.stride_space == 4 * config.patch
    assert case.encoded.shape[1:] == config.latent_shape(FRAMES, case.side, case.side)
    assert case.decoded.shape == case.video.shape


def test_encode_removes_the_statistics_that_decode_restores(case):
    mean, std = (0.5, -1.0, 0.0, 2.0), (0.5, 2.0, 1.0, 3.0)
    codec = Codec(dataclasses.replace(case.config, latents_mean=mean, latents_std=std))
    image = case.video[:, :1]

    @jax.jit
    def run(params, image):
        latents = codec.apply({"params": params}, image, method="encode")
        return latents, codec.apply({"params": params}, latents, method="decode")

    latents, rebuilt = run(case.params, image)
    np.testing.assert_allclose(latents, (case.encoded[:, :1] - np.array(mean)) / np.array(std), atol=1e-5)
    np.testing.assert_allclose(rebuilt, case.apply("decode", case.encoded[:, :1]), atol=1e-5)


@pytest.mark.parametrize("wrong", [{"downsample_time": (True,)}, {"latents_mean": (0.0,)}, {"latents_std": (1.0, 1.0)}])
def test_sizes_that_do_not_belong_together_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(PLAIN, **wrong)


def test_psnr_of_a_known_error():
    assert psnr(np.zeros(10), np.full(10, 0.2)) == pytest.approx(20.0, abs=1e-4)
