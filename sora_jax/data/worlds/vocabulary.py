"""The names of everything a world can contain, and the grammar of the captions.

An id anywhere else in the package is an index into one of the tuples of names.
"""

import functools
import re

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SHAPES = ("ball", "cube", "pyramid", "star")
SIZES = ("small", "large")
MOTIONS = (
    "still",
    "left",
    "right",
    "up",
    "down",
    "up-left",
    "up-right",
    "down-left",
    "down-right",
    "bouncing",
)
CAMERAS = ("fixed", "pan left", "pan right", "zoom in", "zoom out")
OCCLUDERS = ("none", "wall", "pillar", "truck")
BACKGROUNDS = ("plain", "gradient", "ground and sky", "snow", "night")
KINDS = ("single", "pair", "wall", "pillar", "truck", "camera")
# Where the first object of a pair is, seen from the second.
RELATIONS = ("left of", "right of", "above", "below")

# One line for someone whose prompt has words outside of all this.
DESCRIPTION = (
    "a red, orange, yellow, green, blue, purple, pink or white ball, cube, pyramid or star, small or large, alone or "
    "next to another; it rests, moves, rolls, flies, falls, rises or bounces, or passes behind a gray wall or pillar; "
    "a gray truck drives past; the camera pans or zooms; a plain or gradient background, a grassy field, snow, night"
)

# Combinations kept out of training, so that drawing them shows that colour and shape were learned apart.
UNSEEN = (
    ("red", "star"),
    ("orange", "pyramid"),
    ("yellow", "cube"),
    ("green", "ball"),
    ("blue", "pyramid"),
    ("purple", "star"),
)


def _mostly(usual: str, *others: str) -> tuple[str, ...]:
    """The usual word half of the time."""
    return (usual,) * max(len(others), 1) + others


def _diagonal(side: str) -> dict[str, tuple[str, ...]]:
    return {
        f"does up-{side}": (
            f"moves/moving up and to the {side}",
            f"moves/moving diagonally up and to the {side}",
            f"moves/moving up and {side}",
            f"flies/flying up to the {side}",
            f"floats/floating up and {side}",
            f"rises/rising to the {side}",
            f"soars/soaring up to the {side}",
            f"climbs/climbing to the {side}",
            f"climbs/climbing diagonally up {side}",
            f"drifts/drifting toward the upper {side} corner",
            f"moves/moving to the top {side}",
        ),
        f"does down-{side}": (
            f"moves/moving down and to the {side}",
            f"moves/moving diagonally down and to the {side}",
            f"moves/moving down and {side}",
            f"falls/falling to the {side}",
            f"falls/falling down to the {side}",
            f"drops/dropping down and {side}",
            f"sinks/sinking to the {side}",
            f"floats/floating diagonally down {side}",
            f"drifts/drifting toward the lower {side} corner",
            f"moves/moving to the bottom {side}",
        ),
        f"does bouncing {side}": (
            f"bounces/bouncing to the {side}",
            f"bounces/bouncing {side}",
            f"bounces/bouncing along to the {side}",
            f"hops/hopping to the {side}",
            f"hops/hopping {side}",
            f"jumps/jumping to the {side}",
        ),
        f"place {side}": (f"on the {side}", f"on the {side} side"),
    }


# Symbol -> alternatives with equal odds. {symbol} is drawn in turn, or filled in by the caption at hand:
# a, b objects; go, to, from, side, does, rests what they do and where; screen and truck what hides them.
# "rolls/rolling": which of the two depends on whether the caption is a sentence or a title.
GRAMMAR: dict[str, tuple[str, ...]] = {
    "article": ("a", "an", "the"),
    "color red": _mostly("red", "crimson", "scarlet"),
    "color orange": ("orange",),
    "color yellow": _mostly("yellow", "golden", "gold"),
    "color green": _mostly("green", "emerald"),
    "color blue": ("blue", "blue", "blue", "bright blue"),
    "color purple": _mostly("purple", "violet"),
    "color pink": ("pink", "pink", "pink", "bright pink"),
    "color white": ("white",),
    "shape ball": ("ball", "ball", "ball", "sphere", "sphere", "circle", "orb"),
    "shape cube": _mostly("cube", "box", "block", "square"),
    "shape pyramid": _mostly("pyramid", "triangle"),
    "shape star": ("star",),
    "shapes ball": ("balls", "balls", "spheres"),
    "shapes cube": ("cubes", "cubes", "boxes", "blocks"),
    "shapes pyramid": ("pyramids", "pyramids", "triangles"),
    "shapes star": ("stars",),
    "size small": _mostly("small", "little", "tiny"),
    "size large": _mostly("large", "big", "huge", "giant"),
    "gray": ("gray", "gray", "grey"),
    "screen wall": _mostly("{gray} wall", "wide {gray} wall", "wall"),
    "screen pillar": _mostly("{gray} pillar", "{gray} column", "tall {gray} pillar", "pillar"),
    "screen truck": _mostly("{gray} truck", "{gray} lorry", "big {gray} truck", "truck"),
    # Moving to a side, on the ground and through the air.
    "go ball": ("rolls/rolling", "rolls/rolling", "moves/moving", "goes/going", "travels/traveling"),
    "go cube": ("slides/sliding", "slides/sliding", "moves/moving", "glides/gliding", "goes/going"),
    "go pyramid": ("slides/sliding", "moves/moving", "moves/moving", "glides/gliding", "travels/traveling"),
    "go star": ("slides/sliding", "moves/moving", "moves/moving", "glides/gliding", "drifts/drifting"),
    "fly": ("flies/flying", "floats/floating", "drifts/drifting", "moves/moving", "glides/gliding"),
    "to left": (
        "left",
        "left",
        "to the left",
        "to the left",
        "towards the left",
        "toward the left",
        "leftward",
        "leftwards",
    ),
    "to right": (
        "right",
        "right",
        "to the right",
        "to the right",
        "towards the right",
        "toward the right",
        "rightward",
        "rightwards",
    ),
    "from left": ("from right to left",),
    "from right": ("from left to right",),
    "does sideways": (
        "{go} {to}",
        "{go} {to}",
        "{go} {to}",
        "{go} {from}",
        "{go} across the frame {to}",
        "{go} across the screen {from}",
        "{go} along the ground {to}",
        "{go} across the floor {to}",
        "is/ moving {to}",
    ),
    "does somehow": ("{go}", "{go} along", "{go} by", "is/ moving"),
    "does up": (
        "rises/rising",
        "rises/rising up",
        "rises/rising to the top",
        "climbs/climbing",
        "climbs/climbing up",
        "moves/moving up",
        "moves/moving upward",
        "goes/going up",
        "flies/flying up",
        "floats/floating up",
        "floats/floating upwards",
        "ascends/ascending",
        "soars/soaring",
        "soars/soaring up",
        "is/ moving up",
    ),
    "does down": (
        "falls/falling",
        "falls/falling",
        "falls/falling down",
        "drops/dropping",
        "drops/dropping down",
        "moves/moving down",
        "moves/moving downward",
        "moves/moving downwards",
        "goes/going down",
        "sinks/sinking",
        "floats/floating downwards",
        "descends/descending",
        "is/ falling",
    ),
    **_diagonal("left"),
    **_diagonal("right"),
    "does bouncing": (
        "bounces/bouncing",
        "bounces/bouncing",
        "bounces/bouncing up and down",
        "bounces/bouncing up and down in place",
        "bounces/bouncing in place",
        "hops/hopping",
        "hops/hopping up and down",
        "jumps/jumping up and down",
        "leaps/leaping up and down",
        "is/ bouncing",
    ),
    "rests ground": (
        "rests/resting",
        "rests/resting on the ground",
        "rests/resting on the floor",
        "stands/standing",
        "stands/standing still",
        "sits/sitting",
        "sits/sitting still",
        "stays/staying still",
        "stays/staying in place",
        "is/ standing still",
        "is/ motionless",
        "is/ not moving",
    ),
    "rests ball": (  # what is round neither stands nor sits
        "rests/resting",
        "rests/resting on the ground",
        "rests/resting on the floor",
        "lies/lying on the ground",
        "lies/lying still",
        "stays/staying still",
        "stays/staying in place",
        "is/ motionless",
        "is/ not moving",
    ),
    "rests air": (
        "floats/floating in place",
        "hovers/hovering",
        "hangs/hanging in the air",
        "hovers/hovering in the air",
        "stays/staying still",
        "stays/staying in place",
        "is/ not moving",
    ),
    "place middle": ("in the middle", "in the center"),
    # Whole captions.
    "single": ("{a} {does}",),
    "single still": ("{a} {rests} {place}", "{a} {rests}", "{a} {place}", "{a}"),
    "behind": (
        "{a} {go} {to} behind {screen}",
        "{a} {go} {to} behind {screen}",
        "{a} {go} behind {screen} {from}",
        "{a} {go} behind {screen}",
        "{a} {go} behind {screen}",
        "{a} {go} behind {screen}",
        "{a} {go} {to} and passes/passing behind {screen}",
        "{a} passes/passing behind {screen} {from}",
        "{a} {go} {to}, disappears/disappearing behind {screen} and reappears/reappearing",
        "{a} {go} behind {screen} and comes/coming out on the {side}",
        "{a} {go} behind {screen} and comes/coming out again",
        "{a} {go} behind {screen}, then comes/coming out on the other side",
        "{a} {go} behind {screen} and reappears/reappearing on the {side} side",
        "{a} {go} {to} behind {screen}, then reappears/reappearing",
        "{a} {go} {to} behind {screen} and emerges/emerging on the other side",
        "{a} vanishes/vanishing behind {screen} and appears/appearing again",
        "{a} {go} {to} and {screen} hides/hiding it for a moment",
        "{a} {go} {to}, hidden for a moment by {screen}",
        "{screen} hides/hiding {a} that {go} {to}",
    ),
    "in front": (
        "{truck} drives/driving past {a}",
        "{truck} drives/driving past {a}",
        "{truck} drives/driving {to} past {a}",
        "{truck} drives/driving {to} past {a}",
        "{truck} drives/driving {to} in front of {a}",
        "{truck} drives/driving in front of {a} {from}",
        "{truck} passes/passing in front of {a}, driving {to}",
        "{a} {rests} while {truck} drives past {to}",
        "{a} {rests} as {truck} drives by {from}",
        "{a} {rests}, then {truck} drives/driving past it",
        "{truck} drives/driving {to} past {a} and hides/hiding it for a moment",
        "{truck} moving {to} hides/hiding {a} for a moment",
        "{a} is/ hidden for a moment by {truck} driving {to}",
    ),
    "pan": (
        "the camera pans/panning {to} past {a}",
        "the camera pans/panning {to} past {a}",
        "the camera slowly pans/panning {to} past {a}",
        "the camera moves/moving {to} past {a}",
        "camera panning {to} past {a}",
        "pan {to} past {a}",
        "panning {to} past {a}",
        "{a} as the camera pans {to}",
        "{a} {rests} while the camera pans {to}",
        "the camera pans/panning {from} past {a}",
    ),
    "zoom in": (
        "the camera zooms/zooming in on {a}",
        "the camera zooms/zooming in on {a}",
        "the camera slowly zooms/zooming in on {a}",
        "the camera moves/moving closer to {a}",
        "zoom in on {a}",
        "zooming in on {a}",
        "{a} as the camera zooms in",
        "{a} {rests} while the camera zooms in",
        "{a}, and the camera zooms/zooming in on it",
    ),
    "zoom out": (
        "the camera zooms/zooming out from {a}",
        "the camera zooms/zooming out from {a}",
        "the camera slowly zooms/zooming out from {a}",
        "the camera moves/moving away from {a}",
        "the camera pulls/pulling back from {a}",
        "zoom out from {a}",
        "zooming out from {a}",
        "{a} as the camera zooms out",
        "{a} {rests} while the camera zooms out",
    ),
    # In a pair, a is the one that moves where only one does.
    "pair still": (
        "{a} and {b}",
        "{a} {relation} {b}",
        "{a} {relation} {b}",
        "{a} {rests} {relation} {b}",
        "{a} is/ {relation} {b}",
        "{a} and {b} side by side",
        "{a} with {b}",
        "{a} beside {b}",
        "{a} near {b}",
        "there is {a} and {b}",
        "two objects, {a} and {b}",
    ),
    "pair of one shape": (
        "two {size} {shapes}, one {color} and one {color b}",
        "two {size} {shapes}, {color} and {color b}",
        "a {color} {shape} and a {color b} one",
        "a {color} and a {color b} {shape}",
    ),
    "pair of one color": (
        "two {size} {color} objects, a {shape} and a {shape b}",
        "a {color} {shape} and a {color} {shape b}",
        "a {color} {shape} and {shape b}",
    ),
    "pair one moves": (
        "{a} {does} and {b} {rests}",
        "{a} {does} while {b} {rests}",
        "{b} {rests} while {a} {does}",
        "{a} {does} {relation} {b}",
        "{a} {does} next to {b}",
    ),
    "pair both move": ("{a} {does} and {b} {does b}", "{a} {does} while {b} {does b}"),
    "relation left of": ("to the left of", "to the left of", "left of", "on the left of"),
    "relation right of": ("to the right of", "to the right of", "right of", "on the right of"),
    "relation above": ("above",),
    "relation below": _mostly("below", "under"),
    "background plain": (
        "on a plain background",
        "on a plain {gray} background",
        "against a plain background",
        "in front of a plain backdrop",
    ),
    "background gradient": (
        "on a gradient background",
        "on a soft gradient",
        "against a soft gradient background",
        "in front of a gradient backdrop",
    ),
    "background ground and sky": (
        "on a field",
        "on a grassy field",
        "in a meadow",
        "on the grass under a pale sky",
        "in front of low hills",
        "outdoors under the sky",
        "in a field under a blue sky",
    ),
    "background snow": (
        "over snow",
        "in the snow",
        "on a snowy field",
        "in a snowy landscape",
        "over a snowy field",
    ),
    "background night": (
        "at night",
        "at night",
        "under a night sky",
        "in the dark",
        "under a starry night sky",
    ),
    # Before a title, and before a sentence, whose verbs then lose their ending.
    "shown": ("a video of", "video of", "a clip of"),
    "watched": ("watch", "see"),
    "fixed camera": ("fixed camera", "the camera does not move", "static shot"),
}


_INFINITIVES = {"flies": "fly", "goes": "go", "lies": "lie", "passes": "pass", "vanishes": "vanish"}


def infinitive(verb: str) -> str:
    """What a verb of the grammar is after "watch": "rolls" -> "roll"."""
    return _INFINITIVES.get(verb, verb.removesuffix("s"))


@functools.cache
def known_words() -> frozenset[str]:
    """Every word that a caption can contain, in lower case."""
    texts = [text for alternatives in GRAMMAR.values() for text in alternatives]
    literal = [re.sub(r"\{[^}]*\}", " ", text) for text in texts]
    infinitives = [infinitive(verb) for text in texts for verb in re.findall(r"(\w+)/", text) if verb != "is"]
    return frozenset(word for text in literal + infinitives for word in words_of(text))


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())
