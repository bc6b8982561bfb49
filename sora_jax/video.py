"""A video as an array of frames with its speed, and frames of several laid out on one picture.

`Video.save` is the one way in which a generated video leaves the program.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sora_jax import media
from sora_jax.errors import InputError, Refused

if TYPE_CHECKING:  # these take a while to import
    from sora_jax.safety.keys import Signer
    from sora_jax.safety.provenance import Claim
    from sora_jax.safety.scan import Scanner


@dataclass(frozen=True, eq=False, repr=False)
class Video:
    """Frames with their speed.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB, T >= 1.
        fps: frames per second, > 0.
        claim: how it was made, for the manifests of its files; None if that is not known.

    Raises:
        InputError: for another dtype or shape, or an impossible speed.
    """

    frames: np.ndarray
    fps: float = 8.0
    claim: Claim | None = None

    def __post_init__(self) -> None:
        frames = np.asarray(self.frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise InputError(f"a video needs uint8 frames [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
        media.check_fps(self.fps)
        object.__setattr__(self, "frames", frames)

    def __repr__(self) -> str:
        T, H, W, _ = self.frames.shape
        return f"Video({T} frames of {H}x{W}, fps={self.fps:g})"

    def save(
        self,
        path: str | os.PathLike,
        *,
        embed_prompt: bool = False,
        signer: Signer | None = None,
        scanner: Scanner | None = None,
        report: str | os.PathLike | None = None,
        replace: bool = True,
    ) -> Path:
        """Writes the video as .mp4 (H.264, yuv420p), .gif, or .png (one frame) and returns the path.

        Its frames are scanned, marked and signed on the way (see `sora_jax.safety.release`): those of the file are
        not quite those of `frames`, which stay as they are.

        Args:
            embed_prompt: the file's manifest holds the prompt itself, not only its digest.
            signer: who signs, of `sora_jax.safety.keys.load_signer`; by default this installation.
            scanner: looks at the frames too, beside the one that comes with the package.
            report: where it is written why a video is withheld; by default beside `path`, under its name.
            replace: what has that name is replaced; else the file gets the first number that is free, as in NAME-2.mp4.

        Raises:
            Refused: the scan found what must not leave.
            NoTimeStamp: the signer's time-stamp server gives none; `frames` are as they were, to be saved again.
            InputError: if name or folder do not fit (see `media.check_output`), or the file cannot be written.
        """
        from sora_jax.safety.provenance import Claim
        from sora_jax.safety.release import release

        claim = self.claim or Claim()
        claim = claim if embed_prompt else dataclasses.replace(claim, prompt=None)
        return release(path, self.frames, self.fps, claim, signer, scanner, report, replace)

    def _repr_html_(self) -> str:
        """The video itself, for a notebook."""
        suffix = ".png" if len(self.frames) == 1 else ".mp4"
        with tempfile.TemporaryDirectory() as folder:
            try:
                data = base64.b64encode(self.save(Path(folder, "video" + suffix)).read_bytes()).decode()
            except Refused:  # its report is in a folder that is gone in a moment
                raise Refused("the frame scan withholds the video; saved to a file, it leaves a report") from None
        if suffix == ".png":
            return f'<img src="data:image/png;base64,{data}">'
        return f'<video controls autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'


def read_video(path: str | os.PathLike) -> Video:
    """Reads every frame of a video, GIF or picture file; saved again, it says that it is a copy of that file.

    Raises:
        InputError: if it cannot be opened or holds no video.
    """
    from sora_jax.safety.provenance import Claim, Source

    source = Source.read(path, "video")
    return Video(*media.decode(source.data, path), Claim(origin="file", ingredients=(source,)))


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
