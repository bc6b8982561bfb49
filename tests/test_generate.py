import dataclasses
import re
import warnings
import weakref
from hashlib import sha256

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

from sora_jax import attention, media, pipeline, sampler
from sora_jax import generate as generate_module
from sora_jax.dit import DiTConfig
from sora_jax.errors import InputError
from sora_jax.generate import Generator
from sora_jax.interop.presets import PRESETS
from sora_jax.mesh import parse_mesh
from sora_jax.model_config import abstract_params
from sora_jax.models import load
from sora_jax.request import Request, make_request
from sora_jax.safety.manifest import read_manifest
from sora_jax.tensors import OnDemand, Tensor

PARTS = ("text", "dit", "dit_low", "codec")


@pytest.fixture(scope="module")
def generator(tiny_config, tiny_params):
    return Generator(tiny_config, tiny_params)


def test_shapes_defaults_and_seeds(generator):
    video = generator.generate("a red ball", seed=3, progress=False)
    assert video.frames.shape == (5, 32, 64, 3) and video.fps == 8
    again = generator.generate("a red ball", seed=3, progress=False)
    assert np.array_equal(video.frames, again.frames)
    other = generator.generate("a red ball", seed=4, progress=False)
    assert not np.array_equal(video.frames, other.frames)


def test_the_kernel_of_attention_can_be_chosen(tiny_folder, monkeypatch):
    asked = []

    def watched(name):
        kernel = attention.KERNELS[name]
        return lambda *arguments: asked.append(name) or kernel(*arguments)

    monkeypatch.setattr(attention, "KERNELS", {name: watched(name) for name in attention.KERNELS})
    frames = load(tiny_folder).generate("a red ball", progress=False).frames
    assert set(asked) == {"xla"}  # for so few tokens; that of codec and text encoder too
    ours = load(tiny_folder, kernel="heads").generate("a red ball", progress=False).frames
    assert set(asked) == {"xla", "heads"}
    assert np.abs(ours.astype(int) - frames).max() <= 1
    with pytest.raises(InputError, match="'splash' is for a TPU; here is a CPU"):
        load(tiny_folder, kernel="splash")
    with pytest.raises(InputError, match="'cudnn' is for a GPU; here is a CPU"):
        load(tiny_folder, kernel="cudnn", mesh=parse_mesh("data=1"))


def test_a_batch_gives_each_seed_its_own_noise(generator, monkeypatch):
    pixels = 5 * 32 * 64
    monkeypatch.setattr(pipeline, "_PIXELS_PER_BATCH", 2 * pixels)
    batch = generator.generate("a red ball", seed=[3, 4, 2**32 - 1], progress=False)
    for seed, video in zip([3, 4, 2**32 - 1], batch, strict=True):
        alone = generator.generate("a red ball", seed=seed, progress=False)
        assert np.abs(alone.frames.astype(int) - video.frames).max() <= 1


def test_a_picture_is_a_video_of_one_frame(generator, tmp_path):
    video = generator.generate("a red ball", frames=1, progress=False)
    assert video.frames.shape == (1, 32, 64, 3)
    assert len(media.read(video.save(tmp_path / "ball.png"))[0]) == 1


@pytest.mark.parametrize(
    "frames, window, overlap, windows", [(1, 1, 0, 1), (17, 17, 0, 1), (17, 9, 1, 2), (65, 17, 5, 5)]
)
def test_windows_cover_the_video_and_no_more(frames, window, overlap, windows):
    shape = dict(frames=frames, window=window, overlap=overlap, size=(16, 16))
    request = Request(("a red ball",), (0,), "", **shape, steps=1, guidance=4.0, guidance_low=4.0, shift=3.0, fps=8.0)
    assert request.windows == windows
    covered = window + (windows - 1) * (window - overlap)
    assert covered >= frames and (windows == 1 or covered - (window - overlap) < frames)


@pytest.mark.parametrize("mesh", [None, "data=1"])
def test_a_model_can_be_on_the_device_part_by_part(tiny_folder, mesh):
    mesh = mesh and parse_mesh(mesh)
    whole, by_part = (load(tiny_folder, mesh=mesh, offload=offload) for offload in (False, True))
    frames = whole.generate("a red ball", progress=False).frames
    for _ in range(2):
        assert np.array_equal(by_part.generate("a red ball", progress=False).frames, frames)


def test_a_part_that_works_takes_the_others_off_the_device():
    shape = (4,)
    tensors = {part: {"x": Tensor(shape, np.dtype("float32"), lambda: iter([np.ones(shape)]))} for part in PARTS}
    params = OnDemand(tensors, together=("dit", "dit_low"))
    assert list(params) == list(PARTS)
    seen = {part: weakref.ref(params[part]["x"]) for part in PARTS}
    here = [part for part in PARTS if seen[part]() is not None]
    assert here == ["codec"]
    seen = {part: weakref.ref(params[part]["x"]) for part in ("dit", "dit_low")}
    assert all(reference() is not None for reference in seen.values()), "transformers work together"


def test_noise_can_be_given(generator):
    noise = np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32)
    shape = generator.config.codec.latent_shape(5, 32, 64)
    noise = np.resize(noise, shape)
    first = generator.generate("a red ball", seed=1, noise=noise, progress=False)
    second = generator.generate("a red ball", seed=2, noise=noise[None], progress=False)
    assert np.array_equal(first.frames, second.frames)
    with pytest.raises(InputError, match="noise must be"):
        generator.generate("a red ball", noise=noise[:, :1])


def test_many_tokens_are_guided_in_turn_in_less_memory(tiny_config, tiny_params, monkeypatch):
    """The result is the same: also of what is given, which both branches have."""
    config = dataclasses.replace(tiny_config, known_frames=True)
    picture = np.full((*config.sampling.size, 3), 99, np.uint8)
    temporary, frames = [], []
    # All heads together, as on accelerators: one by one, the little that is left of this model is not worth halving.
    monkeypatch.setattr(attention, "_MANY", 10**9)
    for many in (10**9, 1):
        monkeypatch.setattr(pipeline, "_MANY", many)
        generator = Generator(config, tiny_params)
        frames.append(generator.generate("red", seed=[1, 2], steps=2, image=picture, negative_prompt="blue"))
        B, shape = 2, config.codec.latent_shape(33, 128, 128)
        text = np.zeros((2 * B, config.text.length, config.text.width), np.float32)
        arguments = ([tiny_params["dit"]], np.zeros((B, *shape), np.float32), text)
        arguments += (sampler.noise_schedule(2, 3.0), np.float32([2, 2]))
        memory = generator._denoise.lower(*arguments).compile().memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
    together, in_turn = frames
    for a, b in zip(together, in_turn, strict=True):
        assert np.abs(a.frames.astype(int) - b.frames).max() <= 1
    assert temporary[1] < 0.7 * temporary[0]


def test_prompt_guidance_and_negative_prompt_count(generator):
    def frames(prompt="a red ball", **options):
        return generator.generate(prompt, progress=False, **options).frames

    plain = frames()
    assert not np.array_equal(plain, frames("red"))
    assert not np.array_equal(plain, frames(guidance=9.0))
    assert not np.array_equal(plain, frames(negative_prompt="red"))
    shift = generator.config.sampling.shift
    assert np.array_equal(plain, frames(shift=shift)) and not np.array_equal(plain, frames(shift=2 * shift))
    without = frames(guidance=1.0)
    assert not np.array_equal(plain, without) and not np.array_equal(frames(guidance=1.5), without)
    assert np.array_equal(frames(guidance=0.5, negative_prompt="red"), without)


def test_what_is_made_of_pictures_says_so_and_needs_their_files_no_longer(tiny_config, tiny_params, tmp_path):
    config = dataclasses.replace(tiny_config, known_frames=True)
    picture = np.full((32, 64, 3), 90, np.uint8)
    file = tmp_path / "last.png"
    file.write_bytes(media.png(picture))
    request = make_request(config, "a red ball", frames=9, image=picture, last_image=file)
    file.unlink()
    (video,) = Generator(config, tiny_params).run(request, progress=False)
    manifest = read_manifest(video.save(tmp_path / "clip.mp4"))
    assert manifest.actions == ("c2pa.opened", "c2pa.edited", "c2pa.watermarked.unbound")
    assert [(one.title, one.relationship) for one in manifest.ingredients] == [
        ("image.png", "parentOf"),
        ("last_image.png", "inputTo"),
    ]
    checks = manifest.generation["checks"]
    assert sorted(checks) == ["frames", "image", "last_image", "mark", "prompt"]
    for name in ("image", "last_image"):
        ((found, of_frames),) = zip(checks[name], checks["frames"], strict=True)
        assert found.keys() == of_frames.keys() and found["passed"] and found["frames_scanned"] == 1


def test_a_last_picture_is_a_group_of_its_own(tiny_config, tiny_params):
    config = dataclasses.replace(tiny_config, known_frames=True)
    first, last = (np.full((32, 64, 3), brightness, np.uint8) for brightness in (40, 200))
    request = make_request(config, "a red ball", frames=9, size=(32, 64), image=first, last_image=last)
    generator = Generator(config, tiny_params)
    given = generator._known(generate_module._pictures(request), request)
    assert np.array_equal(given.known_BF, [[True, False, True]])
    for place, picture in ((0, first), (-1, last)):
        frames = np.float32(np.stack([picture] * (1 if place == 0 else 5))) / 127.5 - 1
        expected = generator._encode_clip(frames)[:, -1]
        np.testing.assert_allclose(given.latents_BFYXZ[:, place], expected, atol=1e-5)


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_a_file_claims_what_its_own_video_was_made_of(tiny_folder, monkeypatch, at_a_time):
    generator = load(tiny_folder)
    monkeypatch.setattr(pipeline, "_PIXELS_PER_BATCH", at_a_time * 9 * 64 * 64)
    videos = generator.generate(["a red ball", "red"], seed=[3, 4], frames=9, size=(64, 64), progress=False)
    assert [(video.claim.prompt, video.claim.seed) for video in videos] == [("a red ball", 3), ("red", 4)]
    digests = {path.name: sha256(path.read_bytes()).hexdigest() for path in tiny_folder.glob("*.safetensors")}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    assert videos[0].claim.weights_sha256 == sha256(lines.encode()).hexdigest()


def test_a_picture_of_one_frame_is_that_frame(tiny_config, tiny_params):
    config = dataclasses.replace(tiny_config, known_frames=True)
    picture = np.full((32, 64, 3), 90, np.uint8)
    request = make_request(config, "a red ball", frames=1, image=picture)
    assert [*generate_module._pictures(request)] == [0]
    assert np.array_equal(generate_module._pictures(request)[0], picture)
    (video,) = Generator(config, tiny_params).run(request, progress=False)
    other = make_request(config, "a red ball", frames=1, image=255 - picture)
    (changed,) = Generator(config, tiny_params).run(other, progress=False)
    assert len(video.frames) == 1 and not np.array_equal(video.frames, changed.frames)


def test_a_long_video_goes_on_window_by_window(tiny_config, tiny_params, capsys):
    generator = Generator(dataclasses.replace(tiny_config, known_frames=True), tiny_params)

    def frames(seed, **options):
        return generator.generate("a red ball", seed=seed, **options).frames.astype(int)

    long = frames(3, frames=17, window=9, overlap=5)
    assert "6/6" in capsys.readouterr().err, "2 steps in each of 3 windows"
    assert len(long) == 17
    # The first window is a video of its own; the second one goes on from its last frames, at other noise.
    first = frames(3, frames=9)
    assert np.array_equal(long[:9], first)
    following = generator.run(make_request(generator.config, "a red ball", frames=9), progress=False)
    assert not np.array_equal(long[8:13], next(following).frames[4:9])
    # What is cut off at the end and what else is in the batch change nothing.
    assert np.array_equal(frames(3, frames=13, window=9, overlap=1), frames(3, frames=17, window=9, overlap=1)[:13])
    batch = generator.generate("a red ball", seed=[3, 4], frames=17, window=9, overlap=5, progress=False)
    assert np.abs(batch[0].frames - long).max() <= 1
    assert np.abs(batch[1].frames - frames(4, frames=17, window=9, overlap=5)).max() <= 1
    assert np.array_equal(frames(3, frames=9, window=17), first)
    for options, message in (
        ({"window": 8}, "window must be 1 + a multiple of 4"),
        ({"window": 5, "overlap": 5}, "make no headway"),
        ({"overlap": 5}, "give the window too"),
        ({"window": 5, "last_image": np.zeros((32, 64, 3), np.uint8)}, "need all frames at once"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            frames(3, frames=17, **options)


def test_known_frames_stay_at_the_seam_of_windows(tiny_config, tiny_params, monkeypatch):
    """What a window is told of the one before are the codec's latents of its last frames."""
    generator = Generator(dataclasses.replace(tiny_config, known_frames=True), tiny_params)
    told, sample = [], generator._sample

    def spy(request, chosen, text_BLD, given, window):
        latents = sample(request, chosen, text_BLD, given, window)
        told.append((given, np.asarray(latents)))
        return latents

    monkeypatch.setattr(generator, "_sample", spy)
    # An overlap of more than half a window: what the third one starts with was made by both before it.
    video = generator.generate("a red ball", frames=17, window=9, overlap=5, progress=False)
    (nothing, _), *others = told
    assert nothing.known_BF is None and len(others) == 2
    for start, (given, latents) in zip((4, 8), others, strict=True):
        assert np.array_equal(given.known_BF, [[True, True, False]])
        last = np.float32(video.frames[start : start + 5]) / 127.5 - 1
        np.testing.assert_allclose(given.latents_BFYXZ[:, :2], generator._encode_clip(last), atol=1e-5)
        np.testing.assert_allclose(latents[:, :2], given.latents_BFYXZ[:, :2], atol=1e-6)


def test_the_bar_counts_every_step(generator, capsys):
    generator.generate(["red", "ball"], steps=3)
    assert "3/3" in capsys.readouterr().err


def test_two_runs_at_a_time_have_a_bar_each(generator, monkeypatch):
    bars = []

    class Bar(generate_module.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(generate_module, "tqdm", Bar)
    monkeypatch.setattr(pipeline, "_PIXELS_PER_BATCH", 5 * 32 * 64)
    runs = [generator.run(make_request(generator.config, ["red", "ball"], steps=steps)) for steps in (2, 3)]
    for _ in range(2):
        videos = [next(run) for run in runs]
    assert len(videos) == 2 and [bar.n for bar in bars] == [4, 6]


def test_what_was_checked_cannot_be_changed_afterwards(tiny_config):
    config = dataclasses.replace(tiny_config, known_frames=True)
    picture = np.full((32, 64, 3), 90, np.uint8)
    request = make_request(config, "a red ball", image=picture)
    prompts = [*request.prompts]
    request = dataclasses.replace(request, prompts=prompts)
    prompts[0], picture[:] = "a naked woman", 255
    assert request.prompts == ("a red ball",) and request.image.max() == 90
    with pytest.raises(ValueError, match="read-only"):
        request.image[:] = 255


def test_words_are_whole_in_any_alphabet():
    assert generate_module._words("A crocodile didn\u2019t eat 3 'red' balls \U0001f600\ufe0f") == (
        ["a", "crocodile", "didn't", "eat", "3", "red", "balls", "\U0001f600"]
    )
    assert generate_module._words("\u0932\u093e\u0932 \u0917\u0947\u0902\u0926, cafe\u0301") == (
        ["\u0932\u093e\u0932", "\u0917\u0947\u0902\u0926", "caf\u00e9"]
    )


def test_unknown_words_and_long_prompts_are_told(generator):
    with pytest.warns(UserWarning, match="does not know: zebra\nit knows: red balls"):
        generator.generate("a red zebra", progress=False)
    long = "a red ball " * 40
    with pytest.warns(UserWarning, match="does not read its end: .*ball$"):
        generator.generate(long, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate("A red ball.", progress=False)


def test_it_is_told_that_a_picture_is_stretched(tiny_config, tiny_params):
    generator = Generator(dataclasses.replace(tiny_config, known_frames=True), tiny_params)
    with pytest.warns(UserWarning, match="the image of 32x48 is stretched to 32x32"):
        generator.generate("a red ball", image=np.zeros((32, 48, 3), np.uint8), size=(32, 32), progress=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": []}, "do not make pairs"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "2 prompts and 3 seeds"),
        ({"prompt": None}, "the prompt must be text, not NoneType"),
        ({"prompt": 5}, "the prompt must be text, not int"),
        ({"prompt": ["red", b"red"]}, "prompt 2 must be text, not bytes"),
        ({"negative_prompt": 5}, "the negative prompt must be text, not int"),
        ({"seed": [1, [2, 3]]}, "seed must be a whole number, not [2, 3]"),
        ({"frames": 16}, "frames must be 1 + a multiple of 4; 16 is not, nearest are 13 and 17"),
        ({"frames": 0}, "frames must be 1 + a multiple of 4; 0 is not, nearest is 1"),
        ({"size": (-64, 32)}, "height must be a multiple of 32; -64 is not, nearest is 32"),
        ({"frames": 5.5}, "frames must be a whole number"),
        ({"size": (100, 64)}, "height must be a multiple of 32; 100 is not, nearest are 96 and 128"),
        ({"size": (64, 10)}, "width must be a multiple of 32; 10 is not, nearest is 32"),
        ({"size": 64}, "size must be (height, width)"),
        ({"size": (32, (2, 3))}, "size must be a whole number, not (2, 3)"),
        ({"noise": "x"}, "noise must be numbers [1, 2, 2, 4, 4], not str"),
        ({"noise": [[1.0], [1.0, 2.0]]}, "noise must be numbers [1, 2, 2, 4, 4], not list"),
        ({"steps": 0}, "steps must be from 1 to 1000000"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"guidance": 1e39}, "guidance must be a finite number, not 1e+39"),
        ({"shift": 0}, "shift must be above 0, not 0.0"),
        ({"guidance": 10**400}, "guidance must be a finite number"),
        ({"noise": np.full((2, 2, 4, 4), np.nan)}, "noise must be finite numbers"),
        ({"noise": np.full((2, 2, 4, 4), -1e39)}, "noise must be finite numbers"),
        ({"noise": np.full((2, 2, 4, 4), 3e38)}, "sampling ended in numbers that are not finite"),
        ({"seed": -1}, "seed must be from 0 to 4294967295"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967295"),
        ({"fps": 0}, "fps must be from 0.001"),
        ({"frames": 9, "window": 5}, "cannot go on from the frames of another window"),
    ],
)
def test_impossible_requests_name_what_is_possible(generator, options, message):
    with pytest.raises(InputError) as caught:
        generator.generate(**{"prompt": "a red ball", **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_size_that_was_swapped_is_told(tiny_config, tiny_params):
    sampling = dataclasses.replace(tiny_config.sampling, size=(32, 64))
    generator = Generator(dataclasses.replace(tiny_config, sampling=sampling), tiny_params)
    for size, words in (
        ((64, 32), ["note: the height comes first: this video is 64 high and 32 wide"]),
        ((32, 64), []),
    ):
        assert generator.notes(make_request(generator.config, "a red ball", size=size)) == words


def test_a_negative_prompt_without_guidance_is_told_and_not_signed_for(tiny_config, tiny_params):
    generator = Generator(tiny_config, tiny_params)
    for guidance, is_told in ((1.0, True), (1.5, False)):
        request = make_request(generator.config, "a red ball", negative_prompt="a cube", guidance=guidance)
        told = "note: the negative prompt does nothing at guidance 1; above 1 it does"
        assert (told in generator.notes(request)) == is_told
        claim = generator._claim(request, 0, np.zeros((1, 8, 8, 3), np.uint8))
        assert ("negative_prompt_sha256" in claim.config) != is_told


def test_no_negative_prompt_is_an_empty_one(tiny_config):
    assert make_request(tiny_config, "a red ball", negative_prompt=None).negative_prompt == ""


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((0, 5, 3), np.uint8), "image must be uint8 [H, W, 3], not uint8 [0, 5, 3]"),
        (np.zeros((4, 4), np.uint8), "image must be uint8 [H, W, 3], not uint8 [4, 4]"),
        (5, "image must be a file, an array or a picture of PIL, not int"),
        ([[[0, 0, 0]]], "image must be a file, an array or a picture of PIL, not list"),
    ],
)
def test_an_image_that_is_none_is_told(tiny_config, image, message):
    with pytest.raises(InputError) as caught:
        make_request(dataclasses.replace(tiny_config, known_frames=True), "a red ball", frames=9, image=image)
    assert str(caught.value) == message


def test_an_image_of_pil_is_upright_and_rgb(tiny_config, tmp_path):
    """As a file of it is: what it shows is grey with an alpha channel, and says that it was taken on its side."""
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 2), np.uint8), "LA")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    grey.save(tmp_path / "grey.png", exif=exif)
    with Image.open(tmp_path / "grey.png") as picture:
        config = dataclasses.replace(tiny_config, known_frames=True)
        request = make_request(config, "a red ball", frames=9, image=picture)
    of_file = make_request(config, "a red ball", frames=9, image=tmp_path / "grey.png")
    assert request.image.shape == (48, 32, 3) and np.array_equal(request.image, of_file.image)
    (tmp_path / "half.png").write_bytes((tmp_path / "grey.png").read_bytes()[:-600])
    with Image.open(tmp_path / "half.png") as picture, pytest.raises(InputError, match="the picture cannot be read"):
        make_request(config, "a red ball", frames=9, image=picture)


def test_a_damaged_model_makes_no_black_video(tiny_config, tiny_params, monkeypatch):
    monkeypatch.setattr(Generator, "_decode_video", lambda *_: pytest.fail("it is decoded"))
    params = jax.tree.map(np.copy, tiny_params)
    jax.tree.leaves(params["dit"])[0][:] = np.nan
    with pytest.raises(InputError, match="not finite: .* or the model is damaged"):
        Generator(tiny_config, params).generate("a red ball", progress=False)


def test_two_transformers_are_in_memory_once():
    """Where they change places within the one scan, no weights are copied for it."""
    dit = DiTConfig(16, heads=4, head_width=64, feed_forward=1024, layers=4, text_width=4096)
    config = dataclasses.replace(PRESETS["wan2.2-t2v-a14b"], dit=dit)
    params, schedule = abstract_params(config), sampler.noise_schedule(4, 3.0, config.sampling.schedule)
    dits, inputs = (params["dit"], params["dit_low"]), [(1, 1, 4, 4, 16), (2, 8, 4096), (2,)]
    compiled = (
        jax.jit(lambda dits, *inputs: pipeline.denoise(config, jnp.float32, dits, *inputs[:2], schedule, inputs[2]))
        .lower(dits, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs))
        .compile()
    )
    memory, size = compiled.memory_analysis(), sum(4 * leaf.size for leaf in jax.tree.leaves(dits[0]))
    assert 2 * size < memory.argument_size_in_bytes < 2.1 * size
    assert memory.temp_size_in_bytes < size / 4
