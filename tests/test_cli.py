import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import sora_jax
from sora_jax import models
from sora_jax.cli import main
from sora_jax.cli.config_file import load_config
from sora_jax.cli.saving import Target
from sora_jax.errors import InputError
from sora_jax.generate import Generator
from sora_jax.safety import keys, provenance, scan
from sora_jax.safety.policy import load_policy
from sora_jax.safety.provenance import read_manifest
from sora_jax.video import read_video

sys.path.append(str(Path(__file__).parent / "safety"))
from time_stamps import needs_openssl, time_stamp_server  # noqa: E402


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_keep_compiled_programs", lambda: None)


@pytest.fixture(scope="module")
def tiny_generator(tiny_config, tiny_params):
    return Generator(tiny_config, tiny_params)


@pytest.fixture
def generate(tiny_folder, tiny_generator, monkeypatch):
    # One generator for all tests compiles once.
    monkeypatch.setattr(models, "load", lambda path, dtype, **lora: tiny_generator)
    return lambda *arguments: main(["generate", *arguments, "--model", str(tiny_folder), "--steps", "1"])


def one_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("sora-jax: error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0] and "Traceback" not in "".join(lines)
    return errors[0]


def test_the_command_makes_a_video(tiny_folder, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(sora_jax.__file__))
    command = [sys.executable, "-m", "sora_jax", "generate", "A red zebra", "--model", str(tiny_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a-red-zebra.mp4\n"), done.stderr
    assert "does not know: zebra" in done.stderr and "2/2" in done.stderr
    assert len(read_video("a-red-zebra.mp4").frames) == 5
    assert any("decode" in name for name in os.listdir(tmp_path / "cache" / "sora_jax"))


def test_older_files_are_kept_unless_named(generate, capsys):
    assert generate("a red ball") == generate("a red ball") == 0
    assert capsys.readouterr().out.split() == ["a-red-ball.mp4", "a-red-ball-2.mp4"]
    assert read_video("a-red-ball.mp4").frames.tobytes() == read_video("a-red-ball-2.mp4").frames.tobytes()
    before = os.stat("a-red-ball.mp4").st_ino
    assert generate("red", "-o", "a-red-ball.mp4", "--fps", "12") == 0
    assert os.stat("a-red-ball.mp4").st_ino != before and read_video("a-red-ball.mp4").fps == 12


def test_several_seeds_and_prompts(generate, capsys, tmp_path):
    assert generate("a red ball", "--num", "2", "--seed", "7", "-o", "out") == 0
    assert sorted(os.listdir("out")) == ["a-red-ball-seed-7.mp4", "a-red-ball-seed-8.mp4"]
    (tmp_path / "prompts.txt").write_text("# prompts\n\na red ball\n  red  \n")
    assert generate("--prompts", "prompts.txt") == 0
    assert capsys.readouterr().out.split()[-2:] == ["a-red-ball.mp4", "red.mp4"]


@pytest.mark.parametrize("chosen", [[], ["-o", "."], ["-o", "mine.mp4"]])
def test_a_report_of_a_withheld_video_does_not_repeat_the_prompt(generate, monkeypatch, capsys, tmp_path, chosen):
    monkeypatch.setattr(scan.OpenNSFW, "scores", lambda _, frames_THWC: [0.9] * len(frames_THWC))
    names = ["mine.mp4.withheld.json"] if "mine.mp4" in chosen else ["withheld-seed-7-2.json", "withheld-seed-7.json"]
    for _ in names:
        assert generate("a red ball", "--seed", "7", *chosen) == 3
        said = capsys.readouterr()
        (line,) = [line for line in said.err.splitlines() if line.startswith("sora-jax: refused: ")]
        assert "withheld" in line and line.endswith("says why") and "ball" not in line + said.out
    assert sorted(os.listdir(tmp_path)) == names
    assert all('"passed": false' in (tmp_path / name).read_text() for name in names)


def test_the_first_use_says_what_the_key_proves_and_no_later_one(generate, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for times in (1, 0):
        assert generate("a red ball") == 0
        said = capsys.readouterr().err
        assert said.count("note: a signing key was made for this installation.") == times
        assert "UserWarning" not in said


def test_the_policy_of_an_operator_decides(generate, capsys, tmp_path):
    text = '[categories.logos]\ndescription = "logos"\nthreshold = 0.9\nphrases = ["logo* of acme"]\nexamples = []\n'
    (tmp_path / "policy.toml").write_text(text)
    assert generate("the logo of Acme", "--policy", "policy.toml") == 3
    assert "sora-jax: refused: " in capsys.readouterr().err and os.listdir(tmp_path) == ["policy.toml"]
    assert generate("the logo of Acme", "-o", "logo.mp4") == 0
    assert generate("a red ball", "--policy", "policy.toml") == 0
    said = [read_manifest(name).generation["checks"]["prompt"] for name in ("logo.mp4", "a-red-ball.mp4")]
    assert [one["policy_sha256"] for one in said] == [load_policy(path).digest for path in (None, "policy.toml")]


def test_names_come_from_prompts():
    assert str(Target(None, several=False, frames=1, fps=8.0).path("A red ball!")) == "a-red-ball.png"
    assert str(Target("out", several=True, frames=5, fps=8.0).path("../?/..")) == "out/video.mp4"
    assert len(Target(None, several=False, frames=5, fps=8.0).path("é" * 300).name.encode()) < 255


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([""], "prompt is empty"),
        ([], "give one prompt"),
        (["red", "--prompts", "x"], "give one prompt"),
        (["--prompts", "none.txt"], "cannot read none.txt"),
        (["red", "--frames", "16"], "nearest are 13 and 17"),
        (["red", "--size", "100x64"], "nearest are 96 and 128"),
        (["red", "--frames", "0"], "0 is not, nearest is 1"),
        (["red", "--size", "0x64"], "0 is not, nearest is 32"),
        (["red", "--size", "wide"], "HEIGHTxWIDTH"),
        (["red", "--steps", "0"], "at least 1"),
        (["red", "--guidance", "nan"], "must be a number"),
        (["red", "--fps", "0"], "above 0"),
        (["red", "--seed", "-1"], "from 0 to 4294967295"),
        (["red", "--seed", "4294967295", "--num", "2"], "largest seed"),
        (["red", "--kernel", "flash"], "choose from"),
        (["red", "--colour=blue"], "unrecognized arguments: --colour; see"),
        (["red", "ball", "rolls"], "2 words too many: quote the prompt"),
        (["red", "ball"], "1 word too many: quote the prompt"),
        (["red", "-o", "red.avi"], "must end in"),
        (["red", "-o", "none/red.mp4"], "no folder none"),
        (["red", "--mesh", ""], "--mesh is empty"),
        (["red", "--last-image", ""], "--last-image is empty"),
        (["red", "-o", "red.png"], "holds one frame"),
        (["red", "--image", "none.png"], "takes no image"),
        (["red", "--num", "2", "-o", "red.mp4"], "folder"),
        (["red", "--num", "2", "-o", "red.AVI"], "folder"),
        (["red", "--num", "2", "-o", "none/out"], "cannot make the folder"),
    ],
)
def test_mistakes_end_in_one_line_before_loading(generate, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model is being loaded"))
    assert generate(*arguments) == 2
    assert message in one_line(capsys)
    assert not os.listdir(tmp_path)


def test_a_name_that_ends_in_a_slash_is_that_of_a_folder(generate, tmp_path):
    assert generate("a red ball", "-o", f"{tmp_path}/videos/") == 0
    assert os.listdir(tmp_path / "videos") == ["a-red-ball.mp4"]


def test_what_is_not_finite_is_no_video(generate, tiny_generator, monkeypatch, capsys, tmp_path):
    dit = jax.tree.map(lambda leaf: leaf * np.nan, tiny_generator.params["dit"])
    monkeypatch.setattr(tiny_generator, "params", {**tiny_generator.params, "dit": dit})
    assert generate("a red ball") == 2
    assert "sampling ended in numbers that are not finite" in one_line(capsys)
    assert not os.listdir(tmp_path)


def test_the_kernels_that_can_be_chosen_are_those_there_are(capsys):
    from sora_jax.attention import KERNELS

    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert f"--kernel {{auto,{','.join(KERNELS)}}}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["paint"], ["train"], ["generate", "red", "--model"]])
def test_wrong_use_ends_in_one_line(capsys, arguments):
    assert main(arguments) == 2
    assert "--help" in one_line(capsys)


def test_damaged_models_end_in_one_line(tiny_folder, tmp_path, capsys):
    assert main(["generate", "red", "--model", "none"]) == 2
    assert "no model folder none" in one_line(capsys)
    (tmp_path / "empty").mkdir()
    assert main(["generate", "red", "--model", "empty"]) == 2
    assert "empty is no model folder" in one_line(capsys)
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    with open(folder / "dit.safetensors", "r+b") as file:
        file.truncate(100)
    for several in ([], ["--num", "2", "-o", "new"]):
        assert main(["generate", "red", "--model", "model", *several]) == 2
        assert "dit.safetensors is damaged" in one_line(capsys)
    assert sorted(os.listdir()) == ["empty", "model"]


@pytest.mark.parametrize(
    "failure, code", [(OSError(errno.ENOSPC, "No space left on device"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_failure_while_writing_leaves_nothing(generate, capsys, monkeypatch, tmp_path, failure, code):
    def fail(path, signer):
        assert path.stat().st_size > 0
        raise failure

    monkeypatch.setattr(provenance, "verify_signed", fail)
    assert generate("a red ball", "-o", "ball.mp4") == code
    message = one_line(capsys)
    assert code == 130 or "No space left on device" in message
    assert not os.listdir(tmp_path)


@needs_openssl
def test_a_server_that_gives_no_stamp_is_found_before_anything_is_made(generate, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Generator, "_waited", None)
    (tmp_path / "server").mkdir()
    with time_stamp_server(tmp_path / "server", silent_at=range(99)) as url:
        assert generate("a red ball", "--num", "2", "-o", "out", "--timestamp-url", url) == 2
    said = one_line(capsys)
    assert said.startswith(f"sora-jax: error: the time-stamp server {url} gives no time stamp") and "503" in said
    assert os.listdir(tmp_path) == ["server"] and Path("server/asked").read_text() == "1"


@needs_openssl
def test_a_server_that_fails_late_costs_a_stamp_and_no_video(generate, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "_PATIENCE", 0)
    with time_stamp_server(tmp_path, silent_at=[3]) as url:  # the first stamp is that of the rehearsal
        assert generate("a red ball", "--num", "3", "-o", "out", "--timestamp-url", url) == 2
    said = capsys.readouterr()
    paths = [f"out/a-red-ball-seed-{seed}.mp4" for seed in range(3)]
    assert said.out.split() == paths and sorted(os.listdir("out")) == [os.path.basename(path) for path in paths]
    manifests = [read_manifest(path, keys.local_anchor()) for path in paths]
    assert [one.state for one in manifests] == ["trusted"] * 3
    assert [bool(one.time) for one in manifests] == [True, False, True]
    without = f"{paths[1]} is signed, but without a time stamp: the time-stamp server {url} gives no time stamp"
    assert f"video 2 of 3 (seed 1): {without}" in said.err
    assert said.err.splitlines()[-1].startswith(f"sora-jax: error: 1 of 3 videos: {without}")


@pytest.mark.parametrize("recovers", [True, False])
def test_one_video_that_cannot_be_saved_does_not_cost_the_others(generate, capsys, monkeypatch, recovers):
    """Unless the next ones cannot be saved either."""
    outcomes = iter(["rehearsed", "saved", None, "rehearsed" if recovers else None])

    def verify(path, signer):
        if next(outcomes) is None:
            raise InputError("another certificate")

    scores = iter([0.0, 0.0, 0.9])
    monkeypatch.setattr(scan.OpenNSFW, "scores", lambda _, frames_THWC: [next(scores)] * len(frames_THWC))
    monkeypatch.setattr(provenance, "verify_signed", verify)
    assert generate("a red ball", "--num", "3", "-o", "out") == 2
    said = capsys.readouterr()
    assert said.out.split() == ["out/a-red-ball-seed-0.mp4"]
    assert "video 2 of 3 (seed 1): another certificate\n" in said.err
    if not recovers:
        assert os.listdir("out") == ["a-red-ball-seed-0.mp4"]
        assert said.err.endswith("\nsora-jax: error: another certificate\n")
        return
    assert sorted(os.listdir("out")) == ["a-red-ball-seed-0.mp4", "withheld-seed-2.json"]
    assert "video 3 of 3 (seed 2): the frame scan withholds a video; out/withheld-seed-2.json says why\n" in said.err
    assert said.err.endswith("sora-jax: error: 2 of 3 videos: another certificate\n")


def test_a_folder_in_which_nothing_could_be_saved_is_taken_away(generate, capsys, monkeypatch, tmp_path):
    outcomes = iter(["rehearsed", None, "rehearsed", None, "rehearsed"])

    def verify(path, signer):
        if next(outcomes) is None:
            raise InputError("another certificate")

    monkeypatch.setattr(provenance, "verify_signed", verify)
    assert generate("a red ball", "--num", "2", "-o", "out") == 2
    assert capsys.readouterr().err.endswith("sora-jax: error: 2 of 2 videos: another certificate\n")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "number, code, said", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_while_sampling(generate, capsys, monkeypatch, tmp_path, number, code, said):
    monkeypatch.setattr(Generator, "_waited", lambda *_: os.kill(os.getpid(), number))
    assert generate("a red ball") == code
    assert said in one_line(capsys)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["--output", "--model"])
def test_an_empty_name_is_told(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a red ball", name, ""]) == 2
    assert f"{name} is empty" in one_line(capsys) and not os.listdir(tmp_path)


def test_a_damaged_key_of_the_mark_is_found_before_anything_is_made(generate, capsys, monkeypatch, tmp_path):
    def damaged():
        raise InputError("the signing key is open to other users")

    monkeypatch.setattr(Generator, "_waited", None)
    monkeypatch.setattr(keys, "watermark_key", damaged)
    assert generate("a red ball") == 2
    assert "open to other users" in one_line(capsys) and not os.listdir(tmp_path)


def test_an_interrupt_ends_the_sampling_at_once(tmp_path):
    """In the middle of the one program that would run for minutes, which is still its first run."""
    command = [sys.executable, "-m", "sora_jax", "generate", "a red ball", "--steps", "3000", "-o", "ball.mp4"]
    folders = {"PYTHONPATH": os.path.dirname(os.path.dirname(sora_jax.__file__))}
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | folders, stderr=subprocess.PIPE) as process:
        said = b""
        while b" 3/3000" not in said:
            assert (more := os.read(process.stderr.fileno(), 4096)), said
            said += more
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        said += process.stderr.read()
        code = process.wait()
    assert code == 130 and said.endswith(b"error: interrupted\n") and not os.listdir(tmp_path)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_too_little_memory_ends_in_one_line(generate, capsys, monkeypatch, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(Generator, "_waited", fail)
    assert generate("a red ball") == 2
    assert "not enough memory" in one_line(capsys)


def test_an_interrupt_in_the_first_moments(tmp_path):
    """While the command line itself is imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Finder:\n    def find_spec(self, name, *_):\n"
        "        if name == 'sora_jax.cli': raise KeyboardInterrupt\nsys.meta_path.insert(0, Finder())\n"
    )
    folders = os.pathsep.join([str(tmp_path), os.path.dirname(os.path.dirname(sora_jax.__file__))])
    command = [sys.executable, "-m", "sora_jax", "generate", "red"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": folders}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "sora-jax: error: interrupted\n")


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["generate", "--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    assert sora_jax.__version__ in capsys.readouterr().out


def test_import_is_cheap():
    code = "import sys, sora_jax, sora_jax.cli; print([m for m in ('jax', 'flax', 'numpy', 'av') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(sora_jax.__file__))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    optimizer = ConfigDict({"learning_rate": 1e-3, "name": "adam"})
    return ConfigDict({"steps": 10, "ema": True, "size": (128, 128), "optimizer": optimizer})
"""


def test_config_overrides_have_the_type_of_the_field(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    words = ["--config.steps=20", "--config.optimizer.learning_rate", "1e-4", "--config.ema=false"]
    words += ["--config.size=(64,32)", "--config.optimizer.name=7"]
    config = load_config("config.py", words)
    assert (config.steps, config.ema, config.size) == (20, False, (64, 32))
    assert (config.optimizer.learning_rate, config.optimizer.name) == (1e-4, "7")
    assert load_config("config.py", ["--config.optimizer.learning_rate=1"]).optimizer.learning_rate == 1.0
    with pytest.raises((AttributeError, KeyError)):
        config.new_field = 3


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config.stepz=3"], "no field stepz; the top level: did you mean steps?"),
        (["--config.optimizer.learning=3"], "did you mean learning_rate?"),
        (["--config.steps.more=3"], "no field steps.more"),
        (["--config.steps=many"], "--config.steps must be int, not 'many'"),
        (["--config.steps=1.5"], "--config.steps must be int"),
        (["--config.ema=1"], "--config.ema must be bool"),
        (["--config.optimizer=3"], "is a group of fields"),
        (["--config.steps"], "needs a value"),
        (["--steps=3"], "unrecognized argument"),
    ],
)
def test_wrong_overrides_are_named(tmp_path, words, message):
    (tmp_path / "config.py").write_text(CONFIG)
    with pytest.raises(InputError) as caught:
        load_config("config.py", words)
    assert message in str(caught.value)


def test_wrong_config_files_end_in_one_line(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\n\n\ndef get_config():\n    sys.exit(3)\n")
    mistakes = {"none.py": "no config file none.py", "broken.py": "ZeroDivisionError", "leaves.py": "SystemExit: 3"}
    for name, message in mistakes.items():
        assert main(["train", "--config", name, "--workdir", "run"]) == 2
        assert message in one_line(capsys)


def test_the_other_commands_pass_on_what_they_are_given(tmp_path, monkeypatch, capsys):
    from sora_jax.evaluation import report
    from sora_jax.training import loop

    calls = []
    monkeypatch.setattr(loop, "train", lambda config, *given: not calls.append((config.steps, *given)))
    monkeypatch.setattr(loop, "export", lambda workdir, out, codec: calls.append((workdir, out, codec)) or out)
    low = {"label": "colour right", "aim": 0.95, "ceiling": {"value": 0.5, "n": 3}}
    measured = {"rows": [low], "frames": 9, "size": [64, 64]}
    monkeypatch.setattr(report, "evaluate", lambda *args, **options: calls.append((args, options)) or measured)
    (tmp_path / "config.py").write_text(CONFIG)
    assert main(["train", "--config", "config.py", "--workdir", "run", "--config.steps=7"]) == 0
    assert main(["train", "--config", "config.py", "--workdir", "run", "--mesh", "auto"]) == 0
    assert main(["export", "--workdir", "run", "model"]) == 0
    assert main(["export", "--workdir", "run", "model", "--codec", "decoder"]) == 0
    assert main(["evaluate", "--model", "model", "--out", "out", "--num", "3", "--steps", "4"]) == 0
    assert calls == [
        (7, "run", None),
        (10, "run", "auto"),
        ("run", "model", None),
        ("run", "model", "decoder"),
        (("model", "out", 3, 0), {"steps": 4, "guidance": None}),
    ]
    printed = capsys.readouterr()
    assert printed.out.split() == ["model", "model", os.path.join("out", "report.md")]
    assert "real renders are read right less often than is aimed at" in printed.err and "(0.500)" in printed.err


def test_a_reader_that_leaves_early_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "sora_jax", "check", "a red ball"]
    ended = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, timeout=120)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (141, b"")
