"""The straight path from data to noise, its velocity, and what training draws."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import flow

SHAPE = (2, 3, 2, 2, 4)


@pytest.fixture(scope="module")
def pair():
    return np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)


def test_level_0_is_data_and_level_1_is_noise(pair):
    x0, noise = pair
    np.testing.assert_array_equal(flow.add_noise(x0, noise, jnp.zeros((2, 3))), x0)
    np.testing.assert_array_equal(flow.add_noise(x0, noise, jnp.ones((2, 3))), noise)


def test_each_frame_has_its_own_level(pair):
    x0, noise = pair
    level = jnp.array([[0.0, 1.0, 0.5], [1.0, 0.25, 0.0]])
    x = flow.add_noise(x0, noise, level)
    np.testing.assert_array_equal(x[0, 0], x0[0, 0])
    np.testing.assert_array_equal(x[0, 1], noise[0, 1])
    np.testing.assert_allclose(x[1, 1], 0.75 * x0[1, 1] + 0.25 * noise[1, 1], rtol=1e-6)


def test_what_the_loss_wants_is_the_derivative_of_the_path(pair):
    x0, noise = pair
    level = jnp.full((2, 3), 0.3)
    _, velocity = jax.jvp(lambda t: flow.add_noise(x0, noise, t), (level,), (jnp.ones_like(level),))
    assert flow.velocity_loss(velocity, x0, noise, jnp.zeros((2, 3), bool)) < 1e-12


def test_loss_is_the_mean_over_unknown_frames_and_blind_to_known_ones(pair):
    x0, noise = pair
    predicted = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    known = np.array([[True, False, False], [False, False, True]])
    loss, gradient = jax.value_and_grad(flow.velocity_loss)(predicted, x0, noise, known)
    assert not np.asarray(gradient)[known].any()
    assert np.asarray(gradient)[~known].all()
    assert loss == pytest.approx(np.mean((predicted - (noise - x0))[~known] ** 2), rel=1e-5)


def test_loss_of_nothing_unknown_is_zero_not_nan(pair):
    assert flow.velocity_loss(pair[0], *pair, jnp.ones((2, 3), bool)) == 0.0


def test_what_is_noised_lies_on_the_path_at_its_level():
    x0 = jax.random.normal(jax.random.key(0), (64, 4, 2, 2, 3))
    drawn = flow.noised(jax.random.key(1), x0, flow.Levels(shift=2.0), known_share=0.5)
    np.testing.assert_array_equal(drawn.x_BFYXZ, flow.add_noise(x0, drawn.noise_BFYXZ, drawn.level_BF))
    known = np.asarray(drawn.known_BF)
    assert 0.3 < known.any(axis=1).mean() < 0.7
    np.testing.assert_array_equal(np.asarray(drawn.level_BF)[known], 0.0)
    for level_F, known_F in zip(np.asarray(drawn.level_BF), known, strict=True):
        assert len(set(level_F[~known_F])) == 1 and level_F[~known_F][0] > 0


def test_from_a_mistake_the_velocity_leads_to_the_clip():
    x0, mistaken = jax.random.normal(jax.random.key(0), (2, 64, 4, 2, 2, 3))
    arguments = (jax.random.key(1), x0, flow.Levels(shift=2.0), 0.5)
    plain, drawn = flow.noised(*arguments), flow.noised(*arguments, mistaken)
    jax.tree.map(np.testing.assert_array_equal, plain, flow.noised(*arguments, x0))
    np.testing.assert_array_equal(drawn.level_BF, plain.level_BF)
    from_mistake = np.asarray(drawn.level_BF) >= flow.MISTAKES_FROM
    assert 0.2 < from_mistake.mean() < 0.8
    expected = flow.add_noise(mistaken, plain.noise_BFYXZ, plain.level_BF)
    np.testing.assert_allclose(drawn.x_BFYXZ[from_mistake], expected[from_mistake], atol=1e-5)
    np.testing.assert_array_equal(drawn.x_BFYXZ[~from_mistake], plain.x_BFYXZ[~from_mistake])
    velocity = drawn.noise_BFYXZ - x0
    np.testing.assert_allclose(drawn.x_BFYXZ - drawn.level_BF[:, :, None, None, None] * velocity, x0, atol=1e-5)


def test_weights_of_channels_and_places_make_a_weighted_mean_over_what_is_not_known():
    rng = np.random.default_rng(2)
    predicted, x0, noise = rng.normal(size=(3, 2, 3, 4, 4, 2)).astype(np.float32)
    known = np.array([[True, False, False], [False, False, True]])
    weight_Z, weight_BFYX1 = np.array([0.5, 3.0], np.float32), rng.uniform(1, 5, (2, 3, 4, 4, 1)).astype(np.float32)
    weight = np.broadcast_to(weight_Z * weight_BFYX1, predicted.shape)[~known]
    expected = np.average((predicted - (noise - x0))[~known] ** 2, weights=weight)
    for scale in (1.0, 7.0):  # what weights a known frame has, and how large they all are, does not matter
        changed = scale * weight_BFYX1 * np.where(known, 100.0, 1.0)[:, :, None, None, None]
        loss = flow.velocity_loss(predicted, x0, noise, known, weight_Z * changed)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_keeps_the_ends_and_the_order(shift):
    level = np.linspace(0, 1, 101)
    shifted = flow.shift_level(level, shift)
    assert shifted[0] == 0.0 and shifted[-1] == 1.0
    assert (np.diff(shifted) > 0).all()
    # Equation 23 of arXiv:2403.03206: odds of noise are multiplied by the shift.
    odds = level[1:-1] / (1 - level[1:-1])
    np.testing.assert_allclose(shifted[1:-1] / (1 - shifted[1:-1]), shift * odds, rtol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_are_logit_normal_around_the_shift(shift):
    level = np.asarray(flow.sample_level(jax.random.key(0), 20_000, flow.Levels(shift)))
    assert level.min() > 0 and level.max() < 1
    logit = np.log(level / (1 - level))
    # Four standard errors of mean and deviation.
    assert logit.mean() == pytest.approx(np.log(shift), abs=4 / 20_000**0.5)
    assert logit.std() == pytest.approx(1.0, abs=4 / 40_000**0.5)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_share_of_the_levels_is_uniform_before_its_shift(share):
    count = 20_000
    level = np.asarray(flow.sample_level(jax.random.key(0), count, flow.Levels(2.0, share, 5.0)))
    assert level.min() >= 0 and level.max() < 1
    for limit in (0.1, 0.5, 0.9, 0.97):
        logit = np.log(limit / (1 - limit))
        normal, uniform = NormalDist(np.log(2)).cdf(logit), limit / (5 - 4 * limit)
        expected = share * uniform + (1 - share) * normal
        assert (level < limit).mean() == pytest.approx(expected, abs=4 * 0.5 / count**0.5), limit


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("frames", [2, 5])
def test_known_frames_are_never_all_and_as_frequent_as_asked(share, frames):
    clips = 20_000
    known = np.asarray(flow.sample_known(jax.random.key(1), clips, frames, share))
    assert known.shape == (clips, frames) and known.dtype == bool
    assert not known.all(axis=1).any()
    # Of the five patterns, a random subset may be empty or full; of two frames, "both ends" is always full.
    useful = 1 - 2 * 0.5**frames / 5 - (1 / 5 if frames == 2 else 0)
    rate = known.any(axis=1).mean()
    assert rate == pytest.approx(share * useful, abs=4 * 0.5 / clips**0.5)
    if share == 0.0:
        assert not known.any()


def test_known_frames_come_in_all_patterns():
    known = np.asarray(flow.sample_known(jax.random.key(2), 4000, 4, 1.0))
    rows, counts = np.unique(known, axis=0, return_counts=True)
    patterns = {tuple(map(int, row)): int(count) for row, count in zip(rows, counts, strict=True)}
    assert len(patterns) == 15  # every subset but the full one
    for common in [(1, 0, 0, 0), (0, 0, 0, 1), (1, 0, 0, 1), (1, 1, 0, 0), (1, 1, 1, 0)]:
        assert patterns[common] > 2 * patterns[0, 1, 1, 0]


def test_an_image_has_no_known_frames():
    assert not flow.sample_known(jax.random.key(0), 100, 1, 1.0).any()
