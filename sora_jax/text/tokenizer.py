"""Prompts to token ids. A tokenizer is called as `tokenizer(prompts, length)` and gives ids (B, L) int32, padded
with `PAD`; what does not fit is cut and the end token always stands; `tokenizer.unread` tells what was cut off.
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sora_jax.errors import InputError, one_line
from sora_jax.safety.normalize import repaired

PAD, END, _OFFSET = 0, 1, 3
VOCABULARY_SIZE = 256 + _OFFSET


def clean(prompt: str) -> str:
    """Compatibility forms, lower case, single spaces, no final full stop: what the encoder is trained on."""
    return " ".join(unicodedata.normalize("NFKC", prompt).lower().split()).rstrip(" .")


class ByteTokenizer:
    """UTF-8 bytes, numbered as in ByT5 (arXiv:2105.13626): 0 pads, 1 ends the text, byte b is b + 3."""

    def __call__(self, prompts: Sequence[str], length: int) -> np.ndarray:
        ids_BL = np.full((len(prompts), length), PAD, np.int32)
        for row, prompt in enumerate(prompts):
            text = [byte + _OFFSET for byte in self._read(prompt, length).encode()] + [END]
            ids_BL[row, : len(text)] = text
        return ids_BL

    def unread(self, prompt: str, length: int) -> str:
        return clean(prompt)[len(self._read(prompt, length)) :]

    def _read(self, prompt: str, length: int) -> str:
        """What fits, with whole characters."""
        return clean(prompt).encode()[: length - 1].decode(errors="ignore")


tokenize = ByteTokenizer()


class FileTokenizer:
    """The tokenizer that a `tokenizer.json` describes, after the cleaning that Wan's prompts get.

    Args:
      vocabulary_size: of the encoder that reads what it gives.

    Raises:
      InputError: the file cannot be read, or does not fit the encoder.
    """

    def __init__(self, path: Path, vocabulary_size: int):
        import tokenizers

        try:
            self.json = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.json)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except Exception as error:  # the library raises plain exceptions
            raise InputError(f"{path} is damaged: {one_line(error)}") from error
        largest = max(self._tokenizer.get_vocab().values(), default=0)
        if largest >= vocabulary_size:  # JAX would take another row of the embedding for it
            raise InputError(f"{path} has a token {largest}; the text encoder has {vocabulary_size}, counted from 0")

    def __call__(self, prompts: Sequence[str], length: int) -> np.ndarray:
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(length)
        ids_BL = np.full((len(prompts), length), PAD, np.int32)
        for row, encoding in enumerate(self._tokenizer.encode_batch([repaired(prompt) for prompt in prompts])):
            ids_BL[row, : len(encoding.ids)] = encoding.ids
        return ids_BL

    def unread(self, prompt: str, length: int) -> str:
        prompt = repaired(prompt)
        self._tokenizer.no_truncation()
        encoding = self._tokenizer.encode(prompt)
        # The last token ends the text; the one in its place is the first that is not read.
        return prompt[encoding.offsets[length - 1][0] :].strip() if len(encoding.ids) > length else ""
