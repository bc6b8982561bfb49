"""Published model folders load, and give what the public implementations gave (`tests/golden/make.py`)."""

import dataclasses
import json
import shutil
from pathlib import Path

import golden_pipelines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from chunks import in_chunks
from golden_pipelines import GOLDEN, KINDS

import sora_jax
from sora_jax import generate, media, models, sampler
from sora_jax.cli import main
from sora_jax.codec import Codec
from sora_jax.dit import DiT
from sora_jax.errors import InputError
from sora_jax.request import make_request
from sora_jax.tensors import TensorFile
from sora_jax.text import T5Encoder
from sora_jax.video import Video
from sora_jax.vision import VisionEncoder, preprocess

TOLERANCE = 1e-5  # of the norm, in float32


def difference(found, expected) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def generator(kind):
    return sora_jax.load(GOLDEN / kind)


@pytest.fixture(scope="module")
def expected(kind):
    return golden_pipelines.expected(kind)


def test_dit(generator, expected, kind):
    inputs = [expected["dit_latents"], np.float32(expected["dit_levels"] / 1000), expected["dit_text"]]
    inputs += [expected["dit_condition"], expected["dit_image"] if "dit_image" in expected else None]
    apply = jax.jit(DiT(generator.config.dit).apply)
    for part in ("dit", "dit_low") if kind.endswith("a14b") else ("dit",):
        assert difference(apply({"params": generator.params[part]}, *inputs), expected[part]) < TOLERANCE


def test_text_encoder(generator, expected):
    features = T5Encoder(generator.config.text).apply({"params": generator.params["text"]}, expected["text_ids"])
    assert difference(features, expected["text"]) < TOLERANCE


def test_codec_whole_and_streaming(generator, expected):
    codec, params = Codec(generator.config.codec), {"params": generator.params["codec"]}
    video = jnp.asarray(expected["video"])
    mean, log_variance = jax.jit(lambda p, v: codec.apply(p, v, method="posterior"))(params, video)
    assert difference(mean, expected["mean"]) < TOLERANCE
    assert difference(log_variance, expected["log_variance"]) < TOLERANCE
    latents = (mean - jnp.array(codec.config.latents_mean)) / jnp.array(codec.config.latents_std)
    decoded = jax.jit(lambda p, z: codec.apply(p, z, method="decode"))(params, latents)
    assert difference(decoded, expected["decoded"]) < TOLERANCE
    chunks = [video[:, :1], video[:, 1:5], video[:, 5:]]
    streamed = in_chunks(codec, generator.params["codec"], chunks, "encode")
    assert difference(streamed, latents) < TOLERANCE
    chunks = [latents[:, :1], latents[:, 1:2], latents[:, 2:]]
    streamed = in_chunks(codec, generator.params["codec"], chunks, "decode")
    assert difference(streamed, expected["decoded"]) < TOLERANCE


def test_solver_and_schedule(generator, expected):
    sampling = generator.config.sampling
    schedule = sampler.noise_schedule(20, sampling.shift, sampling.schedule)
    end = sampler.sample(
        lambda x, level_BF: jnp.sin(3 * x) + level_BF[:, :, None, None, None],
        expected["solver_start"],
        schedule,
        sampling.solver,
    )
    assert difference(end, expected["solver"]) < TOLERANCE


BEST = 10 * np.log10(12 * 255.0**2)  # dB: what rounding to 8 bits leaves, uniform errors of up to half a level


def quality(generator, noise, expected, **options) -> float:
    """PSNR in dB of the frames of the pipeline."""
    assert expected.std() > 0.05  # there is something to compare
    frames = golden_pipelines.run(generator, noise, **options)
    return -10 * np.log10(np.mean((frames / 255.0 - expected) ** 2))


@pytest.mark.parametrize("kind", ["a14b"], indirect=True)
def test_one_guidance_is_that_of_both_transformers(kind, generator, expected):
    request = make_request(generator.config, "a ball", guidance=5.0)
    assert request.guidance == request.guidance_low == 5.0
    usual = make_request(generator.config, "a ball")
    assert (usual.guidance, usual.guidance_low) == (4.0, 3.0)


def test_pipeline(generator, expected, kind):
    options = golden_pipelines.options(kind, expected)
    assert quality(generator, expected["noise"], expected["frames"], **options) > BEST - 0.5


def test_image_encoder(generator, expected):
    if "features" not in expected:
        pytest.skip("this model has none")
    vision = generator.config.vision
    features = VisionEncoder(vision).apply({"params": generator.params["vision"]}, expected["seen"])
    assert difference(features, expected["features"]) < TOLERANCE
    assert difference(preprocess(expected["image"], vision.image_size), expected["seen"][0]) < TOLERANCE


def test_images_where_a_model_takes_them_and_where_not(generator, expected, kind, tmp_path):
    if kind == "ti2v":
        frames = expected["frames_from_image"]
        assert quality(generator, expected["noise"], frames, image=expected["image"]) > BEST - 0.5
        Video(expected["image"][None]).save(tmp_path / "first.png")
        assert quality(generator, expected["noise"], frames, image=tmp_path / "first.png") > BEST - 0.5
        assert quality(generator, expected["noise"], expected["frames"]) > BEST - 0.5  # and none is needed
    message = {
        "i2v": "makes a video from an image: give --image FILE",
        "flf": "makes a video from an image: give --image FILE",
        "i2v-a14b": "makes a video from an image: give --image FILE",
        "ti2v": None,
    }.get(kind, "takes no image")
    if message:
        given = {} if "image" in expected else {"image": expected["noise"]}
        with pytest.raises(InputError, match=message):
            generator.generate("a red ball", frames=9, **given)
    if kind == "flf":
        with pytest.raises(InputError, match="give --last-image FILE too"):
            generator.generate("a red ball", frames=9, image=expected["image"])
    if kind == "i2v":
        with pytest.raises(InputError, match=r"image must be uint8 \[H, W, 3\]"):
            generator.generate("a red ball", frames=9, image=expected["noise"])


@pytest.mark.parametrize("kind", ["ti2v"], indirect=True)
def test_the_solver_that_the_folder_names(kind, expected, tmp_path):
    """The 5B is published with UniPC; the folder here has Euler steps."""
    folder = Path(shutil.copytree(GOLDEN / kind, tmp_path / "model"))
    shutil.copy(GOLDEN / "t2v" / "scheduler" / "scheduler_config.json", folder / "scheduler")
    index = folder / "model_index.json"
    named = {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **named}))
    generator = sora_jax.load(folder)
    assert quality(generator, expected["noise"], expected["frames_unipc"]) > BEST - 0.5
    assert quality(generator, expected["noise"], expected["frames"]) < BEST - 10


@pytest.mark.parametrize("kind", ["flf"], indirect=True)
def test_images_from_the_command_line(kind, generator, expected, tmp_path, monkeypatch):
    saved, save = [], Video.save
    monkeypatch.setattr(Video, "save", lambda self, path, **options: saved.append(self) or save(self, path, **options))
    paths = {"image": tmp_path / "first.png", "last_image": tmp_path / "last.png"}
    for name, path in paths.items():
        Video(expected[name][None]).save(path)
    size = tuple(8 * generator.config.codec.stride_space * n // 2 for n in (2, 1))
    words = ["generate", "a red ball", "--model", str(GOLDEN / kind), "--steps", "2", "--frames", "9", "--seed", "3"]
    words += ["--size", "{}x{}".format(*size), "--image", str(paths["image"]), "--last-image", str(paths["last_image"])]
    assert main([*words, "-o", str(tmp_path / "out.mp4")]) == 0
    options = {"size": size, "steps": 2, "frames": 9, "progress": False}
    alone = generator.generate("a red ball", seed=3, **paths, **options)
    np.testing.assert_array_equal(saved[-1].frames, alone.frames)
    assert len(media.read(tmp_path / "out.mp4")[0]) == 9


@pytest.mark.parametrize("kind", ["i2v"], indirect=True)
def test_older_names_of_the_same_tensors(kind, generator, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / kind, tmp_path / "model"))
    path = folder / "image_encoder" / "model.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    older = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in tensors.items()}
    older["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    older["visual_projection.weight"] = np.ones((8, 8), np.float32)
    safetensors.numpy.save_file(older, path)
    path = folder / "model_index.json"  # as those of Wan 2.1 name the class
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}))
    path = folder / "text_encoder" / "model.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    safetensors.numpy.save_file({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}, path)
    jax.tree.map(np.testing.assert_array_equal, sora_jax.load(folder).params, generator.params)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    safetensors.numpy.save_file(tensors, path)
    jax.tree.map(np.testing.assert_array_equal, sora_jax.load(folder).params, generator.params)


def test_levels_per_frame_are_not_for_two_transformers(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "a14b", tmp_path / "model"))
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "expand_timesteps": True}))
    refused(folder, "expand_timesteps is for one transformer, told of no picture")


def test_older_and_newer_names_together_are_refused(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "i2v", tmp_path / "model"))
    path = folder / "image_encoder" / "model.safetensors"
    tensors = {k.removeprefix("vision_model."): v for k, v in safetensors.numpy.load(path.read_bytes()).items()}
    name = "embeddings.class_embedding"
    safetensors.numpy.save_file({**tensors, f"vision_model.{name}": tensors[name]}, path)
    refused(folder, f"image_encoder/model.safetensors: the tensor vision_model.{name} is there twice")


def test_pictures_that_the_image_encoder_would_see_otherwise_are_refused(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "i2v", tmp_path / "model"))
    path = folder / "image_processor" / "preprocessor_config.json"
    usual, config = json.loads(path.read_text()), models.read_config(folder)
    for field, value in (
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
        ("size", {"shortest_edge": 336}),
        ("size", {"height": 28, "width": 28}),
        ("crop_size", {"height": 336, "width": 336}),
        ("resample", 2),
        ("rescale_factor", 1.0),
        ("do_center_crop", False),
    ):
        path.write_text(json.dumps({**usual, field: value}))
        refused(folder, f"image_processor/preprocessor_config.json: {field} is .*; only ")
    path.write_text(json.dumps({"size": 28, "resample": None}))  # older versions write the number alone
    assert models.read_config(folder) == config
    path.unlink()
    assert models.read_config(folder) == config


@pytest.mark.parametrize("kind", ["i2v"], indirect=True)
def test_windows_go_on_from_the_last_frame_as_from_a_picture(kind, generator, expected):
    stride = generator.config.codec.stride_space
    options = {"size": (8 * stride, 4 * stride), "steps": 3, "progress": False}
    video = generator.generate("a red ball", frames=9, window=5, image=expected["image"], **options).frames
    noise = generator._draw_noise(np.uint32([0]), generator.config.codec.latent_shape(5, *options["size"]), 1)
    alone = generator.generate("a red ball", frames=5, image=video[4], noise=np.asarray(noise[0]), **options).frames
    assert len(video) == 9 and not np.array_equal(video[4], expected["image"])
    assert np.abs(video[5:].astype(int) - alone[1:]).max() <= 1


def test_second_transformer_and_its_guidance_count(expected, kind, generator):
    if kind not in ("t2v", "a14b"):
        pytest.skip("nothing more to see")
    if kind == "t2v":
        with pytest.raises(InputError, match="this one has none"):
            generator.generate("a ball", guidance_low=1.0)
        return
    stride = generator.config.codec.stride_space
    options = {"noise": expected["noise"], "size": (8 * stride, 4 * stride), "frames": 9, "steps": 6, "progress": False}
    plain = generator.generate("a red ball", **options).frames
    assert not np.array_equal(plain, generator.generate("a red ball", guidance_low=9.0, **options).frames)


@pytest.mark.parametrize("kind", ["i2v", "a14b", "ti2v"], indirect=True)  # every kind of part that there is
def test_converting_writes_the_same_model(generator, kind, tmp_path, capsys):
    assert main(["convert", str(GOLDEN / kind), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    again = sora_jax.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, again.params, generator.params)
    assert again.config == generator.config
    np.testing.assert_array_equal(again.tokenizer(["a red ball"], 512), generator.tokenizer(["a red ball"], 512))


@pytest.mark.parametrize("kind", ["i2v"], indirect=True)
def test_converting_rounds_what_bfloat16_rounds(kind, tmp_path):
    assert main(["convert", str(GOLDEN / kind), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half, source = (sora_jax.load(path, dtype="bfloat16").params for path in (tmp_path / "half", GOLDEN / kind))
    jax.tree.map(np.testing.assert_array_equal, half, source)
    assert sum(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half)) > 10
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["t2v"], indirect=True)
def test_bfloat16(kind, generator, expected):
    """Large kernels are held in bfloat16, and the result is as near as bfloat16 allows."""
    half = sora_jax.load(GOLDEN / kind, dtype="bfloat16")
    assert half.params["dit"]["blocks"]["up"]["kernel"].dtype == jnp.bfloat16
    assert half.params["dit"]["blocks"]["modulation"].dtype == jnp.float32
    levels = np.float32(expected["dit_levels"] / 1000)
    inputs = expected["dit_latents"], levels, expected["dit_text"]
    velocity = DiT(half.config.dit, half.dtype).apply({"params": half.params["dit"]}, *inputs)
    assert velocity.dtype == jnp.float32
    assert 1e-4 < difference(velocity, expected["dit"]) < 2 * expected["dit_bfloat16_error"]
    text = T5Encoder(half.config.text, half.dtype).apply({"params": half.params["text"]}, expected["text_ids"])
    assert 1e-4 < difference(text, expected["text"]) < 2 * expected["text_bfloat16_error"]
    with pytest.raises(InputError, match="dtype is 'int8'"):
        sora_jax.load(GOLDEN / kind, dtype="int8")


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN / "t2v", tmp_path / "model"))


def refused(folder, match):
    with pytest.raises(InputError, match=match):
        sora_jax.load(folder)


def test_what_is_damaged_is_named(folder, capsys, monkeypatch):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    refused(folder, "transformer/diffusion_pytorch_model.safetensors is damaged")
    assert main(["generate", "a red ball", "--model", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

    tensors = safetensors.numpy.load(whole)
    name = "blocks.1.attn1.to_q.weight"

    def with_tensors(tensors):
        path.write_bytes(safetensors.numpy.save(tensors))
        return folder

    refused(with_tensors({k: v for k, v in tensors.items() if k != name}), f"the tensor {name} is missing")
    refused(with_tensors({**tensors, "blocks.9.extra": tensors[name]}), "blocks.9.extra is not part of this model")
    refused(with_tensors({**tensors, name: tensors[name] * np.nan}), f"the tensor {name} is not finite")
    monkeypatch.setattr(TensorFile, "read", None)  # what the headers tell is told before anything is read
    monkeypatch.setattr(TensorFile, "pieces", None)
    refused(with_tensors({**tensors, name: tensors[name][:-1]}), f"the tensor {name} is \\[31, 32\\]")


@pytest.mark.parametrize(
    "model, part, name, change",
    [
        ("t2v", "transformer", "patch_embedding.weight", lambda x: x.reshape(*x.shape[:2], 1, 4, 1)),
        ("t2v", "transformer", "patch_embedding.weight", lambda x: x.reshape(x.shape[0], -1, 1, 1, 1)),
        ("t2v", "transformer", "scale_shift_table", lambda x: np.concatenate([x, x])),
        ("t2v", "transformer", "blocks.0.scale_shift_table", lambda x: x[0]),
        ("t2v", "vae", "encoder.mid_block.attentions.0.to_qkv.weight", lambda x: np.concatenate([x, x, x], axis=2)),
        ("t2v", "vae", "decoder.norm_out.gamma", lambda x: x.reshape(-1)),
        ("t2v", "vae", "decoder.mid_block.attentions.0.norm.gamma", lambda x: x[..., None]),
        ("t2v", "text_encoder", "encoder.embed_tokens.weight", lambda _: np.zeros((3, 3), np.float32)),
        ("i2v", "image_encoder", "embeddings.patch_embedding.weight", lambda x: x.reshape(*x.shape[:2], -1, 1)),
    ],
)
def test_a_tensor_of_another_shape_is_named_however_many_numbers_it_has(tmp_path, model, part, name, change):
    folder = Path(shutil.copytree(GOLDEN / model, tmp_path / "model"))
    (path,) = (folder / part).glob("*.safetensors")
    tensors = safetensors.numpy.load(path.read_bytes())
    stored = next((one for one in (name, f"vision_model.{name}") if one in tensors), name)
    tensors[stored] = np.ascontiguousarray(change(tensors.get(stored)))
    path.write_bytes(safetensors.numpy.save(tensors))
    refused(folder, f"{part}: the tensors? {name} (is|and shared.weight must be the same)")


def test_what_only_the_image_encoder_may_have_is_not_passed_over_elsewhere(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    for name in ("blocks.0.position_ids", "vision_model.scale_shift_table"):
        path.write_bytes(safetensors.numpy.save({**tensors, name: tensors["scale_shift_table"]}))
        refused(folder, f"the tensor {name} is not part of this model")


@pytest.mark.parametrize("positions", [3, 12])
def test_positions_for_two_images_are_as_many_as_their_tokens(tmp_path, positions):
    folder = Path(shutil.copytree(GOLDEN / "flf", tmp_path / "model"))
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pos_embed_seq_len": positions}))
    refused(folder, f"dit has {positions} positions for what vision sees of two images")


@pytest.mark.parametrize("kind", ["i2v"], indirect=True)
def test_a_model_that_sees_one_image_takes_no_last_one(kind, generator, expected):
    with pytest.raises(InputError, match="it takes no last image"):
        generator.generate("a red ball", frames=9, image=expected["image"], last_image=expected["image"])


@pytest.mark.parametrize("kind", ["a14b"], indirect=True)
def test_a_level_at_the_boundary_is_for_the_first_transformer(kind, generator, expected, monkeypatch):
    """Published schedules hit it: 0.875 and 0.9 are among the 40 levels of a shift of 3."""
    sampling = generator.config.sampling
    schedule = sampler.noise_schedule(6, sampling.shift, sampling.schedule)
    stride = generator.config.codec.stride_space
    options = {"noise": expected["noise"], "size": (8 * stride, 4 * stride), "frames": 9, "steps": 6, "progress": False}

    def frames(boundary):
        config = dataclasses.replace(generator.config, boundary=float(boundary))
        return generate.Generator(config, generator.params, generator.tokenizer).generate("a ball", **options).frames

    level = float(schedule.told[2])  # between levels nothing changes, and at one it is still for the first
    np.testing.assert_array_equal(frames(level), frames((level + float(schedule.told[3])) / 2))
    assert not np.array_equal(frames(level), frames((level + float(schedule.told[1])) / 2))


def test_the_levels_of_published_schedules_reach_the_published_boundaries():
    told = np.asarray(sampler.noise_schedule(40, 3.0, "wan-unipc").told)
    for boundary in (0.875, 0.9):
        assert np.abs(told - boundary).min() < 1e-6


def test_guidance_up_to_one_is_none(generator, expected, kind):
    if kind not in ("t2v", "a14b"):
        pytest.skip("nothing more to see")
    low = [{}] if kind == "t2v" else [{"guidance_low": 1.0}, {"guidance_low": 3.0}]  # it counts for both transformers
    found = [
        golden_pipelines.run(generator, expected["noise"], guidance=guidance, **options)
        for guidance in (1.0, 0.5)
        for options in low
    ]
    for frames in found[1:]:
        np.testing.assert_array_equal(frames, found[0])
    assert not np.array_equal(found[0], golden_pipelines.run(generator, expected["noise"], guidance=1.5, **low[0]))


@pytest.mark.parametrize("kind", ["t2v"], indirect=True)
def test_shards_load_as_one_file_does(folder, generator, kind):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    path.unlink()
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, part in shards.items():
        (path.parent / shard).write_bytes(safetensors.numpy.save({name: tensors[name] for name in part}))
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = path.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, sora_jax.load(folder).params, generator.params)
    index.write_text(json.dumps({"weight_map": {**weight_map, "extra": min(shards)}}))
    refused(folder, "index.json names the tensor extra, which none of its files holds")
    for shard in (["a", "b"], "../one.safetensors", str(path), ".."):
        index.write_text(json.dumps({"weight_map": {**weight_map, "one": shard}}))
        refused(folder, "its weight_map does not give the name of a file for each tensor")
    index.write_text("[" * 100_000)
    refused(folder, "index.json is damaged")
    index.unlink()
    refused(folder, "transformer has no .*, and no index for diffusion_pytorch_model-00001-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    twice = {name: tensors[name] for name in names[::2] + names[1:2]}
    (path.parent / min(shards)).write_bytes(safetensors.numpy.save(twice))
    refused(folder, f"the tensor {names[1]} is there twice")
    (path.parent / min(shards)).unlink()
    refused(folder, "cannot read .*00001-of-00002.safetensors")


def test_the_fixtures_stay_small():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 6e6


def test_pickles_and_unknown_classes_are_refused(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    refused(folder, r"vae has no .* \(diffusion_pytorch_model.bin is a pickle, which is never read")
    path.with_suffix(".bin").rename(path)
    for part, field, value, message in (
        ("model_index.json", "_class_name", "LTXPipeline", "_class_name is 'LTXPipeline'; only 'WanPipeline'"),
        ("model_index.json", "vae", ["diffusers", "AutoencoderKL"], "vae is 'AutoencoderKL'; only 'AutoencoderKLWan'"),
        ("model_index.json", "scheduler", ["diffusers", "DDIMScheduler"], "scheduler is 'DDIMScheduler'; only 'UniPC"),
        ("model_index.json", "motion_adapter", ["diffusers", "MotionAdapter"], "be left out: motion_adapter"),
        ("model_index.json", "transformer", 3, "model_index.json: transformer is 3; it must be a pair of names"),
        ("transformer/config.json", "_class_name", "FluxTransformer", "_class_name is 'FluxTransformer'"),
        ("transformer/config.json", "image_dim", 1280, "the field added_kv_proj_dim is missing"),
        ("transformer/config.json", "text_dim", 32, "describes no possible model: dit expects 32 channels from text"),
        (
            "transformer/config.json",
            "patch_size",
            2,
            "^[^:]*config.json: patch_size is 2; it must be a list of 3 values",
        ),
        ("scheduler/scheduler_config.json", "use_karras_sigmas", True, "use_karras_sigmas is True, which is not"),
        ("transformer/config.json", "num_layers", 4, r"the tensor blocks\.3\..* is missing"),
        ("scheduler/scheduler_config.json", "prediction_type", "epsilon", "prediction_type is 'epsilon'"),
        ("text_encoder/config.json", "d_model", None, "the field d_model is missing"),
        ("transformer/config.json", "num_layers", 3.0, "num_layers is 3.0; it must be a whole number"),
        ("transformer/config.json", "ffn_dim", "64", "ffn_dim is '64'; it must be a number"),
        ("transformer/config.json", "out_channels", "4", "out_channels is '4'; it must be a number"),
        ("transformer/config.json", "patch_size", [1, 2], r"patch_size is \[1, 2\]; it must be a list of 3 values"),
        ("scheduler/scheduler_config.json", "flow_shift", 0, "flow_shift is 0; it must be above 0"),
        ("vae/config.json", "latents_std", [0.0] * 4, r"latents_std\[0\] is 0.0; it must be above 0"),
        ("vae/config.json", "latents_mean", [], r"latents_mean is \[\]; it must be a list of 4 values"),
        ("vae/config.json", "latents_mean", [0, 0, 0, "x"], r"latents_mean\[3\] is 'x'; it must be a number"),
        (
            "vae/config.json",
            "temperal_downsample",
            [True, 0.5],
            r"temperal_downsample\[1\] is 0.5; it must be true or false",
        ),
        ("vae/config.json", "temperal_downsample", [1, 1], r"temperal_downsample\[0\] is 1; it must be true or false"),
        ("vae/config.json", "attn_scales", [1.0], r"attn_scales is \[1.0\]; no published codec has any"),
        ("transformer/config.json", "num_layers", 10**6, "num_layers is 1000000; it must be at most 1000"),
        ("transformer/config.json", "eps", 10**400, "eps is 10*; it must be a number"),
        ("transformer/config.json", "qk_norm", "layer_norm", "qk_norm is 'layer_norm'; only 'rms_norm_across_heads'"),
        ("transformer/config.json", "cross_attn_norm", False, "cross_attn_norm is False; only True"),
        ("text_encoder/config.json", "model_type", "t5", "model_type is 't5'; only 'umt5'"),
        ("text_encoder/config.json", "feed_forward_proj", "relu", "feed_forward_proj is 'relu'; only 'gated-gelu'"),
        ("text_encoder/config.json", "layer_norm_epsilon", 1e-5, "layer_norm_epsilon is 1e-05; only 1e-06"),
        ("text_encoder/config.json", "pad_token_id", 1, "pad_token_id is 1; only 0"),
        ("text_encoder/config.json", "vocab_size", 4, "tokenizer.json has a token .*; the text encoder has 4, counted"),
        ("model_index.json", "vae", [None, None], "model_index.json: there is no vae"),
        ("model_index.json", "boundary_ratio", 0.875, "there is a boundary_ratio, and no transformer_2"),
        (
            "model_index.json",
            "scheduler",
            ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "_class_name is 'UniPCMultistepScheduler'; only 'FlowMatchEulerDiscreteScheduler'",
        ),
        *(
            ("scheduler/scheduler_config.json", name, value, f"{name} is {value!r}; only")
            for name, value in {
                "num_train_timesteps": 500,
                "use_flow_sigmas": False,
                "solver_order": 3,
                "solver_type": "bh1",
                "predict_x0": False,
                "lower_order_final": False,
                "final_sigmas_type": "sigma_min",
            }.items()
        ),
        *(
            ("scheduler/scheduler_config.json", name, value, f"{name} is .*, which is not supported")
            for name, value in {
                "use_exponential_sigmas": True,
                "use_beta_sigmas": True,
                "use_dynamic_shifting": True,
                "shift_terminal": 0.1,
                "invert_sigmas": True,
                "stochastic_sampling": True,
                "thresholding": True,
                "disable_corrector": [0],
                "solver_p": "x",
                "rescale_betas_zero_snr": True,
            }.items()
        ),
        ("vae/config.json", "dim_mult", [], r"dim_mult is \[\]; it must be a list of some values"),
        ("vae/config.json", "is_residual", "no", "is_residual is 'no'; it must be true or false"),
        ("model_index.json", "expand_timesteps", "no", "expand_timesteps is 'no'; it must be true or false"),
    ):
        path = folder / part
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), field: value}))
        refused(folder, message)
        path.write_text(before)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json is damaged")


@pytest.mark.parametrize("value,said", [("x", "it must be a number"), (1.5, "it must be at most 1"), (None, "missing")])
def test_a_boundary_between_two_transformers_is_checked(tmp_path, value, said):
    folder = Path(shutil.copytree(GOLDEN / "a14b", tmp_path / "model"))
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "boundary_ratio": value}))
    refused(folder, f"boundary_ratio .*{said}")


def test_original_files_are_pickles(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")
    for named in (tmp_path, tmp_path / "Wan2.1_VAE.pth"):
        for command in (["generate", "a ball", "--model", str(named)], ["convert", str(named), str(tmp_path / "to")]):
            assert main(command) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and "Wan2.1_VAE.pth is a pickle, which is never read" in said


def test_a_precision_that_cannot_be_read_is_named(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    name = "blocks.0.attn1.to_q.weight"
    path.write_bytes(safetensors.numpy.save({**tensors, name: tensors[name].astype(np.int8)}))
    refused(folder, f"{name} is I8; only F32, BF16, F16")


@pytest.mark.parametrize("kind", ["t2v", "i2v"], indirect=True)
def test_coding_in_pieces_changes_nothing(kind, generator, expected, monkeypatch):
    options = {"image": expected["image"]} if kind == "i2v" else {}
    assert generate._PIXELS_AT_ONCE > 9 * 32 * 16
    monkeypatch.setattr(generate, "_PIXELS_AT_ONCE", 0)
    assert quality(generator, expected["noise"], expected["frames"], **options) > BEST - 0.5


def test_an_end_that_is_not_read_is_told(generator):
    prompt = "a red ball " * 200 + "rolls"
    assert generator.tokenizer.unread("a red ball", 512) == ""
    rest = generator.tokenizer.unread(prompt, 512)
    assert rest.endswith("rolls") and prompt.endswith(rest)
    read = len(prompt[: -len(rest)].split())
    assert read == 511  # and the end token
    ids = generator.tokenizer([prompt, "a&lt;  ball"], 512)
    assert (ids[0] > 0).all() and ids[0, -1] == 1
    assert ids[1].tolist()[:5] == [3, 2, 5, 1, 0]
