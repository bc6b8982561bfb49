import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from sora_jax.errors import InputError
from sora_jax.model_folder import (
    FORMAT_VERSION,
    open_model_folder,
    read_codec,
    read_model_folder,
    write_codec,
    write_model_folder,
)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit_json(folder, edit):
    path = folder / "model.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def edit_tensors(folder, part, edit):
    path = folder / f"{part}.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    path.write_bytes(safetensors.numpy.save(tensors))


def refusal(folder):
    with pytest.raises(InputError) as caught:
        read_model_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_config_and_parameters_survive(tiny_config, tiny_params, tiny_folder):
    config, params = read_model_folder(tiny_folder)
    assert config == tiny_config
    jax.tree.map(np.testing.assert_array_equal, params, tiny_params)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_reading_and_writing_again_is_identical(tiny_config, tiny_params, tmp_path, dtype):
    first = write_model_folder(tmp_path / "first", tiny_config, tiny_params, dtype=dtype)
    config, params = read_model_folder(first)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    second = write_model_folder(tmp_path / "second", config, params)
    names = sorted(os.listdir(first))
    assert (
        names
        == sorted(os.listdir(second))
        == [
            "codec.safetensors",
            "dit.safetensors",
            "model.json",
            "text.safetensors",
        ]
    )
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_missing_folder_and_missing_files(folder):
    assert "no model folder" in refusal(folder / "none")
    for name in ("dit.safetensors", "model.json"):
        (folder / name).unlink()
        assert name in refusal(folder)


def test_truncated_and_damaged_files_are_named(folder):
    path = folder / "codec.safetensors"
    data = path.read_bytes()
    for damaged in (data[:-100], data[:20], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        assert "codec.safetensors is damaged" in refusal(folder)
    path.write_bytes(data)
    (folder / "model.json").write_text('{"format_version": 1,')
    assert "model.json is damaged" in refusal(folder)


def test_newer_format_is_named(folder):
    edit_json(folder, lambda values: values.update(format_version=FORMAT_VERSION + 1))
    assert f"format version {FORMAT_VERSION + 1}" in refusal(folder)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda v: v.pop("format_version"), "no format_version"),
        (lambda v: v["dit"].pop("layers"), "dit.layers is missing"),
        (lambda v: v["sampling"].update(stepz=3), "unknown field sampling.stepz; is it steps?"),
        (lambda v: v["sampling"].update(steps="many"), "sampling.steps must be int"),
        (lambda v: v["sampling"].update(size=[128]), "sampling.size must be tuple"),
        (lambda v: v["sampling"].update(guidance=True), "sampling.guidance must be float"),
        (lambda v: v.update(vocabulary=["red", 3]), r"vocabulary[1] must be str"),
        (lambda v: v.update(codec=None), "codec must be CodecConfig"),
        (lambda v: v.update(dtype="int8"), "dtype must be"),
        (lambda v: v["sampling"].update(shift=0.0), "sampling: shift must be above 0, not 0.0"),
        (lambda v: v["sampling"].update(shift=-3), "sampling: shift must be above 0, not -3"),
        (lambda v: v["sampling"].update(guidance=math.nan), "sampling: guidance must be a finite number, not nan"),
        (lambda v: v["sampling"].update(guidance_low=1e39), "guidance_low must be a finite number, not 1e+39"),
        (lambda v: v["sampling"].update(steps=0), "sampling: steps must be at least 1, not 0"),
        (lambda v: v["sampling"].update(size=[128, -32]), "sampling: size must be at least 1, not -32"),
        (lambda v: v["sampling"].update(fps=0), "sampling: fps must be from 0.001 to 1000, not 0"),
        (lambda v: v.update(boundary=1.5), "boundary must be a noise level, from 0 to 1, not 1.5"),
        (lambda v: v["codec"].update(latents_std=[0.0] * 4), "codec: latents_std must be above 0"),
        (lambda v: v["codec"].update(latents_mean=[math.inf] * 4), "codec: latents_mean must be finite numbers"),
        (lambda v: v["sampling"].update(solver="heun"), "sampling: solver 'heun' does not exist"),
        (lambda v: v["dit"].update(text_width=9), "dit expects 9 channels from text, which has 8"),
        (lambda v: v["codec"].update(multipliers=[1, 2]), "codec: downsample_time needs"),
    ],
)
def test_wrong_fields_are_named(folder, edit, message):
    edit_json(folder, edit)
    assert message in refusal(folder)


def test_wrong_tensors_are_named(folder, tiny_folder):
    def check(edit, message):
        edit_tensors(folder, "dit", edit)
        assert message in refusal(folder)
        shutil.copy(tiny_folder / "dit.safetensors", folder)

    name = sorted(safetensors.numpy.load_file(folder / "dit.safetensors"))[0]
    check(lambda t: t.pop(name), f"tensor {name} is missing")
    check(lambda t: t.update(extra=np.zeros(3, np.float32)), "tensor extra is not part of this model")
    check(lambda t: t.update({name: np.zeros((3, 1, 4), np.float32)}), f"tensor {name} is [3, 1, 4]")
    check(lambda t: t.update({name: t[name].astype(np.float16)}), f"tensor {name} is F16")
    check(lambda t: t.update({name: t[name] * np.float32("nan")}), f"tensor {name} is not finite")


def test_values_that_do_not_fit_are_refused(tiny_config, tiny_params, tmp_path):
    huge = jax.tree.map(lambda leaf: leaf * 1e6, tiny_params)
    with pytest.raises(InputError, match="float16 cannot hold"):
        write_model_folder(tmp_path / "model", tiny_config, huge, dtype="float16")
    with pytest.raises(InputError, match="is missing"):
        write_model_folder(tmp_path / "model", tiny_config, {**tiny_params, "dit": {}})
    assert not os.listdir(tmp_path)


def test_only_model_folders_are_replaced(folder, tiny_config, tiny_params, tmp_path):
    config = dataclasses.replace(tiny_config, description="newer")
    write_model_folder(folder, config, tiny_params)
    assert read_model_folder(folder)[0] == config
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("data")
    with pytest.raises(InputError, match="something other than a model"):
        write_model_folder(tmp_path / "other", config, tiny_params)
    (tmp_path / "other" / "model.json").write_text('{"my": "own"}')
    with pytest.raises(InputError, match="something other than a model is there, or beside one"):
        write_model_folder(tmp_path / "other", config, tiny_params)
    (tmp_path / "other" / "precious").unlink()
    with pytest.raises(InputError, match="something other than a model"):
        write_model_folder(tmp_path / "other", config, tiny_params)
    (folder / "notes.txt").write_text("data")
    with pytest.raises(InputError, match="something other than a model"):
        write_model_folder(folder, config, tiny_params)
    assert sorted(os.listdir(tmp_path)) == ["model", "other"] and (folder / "notes.txt").exists()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_keeps_the_older_model(folder, tiny_config, tiny_params, tmp_path, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(Path, "write_text", fail)
    expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_model_folder(folder, tiny_config, tiny_params)
    with pytest.raises(expected):
        write_model_folder(tmp_path / "fresh", tiny_config, tiny_params)
    assert os.listdir(tmp_path) == ["model"]
    assert read_model_folder(folder)[0] == tiny_config


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_between_the_renames_keeps_the_older_model(folder, tiny_config, tiny_params, monkeypatch, failure):
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise failure
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(InputError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_model_folder(folder, dataclasses.replace(tiny_config, description="newer"), tiny_params)
    assert len(calls) == 3 and os.listdir(folder.parent) == ["model"]
    assert read_model_folder(folder)[0] == tiny_config


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_of_a_file_leaves_nothing(tiny_folder, tmp_path, monkeypatch, failure):
    config, tensors = open_model_folder(tiny_folder)
    last = max(tensors["dit"]["blocks"]["up"])

    def pieces():
        raise failure
        yield

    tensors["dit"]["blocks"]["up"][last] = dataclasses.replace(tensors["dit"]["blocks"]["up"][last], pieces=pieces)
    expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_model_folder(tmp_path / "fresh", config, tensors)
    assert not os.listdir(tmp_path)


def test_a_codec_alone_survives_and_a_model_contains_one(tiny_config, tiny_params, tiny_folder, tmp_path):
    write_codec(tmp_path / "codec", tiny_config.codec, tiny_params["codec"])
    for folder in (tmp_path / "codec", tiny_folder):
        config, params = read_codec(folder)
        assert config == tiny_config.codec
        jax.tree.map(np.testing.assert_array_equal, params, tiny_params["codec"])
    with pytest.raises(InputError, match="there is no codec in"):
        read_codec(tmp_path)
