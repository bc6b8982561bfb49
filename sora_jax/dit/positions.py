"""3-D rotary positions: each head's width is shared among time, rows and columns (RoPE, arXiv:2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np


def axis_widths(head_width: int) -> tuple[int, int, int]:
    """How Wan shares a head among time, rows and columns: 128 -> (44, 42, 42)."""
    space = 2 * (head_width // 6)
    return head_width - 2 * space, space, space


def rotary_angles(frames: int, rows: int, columns: int, head_width: int) -> np.ndarray:
    """Angle of each token and pair of coordinates, (N, E/2) float32; tokens in order frame, row, column."""
    grid = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
    angles = []
    for position, width in zip(grid, axis_widths(head_width), strict=True):
        frequency = 10000.0 ** (-np.arange(0, width, 2) / width)
        angles.append(position.reshape(-1, 1) * frequency)
    return np.concatenate(angles, axis=1).astype(np.float32)


def rotate(x_BNKE: jax.Array, angles_NE: jax.Array) -> jax.Array:
    """Turns each pair of coordinates (i, i + E/2) by its angle, in float32.

    Pairs are half a head apart, not neighbours: only whole halves move, which the TPU's lanes like. Attention is the
    same for any pairing that queries and keys share, so weights for neighbouring pairs load by reordering columns.
    """
    cos, sin = jnp.cos(angles_NE)[:, None, :], jnp.sin(angles_NE)[:, None, :]
    a, b = jnp.split(x_BNKE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BNKE.dtype)
