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
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta
from jax.sharding import Mesh

from sora_jax import media
from sora_jax import tensors as tensors_lib
from sora_jax.codec import Codec, CodecConfig
from sora_jax.dit import DiT, DiTConfig
from sora_jax.errors import InputError, one_line
from sora_jax.json_files import read_json
from sora_jax.mesh import check_heads, shardings
from sora_jax.sampler import SCHEDULES, SOLVERS
from sora_jax.tensors import FORMATS, Tensor, TensorFile, fits_float32
from sora_jax.text import T5Encoder, TextConfig
from sora_jax.vision import VisionConfig, VisionEncoder

FORMAT_VERSION = 1
_STORED_AS = {dtype.name: name for name, dtype in FORMATS.items()}


@dataclass(frozen=True)
class SamplingConfig:
    """What `generate` does unless told otherwise.

    Attributes:
        steps: steps of the solver, >= 1.
        guidance: strength of classifier-free guidance, finite; 1 means none.
        shift: time shift of the noise levels, > 0; larger spends more steps at high noise.
        solver, schedule: of `sora_jax.sampler`.
        guidance_low: the guidance of the transformer for low noise levels, where there is one; None is `guidance`.
        frames: frames per video.
        size: (height, width) in pixels.
        fps: frames per second, 0.001 to 1000.

    Raises:
        ValueError: a number out of range, or no such solver or schedule.
    """

    steps: int = 30
    guidance: float = 4.0
    shift: float = 3.0
    solver: str = "unipc"
    frames: int = 17
    size: tuple[int, int] = (128, 128)
    fps: float = 8.0
    schedule: str = "linear"
    guidance_low: float | None = None

    @property
    def is_guided(self) -> bool:
        """Whether there is guidance: at 1, the half without the prompt has no weight."""
        return not self.guidance == 1.0 or self.guidance_low not in (None, 1.0)

    def __post_init__(self) -> None:
        for name, least in (("steps", self.steps), ("frames", self.frames), ("size", min(self.size))):
            if least < 1:
                raise ValueError(f"{name} must be at least 1, not {least}")
        for name in ("guidance", "guidance_low", "shift", "fps"):
            if not fits_float32(getattr(self, name) or 0.0):
                raise ValueError(f"{name} must be a finite number, not {getattr(self, name)}")
        if self.shift <= 0:
            raise ValueError(f"shift must be above 0, not {self.shift}")
        media.check_fps(self.fps)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} does not exist; there are {', '.join(SOLVERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} does not exist; there are {', '.join(SCHEDULES)}")


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its parameters.

    Attributes:
        text, codec, dit: configs of the three parts.
        sampling: defaults of `generate`.
        vocabulary: lower-case words the model was trained on; empty if it is not limited to a list.
        description: one line on what the model can show.
        dtype: precision of the parameters in the folder; "bfloat16" is that of the large products (`memory_dtype`).
        boundary: the noise level from which on upwards "dit" is used and below which "dit_low", a second transformer
            of the same sizes (Wan 2.2 A14B); None if there is one for all levels.
        known_frames: whether the transformer has learned that frames at level 0 are given.
        vision: the image encoder, for transformers that attend to an image.
    """

    text: TextConfig
    codec: CodecConfig
    dit: DiTConfig
    sampling: SamplingConfig = SamplingConfig()
    vocabulary: tuple[str, ...] = ()
    description: str = ""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    boundary: float | None = None
    known_frames: bool = False
    vision: VisionConfig | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that have parameters."""
        return ("text", "codec", *self.transformers, *(("vision",) if self.vision else ()))

    @property
    def transformers(self) -> tuple[str, ...]:
        """Those of the parts that denoise: one for all noise levels, or one for high and one for low ones."""
        return ("dit",) if self.boundary is None else ("dit", "dit_low")

    def __post_init__(self) -> None:
        for part, here, there in (
            ("text", self.dit.text_width, self.text.width),
            ("codec", self.dit.latent_channels, self.codec.latent_channels),
        ):
            if here != there:
                raise ValueError(f"dit expects {here} channels from {part}, which has {there}")
        if self.dit.image_width != (self.vision.width if self.vision else 0):
            raise ValueError(f"dit expects {self.dit.image_width} channels from vision, which has another width")
        if self.dit.condition_channels not in (0, self.codec.stride_time + self.codec.latent_channels):
            raise ValueError("the condition of dit is a mask of stride_time channels, and latents")
        if self.boundary is not None and not 0 <= self.boundary <= 1:
            raise ValueError(f"boundary must be a noise level, from 0 to 1, not {self.boundary}")


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> dict[str, Any]:
    """Names and shapes of all parameters: {"text": ..., "codec": ..., "dit": ...} of ShapeDtypeStruct.

    With a mesh they say where each parameter belongs.

    Raises:
        InputError: the mesh cannot divide a parameter.
    """
    boxed = _boxed_params(config)
    params = meta.unbox(boxed)
    if mesh is None:
        return params
    check_heads(config.dit.heads, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings(boxed, mesh),
    )


@cache  # tracing takes seconds
def _boxed_params(config: ModelConfig) -> dict[str, Any]:
    codec = config.codec
    frames, side = 1 + codec.stride_time, codec.stride_space * max(config.dit.patch)
    ids_BL = jnp.zeros((1, config.text.length), jnp.int32)
    latent_shape = codec.latent_shape(frames, side, side)
    condition = jnp.zeros((1, *latent_shape[:3], config.dit.condition_channels))
    image_tokens = config.dit.image_positions or 1
    inputs = {
        "text": (T5Encoder(config.text), ids_BL),
        "codec": (Codec(codec), jnp.zeros((1, frames, side, side, 3))),
        "dit": (
            DiT(config.dit),
            jnp.zeros((1, *latent_shape)),
            jnp.zeros((1, 2)),
            jnp.zeros((*ids_BL.shape, config.text.width)),
            condition,
            jnp.zeros((1, image_tokens, config.dit.image_width)),
        ),
    }
    if config.vision is not None:
        side = config.vision.image_size
        inputs["vision"] = (VisionEncoder(config.vision), jnp.zeros((1, side, side, 3)))

    if config.boundary is not None:
        inputs["dit_low"] = inputs["dit"]

    def init(key: jax.Array) -> dict[str, Any]:
        return {part: module.init(key, *x)["params"] for part, (module, *x) in inputs.items()}

    return jax.eval_shape(init, jax.random.key(0))


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
    if path.exists() and not (path / "model.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"cannot write the model to {path}: something other than a model folder is there")
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


def memory_dtype(part: str, name: str, dtype: str) -> np.dtype:
    """The precision in which a parameter is held for computing in `dtype`.

    That of the large products of text encoder and transformer; norms, modulation, the noise level and the codec stay
    float32, as the published pipelines have it.
    """
    large = name.endswith("embedding") or (name.startswith(("blocks.", "text_")) and name.endswith("kernel"))
    return jnp.dtype(dtype if large and part in ("text", "dit", "dit_low") else "float32")


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
        raise InputError(f"there is no model folder {path}")
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
    leaves = _flatten(meta.unbox(params))
    _check_shapes(f"the {part} parameters", {name: leaf.shape for name, leaf in leaves.items()}, _flatten(expected))

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
    expected, file = _flatten(expected), TensorFile(path)
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


def _flatten(tree: Any) -> dict[str, Any]:
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
    config = _read_json(path / "codec.json", CodecConfig)
    tensors = _open_part(path / "codec.safetensors", _abstract_codec_params(config), "float32")
    return config, jax.tree.map(Tensor.read, tensors)


def _abstract_codec_params(config: CodecConfig) -> Any:
    side = config.stride_space
    video = jax.ShapeDtypeStruct((1, 1 + config.stride_time, side, side, 3), jnp.float32)
    return meta.unbox(jax.eval_shape(Codec(config).init, jax.random.key(0), video)["params"])
