"""What the README says works: its training commands on a tiny model, its Python on the real one."""

import importlib.util
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from tiny import TINY_CODEC, TINY_DIT

import sora_jax
from sora_jax.cli import main
from sora_jax.interop.presets import PRESETS
from sora_jax.video import read_video

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, flags=re.M)]

EXTRA = {
    "configs/worlds_codec.py": [*TINY_CODEC, "--config.steps=4"],
    "configs/worlds_dit.py": [*TINY_DIT, "--config.steps=4"],
    "evaluate": ["--num", "10"],
}


def python_block(word: str) -> str:
    [block] = [block for block in BLOCKS if word in block and "import" in block]
    return block


@pytest.fixture
def in_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")


def test_commands_from_training_to_evaluation(in_new_folder):
    commands = [line for block in BLOCKS for line in block.splitlines() if line.startswith("sora-jax ")]
    assert [command.split()[1] for command in commands] == [
        *("check", "verify"),
        *("generate", "convert"),
        *("generate", "train", "plan"),
        *("train", "train", "export", "generate", "evaluate"),
    ]
    for command in commands[7:]:
        words = shlex.split(command)[1:]
        extra = [word for key, values in EXTRA.items() if key in words for word in values]
        assert main([*words, *extra]) == 0, command
    assert len(list(Path().glob("a-blue-star-rises*.mp4"))) == 1
    assert "colour right" in Path("report/report.md").read_text()


def test_commands_for_published_folders(in_new_folder):
    """On a tiny model with random weights in the published layout."""
    Path("Wan2.1-T2V-1.3B-Diffusers").symlink_to(ROOT / "tests" / "golden" / "t2v")
    small = ["--size", "32x32", "--frames", "5", "--steps", "2"]
    commands = [line for block in BLOCKS for line in block.splitlines() if "Wan2.1-T2V-1.3B" in line]
    for command in commands:
        words = shlex.split(command)[1:]
        assert main([*words, *(small if words[0] == "generate" else [])]) == 0, command
    assert read_video("a-red-fox-in-the-snow.mp4").frames.shape == (5, 32, 32, 3)
    assert sora_jax.load("wan-1.3b").config.parts == ("text", "codec", "dit")


def test_the_published_models_are_those_that_the_document_lists():
    rows = re.findall(r"^\| Wan-AI/.*", (ROOT / "docs" / "wan.md").read_text(), flags=re.M)
    assert sorted(name for row in rows for name in re.findall(r"`(wan2[^`]*)`", row)) == sorted(PRESETS)
    for row in rows:
        (name,) = re.findall(r"`(wan2[^`]*)`", row)
        sampling = PRESETS[name].sampling
        assert f"{sampling.frames} frames" in row and f"{sampling.steps} steps" in row
        assert ("`--image`" in row) == bool(PRESETS[name].dit.condition_channels or PRESETS[name].known_frames)


def test_commands_for_a_slice(in_new_folder, capsys):
    """Here they have one device: they are understood, and what is missing is said in one line."""
    (block,) = [block for block in BLOCKS if "sora-jax plan" in block]
    Path("Wan2.1-T2V-14B-Diffusers").symlink_to(ROOT / "tests" / "golden" / "t2v")
    messages = {
        "generate": "mesh data=1,fsdp=1,context=8,tensor=1 does not multiply to the 1 devices",
        "train": "mesh data=1,fsdp=4,context=1,tensor=1 does not multiply to the 1 devices",
        "plan": "pip install -e '.[tpu]'",
    }
    for command in block.split("\n"):
        words = shlex.split(command)[1:]
        if words and (words[0] != "plan" or importlib.util.find_spec("libtpu") is None):
            assert main(words) == 2
            assert messages[words[0]] in capsys.readouterr().err


def test_python_of_the_first_section_and_commands_that_check_and_verify(in_new_folder, capsys):
    names = {}
    exec(python_block("sora_jax.load()"), names)
    assert read_video("ball.mp4").frames.shape == names["video"].frames.shape
    (block,) = [block for block in BLOCKS if "sora-jax verify" in block]
    for command in block.strip().split("\n"):
        assert main(shlex.split(command)[1:]) == 0, command
    assert capsys.readouterr().out.startswith("allowed\nball.mp4: trusted\n")


def test_python_that_writes_a_data_set(in_new_folder):
    exec(python_block("Builder"), {})
    assert list(Path("data").rglob("*.array_record*"))


def test_the_two_commands_are_what_ci_runs():
    gate = (ROOT / ".ci" / "run").read_text().replace("$venv", ".venv")  # where somebody may have one
    for part in ("python3 -m venv .venv", "-e .", '-e ".[test]"', ".venv/bin/pytest"):
        assert part in README and part in gate
    assert 'sora-jax generate "a red ball rolls behind a gray wall"' in README and "a red ball rolls behind" in gate
