"""Videos as arrays of frames: saving them, reading them back, and laying frames out on one picture.

`Video.save` is the one way in which a generated video leaves the program.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from sora_jax.errors import InputError

SUFFIXES = (".mp4", ".gif", ".png")
_BT709 = 1  # the number of BT.709 in H.264's tables of primaries, transfer functions and matrices
# Without these the conversion between RGB and YUV takes shortcuts that darken frames by one or two levels.
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True, eq=False)
class Video:
    """Frames with their speed.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB, T >= 1.
        fps: frames per second, > 0.

    Raises:
        InputError: for another dtype or shape, or an impossible speed.
    """

    frames: np.ndarray
    fps: float = 8.0

    def __post_init__(self) -> None:
        frames = np.asarray(self.frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise InputError(f"a video needs uint8 frames [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
        check_fps(self.fps)
        object.__setattr__(self, "frames", frames)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the video as .mp4 (H.264, yuv420p), .gif, or .png (one frame) and returns the path.

        The file appears at `path` only when it is complete and has been read back; until then it has a hidden
        name in the same folder. An existing file is replaced in that last step.

        Raises:
            InputError: if name or folder do not fit (see `check_output`), or the file cannot be written.
        """
        path = Path(path)
        check_output(path, len(self.frames))
        with _complete_or_absent(path) as hidden:
            _ENCODERS[path.suffix.lower()](self, hidden)
            written = len(read_video(hidden).frames)
            if written != len(self.frames):
                raise InputError(f"cannot write {path}: only {written} of {len(self.frames)} frames arrived")
        return path

    def _repr_html_(self) -> str:
        """The video itself, for a notebook."""
        suffix = ".png" if len(self.frames) == 1 else ".mp4"
        with tempfile.TemporaryDirectory() as folder:
            data = base64.b64encode(self.save(Path(folder, "video" + suffix)).read_bytes()).decode()
        if suffix == ".png":
            return f'<img src="data:image/png;base64,{data}">'
        return f'<video controls autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'


def check_fps(fps: float) -> None:
    """Raises InputError unless files can hold this speed, in frames per second."""
    if not 0.001 <= fps <= 1000:
        raise InputError(f"fps must be from 0.001 to 1000, not {fps}")


def check_output(path: str | os.PathLike, frames: int) -> None:
    """Raises InputError unless a video of `frames` frames can be saved at `path`."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"cannot save {path}: the name must end in one of {', '.join(SUFFIXES)}")
    if suffix == ".png" and frames != 1:
        raise InputError(f"cannot save {path}: .png holds one frame, not {frames}; use .mp4 or .gif")
    if path.is_dir():
        raise InputError(f"cannot save {path}: it is a folder")
    if not path.parent.is_dir():
        raise InputError(f"cannot save {path}: there is no folder {path.parent}")
    with _complete_or_absent(path) as hidden:
        hidden.touch()
        hidden.unlink()


def read_video(path: str | os.PathLike) -> Video:
    """Reads every frame of a video, GIF or picture file.

    Raises:
        InputError: if the file cannot be opened or holds no video.
    """
    try:
        with open(path, "rb") as file, av.open(file) as container:
            if not container.streams.video:
                raise InputError(f"cannot read {path}: it holds no video")
            stream = container.streams.video[0]
            frames = [
                frame.reformat(format="rgb24", interpolation=_EXACT).to_ndarray() for frame in container.decode(stream)
            ]
            rate = stream.average_rate or stream.guessed_rate or Fraction(8)
    except (OSError, av.error.FFmpegError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from error
    if not frames or any(frame.shape != frames[0].shape for frame in frames):
        raise InputError(f"cannot read {path}: it holds no frames of one size")
    return Video(np.stack(frames), float(rate))


def contact_sheet(videos: Sequence[Video | np.ndarray], columns: int = 6, gap: int = 2) -> np.ndarray:
    """One row per video, each of `columns` frames spread evenly from the first to the last.

    Args:
        videos: Video or uint8 [T, H, W, 3], all of one H and W.
        columns: frames shown per video, at least 1.
        gap: white pixels between frames.

    Returns:
        uint8 [rows * (H + gap) + gap, columns * (W + gap) + gap, 3].
    """
    clips = [clip.frames if isinstance(clip, Video) else Video(clip).frames for clip in videos]
    if not clips or columns < 1 or any(clip.shape[1:] != clips[0].shape[1:] for clip in clips):
        raise InputError("a contact sheet needs at least one column and videos of one height and width")
    rows = []
    for clip in clips:
        chosen = clip[np.linspace(0, len(clip) - 1, columns).round().astype(int)]
        rows.append(np.concatenate([np.pad(f, ((gap, 0), (gap, 0), (0, 0)), constant_values=255) for f in chosen], 1))
    return np.pad(np.concatenate(rows), ((0, gap), (0, gap), (0, 0)), constant_values=255)


@contextlib.contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` that takes its place if the block succeeds, else leaves no trace."""
    hidden = path.absolute().parent / f".{secrets.token_hex(8)}{path.suffix}"
    try:
        yield hidden
        if hidden.exists():
            os.replace(hidden, path)
    except (OSError, av.error.FFmpegError) as error:
        raise InputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        hidden.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _write_mp4(video: Video, path: Path) -> None:
    # H.264 with 4:2:0 colour halves both sides of the frame, so odd sides grow by one repeated row or column.
    frames = np.pad(video.frames, [(0, 0), *((0, side % 2) for side in video.frames.shape[1:3]), (0, 0)], "edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=_rate(video), options={"crf": "16", "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_EXACT,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write_gif(video: Video, path: Path) -> None:
    # One palette made from the whole clip: a palette per frame flickers, the fixed one of the encoder bands.
    graph = av.filter.Graph()
    height, width = video.frames.shape[1:3]
    rate = _rate(video)
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
    split, palette, use, sink = (graph.add(name) for name in ("split", "palettegen", "paletteuse", "buffersink"))
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for index, frame in enumerate(video.frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = index, 1 / rate
        source.push(picture)
    source.push(None)
    with av.open(str(path), "w", format="gif") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        for _ in video.frames:
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode())


def _write_png(video: Video, path: Path) -> None:
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = video.frames.shape[1:3]
    encoder.pix_fmt, encoder.time_base = "rgb24", 1 / _rate(video)
    picture = av.VideoFrame.from_ndarray(video.frames[0], format="rgb24")
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode()]))


def _rate(video: Video) -> Fraction:
    return Fraction(video.fps).limit_denominator(1001)


_ENCODERS: dict[str, Callable[[Video, Path], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".png": _write_png,
}
