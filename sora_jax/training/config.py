"""What a training config says: the configs of the models it makes, and what it must be before anything is made.

It has to be whole, its numbers possible, and its work directory that of the same run.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sora_jax import mesh as mesh_lib
from sora_jax.attention import check_kernel
from sora_jax.codec import CodecConfig
from sora_jax.data.worlds import vocabulary
from sora_jax.dit import DiTConfig
from sora_jax.errors import InputError, one_line
from sora_jax.json_files import read_json
from sora_jax.model_config import ModelConfig, SamplingConfig
from sora_jax.request import check_multiple
from sora_jax.safety.gate import check_prompts
from sora_jax.text import TextConfig
from sora_jax.text.tokenizer import VOCABULARY_SIZE
from sora_jax.training.state import make_optimizer

# What every config has, and what those of a task have besides.
_FIELDS = (
    *("task", "seed", "start_from", "steps", "batch", "frames", "size", "dtype", "data", "optimizer", "ema_decay"),
    *("mesh", "log_every", "preview_every", "checkpoint_every"),
)
_FIELDS_OF = {
    "codec": ("clip_frames", "crop", "on_object", "codec", "freeze_encoder", "loss"),
    "dit": ("codec", "text", "dit", "kernel", "flow", "align", "sampling", "prompts"),
}
# What numbers can be, of those whose mistakes would only show after hours; NaN is none of them.
_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
    (
        (
            *("steps", "batch", "frames", "size", "log_every", "checkpoint_every"),
            *("clip_frames", "crop", "data.clips", "data.shard", "data.captions", "text.length"),
        ),
        "at least 1",
        lambda value: value >= 1,
    ),
    (("seed", "data.seed"), "from 0 to below 2**31", lambda value: 0 <= value < 2**31),
    (
        (
            *("preview_every", "optimizer.warmup", "optimizer.weight_decay", "align.weight", "align.objects"),
            *("loss.absolute", "loss.squared", "loss.kl"),
        ),
        "at least 0",
        lambda value: 0 <= value < math.inf,
    ),
    (
        ("optimizer.learning_rate", "optimizer.clip", "flow.shift", "flow.uniform_shift"),
        "above 0",
        lambda value: 0 < value < math.inf,
    ),
    (
        (
            *("optimizer.decay", "flow.uniform_share", "flow.drop_text", "flow.known_share", "flow.seen_share"),
            *("on_object", "loss.outlines", "flow.mistaken_share"),
        ),
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
    ),
    (("ema_decay", "optimizer.b1", "optimizer.b2"), "from 0 to below 1", lambda value: 0 <= value < 1),
)
_OF_DRAWN_LATENTS = ("data.clips", "data.shard", "data.captions", "data.seed")  # which the codec's data has not
# What a work directory's data and weights were made with, and a later start may not change.
_LASTING = {
    "codec": ("task", "codec", "optimizer.name"),
    "dit": ("task", "codec", "text", "dit", "size", "frames", "optimizer.name"),
}
# What may be another number at each start: how far, and how often something is written.
_FREE = {"steps", "log_every", "preview_every", "checkpoint_every", "mesh", "start_from"}


def _fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a group, with tuples for the lists that JSON makes of them: frozen dataclasses are hashed."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


def _make(kind: type, name: str, **fields: Any) -> Any:
    """A dataclass of the fields that `config.name` has; InputError, with the name, if none is possible."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"config.{name}: {error}") from error


def codec_config(config: ConfigDict) -> CodecConfig:
    """The codec described by `config.codec`.

    Raises:
      InputError: it describes no possible codec.
    """
    return _make(CodecConfig, "codec", **_fields(config.codec))


def trained_configs(config: ConfigDict, latent_channels: int) -> tuple[TextConfig, DiTConfig]:
    """Those of the text encoder and the transformer.

    Raises:
      InputError: the configuration describes none that are possible.
    """
    text = _make(TextConfig, "text", **_fields(config.text))
    widths = dict(latent_channels=latent_channels, text_width=text.width)
    return text, _make(DiTConfig, "dit", **widths, **_fields(config.dit))


def _sampling_config(config: ConfigDict) -> SamplingConfig:
    shape = dict(frames=config.frames, size=(config.size, config.size))
    return _make(SamplingConfig, "sampling", **shape, **_fields(config.sampling))


def model_config(config: ConfigDict, codec: CodecConfig) -> ModelConfig:
    """The whole model that a run makes.

    Raises:
      InputError: the configuration describes no possible model.
    """
    text, dit = trained_configs(config, codec.latent_channels)
    # What it is aligned with is the truth of the worlds, stored or not; of other clips nothing is known.
    of_worlds = not config.data.dir or config.align.weight > 0
    try:
        model = ModelConfig(
            text=text,
            codec=codec,
            dit=dit,
            sampling=_sampling_config(config),
            vocabulary=tuple(sorted(vocabulary.known_words())) if of_worlds else (),
            description=vocabulary.DESCRIPTION if of_worlds else "",
            known_frames=config.flow.known_share > 0,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"config: {error}") from error
    check_multiple("config.frames", config.frames, codec.stride_time, 1)
    check_multiple("config.size", config.size, codec.stride_space * max(dit.patch), 0)
    return model


def check_local(folder: str | Path, name: str) -> None:
    """Raises InputError if a folder is named as only buckets are, which each host would take for a path of its own."""
    if re.match(r"\w\w+:/", str(folder)):
        raise InputError(f"{name} {folder} is no path: mount the bucket (gcsfuse for gs://) and give the folder")


def check_config(config: ConfigDict) -> None:
    """Raises InputError for a config that is not whole, or numbers and names in it that cannot be."""
    needed = (*_FIELDS, *_FIELDS_OF.get(config.task, ())) if "task" in config else ("task",)
    if missing := [name for name in needed if name not in config]:
        raise InputError(f"the config has no field {missing[0]}; those in configs/ of sora_jax have all")
    if config.task not in _FIELDS_OF:
        raise InputError(f"config.task is {config.task!r}; it can be 'codec' or 'dit'")
    try:
        _check_values(config)
    except (AttributeError, KeyError) as error:
        raise InputError(f"the config is not whole; those in configs/ of sora_jax are: {one_line(error)}") from error
    except TypeError as error:  # None elsewhere
        raise InputError(f"a value of the config has the wrong type: {one_line(error)}") from error


def _check_values(config: ConfigDict) -> None:
    own = (*_FIELDS, *_FIELDS_OF[config.task])
    for names, words, fits in _RANGES:
        for name in names:
            group, _, field = name.rpartition(".")
            if (group or field) not in own or (config.task == "codec" and name in _OF_DRAWN_LATENTS):
                continue
            value = (config[group] if group else config)[field]
            if not isinstance(value, int | float) or not fits(value):  # a field of any type takes None
                raise InputError(f"config.{name} is {value}; it must be {words}")
    for axis, size in config.mesh.items():
        if axis not in mesh_lib.AXES or type(size) is not int:
            raise InputError(f"config.mesh.{axis} is {size}; it must be whole numbers of {', '.join(mesh_lib.AXES)}")
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"config.dtype is {config.dtype!r}; it can be 'float32' or 'bfloat16'")
    (_check_codec if config.task == "codec" else _check_dit)(config)
    make_optimizer(config.optimizer, config.steps)


def _check_codec(config: ConfigDict) -> None:
    codec = codec_config(config)
    for name in ("frames", "clip_frames"):
        check_multiple(f"config.{name}", config[name], codec.stride_time, 1)
    for name in ("crop", "size"):
        check_multiple(f"config.{name}", config[name], codec.stride_space, 0)
    if config.frames > config.clip_frames or config.crop > config.size:
        raise InputError("a window (config.frames, config.crop) must fit into a clip (clip_frames, size)")
    if config.freeze_encoder and not config.start_from:
        raise InputError("config.freeze_encoder trains the decoder of config.start_from, which is empty")
    if config.freeze_encoder and config.optimizer.weight_decay:
        raise InputError("config.freeze_encoder needs --config.optimizer.weight_decay=0, which shrinks all kernels")


def _check_dit(config: ConfigDict) -> None:
    trained_configs(config, 1)  # how many channels latents have, only the codec knows
    _sampling_config(config)
    if config.align.weight and not 1 <= config.align.layer <= config.dit.layers:
        raise InputError(f"config.align.layer is {config.align.layer}; it must be 1 to {config.dit.layers}")
    if config.text.vocabulary_size < VOCABULARY_SIZE:
        raise InputError(
            f"config.text.vocabulary_size is {config.text.vocabulary_size}; bytes need at least {VOCABULARY_SIZE}"
        )
    if not config.prompts:
        raise InputError("config.prompts is empty; it must hold a prompt for the previews")
    try:
        check_prompts(config.prompts)
    except InputError as error:
        raise InputError(f"config.prompts: {error}") from error
    check_kernel(config.kernel)


def check_shares(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    """Raises InputError if a mesh of these sizes cannot share the batch or the heads."""
    if config.task == "dit":
        mesh_lib.check_heads(config.dit.heads, sizes)
    shares = sizes["data"] * sizes["fsdp"]
    if config.batch % shares:
        raise InputError(f"config.batch is {config.batch}; it must be a multiple of {shares}, which share it")


def check_run(config: ConfigDict, workdir: Path, mesh: Mesh) -> str:
    """Raises InputError, before any work, for what the mesh cannot share and for another run's work directory.

    Returns:
      what the work directory was made with and this config has otherwise, so that the run goes on, but not as it would
      have done without a pause; "" if there is nothing of the kind.
    """
    check_shares(config, mesh.shape)
    path = workdir / "config.json"
    if not path.exists():
        return ""
    before, now = (
        flatten_dict(values, sep=".") for values in (read_json(path), json.loads(config.to_json_best_effort()))
    )
    changed = [name for name in now if now[name] != before.get(name)]
    for lasting in _LASTING.get(config.task, ("task",)):
        for name in changed:
            if name == lasting or name.startswith(f"{lasting}."):
                raise InputError(
                    f"{workdir} was started with another config.{name}: {before.get(name)}; use a new --workdir"
                )
    return ", ".join(
        f"{name} {before[name]} -> {now[name]}"
        for name in changed
        if name in before and name.partition(".")[0] not in _FREE
    )


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes down, as config.json, what a work directory is made with."""
    hidden = workdir / ".config.json"
    hidden.write_text(config.to_json_best_effort(indent=1) + "\n")
    hidden.replace(workdir / "config.json")
