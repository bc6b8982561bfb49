"""Text: prompts to token ids (`tokenizer.py`) and ids to features (`t5.py`)."""

from sora_jax.text.t5 import T5Encoder, TextConfig
from sora_jax.text.tokenizer import ByteTokenizer, FileTokenizer, tokenize

__all__ = ["ByteTokenizer", "FileTokenizer", "T5Encoder", "TextConfig", "tokenize"]
