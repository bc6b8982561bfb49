"""Every kernel computes the same attention. That every mesh does is tests/test_mesh.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import attention
from sora_jax.errors import InputError


def arrays(N, L, K, E, B=2):
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=(B, K, n, E)), jnp.float32) for n in (N, L, L))


def literal(q, k, v, valid):
    scores = np.einsum("bkne,bkle->bknl", *(np.float64(x) for x in (q, k))) / np.sqrt(q.shape[-1])
    scores = np.where(valid, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bknl,bkle->bkne", weights / total, np.float64(v)), (np.log(total) + top)[..., 0]


KERNELS = {"xla": attention._xla, "heads": attention._heads, "splash": partial(attention._splash, interpret=True)}


@pytest.mark.parametrize(
    "name,masked,L",
    [("xla", False, 140), ("xla", True, 140), ("heads", False, 140), ("heads", True, 140), ("splash", True, 140)]
    + [
        ("splash", False, 514)  # more than one product, and no multiple of it: two images' features
    ],
)
def test_kernels_compute_softmax_attention(name, masked, L):
    N = 130
    q, k, v = arrays(N, L, 2, 128) if name == "heads" else arrays(N, L, 1, 128, B=1)
    valid = np.arange(L) % 5 > 0 if masked else np.ones(L, bool)
    given = jnp.asarray(valid) if masked else None
    out, log_sum = literal(q, k, v, valid)
    np.testing.assert_allclose(KERNELS[name](q, k, v, given, False), out, atol=2e-6)
    both = KERNELS[name](q, k, v, given, True)
    np.testing.assert_allclose(both[0], out, atol=2e-6)
    np.testing.assert_allclose(both[1], log_sum, atol=2e-6)


def test_the_sum_of_exponentials_has_a_gradient():
    """A ring weighs its parts by it."""
    q, k, v = arrays(6, 7, 2, 4)

    def plain(q, k):
        return jax.nn.logsumexp(jnp.einsum("bkne,bkle->bknl", q, k) / 2, axis=-1)

    def ours(q, k):
        return attention.attend(q, k, v, with_log_sum=True)[1]

    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 6)))
    slopes, expected = (
        jax.grad(lambda q, k, f=f: jnp.sum(weights * f(q, k)), argnums=(0, 1))(q, k) for f in (ours, plain)
    )
    for one, other in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("with_log_sum", [False, True])
@pytest.mark.parametrize("name,inputs", [("splash", (130, 140, 1, 128, 1)), ("heads", (30, 40, 3, 8))])
def test_gradients_of_kernels_are_those_of_xla(name, inputs, with_log_sum, filled):
    inputs = arrays(*inputs)

    def slopes(kernel):
        def total(q, k, v, number):
            # Rings compute which keys count from the place of the device: it is traced.
            valid_L = jnp.arange(k.shape[2]) < number if filled else None
            out = kernel(q, k, v, valid_L, with_log_sum)
            return sum(jnp.sum(jnp.sin(part)) for part in jax.tree.leaves(out))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*inputs, 33)

    for ours, expected in zip(slopes(KERNELS[name]), slopes(KERNELS["xla"]), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("kernel", ["xla", "heads"])
def test_attention_in_blocks_equals_attention_at_once(kernel, monkeypatch):
    q, k, v = arrays(900, 20, 3, 8)

    def run(q):
        out, log_sum = attention.attend(q, k, v, kernel=kernel, with_log_sum=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(log_sum), out

    at_once = jax.value_and_grad(run, has_aux=True)(q)
    monkeypatch.setattr(attention, "_SCORES", 0)
    in_blocks = jax.value_and_grad(run, has_aux=True)(q)
    assert jax.jit(run).lower(q).as_text().count("stablehlo.while") == (1 if kernel == "xla" else 2)
    for ours, expected in zip(jax.tree.leaves(in_blocks), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_kernel_follows_the_platform():
    shape = jax.ShapeDtypeStruct((1, 1, 2048, 128), jnp.bfloat16)
    traced = jax.jit(attention.attend).trace(shape, shape, shape)
    # Without devices of the platform a program can still be lowered for it.
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    cpu, gpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda"))
    assert "custom_call" not in cpu + gpu
    assert "while" in cpu and "while" not in gpu  # head by head


def test_an_unknown_kernel_is_refused():
    with pytest.raises(InputError, match="there are auto, xla, heads, splash, cudnn"):
        attention.attend(*arrays(4, 4, 1, 8), kernel="flash")
    x_BKNE = jnp.ones((1, 1, 8, 8))
    with pytest.raises(InputError, match="the cudnn kernel takes no float32: compute in bfloat16"):
        attention.attend(x_BKNE, x_BKNE, x_BKNE, kernel="cudnn")


@pytest.mark.parametrize("tokens", [24, 20])
def test_heads_come_first_and_go_back(tokens):
    """By whole tiles of eight tokens, or without."""
    x_BFSD = jnp.arange(2 * 3 * tokens * 12).reshape(2, 3, tokens, 12)
    x_BKFSE = attention.heads_first(x_BFSD, 4)
    assert x_BKFSE.shape == (2, 4, 3, tokens, 3)
    np.testing.assert_array_equal(x_BKFSE[1, 2, 0, 17], x_BFSD[1, 0, 17, 6:9])
    np.testing.assert_array_equal(attention.heads_last(x_BKFSE), x_BFSD)
