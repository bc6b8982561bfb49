"""Codec: a causal video VAE that turns frames into latents and back (see `vae.py`)."""

from sora_jax.codec.vae import Codec, CodecConfig

__all__ = ["Codec", "CodecConfig"]
