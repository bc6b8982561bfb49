"""What a training config must be, before anything is made from it: whole, its numbers possible, its run the same."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sora_jax import mesh as mesh_lib
from sora_jax.attention import check_kernel
from sora_jax.errors import InputError, one_line
from sora_jax.json_files import read_json
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
        ("steps", "batch", "frames", "size", "log_every", "checkpoint_every", "sampling.steps"),
        "at least 1",
        lambda value: value >= 1,
    ),
    (
        ("seed", "preview_every", "optimizer.warmup", "optimizer.weight_decay", "align.weight", "align.objects"),
        "at least 0",
        lambda value: 0 <= value < math.inf,
    ),
    (
        ("optimizer.learning_rate", "optimizer.clip", "flow.shift", "flow.uniform_shift", "sampling.shift"),
        "above 0",
        lambda value: 0 < value < math.inf,
    ),
    (
        ("optimizer.decay", "flow.uniform_share", "flow.drop_text", "flow.known_share", "flow.seen_share"),
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
    ),
    (("ema_decay", "optimizer.b1", "optimizer.b2"), "from 0 to below 1", lambda value: 0 <= value < 1),
)
# What a work directory's data and weights were made with, and a later start may not change.
_LASTING = {"codec": ("task", "codec"), "dit": ("task", "codec", "text", "dit", "size", "frames")}


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


def _check_values(config: ConfigDict) -> None:
    for names, words, fits in _RANGES:
        for name in names:
            group, _, field = name.rpartition(".")
            if group in _FIELDS_OF["dit"] and config.task != "dit":
                continue
            value = (config[group] if group else config)[field]
            if not fits(value):
                raise InputError(f"config.{name} is {value}; it must be {words}")
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"config.dtype is {config.dtype!r}; it can be 'float32' or 'bfloat16'")
    if config.task == "dit":
        for name in ("clips", "shard", "captions"):
            if config.data[name] < 1:
                raise InputError(f"config.data.{name} is {config.data[name]}; it must be at least 1")
        if config.align.weight and not 1 <= config.align.layer <= config.dit.layers:
            raise InputError(f"config.align.layer is {config.align.layer}; it must be 1 to {config.dit.layers}")
        if config.text.vocabulary_size < VOCABULARY_SIZE:
            raise InputError(
                f"config.text.vocabulary_size is {config.text.vocabulary_size}; bytes need at least {VOCABULARY_SIZE}"
            )
        if config.data.seed < 0 or not config.prompts:
            raise InputError(
                "config.data.seed must be at least 0, and config.prompts must hold a prompt for the previews"
            )
        check_kernel(config.kernel)
    make_optimizer(config.optimizer, config.steps)


def check_run(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Raises InputError, before any work, for what the mesh cannot share and for another run's work directory."""
    if config.task == "dit":
        mesh_lib.check_heads(config.dit.heads, mesh)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch % shares:
        raise InputError(f"config.batch is {config.batch}; it must be a multiple of {shares}, which share it")
    path = workdir / "config.json"
    if not path.exists():
        return
    before = read_json(path)
    now = json.loads(config.to_json_best_effort())
    for name in _LASTING.get(config.task, ("task",)):
        if before.get(name) != now[name]:
            raise InputError(
                f"{workdir} was started with another config.{name}: {before.get(name)}; use a new --workdir"
            )


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes down, as config.json, what a work directory is made with."""
    hidden = workdir / ".config.json"
    hidden.write_text(config.to_json_best_effort(indent=1) + "\n")
    hidden.replace(workdir / "config.json")
