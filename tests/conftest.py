"""How the tests compile, where their signing key is, and a model with random parameters that compiles in seconds."""

import os
import tempfile
from importlib.metadata import version

# Compiling is nearly all the work of these tests: the compiler need not try hard, nor compile the same thing twice.
# Set before JAX is imported, and inherited by the processes that share the tests and by the commands that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    # The older way to make code of fused operations, which takes half as long. An unknown flag ends a process.
    if version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    _cache = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
# Tests sign with a key of their own.
_settings = tempfile.TemporaryDirectory()
os.environ["XDG_CONFIG_HOME"] = _settings.name

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from sora_jax.codec import CodecConfig  # noqa: E402
from sora_jax.dit import DiTConfig  # noqa: E402
from sora_jax.model_config import ModelConfig, SamplingConfig, abstract_params  # noqa: E402
from sora_jax.model_folder import write_model_folder  # noqa: E402# noqa: E402
from sora_jax.safety.keys import load_signer  # noqa: E402
from sora_jax.text import TextConfig  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def signing_key():
    """Made before any test, whichever is the first: making it prints a note."""
    load_signer()


@pytest.fixture(scope="session")
def tiny_config():
    return ModelConfig(
        text=TextConfig(259, width=8, heads=2, head_width=4, feed_forward=16, layers=1, length=16),
        codec=CodecConfig(4, 4, 4, multipliers=(1, 1, 1), downsample_time=(True, True), blocks=1, patch=4),
        dit=DiTConfig(4, heads=2, head_width=12, feed_forward=32, layers=2, text_width=8),
        sampling=SamplingConfig(steps=2, frames=5, size=(32, 64)),
        vocabulary=("a", "ball", "red"),
        description="red balls",
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.2 * random.normal(size=leaf.shape)).astype(np.float32), abstract_params(tiny_config)
    )


@pytest.fixture(scope="session")
def tiny_folder(tiny_config, tiny_params, tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("model") / "tiny", tiny_config, tiny_params)
