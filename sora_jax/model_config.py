"""What a model is: the configs of its parts, its sampling, and the names, shapes and precision of its parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh

from sora_jax import media
from sora_jax.codec import Codec, CodecConfig
from sora_jax.dit import DiT, DiTConfig
from sora_jax.mesh import check_heads, placed
from sora_jax.sampler import SCHEDULES, SOLVERS
from sora_jax.tensors import fits_float32
from sora_jax.text import T5Encoder, TextConfig
from sora_jax.vision import VisionConfig, VisionEncoder


@dataclass(frozen=True)
class SamplingConfig:
    """What `generate` does unless told otherwise.

    Attributes:
        steps: steps of the solver, >= 1.
        guidance: strength of classifier-free guidance, finite; up to 1 there is none.
        shift: time shift of the noise levels, > 0; larger spends more steps at high noise.
        solver, schedule: of `sora_jax.sampler`.
        guidance_low: the guidance of the transformer for low noise levels, where there is one; None is `guidance`.
        frames: frames per video.
        size: (height, width) in pixels.
        fps: frames per second, 0.001 to 1000.

    Raises:
        ValueError: a number out of range, or no such solver or schedule.
    """

    steps: int = 30
    guidance: float = 4.0
    shift: float = 3.0
    solver: str = "unipc"
    frames: int = 33
    size: tuple[int, int] = (128, 128)
    fps: float = 8.0
    schedule: str = "linear"
    guidance_low: float | None = None

    @property
    def is_guided(self) -> bool:
        """Whether there is guidance: none up to 1, as published pipelines have it, for both transformers."""
        return self.guidance > 1

    def __post_init__(self) -> None:
        for name, least in (("steps", self.steps), ("frames", self.frames), ("size", min(self.size))):
            if least < 1:
                raise ValueError(f"{name} must be at least 1, not {least}")
        for name in ("guidance", "guidance_low", "shift", "fps"):
            if not fits_float32(getattr(self, name) or 0.0):
                raise ValueError(f"{name} must be a finite number, not {getattr(self, name)}")
        if self.shift <= 0:
            raise ValueError(f"shift must be above 0, not {self.shift}")
        media.check_fps(self.fps)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} does not exist; there are {', '.join(SOLVERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} does not exist; there are {', '.join(SCHEDULES)}")


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its parameters.

    Attributes:
        text, codec, dit: configs of the three parts.
        sampling: defaults of `generate`.
        vocabulary: lower-case words the model was trained on; empty if it is not limited to a list.
        description: one line on what the model can show.
        dtype: precision of the parameters in the folder; "bfloat16" is that of the large products (`memory_dtype`).
        boundary: the noise level from which on upwards "dit" is used and below which "dit_low", a second transformer
            of the same sizes (Wan 2.2 A14B); None if there is one for all levels.
        known_frames: whether the transformer has learned that frames at level 0 are given.
        vision: the image encoder, for transformers that attend to an image.
    """

    text: TextConfig
    codec: CodecConfig
    dit: DiTConfig
    sampling: SamplingConfig = SamplingConfig()
    vocabulary: tuple[str, ...] = ()
    description: str = ""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    boundary: float | None = None
    known_frames: bool = False
    vision: VisionConfig | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that have parameters."""
        return ("text", "codec", *self.transformers, *(("vision",) if self.vision else ()))

    @property
    def transformers(self) -> tuple[str, ...]:
        """Those of the parts that denoise: one for all noise levels, or one for high and one for low ones."""
        return ("dit",) if self.boundary is None else ("dit", "dit_low")

    def tokens(self, frames: int, size: tuple[int, int]) -> int:
        """How many tokens the transformer has for a video, or, with one frame, for each latent frame of it."""
        F, Y, X, _ = self.codec.latent_shape(frames, *size)
        return F * Y * X // math.prod(self.dit.patch)

    def __post_init__(self) -> None:
        for part, here, there in (
            ("text", self.dit.text_width, self.text.width),
            ("codec", self.dit.latent_channels, self.codec.latent_channels),
        ):
            if here != there:
                raise ValueError(f"dit expects {here} channels from {part}, which has {there}")
        if self.dit.image_width != (self.vision.width if self.vision else 0):
            raise ValueError(f"dit expects {self.dit.image_width} channels from vision, which has another width")
        if self.dit.image_positions not in (0, 2 * self.vision.tokens if self.vision else 0):
            raise ValueError(f"dit has {self.dit.image_positions} positions for what vision sees of two images")
        if self.dit.condition_channels not in (0, self.codec.stride_time + self.codec.latent_channels):
            raise ValueError("the condition of dit is a mask of stride_time channels, and latents")
        if self.boundary is not None and not 0 <= self.boundary <= 1:
            raise ValueError(f"boundary must be a noise level, from 0 to 1, not {self.boundary}")


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> dict[str, Any]:
    """Names and shapes of all parameters: {"text": ..., "codec": ..., "dit": ...} of ShapeDtypeStruct.

    With a mesh they say where each parameter belongs.

    Raises:
        InputError: the mesh cannot divide a parameter.
    """
    boxed = _boxed_params(config)
    if mesh is None:
        return meta.unbox(boxed)
    check_heads(config.dit.heads, mesh.shape)
    return placed(boxed, mesh)


@cache  # tracing takes seconds
def _boxed_params(config: ModelConfig) -> dict[str, Any]:
    codec = config.codec
    frames, side = 1 + codec.stride_time, codec.stride_space * max(config.dit.patch)
    ids_BL = jnp.zeros((1, config.text.length), jnp.int32)
    latent_shape = codec.latent_shape(frames, side, side)
    condition = jnp.zeros((1, *latent_shape[:3], config.dit.condition_channels))
    image_tokens = config.dit.image_positions or 1
    inputs = {
        "text": (T5Encoder(config.text), ids_BL),
        "codec": (Codec(codec), jnp.zeros((1, frames, side, side, 3))),
        "dit": (
            DiT(config.dit),
            jnp.zeros((1, *latent_shape)),
            jnp.zeros((1, 2)),
            jnp.zeros((*ids_BL.shape, config.text.width)),
            condition,
            jnp.zeros((1, image_tokens, config.dit.image_width)),
        ),
    }
    if config.vision is not None:
        side = config.vision.image_size
        inputs["vision"] = (VisionEncoder(config.vision), jnp.zeros((1, side, side, 3)))

    if config.boundary is not None:
        inputs["dit_low"] = inputs["dit"]

    def init(key: jax.Array) -> dict[str, Any]:
        return {part: module.init(key, *x)["params"] for part, (module, *x) in inputs.items()}

    return jax.eval_shape(init, jax.random.key(0))


def memory_dtype(part: str, name: str, dtype: str) -> np.dtype:
    """The precision in which a parameter is held for computing in `dtype`.

    That of the large products of text encoder and transformer; norms, modulation, the noise level and the codec stay
    float32, as the published pipelines have it.
    """
    large = name.endswith("embedding") or (name.startswith(("blocks.", "text_")) and name.endswith("kernel"))
    return jnp.dtype(dtype if large and part in ("text", "dit", "dit_low") else "float32")
