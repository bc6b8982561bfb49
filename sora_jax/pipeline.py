"""What happens on the device between a prompt's ids and the frames: pure functions of a config and parameters.

    ids -> encode_text -> denoise (noise -> latents) -> decode -> frames

They are compiled for a mesh when called under one (`jax.set_mesh`), and can be compiled without any device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sora_jax import sampler
from sora_jax.codec import Codec
from sora_jax.codec import vae as codec_lib
from sora_jax.dit import DiT
from sora_jax.mesh import RULES, constrain
from sora_jax.model_config import ModelConfig
from sora_jax.text import T5Encoder
from sora_jax.vision import VisionEncoder

_MANY = 8192  # tokens that keep a device busy
_PIXELS_PER_BATCH = 4 * 33 * 128 * 128  # a batch of default videos that fits in about 2 GB


class Given(NamedTuple):
    """What known frames give the transformer; each part is None where the model or the request has none.

    Attributes:
        latents_BFYXZ, known_BF: latent frames that stay as they are, and which those are.
        condition_BFYXC: channels beside the latents.
        image_BLD: features of the images.
            B is that of the noise, or 1: the same for all videos.
    """

    latents_BFYXZ: jax.Array | None = None
    known_BF: jax.Array | None = None
    condition_BFYXC: jax.Array | None = None
    image_BLD: jax.Array | None = None


def encode_text(config: ModelConfig, dtype: Any, params: Any, ids_BL: jax.Array) -> jax.Array:
    """Token ids to features (B, L, D) float32."""
    return T5Encoder(config.text, dtype).apply({"params": params}, ids_BL)


def see(config: ModelConfig, params: Any, image_BHWC: jax.Array) -> jax.Array:
    """Preprocessed pictures to features (B, L, D), all in float32 as published pipelines do it."""
    return VisionEncoder(config.vision).apply({"params": params}, image_BHWC)


def at_a_time(videos: int, pixels: int, is_guided: bool, sizes: Mapping[str, int]) -> int:
    """How many of so many videos are sampled at a time: few enough for the memory, as many as keep a mesh busy.

    Each copy of the model gets one video, or one of the two branches of guidance, so that a guided video fills two
    copies. Fewer videos are filled up with repeats, since all copies work anyway.

    Args:
        pixels: of a video, or of the window of it that is sampled.
        sizes: of the axes of the mesh, or nothing.
    """
    copies = math.prod(sizes.get(axis, 1) for axis in RULES["batch"])
    least = copies // 2 if is_guided and copies % 2 == 0 else copies
    return max(1, min(-(-videos // least), _PIXELS_PER_BATCH // pixels)) * least


def draw_noise(seeds_B: jax.Array, shape: tuple[int, ...], window: int | jax.Array | None = None) -> jax.Array:
    """Noise (B, *shape) float32, of each seed alone, whatever else is in the batch and on whatever mesh.

    Args:
        window: the number of a window after the first one, which draws noise of its own.
    """

    def draw(seed):
        key = jax.random.key(seed)
        return jax.random.normal(key if window is None else jax.random.fold_in(key, window), shape)

    noise = jax.vmap(draw)(seeds_B)
    return constrain(noise, "batch", *[None] * len(shape))


def denoise(
    config: ModelConfig,
    dtype: Any,
    dits: Sequence[Any],
    noise_BFYXZ: jax.Array,
    text_BLD: jax.Array,
    schedule: sampler.Schedule,
    guidance_2: jax.Array,
    given: Given | None = None,
    *,
    is_guided: bool = True,
    kernel: str = "auto",
    progress: Callable[[Any], None] | None = None,
) -> jax.Array:
    """Latents (B, F, Y, X, Z) float32 from noise, in one scan over the steps.

    Args:
        dits: the parameters of the transformer, or of the two for high and low noise levels.
        text_BLD: features of the prompts, and with `is_guided` after them those of the negative prompts.
        guidance_2: the strength of guidance at high and at low noise levels.
        kernel: of attention (see `attention.py`).
        progress: as `sampler.sample` has it.
    """

    given = given or Given()

    def repeat(x, batch):
        # Both halves of a guided batch are of the same videos.
        return None if x is None else jnp.tile(x, (batch // len(x), *[1] * (x.ndim - 1)))

    def with_dit(params, guidance):
        def velocity(x_BFYXZ, level_BF, text_BLD=text_BLD):
            condition, image = (repeat(x, len(x_BFYXZ)) for x in (given.condition_BFYXC, given.image_BLD))
            return DiT(config.dit, dtype, kernel).apply(
                {"params": params}, x_BFYXZ, level_BF, text_BLD, condition, image
            )

        if not is_guided:
            return velocity
        if _in_turn(config, noise_BFYXZ.shape):
            return sampler.guided_in_turn(velocity, text_BLD.reshape(2, -1, *text_BLD.shape[1:]), guidance)
        return sampler.guided(velocity, guidance)

    velocity = with_dit(dits[0], guidance_2[0])
    if config.boundary is not None:
        low = with_dit(dits[1], guidance_2[1])
        boundary, high = config.boundary - 1e-6, velocity  # float32 may round a level down

        def velocity(x_BFYXZ, level_BF):
            return jax.lax.cond(jnp.max(level_BF) >= boundary, high, low, x_BFYXZ, level_BF)

    known = None
    if given.known_BF is not None:
        known = tuple(repeat(x, len(noise_BFYXZ)) for x in (given.latents_BFYXZ, given.known_BF))
    return sampler.sample(velocity, noise_BFYXZ, schedule, config.sampling.solver, known, progress=progress)


def _in_turn(config: ModelConfig, shape: tuple[int, ...]) -> bool:
    """Whether the two branches of guidance are computed one after the other, which takes half the memory.

    One device that the first branch keeps busy gains nothing from both in a batch. Several devices would gather the
    parameters that are sharded among them twice.
    """
    B, F, Y, X, _ = shape
    mesh = jax.sharding.get_abstract_mesh()
    return B * F * Y * X // math.prod(config.dit.patch) >= _MANY and (mesh.empty or mesh.size == 1)


def codec_options(platform: str) -> dict[str, float | bool] | None:
    """Compiler options for `encode` and `decode`.

    By default the TPU's compiler takes minutes over their convolutions, seven times as long as with half of that effort
    less. What it makes then should run a quarter longer; next to all steps of the sampler that is hardly anything.

    The CPU's by default copies the state where it could stay: decoding 256x256 with Wan 2.1 takes 0.62 GiB of memory
    beside parameters and state without these copies, and 0.84 with them.
    """
    return {
        "tpu": {"exec_time_optimization_effort": -0.5},
        "cpu": {"xla_cpu_copy_insertion_use_region_analysis": True},
    }.get(platform)


def decode(config: ModelConfig, params: Any, state: dict, latents_BFYXZ: jax.Array, first: bool):
    """The next latent frames of a video to frames, (B, T, H, W, 3) uint8, and the state for those after them."""
    codec = Codec(config.codec)
    video_BTHWC, state = codec_lib.piece(codec, params, state, latents_BFYXZ, first, "decode")
    return jnp.round((video_BTHWC + 1) * 127.5).astype(jnp.uint8), state


def encode(config: ModelConfig, params: Any, state: dict, video_BTHWC: jax.Array, first: bool):
    """The next frames of a video, in [-1, 1], to latents, and the state for those after them."""
    return codec_lib.piece(Codec(config.codec), params, state, video_BTHWC, first, "encode")
