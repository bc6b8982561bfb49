"""Live comparison with the public implementations on random sizes, where torch and diffusers are installed:

pip install -e ".[test,parity]" && pytest -m parity
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import jax  # noqa: E402
import safetensors.numpy  # noqa: E402
import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel  # noqa: E402

import sora_jax  # noqa: E402
from sora_jax import sampler  # noqa: E402
from sora_jax.codec import Codec  # noqa: E402
from sora_jax.dit import DiT  # noqa: E402
from sora_jax.interop.diffusers import (  # noqa: E402
    _flatten,
    _sources,
    _unneeded,
    codec_config,
    dit_config,
    text_config,
    vision_config,
)
from sora_jax.interop.presets import CODEC_2_2, PRESETS  # noqa: E402
from sora_jax.model_folder import abstract_params  # noqa: E402
from sora_jax.text import T5Encoder  # noqa: E402

_spec = importlib.util.spec_from_file_location("golden_make", Path(__file__).parents[1] / "golden" / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

TOLERANCE = 1e-5
KINDS = ("t2v", "ti2v", "a14b", "i2v", "flf", "i2v-a14b")  # as in make.py, and Wan 2.2's image to video
FROM_IMAGE = ("i2v", "flf", "i2v-a14b")


def difference(found, expected) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def random(kind):
    seed = KINDS.index(kind)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def folder_and_pipeline(random, kind, tmp_path_factory):
    """A pipeline of random sizes, and the folder it was saved to."""
    heads, head_width = int(random.integers(1, 4)), int(random.choice([12, 24, 32]))
    channels, text_width = int(random.choice([4, 6, 12])), int(random.choice([16, 40]))
    layers = int(random.integers(1, 4))

    time = ((True, True), (False, True))[int(random.integers(2))]
    feed_forward, options = int(random.choice([32, 80])), {}
    if kind != "ti2v":  # its pipeline asks for patches of 2 by 2
        options["patch"] = (1, int(random.integers(1, 3)), int(random.integers(1, 3)))
    encoder, processor = None, None
    if kind in FROM_IMAGE:
        options["condition"] = 2 ** sum(time) + channels
    if kind in ("i2v", "flf"):
        options["image"] = int(random.choice([20, 32]))
        options["positions"] = 10 if kind == "flf" else 0
        encoder, processor = make.image_encoder(options["image"])

    def transformer():
        return make.transformer(channels, heads, head_width, feed_forward, layers, text_width, 64, **options)

    parts = {
        "tokenizer": make.tokenizer(),
        "text_encoder": make.text_encoder(text_width, int(random.integers(1, 4)), 8, 24, int(random.integers(1, 4))),
        "vae": make.codec(kind, channels, int(random.choice([4, 8])), 8, (1, 2, 2), time, int(random.integers(1, 3))),
        "scheduler": make.scheduler(kind),
        "transformer": transformer(),
        "transformer_2": transformer() if kind.endswith("a14b") else None,
        "boundary_ratio": 0.9 if kind.endswith("a14b") else None,
        "expand_timesteps": kind == "ti2v",
    }
    if kind in FROM_IMAGE:
        made = WanImageToVideoPipeline(**parts, image_encoder=encoder, image_processor=processor)
    else:
        made = WanPipeline(**parts)
    made.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("parity") / kind
    made.save_pretrained(folder)
    return folder, made


@pytest.fixture(scope="module")
def generator(folder_and_pipeline):
    return sora_jax.load(folder_and_pipeline[0])


@pytest.mark.parametrize("frames", [1, 3])
def test_dit(folder_and_pipeline, generator, random, frames):
    sizes = (int(random.integers(1, 3)), frames, 2 * int(random.integers(1, 5)), 2 * int(random.integers(1, 5)))
    dit = generator.config.dit
    latents, condition = (
        random.normal(size=(*sizes, channels)).astype(np.float32)
        for channels in (dit.latent_channels, dit.condition_channels)
    )
    image = None
    if dit.image_width:
        image = random.normal(size=(sizes[0], dit.image_positions or 7, dit.image_width)).astype(np.float32)
    text = random.normal(size=(sizes[0], 512, generator.config.text.width)).astype(np.float32)
    for levels in (random.integers(0, 1000, sizes[:2]), random.integers(0, 1000, (sizes[0], 1)).repeat(frames, 1)):
        both = np.concatenate([latents, condition], axis=-1)
        expected = make.run_dit(folder_and_pipeline[1].transformer, both, levels, text, image)
        apply, params = jax.jit(DiT(dit).apply), {"params": generator.params["dit"]}
        found = apply(params, latents, np.float32(levels / 1000), text, condition, image)
        assert difference(found, expected) < TOLERANCE


def test_text_encoder(folder_and_pipeline, generator, random):
    lengths = random.integers(1, 512, (2, 1))
    ids = np.where(np.arange(512) < lengths, random.integers(3, 32, (2, 512)), 0)
    expected = make.run_text(folder_and_pipeline[1].text_encoder, ids)
    found = T5Encoder(generator.config.text).apply({"params": generator.params["text"]}, ids)
    assert difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("chunks", [0, 2])
def test_codec(folder_and_pipeline, generator, random, chunks):
    stride, time = generator.config.codec.stride_space, generator.config.codec.stride_time
    sides = [stride * int(random.integers(1, 5)) for _ in range(2)]
    video = random.uniform(-1, 1, (1, 1 + time * chunks, *sides, 3)).astype(np.float32)
    mean, log_variance, decoded = make.run_codec(folder_and_pipeline[1].vae, video)
    codec, params = Codec(generator.config.codec), {"params": generator.params["codec"]}
    found = codec.apply(params, video, method="posterior")
    assert difference(found[0], mean) < TOLERANCE and difference(found[1], log_variance) < TOLERANCE
    rebuilt = codec.apply(params, mean, method="reconstruct")
    assert difference(np.clip(rebuilt, -1, 1), decoded) < TOLERANCE


def test_pipeline(folder_and_pipeline, generator, kind, random):
    config = generator.config
    size = tuple(2 * config.codec.stride_space * int(random.integers(1, 4)) for _ in range(2))
    size = tuple(-(-side // 16) * 16 for side in size)  # the public pipeline asks for it
    frames, steps = 1 + config.codec.stride_time * int(random.integers(0, 3)), int(random.integers(1, 8))
    if kind in FROM_IMAGE:
        frames = 1 + 4 * int(random.integers(2, 4))  # the public codec reads four at a time, whatever its stride
    noise = random.normal(size=(1, *config.codec.latent_shape(frames, *size))).astype(np.float32)
    guidance = float(random.uniform(1.5, 6))
    low = float(random.uniform(1.5, 6)) if kind.endswith("a14b") else None
    first, last = make.pictures(random, 70, 50)
    first, last = first if kind in FROM_IMAGE else None, last if kind == "flf" else None
    prompt, negative = "a red ball, behind a wall", "cube &amp; wall"
    expected = make.run_pipeline(
        folder_and_pipeline[1], prompt, negative, noise, size, frames, steps, guidance, low, first, last
    )
    video = generator.generate(
        prompt,
        negative_prompt=negative,
        noise=noise,
        size=size,
        frames=frames,
        steps=steps,
        guidance=guidance,
        guidance_low=low,
        image=first,
        last_image=last,
        progress=False,
    )
    assert -10 * np.log10(np.mean((video.frames / 255.0 - expected) ** 2)) > 45


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_solvers(solver, steps, shift):
    start = np.random.default_rng(0).normal(size=(1, 2, 2, 2, 2)).astype(np.float32)
    if solver == "unipc":
        theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    else:
        theirs = make.FlowMatchEulerDiscreteScheduler(shift=shift)
    expected = make.run_scheduler(theirs, start, lambda x, t: torch.sin(3 * x) + t, steps)
    schedule = sampler.noise_schedule(steps, shift, f"wan-{solver}")
    np.testing.assert_allclose(schedule.told * 1000, theirs.timesteps.numpy(), rtol=1e-6)
    np.testing.assert_allclose(schedule.levels, theirs.sigmas.numpy(), rtol=1e-6)

    def velocity(x, level_BF):
        return jax.numpy.sin(3 * x) + level_BF[:, :, None, None, None]

    assert difference(sampler.sample(velocity, start, schedule, solver), expected) < TOLERANCE


def reference(part, preset):
    """The public class with a preset's published sizes, without memory for its weights."""
    with torch.device("meta"):
        if part == "text":
            return UMT5EncoderModel(
                UMT5Config(
                    vocab_size=256384,
                    d_model=4096,
                    d_kv=64,
                    d_ff=10240,
                    num_layers=24,
                    num_heads=64,
                    feed_forward_proj="gated-gelu",
                )
            )
        if part == "codec":
            if preset.codec != CODEC_2_2:
                return AutoencoderKLWan()
            return AutoencoderKLWan(
                base_dim=160,
                decoder_base_dim=256,
                z_dim=48,
                is_residual=True,
                in_channels=12,
                out_channels=12,
                patch_size=2,
                latents_mean=list(CODEC_2_2.latents_mean),
                latents_std=list(CODEC_2_2.latents_std),
            )
        if part == "vision":
            sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
            return CLIPVisionModel(
                CLIPVisionConfig(**sizes, num_attention_heads=16, image_size=224, patch_size=14, hidden_act="gelu")
            )
        dit = preset.dit
        return WanTransformer3DModel(
            num_attention_heads=dit.heads,
            attention_head_dim=dit.head_width,
            in_channels=dit.latent_channels + dit.condition_channels,
            out_channels=dit.latent_channels,
            ffn_dim=dit.feed_forward,
            num_layers=dit.layers,
            image_dim=dit.image_width or None,
            added_kv_proj_dim=dit.width if dit.image_width else None,
            pos_embed_seq_len=dit.image_positions or None,
        )


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes(name, tmp_path):
    """Every name, shape and parameter of the published classes, and nothing else."""
    preset = PRESETS[name]
    abstract = abstract_params(preset)
    for part in preset.parts:
        module = reference(part, preset)
        theirs = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        theirs = {key: shape for key, shape in theirs.items() if not _unneeded(preset, part)(key)}
        ours = _flatten(abstract[part])
        used = []
        for key, source in _sources(preset, part, ours).items():
            for tensor in source.names:
                shape = jax.eval_shape(source.convert, jax.ShapeDtypeStruct(theirs[tensor], "float32")).shape
                assert shape == (ours[key].shape[1:] if source.stacked else ours[key].shape)
                used.append(tensor)
        assert sorted(used) == sorted(theirs)
        assert sum(leaf.size for leaf in ours.values()) == sum(int(np.prod(shape)) for shape in theirs.values())
        save = module.config.save_pretrained if part in ("text", "vision") else module.save_config
        save(tmp_path / part)
        if part != "dit_low":
            read = {"text": text_config, "codec": codec_config, "dit": dit_config, "vision": vision_config}[part]
            assert read(tmp_path / part / "config.json") == getattr(preset, part)


@pytest.mark.parametrize("layout", ["peft", "wan"])
def test_adaptations(layout, tmp_path):
    """A pipeline with a loaded LoRA, at a scale, and ours with it merged."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    made = make.pipeline("t2v")
    made.save_pretrained(tmp_path / "model")
    random, found = np.random.default_rng(0), {}
    modules = {f"blocks.{i}.attn1.to_{x}": f"blocks.{i}.self_attn.{x}" for i in range(3) for x in "qkv"}
    modules |= {f"blocks.{i}.ffn.net.2": f"blocks.{i}.ffn.2" for i in range(3)}
    for module, wan in modules.items():
        rows, columns = made.transformer.get_submodule(module).weight.shape
        down, up = (random.normal(size=s).astype(np.float32) for s in ((4, columns), (rows, 4)))
        prefix = f"transformer.{module}" if layout == "peft" else f"diffusion_model.{wan}"
        names = ("lora_A", "lora_B") if layout == "peft" else ("lora_down", "lora_up")
        found |= {f"{prefix}.{names[0]}.weight": 0.2 * down, f"{prefix}.{names[1]}.weight": 0.2 * up}
        if layout == "wan":
            found[f"{prefix}.alpha"] = np.array(2.0, np.float32)
    safetensors.numpy.save_file(found, tmp_path / "style.safetensors")
    made.load_lora_weights(str(tmp_path), weight_name="style.safetensors", adapter_name="style")
    made.set_adapters(["style"], [0.7])
    latents, levels = random.normal(size=(1, 3, 4, 4, 4)).astype(np.float32), np.full((1, 3), 500)
    text = random.normal(size=(1, 512, 24)).astype(np.float32)
    expected = make.run_dit(made.transformer, latents, levels, text)
    generator = sora_jax.load(tmp_path / "model", lora={tmp_path / "style.safetensors": 0.7})
    apply = DiT(generator.config.dit).apply
    found = apply({"params": generator.params["dit"]}, latents, np.float32(levels / 1000), text)
    assert difference(found, expected) < TOLERANCE
    plain = apply({"params": sora_jax.load(tmp_path / "model").params["dit"]}, latents, np.float32(levels / 1000), text)
    assert difference(plain, expected) > 0.01


@pytest.mark.parametrize(("dtype", "most"), [("float32", TOLERANCE), ("bfloat16", 0.03)])
def test_the_benchmark_measures_the_same_thing_on_both_sides(dtype, most, tmp_path):
    script, out = Path(__file__).parents[2] / "experiments" / "benchmark_vs_diffusers.py", tmp_path / "rows.json"
    command = [sys.executable, script, "--quick", "--repeats", "1", "--dtype", dtype, "--json", out]
    subprocess.run(command, check=True, timeout=300)
    results = json.loads(out.read_text())
    for part in ("text", "dit", "encode", "decode"):
        assert results["parts"][part]["apart"] < most, part
    assert 20 * np.log10(1 / results["parts"]["whole"]["apart"]) > 30
    assert results["dit_operations"] > 1e6 and min(results["peak_bytes"].values()) > 1e8
