"""Reading a clip: which objects it shows, where they go, what the camera does, and where it is, from the pixels alone.

Nothing here knows the prompt or the scene. Objects are found by colour, named by the mean colour and the
silhouette of their unhidden frames, and followed over the clip; the camera is read from the background.
"""

import functools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

# How these colours usually look, sRGB in [0, 1]; an object has the name of the nearest one.
COLORS = {
    "red": (0.82, 0.06, 0.08),
    "orange": (0.93, 0.46, 0.02),
    "yellow": (0.94, 0.83, 0.06),
    "green": (0.07, 0.60, 0.18),
    "blue": (0.09, 0.25, 0.87),
    "purple": (0.46, 0.09, 0.69),
    "pink": (0.94, 0.40, 0.67),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("ball", "cube", "pyramid", "star")
# Eight sectors of 45 degrees, counted clockwise on the screen from the right.
_COMPASS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")

_CHROMA = 0.25  # least distance from gray of an object's pixels, in units of R - (G + B) / 2
_WHITE = 0.84  # least of R, G and B in a white object
_SPECK = 0.0012  # of the frame; smaller spots are noise, stars or snow
_OBJECT = (0.005, 0.4)  # of the frame; area of what counts as an object
_LIKENESS = 0.72  # least overlap with an ideal silhouette to be called by its name
_HIDDEN = 0.08  # of its usual area
_STILL = 0.1  # of the frame's shorter side; what moves less rests
_SKY_AND_GROUND = ((0.05, 0.35), (0.65, 0.95))  # of the frame's height
_NIGHT = 0.3  # brightness of what is above; nights are below it
_GREENER = 0.03  # of the ground than the sky, in G - (R + B) / 2
_EDGE = 0.07  # change of brightness over an eighth of the height, where there is a horizon
_GRADIENT = 0.06  # change of brightness from what is above to what is below
_CAMERA_GRID = 64  # the camera is read at about this many pixels a side


@dataclass(frozen=True, eq=False)
class SeenObject:
    """One object of a clip.

    Attributes:
        color: one of `COLORS`.
        shape: one of `SHAPES`, or "other".
        direction: where it goes in the image: a compass name such as "up-left", "still" or "bouncing".
        hidden_and_back: it vanished for two frames or more and came back with the same colour and shape.
        track_T2: float [T, 2], x and y of its centroid in [0, 1] of the frame, NaN where it is not seen.
        area_T: float [T], visible area as a fraction of the frame.
    """

    color: str
    shape: str
    direction: str
    hidden_and_back: bool
    track_T2: np.ndarray
    area_T: np.ndarray


@dataclass(frozen=True)
class Reading:
    """What a clip shows.

    Attributes:
        objects: most prominent first.
        camera: "fixed", "pan left", "pan right", "zoom in", "zoom out", or "other".
        background: "plain", "gradient", "ground and sky", "snow", "night", or "other".
    """

    objects: tuple[SeenObject, ...]
    camera: str
    background: str


def read(frames: np.ndarray) -> Reading:
    """Reads a clip, uint8 [T, H, W, 3] in RGB."""
    video_THWC = frames.astype(np.float32) / 255
    objects, masks = [], []
    for mask_THW in _masks(video_THWC):
        masks.append(mask_THW)
        objects += [_describe(video_THWC, pieces) for pieces in _tracks(mask_THW)]
    objects.sort(key=lambda seen: -seen.area_T.sum())
    objects = [seen for seen in objects if seen.area_T.sum() > 0.08 * objects[0].area_T.sum()]
    objects_THW = np.any(masks, axis=0) if masks else None
    return Reading(tuple(objects), _camera(video_THWC, objects_THW), _background(video_THWC, objects_THW))


# Colour


def name_color(rgb: np.ndarray) -> str:
    """The name of the nearest of `COLORS`, for one colour, sRGB in [0, 1]."""
    distances = np.linalg.norm(_perceived(np.array(list(COLORS.values()))) - _perceived(rgb), axis=-1)
    return list(COLORS)[int(np.argmin(distances))]


def _perceived(rgb):
    """Oklab (https://bottosson.github.io/posts/oklab), with lightness at half weight: shading changes it."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((np.maximum(rgb, 0) + 0.055) / 1.055) ** 2.4)
    to_cones = np.array([[0.41222, 0.53633, 0.05145], [0.2119, 0.6807, 0.1074], [0.0883, 0.28172, 0.62998]])
    to_lab = np.array([[0.21045, 0.79362, -0.00407], [1.978, -2.42859, 0.45059], [0.0259, 0.78277, -0.80868]])
    return np.cbrt(linear @ to_cones.T) @ to_lab.T * (0.5, 1, 1)


def _masks(video_THWC):
    """One bool [T, H, W] for each hue that the clip holds, and one for white."""
    red, green, blue = np.moveaxis(video_THWC, -1, 0)
    # Blending with something gray scales these two, so half of an object's own chroma is half covered.
    across, along = red - (green + blue) / 2, (green - blue) * np.float32(0.75**0.5)
    chroma = np.hypot(across, along)
    where = np.flatnonzero(chroma > _CHROMA)
    masks = []
    if len(where) > _SPECK * chroma.size / 10:
        chroma_N = chroma.flat[where]
        hue_N = np.degrees(np.arctan2(along.flat[where], across.flat[where])) % 360
        histogram = np.bincount((hue_N / 5).astype(int) % 72, weights=chroma_N, minlength=72)
        smooth = ndimage.gaussian_filter1d(histogram, 1.5, mode="wrap")
        peak = (smooth == ndimage.maximum_filter1d(smooth, 5, mode="wrap")) & (smooth > 0.02 * smooth.sum())
        hues = np.flatnonzero(peak) * 5 + 2.5  # none at all where every hue is as frequent as any other
        away_NK = np.abs((hue_N[:, None] - hues + 180) % 360 - 180)
        for i in range(len(hues)):
            own = np.argmin(away_NK, axis=1) == i
            mask = np.zeros(chroma.size, bool)
            mask[where[own]] = chroma_N[own] > 0.5 * np.percentile(chroma_N[own], 75)
            masks.append(mask.reshape(chroma.shape))
    lowest = np.minimum(np.minimum(red, green), blue)
    white = (lowest > _WHITE) & (chroma < 0.15)
    if white.sum() > _SPECK * white.size / 10:
        # Halfway between the object and the brightest parts of what is around it.
        around = np.percentile(lowest[:, ::2, ::2][~white[:, ::2, ::2]], 90) if not white.all() else 1.0
        masks.append((lowest > max(0.7, (np.percentile(lowest[white], 75) + around) / 2)) & (chroma < 0.15))
    return masks


# Following


@dataclass
class _Piece:
    """An object in one frame."""

    time: int
    area: int
    center: np.ndarray  # x, y in pixels
    box: tuple[slice, slice]
    mask: np.ndarray  # bool, inside of the box


def _tracks(mask_THW):
    """The objects of one colour, each a list of its pieces in order of time."""
    frames, height, width = mask_THW.shape
    within_frame = np.zeros((3, 3, 3), int)
    within_frame[1] = 1
    labels, count = ndimage.label(mask_THW, within_frame)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    by_time = [[] for _ in range(frames)]
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if areas[label] >= max(_SPECK * height * width, 4):
            by_time[box[0].start].append(_piece(box[0].start, box[1:], labels[box][0] == label))
    sides = np.array([_sides(piece.box) for pieces in by_time for piece in pieces])
    if not len(sides):
        return []
    usual = np.percentile(sides, 90, axis=0)
    tracks = []
    for pieces in by_time:
        pieces = _join(pieces, 1.15 * usual)
        gaps = np.array([[np.hypot(*(t[-1].center - p.center)) for p in pieces] for t in tracks])
        left = set(range(len(pieces)))
        for _ in range(min(len(tracks), len(pieces))):
            track, piece = np.unravel_index(np.argmin(gaps), gaps.shape)
            tracks[track].append(pieces[piece])
            gaps[track], gaps[:, piece] = np.inf, np.inf
            left.remove(piece)
        tracks += [[pieces[piece]] for piece in left]
    low, high = (share * height * width for share in _OBJECT)
    return [
        track
        for track in tracks
        if len(track) >= min(3, frames) and low < np.percentile([p.area for p in track], 90) < high
    ]


def _piece(time, box, mask):
    rows, columns = np.nonzero(mask)
    center = np.array([columns.mean() + box[1].start, rows.mean() + box[0].start]) + 0.5
    return _Piece(time, len(rows), center, box, mask)


def _sides(box):
    return [side.stop - side.start for side in box]


def _join(pieces, most):
    """Joins what fits into the extent of one object: something narrow may stand in front of it."""
    pieces = sorted(pieces, key=lambda piece: -piece.area)
    joined = []
    for piece in pieces:
        for i, other in enumerate(joined):
            box = tuple(
                slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(piece.box, other.box, strict=True)
            )
            if (_sides(box) <= most).all():
                mask = np.zeros(_sides(box), bool)
                for part in (piece, other):
                    inside = tuple(
                        slice(p.start - b.start, p.stop - b.start) for p, b in zip(part.box, box, strict=True)
                    )
                    mask[inside] |= part.mask
                joined[i] = _piece(piece.time, box, mask)
                break
        else:
            joined.append(piece)
    return joined


# Describing


def _describe(video_THWC, pieces):
    frames, height, width, _ = video_THWC.shape
    track_T2, area_T = np.full((frames, 2), np.nan), np.zeros(frames)
    for piece in pieces:
        track_T2[piece.time] = piece.center / (width, height)
        area_T[piece.time] = piece.area
    color, shape = _color_and_shape(video_THWC, pieces)

    hidden = area_T < _HIDDEN * np.percentile(area_T[area_T > 0], 90)
    back = False
    for (span,) in ndimage.find_objects(ndimage.label(hidden)[0]):
        before = [piece for piece in pieces if piece.time < span.start]
        after = [piece for piece in pieces if piece.time >= span.stop]
        if span.stop - span.start >= 2 and min(len(before), len(after)) >= 2:
            back |= _color_and_shape(video_THWC, before) == _color_and_shape(video_THWC, after)
    direction = _direction(track_T2 * (width, height) / min(height, width))
    return SeenObject(color, shape, direction, bool(back), track_T2, area_T / (height * width))


def _color_and_shape(video_THWC, pieces):
    """Both are read where the most is visible."""
    usual = np.percentile([piece.area for piece in pieces], 95)
    whole = [piece for piece in pieces if piece.area > 0.93 * usual] or [max(pieces, key=lambda p: p.area)]
    pixels, likeness = [], []
    for piece in whole[:: max(1, len(whole) // 8)]:
        core = ndimage.binary_erosion(piece.mask, iterations=2)
        core = core if core.any() else piece.mask
        pixels.append(video_THWC[piece.time][piece.box][core])
        likeness.append(_likeness(piece.mask))
    likeness = np.mean(likeness, axis=0)
    shape = SHAPES[int(np.argmax(likeness))] if likeness.max() > _LIKENESS else "other"
    return name_color(np.median(np.concatenate(pixels), axis=0)), shape


def _likeness(mask):
    """Overlap with each ideal silhouette, intersection over union in [0, 1]."""
    seen = _normalised(mask)
    ideal = _silhouettes()
    overlap = np.minimum(ideal, seen).sum((-1, -2)) / np.maximum(ideal, seen).sum((-1, -2))
    return overlap.max(axis=1)


def _normalised(mask):
    """The silhouette as 24 x 24 samples, in units of its own spread along each axis."""
    rows, columns = np.nonzero(mask)
    spread = np.maximum([rows.std(), columns.std()], 0.5)
    steps = np.linspace(-2.9, 2.9, 24)
    grid = np.meshgrid(rows.mean() + steps * spread[0], columns.mean() + steps * spread[1], indexing="ij")
    return ndimage.map_coordinates(mask.astype(np.float32), grid, order=1)


@functools.cache
def _silhouettes():
    """Each of `SHAPES` sharp, with rounded corners, and cut off at a side, normalised: [4, 4, 24, 24]."""
    x, y = np.meshgrid(*[np.linspace(-1.3, 1.3, 131)] * 2)
    angle = np.arctan2(x, -y) % (2 * np.pi / 5) - np.pi / 5
    # A star's edge runs from its tip (at 36 degrees from the notch) to the notch at 0.4 of the radius.
    tip, notch = np.exp(1j * np.pi / 5), 0.4
    inward = 1j * (tip - notch) / abs(tip - notch)
    point = np.hypot(x, y) * np.exp(1j * np.abs(angle))
    ideal = (
        np.hypot(x, y) < 1,
        np.maximum(np.abs(x), np.abs(y)) < 0.9,
        (y < 0.65) & (np.abs(x) < (y + 1.3) * 1.13 / 1.95),
        ((point - notch) * inward.conjugate()).real > 0,
    )
    # Rounding by an eighth of the radius: more, and stars would pass for balls. Large objects are never quite
    # clear of a wall, so either side may be cut off.
    variants = [
        [mask, ndimage.gaussian_filter(mask.astype(float), 6) > 0.5, mask & (x < 0.8), mask & (x > -0.8)]
        for mask in ideal
    ]
    return np.stack([[_normalised(mask) for mask in masks] for masks in variants])


def _direction(track_T2):
    """Of a track in units of the frame's shorter side."""
    seen = track_T2[np.isfinite(track_T2[:, 0])]
    ends = max(1, min(2, len(seen) // 4))
    moved = seen[-ends:].mean(0) - seen[:ends].mean(0)
    # What goes up and down again covers more height than separates its start from its end.
    climbs = np.abs(np.diff(seen[:, 1])).sum()
    if climbs - abs(seen[-1, 1] - seen[0, 1]) > 0.25:
        return "bouncing"
    if np.hypot(*moved) < _STILL:
        return "still"
    return _COMPASS[round(np.degrees(np.arctan2(moved[1], moved[0])) / 45) % 8]


# The camera


def _camera(video_THWC, objects_THW):
    frames, height, width, _ = video_THWC.shape
    step = max(1, min(height, width) // _CAMERA_GRID)
    rows, columns = height // step, width // step
    if frames < 2 or min(rows, columns) < 8:
        return "fixed"

    def shrink(a, reduce):
        return reduce(a[:, : rows * step, : columns * step].reshape(frames, rows, step, columns, step), (2, 4))

    image_TYX = shrink(video_THWC.mean(-1), np.mean)
    background_TYX = np.ones(image_TYX.shape, bool)
    if objects_THW is not None:
        grow = np.ones((1, 7, 7), bool)
        background_TYX = ~ndimage.binary_dilation(shrink(objects_THW, np.any), grow)
    image_TYX = ndimage.gaussian_filter(image_TYX, (0, 1, 1))

    # Shift and zoom per frame: first between neighbours, then refined over longer distances.
    motion, fastest = np.zeros(3), np.array([columns / 8, rows / 8, 0.1])
    apart = max(1, (frames - 1) // 4)
    for distance in (1, 1, apart, apart, apart):
        motion = np.clip(motion + _refine(image_TYX, background_TYX, motion, distance), -fastest, fastest)
    if not _explains(image_TYX, background_TYX, motion, apart):
        return "fixed"
    right, down, closer = motion * (frames - 1)
    right, down, closer = right / columns / 0.35, down / rows / 0.35, closer / np.log(1.6)
    strongest = max(abs(right), abs(down), abs(closer))
    if strongest < 0.35:
        return "fixed"
    if strongest == abs(closer):
        return "zoom in" if closer > 0 else "zoom out"
    if strongest == abs(right):
        return "pan left" if right > 0 else "pan right"  # what is seen goes the other way
    return "other"


def _pairs(image_TYX, background_TYX, motion, distance):
    """Frames, and those `distance` later with the motion undone; NaN where either shows no background."""
    frames, rows, columns = image_TYX.shape
    bare = np.where(background_TYX, image_TYX, np.nan)
    zoom = np.exp(motion[2] * distance)
    center = np.array([rows - 1, columns - 1]) / 2
    offset = center * (1 - zoom) + motion[1::-1] * distance
    later = np.stack(
        [ndimage.affine_transform(frame, (zoom, zoom), offset, order=1, cval=np.nan) for frame in bare[distance:]]
    )
    return bare[:-distance], later


def _refine(image_TYX, background_TYX, motion, distance):
    """A step of Lucas and Kanade's method (1981) for shift and zoom, with outliers weighted down."""
    now, later = _pairs(image_TYX, background_TYX, motion, distance)
    grad_y, grad_x = np.gradient((now + later) / 2, axis=(1, 2))
    error = later - now
    y, x = (np.arange(n)[:, None] - (n - 1) / 2 for n in now.shape[1:])
    toward = grad_x * x.T + grad_y * y
    use = np.isfinite(error) & np.isfinite(grad_x) & np.isfinite(grad_y)
    if use.sum() < 100:
        return np.zeros(3)
    # The fourth unknown is a change of brightness.
    slopes = np.stack([grad_x[use], grad_y[use], toward[use], np.full(use.sum(), 1 / distance)], 1) * distance
    error = error[use]
    scale = 2 * np.median(np.abs(error)) + 2e-3
    weights = 1 / (1 + (error / scale) ** 2) ** 2
    normal = (slopes * weights[:, None]).T @ slopes
    normal += np.diag([1e-3, 1e-3, 1, 1e-3])
    return -np.linalg.solve(normal, (slopes * weights[:, None]).T @ error)[:3]


def _explains(image_TYX, background_TYX, motion, distance):
    """Whether most parts of the background are more like themselves once the motion is undone."""
    still, moved = (np.abs(np.subtract(*_pairs(image_TYX, background_TYX, m, distance))) for m in (0 * motion, motion))
    use = np.isfinite(still) & np.isfinite(moved)
    if not use.any():
        return False
    totals = []
    for error in (still, moved):
        error = np.where(use, error, 0).sum(0)
        rows, columns = (n // 8 * 8 for n in error.shape)
        totals.append(error[:rows, :columns].reshape(rows // 8, 8, columns // 8, 8).sum((1, 3)).ravel())
    still, moved = totals
    # A part with no texture has no opinion.
    opinion = (still - moved) / (still + moved + 1e-3 * use.sum() / len(still))
    return np.sum(opinion) > 0.3 * np.sum(np.abs(opinion))


# The background


def _background(video_THWC, objects_THW):
    """Told by the usual colour of each row: how dark, how green, and whether it changes at once or bit by bit."""
    step = max(1, len(video_THWC) // 4)
    bare_THWC = video_THWC[::step]
    if objects_THW is not None:
        grown = ndimage.binary_dilation(objects_THW[::step], np.ones((1, 9, 9), bool))
        bare_THWC = np.where(grown[..., None], np.nan, bare_THWC)
    width = bare_THWC.shape[2]
    # Without the middle, where walls stand.
    bare_HNC = np.delete(bare_THWC, slice(width // 4, width - width // 4), axis=2).swapaxes(0, 1)
    rows = [row[np.isfinite(row[:, 0])] for row in bare_HNC.reshape(len(bare_HNC), -1, 3)]
    rows_HC = np.array([np.median(row, axis=0) for row in rows if len(row)])
    if len(rows_HC) < 8:
        return "other"
    top, low = (np.median(rows_HC[round(a * len(rows_HC)) : round(b * len(rows_HC))], 0) for a, b in _SKY_AND_GROUND)
    if top.mean() < _NIGHT:
        return "night"
    if (low - top) @ (-0.5, 1, -0.5) > _GREENER:
        return "ground and sky"
    light_H = ndimage.gaussian_filter1d(rows_HC.mean(1), 1)
    reach = len(rows_HC) // 8
    if np.abs(light_H[reach:] - light_H[:-reach]).max() > _EDGE:
        return "snow" if low.mean() > top.mean() else "other"
    return "gradient" if abs(low.mean() - top.mean()) > _GRADIENT else "plain"
