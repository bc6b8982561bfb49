"""The benchmark counts operations as one would by hand."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from scripts import script

from sora_jax.codec import Codec
from sora_jax.codec.layers import convolve
from sora_jax.codec.vae import piece
from sora_jax.dit import DiT, DiTConfig
from sora_jax.model_config import abstract_params
from sora_jax.plan import model_config


@pytest.mark.slow
def test_the_benchmark_runs_to_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--quick", "--json", str(tmp_path / "found.json")])
    before = jax.config.jax_compilation_cache_dir
    try:
        assert script("experiments/benchmark.py").main() == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row["name"].split(",")[0] for row in found["rows"]}
    assert {"text encoding", "DiT", "codec decode", "generation", "training step", "convolve"} <= rows, sorted(rows)
    assert all(row["seconds"] > 0 and row["operations"] >= 0 for row in found["rows"])
    assert "peak memory" in capsys.readouterr().out


@pytest.fixture(scope="module")
def operations():
    return script("experiments/benchmark.py").operations


def test_products_in_loops_and_compiled_functions_count(operations):
    a, b = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    assert operations(jnp.matmul, a, b) == 2 * 2 * 3 * 4 * 5
    square = jnp.ones((4, 4))
    loop = jax.jit(lambda x: jax.lax.scan(lambda x, _: (x @ square, None), x, length=7)[0])
    assert operations(loop, square) == 7 * 2 * 4**3
    # Forwards once and backwards once: the gradient to the constant is not asked for.
    gradient = jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: x @ square)(x) ** 2))
    assert operations(gradient, square) == 2 * 2 * 4**3


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients(operations, stride):
    x, kernel = jnp.ones((1, 5, 8, 8, 3)), jnp.ones((3, 3, 3, 3, 6))

    def run(x, kernel):
        return convolve(x, kernel, 1, stride)

    forward = 2 * 3 * (8 // stride) ** 2 * 6 * (27 * 3)
    assert operations(run, x, kernel) == forward
    gradients = jax.grad(lambda *args: jnp.sum(run(*args)), argnums=(0, 1))
    assert operations(gradients, x, kernel) == 3 * forward


def test_a_transformer_counts_as_its_formula(operations):
    config = DiTConfig(4, heads=2, head_width=12, feed_forward=32, layers=3, text_width=8, frequency_width=16)
    B, F, Y, X, L, D, M = 2, 3, 4, 6, 5, 24, 32
    model = DiT(config)
    inputs = jnp.ones((B, F, Y, X, 4)), jnp.ones((B, F)), jnp.ones((B, L, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    N, patch = F * Y * X // 4, 16
    block = N * 4 * D * D + 2 * N * N * D  # self-attention: four projections, scores and mixture
    block += 2 * N * D * 12  # halves of the heads change places, for the positions
    block += 2 * N * D * D + 2 * L * D * D + 2 * N * L * D  # cross-attention
    block += 2 * N * D * M
    ends = 2 * N * patch * D + F * (16 * D + D * D + 6 * D * D) + L * (8 * D + D * D)
    assert operations(model.apply, params, *inputs) == 2 * B * (config.layers * block + ends)


def test_the_compiler_counts_the_same(operations):
    a = jnp.ones((32, 48))
    b = jnp.ones((48, 16))
    analysis = jax.jit(jnp.matmul).lower(a, b).compile().cost_analysis()
    assert analysis["flops"] == pytest.approx(operations(jnp.matmul, a, b), rel=0.05)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_the_layers_of_a_codec_are_all_of_it(operations, monkeypatch, method):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments")
    import codec_levels

    config = model_config("wan2.2-ti2v-5b")
    params, codec = abstract_params(config)["codec"], Codec(config.codec)
    _, Y, X, Z = config.codec.latent_shape(1, 64, 96)
    shape = (1, config.codec.stride_time, 64, 96, 3) if method == "encode" else (1, 1, Y, X, Z)
    chunk = jax.ShapeDtypeStruct(shape, jnp.float32)
    layers = codec_levels.calls(codec, params, chunk, method)
    by_layer = sum(operations(call, *arguments) for _, call, arguments in layers)

    def run(params, chunk):
        state = piece(codec, params, {}, chunk[:, :1], True, method)[1]
        return piece(codec, params, state, chunk, False, method)

    first = operations(lambda params, chunk: piece(codec, params, {}, chunk[:, :1], True, method), params, chunk)
    quant = 2 * Y * X * (Z * Z if method == "decode" else (2 * Z) ** 2)
    assert by_layer + quant == operations(run, params, chunk) - first
