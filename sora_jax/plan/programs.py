"""The programs that `generate` and `train` run, with abstract arguments in their places: nothing is computed."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sora_jax import flow, pipeline, sampler
from sora_jax import mesh as mesh_lib
from sora_jax.dit import DiT
from sora_jax.errors import InputError
from sora_jax.model_config import ModelConfig, abstract_params, memory_dtype
from sora_jax.plan.job import Job, at_a_time, model_config
from sora_jax.training import state as state_lib

_STEPS = 2  # of the scan that is compiled; what a step costs does not depend on their number


def steps(job: Job) -> int:
    """Steps of the scan that is compiled."""
    return _STEPS if job.part == "denoise" else 1


def spared(job: Job) -> int:
    """Operations of the traced program that a TPU does not do.

    Attention as it is written for all platforms keeps less of what its backward pass needs than the TPU's kernel, and
    multiplies the probabilities with the values once more there.
    """
    if job.part != "train":
        return 0
    config = model_config(job.model)
    tokens = config.tokens(job.frames, job.size)
    return config.dit.layers * 2 * job.batch * tokens**2 * config.dit.heads * config.dit.head_width


def at_rest(job: Job, mesh: jax.sharding.Mesh) -> int:
    """Bytes on a chip of the parameters of all parts but the job's own."""
    config = model_config(job.model)
    own = {"text": ("text",), "see": ("vision",), "denoise": config.transformers}.get(job.part, ("codec",))
    others = [part for part in config.parts if part not in own]
    return sum(bytes_here(leaf) for part in others for leaf in jax.tree.leaves(_held(config, part, mesh, job.dtype)))


def _held(config: ModelConfig, part: str, mesh: jax.sharding.Mesh, dtype: str) -> Any:
    """The abstract parameters of a part as they are in memory."""

    def in_memory(path, leaf):
        kind = memory_dtype(part, jax.tree_util.keystr(path, simple=True, separator="."), dtype)
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=leaf.sharding)

    return jax.tree.map_with_path(in_memory, abstract_params(config, mesh)[part])


def bytes_here(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def program(job: Job, mesh: jax.sharding.Mesh):
    """The function of a part, its abstract arguments with their places, parameters first, and which are donated."""
    config = model_config(job.model)
    dtype = jnp.dtype(job.dtype)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def held(part):
        return _held(config, part, mesh, job.dtype)

    def array(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    F, Y, X, Z = config.codec.latent_shape(job.frames, *job.size)
    if job.part == "train":
        return _training(config, dtype, mesh, job.batch, (F, Y, X, Z), "offload" if job.offload else "full")
    guided = config.sampling.is_guided
    batch = at_a_time(job)
    texts = batch * (2 if guided else 1)
    if job.part == "text":

        def planned(params, ids_BL):
            return pipeline.encode_text(config, dtype, params, ids_BL)

        return planned, (held("text"), array((texts, config.text.length), jnp.int32)), ()
    if job.part == "see":

        def planned(params, image_BHWC):
            return pipeline.see(config, params, image_BHWC)

        pictures, side = 2 if config.dit.image_positions else 1, config.vision.image_size
        return planned, (held("vision"), array((pictures, side, side, 3))), ()
    if job.part in ("encode", "decode"):
        # As `generate` does it with all but small videos: the first frame, then one latent frame after the other with
        # what went before.
        code = {"encode": pipeline.encode, "decode": pipeline.decode}[job.part]
        latents, T = (1, 1, Y, X, Z), config.codec.stride_time
        start, piece = (latents, latents) if job.part == "decode" else ((1, n, *job.size, 3) for n in (1, T))

        def planned(params, state, piece):
            return code(config, params, state, piece, False)

        codec = held("codec")  # under a mesh of devices that are not there, nothing can be computed
        with jax.set_mesh(mesh):
            _, state = jax.eval_shape(partial(code, config, first=True), codec, {}, array(start))
            state = jax.tree.map(lambda leaf: _by_rows(leaf, mesh), state)
        return planned, (codec, state, array(piece)), 1

    dits = [held(part) for part in config.transformers]
    schedule = sampler.Schedule(array((_STEPS + 1,)), array((_STEPS,)))
    # The first picture is that of all videos; later windows go on from frames of each.
    told = 1 if job.windows == 1 else batch
    channels = config.dit.condition_channels
    goes_on = job.windows > 1 and not channels
    given = pipeline.Given(
        latents_BFYXZ=array((told, F, Y, X, Z)) if goes_on else None,
        known_BF=array((told, F), bool) if goes_on else None,
        condition_BFYXC=array((told, F, Y, X, channels)) if channels else None,
        image_BLD=array((1, config.dit.image_positions or config.vision.tokens, config.vision.width))
        if config.vision
        else None,
    )

    def planned(dits, noise_BFYXZ, text_BLD, schedule, guidance_2, given):
        return pipeline.denoise(
            config, dtype, dits, noise_BFYXZ, text_BLD, schedule, guidance_2, given, is_guided=guided
        )

    text = array((texts, config.text.length, config.text.width))
    return planned, (dits, array((batch, F, Y, X, Z)), text, schedule, array((2,)), given), 1


def _training(config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh, batch: int, shape: tuple[int, ...], remat: str):
    """A step of training the transformer on latents and text features: AdamW, float32 parameters and averages.

    Raises:
        InputError: it is told of pictures too, or the mesh does not divide its heads.
    """
    if config.dit.condition_channels:
        raise InputError("training is planned for transformers that read text alone; this model's reads pictures too")
    mesh_lib.check_heads(config.dit.heads, mesh.shape)
    model = DiT(dataclasses.replace(config.dit, remat=remat), dtype)
    x0_BFYXZ, text_BLD = jnp.zeros((1, *shape)), jnp.zeros((1, config.text.length, config.text.width))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))

    def create():
        level_BF = jnp.zeros((1, shape[0]))
        return state_lib.create(model.init(jax.random.key(0), x0_BFYXZ, level_BF, text_BLD)["params"], optimizer)

    state = mesh_lib.placed(jax.eval_shape(create), mesh)

    def loss(params, batch, key):
        x0_BFYXZ, text_BLD = batch
        drawn = flow.noised(key, x0_BFYXZ, flow.Levels(shift=3.0), known_share=0.2)
        velocity_BFYXZ = model.apply({"params": params}, drawn.x_BFYXZ, drawn.level_BF, text_BLD)
        return flow.velocity_loss(velocity_BFYXZ, x0_BFYXZ, drawn.noise_BFYXZ, drawn.known_BF), {}

    place = mesh_lib.batch_sharding(mesh)
    clips = tuple(
        jax.ShapeDtypeStruct((batch, *x.shape[1:]), jnp.float32, sharding=place) for x in (x0_BFYXZ, text_BLD)
    )
    step = state_lib.make_step(loss, optimizer, seed=0, ema_decay=0.999, state=state)

    def planned(state, clips):
        return step(state, clips)

    return planned, (state, clips), 0


def _by_rows(leaf, mesh):
    with jax.set_mesh(mesh):
        spec = mesh_lib.spec(leaf.shape, ("batch", None, "rows", None, None))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
