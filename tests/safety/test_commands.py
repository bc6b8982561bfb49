"""Mistakes with `sora-jax check` and `safety-eval`: one line, told before the gate is loaded or anything measured."""

import os

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
