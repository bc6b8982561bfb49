"""From noise to latents: a schedule of levels, a solver, guidance, and one `lax.scan` over the steps.

The sampler takes a velocity function, never a model. Levels and guidance are traced values: a new one compiles
nothing anew.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import InputError
from sora_jax.flow import shift_level

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x_BFYXZ, level_BF) -> velocity_BFYXZ


class Schedule(NamedTuple):
    """The levels that sampling visits, from noise to data.

    Attributes:
      levels: (steps + 1,) float32, decreasing to 0: where the solver stands before and after each step.
      told: (steps,) float32: the level that the velocity function is given at each step.
    """

    levels: np.ndarray
    told: np.ndarray


def noise_schedule(steps: int, shift: float, name: str = "linear") -> Schedule:
    """The schedule `name` with the time shift `shift`.

      linear: from 1 to 0 in equal steps, then shifted.
      wan-unipc: as Wan's pipelines have it with UniPC: starting just below 1, and told in whole thousandths.
      wan-euler: as they have it with flow-matching Euler, where the smallest level is shifted twice.

    Raises:
      InputError: no such schedule.
    """
    if name == "linear":
        levels = shift_level(np.linspace(1.0, 0.0, steps + 1), shift)
        told = levels[:-1]
    elif name == "wan-unipc":
        levels = shift_level(np.linspace(1.0, 1e-3, steps + 1)[:-1], shift)
        levels[0] = min(levels[0], 1 - 1e-6)
        told = np.floor(levels * 1000) / 1000
        levels = np.append(levels, 0.0)
    elif name == "wan-euler":
        levels = shift_level(np.linspace(1.0, shift_level(1e-3, shift), steps), shift)
        told = levels
        levels = np.append(levels, 0.0)
    else:
        raise InputError(f"schedule {name!r} does not exist; there are {', '.join(SCHEDULES)}")
    return Schedule(levels.astype(np.float32), told.astype(np.float32))


SCHEDULES = ("linear", "wan-unipc", "wan-euler")


def guided(velocity: Velocity, guidance: jax.Array | float) -> Velocity:
    """Classifier-free guidance (arXiv:2207.12598): unconditional + guidance * (conditional - unconditional).

    `velocity` takes twice the batch, the conditional half first; the result takes the batch once.
    """

    def combined(x_BFYXZ, level_BF):
        both = velocity(jnp.concatenate([x_BFYXZ, x_BFYXZ]), jnp.concatenate([level_BF, level_BF]))
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + guidance * (conditional - unconditional)

    return combined


def guided_in_turn(
    velocity: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    text_2BLD: jax.Array,
    guidance: jax.Array | float,
) -> Velocity:
    """The same with one half after the other, in half the memory.

    `velocity` takes the batch once, and as a third argument the text of one half; the conditional one comes first.
    """

    def combined(x_BFYXZ, level_BF):
        B, F = level_BF.shape

        def flat(text_BLD):  # as the solver's state: see `sample`
            return velocity(x_BFYXZ, level_BF, text_BLD).reshape(B, F, -1)

        conditional, unconditional = jax.lax.map(flat, text_2BLD)
        return (unconditional + guidance * (conditional - unconditional)).reshape(x_BFYXZ.shape)

    return combined


class Solver(NamedTuple):
    """initialize(x) -> state; update(state, velocity, step, levels) -> state; finalize(state) -> x.

    The latents that the model is to see next are always `finalize(state)`. Neighbouring samples are not mixed, so
    whatever holds for the velocity of one frame holds for the sample of that frame.
    """

    initialize: Callable[[jax.Array], Any]
    update: Callable[[Any, jax.Array, jax.Array, jax.Array], Any]
    finalize: Callable[[Any], jax.Array]


def _euler_update(x, velocity, step, levels):
    return x + (levels[step + 1] - levels[step]) * velocity


class UniPCState(NamedTuple):
    """Latents at the current level, the same one step before (corrected), and the last two predictions of x_0."""

    x: jax.Array
    previous_x: jax.Array
    data0: jax.Array
    data1: jax.Array


def _unipc_update(state: UniPCState, velocity, step, levels) -> UniPCState:
    """UniPC of order 2 with B(h) = exp(h) - 1 (arXiv:2302.04867), predicting data, for alpha = 1 - t, sigma = t.

    The new evaluation first corrects the latents it was made at, then predicts the next ones. First and last step are
    of order 1.
    """
    # At t = 1 the signal-to-noise ratio is zero; the bound is the one public implementations use.
    t = jnp.minimum(levels, 1 - 1e-6)

    def log_snr(t):
        return jnp.log1p(-t) - jnp.log(jnp.maximum(t, 1e-12))

    def exponential_step(x, data, s, t):
        """Exact for constant data; also h, and alpha_t * (exp(-h) - 1)."""
        h = log_snr(t) - log_snr(s)
        decay = (1 - s) * t / s - (1 - t)  # alpha_t * expm1(-h), finite at t = 0
        return t / s * x - decay * data, h, decay

    now, before, before2 = t[step], t[jnp.maximum(step - 1, 0)], t[jnp.maximum(step - 2, 0)]
    data = state.x - levels[step] * velocity

    # Corrector: repeat the step to `now`, this time knowing the data at its end.
    x, h, decay = exponential_step(state.previous_x, state.data0, jnp.maximum(before, 1e-6), now)
    h = jnp.where(step > 0, h, 1.0)
    phi2 = jnp.expm1(-h) / -h - 1
    phi3 = phi2 / -h - 0.5
    b1, b2 = phi2 / jnp.expm1(-h), 2 * phi3 / jnp.expm1(-h)
    ratio = jnp.where(step > 1, (log_snr(before2) - log_snr(before)) / h, -1.0)
    rho1 = jnp.where(step > 1, (b2 - b1) / (ratio - 1), 0.0)
    rho2 = jnp.where(step > 1, b1 - rho1, 0.5)
    correction = rho1 * (state.data1 - state.data0) / ratio + rho2 * (data - state.data0)
    x = jnp.where(step > 0, x - decay * correction, state.x)

    # Predictor: on to the next level.
    following = t[step + 1]
    next_x, h, decay = exponential_step(x, data, now, following)
    second_order = (step > 0) & (step < levels.shape[0] - 2)
    ratio = jnp.where(second_order, (log_snr(before) - log_snr(now)) / h, -1.0)
    next_x -= jnp.where(second_order, 0.5, 0.0) * decay * (state.data0 - data) / ratio
    return UniPCState(next_x, x, data, state.data0)


SOLVERS = {
    "euler": Solver(lambda x: x, _euler_update, lambda x: x),
    "unipc": Solver(lambda x: UniPCState(x, x, jnp.zeros_like(x), jnp.zeros_like(x)), _unipc_update, lambda s: s.x),
}


def sample(
    velocity: Velocity,
    noise_BFYXZ: jax.Array,
    schedule: Schedule,
    solver: str = "unipc",
    known: tuple[jax.Array, jax.Array] | None = None,
    progress: Callable[[Any], None] | None = None,
) -> jax.Array:
    """Denoises along the schedule: one scan, one call of `velocity` per step.

    Args:
      velocity: (x_BFYXZ, level_BF) -> velocity_BFYXZ.
      noise_BFYXZ: latents at the first level, float32.
      schedule: as `noise_schedule` gives it; its levels may be traced.
      solver: a name in `SOLVERS`.
      known: latents_BFYXZ and a bool mask_BF of the frames to take from them; those stay exactly, at level 0.
      progress: called on the host from inside the scan, with the number of the step whose velocity is there.
    Returns:
      latents_BFYXZ.
    Raises:
      InputError: no such solver.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver {solver!r} does not exist; there are {', '.join(SOLVERS)}")
    initialize, update, finalize = SOLVERS[solver]
    levels, told = (jnp.asarray(part, jnp.float32) for part in schedule)
    B, F = noise_BFYXZ.shape[:2]
    known_BF = jnp.zeros((B, F), bool) if known is None else known[1]

    def fill(x):
        return x if known is None else jnp.where(known_BF[:, :, None, None, None], known[0], x)

    # The solver's state lies flat: a TPU fills up the few channels of latents to 128.
    def latents(state):
        return fill(finalize(state).reshape(noise_BFYXZ.shape))

    def step(state, number):
        level_BF = jnp.where(known_BF, 0.0, told[number])
        velocity_BFYXZ = velocity(latents(state), level_BF)
        if progress is not None:
            # One element of the velocity goes along, so that the call waits for it.
            jax.debug.callback(lambda number, _: progress(number), number, velocity_BFYXZ[0, 0, 0, 0, 0])
        return update(state, velocity_BFYXZ.reshape(B, F, -1), number, levels), None

    state, _ = jax.lax.scan(step, initialize(noise_BFYXZ.reshape(B, F, -1)), jnp.arange(levels.shape[0] - 1))
    return latents(state)
