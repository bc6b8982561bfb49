"""Low-rank adaptations: merging one equals loading a model whose published tensors were changed by hand."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import sora_jax
from sora_jax.cli import main
from sora_jax.errors import InputError
from sora_jax.tensors import Tensor

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
    with pytest.raises(InputError, match="lora_low is for models with a second transformer"):
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


def test_differences_of_biases_and_norms_and_the_alpha_of_the_metadata(tensors, tmp_path):
    random = np.random.default_rng(0)
    bias, scale = (random.normal(size=32).astype(np.float32) for _ in range(2))
    attention = "diffusion_model.blocks.0.self_attn"
    found = {f"{attention}.k.diff_b": bias, f"{attention}.norm_k.diff": scale}
    down, up = random.normal(size=(4, 32)).astype(np.float32), random.normal(size=(48, 4)).astype(np.float32)
    name = "transformer.blocks.0.ffn.net.0.proj"
    found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    metadata = {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 8}'}
    safetensors.numpy.save_file(found, path := tmp_path / "style.safetensors", metadata=metadata)
    changed = dict(tensors)
    changed["blocks.0.attn1.to_k.bias"] = tensors["blocks.0.attn1.to_k.bias"] + 0.5 * bias
    changed["blocks.0.attn1.norm_k.weight"] = tensors["blocks.0.attn1.norm_k.weight"] + 0.5 * scale
    changed["blocks.0.ffn.net.0.proj.weight"] = tensors["blocks.0.ffn.net.0.proj.weight"] + 0.5 * 8 / 4 * up @ down
    folder = Path(shutil.copytree(GOLDEN / "t2v", tmp_path / "model"))
    safetensors.numpy.save_file(changed, folder / "transformer" / WEIGHTS)
    merged, by_hand = sora_jax.load(GOLDEN / "t2v", lora={path: 0.5}).params, sora_jax.load(folder).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), merged, by_hand)


def test_differences_of_everything_that_is_small(tmp_path):
    """What extractors write of one- and five-dimensional tensors and of tables, such as LightX2V's `.diff_m`."""
    source = GOLDEN / "i2v" / "transformer" / WEIGHTS
    tensors, random = safetensors.numpy.load_file(source), np.random.default_rng(0)
    image = "condition_embedder.image_embedder"
    found, changed = {}, dict(tensors)
    for name, theirs in {
        "blocks.1.self_attn.q.diff_b": "blocks.1.attn1.to_q.bias",
        "blocks.2.diff_m": "blocks.2.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "img_emb.proj.0.diff": f"{image}.norm1.weight",
        "img_emb.proj.0.diff_b": f"{image}.norm1.bias",
        "img_emb.proj.4.diff": f"{image}.norm2.weight",
    }.items():
        found[f"diffusion_model.{name}"] = random.normal(size=tensors[theirs].shape).astype(np.float32)
        changed[theirs] = tensors[theirs] + 0.5 * found[f"diffusion_model.{name}"]
    safetensors.numpy.save_file(found, path := tmp_path / "style.safetensors")
    folder = Path(shutil.copytree(GOLDEN / "i2v", tmp_path / "model"))
    safetensors.numpy.save_file(changed, folder / "transformer" / WEIGHTS)
    merged, by_hand = sora_jax.load(GOLDEN / "i2v", lora={path: 0.5}).params, sora_jax.load(folder).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), merged, by_hand)


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
    refused({f"{other}.lora_A.weight": down, f"{other}.lora_B.weight": up}, "blocks.9.attn1.to_q, which this")
    refused({f"{name}.dora_scale": down}, "attn1.to_q.dora_scale is no part of a low-rank adaptation")
    refused({f"{name}.diff_b": down}, "it changes blocks.0.attn1.to_q.bias as")
    refused({"diffusion_model.blocks.0.diff_m": down}, "it changes blocks.0.scale_shift_table as")
    both = {f"{prefix}.{part}": x for prefix in (name, name[12:]) for part, x in (("lora_A.weight", down),)}
    refused(both, "is there twice, under two names")
    path.write_bytes(path.read_bytes()[:50])
    assert main(["generate", "a ball", "--model", str(GOLDEN / "t2v"), "--lora", f"{path}:0.5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "style.safetensors is damaged" in error
    assert main(["generate", "a ball", "--model", str(GOLDEN / "t2v"), "--lora", str(tmp_path / "x.pt")]) == 2
    assert "is a pickle, which is never read" in capsys.readouterr().err
