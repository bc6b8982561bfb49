"""A clip through the codec chunk by chunk, as `generate` takes long ones."""

from functools import partial

import jax
import numpy as np

from sora_jax.codec.vae import piece, stream


def in_chunks(codec, params, chunks, method):
    run = jax.jit(partial(piece, codec, method=method), static_argnums=3)
    return np.concatenate(list(stream(run, params, chunks)), axis=1)
