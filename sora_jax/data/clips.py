"""Where training gets its clips: drawn from the worlds, or stored in a TFDS data set, with the same contents.

    builder = Builder(config="tiny", data_dir="data")  # of sora_jax.data.worlds.worlds_dataset_builder
    builder.download_and_prepare()
    clip = stored(builder.data_dir, "train")[0]

Any TFDS data set in ArrayRecord files will do, if it has the features `video`, uint8 [T, H, W, 3], and
`captions`, one on each line.
"""

from collections.abc import Sequence
from pathlib import Path

from sora_jax.errors import InputError


def stored(data_dir: str | Path, split: str) -> Sequence[dict]:
    """The clips of a split, to be read in any order: `source[n]` is {"video", "captions", ...}.

    Args:
        data_dir: the folder of one version of the data set, such as `data/worlds/tiny/1.0.0`.

    Raises:
        InputError: there is no such data set or split, or its clips have no video or no captions.
    """
    if not (Path(data_dir) / "dataset_info.json").is_file():
        raise InputError(f"{data_dir}: no data set there; it must be the folder of one version, with dataset_info.json")
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(data_dir)
    if split not in builder.info.splits:
        raise InputError(f"{data_dir}: no split {split!r}; there are {', '.join(builder.info.splits)}")
    missing = {"video", "captions"} - set(builder.info.features)
    if missing:
        raise InputError(f"{data_dir}: its clips have no {' and no '.join(sorted(missing))}")
    return builder.as_data_source(split)


def check_video(data_dir: str | Path, source: Sequence[dict], frames: int, size: int) -> None:
    """Raises InputError unless the clips of `source` have the configured frames and size."""
    if not len(source):
        raise InputError(f"{data_dir}: it has no clips")
    found, asked = source[0]["video"].shape, (frames, size, size, 3)
    if found != asked:
        raise InputError(f"{data_dir}: its clips are {list(found)}; the configuration asks for {list(asked)}")
