"""Provenance: what a file says about itself, signed with C2PA."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509

import sora_jax
from sora_jax.errors import InputError, NoTimeStamp, one_line
from sora_jax.safety import boxes
from sora_jax.safety.keys import Signer
from sora_jax.safety.manifest import (
    BY_MODEL,
    GENERATION,
    LEFT_OUT,
    OFFLINE,
    PARTLY_BY_MODEL,
    Manifest,
    media_type,
    read_manifest,
)

_ACTIONS = "c2pa.actions.v2"
_SOURCE_TYPES = {
    origin: f"http://cv.iptc.org/newscodes/digitalsourcetype/{name}"
    for origin, name in {"model": BY_MODEL, "partly model": PARTLY_BY_MODEL}.items()
}
# c2pa.created must have a type, and every other one says how the frames came about. This one says that the file was
# begun empty, which is so; c2pa.unknown then says that something happened which cannot be named here.
_EMPTY = "http://c2pa.org/digitalsourcetype/empty"
_SIGNING = {
    "builder": {
        "thumbnail": {"enabled": False},
        "created_assertion_labels": [_ACTIONS, GENERATION],
        "bmff_hash_exclude_free_and_skip_boxes": False,
        "ignore_ingredient_errors": True,
    },
    "verify": OFFLINE,
}
_PATIENCE = 10  # seconds
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="  # a PNG file


@dataclass(frozen=True)
class Source:
    """A file that something was made from, as it was when it was read.

    Attributes:
        title: what it is, such as "image.png".
        data: all of it.
    """

    title: str
    data: bytes = field(repr=False)

    @classmethod
    def read(cls, path: str | os.PathLike, name: str) -> Source:
        """The file at `path`, titled `name` with its ending: its own name may be a prompt, or tell of somebody.

        Raises:
            InputError: it cannot be read.
        """
        path = Path(path)
        if path.exists() and not path.is_file():  # a device may never end
            raise InputError(f"cannot read {path}: it is no file")
        try:
            return cls(f"{name}{path.suffix.lower()}", path.read_bytes())
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error


@dataclass(frozen=True)
class Claim:
    """What a file says about itself; what is not known stays empty.

    Attributes:
        origin: where its frames come from: "model" if a generative model made them, "partly model" if other pictures
            are on them too, "file" if they are those of the first ingredient, encoded anew.
        title: what kind of file it is, such as "video.mp4": its own name may be made from the prompt.
        model, weights_sha256: the model's name and the digest of its weights, hexadecimal.
        config: what was asked for: frames, size, solver and what else decided how it was sampled, as JSON has it.
        prompt_sha256: digest of the prompt in UTF-8, hexadecimal.
        seed: of the noise.
        prompt: the prompt itself, only if it shall be in the file.
        mesh: the device mesh, as the command line writes it.
        version: of this program.
        checks: what was checked before the file was released, as JSON has it.
        ingredients: what it was made from; the file is then an edit of the first.
        frames_sha256: digest of the frames that the model made, hexadecimal: of others nothing is said of a model.
    """

    origin: str = ""
    title: str = ""
    model: str = ""
    weights_sha256: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    prompt_sha256: str = ""
    seed: int | None = None
    prompt: str | None = None
    mesh: str = ""
    version: str = sora_jax.__version__
    checks: Mapping[str, Any] = field(default_factory=dict)
    ingredients: tuple[Source, ...] = ()
    frames_sha256: str = ""


def frames_digest(frames_THWC: np.ndarray) -> str:
    """SHA-256 of the shape and the bytes of frames, hexadecimal, as `Claim.frames_sha256` has it."""
    digest = hashlib.sha256(str(frames_THWC.shape).encode())
    digest.update(np.ravel(frames_THWC))
    return digest.hexdigest()


def together(claims: Sequence[Claim]) -> Claim:
    """What a picture of several videos says: what all of them say alike, and the prompt's digest and seed of each."""
    first, *others = claims
    alike = {
        name: getattr(first, name)
        for name in ("origin", "model", "weights_sha256", "mesh", "version", "checks")
        if all(getattr(one, name) == getattr(first, name) for one in others)
    }
    config = {
        name: value for name, value in first.config.items() if all(one.config.get(name) == value for one in others)
    }
    each = {"prompts_sha256": [one.prompt_sha256 for one in claims], "seeds": [one.seed for one in claims]}
    ingredients = dict.fromkeys(source for one in claims for source in one.ingredients)
    return Claim(**alike, config=config | each, ingredients=tuple(ingredients))


def sign(data: bytes, ending: str, claim: Claim, signer: Signer) -> bytes:
    """A signed copy of an .mp4, .gif or .png file.

    Args:
        data: the file.
        ending: of its name.
        claim: what it says.
        signer: who signs it.

    Raises:
        NoTimeStamp: the time-stamp server gives none.
        InputError: signing fails.
    """
    import c2pa

    failures: list[Exception] = []

    def call(data: bytes) -> bytes:
        try:
            return signer.sign(data)
        except Exception as error:  # c2pa would report it as an invalid signature
            failures.append(error)
            raise

    original, signed = io.BytesIO(data), io.BytesIO()
    manifest = _manifest(claim, boxes.left_out_sha256(original))
    original.seek(0)
    try:
        builder = c2pa.Builder(manifest, context=c2pa.Context.from_dict(_SIGNING))
        for number, ingredient in enumerate(claim.ingredients):
            _add_ingredient(builder, number, ingredient)
        algorithm = c2pa.C2paSigningAlg[signer.algorithm.upper()]
        with c2pa.Signer.from_callback(call, algorithm, signer.chain, signer.timestamp_url) as native:
            builder.sign(native, media_type(f"file{ending}"), original, signed)
    except c2pa.C2paError as error:
        reason = one_line(re.sub(r"//[^/\s]*@", "//", str(error)))  # without the time-stamp server's password
        if signer.timestamp_url and not failures and isinstance(error, c2pa.C2paError.Signature):
            raise NoTimeStamp(f"the time-stamp server {_server(signer)} gives no time stamp: {reason}") from error
        if failures:
            reason = f"the signing key fails: {type(failures[0]).__name__}: {one_line(failures[0])}"
        raise InputError(f"cannot sign {claim.title}: {reason}") from error
    return signed.getvalue()


def sign_patiently(data: bytes, ending: str, claim: Claim, signer: Signer) -> bytes:
    """The same, but what cost minutes to make is not given up at once: a server that gives no stamp is asked again.

    It is after 1, 2 and 4 seconds, but not later than `_PATIENCE` seconds after the first time: one that is silent for
    longer is asked once.
    """
    end, pause = time.monotonic() + _PATIENCE, 1
    while True:
        try:
            return sign(data, ending, claim, signer)
        except NoTimeStamp:
            if time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        pause *= 2


def _server(signer: Signer) -> str:
    """The address of its time-stamp server, without a password."""
    return (signer.timestamp_url or "").rpartition("@")[2]


def rehearse(signer: Signer) -> None:
    """Signs one grey pixel and reads it back, so that nothing is generated which cannot be signed.

    Finds what `load_signer` cannot: a C2PA library that does not work, a time-stamp server that gives none (one that is
    silent for 30 seconds counts as such), a signing service that fails, a certificate that the library takes amiss.

    Raises:
        InputError: if signing or reading back fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "signed.png")
        path.write_bytes(sign(base64.b64decode(_PIXEL), ".png", Claim(title="a first pixel"), signer))
        verify_signed(path, signer)


def verify_signed(path: str | os.PathLike, signer: Signer) -> Manifest:
    """Reads back a file that was just signed.

    Raises:
        InputError: unless its manifest is intact, fits this very file and is by this signer.
        NoTimeStamp: it was to have a time stamp, and has none that fits.
    """
    certificates = x509.load_pem_x509_certificates(signer.chain.encode())
    manifest = read_manifest(path, signer.anchor)
    if manifest.state != ("trusted" if signer.anchor else "valid"):
        raise InputError(f"{path} was signed, but does not verify: {'; '.join(manifest.problems) or manifest.state}")
    if manifest.serial_number != str(certificates[0].serial_number):
        raise InputError(f"{path} was signed, but with another certificate")
    if signer.timestamp_url and not manifest.time:
        raise NoTimeStamp(f"the time stamp of the server {_server(signer)} does not fit the signature")
    return manifest


def _manifest(claim: Claim, left_out: str | None) -> dict[str, Any]:
    agent = {"name": "sora_jax", "version": claim.version}
    used = [{"title": one.title, "sha256": hashlib.sha256(one.data).hexdigest()} for one in claim.ingredients]
    generation = asdict(replace(claim, ingredients=())) | {"ingredients": used, LEFT_OUT: left_out}
    if claim.prompt is None:
        del generation["prompt"]
    marked = [{"action": "c2pa.watermarked.unbound"}] if "mark" in claim.checks else []  # C2PA 2.3: no soft binding
    identifiers = [_identifier(number) for number in range(len(claim.ingredients))]
    # The standard wants what was edited to be opened first.
    opened = [{"action": "c2pa.opened", "parameters": {"ingredientIds": identifiers[:1]}}] if identifiers else []
    if claim.origin in _SOURCE_TYPES:
        made = {"action": "c2pa.created", "digitalSourceType": _SOURCE_TYPES[claim.origin], "softwareAgent": agent}
        if opened:
            made |= {"action": "c2pa.edited", "parameters": {"ingredientIds": identifiers[1:]}}
        actions = [*opened, made, *[one | {"softwareAgent": agent} for one in marked]]
    else:
        done = "c2pa.transcoded" if claim.origin == "file" else "c2pa.unknown"
        created = {"action": "c2pa.created", "digitalSourceType": _EMPTY}
        actions = [*(opened or [created]), {"action": done}, *marked]
        actions = [one | {"softwareAgent": agent} for one in actions]
    return {
        "claim_generator_info": [agent],
        "title": claim.title,
        "assertions": [
            {"label": _ACTIONS, "data": {"actions": actions}},
            {"label": GENERATION, "kind": "Json", "data": generation},
        ],
    }


def _add_ingredient(builder: Any, number: int, source: Source) -> None:
    relationship = "inputTo" if number else "parentOf"
    entry = {"title": source.title, "relationship": relationship, "instance_id": _identifier(number)}
    builder.add_ingredient(
        entry, media_type(source.title, source.data) or "application/octet-stream", io.BytesIO(source.data)
    )


def _identifier(number: int) -> str:
    return f"ingredient-{number}"
