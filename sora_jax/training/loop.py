"""The training loop: restore, step, log, preview, save. The same for every task, on whatever devices there are.

With several processes (see `hosts.py`) each runs all of this, and the first alone writes logs and previews.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict
from tqdm import tqdm

from sora_jax import hosts
from sora_jax import mesh as mesh_lib
from sora_jax.attention import check_kernel
from sora_jax.errors import InputError, Refused, one_line
from sora_jax.json_files import read_json
from sora_jax.mesh_choice import training_mesh
from sora_jax.model_folder import read_codec, write_model_folder
from sora_jax.text.tokenizer import VOCABULARY_SIZE
from sora_jax.training import state as state_lib
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.video import Video


def make_task(config: ConfigDict, workdir: Path):
    """The task that `config.task`, one of those that `check_config` lets pass, names."""
    if config.task == "codec":
        from sora_jax.training.codec_task import CodecTask

        return CodecTask(config)
    from sora_jax.training.dit_task import DiTTask

    return DiTTask(config, workdir)


def initial_state(task, optimizer, config: ConfigDict, mesh) -> tuple:
    """Abstract state with its shardings, and a function that makes the state already sharded.

    It takes the parameters that are not to be fresh, by their names, as `_pretrained` gives them.
    """

    def create():
        return state_lib.create(task.initialize(jax.random.key(config.seed)), optimizer)

    boxed = jax.eval_shape(create)
    placed = mesh_lib.shardings(boxed, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        meta.unbox(boxed),
        placed,
    )

    def make(found):
        if not found:
            return jax.jit(lambda: meta.unbox(create()), out_shardings=placed)()

        def create_from(found):
            # What the folder does not have, such as a network that only training uses, is fresh.
            params = meta.unbox(task.initialize(jax.random.key(config.seed)))
            return state_lib.create({**params, **found}, optimizer)

        return jax.jit(create_from, out_shardings=placed)(found)

    return abstract, make


def _pretrained(task, config: ConfigDict, abstract) -> dict:
    """The parameters that `config.start_from` has for a new run, if it names a model.

    Raises:
      InputError: they do not fit.
    """
    found = task.pretrained(config.start_from) if config.start_from else {}
    if not found.keys() <= abstract.params.keys() or _shapes(found) != _shapes(
        {name: abstract.params[name] for name in found}
    ):
        raise InputError(f"the model in {config.start_from} does not fit this configuration")
    return found


def _shapes(tree):
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


def train(config: ConfigDict, workdir: str | Path, mesh_words: str | None = None) -> bool:
    """Trains until `config.steps`, from the newest checkpoint in `workdir` if there is one.

    A run that was interrupted and started again equals one that was not: parameters, optimizer, EMA, randomness and
    data all follow from the checkpoint. SIGTERM saves and returns. A new run starts from fresh parameters, or from
    those of the model folder `config.start_from`.

    Args:
      mesh_words: such as "fsdp=4,context=2", or "auto", in place of `config.mesh`.

    Returns:
      whether all steps are done: not if SIGTERM came first.

    Raises:
      InputError: the configuration does not fit the work directory, or the loss is no longer finite.
      HostLost: another process of the run is gone.
    """
    check_local(workdir, "the work directory")
    workdir = Path(workdir)
    check_config(config)
    if mesh_words is not None:
        config.mesh = _sizes(config, mesh_words)
    mesh = mesh_lib.make_mesh(**config.mesh)
    _check(config, workdir, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with hosts.watched():
        hosts.check_shared(workdir)
        with hosts.alone():
            task = make_task(config, workdir)
        optimizer = state_lib.make_optimizer(config.optimizer, config.steps)
        with jax.set_mesh(mesh):
            abstract, make = initial_state(task, optimizer, config, mesh)
        with Checkpoints(workdir) as checkpoints:
            is_new = checkpoints.latest() is None
        found = _pretrained(task, config, abstract) if is_new else {}
        with hosts.alone():
            task.prepare()  # only now: it may take long, and the mesh and the model fit
        with jax.set_mesh(mesh):
            with Checkpoints(workdir) as checkpoints, hosts.watched():
                state = make(found) if is_new else checkpoints.restore(abstract)
                del found  # the host need not hold them any longer
                try:
                    return _run(config, workdir, task, optimizer, checkpoints, state, mesh_lib.batch_sharding(mesh))
                except KeyboardInterrupt:
                    # The state of an interrupted step has been donated; what counts is the last finished checkpoint.
                    saved = "nothing" if (step := checkpoints.latest()) is None else f"step {step}"
                    tqdm.write(f"interrupted; {saved} is saved in {workdir}")
                    raise


def _sizes(config: ConfigDict, words: str) -> dict[str, int]:
    """The sizes of a mesh in words; what "auto" chose is said."""
    if words == "auto":
        from sora_jax.training.dit_task import trained_configs

        # Of a codec there is nothing that a mesh must divide. The latents' channels do not matter here.
        trained = trained_configs(config, 1) if config.task == "dit" else ()
        words, reason = training_mesh(config.batch, jax.device_count(), *trained)
        if hosts.is_first():
            tqdm.write(f"mesh {words}: {reason}", file=sys.stderr)
    return mesh_lib.parse_sizes(words)


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
    state_lib.make_optimizer(config.optimizer, config.steps)


def _check(config: ConfigDict, workdir: Path, mesh) -> None:
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


def _write_config(config: ConfigDict, workdir: Path) -> None:
    hidden = workdir / ".config.json"
    hidden.write_text(config.to_json_best_effort(indent=1) + "\n")
    hidden.replace(workdir / "config.json")


class _Log:
    """What one sees of a run: metrics.jsonl, TensorBoard and a progress bar, by the first process alone."""

    def __init__(self, config: ConfigDict, workdir: Path, start: int):
        self._first, self._workdir, self._path = hosts.is_first(), workdir, workdir / "metrics.jsonl"
        self._bar = tqdm(
            total=config.steps,
            initial=start,
            unit="step",
            desc=f"train {config.task}",
            smoothing=0.05,
            disable=not self._first,
        )
        if self._first:
            from tensorboardX import SummaryWriter

            # What was logged after the checkpoint is logged again.
            _forget_after(self._path, start)
            self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def advance(self) -> None:
        self._bar.update()

    def say(self, text: str) -> None:
        if self._first:
            tqdm.write(text)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if not self._first:
            return
        if self._has_tensorboard():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        with open(self._path, "a") as log:
            log.write(json.dumps({"step": step, **values}) + "\n")
        shown = {k: f"{values[k]:.4g}" for k in ("loss", "clips_per_second") if k in values}
        if shown:
            self._bar.set_postfix(shown, refresh=False)

    def videos(self, step: int, videos: dict[str, Video]) -> None:
        """Videos for TensorBoard, which plays an animated GIF given as an image."""
        if not self._first:
            return
        from tensorboardX.proto.summary_pb2 import Summary

        # In place of a digest of the weights, for which they would have to be gathered.
        run = hashlib.sha256((self._workdir / "config.json").read_bytes()).hexdigest()
        for name, video in videos.items():
            config = {**video.claim.config, "run_sha256": run, "step": step}
            claim = dataclasses.replace(video.claim, model=self._workdir.resolve().name, config=config)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    shown = dataclasses.replace(video, claim=claim)
                    gif = shown.save(Path(folder, "preview.gif")).read_bytes()
            except (Refused, InputError) as reason:  # no reason to lose a run
                self.say(f"the preview of step {step} is not shown: {reason}")
                continue
            _, height, width, _ = video.frames.shape
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
            if not self._has_tensorboard():
                return
            self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def _has_tensorboard(self) -> bool:
        """Whether events still find a file: the thread that writes them ends at the first failure, as on a full disk.

        What is added after that waits for it without end.
        """
        # The thread is not part of tensorboardX's interface.
        worker = getattr(self._writer and self._writer.file_writer.event_writer, "_worker", None)
        if worker is not None and not worker.is_alive():
            self.say("TensorBoard files can no longer be written: is the disk full? metrics.jsonl goes on")
            self._writer = None
        return self._writer is not None

    def close(self) -> None:
        self._bar.close()
        if self._first and self._has_tensorboard():
            self._writer.close()


@contextlib.contextmanager
def _sigterm() -> Iterator[list[str]]:
    """A list that SIGTERM, sent to a process alone, puts a word into. Of several, JAX listens: `hosts.preempted`."""
    asked = []
    if jax.process_count() > 1:
        yield asked
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.append("SIGTERM"))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(config, workdir, task, optimizer, checkpoints, state, batch_sharding) -> bool:
    step = state_lib.make_step(task.loss, optimizer, config.seed, config.ema_decay, state)
    start = int(state.step)
    if hosts.is_first():
        _write_config(config, workdir)
    window, window_start = [], time.perf_counter()
    pending = None  # metrics of the step before: reading them does not hold up the step that is running

    def check(number, metrics) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        # A gradient that is not finite spoils the parameters that the step leaves behind.
        bad = next((name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])), None)
        if bad:
            good = checkpoints.latest()
            kept = f"step {good} is kept in {workdir / 'checkpoints'}" if good else "there is no checkpoint yet"
            raise InputError(f"the {bad} is {values[bad]} at step {number}; {kept}: try a lower learning rate")
        window.append(values)

    with contextlib.closing(_Log(config, workdir, start)) as log, _sigterm() as sigterm:
        for number, batch in zip(range(start, config.steps), task.batches(start, batch_sharding), strict=False):
            if number == start and jax.process_count() > 1:
                # Each compiles at its own pace; then all exchange something for the first time, which cannot wait long.
                step = step.lower(state, batch).compile()
                hosts.wait("compiled")
            state, metrics = step(state, batch)
            if pending:
                check(*pending)
            pending = (number, metrics)
            log.advance()
            done = number + 1
            stopping = bool(sigterm) or hosts.preempted(done)
            if done % config.log_every == 0 or done == config.steps:
                check(*pending)
                pending = None
                seconds, window_start = time.perf_counter() - window_start, time.perf_counter()
                means = {name: float(np.mean([v[name] for v in window])) for name in window[0]}
                log.scalars(done, means | {"clips_per_second": len(window) * config.batch / seconds})
                window.clear()
            last = done == config.steps
            if done % config.checkpoint_every == 0 or last or stopping:
                if pending:
                    check(*pending)
                    pending = None
                checkpoints.save(state)
            if config.preview_every and (done % config.preview_every == 0 or last) and not stopping:
                # All processes compute it: each has a part of the parameters.
                scalars, videos = task.preview(state.ema)
                log.scalars(done, scalars)
                log.videos(done, videos)
            if stopping:
                log.say(f"SIGTERM: saved step {done} in {workdir}")
                return done >= config.steps
        if start >= config.steps:
            log.say(f"{workdir} is at step {start} already; config.steps is {config.steps}")
    return True


def _forget_after(path: Path, step: int) -> None:
    """Drops the records of later steps, and a last one that was cut off, from a log of JSON lines."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    hidden = path.with_name(f".{path.name}")
    hidden.write_text("".join(kept))
    hidden.replace(path)


def export(workdir: str | Path, out: str | Path, codec: str | Path | None = None) -> Path:
    """Writes the averaged weights of a finished or running DiT run as a model folder, in float16.

    Args:
      codec: a codec run whose decoder takes the place of the one that the DiT was trained beside; its encoder must be
        the same (`config.freeze_encoder`).

    Raises:
      InputError: `workdir` holds no DiT run with a checkpoint, the codec is another one, or `out` cannot be written.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise InputError(f"{workdir} is not the work directory of a training run: it has no config.json")
    config = ConfigDict(read_json(workdir / "config.json"))
    if config.task != "dit":
        raise InputError(f"{workdir} trains a {config.task}; a model folder is made from a run of task 'dit'")
    from sora_jax.training.dit_task import codec_of_run, model_config

    codec_config, codec_params = read_codec(workdir / "codec")
    if codec is not None:
        codec_params = _with_decoder(codec_params, codec_of_run(Path(codec))[1], codec)
    with Checkpoints(workdir) as checkpoints:
        params = checkpoints.restore_any()["ema"]
    params = {"text": params["text"], "dit": params["dit"], "codec": codec_params}
    return write_model_folder(out, model_config(config, codec_config), params, "float16")


def _with_decoder(kept: dict, found: dict, codec: str | Path) -> dict:
    """The parameters `found`, if encoding with them is the same as with those `kept`."""
    same = _shapes(kept) == _shapes(found) and all(
        np.array_equal(one, other)
        for half in ("encoder", "quant")
        for one, other in zip(jax.tree.leaves(kept[half]), jax.tree.leaves(found[half]), strict=True)
    )
    if not same:
        raise InputError(f"{codec}: its encoder is not the one whose latents the transformer was trained on")
    return found
