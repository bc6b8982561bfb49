"""The one exit: frames are scanned, marked, encoded, signed and read back before a file has its name.

    frames -> scan -> mark -> encode -> sign -> write -> read back -> rename

Every generated video and picture leaves through `release`, which alone writes frames to files. What is not scanned and
signed is never on a disk, under whatever name: a process can be killed at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from sora_jax import media
from sora_jax.errors import InputError, Refused
from sora_jax.safety import keys, mark, provenance, scan
from sora_jax.safety.keys import Signer
from sora_jax.safety.provenance import Claim, frames_digest
from sora_jax.safety.scan import Scanner


def release(
    path: str | os.PathLike,
    frames_THWC: np.ndarray,
    fps: float,
    claim: Claim,
    signer: Signer | None = None,
    scanner: Scanner | None = None,
    report: str | os.PathLike | None = None,
    replace: bool = True,
) -> Path:
    """Writes frames as .mp4, .gif or .png (one frame), scanned, marked and signed; returns the path.

    The file appears at `path` when all is done and checked; whatever stops it before leaves an older file as it was.

    Args:
        frames_THWC: uint8 [T, H, W, 3], RGB.
        fps: frames per second.
        claim: what the file says of how it was made; the checks and the mark are added to it. That the frames are those
            of a file is said only if they are.
        signer: by default the installation's own.
        scanner: looks at the frames too, beside the one that comes with the package.
        report: where it is written what the scan found, if that must not leave; by default beside `path`, under its
            name. Given where that name is made from the prompt, which refusals never repeat.
        replace: what has these names is replaced; else the files get the first number that is free.

    Raises:
        Refused: the scan found what must not leave; a report without the pictures is written.
        NoTimeStamp: the signer's time-stamp server gives none, or one that does not fit.
        InputError: name or folder do not fit (see `media.check_output`), or the file cannot be written or signed.
    """
    path = Path(path)
    ending = path.suffix.lower()
    media.check_output(path, len(frames_THWC), fps)
    signer, secret = signer or keys.load_signer(), keys.watermark_key()
    scanners = [None] if scanner is None else [None, scanner]
    found = [scan.scan(frames_THWC, one) for one in scanners]
    scans = [one.report for one in found]
    if not all(one.passed for one in found):
        what = "a video" if report else path
        report = Path(report) if report else path.with_name(f"{path.name}.withheld.json")
        with media.complete_or_absent(report) as hidden:
            hidden.write_text(json.dumps(scans, indent=1) + "\n")
            report = report if replace else media.take_free_name(hidden, report)
        raise Refused(f"the frame scan withholds {what}; {report} says why")
    if claim.frames_sha256 and claim.frames_sha256 != frames_digest(frames_THWC):  # changed since the model made them
        claim = Claim(version=claim.version, ingredients=claim.ingredients)
    if "fps" in claim.config:
        claim = dataclasses.replace(claim, config={**claim.config, "fps": fps})
    payload = mark_of(claim, frames_THWC)
    checks = {**claim.checks, "frames": scans, "mark": f"{payload:04x}"}
    origin = "" if claim.origin == "file" and not _is_copy(frames_THWC, fps, claim) else claim.origin
    # Not the file's name, which is often made from the prompt.
    claim = dataclasses.replace(claim, title=f"video{ending}", checks=checks, origin=origin)
    marked_THWC = mark.embed(frames_THWC, payload, secret)
    with media.complete_or_absent(path) as hidden:
        encoded = media.encode(marked_THWC, fps, ending)
        hidden.write_bytes(provenance.sign_patiently(encoded, ending, claim, signer))
        provenance.verify_signed(hidden, signer)
        written = media.count(hidden)
        if written != len(frames_THWC):
            raise InputError(f"cannot write {path}: only {written} of {len(frames_THWC)} frames arrived")
        path = path if replace else media.take_free_name(hidden, path)
    return path


def _is_copy(frames_THWC: np.ndarray, fps: float, claim: Claim) -> bool:
    """Whether these are the frames of the first ingredient: they may have been changed since they were read."""
    source = claim.ingredients[0]
    theirs_THWC, speed = media.decode(source.data, source.title)
    return fps == speed and np.array_equal(frames_THWC, theirs_THWC)


def mark_of(claim: Claim, frames_THWC: np.ndarray) -> int:
    """The 16 bits that the invisible mark carries, so that the same video has the same mark.

    From a hash of the claim where it says which video of its model this is, else of the frames themselves.
    """
    said = [claim.model, claim.weights_sha256, claim.config, claim.prompt_sha256, claim.seed]
    if claim.seed is None:
        said = [frames_THWC.shape, frames_digest(frames_THWC)]
    return int.from_bytes(hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()[:2])
