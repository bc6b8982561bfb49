"""The diffusion transformer: what it starts as, what reaches what, and that its scan is a loop."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from sora_jax.dit import DiT, DiTConfig
from sora_jax.dit.model import REMAT_POLICIES, Block, level_features
from sora_jax.dit.positions import rotary_angles
from sora_jax.layers import layer_norm

CONFIG = DiTConfig(
    3, heads=2, head_width=12, feed_forward=32, layers=2, text_width=8, patch=(1, 2, 2), frequency_width=16
)
B, F, Y, X, L = 2, 3, 4, 6, 5
LEVEL = np.array([[0.2, 0.9, 0.5], [0.7, 0.0, 1.0]], np.float32)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    # These tests compile much and compute little.
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    return (
        random.normal(size=(B, F, Y, X, 3)).astype(np.float32),
        LEVEL,
        random.normal(size=(B, L, 8)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def shapes(inputs):
    return meta.unbox(jax.eval_shape(DiT(CONFIG).init, jax.random.key(0), *inputs))["params"]


@pytest.fixture(scope="module")
def params(shapes):
    """Random everywhere: fresh parameters hide the blocks behind zeros."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda params, *inputs: DiT(CONFIG).apply({"params": params}, *inputs))


@pytest.fixture(scope="module")
def gradient():
    """(params, weights, inputs) -> gradients of sum(weights * velocity) to the inputs."""

    def projected(inputs, params, weights):
        return jnp.sum(weights * DiT(CONFIG).apply({"params": params}, *inputs))

    compiled = jax.jit(jax.grad(projected))
    return lambda params, weights, inputs: jax.tree.map(np.asarray, compiled(inputs, params, weights))


def test_fresh_model_predicts_zero(shapes, inputs, apply):
    velocity, variables = jax.jit(DiT(CONFIG).init_with_output)(jax.random.key(0), *inputs)
    assert velocity.shape == inputs[0].shape and velocity.dtype == jnp.float32
    assert not np.any(velocity)
    # With its last layer alone made random it no longer does: the zero above is not an accident.
    fresh = meta.unbox(variables["params"])
    fresh["patches_out"]["kernel"] = jnp.ones_like(fresh["patches_out"]["kernel"]).at[::2].set(0.5)
    assert np.abs(apply(fresh, *inputs)).max() > 0.1


def test_fresh_block_is_the_identity():
    x = np.random.default_rng(0).normal(size=(B, F, 6, CONFIG.width)).astype(np.float32)
    modulation = np.zeros((B, F, 6, CONFIG.width), np.float32)  # what a fresh model's level gives
    text = np.random.default_rng(1).normal(size=(B, L, CONFIG.width)).astype(np.float32)
    angles = rotary_angles(F, 2, 3, CONFIG.head_width)
    y, _ = jax.jit(Block(CONFIG).init_with_output)(jax.random.key(0), x, modulation, text, angles)
    np.testing.assert_array_equal(y, x)


def test_every_token_attends_to_every_token_and_to_the_text(params, inputs, gradient):
    for place in [(0, 0, 0), (1, 2, 3), (2, 3, 5)]:
        weights = np.zeros_like(inputs[0])
        weights[(0, *place)] = 1.0
        latents, level, text = gradient(params, weights, inputs)
        assert latents[0].all() and level[0].all() and text[0].all()
        # Nothing crosses from one video of the batch to the other.
        assert not latents[1].any() and not level[1].any() and not text[1].any()


def test_without_attention_a_level_acts_on_its_own_frame_alone(params, inputs, apply):
    attention = params["blocks"]["self_attention"]
    cut = jax.tree.map(np.zeros_like, attention["out"])
    alone = {**params, "blocks": {**params["blocks"], "self_attention": {**attention, "out": cut}}}
    latents, level, text = inputs
    changed = level.copy()
    changed[:, 1] = 0.4
    for tree, frames in ((alone, [False, True, False]), (params, [True, True, True])):
        moved = apply(tree, latents, changed, text) != apply(tree, latents, level, text)
        np.testing.assert_array_equal(moved.any(axis=(0, 2, 3, 4)), frames)


def literal(params, latents, level, text):
    """The model as a Python loop over the blocks, unpatching in loops; `level` is (B, F), or (B, 1) for all frames."""

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    tokens = [
        latents[:, f, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(B, -1)
        for f in range(F)
        for y in range(Y // 2)
        for x in range(X // 2)
    ]
    h = dense("patches_in", np.stack(tokens, axis=1)).reshape(B, F, -1, CONFIG.width)
    level_BFD = dense("level_out", jax.nn.silu(dense("level_in", level_features(level, CONFIG.frequency_width))))
    level_BF6D = dense("level_modulation", jax.nn.silu(level_BFD)).reshape(B, level.shape[1], 6, CONFIG.width)
    text = dense("text_out", jax.nn.gelu(dense("text_in", text), approximate=True))
    angles = rotary_angles(F, Y // 2, X // 2, CONFIG.head_width)
    for layer in range(CONFIG.layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        h = Block(CONFIG).apply({"params": block}, h, level_BF6D, text, angles)
    shift, scale = (np.repeat(params["modulation_out"][i] + level_BFD, F // level.shape[1], axis=1) for i in (0, 1))
    per_frame = len(tokens) // F
    h = layer_norm(h, CONFIG.epsilon).reshape(B, len(tokens), -1)
    h = dense("patches_out", h * (1 + np.repeat(scale, per_frame, 1)) + np.repeat(shift, per_frame, 1))
    velocity = np.zeros(latents.shape, np.float32)
    for n, patch in enumerate(np.asarray(h).swapaxes(0, 1)):
        f, y, x = np.unravel_index(n, (F, Y // 2, X // 2))
        velocity[:, f, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = patch.reshape(B, 2, 2, -1)
    return velocity


def test_scan_over_layers_equals_a_loop(params, inputs, apply):
    np.testing.assert_allclose(apply(params, *inputs), literal(params, *inputs), atol=2e-4, rtol=2e-4)


def test_equal_levels_are_one_level_for_the_video(params, inputs, apply):
    latents, _, text = inputs
    one = np.array([[0.3], [0.8]], np.float32)
    expected = literal(params, latents, one, text)
    np.testing.assert_allclose(apply(params, latents, np.repeat(one, F, 1), text), expected, atol=2e-4, rtol=2e-4)


def test_recomputation_does_not_change_gradients(params, inputs):
    weights = np.random.default_rng(2).normal(size=inputs[0].shape).astype(np.float32)
    gradients = []
    for remat in REMAT_POLICIES:
        model = DiT(dataclasses.replace(CONFIG, remat=remat))
        loss = jax.jit(jax.grad(lambda p, model=model: jnp.sum(weights * model.apply({"params": p}, *inputs))))
        gradients.append(loss(params))
    for other in gradients[1:]:
        for a, b in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


def test_the_tokens_after_a_block_are_those_of_a_model_that_ends_there(params, inputs, apply):
    def kept(layers):
        model = DiT(dataclasses.replace(CONFIG, layers=layers), keep_after=1)
        cut = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:layers], params["blocks"])}
        velocity, state = jax.jit(partial(model.apply, mutable=["intermediates"]))({"params": cut}, *inputs)
        (tokens,) = state["intermediates"]["tokens"]
        return velocity, tokens

    velocity, tokens = kept(2)
    assert tokens.shape == (B, F, Y * X // 4, CONFIG.width)
    np.testing.assert_allclose(tokens, kept(1)[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(velocity, apply(params, *inputs), rtol=1e-5, atol=1e-5)


def test_keeping_the_tokens_of_one_block_takes_no_memory_for_those_of_others(inputs):
    """More blocks take more memory for training, but as much more as where no tokens are kept."""

    def temporary(layers, layer):
        model = DiT(dataclasses.replace(CONFIG, layers=layers, remat="full"), keep_after=layer)
        shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]

        def loss(params):
            velocity, state = model.apply({"params": params}, *inputs, mutable=["intermediates"])
            return jnp.sum(velocity**2) + jnp.sum(jnp.square(state["intermediates"]["tokens"][0]) if layer else 0)

        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    one_layer = 4 * B * F * (Y * X // 4) * CONFIG.width
    extra = [temporary(layers, 2) - temporary(layers, 0) for layers in (4, 12)]
    assert abs(extra[1] - extra[0]) < one_layer


def test_level_features_of_golden_values():
    np.testing.assert_allclose(level_features(jnp.zeros(()), 4), [1, 1, 0, 0], atol=1e-6)
    t = 0.37
    expected = [np.cos(370), np.cos(370 / 100), np.sin(370), np.sin(370 / 100)]
    np.testing.assert_allclose(level_features(jnp.array(t), 4), expected, atol=1e-4)


@pytest.mark.parametrize("wrong,word", [({"remat": "some"}, "remat"), ({"patch": (2, 2, 2)}, "one latent frame")])
def test_impossible_configs_are_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(CONFIG, **wrong)
