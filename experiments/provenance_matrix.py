"""What reading a signed file says after each kind of change, and whether the change touches a pixel.

    python experiments/provenance_matrix.py [--out FILE]

Writes a table in Markdown. It fails if any file whose pixels or times changed still counts as trusted or valid.
Keys and files are made in a temporary folder.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import tampering
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from sora_jax import media
from sora_jax.safety import certificates
from sora_jax.safety.keys import Signer, load_signer
from sora_jax.safety.manifest import read_manifest
from sora_jax.safety.provenance import Claim, sign

FORMATS = ("mp4", "gif", "png")
INTACT = ("trusted", "valid")


@dataclass(frozen=True)
class Row:
    """One kind of change to files of one format, tried one or more times."""

    format: str
    change: str
    states: Counter
    pixels: Counter
    problem: str


def make_signed(folder: Path, format: str, signer: Signer, seed: int = 0) -> Path:
    """A small signed file of noise: 5 frames (png: 1) of 32x32."""
    frames = np.random.default_rng(seed).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    plain = media.encode(frames[:1] if format == "png" else frames, 8, f".{format}")
    target = folder / f"signed-{seed}.{format}"
    claim = Claim("model", target.name, "bundled", "00" * 32, {"steps": 30, "size": [32, 32]}, "11" * 32, 7)
    target.write_bytes(sign(plain, f".{format}", claim, signer))
    return target


def with_certificate(folder: Path, format: str, problem: str) -> tuple[Path, str, str]:
    """A signed file whose signature is right but whose certificate is not, the root certificate it names, and `pixels`.

    Nobody signs with such a certificate: both it and a new signature take the place of good ones of the same length.

    Args:
        problem: "expired", "usage", "purpose" or "chain".
    """
    root_key, other_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root, leaf = (certificates.name(f"{part} for {problem}", "Example") for part in ("root", "signer"))
    start, end = (datetime.now(UTC) + timedelta(days=days) for days in (-2, 2))
    wanted = {"issuer": root, "issuer_key": root_key, "start": start, "end": end}
    change = {
        "expired": {"end": datetime.now(UTC) - timedelta(days=1)},
        "usage": {"usage": "key_agreement"},
        "purpose": {"uses": (ExtendedKeyUsageOID.SERVER_AUTH,)},
        "chain": {"issuer_key": other_key},
    }[problem]
    anchor = certificates.issue(root, root_key.public_key(), root, root_key, start, end, True, "key_cert_sign", ())
    good = certificates.issue(leaf, key.public_key(), **wanted)
    old, new = good.public_bytes(Encoding.DER), b""
    while len(new) != len(old):  # lengths of signatures vary
        new = certificates.issue(leaf, key.public_key(), **wanted | change).public_bytes(Encoding.DER)
    signed, signatures = [], []

    def call(data: bytes) -> bytes:
        signed.append(data)
        signatures.append(_ecdsa(key, data))
        return signatures[-1]

    path = make_signed(folder, format, Signer(certificates.pem([good, anchor]), "es256", call))

    def exchange(store: bytes) -> bytes:
        assert signatures[-1] in store and old in store
        return store.replace(signatures[-1], _ecdsa(key, signed[-1].replace(old, new))).replace(old, new)

    before = tampering.look(path)
    path.write_bytes(tampering.with_store(path.read_bytes(), format, exchange))
    return path, certificates.pem([anchor]), tampering.pixels(path, before)


def _ecdsa(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    numbers = utils.decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return b"".join(number.to_bytes(32, "big") for number in numbers)


def rows(folder: Path, formats: tuple[str, ...] = FORMATS, flips: int = 12) -> Iterator[Row]:
    """Every change to every format.

    Args:
        folder: where files are made.
        flips: bytes that are flipped in each region, spread evenly.
    """
    signer = load_signer()
    for format in formats:
        yield from _format_rows(folder, format, signer, flips)
        yield from _certificate_rows(folder, format)


def _format_rows(folder: Path, format: str, signer: Signer, flips: int) -> Iterator[Row]:
    path = make_signed(folder, format, signer)
    data, before, target = path.read_bytes(), tampering.look(path), folder / f"changed.{format}"
    parts = tampering.regions(data, format)

    def tried(change: str, *variants: bytes, anchor: str = signer.anchor) -> Row:
        states, seen, problems = Counter(), Counter(), []
        for variant in variants:
            target.write_bytes(variant)
            manifest, now = read_manifest(target, anchor), tampering.pixels(target, before)
            if manifest.state in INTACT and now != "same":
                raise AssertionError(f"{format}, {change}: {manifest.state}, but the pixels are {now}")
            states[manifest.state] += 1
            seen[now] += 1
            problems += manifest.problems
        return Row(format, change, states, seen, problems[-1] if problems else "")

    yield tried("none", data)
    yield tried("none, and the signer is not known", data, anchor="")
    for name, start, end in parts:
        places = np.unique(np.linspace(start, end - 1, flips).astype(int))
        yield tried(f"flipped: {name}", *(tampering.flip(data, place) for place in places))
    cuts = [len(data) - 1, len(data) // 2, parts[-1][1] - 1, 40]
    yield tried("cut off: last byte, half, last part, nearly all", *(data[:cut] for cut in cuts))
    for change, variant in tampering.additions(data, format):
        yield tried(change, variant)
    edited = tampering.with_store(data, format, lambda store: store.replace(b'"seed":7', b'"seed":8'))
    yield tried("assertion edited: another seed", edited)
    yield tried("forged: other pictures in the room of the signature's padding", tampering.forged(data, format, folder))
    other = make_signed(folder, format, signer, seed=1).read_bytes()
    yield tried("manifest of another file", tampering.transplanted(data, other, format))
    yield tried("remuxed", tampering.remuxed(data, format))
    if format != "mp4":
        yield tried("cut into other blocks around the manifest", tampering.remuxed(data, format, keep=True))
    yield tried("encoded again", media.encode(*media.read(path), f".{format}"))


def _certificate_rows(folder: Path, format: str) -> Iterator[Row]:
    for problem, change in {
        "expired": "certificate: expired, no time stamp",
        "usage": "certificate: key usage is not digitalSignature",
        "purpose": "certificate: for web servers",
        "chain": "certificate: not issued by the root it names",
    }.items():
        path, anchor, seen = with_certificate(folder, format, problem)
        manifest = read_manifest(path, anchor)
        yield Row(format, change, Counter([manifest.state]), Counter([seen]), "; ".join(manifest.problems))


HEAD = """# What reading a signed file says after a change

Written by `python experiments/provenance_matrix.py --out docs/provenance.md`. Trusted and valid are intact, by a signer
known here or not; rejected has a bad certificate or leaves parts out; tampered was changed; none has no manifest.
Numbers count what was tried, such as single bytes. "Pixels" says whether a player shows the same frames, other ones,
or none.
Where a flipped byte leaves a file trusted, it is in the empty room that C2PA keeps beside a signature.

What a model made says so (`trainedAlgorithmicMedia`). What it did not make says only what is known: a video that was
read from a file and saved again was opened, encoded anew and marked, with the file's own manifest within its own;
frames of unknown origin were put into an empty file.

"""


def table(found: Iterator[Row]) -> str:
    """Rows as a table in Markdown."""

    def count(counter: Counter) -> str:
        return ", ".join(name if counter.total() == 1 else f"{name} {n}" for name, n in counter.most_common())

    lines = ["| format | change | reading says | pixels | why |", "|---|---|---|---|---|"]
    lines += [f"| {r.format} | {r.change} | {count(r.states)} | {count(r.pixels)} | {r.problem} |" for r in found]
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="file for the table (default: print it)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CONFIG_HOME"] = folder
        text = table(rows(Path(folder)))
    if options.out:
        Path(options.out).write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
