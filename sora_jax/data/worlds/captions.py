"""Captions of scenes, as people would type them, drawn from the grammar in `vocabulary`."""

import re

import numpy as np

from sora_jax.data.worlds import vocabulary
from sora_jax.data.worlds.scenes import BELOW, RADII, Scene
from sora_jax.errors import InputError

DETAILS = ("terse", "medium", "full")
MAX_BYTES = 120  # captions are ASCII

_DETAIL_ODDS = (0.1, 0.25, 0.65)
_SIZE_ODDS = {"terse": 0.25, "medium": 0.6, "full": 0.95}
_BACKGROUND_ODDS = {"terse": 0.0, "medium": 0.4, "full": 0.95}
_NO_DIRECTION_ODDS = 0.08
_FORM_ODDS = (0.58, 0.38, 0.04)  # "a ball rolls left", "a ball rolling left", "watch a ball roll left"
_GROUND = re.compile(r"on (a|the) (field|grass)|on a (grassy|snowy)|.*(the ground|the floor)")  # of nothing that floats
# "moves right above it" may mean straight above it; and one backdrop behind a truck is enough.
_MISLEADING = re.compile(r"\b(left|right) (above|below|under)\b|\bin front of\b.*\bin front of\b")


def caption(scene: Scene, rng: np.random.Generator, detail: str | None = None) -> str:
    """Describe a scene in a line of plain English, at most `MAX_BYTES` long.

    Args:
        scene: one scene, of JAX or NumPy arrays.
        rng: which of the many ways to say it.
        detail: "terse" (object and motion), "medium" or "full" (mostly with size and background), or drawn.

    Raises:
        InputError: an unknown detail.
    """
    if detail is not None and detail not in DETAILS:
        raise InputError(f"caption: unknown detail {detail!r}; it is one of {', '.join(DETAILS)}")
    detail = detail or str(rng.choice(DETAILS, p=_DETAIL_ODDS))
    while True:
        text = _Writer(scene, rng, detail).write()
        if len(text) > MAX_BYTES:
            detail = DETAILS[max(DETAILS.index(detail) - 1, 0)]
        elif not _MISLEADING.search(text.lower()):
            return text


class _Writer:
    """One attempt at a caption."""

    def __init__(self, scene, rng, detail):
        self.scene, self.rng, self.detail = scene, rng, detail
        self.kind = vocabulary.KINDS[int(scene.kind)]
        self.filled = {}  # symbols with a meaning in this caption only

    def write(self):
        form = str(self.rng.choice(("sentence", "title", "watched"), p=_FORM_ODDS))
        start = self._sentence()
        if not re.match(r"(a|an|one|two) ", start):
            form = "sentence" if form == "watched" else form
        elif form == "watched":
            start = f"{self._say('watched')} {start}"
        elif form == "title" and self._chance(0.1):
            start = f"{self._say('shown')} {start}"
        elif self.detail == "terse" and self._chance(0.35):
            start = re.sub(r"^(a|one) ", "", start)
        text = self._background(start)
        if self.detail == "full" and int(self.scene.camera) == 0 and self._chance(0.05):
            text += ", " + self._say("fixed camera")
        return self._polish(text, form)

    def _sentence(self):
        scene = self.scene
        camera = vocabulary.CAMERAS[int(scene.camera)]
        if self.kind == "pair":
            return self._pair()
        self.filled = {"a": self._object(0), "rests": self._rests(0), "go": self._go(0)}
        if self.kind in ("wall", "pillar"):
            side = vocabulary.MOTIONS[int(scene.motion[0])]
            self._fill_direction(side)
            self.filled["screen"] = "a " + self._say(f"screen {self.kind}")
            return self._say("behind")
        if self.kind == "truck":
            self._fill_direction("right" if scene.screen[1] > scene.screen[0] else "left")
            self.filled["truck"] = "a " + self._say("screen truck")
            return self._say("in front")
        if camera.startswith("pan"):
            self._fill_direction(camera.split()[1])
            return self._say("pan")
        if camera.startswith("zoom"):
            return self._say(camera)
        if int(scene.motion[0]) == 0:
            x = float(scene.path[0, 0, 0])
            place = "left" if x < 0.36 else "right" if x > 0.64 else "middle"
            self.filled["place"] = self._say(f"place {place}") if self.detail == "full" else ""
            return self._say("single still")
        self.filled["does"] = self._does(0)
        return self._say("single")

    def _pair(self):
        moves = [int(motion) != 0 for motion in self.scene.motion]
        swap = moves == [False, True] or (moves[0] == moves[1] and self._chance(0.3))
        first, second = (1, 0) if swap else (0, 1)
        relation = vocabulary.RELATIONS[int(self.scene.relation) ^ swap]  # opposites are neighbours in the tuple
        self.filled = {
            "a": self._object(first),
            "b": self._object(second),
            "relation": self._say(f"relation {relation}"),
            "does": self._does(first),
            "does b": self._does(second),
            "rests": self._rests(first if not any(moves) else second),
        }
        if not any(moves):
            if self._chance(0.4) and (alike := self._alike(first, second)):
                return alike
            in_row = relation in ("left of", "right of")
            return self._say("pair still", lambda text: in_row or not re.search("side by side|beside|near", text))
        if all(moves):
            return self._say("pair both move")
        in_row = relation in ("left of", "right of")
        return self._say("pair one moves", lambda text: in_row or "next to" not in text)

    def _alike(self, first, second):
        """Says of two objects of one shape or of one colour what they share; None of others."""
        shape, shape_b = (vocabulary.SHAPES[int(self.scene.shape[i])] for i in (first, second))
        color, color_b = (vocabulary.COLORS[int(self.scene.color[i])] for i in (first, second))
        size, size_b = (vocabulary.SIZES[int(self.scene.size[i])] for i in (first, second))
        says_size = size == size_b and self._chance(_SIZE_ODDS[self.detail])
        self.filled |= {
            "size": self._say(f"size {size}") if says_size else "",
            "color": self._say(f"color {color}"),
            "color b": self._say(f"color {color_b}"),
            "shape": self._say(f"shape {shape}"),
            "shape b": self._say(f"shape {shape_b}"),
            "shapes": self._say(f"shapes {shape}"),
        }
        if shape == shape_b:
            return self._say("pair of one shape")
        return self._say("pair of one color") if color == color_b else None

    def _object(self, i):
        scene = self.scene
        words = [str(self.rng.choice(("a", "the", "one"), p=(0.92, 0.05, 0.03)))]
        if self._chance(_SIZE_ODDS[self.detail]):
            words.append(self._say(f"size {vocabulary.SIZES[int(scene.size[i])]}"))
        words.append(self._say(f"color {vocabulary.COLORS[int(scene.color[i])]}"))
        words.append(self._say(f"shape {vocabulary.SHAPES[int(scene.shape[i])]}"))
        return " ".join(words)

    def _does(self, i):
        motion = vocabulary.MOTIONS[int(self.scene.motion[i])]
        if motion == "still":
            return self._rests(i)
        if motion in ("left", "right"):
            self._fill_direction(motion)
            self.filled["go"] = self._go(i)
            if self._chance(_NO_DIRECTION_ODDS):
                return self._say("does somehow")
            return self._say("does sideways", lambda text: not (self._floats(i) and _GROUND.match(text)))
        drift = float(self.scene.path[i, 1, 0] - self.scene.path[i, 0, 0])
        if motion == "bouncing" and abs(drift) > 0.1:
            return self._say(f"does bouncing {'right' if drift > 0 else 'left'}")
        return self._say(f"does {motion}")

    def _rests(self, i):
        if self._floats(i):
            return self._say("rests air")
        return self._say("rests ball" if vocabulary.SHAPES[int(self.scene.shape[i])] == "ball" else "rests ground")

    def _go(self, i):
        return self._say("fly" if self._floats(i) else f"go {vocabulary.SHAPES[int(self.scene.shape[i])]}")

    def _floats(self, i):
        bottom = float(self.scene.path[i, 0, 1]) + BELOW[int(self.scene.shape[i])] * RADII[int(self.scene.size[i])]
        return float(self.scene.floor[i]) - bottom > 0.03

    def _fill_direction(self, side):
        self.filled |= {"to": self._say(f"to {side}"), "from": self._say(f"from {side}"), "side": side}

    def _background(self, text):
        if not self._chance(_BACKGROUND_ODDS[self.detail]):
            return text
        floats = any(self._floats(i) for i in range(1 + int(self.scene.present[1])))
        where = self._say(
            f"background {vocabulary.BACKGROUNDS[int(self.scene.background)]}",
            lambda text: not (floats and _GROUND.match(text)),
        )
        if self._chance(0.12):
            return f"{where}, {text}"
        # It is not the camera that is somewhere.
        thing, *camera = re.split(r"(?=,? (?:while|as|and) the camera)", text, maxsplit=1)
        return " ".join([thing, where, *camera]).replace(" ,", ",")

    def _polish(self, text, form):
        def conjugate(match):
            verb, participle = match.groups()
            if form == "sentence":
                return verb
            return participle if form == "title" or verb == "is" else vocabulary.infinitive(verb)

        # After these words only a sentence can follow.
        head, *tail = re.split(r"(?= (?:while|as|that) )", text, maxsplit=1)
        head = re.sub(r"([a-z]+)/([a-z]*)", conjugate, head)
        tail = re.sub(r"([a-z]+)/([a-z]*)", r"\1", "".join(tail))
        text = re.sub(r"\s+", " ", head + tail).replace(" ,", ",").strip()
        text = re.sub(r"\ba(?= [aeiou])", "an", text)
        if self._chance(0.5):
            text = text[0].upper() + text[1:]
            return text + "." if self._chance(0.6) else text
        return text + "." if self._chance(0.1) else text

    def _say(self, symbol, fits=lambda text: True):
        if symbol in self.filled:
            return self.filled[symbol]
        alternatives = [text for text in vocabulary.GRAMMAR[symbol] if fits(text)]
        text = alternatives[self.rng.integers(len(alternatives))]
        return re.sub(r"\{([^}]*)\}", lambda match: self._say(match[1]), text)

    def _chance(self, odds):
        return self.rng.random() < odds
