"""Clips of a stored data set as pixels with captions, in batches.

    builder = Builder(config="tiny", data_dir="data")  # of sora_jax.data.worlds.worlds_dataset_builder
    builder.download_and_prepare()
    for batch in clips.batches(builder.data_dir, batch=8, text_length=128, seed=0, start=0):
        ...

Any TFDS data set in ArrayRecord files will do, if it has the features `video`, uint8 [T, H, W, 3], and
`captions`, one on each line.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from sora_jax.data import loading
from sora_jax.errors import InputError
from sora_jax.text import tokenize


def batches(
    data_dir: str | Path, batch: int, text_length: int, seed: int, start: int, split: str = "train"
) -> Iterator[dict]:
    """Shuffled batches from number `start` on: {"video" (B, T, H, W, 3) uint8, "ids" (B, L) int32}.

    A function of `seed` and the number of the batch, with one of its captions for each clip; every process of
    a multi-host run gets its own slice. Pixels stay uint8, 0 to 255: a quarter of the bytes.

    Args:
        data_dir: the folder of one version of the data set, such as `data/worlds/tiny/1.0.0`.
        text_length: bytes L of a caption.

    Raises:
        InputError: there is no such data set or split, or the batch does not fit the processes.
    """
    if not (Path(data_dir) / "dataset_info.json").is_file():
        raise InputError(f"{data_dir}: no data set there; it must be the folder of one version, with dataset_info.json")
    builder = tfds.builder_from_directory(data_dir)
    if split not in builder.info.splits:
        raise InputError(f"{data_dir}: no split {split!r}; there are {', '.join(builder.info.splits)}")

    def read(clip: dict, rng: np.random.Generator) -> dict:
        captions = clip["captions"].decode().split("\n")
        ids_L = tokenize([captions[rng.integers(len(captions))]], text_length)[0]
        return {"video": clip["video"], "ids": ids_L}

    return loading.batches(builder.as_data_source(split), read, batch, seed, start)
