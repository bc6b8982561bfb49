"""The prompt gate: a prompt is normalised, and each layer in turn may refuse it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from sora_jax.safety.names import NameFinder
from sora_jax.safety.normalize import MAX_LENGTH, forms
from sora_jax.safety.phrases import compile_phrases
from sora_jax.safety.policy import Policy

_PEOPLE = "real_people"


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a prompt; nothing in it repeats the prompt.

    Attributes:
        allowed: whether it may be generated.
        categories: codes of what it asks for, where it is refused.
        reason: one line for people.
        layer: which one decided: "length", "rules", "names" or "".
    """

    allowed: bool
    categories: tuple[str, ...] = ()
    reason: str = ""
    layer: str = ""


class Gate:
    """The layers of a policy, ready to be asked."""

    def __init__(self, policy: Policy):
        lists = dict(policy.lists)
        enabled = [category for category in policy.categories if category.enabled]
        self._descriptions = {category.name: category.description for category in enabled}
        self._rules = {
            category.name: (
                compile_phrases(category.phrases, lists, category.name),
                compile_phrases(category.allow, lists, category.name),
            )
            for category in enabled
        }
        self._names = NameFinder(policy.names) if _PEOPLE in self._rules else None

    def check(self, prompt: str) -> Verdict:
        """Reads one prompt."""
        read = forms(prompt)
        if read is None:
            return Verdict(False, ("unreadable",), f"longer than {MAX_LENGTH} characters, too long to check", "length")
        readings = (read.words, *read.decoded)
        hits = [
            name
            for name, (phrases, allow) in self._rules.items()
            if any(phrases.found_in(allow.removed_from(words)) for words in readings)
        ]
        if hits:
            return self._refused(hits, "rules")
        if self._names and self._names.found_in(read):
            return self._refused([_PEOPLE], "names")
        return Verdict(True)

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        """Reads prompts, one verdict each."""
        return [self.check(prompt) for prompt in prompts]

    def _refused(self, names: Sequence[str], layer: str) -> Verdict:
        return Verdict(False, tuple(names), "; ".join(self._descriptions[name] or name for name in names), layer)


@functools.lru_cache(maxsize=4)
def load_gate(policy: Policy) -> Gate:
    """The gate of a policy; one that was made is kept."""
    return Gate(policy)
