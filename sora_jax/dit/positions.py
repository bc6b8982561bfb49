"""3-D rotary positions: each head's width is shared among time, rows and columns (RoPE, arXiv:2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np


def axis_widths(head_width: int) -> tuple[int, int, int]:
    """How Wan shares a head among time, rows and columns: 128 -> (44, 42, 42)."""
    space = 2 * (head_width // 6)
    return head_width - 2 * space, space, space


def rotary_angles(frames: int, rows: int, columns: int, head_width: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles of each frame, (F, Et/2) float32, and of each place in a frame, row by row, (S, E/2 - Et/2) float32."""
    grid = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    time, *space = (
        np.reshape(position, (-1, 1)) * 10000.0 ** (-np.arange(0, width, 2) / width)
        for position, width in zip((np.arange(frames), *grid), axis_widths(head_width), strict=True)
    )
    return time.astype(np.float32), np.concatenate(space, axis=1).astype(np.float32)


def rotate(x_BKFSE: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair of coordinates (i, i + E/2) by its angle, as `rotary_angles` gives them, in float32.

    Pairs are half a head apart, not neighbours: only whole halves move, which the TPU's lanes like. Attention is the
    same for any pairing that queries and keys share, so weights for neighbouring pairs load by reordering columns.
    """
    time_FE, space_SE = (jnp.asarray(part) for part in angles)
    shape = (len(time_FE), len(space_SE))

    def turned(function):
        time = jnp.broadcast_to(function(time_FE)[:, None], (*shape, time_FE.shape[1]))
        space = jnp.broadcast_to(function(space_SE), (*shape, space_SE.shape[1]))
        return jnp.concatenate([time, space], axis=-1)

    cos, sin = turned(jnp.cos), turned(jnp.sin)
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    # Halves change places by a product, which is exact: half a head alone would fill half of a TPU's lanes.
    E = x_BKFSE.shape[-1]
    swap = jnp.asarray(np.roll(np.eye(E), E // 2, axis=0), x_BKFSE.dtype)
    swapped_BKFSE = jnp.matmul(x_BKFSE, swap, precision="highest")
    return (x_BKFSE * cos + swapped_BKFSE * sin).astype(x_BKFSE.dtype)
