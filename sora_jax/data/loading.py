"""The one way in which stored clips become batches, whatever a clip holds."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Sharding

from sora_jax.errors import InputError


def batches(
    source: Sequence,
    read: Callable[[Any, np.random.Generator], dict],
    batch: int,
    seed: int,
    start: int,
    sharding: Sharding | None = None,
) -> Iterator[dict]:
    """Shuffled batches from number `start` on, without end; every pass over the source has its own order.

    A batch is a function of `seed` and its number alone, so a run that resumes at `start` sees what it would
    have seen, on however many hosts: each process reads the clips that its devices get, and no others.

    Args:
        source: anything with a length and items.
        read: turns an item into a dictionary of arrays, with a generator for what is random about it.
        batch: clips of a batch, over all processes.
        sharding: where a batch goes, by its first axis: the batches are global arrays, placed so. Without it they
            are NumPy's, and whole.

    Raises:
        InputError: there is no clip, or none in a batch.
    """
    if batch < 1 or not len(source):
        raise InputError(f"batch is {batch}, of {len(source)} clips; both must be at least 1")
    # The slice [:] does nothing, and stays: Grain makes seeds from places in this chain, and runs that were started
    # with it would go on in another order without.
    clips = grain.MapDataset.source(source).seed(seed).shuffle()[:].repeat().random_map(read)
    rows = range(batch) if sharding is None else rows_here(batch, sharding)
    dataset = grain.MapDataset.source(_Rows(clips, batch, rows)).batch(len(rows))
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    iterator.set_state({"next_index": start})
    if sharding is None:
        return iterator
    return (jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), here) for here in iterator)


def rows_here(batch: int, sharding: Sharding) -> Sequence[int]:
    """Which rows of a batch the devices of this process hold, in ascending order."""
    parts = sharding.addressable_devices_indices_map((batch,)).values()
    return sorted({row for (part,) in parts for row in range(batch)[part]})


class _Rows:
    """Of an endless row of clips, those that fall on some rows of batches."""

    def __init__(self, clips: Sequence, batch: int, rows: Sequence[int]):
        self._clips, self._batch, self._rows = clips, batch, rows

    def __len__(self) -> int:
        return len(self._clips) // self._batch * len(self._rows)

    def __getitem__(self, index: int):
        number, row = divmod(index, len(self._rows))
        return self._clips[number * self._batch + self._rows[row]]
