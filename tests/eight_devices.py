"""Run by test_mesh.py in a process of its own, with eight devices: every mesh computes what one device does."""

import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from sora_jax import mesh as mesh_lib
from sora_jax import sampler
from sora_jax.codec import Codec, CodecConfig
from sora_jax.codec.vae import piece
from sora_jax.dit import DiT, DiTConfig
from sora_jax.generate import load

HEADS, HEAD_WIDTH, FRAME = 4, 16, 9
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

    def loss(params, inputs):
        velocity = model.apply({"params": params}, *inputs)
        return jnp.mean(velocity**2), velocity

    def denoise(params, noise, text):
        def velocity(x, level):
            return model.apply({"params": params}, x, level, jnp.concatenate([text, 0 * text]))

        return sampler.sample(sampler.guided(velocity, 3.0), noise, sampler.noise_schedule(3, 2.0))

    step = jax.value_and_grad(loss, has_aux=True)
    (_, expected), expected_gradients = jax.jit(step)(params, inputs)
    expected_video = jax.jit(denoise)(params, inputs[0][:4], inputs[2][:4])
    for axes in MESHES:
        mesh = mesh_lib.make_mesh(**{"data": 1, **axes})
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, mesh_lib.shardings(boxed, mesh))
            batch = jax.device_put(inputs, mesh_lib.batch_sharding(mesh))
            check_placement(mesh, placed, batch)
            compiled = jax.jit(step).lower(placed, batch).compile()
            (_, velocity), gradients = compiled(placed, batch)
            check_collectives(mesh, compiled.as_text())
            video = jax.jit(denoise)(placed, inputs[0][:4], inputs[2][:4])
        for ours, one in ((velocity, expected), (video, expected_video)):
            assert np.linalg.norm(ours - one) < 1e-4 * np.linalg.norm(one), axes
        pairs = zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected_gradients), strict=True)
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


def check_collectives(mesh, text):
    """Attention shares its tokens as it should, and no all-gather yields the tokens of other devices."""
    context, heads = mesh.shape["context"], HEADS // mesh.shape["tensor"]
    found = {kind for kind in ("all-to-all", "collective-permute") if re.search(rf" {kind}(-start)?\(", text)}
    if np.gcd(context, heads) > 1:
        assert "all-to-all" in found, dict(mesh.shape)
    if context // np.gcd(context, heads) > 1:
        assert "collective-permute" in found, dict(mesh.shape)
    if context == 1:
        assert "all-to-all" not in found, dict(mesh.shape)
    whole = -(-FRAME // context) * context
    gathers = re.findall(r"= (.*) all-gather(?:-start)?\(", text)
    shapes = re.findall(r"\w+\[([\d,]+)\]", " ".join(gathers))
    assert shapes, dict(mesh.shape)  # the parameters, at least
    for shape in shapes:
        sizes = [int(size) for size in shape.split(",")]
        # Activations begin with the batch, of 4 or 8; those of 12 numbers are the patches that go out.
        if context > 1 and sizes[0] in (4, 8) and sizes[-1] != 12:
            assert not {whole, 2 * whole} & set(sizes), (dict(mesh.shape), shape)


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
            # Halos: no device works on all rows of the widest activations.
            text = compiled.as_text()
            assert "collective-permute" in text
            shapes = re.findall(r"= f32\[([\d,]+)\]\S* convolution\(", text)
            assert shapes and not [shape for shape in shapes if "24" in shape.split(",")], (axes, shapes)
        print("equal on", axes, flush=True)


def generate():
    """The bundled model: the same seed gives the same video on any mesh."""
    alone, noise = load(), np.random.default_rng(0).normal(size=(5, 8, 8, 32)).astype(np.float32)

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


if __name__ == "__main__":
    assert jax.device_count() == 8
    globals()[sys.argv[1]]()
