"""What words of the command line may be: each function here turns a text into a value, or says what it must be."""

import argparse
import math
import re
from collections.abc import Callable


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
    match = re.fullmatch(r"(.+):(-?[\d.]+(?:e-?\d+)?)", text)
    return (match[1], number()(match[2])) if match else (text, 1.0)


def size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 128x128, not '{text}'")
    return int(match[1]), int(match[2])
