"""What is where in a clip, as a coarse map on the DiT's grid of tokens: features for the DiT to align with.

Representation alignment (REPA, arXiv:2410.06940) asks tokens in the middle of a DiT to predict what a vision encoder
sees in the clean video, which teaches a young model in a fraction of the steps what there is to draw and where. The
worlds know what they show, so that the map below takes the place of the vision encoder.
"""

import math

import jax
import jax.numpy as jnp

from sora_jax.data.worlds import vocabulary
from sora_jax.data.worlds.render import Truth
from sora_jax.data.worlds.scenes import Scene

_BLUR = 0.15  # of the frame; an object is a Gaussian spot of this standard deviation times the root of one half
_SPOT_AREA = math.pi * _BLUR**2 / 2  # its mean square over the frame

# Of an object, in the order of the map's channels.
PROPERTIES = {
    "color": vocabulary.COLORS,
    "shape": vocabulary.SHAPES,
    "size": vocabulary.SIZES,
    "motion": vocabulary.MOTIONS,
}
_GLOBAL = {
    "background": vocabulary.BACKGROUNDS,
    "camera": vocabulary.CAMERAS,
    "occluder": vocabulary.OCCLUDERS,
}
CHANNELS = sum(len(names) for names in (*PROPERTIES.values(), *_GLOBAL.values())) + 2


def layout(scene: Scene, truth: Truth, frames: int, rows: int, columns: int) -> jax.Array:
    """The map of a clip of 1 + n (frames - 1) frames, n to a latent frame after the first: (F, Y, X, CHANNELS) float32.

    Each object leaves a spot on the channels of its colour, shape, size and motion, also while it is hidden, since
    it is still there; two channels say how far off the token's centre it is. Background, camera and occluder are
    the same everywhere. Channels are scaled to a mean square of about one.
    """
    y, x = (jnp.arange(rows) + 0.5) / rows, (jnp.arange(columns) + 0.5) / columns
    from_x = truth.center_T2[:, :, None, None, 0] - x
    from_y = truth.center_T2[:, :, None, None, 1] - y[:, None]
    spot = jnp.exp(-0.5 * (from_x**2 + from_y**2) / (0.5 * _BLUR**2)) * truth.present[:, None, None, None]
    parts = [jnp.stack([jnp.sum(spot * by, axis=0) for by in (from_x, from_y)], -1) * math.sqrt(4 / _SPOT_AREA) / _BLUR]
    for name, names in PROPERTIES.items():
        is_2K = jax.nn.one_hot(getattr(scene, name), len(names))
        parts.append(jnp.einsum("otyx,ok->tyxk", spot, is_2K) * math.sqrt(len(names) / _SPOT_AREA))
    for name, names in _GLOBAL.items():
        is_K = jax.nn.one_hot(getattr(scene, name), len(names)) * math.sqrt(len(names))
        parts.append(jnp.broadcast_to(is_K, (*parts[0].shape[:3], len(names))))
    map_TYXC = jnp.concatenate(parts, axis=-1)
    if frames == 1:
        return map_TYXC[:1]
    rest = map_TYXC[1:].reshape(frames - 1, -1, *map_TYXC.shape[1:]).mean(axis=1)
    return jnp.concatenate([map_TYXC[:1], rest])


def objects(layout_BFYXC: jax.Array) -> jax.Array:
    """Where objects are, read off a layout: (..., Y, X) float32, 1 at their centres, 0 where none is near."""
    colors = layout_BFYXC[..., 2 : 2 + len(vocabulary.COLORS)].astype(jnp.float32)  # behind the two of the offset
    return jnp.clip(2 * colors.sum(-1) / math.sqrt(len(vocabulary.COLORS) / _SPOT_AREA), 0, 1)
