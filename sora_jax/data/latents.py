"""Clips as the DiT sees them: encoded once by the frozen codec and stored with their captions in ArrayRecord files.

Encoding costs far more than the rest of reading a clip, and a DiT sees each clip many times.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain
import jax
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import Sharding

from sora_jax.data import loading
from sora_jax.errors import InputError, one_line
from sora_jax.json_files import read_json
from sora_jax.text import tokenize

# (start, count) -> {"latents", "captions"[, "layout", "mistaken"]} of each clip
Encode = Callable[[int, int], Iterator[dict]]

_ARRAYS = ("latents", "layout", "mistaken")


def claim_folder(folder: Path, about: dict) -> None:
    """Makes the folder of clips that are made from what `about` says, which is kept beside them; of several processes
    one does it.

    Raises:
      InputError: the folder holds clips made from something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("clips-*")):
        if not (folder / "about.json").exists():
            raise InputError(f"{folder} holds clips of unknown origin, without about.json; use a new --workdir")
        check_about(folder / "about.json", about)
    else:
        write_about(folder / "about.json", about)


def write_shards(folder: Path, clips: int, shard: int, encode: Encode, progress: Callable[[int], None]) -> list[Path]:
    """Writes `clips` clips in files of `shard`, skipping those that are there; a file appears when it is complete.

    Of several processes each writes some of the files: when all have returned, all files are there.

    Args:
      encode: gives clips start to start + count: latents (F, Y, X, Z) and perhaps the layout (F, Y, X, C) and mistaken
        latents, all kept in float16, and captions, one on each line.
      progress: called with the number of clips that this process need no longer care about.

    Raises:
      InputError: the disk is full.
    """
    paths = []
    for number, start in enumerate(range(0, clips, shard)):
        count = min(shard, clips - start)
        path = folder / f"clips-{start:07d}-{count}.array_record"
        if number % jax.process_count() == jax.process_index() and not path.exists():
            unfinished = path.with_suffix(".unfinished")
            writer = ArrayRecordWriter(str(unfinished), "group_size:1")
            for clip in encode(start, count):
                arrays = {name: clip[name].astype(np.float16) for name in _ARRAYS if name in clip}
                arrays["captions"] = np.frombuffer(clip["captions"].encode(), np.uint8)
                _write(writer, safetensors.numpy.save(arrays), path)
            _write(writer, None, path)
            unfinished.rename(path)
        progress(count)
        paths.append(path)
    return paths


def _write(writer: ArrayRecordWriter, record: bytes | None, path: Path) -> None:
    """Writes a record, or closes the file where there is none."""
    try:
        writer.close() if record is None else writer.write(record)
    except RuntimeError as error:  # what ArrayRecord makes of a full disk
        raise InputError(f"cannot write {path}: {one_line(error)}") from error


def write_about(path: Path, about: dict) -> None:
    """Writes down what the things beside `path` are going to be made from."""
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(json.dumps(about, indent=1) + "\n")
    hidden.replace(path)


def check_about(path: Path, about: dict) -> None:
    """Raises InputError if the things beside `path` were made from something else than `about` says."""
    about = json.loads(json.dumps(about))
    before = read_json(path)
    for name, value in about.items():
        if before.get(name) != value:
            raise InputError(
                f"{path.parent} was made with {name} {before.get(name)!r}, not {value!r}; use a new --workdir"
            )


def first_latents(path: Path, count: int) -> np.ndarray:
    """The latents of the first clips of a file: (count, F, Y, X, Z) float32.

    Raises:
      InputError: the file is damaged.
    """
    records = _Records([path])
    clips = [safetensors.numpy.load(records[i]) for i in range(min(count, len(records)))]
    return np.stack([clip["latents"] for clip in clips]).astype(np.float32)


def batches(
    paths: Sequence[Path], batch: int, text_length: int, seed: int, start: int, sharding: Sharding | None = None
) -> Iterator[dict]:
    """Shuffled batches from number `start` on: {"latents" (B, F, Y, X, Z) float16, "ids" (B, L) int32}, and "layout"
    (B, F, Y, X, C) and "mistaken" (B, F, Y, X, Z) float16 if the clips have them.

    A function of `seed` and the number of the batch, with one of its captions for each clip; placed by `sharding`
    (see `loading.batches`).

    Raises:
      InputError: a file is damaged; also from the iterator, where it comes to the damaged part.
    """

    def read(record: bytes, rng: np.random.Generator) -> dict:
        clip = safetensors.numpy.load(record)
        captions = clip.pop("captions").tobytes().decode().split("\n")
        ids_L = tokenize([captions[rng.integers(len(captions))]], text_length)[0]
        return {**clip, "ids": ids_L}

    return loading.batches(_Records(paths), read, batch, seed, start, sharding)


class _Records:
    """The records of some files, one file after the other."""

    def __init__(self, paths: Sequence[Path]):
        self._paths, self._sources = paths, []
        for path in paths:
            with _told(path):
                self._sources.append(grain.sources.ArrayRecordDataSource([str(path)]))
        self._ends = np.cumsum([len(source) for source in self._sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> bytes:
        file = int(np.searchsorted(self._ends, number, side="right"))
        source = self._sources[file]
        with _told(self._paths[file]):
            return source[int(number - self._ends[file]) + len(source)]


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what ArrayRecord makes of a file that is cut off or damaged
        raise InputError(f"cannot read {path}: {one_line(error)}; delete it, and it is made again") from error
