"""The notebook for Colab runs from start to end, with small sizes, where this project is installed already."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

import sora_jax
from sora_jax.plan import NEEDS_LIBTPU

ROOT = Path(__file__).parents[1]
SMALL = {"FRAMES": 5, "SIZE": 64, "CLIPS": 16, "STEPS": 3, "BATCH": 2, "SAMPLING_STEPS": 2}


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "experiments" / "colab_tpu.ipynb", as_version=4)


def cell_with(notebook, words):
    """The one cell of code with these words, or that tag."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (cell,) = [cell for cell in code if words in cell.source or words in cell.metadata.get("tags", ())]
    return cell


def printed(cell, name="stdout"):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == name)


def result(cell, kind="text/plain"):
    """What the last expression of a cell came to."""
    (output,) = [output for output in cell.outputs if output.output_type == "execute_result"]
    return output["data"][kind]


@pytest.mark.slow
def test_the_notebook_runs_from_start_to_end(notebook, tmp_path, monkeypatch):
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    parameters = cell_with(notebook, "parameters")
    small = {**SMALL, "WORKDIR": str(tmp_path / "run")}
    assert set(re.findall(r"[A-Z_]{4,}", parameters.source)) == small.keys()
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()

    assert printed(cell_with(notebook, "install")) == f"sora_jax {sora_jax.__version__} in {ROOT}\n"
    assert result(cell_with(notebook, "jax.devices()")) == repr(jax.devices())
    for words in ("sora_jax.load()", "sora_jax.load(model)"):
        assert "<video" in result(cell_with(notebook, words), "text/html")
    rows = printed(cell_with(notebook, "metrics.jsonl")).splitlines()
    assert rows[-1].startswith(f"{SMALL['STEPS']} ") and "held_out_velocity_loss" in rows[-1]
    assert (tmp_path / "run" / "model" / "model.json").is_file()

    plan = cell_with(notebook, '"plan"')
    assert "mesh data=1,context=1,tensor=1: one device" in printed(plan, "stderr")
    if importlib.util.find_spec("libtpu"):
        assert result(plan) == "0" and "\nfits: at most " in printed(plan)
    else:
        # An exit code and a line, and nothing that looks like an answer.
        assert result(plan) == "2" and printed(plan) == ""
        assert f"{NEEDS_LIBTPU}\n" in printed(plan, "stderr")


@pytest.fixture
def install(notebook, tmp_path, monkeypatch):
    """Runs the cell that installs, in an empty folder where nothing is installed; gives the commands it would run."""
    commands = []

    def run(command, check):
        assert check  # or a failure would pass unseen
        commands.append(command)
        if command[0] == "git":
            (tmp_path / command[-1] / "configs").mkdir(parents=True)
            (tmp_path / command[-1] / "configs" / "worlds_dit.py").touch()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **where: ())
    monkeypatch.chdir(tmp_path)

    def cell(repository=""):
        source = cell_with(notebook, "install").source
        exec(re.sub('^REPOSITORY = ""', f"REPOSITORY = {repository!r}", source, flags=re.M), {})
        return commands

    return cell


def test_the_notebook_clones_and_installs(install, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "-e", ".[tpu]"]
    assert install("https://example.com/sora_jax") == [
        ["git", "clone", "--quiet", "https://example.com/sora_jax", "sora_jax"],
        pip,
    ]
    assert Path.cwd() == tmp_path / "sora_jax"
    assert install()[2:] == [pip]  # once more, in the clone
    assert Path.cwd() == tmp_path / "sora_jax"


def test_the_notebook_says_what_it_needs_to_clone(install):
    with pytest.raises(AssertionError, match="give REPOSITORY"):
        install()


def test_the_notebook_does_not_install_what_is_installed(install, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name, path: iter([name]))
    assert [command[0] for command in install("https://example.com/sora_jax")] == ["git"]
