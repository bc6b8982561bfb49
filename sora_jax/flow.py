"""Rectified flow: straight paths from data (level 0) to noise (level 1), and the velocity along them.

    x_t = (1 - t) x_0 + t noise        velocity = d x_t / dt = noise - x_0

(Liu et al., arXiv:2209.03003; Esser et al., arXiv:2403.03206 for the distribution of levels and the shift.)
The level is given per latent frame, `level_BF`: a known frame has level 0 while the others are being denoised, so
that starting from an image, extending and connecting clips are all the same task.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def shift_level(level: jax.Array, shift: float | jax.Array) -> jax.Array:
    """Moves levels in [0, 1] towards noise: a t / (1 + (a - 1) t), which keeps 0 and 1 (arXiv:2403.03206, eq. 23)."""
    return shift * level / (1 + (shift - 1) * level)


MISTAKES_FROM = 0.5  # below this level a mistake is plain to see, and too late to undo


class Levels(NamedTuple):
    """Which noise levels training draws: sigmoid of a standard normal, but uniform for a share of the clips.

    The normal favours the middle, where most is to be learnt, and all but leaves out the levels near 1: of 400 levels
    at shift 2 one is above 0.97. Sampling starts there, and decides there what all of a clip has in common, such as
    day or night: ten thousand noisy numbers together tell it long before any one of them does.

    Attributes:
      shift: of the normal's levels, see `shift_level`.
      uniform_share: how many of the clips have uniform levels.
      uniform_shift: of those.
    """

    shift: float = 1.0
    uniform_share: float = 0.0
    uniform_shift: float = 1.0


def sample_level(key: jax.Array, batch: int, levels: Levels) -> jax.Array:
    """One level for each clip: (B,) float32 in [0, 1)."""
    normal_key, uniform_key, share_key = jax.random.split(key, 3)
    normal_B = shift_level(jax.nn.sigmoid(jax.random.normal(normal_key, (batch,))), levels.shift)
    uniform_B = shift_level(jax.random.uniform(uniform_key, (batch,)), levels.uniform_shift)
    return jnp.where(jax.random.uniform(share_key, (batch,)) < levels.uniform_share, uniform_B, normal_B)


def sample_known(key: jax.Array, batch: int, frames: int, share: float) -> jax.Array:
    """Which latent frames are given clean in training: (B, F) bool, never all of a clip.

    A `share` of the clips gets one of: the first frame, the last, both, a prefix, a random subset.
    """
    if frames < 2:
        return jnp.zeros((batch, frames), bool)
    chosen, pattern, length, subset = jax.random.split(key, 4)
    frame_F = jnp.arange(frames)
    length_B1 = jax.random.randint(length, (batch, 1), 1, frames)  # at most frames - 1
    first_F, last_F = frame_F == 0, frame_F == frames - 1
    patterns_5BF = jnp.stack(
        [jnp.broadcast_to(p, (batch, frames)) for p in (first_F, last_F, first_F | last_F)]
        + [frame_F < length_B1, jax.random.uniform(subset, (batch, frames)) < 0.5]
    )
    known_BF = patterns_5BF[jax.random.randint(pattern, (batch,), 0, 5), jnp.arange(batch)]
    known_BF &= ~known_BF.all(axis=1, keepdims=True)
    return known_BF & (jax.random.uniform(chosen, (batch, 1)) < share)


def add_noise(x0_BFYXZ: jax.Array, noise_BFYXZ: jax.Array, level_BF: jax.Array) -> jax.Array:
    """x_t at each frame's level."""
    t = level_BF[:, :, None, None, None]
    return (1 - t) * x0_BFYXZ + t * noise_BFYXZ


class Noised(NamedTuple):
    """What the model sees of clips in training, and what it is to find; known_BF are the frames that are given."""

    x_BFYXZ: jax.Array
    level_BF: jax.Array
    noise_BFYXZ: jax.Array
    known_BF: jax.Array


def noised(
    key: jax.Array,
    x0_BFYXZ: jax.Array,
    levels: Levels,
    known_share: float,
    mistaken_BFYXZ: jax.Array | None = None,
) -> Noised:
    """Clips at random levels, with the frames clean that are known (see `Levels`, `sample_known`).

    Sampling makes mistakes, and goes on from them; training only ever sees what comes from the clip itself. Where
    `mistaken_BFYXZ` differs from `x0_BFYXZ`, at levels from `MISTAKES_FROM` on, x_t comes from the former, while the
    velocity still leads to the latter: x_t = (1 - t) mistaken + t noise, velocity = (x_t - x_0) / t. It is as if the
    noise, which is what comes back, had been another. (Input perturbation, arXiv:2301.11706, adds plain noise.)
    """
    level_key, noise_key, known_key = jax.random.split(key, 3)
    B, F = x0_BFYXZ.shape[:2]
    known_BF = sample_known(known_key, B, F, known_share)
    level_BF = jnp.where(known_BF, 0.0, sample_level(level_key, B, levels)[:, None])
    noise_BFYXZ = jax.random.normal(noise_key, x0_BFYXZ.shape)
    if mistaken_BFYXZ is not None:
        ratio_BF = jnp.where(level_BF >= MISTAKES_FROM, (1 - level_BF) / jnp.maximum(level_BF, MISTAKES_FROM), 0.0)
        noise_BFYXZ += ratio_BF[:, :, None, None, None] * (mistaken_BFYXZ - x0_BFYXZ)
    return Noised(add_noise(x0_BFYXZ, noise_BFYXZ, level_BF), level_BF, noise_BFYXZ, known_BF)


def velocity_loss(
    predicted_BFYXZ: jax.Array,
    x0_BFYXZ: jax.Array,
    noise_BFYXZ: jax.Array,
    known_BF: jax.Array,
    weight_BFYXZ: jax.Array | float = 1.0,
) -> jax.Array:
    """Mean squared error of the velocity over the frames that are not known; scalar float32, 0 where all are.

    `weight_BFYXZ`, or anything that broadcasts to it, such as weights of the channels, makes it a weighted mean.
    """
    weight_BFYXZ = weight_BFYXZ * jnp.where(known_BF, 0.0, 1.0)[:, :, None, None, None]
    weight_BFYXZ = jnp.broadcast_to(weight_BFYXZ, x0_BFYXZ.shape)
    squared_BFYXZ = (predicted_BFYXZ - (noise_BFYXZ - x0_BFYXZ)) ** 2
    return jnp.sum(weight_BFYXZ * squared_BFYXZ) / jnp.maximum(jnp.sum(weight_BFYXZ), 1e-12)
