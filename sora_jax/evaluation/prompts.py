"""Prompts to evaluate on: balanced over what can be asked for, and each with a scene that would fulfil it."""

import re
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from sora_jax.data.worlds import vocabulary
from sora_jax.data.worlds.captions import caption
from sora_jax.data.worlds.drawing import HELD_OUT
from sora_jax.data.worlds.scenes import Scene, sample_scene
from sora_jax.errors import InputError

# One round; the prompts go through it again and again, so that any number of them is balanced.
_ROUND = (
    ("single", "pair", "single", "wall", "camera", "single")
    + ("pillar", "single", "pair", "truck", "single", "camera")
)  # fmt: skip
_PAIR_MOTIONS = ("still", "left", "right", "up", "down", "bouncing")
_BATCH = 24
_RELATION = re.compile(r"\b(left of|right of|above|below|under(?! (?:a|the)(?: \w+){0,2} sky))\b")
_SIDE = re.compile(r"\bfrom (?:left|right) to (?:left|right)\b|\b(?:left|right)(?! of)(?:wards?)?\b")
_REST = re.compile(r"\b(rest|stand|sit|stay|lies?\b|lying|motionless|not moving|hover|hang|float\w* in place)")


@dataclass(frozen=True, eq=False)
class EvaluationPrompt:
    """A prompt, what it asks for, and a scene that shows it.

    Attributes:
        text: the prompt; it states all of the following that is not None.
        kind: one of `vocabulary.KINDS`.
        colors, shapes: names, one per object.
        directions: one of `vocabulary.MOTIONS` for each object; None where the prompt asks for none: trucks, moving
            cameras, pairs of which nothing moves.
        relation: one of `vocabulary.RELATIONS`, of the first object to the second, if the prompt states it, else None.
        camera: one of `vocabulary.CAMERAS` if the prompt asks for a camera motion, else None.
        background: one of `vocabulary.BACKGROUNDS` if the prompt names one, else None.
        hidden: whether the object is to be hidden for a moment and to come back.
        unseen: whether the (first) object is a combination that is kept out of training.
        scene: a Scene of NumPy arrays, from a key that training never uses.
    """

    text: str
    kind: str
    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    directions: tuple[str | None, ...]
    relation: str | None
    camera: str | None
    background: str | None
    hidden: bool
    unseen: bool
    scene: Scene


def evaluation_prompts(n: int = 240, seed: int = 0) -> tuple[EvaluationPrompt, ...]:
    """`n` prompts, always the first ones of those of `seed`; a quarter asks for pairs never trained on.

    Raises:
        InputError: if `n` is below 1 or `seed` is negative.
    """
    if n < 1 or seed < 0:
        raise InputError(f"evaluation needs at least 1 prompt and a seed from 0, not {n} and {seed}")
    rng = np.random.default_rng(seed)
    trained = [
        pair
        for pair in np.ndindex(len(vocabulary.COLORS), len(vocabulary.SHAPES))
        if (vocabulary.COLORS[pair[0]], vocabulary.SHAPES[pair[1]]) not in vocabulary.UNSEEN
    ]
    unseen = [(vocabulary.COLORS.index(c), vocabulary.SHAPES.index(s)) for c, s in vocabulary.UNSEEN]
    sides = ("left", "right")
    decks = {
        "single": _deck(rng, range(len(vocabulary.MOTIONS))),
        "pair": _deck(rng, [vocabulary.MOTIONS.index(m) for m in _PAIR_MOTIONS]),
        "screen": _deck(rng, [vocabulary.MOTIONS.index(side) for side in sides]),
        "camera": _deck(rng, range(1, len(vocabulary.CAMERAS))),
        "background": _deck(rng, range(len(vocabulary.BACKGROUNDS))),
        **{f"{kind} unseen": _deck(rng, (True, False, False, False)) for kind in vocabulary.KINDS},
        True: _deck(rng, unseen),
        False: _deck(rng, trained),
    }
    asked = []
    for i in range(n):
        kind = _ROUND[i % len(_ROUND)]
        is_unseen = bool(next(decks[f"{kind} unseen"]))
        color, shape = next(decks[is_unseen])
        others = [(c, s) for c, s in trained if (c, s) != (color, shape)]
        color2, shape2 = others[rng.integers(len(others))]
        motions = decks.get({"wall": "screen", "pillar": "screen"}.get(kind, kind))
        asked.append(
            {
                "kind": vocabulary.KINDS.index(kind),
                "color": color,
                "shape": shape,
                "color2": color2,
                "shape2": shape2,
                "motion": 0 if kind in ("camera", "truck") else next(motions),
                "camera": next(decks["camera"]) if kind == "camera" else 0,
                "background": next(decks["background"]),
            }
        )
    fixed = {part: np.array([each[part] for each in asked], np.int32) for part in asked[0]}
    key = jax.random.fold_in(jax.random.key(HELD_OUT), seed)
    # In batches of one size, so that any number of prompts needs only one compilation.
    batches = [np.minimum(start + np.arange(_BATCH), n - 1) for start in range(0, n, _BATCH)]
    sampled = [_sample(key, i, jax.tree.map(lambda a, i=i: a[i], fixed)) for i in batches]
    scenes = jax.tree.map(lambda *parts: np.concatenate(parts), *sampled)
    return tuple(_prompt(jax.tree.map(lambda a, i=i: a[i], scenes), np.random.default_rng((seed, i))) for i in range(n))


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, 0))
def _sample(key, i, fixed):
    return sample_scene(jax.random.fold_in(key, i), **fixed)


def _deck(rng, cards):
    """Deals the cards in random order, again and again."""
    while True:
        for i in rng.permutation(len(cards)):
            yield cards[i]


def _prompt(scene, rng):
    kind, background = vocabulary.KINDS[scene.kind], vocabulary.BACKGROUNDS[scene.background]
    objects = range(1 + int(scene.present[1]))
    colors = tuple(vocabulary.COLORS[scene.color[i]] for i in objects)
    shapes = tuple(vocabulary.SHAPES[scene.shape[i]] for i in objects)
    motions = tuple(vocabulary.MOTIONS[scene.motion[i]] for i in objects)
    # A truck drives past, a camera moves, or an object moves: of what rests then, captions say so now and then.
    asks = kind in ("single", "wall", "pillar") or (kind == "pair" and any(motion != "still" for motion in motions))
    text = caption(scene, rng)
    while asks and not _states(text.lower(), motions):
        text = caption(scene, rng)
    rests = asks and _says_rest(text.lower())
    return EvaluationPrompt(
        text=text,
        kind=kind,
        colors=colors,
        shapes=shapes,
        directions=tuple(motion if asks and (motion != "still" or rests) else None for motion in motions),
        relation=vocabulary.RELATIONS[scene.relation] if kind == "pair" and _RELATION.search(text.lower()) else None,
        camera=vocabulary.CAMERAS[scene.camera] if kind == "camera" else None,
        background=background if _names(text.lower(), f"background {background}") else None,
        hidden=kind in ("wall", "pillar", "truck"),
        unseen=(colors[0], shapes[0]) in vocabulary.UNSEEN,
        scene=scene,
    )


def _states(text, motions):
    """Captions leave out rest and the side now and then; every other motion is in the verb."""
    if motions == ("still",):
        return _says_rest(text)
    return len(_SIDE.findall(text)) >= sum(motion in ("left", "right") for motion in motions)


def _says_rest(text):
    return _REST.search(text) is not None


def _names(text, symbol):
    """Whether a caption says one of the alternatives of a symbol of the grammar."""
    return any(re.search(re.sub(r"\{[^}]*\}", ".*", said), text) for said in vocabulary.GRAMMAR[symbol])
