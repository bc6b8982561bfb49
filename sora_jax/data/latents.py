"""Clips as the DiT sees them: encoded once by the frozen codec and stored with their captions in ArrayRecord files.

Encoding costs far more than the rest of reading a clip, and a DiT sees each clip many times.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter

from sora_jax.data import loading
from sora_jax.text import tokenize

Clips = Callable[[int, int], tuple[np.ndarray, list[list[str]]]]  # (start, count) -> latents_BFYXZ, captions of each


def write_shards(folder: Path, clips: int, shard: int, make: Clips, progress: Callable[[int], None]) -> list[Path]:
    """Writes `clips` clips in files of `shard`, skipping those that are there; a file appears when it is complete.

    Args:
      make: gives clips start to start + count: latents (B, F, Y, X, Z), kept in float16, and captions for each.
      progress: called with the number of clips that have become available.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, clips, shard):
        count = min(shard, clips - start)
        path = folder / f"clips-{start:07d}-{count}.array_record"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            writer = ArrayRecordWriter(str(unfinished), "group_size:1")
            for latents_FYXZ, captions in zip(*make(start, count), strict=True):
                text = np.frombuffer("\n".join(captions).encode(), np.uint8)
                writer.write(safetensors.numpy.save({"latents": latents_FYXZ.astype(np.float16), "captions": text}))
            writer.close()
            unfinished.rename(path)
        progress(count)
        paths.append(path)
    return paths


def batches(paths: Sequence[Path], batch: int, text_length: int, seed: int, start: int) -> Iterator[dict]:
    """Shuffled batches from number `start` on: {"latents" (B, F, Y, X, Z) float16, "ids" (B, L) int32}.

    A function of `seed` and the number of the batch, with one of its captions for each clip; every process of a
    multi-host run gets its own slice.
    """

    def read(record: bytes, rng: np.random.Generator) -> dict:
        clip = safetensors.numpy.load(record)
        captions = clip["captions"].tobytes().decode().split("\n")
        ids_L = tokenize([captions[rng.integers(len(captions))]], text_length)[0]
        return {"latents": clip["latents"], "ids": ids_L}

    source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
    return loading.batches(source, read, batch, seed, start)
