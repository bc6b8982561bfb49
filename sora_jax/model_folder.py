"""A model as a folder: `model.json` with the configs, and one safetensors file of parameters per part.

    model.json          format version, configs of the parts, sampling defaults, known words
    text.safetensors    parameters of the text encoder; each key is the parameter's path joined by "."
    codec.safetensors   parameters of the video codec
    dit.safetensors     parameters of the diffusion transformer
    dit_low.safetensors the same for low noise levels, if the model has a second transformer
    vision.safetensors  parameters of the image encoder, if the model has one
    tokenizer.json      how the text encoder reads text, unless it reads bytes

Reading is strict: every tensor must be expected and every expected tensor present, in the stated precision
and shape. A folder that was read and is written again is identical byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import secrets
import shutil
import types
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta
from jax.sharding import Mesh

from sora_jax import tensors as tensors_lib
from sora_jax.codec import Codec, CodecConfig
from sora_jax.errors import InputError, one_line
from sora_jax.json_files import read_json
from sora_jax.model_config import ModelConfig, abstract_params, memory_dtype
from sora_jax.tensors import FORMATS, Tensor, TensorFile

FORMAT_VERSION = 1
_STORED_AS = {dtype.name: name for name, dtype in FORMATS.items()}


def write_model_folder(
    path: str | os.PathLike,
    config: ModelConfig,
    params: dict[str, Any],
    dtype: str | None = None,
    tokenizer: bytes | None = None,
) -> Path:
    """Writes the model to the folder `path`, which appears complete or not at all.

    Args:
        path: the folder; its parent must exist.
        config: the configs.
        params: {"text": tree, "codec": tree, "dit": tree} of arrays, or of `Tensor`s, which are read as they are
            written; exactly as `abstract_params` lists them.
        dtype: "float32", "float16" or "bfloat16"; by default `config.dtype`.
        tokenizer: what tokenizer.json holds, if `config.text.tokenizer` is "file".

    Raises:
        InputError: if parameters do not fit the config or the precision, if `path` is something else than a
            model folder (an older model is replaced), or if it cannot be written.
    """
    path = Path(path)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    if config.dtype not in _STORED_AS:
        raise InputError(f"a model folder holds float32, float16 or bfloat16, not {config.dtype}")
    if path.exists() and not _may_be_replaced(path):
        raise InputError(f"cannot write the model to {path}: something other than a model is there, or beside one")
    expected = abstract_params(config)
    tensors = {part: _stored(part, params[part], expected[part], config.dtype) for part in config.parts}
    with _complete_or_absent(path, "the model") as hidden:
        for part in config.parts:
            tensors_lib.write(hidden / f"{part}.safetensors", tensors[part])
        if config.text.tokenizer == "file":
            (hidden / "tokenizer.json").write_bytes(tokenizer)
        text = json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}, indent=1)
        (hidden / "model.json").write_text(text + "\n", encoding="utf-8")
    return path


def _may_be_replaced(path: Path) -> bool:
    """Whether what is there is an empty folder, or a model folder with nothing else in it."""
    if not path.is_dir():
        return False
    there = {one.name for one in path.iterdir()}
    if not there:
        return True
    parts = ("text", "codec", "dit", "dit_low", "vision")
    ours = {"model.json", "tokenizer.json", *(f"{part}.safetensors" for part in parts)}
    try:
        return there <= ours and "format_version" in read_json(path / "model.json")
    except InputError:
        return False


@contextlib.contextmanager
def _complete_or_absent(path: Path, what: str) -> Iterator[Path]:
    """A hidden folder to fill, which then takes the place of `path`: never half of it, nor beside half of an older one.

    Raises:
        InputError: the folder cannot be written.
    """
    token = secrets.token_hex(8)
    hidden, older = (path.absolute().parent / f".{token}.{role}" for role in ("new", "old"))
    try:
        hidden.mkdir()
        yield hidden
        if path.exists():
            os.rename(path, older)
        os.rename(hidden, path)
    except OSError as error:
        raise InputError(f"cannot write {what} to {path}: {error.strerror}") from error
    finally:
        if older.exists() and not path.exists():  # whatever came between the two
            os.rename(older, path)
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def read_model_folder(path: str | os.PathLike, dtype: str = "float32") -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a model folder for computing in `dtype`, "float32" or "bfloat16".

    Returns:
        The config, and {"text": tree, "codec": tree, "dit": tree} of NumPy arrays (see `memory_dtype`).

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    config, tensors = open_model_folder(path, dtype)
    return config, jax.tree.map(Tensor.read, tensors)


def open_model_folder(
    path: str | os.PathLike, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """As `read_model_folder`, with `Tensor`s that are yet to be read in place of the arrays.

    Args:
        mesh: the devices where the parameters belong; by default the one that JAX has by default.

    Raises:
        InputError: naming the file and what is wrong with it, or the parameter that the mesh cannot divide.
    """
    path, config = Path(path), read_config(path)
    with described_by(path / "model.json"):
        expected = abstract_params(config, mesh)
    return config, {
        part: _open_part(path / f"{part}.safetensors", expected[part], config.dtype, part, dtype)
        for part in config.parts
    }


@contextlib.contextmanager
def described_by(path: Path) -> Iterator[None]:
    """Around what may object to a config, as any module does in its own way: raises InputError that names `path`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} describes no possible model: {one_line(error)}") from error


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The config of a model folder alone; raises InputError."""
    if not Path(path).is_dir():
        raise InputError(
            f"there is no model folder {path}; it must be a folder on this machine (docs/wan.md names some to fetch)"
        )
    if Path(path, "model_index.json").exists() and not Path(path, "model.json").exists():
        raise InputError(f"{path} is in the layout of diffusers, which is not read here: `sora-jax convert` it first")
    if not Path(path, "model.json").exists():
        raise InputError(f"{path} is no model folder: it holds no model.json, and no model_index.json as Wan's do")
    return _read_json(Path(path, "model.json"), ModelConfig)


def _read_json(path: Path, kind: type) -> Any:
    values = read_json(path)
    version = values.pop("format_version", None)
    if type(version) is not int or version < 1:
        raise InputError(f"{path} is no model description: it has no format_version")
    if version > FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}; upgrade it")
    return _parse(kind, values, "", path)


def _parse(kind: Any, value: Any, name: str, path: Path) -> Any:
    """The JSON `value` of the field `name` as the annotated type `kind`."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        kinds = typing.get_type_hints(kind)
        prefix = f"{name}." if name else ""
        for key in value.keys() - kinds.keys():
            close = difflib.get_close_matches(key, kinds, 1)
            raise InputError(f"{path}: unknown field {prefix}{key}{f'; is it {close[0]}?' if close else ''}")
        for field in dataclasses.fields(kind):
            if field.name not in value and field.default is dataclasses.MISSING:
                raise InputError(f"{path}: the field {prefix}{field.name} is missing")
        values = {key: _parse(kinds[key], value[key], prefix + key, path) for key in kinds if key in value}
        try:
            return kind(**values)
        except ValueError as error:
            raise InputError(f"{path}: {f'{name}: ' if name else ''}{one_line(error)}") from error
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list):
        kinds = options[:1] * len(value) if options[1:] == (...,) else options
        if len(kinds) == len(value):
            return tuple(
                _parse(each, v, f"{name}[{i}]", path) for i, (each, v) in enumerate(zip(kinds, value, strict=True))
            )
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _parse(next(option for option in options if option is not type(None)), value, name, path)
    elif origin is Literal:
        if value in options:
            return value
    elif kind is float and type(value) in (int, float) or kind is type(value):
        return value
    shown = json.dumps(value)
    expected = kind.__name__ if isinstance(kind, type) and origin is None else str(kind).replace("typing.", "")
    raise InputError(f"{path}: {name or 'the top level'} must be {expected}, not {shown[:40]}")


def _stored(part: str, params: Any, expected: Any, dtype: str) -> dict[str, Tensor]:
    """Flattened tensors in the precision of the folder, checked against the expected names and shapes."""
    leaves = flatten(meta.unbox(params))
    _check_shapes(f"the {part} parameters", {name: leaf.shape for name, leaf in leaves.items()}, flatten(expected))

    def pieces(name: str, kind: np.dtype) -> Iterator[np.ndarray]:
        leaf = leaves[name]
        for piece in leaf.pieces() if isinstance(leaf, Tensor) else [np.asarray(leaf)]:
            with np.errstate(over="ignore"):
                piece = piece.astype(kind, copy=False)
            if not np.isfinite(piece).all():
                raise InputError(f"the {part} parameter {name} has values that {dtype} cannot hold")
            yield piece

    kinds = {name: _folder_dtype(part, name, dtype) for name in leaves}
    return {name: Tensor(leaf.shape, kinds[name], partial(pieces, name, kinds[name])) for name, leaf in leaves.items()}


def _folder_dtype(part: str, name: str, dtype: str) -> np.dtype:
    return memory_dtype(part, name, dtype) if dtype == "bfloat16" else np.dtype(dtype)


def _open_part(path: Path, expected: Any, folder_dtype: str, part: str = "codec", dtype: str = "float32") -> Any:
    """The tree of `Tensor`s of one file, checked against the expected names, shapes and precision."""
    expected, file = flatten(expected), TensorFile(path)
    _check_shapes(str(path), file.shapes, expected)
    for name, format in file.formats.items():
        if format != (stored_as := _STORED_AS[_folder_dtype(part, name, folder_dtype).name]):
            raise InputError(f"{path}: tensor {name} is {format}, model.json says {stored_as}")
    tensors = {
        name: Tensor(leaf.shape, memory_dtype(part, name, dtype), partial(file.pieces, name), leaf.sharding)
        for name, leaf in expected.items()
    }
    return traverse_util.unflatten_dict(tensors, sep=".")


def _check_shapes(where: str, shapes: dict[str, tuple[int, ...]], expected: dict[str, Any]) -> None:
    for names, problem in (
        (expected.keys() - shapes.keys(), "is missing"),
        (shapes.keys() - expected.keys(), "is not part of this model"),
    ):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"{where}: tensor {min(names)} {problem}{others}")
    for name, shape in shapes.items():
        if tuple(shape) != expected[name].shape:
            raise InputError(f"{where}: tensor {name} is {list(shape)}, it must be {list(expected[name].shape)}")


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters, by names such as blocks.up.kernel."""
    return traverse_util.flatten_dict(tree, sep=".")


def write_codec(path: Path, config: CodecConfig, params: Any) -> None:
    """Writes a codec alone (`codec.json`, `codec.safetensors`, float32) as a new folder, complete or not at all."""
    tensors = _stored("codec", params, _abstract_codec_params(config), "float32")
    with _complete_or_absent(path, "the codec") as hidden:
        tensors_lib.write(hidden / "codec.safetensors", tensors)
        text = json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}, indent=1)
        (hidden / "codec.json").write_text(text + "\n", encoding="utf-8")


def read_codec(path: str | os.PathLike) -> tuple[CodecConfig, Any]:
    """The codec of a folder made by `write_codec`, or of a whole model folder, as float32 NumPy arrays."""
    path = Path(path)
    if (path / "model.json").is_file():
        config, tensors = open_model_folder(path)
        return config.codec, jax.tree.map(Tensor.read, tensors["codec"])
    if not (path / "codec.json").exists():
        raise InputError(f"there is no codec in {path}; expected a model folder, or the folder of a codec's training")
    config = _read_json(path / "codec.json", CodecConfig)
    tensors = _open_part(path / "codec.safetensors", _abstract_codec_params(config), "float32")
    return config, jax.tree.map(Tensor.read, tensors)


def _abstract_codec_params(config: CodecConfig) -> Any:
    side = config.stride_space
    video = jax.ShapeDtypeStruct((1, 1 + config.stride_time, side, side, 3), jnp.float32)
    return meta.unbox(jax.eval_shape(Codec(config).init, jax.random.key(0), video)["params"])
