"""Live comparison with the public implementations on random sizes, where torch and diffusers are installed:

pip install -e ".[test,parity]" && pytest -m parity

Every day draws other sizes; PARITY_SEED=N, the number in a test's name, draws those again.
"""

import datetime
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from chunks import in_chunks
from scripts import script

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import jax  # noqa: E402
import safetensors.numpy  # noqa: E402
import torch  # noqa: E402
from diffusers import (  # noqa: E402
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402
from transformers import PreTrainedTokenizerFast, T5TokenizerFast, UMT5EncoderModel  # noqa: E402

import sora_jax  # noqa: E402
from sora_jax import sampler  # noqa: E402
from sora_jax.codec import Codec  # noqa: E402
from sora_jax.dit import DiT  # noqa: E402
from sora_jax.interop.configs import codec_config, dit_config, text_config, vision_config  # noqa: E402
from sora_jax.text import T5Encoder  # noqa: E402
from sora_jax.text.tokenizer import FileTokenizer  # noqa: E402
from sora_jax.vision import VisionEncoder, preprocess  # noqa: E402

make, published = script("tests/golden/make.py"), script("tests/golden/published.py")

TOLERANCE = 1e-5
LEVEL = 1 / (255 * 0.26)  # of 8 bits, as the image encoder sees it
KINDS = (*make.KINDS, "ti2v-unipc")  # the 5B with the solver of its published folder
SEED = int(os.environ.get("PARITY_SEED", datetime.date.today().toordinal()))


def difference(found, expected) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=KINDS, ids=[f"{kind}-{SEED}" for kind in KINDS])
def kind(request):
    return request.param


@pytest.fixture
def random(request):
    """Draws of its own for each test, whatever others draw."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.name.encode())])


@pytest.fixture(scope="module")
def folder_and_pipeline(kind, tmp_path_factory):
    """A pipeline of random sizes, and the folder it was saved to."""
    random = np.random.default_rng([SEED, KINDS.index(kind)])
    torch.manual_seed(SEED)

    def one_of(*options):
        return options[random.integers(len(options))]

    heads, head_width, layers = one_of(1, 2, 3), one_of(12, 24, 32), one_of(1, 2, 3)
    channels, text_width, feed_forward = one_of(4, 6, 12), one_of(16, 40), one_of(32, 80)
    multipliers, time = one_of(
        ((1, 2, 2), (True, True)), ((1, 2, 2), (False, True)), ((1, 2, 4, 4), (False, True, True))
    )
    family, options = kind.removesuffix("-unipc"), {}
    if family != "ti2v":  # its pipeline asks for patches of 2 by 2
        options["patch"] = (1, one_of(1, 2), one_of(1, 2))
    encoder, processor = None, None
    if kind in make.FROM_IMAGE:
        options["condition"] = 2 ** sum(time) + channels
    if kind in make.SEEING:
        options["image"] = one_of(20, 32)
        options["positions"] = 10 if kind == "flf" else 0
        encoder, processor = make.image_encoder(options["image"], 28, one_of(1, 2, 4), one_of(24, 48), one_of(2, 3, 4))

    def transformer():
        return make.transformer(channels, heads, head_width, feed_forward, layers, text_width, 64, **options)

    parts = {
        "tokenizer": make.tokenizer(),
        "text_encoder": make.text_encoder(text_width, one_of(1, 2, 3), one_of(8, 12), one_of(24, 40), one_of(1, 2, 3)),
        "vae": make.codec(family, channels, one_of(4, 8), 8, multipliers, time, one_of(1, 2)),
        "scheduler": make.scheduler("ti2v" if kind == "ti2v" else "t2v"),
        "transformer": transformer(),
        "transformer_2": transformer() if kind.endswith("a14b") else None,
        "boundary_ratio": 0.9 if kind.endswith("a14b") else None,
        "expand_timesteps": family == "ti2v",
    }
    if kind in make.FROM_IMAGE:
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


def noise_picture(random, height, width):
    """uint8 (H, W, 3); what is smooth would not tell how it is resized."""
    return random.integers(0, 256, (height, width, 3), np.uint8)


def dit_inputs(config, random, frames):
    """Latents, channels beside them, features of text and of images."""
    dit = config.dit
    sizes = (int(random.integers(1, 3)), frames, 2 * int(random.integers(1, 5)), 2 * int(random.integers(1, 5)))
    latents, condition = (
        random.normal(size=(*sizes, channels)).astype(np.float32)
        for channels in (dit.latent_channels, dit.condition_channels)
    )
    image = None
    if dit.image_width:
        image = random.normal(size=(sizes[0], dit.image_positions or 7, dit.image_width)).astype(np.float32)
    return latents, condition, random.normal(size=(sizes[0], 512, config.text.width)).astype(np.float32), image


def transformers_of(folder_and_pipeline):
    """Our name and their module of each transformer, and the folder that it was saved to."""
    folder, made = folder_and_pipeline
    yield "dit", made.transformer, folder / "transformer"
    if getattr(made, "transformer_2", None) is not None:
        yield "dit_low", made.transformer_2, folder / "transformer_2"


@pytest.mark.parametrize("frames", [1, 3])
def test_dit(folder_and_pipeline, generator, random, frames):
    latents, condition, text, image = dit_inputs(generator.config, random, frames)
    B, apply = len(latents), jax.jit(DiT(generator.config.dit).apply)
    both = np.concatenate([latents, condition], axis=-1)
    for levels in (random.integers(0, 1000, (B, frames)), random.integers(0, 1000, (B, 1)).repeat(frames, 1)):
        for part, module, _ in transformers_of(folder_and_pipeline):
            expected = make.run_dit(module, both, levels, text, image)
            params = {"params": generator.params[part]}
            found = apply(params, latents, np.float32(levels / 1000), text, condition, image)
            assert difference(found, expected) < TOLERANCE


def test_bfloat16(folder_and_pipeline, generator, random):
    """Ours in bfloat16 is at most twice as far from ours in float32 as theirs is from theirs."""
    half = sora_jax.load(folder_and_pipeline[0], "bfloat16")
    latents, condition, text, image = dit_inputs(generator.config, random, 3)
    both, levels = np.concatenate([latents, condition], axis=-1), random.integers(0, 1000, (len(latents), 1))
    levels = levels.repeat(3, 1)
    for part, module, path in transformers_of(folder_and_pipeline):
        theirs = WanTransformer3DModel.from_pretrained(path, torch_dtype=torch.bfloat16)
        error = difference(*(make.run_dit(one, both, levels, text, image) for one in (theirs, module)))
        ours = [
            jax.jit(DiT(one.config.dit, one.dtype).apply)(
                {"params": one.params[part]}, latents, np.float32(levels / 1000), text, condition, image
            )
            for one in (half, generator)
        ]
        assert 1e-4 < difference(*ours) < 2 * error
    ids = random.integers(3, 32, (2, 512))
    theirs = UMT5EncoderModel.from_pretrained(folder_and_pipeline[0] / "text_encoder", dtype=torch.bfloat16)
    error = difference(*(make.run_text(one, ids) for one in (theirs, folder_and_pipeline[1].text_encoder)))
    ours = [
        T5Encoder(one.config.text, one.dtype).apply({"params": one.params["text"]}, ids) for one in (half, generator)
    ]
    assert 1e-4 < difference(*ours) < 2 * error


def test_text_encoder(folder_and_pipeline, generator, random):
    lengths = random.integers(1, 512, (2, 1))
    ids = np.where(np.arange(512) < lengths, random.integers(3, 32, (2, 512)), 0)
    expected = make.run_text(folder_and_pipeline[1].text_encoder, ids)
    found = T5Encoder(generator.config.text).apply({"params": generator.params["text"]}, ids)
    assert difference(found, expected) < TOLERANCE


def test_features_of_prompts(folder_and_pipeline, generator):
    """Of each one as long as theirs are, whatever special tokens it holds."""
    prompts = ["a red ball", "", "a red <pad> ball", "<pad>", "wall <pad>", "a </s> ball <unk> <pad><pad> wall"]
    prompts += ["a <extra_id_0> ball", "&lt;pad&gt; ball", "<pad> " * 600]
    with torch.no_grad():
        expected, _ = folder_and_pipeline[1].encode_prompt(prompts, None, False, max_sequence_length=512)
    ids = generator.tokenizer(prompts, 512)
    found = T5Encoder(generator.config.text).apply({"params": generator.params["text"]}, ids)
    np.testing.assert_array_equal(found.any(axis=-1), expected.any(dim=-1))
    assert difference(found, expected) < TOLERANCE


def test_image_encoder(folder_and_pipeline, generator, random, kind):
    if kind not in make.SEEING:
        assert generator.config.vision is None
        return
    vision = generator.config.vision
    for size in random.integers(20, 90, (4, 2)):
        picture = noise_picture(random, *size)
        features, seen = make.run_image_encoder(folder_and_pipeline[1], picture)
        apart = np.abs(preprocess(picture, vision.image_size) - seen[0])
        assert apart.max() < 1.5 * LEVEL and (apart > 0.5 * LEVEL).mean() < 0.02
        found = VisionEncoder(vision).apply({"params": generator.params["vision"]}, seen)
        assert difference(found, features) < TOLERANCE


def test_tokenizer(random, tmp_path):
    """Pieces as a published `tokenizer.json` has them, and the cleaning of prompts before."""
    pieces = [chr(code) for code in [*range(33, 127), *range(0xE0, 0x100), 0x2581, 0x4E2D, 0x56FD]]
    pieces += ["\u2581a", "\u2581the", "\u2581re", "ed", "ball", "\u2581ball", "\u2581caf", "ing", "oll"]
    scores = [(piece, -float(random.uniform(2, 12))) for piece in pieces]
    unigram = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scores], unk_id=2))
    unigram.normalizer = normalizers.Strip(left=False)  # before special tokens too
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special["additional_special_tokens"] = ["<extra_id_0>", "<extra_id_1>"]
    PreTrainedTokenizerFast(tokenizer_object=unigram, **special).save_pretrained(tmp_path)
    prompts = ["", "a red ball", "  two\tspaces \n", "the café", "the cafÃ© rolling", "&amp;amp; a &lt;ball&gt;"]
    prompts += ["中国 \u200b☃", "“quoted” — dash", "ﬁne ball", "a " * 40]
    prompts += ["a <pad> ball", "<pad>", "the ball<pad> <pad>", "&lt;pad&gt; < pad > <PAD>", "<pad> " * 40]
    prompts += ["</s> ball </s>", "a <unk>ball", "<extra_id_0> ball<extra_id_1>", "<extra_id_9>"]
    prompts += ["".join(chr(code) for code in random.integers(32, 0x3000, 12)) for _ in range(50)]
    found = FileTokenizer(tmp_path / "tokenizer.json", 10**6)(prompts, 24)
    for theirs in (PreTrainedTokenizerFast, T5TokenizerFast):  # Wan's folders name the latter
        options = {"padding": "max_length", "max_length": 24, "truncation": True, "return_tensors": "np"}
        read = theirs.from_pretrained(tmp_path, extra_ids=2)
        expected = read([prompt_clean(prompt) for prompt in prompts], **options)["input_ids"]
        np.testing.assert_array_equal(found, expected)


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
    latents = (mean - np.array(codec.config.latents_mean)) / np.array(codec.config.latents_std)
    pieces = np.split(video, [1 + time * chunk for chunk in range(chunks)], axis=1) if chunks else [video]
    streamed = in_chunks(codec, params["params"], pieces, "encode")
    assert difference(streamed, latents) < TOLERANCE
    pieces = np.split(latents.astype(np.float32), range(1, 1 + chunks), axis=1)
    streamed = in_chunks(codec, params["params"], pieces, "decode")
    assert difference(streamed, decoded) < TOLERANCE


@pytest.mark.parametrize("from_image", [False, True])
def test_pipeline(folder_and_pipeline, generator, kind, random, from_image):
    made = folder_and_pipeline[1]
    if from_image and not kind.startswith("ti2v"):
        pytest.skip("the 5B alone makes videos with an image and without")
    if from_image:
        parts = {**made.components, "image_encoder": None, "image_processor": None}
        made = WanImageToVideoPipeline(**parts, expand_timesteps=True)
        made.set_progress_bar_config(disable=True)
    config = generator.config
    size = tuple(2 * config.codec.stride_space * int(random.integers(1, 4)) for _ in range(2))
    size = tuple(-(-side // 16) * 16 for side in size)  # the public pipeline asks for it
    frames, steps = 1 + config.codec.stride_time * int(random.integers(0, 3)), int(random.integers(1, 8))
    if from_image or kind in make.FROM_IMAGE:
        frames = 1 + 4 * int(random.integers(2, 4))  # the public codec reads four at a time, whatever its stride
    noise = random.normal(size=(1, *config.codec.latent_shape(frames, *size))).astype(np.float32)
    guidance = float(random.uniform(1.5, 6))
    low = float(random.uniform(1.5, 6)) if kind.endswith("a14b") else None
    first, last = (noise_picture(random, 70, 50) for _ in range(2))
    first, last = (
        first if from_image or kind in make.FROM_IMAGE else None,
        last if kind in ("flf", "i2v-a14b") else None,
    )
    prompt, negative = "a red ball, behind a wall", "cube &amp; wall"
    expected = make.run_pipeline(made, prompt, negative, noise, size, frames, steps, guidance, low, first, last)
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
    assert -10 * np.log10(np.mean((video.frames / 255.0 - expected) ** 2)) > 58  # 58.9: rounding to 8 bits


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


@pytest.mark.parametrize("model", published.MODELS)
def test_published_sizes(model, tmp_path):
    """What `test_published.py` compares the presets with is what the classes are, whose configs are read alike."""
    made, stored = published.module(model), json.loads(published.FILE.read_text())[model]
    assert {"class": type(made).__name__, **published.tensors(made)} == {
        name: value for name, value in stored.items() if name != "config"
    }
    read = {
        "UMT5EncoderModel": text_config,
        "CLIPVisionModel": vision_config,
        "AutoencoderKLWan": codec_config,
        "WanTransformer3DModel": dit_config,
    }[stored["class"]]
    for number, config in enumerate((published.config(made), stored["config"])):
        (tmp_path / f"{number}.json").write_text(json.dumps(config))
    assert read(tmp_path / "0.json") == read(tmp_path / "1.json")


# Layers that adaptations change: the published name, and Wan's own.
LAYERS = {
    f"blocks.{layer}.{published}": f"blocks.{layer}.{wan}"
    for layer in range(3)
    for published, wan in (
        *((f"attn1.to_{x}", f"self_attn.{x}") for x in "qkv"),
        *((f"attn2.to_{x}", f"cross_attn.{x}") for x in "qkv"),
        *((f"attn2.add_{x}_proj", f"cross_attn.{x}_img") for x in "kv"),
        *((f"attn{n}.to_out.0", f"{kind}_attn.o") for n, kind in ((1, "self"), (2, "cross"))),
        *((f"ffn.net.{part}", f"ffn.{part[0]}") for part in ("0.proj", "2")),
    )
}
LAYERS |= {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
LAYOUTS = {
    "peft": ("transformer.{published}", "lora_A", "lora_B"),
    "wan": ("diffusion_model.{wan}", "lora_down", "lora_up"),
    "wan-AB": ("diffusion_model.{wan}", "lora_A", "lora_B"),
    "musubi": ("lora_unet_{flat}", "lora_down", "lora_up"),
}


def small(random, shape):
    return (0.3 * random.normal(size=shape)).astype(np.float32)


def adaptation(layout, random, image=False, bias=False):
    """Tensors of several ranks for all layers that diffusers reads in a layout, with an alpha where it reads one."""
    prefix, down, up = LAYOUTS[layout]
    shapes, found = dict(make.transformer(4, image=20).named_parameters()), {}
    for number, (published, wan) in enumerate(LAYERS.items()):
        in_blocks = published.startswith("blocks")
        if ("add_" in published or "image_" in published) > image or (layout == "musubi" and not in_blocks):
            continue
        name = prefix.format(published=published, wan=wan, flat=wan.replace(".", "_"))
        (rows, columns), rank = shapes[f"{published}.weight"].shape, 2 + number % 3
        found[f"{name}.{down}.weight"] = small(random, (rank, columns))
        found[f"{name}.{up}.weight"] = small(random, (rows, rank))
        if up == "lora_up" and in_blocks:
            found[f"{name}.alpha"] = np.array(1 + number % 4, np.float32)
        if bias and layout != "musubi":
            found[f"{name}.diff_b" if "{wan}" in prefix else f"{name}.lora_B.bias"] = small(random, rows)
    return found


@pytest.fixture
def compare(tmp_path):
    """Compares our parameters, with files of adaptations, with what diffusers makes of them by fusing the same files.

    `parts` has the scales of each transformer's files by their numbers, `also` what we alone add.
    """
    pytest.importorskip("peft")
    torch.manual_seed(0)

    def load(made, part, path, own_prefix):
        source = {"weight_name": path.name, "adapter_name": path.stem}
        if own_prefix:  # has to be asked for
            getattr(made, part).load_lora_adapter(path.parent, prefix=part, **source)
        else:
            made.load_lora_weights(path.parent, load_into_transformer_2=part == "transformer_2", **source)

    def run(kind, styles, parts, also=None, own_prefix=False, **written):
        made = make.pipeline(kind)
        made.save_pretrained(tmp_path / "plain")
        paths = [tmp_path / f"style{number}.safetensors" for number in range(len(styles))]
        for path, tensors in zip(paths, styles, strict=True):
            safetensors.numpy.save_file(tensors, path, **written)
        scales = {part: {paths[number]: scale for number, scale in parts[part].items()} for part in parts}
        for part in parts:
            for path in scales[part]:
                load(made, part, path, own_prefix)
            getattr(made, part).set_adapters([path.stem for path in scales[part]], list(scales[part].values()))
        made.fuse_lora(components=list(parts))
        made.unload_lora_weights()
        for name, added in (also or {}).items():
            made.transformer.get_parameter(name).data += torch.tensor(added)
        made.save_pretrained(tmp_path / "fused")
        expected, plain = (sora_jax.load(tmp_path / name).params for name in ("fused", "plain"))
        files = {"lora": scales.get("transformer"), "lora_low": scales.get("transformer_2")}
        found = sora_jax.load(tmp_path / "plain", **files).params
        apart = jax.tree.map(difference, found, expected)
        assert max(jax.tree.leaves(apart)) < TOLERANCE, apart
        for ours, part in (("dit", "transformer"), ("dit_low", "transformer_2")):
            changes = jax.tree.leaves(jax.tree.map(difference, plain.get(ours), found.get(ours)))
            assert max(changes, default=0) > 0.1 if part in parts else not any(changes)

    return run


@pytest.mark.parametrize("kind", ["t2v", "i2v", "i2v-a14b"])
@pytest.mark.parametrize("layout", ["peft", "wan", "wan-AB", "musubi"])
def test_adaptations(kind, layout, random, compare):
    """Two at once, one of them for models that see images: "i2v" is one, "i2v-a14b" does without what is for them."""
    one = adaptation(layout, random, image=kind in make.FROM_IMAGE, bias=True)
    compare(kind, [one, adaptation(layout, random)], {"transformer": {0: 0.7, 1: -0.4}})


@pytest.mark.parametrize("layout", ["peft", "wan", "musubi"])
def test_adaptations_of_the_second_transformer(layout, random, compare):
    files = [adaptation(layout, random) for _ in range(2)]
    compare("a14b", files, {"transformer": {0: 1.0}, "transformer_2": {1: 0.6, 0: 0.3}})


@pytest.mark.parametrize("parts", [["transformer", "transformer_2"], ["transformer_2"]])
def test_adaptations_of_both_transformers_in_a_file(parts, random, compare):
    both = {f"{part}.{name.partition('.')[2]}": x for part in parts for name, x in adaptation("peft", random).items()}
    compare("a14b", [both], {part: {0: 0.6} for part in parts}, own_prefix=True)


@pytest.mark.parametrize("by_root", [False, True])
def test_adaptations_with_alpha_in_the_metadata(by_root, random, compare):
    tensors = adaptation("peft", random, bias=True)
    ranks = {name[12:-14]: x.shape[1] for name, x in tensors.items() if name.endswith("lora_B.weight")}
    told = {"r": 4, "lora_alpha": 5, "rank_pattern": {f"^{name}": rank for name, rank in ranks.items()}}
    told |= {"target_modules": list(ranks), "use_rslora": by_root, "lora_bias": True}
    told["alpha_pattern"] = {"^blocks.0.attn1.to_q": 3, "attn1.to_q": 7, "to_q": 2, "net.2": 1.5, "q": 9}
    told = json.dumps({f"transformer.{name}": value for name, value in told.items()})
    compare("t2v", [tensors], {"transformer": {0: 0.7}}, metadata={"lora_adapter_metadata": told})


def test_adaptations_with_whole_differences(random, compare):
    """Those of biases in the blocks and of the last layer are added by both, the others by us alone."""
    tensors = adaptation("wan", random, image=True)
    alone = ("head.head", "time_projection.1", "img_emb.proj.1")  # no matrices beside them
    tensors = {name: x for name, x in tensors.items() if not any(layer in name for layer in alone)}
    left_out = {
        "blocks.0.self_attn.norm_k.diff": "blocks.0.attn1.norm_k.weight",
        "blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.2.cross_attn.norm_k_img.diff": "blocks.2.attn2.norm_added_k.weight",
        "img_emb.proj.0.diff_b": "condition_embedder.image_embedder.norm1.bias",
        "blocks.1.diff_m": "blocks.1.scale_shift_table",
        "head.modulation.diff": "scale_shift_table",
        "blocks.2.self_attn.q.diff": "blocks.2.attn1.to_q.weight",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
        "img_emb.proj.1.diff_b": "condition_embedder.image_embedder.ff.net.0.proj.bias",
    }
    added = {"blocks.1.self_attn.k.diff_b": "blocks.1.attn1.to_k.bias"}
    added |= {"head.head.diff": "proj_out.weight", "head.head.diff_b": "proj_out.bias"}
    shapes = {name: x.shape for name, x in make.pipeline("i2v").transformer.named_parameters()}
    whole = {name: small(random, shapes[published]) for name, published in (left_out | added).items()}
    also = {published: np.float32(0.7) * whole[name] for name, published in left_out.items()}
    tensors |= {f"diffusion_model.{name}": x for name, x in whole.items()}
    compare("i2v", [tensors], {"transformer": {0: 0.7}}, also)


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
