"""Ways to change a signed file: its parts, what can be added to it, and forgeries that keep all that is signed.

Bytes go in and come out; `look` and `pixels` tell what a player shows before and after.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np

from sora_jax import media

MANIFESTS = {"mp4": "uuid", "gif": "C2PA_GIF", "png": "caBX"}
_PIECE = 100  # bytes: of coded pictures that are cut anew
_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts")


def look(path: Path) -> list[tuple]:
    """Times and pixels of the frames that a player would show, up to where it fails."""
    frames = []
    try:
        with open(path, "rb") as file, av.open(file, **media.ANY_NOTES) as container:
            if (decoder := container.streams.video[0].codec_context) is not None:
                decoder.thread_count = 1  # to start threads takes longer than to decode
            for frame in container.decode(video=0):
                seen = None if frame.pts is None else float(frame.pts * frame.time_base)
                frames.append((seen, frame.to_ndarray(format="rgb24").tobytes()))
    except (av.error.FFmpegError, OSError, ValueError, IndexError):
        pass
    return frames


def pixels(path: Path, before: list[tuple]) -> str:
    """Whether the frames of a file are the "same" as before, "changed", or none is left."""
    after = look(path)
    return "same" if after == before else "changed" if after else "none"


def regions(data: bytes, format: str) -> list[tuple[str, int, int]]:
    """Name, start and end of every part of a file: boxes, chunks, blocks."""
    return {"mp4": _boxes, "gif": _blocks, "png": _chunks}[format](data)


def _boxes(data: bytes, start: int = 0, end: int | None = None, prefix: str = "") -> list[tuple[str, int, int]]:
    found, end = [], len(data) if end is None else end
    while start < end:
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        name = prefix + kind.decode("latin1")
        if kind in _CONTAINERS:
            found += [(f"{name} (header)", start, start + 8), *_boxes(data, start + 8, start + size, f"{name}/")]
        else:
            found.append((name, start, start + size))
        start += size
    return found


def _chunks(data: bytes) -> list[tuple[str, int, int]]:
    found, start = [("signature", 0, 8)], 8
    while start < len(data):
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        found.append((kind.decode("latin1"), start, start + size + 12))
        start += size + 12
    return found


def _blocks(data: bytes) -> list[tuple[str, int, int]]:
    palette = 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0
    found, start = [("header", 0, 6), ("screen", 6, 13), ("palette", 13, 13 + palette)], 13 + palette
    while data[start] != 0x3B:
        at = start
        if data[at] == 0x21:
            name = {0xF9: "control", 0xFE: "comment"}.get(data[at + 1]) or data[at + 3 : at + 11].decode("latin1")
            at += 2
        else:
            name, at = "image", at + 10 + (3 << (data[at + 9] & 7) + 1 if data[at + 9] & 0x80 else 0) + 1
        while data[at]:
            at += data[at] + 1
        found.append((name, start, at + 1))
        start = at + 1
    return [*found, ("trailer", start, len(data))]


def box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def sub_blocks(body: bytes, size: int = 255) -> bytes:
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\0"


def additions(data: bytes, format: str) -> Iterator[tuple[str, bytes]]:
    """Files with something added."""
    parts = regions(data, format)
    yield "appended: 100 bytes of noise", data + np.random.default_rng(1).bytes(100)
    yield "appended: the file once more", data + data
    if format == "mp4":
        yield from ((f"appended: {kind.decode()} box", data + box(kind, bytes(64))) for kind in (b"free", b"skip"))
        yield from (
            (f"appended: {kind.decode()} box", data + box(kind, bytes(64)))
            for kind in (b"mfra", b"uuid", b"mdat", b"moof", b"wide", b"ftyp")
        )
        yield "appended: second manifest", data + _part(data, parts, "uuid")
        moov = next(start for name, start, _ in parts if name.startswith("moov"))
        yield "inserted: free box before moov", data[:moov] + box(b"free") + data[moov:]
        for brand in (b"qt  ", b"jp2 ", b"avif"):
            yield f"main brand in ftyp now '{brand.decode()}'", data[:8] + brand + data[12:]
    elif format == "png":
        image = next(start for name, start, _ in parts if name == "IDAT")
        yield "inserted: text chunk", data[:image] + chunk(b"tEXt", b"Comment\0none") + data[image:]
        yield "inserted: gamma chunk", data[:image] + chunk(b"gAMA", struct.pack(">I", 20000)) + data[image:]
        yield "inserted: second image data", data[:image] + _part(data, parts, "IDAT") + data[image:]
        yield "inserted: second manifest", data[:image] + _part(data, parts, "caBX") + data[image:]
    else:
        image = next(start for name, start, _ in parts if name == "image")
        yield "inserted: comment", data[:image] + b"\x21\xfe" + sub_blocks(b"none") + data[image:]
        yield "inserted: image once more", data[:image] + _part(data, parts, "image") + data[image:]
        yield "inserted: second manifest", data[:image] + _part(data, parts, "C2PA_GIF") + data[image:]


def _part(data: bytes, parts: list[tuple[str, int, int]], name: str) -> bytes:
    return next(data[start:end] for here, start, end in parts if here == name)


def shorter_padding(store: bytes, by: int) -> bytes:
    """A manifest store whose signature has `by` bytes less of padding, which nobody signs; all sizes fit."""
    at = store.rfind(b"cpadY")
    (padding,) = struct.unpack(">H", store[at + 5 : at + 7])
    result = bytearray(store)
    result[at + 5 : at + 7] = struct.pack(">H", padding - by)
    del result[at + 7 : at + 7 + by]
    start, end = 0, len(store)
    while start < end:
        size, kind = struct.unpack(">I4s", store[start : start + 8])
        if not start < at < start + size:
            start += size
            continue
        result[start : start + 4] = struct.pack(">I", size - by)
        if kind != b"jumb":
            break
        start, end = start + 8, start + size
    return bytes(result)


def with_store(data: bytes, format: str, change: Callable[[bytes], bytes]) -> bytes:
    """A file whose manifest store is what `change`, which keeps its length, makes of it; checksums fit."""
    start, end = next((start, end) for here, start, end in regions(data, format) if here == MANIFESTS[format])
    if format == "png":
        part = chunk(b"caBX", change(data[start + 8 : end - 4]))
    elif format == "gif":
        part = data[start : start + 14] + sub_blocks(change(_joined(data, start + 14)))
    else:
        part = change(data[start:end])
    return data[:start] + part + data[end:]


def _joined(data: bytes, at: int) -> bytes:
    """The bytes in the sub-blocks of a GIF that start there."""
    body = b""
    while data[at]:
        body, at = body + data[at + 1 : at + 1 + data[at]], at + 1 + data[at]
    return body


def forged(data: bytes, format: str, folder: Path) -> bytes:
    """A file that shows red, with all that is signed in its place: the red hides in the room of the padding."""
    room, parts = 8000, regions(data, format)
    name = MANIFESTS[format]
    start, end = next((start, end) for here, start, end in parts if here == name)
    red = np.broadcast_to(np.uint8([255, 0, 0]), (3, 32, 32, 3))
    if format == "png":
        rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in red[0]))
        manifest = chunk(b"caBX", shorter_padding(data[start + 8 : end - 4], room))
        image = chunk(b"IDAT", rows) + chunk(b"IEND")
        other = manifest + image + chunk(b"zzZz", bytes(room - len(image) - 12))
        return data[:start] + other + data[end:]
    if format == "gif":
        body = _joined(data, start + 14)
        shown = media.encode(red[:1], 8, ".gif")
        other = data[start : start + 14] + sub_blocks(shorter_padding(body, room))
        other += _part(shown, regions(shown, "gif"), "image")
        rest, comment = end - start - len(other) - 3, b""
        while rest:  # blocks of one length byte and at least one other
            size = min(rest, 255) - (rest % 255 == 1 and rest > 255)
            comment, rest = comment + bytes([size - 1]) + bytes(size - 1), rest - size
        return data[:start] + other + b"\x21\xfe" + comment + b"\0" + data[end:]
    store = data.index(b"jumb", start) - 4
    manifest = box(b"uuid", data[start + 8 : store] + shorter_padding(data[store:end], room))
    with av.open(str(folder / "red.ts"), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in red:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    stream = ((folder / "red.ts").read_bytes() * 4)[: (room - 8) // 188 * 188]
    header = b"jp2 " + data[12:16] + stream
    return box(b"ftyp", header + bytes(start + room - 8 - len(header))) + manifest + data[end:]


def flip(data: bytes, place: int) -> bytes:
    """One bit of a byte changed, or all of them, in turns."""
    return data[:place] + bytes([data[place] ^ (0xFF if place % 2 else 0x01)]) + data[place + 1 :]


def transplanted(data: bytes, other: bytes, format: str) -> bytes:
    """`data` with the manifest of `other` in place of its own."""
    name = MANIFESTS[format]
    start, end = next((start, end) for here, start, end in regions(data, format) if here == name)
    return data[:start] + _part(other, regions(other, format), name) + data[end:]


def remuxed(data: bytes, format: str, keep: bool = False) -> bytes:
    """The same coded pictures written anew, as tools for cutting and shrinking do, in other chunks and blocks.

    Such tools leave out what they do not know, as the manifest. With `keep` (not for mp4) it stays.
    """
    if format == "mp4":
        file = io.BytesIO()
        with av.open(io.BytesIO(data)) as old, av.open(file, "w", format="mp4") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
        return file.getvalue()
    written, pictures = b"", b""
    for name, start, end in regions(data, format):
        part = data[start:end]
        if name == "IDAT":
            pictures += part[8:-4]
            continue
        while pictures:
            written, pictures = written + chunk(b"IDAT", pictures[:_PIECE]), pictures[_PIECE:]
        if name == "image":
            head = 11 + (3 << (part[9] & 7) + 1 if part[9] & 0x80 else 0)
            part = part[:head] + sub_blocks(_joined(part, head), _PIECE)
        if keep or name != MANIFESTS[format]:
            written += part
    return written
