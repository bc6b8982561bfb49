"""The sampler, on Gaussian data: there the velocity and the end of every path are known in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import sampler
from sora_jax.errors import InputError

SHAPE = (2, 3, 1, 2, 2)
MEAN, DEVIATION = 0.7, 0.4


def gaussian_velocity(x, t):
    """E[noise - x_0 | x_t = x] for x_0 ~ Normal(MEAN, DEVIATION^2)."""
    a = 1 - t
    gain = (t - a * DEVIATION**2) / (a**2 * DEVIATION**2 + t**2)
    return gain * (x - a * MEAN) - MEAN


def gaussian_path(noise, t):
    """Where the path that starts at `noise` is at level t."""
    a = 1 - t
    return a * MEAN + np.sqrt(a**2 * DEVIATION**2 + t**2) * noise


def velocity(x_BFYXZ, level_BF):
    return gaussian_velocity(x_BFYXZ, level_BF[:, :, None, None, None])


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def plain(levels):
    """A schedule that tells the velocity function the very levels that the solver visits."""
    return sampler.Schedule(levels, levels[:-1])


def linear(steps, shift):
    return sampler.noise_schedule(steps, shift).levels


def error(solver, levels, noise):
    """Largest error at the last level, starting on the exact path at the first."""
    start = gaussian_path(noise, levels[0])
    end = sampler.sample(velocity, start.astype(np.float32), plain(levels), solver)
    return float(np.abs(end - gaussian_path(noise, levels[-1])).max())


def test_noise_levels():
    levels, told = sampler.noise_schedule(10, 3.0)
    np.testing.assert_array_equal(told, levels[:-1])
    assert levels.shape == (11,) and levels.dtype == np.float32
    assert levels[0] == 1.0 and levels[-1] == 0.0 and (np.diff(levels) < 0).all()
    np.testing.assert_allclose(linear(4, 1.0), [1, 0.75, 0.5, 0.25, 0])
    assert levels[5] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


def test_euler_is_of_order_1(noise):
    errors = [error("euler", linear(steps, 1.0), noise) for steps in (16, 32, 64)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert 0.8 < orders[-1] < 1.2


def test_unipc_is_of_order_2_away_from_the_ends(noise):
    # From 0.9 to 0.1 the signal-to-noise ratio is finite, and the order can be measured above float32 rounding.
    errors = [error("unipc", np.linspace(0.9, 0.1, steps + 1, dtype=np.float32), noise) for steps in (6, 12, 24)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert orders[-1] > 1.7, (errors, orders)


@pytest.mark.parametrize("steps", [8, 16, 32])
def test_unipc_is_far_better_than_euler_at_equal_steps(noise, steps):
    levels = linear(steps, 1.0)
    assert error("unipc", levels, noise) < error("euler", levels, noise) / 4
    # With the shift that sampling uses, a few steps leave a long last one, of order 1 in both solvers, and most of
    # the error is made there.
    levels = linear(steps, 3.0)
    assert error("unipc", levels, noise) < error("euler", levels, noise)


@pytest.mark.parametrize("solver", list(sampler.SOLVERS))
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_are_finite_and_one_step_is_the_mean(noise, solver, steps):
    end = sampler.sample(velocity, noise, sampler.noise_schedule(steps, 3.0), solver)
    assert np.isfinite(end).all()
    if steps == 1:  # from pure noise the best prediction of the data is its mean
        np.testing.assert_allclose(end, MEAN, atol=1e-4)


def literal_unipc(x: float, levels: list[float]) -> list[float]:
    """UniPC of order 2, predicting data, as arXiv:2302.04867 states it, for one number in float64.

    UniP and UniC add to the exact step for constant data alpha_t B(h) sum_m a_m D_m / r_m, where D_m is the
    difference of the data at lambda + r_m h from that at lambda. Coefficients match the exponential integral of
    polynomials, here by quadrature; with a single point both take a = 1/2. Returns the x after each step.
    """
    nodes, weights = np.polynomial.legendre.leggauss(80)
    nodes, weights = (nodes + 1) / 2, weights / 2

    def data(x, t):
        return x - t * gaussian_velocity(x, t)

    def half_log_snr(t):
        return math.log((1 - t) / t)

    def advance(x, s, t, m0, points):
        """The step from level s to t; `points` are (r, data) besides r = 0."""
        h = half_log_snr(t) - half_log_snr(s)
        B = 1 - math.exp(-h)
        if len(points) == 1:
            a = [0.5]
        else:
            moments = [h * np.sum(weights * np.exp(-h * (1 - nodes)) * nodes**k) for k in range(1, len(points) + 1)]
            vandermonde = [[r ** (k - 1) for r, _ in points] for k in range(1, len(points) + 1)]
            a = np.linalg.solve(vandermonde, np.array(moments) / B) if points else []
        bracket = B * m0 + B * sum(c * (m - m0) / r for c, (r, m) in zip(a, points, strict=True))
        return t / s * x + (1 - t) * bracket

    path = []
    m_before, m_before2, corrected_before = None, None, None
    bounded = [min(t, 1 - 1e-6) for t in levels]
    for i in range(len(levels) - 1):
        now, following = bounded[i], bounded[i + 1]
        m = data(x, levels[i])
        if i > 0:  # UniC: the step to here again, with the data found here at r = 1
            s, points = bounded[i - 1], [(1.0, m)]
            if i > 1:
                h = half_log_snr(now) - half_log_snr(s)
                points.insert(0, ((half_log_snr(bounded[i - 2]) - half_log_snr(s)) / h, m_before2))
            x = advance(corrected_before, s, now, m_before, points)
        corrected = x
        if following == 0:  # h is infinite: the data itself, of order 1
            x = m
        elif i == 0 or i == len(levels) - 2:
            x = advance(x, now, following, m, [])
        else:
            h = half_log_snr(following) - half_log_snr(now)
            r = (half_log_snr(bounded[i - 1]) - half_log_snr(now)) / h
            x = advance(x, now, following, m, [(r, m_before)])
        m_before2, m_before, corrected_before = m_before, m, corrected
        path.append(x)
    return path


@pytest.mark.parametrize("levels", [linear(7, 3.0), np.linspace(0.95, 0.05, 6, dtype=np.float32)])
def test_unipc_equals_a_literal_statement_of_the_algorithm(noise, levels):
    end = sampler.sample(velocity, noise, plain(levels), "unipc")
    expected = [literal_unipc(float(x), [float(t) for t in levels])[-1] for x in noise.ravel()]
    np.testing.assert_allclose(np.ravel(end), expected, atol=2e-5)


def test_guidance_is_linear_between_and_beyond_the_two_halves():
    def halves(x, level):
        count = x.shape[0] // 2
        np.testing.assert_array_equal(x[:count], x[count:])
        np.testing.assert_array_equal(level[:count], level[count:])
        return jnp.concatenate([jnp.full_like(x[:count], 3.0), jnp.full_like(x[count:], 1.0)])

    x, level = jnp.ones(SHAPE), jnp.ones(SHAPE[:2])
    for guidance, expected in [(0.0, 1.0), (1.0, 3.0), (0.5, 2.0), (4.0, 9.0)]:
        result = sampler.guided(halves, guidance)(x, level)
        assert result.shape == SHAPE
        np.testing.assert_allclose(result, expected)


def test_guidance_in_turn_is_guidance():
    offsets_2 = np.float32([3.0, -1.0])

    def both(x, level):
        return velocity(x, level) + jnp.repeat(offsets_2, len(x) // 2)[:, None, None, None, None]

    x, level = jax.random.normal(jax.random.key(3), SHAPE), jnp.full(SHAPE[:2], 0.5)
    together = sampler.guided(both, 2.5)(x, level)
    in_turn = sampler.guided_in_turn(lambda x, level, offset: velocity(x, level) + offset, offsets_2, 2.5)(x, level)
    np.testing.assert_allclose(in_turn, together, rtol=1e-6)


def test_new_levels_and_guidance_compile_nothing_anew(noise):
    def both(x, level):
        return jnp.concatenate([velocity(*(y[: len(y) // 2] for y in (x, level))), jnp.zeros_like(x[len(x) // 2 :])])

    @jax.jit
    def run(noise, levels, guidance):
        return sampler.sample(sampler.guided(both, guidance), noise, plain(levels))

    first = run(noise, linear(4, 1.0), jnp.float32(1.0))
    second = run(noise, linear(4, 5.0), jnp.float32(2.5))
    assert run._cache_size() == 1
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("solver", list(sampler.SOLVERS))
def test_known_frames_stay_and_are_seen_clean(noise, solver):
    latents = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    mask = np.array([[True, False, False], [False, True, True]])
    levels, seen = linear(3, 3.0), []

    def watched(x, level):
        jax.debug.callback(lambda x, level: seen.append((np.array(x), np.array(level))), x, level, ordered=True)
        return velocity(x, level)

    end = sampler.sample(watched, noise, plain(levels), solver, known=(latents, mask))
    jax.effects_barrier()
    assert len(seen) == 3
    for number, (x, level) in enumerate(seen):
        np.testing.assert_array_equal(x[mask], latents[mask])
        np.testing.assert_array_equal(level, np.where(mask, 0.0, levels[number]))
    np.testing.assert_array_equal(end[mask], latents[mask])
    # The other frames are what they would have been: this velocity does not mix frames.
    without = sampler.sample(velocity, noise, plain(levels), solver)
    np.testing.assert_allclose(end[~mask], without[~mask], atol=1e-5)


def test_progress_hears_of_every_step_once(noise):
    heard = []
    sampler.sample(velocity, noise, sampler.noise_schedule(5, 1.0), progress=lambda step: heard.append(int(step)))
    jax.effects_barrier()
    assert sorted(heard) == [0, 1, 2, 3, 4]


def test_unknown_solver(noise):
    with pytest.raises(InputError, match="'heun' does not exist; there are euler, unipc"):
        sampler.sample(velocity, noise, sampler.noise_schedule(2, 1.0), "heun")
