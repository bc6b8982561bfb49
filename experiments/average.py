"""The mean of models that come from one another, which is often a little better than each (arXiv:2203.05482).

    python experiments/average.py MODEL MODEL OUT

writes the model folder OUT with the mean of all parameters, and with the words of the last model.
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


def average(models: list[tuple[ModelConfig, dict]]) -> dict:
    """The mean of each parameter, float32.

    Args:
        models: configs and parameters that are yet to be read.

    Raises:
        InputError: the models differ in their sizes.
    """
    sizes = {(config.text, config.codec, config.dit, config.boundary, config.vision) for config, _ in models}
    if len(sizes) > 1:
        raise InputError("the models have different sizes, or different codecs: there is no mean of them")
    mean = lambda *tensors: np.mean([np.asarray(one.read(), np.float32) for one in tensors], axis=0)  # noqa: E731
    return jax.tree.map(mean, *(params for _, params in models))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="two model folders or more")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    if len(options.models) < 2:
        parser.error("give at least two models")
    try:
        opened = [open_model(model, "float32") for model in options.models]
        params = average([(config, tensors) for config, tensors, _ in opened])
        config, _, tokenizer = opened[-1]
        config = dataclasses.replace(config, dtype=opened[0][0].dtype)
        print(write_model_folder(options.out, config, params, tokenizer=getattr(tokenizer, "json", None)))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
