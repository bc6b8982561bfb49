"""What is refused, and how readily: categories with phrases, thresholds and examples, read from TOML.

names = ["colleagues.txt"]              # more lists of people, beside this file; the format is in names.py

[lists]                                 # words for [name] in phrases
brand = ["acme", "acme corp*"]

[categories.violence]                   # a category that exists: what is given here is added or changed
enabled = false                         # or threshold = 0.9: refuse less; minors can only be made stricter
allow = ["sword dance*"]                # phrases that its own phrases overlook; names are freed in a list of names

[categories.logos]                      # a new category
description = "our competitors' logos"
threshold = 0.75                        # similarity to an example, from which a prompt is refused
phrases = ["[brand] ... logo*"]         # the language is in phrases.py; categories that exist take hints besides
examples = ["the logo of Acme on a wall", "an Acme billboard"]
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_jax.errors import InputError, one_line
from sora_jax.safety.names import Names, read_names
from sora_jax.safety.normalize import own_file
from sora_jax.safety.phrases import compile_phrases

PROTECTED = "minors"
_FIELDS = {
    "description": str,
    "enabled": bool,
    "threshold": float,
    "phrases": list,
    "hints": list,
    "allow": list,
    "examples": list,
}


@dataclass(frozen=True)
class Category:
    """One kind of thing that is refused.

    Attributes:
        name: the code in verdicts.
        description: one line for people.
        enabled: whether it is looked for at all.
        threshold: 0 to 1; the layer of meaning refuses from this score on. For the package's own categories the score
            is the probability of the category against harmless; for others the similarity to the nearest example.
        phrases: what the rules refuse.
        hints: words of harm that have harmless senses. They refuse nothing, but make the layer of meaning readier to,
            in the package's own categories.
        allow: what rules and hints overlook in this category.
        examples: prompts of a new category, for the layer of meaning.
    """

    name: str
    description: str = ""
    enabled: bool = True
    threshold: float = 0.75
    phrases: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """Everything that decides about a prompt, besides the package's own version."""

    categories: tuple[Category, ...]
    lists: tuple[tuple[str, tuple[str, ...]], ...]
    names: Names

    @property
    def digest(self) -> str:
        """SHA-256, in hex, over all that is in force, as JSON with sorted keys."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def check_protection(self) -> None:
        """Raises InputError if minors are less protected than by the package's policy, whoever made this one."""
        own = _own()
        least = own.category(PROTECTED)
        here = self.category(PROTECTED)
        lists = {name: set(phrases) for name, phrases in self.lists}
        if (
            here is None
            or not here.enabled
            or not here.threshold <= least.threshold  # nor if it is no number
            or sum(category.name == PROTECTED for category in self.categories) > 1
            or not set(least.phrases) <= set(here.phrases)
            or not set(least.hints) <= set(here.hints)
            or not set(here.allow) <= set(least.allow)
            or not all(set(phrases) <= lists.get(name, set()) for name, phrases in own.lists)
        ):
            raise InputError(f"a policy cannot relax the category {PROTECTED}: start from load_policy()")

    def category(self, name: str) -> Category | None:
        """The category of that name."""
        return next((category for category in self.categories if category.name == name), None)


def load_policy(path: str | os.PathLike | None = None) -> Policy:
    """The package's policy, with what the TOML file at `path` adds and changes.

    Raises:
        InputError: the file cannot be read, or has an unknown key, a wrong type, a value out of range, a phrase that
            cannot be compiled, or relaxes the protection of minors.
    """
    return _own() if path is None else _extend(_own(), _read(Path(path)), Path(path), own=False)


@functools.cache
def _own() -> Policy:
    path = own_file("policy.toml")
    return _extend(Policy((), (), read_names(own_file("names.txt"))), _read(path), path, own=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot read the policy {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise InputError(f"the policy {path} is not TOML: {one_line(error)}") from error


def _extend(policy: Policy, content: dict[str, Any], path: Path, own: bool) -> Policy:
    where = f"policy {path}"
    _known(content, ("names", "lists", "categories"), where)
    lists = dict(policy.lists)
    for name, phrases in _typed(content, "lists", dict, where).items():
        lists[name] = lists.get(name, ()) + _strings(phrases, f"{where}: lists.{name}")
    names = policy.names
    for file in _strings(content.get("names", []), f"{where}: names"):
        names = names | read_names(path.parent / file)
    categories = {category.name: category for category in policy.categories}
    for name, fields in _typed(content, "categories", dict, where).items():
        here = f"{where}: categories.{name}"
        if not isinstance(fields, dict):
            raise InputError(f"{here} must be a table, not {type(fields).__name__}")
        before = categories.get(name)
        category = _category(before or Category(name), fields, here)
        if not before and not category.phrases and not category.examples:
            raise InputError(f"{here} is new, and needs phrases or examples; there are {', '.join(categories)}")
        if before and not own:
            _check_change(before, fields, here)
        if category.hints and not before and not own:
            raise InputError(f"{here}.hints: only the package's own categories take hints; here add phrases")
        for part in ("phrases", "hints", "allow"):
            compile_phrases(getattr(category, part), lists, f"{here}.{part}")
        categories[name] = category
    return Policy(tuple(categories.values()), tuple(sorted(lists.items())), names)


def _category(category: Category, fields: dict[str, Any], where: str) -> Category:
    _known(fields, _FIELDS, where)
    changed = {}
    for key, kind in _FIELDS.items():
        if key not in fields:
            continue
        if kind is list:
            changed[key] = getattr(category, key) + _strings(fields[key], f"{where}.{key}")
        elif kind is float:
            value = fields[key]
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise InputError(f"{where}.{key} must be a number from 0 to 1, not {value!r}")
            changed[key] = float(value)
        else:
            changed[key] = _typed(fields, key, kind, where)
    return dataclasses.replace(category, **changed)


def _check_change(before: Category, fields: dict[str, Any], where: str) -> None:
    if before.name == PROTECTED and (
        fields.get("enabled") is False or fields.get("threshold", 0) > before.threshold or fields.get("allow")
    ):
        raise InputError(
            f"{where} cannot be relaxed: leave out enabled and allow; threshold may be at most {before.threshold}"
        )
    if fields.get("examples") and not before.examples:
        raise InputError(f"{where}.examples: only new categories take examples; here add phrases, or lower threshold")


def _known(table: dict[str, Any], keys: Any, where: str) -> None:
    for key in table:
        if key not in keys:
            raise InputError(f"{where} has an unknown key {key!r}; known are {', '.join(keys)}")


def _typed(table: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = table.get(key, kind())
    if type(value) is not kind:
        names = {dict: "a table", str: "a text", bool: "true or false"}
        raise InputError(f"{where}: {key} must be {names[kind]}, not {value!r}")
    return value


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
        raise InputError(f"{where} must be a list of texts, not {value!r}")
    return tuple(value)
