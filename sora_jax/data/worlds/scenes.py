"""Sampling a scene: a small tuple of ids and numbers that fixes a whole clip, at any resolution and length.

World coordinates are those of the fixed camera's frame: x in [0, 1] to the right, y in [0, 1] downwards.
Lengths are fractions of the frame's shorter side. Motion is a function of u in [0, 1] over the clip.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.data.worlds import vocabulary
from sora_jax.errors import InputError

RADII = (0.11, 0.155)  # small, large
# Extents of each silhouette about its centroid, in radii. Chosen so that the four feel equally big.
HALF_WIDTH = (1.0, 0.9, 1.13, 1.236)
ABOVE = (1.0, 0.9, 1.3, 1.3)
BELOW = (1.0, 0.9, 0.65, 1.052)

PAN_TRAVEL = 0.35  # of the frame's width
ZOOM_RANGE = 1.6

_MARGIN = 0.02  # free space kept between an object and the frame's edge
_LEAST_TRAVEL = 0.45
_DWELL = 0.4
_HOPS = 2.0  # of what bounces: half a hop to a latent frame, which is what a small model can draw
_KIND_ODDS = (0.14, 0.36, 0.08, 0.08, 0.06, 0.28)  # two objects and moving cameras are the hardest to learn
_SHAPE_ODDS = (1, 1, 1, 3)  # and so are stars: for the codec, and more so for the transformer
# Of a second object: as many of the first one's colour or shape as of others. There are seven other colours, and three
# other shapes; those of one colour are the harder ones to tell apart.
_SAME_COLOR_ODDS, _SAME_SHAPE_ODDS = 2.0, 0.5
_MISTAKE_ODDS = (0.2, 0.2, 0.5, 0.1)  # of a pair: one takes the other's colour, its shape, all looks, or is gone
_CAMERA_MISTAKE_ODDS = (0.6, 0.15, 0.25)  # the background moves otherwise, all that is seen does, there is a double
_CAMERA_BACKGROUND_ODDS = (1, 1, 1, 1, 2.5)  # at night a moving camera moves little else than stars
_MOTION_ODDS = (0.12, 0.12, 0.12, 0.12, 0.12, 0.06, 0.06, 0.06, 0.06, 0.16)
# In a pair: side by side, one above the other; of the first object, and of the second. Two that move are harder.
_COLUMN_ODDS = ((0.2, 0, 0, 0.22, 0.22, 0, 0, 0, 0, 0.36), (0.55, 0, 0, 0.15, 0.15, 0, 0, 0, 0, 0.15))
_ROW_ODDS = ((0.3, 0.35, 0.35, 0, 0, 0, 0, 0, 0, 0), (0.5, 0.25, 0.25, 0, 0, 0, 0, 0, 0, 0))
_DIRECTION_X = (0, -1, 1, 0, 0, -1, 1, -1, 1, 0)
_DIRECTION_Y = (0, 0, 0, -1, 1, -1, -1, 1, 1, 0)
_OTHER_WAY = (0, 2, 1, 4, 3)  # of a camera
_STILL, _LEFT, _RIGHT, _UP, _DOWN, _BOUNCING = 0, 1, 2, 3, 4, 9
_SINGLE, _PAIR, _WALL, _PILLAR, _TRUCK, _CAMERA = range(6)

_NAMES = {
    "kind": vocabulary.KINDS,
    "background": vocabulary.BACKGROUNDS,
    "camera": vocabulary.CAMERAS,
    "relation": vocabulary.RELATIONS,
    **{
        name + i: names
        for i in ("", "2")
        for name, names in (
            ("color", vocabulary.COLORS),
            ("shape", vocabulary.SHAPES),
            ("size", vocabulary.SIZES),
            ("motion", vocabulary.MOTIONS),
        )
    },
}


class Scene(NamedTuple):
    """Everything that fixes a clip. Ids (int32) index the tuples of `vocabulary`; the rest is float32.

    The leading axis of size 2 is the object; the second one counts only where `present` holds.
    """

    kind: jax.Array  # []
    background: jax.Array  # []
    camera: jax.Array  # []
    backdrop: jax.Array  # [] the camera as the background has it: another one only by mistake
    occluder: jax.Array  # []
    relation: jax.Array  # [] of the first object to the second
    present: jax.Array  # bool [2]
    color: jax.Array  # [2]
    shape: jax.Array  # [2]
    size: jax.Array  # [2]
    motion: jax.Array  # [2]
    path: jax.Array  # [2, 2, 2] object, start and end, x and y of the centroid
    hop: jax.Array  # [2, 2] height and number of hops over the clip
    floor: jax.Array  # [2] y of the ground that receives the object's shadow
    dwell: jax.Array  # [] how much the motion slows down at its ends and in its middle
    screen: jax.Array  # [5] occluder: x of its centre at start and at end, half width, top, bottom
    look: jax.Array  # [6] in [0, 1], the freedom of the background


def sample_scene(key: jax.Array, *, unseen: bool = False, **fixed) -> Scene:
    """Draw a scene; pure, so `jax.vmap` over keys works.

    Args:
        key: a JAX random key.
        unseen: when True, the first object is one of the combinations `vocabulary.UNSEEN`. Otherwise those
            are drawn only where `fixed` names both colour and shape.
        **fixed: parts to fix, as names or ids: kind, background, camera, relation, color, shape, size, motion
            and, for the second object, color2, shape2, size2, motion2. A second object needs kind "pair", a
            moving camera kind "camera"; what a kind does not allow (a diagonal motion behind a wall) is
            replaced by something it does.

    Raises:
        InputError: an unknown part or name.
    """
    fixed = {part: _as_id(part, value) for part, value in fixed.items()}
    numbers = iter(jax.random.uniform(key, (48,)))  # one draw for all: it compiles faster than a key for each

    def uniform(low, high):
        return low + (high - low) * next(numbers)

    def draw(part, odds):
        drawn = _pick(next(numbers), jnp.asarray(odds, jnp.float32))
        return jnp.asarray(fixed.get(part, drawn), jnp.int32)

    kind = draw("kind", _KIND_ODDS)
    is_pair, is_camera, is_truck = kind == _PAIR, kind == _CAMERA, kind == _TRUCK
    is_screen = (kind == _WALL) | (kind == _PILLAR)
    background = draw("background", jnp.where(is_camera, jnp.asarray(_CAMERA_BACKGROUND_ODDS), 1.0))
    camera = jnp.where(is_camera, draw("camera", (0.0, 1.0, 1.0, 1.0, 1.0)), 0)

    first = _color_and_shape(next(numbers), fixed.get("color"), fixed.get("shape"), unseen, None)
    second = _color_and_shape(next(numbers), fixed.get("color2"), fixed.get("shape2"), False, first)
    color, shape = (jnp.stack(ids) for ids in zip(first, second, strict=True))
    large = jnp.where(kind == _PILLAR, 0.2, 0.5)  # a pillar is only narrow where the object is small
    size = jnp.stack([draw(part, jnp.stack([1 - large, large])) for part in ("size", "size2")])
    radius = jnp.asarray(RADII)[size]
    half_width, above, below = (jnp.asarray(e)[shape] * radius for e in (HALF_WIDTH, ABOVE, BELOW))

    # Objects of a pair keep to their own column or their own row, so that they never meet. Motions that were
    # asked for decide which.
    asked = jnp.stack([jnp.asarray(fixed.get(part, _STILL)) for part in ("motion", "motion2")])
    needs_rows = _is_any(asked, _LEFT, _RIGHT).any()
    needs_columns = _is_any(asked, _UP, _DOWN, _BOUNCING).any() & ~needs_rows
    odds = jnp.repeat(jnp.stack([~needs_rows, ~needs_columns]), 2)
    relation = draw("relation", odds)
    in_columns = relation < 2
    odds = jnp.where(in_columns, jnp.asarray(_COLUMN_ODDS), jnp.asarray(_ROW_ODDS))
    pair_motions = [draw(part, odds[i]) for i, part in enumerate(("motion", "motion2"))]
    pair_motions = [jnp.where(odds[i, m] > 0, m, _STILL) for i, m in enumerate(pair_motions)]

    motion = draw("motion", _MOTION_ODDS)
    sideways = jnp.where(_is_any(motion, _LEFT, _RIGHT), motion, jnp.where(uniform(0, 1) < 0.5, _LEFT, _RIGHT))
    motion = jnp.where(is_screen, sideways, jnp.where(is_pair, pair_motions[0], motion))
    motion = jnp.where(is_camera | is_truck, _STILL, motion)
    motion = jnp.stack([motion, jnp.where(is_pair, pair_motions[1], _STILL)]).astype(jnp.int32)

    # The part of the frame that each object's centroid may use: lowest and highest x, then y.
    low_x, high_x = half_width + _MARGIN, 1 - half_width - _MARGIN
    low_y, high_y = above + _MARGIN, 1 - below - 1.5 * _MARGIN
    before = jnp.stack([_is_any(relation, 0, 2), _is_any(relation, 1, 3)])  # is it the left or upper one?
    split = is_pair & in_columns
    high_x = jnp.where(split & before, 0.49 - half_width, high_x)
    low_x = jnp.where(split & ~before, 0.51 + half_width, low_x)
    split = is_pair & ~in_columns
    high_y = jnp.where(split & before, 0.48 - below, high_y)
    low_y = jnp.where(split & ~before, 0.51 + above, low_y)
    # Under a moving camera there is less room: it has to do at the closest zoom and along the whole pan.
    pans, zooms = _is_any(camera, 1, 2), _is_any(camera, 3, 4)
    pad = jnp.where(pans, PAN_TRAVEL / 2, 0.0)
    shrink = jnp.where(zooms, 1 / ZOOM_RANGE, 1.0)
    inset_x, inset_y = pad + (1 - shrink) / 2, (1 - shrink) / 2
    low_x, high_x = low_x + inset_x, high_x - inset_x
    low_y, high_y = low_y + inset_y, high_y - inset_y

    paths, hops, floors = [], [], []
    for i in range(2):
        x_way = jnp.asarray(_DIRECTION_X)[motion[i]]
        y_way = jnp.asarray(_DIRECTION_Y)[motion[i]]
        bounces = motion[i] == _BOUNCING
        drift = jnp.where(bounces & ~is_pair, jnp.round(uniform(-1.5, 1.5)), 0.0)
        x_start, x_end = _span(uniform(0, 1), uniform(0, 1), low_x[i], high_x[i], x_way + drift)
        x_start = jnp.where(is_truck, 0.5 + uniform(-0.03, 0.03), x_start)
        # Behind a wall every bit of room counts: from edge to edge.
        x_start = jnp.where(is_screen, jnp.where(motion[i] == _LEFT, high_x[i], low_x[i]), x_start)
        x_end = jnp.where(is_screen, jnp.where(motion[i] == _LEFT, low_x[i], high_x[i]), x_end)
        x_end = jnp.where((x_way == 0) & (drift == 0), x_start, x_end)

        # Most objects that do not climb or fall stand on the ground, the others float.
        y_start, y_end = _span(uniform(0, 1), uniform(0, 1), low_y[i], high_y[i], y_way)
        ground = jnp.clip(uniform(0.72, 0.9) - below[i], low_y[i], high_y[i])
        ground = jnp.where(is_truck, 0.72 - below[i], ground)
        grounded = (uniform(0, 1) < 0.7) | bounces | is_screen | is_truck
        y_start = jnp.where((y_way == 0) & grounded, ground, y_start)
        y_end = jnp.where(y_way == 0, y_start, y_end)
        height = jnp.where(bounces, jnp.minimum(uniform(0.2, 0.34), y_start - low_y[i]), 0.0)

        lowest = jnp.maximum(y_start, y_end) + below[i]
        paths.append(jnp.stack([jnp.stack([x_start, y_start]), jnp.stack([x_end, y_end])]))
        hops.append(jnp.stack([height, _HOPS]))
        floors.append(jnp.where(lowest > 0.66, lowest, 0.9))

    return Scene(
        kind=kind,
        background=background,
        camera=camera.astype(jnp.int32),
        backdrop=camera.astype(jnp.int32),
        occluder=jnp.where(is_screen | is_truck, kind - 1, 0).astype(jnp.int32),
        relation=relation,
        present=jnp.stack([jnp.array(True), is_pair]),
        color=color,
        shape=shape,
        size=size,
        motion=motion,
        path=jnp.stack(paths).astype(jnp.float32),
        hop=jnp.stack(hops).astype(jnp.float32),
        floor=jnp.stack(floors).astype(jnp.float32),
        dwell=jnp.where(is_screen, _DWELL, 0.0).astype(jnp.float32),
        screen=_screen(kind, half_width[0], paths[0][0, 1] - above[0], floors[0], uniform(0, 1), uniform(0, 1)),
        look=jnp.stack([next(numbers) for _ in range(6)]),
    )


def mistake(key: jax.Array, scene: Scene) -> Scene:
    """The scene as a small model tends to mistake it: an object too many, too few, or like the other one; the camera.

    In a pair one object takes the colour, the shape or all looks of the other, or is not there. Under a moving camera
    the background may stand still or go the other way, or all that is seen. Whatever else is shown has a double, that
    comes from the other side or moves along beside it.
    """
    which, what, where = jax.random.uniform(key, (3,))
    other = (which < 0.5).astype(jnp.int32)
    one = 1 - other
    what = _pick(what, _MISTAKE_ODDS)
    is_pair, is_gone = scene.kind == _PAIR, what == 3
    same_color, same_shape = scene.color[0] == scene.color[1], scene.shape[0] == scene.shape[1]
    takes_color, takes_shape = same_shape | (what == 0), same_color | (what == 1)
    color, shape = (
        jnp.where(takes, ids[other], ids[one])
        for ids, takes in ((scene.color, takes_color), (scene.shape, takes_shape))
    )
    takes_all = (what == 2) | _is_kept_out(color, shape)
    takes_color, takes_shape = takes_all | takes_color, takes_all | takes_shape

    def like_other(looks_2, takes):
        return looks_2.at[one].set(jnp.where(takes & ~is_gone, looks_2[other], looks_2[one]))

    pair = scene._replace(
        color=like_other(scene.color, takes_color),
        shape=like_other(scene.shape, takes_shape),
        size=like_other(scene.size, takes_all),
        present=scene.present.at[one].set(~is_gone),
    )
    path = scene.path[0]
    mirrored = path.at[:, 0].set(1 - path[:, 0])
    beside = path.at[:, 0].add(jnp.where(path[:, 0].mean() < 0.5, 0.45, -0.45))
    is_mirrored = (jnp.abs(path[1, 0] - path[0, 0]) > 0.2) & (where < 0.6)
    double = {name: jnp.stack([getattr(scene, name)[0]] * 2) for name in ("color", "shape", "size", "hop", "floor")}
    double |= dict(path=jnp.stack([path, jnp.where(is_mirrored, mirrored, beside)]), present=jnp.ones(2, bool))
    double = scene._replace(**double)

    backdrop = jnp.where(where < 0.6, 0, jnp.array(_OTHER_WAY)[scene.camera])
    camera_mistake = _pick(which, _CAMERA_MISTAKE_ODDS)
    camera = scene._replace(camera=jnp.where(camera_mistake == 1, backdrop, scene.camera), backdrop=backdrop)
    is_camera = (scene.kind == _CAMERA) & (camera_mistake < 2)

    return jax.tree.map(lambda *a: jnp.where(is_pair, a[0], jnp.where(is_camera, *a[1:])), pair, camera, double)


def _as_id(part, value):
    if part not in _NAMES:
        raise InputError(f"scene: unknown part {part!r}; the parts are {', '.join(_NAMES)}")
    names = _NAMES[part]
    if isinstance(value, str):
        if value not in names:
            raise InputError(f"scene: unknown {part} {value!r}; it is one of {', '.join(names)}")
        return names.index(value)
    if isinstance(value, int) and not 0 <= value < len(names):
        raise InputError(f"scene: {part} {value} is out of range; it is 0 to {len(names) - 1}")
    return value


def _is_any(value, *options):
    return jnp.isin(value, jnp.array(options))


def _color_and_shape(number, color, shape, unseen, other):
    """One colour and one shape, not both the same as those of the other object."""
    color_ids, shape_ids = jnp.divmod(jnp.arange(32), 4)
    kept_out = _is_kept_out(color_ids, shape_ids)
    fits = jnp.ones(32, bool)
    if color is not None:
        fits &= color_ids == color
    if shape is not None:
        fits &= shape_ids == shape
    allowed = fits & (kept_out if unseen else ~kept_out)
    odds = jnp.asarray(_SHAPE_ODDS, jnp.float32)[shape_ids]
    if other is not None:
        same_color, same_shape = color_ids == other[0], shape_ids == other[1]
        allowed &= ~(same_color & same_shape)
        odds *= jnp.where(same_color, _SAME_COLOR_ODDS, 1.0) * jnp.where(same_shape, _SAME_SHAPE_ODDS, 1.0)
    allowed = jnp.where(allowed.any(), allowed, fits)
    pair = _pick(number, allowed * odds)
    return color_ids[pair].astype(jnp.int32), shape_ids[pair].astype(jnp.int32)


def _is_kept_out(color, shape):
    """Whether a colour and a shape are one of the combinations `vocabulary.UNSEEN`."""
    unseen = [vocabulary.COLORS.index(c) * 4 + vocabulary.SHAPES.index(s) for c, s in vocabulary.UNSEEN]
    return _is_any(color * 4 + shape, *unseen)


def _pick(number, odds):
    """The index that a number in [0, 1) falls on, given odds (of any sum); never one of odds 0."""
    heights = jnp.cumsum(jnp.asarray(odds, jnp.float32))
    return jnp.sum(heights <= number * heights[-1])


def _span(a, b, low, high, way):
    """Start and end of a trip through [low, high] in the direction `way`; at rest both are anywhere in it."""
    room = high - low
    least = jnp.minimum(jnp.maximum(_LEAST_TRAVEL, 0.75 * room), room)
    travel = jnp.where(way == 0, 0.0, least + a * (room - least))
    left = low + b * (room - travel)
    return jnp.where(way < 0, left + travel, left), jnp.where(way < 0, left, left + travel)


def _screen(kind, half_width, object_top, floor, a, b):
    """What hides the object: wide enough for two hidden frames of 17, narrow enough to show it at both ends: at
    least three quarters, as of a large star; small objects all of it.

    Behind a wall an object does at most 0.045 a frame, and the dwell slows that to 0.6 of it; a truck does at
    most 0.1 a frame.
    """
    hides = half_width + 0.043
    wall = jnp.stack([jnp.maximum(hides, 0.2), object_top - 0.05 - 0.12 * a, floor + 0.06])
    pillar = jnp.stack([hides, jnp.float32(-0.2), floor + 0.06])
    body = jnp.stack([half_width + 0.125, object_top - 0.05, floor + 0.04])
    box = jnp.stack([wall, wall, wall, pillar, body, wall])[kind]
    x = 0.5 + 0.03 * (2 * b - 1) * (half_width < 0.12)
    ahead, behind = box[0] + 0.21, box[0]  # the truck's cab sticks out in front of its body
    way = jnp.where(a < 0.5, -1.0, 1.0)
    start, end = 0.5 - way * (0.42 + ahead), 0.5 + way * (0.42 + behind)
    is_truck = kind == _TRUCK
    return jnp.stack([jnp.where(is_truck, start, x), jnp.where(is_truck, end, x), *box]).astype(jnp.float32)
