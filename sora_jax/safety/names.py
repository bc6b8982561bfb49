"""Real people by name: the format of name lists, and finding names in prompts.

A list knows only the people on it, also where one letter of a name is wrong, which makes no English word. A given name
with a capitalised word after it is taken for a person too, unless the prompt introduces a made-up one ("a detective
named Jack Marlow") or capitalises everything. A work in somebody's style shows nobody, so names after "in the style of"
and the like pass. A name on the list in another alphabet is looked for in that one, as Latin letters stand for too much
of it: Chinese "Yao Ming" and "terribly" are both "yao ming".
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from sora_jax.errors import InputError, one_line
from sora_jax.safety.normalize import Forms, alphabetic, lexicon, to_ascii, to_words, visible
from sora_jax.safety.phrases import compile_phrases

_SEPARATORS = r"\s·・‧.\-"  # between the words of a name in another alphabet
# Letters that a name must have before a slip in it is looked past: of several words, and of one, which is more often
# another word.
_LONG, _LONG_ALONE = 8, 9

# After a given name these make a place, a thing or an action, not a person.
_NO_SURNAME = frozenset(
    "Avenue Street Road Lane Square Park Bridge Falls Lake River Bay Beach Island Islands Mountain Mountains Mount "
    "Peak Valley Canyon Station Airport Museum Gallery Cathedral Church Abbey Castle Palace Tower Hall House Hotel "
    "University College School Hospital Theater Theatre Opera Stadium Market Building Memorial Monument Day Week "
    "Festival Style Era The And Or Of In On At Is As With From To A An I It He She They".split()
)
_NAME = re.compile(
    r"\b([A-Z][a-z]+(?:-[A-Za-z]+)?)(?: [A-Z]\.?)? ((?:van|von|de|da|del|der|bin|al|la|le|el|di)[ -])*"
    r"([A-Z][a-z]*'?[A-Z]?[a-z]+)"
)
# Right before a name: what only an invented person is, in prompts for videos, or what is no person.
_MADE_UP = re.compile(
    r"\b(named|called|nicknamed|character|heroine|hero|superhero|superheroine|villain|villainess|wizard|witch|sorcerer|"
    r"sorceress|mage|necromancer|elf|dwarf|hobbit|knight|paladin|bounty hunter|starship captain|vampire|werewolf|"
    r"android|robot|restaurant|ship|boat|hotel|brand|"
    r"(fictional|fictitious|imaginary|invented|made[ -]up)([ -]\w+){0,3})[^\w.!?;]+$",
    re.I,
)
_WORK = re.compile(
    r"\b(style of|styled like|inspired by|directed by|painted by|painting by|paintings by|filmed by|film by|movie by|"
    r"music by|song by|composed by|homage to|reminiscent of|novel by|book by|poem by|scored by|score by|"
    r"photographed by|designed by)"
    r"( \w+ and)?( a| an| the)? $"
)
_STYLE = re.compile(
    r"^s? ?(inspired|esque|like (palette|colors|framing)|style|styled|aesthetic|color palette|symmetry|film look|"
    r"vibes)\b"
)


@dataclass(frozen=True)
class Names:
    """The sections of one or more name lists; what they mean is written at the head of data/names.txt."""

    people: tuple[str, ...] = ()
    capitalised: tuple[str, ...] = ()
    false_friends: tuple[str, ...] = ()
    given_names: tuple[str, ...] = ()

    def __or__(self, other: Names) -> Names:
        return Names(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def read_names(path: str | os.PathLike) -> Names:
    """Reads a name list.

    Raises:
        InputError: the file cannot be read, or a line stands outside the four sections or holds no name.
    """
    sections: dict[str, list[str]] = {field.name: [] for field in fields(Names)}
    section = None
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the names {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"the names {path} are not UTF-8: {one_line(error)}") from error
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if line.startswith("["):
            section = line.strip("[]").replace(" ", "_")
        if line and section not in sections:
            known = ", ".join(f"[{name.replace('_', ' ')}]" for name in sections)
            raise InputError(f"{path}, line {number} is in no known section; there are {known}")
        if line and not line.startswith("["):
            entries = [entry.strip() for entry in line.split(",") if entry.strip()]
            if not all(to_words(to_ascii(entry)) for entry in entries):
                raise InputError(f"{path}, line {number} has a name without letters")
            sections[section] += entries
    return Names(**{name: tuple(entries) for name, entries in sections.items()})


class NameFinder:
    """Finds people in prompts. Compiled once for a policy."""

    def __init__(self, names: Names):
        people, self._elsewhere = _by_alphabet(names.people)
        false_friends, self._false_elsewhere = _by_alphabet(names.false_friends)
        self._people = frozenset(tuple(to_words(to_ascii(name)).split()) for name in people)
        self._longest = max(map(len, self._people), default=0)
        # Written as one word, as in "#taylorswift"; short ones are too often something else.
        glued = {"".join(name) for name in self._people if len(name) > 1}
        self._glued = frozenset(name for name in glued if len(name) >= 9 and name not in lexicon())
        self._words = {word for name in self._people for word in name}
        # By what is left when a letter is missing.
        self._shortened: dict[str, list[str]] = {}
        for name in map(" ".join, self._people):
            if len(name.replace(" ", "")) >= (_LONG if " " in name else _LONG_ALONE):
                for rest in _without_a_letter(name):
                    self._shortened.setdefault(rest, []).append(name)
        self._false_friends = compile_phrases(false_friends, {}, "names: false friends")
        self._capitalised = frozenset(names.capitalised)
        self._given = frozenset(names.given_names)

    def found_in(self, forms: Forms) -> bool:
        """Whether the prompt names a person."""
        if not forms.original.isascii():
            if self._elsewhere.search(self._false_elsewhere.sub(" ", forms.original.casefold())):
                return True
            forms = alphabetic(forms)
        return any(map(self._is_listed, (forms.words, *forms.decoded))) or self._is_written_as_a_name(forms.text)

    def _is_listed(self, words: str) -> bool:
        parts = self._false_friends.removed_from(words).split()
        start = 0
        while start < len(parts):
            for end in range(min(start + self._longest, len(parts)), start, -1):
                name = tuple(parts[start:end])
                genitive = (*name[:-1], name[-1].removesuffix("s"))
                listed = name in self._people or genitive in self._people or self._is_misspelt(name)
                glued = len(name) == 1 and (name[0] in self._glued or genitive[0] in self._glued)
                if listed or glued:
                    if not _is_about_work(" ".join(parts[:start]) + " ", " ".join(parts[end:])):
                        return True
                    start = end - 1  # a surname in it, which is listed too, is that of the same
                    break
            start += 1
        return False

    def _is_misspelt(self, words: tuple[str, ...]) -> bool:
        """Whether these are the words of a listed name but for a letter of one that is no English word."""
        wrong = [word for word in words if word not in lexicon()]
        if not wrong or sum(word in self._words for word in words) < len(words) - 1:
            return False  # all but one are right
        text = " ".join(words)
        for name in {name for rest in _without_a_letter(text) for name in self._shortened.get(rest, ())}:
            listed = name.split()
            if len(listed) == len(words):
                pairs = [(one, other) for one, other in zip(words, listed, strict=True) if one != other]
                if len(pairs) == 1 and pairs[0][0] in wrong and _is_one_slip(*pairs[0]):
                    return True
        return False

    def _is_written_as_a_name(self, text: str) -> bool:
        words = re.findall(r"[A-Za-z']{3,}", text)
        if sum(word[0].isupper() for word in words) > max(2, len(words) / 2):
            return False  # a title, where capitals say nothing
        return any(self._is_single_name(text, match) for match in re.finditer(r"(?<=[a-z,] )[A-Z][a-z]+", text)) or any(
            self._is_full_name(text, match) for match in _NAME.finditer(text)
        )

    def _is_single_name(self, text: str, match: re.Match) -> bool:
        return match[0] in self._capitalised and self._is_nothing_else(text, match)

    def _is_full_name(self, text: str, match: re.Match) -> bool:
        given, surname = match[1], match[3]
        return (
            given.partition("-")[0] in self._given
            and surname not in _NO_SURNAME
            and not _MADE_UP.search(text[: match.start()])
            and self._is_nothing_else(text, match)
        )

    def _is_nothing_else(self, text: str, match: re.Match) -> bool:
        """Whether no false friend, with up to three words around, takes the name away, and no work is meant."""
        before, after = to_words(text[: match.start()]), to_words(text[match.end() :])
        # Also before the given name of a surname, as in "the style of Pablo Picasso".
        before_all = re.sub(r"([A-Z][\w'.-]* )+$", "", text[: match.start()])
        if _is_about_work(to_words(before_all) + " ", after):
            return False
        around = " ".join([*before.split()[-3:], to_words(match[0]), *after.split()[:3]])
        first = to_words(match[0]).split()[0]
        return around.split().count(first) == self._false_friends.removed_from(around).split().count(first)


def _by_alphabet(names: Iterable[str]) -> tuple[list[str], re.Pattern]:
    """Names in Latin letters, and a pattern for the others: of visible text, case folded."""
    latin = [name for name in names if all(map(_is_latin, name))]
    others = sorted(set(names) - set(latin), key=len, reverse=True)
    return latin, re.compile("|".join(map(_pattern, others)) or r"(?!)")


def _is_latin(character: str) -> bool:
    return character.isascii() or not character.isalpha() or unicodedata.name(character, "").startswith("LATIN")


def _pattern(name: str) -> str:
    """A name in another alphabet, in any case, with the endings and the separators that writing in it has."""
    parts = re.split(rf"[{_SEPARATORS}]+", visible(name).casefold())
    pattern = rf"[{_SEPARATORS}]*".join(map(re.escape, parts))
    if re.search(r"[\u0370-\u052f]", name):  # Greek, Cyrillic: up to two letters are a case
        return rf"(?<!\w){pattern}\w{{,2}}(?!\w)"
    if re.search(r"[\u30a1-\u30ff]$", name):  # a word in katakana ends where they do
        return rf"(?<![\u30a1-\u30ff]){pattern}(?![\u30a1-\u30ff])"
    if re.search(r"[\u0e00-\u0e7f\u2e80-\u9fff]", name):  # Thai, Chinese, Japanese: no spaces between words
        return pattern
    if re.search(r"[\u1100-\u11ff\uac00-\ud7af]", name):  # Korean: what a name does in the sentence comes after it
        return rf"(?<!\w){pattern}"
    return rf"(?<![\w\u0900-\u0dff]){pattern}(?![\w\u0900-\u0dff])"


def _without_a_letter(text: str) -> set[str]:
    """A text, and what it is without one of its letters: texts that are one slip apart have some in common."""
    return {text} | {text[:i] + text[i + 1 :] for i in range(len(text))}


def _is_one_slip(one: str, other: str) -> bool:
    """Whether texts differ by a letter that is missing, too many or another, or by two that changed places."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    one, other = one[at:], other[at:]
    swapped = one[:2] == other[1::-1] and one[2:] == other[2:]
    return swapped or one[1:] == other[1:] or one[1:] == other or one == other[1:]


def _is_about_work(before: str, after: str) -> bool:
    return bool(_WORK.search(before) or _STYLE.search(after))
