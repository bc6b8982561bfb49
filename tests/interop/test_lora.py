"""Low-rank adaptations: merging one equals loading a model whose published tensors were changed by hand."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import sora_jax
from sora_jax.cli import main
from sora_jax.errors import InputError
from sora_jax.request import make_request
from sora_jax.safety.manifest import read_manifest
from sora_jax.tensors import Tensor
from sora_jax.video import read_video

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Published name, Wan's own name, and that with underscores.
MODULES = {
    "blocks.0.attn1.to_q": ("blocks.0.self_attn.q", "blocks_0_self_attn_q"),
    "blocks.2.attn2.to_v": ("blocks.2.cross_attn.v", "blocks_2_cross_attn_v"),
    "blocks.1.attn1.to_out.0": ("blocks.1.self_attn.o", "blocks_1_self_attn_o"),
    "blocks.1.ffn.net.0.proj": ("blocks.1.ffn.0", "blocks_1_ffn_0"),
    "condition_embedder.text_embedder.linear_1": ("text_embedding.0", "text_embedding_0"),
}
RANK, ALPHA, SCALE = 4, 2.0, 0.7


@pytest.fixture(scope="module")
def tensors():
    return safetensors.numpy.load_file(GOLDEN / "t2v" / "transformer" / WEIGHTS)


@pytest.fixture(scope="module")
def matrices(tensors):
    random = np.random.default_rng(0)
    shapes = {module: tensors[f"{module}.weight"].shape for module in MODULES}
    return {
        module: (
            random.normal(size=(RANK, columns)).astype(np.float32),
            random.normal(size=(rows, RANK)).astype(np.float32),
        )
        for module, (rows, columns) in shapes.items()
    }


def write(path, layout, matrices, alpha):
    found = {}
    for module, (down, up) in matrices.items():
        dotted, underscored = MODULES[module]
        prefix, names = {
            "peft": (f"transformer.{module}", ("lora_A.weight", "lora_B.weight")),
            "wan": (f"diffusion_model.{dotted}", ("lora_down.weight", "lora_up.weight")),
            "underscores": (f"lora_unet_{underscored}", ("lora_down.weight", "lora_up.weight")),
        }[layout]
        found |= {f"{prefix}.{names[0]}": down, f"{prefix}.{names[1]}": up}
        if alpha is not None:
            found[f"{prefix}.alpha"] = np.array(alpha, np.float32)
    safetensors.numpy.save_file(found, path)
    return path


@pytest.mark.parametrize("layout, alpha", [("peft", None), ("wan", ALPHA), ("underscores", ALPHA)])
def test_merging_equals_changing_the_published_tensors(layout, alpha, matrices, tensors, tmp_path):
    changed = dict(tensors)
    for module, (down, up) in matrices.items():
        factor = SCALE * (RANK if alpha is None else alpha) / RANK
        changed[f"{module}.weight"] = tensors[f"{module}.weight"] + factor * up @ down
    folder = Path(shutil.copytree(GOLDEN / "t2v", tmp_path / "model"))
    safetensors.numpy.save_file(changed, folder / "transformer" / WEIGHTS)
    by_hand = sora_jax.load(folder)
    path = write(tmp_path / "style.safetensors", layout, matrices, alpha)
    merged = sora_jax.load(GOLDEN / "t2v", lora={path: SCALE})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged.params, by_hand.params)
    plain = sora_jax.load(GOLDEN / "t2v").params["dit"]["blocks"]["up"]["kernel"]
    assert np.abs(merged.params["dit"]["blocks"]["up"]["kernel"] - plain).max() > 0.1
    # Once with and once against: nothing is left.
    both = sora_jax.load(GOLDEN / "t2v", lora={path: SCALE, shutil.copy(path, tmp_path / "again.safetensors"): -SCALE})
    np.testing.assert_allclose(both.params["dit"]["blocks"]["up"]["kernel"], plain, atol=1e-5)


def test_each_transformer_has_its_own(matrices, tmp_path):
    path = write(tmp_path / "style.safetensors", "peft", matrices, None)
    plain = sora_jax.load(GOLDEN / "a14b")
    low = sora_jax.load(GOLDEN / "a14b", lora_low={path: 1.0})
    jax.tree.map(np.testing.assert_array_equal, low.params["dit"], plain.params["dit"])
    kernels = [g.params["dit_low"]["blocks"]["up"]["kernel"] for g in (low, plain)]
    assert not np.array_equal(*kernels)
    with pytest.raises(InputError, match=r"\(lora_low\) is for models with a second transformer"):
        sora_jax.load(GOLDEN / "t2v", lora_low={path: 1.0})


def test_a_file_for_both_transformers_goes_to_each(matrices, tmp_path):
    down, up = matrices["blocks.1.ffn.net.0.proj"]
    found = {}
    for part, factor in (("transformer", 1.0), ("transformer_2", 2.0)):
        name = f"{part}.blocks.1.ffn.net.0.proj"
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": np.float32(factor) * up}
    safetensors.numpy.save_file(found, path := tmp_path / "both.safetensors")
    plain = sora_jax.load(GOLDEN / "a14b").params
    merged = sora_jax.load(GOLDEN / "a14b", lora={path: 1.0}, lora_low={path: 1.0}).params
    for part, factor in (("dit", 1.0), ("dit_low", 2.0)):
        added = merged[part]["blocks"]["up"]["kernel"][1] - plain[part]["blocks"]["up"]["kernel"][1]
        np.testing.assert_allclose(added, factor * (up @ down).T, atol=1e-5)
    with pytest.raises(InputError, match="both.safetensors has parts for two transformers: give it as --lora-low too"):
        sora_jax.load(GOLDEN / "a14b", lora={path: 1.0})
    half = sora_jax.load(GOLDEN / "a14b", lora={path: 1.0}, lora_low={f"{tmp_path}/./both.safetensors": 0.0}).params
    jax.tree.map(np.testing.assert_array_equal, half["dit"], merged["dit"])
    jax.tree.map(np.testing.assert_array_equal, half["dit_low"], plain["dit_low"])
    with pytest.raises(InputError, match="has parts for two transformers: this model has one"):
        sora_jax.load(GOLDEN / "t2v", lora={path: 1.0})


@pytest.mark.parametrize("scale", [np.nan, np.inf, "x", None])
def test_a_scale_is_a_finite_number(matrices, tmp_path, scale):
    path = write(tmp_path / "style.safetensors", "peft", matrices, None)
    with pytest.raises(InputError, match=f"the scale of {path} must be a finite number, not"):
        sora_jax.load(GOLDEN / "t2v", lora={path: scale})
    for given in (str(path), [path]):
        with pytest.raises(InputError, match="lora must be a dictionary, of files with their scales"):
            sora_jax.load(GOLDEN / "t2v", lora=given)


def test_an_adaptation_that_is_not_finite_is_named(matrices, tmp_path):
    down, up = matrices["blocks.0.attn1.to_q"]
    name, path = "transformer.blocks.0.attn1.to_q", tmp_path / "style.safetensors"
    for down_by, up_by, alpha in ((np.nan, 1, 1), (1e30, 1e30, 1), (1, 1, np.inf)):
        tensors = {f"{name}.lora_A.weight": np.float32(down_by) * down, f"{name}.lora_B.weight": np.float32(up_by) * up}
        safetensors.numpy.save_file({**tensors, f"{name}.alpha": np.array(alpha, np.float32)}, path)
        with pytest.raises(InputError, match=r"style.safetensors.* not finite"):
            sora_jax.load(GOLDEN / "t2v", lora={path: 1.0})
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    for adapter, why in (
        ('{"transformer.lora_alpha": NaN}', "lora_alpha is nan"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "too large"),
        ("[" * 10**5, "recursion"),
    ):
        safetensors.numpy.save_file(tensors, path, metadata={"lora_adapter_metadata": adapter})
        with pytest.raises(InputError, match=f"its metadata are damaged: .*{why}"):
            sora_jax.load(GOLDEN / "t2v", lora={path: 1.0})


def test_the_command_merges_a_file_into_each_transformer(matrices, tmp_path):
    high, low = (write(tmp_path / f"{layout}.safetensors", layout, matrices, 1.0) for layout in ("peft", "wan"))
    words = ["--lora", f"{high}:0.3", "--lora-low", f"{low}:0.2", "--size=32x32", "--frames=5", "--steps=2"]
    path = tmp_path / "ball.mp4"
    assert main(["generate", "a red ball", "--model", str(GOLDEN / "a14b"), *words, "-o", str(path)]) == 0
    merged = sora_jax.load(GOLDEN / "a14b", lora={high: 0.3}, lora_low={low: 0.2})
    merged.generate("a red ball", size=(32, 32), frames=5, steps=2, progress=False).save(tmp_path / "again.mp4")
    np.testing.assert_array_equal(*(read_video(one).frames for one in (path, tmp_path / "again.mp4")))
    digests = {read_manifest(one).generation["weights_sha256"] for one in (path, tmp_path / "again.mp4")}
    other = sora_jax.load(GOLDEN / "a14b", lora={high: 0.3}, lora_low={low: 0.3}).weights()
    assert len(digests) == 1 and other not in digests


def merges(path, model, tensors, added, tmp_path, **written):
    """That a file with these tensors, half of it, adds what is `added` to the published tensors."""
    safetensors.numpy.save_file(tensors, path, **written)
    source = model / "transformer" / WEIGHTS
    changed = safetensors.numpy.load_file(source)
    for name, change in added.items():
        changed[name] = changed[name] + 0.5 * change
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    safetensors.numpy.save_file(changed, folder / "transformer" / WEIGHTS)
    merged, by_hand = sora_jax.load(model, lora={path: 0.5}).params, sora_jax.load(folder).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), merged, by_hand)


def normal(*shapes):
    random = np.random.default_rng(0)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def test_differences_of_biases_and_norms_and_the_alpha_of_the_metadata(tmp_path):
    random = np.random.default_rng(0)
    bias, scale = (random.normal(size=32).astype(np.float32) for _ in range(2))
    attention = "diffusion_model.blocks.0.self_attn"
    found = {f"{attention}.k.diff_b": bias, f"{attention}.norm_k.diff": scale}
    down, up = random.normal(size=(4, 32)).astype(np.float32), random.normal(size=(48, 4)).astype(np.float32)
    name = "transformer.blocks.0.ffn.net.0.proj"
    found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    metadata = {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 8}'}
    added = {"blocks.0.attn1.to_k.bias": bias, "blocks.0.attn1.norm_k.weight": scale}
    added["blocks.0.ffn.net.0.proj.weight"] = 8 / 4 * up @ down
    merges(tmp_path / "style.safetensors", GOLDEN / "t2v", found, added, tmp_path, metadata=metadata)


def test_differences_of_everything_that_is_small(tmp_path):
    """What extractors write of one- and five-dimensional tensors and of tables, such as LightX2V's `.diff_m`."""
    published = safetensors.numpy.load_file(GOLDEN / "i2v" / "transformer" / WEIGHTS)
    image = "condition_embedder.image_embedder"
    names = {
        "blocks.1.self_attn.q.diff_b": "blocks.1.attn1.to_q.bias",
        "blocks.2.diff_m": "blocks.2.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "img_emb.proj.0.diff": f"{image}.norm1.weight",
        "img_emb.proj.0.diff_b": f"{image}.norm1.bias",
        "img_emb.proj.4.diff": f"{image}.norm2.weight",
    }
    added = dict(zip(names.values(), normal(*(published[theirs].shape for theirs in names.values())), strict=True))
    found = {f"diffusion_model.{name}": added[theirs] for name, theirs in names.items()}
    merges(tmp_path / "style.safetensors", GOLDEN / "i2v", found, added, tmp_path)


def test_prefixes_of_other_trainers_and_of_prefixes(tmp_path):
    tensors, added = {}, {}
    image = "condition_embedder.image_embedder"
    for name, theirs, rows, columns in (
        ("lora_unet__blocks_0_self_attn_q", "blocks.0.attn1.to_q", 32, 32),
        ("lora_unet__blocks_0_cross_attn_k_img", "blocks.0.attn2.add_k_proj", 32, 32),
        ("pipe.dit.blocks.1.ffn.0", "blocks.1.ffn.net.0.proj", 48, 32),
        ("base_model.model.diffusion_model.blocks.2.cross_attn.o", "blocks.2.attn2.to_out.0", 32, 32),
        ("base_model.model.transformer.blocks.2.attn1.to_v", "blocks.2.attn1.to_v", 32, 32),
        ("lora_unet_img_emb_proj_1", f"{image}.ff.net.0.proj", 20, 20),
        ("lora_unet_time_projection_1", "condition_embedder.time_proj", 192, 32),
        ("lora_unet__head_head", "proj_out", 16, 32),
    ):
        down, up = normal((RANK, columns), (rows, RANK))
        tensors |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
        added[f"{theirs}.weight"] = up @ down
    merges(tmp_path / "style.safetensors", GOLDEN / "i2v", tensors, added, tmp_path)


def test_what_is_for_an_image_encoder_is_left_out_by_models_without_one(matrices, tmp_path):
    """As diffusers has it: files made for Wan 2.1's image to video are used with Wan 2.2's."""
    path = write(tmp_path / "steps.safetensors", "wan", matrices, ALPHA)
    plain = sora_jax.load(GOLDEN / "i2v-a14b", lora={path: 1.0})
    tensors = safetensors.numpy.load_file(path)
    image = "diffusion_model.blocks.0.cross_attn.k_img"
    tensors |= {
        f"{image}.lora_down.weight": np.ones((RANK, 32), np.float32),
        f"{image}.diff_b": np.ones(32, np.float32),
    }
    tensors |= {f"{image}.lora_up.weight": np.ones((32, RANK), np.float32)}
    safetensors.numpy.save_file(tensors, path)
    generator = sora_jax.load(GOLDEN / "i2v-a14b", lora={path: 1.0})
    jax.tree.map(np.testing.assert_array_equal, generator.params, plain.params)
    request = make_request(generator.config, "a red ball", image=np.zeros((16, 16, 3), np.uint8))
    assert any(
        "steps.safetensors also changes layers for an image encoder" in note for note in generator.notes(request)
    )
    assert not any("image encoder" in note for note in plain.notes(request))


@pytest.mark.parametrize("by_root", [False, True])
def test_pefts_own_folder_has_alpha_in_a_file_beside(by_root, tmp_path):
    down, up = normal((RANK, 32), (32, RANK))
    name = "base_model.model.blocks.0.attn1.to_q"
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "use_rslora": by_root}))
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    added = {"blocks.0.attn1.to_q.weight": 16 / (RANK**0.5 if by_root else RANK) * up @ down}
    merges(tmp_path / "adapter_model.safetensors", GOLDEN / "t2v", tensors, added, tmp_path)
    for text, error in (
        ("[]", "adapter_config.json is damaged"),
        ('{"alpha_pattern": {"(.*)*": 4}}', r"alpha_pattern has '\(\.\*\)\*'; only names of layers and their ends"),
        ('{"alpha_pattern": {"to_q": NaN}}', "its metadata are damaged: to_q is nan"),
        ('{"alpha_pattern": ["to_q"]}', "its metadata are damaged"),
    ):
        beside.write_text(text)
        with pytest.raises(InputError, match=error):
            sora_jax.load(GOLDEN / "t2v", lora={tmp_path / "adapter_model.safetensors": 1.0})


def test_alphas_of_single_layers_in_the_metadata(tmp_path):
    """By the names that the file has, or their ends; the first that fits counts, and one with ^ fits no end."""
    names = {
        "blocks.0.self_attn.q": ("blocks.0.attn1.to_q", 3),
        "blocks.1.self_attn.q": ("blocks.1.attn1.to_q", 5),
        "blocks.1.cross_attn.q": ("blocks.1.attn2.to_q", 7),
        "blocks.2.self_attn.k": ("blocks.2.attn1.to_k", 16),
    }
    patterns = {"^self_attn.k": 1, "elf_attn.k": 1, "^blocks.0.self_attn.q": 3, "self_attn.q": 5, "q": 7}
    config = {"lora_alpha": 16, "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors, added = {}, {}
    for name, (published, alpha) in names.items():
        down, up = normal((RANK, 32), (32, RANK))
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        added[f"{published}.weight"] = alpha / RANK * up @ down
    merges(tmp_path / "adapter_model.safetensors", GOLDEN / "t2v", tensors, added, tmp_path)


@pytest.mark.parametrize("part, alpha", [("transformer", 8), ("transformer_2", 2)])
def test_metadata_of_the_other_transformer_count_where_there_are_no_others(part, alpha, tmp_path):
    """As files of diffusers are used for either transformer, but those with parts for both have metadata of both."""
    down, up = normal((RANK, 32), (48, RANK))
    name = f"{part}.blocks.0.ffn.net.0.proj"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    told = {"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 64, f"{part}.lora_alpha": alpha}
    metadata = {"lora_adapter_metadata": json.dumps(told)}
    safetensors.numpy.save_file(tensors, path := tmp_path / "style.safetensors", metadata=metadata)
    plain, merged = (sora_jax.load(GOLDEN / "a14b", lora_low=files) for files in (None, {path: 1.0}))
    kernels = [g.params["dit_low"]["blocks"]["up"]["kernel"][0] for g in (merged, plain)]
    np.testing.assert_allclose(kernels[0] - kernels[1], alpha / RANK * (up @ down).T, atol=1e-5)


def test_a_bias_has_the_scale_of_its_matrices(tmp_path):
    """As peft merges those of `lora_bias`; a whole difference beside it has none."""
    down, up, bias, diff, other = normal((RANK, 32), (32, RANK), 32, 32, 32)
    one, two = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.1.self_attn.v"
    tensors = {f"{one}.lora_down.weight": down, f"{one}.lora_up.weight": up, f"{one}.lora_up.bias": bias}
    tensors |= {f"{one}.diff_b": diff, f"{one}.alpha": np.array(ALPHA, np.float32)}
    tensors |= {f"{two}.lora_A.weight": down, f"{two}.lora_B.weight": up, f"{two}.lora_B.bias": other}
    added = {"blocks.0.attn1.to_q.weight": ALPHA / RANK * up @ down}
    added |= {"blocks.0.attn1.to_q.bias": ALPHA / RANK * bias + diff}
    added |= {"blocks.1.attn1.to_v.weight": up @ down, "blocks.1.attn1.to_v.bias": other}
    merges(tmp_path / "style.safetensors", GOLDEN / "t2v", tensors, added, tmp_path)


def test_differences_of_tables_by_their_own_names(tmp_path):
    published = safetensors.numpy.load_file(GOLDEN / "flf" / "transformer" / WEIGHTS)
    names = {
        "blocks.1.modulation": "blocks.1.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    }
    added = dict(zip(names.values(), normal(*(published[theirs].shape for theirs in names.values())), strict=True))
    found = {f"diffusion_model.{name}.diff": added[theirs] for name, theirs in names.items()}
    merges(tmp_path / "style.safetensors", GOLDEN / "flf", found, added, tmp_path)


@pytest.mark.parametrize("dtype", ["int64", "int32", "float64", "float16"])
def test_alpha_is_a_number_of_any_format(dtype, tmp_path):
    down, up = normal((RANK, 32), (32, RANK))
    name = "lora_unet_blocks_0_self_attn_q"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.array([8], dtype)}
    added = {"blocks.0.attn1.to_q.weight": 8 / RANK * up @ down}
    merges(tmp_path / "style.safetensors", GOLDEN / "t2v", tensors, added, tmp_path)


@pytest.mark.parametrize("flat", [False, True])
def test_matrices_of_a_convolution(flat, tmp_path):
    down, up = normal((RANK, 12, 1, 2, 2), (32, RANK, 1, 1, 1))
    added = {"patch_embedding.weight": np.einsum("or,rcthw->octhw", up[:, :, 0, 0, 0], down)}
    if flat:
        down, up = down.reshape(RANK, -1), up.reshape(32, RANK)
    tensors = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    merges(tmp_path / "style.safetensors", GOLDEN / "i2v", tensors, added, tmp_path)


def test_a_file_for_low_noise_levels_is_not_for_others(matrices, tmp_path):
    path = write(tmp_path / "style.safetensors", "peft", matrices, None)
    tensors = {
        name.replace("transformer.", "transformer_2."): x for name, x in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(tensors, path)
    for model in ("a14b", "t2v"):
        with pytest.raises(InputError, match="is for the second of two transformers: give it as --lora-low to a"):
            sora_jax.load(GOLDEN / model, lora={path: 1.0})
    plain, low = (sora_jax.load(GOLDEN / "a14b", lora_low=files) for files in (None, {path: 1.0}))
    assert not np.array_equal(*(g.params["dit_low"]["blocks"]["up"]["kernel"] for g in (plain, low)))


def test_what_does_not_fit_is_named_before_a_model_is_read(matrices, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Tensor, "place", lambda _: pytest.fail("a parameter is being read"))
    path = tmp_path / "style.safetensors"
    down, up = matrices["blocks.0.attn1.to_q"]

    def refused(tensors, match):
        safetensors.numpy.save_file(tensors, path)
        with pytest.raises(InputError, match=match):
            sora_jax.load(GOLDEN / "t2v", lora={path: 1.0})

    name = "transformer.blocks.0.attn1.to_q"
    refused({f"{name}.lora_A.weight": down}, "attn1.to_q needs a lower and an upper matrix")
    refused({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up[:, :2]}, "matrix of one rank")
    refused({f"{name}.lora_A.weight": down[:, :7], f"{name}.lora_B.weight": up}, r"as \[32, 7\]; here it is \[32, 32\]")
    other = name.replace("0", "9")
    refused({f"{other}.lora_A.weight": down, f"{other}.lora_B.weight": up}, "blocks.9.attn1.to_q.weight, which this")
    refused({f"{name}.dora_scale": down}, "attn1.to_q.dora_scale is no part of a low-rank adaptation")
    refused({f"{name}.diff_b": down}, "it changes blocks.0.attn1.to_q.bias as")
    refused({"diffusion_model.blocks.0.diff_m": down}, "it changes blocks.0.scale_shift_table as")
    pair = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    refused({f"{name}.alpha": np.array(1.0, np.float32)}, r"attn1.to_q needs a lower and .* it has alpha \[\]")
    refused({f"{name}.lora_B.bias": up[:, 0]}, r"attn1.to_q needs a lower and .* it has bias \[32\]")
    refused({f"{name}.lora_A.weight": down[:0], f"{name}.lora_B.weight": up[:, :0]}, "of one rank above 0")
    refused(pair | {f"{name}.alpha": np.ones(0, np.float32)}, r"to_q.alpha has the shape \[0\]; it must be one number")
    refused(pair | {f"{name}.alpha": np.array(True)}, "to_q.alpha is BOOL, which cannot be read")
    refused({f"{name}.diff": down.astype(np.float64)}, "to_q.diff is F64, which cannot be read")
    norm = "transformer.blocks.0.attn1.norm_k"
    refused({f"{norm}.diff_b": down[0]}, "it changes blocks.0.attn1.norm_k.bias, which this transformer does not have")
    refused(pair | {f"{name}.diff_m": down}, "it changes blocks.0.attn1.to_q.scale_shift_table, which this")
    table = np.zeros((1, 6, 32), np.float32)
    refused({"blocks.0.diff_m": table, "blocks.0.modulation.diff": table}, "is there twice, under two names")
    patches = {"patch_embedding.lora_down.weight": down[:, :16], "patch_embedding.lora_up.weight": up[:16]}
    refused(patches, r"patch_embedding.weight as \[16, 16\]; here it is \[32, 4, 1, 2, 2\]")
    image = "blocks.0.cross_attn.k_img"
    seen = {f"{image}.lora_A.weight": down, f"{image}.lora_B.weight": up, f"{image}.diff_b": up[:, 0]}
    refused(seen, r"add_k_proj.bias \(and 1 more\).* made for a model that sees an image \(Wan 2.1 I2V\)")
    both = {f"{prefix}.{part}": x for prefix in (name, name[12:]) for part, x in (("lora_A.weight", down),)}
    refused(both, "is there twice, under two names")
    path.write_bytes(path.read_bytes()[:50])
    assert main(["generate", "a ball", "--model", str(GOLDEN / "t2v"), "--lora", f"{path}:0.5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "style.safetensors is damaged" in error
    assert main(["generate", "a ball", "--model", str(GOLDEN / "t2v"), "--lora", str(tmp_path / "x.pt")]) == 2
    assert "is a pickle, which is never read" in capsys.readouterr().err
