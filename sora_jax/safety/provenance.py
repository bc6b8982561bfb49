"""Provenance: signs what is generated with C2PA, and reads what files say about where they come from.

A manifest proves that a file is as its signer left it, and what the signer says of it. It can be taken off any file, so
that a file without one proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cryptography import x509

import sora_jax
from sora_jax.errors import InputError, one_line
from sora_jax.safety import boxes
from sora_jax.safety.keys import Signer

STATES = ("trusted", "valid", "rejected", "tampered", "none", "unreadable")
GENERATION = "org.sora-jax.generation"
_ACTIONS = "c2pa.actions.v2"
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_MIME = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}
_LEFT_OUT = "left_out_boxes_sha256"
_VERIFY = {"remote_manifest_fetch": False, "ocsp_fetch": False}  # reading a file contacts nobody
_SIGNING = {
    "builder": {
        "thumbnail": {"enabled": False},
        "created_assertion_labels": [_ACTIONS, GENERATION],
        "bmff_hash_exclude_free_and_skip_boxes": False,
    },
    "verify": _VERIFY,
}
_CONTENT = "the picture data or another part of the file was changed after signing"
_WORDS = {  # C2PA 2.2, 15.2: status codes
    "assertion.dataHash.mismatch": _CONTENT,
    "assertion.bmffHash.mismatch": _CONTENT,
    "assertion.boxesHash.mismatch": _CONTENT,
    "assertion.hashedURI.mismatch": "what the manifest says was changed after signing",
    "claimSignature.mismatch": "the signature does not fit the manifest",
    "claimSignature.missing": "the manifest has no signature",
    "claimSignature.outsideValidity": "it was signed outside the validity of the signer's certificate",
    "claim.hardBindings.missing": "nothing ties the manifest to this file",
    "signingCredential.expired": "the signer's certificate has expired, and no time stamp shows that it signed before",
    "signingCredential.invalid": "the signer's certificate is not one for signing files",
    "signingCredential.ocsp.revoked": "the signer's certificate was revoked",
    "signingCredential.untrusted": "the signer is not known here",
    GENERATION: "a part of the file that tells players how to read it was changed after signing",
}
_CREDENTIAL = ("signingCredential.", "claimSignature.outsideValidity", "timeStamp.")
_BOUND = ("assertion.dataHash.match", "assertion.bmffHash.match", "assertion.boxesHash.match")


@dataclass(frozen=True)
class Claim:
    """What a generated file says about itself.

    Attributes:
        title: name of the file, without folders.
        model, weights_sha256: the model's name and the digest of its weights, hexadecimal.
        config: the request and the model's configuration, as JSON has it.
        prompt_sha256: digest of the prompt in UTF-8, hexadecimal.
        seed: of the noise.
        prompt: the prompt itself, only if it shall be in the file.
        mesh: the device mesh, as the command line writes it.
        version: of this program.
        checks: what was checked before the file was released, as JSON has it.
        ingredients: files that were used as input; the file is then an edit of the first.
    """

    title: str
    model: str
    weights_sha256: str
    config: Mapping[str, Any]
    prompt_sha256: str
    seed: int
    prompt: str | None = None
    mesh: str = ""
    version: str = sora_jax.__version__
    checks: Mapping[str, Any] = field(default_factory=dict)
    ingredients: tuple[str | os.PathLike, ...] = ()


@dataclass(frozen=True)
class Ingredient:
    """A file that went into another: its name, what it was used for, and the state of its own manifest."""

    title: str
    relationship: str
    state: str


@dataclass(frozen=True)
class Manifest:
    """What reading a file found. Everything but `state` and `problems` is what the signer says, and no proof of it.

    Attributes:
        state: trusted (intact, and the signer's certificate leads to an anchor), valid (intact, signer unknown),
            rejected (intact, but the certificate is expired or not for this), tampered, none (no manifest: taken off or
            never there), unreadable (the file or its manifest cannot be read).
        problems: what is wrong, in plain words with the code of the C2PA standard.
        identifier: URN of the manifest.
        title: name of the file when it was signed.
        generator: program that wrote the claim, with its version.
        actions: such as c2pa.created.
        source_types: last part of the IPTC digital source type of every action, such as trainedAlgorithmicMedia.
        generation: our own assertion, empty in files by others.
        signer: common name and organization in the certificate.
        time: of the time stamp (ISO 8601), or "".
        ingredients: files that this one was made from.
    """

    state: str
    problems: tuple[str, ...] = ()
    identifier: str = ""
    title: str = ""
    generator: str = ""
    actions: tuple[str, ...] = ()
    source_types: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    signer: str = ""
    serial_number: str = ""
    time: str = ""
    ingredients: tuple[Ingredient, ...] = ()


def sign(source: str | os.PathLike, target: str | os.PathLike, claim: Claim, signer: Signer) -> None:
    """Writes a signed copy of an .mp4, .gif or .png file.

    Args:
        source: the file; it is only read.
        target: the copy; the caller names it and removes it if this fails. Its folder exists.
        claim: what it says.
        signer: who signs it.

    Raises:
        InputError: if an ingredient cannot be read, or signing or its time stamp fails.
    """
    import c2pa

    source, target = Path(source), Path(target)
    if os.path.exists(target) and os.path.samefile(source, target):
        raise InputError(f"cannot sign {source} in place: the signed copy needs a name of its own")
    failures: list[Exception] = []

    def call(data: bytes) -> bytes:
        try:
            return signer.sign(data)
        except Exception as error:  # c2pa would report it as an invalid signature
            failures.append(error)
            raise

    try:
        with open(source, "rb") as original, open(target, "w+b") as signed:
            manifest = _manifest(claim, boxes.left_out_sha256(original))
            original.seek(0)
            builder = c2pa.Builder(manifest, context=c2pa.Context.from_dict(_SIGNING))
            for number, path in enumerate(claim.ingredients):
                _add_ingredient(builder, number, Path(path))
            algorithm = c2pa.C2paSigningAlg[signer.algorithm.upper()]
            with c2pa.Signer.from_callback(call, algorithm, signer.chain, signer.timestamp_url) as native:
                builder.sign(native, _MIME[source.suffix.lower()], original, signed)
    except OSError as error:
        raise InputError(f"cannot sign {error.filename or target}: {error.strerror}") from error
    except c2pa.C2paError as error:
        if failures:
            reason = f"the signing key fails: {type(failures[0]).__name__}: {one_line(failures[0])}"
        elif signer.timestamp_url and "claim" not in str(error):
            reason = f"the time-stamp server {signer.timestamp_url} gives no time stamp: {one_line(error)}"
        else:
            reason = one_line(error)
        raise InputError(f"cannot sign {claim.title}: {reason}") from error


def verify_signed(path: str | os.PathLike, signer: Signer) -> Manifest:
    """Reads back a file that was just signed.

    Raises:
        InputError: unless its manifest is intact, fits this very file and is by this signer.
    """
    certificates = x509.load_pem_x509_certificates(signer.chain.encode())
    manifest = read_manifest(path, signer.anchor)
    if manifest.state != ("trusted" if signer.anchor else "valid"):
        raise InputError(f"{path} was signed, but does not verify: {'; '.join(manifest.problems) or manifest.state}")
    if manifest.serial_number != str(certificates[0].serial_number):
        raise InputError(f"{path} was signed, but with another certificate")
    return manifest


def read_manifest(path: str | os.PathLike, anchors: str = "") -> Manifest:
    """Reads and checks the C2PA manifest of any file.

    Args:
        path: the file.
        anchors: root certificates of the signers that are known, PEM.

    Raises:
        InputError: if there is no such file to read, or the anchors are no certificates. What is wrong with the
            content of a file is never raised but told in the result.
    """
    import c2pa

    settings = {"verify": _VERIFY} | ({"trust": {"user_anchors": anchors}} if anchors else {})
    try:
        if anchors:
            x509.load_pem_x509_certificates(anchors.encode())
        with open(path, "rb") as file:
            try:
                with c2pa.Reader(_format(path), file, context=c2pa.Context.from_dict(settings)) as reader:
                    report = json.loads(reader.json())
                    exact = json.loads(reader.crjson())
            except c2pa.C2paError.ManifestNotFound:
                return Manifest("none")
            except (c2pa.C2paError, ValueError) as error:
                return Manifest("unreadable", (_plain(error),))
            try:
                return _checked(report, _generation(report, exact), file)
            except (AttributeError, KeyError, TypeError, ValueError):  # signed by others, in a form of their own
                return Manifest("unreadable", ("its manifest does not have the form of the standard",))
    except ValueError as error:
        raise InputError("the anchors are no certificates in PEM; expected -----BEGIN CERTIFICATE-----") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _manifest(claim: Claim, left_out: str | None) -> dict[str, Any]:
    agent = {"name": "sora_jax", "version": claim.version}
    generation = asdict(claim) | {_LEFT_OUT: left_out}
    generation["ingredients"] = [
        {"title": Path(path).name, "sha256": hashlib.sha256(_bytes(path)).hexdigest()} for path in claim.ingredients
    ]
    if claim.prompt is None:
        del generation["prompt"]
    identifiers = [_identifier(number) for number in range(len(claim.ingredients))]
    made = {"digitalSourceType": _SOURCE_TYPE, "softwareAgent": agent}
    if identifiers:  # the standard wants what was edited to be opened first
        actions = [
            {"action": "c2pa.opened", "parameters": {"ingredientIds": identifiers[:1]}},
            {"action": "c2pa.edited", "parameters": {"ingredientIds": identifiers[1:]}, **made},
        ]
    else:
        actions = [{"action": "c2pa.created", **made}]
    return {
        "claim_generator_info": [agent],
        "title": claim.title,
        "assertions": [
            {"label": _ACTIONS, "data": {"actions": actions}},
            {"label": GENERATION, "kind": "Json", "data": generation},
        ],
    }


def _add_ingredient(builder: Any, number: int, path: Path) -> None:
    relationship = "inputTo" if number else "parentOf"
    entry = {"title": path.name, "relationship": relationship, "instance_id": _identifier(number)}
    with open(path, "rb") as file:
        builder.add_ingredient(entry, _format(path) or "application/octet-stream", file)


def _identifier(number: int) -> str:
    return f"ingredient-{number}"


def _bytes(path: str | os.PathLike) -> bytes:
    return Path(path).read_bytes()


def _format(path: str | os.PathLike) -> str | None:
    return mimetypes.guess_type(os.fspath(path))[0]


def _generation(report: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    # The plain report of c2pa shows lists of numbers as base64.
    active = next(one for one in exact["manifests"] if one["label"] == report["active_manifest"])
    return dict(active["assertions"].get(GENERATION, {}))


def _checked(report: dict[str, Any], generation: dict[str, Any], file: BinaryIO) -> Manifest:
    active = report["manifests"][report["active_manifest"]]
    assertions = [one for one in active.get("assertions", ()) if one["label"].startswith("c2pa.actions")]
    actions = [action for assertion in assertions for action in assertion["data"]["actions"]]
    certificate = active.get("signature_info") or {}
    state, problems = _state(report["validation_results"])
    if state in ("trusted", "valid", "rejected"):
        problem = _container_problem(file, generation)
        if problem:
            state, problems = "tampered", (*problems, problem)
    return Manifest(
        state,
        problems,
        identifier=_plain(report["active_manifest"]),
        title=_plain(active.get("title", "")),
        generator=", ".join(
            _plain(f"{info.get('name', '')} {info.get('version', '')}")
            for info in active.get("claim_generator_info", ())
        ),
        actions=tuple(_plain(action["action"]) for action in actions),
        source_types=tuple(_plain(a["digitalSourceType"]).split("/")[-1] for a in actions if "digitalSourceType" in a),
        generation=generation,
        signer=", ".join(_plain(certificate[part]) for part in ("common_name", "issuer") if certificate.get(part)),
        serial_number=_plain(certificate.get("cert_serial_number", "")),
        time=_plain(certificate.get("time", "")),
        ingredients=tuple(
            Ingredient(
                _plain(one.get("title", "")),
                _plain(one.get("relationship", "")),
                _state(one["validation_results"])[0] if "validation_results" in one else "none",
            )
            for one in active.get("ingredients", ())
        ),
    )


def _state(results: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The state of a manifest from its validation results, and what is wrong with it."""
    codes = results["activeManifest"]
    passed = {entry["code"] for entry in codes["success"]}
    failed = {entry["code"]: entry.get("explanation", "") for entry in codes["failure"]}
    problems = tuple(f"{_WORDS.get(code) or _plain(words)} ({_plain(code)})" for code, words in failed.items())
    intact = "claimSignature.validated" in passed and passed & set(_BOUND)
    if not intact or not all(code.startswith(_CREDENTIAL) for code in failed):
        return "tampered", problems
    if not failed:
        return ("trusted" if "signingCredential.trusted" in passed else "valid"), ()
    return ("valid" if set(failed) == {"signingCredential.untrusted"} else "rejected"), problems


def _container_problem(file: BinaryIO, generation: Mapping[str, Any]) -> str | None:
    if _LEFT_OUT in generation:
        return None if generation[_LEFT_OUT] == boxes.left_out_sha256(file) else f"{_WORDS[GENERATION]} ({GENERATION})"
    return boxes.header_problem(file)


def _plain(text: Any) -> str:
    """Another's words without the control characters that could steer a terminal, at most 300 letters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))[:300].strip()
