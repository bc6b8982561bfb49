"""The parts of an MP4 file that its C2PA hash leaves out, and what is wrong with them.

The hash of an ISO base media file covers every top-level box and its place, but for some (C2PA 2.2, 9.2.2 and A.5.4):
`ftyp`, `mfra`, the box with the manifest, and, where the signer chose so, `free` and `skip`. That is more than it
seems. A player finds out what a file is from its first bytes, and `ftyp` may name JPEG 2000 and then hold a whole other
stream, in the room that the padding of the signature gives up. Readers of C2PA call such a file intact, and FFmpeg
plays the other stream. So these boxes are hashed once more and the digest is signed with the claim; of files by others,
whose claims hold no such digest, `ftyp` has to look like one.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_LEFT_OUT = (b"ftyp", b"free", b"skip", b"mfra")
_C2PA_UUID = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
# FFmpeg takes a file whose ftyp has one of these for something else if anything else fits; a true file of these kinds
# does not begin with ftyp.
_OTHER_KINDS = (b"jp2 ", b"jpx ", b"jpm ", b"mjp2", b"jxl ")
_LONGEST_FTYP = 256  # 60 brands


@dataclass(frozen=True)
class Box:
    """A top-level box: its four-letter type, the bytes it takes, and whether it holds a C2PA manifest."""

    kind: bytes
    start: int
    size: int
    c2pa: bool


def is_iso_media(file: BinaryIO) -> bool:
    """Whether a file begins like an ISO base media file (MP4, MOV, HEIF, AVIF)."""
    file.seek(0)
    return file.read(8)[4:] == b"ftyp"


def left_out_sha256(file: BinaryIO) -> str | None:
    """SHA-256, hexadecimal, of the boxes that the C2PA hash may leave out, in their order; None if it is no such file.

    The first box with a manifest is not among them, others are.
    """
    if not is_iso_media(file):
        return None
    digest, manifests = hashlib.sha256(), 0
    for box in _boxes(file):
        manifests += box.c2pa
        if box.kind in _LEFT_OUT or (box.c2pa and manifests > 1):
            file.seek(box.start)
            for start in range(0, box.size, 1 << 20):
                digest.update(file.read(min(1 << 20, box.size - start)))
    return digest.hexdigest()


def header_problem(file: BinaryIO) -> str | None:
    """Why a player may take an ISO base media file for another kind of file, or None."""
    if not is_iso_media(file):
        return None
    headers = [box for box in _boxes(file) if box.kind == b"ftyp"]
    if len(headers) > 1:
        return "it has more than one file type box"
    file.seek(8)
    data = file.read(min(headers[0].size, _LONGEST_FTYP + 1) - 8)
    brands = [data[:4], *(data[n : n + 4] for n in range(8, len(data), 4))]
    if headers[0].size > _LONGEST_FTYP or not all(len(b) == 4 and b.isascii() for b in brands):
        return "its file type box holds more than the names of file types"
    if brands[0] in _OTHER_KINDS:
        return "its file type box names another kind of file"
    return None


def _boxes(file: BinaryIO) -> Iterator[Box]:
    end = file.seek(0, os.SEEK_END)
    start = 0
    while start + 8 <= end:
        file.seek(start)
        header = file.read(32)
        size, kind = struct.unpack(">I4s", header[:8])
        body = 8
        if size == 1 and len(header) >= 16:
            (size,) = struct.unpack(">Q", header[8:16])
            body = 16
        if size == 0 or start + size > end:
            size = end - start
        size = max(size, body)  # a size that is none must not stop the walk
        yield Box(kind, start, size, kind == b"uuid" and header[body : body + 16] == _C2PA_UUID)
        start += size
