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

EIGHT_DEVICES = """
import jax, numpy as np, flax.linen as nn
from flax.core import meta
from sora_jax import mesh as mesh_lib
from sora_jax.dit import DiT, DiTConfig

assert jax.device_count() == 8
model = DiT(DiTConfig(4, heads=4, head_width=8, feed_forward=32, layers=2, text_width=8, frequency_width=16))
random = np.random.default_rng(0)
inputs = [random.normal(size=shape).astype(np.float32) for shape in [(8, 2, 4, 4, 4), (8, 2), (8, 4, 8)]]
inputs[1] = 1 / (1 + np.exp(-inputs[1]))
boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
params = jax.tree.map(lambda p: 0.3 * random.normal(size=p.shape).astype(np.float32), meta.unbox(boxed))


def loss(params, inputs):
    velocity = model.apply({"params": params}, *inputs)
    return jax.numpy.mean(velocity**2), velocity


step = jax.value_and_grad(loss, has_aux=True)
(_, expected), expected_gradients = jax.jit(step)(params, inputs)
MESHES = [dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, context=4)]
SHARDS = [dict(width=2, heads=2), dict(width=2)]  # how often an axis is split
for axes, shards in zip(MESHES, SHARDS, strict=True):
    mesh = mesh_lib.make_mesh(**axes)
    assert mesh.shape["data"] * axes.get("fsdp", 1) * axes.get("context", 1) * axes.get("tensor", 1) == 8
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, mesh_lib.shardings(boxed, mesh))
        for name, rows, columns in [("query", "width", "heads"), ("out", "heads", "width")]:
            kernel = placed["blocks"]["self_attention"][name]["kernel"]
            layers, height, breadth = kernel.sharding.shard_shape(kernel.shape)
            whole = kernel.shape
            assert (layers, height, breadth) == (
                whole[0], whole[1] // shards.get(rows, 1), whole[2] // shards.get(columns, 1)
            ), (axes, name, kernel.sharding)
        batch = jax.device_put(inputs, mesh_lib.batch_sharding(mesh))
        assert batch[0].sharding.shard_shape(batch[0].shape)[0] == 8 // (mesh.shape["data"] * mesh.shape["fsdp"])
        (_, velocity), gradients = jax.jit(step)(placed, batch)
    np.testing.assert_allclose(velocity, expected, rtol=1e-4, atol=1e-4)
    for (path, a), b in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected_gradients), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, atol=2e-5 * scale, rtol=1e-4, err_msg=f"{axes} {jax.tree_util.keystr(path)}")
    print("equal on", axes)
"""


def test_eight_devices_compute_what_one_does():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("equal on") == 2


def test_one_device_is_the_identity():
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(mesh_lib.AXES, 1)
    x = jnp.ones((2, 4, 8))
    assert mesh_lib.constrain(x, "batch", "tokens", None) is x  # without a mesh


@pytest.mark.parametrize("sizes", [dict(data=2), dict(tensor=3), dict(data=0), dict(fsdp=-1), dict(context=0)])
def test_sizes_that_do_not_multiply_are_refused(sizes):
    with pytest.raises(InputError, match="does not multiply to the 1 devices"):
        mesh_lib.make_mesh(**sizes, devices=jax.devices()[:1])


@pytest.mark.parametrize("module,inputs", [(m, x) for m, *x in (DIT, TEXT, CODEC)], ids=["dit", "text", "codec"])
def test_every_parameter_names_its_axes(module, inputs):
    boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    known = {name for name, _ in mesh_lib.RULES} | {None, "layers"}
    boxes = jax.tree.leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert boxes
    for path, box in boxes:
        name = jax.tree_util.keystr(path)
        assert isinstance(box, nn.LogicallyPartitioned), f"{name} carries no names"
        assert len(box.names) == len(box.value.shape), f"{name} has {box.names} for {box.value.shape}"
        assert set(box.names) <= known, f"{name} has {box.names}"
    used = {name for _, box in boxes for name in box.names} - {None, "layers"}
    assert used, "no parameter is ever split"
