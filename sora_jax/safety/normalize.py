"""Prompts to the forms that the gate's layers read: as written, plain ASCII, and what is left without disguises.

Compatibility forms, lookalike letters, invisible characters, accents and other alphabets become ASCII letters. Digits
and symbols that stand for letters, letters set apart, words run together and letters doubled or swapped are undone
beside the plain form, not in it, so that "10 balls" stays what it is.
"""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import html
import importlib.metadata
import importlib.util
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_jax.errors import InputError, one_line

DATA = Path(__file__).parent / "data"
SUMS = "SHA256SUMS"  # of the files that decide about prompts, as `sha256sum` writes them
MAX_LENGTH = 4000  # characters, as given and in ASCII; several times what text encoders read

# Fillers that are drawn as nothing but count as letters or symbols.
_BLANK = "\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # all but white space
_NOT_DRAWN = {"Cf", "Cn", "Co", "Cs"}
_INVISIBLE = {*_NOT_DRAWN, "Mn", "Me", "Mc"}
# Chinese, Japanese and Korean are written without spaces; each of their characters counts as a word.
_UNSPACED = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
# In words that mix alphabets these are meant by their shape, not by their upper case.
_BY_SHAPE = {ord("η"): "n", ord("μ"): "u", ord("ω"): "w", ord("и"): "u", ord("я"): "r", ord("з"): "3"}

_LEET = str.maketrans("01345789@$!|+", "oieastbgasiit")
_LEET_L = str.maketrans("1!|", "lll")
_MEASURE = re.compile(
    r"[\d.,/x:]+(k|d|p|i|mm|cm|m|km|fps|s|st|nd|rd|th|x|am|pm|h|min|sec|ms|hz|khz|bit|g|kg|lb|c|f|in|ft|px|mp)?|[a-z]{1,2}\d+",
    re.IGNORECASE,
)
_SINGLE = r"[A-Za-z0-9@$!|+]"
# Letters that are set apart, by any marks but those that stand for letters; two spaces are a gap between words.
_BETWEEN = r"(?: |[^\sA-Za-z0-9@$!]{1,3} ?)"
_SPACED = re.compile(rf"(?<![A-Za-z0-9]){_SINGLE}(?:{_BETWEEN}{_SINGLE}){{2,}}(?![A-Za-z0-9])")
_SET_APART = re.compile(rf"({_SINGLE})(?:{_BETWEEN}(?={_SINGLE})|$)")
_BRACKETED = re.compile(r"(?:\(\w\)|\[\w\]){3,}")
_LONGEST_WORD = 20
# Words run together: capitals inside, more than once, or no word is so long.
_RUN_TOGETHER = re.compile(rf"[A-Za-z]*[a-z][A-Z]+[a-z]+[A-Z][A-Za-z]*|[A-Za-z]{{{_LONGEST_WORD + 1},}}")
_CAPITALS = re.compile(r"[a-z][A-Z]|[A-Z]{2}[^a-z]+[A-Z]{2}")  # inside of words, or several words of them
# The same mark between three words (hyphens between four: a son-in-law), or before or behind each of two.
_MARKS = re.compile(
    r"[A-Za-z0-9]([^A-Za-z0-9\s-])[A-Za-z0-9]+\1[A-Za-z0-9]|[A-Za-z0-9]-[A-Za-z0-9]+-[A-Za-z0-9]+-[A-Za-z0-9]"
    r"|(?<!\S)([^A-Za-z0-9\s]+)[A-Za-z0-9]+[^A-Za-z0-9\s]* \2[A-Za-z0-9]"
    r"|[A-Za-z0-9]([^A-Za-z0-9\s,.;:!?]+) [A-Za-z0-9]+\3(?!\S)"
)
_ENGLISH = 0.6  # the share of known words from which a text is taken for English
_LATIN = 0.25  # the share of Latin letters from which lookalikes may stand for the others
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\s*\n\s*")
_CLAUSE_END = re.compile(r"(?<=[,:])\s+|(?<=[，：、])|\s*[—|…]\s*|\.{3}\s*|\s+[–/(]\s*")
_PHRASE = re.compile(r",? (?:in|at|near|by|outside|during|while|after|before) |, ?")  # where one begins
_MANY_WORDS = 20  # a sentence of more is read by clauses too


@dataclass(frozen=True)
class Forms:
    """What a prompt says.

    Attributes:
        original: in its own alphabet, without invisible characters; single spaces.
        text: ASCII with case and punctuation, single spaces.
        words: `text` as lower-case words of letters and digits with single spaces.
        decoded: other readings, like `words`, if the prompt holds anything that may be a disguise; else empty.
    """

    original: str
    text: str
    words: str
    decoded: tuple[str, ...]


def forms(prompt: str) -> Forms | None:
    """Every form of a prompt, or None if it is longer than `MAX_LENGTH`.

    `forms(forms(prompt).text).text` is the same text again.
    """
    if len(prompt) > MAX_LENGTH or len(ascii_text := to_ascii(prompt)) > MAX_LENGTH:
        return None
    text = " ".join(ascii_text.split())
    words = to_words(text)
    readings, is_plain = [], is_latin(prompt)  # other alphabets become words that are no English
    # What is drawn as nothing or as a small picture may stand for a gap.
    for written, split in itertools.product(dict.fromkeys((ascii_text, to_ascii(_with_gaps(prompt)))), (False, True)):
        joined = _join_spaced(written, split)
        if is_plain:
            joined = _RUN_TOGETHER.sub(_apart, joined)
        read = to_words(_unleet(_glue(joined)))
        readings += [_respelled(read)] * is_plain
        readings += [re.sub(r"([a-z])\1{2,}", short, read) for short in (r"\1", r"\1\1")]
    # The encoder takes other capitals for other words, and a word between marks for another one.
    is_plain = prompt.isascii() or (is_plain and is_english(words))  # but for its marks
    marked = is_plain and bool(_MARKS.search(text) or _CAPITALS.search(text) or text.istitle())
    decoded = dict.fromkeys(read for read in readings if read != words or marked)
    return Forms(visible(prompt), text, words, tuple(decoded))


def alphabetic(read: Forms) -> Forms:
    """The same without Chinese, Japanese and Korean characters, of which ASCII holds little but the sound."""
    return forms(_UNSPACED.sub(" ", read.original)) or read if _UNSPACED.search(read.original) else read


def pieces(prompt: str) -> list[Forms]:
    """The sentences of a prompt that has several; of long ones also the clauses, and each two neighbours of these; a
    single short one without its last phrases.

    What one of them asks for has little weight in the whole, where the others are harmless and many.
    """
    sentences = [part for part in _SENTENCE_END.split(prompt) if part.strip()]
    found = sentences if len(sentences) > 1 else []
    for sentence in sentences:
        if len(_UNSPACED.sub(" x ", sentence).split()) > _MANY_WORDS:
            clauses = [part for part in _CLAUSE_END.split(sentence) if part.strip()]
            if len(clauses) > 1:
                found = [*found, *clauses, *map(" ".join, itertools.pairwise(clauses))]
        elif len(sentences) == 1:
            found = [*found, *_heads(sentence)]
    # Two that are put together again can be longer than the prompt, by the space between them.
    return [read for part in dict.fromkeys(found) if (read := forms(part))]


def _heads(sentence: str) -> Iterator[str]:
    """Without its last phrases, up to three: places, times and words about the picture."""
    for found in list(_PHRASE.finditer(sentence))[:-4:-1]:
        if len((head := sentence[: found.start()]).split()) >= 3:
            yield head


def repaired(prompt: str) -> str:
    """A prompt as the published models read it: Unicode repaired by ftfy, no HTML entities, single spaces.

    Entities, escape sequences of terminals and text in a wrong encoding hide words from whoever reads the prompt as it
    stands, so that the gate reads this too.
    """
    ftfy = package("ftfy")
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def own_file(name: str) -> Path:
    """One of the gate's own files, as it was shipped.

    Raises:
        InputError: it is missing or was changed: the gate would let pass what it does not know.
    """
    path = DATA / name
    try:
        sums = dict(line.split()[::-1] for line in (DATA / SUMS).read_text(encoding="utf-8").splitlines())
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"the prompt gate cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{DATA / SUMS} is damaged: reinstall sora_jax") from error
    if sums.get(name) != found:
        raise InputError(f"{path} is damaged: reinstall sora_jax (a policy of your own is given with --policy)")
    return path


@functools.cache
def package(module: str, distribution: str = "") -> Any:
    """A module of a package that the gate reads with, as it was installed: installers note the digests of all files.

    Args:
        module: its name, with dots.
        distribution: what is installed with pip; by default the first part of the module's name.

    Raises:
        InputError: it is missing or was changed: the gate would let pass what it does not read.
    """
    name = module.partition(".")[0]
    distribution = distribution or name
    try:
        _check_files(name, distribution)
        return importlib.import_module(module)
    except Exception as error:  # a package that is broken can fail in any way
        raise InputError(
            f"the prompt gate cannot use the package {distribution}: {one_line(error)}; "
            f"repair it with: pip install --force-reinstall {distribution}"
        ) from error


@functools.cache
def _check_files(name: str, distribution: str) -> None:
    """Raises an error if a file of the package is missing or is not as it was installed.

    By the list of files itself: from Python 3.12 on, `importlib.metadata.files` leaves out those that are gone.
    """
    installed = importlib.metadata.distribution(distribution)
    noted_files = [*csv.reader((installed.read_text("RECORD") or "").splitlines())]
    if not any(path.partition("/")[0] == name and noted for path, noted, *_ in noted_files):
        raise ValueError("its list of files, RECORD, is missing")
    found = importlib.util.find_spec(name)
    folders = list((found and found.submodule_search_locations) or ())
    if not folders or not os.path.samefile(folders[0], installed.locate_file(name)):
        raise ValueError(f"what is imported is not what was installed, but {found and found.origin}")
    for path, noted, *_ in noted_files:
        if path.partition("/")[0] == name and noted.startswith("sha256="):
            digest = hashlib.sha256(Path(installed.locate_file(path)).read_bytes()).digest()
            if base64.urlsafe_b64encode(digest).decode().rstrip("=") != noted.removeprefix("sha256="):
                raise ValueError(f"{path} is damaged")


def visible(text: str) -> str:
    """Text in compatibility forms, without what is drawn as nothing; single spaces."""
    if not text.isascii():
        text = "".join(
            character
            for character in unicodedata.normalize("NFKC", text)
            if unicodedata.category(character) not in _NOT_DRAWN and character not in _BLANK
        )
    return " ".join(_CONTROL.sub("", text).split())


def _with_gaps(text: str) -> str:
    """Spaces for invisible characters, for blank ones, and for emoji and other pictures."""
    if text.isascii():
        return text
    return "".join(" " if character in _BLANK or _is_picture(character) else character for character in text)


@functools.lru_cache(maxsize=65536)
def _is_picture(character: str) -> bool:
    return unicodedata.category(character) in {"So", *_NOT_DRAWN}


def to_ascii(text: str) -> str:
    """Latin letters for letters of any alphabet, names for emoji; white space is kept."""
    anyascii = package("anyascii").anyascii

    if not text.isascii():
        text = "".join(character for character in text if not _is_invisible(character))
        text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
        text = "".join(character for character in text if not _is_invisible(character))
        text = _UNSPACED.sub(lambda match: f" {match[0]} ", unicodedata.normalize("NFC", text))
        text = re.sub(r"\w+", _ascii_word, text)
        text = anyascii(text)
    return _CONTROL.sub("", text)


def to_words(text: str) -> str:
    """Lower-case words of ASCII letters and digits with single spaces; apostrophes join."""
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower().replace("'", "").replace("`", "")).split())


@functools.cache
def lexicon() -> dict[str, int]:
    """Words of English with their rank by frequency, from the vocabulary of bert-base-uncased (Apache-2.0)."""
    words = own_file("vocab.txt").read_text(encoding="utf-8").split("\n")
    return {word: rank for rank, word in enumerate(words) if word.isascii() and word.isalpha()}


def is_english(words: str) -> bool:
    """Whether most of the words (`Forms.words`) that are letters alone are in the lexicon."""
    letters = [word for word in words.split() if word.isalpha()]
    return 0 < _ENGLISH * len(letters) <= sum(word in lexicon() for word in letters)


def is_latin(text: str) -> bool:
    """Whether a good part of its letters are Latin ones, as where lookalikes of other alphabets are among them."""
    letters = [letter for letter in text if letter.isalpha()]
    return 0 < _LATIN * len(letters) <= sum(letter < "\u0250" for letter in letters)


@functools.lru_cache(maxsize=65536)
def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE or character in _BLANK


def _ascii_word(match: re.Match) -> str:
    """One word: lookalikes by shape where that makes it Latin, else by sound."""
    anyascii = package("anyascii").anyascii

    word = match[0]
    if word.isascii():
        return word
    strict, loose = _lookalikes()
    shaped = word.translate(strict)
    if shaped.isascii():
        return shaped
    if re.search("[A-Za-z]", word):  # a word of two alphabets is a disguise
        return anyascii(word.translate(loose))
    return anyascii(word)


@functools.cache
def _lookalikes() -> tuple[dict[int, str], dict[int, str]]:
    """Characters that are drawn like an ASCII letter (Unicode's confusables); also those that are in capitals."""
    anyascii = package("anyascii").anyascii
    confusables = package("confusable_homoglyphs.confusables")
    strict = {}
    for character, found in confusables.confusables_data.items():
        letters = [one["c"] for one in found if len(one["c"]) == 1 and one["c"].isascii() and one["c"].isalpha()]
        if len(character) == 1 and not character.isascii() and letters:
            sound = anyascii(character).lower()
            strict[ord(character)] = next((one for one in letters if one.lower() == sound), letters[0])
    loose = dict(strict)
    for code in range(0x370, 0x530):  # Greek and Cyrillic
        upper = chr(code).upper()
        if code not in strict and len(upper) == 1 and ord(upper) in strict:
            loose[code] = strict[ord(upper)].lower()
    return strict, loose | _BY_SHAPE


def _join_spaced(text: str, split: bool) -> str:
    """ "n a k e d" and "n.a.k.e.d" as one word, or as several; two spaces and more stay a gap between words."""

    def joined(match: re.Match) -> str:
        letters = "".join(_SET_APART.findall(match[0]))
        return _split(letters) if split else letters

    text = _BRACKETED.sub(lambda match: re.sub(r"[()\[\]]", "", match[0]), text)
    return _SPACED.sub(joined, text)


def _apart(match: re.Match) -> str:
    """ "AManRuns" at its capitals, "amanruns" and "aMaNrUnS" where words may end."""
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", match[0])
    return " ".join(parts) if len(match[0]) >= 3 * len(parts) > 3 else _split(match[0])


def _split(letters: str) -> str:
    """Letters without spaces as the likeliest words, where those of rank n are 1/n as frequent (Zipf's law)."""
    known, lower = lexicon(), letters.lower()
    best = [(0.0, 0)]  # for each end: the cost, and where its last word starts
    for end in range(1, len(letters) + 1):
        starts = range(max(0, end - _LONGEST_WORD), end)
        best.append(min((best[start][0] + _cost(lower[start:end], known), start) for start in starts))
    words, end = [], len(letters)
    while end:
        words.append(letters[best[end][1] : end])
        end = best[end][1]
    return " ".join(reversed(words))


def _cost(word: str, known: dict[str, int]) -> float:
    return math.log(known[word]) if word in known else 12.0 * len(word)


def _respelled(words: str) -> str:
    """Words that the lexicon lacks, with letters doubled or inner letters swapped, as it has them: if they are several,
    and most are English then. One alone is a slip."""
    known = lexicon()
    given = re.sub(r"\b([ai])\1\b", r"\1", words).split()
    found = [word if word in known else _in_lexicon(word) for word in given]
    changed = sum(before != after for before, after in zip(words.split(), found, strict=True))
    respelled = " ".join(found)
    return respelled if changed > 1 and is_english(respelled) else words


def _in_lexicon(word: str) -> str:
    known = lexicon()
    runs = re.findall(r"(([a-z])\2*)", word)
    if sum(len(run) > 1 for run, _ in runs) <= 6:
        choices = ((letter, 2 * letter) if len(run) > 1 else (run,) for run, letter in runs)
        variants = map("".join, itertools.product(*choices))
        if spelled := [one for one in variants if one in known or one.removesuffix("s") in known]:
            return min(spelled, key=lambda one: known.get(one, 1 << 30))
    return _by_letters().get((word[0], word[-1], *sorted(word)), word)


@functools.cache
def _by_letters() -> dict[tuple[str, ...], str]:
    """The commonest word by its first and last letter and all that it has."""
    return {(word[0], word[-1], *sorted(word)): word for word in reversed(lexicon())}


def _glue(text: str) -> str:
    """ "na-ked" as one word, if that is a commoner word than one of its parts."""
    known = lexicon()

    def glued(match: re.Match) -> str:
        parts = re.split(r"[^A-Za-z0-9]+", match[0].lower())
        word = "".join(parts)
        rarest = max(known.get(part, 1 << 30) for part in parts)
        return word if known.get(word, 1 << 30) < rarest else match[0]

    return re.sub(r"(?<![A-Za-z])[A-Za-z]+(?:[^\sA-Za-z0-9@$!']{1,3}[A-Za-z]+)+", glued, text)


def _unleet(text: str) -> str:
    """Letters for the digits and symbols inside words; numbers and measures such as 35mm stay."""
    return re.sub(r"\S+", _unleet_word, text)


def _unleet_word(match: re.Match) -> str:
    core = match[0].strip(".,;:?\"'()[]").rstrip("!")
    if not re.search("[A-Za-z]", core) or not re.search(r"[0-9@$!|+]", core) or _MEASURE.fullmatch(core):
        return match[0]
    as_i, as_l = core.translate(_LEET), core.translate(_LEET_L).translate(_LEET)
    return as_l if as_l.lower() in lexicon() and as_i.lower() not in lexicon() else as_i
