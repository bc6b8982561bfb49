"""Own videos as a data set to train on.

    python experiments/make_dataset.py VIDEOS data --frames 33 --size 128 --fps 8
    sora-jax train --config configs/worlds_codec.py --workdir runs/codec --config.data.dir=data/clips/1.0.0

VIDEOS is a folder of video files, each with its captions in a text file of the same name, one on each line: `dog.mp4`
and `dog.txt`. Each video is cut into clips of so many frames at that speed, one after the other, with the square in its
middle at that size. A clip has all captions of its video. One video in twenty, at least one, goes to the split
`held_out`, which training does not see; the others to `train`.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from sora_jax import media
from sora_jax.cli import words
from sora_jax.errors import InputError, one_line

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
HELD_OUT = 20  # one of so many


def videos_in(folder: Path) -> dict[Path, str]:
    """The videos of a folder and those below it, in the order of their names, with their captions.

    Raises:
        InputError: there are not two, or one has no captions.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        try:
            lines = path.with_suffix(".txt").read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: cannot read its captions, {path.with_suffix('.txt')}: {one_line(error)}"
            ) from error
        found[path] = "\n".join(line.strip() for line in lines if line.strip())
        if not found[path]:
            raise InputError(f"{path.with_suffix('.txt')} has no caption")
    if len(found) < 2:
        raise InputError(f"{folder} has {len(found)} videos; training and what is held out need one each at least")
    return found


def frames_of(path: Path, size: int, fps: float) -> Iterator[np.ndarray]:
    """What a video shows every 1 / fps seconds, uint8 [size, size, 3]; a slower one shows its frames several times.

    Raises:
        InputError: it cannot be read.
    """
    shown, begin, end, taken = None, None, 0.0, 0
    try:
        with av.open(str(path), **media.OPENED) as container:
            rate = float(container.streams.video[0].average_rate or fps)
            for number, frame in enumerate(itertools.chain(container.decode(video=0), [None])):
                time = end if frame is None else number / rate if frame.time is None else frame.time
                if begin is None:  # what was cut out of a longer one begins late
                    begin = time
                if frame is not None:
                    time -= begin
                while shown is not None and taken / fps < time - 1e-6:
                    if isinstance(shown, av.VideoFrame):
                        picture = shown.to_ndarray(format="rgb24", interpolation=media.EXACT)
                        upright = media.upright(picture, shown.rotation)
                        shown = squared(upright, size)
                    yield shown
                    taken += 1
                shown, end = frame, time + 1 / rate
    except (OSError, av.error.FFmpegError, IndexError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error


def clips_of(path: Path, frames: int, size: int, fps: float) -> Iterator[np.ndarray]:
    """The clips of a video, uint8 [frames, size, size, 3]; what is left at its end is not used."""
    pictures = frames_of(path, size, fps)
    while len(clip := list(itertools.islice(pictures, frames))) == frames:
        yield np.stack(clip)


def squared(picture_HWC: np.ndarray, size: int) -> np.ndarray:
    """The square in the middle, at another size."""
    rows, columns = picture_HWC.shape[:2]
    side = min(rows, columns)
    top, left = (rows - side) // 2, (columns - side) // 2
    return media.resize(picture_HWC[top : top + side, left : left + side], (size, size), "lanczos")


class Clips(tfds.core.GeneratorBasedBuilder):
    """The data set: `video`, uint8 [frames, size, size, 3], and `captions`, one on each line."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, videos: dict[Path, str], frames: int, size: int, fps: float, **kwargs):
        self._videos, self._shape, self._fps = videos, (frames, size, size, 3), fps
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        video = tfds.features.Tensor(shape=self._shape, dtype=np.uint8, encoding="zlib")
        features = tfds.features.FeaturesDict({"video": video, "captions": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description="Own videos.", features=features)

    def _split_generators(self, dl_manager) -> dict:
        names = list(self._videos)
        held_out = names[::HELD_OUT]
        return {"train": self._clips([one for one in names if one not in held_out]), "held_out": self._clips(held_out)}

    def _generate_examples(self) -> None:
        """What the base class asks for; the splits have their own."""

    def _clips(self, paths: Sequence[Path]) -> Iterator[tuple[int, dict]]:
        number = 0
        for path in tqdm(paths, unit="video"):
            before = number
            for clip in clips_of(path, *self._shape[:2], self._fps):
                yield number, {"video": clip, "captions": self._videos[path]}
                number += 1
            if number == before:
                tqdm.write(
                    f"note: {path} is shorter than {self._shape[0]} frames at {self._fps:g} a second", file=sys.stderr
                )
        if not number:
            raise InputError(f"none of {len(paths)} videos has {self._shape[0]} frames at {self._fps:g} a second")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("videos", type=Path, metavar="VIDEOS", help="a folder of videos and texts")
    add("out", type=Path, help="where the folder clips/1.0.0 is made")
    add("--frames", type=words.whole(1), default=33, help="of a clip, 1 + a multiple of 4 (default: 33)")
    add("--size", type=words.whole(1), default=128, help="rows and columns of a clip (default: 128)")
    add("--fps", type=words.number(0), default=8.0, help="frames a second of a clip (default: 8)")
    options = parser.parse_args(arguments)
    try:
        videos = videos_in(options.videos)
        builder = Clips(videos, options.frames, options.size, options.fps, data_dir=options.out)
        if builder.data_path.exists():
            raise InputError(f"{builder.data_path} is there already; name another folder, or take it away")
        tfds.disable_progress_bar()  # which counts clips, of an unknown number
        builder.download_and_prepare()
    except (InputError, OSError) as error:
        print(f"make_dataset: error: {one_line(error)}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{split.num_examples} in {name}" for name, split in builder.info.splits.items())
    print(f"{builder.data_path}: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
