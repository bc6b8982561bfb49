"""experiments/average.py: the mean of models."""

import dataclasses

import jax
import numpy as np
import pytest
from scripts import script

from sora_jax.model_folder import read_model_folder, write_model_folder


@pytest.fixture(scope="module")
def average():
    return script("experiments/average.py")


def run(average, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["average.py", *map(str, words)])
    average.main()


def test_the_mean_is_that_of_every_parameter(average, tiny_folder, tiny_config, tiny_params, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny_config, vocabulary=("new",))
    other = write_model_folder(tmp_path / "other", config, jax.tree.map(lambda x: 3 * np.asarray(x), tiny_params))
    run(average, monkeypatch, tiny_folder, other, tmp_path / "mean")
    found, params = read_model_folder(tmp_path / "mean")
    assert found == config
    jax.tree.map(lambda one, mean: np.testing.assert_allclose(mean, 2 * one, rtol=1e-6), tiny_params, params)


def test_what_has_no_mean_is_told(average, tiny_folder, tiny_config, tiny_params, tmp_path, monkeypatch, capsys):
    codec = dataclasses.replace(tiny_config.codec, latents_mean=(1.0,) * tiny_config.codec.latent_channels)
    config = dataclasses.replace(tiny_config, codec=codec)
    other = write_model_folder(tmp_path / "other", config, tiny_params)
    for words, said in (
        ([tiny_folder, other], "different sizes, or different codecs"),
        ([tiny_folder], "at least two models"),
        ([tiny_folder, tmp_path / "none"], "there is no model folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(average, monkeypatch, *words, tmp_path / "mean")
        assert ended.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "mean").exists()
