"""The prompt gate: a prompt is normalised, and each layer in turn may refuse it.

    prompt -> forms -> length -> rules -> names of real people -> meaning -> verdict

A part that is missing or damaged is an error, never a pass. The gate errs, in both directions: `sora-jax safety-eval`
says how often.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sora_jax.errors import InputError
from sora_jax.safety.names import NameFinder
from sora_jax.safety.normalize import (
    MAX_LENGTH,
    Forms,
    alphabetic,
    forms,
    is_english,
    is_latin,
    pieces,
    repaired,
    visible,
)
from sora_jax.safety.phrases import compile_phrases
from sora_jax.safety.policy import PROTECTED, Policy, load_policy
from sora_jax.safety.semantic import classifier, encoder, windows

_PEOPLE = "real_people"
# A part of a prompt is one of many, and says less than a whole one: it must be worth so many times the odds.
_DOUBT = 8.0
_FULL_NAME = re.compile(r"[A-Z]\w+(?: [A-Z]\w+)+")
_HINT = 8.0  # how many times a hint makes the odds


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a prompt; nothing in it repeats the prompt.

    Attributes:
        allowed: whether it may be generated.
        categories: codes of what it asks for, where it is refused; "length" if it is too long to be read.
        reason: one line for people.
        layer: which one decided: "length", "rules", "names" or "meaning"; "" if none refused.
    """

    allowed: bool
    categories: tuple[str, ...] = ()
    reason: str = ""
    layer: str = ""


class Gate:
    """The layers of a policy, ready to be asked.

    Raises:
        InputError: a part of the gate is missing or damaged, or the policy does not protect minors as the package's.
    """

    def __init__(self, policy: Policy):
        policy.check_protection()
        lists = dict(policy.lists)
        self._categories = [category for category in policy.categories if category.enabled]
        self._descriptions = {category.name: category.description or category.name for category in self._categories}
        self._rules = {
            one.name: {
                part: compile_phrases(getattr(one, part), lists, one.name) for part in ("phrases", "hints", "allow")
            }
            for one in self._categories
        }
        self._names = NameFinder(policy.names) if _PEOPLE in self._rules else None
        # Where children are named, what the package's policy refuses is harm to them, whatever else is relaxed.
        self._strict = None if policy == load_policy() else load_gate(load_policy())
        self._children = compile_phrases(("[child]",), lists, PROTECTED)
        self._encode, self._classify = encoder(), classifier()
        # A category of the user's own is known by its examples.
        self._examples = {
            category.name: self._encode(_windows([_readable(example) for example in category.examples]))
            for category in self._categories
            if category.examples
        }

    def check(self, prompt: str) -> Verdict:
        """Reads one prompt, as it stands and as models read it."""
        too_long = Verdict(
            False, ("length",), f"it is longer than {MAX_LENGTH} characters, too long to be read", "length"
        )
        if len(prompt) > MAX_LENGTH:
            return too_long
        for text in dict.fromkeys((prompt, repaired(prompt))):
            read = forms(text)
            verdict = self._check(text, read) if read else too_long
            if verdict.allowed and self._strict and any(map(self._children.found_in, (read.words, *read.decoded))):
                # Whoever may be named now draws the encoder's attention away from what is done.
                for said in dict.fromkeys((text, _FULL_NAME.sub("somebody", text))):
                    strict = self._strict._check(said, forms(said) or read, but=_PEOPLE)
                    if not strict.allowed:
                        verdict = Verdict(False, (PROTECTED,), self._descriptions[PROTECTED], strict.layer)
                        break
            if not verdict.allowed:
                break
        return verdict

    def _check(self, text: str, read: Forms, but: str = "") -> Verdict:
        """What the first layer finds that finds anything, without the category `but`."""
        readings = (read.words, *read.decoded)
        for layer, found in (
            ("rules", lambda: self._by_rules(readings, "phrases")),
            ("names", lambda: [_PEOPLE] if self._names and self._names.found_in(read) else []),
            ("meaning", lambda: self._by_meaning(read, pieces(text), self._by_rules(readings, "hints"))),
        ):
            if hits := [name for name in found() if name != but]:
                return Verdict(False, tuple(hits), "; ".join(self._descriptions[name] for name in hits), layer)
        return Verdict(True)

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        """Reads prompts, one verdict each."""
        return [self.check(prompt) for prompt in prompts]

    def _by_rules(self, readings: Sequence[str], which: str) -> list[str]:
        """Categories of which "phrases" or "hints" are found."""
        return [
            name
            for name, rules in self._rules.items()
            if any(rules[which].found_in(rules["allow"].removed_from(words)) for words in readings)
        ]

    def _by_meaning(self, read: Forms, parts: Sequence[Forms], hinted: Sequence[str]) -> list[str]:
        whole, rest = (_windows(text for read in some for text in _said(read)) for some in ([read], parts))
        doubts = dict.fromkeys(rest, _DOUBT) | dict.fromkeys(whole, 1.0)  # forms and pieces are often the same text
        texts, doubt_N = list(doubts), np.array([*doubts.values()])
        vectors_ND = self._encode(texts)
        found = self._classify(vectors_ND, [self._encode.tokens(text) for text in texts])
        scores = {}
        for name, p_N in found.items():
            against_N = (1 - p_N) * doubt_N / (_HINT if name in hinted else 1.0)
            scores[name] = (p_N / (p_N + against_N)).max()
        scores |= {name: (vectors_ND @ examples_MD.T).max() for name, examples_MD in self._examples.items()}
        return [one.name for one in self._categories if scores.get(one.name, -1.0) >= one.threshold]


def _said(read: Forms) -> Iterator[str]:
    """As it is written, in plain letters if that may be what was meant, and what is left when disguises are off."""
    yield read.original
    plain = alphabetic(read)
    # Of other alphabets they hold but the sound, which says nothing to the encoder.
    if is_latin(plain.original) or is_english(plain.words):
        yield plain.text
    yield from read.decoded[:1]


def _windows(texts: Iterable[str]) -> list[str]:
    return [window for text in texts for window in windows(text)]


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises InputError if one is empty, to the eye at least, or no text."""
    check_texts(prompts)
    for number, text in enumerate(prompts, 1):
        if not visible(text[:MAX_LENGTH]):
            which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            raise InputError(f"{which} is empty; describe what the video shows, e.g. 'a red ball rolls left'")


def check_texts(texts: Sequence[str], name: str = "prompt") -> None:
    """Raises InputError if one is no text, or holds half of a character, as words do that are not UTF-8."""
    for number, text in enumerate(texts, 1):
        which = f"{name} {number}" if len(texts) > 1 else f"the {name}"
        if not isinstance(text, str):
            raise InputError(f"{which} must be text, not {type(text).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{which} is not UTF-8 text")


def _readable(text: str) -> str:
    read = forms(text)
    return read.original if read else text[:MAX_LENGTH]


@functools.lru_cache(maxsize=4)
def load_gate(policy: Policy) -> Gate:
    """The gate of a policy; one that was made is kept."""
    return Gate(policy)
