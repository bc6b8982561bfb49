"""What words of the command line may be: each function here turns a text into a value, or says what it must be."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from sora_jax.errors import InputError

PROMPTS_HELP = "a file with one prompt per line; lines that begin with '# ' are comments"


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text) or int(text) < low or (high is not None and int(text) > high):
            limits = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, not '{text}'")
        return int(text)

    return parse


def number(above: float = -math.inf) -> Callable[[str], float]:
    """A finite number above `above`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > above):
            limits = "" if above == -math.inf else f" above {above}"
            raise argparse.ArgumentTypeError(f"must be a number{limits}, not '{text}'")
        return value

    return parse


def lora(text: str) -> tuple[str, float]:
    """FILE, or FILE:SCALE."""
    match = re.fullmatch(r"(.+):([-+]?[\d.]+(?:[eE][-+]?\d+)?)", text)
    return (match[1], number()(match[2])) if match else (text, 1.0)


def size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 128x128, not '{text}'")
    return int(match[1]), int(match[2])


def prompts_of(options: argparse.Namespace) -> list[str]:
    """The one prompt of a command, or those of its file: one a line, but for blank ones and comments (see the help)."""
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("give one prompt, or a file of prompts with --prompts FILE")
    if options.prompt is not None:
        return [options.prompt]
    try:
        # Windows marks such files with U+FEFF. Only line feeds end a line: "\u2028" may be part of a prompt.
        lines = Path(options.prompts).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {options.prompts}: it is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"cannot read {options.prompts}: {error.strerror}") from error
    prompts = [line.strip() for line in lines]
    prompts = [line for line in prompts if line and line != "#" and not line.startswith("# ")]
    if not prompts:
        raise InputError(f"{options.prompts} holds no prompts")
    return prompts
