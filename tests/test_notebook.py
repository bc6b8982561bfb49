"""The notebook for Colab runs from start to end, with small sizes and without its installation."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_notebook_runs_from_start_to_end(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / "experiments" / "colab_tpu.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    small = {"FRAMES": 5, "SIZE": 64, "CLIPS": 16, "STEPS": 3, "BATCH": 2, "SAMPLING_STEPS": 2}
    assert set(re.findall(r"[A-Z_]{4,}", parameters.source)) == {*small, "WORKDIR"}
    small["WORKDIR"] = str(tmp_path / "run")
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = [
        output["data"].get("text/html", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "execute_result"
    ]
    assert sum("<video" in html for html in shown) == 2
    printed = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stdout"
    )
    assert "held_out_velocity_loss" in printed
    (plan,) = [cell for cell in notebook.cells if '"plan"' in cell.source]
    told = "".join(output.text for output in plan.outputs if output.output_type == "stream")
    assert "divides the 1560 tokens of a frame" in told  # as far as it goes without libtpu
    assert (tmp_path / "run" / "model" / "model.json").is_file()
