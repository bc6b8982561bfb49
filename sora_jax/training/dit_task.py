"""Training the DiT, together with its text encoder, on latents of the frozen codec."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from sora_jax import flow, sampler
from sora_jax.codec import Codec, CodecConfig
from sora_jax.data import latents as latents_lib
from sora_jax.data.worlds import vocabulary
from sora_jax.data.worlds.captions import caption
from sora_jax.data.worlds.render import render
from sora_jax.data.worlds.scenes import sample_scene
from sora_jax.dit import DiT, DiTConfig
from sora_jax.errors import InputError
from sora_jax.model_folder import ModelConfig, SamplingConfig, read_codec, read_model_folder, write_codec
from sora_jax.text import T5Encoder, TextConfig, tokenize
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.codec_task import HELD_OUT_SEED
from sora_jax.training.codec_task import codec_config as codec_config_of

_RENDER_BATCH = 8


def frozen_codec(config: ConfigDict, workdir: Path) -> tuple[CodecConfig, dict]:
    """The codec this run uses, with its latents' statistics; kept in the work directory from the first time on.

    `config.codec` is the work directory of a codec run (its averaged weights are taken) or a model folder.
    """
    kept = workdir / "codec"
    if not kept.exists():
        source = Path(config.codec)
        if (source / "checkpoints").is_dir():
            codec_config, params = _from_codec_run(source)
        else:
            codec_config, params = read_codec(source)
        if not codec_config.latents_std:
            codec_config = _with_statistics(codec_config, params, config)
        write_codec(kept, codec_config, params)
    return read_codec(kept)


def _from_codec_run(source: Path) -> tuple[CodecConfig, dict]:
    config = ConfigDict(json.loads((source / "config.json").read_text()))
    if config.task != "codec":
        raise InputError(f"config.codec is {source}, which trains a {config.task}; it must be a codec run or a model")
    checkpoints = Checkpoints(source)
    try:
        return codec_config_of(config), checkpoints.restore_any()["ema"]
    finally:
        checkpoints.close()


def _with_statistics(codec_config: CodecConfig, params, config: ConfigDict) -> CodecConfig:
    """Mean and standard deviation of each latent channel over a few hundred clips."""
    encode = _encoder(codec_config, config)
    latents = np.concatenate([encode(params, start)[0] for start in range(0, 256, _RENDER_BATCH)])
    mean, std = latents.mean(axis=(0, 1, 2, 3)), latents.std(axis=(0, 1, 2, 3))
    return dataclasses.replace(codec_config, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std)))


def _encoder(codec_config: CodecConfig, config: ConfigDict):
    """(params, start) -> latents and scenes of the clips start, start + 1, ... of the training worlds."""
    codec = Codec(codec_config)

    @jax.jit
    def encode(params, seed, start):
        numbers = start + jnp.arange(_RENDER_BATCH)
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(numbers)
        scenes = jax.vmap(sample_scene)(keys)
        size = (config.size, config.size)
        video_BTHWC = jax.vmap(lambda scene: render(scene, config.frames, size)[0])(scenes)
        return codec.apply({"params": params}, video_BTHWC * 2 - 1, method="encode"), scenes

    def numbered(params, start, seed=config.data.seed):
        return jax.tree.map(np.asarray, encode(params, np.uint32(seed), np.uint32(start)))

    return numbered


def model_config(config: ConfigDict, codec_config: CodecConfig) -> ModelConfig:
    """The whole model that a run makes.

    Raises:
      InputError: the configuration describes no possible model.
    """
    if config.sampling.solver not in sampler.SOLVERS:
        raise InputError(
            f"config.sampling.solver is {config.sampling.solver!r}; it can be {', '.join(sampler.SOLVERS)}"
        )
    try:
        model = ModelConfig(
            text=TextConfig(**config.text),
            codec=codec_config,
            dit=DiTConfig(latent_channels=codec_config.latent_channels, text_width=config.text.width, **config.dit),
            sampling=SamplingConfig(frames=config.frames, size=(config.size, config.size), **config.sampling),
            vocabulary=tuple(sorted(vocabulary.known_words())),
            description=vocabulary.DESCRIPTION,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"config: {error}") from error
    side = codec_config.stride_space * max(model.dit.patch)
    if config.frames % codec_config.stride_time != 1 % codec_config.stride_time:
        raise InputError(f"config.frames is {config.frames}; it must be 1 + a multiple of {codec_config.stride_time}")
    if config.size % side:
        raise InputError(f"config.size is {config.size}; it must be a multiple of {side}")
    return model


class DiTTask:
    """Velocity loss on the latents of captioned worlds; the parameters are {"text": ..., "dit": ...}."""

    def __init__(self, config: ConfigDict, workdir: Path):
        self.config = config
        self.codec_config, self.codec_params = frozen_codec(config, workdir)
        model = model_config(config, self.codec_config)
        self.text_config, self.dit_config = model.text, model.dit
        self.text, self.dit = T5Encoder(self.text_config), DiT(self.dit_config)
        self.latent_shape = self.codec_config.latent_shape(config.frames, config.size, config.size)
        self._paths = self._encode_worlds(workdir / "latents")
        self._held_out = None

    def _encode_worlds(self, folder: Path) -> list[Path]:
        data = self.config.data
        encode = _encoder(self.codec_config, self.config)

        def make(start: int, count: int):
            latents, captions = [], []
            for first in range(start, start + count, _RENDER_BATCH):
                batch, scenes = encode(self.codec_params, first)
                latents.append(batch)
                for i in range(_RENDER_BATCH):
                    scene = jax.tree.map(lambda a, i=i: a[i], scenes)
                    rng = np.random.default_rng((data.seed, first + i))
                    captions.append([caption(scene, rng) for _ in range(data.captions)])
            return np.concatenate(latents)[:count], captions[:count]

        with tqdm(total=data.clips, unit="clip", desc="encode worlds") as bar:
            return latents_lib.write_shards(folder, data.clips, data.shard, make, bar.update)

    def initialize(self, key: jax.Array):
        """Fresh parameters, boxed with their axis names."""
        text_key, dit_key = jax.random.split(key)
        ids_BL = jnp.zeros((1, self.text_config.length), jnp.int32)
        text_BLD = jnp.zeros((1, self.text_config.length, self.text_config.width))
        latents = jnp.zeros((1, *self.latent_shape))
        return {
            "text": self.text.init(text_key, ids_BL)["params"],
            "dit": self.dit.init(dit_key, latents, jnp.zeros(latents.shape[:2]), text_BLD)["params"],
        }

    def pretrained(self, path: str):
        """The parameters in a model folder, for a run that goes on from them."""
        params = read_model_folder(path)[1]
        return {"text": params["text"], "dit": params["dit"]}

    def batches(self, start: int) -> Iterator[dict]:
        """One batch for each step from `start` on."""
        return latents_lib.batches(self._paths, self.config.batch, self.text_config.length, self.config.seed, start)

    def loss(self, params, batch: dict, key: jax.Array):
        level_key, noise_key, known_key, drop_key = jax.random.split(key, 4)
        x0_BFYXZ, ids_BL = batch["latents"].astype(jnp.float32), batch["ids"]
        B, F = x0_BFYXZ.shape[:2]
        drop_B1 = jax.random.uniform(drop_key, (B, 1)) < self.config.flow.drop_text
        ids_BL = jnp.where(drop_B1, tokenize([""], self.text_config.length), ids_BL)
        known_BF = flow.sample_known(known_key, B, F, self.config.flow.known_share)
        level_B1 = flow.sample_level(level_key, B, self.config.flow.shift)[:, None]
        level_BF = jnp.where(known_BF, 0.0, level_B1)
        noise_BFYXZ = jax.random.normal(noise_key, x0_BFYXZ.shape)
        velocity_BFYXZ = self._velocity(params, flow.add_noise(x0_BFYXZ, noise_BFYXZ, level_BF), level_BF, ids_BL)
        return flow.velocity_loss(velocity_BFYXZ, x0_BFYXZ, noise_BFYXZ, known_BF), {}

    def _velocity(self, params, x_BFYXZ, level_BF, ids_BL):
        text_BLD = self.text.apply({"params": params["text"]}, ids_BL)
        return self.dit.apply({"params": params["dit"]}, x_BFYXZ, level_BF, text_BLD)

    def preview(self, params) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Loss on held-out clips at fixed levels and noise, and samples of the configured prompts side by side."""
        if self._held_out is None:
            latents, scenes = _encoder(self.codec_config, self.config)(self.codec_params, 0, seed=HELD_OUT_SEED)
            rng = np.random.default_rng(0)
            captions = [caption(jax.tree.map(lambda a, i=i: a[i], scenes), rng, "full") for i in range(_RENDER_BATCH)]
            ids_BL = tokenize(captions, self.text_config.length)
            # Each clip eight times, to see it at many levels.
            self._held_out = {"latents": np.repeat(latents, 8, axis=0), "ids": np.repeat(ids_BL, 8, axis=0)}
        loss = jax.jit(self.loss)(params, self._held_out, jax.random.key(0))[0]
        return {"held_out_loss": float(loss)}, {"samples": self._samples(params)}

    def _samples(self, params) -> np.ndarray:
        prompts, settings = list(self.config.prompts), self.config.sampling

        @jax.jit
        def run(params, codec_params, ids_BL, noise_BFYXZ):
            text_BLD = self.text.apply({"params": params["text"]}, ids_BL)

            def velocity(x_BFYXZ, level_BF):
                return self.dit.apply({"params": params["dit"]}, x_BFYXZ, level_BF, text_BLD)

            levels = sampler.noise_levels(settings.steps, settings.shift)
            guided = sampler.guided(velocity, settings.guidance)
            latents = sampler.sample(guided, noise_BFYXZ, levels, settings.solver)
            return Codec(self.codec_config).apply({"params": codec_params}, latents, method="decode")

        ids_BL = tokenize([*prompts, *[""] * len(prompts)], self.text_config.length)
        noise = jax.random.normal(jax.random.key(0), (len(prompts), *self.latent_shape))
        video = run(params, self.codec_params, ids_BL, noise)
        frames = np.asarray(jnp.round((video + 1) * 127.5), np.uint8)
        frames = np.pad(frames, [(0, -len(prompts) % 4), *[(0, 0)] * 4])
        rows = [np.concatenate(list(frames[i : i + 4]), axis=2) for i in range(0, len(frames), 4)]
        return np.concatenate(rows, axis=1)
