"""The programs that are planned run here: on a tiny model, and their operations are those of the formula."""

import json

import pytest
from jax.sharding import AbstractMesh
from scripts import script

from sora_jax.mesh import AXES


@pytest.fixture(scope="module")
def mfu():
    return script("experiments/mfu.py")


@pytest.mark.slow
def test_a_denoising_and_a_training_step_are_timed(mfu, tiny_folder, tmp_path, capsys):
    arguments = ["--model", str(tiny_folder), "--size", "32x64", "--frames", "9", "--dtype", "float32", "--batch", "2"]
    out = tmp_path / "rows.json"
    assert mfu.main([*arguments, "--repeats", "2", "--peak", "0.5", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "denoising step" in printed and "training step, batch 2" in printed and printed.count("%") == 4
    denoise, train = json.loads(out.read_text())["rows"]
    # A training step: two clips, forwards once and backwards twice; a denoising step: two branches of guidance.
    assert train["operations"] == 2 * 3 * denoise["operations"] / 2 > 1e6
    for row in (denoise, train):
        rate = row["operations_per_second_and_device"]
        assert rate == pytest.approx(row["operations"] / row["seconds"])
        assert row["mfu"] == pytest.approx(rate / 0.5e12)


def test_operations_of_a_step_are_those_of_its_clips_on_any_mesh(mfu):
    """A mesh with room for several videos fills a denoising step up; a training step has the clips that it has."""
    counted = {}
    for sizes in ((1, 1, 1, 1), (1, 8, 1, 1), (4, 1, 2, 1)):
        words = ",".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        job = mfu.Job("wan2.1-t2v-1.3b", "train", "", words, (480, 832), 17, 8)
        counted[sizes] = mfu.operations(job, AbstractMesh(sizes, AXES))
    # The text of a clip is read twice where its noise level is that of two videos: a thousandth.
    first, *others = counted.values()
    assert others == pytest.approx([first] * 2, rel=2e-3)


def test_mistakes_are_one_line(mfu, tiny_folder, capsys):
    for wrong in (["--model", "none"], ["--model", str(tiny_folder), "--mesh", "data=3", "--size", "32x64"]):
        assert mfu.main([*wrong, "--frames", "9"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mfu: error: ") and error.count("\n") == 1
