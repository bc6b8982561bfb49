"""DiT: the diffusion transformer that predicts the velocity of noisy latents (see `model.py`)."""

from sora_jax.dit.model import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig"]
