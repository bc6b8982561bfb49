"""A model with more layers that computes the same, to go on training from.

    python experiments/deepen.py MODEL OUT --layers 0,1,1,2,3,3,4,4,5

writes the model folder OUT, whose transformer (with `--part text`, whose text encoder) has these layers of MODEL's,
counted from 0. A layer named again is a copy that adds nothing yet: the last products of its attention and feed-forward
are zero, and training opens them (as fresh layers start, and as Net2Net grows a network, arXiv:1511.05641).
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from sora_jax.errors import InputError
from sora_jax.model_config import ModelConfig
from sora_jax.model_folder import write_model_folder
from sora_jax.models import open_model
from sora_jax.tensors import Tensor

_LAST = ("out", "down")  # the dense layers whose products a block adds to its tokens


def deepen(config: ModelConfig, params: dict, part: str, layers: list[int]) -> tuple[ModelConfig, dict]:
    """Config and parameters with these layers of the part; repeated ones are the identity.

    Args:
        params: {"text": ..., "codec": ..., "dit": ...}, tensors that are yet to be read.
        part: "dit" or "text".
        layers: 0 to the number that the part has - 1, each at least once, in order.

    Raises:
        ValueError: other layers.
    """
    sizes = getattr(config, part)
    if sorted(layers) != layers or {*layers} != {*range(sizes.layers)}:
        raise ValueError(f"layers must be 0 to {sizes.layers - 1}, each at least once, in order, not {layers}")
    again = [number for number, layer in enumerate(layers) if layer in layers[:number]]

    def grow(path, tensor: Tensor) -> np.ndarray:
        stacked = tensor.read()[layers]
        if any(key.key in _LAST for key in path):
            stacked[again] = 0
        return stacked

    blocks = jax.tree.map_with_path(grow, params[part]["blocks"])
    config = dataclasses.replace(config, **{part: dataclasses.replace(sizes, layers=len(layers))})
    return config, {**params, part: {**params[part], "blocks": blocks}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", required=True, type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--part", choices=("dit", "text"), default="dit")
    options = parser.parse_args()
    try:
        config, tensors, tokenizer = open_model(options.model, "float32")
        config, params = deepen(config, tensors, options.part, options.layers)
        print(write_model_folder(options.out, config, params, tokenizer=getattr(tokenizer, "json", None)))
    except (InputError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
