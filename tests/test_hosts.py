"""Several processes train and generate what one does, and what stops them costs nothing but time. On loopback, on fake
devices."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny import TINY_CODEC, TINY_DIT

import sora_jax
from sora_jax import hosts
from sora_jax import mesh as mesh_lib
from sora_jax.cli import main
from sora_jax.cli.config_file import load_config
from sora_jax.errors import HostLost, InputError, NoTimeStamp, Refused
from sora_jax.interop.presets import PRESETS
from sora_jax.model_config import abstract_params
from sora_jax.training import loop
from sora_jax.training import state as state_lib
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.dit_task import DiTTask
from sora_jax.video import read_video

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds; far more than a quiet machine needs
ENDLESS = [
    "--config.steps=100000",
    "--config.batch=4",
    "--config.log_every=1",
    "--config.checkpoint_every=6",
    "--config.optimizer.warmup=2",
    # Less to compile, in so many processes:
    "--config.align.weight=0",
    "--config.flow.seen_share=0",
]


def train(workdir, *overrides):
    return ["train", "--config", "configs/worlds_dit.py", "--workdir", workdir, *overrides]


def start(devices, *commands):
    """Commands of `sora-jax`, one in each of as many processes that know one another, with so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(len(commands))}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "sora_jax", *command],
            env={**environment, "JAX_PROCESS_ID": str(index)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, command in enumerate(commands)
    ]


def losses(workdir):
    """The loss by step, as far as it is written."""
    log = workdir / "metrics.jsonl"
    records = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            records[record["step"]] = record["loss"]
    return records


def wait_for(workdir, step, children, saved=0):
    """Returns after this step, with a checkpoint after step `saved` complete: the first is of step 6."""
    deadline = time.monotonic() + PATIENCE
    kept = workdir / "checkpoints"
    while max(losses(workdir), default=0) < step or not any(
        path.name.isdigit() and int(path.name) > saved for path in kept.glob("*")
    ):
        for child in children:
            assert child.poll() is None, errors_of(child)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def errors_of(child):
    """What a process that has ended says went wrong: its first words count, what JAX adds on the way out is long."""
    return child.communicate()[1].replace("\r", "\n")[:3000]


def finish(children):
    """What each process has written to stderr, once it has ended."""
    return [child.communicate(timeout=PATIENCE)[1] for child in children]


class Enough(Exception):
    """Ends a run in this process."""


def train_here(config, workdir, until, monkeypatch):
    """Trains in this process, to a checkpoint at step `until` and no further."""
    batches = DiTTask.batches

    def cut(self, start, sharding):
        for number, batch in enumerate(batches(self, start, sharding), start):
            if number == until:
                raise Enough
            yield batch

    with monkeypatch.context() as patch, pytest.raises(Enough):
        patch.setattr(DiTTask, "batches", cut)
        loop.train(config, workdir)


@pytest.mark.slow
def test_hosts_come_and_go_and_the_curve_is_that_of_one_process(tiny_folder, tmp_path, monkeypatch):
    overrides = [*TINY_DIT, *ENDLESS, f"--config.codec={tiny_folder}"]
    workdir = tmp_path / "many"

    def lose(children, lost):
        """Kills one; the others end by themselves, each with a line."""
        children[lost].kill()
        begin = time.monotonic()
        others = [index for index in range(len(children)) if index != lost]
        for index, errors in zip(others, finish([children[index] for index in others]), strict=True):
            assert children[index].returncode == 1 and "Traceback" not in errors
            # The CPU's collectives may say something of errors, too, in lines of their own.
            (said,) = re.findall(r"sora-jax: error: .*", errors)
            assert said.startswith(f"sora-jax: error: process {index} of {len(children)} has lost another one"), errors
        assert time.monotonic() - begin < 60

    # Two hosts; one is lost.
    children = start(1, *[train(workdir, *overrides)] * 2)
    wait_for(workdir, 7, children)
    lose(children, 1)
    before = losses(workdir)

    # The same two go on from the last checkpoint, exactly; one of them is sent away.
    children = start(1, *[train(workdir, *overrides)] * 2)
    wait_for(workdir, max(before) + 1, children)
    children[1].send_signal(signal.SIGTERM)
    errors = finish(children)
    assert [child.returncode for child in children] == [143] * 2, errors
    again = losses(workdir)
    assert {step: again[step] for step in before} == before

    # Four hosts take over, with the parameters split among them; one of them is lost.
    children = start(1, *[train(workdir, *overrides, "--config.mesh.fsdp=2", "--config.mesh.tensor=2")] * 4)
    wait_for(workdir, max(again) + 3, children, saved=max(again))
    lose(children, 2)
    after = losses(workdir)
    with Checkpoints(workdir) as checkpoints:
        saved = checkpoints.latest()
    assert saved > max(again)

    # One process ends what they began.
    config = load_config("configs/worlds_dit.py", overrides)
    train_here(config, workdir, saved + 2, monkeypatch)
    train_here(config, tmp_path / "one", saved + 2, monkeypatch)
    alone = losses(tmp_path / "one")
    for some in (before, again, after, losses(workdir)):
        common = sorted(step for step in some if step in alone and (step <= saved or step == saved + 2))
        assert len(common) >= 3
        np.testing.assert_allclose([some[step] for step in common], [alone[step] for step in common], rtol=1e-4)
    events = list((workdir / "tensorboard").iterdir())
    assert len(events) == 4  # each start has written once, by its first process


@pytest.mark.slow
def test_hosts_train_both_parts_to_their_end_as_one_does(tmp_path):
    """A codec, then a transformer on its latents as configured: optimizer, alignment, weights of channels, previews."""
    codec = tmp_path / "codec"
    command = ["train", "--config", "configs/worlds_codec.py", "--workdir", codec, *TINY_CODEC, "--config.steps=2"]
    own = ["--config.optimizer.name=muon", "--config.flow.seen_share=0.8", f"--config.codec={codec}"]
    overrides = [*TINY_DIT, *own, "--config.steps=4", "--config.preview_every=2", "--config.log_every=1"]
    both, alone = tmp_path / "both", tmp_path / "alone"
    runs = [[command] * 2, [train(both, *overrides, "--config.mesh.fsdp=2")] * 2, [train(alone, *overrides)]]
    for commands in runs:
        children = start(1, *commands)
        ends = finish(children)
        assert [child.returncode for child in children] == [0] * len(commands), ends
    logs = []
    for workdir in (both, alone):
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        logs.append(
            {
                (record["step"], name): value
                for record in records
                for name, value in record.items()
                if name.endswith("loss")
            }
        )
    assert logs[0].keys() == logs[1].keys() and {(4, "loss"), (4, "held_out_velocity_loss")} <= logs[0].keys()
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)


@pytest.mark.slow
def test_hosts_generate_what_one_does_and_the_first_writes_it(tmp_path):
    """By windows, and with more videos than fit at a time."""
    sampling = ["--num=2", "--steps=2", "--frames=9", "--window=5", "--size=64x64"]
    command = ["generate", "a red ball", "--hosts", *sampling, "--mesh", "data=2,context=2"]
    first, second = start(2, *[[*command, "-o", str(tmp_path / "two")]] * 2)
    (printed, errors), (nothing, others) = (child.communicate(timeout=PATIENCE) for child in (first, second))
    assert first.returncode == second.returncode == 0, errors + others
    # The CPU's collectives print lines of their own, sometimes into the middle of another.
    paths = [Path(path) for path in re.findall(r"/\S+?\.mp4", printed)]
    assert paths == sorted((tmp_path / "two").iterdir()) and len(paths) == 2
    assert not others and ".mp4" not in nothing
    alone = sora_jax.load().generate("a red ball", seed=range(2), steps=2, frames=9, window=5, size=(64, 64))
    for path, video in zip(paths, alone, strict=True):
        video.save(tmp_path / "one.mp4")
        between = read_video(path).frames.astype(float) - read_video(tmp_path / "one.mp4").frames
        # 40 dB: the encoder makes more of differences in the last bit, but another seed gives 15 dB.
        assert np.mean(between**2) < 255**2 * 1e-4

    # What the first cannot write, none makes.
    check_mistake("cannot make the folder", *[[*command, "-o", str(tmp_path / "missing" / "folder")]] * 2)


def check_mistake(said, *commands):
    """All hosts say the same, in one line; the first may have told which mesh it chose."""
    children = start(2, *commands)
    ends = finish(children)
    assert [child.returncode for child in children] == [2] * len(commands), ends
    for end in ends:
        (line,) = [line for line in end.splitlines() if not line.startswith("mesh ")]
        assert line.startswith(f"sora-jax: error: {said}")


@pytest.mark.slow
def test_hosts_that_are_asked_different_things_make_nothing(tiny_folder, tmp_path):
    rest = ["--hosts", "--model", str(tiny_folder), "-o", str(tmp_path / "ball.mp4")]
    ball, cube = (["generate", prompt, *rest] for prompt in ("a red ball", "a red cube"))
    check_mistake("model, prompts, pictures, policy and options must be the same on all hosts", ball, cube)
    # What one alone cannot read, the others are told of.
    check_mistake("cannot read", ball, [*ball, "--policy", str(tmp_path / "none.toml")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_host_that_is_lost_while_generating_ends_the_other_with_a_line(tiny_folder, tmp_path):
    endless = ["--hosts", "--model", str(tiny_folder), "--steps=100000"]
    command = ["generate", "a red ball", *endless, "-o", str(tmp_path / "ball.mp4")]

    def sampling():
        children = start(1, command, command)
        begin = time.monotonic()
        while b"step/s" not in os.read(children[0].stderr.fileno(), 1000):
            assert time.monotonic() - begin < PATIENCE
        return children

    first, second = sampling()
    second.kill()
    errors = first.communicate(timeout=PATIENCE)[1]
    assert first.returncode == 1 and "Traceback" not in errors
    assert "sora-jax: error: process 0 of 2 has lost another one" in errors

    # Process 0 is the one through which JAX knows of the others: without it JAX may be the first to say so, and abort.
    first, second = sampling()
    first.kill()
    begin = time.monotonic()
    errors = second.communicate(timeout=PATIENCE)[1]
    ours = "sora-jax: error: process 1 of 2 has lost another one" in errors
    assert time.monotonic() - begin < 60 and "Traceback" not in errors
    assert (ours and second.returncode == 1) or "JAX distributed service detected fatal errors" in errors

    # SIGTERM ends them.
    children = sampling()
    for child in children:
        child.terminate()
    finish(children)
    assert [child.returncode for child in children] == [143] * 2
    assert not list(tmp_path.iterdir())


def test_sizes_of_the_mesh_that_do_not_divide_the_parameters_are_one_line(tiny_folder, tmp_path):
    config = load_config("configs/worlds_dit.py", [*TINY_DIT, f"--config.codec={tiny_folder}"])
    task = loop.make_task(config, tmp_path)
    optimizer = state_lib.make_optimizer(config.optimizer, config.steps)
    mesh = AbstractMesh((1, 5, 1, 1), mesh_lib.AXES)
    with pytest.raises(InputError, match=r"fsdp=5 cannot divide the \d+ \(width\) of") as caught:
        loop.initial_state(task, optimizer, config, mesh)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "said,kind",
    [
        ("UNAVAILABLE: connection reset by peer", HostLost),
        ("INTERNAL: Mosaic failed to compile TPU kernel", jax.errors.JaxRuntimeError),
        ("RESOURCE_EXHAUSTED: out of memory", jax.errors.JaxRuntimeError),
    ],
)
def test_what_would_fail_alone_is_no_loss_of_a_host(said, kind, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(kind), hosts.watched():
        raise jax.errors.JaxRuntimeError(said)


@pytest.mark.parametrize(
    "failure, kind, said",
    [
        (InputError("no such folder"), InputError, "no such folder"),
        (NoTimeStamp("silent"), InputError, "silent"),
        (Refused("withheld"), Refused, "withheld"),
        (BrokenPipeError("closed"), HostLost, "process 0 has failed: BrokenPipeError: closed"),
    ],
)
def test_what_fails_in_one_process_fails_in_the_others(failure, kind, said, monkeypatch):
    """And none takes for a mistake of the user, after which it may go on, what ends the other."""
    sent = []

    def gather(letters):
        sent.append(letters)
        return np.stack([sent[0], letters])

    def fail():
        raise failure

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    with pytest.raises(type(failure)):
        hosts.by_all(fail)
    with pytest.raises(kind) as caught:
        hosts.by_all(lambda: None)
    assert type(caught.value) is kind and str(caught.value) == said


def test_who_was_told_of_others_does_not_train_alone(tmp_path):
    """JAX cannot join others once it was used: each process would take itself for the only one."""
    script = "import jax; jax.devices(); from sora_jax import hosts; hosts.connect()"
    told = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    environment = {**os.environ, **told, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(sora_jax.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode and "cannot join the other processes" in done.stderr


def test_heads_that_the_mesh_does_not_divide_are_one_line():
    with pytest.raises(InputError, match="tensor=8 cannot divide 12 heads; sizes below that can: 1, 2, 4"):
        abstract_params(PRESETS["wan2.1-t2v-1.3b"], AbstractMesh((1, 1, 1, 8), mesh_lib.AXES))


def test_only_who_is_told_of_others_looks_for_them(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    begin = time.monotonic()
    hosts.connect()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    hosts.connect()
    assert time.monotonic() - begin < 5 and not jax.distributed.is_initialized()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES is 'two'; it must be a whole number"):
        hosts.connect()


def test_hosts_that_know_of_no_other_do_not_each_make_the_whole(monkeypatch, capsys, tmp_path):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert main(["generate", "a red ball", "--hosts", "-o", str(tmp_path / "ball.mp4")]) == 2
    assert "no other host was found: set JAX_COORDINATOR_ADDRESS" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "environment,said",
    [
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, "Number of processes must be defined"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "coordinator_address should be defined"),
    ],
)
def test_half_of_what_is_to_be_told_is_a_mistake(environment, said):
    script = "from sora_jax import hosts; hosts.connect()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "InputError: cannot join the other processes: " in result.stderr and said in result.stderr
