"""The reader says what real renders show, and is not taken in by clips that show something else."""

import re

import jax
import numpy as np
import pytest
from scipy import ndimage

from sora_jax.data.worlds.render import render
from sora_jax.evaluation.prompts import evaluation_prompts
from sora_jax.evaluation.reader import COLORS, SHAPES, name_color, read
from sora_jax.evaluation.report import score

COUNT = 48
SEED = 7  # not one that the reader was developed on
OPPOSITE = {"left": "right", "up": "down", "in": "out"} | {"right": "left", "down": "up", "out": "in"}


@pytest.fixture(scope="module")
def draw():
    """Scenes to uint8 [B, T, H, W, 3]; compiled once."""
    compiled = jax.jit(jax.vmap(lambda scene: render(scene, 17, (128, 128))[0]))

    def draw(scenes):
        clips = []
        for start in range(0, len(scenes), 8):
            batch = [scenes[min(start + i, len(scenes) - 1)] for i in range(8)]
            clips.append(np.asarray(compiled(jax.tree.map(lambda *a: np.stack(a), *batch))))
        return np.round(np.concatenate(clips)[: len(scenes)] * 255).astype(np.uint8)

    return draw


@pytest.fixture(scope="module")
def clips(draw):
    """Pairs of prompt and real render."""
    prompts = evaluation_prompts(COUNT, SEED)
    return list(zip(prompts, draw([prompt.scene for prompt in prompts]), strict=True))


@pytest.fixture(scope="module")
def readings(clips):
    return [read(frames) for _, frames in clips]


def of_kind(clips, *kinds):
    found = [(prompt, frames) for prompt, frames in clips if prompt.kind in kinds]
    assert {prompt.kind for prompt, _ in found} == set(kinds)
    return found


def shares(prompts, readings):
    """The share of right answers to each question."""
    answers = [score(prompt, reading) for prompt, reading in zip(prompts, readings, strict=True)]
    questions = {question for each in answers for question in each}
    return {q: np.mean([each[q] for each in answers if q in each]) for q in questions}


def opposite(name):
    """Of a direction or a camera motion: each word of it turned round."""
    return re.sub("[a-z]+", lambda word: OPPOSITE.get(word[0], word[0]), name)


def test_real_renders_are_read_right(clips, readings):
    for question, share in shares([prompt for prompt, _ in clips], readings).items():
        assert share >= 0.95, question


def test_nothing_is_hidden_where_nothing_hides_it(clips, readings):
    for (prompt, _), reading in zip(clips, readings, strict=True):
        assert prompt.hidden or not any(seen.hidden_and_back for seen in reading.objects)


def test_blur_and_noise_do_not_matter(clips):
    rng = np.random.default_rng(0)
    chosen = clips[:24]

    def spoil(frames):
        blurred = ndimage.gaussian_filter(frames.astype(np.float32), (0, 1.5, 1.5, 0))
        return np.clip(blurred + rng.normal(0, 5, frames.shape), 0, 255).astype(np.uint8)

    found = shares([prompt for prompt, _ in chosen], [read(spoil(frames)) for _, frames in chosen])
    assert min(found.values()) >= 0.9, found


def test_backwards_clips_go_the_opposite_way(clips, readings):
    for (prompt, frames), reading in list(zip(clips, readings, strict=True))[:24]:
        turned = read(frames[::-1])
        assert turned.camera == opposite(reading.camera), prompt.text
        if len(prompt.colors) == 1 and prompt.directions[0]:
            assert turned.objects[0].direction == opposite(reading.objects[0].direction), prompt.text


def test_mirrored_clips_swap_left_and_right(clips):
    swap = {"left": "right", "right": "left"}
    for prompt, frames in of_kind(clips, "wall", "pillar")[:4]:
        assert read(frames[:, :, ::-1]).objects[0].direction == swap[prompt.directions[0]]


def test_swapped_colors_are_noticed(clips):
    chosen = [one for one in of_kind(clips, "single") if one[0].colors not in (("white",), ("green",))][:12]
    assert len(chosen) == 12
    for prompt, frames in chosen:
        answers = score(prompt, read(frames[..., [1, 2, 0]]))
        assert not answers["color"] and answers["shape"], prompt.text


def test_upside_down_is_another_shape(clips):
    pyramids = [frames for prompt, frames in of_kind(clips, "single") if prompt.shapes == ("pyramid",)]
    assert pyramids
    for frames in pyramids:
        assert read(frames[:, ::-1]).objects[0].shape != "pyramid"


@pytest.mark.parametrize("part", ["color", "shape"])
def test_what_comes_back_as_something_else_is_not_the_same(clips, draw, part):
    prompts = [prompt for prompt, _ in of_kind(clips, "wall", "pillar", "truck")]
    count = {"color": len(COLORS), "shape": len(SHAPES)}[part]
    changed = [p.scene._replace(**{part: (getattr(p.scene, part) + 1) % count}) for p in prompts]
    before, after = draw([prompt.scene for prompt in prompts]), draw(changed)
    for prompt, first, second in zip(prompts, before, after, strict=True):
        assert read(first).objects[0].hidden_and_back, prompt.text
        # The change happens in the middle of the hidden frames.
        area_T = read(first).objects[0].area_T
        middle = int(np.median(np.flatnonzero(area_T < 0.08 * area_T.max())))
        mixed = np.concatenate([first[:middle], second[middle:]])
        assert not any(seen.hidden_and_back for seen in read(mixed).objects), prompt.text


def test_what_does_not_come_back_is_not_back(clips):
    for _, frames in of_kind(clips, "wall", "pillar")[:4]:
        area_T = read(frames).objects[0].area_T
        gone = int(np.flatnonzero(area_T == 0)[0])
        stuck = np.concatenate([frames[: gone + 1], np.repeat(frames[gone : gone + 1], 16 - gone, axis=0)])
        assert not read(stuck).objects[0].hidden_and_back


def test_empty_backgrounds_hold_nothing_and_still_show_the_camera(clips, draw):
    chosen = of_kind(clips, "camera", "truck", "wall")
    bare = [prompt.scene._replace(present=np.zeros(2, bool)) for prompt, _ in chosen]
    for (prompt, _), frames in zip(chosen, draw(bare), strict=True):
        reading = read(frames)
        assert reading.objects == ()
        assert reading.camera == (prompt.camera or "fixed"), prompt.text


@pytest.mark.parametrize("shape", [(17, 64, 64, 3), (5, 32, 64, 3), (1, 32, 32, 3), (2, 4, 4, 3)])
def test_any_frames_can_be_read(shape):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, shape).astype(np.uint8)
    assert read(noise).objects == ()
    assert read(np.full(shape, 128, np.uint8)).objects == ()
    assert read(np.full(shape, 255, np.uint8)).objects == ()
    red = np.full(shape, 0, np.uint8)
    red[..., 0] = 255
    assert read(red).objects == ()  # as large as the frame: a background


def test_tracks_follow_the_object():
    frames = np.full((9, 96, 128, 3), 120, np.uint8)
    for t in range(9):
        frames[t, 40:60, 10 + 10 * t : 30 + 10 * t] = (20, 60, 230)
    (seen,) = read(frames).objects
    assert (seen.color, seen.shape, seen.direction) == ("blue", "cube", "right")
    np.testing.assert_allclose(seen.track_T2[:, 0], (20 + 10 * np.arange(9)) / 128, atol=1e-6)
    np.testing.assert_allclose(seen.track_T2[:, 1], 50 / 96, atol=1e-6)
    np.testing.assert_allclose(seen.area_T, 400 / (96 * 128))


def test_shaded_and_faded_colors_keep_their_names():
    for name, rgb in COLORS.items():
        for light in (0.85, 1.0, 1.05) if name != "white" else (0.95, 1.0):
            assert name_color(np.clip(np.array(rgb) * light, 0, 1)) == name
        assert name_color(0.85 * np.array(rgb) + 0.15 * 0.7) == name
    assert set(SHAPES) == {"ball", "cube", "pyramid", "star"}
