"""The one way in which stored clips become batches, whatever a clip holds."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from sora_jax.errors import InputError


def batches(
    source: Sequence, read: Callable[[Any, np.random.Generator], dict], batch: int, seed: int, start: int
) -> Iterator[dict]:
    """Shuffled batches from number `start` on, without end; every pass over the source has its own order.

    A batch is a function of `seed` and its number alone, so a run that resumes at `start` sees what it would
    have seen. Each process of a multi-host run gets its own slice of a pass, and `batch` / processes clips.

    Args:
        source: anything with a length and items.
        read: turns an item into a dictionary of arrays, with a generator for what is random about it.
        batch: clips of a batch, over all processes.

    Raises:
        InputError: the processes cannot share the batch equally, or there are fewer clips than processes.
    """
    processes = jax.process_count()
    if batch < 1 or batch % processes:
        raise InputError(f"batch is {batch}; it must be a multiple of the number of processes, {processes}")
    if len(source) < processes:
        raise InputError(f"{len(source)} clips are too few: each of {processes} processes needs one")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle()
    dataset = dataset[jax.process_index() :: processes].repeat().random_map(read)
    dataset = dataset.batch(batch // processes)
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    iterator.set_state({"next_index": start})
    return iterator
