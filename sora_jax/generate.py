"""From a prompt to a video: check, read the prompt, draw noise, remove it step by step, decode."""

from __future__ import annotations

import math
import operator
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from sora_jax import sampler
from sora_jax.codec import Codec
from sora_jax.dit import DiT
from sora_jax.errors import InputError
from sora_jax.model_folder import ModelConfig, read_model_folder
from sora_jax.text import T5Encoder, tokenize
from sora_jax.video import Video, check_fps

BUNDLED = Path(__file__).parent / "bundled"
_PIXELS_PER_BATCH = 8 * 17 * 128 * 128  # a batch of default videos that fits in about 2 GB


def load(path: str | os.PathLike | None = None) -> Generator:
    """The generator of a model folder; without a path, of the model that comes with the package.

    Compiled programs are kept in the user's cache folder, unless JAX already has a compilation cache.

    Raises:
        InputError: if the folder is not a readable model.
    """
    _keep_compiled_programs()
    return Generator(*read_model_folder(BUNDLED if path is None else path))


@dataclass(frozen=True)
class Request:
    """What is to be made, complete and checked: one video per entry of `prompts` and `seeds`."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    frames: int
    size: tuple[int, int]
    steps: int
    guidance: float
    fps: float
    noise: np.ndarray | None = None


class Generator:
    """A model with its parameters on the device, ready to make videos.

    Attributes:
        config: ModelConfig.
        params: {"text": ..., "codec": ..., "dit": ...}, float32.
    """

    def __init__(self, config: ModelConfig, params: dict[str, Any]):
        self.config = config
        self.params = jax.device_put(params)
        self._bar: tqdm | None = None
        self._encode_text = jax.jit(self._encode_text_fn)
        self._denoise = jax.jit(self._denoise_fn)
        self._decode = jax.jit(self._decode_fn)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        fps: float | None = None,
        noise: np.ndarray | None = None,
        progress: bool = True,
    ) -> Video | list[Video]:
        """Makes a video of a prompt, or a list of videos if `prompt` or `seed` is a list.

        Args:
            prompt: what the video shows; a list gives one video each.
            seed: 0 to 2**32 - 1; a list gives one video each. Noise depends on the seed alone, not the batch.
            frames: 1 + a multiple of the codec's stride in time.
            size: (height, width) in pixels, multiples of what codec and transformer fold together.
            steps: steps of the solver, >= 1.
            guidance: the velocity is `without + guidance * (with - without)` the prompt (arXiv:2207.12598).
            negative_prompt: takes the place of the empty prompt in "without".
            fps: frames per second of the result; it changes the speed, not the frames.
            noise: initial latents, float [B, F, Y, X, Z] or [F, Y, X, Z], in place of the seed's.
            progress: show a bar on stderr.

        Raises:
            InputError: if an argument is out of range; the message names what would be possible.
        """
        request = self.request(
            prompt,
            seed=seed,
            frames=frames,
            size=size,
            steps=steps,
            guidance=guidance,
            negative_prompt=negative_prompt,
            fps=fps,
            noise=noise,
        )
        note = self.note_on_words(" ".join([*request.prompts, negative_prompt]))
        if note:
            warnings.warn(note, stacklevel=2)
        videos = list(self.run(request, progress=progress))
        return videos[0] if isinstance(prompt, str) and np.ndim(seed) == 0 else videos

    def request(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        fps: float | None = None,
        noise: np.ndarray | None = None,
    ) -> Request:
        """Checks the arguments of `generate` and fills in the model's defaults; raises InputError."""
        defaults = self.config.sampling
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] if np.ndim(seed) == 0 else list(seed)
        prompts = prompts * len(seeds) if len(prompts) == 1 else prompts
        seeds = seeds * len(prompts) if len(seeds) == 1 else seeds
        if not prompts or len(prompts) != len(seeds):
            raise InputError(f"{len(prompts)} prompts and {len(seeds)} seeds do not make pairs")
        for text in prompts:
            if not isinstance(text, str) or not text.strip():
                raise InputError("the prompt is empty; describe what the video shows, e.g. 'a red ball rolls left'")
        request = Request(
            prompts=tuple(prompts),
            seeds=tuple(_whole("seed", value, 0, 2**32 - 1) for value in seeds),
            negative_prompt=negative_prompt,
            frames=_whole("frames", defaults.frames if frames is None else frames, 1),
            size=tuple(_whole("size", side, 1) for side in _pair(defaults.size if size is None else size)),
            steps=_whole("steps", defaults.steps if steps is None else steps, 1),
            guidance=_number("guidance", defaults.guidance if guidance is None else guidance),
            fps=_number("fps", defaults.fps if fps is None else fps),
        )
        _check_multiple("frames", request.frames, self.config.codec.stride_time, 1)
        for name, side, patch in zip(("height", "width"), request.size, self.config.dit.patch[1:], strict=True):
            _check_multiple(name, side, self.config.codec.stride_space * patch, 0)
        check_fps(request.fps)
        if noise is None:
            return request
        shape = (len(prompts), *self.config.codec.latent_shape(request.frames, *request.size))
        noise = np.asarray(noise, np.float32)
        if noise.shape not in (shape, shape[1:]) or (noise.ndim == 4 and len(prompts) > 1):
            raise InputError(f"noise must be {list(shape)}, not {list(noise.shape)}")
        return Request(**{**vars(request), "noise": noise.reshape(shape)})

    def run(self, request: Request, progress: bool = True) -> Iterator[Video]:
        """Yields the videos of a checked request, in order, sampling in batches of bounded size."""
        pixels = request.frames * math.prod(request.size)
        batch = max(1, min(len(request.prompts), _PIXELS_PER_BATCH // pixels))
        starts = range(0, len(request.prompts), batch)
        bar = tqdm(total=len(starts) * request.steps, desc="sampling", unit="step", disable=not progress)
        # The compiled scan reports to whatever bar is there: a program that held one bar would serve only once.
        self._bar = bar
        with bar:
            for start in starts:
                # The last batch is filled up with repeats: cheaper than compiling for another size.
                chosen = [min(start + i, len(request.prompts) - 1) for i in range(batch)]
                latents_BFYXZ = self._sample(request, chosen)
                for latents_FYXZ in latents_BFYXZ[: len(request.prompts) - start]:
                    # One video at a time: decoding needs far more memory than sampling.
                    frames = _wait(self._decode(self.params["codec"], latents_FYXZ[None]))
                    yield Video(np.asarray(frames[0]), request.fps)

    def _sample(self, request: Request, chosen: list[int]) -> jax.Array:
        prompts = [request.prompts[i] for i in chosen]
        ids_2BL = tokenize([*prompts, *[request.negative_prompt] * len(prompts)], self.config.text.length)
        text_2BLD = self._encode_text(self.params["text"], ids_2BL)
        if request.noise is None:
            shape = self.config.codec.latent_shape(request.frames, *request.size)
            noise_BFYXZ = _draw_noise(np.array(request.seeds, np.uint32)[chosen], shape)
        else:
            noise_BFYXZ = request.noise[chosen]
        levels_S = sampler.noise_levels(request.steps, self.config.sampling.shift)
        guidance = jnp.float32(request.guidance)
        latents = _wait(self._denoise(self.params["dit"], noise_BFYXZ, text_2BLD, levels_S, guidance))
        jax.effects_barrier()  # the last steps reach the bar before it closes
        return latents

    def _encode_text_fn(self, params, ids_BL):
        return T5Encoder(self.config.text).apply({"params": params}, ids_BL)

    def _denoise_fn(self, params, noise_BFYXZ, text_BLD, levels_S, guidance):
        def velocity(x_BFYXZ, level_BF):
            return DiT(self.config.dit).apply({"params": params}, x_BFYXZ, level_BF, text_BLD)

        return sampler.sample(
            sampler.guided(velocity, guidance),
            noise_BFYXZ,
            levels_S,
            solver=self.config.sampling.solver,
            progress=self._step_done,
        )

    def _step_done(self, _) -> None:
        if self._bar is not None:
            self._bar.update()

    def _decode_fn(self, params, latents_BFYXZ):
        video_BTHWC = Codec(self.config.codec).apply({"params": params}, latents_BFYXZ, method="decode")
        return jnp.round((video_BTHWC + 1) * 127.5).astype(jnp.uint8)

    def unknown_words(self, text: str) -> list[str]:
        """Words of `text` that the model was not trained on; empty if the model is not limited to a list."""
        known = set(self.config.vocabulary)
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
        return [word for word in words if known and word not in known]

    def note_on_words(self, text: str) -> str:
        """What to tell someone whose prompt has unknown words, in two lines; empty if there are none."""
        unknown = self.unknown_words(text)
        if not unknown:
            return ""
        known = self.config.description or " ".join(self.config.vocabulary)
        return f"note: this model does not know: {', '.join(unknown)}\nit knows: {known}"


def _wait(array: jax.Array) -> jax.Array:
    # Sleeping in Python, rather than blocking inside JAX, lets Ctrl-C through at once.
    while not array.is_ready():
        time.sleep(0.01)
    return array


@partial(jax.jit, static_argnums=1)
def _draw_noise(seeds_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds_B)


def _whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, not {value!r}") from None
    if number < low or (high is not None and number > high):
        raise InputError(
            f"{name} must be {f'at least {low}' if high is None else f'from {low} to {high}'}, not {value}"
        )
    return number


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name} must be a finite number, not {value!r}")
    return number


def _pair(size: Any) -> tuple[Any, Any]:
    if isinstance(size, str) or np.shape(size) != (2,):
        raise InputError(f"size must be (height, width), not {size!r}")
    return tuple(size)


def _check_multiple(name: str, value: int, step: int, offset: int) -> None:
    """Raises InputError, naming the nearest values, unless value = offset + a positive multiple of step."""
    if value >= max(offset, 1) and value % step == offset % step:
        return
    below = value - (value - offset) % step
    nearest = [str(n) for n in (below, below + step) if n > 0]
    rule = f"{offset} + a multiple of {step}" if offset else f"a multiple of {step}"
    are = f"nearest are {nearest[0]} and {nearest[1]}" if len(nearest) > 1 else f"nearest is {nearest[0]}"
    raise InputError(f"{name} must be {rule}; {value} is not, {are}")


def _keep_compiled_programs() -> None:
    if jax.config.jax_compilation_cache_dir is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        return  # no home: nowhere to keep anything
    jax.config.update("jax_compilation_cache_dir", str(Path(home, "sora_jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # JAX looks for its cache once, at the first compilation, which may have been before this.
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
