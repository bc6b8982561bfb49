"""experiments/read_captions.py: a text encoder that learns to read, held to what it said before."""

import jax
import numpy as np
import pytest
from scripts import script

from sora_jax.model_folder import read_model_folder


@pytest.fixture(scope="module")
def reading():
    return script("experiments/read_captions.py")


def run(reading, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["read_captions.py", *map(str, words)])
    reading.main()


def test_it_learns_and_still_says_what_it_said(reading, tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "reader"
    words = ["--captions", 64, "--batch", 16, "--seed", 3]
    run(reading, monkeypatch, tiny_folder, out, *words, "--steps", 1)
    run(reading, monkeypatch, tiny_folder, tmp_path / "again", *words, "--steps", 250)
    told = [line.split() for line in capsys.readouterr().out.splitlines() if "loss" in line]
    losses, moved = ([float(line[i].strip(",")) for line in told] for i in (3, -1))
    assert losses[-1] < 0.5 * losses[0] and 0 < moved[-1] < 0.3
    (config, before), (after_config, after) = (
        read_model_folder(folder) for folder in (tiny_folder, tmp_path / "again")
    )
    assert config == after_config
    assert all(map(np.array_equal, *(jax.tree.leaves(params["dit"]) for params in (before, after))))
    assert not np.array_equal(before["text"]["embedding"], after["text"]["embedding"])
