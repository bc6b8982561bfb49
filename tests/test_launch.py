"""The launcher: what it would run, word by word, and what it runs here."""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import TINY_CODEC

from sora_jax.errors import InputError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "experiments"))
import launch  # noqa: E402

GOLDEN = Path(__file__).parent / "golden_launch"
CONFIG = ["--config", "configs/worlds_codec.py", "--config.batch=48"]  # which many devices can share


@pytest.mark.parametrize(
    "name,arguments",
    {
        "tpu_vm": ["--on", "tpu-vm=pod", "--zone", "us-west4-a", "--folder", "my sora", "--sweep", "config.seed=0,1"],
        "slurm": ["--on", "slurm", "--nodes", "2", "--gpus-per-node", "8", "--sbatch", "time=24:00:00"],
        "gke": ["--on", "gke", "--image", "registry/sora:1", "--claim", "runs", "--topology", "2x2x4"]
        + ["--tpu", "tpu-v5p-slice", "--sweep", "config.optimizer.learning_rate=1e-3"],
    }.items(),
)
def test_what_would_run_elsewhere(name, arguments, capsys):
    overrides = ["--config.steps=10", "--config.codec.multipliers=(1, 2, 4)"]
    assert launch.main([*CONFIG, "--runs", "/runs", "--dry-run", *arguments, *overrides]) == 0
    assert capsys.readouterr().out == (GOLDEN / f"{name}.txt").read_text()


def test_the_manifest_has_the_fields_that_kubernetes_publishes(capsys):
    """Names and kinds of the fields of JobSet v1alpha2 (its jobset_types.go) and of Kubernetes 1.37 (its OpenAPI)."""
    known = json.loads((GOLDEN / "kubernetes.json").read_text())

    def check(value, kind):
        if kind.startswith("list["):
            assert isinstance(value, list)
            for one in value:
                check(one, kind.removeprefix("list[").removesuffix("]"))
        elif kind in known:
            assert value.keys() <= known[kind].keys()
            for name, part in value.items():
                check(part, known[kind][name])
        else:
            assert type(value) is {"str": str, "int": int, "bool": bool}.get(kind, dict), (value, kind)

    options = ["--image", "a", "--claim", "b", "--runs", "/runs", "--dry-run"]
    assert launch.main([*CONFIG, "--on", "gke", *options]) == 0
    manifest = json.loads(re.search(r"<<'EOF'\n(.*)EOF", capsys.readouterr().out, re.DOTALL)[1])
    check(manifest, "JobSet")


def _job_script(capsys, *arguments):
    assert launch.main([*CONFIG, "--on", "slurm", "--runs", "/my runs", "--dry-run", *arguments]) == 0
    return re.search(r"<<'EOF'\n(.*)EOF", capsys.readouterr().out, re.DOTALL)[1]


def test_options_are_those_that_slurm_and_gcloud_publish(capsys):
    """Names and values of the options in the manuals of Slurm 22.05.8 (sbatch.1, srun.1) and in the synopsis of
    https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh.
    """
    known = json.loads((GOLDEN / "options.json").read_text())

    def check(tool, words):
        for word in words:
            name, equals, value = word.removeprefix("--").partition("=")
            form = known[tool][name]
            assert bool(equals) == form.startswith("=") or form.startswith("["), word
            choices = re.fullmatch(r"\[?=\{?(\w+(?:\|\w+)+)\}?\]?", form)
            assert not (choices and equals) or value in choices[1].split("|"), word

    settings = ["--nodes", "2", "--gpus-per-node", "8", "--sbatch", "partition=a100", "--sbatch", "exclusive"]
    script = _job_script(capsys, *settings)
    options = re.findall("^#SBATCH (.*)$", script, re.MULTILINE)
    check("sbatch", options)
    assert "--exclusive" in options and len(options) == 10
    srun = shlex.split(script.splitlines()[-1])
    ours = srun.index("sora-jax")
    check("srun", srun[1:ours])
    assert ours > 1
    assert launch.main([*CONFIG, "--on", "tpu-vm=pod", "--zone", "us-west4-a", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[1])
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    check(" ".join(words[:5]), words[6:])


@pytest.mark.skipif(not shutil.which("sbatch"), reason="needs Slurm's client, such as Debian's package slurm-client")
def test_slurm_itself_reads_the_script_as_it_is_meant(capsys, tmp_path):
    """sbatch reads all options before it looks for a cluster, and tells what it has read; there is none here."""
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=none\nSlurmctldHost=localhost\nNodeName=localhost\nPartitionName=all Nodes=ALL\n"
    )
    (tmp_path / "job.sh").write_text(
        _job_script(capsys, "--nodes", "2", "--gpus-per-node", "8", "--sbatch", 'comment=a "b" # \\c')
    )
    told = subprocess.run(
        ["sbatch", "-vv", "--gpus-per-node=0", tmp_path / "job.sh"],
        env={**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    ).stderr
    read = dict(re.findall(r"^sbatch: ([\w-]+) +: (.*)$", told, re.MULTILINE))
    wanted = {
        "comment": 'a "b" # \\c',
        "job-name": "worlds_codec",
        "nodes": "2",
        "ntasks-per-node": "8",
        "open-mode": "a",
        "output": "/my runs/worlds_codec-%j.out",
        "requeue": "requeue",
        "signal": "TERM@120",
    }
    assert {name: read.get(name) for name in wanted} == wanted, told


def test_what_would_run_here(capsys):
    assert launch.main([*CONFIG, "--on", "processes=2", "--dry-run"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "# worlds_codec" and len(lines) == 2 and lines[0].endswith(" &")
    for index, line in enumerate(lines):
        assert line.startswith("JAX_COORDINATOR_ADDRESS=127.0.0.1:") and f"PROCESSES=2 JAX_PROCESS_ID={index} " in line
        assert f"JAX_LOCAL_DEVICE_IDS={index} " in line
        assert "-m sora_jax train --config configs/worlds_codec.py --workdir runs/worlds_codec" in line


def test_a_mesh_is_passed_on(capsys):
    assert launch.main([*CONFIG, "--on", "local", "--dry-run", "--mesh", "auto", "--config.steps=3"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("--config.steps=3 --mesh auto")


def test_a_sweep_gives_every_combination_a_folder_of_its_own():
    sweep = ["config.optimizer.learning_rate=1e-3,2e-3", "config.codec.width=8", "config.loss.kl=0,1"]
    runs = launch.make_runs(CONFIG[1], sweep, ["--config.steps=5"], "folder")
    assert [run.name for run in runs] == [
        f"worlds_codec-learning_rate={rate}-width=8-kl={kl}" for rate in ("1e-3", "2e-3") for kl in "01"
    ]
    assert runs[0].arguments[3:] == [
        "--workdir",
        "folder/worlds_codec-learning_rate=1e-3-width=8-kl=0",
        "--config.steps=5",
        "--config.optimizer.learning_rate=1e-3",
        "--config.codec.width=8",
        "--config.loss.kl=0",
    ]
    # Fields of the same name are told apart.
    (run,) = launch.make_runs(CONFIG[1], ["config.codec.width=8", "config.mesh.data=1", "config.data.dir=a/b"], [], "r")
    assert run.name == "worlds_codec-width=8-data=1-dir=a-b"
    (run,) = launch.make_runs("configs/worlds_dit.py", ["config.text.width=8", "config.text.heads=2"], [], "r")
    assert run.name == "worlds_dit-width=8-heads=2"
    (run,) = launch.make_runs("configs/worlds_dit.py", ["config.text.heads=8", "config.dit.heads=2"], [], "r")
    assert run.name == "worlds_dit-config.text.heads=8-config.dit.heads=2"


def test_values_of_a_sweep_may_have_commas_in_brackets():
    assert launch._split("1e-3,2e-3") == ["1e-3", "2e-3"] and launch._split("a") == ["a"]
    assert launch._split("(1, 2),(1,2,4)") == ["(1, 2)", "(1,2,4)"] and launch._split("[1,2],'a,b'") == [
        "[1,2]",
        "'a,b'",
    ]
    assert launch._split("((1,2),(3,4)),{'a': [1,2]}") == ["((1,2),(3,4))", "{'a': [1,2]}"]
    assert launch._split("1,,2") == ["1", "", "2"] and launch._split("1,") == ["1", ""] and launch._split("") == [""]
    runs = launch.make_runs(CONFIG[1], ["config.codec.multipliers=(1, 2, 4),(1,4,4)"], [], "r")
    assert [run.arguments[-1] for run in runs] == [
        "--config.codec.multipliers=(1, 2, 4)",
        "--config.codec.multipliers=(1,4,4)",
    ]


def test_a_config_can_take_an_argument(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "check_config", lambda config: None)  # this one is not whole
    path = tmp_path / "sized.py"
    path.write_text("def get_config(size='s'): return dict(task='codec', size=size, batch=1)\n")
    for config, name in ((f"{path}:xl", "sized-xl"), (str(path), "sized")):
        (run,) = launch.make_runs(config, [], [], "runs")
        assert run.name == name and run.arguments[:3] == ["train", "--config", config]


def test_names_of_kubernetes_are_short_and_differ():
    assert launch.kubernetes_name("worlds_codec-seed=1") == "worlds-codec-seed-1"
    for one, other in (("seed=-1", "seed=1"), ("rate=1e-3", "rate=1e+3"), ("name=A", "name=a")):
        assert launch.kubernetes_name(one) != launch.kubernetes_name(other)
    names = {launch.kubernetes_name("worlds_dit-" + "learning_rate=1e-3-" * 5 + end) for end in "ab"}
    for name in ("\u6a21\u578b", "1b", "=", "-x-"):  # jobs and pods take labels of DNS
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", launch.kubernetes_name(name)), name
    assert len(names) == 2 and all(len(name) <= 40 and name.strip("-") == name for name in names)


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--on", "moon"], "none of: local"),
        (["--on", "processes=0"], "none of: local"),
        (["--on", "gke"], "--image and --claim"),
        (["--on", "gke", "--image", "a", "--claim", "b"], "--runs from the root on, such as /mnt/runs, not runs"),
        (
            ["--on", "gke", "--image", "a", "--claim", "b", "--runs", "/r", "--topology", "1x1"],
            "1 chips; 4 are on a host",
        ),
        (["--on", "local", "--sweep", "config.data.dir=a_b,a-b"], "same name in Kubernetes"),
        (["--on", "slurm", "--runs", "gs://bucket/runs"], "--runs gs://bucket/runs is no path: mount the bucket"),
        (["--on", "local", "--sweep", "seed=1"], "must look like"),
        (["--on", "local", "--sweep", "config.seed=1,1"], "same name"),
        (["--on", "local", "--sweep", "config.sed=1"], "did you mean seed"),
        (["--on", "local", "--config.steps=many"], "must be int"),
        (["--on", "local", "--sweep", "config.batch=8,-8"], "config.batch is -8; it must be at least 1"),
        (["--on", "local", "--sweep", "config.optimizer.learning_rate=-1e-3"], "it must be above 0"),
        (["--on", "local", "--config.optimizer.name=sgd"], "'adamw' or 'muon'"),
        (["--on", "local", "--nodes", "2"], "--nodes is for --on slurm, not local"),
        (["--on", "gke", "--gpus-per-node", "2"], "--gpus-per-node is for --on slurm, not gke"),
        (["--on", "slurm", "--zone", "us-west4-a"], "--zone is for --on tpu-vm, not slurm"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, capsys):
    assert launch.main([*CONFIG, "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("launch: error: ") and error.count("\n") == 1 and said in error


@pytest.mark.parametrize(
    "words", [["--nodes", "0"], ["--gpus-per-node=-2"], ["--chips-per-host", "0"], ["--topology", "0x4"]]
)
def test_numbers_that_cannot_be_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.main([*CONFIG, "--dry-run", "--on", "gke", *words])
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_values_with_spaces_are_quoted_for_slurm(capsys):
    assert launch.main([*CONFIG, "--dry-run", "--on", "slurm", "--runs", "my runs", "--sbatch", "comment=a b"]) == 0
    said = capsys.readouterr().out
    assert '#SBATCH --comment="a b"\n' in said and '#SBATCH --output="my runs/' in said


def python(script):
    return launch.Command([sys.executable, "-c", script])


def test_what_sbatch_would_read_otherwise_is_quoted(capsys):
    options = ['comment=say "hi" #1', "comment=it's", "--partition=a100", "exclusive", "mail-user=a@b.c"]
    words = [*CONFIG, "--on", "slurm", "--dry-run", "--runs", "/r/%u \\x", *[f"--sbatch={o}" for o in options]]
    assert launch.main(words) == 0
    said = capsys.readouterr().out
    for line in (
        r'--comment="say \"hi\" #1"',
        """--comment="it's\"""",
        "--partition=a100",
        "--exclusive",
        "--mail-user=a@b.c",
        r'--output="/r/%%u \\x/worlds_codec-%j.out"',
    ):
        assert f"#SBATCH {line}\n" in said, line


def test_a_host_knows_where_its_home_is(capsys):
    words = [*CONFIG, "--on", "tpu-vm=a", "--dry-run", "--folder", "~/my sora", "--python", "~/v/bin/python"]
    assert launch.main(words) == 0
    (command,) = capsys.readouterr().out.splitlines()[1:]
    assert shlex.split(command)[-1].startswith("--command=cd ~/'my sora' && ~/v/bin/python -m sora_jax train ")


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--on", "processes=4", "--mesh", "data=3"],
            "mesh data=3,fsdp=1,context=1,tensor=1 does not multiply to the 4",
        ),
        (["--on", "processes=4", "--mesh", "banana=3"], "'banana=3' is none of"),
        (["--on", "local", "--mesh", "data=0"], "does not multiply to the"),
        (
            ["--on", "gke", "--image=i", "--claim=c", "--runs=/r", "--topology=2x2", "--mesh=data=99"],
            "to the 4 devices",
        ),
        (["--on", "slurm", "--nodes=2", "--gpus-per-node=8", "--mesh=fsdp=3"], "to the 16 devices"),
        (["--on", "processes=2", "--sweep", "config.mesh.fsdp=1,3"], "mesh fsdp=3,context=1,tensor=1 does not"),
        (["--on", "local", "--sweep=config.seed=1", "--sweep=config.seed=2"], "config.seed is given twice"),
        (["--on", "processes=3", "--config.batch=4"], "config.batch is 4; it must be a multiple of 3"),
        (["--on", "local", "--mesh=fsdp=5,data=2"], "config.batch is 48; it must be a multiple of 10"),
        (["--on", "tpu-vm=-x"], "a TPU VM's name begins with a letter"),
        (["--on", "slurm", "--sbatch=comment=a\nb"], "an option is one line"),
        (["--on", "slurm", "--grace=32768"], "at most 65535 s before the end"),
    ],
)
def test_what_could_not_run_is_told_before_it_is_handed_over(words, said, capsys):
    assert launch.main([*CONFIG, "--dry-run", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--mesh=auto"], ["--mesh=fsdp=4"], ["--mesh=data=2,fsdp=2"]])
def test_meshes_that_can_be_are_handed_over(words):
    assert launch.main([*CONFIG, "--dry-run", "--on", "processes=4", *words]) == 0


def test_how_processes_end_is_told():
    start = functools.partial(launch.start, grace=0.5)
    good, bad = python(""), python("raise SystemExit(3)")
    killed = python("import os; os.kill(os.getpid(), 9)")
    endless = python("while True: pass")
    assert start([good]) is None and start([good, good]) is None
    assert start([bad]) == "exit code 3"
    begin = time.monotonic()
    assert start([endless, killed]) == "process 1: killed by SIGKILL"
    assert time.monotonic() - begin < 20
    with pytest.raises(InputError, match="there is no command no-such-tool"):
        start([launch.Command(["no-such-tool"])])
    reading = python("import sys; sys.exit(sys.stdin.read() != 'text')")
    assert start([launch.Command(reading.words, "text")]) is None


def test_ctrl_c_stops_what_was_started(tmp_path, monkeypatch, capsys):
    script = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1])
try:
    path.write_text("runs")
    time.sleep(100)
except KeyboardInterrupt:
    path.write_text("stopped")
"""
    paths = [tmp_path / "0", tmp_path / "1"]
    commands = [launch.Command([sys.executable, "-c", script, str(path)]) for path in paths]
    monkeypatch.setattr(launch, "on_this_machine", lambda run, processes: commands)

    def interrupt():
        while not all(path.exists() and path.read_text() == "runs" for path in paths):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert launch.main([*CONFIG, "--on", "processes=2"]) == 130
    assert [path.read_text() for path in paths] == ["stopped", "stopped"]
    assert "launch: stopped by SIGINT" in capsys.readouterr().err


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
def test_a_sweep_runs_here_in_one_process_and_in_two(tmp_path, monkeypatch, capfd):
    """Both ways agree; a value that cannot be trained with is told, and does not keep the next from its run."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    overrides = [*TINY_CODEC, "--config.steps=2", "--config.log_every=1", "--config.batch=2"]
    for where, sweep in (("local", "config.mesh.fsdp=2,1"), ("processes=2", "config.mesh.fsdp=1")):
        arguments = [*CONFIG, "--on", where, "--runs", str(tmp_path / where), "--sweep", sweep]
        assert launch.main([*arguments, *overrides]) == ("2" in sweep)
        said = capfd.readouterr()
        assert "# worlds_codec-fsdp=1: done" in said.out and "Traceback" not in said.err
        if "2" in sweep:
            assert "\n# worlds_codec-fsdp=2: exit code 2" in said.err
            assert "sora-jax: error: mesh fsdp=2,context=1,tensor=1 does not multiply to the 1 devices" in said.err
    one, two = (losses(tmp_path / where / "worlds_codec-fsdp=1") for where in ("local", "processes=2"))
    assert len(one) == 2
    assert two == pytest.approx(one, rel=1e-4)
