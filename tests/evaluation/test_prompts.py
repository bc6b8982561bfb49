"""The prompts of the evaluation are balanced, reproducible, and say what is compared."""

import re
from collections import Counter

import numpy as np
import pytest

from sora_jax.data.worlds import vocabulary
from sora_jax.errors import InputError
from sora_jax.evaluation.prompts import _RELATION, _SIDE, evaluation_prompts

BACKGROUND_WORDS = {
    "plain": ("plain",),
    "gradient": ("gradient",),
    "ground and sky": ("field", "meadow", "grass", "hills", "sky"),
    "snow": ("snow",),
    "night": ("night", "dark"),
}


@pytest.fixture(scope="module")
def prompts():
    return evaluation_prompts(240)


def test_kinds_motions_and_cameras_are_balanced(prompts):
    kinds = Counter(prompt.kind for prompt in prompts)
    assert set(kinds) == set(vocabulary.KINDS) and min(kinds.values()) >= 20
    singles = Counter(prompt.directions[0] for prompt in prompts if prompt.kind == "single")
    assert set(singles) == set(vocabulary.MOTIONS) and len(set(singles.values())) == 1
    cameras = Counter(prompt.camera for prompt in prompts if prompt.kind == "camera")
    assert set(cameras) == set(vocabulary.CAMERAS) - {"fixed"} and len(set(cameras.values())) == 1
    backgrounds = Counter(prompt.background for prompt in prompts if prompt.background)
    assert set(backgrounds) == set(vocabulary.BACKGROUNDS) and sum(backgrounds.values()) >= 80


def test_a_quarter_asks_for_unseen_combinations(prompts):
    assert np.mean([prompt.unseen for prompt in prompts]) == pytest.approx(0.25, abs=0.03)
    for prompt in prompts:
        assert prompt.unseen == ((prompt.colors[0], prompt.shapes[0]) in vocabulary.UNSEEN)
        assert not set(zip(prompt.colors[1:], prompt.shapes[1:], strict=True)) & set(vocabulary.UNSEEN)


def test_the_text_states_everything_that_is_compared(prompts):
    for prompt in prompts:
        text = prompt.text.lower()
        assert set(vocabulary.words_of(text)) <= vocabulary.known_words()
        for part, names in (("color", prompt.colors), ("shape", prompt.shapes)):
            for name in names:
                assert any(word in text for word in vocabulary.GRAMMAR[f"{part} {name}"]), text
        for direction in {"left", "right"} & set(prompt.directions):
            assert direction in re.sub("bright|left of|right of", "", text), text
        if prompt.relation:
            words = {"left of": ["left of"], "right of": ["right of"], "above": ["above"], "below": ["below", "under"]}
            opposite = vocabulary.RELATIONS[vocabulary.RELATIONS.index(prompt.relation) ^ 1]
            assert any(word in text for one in (prompt.relation, opposite) for word in words[one]), text
        if prompt.background:
            assert any(word in text for word in BACKGROUND_WORDS[prompt.background]), text
        if prompt.camera:
            assert any(word in text for word in ("camera", "zoom", "pan")), text


def test_the_scene_is_what_the_prompt_asks_for(prompts):
    for prompt in prompts:
        scene = prompt.scene
        assert vocabulary.KINDS[scene.kind] == prompt.kind
        assert tuple(vocabulary.COLORS[c] for c in scene.color[scene.present]) == prompt.colors
        assert tuple(vocabulary.SHAPES[s] for s in scene.shape[scene.present]) == prompt.shapes
        assert vocabulary.CAMERAS[scene.camera] == (prompt.camera or "fixed")
        assert prompt.hidden == bool(scene.occluder)
        assert prompt.background in (None, vocabulary.BACKGROUNDS[scene.background])
        assert prompt.relation in (None, vocabulary.RELATIONS[scene.relation])
        motions = [vocabulary.MOTIONS[motion] for motion in scene.motion[scene.present]]
        assert all(asked in (None, motion) for asked, motion in zip(prompt.directions, motions, strict=True))


def test_pairs_are_asked_to_move_and_to_stand_somewhere(prompts):
    pairs = [prompt for prompt in prompts if prompt.kind == "pair"]
    assert sum(prompt.relation is not None for prompt in pairs) >= 5
    assert sum(any(prompt.directions) for prompt in pairs) >= 20
    moving = [prompt for prompt in pairs if prompt.scene.motion.any()]
    assert all(any(prompt.directions) for prompt in moving)
    assert any(None in prompt.directions for prompt in moving) and any(
        "still" in prompt.directions for prompt in moving
    )


@pytest.mark.parametrize(
    "text, states",
    [
        ("a red ball above a blue cube", True),
        ("a red ball under a blue cube in a field under a blue sky", True),
        ("a red ball and a blue cube under a starry night sky", False),
        ("a red ball and a blue cube on the grass under a pale sky", False),
        ("a red ball rolls to the left and a blue cube rests", False),
        ("a red ball to the left of a blue cube", True),
    ],
)
def test_a_place_under_the_sky_is_no_relation(text, states):
    assert bool(_RELATION.search(text)) == states


@pytest.mark.parametrize(
    "text, sides",
    [
        ("a red ball rolls from left to right and a blue cube slides left", 2),
        ("a bright blue ball rolls to the right", 1),
        ("a red ball moving leftward left of a cube", 1),
        ("a red ball rolls right of a cube", 0),
        ("a red ball rolls rightwards and a cube slides leftwards", 2),
    ],
)
def test_sides_are_counted_once(text, sides):
    assert len(_SIDE.findall(text)) == sides


def test_the_seed_decides(prompts):
    assert [p.text for p in evaluation_prompts(24)] == [p.text for p in prompts[:24]]
    assert [p.text for p in evaluation_prompts(24, seed=1)] != [p.text for p in prompts[:24]]
    with pytest.raises(InputError, match="at least 1 prompt"):
        evaluation_prompts(0)
