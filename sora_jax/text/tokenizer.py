"""UTF-8 bytes as tokens, numbered as in ByT5 (arXiv:2105.13626): 0 pads, 1 ends the text, byte b is b + 3."""

import unicodedata
from collections.abc import Sequence

import numpy as np

PAD, END, _OFFSET = 0, 1, 3
VOCABULARY_SIZE = 256 + _OFFSET


def clean(prompt: str) -> str:
    """Compatibility forms, lower case, single spaces, no final full stop: what the encoder is trained on."""
    return " ".join(unicodedata.normalize("NFKC", prompt).lower().split()).rstrip(" .")


def tokenize(prompts: Sequence[str], length: int) -> np.ndarray:
    """Prompts to ids, (B, L) int32 with L = `length`; what does not fit is cut, the end token always stands."""
    ids_BL = np.full((len(prompts), length), PAD, np.int32)
    for row, prompt in enumerate(prompts):
        text = [byte + _OFFSET for byte in clean(prompt).encode()][: length - 1] + [END]
        ids_BL[row, : len(text)] = text
    return ids_BL
