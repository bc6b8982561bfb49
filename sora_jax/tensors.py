"""Tensors in safetensors files, read and written piece by piece: no model has to fit into the host's memory."""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from sora_jax.errors import InputError, one_line

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# As the files name the precisions, in the order in which tensors of each stand in a file.
FORMATS = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}
_NAMES = {dtype: name for name, dtype in FORMATS.items()}
_EXPONENT = {FORMATS["F16"]: np.uint16(0x7C00), FORMATS["BF16"]: np.uint16(0x7F80)}
# And numbers of other kinds, which a scale may be.
_DTYPES = FORMATS | {
    f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}")
    for kind, bits in [("F", 64), *((kind, bits) for kind in "IU" for bits in (8, 16, 32, 64))]
}
_LFS_POINTER = b"version https://git-lfs"  # what `git clone` leaves in place of a file where Git LFS is missing
_PIECE_BYTES = 8 << 20
_AHEAD = 3  # pieces that are read at a time


def weight_files(folder: Path) -> dict[str, Path]:
    """All files of weights below a folder, by their names from there."""
    return {str(path.relative_to(folder)): path for path in folder.rglob("*.safetensors")}


def files_sha256(files: dict[str, Path]) -> str:
    """Digest over the digests of named files, hexadecimal. For `weight_files` it is what this prints in the folder:

    find * -name '*.safetensors' | LC_ALL=C sort | xargs sha256sum | sha256sum
    """
    lines = []
    for name, path in sorted(files.items()):
        with open(path, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Tensor:
    """A tensor that is read when it is needed, piece by piece.

    Attributes:
        shape: of the tensor.
        dtype: in which it is wanted.
        pieces: reads it: arrays that follow one another along the first axis, in the precision of their source.
        sharding: where it is wanted; None is the default device.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]
    sharding: Sharding | None = None

    def read(self) -> np.ndarray:
        """The whole tensor, in the host's memory."""
        pieces = [piece.astype(self.dtype, copy=False) for piece in self.pieces()]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def place(self) -> jax.Array:
        """The whole tensor on its devices. The host holds a few pieces of it, or all if its first axis is split."""
        if isinstance(self.sharding, NamedSharding) and self.sharding.spec and self.sharding.spec[0] is not None:
            # Pieces run along the axis that is split: adding one to the others would gather them.
            return _on_devices(self.read(), self.sharding)
        pieces = self.pieces()
        first = next(pieces)
        if first.shape == self.shape:
            return _on_devices(first.astype(self.dtype, copy=False), self.sharding)
        whole, start, sharding = jnp.zeros(self.shape, self.dtype, device=self.sharding), 0, None
        if isinstance(self.sharding, NamedSharding):
            sharding = NamedSharding(self.sharding.mesh, PartitionSpec(None, *self.sharding.spec[1:]))
        for piece in chain([first], pieces):
            whole = _put(whole, _on_devices(piece, sharding), start, self.sharding)
            start += len(piece)
            whole.block_until_ready()  # or pieces would wait in memory for the devices
        return whole


def _on_devices(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """An array that every host has, on its devices.

    Where they are those of several hosts, `jax.device_put` first compares what the hosts have, which gathers as many
    copies as there are hosts on every device.
    """
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class OnDemand(Mapping[str, Any]):
    """The parameters of a model's parts, each on its devices only while it works: asking for one takes the others off.

    What is taken off is read again from its files when it is asked for.
    """

    def __init__(self, tensors: dict[str, Any], together: Collection[str] = ()):
        """Takes trees of `Tensor`s by part, and the names of parts that work together, and stay together."""
        self._tensors, self._together = tensors, together
        self._here: dict[str, Any] = {}

    def __getitem__(self, part: str) -> Any:
        if part not in self._here:
            stays = self._together if part in self._together else ()
            self._here = {other: tree for other, tree in self._here.items() if other in stays}
            self._here[part] = jax.tree.map(Tensor.place, self._tensors[part])
        return self._here[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(whole: jax.Array, piece: jax.Array, start: int, sharding: Sharding | None) -> jax.Array:
    whole = jax.lax.dynamic_update_slice_in_dim(whole, piece.astype(whole.dtype), start, 0)
    return whole if sharding is None else jax.lax.with_sharding_constraint(whole, sharding)


def ahead(calls: Iterable[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """What each call gives, in order; while one result is used the next calls are at work, in threads."""
    waiting = deque()
    with ThreadPoolExecutor(_AHEAD) as threads:
        try:
            for call in calls:
                waiting.append(threads.submit(call))
                if len(waiting) == _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def spans(count: int, size: int) -> Iterator[slice]:
    """`count` rows of `size` bytes each in runs of a few megabytes, or single rows if they are larger."""
    step = max(1, _PIECE_BYTES // max(size, 1))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


class TensorFile:
    """A safetensors file, of which only the header is read at first.

    Attributes:
        path: of the file.
        shapes: of its tensors, by name.
        formats: their precisions, as the file names them (keys of `FORMATS`, or others that cannot be read).
        metadata: what else the header says.

    Raises:
        InputError: naming the file, if it cannot be read or is damaged; later also for the tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.suffix in PICKLES:
            raise InputError(f"{path} is a pickle, which is never read: convert it to safetensors")
        try:
            with open(path, "rb") as file, safetensors.safe_open(path, "np"):
                # It has checked the header: names, formats, and that the tensors fill the file.
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or 'no such file'}") from error
        except safetensors.SafetensorError as error:
            with open(path, "rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    why = f"{path} only names a file that Git LFS would fetch: git lfs pull, or hf download, gets it"
                    raise InputError(why) from error
            raise InputError(f"{path} is damaged: {one_line(error)}") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
        self.formats = {name: tensor["dtype"] for name, tensor in header.items()}
        self._starts = {name: 8 + size + tensor["data_offsets"][0] for name, tensor in header.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor `name`, or some rows of it, in the precision of the file."""
        # The library would copy from pages that it maps, holding the interpreter's lock: this is as fast, and threads
        # share it.
        shape, dtype, start = self.shapes[name], _DTYPES[self.formats[name]], self._starts[name]
        if rows is not None:
            start += rows.start * dtype.itemsize * math.prod(shape[1:])
            shape = (rows.stop - rows.start, *shape[1:])
        try:
            array = np.fromfile(self.path, dtype, math.prod(shape), offset=start).reshape(shape)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or 'no such file'}") from error
        except ValueError as error:
            raise InputError(f"{self.path} is damaged: it ends in the tensor {name}") from error
        if not _is_finite(array):
            raise InputError(f"{self.path} is damaged: the tensor {name} is not finite")
        return array

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The tensor `name`, some rows at a time."""
        shape = self.shapes[name]
        size = FORMATS[self.formats[name]].itemsize * math.prod(shape)
        if size <= _PIECE_BYTES:
            yield self.read(name)
        else:
            yield from ahead(partial(self.read, name, rows) for rows in spans(shape[0], size // shape[0]))


def fits_float32(number: float) -> bool:
    """Whether a number is finite, and still is in float32."""
    return abs(number) <= float(np.finfo(np.float32).max)


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype not in _EXPONENT:
        return bool(np.isfinite(array).all())
    ones = _EXPONENT[array.dtype]  # the test of these bits is ten to a hundred times as fast as NumPy's own
    return not array.size or (array.view(np.uint16) & ones).max() != ones


def write(path: str | os.PathLike, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file piece by piece: the bytes that `safetensors.numpy.save` makes of whole arrays."""
    order = list(_NAMES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.dtype.itemsize * math.prod(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in tensors[name].pieces():
                file.write(np.ascontiguousarray(piece, tensors[name].dtype).reshape(-1).view(np.uint8).data)
