"""Reads what a file's C2PA manifest says, and whether to believe it.

A manifest proves that a file is as its signer left it, and what the signer says of it. It can be taken off any file, so
that a file without one proves nothing.
"""

from __future__ import annotations

import json
import mimetypes
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from cryptography import x509
from cryptography.x509.oid import NameOID

from sora_jax.errors import InputError
from sora_jax.safety import boxes

GENERATION = "org.sora-jax.generation"
LEFT_OUT = "left_out_boxes_sha256"  # in our assertion: the digest of the boxes that the C2PA hash leaves out
# Source types (IPTC) of what a generative model made, and of what it made in part.
BY_MODEL, PARTLY_BY_MODEL = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
OFFLINE = {"remote_manifest_fetch": False, "ocsp_fetch": False}  # to read a file is to contact nobody
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
_BEGINNINGS = {  # of files that can hold a manifest, whatever their names say
    rb"\x89PNG\r\n\x1a\n": "image/png",
    rb"GIF8[79]a": "image/gif",
    rb"\xff\xd8\xff": "image/jpeg",
    rb"RIFF....WEBP": "image/webp",
    rb"RIFF....AVI ": "video/avi",
    rb"RIFF....WAVE": "audio/wav",
    rb"II\*\0|MM\0\*": "image/tiff",
}
_BRANDS = {b"qt  ": "video/quicktime", b"avif": "image/avif", b"heic": "image/heic", b"mif1": "image/heif"}
_TOO_SHORT = "it ends too soon, or is not what its name says"
_EXTRA = ".additionalExclusionsPresent"
LEFT_OUT_TOO = "the signer left out more of the file than C2PA does, and there it may have been changed"
_CREDENTIAL = ("signingCredential.", "claimSignature.outsideValidity", "timeStamp.")
_BOUND = ("assertion.dataHash.match", "assertion.bmffHash.match", "assertion.boxesHash.match")


@dataclass(frozen=True)
class Ingredient:
    """A file that went into another, and what its own manifest says.

    Attributes:
        title: its name.
        relationship: what it was used for.
        state: of its manifest, see `Manifest`, as whoever signed the other file found it: it cannot be checked again
            without this one.
        by_model: whether that says that a generative model made it, or made what it is a copy or an edit of; if only
            in part.
    """

    title: str
    relationship: str
    state: str
    by_model: bool = False


@dataclass(frozen=True)
class Manifest:
    """What reading a file found. Everything but `state` and `problems` is what the signer says, and no proof of it.

    Attributes:
        state: trusted (intact, and the signer's certificate leads to an anchor), valid (intact, signer unknown),
            rejected (intact, but the certificate is expired or not for this, or more of the file is left out than C2PA
            does), tampered, none (no manifest: taken off or
            never there), unreadable (the file or its manifest cannot be read).
        problems: what is wrong or, in an intact file, weakens the proof; in plain words with the code of the C2PA
            standard.
        identifier: URN of the manifest.
        title: name of the file when it was signed.
        generator: program that wrote the claim, with its version.
        actions: such as c2pa.created.
        source_types: last part of the IPTC digital source type of actions, such as trainedAlgorithmicMedia.
        generation: our own assertion, empty in files by others; its strings are as they were signed, not made safe
            for a terminal.
        signer: common name and organization in the certificate.
        issuer: common name and organization of who issued it.
        time: of a time stamp that fits the signature (ISO 8601), or "".
        time_is_trusted: whether the certificate of the time-stamp server leads to an anchor.
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
    issuer: str = ""
    serial_number: str = ""
    time: str = ""
    time_is_trusted: bool = False
    ingredients: tuple[Ingredient, ...] = ()


def read_manifest(path: str | os.PathLike, anchors: str = "") -> Manifest:
    """Reads and checks the C2PA manifest of any file.

    Args:
        path: the file.
        anchors: root certificates of the signers that are known, PEM.

    Raises:
        InputError: if there is no such file to read, or the anchors are no certificates. What is wrong with the
            content of a file is never raised but told in the result.
    """
    settings = {"verify": OFFLINE}
    if anchors:
        settings["trust"] = {"user_anchors": anchors}
        try:
            x509.load_pem_x509_certificates(anchors.encode())
        except ValueError:
            raise InputError("the anchors are no certificates in PEM; expected -----BEGIN CERTIFICATE-----") from None
    if os.path.exists(path) and not os.path.isfile(path):  # a device may never end
        raise InputError(f"cannot read {path}: it is no file")
    try:
        with open(path, "rb") as file:
            return _read(file, media_type(path), settings)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def media_type(path: str | os.PathLike, data: bytes = b"") -> str | None:
    """The MIME type of a file: of what it begins with, if that is known, else what its name stands for."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "video/mp4")
    for begins, kind in _BEGINNINGS.items():
        if re.match(begins, data, re.DOTALL):
            return kind
    return mimetypes.guess_type(os.fspath(path))[0]


def _read(file: BinaryIO, kind: str | None, settings: dict[str, Any]) -> Manifest:
    import c2pa

    try:
        with c2pa.Reader(kind, file, context=c2pa.Context.from_dict(settings)) as reader:
            report, exact = json.loads(reader.json()), json.loads(reader.crjson())
    except c2pa.C2paError.NotSupported:
        return Manifest(
            "unreadable", ("a manifest cannot be in a file of this kind; it can be in .mp4, .gif, .png, .jpg",)
        )
    except c2pa.C2paError.ManifestNotFound:
        return Manifest("none")
    except (c2pa.C2paError, ValueError) as error:
        words = plain(error)
        if "failed to fill whole buffer" in words:
            words = f"{_TOO_SHORT} ({words})"
        elif words.startswith("Remote"):
            words = f"it is kept at another place, and nobody is contacted here ({words})"
        return Manifest("unreadable", (words,))
    try:
        return _checked(report, _active(exact, report["active_manifest"]), file)
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError):  # by others, in a form of their own
        return Manifest("unreadable", ("its manifest does not have the form of the standard",))


def _active(exact: dict[str, Any], label: str) -> dict[str, Any]:
    """The active manifest in c2pa's other report: the plain one shows lists of numbers as base64, and no issuer."""
    return next(one for one in exact["manifests"] if one["label"] == label)


def _checked(report: dict[str, Any], exact: dict[str, Any], file: BinaryIO) -> Manifest:
    generation = dict(exact["assertions"].get(GENERATION, {}))
    issuer = exact.get("signature", {}).get("certificateInfo", {}).get("issuer", {})
    active = report["manifests"][report["active_manifest"]]
    actions = _actions(active)
    certificate = active.get("signature_info") or {}
    state, problems = _state(report["validation_results"])
    own = f"{report['active_manifest']}/c2pa.signature"  # stamps of ingredients are listed here too
    passed = {
        entry["code"] for entry in report["validation_results"]["activeManifest"]["success"] if own in entry["url"]
    }
    if state in ("trusted", "valid", "rejected"):
        problem = _container_problem(file, generation)
        if problem:
            state, problems = "tampered", (*problems, problem)
    return Manifest(
        state,
        problems,
        identifier=plain(report["active_manifest"]),
        title=plain(active.get("title", "")),
        generator=", ".join(
            plain(f"{info.get('name', '')} {info.get('version', '')}")
            for info in active.get("claim_generator_info", ())
        ),
        actions=tuple(plain(action["action"]) for action in actions),
        source_types=_source_types(actions),
        generation=generation,
        signer=", ".join(plain(certificate[part]) for part in ("common_name", "issuer") if certificate.get(part)),
        issuer=", ".join(plain(issuer[part]) for part in ("CN", "O") if issuer.get(part)),
        serial_number=plain(certificate.get("cert_serial_number", "")),
        time=plain(certificate.get("time", "")),
        time_is_trusted="timeStamp.trusted" in passed,
        ingredients=tuple(
            Ingredient(
                plain(one.get("title", "")),
                plain(one.get("relationship", "")),
                _ingredient_state(one),
                _by_model(report["manifests"], one.get("active_manifest")),
            )
            for one in active.get("ingredients", ())
        ),
    )


def _actions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    assertions = [one for one in manifest.get("assertions", ()) if one["label"].startswith("c2pa.actions")]
    return [action for assertion in assertions for action in assertion["data"]["actions"]]


def _source_types(actions: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(plain(one["digitalSourceType"]).split("/")[-1] for one in actions if "digitalSourceType" in one)


def _by_model(manifests: dict[str, Any], label: str | None) -> bool:
    """Whether a manifest says that a generative model made its file, or that of its parent, and so on."""
    seen: set[str | None] = set()
    while label in manifests and label not in seen:
        seen.add(label)
        if {BY_MODEL, PARTLY_BY_MODEL} & {*_source_types(_actions(manifests[label]))}:
            return True
        parents = [one for one in manifests[label].get("ingredients", ()) if one.get("relationship") == "parentOf"]
        label = parents[0].get("active_manifest") if parents else None
    return False


def _state(results: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The state of a manifest from its validation results, and what is wrong with it."""
    codes = results["activeManifest"]
    passed = {entry["code"] for entry in codes["success"]}
    failed = {entry["code"]: entry.get("explanation", "") for entry in codes["failure"]}
    left_out = {entry["code"]: LEFT_OUT_TOO for entry in codes["informational"] if entry["code"].endswith(_EXTRA)}
    words = {code: _WORDS.get(code) or plain(explanation) for code, explanation in failed.items()} | left_out
    problems = tuple(f"{text} ({plain(code)})" for code, text in words.items())
    intact = "claimSignature.validated" in passed and passed & set(_BOUND)
    if not intact or not all(code.startswith(_CREDENTIAL) for code in failed):
        return "tampered", problems
    # Of mp4 files the C2PA library itself leaves out free boxes; of others that may be the pictures.
    if any(not code.startswith("assertion.bmffHash") for code in left_out):
        return "rejected", problems
    if not failed:
        return ("trusted" if "signingCredential.trusted" in passed else "valid"), problems
    return ("valid" if set(failed) == {"signingCredential.untrusted"} else "rejected"), problems


def _ingredient_state(ingredient: dict[str, Any]) -> str:
    if "active_manifest" in ingredient:
        return _state(ingredient["validation_results"])[0]
    return "unreadable" if "validation_results" in ingredient else "none"


def _container_problem(file: BinaryIO, generation: Mapping[str, Any]) -> str | None:
    if LEFT_OUT in generation:
        return None if generation[LEFT_OUT] == boxes.left_out_sha256(file) else f"{_WORDS[GENERATION]} ({GENERATION})"
    return boxes.header_problem(file)


def signer_name(name: x509.Name) -> str:
    """A name in a certificate as `Manifest` has it: common name and organization."""
    parts = [name.get_attributes_for_oid(oid) for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)]
    return ", ".join(plain(found[0].value) for found in parts if found)


def plain(text: Any) -> str:
    """Another's words without the control characters that could steer a terminal, at most 300 letters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))[:300].strip()
