"""Captions say of a scene what is so, and nothing that is not: read here with words of this file alone."""

import re

import jax
import numpy as np
import pytest

from sora_jax.data.worlds import vocabulary
from sora_jax.data.worlds.captions import DETAILS, caption
from sora_jax.data.worlds.scenes import sample_scene

UP = {
    *("up", "upward", "upwards", "rises", "rising", "rise", "climbs", "climbing", "climb", "top", "upper"),
    *("soars", "soaring", "soar", "ascends", "ascending", "ascend"),
}
DOWN = {
    *("down", "downward", "downwards", "falls", "falling", "fall", "drops", "dropping", "drop"),
    *("sinks", "sinking", "sink", "descends", "descending", "descend", "bottom", "lower"),
}
LEFT, RIGHT = {"left", "leftward", "leftwards"}, {"right", "rightward", "rightwards"}
SMALL, LARGE = {"small", "little", "tiny"}, {"large", "big", "huge", "giant"}
BACKGROUNDS = {  # words that no other background has
    "plain": {"plain"},
    "gradient": {"gradient"},
    "ground and sky": {"grassy", "meadow", "grass", "hills", "outdoors", "blue sky"},
    "snow": {"snow", "snowy"},
    "night": {"night", "dark", "starry"},
}
COLORS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden", "gold"),
    "green": ("green", "emerald"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "white": ("white",),
}
SHAPES = {
    "ball": ("ball", "sphere", "circle", "orb"),
    "cube": ("cube", "box", "block", "square"),
    "pyramid": ("pyramid", "triangle"),
    "star": ("star",),
}
RELATION = re.compile(
    r"(to the left of|left of|on the left of|to the right of|right of|on the right of|above|below|under)\b"
)


@pytest.fixture(scope="module")
def told():
    """2,000 scenes, with three captions of each: (scene, text in lower case)."""
    keys = jax.random.split(jax.random.key(7), 2000)
    scenes = jax.tree.map(np.asarray, jax.jit(jax.vmap(sample_scene))(keys))
    rng = np.random.default_rng(0)
    each = [jax.tree.map(lambda a, i=i: a[i], scenes) for i in range(len(keys))]
    return [(scene, caption(scene, rng, detail).lower()) for scene in each for detail in DETAILS]


def of_kind(told, *kinds):
    return [(scene, text) for scene, text in told if vocabulary.KINDS[scene.kind] in kinds]


def sides(text):
    """The ways to the side that a text names: "from left to right" is to the right."""
    text = text.replace("from left to right", "right").replace("from right to left", "left")
    found = set(vocabulary.words_of(text))
    return {side for side, words in (("left", LEFT), ("right", RIGHT)) if found & words}


def heights(text):
    found = set(vocabulary.words_of(text.replace("up and down", "")))
    return {way for way, words in (("up", UP), ("down", DOWN)) if found & words}


def way(start, end, less, more, least=0.05):
    return {more} if end - start > least else {less} if start - end > least else set()


def mention(text, scene, i):
    """Where an object is named; None where that takes more than its colour and then its shape."""
    pairs = [
        f"{c} {s}" for c in COLORS[vocabulary.COLORS[scene.color[i]]] for s in SHAPES[vocabulary.SHAPES[scene.shape[i]]]
    ]
    return min((match.start() for pair in pairs if (match := re.search(rf"\b{pair}\b", text))), default=None)


def test_what_a_single_object_does(told):
    named = {"side": 0, "height": 0}
    for scene, text in of_kind(told, "single"):
        (x, y), (to_x, to_y) = scene.path[0]
        motion = vocabulary.MOTIONS[scene.motion[0]]
        if motion == "still":
            place = {side for side in sides(text) if f"on the {side}" in text}
            assert place == sides(text) and place <= ({"left"} if x < 0.5 else {"right"}), text
            continue
        assert sides(text) <= way(x, to_x, "left", "right"), text
        if motion != "bouncing":
            assert heights(text) <= way(y, to_y, "up", "down"), text  # y grows downwards
            named["height"] += bool(heights(text))
        named["side"] += bool(sides(text))
    assert min(named.values()) > 300


def test_which_way_what_passes_behind_a_screen_goes(told):
    texts = of_kind(told, "wall", "pillar")
    for scene, text in texts:
        assert sides(text) <= way(scene.path[0, 0, 0], scene.path[0, 1, 0], "left", "right"), text
    assert np.mean([bool(sides(text)) for _, text in texts]) > 0.6


def test_which_way_the_truck_drives(told):
    texts = of_kind(told, "truck")
    for scene, text in texts:
        assert sides(text) <= way(scene.screen[0], scene.screen[1], "left", "right"), text
    assert np.mean([bool(sides(text)) for _, text in texts]) > 0.5


def test_what_the_camera_does(told):
    for scene, text in of_kind(told, "camera"):
        motion, _, where = vocabulary.CAMERAS[scene.camera].partition(" ")
        if motion == "pan":
            assert sides(text) == {where}, text
        else:
            zoomed = {"in" if re.search(r"zoom(s|ing)? in\b|closer", text) else "out"}
            assert zoomed == {where} and not sides(text), text
            assert bool(re.search(r"zoom(s|ing)? out\b|away|back from", text)) == (where == "out"), text


def test_where_the_objects_of_a_pair_are(told):
    found = 0
    for scene, text in of_kind(told, "pair"):
        text = text.replace("right above", "above").replace("right under", "under").replace("right below", "below")
        relation = RELATION.search(re.sub(r"under (a|the) [a-z ]*sky", "", text))
        if relation is None or any(vocabulary.MOTIONS[m] not in ("still", "bouncing") for m in scene.motion):
            continue
        first, second = sorted((0, 1), key=lambda i: mention(text, scene, i))
        (x, y), (other_x, other_y) = scene.path[first, 0], scene.path[second, 0]
        word = relation[1]
        right = (
            x < other_x
            if "left" in word
            else x > other_x
            if "right" in word
            else y < other_y
            if word == "above"
            else y > other_y
        )
        assert right, text
        found += 1
    assert found > 100


def test_size_color_and_shape_are_those_of_the_objects(told):
    for scene, text in told:
        for i in range(1 + bool(scene.present[1])):
            before = text[: mention(text, scene, i) or 0].replace(" bright ", " ").split()[-1:]
            size = vocabulary.SIZES[scene.size[i]]
            assert not {*before} & (LARGE if size == "small" else SMALL), text
        shapes = {vocabulary.SHAPES[scene.shape[i]] for i in range(1 + bool(scene.present[1]))}
        for shape, words in SHAPES.items():
            assert shape in shapes or not {*words} & {*vocabulary.words_of(text)}, text


def test_the_background_is_the_one_that_is_there(told):
    named = 0
    for scene, text in told:
        here = vocabulary.BACKGROUNDS[scene.background]
        for name, words in BACKGROUNDS.items():
            said = any(re.search(rf"\b{word}\b", text) for word in words)
            assert not said or name == here, text
            named += said
    assert named > 2000


def test_captions_read_well(told):
    """What is on a field is the object, not the camera; nothing round stands; one backdrop is enough."""
    for scene, text in told:
        assert not re.search(
            r"camera (zooms|pans|moves)( \w+){0,4} (on|in|over|at|under|against) (a|the|snow|night)\b", text
        ) or (
            re.search(
                rf"zooms in on (a|an|the|one) (\w+ )*({'|'.join(word for words in SHAPES.values() for word in words)})",
                text,
            )
        ), text
        if not scene.present[1] and vocabulary.SHAPES[scene.shape[0]] == "ball":
            assert not re.search(r"\b(stands|standing|sits|sitting)\b", text), text
        assert text.count("in front of") < 2, text
        assert not re.search(r"\b(left|right) (above|below|under)\b", text), text
        if not scene.present[1] and re.search(r"\b(hover|hang|fl(y|ies|ying)\b)", text):
            assert not re.search(r"\bon (a|the) (grass|field|snowy|ground|floor)", text), text


def test_two_that_share_a_shape_or_a_colour_are_told_apart(told):
    """Each has its colour or its shape, though it may be called "one", or share a noun; one of a plural is enough."""
    found = {"shape": 0, "color": 0}
    for scene, text in of_kind(told, "pair"):
        colors = {vocabulary.COLORS[c] for c in scene.color}
        shapes = {vocabulary.SHAPES[s] for s in scene.shape}
        words = {*vocabulary.words_of(text.replace("blue sky", "sky"))}
        said = {shape for shape, names in SHAPES.items() for name in names if words & {name, f"{name}s", f"{name}es"}}
        assert {color for color, names in COLORS.items() if words & {*names}} == colors, text
        assert said == shapes, text
        if None in (mention(text, scene, 0), mention(text, scene, 1)):
            assert len(colors) + len(shapes) == 3 and not scene.motion.any(), text
            found["shape" if len(shapes) == 1 else "color"] += 1
    assert min(found.values()) > 10


def test_what_is_watched_has_verbs_without_an_ending(told):
    watched = [text for _, text in told if re.search(r"\b(watch|see) ", text)]
    heads = [re.split(r" (?:while|as|that) ", text)[0] for text in watched]
    assert len(heads) > 50
    for text in heads:
        assert not re.search(r"\b(rolls|rolling|slides|flies|falls|rises|drives|passes|bounces|is)\b", text), text
    assert (
        sum(bool(re.search(r"\b(roll|slide|fly|fall|rise|drive|pass|bounce|move|go)\b", text)) for text in heads) > 20
    )
    assert {"flies": "fly", "lies": "lie", "goes": "go", "bounces": "bounce", "vanishes": "vanish"}.items() <= {
        verb: vocabulary.infinitive(verb) for verb in ("flies", "lies", "goes", "bounces", "vanishes")
    }.items()


def test_most_captions_are_detailed():
    keys = jax.random.split(jax.random.key(8), 1000)
    scenes = jax.tree.map(np.asarray, jax.jit(jax.vmap(sample_scene))(keys))
    rng = np.random.default_rng(0)
    texts = [caption(jax.tree.map(lambda a, i=i: a[i], scenes), rng).lower() for i in range(len(keys))]
    named = [
        any(re.search(rf"\b{w}\b", t) for words in BACKGROUNDS.values() for w in words) or "field" in t for t in texts
    ]
    sizes = [any(word in t.split() for word in SMALL | LARGE) for t in texts]
    assert np.mean(named) > 0.65 and np.mean(sizes) > 0.75
