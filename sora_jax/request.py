"""What is asked of a model, checked before any work: arguments in, a complete `Request` out.

There is no request that was not checked: prompts go through the prompt gate and pictures through the frame scan when
a `Request` is made, whoever makes it.
"""

import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sora_jax import media
from sora_jax.errors import InputError, Refused
from sora_jax.model_config import ModelConfig
from sora_jax.safety.gate import check_prompts, check_texts, load_gate
from sora_jax.safety.policy import Policy, load_policy
from sora_jax.safety.provenance import Source
from sora_jax.safety.scan import scan
from sora_jax.tensors import fits_float32

_MOST_STEPS = 1_000_000  # a number mistyped is told before it fills the memory


@dataclass(frozen=True)
class Request:
    """What is to be made, complete and checked: one video per entry of `prompts` and `seeds`.

    `window` frames are sampled at a time, and each window but the first starts with the last `overlap` frames of the
    one before.

    Raises:
        Refused: the policy forbids a prompt or a picture.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    frames: int
    window: int
    overlap: int
    size: tuple[int, int]
    steps: int
    guidance: float
    guidance_low: float
    shift: float
    fps: float
    noise: np.ndarray | None = None
    image: np.ndarray | None = None
    last_image: np.ndarray | None = None
    ingredients: tuple[Source, ...] = ()  # the pictures, for the manifests of what is made of them
    policy: Policy = field(default_factory=load_policy)
    checks: Mapping[str, Any] = field(init=False)  # of all this, for the same manifests

    @property
    def windows(self) -> int:
        """How many windows the video takes; surplus frames of the last are cut off."""
        return windows(self.frames, self.window, self.overlap)

    @property
    def is_guided(self) -> bool:
        """As `SamplingConfig.is_guided`."""
        return self.guidance > 1

    def __post_init__(self) -> None:
        # What was checked stays what it is: nobody else holds a list or an array of it.
        object.__setattr__(self, "prompts", tuple(self.prompts))
        for name in ("image", "last_image"):
            if (picture := getattr(self, name)) is not None:
                picture = np.array(picture)
                picture.flags.writeable = False
                object.__setattr__(self, name, picture)
        check_texts([self.negative_prompt], "negative prompt")
        allowed = {"policy_sha256": self.policy.digest, "allowed": True}
        admit(self.prompts, self.policy)
        checks: dict[str, Any] = {"prompt": allowed}
        if self.negative_prompt and self.is_guided and self.guidance_low < 1:  # at low levels that leads towards it
            admit([self.negative_prompt], self.policy, "negative prompt")
            checks["negative_prompt"] = allowed
        for name, picture in (("image", self.image), ("last_image", self.last_image)):
            if picture is not None:
                found = scan(picture[None])
                if not found.passed:
                    raise Refused(f"the frame scan does not let {name} pass")
                checks[name] = [found.report]
        object.__setattr__(self, "checks", checks)


def admit(prompts: Sequence[str], policy: Policy, name: str = "prompt") -> None:
    """Raises Refused if the policy forbids one of the prompts, or InputError if one is no text."""
    check_texts(prompts, name)
    texts = list(dict.fromkeys(prompts))
    for text, verdict in zip(texts, load_gate(policy).check_many(texts), strict=True):
        if not verdict.allowed:
            number = f" {prompts.index(text) + 1}" if len(prompts) > 1 else ""
            which = f"{name}{number}: " if number or name != "prompt" else ""
            reason = f"{which}{verdict.reason} ({', '.join(verdict.categories)})"
            raise Refused(reason, verdict.categories, verdict.layer)


def make_request(
    config: ModelConfig,
    prompt: str | Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    frames: int | None = None,
    window: int | None = None,
    overlap: int | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_low: float | None = None,
    shift: float | None = None,
    negative_prompt: str | None = "",
    fps: float | None = None,
    noise: np.ndarray | None = None,
    image: str | os.PathLike | np.ndarray | media.Picture | None = None,
    last_image: str | os.PathLike | np.ndarray | media.Picture | None = None,
    policy: Policy | None = None,
) -> Request:
    """Checks the arguments of `Generator.generate` and fills in the model's defaults.

    Raises:
        InputError: an argument that cannot be.
        Refused: the policy, by default that of the package, forbids a prompt or a picture.
    """
    defaults = config.sampling
    prompts = [prompt] if isinstance(prompt, str) else _listed(prompt)
    seeds = _listed(seed)
    prompts = prompts * len(seeds) if len(prompts) == 1 else prompts
    seeds = seeds * len(prompts) if len(seeds) == 1 else seeds
    if not prompts or len(prompts) != len(seeds):
        raise InputError(f"{len(prompts)} prompts and {len(seeds)} seeds do not make pairs")
    check_prompts(prompts)
    if guidance_low is not None and config.boundary is None:
        raise InputError("--guidance-low (guidance_low) is for models with a second transformer; this one has none")
    if guidance_low is None:
        # Who asks for one guidance means it for all levels, as published pipelines have it.
        guidance_low = defaults.guidance_low if guidance is None else guidance
    guidance = _number("guidance", defaults.guidance if guidance is None else guidance)
    guidance_low = _number("guidance_low", guidance if guidance_low is None else guidance_low)
    shift = _number("shift", defaults.shift if shift is None else shift)
    if shift <= 0:
        raise InputError(f"shift must be above 0, not {shift}")
    frames = _whole("frames", defaults.frames if frames is None else frames)
    size = tuple(_whole("size", side) for side in _pair(defaults.size if size is None else size))
    check_shape(config, frames, size)
    window, overlap = check_window(config, frames, window, overlap)
    if window < frames and (noise is not None or last_image is not None):
        raise InputError("noise and a last image need all frames at once: leave out the window")
    fps = _number("fps", defaults.fps if fps is None else fps)
    media.check_fps(fps)
    if noise is not None:
        shape = (len(prompts), *config.codec.latent_shape(frames, *size))
        try:
            with np.errstate(over="ignore"):
                noise = np.asarray(noise, np.float32)
        except (TypeError, ValueError):
            raise InputError(f"noise must be numbers {list(shape)}, not {type(noise).__name__}") from None
        if noise.shape not in (shape, shape[1:]) or (noise.ndim == 4 and len(prompts) > 1):
            raise InputError(f"noise must be {list(shape)}, not {list(noise.shape)}")
        if not np.isfinite(noise).all():
            raise InputError("noise must be finite numbers")
        noise = noise.reshape(shape)
    return Request(
        prompts=tuple(prompts),
        seeds=tuple(_whole("seed", value, 0, 2**32 - 1) for value in seeds),
        negative_prompt="" if negative_prompt is None else negative_prompt,
        frames=frames,
        window=window,
        overlap=overlap,
        size=size,
        steps=_whole("steps", defaults.steps if steps is None else steps, 1, _MOST_STEPS),
        guidance=guidance,
        guidance_low=guidance_low,
        shift=shift,
        fps=fps,
        noise=noise,
        **_images(config, image, last_image, window),
        policy=policy or load_policy(),
    )


def check_shape(config: ModelConfig, frames: int, size: tuple[int, int]) -> None:
    """Raises InputError for numbers of frames, rows and columns that codec and transformer cannot fold."""
    check_multiple("frames", frames, config.codec.stride_time, 1)
    for name, side, patch in zip(("height", "width"), size, config.dit.patch[1:], strict=True):
        check_multiple(name, side, config.codec.stride_space * patch, 0)


def windows(frames: int, window: int, overlap: int) -> int:
    """How many windows make so many frames; surplus frames of the last are cut off."""
    return 1 - (window - frames) // (window - overlap)


def check_window(config: ModelConfig, frames: int, window: Any, overlap: Any) -> tuple[int, int]:
    """Frames that are sampled at a time, and how many of them are those of the window before.

    Raises:
        InputError: windows that cannot be, or a model that cannot go on from frames.
    """
    stride = config.codec.stride_time
    if window is None and overlap is not None:
        raise InputError("an overlap is that of windows: give the window too")
    window = frames if window is None else _whole("window", window)
    overlap = 1 if overlap is None else _whole("overlap", overlap)
    for name, value in (("window", window), ("overlap", overlap)):
        check_multiple(name, value, stride, 1)
    if window >= frames:
        return frames, 0  # one window, with none before it
    if overlap >= window:
        raise InputError(f"windows of {window} frames that overlap by {overlap} make no headway")
    if not (config.known_frames or config.dit.condition_channels) or config.dit.image_positions:
        raise InputError("this model cannot go on from the frames of another window: leave out the window")
    return window, overlap


def _images(config: ModelConfig, image: Any, last_image: Any, frames: int) -> dict[str, Any]:
    """The images as arrays, checked, and as files: those that they were read from, with all that these say."""
    dit = config.dit
    if (image is not None or last_image is not None) and not (config.known_frames or dit.condition_channels):
        raise InputError("this model makes videos from text alone: it takes no image")
    if image is None and dit.condition_channels:
        raise InputError("this model makes a video from an image: give --image FILE, or image= in Python")
    if last_image is not None and frames < 2 * config.codec.stride_time:
        raise InputError(f"{frames} frames are too few for {'a' if image is None else 'a first and a'} last image")
    if dit.image_positions and last_image is None:
        raise InputError("this model goes from a first to a last image: give --last-image FILE too")
    if dit.image_width and not dit.image_positions and last_image is not None:
        raise InputError("this model sees one image, with which the video starts: it takes no last image")
    arrays, ingredients = {}, []
    for name, picture in (("image", image), ("last_image", last_image)):
        source = None
        if isinstance(picture, str | os.PathLike):
            source = Source.read(picture, name)
            picture = media.decode_picture(source.data, picture)
        elif isinstance(picture, media.Picture):
            picture = media.from_pil(picture)
        elif picture is not None and not isinstance(picture, np.ndarray):
            raise InputError(f"{name} must be a file, an array or a picture of PIL, not {type(picture).__name__}")
        if picture is not None and (
            picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or 0 in picture.shape
        ):
            raise InputError(f"{name} must be uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
        arrays[name] = picture
        if picture is not None:
            ingredients.append(source or Source(f"{name}.png", media.png(picture)))
    return {**arrays, "ingredients": tuple(ingredients)}


def _listed(value: Any) -> list[Any]:
    """The entries of a list, or the one that is given in place of a list."""
    try:
        return list(value)
    except TypeError:
        return [value]


def _whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, not {value!r}") from None
    if (low is not None and number < low) or (high is not None and number > high):
        raise InputError(
            f"{name} must be {f'at least {low}' if high is None else f'from {low} to {high}'}, not {value}"
        )
    return number


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not fits_float32(number):
        raise InputError(f"{name} must be a finite number, not {value!r}")
    return number


def _pair(size: Any) -> tuple[Any, Any]:
    sides = _listed(size)
    if isinstance(size, str) or len(sides) != 2:
        raise InputError(f"size must be (height, width), not {size!r}")
    return tuple(sides)


def check_multiple(name: str, value: int, step: int, offset: int) -> None:
    """Raises InputError, naming the nearest values, unless value = offset + a positive multiple of step."""
    if value >= max(offset, 1) and value % step == offset % step:
        return
    near = max(value, 1)
    below = near - (near - offset) % step
    nearest = [str(n) for n in (below, below + step) if n > 0][: 1 if value < near else 2]
    rule = f"{offset} + a multiple of {step}" if offset else f"a multiple of {step}"
    are = f"nearest are {nearest[0]} and {nearest[1]}" if len(nearest) > 1 else f"nearest is {nearest[0]}"
    raise InputError(f"{name} must be {rule}; {value} is not, {are}")
