"""Drawing a scene: signed distances turned into antialiased coverage, one frame at a time, in pure JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.data.worlds.scenes import ABOVE, BELOW, HALF_WIDTH, PAN_TRAVEL, RADII, ZOOM_RANGE, Scene

# In the order of vocabulary.COLORS.
PALETTE = (
    (0.90, 0.07, 0.09),
    (1.00, 0.50, 0.02),
    (1.00, 0.89, 0.06),
    (0.08, 0.66, 0.20),
    (0.10, 0.28, 0.95),
    (0.50, 0.10, 0.76),
    (1.00, 0.43, 0.72),
    (1.00, 1.00, 1.00),
)
_SHADE = (0.2, 0.2, 0.16, 0.2, 0.2, 0.2, 0.16, 0.06)  # how much darker the far side is; white stays white

# Per background: sky top, sky bottom, ground top, ground bottom. Dull (saturation below 0.25) and at most 0.8
# bright, so that objects stand out.
_SKY_GROUND = (
    ((0.60, 0.60, 0.60),) * 4,
    ((0.47, 0.48, 0.51), (0.70, 0.69, 0.66)) * 2,
    ((0.56, 0.62, 0.70), (0.73, 0.75, 0.77), (0.53, 0.56, 0.46), (0.44, 0.46, 0.38)),
    ((0.50, 0.53, 0.58), (0.60, 0.62, 0.66), (0.75, 0.76, 0.775), (0.69, 0.71, 0.74)),
    ((0.160, 0.170, 0.200), (0.290, 0.300, 0.335), (0.190, 0.195, 0.200), (0.140, 0.145, 0.150)),
)
_HAS_GROUND = (0.0, 0.0, 1.0, 1.0, 1.0)
_PANELS = (0.03, 0.025, 0.0, 0.0, 0.0)
_PATCHES = (0.0, 0.0, 0.04, 0.025, 0.05)  # at night they are what shows a moving camera
_DOTS = (0.0, 0.0, 0.0, 0.6, 0.7)
_DOT_SIZE = (0.1, 0.1, 0.1, 0.12, 0.13)
_DOT_SHARE = (1.0, 1.0, 1.0, 0.5, 0.35)
_SCREEN_GRAY = (0.30, 0.27, 0.27, 0.30, 0.50)
_COS_36, _SIN_36 = 0.8090170, 0.5877853
_NOTCH = 0.4  # inner over outer radius of the star; that of a pentagram is 0.38, and more looks like a ball
_TINTED = (1.0, 0.6, 0.0, 0.0, 0.0)


class Truth(NamedTuple):
    """What a clip shows, frame by frame. The leading axis of size 2 is the object."""

    present: jax.Array  # bool [2]
    color: jax.Array  # int32 [2]
    shape: jax.Array  # int32 [2]
    size: jax.Array  # int32 [2]
    center_T2: jax.Array  # float32 [2, T, 2] x and y of the silhouette's centroid, in [0, 1] of the frame
    visible_T: jax.Array  # float32 [2, T] visible pixels / pixels of the whole silhouette; 0 where not present
    camera: jax.Array  # int32 []


def render(scene: Scene, frames: int, size: tuple[int, int]) -> tuple[jax.Array, Truth]:
    """Draw a scene.

    Args:
        scene: one scene (use `jax.vmap` for a batch).
        frames: number of frames T, evenly spread over the clip; 1 gives its start.
        size: height and width in pixels.

    Returns:
        video_THWC, float32 in [0, 1], and its Truth.
    """
    return render_at(scene, jnp.arange(frames) / max(frames - 1, 1), size)


def render_at(scene: Scene, u_T: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, Truth]:
    """Draw the moments `u_T`, float32 in [0, 1] over the clip: a window of a scene; otherwise as `render`."""
    frame_T3HW, center_T22, visible_T2 = jax.vmap(lambda u: _frame(scene, u, size))(u_T)
    truth = Truth(
        scene.present,
        scene.color,
        scene.shape,
        scene.size,
        jnp.swapaxes(center_T22, 0, 1),
        visible_T2.T * scene.present[:, None],
        scene.camera,
    )
    return jnp.moveaxis(frame_T3HW, 1, -1), truth


def _frame(scene, u, size):
    height, width = size
    unit = min(size)
    x = ((jnp.arange(width) + 0.5) / width)[None, :]
    y = ((jnp.arange(height) + 0.5) / height)[:, None]
    eye_x, zoom = _camera(scene.camera, u)
    far_x, far_zoom = _camera(scene.backdrop, u)
    image = _background(scene, (x - 0.5) / far_zoom + far_x, (y - 0.5) / far_zoom + 0.5, far_zoom * unit)

    pace = u - scene.dwell * jnp.sin(4 * jnp.pi * u) / (4 * jnp.pi)
    screen_x = scene.screen[0] + u * (scene.screen[1] - scene.screen[0])
    screen_image, screen_cover = _occluder(scene, screen_x, x, y, size)

    covers, centers = [], []
    for i in range(2):
        center = scene.path[i, 0] + pace * (scene.path[i, 1] - scene.path[i, 0])
        phase = jnp.where(u >= 1, 0.0, (u * scene.hop[i, 1]) % 1.0)
        center = center - jnp.stack([0.0, scene.hop[i, 0] * 4 * phase * (1 - phase)])
        below = jnp.asarray(BELOW)[scene.shape[i]]
        radius = jnp.asarray(RADII)[scene.size[i]]
        gap = jnp.maximum(scene.floor[i] - center[1] - below * radius, 0.0)
        center = (center - jnp.stack([eye_x, 0.5])) * zoom + 0.5
        radius = radius * zoom

        # Offsets from the centroid over the frame's shorter side: shapes keep their form at any aspect.
        dx, dy = (x - center[0]) * width / unit, (y - center[1]) * height / unit
        shadow_y = dy - below * radius - gap * zoom * height / unit
        shadow_x = dx / (1.05 * jnp.asarray(HALF_WIDTH)[scene.shape[i]] * radius + 0.3 * gap)
        shadow = jnp.exp(-2.0 * (shadow_x**2 + (shadow_y / (0.26 * radius)) ** 2))
        image = image * (1 - scene.present[i] * 0.38 * jnp.exp(-3 * gap) * shadow)

        qx, qy = dx / radius, dy / radius
        cover = jnp.clip(0.5 - _distance(scene.shape[i], qx, qy) * radius * unit, 0, 1) * scene.present[i]
        light = jnp.clip(0.5 + 0.28 * (qx + 1.2 * qy), 0, 1)
        shade = 1 - jnp.asarray(_SHADE)[scene.color[i]] * light
        image = image + cover * (shade * jnp.asarray(PALETTE)[scene.color[i]][:, None, None] - image)
        covers.append(cover)
        centers.append(center)

    image = image + screen_cover * (screen_image - image)
    visible = [(c * (1 - screen_cover)).sum() / jnp.maximum(c.sum(), 1e-6) for c in covers]
    return jnp.clip(image, 0, 1), jnp.stack(centers), jnp.stack(visible)


def _camera(camera, u):
    """Where the camera looks (x) and how close."""
    pan = jnp.array([0.0, -1.0, 1.0, 0.0, 0.0])[camera] * PAN_TRAVEL
    toward = jnp.array([0.0, 0.0, 0.0, u, 1 - u])[camera]
    return 0.5 + pan * (u - 0.5), 1 + (ZOOM_RANGE - 1) * toward


def _distance(shape, x, y):
    """Signed distance to the outline, in radii; y points down. Beyond corners it is a lower bound."""
    x, y = jnp.abs(x), -y
    ball = jnp.sqrt(x * x + y * y) - 1
    cube = jnp.maximum(x, jnp.abs(y)) - HALF_WIDTH[1]
    rise, run = ABOVE[2] + BELOW[2], HALF_WIDTH[2]
    pyramid = jnp.maximum((rise * x + run * (y - ABOVE[2])) / (rise**2 + run**2) ** 0.5, -y - BELOW[2])
    # Two reflections fold all five points of the star onto the upper one; what is left is one straight edge.
    for normal_x, normal_y in ((_COS_36, -_SIN_36), (-_COS_36, -_SIN_36)):
        over = 2 * jnp.maximum(normal_x * x + normal_y * y, 0)
        x, y = x - over * normal_x, y - over * normal_y
    tip, notch = ABOVE[3], _NOTCH * ABOVE[3]
    edge_x, edge_y = notch * _SIN_36, notch * _COS_36 - tip
    star = (edge_x * (y - tip) - edge_y * jnp.abs(x)) / (edge_x**2 + edge_y**2) ** 0.5
    return jnp.where(shape < 2, jnp.where(shape == 0, ball, cube), jnp.where(shape == 2, pyramid, star))


def _background(scene, x, y, pixels):
    """Image [3, H, W] at world coordinates x [1, W] and y [H, 1]; `pixels` per unit of length."""
    kind, look = scene.background, scene.look

    def pick(table):
        return jnp.asarray(table)[kind]

    sky_top, sky_bottom, ground_top, ground_bottom = pick(_SKY_GROUND)[:, :, None, None]
    tint = 0.032 * jnp.cos(2 * jnp.pi * (look[0] + jnp.arange(3) / 3))[:, None, None] + 0.2 * (look[1] - 0.5)
    # The gradient backgrounds run either way.
    flip = (kind == 1) & (look[2] < 0.5)
    sky_top, sky_bottom = jnp.where(flip, sky_bottom, sky_top), jnp.where(flip, sky_top, sky_bottom)

    horizon = 0.47 + 0.1 * look[3]
    hills = horizon - 0.05 * jnp.sin(5.1 * x + 6.3 * look[4]) * jnp.sin(2.3 * x + 6.3 * look[5]) - 0.02
    ground = pick(_HAS_GROUND) * jnp.clip((y - hills) * pixels + 0.5, 0, 1)
    sky = sky_top + (sky_bottom - sky_top) * jnp.clip(y / jnp.where(pick(_HAS_GROUND) > 0, horizon, 1.0), 0, 1)
    soil = ground_top + (ground_bottom - ground_top) * jnp.clip((y - horizon) / (1 - horizon), 0, 1)

    wave = jnp.sin(2 * jnp.pi * (2.5 * x + look[4]))
    panels = pick(_PANELS) * jnp.tanh(3 * wave)
    # Perspective makes the patches of the ground shrink towards the horizon, where they fade before they get
    # too fine.
    near = jnp.maximum(y - horizon, 0)
    depth = 0.35 / (0.2 + near)
    patches = jnp.sin((x - 0.5) * depth * 16 + 6.3 * look[5]) * jnp.sin(depth * 9 + 6.3 * look[4])
    soil = soil + pick(_PATCHES) * jnp.minimum(4 * near, 1) * patches
    image = sky + ground * (soil - sky) + panels + pick(_TINTED) * tint

    # One soft dot in some of the cells of a grid: falling snow held still, or stars.
    cell_x, cell_y = jnp.floor(x * 8), jnp.floor(y * 8)
    noise = [_noise(cell_x, cell_y, look[5] + i) for i in range(3)]
    dot_x, dot_y = x * 8 - cell_x - 0.3 - 0.4 * noise[0], y * 8 - cell_y - 0.3 - 0.4 * noise[1]
    share = pick(_DOT_SHARE)
    bright = jnp.maximum(noise[2] - (1 - share), 0) / share
    dot = bright * jnp.exp(-(dot_x**2 + dot_y**2) / (2 * pick(_DOT_SIZE) ** 2))
    return image + pick(_DOTS) * dot * jnp.where(kind == 3, 1.0, 1 - ground) * (0.8 - image)


def _noise(x, y, seed):
    """A number in [0, 1) for each whole x and y; the constants only have to be incommensurable."""
    return (jnp.sin(x * 12.9898 + y * 78.233 + seed * 37.7) * 43.7585) % 1.0


def _occluder(scene, center_x, x, y, size):
    """Image [3, H, W] and coverage [H, W] of the wall, pillar or truck, in frame coordinates."""
    height, width = size
    half_width, top, bottom = scene.screen[2:]

    def box(left, right, upper, lower):
        across = jnp.clip(jnp.minimum(x - left, right - x) * width + 0.5, 0, 1)
        down = jnp.clip(jnp.minimum(y - upper, lower - y) * height + 0.5, 0, 1)
        return across * down

    is_truck = scene.occluder == 3
    is_pillar = scene.occluder == 2
    bright = jnp.asarray(_SCREEN_GRAY)[scene.background]
    body = box(center_x - half_width, center_x + half_width, top, bottom)
    local_x, local_y = (x - center_x) / half_width, (y - top) / (bottom - top)
    # A wall has courses of stone, a pillar is round, a truck's body is plain with a rail.
    courses = -0.06 * jnp.exp(-((4 * jnp.sin((y - bottom) * 32)) ** 2)) * jnp.ones_like(x)
    rounded = 0.1 * (0.3 - local_x**2) * jnp.ones_like(y)
    plain = 0.05 * (0.5 - local_y) * jnp.ones_like(x)
    gray = bright + jnp.where(is_truck, plain, jnp.where(is_pillar, rounded, courses))

    # Only the truck has a cab and wheels; they face the way it drives.
    way = jnp.sign(scene.screen[1] - scene.screen[0])
    nose = center_x + way * half_width
    near, far = jnp.minimum(nose, nose + way * 0.2), jnp.maximum(nose, nose + way * 0.2)
    roof = bottom - 0.72 * (bottom - top)
    cab = box(near, far, roof, bottom)
    window_x = nose + way * 0.12
    window = box(window_x - 0.05, window_x + 0.05, roof + 0.04, roof + 0.14)
    gray = gray + is_truck * (1 - body) * (cab * -0.08 + window * 0.2)
    cover = jnp.maximum(body, is_truck * cab)
    for offset in (-0.6 * half_width, half_width + 0.09):
        wheel_x, wheel_y = (x - center_x - way * offset) * width, (y - bottom) * height
        away = jnp.sqrt(wheel_x**2 + wheel_y**2)
        tyre = is_truck * jnp.clip(0.5 + 0.062 * min(size) - away, 0, 1)
        hub = jnp.clip(0.5 + 0.028 * min(size) - away, 0, 1)
        gray = gray + tyre * (0.07 + 0.4 * hub - gray)
        cover = jnp.maximum(cover, tyre)
    return gray[None], cover * (scene.occluder > 0)
