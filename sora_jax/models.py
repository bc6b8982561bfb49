"""Models in folders of either layout, ours or that of diffusers: configs, tensors yet to be read, and conversion."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sora_jax import model_folder
from sora_jax.errors import InputError
from sora_jax.model_folder import ModelConfig, write_model_folder
from sora_jax.tensors import PICKLES
from sora_jax.text import ByteTokenizer, FileTokenizer

BUNDLED = Path(__file__).parent / "bundled"


def convert(source: str | os.PathLike, target: str | os.PathLike, dtype: str | None = None) -> Path:
    """Writes a model, such as a published folder, as one of our model folders, from which loading is a straight read.

    Of the model, a few megabytes or tensors are in memory at a time.

    Args:
        dtype: "float32", "float16" or "bfloat16"; by default that of a model folder, float32 for published ones.

    Raises:
        InputError: if `source` cannot be read or `target` not be written.
    """
    config, tensors, tokenizer = open_model(Path(source), "float32")
    return write_model_folder(target, config, tensors, dtype, getattr(tokenizer, "json", None))


def read_config(path: str | os.PathLike | None = None) -> ModelConfig:
    """The config of the model that `load` would load, at once; raises InputError."""
    path = Path(BUNDLED if path is None else path)
    if _is_published(path):
        from sora_jax.interop.configs import pipeline_config

        return pipeline_config(path)
    return model_folder.read_config(path)


def _is_published(path: Path) -> bool:
    """Whether a folder has the layout of diffusers; raises InputError if there are only pickles."""
    if (path / "model_index.json").is_file():
        return True
    pickles = [one for one in (path, *sorted(path.glob("*"))) if one.suffix in PICKLES and one.is_file()]
    if pickles and not (path / "model.json").is_file():
        raise InputError(
            f"{pickles[0]} is a pickle, which is never read; of Wan's published models those can be read whose names "
            "end in -Diffusers or -diffusers"
        )
    return False


def open_model(
    path: Path, dtype: str, mesh: Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any], ByteTokenizer | FileTokenizer]:
    """Config, parameters that are yet to be read, and tokenizer of a folder of either layout."""
    if _is_published(path):
        from sora_jax.interop.diffusers import open_pipeline_folder

        return open_pipeline_folder(path, dtype, mesh)
    config, tensors = model_folder.open_model_folder(path, dtype, mesh)
    tokenizer = FileTokenizer(path / "tokenizer.json") if config.text.tokenizer == "file" else ByteTokenizer()
    return config, tensors, tokenizer
