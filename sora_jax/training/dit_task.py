"""Training the DiT, together with its text encoder, on latents of the frozen codec."""

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from ml_collections import ConfigDict
from tqdm import tqdm

from sora_jax import flow, hosts
from sora_jax.attention import check_kernel
from sora_jax.codec import Codec, CodecConfig
from sora_jax.data import clips as clips_lib
from sora_jax.data import latents as latents_lib
from sora_jax.data.worlds.drawing import HELD_OUT, draw_clips
from sora_jax.data.worlds.layout import CHANNELS, layout, objects
from sora_jax.data.worlds.render import Truth
from sora_jax.data.worlds.scenes import Scene
from sora_jax.dit import DiT
from sora_jax.errors import InputError
from sora_jax.generate import Generator
from sora_jax.json_files import read_json
from sora_jax.layers import Dense, layer_norm
from sora_jax.model_folder import read_codec, read_model_folder, write_codec
from sora_jax.request import admit, make_request
from sora_jax.safety.policy import load_policy
from sora_jax.safety.provenance import Claim
from sora_jax.text import T5Encoder, tokenize
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.config import codec_config as codec_config_of
from sora_jax.training.config import model_config
from sora_jax.video import Video

_ENCODE_BATCH = 8
_STATISTICS_CLIPS = 256
_HELD_OUT_CLIPS = 16
_SEEN_CLIPS = 2


def frozen_codec(config: ConfigDict, workdir: Path) -> tuple[CodecConfig, dict]:
    """The codec this run uses, with its latents' statistics; kept in the work directory from the first time on.

    `config.codec` is the work directory of a codec run (its averaged weights are taken) or a model folder.
    """
    kept = workdir / "codec"
    about = {"codec": str(config.codec), "frames": config.frames, "size": config.size, "data": _origin(config)}
    missing = not kept.exists()
    hosts.wait("codec is looked for")
    if not missing:
        latents_lib.check_about(workdir / "codec.about.json", about)
        return read_codec(kept)
    source = Path(config.codec)
    if (source / "checkpoints").is_dir():
        codec_config, params = codec_of_run(source)
    else:
        codec_config, params = read_codec(source)
    model_config(config, codec_config)  # what cannot be is said before anything is kept
    if not codec_config.latents_std:
        codec_config = _with_statistics(codec_config, params, config)

    def write():
        latents_lib.write_about(workdir / "codec.about.json", about)
        write_codec(kept, codec_config, params)

    hosts.by_first(write)
    return read_codec(kept)


def _origin(config: ConfigDict) -> dict:
    """What decides which clips there are."""
    return {"dir": config.data.dir} if config.data.dir else {"seed": config.data.seed, "captions": config.data.captions}


def codec_of_run(source: Path) -> tuple[CodecConfig, dict]:
    """The averaged weights in the work directory of a codec run.

    Raises:
      InputError: it is none.
    """
    if not (source / "config.json").is_file():
        raise InputError(f"{source} is not the work directory of a codec run: it has no config.json")
    config = ConfigDict(read_json(source / "config.json"))
    if config.get("task") != "codec" or "codec" not in config:
        raise InputError(f"{source} trains a {config.get('task')}; the codec is that of a codec run or a model")
    with Checkpoints(source) as checkpoints:
        return codec_config_of(config), checkpoints.read("ema")["ema"]


def _with_statistics(codec_config: CodecConfig, params, config: ConfigDict) -> CodecConfig:
    """Mean and standard deviation of each latent channel over a few hundred clips."""
    clips, available = _clips(config)
    encoded = _encode(codec_config, params, clips(0, min(_STATISTICS_CLIPS, available)))
    latents = np.stack([clip["latents"] for clip in encoded])
    mean, std = latents.mean(axis=(0, 1, 2, 3)), latents.std(axis=(0, 1, 2, 3))
    return dataclasses.replace(codec_config, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std)))


def _clips(
    config: ConfigDict, held_out: bool = False, mistaken: bool = False
) -> tuple[Callable[[int, int], Iterator[dict]], int]:
    """(start, count) -> clips start, start + 1, ..., and how many there are: drawn, `mistaken` ones beside them if
    asked for, or those of `config.data.dir`.

    Of what is drawn, clips held out have other numbers; of the stored worlds, they show combinations of colour and
    shape that training does not: losses on the two do not compare.
    """
    data = config.data
    if not data.dir:
        first, size = HELD_OUT if held_out else 0, (config.size, config.size)
        asked = dict(seed=data.seed, frames=config.frames, size=size, captions=data.captions, mistaken=mistaken)

        def draw(start, count):
            return draw_clips(range(first + start, first + start + count), **asked)

        return draw, data.clips
    source = clips_lib.stored_as(data.dir, data.held_out if held_out else "train", config.frames, config.size)
    return lambda start, count: (source[i] for i in range(start, start + count)), len(source)


def _encode(codec_config: CodecConfig, params, clips: Iterable[dict], patch=(1, 1, 1)) -> Iterator[dict]:
    """The latents (F, Y, X, Z) float32 of clips, their captions, those of mistaken ones if there are any, and, if the
    truth about them is known, their layout on the grid of patches.
    """
    clips = iter(clips)
    while batch := list(itertools.islice(clips, _ENCODE_BATCH)):
        # A last batch is filled up, so that one program serves all.
        filled = [batch[min(i, len(batch) - 1)] for i in range(_ENCODE_BATCH)]
        latents = {
            name: np.asarray(_encode_videos(codec_config, params, np.stack([clip[of] for clip in filled])))
            for name, of in (("latents", "video"), ("mistaken", "mistaken"))
            if of in batch[0]
        }
        F, Y, X = latents["latents"].shape[1:4]
        for i, clip in enumerate(batch):
            captions = clip["captions"]
            encoded = {name: latents_BFYXZ[i] for name, latents_BFYXZ in latents.items()}
            encoded["captions"] = captions if isinstance(captions, str) else captions.decode()
            if _has_truth(clip):
                scene, truth = Scene(**clip["scene"]), Truth(**clip["truth"])
                encoded["layout"] = np.asarray(_layout(scene, truth, F, Y // patch[1], X // patch[2]))
            yield encoded


def _has_truth(clip: dict) -> bool:
    return "truth" in clip and set(Scene._fields) <= clip.get("scene", {}).keys()


@functools.partial(jax.jit, static_argnums=0)
def _encode_videos(codec_config, params, video_BTHWC):
    video_BTHWC = video_BTHWC.astype(jnp.float32) / 127.5 - 1
    return Codec(codec_config).apply({"params": params}, video_BTHWC, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _decode(codec_config, params, latents_BFYXZ):
    return Codec(codec_config).apply({"params": params}, latents_BFYXZ, method="decode")


_layout = jax.jit(layout, static_argnums=(2, 3, 4))


class Aligner(nn.Module):
    """Reads the layout of the clean clip off tokens in the middle of the DiT: (..., D) -> (..., CHANNELS)."""

    width: int

    @nn.compact
    def __call__(self, tokens_BFSD: jax.Array) -> jax.Array:
        hidden = Dense(self.width, ("width", None), name="hidden")(layer_norm(tokens_BFSD, 1e-6))
        return Dense(CHANNELS, ("width", None), name="out")(nn.silu(hidden))


class DiTTask:
    """Velocity loss on the latents of captioned clips; the parameters are {"text": ..., "dit": ...}, float32.

    Large products are computed in `config.dtype`; norms, sums of blocks, losses and the optimizer in float32.

    With `config.align.weight` above 0, the tokens after `config.align.layer` blocks are also to tell the layout of
    the clean clip (see `data/worlds/layout.py`), through a small network, {"aligner": ...}, that no model folder has.
    The velocity then counts up to 1 + `config.align.objects` times as much where the layout has objects.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        self.config = config
        check_kernel(config.kernel, jax.default_backend())
        admit(config.prompts, load_policy(), "config.prompts")
        if config.flow.mistaken_share and config.data.dir:
            raise InputError(f"{config.data.dir}: its clips have no mistaken ones; set --config.flow.mistaken_share=0")
        if config.data.dir:
            _clips(config, held_out=True)  # better now than at the first preview
        self.codec_config, self.codec_params = frozen_codec(config, workdir)
        self.model = model_config(config, self.codec_config)
        self.text_config, self.dit_config = self.model.text, self.model.dit
        dtype = jnp.dtype(config.dtype)
        self.text = T5Encoder(self.text_config, dtype)
        self.dit = DiT(self.dit_config, dtype, config.kernel, config.align.layer if config.align.weight else 0)
        self.aligner = Aligner(self.dit_config.width)
        self.latent_shape = self.codec_config.latent_shape(config.frames, config.size, config.size)
        self._latents = workdir / "latents"
        self._loss, self._held_out = jax.jit(self.loss), None
        self._generator: Generator | None = None

    def prepare(self) -> None:
        """Encodes the clips, or those of them that are not yet, and asks the decoder about the channels."""
        _ = self._paths, self._weight_Z

    @functools.cached_property
    def _weight_Z(self) -> np.ndarray:
        return self._channel_weights(self.config.flow.seen_share)

    @functools.cached_property
    def _paths(self) -> list[Path]:
        config, folder = self.config, self._latents
        clips, count = _clips(config, mistaken=config.flow.mistaken_share > 0)
        if config.align.weight and config.data.dir and not _has_truth(next(iter(clips(0, 1)))):
            raise InputError(f"{config.data.dir}: its clips have no truth to align with; set --config.align.weight=0")
        patch = self.dit_config.patch
        about = {"codec": str(config.codec), "frames": config.frames, "size": config.size, "patch": patch}
        about |= _origin(config)
        if config.flow.mistaken_share:
            about["mistaken"] = True
        hosts.by_first(functools.partial(latents_lib.claim_folder, folder, about))
        longer = 0

        def encode(start, count):
            nonlocal longer
            for clip in _encode(self.codec_config, self.codec_params, clips(start, count), patch):
                unread = [tokenize.unread(text, config.text.length) for text in clip["captions"].split("\n")]
                longer += any(unread)
                yield clip

        with tqdm(total=count, unit="clip", desc="encode clips", disable=not hosts.is_first()) as bar:
            paths = latents_lib.write_shards(folder, count, config.data.shard, encode, bar.update)
        if longer:
            limit = f"{config.text.length - 1} bytes (--config.text.length)"
            tqdm.write(
                f"note: {longer} clips have captions longer than {limit}, whose ends are not read", file=sys.stderr
            )
        hosts.wait("clips are encoded")
        return paths

    def _channel_weights(self, share: float) -> np.ndarray:
        """Weights (Z,) of mean one: this share of the loss counts what an error does to the frames one sees.

        Latent channels are alike in variance, but not in what they do: in the bundled codec a third of them makes
        nine tenths of all change in the decoded frames, and others next to none. The decoder tells.
        """
        if not share:
            return np.ones(self.codec_config.latent_channels, np.float32)
        latents = latents_lib.first_latents(self._paths[0], _SEEN_CLIPS)
        noise = 0.3 * np.random.default_rng(0).standard_normal(latents.shape[:-1], np.float32)
        decoded = _decode(self.codec_config, self.codec_params, latents)

        def change(channel):
            changed = latents + noise[..., None] * (np.arange(latents.shape[-1]) == channel)
            return jnp.mean((_decode(self.codec_config, self.codec_params, changed) - decoded) ** 2)

        seen_Z = np.array([change(channel) for channel in range(latents.shape[-1])])
        return hosts.of_first(np.float32(1 - share + share * seen_Z / max(seen_Z.mean(), 1e-12)))

    def initialize(self, key: jax.Array):
        """Fresh parameters, boxed with their axis names."""
        text_key, dit_key, aligner_key = jax.random.split(key, 3)
        ids_BL = jnp.zeros((1, self.text_config.length), jnp.int32)
        text_BLD = jnp.zeros((1, self.text_config.length, self.text_config.width))
        latents = jnp.zeros((1, *self.latent_shape))
        params = {
            "text": self.text.init(text_key, ids_BL)["params"],
            "dit": self.dit.init(dit_key, latents, jnp.zeros(latents.shape[:2]), text_BLD)["params"],
        }
        if self.config.align.weight:
            params["aligner"] = self.aligner.init(aligner_key, jnp.zeros((1, 1, 1, self.dit_config.width)))["params"]
        return params

    def pretrained(self, path: str):
        """Those of the parameters that a model folder has, for a run that goes on from them."""
        config, params = read_model_folder(path)
        for name, theirs, ours in (("text", config.text, self.text_config), ("dit", config.dit, self.dit_config)):
            for field in dataclasses.fields(ours):
                values = [getattr(one, field.name) for one in (theirs, ours)]
                if field.name != "remat" and values[0] != values[1]:
                    words = f"its {name}.{field.name} is {values[0]}, not {values[1]}"
                    raise InputError(f"the model in {path} does not fit this configuration: {words}")
        return {"text": params["text"], "dit": params["dit"]}

    def batches(self, start: int, sharding: Sharding | None = None) -> Iterator[dict]:
        """One batch for each step from `start` on, placed by `sharding`."""
        self.prepare()
        config = self.config
        return latents_lib.batches(self._paths, config.batch, config.text.length, config.seed, start, sharding)

    def loss(self, params, batch: dict, key: jax.Array):
        config = self.config
        flow_key, drop_key, mistaken_key = jax.random.split(key, 3)
        x0_BFYXZ, ids_BL = batch["latents"].astype(jnp.float32), batch["ids"]
        B, F = x0_BFYXZ.shape[:2]
        drop_B1 = jax.random.uniform(drop_key, (B, 1)) < config.flow.drop_text
        ids_BL = jnp.where(drop_B1, tokenize([""], self.text_config.length), ids_BL)
        levels = flow.Levels(config.flow.shift, config.flow.uniform_share, config.flow.uniform_shift)
        mistaken_BFYXZ = None
        if config.flow.mistaken_share and "mistaken" in batch:  # not in what is held out: losses of all runs compare
            # Only the prompt can tell that it is a mistake.
            chosen_B1 = (jax.random.uniform(mistaken_key, (B, 1)) < config.flow.mistaken_share) & ~drop_B1
            mistaken_BFYXZ = jnp.where(chosen_B1[:, :, None, None, None], batch["mistaken"], x0_BFYXZ)
        x_BFYXZ, level_BF, noise_BFYXZ, known_BF = flow.noised(
            flow_key, x0_BFYXZ, levels, config.flow.known_share, mistaken_BFYXZ
        )
        text_BLD = self.text.apply({"params": params["text"]}, ids_BL)
        velocity_BFYXZ, kept = self.dit.apply(
            {"params": params["dit"]}, x_BFYXZ, level_BF, text_BLD, mutable=["intermediates"]
        )
        weight_BFYXZ = self._weight_Z
        if config.align.weight:
            weight_BFYXZ = weight_BFYXZ * self._object_weights(batch["layout"], level_BF)
        loss = flow.velocity_loss(velocity_BFYXZ, x0_BFYXZ, noise_BFYXZ, known_BF, weight_BFYXZ)
        metrics = {"velocity_loss": flow.velocity_loss(velocity_BFYXZ, x0_BFYXZ, noise_BFYXZ, known_BF)}
        if config.flow.seen_share or config.align.weight:
            metrics["weighted_loss"] = loss
        if config.align.weight:
            layout_BFYXC = batch["layout"].astype(jnp.float32)
            layout_BFSC = layout_BFYXC.reshape(B, F, -1, CHANNELS)
            (tokens_BFSD,) = kept["intermediates"]["tokens"]
            read_BFSC = self.aligner.apply({"params": params["aligner"]}, tokens_BFSD[:, :, : layout_BFSC.shape[2]])
            metrics["align_loss"] = jnp.mean((read_BFSC - layout_BFSC) ** 2)
            loss += config.align.weight * metrics["align_loss"]
        return loss, metrics

    def _object_weights(self, layout_BFYXC: jax.Array, level_BF: jax.Array) -> jax.Array:
        """Weights (B, F, Y, X, 1) of 1, and up to 1 + `config.align.objects` where an object is.

        Objects are a tenth of the frame, and their outlines are what is hard. The weight fades as the level rises:
        where noise still leaves open where an object goes, it would favour clips with objects in many places.
        """
        extra_BFYX = objects(layout_BFYXC) * (1 - level_BF)[:, :, None, None]
        weight_BFYX = 1 + self.config.align.objects * extra_BFYX
        return weight_BFYX.repeat(self.dit_config.patch[1], 2).repeat(self.dit_config.patch[2], 3)[..., None]

    def preview(self, params) -> tuple[dict[str, float], dict[str, Video]]:
        """Loss on held-out clips at fixed levels and noise, and samples of the configured prompts side by side."""
        if self._held_out is None:
            clips, available = _clips(self.config, held_out=True)
            clips = clips(0, min(_HELD_OUT_CLIPS, available))
            with hosts.alone():
                clips = list(_encode(self.codec_config, self.codec_params, clips, self.dit_config.patch))
            captions = [clip.pop("captions").split("\n")[0] for clip in clips]
            # Each clip several times, to see it at many levels.
            held_out = {name: np.stack([clip[name] for clip in clips * 4]) for name in clips[0]}
            self._held_out = held_out | {"ids": np.tile(tokenize(captions, self.text_config.length), (4, 1))}
        metrics = self._loss(params, self._held_out, jax.random.key(0))[1]
        return {f"held_out_{name}": float(value) for name, value in metrics.items()}, {"samples": self._samples(params)}

    def _samples(self, params) -> Video:
        """The configured prompts, made as `generate` makes videos, four to a row."""
        if self._generator is None:
            sharding = jax.tree.leaves(params)[0].sharding
            mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
            parts = {"text": params["text"], "dit": params["dit"], "codec": self.codec_params}
            config = self.config
            self._generator = Generator(self.model, parts, dtype=config.dtype, mesh=mesh, kernel=config.kernel)
        generator, prompts = self._generator, list(self.config.prompts)
        generator.params = {**generator.params, "text": params["text"], "dit": params["dit"]}
        request = make_request(self.model, prompts, seed=range(len(prompts)), policy=generator.policy)
        frames = np.stack([video.frames for video in generator.run(request, progress=False)])
        generator.params = {"codec": generator.params["codec"]}  # the next step donates the others
        frames = np.pad(frames, [(0, -len(frames) % 4), *[(0, 0)] * 4])
        rows = [np.concatenate(list(frames[i : i + 4]), axis=2) for i in range(0, len(frames), 4)]
        digests = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts]
        said = {**self.config.sampling, "prompts_sha256": digests}
        checks = {"prompt": {"policy_sha256": generator.policy.digest, "allowed": True}}
        claim = Claim(origin="model", config=said, checks=checks)
        return Video(np.concatenate(rows, axis=1), self.model.sampling.fps, claim)
