"""Where the videos of `sora-jax generate` go, and what becomes of the others when one cannot be saved."""

from __future__ import annotations

import argparse
import contextlib
import mimetypes
import os
import re
import sys
import unicodedata
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sora_jax.errors import InputError, NoTimeStamp, Refused

if TYPE_CHECKING:  # mistakes are told without waiting for JAX
    from sora_jax.safety.keys import Signer
    from sora_jax.video import Video


class Target:
    """Where videos go: the one file that was asked for, or names made from prompts in a folder."""

    def __init__(self, output: str | None, several: bool, frames: int, fps: float):
        self.frames, self.fps, self.made = frames, fps, False
        several |= bool(output) and output.endswith(("/", os.sep))
        self.file = Path(output) if output and not several and not Path(output).is_dir() else None
        self.folder = Path(output or ".")
        kind, _ = mimetypes.guess_type(self.folder.name)
        if self.file is None and not self.folder.is_dir() and (kind or "").startswith(("video/", "image/")):
            raise InputError(f"several videos need a folder, not {output}; give -o the name of a folder")

    def check(self, prompt: str) -> None:
        """Raises InputError if writing cannot succeed; makes the folder if only that is missing."""
        from sora_jax.media import check_output, numbered

        path = self.path(prompt)
        if self.file is None:
            try:
                self.made |= not self.folder.exists()
                self.folder.mkdir(exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make the folder {self.folder}: {error.strerror}") from error
            path = next(one for one in numbered(path) if not one.exists())
        check_output(path, self.frames, self.fps)

    def tidy(self) -> None:
        """Takes away the folder that was made, if nothing is in it."""
        if self.made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def path(self, title: str) -> Path:
        """The path of a video; one in the folder gets a number when it is saved, if its name is taken then."""
        if self.file is not None:
            return self.file
        title = unicodedata.normalize("NFC", title.lower())
        # Signs that belong to a letter are none of their own; the others part words.
        parted = "".join(c if c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" else "-" for c in title)
        name = re.sub("-+", "-", parted).strip("-")[:60].strip("-") or "video"
        return self.folder / f"{name}{'.mp4' if self.frames > 1 else '.png'}"

    def report(self, seed: int) -> Path | None:
        """Where it is said why a video is withheld: not under a name that is made from the prompt."""
        return None if self.file else self.folder / f"withheld-seed-{seed}.json"


class Saver:
    """Saves videos one after the other; of several hosts the first does.

    A problem of one video does not cost the others; where nothing can be saved any more, the run ends.
    """

    def __init__(self, options: argparse.Namespace, target: Target, jobs: list[tuple[str, int]]):
        self.options, self.target, self.jobs = options, target, jobs
        self.signer: Signer | None = None
        self.problems: list[tuple[type, str]] = []  # not the errors, whose tracebacks hold all frames

    def prepare(self) -> None:
        """Raises InputError if nothing could be saved."""
        self.target.check(self.jobs[0][0])
        self.signer = _signer(self.options)

    def save(self, number: int, video: Video) -> None:
        """Saves the video of the job with that number, or says what is wrong with it."""
        from tqdm.auto import tqdm

        try:
            self._write(video, *self.jobs[number])
        except (InputError, Refused) as problem:
            if len(self.jobs) == 1:
                raise
            kind = Refused if isinstance(problem, Refused) else InputError
            self.problems.append((kind, str(problem)))
            which = f"video {number + 1} of {len(self.jobs)} (seed {self.jobs[number][1]})"
            tqdm.write(f"{which}: {problem}", file=sys.stderr)
            if kind is InputError and not isinstance(problem, NoTimeStamp):
                self.prepare()

    def finish(self) -> None:
        """Raises what is left to say when all videos were made."""
        if self.problems:
            kind, text = next((one for one in self.problems if one[0] is InputError), self.problems[0])
            raise kind(f"{len(self.problems)} of {len(self.jobs)} videos: {text}")

    def _write(self, video: Video, prompt: str, seed: int) -> None:
        from tqdm.auto import tqdm

        save = partial(
            video.save,
            self.target.path(f"{prompt} seed {seed}" if self.options.num > 1 else prompt),
            embed_prompt=self.options.embed_prompt,
            report=self.target.report(seed),
            replace=self.target.file is not None,
        )
        try:
            path = save(signer=self.signer)
        except NoTimeStamp as error:  # what was made is kept all the same
            path = save(signer=replace(self.signer, timestamp_url=None))
            tqdm.write(str(path))
            raise NoTimeStamp(f"{path} is signed, but without a time stamp: {error}") from error
        tqdm.write(str(path))  # to stdout, past the progress bar


def _signer(options: argparse.Namespace) -> Signer:
    """Who signs the files; a key that cannot sign is found before anything is made."""
    from sora_jax.safety import keys, provenance

    with warnings.catch_warnings(record=True, action="always", category=UserWarning) as notes:
        try:
            signer = keys.load_signer(options.signing_cert, options.signing_key, options.timestamp_url)
            provenance.rehearse(signer)
            keys.watermark_key()  # also the mark's, which is this installation's, whoever signs
        finally:  # a key is made only once
            for note in notes:
                print(note.message, file=sys.stderr)
    return signer
