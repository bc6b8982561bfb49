"""Mistakes with `sora-jax check` and `safety-eval`: one line, told before the gate is loaded or anything measured."""

import json
import os
import subprocess
import sys

import pytest

from sora_jax.cli import main
from sora_jax.safety import evaluation, gate


@pytest.mark.parametrize("prompt", ["", " \n", "\u200b\ufeff"])
def test_an_empty_prompt_is_not_allowed_but_a_mistake(monkeypatch, capsys, prompt):
    monkeypatch.setattr(gate, "load_gate", lambda _: pytest.fail("the gate is being loaded"))
    assert main(["check", prompt]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("sora-jax: error: the prompt is empty; describe") and said.err.count("\n") == 1
    assert not said.out


def test_an_empty_prompt_among_others_is_named_by_its_number(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red ball\n\u200b\n")
    assert main(["check", "--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert "prompt 2 is empty" in capsys.readouterr().err


def test_only_lines_with_a_space_after_the_sign_are_comments(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("# a comment\n#\n#nude woman\n")
    assert main(["check", "--prompts", str(tmp_path / "prompts.txt"), "--json"]) == 3
    (verdict,) = json.loads(capsys.readouterr().out)
    assert verdict["prompt"] == "#nude woman" and verdict["categories"] == ["sexual"]


def test_a_prompt_in_place_of_a_command_is_not_repeated(capsys):
    assert main(["a naked woman (on a bed)"]) == 2
    said = capsys.readouterr().err
    assert "invalid choice (choose from" in said and "naked" not in said and "bed" not in said


@pytest.mark.parametrize("module, command", [("c2pa", ["verify", "x.png"]), ("safetensors", ["check", "a red ball"])])
def test_a_package_that_is_missing_is_one_line(tmp_path, module, command):
    (tmp_path / "x.png").write_bytes(b"")
    script = f"import sys; sys.modules[{module!r}] = None; from sora_jax.cli import main; sys.exit(main({command}))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and f"a package is missing or damaged (import of {module} halted" in line


@pytest.mark.parametrize("name", ["file", "file/report", "/proc/report", "taken"])
def test_a_report_that_cannot_be_written_is_told_before_measuring(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "load_gate", lambda _: pytest.fail("the gate is being loaded"))
    (tmp_path / "file").write_text("kept")
    if name == "taken":
        (tmp_path / "taken").symlink_to("/proc/nobody")
    assert main(["safety-eval", "-o", name]) == 2
    said = capsys.readouterr()
    assert f"cannot make the folder {name}" in said.err and said.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_of_the_report_that_cannot_be_written_is_told_before_measuring(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load_gate", lambda _: pytest.fail("the gate is being loaded"))
    (tmp_path / "safety.md").mkdir()
    assert main(["safety-eval", "-o", str(tmp_path)]) == 2
    assert "safety.md: it is a folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["safety.md"]
