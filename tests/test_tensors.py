"""Reading, placing and writing in pieces gives what doing it at once would."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from scripts import script

from sora_jax import tensors as tensors_lib
from sora_jax.errors import InputError
from sora_jax.tensors import Tensor, TensorFile

ROOT = Path(__file__).parents[1]
SHAPES = {"b": (7, 3), "a": (2, 3, 4), "ä.kernel": (5,), "scalar": (), "norm": (4, 2)}
DTYPES = {"b": "float32", "a": "bfloat16", "ä.kernel": "float32", "scalar": "float32", "norm": "bfloat16"}

EIGHT_DEVICES = """
import sys
import jax, numpy as np
import sora_jax
from sora_jax import tensors
from sora_jax.models import convert
from sora_jax.errors import InputError
from sora_jax.mesh import make_mesh
from sora_jax.model_config import abstract_params

published, converted, lora = sys.argv[1:]
assert jax.device_count() == 8
tensors._PIECE_BYTES = 4000  # small as they are, many parameters come in several pieces
mesh = make_mesh(fsdp=4)
convert(published, converted)
plain = sora_jax.load(published, lora={lora: 0.5})
for folder in (published, converted):
    shared = sora_jax.load(folder, lora={lora: 0.5}, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, shared.params, plain.params)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(shared.config, mesh))
    assert jax.tree.map(lambda leaf: leaf.sharding, shared.params) == places
    kernel = shared.params["dit"]["blocks"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], kernel.shape[1] // 4, kernel.shape[2])
    # Another mesh is refused in one line, before anything is read.
    tensors.TensorFile.read, read = None, tensors.TensorFile.read
    try:
        sora_jax.load(folder, mesh=make_mesh(fsdp=3, devices=jax.devices()[:3]))
        raise AssertionError("not refused")
    except InputError as error:
        assert "fsdp=3 cannot divide the" in str(error) and chr(10) not in str(error), error
    tensors.TensorFile.read = read
print("equal")
"""


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(jnp.dtype(DTYPES[name])) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("piece", [4, 50, 1000])
def test_pieces_are_the_whole(arrays, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tensors_lib, "_PIECE_BYTES", piece)
    whole = safetensors.numpy.save(arrays)
    (tmp_path / "whole").write_bytes(whole)
    file = TensorFile(tmp_path / "whole")
    kinds = {name: arrays[name].dtype for name in arrays}
    tensors = {name: Tensor(SHAPES[name], kinds[name], lambda name=name: file.pieces(name)) for name in arrays}
    if piece == 4:
        assert len(list(tensors["b"].pieces())) == 7
    for name, tensor in tensors.items():
        for read in (tensor.read(), tensor.place()):
            assert read.dtype == arrays[name].dtype
            np.testing.assert_array_equal(np.asarray(read), arrays[name])
    tensors_lib.write(tmp_path / "again", tensors)
    assert (tmp_path / "again").read_bytes() == whole


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_found(dtype, value, tmp_path):
    x = np.linspace(-60000, 60000, 12).reshape(3, 4).astype(jnp.dtype(dtype))
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"x": x}, path)
    assert TensorFile(path).read("x").shape == (3, 4)
    x[2, 3] = float(value)
    safetensors.numpy.save_file({"x": x}, path)
    with pytest.raises(InputError, match="x.safetensors is damaged: the tensor x is not finite"):
        TensorFile(path).read("x")


def test_a_folder_is_called_one(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(InputError, match="cannot read .*x.safetensors: Is a directory"):
        TensorFile(tmp_path / "x.safetensors")


def test_what_git_leaves_without_lfs_is_not_called_damaged(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4995584424\n")
    with pytest.raises(InputError, match="x.safetensors only names a file that Git LFS would fetch"):
        TensorFile(path)


def test_what_is_read_ahead_comes_in_order_and_no_further():
    started = []

    def call(number):
        started.append(number)
        if number == 6:
            raise InputError("damaged")
        return number

    results = tensors_lib.ahead(partial(call, number) for number in range(100))
    for number in range(6):
        assert next(results) == number
        assert len(started) <= number + tensors_lib._AHEAD
    with pytest.raises(InputError, match="damaged"):
        next(results)
    assert len(started) <= 6 + tensors_lib._AHEAD


def test_a_file_that_shrinks_after_it_was_opened_is_damaged(arrays, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays))
    file = TensorFile(path)
    os.truncate(path, path.stat().st_size - 200)
    with pytest.raises(InputError, match="x.safetensors is damaged: it ends in the tensor"):
        [file.read(name) for name in arrays]
    path.unlink()
    with pytest.raises(InputError, match="cannot read .*x.safetensors: No such file"):
        file.read("b")


def test_eight_devices_share_what_one_would_hold(tmp_path):
    random, prefix = np.random.default_rng(0), "transformer.blocks.1.ffn.net.0.proj"
    matrices = {"lora_A": random.normal(size=(4, 32)), "lora_B": random.normal(size=(48, 4))}
    lora = tmp_path / "style.safetensors"
    safetensors.numpy.save_file({f"{prefix}.{key}.weight": np.float32(x) for key, x in matrices.items()}, lora)
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    folders = [ROOT / "tests" / "golden" / "t2v", tmp_path / "converted", lora]
    command = [sys.executable, "-c", EIGHT_DEVICES, *map(str, folders)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "equal" in result.stdout


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell the peak of memory")
def test_the_host_never_holds_the_model():
    memory = script("experiments/loading_memory.py")
    bound, took = memory.figures(layers=32, shards=2, rows=("load", "load with a LoRA", "convert"))
    assert bound < 180e6  # the parameters are 268e6
    assert max(took.values()) < bound, took
