"""A video as an array of frames with its speed, and frames of several laid out on one picture."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sora_jax import media
from sora_jax.errors import InputError


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
        media.check_fps(self.fps)
        object.__setattr__(self, "frames", frames)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the video as .mp4 (H.264, yuv420p), .gif, or .png (one frame) and returns the path.

        The file appears at `path` only when it is complete and has been read back; until then it has a hidden
        name in the same folder. An existing file is replaced in that last step.

        Raises:
            InputError: if name or folder do not fit (see `check_output`), or the file cannot be written.
        """
        path = Path(path)
        media.check_output(path, len(self.frames))
        with media.complete_or_absent(path) as hidden:
            media.write(hidden, self.frames, self.fps)
            written = len(media.read(hidden)[0])
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


def read_video(path: str | os.PathLike) -> Video:
    """Reads every frame of a video, GIF or picture file; InputError if it cannot be opened or holds no video."""
    return Video(*media.read(path))


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
