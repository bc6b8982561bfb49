"""The procedural worlds: clips show what their truth says, and captions say what their scenes hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.data.worlds import vocabulary
from sora_jax.data.worlds.captions import MAX_BYTES, caption
from sora_jax.data.worlds.layout import CHANNELS, layout, objects
from sora_jax.data.worlds.render import PALETTE, render
from sora_jax.data.worlds.scenes import PAN_TRAVEL, ZOOM_RANGE, mistake, sample_scene
from sora_jax.errors import InputError

FRAMES = 17


@pytest.fixture(scope="module")
def scenes():
    """2000 scenes of all kinds, as NumPy arrays."""
    keys = jax.random.split(jax.random.key(0), 2000)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(sample_scene))(keys))


@pytest.fixture(scope="module")
def draw():
    """Any number of scenes to videos [B, T, H, W, C] and truths, as NumPy arrays; compiled once."""
    compiled = jax.jit(jax.vmap(lambda scene: render(scene, FRAMES, (64, 64))))
    batch = 20

    def draw(scenes):
        count = len(scenes.kind)
        chunks = []
        for start in range(0, count, batch):
            picked = np.minimum(np.arange(start, start + batch), count - 1)
            chunks.append(jax.tree.map(np.asarray, compiled(take(scenes, picked))))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *chunks)

    return draw


def take(scenes, where):
    return jax.tree.map(lambda a: a[where], scenes)


def of_kind(scenes, *kinds, limit=40):
    ids = [vocabulary.KINDS.index(kind) for kind in kinds]
    return take(scenes, np.flatnonzero(np.isin(scenes.kind, ids))[:limit])


def find(scenes, kind, **ids):
    """The first scene of a kind, with some ids of its first object replaced."""
    scene = take(of_kind(scenes, kind, limit=1), 0)
    replaced = {name: np.array([value, getattr(scene, name)[1]]) for name, value in ids.items()}
    return scene._replace(**replaced)


def color_mask(video, color):
    """Pixels [..., H, W] whose hue is that of a palette colour and that are saturated."""
    saturated = video.max(-1) - video.min(-1) > 0.35

    def normalise(rgb):
        rgb = rgb - rgb.min(-1, keepdims=True)
        return rgb / np.maximum(rgb.max(-1, keepdims=True), 1e-6)

    return saturated & (np.abs(normalise(video) - normalise(np.asarray(PALETTE[color]))).max(-1) < 0.25)


def test_same_key_same_clip_alone_or_in_a_batch(scenes, draw):
    keys = jax.random.split(jax.random.key(0), 2000)
    alone = jax.jit(sample_scene)(keys[7])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[7], atol=1e-6), alone, scenes)
    few = take(scenes, slice(0, 20))
    np.testing.assert_array_equal(draw(few)[0], draw(few)[0])


def test_one_frame_is_the_start_of_the_clip(scenes, draw):
    scene = take(scenes, 0)
    frame, truth = jax.jit(lambda scene: render(scene, 1, (64, 64)))(scene)
    np.testing.assert_allclose(frame[0], draw(take(scenes, slice(0, 1)))[0][0, 0], atol=1e-4)
    assert truth.visible_T.shape == (2, 1)


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_any_size_will_do(scenes, size):
    video, truth = jax.eval_shape(lambda scene: render(scene, 5, size), take(scenes, 0))
    assert video.shape == (5, *size, 3) and video.dtype == jnp.float32
    assert truth.center_T2.shape == (2, 5, 2) and truth.visible_T.shape == (2, 5)


def test_values_are_within_range_and_white_stands_out(scenes, draw):
    video, _ = draw(take(scenes, slice(0, 60)))
    assert video.min() >= 0 and video.max() <= 1
    bare = take(scenes, slice(0, 60))._replace(present=np.zeros((60, 2), bool), occluder=np.zeros(60, np.int32))
    background, _ = draw(bare)
    assert background.max() < 0.85
    assert (background.max(-1) - background.min(-1)).max() < 0.2


def test_colored_pixels_are_where_the_truth_says(scenes, draw):
    colored = scenes.color[:, 0] != vocabulary.COLORS.index("white")
    singles = of_kind(take(scenes, colored), "single", "camera")
    video, truth = draw(singles)
    grid = (np.arange(64) + 0.5) / 64
    for clip, color, center_T2 in zip(video, singles.color[:, 0], truth.center_T2[:, 0], strict=True):
        mask = color_mask(clip, color)
        count = mask.sum((1, 2))
        assert count.min() > 40
        x = (mask * grid).sum((1, 2)) / count
        y = (mask * grid[:, None]).sum((1, 2)) / count
        assert np.abs(np.stack([x, y], -1) - center_T2).max() < 1.5 / 64


def test_objects_stay_inside_the_frame_and_apart(scenes, draw):
    shown = of_kind(scenes, "single", "pair", "camera", limit=120)
    video, truth = draw(shown)
    visible = truth.visible_T[truth.present]
    np.testing.assert_allclose(visible, 1, atol=1e-4)
    assert (truth.visible_T[~truth.present] == 0).all()
    # Only what is dull touches the frame's edge.
    edge = np.concatenate([video[:, :, 0], video[:, :, -1], video[:, :, :, 0], video[:, :, :, -1]], axis=2)
    assert (edge.max(-1) - edge.min(-1)).max() < 0.2
    pairs = shown.present[:, 1]
    same_color, same_shape = (
        (shown.color[pairs, 0] == shown.color[pairs, 1]),
        (shown.shape[pairs, 0] == shown.shape[pairs, 1]),
    )
    assert not (same_color & same_shape).any() and same_color.any() and same_shape.any()


@pytest.mark.parametrize("kind", ["wall", "pillar", "truck"])
def test_an_occluded_object_vanishes_and_comes_back(scenes, draw, kind):
    chosen = of_kind(scenes, kind)
    video, truth = draw(chosen)
    visible_BT = truth.visible_T[:, 0]
    assert (visible_BT[:, :3] > 0.5).all() and (visible_BT[:, -3:] > 0.5).all()
    assert ((visible_BT < 0.01).sum(1) >= 2).all()
    for clip, color, visible_T in zip(video, chosen.color[:, 0], visible_BT, strict=True):
        if vocabulary.COLORS[color] == "white":
            continue
        count = color_mask(clip, color).sum((1, 2))
        assert count[visible_T == 0].max(initial=0) == 0
        assert count[0] > 30 and count[-1] > 30


def test_unseen_combinations_are_never_drawn_unless_asked_for(scenes):
    def pairs(scenes):
        drawn = zip(scenes.color[scenes.present], scenes.shape[scenes.present], strict=True)
        return {(vocabulary.COLORS[c], vocabulary.SHAPES[s]) for c, s in drawn}

    assert len(vocabulary.UNSEEN) == 6
    assert pairs(scenes) == {(c, s) for c in vocabulary.COLORS for s in vocabulary.SHAPES} - set(vocabulary.UNSEEN)
    keys = jax.random.split(jax.random.key(1), 100)
    unseen = jax.jit(jax.vmap(lambda key: sample_scene(key, unseen=True, kind="single")))(keys)
    assert pairs(jax.tree.map(np.asarray, unseen)) == set(vocabulary.UNSEEN)
    color, shape = vocabulary.UNSEEN[0]
    asked = jax.jit(lambda key: sample_scene(key, color=color, shape=shape))(keys[0])
    assert (asked.color[0], asked.shape[0]) == (
        vocabulary.COLORS.index(color),
        vocabulary.SHAPES.index(shape),
    )


@pytest.mark.parametrize(
    ("motion", "way"),
    [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1)), ("up-left", (-1, -1)),
     ("down-right", (1, 1)), ("still", (0, 0))],
)  # fmt: skip
def test_objects_go_the_way_they_should(scenes, draw, motion, way):
    moving = scenes.motion[:, 0] == vocabulary.MOTIONS.index(motion)
    _, truth = draw(of_kind(take(scenes, moving), "single", limit=20))
    moved_B2 = truth.center_T2[:, 0, -1] - truth.center_T2[:, 0, 0]
    for axis in range(2):
        if way[axis]:
            assert (moved_B2[:, axis] * way[axis] >= 0.44).all()
        else:
            np.testing.assert_allclose(moved_B2[:, axis], 0, atol=1e-5)


def test_a_moving_camera_moves_the_background(scenes, draw):
    count = len(vocabulary.BACKGROUNDS)
    empty = take(scenes, slice(0, count))._replace(
        present=np.zeros((count, 2), bool),
        occluder=np.zeros(count, np.int32),
        background=np.arange(count, dtype=np.int32),
    )
    pan, zoom = (np.full(count, vocabulary.CAMERAS.index(name), np.int32) for name in ("pan right", "zoom in"))
    video, _ = draw(empty._replace(camera=pan, backdrop=pan))
    shift = PAN_TRAVEL * 64 * 5 / 16  # in five of the sixteen steps from the first frame to the last
    assert shift == pytest.approx(7)
    np.testing.assert_allclose(video[:, 5, :, :-7], video[:, 0, :, 7:], atol=0.01)  # what is seen goes left
    assert (np.abs(video[:, -1] - video[:, 0]).mean((1, 2, 3)) > 0.002).all()
    video, _ = draw(empty._replace(camera=zoom, backdrop=zoom))
    assert (np.abs(video[:, -1] - video[:, 0]).mean((1, 2, 3)) > 0.002).all()


def test_zoom_enlarges_the_object_about_the_centre(scenes, draw):
    zoom_in = vocabulary.CAMERAS.index("zoom in")
    chosen = take(scenes, np.flatnonzero((scenes.camera == zoom_in) & (scenes.color[:, 0] == 0))[:5])
    video, truth = draw(chosen)
    area = color_mask(video, 0).sum((2, 3))
    np.testing.assert_allclose(area[:, -1] / area[:, 0], ZOOM_RANGE**2, rtol=0.2)
    away = truth.center_T2[:, 0] - 0.5
    np.testing.assert_allclose(away[:, -1], ZOOM_RANGE * away[:, 0], atol=1e-5)


@pytest.fixture(scope="module")
def mistaken(scenes):
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(mistake))(jax.random.split(jax.random.key(1), 2000), scenes))


def test_a_mistake_is_an_object_too_many_too_few_or_like_the_other(scenes, mistaken, draw):
    is_pair = scenes.kind == vocabulary.KINDS.index("pair")
    looks, seen = (np.stack([scene.color, scene.shape, scene.size], -1) for scene in (scenes, mistaken))
    is_double = ~is_pair & (mistaken.backdrop == scenes.camera)
    assert is_double[scenes.camera == 0].sum() == (~is_pair & (scenes.camera == 0)).sum()
    assert mistaken.present[is_double].all() and (seen[is_double] == looks[is_double][:, :1]).all()
    gone, changed = ~mistaken.present[is_pair], (seen != looks)[is_pair]
    assert ((gone | changed[..., :2].any(-1)).sum(1) == 1).all()  # of two objects it is always one
    one = gone.argmax(1) | changed.any(-1).argmax(1)
    assert 0.05 < gone.any(1).mean() < 0.15 and 0.45 < one.mean() < 0.55
    pairs, number = seen[is_pair][~gone.any(1)], one[~gone.any(1)]
    taken = pairs[np.arange(len(number)), number] == looks[is_pair][~gone.any(1)][np.arange(len(number)), 1 - number]
    assert taken[:, :2].any(1).all() and (changed[~gone.any(1)].any((0, 1))).all()
    kept_out = {(vocabulary.COLORS.index(color), vocabulary.SHAPES.index(shape)) for color, shape in vocabulary.UNSEEN}
    assert not kept_out & set(map(tuple, seen[mistaken.present][:, :2].tolist()))
    kept = [name for name in scenes._fields if name not in ("color", "shape", "size", "present")]
    for name in kept:  # where and how things move does not change
        np.testing.assert_array_equal(getattr(mistaken, name)[is_pair], getattr(scenes, name)[is_pair])
    few = take(scenes, slice(20)), take(mistaken, slice(20))
    videos = [draw(some)[0] for some in few]
    assert (np.abs(videos[0] - videos[1]).max((1, 2, 3, 4)) > 0.1).all()


def test_a_mistake_of_the_camera_leaves_the_object_and_moves_the_background_otherwise(scenes, mistaken, draw):
    chosen = np.flatnonzero((scenes.camera > 0) & (mistaken.backdrop != scenes.camera))
    assert 0.65 < len(chosen) / (scenes.camera > 0).sum() < 0.85
    right, wrong = take(scenes, chosen), take(mistaken, chosen)
    for name in set(scenes._fields) - {"camera", "backdrop"}:
        np.testing.assert_array_equal(getattr(wrong, name), getattr(right, name))
    names = np.array(vocabulary.CAMERAS)
    other_way = {"pan left": "pan right", "pan right": "pan left", "zoom in": "zoom out", "zoom out": "zoom in"}
    is_fixed = wrong.backdrop == 0
    assert 0.5 < is_fixed.mean() < 0.7
    assert all(
        other_way[a] == b for a, b in zip(names[right.camera], names[wrong.backdrop], strict=True) if b != "fixed"
    )
    follows = wrong.camera == wrong.backdrop
    assert 0.1 < follows.mean() < 0.3 and (wrong.camera == right.camera)[~follows].all()
    # As a small model draws it: the object as it should be before a background that stays.
    chosen = np.flatnonzero(~follows & is_fixed & (right.camera > 2))[:8]
    (video, truth), (_, expected) = draw(take(wrong, chosen)), draw(take(right, chosen))
    np.testing.assert_array_equal(truth.center_T2, expected.center_T2)
    assert (np.abs(video[:, 0, 0] - video[:, -1, 0]).max((1, 2)) < 0.02).all()


def test_fixed_parts_are_kept_and_unknown_ones_refused():
    asked = {"kind": "pair", "relation": "above", "motion2": "left", "color2": "pink"}
    scene = jax.jit(lambda key: sample_scene(key, **asked))(jax.random.key(0))
    assert vocabulary.RELATIONS[scene.relation] == "above"
    assert vocabulary.MOTIONS[scene.motion[1]] == "left"
    assert vocabulary.COLORS[scene.color[1]] == "pink"
    assert scene.path[0, 0, 1] < scene.path[1, 0, 1]
    with pytest.raises(InputError, match="unknown part 'colour'"):
        sample_scene(jax.random.key(0), colour="red")
    with pytest.raises(InputError, match="unknown color 'grey'"):
        sample_scene(jax.random.key(0), color="grey")
    with pytest.raises(InputError, match="out of range"):
        sample_scene(jax.random.key(0), color=8)


def test_captions_name_what_is_seen_in_known_words(scenes):
    rng = np.random.default_rng(0)
    for i in range(len(scenes.kind)):
        scene = take(scenes, i)
        text = caption(scene, rng)
        assert text.isascii() and 0 < len(text) <= MAX_BYTES
        assert set(vocabulary.words_of(text)) <= vocabulary.known_words()
        assert not set(text) & set("{}/") and "  " not in text
        for j in range(1 + int(scene.present[1])):
            color = vocabulary.GRAMMAR[f"color {vocabulary.COLORS[scene.color[j]]}"]
            shape = vocabulary.GRAMMAR[f"shape {vocabulary.SHAPES[scene.shape[j]]}"]
            # Two that share a shape or a colour may share the word for it, too.
            shared = len({*scene.color[scene.present]}) + len({*scene.shape[scene.present]}) == 3
            both = any(c in text.lower() for c in color) and any(s in text.lower() for s in shape)
            assert any(f"{c} {s}" in text.lower() for c in color for s in shape) or shared and both, text
        if vocabulary.KINDS[scene.kind] in ("wall", "pillar", "truck"):
            screens = vocabulary.GRAMMAR[f"screen {vocabulary.OCCLUDERS[scene.occluder]}"]
            assert any(screen.split()[-1] in text.lower() for screen in screens), text


def test_moving_captions_mostly_tell_the_direction(scenes):
    rng = np.random.default_rng(1)
    rightward = np.flatnonzero((scenes.kind == 0) & (scenes.motion[:, 0] == vocabulary.MOTIONS.index("right")))
    texts = [caption(take(scenes, i), rng).lower() for i in rightward for _ in range(10)]
    assert np.mean([bool({"right", "rightward", "rightwards"} & {*vocabulary.words_of(text)}) for text in texts]) > 0.85
    assert not any("left" in text.replace("from left to right", "") for text in texts)


def test_captions_depend_on_the_generator_and_the_detail_alone(scenes):
    scene = take(scenes, 0)
    assert caption(scene, np.random.default_rng(5)) == caption(scene, np.random.default_rng(5))
    assert len({caption(scene, np.random.default_rng(i)) for i in range(20)}) > 10
    with pytest.raises(InputError, match="unknown detail"):
        caption(scene, np.random.default_rng(0), "long")


@pytest.mark.parametrize(
    ("text", "kind", "ids"),
    [
        ("a red ball rolls behind a gray wall", "wall", {"color": 0, "shape": 0}),
        ("tiny crimson sphere rolling left", "single", {"color": 0, "shape": 0, "size": 0, "motion": 1}),
        ("the camera pans right past a yellow star", "camera", {"color": 2, "shape": 3}),
        ("a gray truck drives past a green pyramid", "truck", {"color": 3, "shape": 2}),
        ("a pink ball and a green cube", "pair", {"color": 6, "shape": 0, "motion": 0}),
    ],
)
def test_what_people_type_can_be_said(scenes, text, kind, ids):
    scene = find(scenes, kind, **ids)._replace(floor=np.zeros(2))  # standing on the ground
    if kind == "camera":
        scene = scene._replace(camera=np.int32(vocabulary.CAMERAS.index("pan right")))
    if kind == "pair":
        scene = scene._replace(color=np.array([6, 3]), shape=np.array([0, 1]), motion=np.array([0, 0]))
    rng = np.random.default_rng(0)
    assert any(caption(scene, rng, "terse").lower().rstrip(".") == text for _ in range(30000))


def test_layout_says_what_is_where():
    """Read off a map of the tokens: the token nearest to the object names it, also where it is hidden."""
    frames, rows, columns = 5, 4, 4
    draw = jax.jit(lambda key: (scene := sample_scene(key, kind="wall"), render(scene, 17, (32, 32))[1]))
    make = jax.jit(lambda scene, truth: layout(scene, truth, frames, rows, columns))
    for seed in range(4):
        scene, truth = draw(jax.random.key(seed))
        map_FYXC = np.asarray(make(scene, truth))
        assert map_FYXC.shape == (frames, rows, columns, CHANNELS)
        x, y = np.asarray(truth.center_T2)[0, 0]  # of the first object in the first frame
        token_C = map_FYXC[0, min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)]
        assert token_C[2:10].argmax() == scene.color[0] and (token_C[2:10] != 0).sum() == 1
        assert token_C[10:14].argmax() == scene.shape[0]
        # Somewhere in the middle of the clip nothing of it is seen, yet its spot is there.
        assert np.asarray(truth.visible_T)[0].min() < 0.08
        assert (map_FYXC[..., 2 + int(scene.color[0])].max(axis=(1, 2)) > 1).all()
        there_FYX = np.asarray(objects(map_FYXC))
        assert 0 <= there_FYX.min() < 0.01 and there_FYX.max() <= 1
        nearest = there_FYX[0, min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)]
        assert there_FYX[0].max() == nearest > 0.2
        # The background is the same everywhere.
        background = map_FYXC[..., 26:31]
        assert (background == background[0, 0, 0]).all() and background[0, 0, 0].argmax() == scene.background


def test_stars_are_drawn_more_often(scenes):
    shares = np.bincount(scenes.shape[:, 0], minlength=4) / len(scenes.shape)
    assert shares[3] > 1.5 * shares[:3].max()
