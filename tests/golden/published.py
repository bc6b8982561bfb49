"""Writes `published.json`: every tensor of the published models, by the public classes with the published sizes, which
need no memory for weights on torch's meta device. Needs the extra `parity`; the test that reads the file does not.

    python tests/golden/published.py

Each entry has the class, its config as it is saved, the number of parameters, and names and shapes of all tensors; in
a name, {} is the number of a layer, from 0 to `layers` - 1.
"""

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

FILE = Path(__file__).parent / "published.json"
LAYER = re.compile(r"^(blocks|encoder\.block|encoder\.layers)\.(\d+)\.")

# What the published configs say beyond the defaults of their class.
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
UMT5_XXL |= {"feed_forward_proj": "gated-gelu"}
CLIP_VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
CLIP_VIT_H |= {"image_size": 224, "patch_size": 14, "hidden_act": "gelu"}
CODECS = {
    "wan2.1-codec": {},
    "wan2.2-codec": {
        **{"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2},
        **{"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16},
        # Those of vae/config.json in Wan-AI/Wan2.2-TI2V-5B-Diffusers.
        "latents_mean": [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557]
        + [-0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825]
        + [-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502]
        + [-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123]
        + [-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748]
        + [0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        "latents_std": [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013]
        + [0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978]
        + [0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659]
        + [0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093]
        + [0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887]
        + [0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744],
    },
}
_LARGE = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
TRANSFORMERS = {
    "wan2.1-t2v-1.3b": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1-t2v-14b": _LARGE,
    "wan2.1-i2v-14b": {**_LARGE, **_IMAGE},
    "wan2.1-flf2v-14b": {**_LARGE, **_IMAGE, "pos_embed_seq_len": 514},
    "wan2.2-t2v-a14b": _LARGE,
    "wan2.2-i2v-a14b": {**_LARGE, "in_channels": 36},
    "wan2.2-ti2v-5b": {
        **{"num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "num_layers": 30},
        **{"in_channels": 48, "out_channels": 48},
    },
}
MODELS = ("umt5-xxl", "clip-vit-h", *CODECS, *TRANSFORMERS)


def module(model: str) -> torch.nn.Module:
    with torch.device("meta"):
        if model == "umt5-xxl":
            return UMT5EncoderModel(UMT5Config(**UMT5_XXL))
        if model == "clip-vit-h":
            return CLIPVisionModel(CLIPVisionConfig(**CLIP_VIT_H))
        if model in CODECS:
            return AutoencoderKLWan(**CODECS[model])
        return WanTransformer3DModel(**TRANSFORMERS[model])


def config(made: torch.nn.Module) -> dict[str, Any]:
    """As it is saved, but for the version that saved it."""
    save = made.config.save_pretrained if hasattr(made.config, "save_pretrained") else made.save_config
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        values = json.loads((Path(folder) / "config.json").read_text())
    return {name: value for name, value in values.items() if not name.endswith("_version")}


def tensors(made: torch.nn.Module) -> dict[str, Any]:
    """Number of parameters and layers; names and shapes, of all layers as of the first."""
    shapes = {name: list(value.shape) for name, value in made.state_dict().items()}
    layers = 1 + max((int(found[2]) for found in map(LAYER.match, shapes) if found), default=-1)
    collapsed = {LAYER.sub(r"\1.{}.", name): shape for name, shape in shapes.items()}
    assert shapes == {
        name.format(layer): shape for name, shape in collapsed.items() for layer in range(layers if "{}" in name else 1)
    }
    parameters = sum(math.prod(parameter.shape) for parameter in made.parameters())
    return {"parameters": parameters, "layers": layers, "tensors": collapsed}


def main():
    entries = []
    for model in MODELS:
        made = module(model)
        values = {"class": type(made).__name__, "config": config(made), **tensors(made)}
        lines = [f"{json.dumps(name)}: {json.dumps(values[name])}" for name in ("class", "config", "parameters")]
        lines.append(f'"layers": {values["layers"]}')
        names = ",\n".join(f"  {json.dumps(name)}: {shape}" for name, shape in values["tensors"].items())
        entries.append(f"{json.dumps(model)}: {{\n " + ",\n ".join(lines) + f',\n "tensors": {{\n{names}}}}}')
    FILE.write_text("{\n" + ",\n".join(entries) + "\n}\n")


if __name__ == "__main__":
    main()
