"""Clips stored in a TFDS data set, for training on something else than freshly drawn worlds.

    builder = Builder(config="tiny", data_dir="data")  # of sora_jax.data.worlds.worlds_dataset_builder
    builder.download_and_prepare()
    clip = stored(builder.data_dir, "train")[0]

Any TFDS data set in ArrayRecord files will do, if it has the features `video`, uint8 [T, H, W, 3], and
`captions`, one on each line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sora_jax.errors import InputError, one_line


def stored(data_dir: str | Path, split: str) -> Sequence[dict]:
    """The clips of a split, to be read in any order: `source[n]` is {"video", "captions", ...}.

    Args:
        data_dir: the folder of one version of the data set, such as `data/worlds/tiny/1.1.0`.

    Raises:
        InputError: there is no such data set or split, or it has other files or features.
    """
    if not (Path(data_dir) / "dataset_info.json").is_file():
        raise InputError(f"{data_dir}: no data set there; it must be the folder of one version, with dataset_info.json")
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(data_dir)
    if split not in builder.info.splits:
        raise InputError(f"{data_dir}: no split {split!r}; there are {', '.join(builder.info.splits)}")
    features = dict(builder.info.features.items())
    video = features.get("video")
    if video is None or video.np_dtype != np.uint8 or len(video.shape) != 4 or video.shape[-1] != 3:
        raise InputError(f"{data_dir}: its clips need a feature `video`, uint8 [T, H, W, 3]")
    if not isinstance(features.get("captions"), tfds.features.Text):
        raise InputError(f"{data_dir}: its clips need a feature `captions`, a text with one caption on each line")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise InputError(f"{data_dir}: its files are {builder.info.file_format.value}; they must be array_record")
    source = builder.as_data_source(split)
    if not len(source):
        raise InputError(f"{data_dir}: its split {split!r} has no clips")
    return source


def stored_as(data_dir: str | Path, split: str, frames: int, size: int) -> Sequence[dict]:
    """The same; InputError where a clip, of which the first is read here, has not the configured frames and size."""
    clips = Shaped(stored(data_dir, split), (frames, size, size, 3), f"{data_dir}, split {split}")
    _ = clips[0]
    return clips


@dataclass(frozen=True)
class Shaped:
    """Clips of one shape: a data set may declare that they have any."""

    clips: Sequence[dict]
    shape: tuple[int, ...]
    name: str

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> dict:
        try:
            clip = self.clips[number]
        except RuntimeError as error:  # what ArrayRecord makes of a file that is cut off or damaged
            raise InputError(f"{self.name}: clip {number} cannot be read: {one_line(error)}") from error
        if (found := clip["video"].shape) != self.shape:
            asked = list(self.shape)
            raise InputError(f"{self.name}: clip {number} is {list(found)}; the configuration asks for {asked}")
        return clip
