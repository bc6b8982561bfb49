"""From a prompt, and perhaps pictures, to a video: read them, draw noise, remove it step by step, decode."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from sora_jax import background, hosts, media, pipeline, sampler
from sora_jax.codec.vae import stream
from sora_jax.errors import InputError
from sora_jax.media import Picture
from sora_jax.model_config import ModelConfig, abstract_params
from sora_jax.pipeline import Given
from sora_jax.request import Request, make_request
from sora_jax.safety.policy import Policy, load_policy
from sora_jax.safety.provenance import Claim, frames_digest
from sora_jax.tensors import OnDemand
from sora_jax.text import ByteTokenizer, FileTokenizer
from sora_jax.video import Video
from sora_jax.vision import preprocess

_UNSEEN = 0.03  # so much (log of the ratio of its sides) a picture may be stretched before somebody is told
_PIXELS_AT_ONCE = 33 * 128 * 128  # more than these the codec takes in pieces, so that its memory does not grow


class Generator:
    """A model with its parameters, ready to make videos.

    Attributes:
        config: ModelConfig.
        params: {"text": ..., "codec": ..., "dit": ...} and perhaps "dit_low" and "vision"; or `OnDemand`.
        tokenizer: prompts to ids.
        dtype: of the large products of text encoder and transformer.
        mesh: the devices that share the work, or None: JAX's default device does it.
        name: of the model, for the manifests of what it makes.
        weights: gives the digest of its weights, hexadecimal, for the same.
        policy: what prompts may ask for.
        kernel: of the transformer's attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        tokenizer: ByteTokenizer | FileTokenizer | None = None,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        name: str = "",
        weights: Callable[[], str] = lambda: "",
        policy: Policy | None = None,
        kernel: str = "auto",
        notes: Sequence[str] = (),
    ):
        self.config, self.kernel = config, kernel
        self.name, self.weights, self.policy = name, weights, policy or load_policy()
        self.dtype = jnp.dtype(dtype)
        self.tokenizer = tokenizer or ByteTokenizer()
        self._notes = tuple(notes)  # on how it was loaded
        self.mesh = mesh
        self.params = params
        if not isinstance(params, OnDemand):
            # Parameters that are in their places stay there.
            places = mesh and jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))
            self.params = jax.device_put(params, places)
        self._bar: tqdm | None = None
        config, dtype = self.config, self.dtype
        self._draw_noise = jax.jit(pipeline.draw_noise, static_argnums=1)
        self._encode_text = jax.jit(partial(pipeline.encode_text, config, dtype))
        self._denoise = jax.jit(
            partial(pipeline.denoise, config, dtype, kernel=kernel, progress=self._step_done),
            static_argnames="is_guided",
            donate_argnums=1,
        )
        options = pipeline.codec_options(mesh.devices.flat[0].platform if mesh else jax.default_backend())
        code = partial(jax.jit, static_argnums=3, donate_argnums=1, compiler_options=options)
        self._decode = code(partial(pipeline.decode, config))
        self._encode_video = code(partial(pipeline.encode, config))
        self._see = jax.jit(partial(pipeline.see, config))

    def generate(
        self,
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
        image: str | os.PathLike | np.ndarray | Picture | None = None,
        last_image: str | os.PathLike | np.ndarray | Picture | None = None,
        progress: bool = True,
    ) -> Video | list[Video]:
        """Makes a video of a prompt, or a list of videos if `prompt` or `seed` is a list.

        Args:
            prompt: what the video shows; a list gives one video each.
            seed: 0 to 2**32 - 1; a list gives one video each. Noise depends on the seed alone, not the batch.
            frames: 1 + a multiple of the codec's stride in time.
            window: frames that are sampled at a time, by default all: a longer video goes on from the last ones of
                each window, so that time grows with its length and not with the square of it.
            overlap: how many frames a window starts with that the one before has made, 1 + a multiple of the codec's
                stride in time; by default 1. More of them carry motion along, in models that take more than one.
            size: (height, width) in pixels, multiples of what codec and transformer fold together.
            steps: steps of the solver, >= 1.
            guidance: above 1 the velocity is `without + guidance * (with - without)` the prompt (arXiv:2207.12598), and
                up to 1 that with the prompt, as in published pipelines.
            guidance_low: the guidance of a second transformer for low noise levels, where the model has one.
            shift: time shift of the noise levels, above 0; larger spends more steps at high noise, which larger videos
                need (see `flow.shift_level`).
            negative_prompt: takes the place of the empty prompt in "without".
            fps: frames per second of the result; it changes the speed, not the frames.
            noise: initial latents, float [B, F, Y, X, Z] or [F, Y, X, Z], in place of the seed's.
            image, last_image: pictures that the video starts and ends with, for models that can: files,
                uint8 [H, W, 3], or pictures of PIL; they are stretched to the size of the video.
            progress: show a bar on stderr.

        Raises:
            InputError: if an argument is out of range; the message names what would be possible. Or sampling ends in
                numbers that are not finite.
            Refused: the policy forbids a prompt or a picture.
        """
        request = make_request(
            self.config,
            prompt,
            seed=seed,
            frames=frames,
            window=window,
            overlap=overlap,
            size=size,
            steps=steps,
            guidance=guidance,
            guidance_low=guidance_low,
            shift=shift,
            negative_prompt=negative_prompt,
            fps=fps,
            noise=noise,
            image=image,
            last_image=last_image,
            policy=self.policy,
        )
        for note in self.notes(request):
            warnings.warn(note, stacklevel=2)
        videos = list(self.run(request, progress=progress))
        return videos[0] if isinstance(prompt, str) and np.ndim(seed) == 0 else videos

    def run(self, request: Request, progress: bool = True) -> Iterator[Video]:
        """Yields the videos of a checked request, in order, sampling in batches of bounded size.

        Where the mesh is that of several processes, all of them run this and have the videos.
        """
        batch = self._at_a_time(request)
        starts = range(0, len(request.prompts), batch)
        with self._on_mesh():
            first = self._known(_pictures(request), request)
        bar = tqdm(
            total=len(starts) * request.windows * request.steps,
            desc="sampling",
            unit="step",
            disable=not (progress and hosts.is_first()),
        )
        with bar:
            for start in starts:
                # The compiled scan reports to whatever bar is there: a program that held one bar would serve only once.
                # Another run may have had its own since the last batch.
                self._bar = bar
                # The last batch is filled up with repeats: cheaper than compiling for another size.
                chosen = [min(start + i, len(request.prompts) - 1) for i in range(batch)]
                several = min(batch, len(request.prompts) - start)
                with self._on_mesh():
                    text_BLD = self._read([request.prompts[i] for i in chosen], request)
                    before, given = [[]] * several, first
                    for window in range(request.windows - 1):
                        latents = self._sample(request, chosen, text_BLD, given, window)
                        pairs = zip(before, latents[:several], strict=True)
                        before = [self._go_on(*pair, request) for pair in pairs]
                        pieces = -(-request.overlap // (request.window - request.overlap))  # that the overlap reaches
                        last = [np.concatenate(clip[-pieces:])[-request.overlap :] for clip in before]
                        known = [self._known(dict(enumerate(frames)), request) for frames in last]
                        known += known[-1:] * (batch - several)
                        given = jax.tree.map(lambda *parts: jnp.concatenate(parts), *known)
                    latents = self._sample(request, chosen, text_BLD, given, request.windows - 1)
                for number, latents_FYXZ in enumerate(latents[:several]):
                    # One video at a time: decoding needs far more memory than sampling.
                    with self._on_mesh():
                        frames_THWC = np.concatenate(self._go_on(before[number], latents_FYXZ, request))
                    frames_THWC = frames_THWC[: request.frames]
                    claim = self._claim(request, start + number, frames_THWC)
                    yield Video(frames_THWC, request.fps, claim)

    def _go_on(self, clips: list[np.ndarray], latents_FYXZ: jax.Array, request: Request) -> list[np.ndarray]:
        """The windows of a video with another one, without the frames that are those of the last."""
        return [*clips, self._decode_video(latents_FYXZ, request)[request.overlap if clips else 0 :]]

    def _claim(self, request: Request, number: int, frames_THWC: np.ndarray) -> Claim:
        """What the file of a video will say of how it was made."""
        sampling = self.config.sampling
        said = {name: getattr(request, name) for name in ("frames", "size", "steps", "guidance", "shift", "fps")}
        if request.windows > 1:
            said |= {"window": request.window, "overlap": request.overlap}
        if self.config.boundary is not None:
            said["guidance_low"] = request.guidance_low
        said |= {name: getattr(sampling, name) for name in ("solver", "schedule")} | {"dtype": self.dtype.name}
        if request.negative_prompt and request.is_guided:
            said["negative_prompt_sha256"] = _sha256(request.negative_prompt)
        if request.noise is not None:
            said["noise_sha256"] = hashlib.sha256(request.noise[number].tobytes()).hexdigest()
        prompt = request.prompts[number]
        return Claim(
            origin="model",
            model=self.name,
            weights_sha256=self.weights(),
            config=said,
            prompt_sha256=_sha256(prompt),
            prompt=prompt,
            seed=request.seeds[number],
            mesh=",".join(f"{axis}={n}" for axis, n in self.mesh.shape.items() if n > 1) if self.mesh else "",
            checks=dict(request.checks),
            ingredients=request.ingredients,
            frames_sha256=frames_digest(frames_THWC),
        )

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def _read(self, prompts: list[str], request: Request) -> jax.Array:
        """Features of the prompts, and after them, with guidance, of as many negative prompts."""
        negative = [request.negative_prompt] * len(prompts) if request.is_guided else []
        ids_BL = self.tokenizer([*prompts, *negative], self.config.text.length)
        return self._waited(self._encode_text, self.params["text"], ids_BL)

    def _sample(
        self, request: Request, chosen: list[int], text_BLD: jax.Array, given: Given, window: int
    ) -> list[jax.Array]:
        """Latents (F, Y, X, Z) of a window of each of the chosen videos."""
        if request.noise is None:
            shape = self.config.codec.latent_shape(request.window, *request.size)
            noise_BFYXZ = self._draw_noise(np.array(request.seeds, np.uint32)[chosen], shape, window or None)
        else:
            noise_BFYXZ = request.noise[chosen]
        sampling = self.config.sampling
        schedule = sampler.noise_schedule(request.steps, request.shift, sampling.schedule)
        guidance_2 = np.float32([request.guidance, request.guidance_low])
        dits = [self.params[part] for part in self.config.transformers]
        denoise = partial(self._denoise, is_guided=request.is_guided)
        latents_BFYXZ = self._waited(denoise, dits, noise_BFYXZ, text_BLD, schedule, guidance_2, given)
        if not jnp.isfinite(latents_BFYXZ).all():  # they would make black frames
            raise InputError(
                "sampling ended in numbers that are not finite: too much guidance or noise, or the model is damaged"
            )
        return [latents_BFYXZ[number] for number in range(len(chosen))]

    def _decode_video(self, latents_FYXZ: jax.Array, request: Request) -> np.ndarray:
        """Frames, uint8 [T, H, W, 3]: at once if they are few, else one latent frame after the other."""
        few = request.window * math.prod(request.size) <= _PIXELS_AT_ONCE
        at_once = len(latents_FYXZ) if few else 1
        pieces = (latents_FYXZ[None, start : start + at_once] for start in range(0, len(latents_FYXZ), at_once))
        frames = stream(partial(self._waited, self._decode), self.params["codec"], pieces)
        return np.concatenate([hosts.whole(piece_BTHWC)[0] for piece_BTHWC in frames])

    def _encode_clip(self, video_THWC: np.ndarray) -> np.ndarray:
        """Latents (1, F, Y, X, Z) of frames in [-1, 1], in pieces if there are many."""
        stride, end = self.config.codec.stride_time, len(video_THWC)
        ends = [end] if video_THWC[..., 0].size <= _PIXELS_AT_ONCE else range(1, end + 1, stride)
        pieces = (video_THWC[None, start:end] for start, end in zip([0, *ends], ends, strict=False))
        latents = stream(partial(self._waited, self._encode_video), self.params["codec"], pieces)
        return np.concatenate([hosts.whole(piece_BFYXZ) for piece_BFYXZ in latents], axis=1)

    def _at_a_time(self, request: Request) -> int:
        pixels, sizes = request.window * math.prod(request.size), self.mesh.shape if self.mesh else {}
        return pipeline.at_a_time(len(request.prompts), pixels, request.is_guided, sizes)

    def _known(self, frames: dict[int, np.ndarray], request: Request) -> Given:
        """What the known frames of a window give the transformer: pictures by the number of their frame."""
        config, T = self.config, request.window
        if not frames:
            return Given()
        stride, clip = config.codec.stride_time, {t: _stretch(frame, request.size) for t, frame in frames.items()}
        if not config.dit.condition_channels:
            F, Y, X, Z = config.codec.latent_shape(T, *request.size)
            latents_1FYXZ, known_1F = np.zeros((1, F, Y, X, Z), np.float32), np.zeros((1, F), bool)
            start = [clip[t] for t in takewhile(clip.__contains__, range(T))]
            if start:
                places = slice(1 + (len(start) - 1) // stride)
                latents_1FYXZ[:, places], known_1F[:, places] = self._encode_clip(np.stack(start)), True
            if len(clip) > len(start):  # a last picture is a group of equal frames
                latents_1FYXZ[:, -1] = self._encode_clip(np.stack([clip[T - 1]] * (1 + stride)))[:, -1]
                known_1F[:, -1] = True
            return Given(latents_1FYXZ, known_1F)
        video_THWC = np.zeros((T, *request.size, 3), np.float32)
        mask_T = np.zeros(T, np.float32)
        for t, frame in clip.items():
            video_THWC[t], mask_T[t] = frame, 1.0
        latents_1FYXZ = self._encode_clip(video_THWC)
        # The mask of a latent frame is that of its group of frames; the first frame fills a group alone.
        mask_FC = np.concatenate([np.repeat(mask_T[:1], stride), mask_T[1:]]).reshape(-1, stride)
        mask_1FYXC = jnp.broadcast_to(mask_FC[:, None, None], (*latents_1FYXZ.shape[1:4], stride))[None]
        features = None
        if config.vision is not None:
            seen = [preprocess(frames[t], config.vision.image_size) for t in (0, T - 1) if t in frames]
            features = self._waited(self._see, self.params["vision"], np.stack(seen))
            features = features.reshape(1, -1, features.shape[-1])
        return Given(condition_BFYXC=jnp.concatenate([mask_1FYXC, latents_1FYXZ], axis=-1), image_BLD=features)

    def _waited(self, program: Callable[..., Any], *args: Any) -> Any:
        """What a compiled program gives, when all of it is there, the last steps on the bar included.

        It runs in another thread: compiling, and on CPUs a program's first run, return to Python only when they are
        done, and Ctrl-C would have to wait for them.
        """

        def work():
            with self._on_mesh():  # which is each thread's own
                result = jax.block_until_ready(program(*args))
                jax.effects_barrier()
            return result

        return background.start(work)()

    def _step_done(self, _) -> None:
        if self._bar is not None:
            self._bar.update()

    def unknown_words(self, text: str) -> list[str]:
        """Words of `text` that the model was not trained on; empty if the model is not limited to a list."""
        known = set(self.config.vocabulary)
        return [word for word in dict.fromkeys(_words(text)) if known and word not in known]

    def notes(self, request: Request) -> list[str]:
        """What someone should be told: of the model as it was loaded, and of a request: unknown words, text that is not
        read, a negative prompt without guidance, pictures out of shape."""
        texts = [*dict.fromkeys(request.prompts), request.negative_prompt]
        notes = list(self._notes)
        if request.negative_prompt and not request.is_guided:
            notes.append(f"note: the negative prompt does nothing at guidance {request.guidance:g}; above 1 it does")
        if unknown := self.unknown_words(" ".join(texts)):
            known = self.config.description or " ".join(self.config.vocabulary)
            notes.append(f"note: this model does not know: {', '.join(unknown)}\nit knows: {known}")
        for text in texts:
            if rest := self.tokenizer.unread(text, self.config.text.length):
                which = "prompt" if text in request.prompts else "negative prompt"
                notes.append(f"note: the {which} is too long for this model, which does not read its end: ...{rest}")
        if (several := self._at_a_time(request)) > len(request.prompts):
            asked = f"{len(request.prompts)} {'is' if len(request.prompts) == 1 else 'are'} asked for"
            notes.append(f"note: this mesh makes {several} videos at a time, and {asked}: context would share the work")
        height, width = request.size
        if height != width and request.size == self.config.sampling.size[::-1]:
            notes.append(f"note: the height comes first: this video is {height} high and {width} wide")
        for name, picture in (("image", request.image), ("last image", request.last_image)):
            if picture is not None and abs(np.log(picture.shape[0] / picture.shape[1] * width / height)) > _UNSEEN:
                rows, columns = picture.shape[:2]
                notes.append(f"note: the {name} of {rows}x{columns} is stretched to {height}x{width}")
        return notes


def _pictures(request: Request) -> dict[int, np.ndarray]:
    """The pictures of a request by the number of the frame they are."""
    pictures = {request.frames - 1: request.last_image, 0: request.image}  # of one frame, the first one is all
    return {t: picture for t, picture in pictures.items() if picture is not None}


def _stretch(picture_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To another size, as published pipelines do it; uint8 to float32 in [-1, 1]."""
    return media.resize(picture_HWC, size, "lanczos") / np.float32(127.5) - 1


def _words(text: str) -> list[str]:
    """Words of any alphabet, numbers, and symbols such as emoji, each of which is one."""
    text = "".join(
        letter if letter.isalnum() or letter == "'" or unicodedata.category(letter)[0] == "M"
        else f" {letter} " if unicodedata.category(letter) == "So" else " "
        for letter in unicodedata.normalize("NFC", text.lower().replace("\u2019", "'"))
    )  # fmt: skip
    words = (word.strip("'") for word in text.split())
    return [word for word in words if any(unicodedata.category(letter)[0] != "M" for letter in word)]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
