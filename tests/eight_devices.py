"""Run by test_mesh.py in a process of its own, with eight devices: every mesh computes what one device does."""

import functools
import json
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import golden_pipelines
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.core import meta
from golden_pipelines import GOLDEN
from ml_collections import ConfigDict
from tiny import TINY_CODEC

from sora_jax import mesh as mesh_lib
from sora_jax import sampler
from sora_jax.attention import self_attention
from sora_jax.cli.config_file import load_config
from sora_jax.codec import Codec, CodecConfig
from sora_jax.codec.vae import piece
from sora_jax.counting import count_collectives
from sora_jax.dit import DiT, DiTConfig
from sora_jax.models import load
from sora_jax.pipeline import draw_noise
from sora_jax.text import T5Encoder, TextConfig
from sora_jax.training import loop
from sora_jax.training import state as state_lib

HEADS, HEAD_WIDTH, FRAME = 4, 16, 9
STEPS = 4
OPTIMIZER = ConfigDict(
    dict(name="adamw", learning_rate=3e-3, warmup=1, decay=0.25, b1=0.9, b2=0.98, weight_decay=0.01, clip=1.0)
)
# 9 tokens a frame never divide, so that some of the places are filled up.
MESHES = [
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=8),
    dict(data=2, context=4),  # Ulysses
    dict(context=8),  # rings of 2, groups of 4
    dict(fsdp=2, context=2, tensor=2),  # Ulysses among heads that are split already
    dict(context=4, tensor=2),  # rings of 2, groups of 2
    dict(context=2, tensor=4),  # a ring
]


def dit():
    model = DiT(DiTConfig(3, HEADS, HEAD_WIDTH, feed_forward=40, layers=2, text_width=8, frequency_width=16))
    random = np.random.default_rng(0)
    inputs = [random.normal(size=s).astype(np.float32) for s in [(8, 2, 6, 6, 3), (8, 2), (8, 4, 8)]]
    inputs[1] = 1 / (1 + np.exp(-inputs[1]))
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(lambda p: 0.2 * random.normal(size=p.shape).astype(np.float32), meta.unbox(boxed))

    def loss(params, inputs, key):
        velocity = model.apply({"params": params}, *inputs)
        return jnp.mean((velocity - jax.random.normal(key, velocity.shape)) ** 2), {}

    def denoise(params, seeds, text):
        noise = draw_noise(seeds, inputs[0].shape[1:])

        def velocity(x, level):
            return model.apply({"params": params}, x, level, jnp.concatenate([text, 0 * text]))

        return sampler.sample(sampler.guided(velocity, 3.0), noise, sampler.noise_schedule(3, 2.0))

    optimizer = state_lib.make_optimizer(OPTIMIZER, STEPS)

    def start():
        return state_lib.create(jax.tree.map(jnp.asarray, params), optimizer)

    def step_from(state):
        return state_lib.make_step(loss, optimizer, seed=0, ema_decay=0.9, state=state)

    def curve(state, batch, step):
        """Loss and norm of the gradient at each step, and the parameters after the last."""
        metrics = []
        for _ in range(STEPS):
            state, one = step(state, batch)
            metrics.append([one["loss"], one["gradient_norm"]])
        return np.array(metrics), jax.device_get(state.params)

    boxed_state = jax.eval_shape(lambda boxed: state_lib.create(boxed, optimizer), boxed)
    expected_curve, expected_params = curve(start(), inputs, step_from(start()))
    assert expected_curve[-1, 0] < 0.95 * expected_curve[0, 0]
    asked = np.uint32([0, 1, 7, 2**32 - 1]), inputs[2][:4]
    expected_video = jax.jit(denoise)(params, *asked)
    for axes in MESHES:
        mesh = mesh_lib.make_mesh(**{"data": 1, **axes})
        with jax.set_mesh(mesh):
            state = jax.device_put(start(), mesh_lib.shardings(boxed_state, mesh))
            batch = jax.device_put(inputs, mesh_lib.batch_sharding(mesh))
            for tree in (state.params, state.ema):
                check_placement(mesh, tree, batch)
            check_optimizer(mesh, state)
            compiled = step_from(state).lower(state, batch).compile()
            check_exchanges(mesh, compiled.as_text())
            check_gathers(mesh, compiled.as_text(), params)
            sampling = jax.jit(denoise).lower(state.params, *asked).compile()
            check_gathers(mesh, sampling.as_text(), params)
            video = sampling(state.params, *asked)
            ours, params_after = curve(state, batch, compiled)
        assert np.linalg.norm(video - expected_video) < 1e-4 * np.linalg.norm(expected_video), axes
        np.testing.assert_allclose(ours, expected_curve, rtol=1e-5, err_msg=str(axes))
        pairs = zip(jax.tree.leaves_with_path(params_after), jax.tree.leaves(expected_params), strict=True)
        for (path, ours), one in pairs:
            assert np.linalg.norm(ours - one) < 1e-3 * np.linalg.norm(one), (axes, jax.tree_util.keystr(path))
        print("equal on", axes, flush=True)


def check_placement(mesh, params, batch):
    """Parameters and batch are split as the table of rules says."""
    split = {"width": mesh.shape["fsdp"] * mesh.shape["context"], "heads": mesh.shape["tensor"]}
    for name, rows, columns in [("query", "width", "heads"), ("out", "heads", "width")]:
        kernel = params["blocks"]["self_attention"][name]["kernel"]
        layers, height, breadth = kernel.shape
        assert kernel.sharding.shard_shape(kernel.shape) == (layers, height // split[rows], breadth // split[columns])
    assert batch[0].sharding.shard_shape(batch[0].shape)[0] == 8 // (mesh.shape["data"] * mesh.shape["fsdp"])


def check_optimizer(mesh, state):
    """What an optimizer keeps for a kernel is split as the kernel is."""

    def kernels(tree):
        return sorted(
            (leaf.shape, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree) if leaf.ndim == 3
        )

    # Two averages of AdamW.
    assert kernels(state.optimizer) == sorted(2 * kernels(state.params)), dict(mesh.shape)


def check_exchanges(mesh, text):
    """Attention shares its tokens as it should. (In sampling, latents move to the halves of guidance besides.)"""
    context, heads = mesh.shape["context"], HEADS // mesh.shape["tensor"]
    found = {kind for kind in ("all-to-all", "collective-permute") if re.search(rf" {kind}(-start)?\(", text)}
    if np.gcd(context, heads) > 1:
        assert "all-to-all" in found, dict(mesh.shape)
    if context // np.gcd(context, heads) > 1:
        assert "collective-permute" in found, dict(mesh.shape)
    if context == 1:
        assert "all-to-all" not in found, dict(mesh.shape)


def check_gathers(mesh, text, params):
    """All-gathers yield parameters, of a layer or of all, and what comes in and goes out; no activations."""
    split = mesh.shape["tensor"]
    wholes = {
        tuple(n for n in shape if n > 1) for leaf in jax.tree.leaves(params) for shape in (leaf.shape, leaf.shape[1:])
    }
    gathers = re.findall(r"= (.*) all-gather(?:-start)?\(", text)
    shapes = {
        tuple(int(size) for size in shape.split(",") if size != "1")
        for shape in re.findall(r"\w+\[([\d,]+)\]", " ".join(gathers))
    }
    assert shapes & wholes, dict(mesh.shape)  # the parameters, at least
    for shape in shapes:
        is_parameter = any(
            len(shape) == len(whole)
            and all(n in (all_n, all_n // split) for n, all_n in zip(shape, whole, strict=True))
            for whole in wholes
        )
        # Those of 12 numbers are patches, those of 3 latents; two of every video are its frames' noise levels.
        is_small = shape[-1] in (12, 3) or shape in ((4, 2), (8, 2))
        assert is_parameter or is_small, (dict(mesh.shape), shape)


def rings_for_tpus():
    """The gradient of rings over tokens that fill up is lowered for TPUs, whose kernel then gives sums too."""
    mesh = mesh_lib.make_mesh(context=8)
    x = jax.ShapeDtypeStruct(
        (1, 4, 2, 8 * 1600, 128), "bfloat16", sharding=jax.NamedSharding(mesh, jax.P(None, None, None, "context"))
    )

    def total(q, k, v):
        return self_attention(q, k, v, tokens=8 * 1600 - 3).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text() and "collective_permute" in lowered.as_text()
    print("lowered", flush=True)


def attention():
    """Bytes that a device receives by all-to-all and by rings are those that the docstring of attention.py counts."""
    N, D = 2 * 16, 64
    for devices in (2, 4, 8):
        mesh = mesh_lib.make_mesh(context=devices, devices=jax.devices()[:devices])
        received = {}
        for heads in (8, 1):
            x = jnp.zeros((1, heads, 2, N // 2, D // heads))
            with jax.set_mesh(mesh):
                placed = [jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, None, None, "context")))] * 3
                compiled = jax.jit(self_attention).lower(*placed).compile()
            received[heads] = count_collectives(compiled.as_text(), chips=devices)
        share = N // devices * D * 4
        assert received[8] == {"all-to-all": 4 * share * (devices - 1) / devices}, received
        assert received[1] == {"collective-permute": 2 * share * (devices - 1)}, received
        print("equal on", devices, flush=True)


def codec():
    """Encoding, decoding, and both in pieces, with rows split: 12 latent rows, which not all meshes divide."""
    module = Codec(CodecConfig(4, 8, 8, (1, 2), (True,), blocks=1, patch=2))
    video = np.random.default_rng(0).uniform(-1, 1, size=(2, 5, 48, 16, 3)).astype(np.float32)
    boxed = jax.eval_shape(module.init, jax.random.key(0), video)["params"]
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda p: 0.2 * random.normal(size=p.shape).astype(np.float32), meta.unbox(boxed))

    def run(params, video):
        latents = module.apply({"params": params}, video, method="encode")
        first, state = piece(module, params, {}, latents[:, :1], True, "decode")
        rest, _ = piece(module, params, state, latents[:, 1:], False, "decode")
        return latents, module.apply({"params": params}, latents, method="decode"), jnp.concatenate([first, rest], 1)

    expected = jax.jit(run)(params, video)
    assert np.linalg.norm(expected[1] - expected[2]) < 1e-4 * np.linalg.norm(expected[1])
    for axes in (dict(context=8), dict(data=2, context=4), dict(context=2, tensor=4), dict(fsdp=8)):
        mesh = mesh_lib.make_mesh(**{"data": 1, **axes})
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, mesh_lib.shardings(boxed, mesh))
            compiled = jax.jit(run).lower(placed, video).compile()
            found = compiled(placed, video)
        for ours, one in zip(found, expected, strict=True):
            assert np.linalg.norm(ours - one) < 1e-4 * np.linalg.norm(one), axes
        rows = mesh.shape["context"] * mesh.shape["tensor"]
        if rows > 1:
            # Halos: no device works on all rows, whether or not there are as many for each.
            text = compiled.as_text()
            assert "collective-permute" in text
            shapes = re.findall(r"= f32\[([\d,]+)\]\S* convolution\(", text)
            assert shapes and not [shape for shape in shapes if shape.split(",")[1] in ("12", "24")], (axes, shapes)
        print("equal on", axes, flush=True)


def text():
    """The text encoder, which is never whole on one device: neither its parameters at rest nor, while it works, its
    embedding or more than one of its layers."""
    config = TextConfig(1000, 32, 4, 8, 48, layers=3, length=8)
    module = T5Encoder(config)
    ids = np.random.default_rng(0).integers(1, 1000, size=(2, 8)).astype(np.int32)
    boxed = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda p: 0.2 * random.normal(size=p.shape).astype(np.float32), meta.unbox(boxed))

    def encode(params, ids):
        return module.apply({"params": params}, ids)

    expected = jax.jit(encode)(params, ids)
    for axes in (dict(context=8), dict(fsdp=2, context=4), dict(context=2, tensor=4)):
        mesh = mesh_lib.make_mesh(**{"data": 1, **axes})
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, mesh_lib.shardings(boxed, mesh))
            compiled = jax.jit(encode).lower(placed, ids).compile()
            found = compiled(placed, ids)
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected), axes
        shares, columns = mesh.shape["fsdp"] * mesh.shape["context"], mesh.shape["tensor"]
        embedding, up = placed["embedding"], placed["blocks"]["up"]["kernel"]
        assert embedding.sharding.shard_shape(embedding.shape) == (1000, 32 // shares)
        assert up.sharding.shard_shape(up.shape) == (3, 32 // shares, 48 // columns)
        gathers = re.findall(r"= (.*) all-gather(?:-start)?\(", compiled.as_text())
        shapes = re.findall(r"\w+\[([\d,]+)\]", " ".join(gathers))
        assert shapes, axes  # of one layer
        largest = max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)
        assert largest <= 32 * 48, (axes, shapes)
        print("equal on", axes, flush=True)


def generate():
    """The bundled model: the same seed gives the same video on any mesh."""
    alone = load()
    sampling = alone.config.sampling
    shape = alone.config.codec.latent_shape(sampling.frames, *sampling.size)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def run(generator, **options):
        return generator.generate("a red ball rolls behind a gray wall", steps=2, progress=False, **options).frames

    expected, of_noise = run(alone, seed=3), run(alone, noise=noise)
    for words in ("context=8", "data=2,context=2,tensor=2"):
        mesh = mesh_lib.parse_mesh(words)
        generator = load(mesh=mesh)
        for leaf in jax.tree.leaves(generator.params):
            assert leaf.sharding.mesh == mesh
        up = generator.params["dit"]["blocks"]["up"]["kernel"]
        shares = 8 // mesh.shape["data"]
        assert up.size == shares * math.prod(up.sharding.shard_shape(up.shape))
        for ours, one in ((run(generator, seed=3), expected), (run(generator, noise=noise), of_noise)):
            # Rounding to 8 bits may fall to either side.
            assert np.abs(ours.astype(int) - one).max() <= 1
        print("equal on", words, flush=True)


def train_codec():
    """The codec's own training, whose clips the data axes share and whose rows `context` does: the losses of one."""
    folder, make_mesh, losses = Path(tempfile.mkdtemp()), mesh_lib.make_mesh, {}
    overrides = [
        *TINY_CODEC,
        "--config.batch=4",
        "--config.steps=4",
        "--config.log_every=1",
        "--config.optimizer.warmup=1",
    ]
    for words in ("one device", "data=4,context=2", "fsdp=2,context=2,tensor=2"):
        alone = words == "one device"
        mesh_lib.make_mesh = functools.partial(make_mesh, devices=jax.devices()[:1]) if alone else make_mesh
        config = load_config("configs/worlds_codec.py", overrides)
        loop.train(config, folder / words, None if alone else words)
        lines = (folder / words / "metrics.jsonl").read_text().splitlines()
        losses[words] = [json.loads(line)["loss"] for line in lines if "loss" in line]
        assert len(losses[words]) == 4 and losses[words][0] != losses[words][3]
        np.testing.assert_allclose(losses[words], losses["one device"], rtol=1e-5)
        print("equal on", words, flush=True)
    shutil.rmtree(folder)


def wan():
    """Every kind of Wan's pipelines gives, split along `context` and more, the frames of the public one."""
    meshes = {
        "t2v": "context=8",
        "ti2v": "data=4,context=2",
        "a14b": "fsdp=4,context=2",
        "i2v": "data=2,context=4",
        "flf": "data=2,fsdp=2,context=2",
        "i2v-a14b": "fsdp=2,context=4",
    }
    assert meshes.keys() == set(golden_pipelines.KINDS)
    for kind, words in meshes.items():
        expected = golden_pipelines.expected(kind)
        given, frames = golden_pipelines.options(kind, expected), expected["frames"]
        if kind == "ti2v":  # with a picture there is more to split
            given, frames = {"image": expected["image"]}, expected["frames_from_image"]
        found = split(GOLDEN / kind, words, expected["noise"], given)
        assert np.abs(found - 255 * frames).max() < 1, words  # one of the two levels beside each value
        print("equal on", words, flush=True)
    for kind, words in (("ti2v", "context=4,tensor=2"), ("i2v", "fsdp=2,context=2,tensor=2")):
        expected = golden_pipelines.expected(kind)
        given = {"image": expected["image"]}
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(GOLDEN / kind, folder, dirs_exist_ok=True)
            leave_two_heads(Path(folder) / "text_encoder")
            one = golden_pipelines.run(load(folder), expected["noise"], **given)
            found = split(folder, words, expected["noise"], given)
        assert np.abs(found - one.astype(int)).max() <= 1, words
        print("equal on", words, flush=True)


def split(folder, words, noise, given):
    """The frames of a golden pipeline on a mesh among whose devices its transformer is split."""
    mesh = mesh_lib.parse_mesh(words)
    generator = load(folder, mesh=mesh)
    up = generator.params["dit"]["blocks"]["up"]["kernel"]
    shares = mesh.size // mesh.shape["data"]
    assert up.size == shares * math.prod(up.sharding.shard_shape(up.shape))
    return golden_pipelines.run(generator, noise, **given)


def leave_two_heads(folder):
    """Takes from a published text encoder all heads but two: `tensor` divides no three."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_heads": 2}))
    width, path = 2 * config["d_kv"], folder / "model.safetensors"
    kept = {**dict.fromkeys("qkv", np.s_[:width]), "o": np.s_[:, :width], "relative_attention_bias": np.s_[:, :2]}
    tensors = {
        name: np.ascontiguousarray(tensor[kept.get(name.split(".")[-2], ...)])
        for name, tensor in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(tensors, path)


if __name__ == "__main__":
    assert jax.device_count() == 8
    globals()[sys.argv[1]]()
