"""Phrases over normalised words, a small language that does not run away as regular expressions can: gaps and optional
parts are few.

knife               the word
stab*               words that begin so
(gun|big rifle*)    one of several; groups may hold groups
(the)? king         perhaps with "the"
[weapon]            one of a named list
shoot ... him       at most four words between
knife & crowd       both, anywhere in the prompt
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sora_jax.errors import InputError
from sora_jax.safety.normalize import to_ascii, to_words

_TOKEN = re.compile(r"\.\.\.|[()|?]|\[[^\[\]]*\]|[^\s()\[\]|?]+")
_GAP = r"(?:\w+ ){0,4}"
_LONGEST = 100_000  # characters that a phrase may come to with its lists
_MOST_WAYS = 10_000  # to read one phrase from a place on: five for each gap, two for each optional part
_MARK = "."  # no word, so that nothing is found across it


@dataclass(frozen=True)
class Phrases:
    """Compiled phrases. `alone` finds any phrase without "&"; of a row of `together` every pattern must be found."""

    alone: re.Pattern | None
    together: tuple[tuple[re.Pattern, ...], ...]

    def found_in(self, words: str) -> bool:
        """Whether any phrase is in `words`, lower-case words with single spaces."""
        return bool(self.alone and self.alone.search(words)) or any(
            all(pattern.search(words) for pattern in row) for row in self.together
        )

    def removed_from(self, words: str) -> str:
        """`words` with a mark in place of every phrase without "&"."""
        return self.alone.sub(_MARK, words) if self.alone else words


def compile_phrases(phrases: Iterable[str], lists: Mapping[str, Iterable[str]], where: str) -> Phrases:
    """Phrases ready to be found.

    Args:
        phrases: in the language above.
        lists: phrases for [name].
        where: named in errors.

    Raises:
        InputError: a phrase that is empty, unbalanced, or too long with its lists, has too many gaps and optional
            parts, or names an unknown list.
    """
    alone, together = [], []
    for phrase in phrases:
        here = f"{where}: phrase {phrase!r}"[:200]
        try:
            parts = [_Parser(part, lists, here).pattern() for part in phrase.split("&")]
        except RecursionError:
            raise InputError(f"{here} has brackets in brackets too often") from None
        if len(parts) == 1:
            alone.append(parts[0])
        else:
            together.append(tuple(re.compile(part) for part in parts))
    return Phrases(re.compile("|".join(alone)) if alone else None, tuple(together))


class _Parser:
    """One phrase without "&" to a regular expression, by recursive descent."""

    def __init__(self, phrase: str, lists: Mapping[str, Iterable[str]], where: str):
        self.lists, self.where = lists, where
        self.tokens = _TOKEN.findall(phrase)[::-1]
        self.ways = 1
        if _TOKEN.sub("", phrase).strip():
            raise InputError(f"{where} has a square bracket without its other half")

    def pattern(self) -> str:
        found = self._alternatives()
        if self.tokens:
            raise InputError(f"{self.where} has a closing bracket too many")
        return rf"\b{found}\b"

    def _alternatives(self) -> str:
        sequences = [self._sequence()]
        while self.tokens and self.tokens[-1] == "|":
            self.tokens.pop()
            sequences.append(self._sequence())
        return f"(?:{'|'.join(sequences)})"

    def _sequence(self) -> str:
        items = []
        while self.tokens and self.tokens[-1] not in "|)":
            items.append(self._item())
            self._short("".join(items))
        if not items or items[0] == _GAP or items[-1][-1] in "}?":
            raise InputError(f"{self.where} has an empty part, or one that begins or ends with a gap, or ends with ?")
        return "".join(item if item[-1] in "}?" else item + " " for item in items[:-1]) + items[-1]

    def _item(self) -> str:
        """A word or a group without the space after it; a gap or an optional item with it."""
        token = self.tokens.pop()
        if token == "...":
            self._grow(5)
            return _GAP
        if token == "(":
            found = self._alternatives()
            if not self.tokens or self.tokens.pop() != ")":
                raise InputError(f"{self.where} has an opening bracket too many")
        elif token[0] == "[":
            found = self._list(token[1:-1])
        else:
            found = self._word(token)
        if self.tokens and self.tokens[-1] == "?":
            self.tokens.pop()
            self._grow(2)
            return f"(?:{found} )?"
        return found

    def _list(self, name: str) -> str:
        if name not in self.lists:
            known = ", ".join(sorted(self.lists)) or "none"
            raise InputError(f"{self.where} names the list {name!r}; there are: {known}")
        others = {other: phrases for other, phrases in self.lists.items() if other != name}
        parsers = [_Parser(phrase, others, self.where) for phrase in self.lists[name]]
        found = "|".join(parser._alternatives() for parser in parsers)
        self._grow(max((parser.ways for parser in parsers), default=1))
        return f"(?:{self._short(found)})"

    def _grow(self, ways: int) -> None:
        self.ways *= ways
        if self.ways > _MOST_WAYS:
            raise InputError(f"{self.where} has too many gaps and optional parts: five gaps are the most")

    def _short(self, found: str) -> str:
        if len(found) > _LONGEST:  # lists of lists can double with each
            raise InputError(f"{self.where} is too long with the lists it names and those that they name")
        return found

    def _word(self, token: str) -> str:
        if "*" in token[:-1]:
            raise InputError(f"{self.where} has a * that is not the end of a word: {token!r}")
        words = to_words(to_ascii(token.removesuffix("*")))
        if not words:
            raise InputError(f"{self.where} has a word without letters: {token!r}")
        return words + (r"\w*" if token.endswith("*") else "")
