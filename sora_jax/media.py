"""Frames as files: mp4, gif and png, written and read back.

Nothing here decides what may be written: generated frames go through `safety/release.py`, which alone calls `encode`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import platform
import secrets
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import ExifTags, Image, ImageOps

from sora_jax.errors import InputError, one_line

Picture = Image.Image
SUFFIXES = (".mp4", ".gif", ".png")
# What is read. FFmpeg knows hundreds of formats and goes by the content, and among them are playlists: a text that has
# it read other files, or ask the network for them.
_FORMATS = "mov,matroska,avi,flv,ogg,mpegts,gif,apng,png_pipe,jpeg_pipe,mjpeg,webp_pipe,bmp_pipe,tiff_pipe"
_MOST_PIXELS = 2**27  # of one frame; that is 8 bits RGB in 384 MiB
# Where not all frames are asked for, so many pixels are decoded, or so many for each byte of the file: a few kilobytes
# may unfold to hours of work.
_MOST_DECODED, _MOST_TO_A_BYTE = 2**28, 2**14
# Notes in a file that are no text do not matter; PyAV takes them as they are from version 19 on.
ANY_NOTES = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
OPENED = {"options": {"format_whitelist": _FORMATS}, **ANY_NOTES}  # how PyAV is to open what somebody gives
_BT709 = 1  # the number of BT.709 in H.264's tables of primaries, transfer functions and matrices
# Without these the conversion between RGB and YUV takes shortcuts that darken frames by one or two levels.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# The same frames give the same file. The number of threads changes it; and with AVX-512 x264 reads memory that it never
# wrote (MALLOC_PERTURB_ shows it, for frames of 64 x 64 pixels).
_X264 = {"crf": "16", "preset": "medium", "threads": "1"}
if platform.machine() in ("x86_64", "AMD64"):
    _X264["x264-params"] = "asm=avx2"


def check_fps(fps: float) -> None:
    """Raises InputError unless files can hold this speed, in frames per second."""
    if not 0.001 <= fps <= 1000:
        raise InputError(f"fps must be from 0.001 to 1000, not {fps}")


def check_output(path: str | os.PathLike, frames: int, fps: float) -> None:
    """Raises InputError unless a video of `frames` frames at this speed can be saved at `path`."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"cannot save {path}: the name must end in one of {', '.join(SUFFIXES)}")
    if suffix == ".png" and frames != 1:
        raise InputError(f"cannot save {path}: .png holds one frame, not {frames}; use .mp4 or .gif")
    if suffix == ".gif" and not 0.002 <= fps <= 100:  # it counts in hundredths of a second, up to 65,535 a frame
        raise InputError(f"cannot save {path}: .gif holds 0.002 to 100 frames a second, not {fps}; use .mp4")
    if not path.parent.is_dir():
        raise InputError(f"cannot save {path}: there is no folder {path.parent}")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raises InputError unless a file can be written at `path`; what is there stays as it is."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    with complete_or_absent(path) as hidden:
        hidden.touch()
        hidden.unlink()


def encode(frames: np.ndarray, fps: float, ending: str) -> bytes:
    """A file of frames, in memory: ".mp4" (H.264, yuv420p), ".gif", or ".png" (one frame).

    Args:
        frames: uint8 [T, H, W, 3], RGB.
        fps: frames per second.
        ending: of the file's name, in small letters.

    Raises:
        av.error.FFmpegError: they cannot be encoded; `complete_or_absent` puts it into one line.
    """
    return _ENCODERS[ending](frames, Fraction(fps).limit_denominator(1001))


def read(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """The frames of a video, GIF or picture file, uint8 [T, H, W, 3], and frames per second.

    Raises:
        InputError: if the file cannot be opened or holds no video.
    """
    with _file(path) as file:
        return _decode(file, path)


def decode(data: bytes, name: str | os.PathLike) -> tuple[np.ndarray, float]:
    """The frames in the bytes of a file, as `read` gives those of the file `name`."""
    return _decode(io.BytesIO(data), name)


def count(path: str | os.PathLike) -> int:
    """How many frames of a file can be decoded, with one in memory at a time; InputError if it cannot be opened."""
    with _file(path) as file, _video(file, path) as (stream, _):
        return sum(1 for _ in stream.container.decode(stream))


def some(path: str | os.PathLike, most: int) -> Iterator[np.ndarray]:
    """Frames of a file one after the other, uint8 [H, W, 3]: evenly spread from the first one on, `most` or fewer.

    A long file takes no more memory than a short one, and of one that unfolds to very many pixels only the first are
    decoded. How many there are is what its packets say, which are counted first, not what is written in the file.

    Raises:
        InputError: what `read` raises, perhaps after some frames.
    """
    with _file(path) as file:
        most_pixels = max(_MOST_DECODED, _MOST_TO_A_BYTE * file.seek(0, io.SEEK_END))
        with _video(file, path) as (stream, _):
            packets = (packet for packet in stream.container.demux(stream) if packet.size)
            frames = sum(1 for _ in itertools.islice(packets, most_pixels // max(1, stream.width * stream.height) + 1))
        step = 1
        while -(-frames // step) > most:
            step *= 2
        with _video(file, path) as (stream, mirrored):
            yield from itertools.islice(_pictures(stream, path, mirrored, step, most_pixels), most)


def decode_picture(data: bytes, name: str | os.PathLike) -> np.ndarray:
    """The picture in the bytes of the file `name`, uint8 [H, W, 3].

    Raises:
        InputError: it cannot be read, or holds more than one frame.
    """
    frames_THWC, _ = _decode(io.BytesIO(data), name, first=2)
    if len(frames_THWC) > 1:
        raise InputError(f"{name} is a video; a picture is one frame, such as a .png or .jpg")
    return frames_THWC[0]


def from_pil(picture: Picture) -> np.ndarray:
    """A picture of PIL, uint8 [H, W, 3], RGB, upright; InputError if PIL cannot read the rest of its file."""
    try:
        return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except Exception as error:  # whichever it is of the many that its readers raise
        raise InputError(f"the picture cannot be read: {one_line(error)}") from error


def resize(picture_HWC: np.ndarray, size: tuple[int, int], method: Literal["bicubic", "lanczos"]) -> np.ndarray:
    """A picture, uint8 [H, W, 3], at another size (rows, columns): by PIL, as published pipelines do it."""
    return np.asarray(Image.fromarray(picture_HWC).resize(size[::-1], Image.Resampling[method.upper()]))


@contextlib.contextmanager
def _file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def _video(file: BinaryIO, path: str | os.PathLike) -> Iterator[tuple[av.VideoStream, bool]]:
    """The video of a file, and whether it is mirrored; what FFmpeg finds wrong within the block is an InputError."""
    mirrored = _mirrored(file)
    try:
        with av.open(file, **OPENED) as container:
            if not container.streams.video:
                raise InputError(f"cannot read {path}: it holds no video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InputError(f"cannot read {path}: its video is in no known encoding")
            if stream.width * stream.height > _MOST_PIXELS:
                raise InputError(f"cannot read {path}: {stream.width}x{stream.height} pixels are too many")
            yield stream, mirrored
    except (OSError, av.error.FFmpegError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from error


def _pictures(
    stream: av.VideoStream, path: str | os.PathLike, mirrored: bool, step: int = 1, most_pixels: float = math.inf
) -> Iterator[np.ndarray]:
    """Every step-th frame of a video, uint8 [H, W, 3], upright, until so many pixels were decoded."""
    convert = VideoReformatter().reformat  # one for all frames: its tables take longer than a small frame
    shape = None
    for number, frame in enumerate(stream.container.decode(stream)):
        if number * frame.width * frame.height > most_pixels:
            break
        if number % step:
            continue
        picture = convert(frame, format="rgb24", interpolation=EXACT).to_ndarray()
        picture = upright(picture, frame.rotation, mirrored)
        if shape not in (None, picture.shape):
            raise InputError(f"cannot read {path}: it holds no frames of one size")
        shape = picture.shape
        yield picture
    if shape is None:
        raise InputError(f"cannot read {path}: it holds no frames")


def _decode(file: BinaryIO, path: str | os.PathLike, first: int | None = None) -> tuple[np.ndarray, float]:
    with _video(file, path) as (stream, mirrored):
        frames = list(itertools.islice(_pictures(stream, path, mirrored), first))
        return np.stack(frames), float(stream.average_rate or stream.guessed_rate or Fraction(8))


def upright(picture_HWC: np.ndarray, degrees: int, mirrored: bool = False) -> np.ndarray:
    """A picture turned counterclockwise as players show it: phones write beside the pixels how they were held."""
    if degrees % 90:
        return picture_HWC
    turned = np.rot90(picture_HWC, degrees // 90)
    if mirrored:  # FFmpeg's angle is then that of the axis which the mirror leaves
        turned = np.flip(turned, 1 if degrees % 180 else 0)
    return turned


def _mirrored(file: BinaryIO) -> bool:
    """Whether a JPEG, PNG or WebP says that it is mirrored, as pictures of front cameras are: FFmpeg tells angles."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=("JPEG", "PNG", "WEBP")) as picture:
            return picture.getexif().get(ExifTags.Base.Orientation) in (2, 4, 5, 7)
    except Exception:  # whatever else is wrong with the file, FFmpeg has the words for it
        return False
    finally:
        file.seek(0)


def png(picture_HWC: np.ndarray) -> bytes:
    """A PNG file of a picture, uint8 [H, W, 3], RGB."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = picture_HWC.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode()])


@contextlib.contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` that takes its place if the block succeeds, else leaves no trace."""
    hidden = path.absolute().parent / f".{secrets.token_hex(8)}{path.suffix}"
    try:
        yield hidden
        if hidden.exists():
            _flush(hidden)
            os.replace(hidden, path)
    except (OSError, av.error.FFmpegError) as error:
        raise InputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        hidden.unlink(missing_ok=True)


def take_free_name(hidden: Path, path: Path) -> Path:
    """Names a complete hidden file `path`, or with the first number from 2 on that is free; returns the name.

    Whatever others write at the same time is kept, which looking first and renaming then would not promise.
    """
    _flush(hidden)
    for name in numbered(path):
        try:
            os.link(hidden, name)
            hidden.unlink()
        except FileExistsError:
            continue
        except OSError:  # of a file system without hard links: a hidden file holds the name until it is taken
            claim = name.with_name(f".{name.name}.claim")
            try:
                claim.touch(exist_ok=False)
            except FileExistsError:
                continue
            try:
                if os.path.lexists(name):
                    continue
                os.replace(hidden, name)
            finally:
                claim.unlink()
        return name


def numbered(path: Path) -> Iterator[Path]:
    """NAME.mp4, NAME-2.mp4, NAME-3.mp4, ..."""
    yield path
    yield from (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))


def _flush(path: Path) -> None:
    """Waits for the disk: a power cut must not leave a name without what it names."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _mp4(frames: np.ndarray, rate: Fraction) -> bytes:
    # H.264 with 4:2:0 colour halves both sides of the frame, so odd sides grow by one repeated row or column.
    frames = np.pad(frames, [(0, 0), *((0, side % 2) for side in frames.shape[1:3]), (0, 0)], "edge")
    file = io.BytesIO()
    # To put the index first, FFmpeg opens what it has written once more, and reads it while it writes.
    again = lambda *_: io.BytesIO(file.getvalue())  # noqa: E731
    with av.open(file, "w", format="mp4", options={"movflags": "+faststart"}, io_open=again) as container:
        stream = container.add_stream("libx264", rate=rate, options=_X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        convert = VideoReformatter().reformat
        for frame in frames:
            picture = convert(
                av.VideoFrame.from_ndarray(frame, format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=EXACT,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


def _gif(frames: np.ndarray, rate: Fraction) -> bytes:
    # One palette made from the whole clip: a palette per frame flickers, the fixed one of the encoder bands.
    graph = av.filter.Graph()
    height, width = frames.shape[1:3]
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
    split, palette, use, sink = (graph.add(name) for name in ("split", "palettegen", "paletteuse", "buffersink"))
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for index, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = index, 1 / rate
        source.push(picture)
    source.push(None)
    file = io.BytesIO()
    with av.open(file, "w", format="gif") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        for _ in frames:
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode())
    return file.getvalue()


_ENCODERS: dict[str, Callable[[np.ndarray, Fraction], bytes]] = {
    ".mp4": _mp4,
    ".gif": _gif,
    ".png": lambda frames, rate: png(frames[0]),
}
