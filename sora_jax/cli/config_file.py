"""Config files of training runs: Python files with `get_config`, and overrides from the command line."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_jax.errors import InputError


def load_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """The ConfigDict that `get_config()` of the Python file returns, with overrides applied, locked.

    Args:
        path: the config file; of "FILE:ARGUMENT" the second part is given to `get_config`.
        overrides: command-line words, "--config.a.b=value" or "--config.a.b", "value".

    Raises:
        InputError: for a file that cannot be used, an unknown field, or a value of the wrong type.
    """
    import ml_collections

    path, *argument = path.split(":", 1)
    spec = importlib.util.spec_from_file_location("sora_jax_config", path)
    if spec is None or not Path(path).is_file():
        raise InputError(f"there is no config file {path}; it must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = ml_collections.ConfigDict(module.get_config(*argument))
    except (Exception, SystemExit) as error:  # the file is the user's code and can fail in any way
        raise InputError(f"the config {path} fails: {type(error).__name__}: {error}") from error
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            raise InputError(f"unrecognized argument: {word}; see sora-jax train --help")
        name, equals, text = word.removeprefix("--config.").partition("=")
        if not equals and not words:
            raise InputError(f"--config.{name} needs a value")
        _override(config, name, text if equals else words.pop(0))
    return config.lock()


def _override(config: Any, name: str, text: str) -> None:
    *parents, last = name.split(".")
    for depth, key in enumerate([*parents, last]):
        fields = list(config.keys()) if hasattr(config, "keys") else []
        if key not in fields:
            prefix = ".".join(name.split(".")[:depth])
            close = difflib.get_close_matches(key, fields, 3, 0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(fields)}"
            raise InputError(f"the config has no field {name}; {prefix or 'the top level'}: {hint}")
        if depth < len(parents):
            config = config[key]
    kind = config.get_type(last)
    if isinstance(config[last], type(config)):
        raise InputError(f"--config.{name} is a group of fields; set one of: {', '.join(config[last].keys())}")
    try:
        config[last] = text if kind is str else _literal(text)
    except TypeError as error:
        raise InputError(f"--config.{name} must be {kind.__name__}, not {text!r}") from error


def _literal(text: str) -> Any:
    """A Python literal, true/false as people write them, or else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
