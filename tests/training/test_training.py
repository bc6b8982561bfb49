"""Training on tiny models: what is interrupted goes on exactly, what fails says so, what is exported generates."""

import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import time

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from flax.core import meta
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event
from tiny import TINY_CODEC, TINY_DIT

from sora_jax import pipeline, sampler
from sora_jax.cli import main
from sora_jax.cli.config_file import load_config
from sora_jax.data import clips as clips_lib
from sora_jax.data import latents as latents_lib
from sora_jax.data.latents import first_latents, write_shards
from sora_jax.errors import InputError, Refused
from sora_jax.mesh import make_mesh
from sora_jax.model_folder import read_codec, read_model_folder
from sora_jax.models import load
from sora_jax.safety.manifest import read_manifest
from sora_jax.safety.provenance import Claim
from sora_jax.text import tokenize
from sora_jax.training import loop
from sora_jax.training import state as state_lib
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.codec_task import cut_window
from sora_jax.training.config import check_config, check_run, model_config
from sora_jax.training.dit_task import codec_of_run
from sora_jax.training.log import Log
from sora_jax.training.loop import make_task
from sora_jax.video import Video


def codec_config(*overrides):
    return load_config("configs/worlds_codec.py", [*TINY_CODEC, *overrides])


def dit_config(codec, *overrides):
    return load_config("configs/worlds_dit.py", [*TINY_DIT, f"--config.codec={codec}", *overrides])


def final_state(workdir):
    checkpoints = Checkpoints(workdir)
    state = checkpoints.read("step", "params", "ema", "optimizer")
    checkpoints.close()
    return state


def assert_same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b) > 10
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def previews(workdir):
    """The manifests of the pictures in a run's TensorBoard files, each record of which has a frame of 12 + 4 bytes."""
    found = []
    for events in (workdir / "tensorboard").glob("events*"):
        data = events.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            for value in Event.FromString(data[12 : 12 + size]).summary.value:
                if value.HasField("image"):
                    (workdir / "preview.gif").write_bytes(value.image.encoded_image_string)
                    found.append(read_manifest(workdir / "preview.gif"))
            data = data[16 + size :]
    return found


def random_params(task):
    """In the places of fresh ones, but with nothing at zero; drawing them compiles nothing."""
    random, shapes = np.random.default_rng(0), meta.unbox(jax.eval_shape(task.initialize, jax.random.key(0)))
    return jax.tree.map(lambda leaf: random.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)


def made_once(tmp_path_factory, name, make):
    """A run that whichever process shares the tests and comes first makes for all of them; no test changes it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make(folder / "run")
            (folder / "made").touch()
    return folder / "run"


@pytest.fixture(scope="module")
def codec_run(tmp_path_factory):
    return made_once(tmp_path_factory, "codec", lambda run: loop.train(codec_config("--config.steps=4"), run))


@pytest.fixture(scope="module")
def dit_run(codec_run, tmp_path_factory):
    config = dit_config(codec_run, "--config.steps=4")
    return made_once(tmp_path_factory, "dit", lambda run: loop.train(config, run))


class Stop(Exception):
    """Stands for the machine going down."""


def stop_after(monkeypatch, task, steps):
    """Makes the task's batches end with an exception, after `steps` of them in one run."""
    batches = task.batches

    def cut(self, start, sharding):
        for number, batch in enumerate(batches(self, start, sharding)):
            if number == steps:
                raise Stop
            yield batch

    monkeypatch.setattr(task, "batches", cut)


class Toy:
    """A task that takes no time: a number goes down, and a kernel is drawn about."""

    def prepare(self):
        pass

    def initialize(self, key):
        return {"number": jnp.ones(()), "kernel": jax.random.normal(key, (4, 3))}

    def batches(self, start, sharding):
        return (np.float32(step) for step in itertools.count(start))

    def loss(self, params, batch, key):
        return (params["number"] + batch) ** 2 + jnp.sum(params["kernel"] * jax.random.normal(key, (4, 3))), {}

    def preview(self, params):
        return {}, {}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(loop, "make_task", lambda *_: Toy())


def test_outlines_have_their_share_of_the_loss():
    from sora_jax.training.codec_task import outline_weights

    video = np.zeros((1, 1, 32, 32, 3), np.float32)
    video[:, :, 8:24, 8:24] = 1.0
    weights = np.asarray(outline_weights(video, 0.6))
    np.testing.assert_allclose(weights.mean(), 1.0, rtol=1e-5)
    near = np.zeros((32, 32), bool)
    near[6:26, 6:26], near[10:22, 10:22] = True, False
    np.testing.assert_allclose(weights[0, 0, ~near], 0.4, atol=1e-5)
    assert weights[0, 0, near].min() > 0.4
    np.testing.assert_array_equal(outline_weights(video, 0.0), 1.0)
    np.testing.assert_array_equal(outline_weights(video * 0 + 0.3, 0.6), 1.0)


def test_interrupted_codec_run_equals_uninterrupted(codec_run, tmp_path, monkeypatch):
    from sora_jax.training.codec_task import CodecTask

    with monkeypatch.context() as patch:
        stop_after(patch, CodecTask, 3)
        with pytest.raises(Stop):
            loop.train(codec_config("--config.steps=4"), tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # after the checkpoint; cut off
    loop.train(codec_config("--config.steps=4"), tmp_path / "run")
    assert_same(final_state(codec_run), final_state(tmp_path / "run"))
    steps = [[json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] for run in (codec_run, log.parent)]
    assert steps[0] == steps[1] == [2, 4]


def test_interrupted_run_with_muon_equals_uninterrupted(tmp_path, monkeypatch, toy):
    config = codec_config("--config.steps=3", "--config.optimizer.name=muon")
    loop.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, Toy, 2)
        with pytest.raises(Stop):
            loop.train(config, tmp_path / "run")
    assert Checkpoints(tmp_path / "run").latest() == 2
    loop.train(config, tmp_path / "run")
    whole = final_state(tmp_path / "whole")
    assert_same(whole, final_state(tmp_path / "run"))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(whole["optimizer"])]
    (kept,) = [name for name in names if "kernel" in name]  # Adam would keep two averages
    assert "muon" in kept and "mu" in kept


@pytest.mark.parametrize("shape,matrix", [((6, 4), (1, 6, 4)), ((3, 6, 4), (3, 6, 4)), ((2, 3, 3, 6, 4), (1, 108, 4))])
def test_muon_makes_the_update_of_every_kernel_orthogonal(shape, matrix):
    """Of matrices stacked by a scan each one's, of a convolution the whole: (time, rows, columns, in) to out."""
    config = codec_config("--config.optimizer.name=muon").optimizer
    optimizer = state_lib.make_optimizer(config, 10)
    params = {"kernel": jnp.zeros(shape), "scale": jnp.ones(shape)}
    # All columns have much in common, as in a gradient, and the layers are steep and flat.
    random, layers = np.random.default_rng(0), np.geomspace(1, 0.1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    gradient = {name: np.float32(random.normal(2, size=shape) * layers) for name in params}
    state = optimizer.init(params)
    is_muon = lambda part: isinstance(part, optax.contrib.MuonState)  # noqa: E731
    (kept,) = [part for part in jax.tree.leaves(state, is_leaf=is_muon) if is_muon(part)]
    assert [leaf.shape for leaf in jax.tree.leaves(kept.mu)] == [shape]
    update = jax.jit(optimizer.update)
    updates, _ = update(gradient, update(gradient, state, params)[1], params)  # the first has learning rate zero
    for name, is_orthogonal in (("kernel", True), ("scale", False)):
        stretched = np.linalg.svd(np.reshape(updates[name], matrix), compute_uv=False)
        assert (0 < stretched.max() < 2 * stretched.min()) == is_orthogonal, (name, stretched)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_decay_in_kernels_alone(name):
    """What a scan has stacked has an axis more, but norms and biases in it are still no kernels."""
    config = codec_config(f"--config.optimizer.name={name}", "--config.optimizer.weight_decay=0.1").optimizer
    optimizer = state_lib.make_optimizer(config, 10)
    ones = jnp.ones((2, 3))
    params = {"blocks": {"up": {"kernel": jnp.ones((2, 3, 3)), "bias": ones}, "norm": {"scale": ones}}}
    state, nothing = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.update(nothing, state, params)[1], params)
    decayed = traverse_util.flatten_dict(jax.tree.map(lambda leaf: bool((leaf < 0).all()), updates), sep=".")
    assert decayed == {"blocks.up.kernel": True, "blocks.up.bias": False, "blocks.norm.scale": False}
    assert not np.any(updates["blocks"]["up"]["bias"]) and not np.any(updates["blocks"]["norm"]["scale"])


def test_interrupted_dit_run_equals_uninterrupted(dit_run, tmp_path, monkeypatch):
    from sora_jax.training.dit_task import DiTTask

    config = dit_config(dit_run / "codec", "--config.steps=4")  # with the statistics of its latents
    with monkeypatch.context() as patch:
        stop_after(patch, DiTTask, 3)
        with pytest.raises(Stop):
            loop.train(config, tmp_path / "run")
    loop.train(config, tmp_path / "run")
    assert_same(final_state(dit_run), final_state(tmp_path / "run"))


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    shown = ["--config.checkpoint_every=20", "--config.log_every=5", "--config.preview_every=100"]
    config = codec_config("--config.steps=20", *shown)
    loop.train(config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
    assert any("held_out_psnr" in record for record in records)
    (manifest,) = previews(tmp_path)
    assert manifest.source_types == ("compositeWithTrainedAlgorithmicMedia",)
    assert manifest.generation["model"] == tmp_path.name and manifest.generation["config"]["step"] == 20


def test_a_log_tells_how_fast_training_is_and_not_how_long_previews_take(tmp_path, monkeypatch, toy):
    def preview(*_):
        time.sleep(1.0)
        return {"held_out": 1.0}, {}

    monkeypatch.setattr(Toy, "preview", preview)
    config = codec_config("--config.steps=8", "--config.log_every=2", "--config.preview_every=2")
    loop.train(config, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in records if "loss" in record]
    assert len(logged) == 4 and len(records) == 8
    assert (
        min(record["clips_per_second"] for record in logged) > 2 * config.batch
    )  # 2 at most, with the second of sleep
    rate = state_lib.learning_rate(config.optimizer, 8)
    assert [record["learning_rate"] for record in logged] == [float(rate(step)) for step in (1, 3, 5, 7)]


def test_sigterm_saves_and_returns(tmp_path, monkeypatch, toy):
    batches = Toy.batches

    def terminate(self, start, sharding):
        for number, batch in enumerate(batches(self, start, sharding)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Toy, "batches", terminate)
    assert not loop.train(codec_config("--config.steps=4", "--config.checkpoint_every=1000"), tmp_path)
    assert Checkpoints(tmp_path).latest() == 3


@pytest.mark.parametrize("words", ["auto", "fsdp=1,tensor=1"])
def test_a_mesh_in_words_takes_the_place_of_that_of_the_config(tmp_path, monkeypatch, toy, capsys, words):
    config = codec_config("--config.steps=1", "--config.mesh.data=3")
    with pytest.raises(InputError, match="does not multiply to the 1 devices"):
        loop.train(config, tmp_path)
    loop.train(config, tmp_path, words)
    kept = json.loads((tmp_path / "config.json").read_text())["mesh"]
    assert kept == dict.fromkeys(("data", "fsdp", "context", "tensor"), 1)
    said = "mesh data=1,fsdp=1,context=1,tensor=1: fsdp=1 divides the batch"
    assert (said in capsys.readouterr().err) == (words == "auto")
    with pytest.raises(InputError, match="'rows=1' is none of data=N"):
        loop.train(config, tmp_path, "rows=1")
    # Of a transformer the sizes are asked, before anything else is.
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(InputError, match="data=1,fsdp=2,context=4,tensor=1 does not multiply to the 1 devices"):
        loop.train(dit_config("none", "--config.batch=2"), tmp_path, "auto")


def test_who_starts_it_again_is_told_by_the_exit_code(tmp_path, monkeypatch):
    arguments = ["train", "--config", "configs/worlds_codec.py", "--workdir", str(tmp_path)]
    for done, code in ((True, 0), (False, 143)):
        monkeypatch.setattr(loop, "train", lambda *_, done=done: done)
        assert main(arguments) == code


def test_non_finite_gradient_is_not_saved(tmp_path, monkeypatch, toy):
    """The loss of a step can be finite where its gradient is not: what that step leaves behind is spoiled."""
    loss = Toy.loss

    def steep(self, params, batch, key):
        value, metrics = loss(self, params, batch, key)
        # The square root of 0 * number**2 is 0, and its slope is not a number.
        return value + jnp.sqrt(0 * params["number"] ** 2), metrics

    monkeypatch.setattr(Toy, "loss", steep)
    with pytest.raises(InputError, match="the gradient_norm is nan at step 0; there is no checkpoint yet"):
        loop.train(codec_config("--config.steps=2", "--config.checkpoint_every=1"), tmp_path)
    assert Checkpoints(tmp_path).latest() is None


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, toy):
    batches = Toy.batches

    def spoiled(self, start, sharding):
        for number, batch in enumerate(batches(self, start, sharding)):
            yield batch * np.nan if number == 3 else batch

    monkeypatch.setattr(Toy, "batches", spoiled)
    with pytest.raises(InputError, match="loss is nan at step 3; step 2 is kept"):
        loop.train(codec_config("--config.steps=4"), tmp_path)
    state = final_state(tmp_path)
    assert state["step"] == 2 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))


def test_a_mistake_in_the_first_start_leaves_the_work_directory_usable(codec_run, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for wrong in (["--config.codec=nowhere"], ["--config.frames=16"], ["--config.size=36"]):
        with pytest.raises(InputError):
            make_task(dit_config(codec_run, *wrong), workdir)
    make_task(dit_config(codec_run), workdir)
    with pytest.raises(InputError, match="was made with frames 9, not 5"):
        make_task(dit_config(codec_run, "--config.frames=5"), workdir)


def test_a_refused_first_start_leaves_no_folder(codec_run, tmp_path):
    with pytest.raises(InputError):
        loop.train(dit_config(codec_run, "--config.codec=nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, toy):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: write: No space left on device\n more")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(
        InputError, match="cannot write a checkpoint in .*, there is none yet: .*No space left"
    ) as caught:
        loop.train(codec_config("--config.steps=2"), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_config_that_is_not_whole_is_one_line(tmp_path, codec_run):
    config = ConfigDict(codec_config().to_dict())
    del config.ema_decay
    with pytest.raises(InputError, match="the config has no field ema_decay"):
        loop.train(config, tmp_path / "run")
    for field, message in (
        ("clip", "the config is not whole; .*clip"),
        ("learning_rate", "not whole; .*learning_rate"),
    ):
        config = ConfigDict(codec_config().to_dict())
        del config.optimizer[field]
        with pytest.raises(InputError, match=message):
            loop.train(config, tmp_path / "run")
    with pytest.raises(InputError, match="config.task is 'vae'; it can be 'codec' or 'dit'"):
        loop.train(codec_config("--config.task=vae"), tmp_path / "run")
    shutil.copytree(codec_run, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("")
    for use in (lambda path: loop.train(codec_config(), path), lambda path: loop.export(path, tmp_path / "model")):
        with pytest.raises(InputError, match="config.json is damaged"):
            use(tmp_path / "copy")


def test_every_step_is_logged_with_its_own_loss(tmp_path, toy):
    """A record of the loss is that of its step; a run without a multiple of log_every logs its last steps too."""
    records = {}
    for every in (1, 2):
        workdir = tmp_path / str(every)
        loop.train(codec_config("--config.steps=3", f"--config.log_every={every}"), workdir)
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        records[every] = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert [*records[1]] == [1, 2, 3] and [*records[2]] == [2, 3]
    np.testing.assert_allclose(records[2][2], (records[1][1] + records[1][2]) / 2, rtol=1e-5)
    np.testing.assert_allclose(records[2][3], records[1][3], rtol=1e-5)


def test_training_goes_on_without_tensorboard(tmp_path):
    """Its thread ends at the first failure, and what is added then would wait without end."""
    config = codec_config()
    log = Log(config, tmp_path, 0)
    worker = log._writer.file_writer.event_writer._worker
    worker.stop()
    worker.join(10)
    for step in range(30):
        log.scalars(step, {"loss": 1.0})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 30


def test_checkpoint_of_another_shape_is_refused(codec_run, tmp_path):
    shutil.copytree(codec_run / "checkpoints", tmp_path / "checkpoints")  # without the config that would tell first
    with pytest.raises(InputError, match=r"does not fit this configuration: .* is \[.*\] there, and \[.*\] here$"):
        loop.train(codec_config("--config.steps=8", "--config.codec.width=8"), tmp_path)


def test_another_model_in_the_same_folder_is_refused(codec_run):
    with pytest.raises(InputError, match="another config.codec"):
        loop.train(codec_config("--config.steps=8", "--config.codec.width=8"), codec_run)


def test_a_run_that_goes_on_otherwise_says_so(tmp_path):
    (tmp_path / "config.json").write_text(codec_config("--config.steps=2").to_json_best_effort())
    mesh = make_mesh()
    assert check_run(codec_config("--config.steps=9", "--config.log_every=1"), tmp_path, mesh) == ""
    changed = check_run(codec_config("--config.seed=5", "--config.loss.kl=0.5"), tmp_path, mesh)
    assert re.fullmatch(r"loss.kl \S+ -> 0.5, seed 0 -> 5", changed)
    with pytest.raises(InputError, match="another config.optimizer.name: adamw; use a new --workdir"):
        check_run(codec_config("--config.optimizer.name=muon"), tmp_path, mesh)


def test_export_writes_a_model_that_generates(dit_run, tmp_path, capsys):
    assert main(["export", "--workdir", str(dit_run), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    video = load(tmp_path / "model").generate("a red ball", progress=False)
    assert video.frames.shape == (9, 32, 32, 3)
    codec = json.loads((tmp_path / "model" / "model.json").read_text())["codec"]
    assert len(codec["latents_std"]) == 4 and min(codec["latents_std"]) > 0
    # It is the average of the weights, not the last of them, in half precision.
    state, written = final_state(dit_run), read_model_folder(tmp_path / "model")[1]
    for part in ("text", "dit"):
        average, last = (traverse_util.flatten_dict(state[which][part]) for which in ("ema", "params"))
        for name, value in traverse_util.flatten_dict(written[part]).items():
            np.testing.assert_array_equal(value, np.float16(average[name]).astype(np.float32))
        assert any((average[name] != last[name]).any() for name in last)


def test_a_model_whose_parameters_have_the_same_shapes_is_not_the_same(dit_run, codec_run, tmp_path):
    model = loop.export(dit_run, tmp_path / "model")
    config = dit_config(codec_run, f"--config.start_from={model}")
    heads, width = config.dit.heads, config.dit.head_width
    other = [f"--config.dit.heads={heads // 2}", f"--config.dit.head_width={2 * width}"]
    with pytest.raises(InputError, match=rf"does not fit .*: its dit.heads is {heads}, not {heads // 2}"):
        loop.train(dit_config(codec_run, f"--config.start_from={model}", *other), tmp_path / "run")


@pytest.mark.parametrize("text", ["{}", '{"task": "codec"}', '{"architectures": ["X"]}'])
def test_other_peoples_config_json_is_no_run(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="trains a "):
        loop.export(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="trains a "):
        codec_of_run(tmp_path)


def test_a_new_run_can_start_from_a_model_folder(dit_run, tmp_path, codec_run):
    model = loop.export(dit_run, tmp_path / "model")
    loop.train(dit_config(model, "--config.steps=1", f"--config.start_from={model}"), tmp_path / "run")
    # The first step of the warm-up has learning rate zero: the parameters are still those of the folder.
    params = final_state(tmp_path / "run")["params"]
    for part in ("text", "dit"):
        for name, value in traverse_util.flatten_dict(read_model_folder(model)[1][part]).items():
            np.testing.assert_array_equal(traverse_util.flatten_dict(params[part])[name], value)
    with pytest.raises(InputError, match="does not fit"):
        loop.train(dit_config(codec_run, f"--config.start_from={model}", "--config.dit.layers=3"), tmp_path / "other")


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("seed", -1, "from 0 to below 2**31"),
        ("data.seed", 2**31, "from 0 to below 2**31"),
        ("ema_decay", 1.0, "from 0 to below 1"),
        ("optimizer.clip", 0.0, "above 0"),
        ("optimizer.learning_rate", math.nan, "above 0"),
        ("optimizer.decay", 20.0, "from 0 to 1"),
        ("flow.shift", 0.0, "above 0"),
        ("flow.uniform_share", 25.0, "from 0 to 1"),
        ("flow.drop_text", 10.0, "from 0 to 1"),
        ("flow.seen_share", 5.0, "from 0 to 1"),
        ("flow.mistaken_share", 2.0, "from 0 to 1"),
        ("align.layer", 0, "1 to 9"),
        ("align.layer", 10, "1 to 9"),
        ("text.length", 0, "at least 1"),
        ("mesh.fsdp", None, "whole numbers of data, fsdp, context, tensor"),
        ("text.vocabulary_size", 100, "259"),
    ],
)
def test_numbers_that_cannot_be_are_told_before_any_work(name, value, words):
    config = load_config("configs/worlds_dit.py")
    check_config(config)
    group, _, field = name.rpartition(".")
    (config[group] if group else config)[field] = value
    with pytest.raises(InputError, match=f"^config.{name} is {value}; .*{re.escape(words)}$"):
        check_config(config)
    if name.startswith("optimizer"):
        config = load_config("configs/worlds_codec.py")
        config.optimizer[field] = value
        with pytest.raises(InputError, match=f"^config.{name} is {value}; .*{re.escape(words)}$"):
            check_config(config)


@pytest.mark.parametrize(
    "task,override,words",
    [
        ("dit", "dit.remat=foo", "config.dit: .*remat"),
        ("dit", "dit.heads=0", "config.dit: heads is 0; it must be whole, at least 1"),
        ("dit", "dit.head_width=7", "config.dit: head_width is 7; it must be even"),
        ("dit", "text.layers=0", "config.text: layers is 0"),
        ("dit", "prompts=('a red ball','')", "config.prompts: prompt 2 is empty"),
        ("codec", "codec.width=0", "config.codec: width is 0"),
        ("codec", "codec.multipliers=('a','b','c')", "config.codec: multipliers is .*whole, at least 1"),
        ("dit", "sampling.solver=bar", "config.sampling: solver 'bar' does not exist"),
        ("dit", "sampling.steps=0", "config.sampling: steps must be at least 1"),
        ("dit", "steps=None", "config.steps is None; it must be at least 1"),
        ("dit", "align.layer=None", "a value of the config has the wrong type"),
        ("codec", "frames=16", "config.frames must be 1 . a multiple of 4; 16 is not, nearest are 13 and 17"),
        ("codec", "crop=33", "config.crop must be a multiple of 16; 33 is not"),
        ("codec", "codec.downsample_time=(True,)", "config.codec: downsample_time needs"),
        ("codec", "on_object=7.0", "config.on_object is 7.0; it must be from 0 to 1"),
        ("codec", "loss.kl=-1.0", "config.loss.kl is -1.0; it must be at least 0"),
        ("codec", "loss.outlines=2.0", "config.loss.outlines is 2.0; it must be from 0 to 1"),
    ],
)
def test_models_that_cannot_be_are_told_before_any_work(task, override, words):
    config = load_config(f"configs/worlds_{task}.py", [f"--config.{override}"])
    with pytest.raises(InputError, match=words):
        check_config(config)


@pytest.mark.parametrize("start_from,words", [("nowhere", "nowhere"), ("of another depth", "does not fit")])
def test_a_model_to_start_from_is_looked_at_before_clips_are_encoded(dit_run, codec_run, tmp_path, start_from, words):
    model, overrides = start_from, ()
    if words == "does not fit":
        model, overrides = loop.export(dit_run, tmp_path / "model"), ("--config.dit.layers=3",)
    with pytest.raises(InputError, match=words):
        loop.train(dit_config(codec_run, f"--config.start_from={model}", *overrides), tmp_path / "run")
    assert not list((tmp_path / "run").glob("latents/clips*"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A stored data set of the tiny models' size."""
    from sora_jax.data.worlds.worlds_dataset_builder import Builder, WorldsConfig

    config = WorldsConfig(name="tiny9", frames=9, size=(32, 32), train_clips=8, held_out_clips=2)
    builder = Builder(config=config, data_dir=tmp_path_factory.mktemp("data"))
    builder.download_and_prepare()
    return builder.data_dir


def test_both_tasks_train_on_a_stored_data_set(data_dir, tmp_path):
    loop.train(codec_config("--config.steps=4", f"--config.data.dir={data_dir}"), tmp_path / "codec")
    stored = [f"--config.data.dir={data_dir}", "--config.preview_every=100"]
    dit = dit_config(tmp_path / "codec", "--config.steps=4", *stored)
    loop.train(dit, tmp_path / "dit")
    records = [json.loads(line) for line in (tmp_path / "dit" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(records[-1]["held_out_velocity_loss"])
    (manifest,) = previews(tmp_path / "dit")
    assert manifest.source_types == ("trainedAlgorithmicMedia",)
    said = manifest.generation["config"]
    assert said["run_sha256"] == hashlib.sha256((tmp_path / "dit" / "config.json").read_bytes()).hexdigest()
    assert said["step"] == 4 and len(said["prompts_sha256"]) == len(dit.prompts)
    # Stored worlds are encoded to what drawn ones are, with the same layout and captions.
    latents = {}
    for name, overrides in {"stored": [f"--config.data.dir={data_dir}"], "drawn": ["--config.data.seed=0"]}.items():
        config = dit_config(tmp_path / "codec", "--config.data.captions=4", "--config.data.clips=8", *overrides)
        (tmp_path / name).mkdir()
        latents[name] = next(make_task(config, tmp_path / name).batches(0))
    np.testing.assert_array_equal(latents["stored"]["ids"], latents["drawn"]["ids"])
    for name in ("latents", "layout"):
        np.testing.assert_allclose(latents["stored"][name], latents["drawn"][name], atol=0.1)
    with pytest.raises(InputError, match="clip 0 is"):
        loop.train(dit_config(tmp_path / "codec", "--config.frames=5", f"--config.data.dir={data_dir}"), tmp_path / "5")


def test_stored_clips_are_all_of_one_shape():
    clips = [{"video": np.zeros((5, 8, 8, 3), np.uint8)}, {"video": np.zeros((6, 8, 8, 3), np.uint8)}]
    shaped = clips_lib.Shaped(clips, (5, 8, 8, 3), "DIR, split train")
    assert shaped[0] is clips[0] and len(shaped) == 2
    with pytest.raises(InputError, match=r"split train: clip 1 is \[6, 8, 8, 3\]; the configuration asks for \[5,"):
        _ = shaped[1]


def test_windows_of_stored_clips_are_around_objects_where_their_truth_is_known():
    video = np.zeros((9, 32, 32, 3), np.uint8)
    video[:, 24:28, 4:8] = 255
    truth = {"present": np.array([True, False]), "center_T2": np.full((2, 9, 2), (6 / 32, 26 / 32), np.float32)}
    config = codec_config("--config.on_object=1.0")
    rng = np.random.default_rng(0)
    around = [cut_window({"video": video, "truth": truth}, rng, config)["video"] for _ in range(8)]
    assert all(window.shape == (5, 16, 16, 3) and (window == 1).sum() == 5 * 4 * 4 * 3 for window in around)
    anywhere = [cut_window({"video": video}, rng, config)["video"] for _ in range(8)]
    assert min((window == 1).sum() for window in anywhere) == 0


def test_only_models_of_the_worlds_know_their_words(dit_run, codec_run):
    codec = read_codec(dit_run / "codec")[0]
    for overrides, knows in (
        ((), True),
        (("--config.data.dir=worlds",), True),
        (("--config.data.dir=own", "--config.align.weight=0"), False),
    ):
        model = model_config(dit_config(codec_run, *overrides), codec)
        assert bool(model.vocabulary) == bool(model.description) == knows


def test_captions_that_are_cut_are_told(codec_run, tmp_path, capsys):
    make_task(dit_config(codec_run, "--config.text.length=12", "--config.data.clips=2"), tmp_path).prepare()
    assert "note: 2 clips have captions longer than 11 bytes (--config.text.length)" in capsys.readouterr().err


def test_clips_of_other_data_are_not_mixed_in(dit_run, codec_run):
    with pytest.raises(InputError, match="was made with data .*not .*seed.: 2.*use a new --workdir"):
        loop.train(dit_config(codec_run, "--config.steps=8", "--config.data.seed=2"), dit_run)


def test_objects_count_for_more_the_lower_the_level(dit_run, codec_run):
    task = make_task(dit_config(codec_run, "--config.align.layer=1", "--config.align.objects=4.0"), dit_run)
    layout_BFYXC = next(task.batches(0))["layout"]
    F = layout_BFYXC.shape[1]
    low, high, noise = (
        np.asarray(task._object_weights(layout_BFYXC, np.full((2, F), level))) for level in (0.1, 0.6, 1.0)
    )
    assert low.shape == (2, *task.latent_shape[:3], 1)
    for weight in (low, high, noise):
        assert weight.min() == pytest.approx(1, abs=0.1) and weight.max() <= 5
    assert low.max() / low.min() > high.max() / high.min() > 1.2
    np.testing.assert_allclose(noise, 1)


def _products(jaxpr):
    """The dtypes of the results of matrix products and convolutions, in whatever is called as well."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.add(str(equation.outvars[0].aval.dtype))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= _products(inner)
    return found


@pytest.mark.parametrize("task", ["codec", "dit"])
def test_bfloat16_is_for_products_and_parameters_stay_float32(dit_run, codec_run, task):
    """Both precisions give about the same loss; what is learnt, and its gradients, are float32 in both."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        asked = f"--config.dtype={dtype}"
        config = codec_config(asked) if task == "codec" else dit_config(codec_run, asked)
        made = make_task(config, codec_run if task == "codec" else dit_run)
        params, batch, key = random_params(made), next(made.batches(0)), jax.random.key(1)
        loss = lambda p, made=made, b=batch, k=key: made.loss(p, b, k)[0]  # noqa: E731
        losses[dtype] = jax.jit(loss)(params)
        assert losses[dtype].dtype == jnp.float32
        step, gradient = jax.make_jaxpr(jax.grad(loss), return_shape=True)(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
        assert ("bfloat16" in _products(step.jaxpr)) == (dtype == "bfloat16")
    assert losses["float32"] != losses["bfloat16"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=1e-2)


def test_a_precision_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.dtype is 'float17'"):
        loop.train(codec_config("--config.dtype=float17"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_share_of_the_prompts_is_dropped(dit_run, codec_run):
    losses = {}
    for share in (0.0, 1.0):
        task = make_task(dit_config(codec_run, f"--config.flow.drop_text={share}"), dit_run)
        params, batch, key = random_params(task), next(task.batches(0)), jax.random.key(1)
        loss = jax.jit(task.loss)
        empty = {**batch, "ids": np.tile(tokenize([""], task.text_config.length), (len(batch["ids"]), 1))}
        losses[share] = [float(loss(params, one, key)[0]) for one in (batch, empty)]
    assert losses[1.0][0] == losses[1.0][1] == losses[0.0][1] != losses[0.0][0]


def test_training_goes_on_from_mistakes_where_a_prompt_tells_of_them(codec_run, tmp_path):
    losses = {}
    for share in (0.0, 1.0):
        config = dit_config(codec_run, f"--config.flow.mistaken_share={share}", "--config.flow.drop_text=0.0")
        (tmp_path / str(share)).mkdir()
        task = make_task(config, tmp_path / str(share))
        batch = next(task.batches(0))
        assert ("mistaken" in batch) == bool(share)
        params = meta.unbox(jax.jit(task.initialize)(jax.random.key(0)))
        key = jax.random.key(2)
        losses[share] = float(jax.jit(task.loss)(params, batch, key)[0])
    assert not np.allclose(batch["mistaken"], batch["latents"], atol=0.1)
    same = {**batch, "mistaken": batch["latents"]}
    assert float(jax.jit(task.loss)(params, same, key)[0]) == losses[0.0] != losses[1.0]
    task.config.flow.drop_text = 1.0
    dropped = [float(jax.jit(lambda *of: task.loss(*of))(params, some, key)[0]) for some in (batch, same)]
    assert dropped[0] == dropped[1]
    with pytest.raises(InputError, match="was made with mistaken None, not True"):
        next(make_task(config, tmp_path / "0.0").batches(0))
    with pytest.raises(InputError, match="^own: its clips have no mistaken ones"):
        make_task(dit_config(codec_run, "--config.data.dir=own", "--config.flow.mistaken_share=0.5"), tmp_path)


@pytest.mark.slow
def test_two_clips_are_learnt_and_told_apart_by_their_captions(codec_run, tmp_path):
    """What training is for: from new noise, each caption's own clip comes out, and not the other one."""
    sizes = ("text.width=16", "text.feed_forward=32", "dit.feed_forward=64", "align.weight=0")
    rates = ("optimizer.learning_rate=5e-3", "optimizer.warmup=10", "ema_decay=0.95", "steps=700")
    draws = ("flow.shift=1.0", "flow.uniform_share=0.0", "flow.known_share=0.0", "frames=5")
    config = dit_config(codec_run, *(f"--config.{words}" for words in (*sizes, *rates, *draws)))
    task = make_task(config, tmp_path)
    two = {name: np.asarray(part) for name, part in next(task.batches(0)).items() if name != "layout"}
    batch = jax.tree.map(lambda part: part.repeat(8, axis=0), two)
    optimizer = state_lib.make_optimizer(config.optimizer, config.steps)
    state = state_lib.create(meta.unbox(jax.jit(task.initialize)(jax.random.key(0))), optimizer)
    step = state_lib.make_step(task.loss, optimizer, 0, config.ema_decay, state)
    for _ in range(config.steps):
        state, _ = step(state, batch)

    text_BLD = pipeline.encode_text(task.model, jnp.float32, state.ema["text"], two["ids"])
    noise_BFYXZ = jax.random.normal(jax.random.key(3), two["latents"].shape)
    schedule, no_guidance = sampler.noise_schedule(10, 1.0), np.ones(2, np.float32)
    denoise = jax.jit(functools.partial(pipeline.denoise, task.model, jnp.float32, is_guided=False))
    made = np.asarray(denoise([state.ema["dit"]], noise_BFYXZ, text_BLD, schedule, no_guidance))
    apart = [
        [np.linalg.norm(one - clip) / np.linalg.norm(clip) for clip in two["latents"].astype(float)] for one in made
    ]
    for number in range(2):
        assert apart[number][number] < 0.6 * apart[number][1 - number], apart


def test_previews_ask_for_nothing_that_is_refused(codec_run, tmp_path):
    with pytest.raises(Refused):
        make_task(dit_config(codec_run, "--config.prompts=('Tom Hanks on a bench',)"), tmp_path)


def test_the_rate_warms_up_stays_and_decays():
    rate = state_lib.learning_rate(ConfigDict(dict(learning_rate=1.0, warmup=10, decay=0.2)), 100)
    np.testing.assert_allclose([rate(step) for step in (0, 5, 10, 80, 90, 100)], [0, 0.5, 1, 1, 0.5, 0], atol=1e-6)
    rate = state_lib.learning_rate(ConfigDict(dict(learning_rate=1.0, warmup=10, decay=0.9)), 20)
    np.testing.assert_allclose([rate(step) for step in (5, 10, 15, 20)], [0.5, 1, 0.5, 0], atol=1e-6)


def test_a_preview_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys, toy):
    def no_key(*_, **__):
        raise InputError("cannot make the signing key")

    monkeypatch.setattr(Video, "save", no_key)
    clip = Video(np.zeros((2, 8, 8, 3), np.uint8), claim=Claim())
    monkeypatch.setattr(Toy, "preview", lambda *_: ({}, {"clip": clip}))
    assert loop.train(codec_config("--config.steps=2", "--config.preview_every=2"), tmp_path / "run")
    assert "is not shown: cannot make the signing key" in "".join(capsys.readouterr())


def test_clips_that_were_half_written_are_written_again(tmp_path):
    def clips(start, count):
        latents = (np.full((1, 1, 1, 2), number, np.float32) for number in range(start, start + count))
        return ({"latents": one, "captions": "a"} for one in latents)

    def broken(start, count):
        for number, clip in enumerate(clips(start, count)):
            if (start, number) == (2, 1):
                raise Stop
            yield clip

    with pytest.raises(Stop):
        write_shards(tmp_path, 4, 2, broken, lambda _: None)
    assert [path.name for path in tmp_path.glob("*.array_record")] == ["clips-0000000-2.array_record"]
    asked = []
    paths = write_shards(
        tmp_path, 4, 2, lambda start, count: asked.append(start) or clips(start, count), lambda _: None
    )
    assert asked == [2] and first_latents(paths[1], 2)[:, 0, 0, 0, 0].tolist() == [2, 3]


def test_clips_are_read_from_several_files_and_damage_is_told(tmp_path):
    def clips(start, count):
        rng = np.random.default_rng(start)
        for number in range(start, start + count):
            yield {"latents": np.r_[number, rng.random(20_000)].reshape(1, 1, 1, -1), "captions": "a"}

    paths = write_shards(tmp_path, 7, 3, clips, lambda _: None)
    read = latents_lib.batches(paths, 7, 4, seed=0, start=0)
    assert sorted(next(read)["latents"][:, 0, 0, 0, 0].tolist()) == list(range(7))
    whole = paths[1].read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:1000] + b"x" * 100 + whole[1100:]):
        paths[1].write_bytes(damaged)
        with pytest.raises(InputError, match=f"cannot read {paths[1]}: .*; delete it, and it is made again"):
            next(latents_lib.batches(paths, 7, 4, seed=0, start=0))


def _without_metadata(checkpoint):
    (checkpoint / "default" / "_METADATA").unlink()


def _cut_off(checkpoint):
    for path in checkpoint.rglob("d/*"):  # which of them holds what is by chance
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage", [lambda checkpoint: shutil.rmtree(checkpoint / "default"), _without_metadata, _cut_off]
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_counts(codec_run, tmp_path, damage):
    workdir = shutil.copytree(codec_run, tmp_path / "run")
    before, newest = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    damage(workdir / "checkpoints" / str(newest))
    told = f"cannot read the checkpoint .*checkpoints/{newest}: .*the one before it counts"
    with Checkpoints(workdir) as checkpoints, pytest.raises(InputError, match=told):
        checkpoints.read("ema")
    with pytest.raises(InputError, match=told):
        loop.train(codec_config(), workdir)
    shutil.rmtree(workdir / "checkpoints" / str(newest))
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == before and "ema" in checkpoints.read("ema")


def test_alignment_trains_the_tokens_and_is_not_exported(dit_run, codec_run, tmp_path):
    """The gradient of the alignment alone reaches the text encoder and the blocks up to the layer, none beyond."""
    config = dit_config(codec_run, "--config.align.layer=1")
    task = make_task(config, dit_run)
    batch = next(task.batches(0))
    align_loss = lambda p: task.loss(p, batch, jax.random.key(1))[1]["align_loss"]  # noqa: E731
    gradient = jax.jit(jax.grad(align_loss))(random_params(task))
    blocks = traverse_util.flatten_dict(gradient["dit"]["blocks"], sep="/")
    kernel = blocks["up/kernel"]
    assert np.abs(kernel[0]).max() > 0 and np.abs(kernel[1:]).max() == 0
    assert np.abs(gradient["text"]["embedding"]).max() > 0
    assert "aligner" in final_state(dit_run)["params"]
    model = loop.export(dit_run, tmp_path / "model")
    assert sorted(path.name for path in model.iterdir() if path.suffix == ".safetensors") == [
        "codec.safetensors",
        "dit.safetensors",
        "text.safetensors",
    ]


def test_a_channel_weighs_in_the_loss_as_it_is_seen(dit_run, codec_run):
    task = make_task(dit_config(codec_run, "--config.flow.seen_share=0.75"), dit_run)
    kernel = task.codec_params["decoder"]["conv_in"]["kernel"]
    kernel[..., 0, :] = 0  # the decoder is blind to this channel,
    kernel[..., 1, :] *= 10  # and sees this one well
    # Through the mixing of channels before the decoder, each one would be seen in all.
    mixing = task.codec_params["post_quant"]["kernel"]
    mixing[...] = np.eye(mixing.shape[-1])
    weight_Z = task._channel_weights(0.75)
    np.testing.assert_allclose([weight_Z.mean(), weight_Z[0], weight_Z.min()], [1, 0.25, 0.25], rtol=1e-5)
    assert weight_Z[1] == weight_Z.max() > 1.2
    np.testing.assert_array_equal(task._channel_weights(0.0), np.ones(len(weight_Z)))


@pytest.mark.slow
def test_a_decoder_trained_alone_can_be_exported_beside_the_transformer(dit_run, codec_run, tmp_path):
    plain = read_model_folder(loop.export(dit_run, tmp_path / "plain"))[1]
    both = ["--config.steps=4", f"--config.start_from={dit_run / 'codec'}"]
    loop.train(codec_config(*both), tmp_path / "all")
    loop.train(codec_config(*both, "--config.freeze_encoder=True", "--config.optimizer.warmup=1"), tmp_path / "decoder")
    model = loop.export(dit_run, tmp_path / "model", codec=tmp_path / "decoder")
    codec = read_model_folder(model)[1]["codec"]
    jax.tree.map(np.testing.assert_array_equal, codec["encoder"], plain["codec"]["encoder"])
    assert not np.array_equal(codec["decoder"]["conv_in"]["kernel"], plain["codec"]["decoder"]["conv_in"]["kernel"])
    with pytest.raises(InputError, match="its encoder is not the one"):
        loop.export(dit_run, tmp_path / "other", codec=tmp_path / "all")
    assert not (tmp_path / "other").exists()


def test_a_frozen_encoder_is_not_shrunk():
    frozen = ("--config.freeze_encoder=True", "--config.start_from=x", "--config.optimizer.weight_decay=0.1")
    with pytest.raises(InputError, match="weight_decay=0"):
        check_config(codec_config(*frozen))


def test_lists_in_a_config_are_tuples_in_the_model(dit_run):
    config = ConfigDict(json.loads((dit_run / "config.json").read_text()))
    with config.unlocked():
        config.dit.patch = [1, 2, 2]
    hash(model_config(config, read_codec(dit_run / "codec")[0]))


def test_export_needs_a_dit_run(codec_run, tmp_path, capsys):
    assert main(["export", "--workdir", str(codec_run), str(tmp_path / "model")]) == 2
    assert main(["export", "--workdir", str(tmp_path), str(tmp_path / "model")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "trains a codec" in errors[0] and "no config.json" in errors[1]
    assert not (tmp_path / "model").exists()


def test_unknown_field_is_one_line(tmp_path, capsys):
    arguments = ["train", "--config", "configs/worlds_codec.py", "--workdir", str(tmp_path / "run")]
    assert main([*arguments, "--config.optimizer.learning_rat=1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "learning_rate" in error
    assert not (tmp_path / "run").exists()
