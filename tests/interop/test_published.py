"""The presets have the tensors of the published models, as the public classes make them: every name and every shape."""

import json
import math
from pathlib import Path

import jax
import pytest

from sora_jax.interop.configs import codec_config, dit_config, text_config, vision_config
from sora_jax.interop.diffusers import _sources, _unneeded
from sora_jax.interop.presets import PRESETS
from sora_jax.model_config import abstract_params
from sora_jax.model_folder import flatten

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "published.json").read_text())
READ = {"text": text_config, "codec": codec_config, "dit": dit_config, "vision": vision_config}


def published(name: str, part: str) -> dict:
    """The entry of a part of the preset `name`."""
    codec = "wan2.2-codec" if name == "wan2.2-ti2v-5b" else "wan2.1-codec"  # the A14B came with the older one
    return PUBLISHED[{"text": "umt5-xxl", "vision": "clip-vit-h", "codec": codec}.get(part, name)]


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_has_its_place_and_shape(name):
    preset = PRESETS[name]
    for part, tree in abstract_params(preset).items():
        entry, unneeded = published(name, part), _unneeded(preset, part)
        theirs = {
            tensor.format(layer): tuple(shape)
            for tensor, shape in entry["tensors"].items()
            for layer in range(entry["layers"] if "{}" in tensor else 1)
        }
        ours, used = flatten(tree), []
        for key, source in _sources(preset, part, ours).items():
            for tensor in source.names:
                shape = ours[key].shape[1:] if source.stacked else ours[key].shape
                assert source.layout.published(shape) == theirs[tensor], tensor
                layout = source.layout.convert
                assert jax.eval_shape(layout, jax.ShapeDtypeStruct(theirs[tensor], "float32")).shape == shape, tensor
                used.append(tensor)
        left = {tensor for tensor in theirs if unneeded(tensor)}
        assert sorted(used) == sorted(theirs.keys() - left)
        # A copy of the embedding is not counted twice; the image encoder ends before its last block.
        more = sum(math.prod(theirs[tensor]) for tensor in left) if part == "vision" else 0
        assert sum(leaf.size for leaf in ours.values()) + more == entry["parameters"]


@pytest.mark.parametrize("name", PRESETS)
def test_their_configs_are_read_as_the_presets(name, tmp_path):
    preset, path = PRESETS[name], tmp_path / "config.json"
    for part in preset.parts:
        path.write_text(json.dumps(published(name, part)["config"]))
        assert READ[part.removesuffix("_low")](path) == getattr(preset, part.removesuffix("_low")), part
