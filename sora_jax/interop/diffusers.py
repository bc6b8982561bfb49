"""Wan models as published, in the folder layout of diffusers: `model_index.json` and a folder for each part.

Configs become a `ModelConfig` (`configs.py`), tensors our parameters (`names.py`), one at a time and when they are
needed; nothing is imported from diffusers, and only safetensors are read.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from sora_jax.errors import InputError
from sora_jax.interop import names
from sora_jax.interop.configs import field, pipeline_config
from sora_jax.json_files import read_json
from sora_jax.model_config import ModelConfig, abstract_params, memory_dtype
from sora_jax.model_folder import described_by, flatten
from sora_jax.tensors import FORMATS, PICKLES, Tensor, TensorFile, ahead, spans
from sora_jax.text import FileTokenizer

_STRIP = 128  # numbers that are copied at a time along the last axis
_FOLDERS = {
    "text": "text_encoder",
    "codec": "vae",
    "dit": "transformer",
    "dit_low": "transformer_2",
    "vision": "image_encoder",
}


def open_pipeline_folder(
    path: Path, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any], FileTokenizer]:
    """A published model: its config, its parameters for computing in `dtype`, and its tokenizer.

    The parameters are `Tensor`s, checked against the headers of the files and yet to be read.

    Args:
      mesh: the devices where the parameters belong; by default the one that JAX has by default.

    Raises:
      InputError: naming the file and what is wrong with it, or the parameter that the mesh cannot divide.
    """
    config = pipeline_config(path)
    with described_by(path):
        expected = {part: flatten(tree) for part, tree in abstract_params(config, mesh).items()}
    tokenizer = FileTokenizer(path / "tokenizer" / "tokenizer.json", config.text.vocabulary_size)
    params = {}
    for part in config.parts:
        files, sources = _Files(path / _FOLDERS[part], part == "vision"), _sources(config, part, expected[part])
        _check(files, sources, expected[part], _unneeded(config, part))
        params[part] = {
            ours: Tensor(
                leaf.shape, memory_dtype(part, ours, dtype), partial(_pieces, files, sources[ours]), leaf.sharding
            )
            for ours, leaf in expected[part].items()
        }
    return config, {part: traverse_util.unflatten_dict(tree, sep=".") for part, tree in params.items()}, tokenizer


class _Files:
    """The safetensors of a folder, one file or shards with an index, and where each tensor is."""

    def __init__(self, folder: Path, is_vision: bool):
        self.folder = folder
        stems = ("diffusion_pytorch_model", "model")
        indices = [folder / f"{stem}.safetensors.index.json" for stem in stems]
        index, weight_map = next((path for path in indices if path.is_file()), None), {}
        if index is not None:
            weight_map = field(index, read_json(index), "weight_map")
            if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
                raise InputError(f"{index} is damaged: its weight_map does not give the name of a file for each tensor")
            paths = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            paths = [path for path in (folder / f"{stem}.safetensors" for stem in stems) if path.is_file()]
        if not paths:
            raise InputError(f"{folder} has no {stems[0]}.safetensors or {stems[1]}.safetensors{_hint(folder)}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._place_of: dict[str, tuple[TensorFile, str]] = {}
        for path in paths:
            file = TensorFile(path)
            weight_map = {name: shard for name, shard in weight_map.items() if name not in file.shapes}
            for stored, shape in file.shapes.items():
                # Older versions of the image encoder are saved so.
                name = stored.removeprefix("vision_model.") if is_vision else stored
                kind = file.formats[stored]
                if is_vision and name == "embeddings.position_ids":  # counts from 0
                    continue
                if kind not in FORMATS:
                    raise InputError(f"{path}: the tensor {name} is {kind}; only {', '.join(FORMATS)} can be read")
                if name in self.shapes:
                    raise InputError(
                        f"{path}: the tensor {stored} is there twice, also in {self._place_of[name][0].path}"
                    )
                self.shapes[name], self.dtypes[name] = shape, FORMATS[kind]
                self._place_of[name] = file, stored
        if weight_map:
            raise InputError(f"{index} names the tensor {min(weight_map)}, which none of its files holds")
        for copy, name in names.TEXT_COPIES.items():
            if copy in self.shapes:
                for known in (self.shapes, self.dtypes, self._place_of):
                    known.setdefault(name, known[copy])
                if self.shapes[copy] != self.shapes[name]:
                    raise InputError(f"{folder}: the tensors {copy} and {name} must be the same, and differ in shape")

    def read(self, name: str) -> np.ndarray:
        file, stored = self._place_of[name]
        return file.read(stored)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        file, stored = self._place_of[name]
        return file.pieces(stored)


def _hint(folder: Path) -> str:
    """What is there in place of safetensors of the usual names."""
    there = sorted(path.name for path in folder.glob("*") if path.suffix in (*PICKLES, ".safetensors"))
    if there and there[0].endswith(".safetensors"):
        return f", and no index for {there[0]}"
    return f" ({there[0]} is a pickle, which is never read: convert it to safetensors)" if there else ""


def _is_file_name(name: Any) -> bool:
    """Whether it names a file in the same folder, and not elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _pieces(files: _Files, source: names.Source) -> Iterator[np.ndarray]:
    """A parameter of ours, layer by layer where it is a stack of them."""
    if not source.stacked:
        name = source.names[0]
        if source.layout is names.AS_IS:
            yield from files.pieces(name)
        else:
            whole = source.layout.convert(files.read(name))
            yield _copy(whole, np.empty(whole.shape, whole.dtype))
        return
    dtypes = {files.dtypes[name] for name in source.names}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype("float32")
    size = dtype.itemsize * math.prod(files.shapes[source.names[0]])

    def read(layers: slice) -> np.ndarray:
        piece = None
        for number, name in enumerate(source.names[layers]):
            layer = source.layout.convert(files.read(name))
            if piece is None:
                piece = np.empty((layers.stop - layers.start, *layer.shape), dtype)
            _copy(layer, piece[number])
        return piece

    yield from ahead(partial(read, layers) for layers in spans(len(source.names), size))


def _copy(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Copies an array that may be turned, by strips that stay in the cache: NumPy itself takes three times as long."""
    for start in range(0, target.shape[-1], _STRIP):
        target[..., start : start + _STRIP] = source[..., start : start + _STRIP]
    return target


def _sources(config: ModelConfig, part: str, expected: dict[str, Any]) -> dict[str, names.Source]:
    find: Callable[[str], names.Source] = {
        "text": partial(names.text, config.text.layers),
        "codec": partial(names.codec, config.codec),
        "dit": partial(names.dit, config.dit),
        "dit_low": partial(names.dit, config.dit),
        "vision": partial(names.vision, config.vision),
    }[part]
    return {name: find(name) for name in expected}


def _unneeded(config: ModelConfig, part: str) -> Callable[[str], bool]:
    """Tells the published tensors that have no place in our model, and why is known."""
    if part == "text":
        return names.TEXT_COPIES.__contains__
    if part == "vision":
        return partial(names.is_after_vision, config.vision.layers)
    return lambda name: False


def _check(
    files: _Files,
    sources: dict[str, names.Source],
    expected: dict[str, Any],
    unneeded: Callable[[str], bool],
) -> None:
    """Raises InputError unless every tensor is used or unneeded, every parameter filled, and every shape right."""
    used = set()
    for ours, source in sources.items():
        shape = expected[ours].shape[1:] if source.stacked else expected[ours].shape
        for name in source.names:
            if name not in files.shapes:
                raise InputError(f"{files.folder}: the tensor {name} is missing")
            found, asked = files.shapes[name], source.layout.published(shape)
            if found != asked:
                raise InputError(
                    f"{files.folder}: the tensor {name} is {list(found)}; the config asks for {list(asked)}"
                )
            used.add(name)
    if left := {name for name in files.shapes.keys() - used if not unneeded(name)}:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise InputError(f"{files.folder}: the tensor {min(left)}{more} is not part of this model")
