"""Training the codec: reconstruct windows of clips from noisy latents."""

import functools
import itertools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Sharding
from ml_collections import ConfigDict

from sora_jax import hosts
from sora_jax.codec import Codec
from sora_jax.codec.vae import psnr
from sora_jax.data import clips as clips_lib
from sora_jax.data import loading
from sora_jax.data.worlds.drawing import HELD_OUT
from sora_jax.data.worlds.render import render, render_at
from sora_jax.data.worlds.scenes import sample_scene
from sora_jax.model_folder import read_codec
from sora_jax.safety.provenance import Claim
from sora_jax.training.config import codec_config
from sora_jax.video import Video


def render_windows(key: jax.Array, batch: int, config: ConfigDict) -> jax.Array:
    """Windows of `config.frames` frames and `config.crop` pixels out of clips: (B, T, H, W, 3) float32 in [-1, 1].

    A window is as good a lesson as a clip and costs a fraction of it, so that more steps fit into an hour. The share
    `config.on_object` of them is centred on an object in a random frame: silhouettes are what is hard, and most of a
    frame has none.
    """
    size = (config.size, config.size)
    room = config.size - config.crop

    def one(key):
        scene_key, time_key, place_key, which_key = jax.random.split(key, 4)
        first = jax.random.randint(time_key, (), 0, config.clip_frames - config.frames + 1)
        u_T = (first + jnp.arange(config.frames)) / max(config.clip_frames - 1, 1)
        video_THWC, truth = render_at(sample_scene(scene_key), u_T, size)
        anywhere_2 = jax.random.randint(place_key, (2,), 0, room + 1)
        chance_key, which_key = jax.random.split(which_key)
        on_object = jax.random.uniform(chance_key) < config.on_object
        second, frame = jax.random.randint(which_key, (2,), 0, jnp.array([2, config.frames]))
        center_2 = truth.center_T2[second & truth.present[1], frame] * config.size
        around_2 = jnp.clip(center_2 - config.crop / 2, 0, room).astype(jnp.int32)
        x, y = jnp.where(on_object, around_2, anywhere_2)
        window_THWC = jax.lax.dynamic_slice(video_THWC, (0, y, x, 0), (config.frames, config.crop, config.crop, 3))
        return window_THWC * 2 - 1

    return jax.vmap(one)(jax.random.split(key, batch))


def render_clips(key: jax.Array, batch: int, config: ConfigDict) -> jax.Array:
    """Whole clips, (B, T, H, W, 3) float32 in [-1, 1]."""
    size = (config.size, config.size)
    return jax.vmap(lambda key: render(sample_scene(key), config.clip_frames, size)[0] * 2 - 1)(
        jax.random.split(key, batch)
    )


def cut_window(clip: dict, rng: np.random.Generator, config: ConfigDict) -> dict:
    """{"video": a window of a stored clip}, float32 (T, H, W, 3) in [-1, 1].

    The share `config.on_object` of them is centred on an object in a random frame, where the clip has its truth.
    """
    video_THWC = clip["video"]
    sides = (config.frames, config.crop, config.crop)
    corner = [rng.integers(0, whole - side + 1) for whole, side in zip(video_THWC.shape, sides, strict=False)]
    if "truth" in clip and rng.random() < config.on_object:
        object_ = rng.choice(np.flatnonzero(clip["truth"]["present"]))
        center_2 = clip["truth"]["center_T2"][object_, corner[0] + rng.integers(config.frames)] * config.size
        corner[2], corner[1] = np.clip(center_2 - config.crop / 2, 0, config.size - config.crop).astype(int)
    window_THWC = video_THWC[tuple(slice(start, start + side) for start, side in zip(corner, sides, strict=True))]
    return {"video": window_THWC.astype(np.float32) / 127.5 - 1}


def outline_weights(video_BTHWC: jax.Array, share: float) -> jax.Array:
    """Weights (B, T, H, W, 1) of mean one: this share of them lies where the frames differ from their surroundings.

    Outlines tell shapes apart, and are a few pixels in a hundred. Surroundings are the 5 x 5 pixels around each.
    """
    padded = jnp.pad(video_BTHWC, [(0, 0), (0, 0), (2, 2), (2, 2), (0, 0)], mode="edge")
    blurred = nn.avg_pool(padded, (1, 5, 5), padding="VALID")
    contrast = jnp.abs(video_BTHWC - blurred).mean(axis=-1, keepdims=True)
    mean = contrast.mean()
    return jnp.where(mean > 1e-4, 1 - share + share * contrast / jnp.maximum(mean, 1e-4), 1.0)  # flat clips have none


class CodecTask:
    """Reconstruction (absolute and squared error) plus a small Kullback-Leibler term on the posterior.

    The share `config.loss.outlines` of the squared error is spread over outlines (see `outline_weights`).
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self.codec = Codec(codec_config(config), jnp.dtype(config.dtype))
        self._reconstruct = jax.jit(self.codec.apply)
        self._train = self._held_out = None
        if config.data.dir:
            self._train, self._held_out = (
                clips_lib.stored_as(config.data.dir, split, config.clip_frames, config.size)
                for split in ("train", config.data.held_out)
            )

    def prepare(self) -> None:
        """Nothing has to be."""

    def initialize(self, key: jax.Array):
        """Fresh parameters, boxed with their axis names."""
        video = jnp.zeros((1, 1 + self.codec.config.stride_time, self.config.size, self.config.size, 3))
        return self.codec.init(key, video)["params"]

    def pretrained(self, path: str):
        """The parameters of the codec in a model folder, for a run that goes on from them."""
        return read_codec(path)[1]

    def batches(self, start: int, sharding: Sharding | None = None) -> Iterator[jax.Array]:
        """One batch of windows for each step from `start` on, placed by `sharding`."""
        config = self.config
        if self._train is not None:
            cut = functools.partial(cut_window, config=config)
            for batch in loading.batches(self._train, cut, config.batch, config.seed, start, sharding):
                yield batch["video"]
            return
        # Every device draws its own part.
        draw = jax.jit(lambda key: render_windows(key, config.batch, config), out_shardings=sharding)
        for step in itertools.count(start):
            yield draw(jax.random.fold_in(jax.random.key(config.seed), step))

    @functools.cached_property
    def _held_out_clips(self) -> np.ndarray:
        """Eight whole clips that training does not see, (B, T, H, W, 3) float32 in [-1, 1]."""
        source = self._held_out
        if source is None:
            with hosts.alone():
                return np.asarray(jax.jit(lambda key: render_clips(key, 8, self.config))(jax.random.key(HELD_OUT)))
        return np.stack([source[i]["video"] for i in range(min(8, len(source)))]).astype(np.float32) / 127.5 - 1

    def loss(self, params, video_BTHWC: jax.Array, key: jax.Array):
        def autoencode(codec):
            mean, log_variance = codec.posterior(video_BTHWC)
            if self.config.freeze_encoder:
                mean, log_variance = jax.lax.stop_gradient((mean, log_variance))
            noise = jax.random.normal(key, mean.shape)
            return codec.reconstruct(mean + jnp.exp(0.5 * log_variance) * noise), mean, log_variance

        video, mean, log_variance = self.codec.apply({"params": params}, method=autoencode)
        absolute = jnp.mean(jnp.abs(video - video_BTHWC))
        weights_BTHW1 = outline_weights(video_BTHWC, self.config.loss.outlines)
        squared = jnp.mean(weights_BTHW1 * (video - video_BTHWC) ** 2)
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
        weights = self.config.loss
        loss = weights.absolute * absolute + weights.squared * squared + weights.kl * kl
        return loss, {"absolute": absolute, "psnr": psnr(video, video_BTHWC), "kl": kl}

    def preview(self, params) -> tuple[dict[str, float], dict[str, Video]]:
        """Held-out PSNR, and held-out clips above their reconstructions."""
        video = self._held_out_clips
        rebuilt = hosts.whole(self._reconstruct({"params": meta.unbox(params)}, video))
        pair = np.concatenate([np.concatenate(list(v), axis=2) for v in (video[:4], rebuilt[:4])], axis=1)
        frames = np.round((pair + 1) * 127.5).astype(np.uint8)
        shown = Video(frames, claim=Claim(origin="partly model"))
        return {"held_out_psnr": float(psnr(video, rebuilt))}, {"reconstruction": shown}
