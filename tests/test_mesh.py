"""Placement on many devices changes nothing but the placement."""

import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from sora_jax import mesh as mesh_lib
from sora_jax.codec import Codec, CodecConfig
from sora_jax.dit import DiT, DiTConfig
from sora_jax.errors import InputError
from sora_jax.text import T5Encoder, TextConfig

ROOT = Path(__file__).parents[1]
DIT = (
    DiT(DiTConfig(4, heads=2, head_width=8, feed_forward=16, layers=2, text_width=8, frequency_width=16)),
    jnp.zeros((1, 2, 4, 4, 4)),
    jnp.zeros((1, 2)),
    jnp.zeros((1, 4, 8)),
)
TEXT = T5Encoder(TextConfig(32, 8, 2, 4, 16, layers=2, length=4)), jnp.zeros((1, 4), jnp.int32)
CODEC = Codec(CodecConfig(4, 4, 4, (1, 2), (True,), blocks=1, patch=2)), jnp.zeros((1, 3, 8, 8, 3))


def on_eight_devices(what):
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tests" / "eight_devices.py"), what]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_codec_whose_rows_are_split_computes_what_one_device_does():
    assert on_eight_devices("codec").count("equal on") == 4


def test_a_text_encoder_is_never_whole_on_one_device():
    assert on_eight_devices("text").count("equal on") == 3


def test_the_same_seed_gives_the_same_video_on_any_mesh():
    assert on_eight_devices("generate").count("equal on") == 2


@pytest.mark.slow
def test_a_codec_is_trained_on_a_mesh_as_on_one_device():
    assert on_eight_devices("train_codec").count("equal on") == 3


@pytest.mark.slow
def test_every_kind_of_wan_gives_the_same_video_on_a_mesh():
    assert on_eight_devices("wan").count("equal on") == 8


def test_training_with_rings_is_lowered_for_tpus():
    assert on_eight_devices("rings_for_tpus") == "lowered\n"


def test_every_mesh_computes_what_one_device_does():
    assert on_eight_devices("dit").count("equal on") == 7


def test_all_to_all_and_rings_receive_what_is_counted():
    assert on_eight_devices("attention").count("equal on") == 3


def test_an_axis_that_is_named_twice_is_told():
    with pytest.raises(InputError, match="^mesh 'data=2,data=4': data is there twice$"):
        mesh_lib.parse_sizes("data=2,data=4")


@pytest.mark.parametrize("words", ["data", "rows=2", "data=x", ""])
def test_words_that_are_no_mesh_are_refused(words):
    with pytest.raises(InputError, match="is none of data=N, fsdp=N, context=N, tensor=N"):
        mesh_lib.parse_mesh(words)


def test_one_device_is_the_identity():
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(mesh_lib.AXES, 1)
    x = jnp.ones((2, 4, 8))
    assert mesh_lib.constrain(x, "batch", "tokens", None) is x  # without a mesh
    assert mesh_lib.shares("tokens") == 1
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: mesh_lib.per_device(jnp.sin, (("batch", "tokens", None),), x))(x)
    assert y.shape == x.shape and (y == jnp.sin(x)).all()


@pytest.mark.parametrize("sizes", [dict(data=2), dict(tensor=3), dict(data=0), dict(fsdp=-1), dict(context=0)])
def test_sizes_that_do_not_multiply_are_refused(sizes):
    with pytest.raises(InputError, match="does not multiply to the 1 devices"):
        mesh_lib.make_mesh(**sizes, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "words,would",
    [
        ("data=2,fsdp=2", "context=2 or tensor=2 would"),
        ("data=8,fsdp=2", "data=4 or fsdp=1 would"),
        ("data=3", "data=8 would"),
        ("fsdp=16", "fsdp=8 would"),
        ("context=3,tensor=5", "sizes that can be: 1, 2, 4, 8"),
    ],
)
def test_what_would_make_a_mesh_is_said(words, would):
    with pytest.raises(InputError, match=f"does not multiply to the 8 devices; .*{would}"):
        mesh_lib.check_mesh(mesh_lib.parse_sizes(words), 8)


@pytest.mark.parametrize(
    "names,message",
    [
        (("widht", None), "'widht' is not in the table of the mesh; there are batch, tokens"),
        (("rows", "heads"), "rows and heads of one array would both be split along tensor"),
    ],
)
def test_names_that_have_no_place_are_refused(names, message):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    boxed = nn.LogicallyPartitioned(jnp.zeros((4, 4)), names)
    with pytest.raises(InputError, match=message):
        mesh_lib.shardings({"kernel": boxed}, mesh)
    with jax.set_mesh(mesh), pytest.raises(InputError, match=message):
        mesh_lib.constrain(jnp.zeros((4, 3)), *names)  # also where it would not be split


@pytest.mark.parametrize("module,inputs", [(m, x) for m, *x in (DIT, TEXT, CODEC)], ids=["dit", "text", "codec"])
def test_every_parameter_names_its_axes(module, inputs):
    boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    known = set(mesh_lib.RULES) | {None}
    boxes = jax.tree.leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert boxes
    for path, box in boxes:
        name = jax.tree_util.keystr(path)
        assert isinstance(box, nn.LogicallyPartitioned), f"{name} carries no names"
        assert len(box.names) == len(box.value.shape), f"{name} has {box.names} for {box.value.shape}"
        assert set(box.names) <= known, f"{name} has {box.names}"
    used = {name for _, box in boxes for name in box.names} - {None, "layers"}
    assert used, "no parameter is ever split"
