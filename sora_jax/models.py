"""Models in folders of either layout, ours or that of diffusers: loaded, opened, converted."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sora_jax import background, hosts, model_folder
from sora_jax.attention import check_kernel
from sora_jax.errors import InputError
from sora_jax.generate import Generator
from sora_jax.model_config import ModelConfig
from sora_jax.model_folder import write_model_folder
from sora_jax.safety.policy import Policy
from sora_jax.tensors import PICKLES, OnDemand, Tensor, files_sha256, weight_files
from sora_jax.text import ByteTokenizer, FileTokenizer

BUNDLED = Path(__file__).parent / "bundled"
DTYPES = ("float32", "bfloat16")


def load(
    path: str | os.PathLike | None = None,
    dtype: str | None = None,
    *,
    kernel: str = "auto",
    lora: dict[str | os.PathLike, float] | None = None,
    lora_low: dict[str | os.PathLike, float] | None = None,
    mesh: Mesh | None = None,
    offload: bool = False,
    policy: Policy | None = None,
) -> Generator:
    """The generator of a model folder, ours or one in the diffusers layout; without a path, of the model that comes
    with the package.

    Compiled programs are kept in the user's cache folder, unless JAX already has a compilation cache.

    Args:
        path: the folder.
        dtype: precision of the large products, "float32" or "bfloat16"; by default float32 for the bundled model and
            on CPU, where bfloat16 is slower, and bfloat16 otherwise.
        kernel: of the transformer's attention (see `sora_jax.attention`); by default chosen by the device.
        lora: files of low-rank adaptations with the scale of each, merged into the transformer in this order.
        lora_low: the same for a second transformer for low noise levels.
        mesh: of `sora_jax.mesh`, the devices that share the parameters; by default all are on JAX's default device.
            Either way they go there in pieces: the host never holds the model.
        offload: a part of the model is on the devices only while it works, and is read again for the next video: for
            models whose parts fit one by one. `sora-jax plan --offload` tells.
        policy: what prompts may ask for (see `sora_jax.safety.policy.load_policy`); by default that of the package.

    Raises:
        InputError: if the folder is not a readable model.
    """
    _keep_compiled_programs()
    folder = Path(BUNDLED if path is None else path)
    if dtype is None:
        dtype = "float32" if path is None or jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it can be {' or '.join(DTYPES)}")
    check_kernel(kernel, mesh.devices.flat[0].platform if mesh else jax.default_backend())
    config, tensors, tokenizer = open_model(folder, dtype, mesh)
    notes = []
    for name, part, files in (("lora", "dit", lora or {}), ("lora_low", "dit_low", lora_low or {})):
        if not isinstance(files, dict):
            raise InputError(f"{name} must be a dictionary, of files with their scales, not {files!r}")
        if files and part not in tensors:
            raise InputError("--lora-low (lora_low) is for models with a second transformer; this one has none")
        for file, scale in files.items():
            from sora_jax.interop import lora as lora_lib

            tensors[part], left_out = lora_lib.merge(config.dit, tensors[part], file, scale, low=part == "dit_low")
            if left_out:
                notes.append(f"note: {file} also changes layers for an image encoder, which this model does not have")
            is_low_too = Path(file).resolve() in {Path(low).resolve() for low in lora_low or {}}
            if part == "dit" and not is_low_too and lora_lib.is_for_both(file):
                use = "give it as --lora-low too, with the scale 0 if that is not wanted"
                use = use if "dit_low" in tensors else "this model has one"
                raise InputError(f"{file} has parts for two transformers: {use}")
    adapted = {"dit": lora or {}, "dit_low": lora_low or {}}
    # The host that writes the files says what they were made with.
    weights = background.start(partial(_weights_of, folder, adapted)) if hosts.is_first() else str
    params = OnDemand(tensors, config.transformers) if offload else jax.tree.map(Tensor.place, tensors)
    return Generator(config, params, tokenizer, dtype, mesh, folder.resolve().name, weights, policy, kernel, notes)


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
    if config.text.tokenizer == "file":
        return config, tensors, FileTokenizer(path / "tokenizer.json", config.text.vocabulary_size)
    return config, tensors, ByteTokenizer()


def _weights_of(folder: Path, adapted: dict[str, dict[str | os.PathLike, float]]) -> str:
    """Digest of the weights in a folder and of the adaptations merged into each part of them."""
    files = weight_files(folder)
    for part, merged in adapted.items():
        for number, (path, scale) in enumerate(merged.items()):
            files[f"{part} + {number} {scale} {Path(path).name}"] = Path(path)
    return files_sha256(files)


def _keep_compiled_programs() -> None:
    if jax.config.jax_compilation_cache_dir is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        return  # no home: nowhere to keep anything
    jax.config.update("jax_compilation_cache_dir", str(Path(home, "sora_jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # JAX looks for its cache once, at the first compilation, which may have been before this.
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
