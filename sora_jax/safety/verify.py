"""What can be said of a file: its manifest, the invisible mark, and a verdict that claims no more than they show."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from sora_jax import media
from sora_jax.errors import InputError
from sora_jax.safety import keys, mark, scan
from sora_jax.safety.manifest import (
    BY_MODEL,
    LEFT_OUT_TOO,
    PARTLY_BY_MODEL,
    Manifest,
    plain,
    read_manifest,
    signer_name,
)

# What `sora-jax verify` ends with.
EXIT_CODES = {"trusted": 0, "valid": 4, "tampered": 5, "none": 6, "rejected": 7, "unreadable": 2}
_HEADLINES = {"valid": "valid, signer unknown"}  # of states whose name alone says too much
# What whoever signed a file says of the manifests of those that it was made from, by state: nobody else can check it.
_SAYS = {
    "trusted": "whose manifest was intact",
    "valid": "whose manifest was intact",
    "rejected": "whose manifest was intact, but by a signer whose certificate did not hold, or not of all of it",
    "tampered": "which had been changed after it was signed",
    "none": "which held no manifest",
    "unreadable": "whose manifest could not be read",
}
_ACTION = re.compile(r"[\w.]{1,64}")
_MOST_FRAMES = 96  # of a long file the mark is looked for in so many, evenly spread


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        file: its path.
        manifest: see `manifest.Manifest`.
        mark: "found" with the bits it carries, "not found", or why it was not looked for.
        mark_bits: the 16 bits of this installation's mark, hexadecimal, or "".
        verdict: plain words, a sentence to a line.
    """

    file: str
    manifest: Manifest
    mark: str
    mark_bits: str = ""
    verdict: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.manifest.state]

    @property
    def text(self) -> str:
        state = _HEADLINES.get(self.manifest.state, self.manifest.state)
        return "\n".join([f"{plain(self.file)}: {state}", *(f"  {line}" for line in self.verdict)])


def verify(path: str | os.PathLike, anchors: str | os.PathLike | None = None) -> Verification:
    """Reads a file's manifest and looks for this installation's invisible mark.

    Args:
        path: a video or picture, ours or of others.
        anchors: a PEM file with root certificates that are trusted besides this installation's own.

    Raises:
        InputError: there is no such file, or `anchors` cannot be read.
    """
    anchor, secret, why_not, given = "", None, "this installation has marked nothing yet", ""
    try:
        if anchor := keys.local_anchor():
            secret = keys.watermark_key()
    except InputError as error:  # the file can be read all the same
        why_not = str(error)
    if anchors:
        if Path(anchors).exists() and not Path(anchors).is_file():  # of a pipe nobody knows when it ends
            raise InputError(f"cannot read {anchors}: it must be a file with certificates in PEM")
        try:
            given = Path(anchors).read_text()
            x509.load_pem_x509_certificates(given.encode())
        except OSError as error:
            raise InputError(f"cannot read {anchors}: {error.strerror}") from error
        except ValueError:
            raise InputError(f"cannot read {anchors}: it must be certificates in PEM") from None
    known = f"{anchor}\n{given}".strip().encode()
    manifest = read_manifest(path, known.decode())
    words, bits = _look_for_mark(path, secret) if secret else (f"not looked for: {why_not}", "")
    roots = {signer_name(root.subject) for root in x509.load_pem_x509_certificates(known)} if known else set()
    verdict = (*_of_manifest(manifest, roots), *_of_mark(words, bits, manifest))
    return Verification(os.fspath(path), manifest, words, bits, verdict)


def _look_for_mark(path: str | os.PathLike, secret: bytes) -> tuple[str, str]:
    try:
        found = mark.detect(media.some(path, _MOST_FRAMES), secret)
    except InputError:
        return "not looked for: the file holds no frames that can be read", ""
    return ("found", f"{found.payload:04x}") if found.found else ("not found", "")


def _quoted(words: str) -> str:
    """Another's words, which may read as if they were ours."""
    return '"' + words.replace('"', "'") + '"'


def _of_manifest(manifest: Manifest, roots: Set[str]) -> list[str]:
    if manifest.state == "none":
        return [
            "It carries no manifest: it never had one, or somebody took it off, which any conversion does.",
            "That says nothing of how it was made.",
        ]
    if manifest.state == "unreadable":
        return [f"Its manifest cannot be read: {'; '.join(manifest.problems)}."]
    program = _quoted(manifest.generator) if manifest.generator else "an unnamed program"
    said = f"It says that it was written with {program}"
    if BY_MODEL in manifest.source_types:
        said += ", and made by a generative model"
    elif PARTLY_BY_MODEL in manifest.source_types:
        said += ", and made in part by a generative model"
    # A word for an action has no spaces; what else stands there could be taken for ours.
    actions = ", ".join(filter(_ACTION.fullmatch, manifest.actions))
    said += f" ({actions})." if actions else "."
    if manifest.state == "tampered":
        return [f"It was changed after it was signed: {'; '.join(manifest.problems)}.", f"{said} Do not rely on it."]
    if manifest.state == "rejected":
        unchanged = "It is unchanged, but its signer's certificate does not hold"
        if any(problem.startswith(LEFT_OUT_TOO) for problem in manifest.problems):
            unchanged = "What is signed is unchanged, but not enough is"
        return [f"{unchanged}: {'; '.join(manifest.problems)}.", said]
    known = "knows" if manifest.state == "trusted" else "does not know"
    signer = _quoted(manifest.signer) if manifest.signer else "somebody without a name"
    lines = [
        f"Its pictures, and what it says of them, are unchanged since they were signed by {signer}, "
        f"whom this installation {known}."
    ]
    if manifest.state == "valid" and manifest.issuer:  # whether a link is missing, or only the root, is not reported
        names = f"The certificate names {_quoted(manifest.issuer)} as its issuer"
        if manifest.issuer in roots:
            lines.append(f"{names}. A root of that name is known here, but it did not issue this certificate.")
        else:
            lines.append(f"{names}, which was not checked: no chain leads from there to a root that is known here.")
    if manifest.time:
        known = "knows" if manifest.time_is_trusted else "does not know"
        lines.append(
            f"It was signed no later than {manifest.time}, says a time-stamp server that this installation {known}."
        )
    lines += [said, *_of_generation(manifest)]
    for one in manifest.ingredients:
        model = "; that manifest says that a generative model made it" if one.by_model else ""
        lines.append(f"It says that it was made from {_quoted(one.title)}, {_SAYS[one.state]}{model}.")
    lines += [f"Note: {problem}." for problem in manifest.problems]
    return [*lines, "A signature shows that a file is unchanged, not that what it says is true."]


def _of_generation(manifest: Manifest) -> list[str]:
    said = manifest.generation
    if not said:  # by another program
        return _of_checks({})
    if {BY_MODEL, PARTLY_BY_MODEL} & {*manifest.source_types}:
        seed = f", seed {said['seed']}" if type(said.get("seed")) is int else ""
        model = _quoted(plain(said["model"])) if said.get("model") else "one without a name"
        line = f"It says that the model was {model}{seed}."
    elif "c2pa.transcoded" in manifest.actions and manifest.ingredients:
        line = "It says that its frames are those of the file that it was made from, encoded anew and marked."
    else:
        line = "It does not say where its frames come from."
    checks = said.get("checks")
    return [line, *_of_checks(checks if isinstance(checks, Mapping) else {})]


def _of_checks(checks: Mapping[str, Any]) -> list[str]:
    """What a manifest says was checked; one of others may say anything."""
    texts = {name: checks.get(name) for name in ("prompt", "negative_prompt")}
    passed = [name for name, said in texts.items() if isinstance(said, Mapping) and said.get("allowed") is True]
    named = " and the ".join(passed).replace("_", " ")
    lines = [f"It says that the prompt gate let the {named} pass."] if passed else []
    for name, end in (("image", "starts"), ("last_image", "ends")):
        lines += _of_scans(checks.get(name), f"the picture that it {end} with")[0]
    return lines + _of_frames(checks.get("frames"))


def _of_frames(said: Any) -> list[str]:
    lines, kinds = _of_scans(said)
    if not lines:
        return ["It says nothing of a scan of its frames, and none is made here."]
    left = scan.not_scanned_for(kinds)
    return [*lines, f"Not scanned for, as far as it says: {', '.join(left)}."] if left else lines


def _of_scans(said: Any, what: str = "") -> tuple[list[str], list[str]]:
    """What is said of scans, of frames or of `what`, and what these were for; older files have a single scan."""
    lines, all_kinds = [], []
    for one in [said] if isinstance(said, Mapping) else said if isinstance(said, list) else []:
        kinds = one.get("scans_for") if isinstance(one, Mapping) else None
        if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) for kind in kinds):
            continue
        all_kinds += kinds
        every = one.get("every")
        counted = type(every) is int and every > 1
        frames = "all frames" if every == 1 else f"at least one in {every} frames" if counted else "frames"
        passed = "passed" if one.get("passed") is True else "did not pass"
        named = ", ".join(kind if kind in scan.KINDS else _quoted(plain(kind)) for kind in kinds)
        lines.append(f"It says that {what or frames} {passed} a scan for {named}.")
    return lines, all_kinds


def _of_mark(words: str, bits: str, manifest: Manifest) -> list[str]:
    if words == "found":
        checks = manifest.generation.get("checks")
        said = checks.get("mark") if isinstance(checks, Mapping) else None
        fits = "as its manifest says" if said == bits else "not what its manifest says"
        which = f"bits {bits}, {fits}" if said else f"bits {bits}"
        return [
            f"It carries this installation's invisible mark ({which}): frames that were written here are in it, or "
            "somebody who has some has copied the mark."
        ]
    if words == "not found":
        return ["The invisible mark of this installation was not found, which does not prove that it was never there."]
    return [f"The invisible mark was {words}."]
