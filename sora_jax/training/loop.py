"""The training loop: restore, step, log, preview, save. The same for every task, on whatever devices there are.

With several processes (see `hosts.py`) each runs all of this, and the first alone writes logs and previews.
"""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict
from tqdm import tqdm

from sora_jax import hosts
from sora_jax import mesh as mesh_lib
from sora_jax.errors import InputError
from sora_jax.json_files import read_json
from sora_jax.mesh_choice import training_mesh
from sora_jax.model_folder import read_codec, write_model_folder
from sora_jax.training import state as state_lib
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.config import check_config, check_local, check_run, model_config, trained_configs, write_config
from sora_jax.training.log import Log


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
    abstract, places = mesh_lib.placed(boxed, mesh), mesh_lib.shardings(boxed, mesh)

    def make(found):
        if not found:
            return jax.jit(lambda: meta.unbox(create()), out_shardings=places)()

        def create_from(found):
            # What the folder does not have, such as a network that only training uses, is fresh.
            params = meta.unbox(task.initialize(jax.random.key(config.seed)))
            return state_lib.create({**params, **found}, optimizer)

        return jax.jit(create_from, out_shardings=places)(found)

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


@contextlib.contextmanager
def _folder(workdir: Path) -> Iterator[None]:
    """Makes the work directory, and takes it away again if it is new and what goes wrong has left nothing in it."""
    is_new = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except InputError:
        if is_new:
            with contextlib.suppress(OSError):
                workdir.rmdir()
        raise


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
    changed = check_run(config, workdir, mesh)
    if changed and hosts.is_first():
        tqdm.write(f"note: {workdir} goes on with other values than it had: {changed}", file=sys.stderr)
    if (warmup := config.optimizer.warmup) >= config.steps and hosts.is_first():
        tqdm.write(f"note: the rate still rises at the end: config.optimizer.warmup is {warmup}", file=sys.stderr)
    with _folder(workdir), hosts.watched():
        hosts.check_same("the config", config.to_json_best_effort())
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
        # Of a codec there is nothing that a mesh must divide. The latents' channels do not matter here.
        trained = trained_configs(config, 1) if config.task == "dit" else ()
        words, reason = training_mesh(config.batch, jax.device_count(), *trained)
        if hosts.is_first():
            tqdm.write(f"mesh {words}: {reason}", file=sys.stderr)
    return mesh_lib.parse_sizes(words)


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
        write_config(config, workdir)
    rate = state_lib.learning_rate(config.optimizer, config.steps)
    window = []
    clock, timed = time.perf_counter(), 0  # of the steps since the clock was started, which leaves out compiling
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

    with contextlib.closing(Log(config, workdir, start)) as log, _sigterm() as sigterm:
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
            timed += 1
            if number == start:
                jax.block_until_ready(metrics)
                clock, timed = time.perf_counter(), 0
            stopping = bool(sigterm) or hosts.preempted(done)
            if done % config.log_every == 0 or done == config.steps:
                check(*pending)
                pending = None
                values = {name: float(np.mean([v[name] for v in window])) for name in window[0]}
                values["learning_rate"] = float(rate(number))
                if timed:
                    values["clips_per_second"] = timed * config.batch / (time.perf_counter() - clock)
                log.scalars(done, values)
                window.clear()
                clock, timed = time.perf_counter(), 0
            last = done == config.steps
            if done % config.checkpoint_every == 0 or last or stopping:
                if pending:
                    check(*pending)
                    pending = None
                began = time.perf_counter()  # what is no training does not slow it down
                checkpoints.save(state)
                clock += time.perf_counter() - began
            if config.preview_every and (done % config.preview_every == 0 or last) and not stopping:
                # All processes compute it: each has a part of the parameters.
                began = time.perf_counter()
                try:
                    scalars, videos = task.preview(state.ema)
                except InputError as reason:  # such as samples that are not finite: no reason to lose a run
                    log.say(f"there is no preview of step {done}: {reason}")
                else:
                    log.scalars(done, scalars)
                    log.videos(done, videos)
                clock += time.perf_counter() - began
            if stopping:
                log.say(f"SIGTERM: saved step {done} in {workdir}")
                return done >= config.steps
        if start >= config.steps:
            log.say(f"{workdir} is at step {start} already; config.steps is {config.steps}")
    return True


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
    if config.get("task") != "dit":
        raise InputError(f"{workdir} trains a {config.get('task')}; a model folder is made from a run of task 'dit'")
    from sora_jax.training.dit_task import codec_of_run

    codec_config, codec_params = read_codec(workdir / "codec")
    if codec is not None:
        codec_params = _with_decoder(codec_params, codec_of_run(Path(codec))[1], codec)
    with Checkpoints(workdir) as checkpoints:
        params = checkpoints.read("ema")["ema"]
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
