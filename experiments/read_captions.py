"""A text encoder that learns to read captions before a DiT draws from them, held to what it said before.

    python experiments/read_captions.py MODEL OUT --steps 900

writes the model folder OUT: MODEL, whose text encoder was trained on captions of the worlds alone, to tell a `Reader`
which properties are of one object. Captions are cheap: that takes six minutes. It is also trained to say what it said
before, in the mean square, so that the DiT still understands it and can go on training from OUT. (Layers that it lacks
for the work, `deepen.py --part text` adds.)
"""

import argparse
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import trange

from sora_jax.data.worlds.captions import caption
from sora_jax.data.worlds.layout import PROPERTIES
from sora_jax.data.worlds.scenes import sample_scene
from sora_jax.errors import InputError
from sora_jax.model_folder import write_model_folder
from sora_jax.models import open_model
from sora_jax.text import T5Encoder, TextConfig, tokenize
from sora_jax.text.tokenizer import PAD
from sora_jax.training.state import make_optimizer

_OPTIMIZER = ConfigDict(
    dict(name="muon", learning_rate=2e-3, warmup=50, decay=0.5, b1=0.9, b2=0.98, weight_decay=0.01, clip=1.0)
)
_HELD = 3.0  # weight of what it said before
_HELD_OUT = 512
_STARTS = np.cumsum([0, *map(len, PROPERTIES.values())]).tolist()  # of each kind in a row of all properties
_LOOKS = _STARTS[2]  # colours and shapes, which every caption tells


class Reader(nn.Module):
    """Reads which properties are of one object: (B, L, D), (B, L) bool -> logits (B, looks, properties).

    Each colour and each shape has a learned query that attends to the features where the mask holds.
    """

    heads: int = 4
    head_width: int = 64

    @nn.compact
    def __call__(self, text_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        inner = self.heads * self.head_width

        def split(y):
            return y.reshape(*y.shape[:2], self.heads, self.head_width)

        query = self.param("query", nn.initializers.normal(1.0), (_LOOKS, inner))
        q = split(jnp.broadcast_to(query, (len(text_BLD), *query.shape)))
        k, v = (split(nn.Dense(inner, name=name)(text_BLD)) for name in ("key", "value"))
        read = jax.nn.dot_product_attention(q, k, v, mask=mask_BL[:, None, None, :])
        hidden = nn.silu(nn.Dense(inner, name="hidden")(read.reshape(len(q), _LOOKS, inner)))
        return nn.Dense(_STARTS[-1], name="out")(hidden)


def reading_loss(logits_BLP: jax.Array, bindings_BLP: jax.Array) -> jax.Array:
    """What a reader has wrong of each prompt: (B,), in nats, summed over properties, averaged over looks.

    It does not end at zero: captions leave out sizes and, now and then, the side that something moves to.
    """
    return optax.sigmoid_binary_cross_entropy(logits_BLP, bindings_BLP).sum(-1).mean(-1)


def draw(count: int, seed: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Captions of scenes, ids (N, L) int32; what is of one object in each, (N, looks, properties) float32, 0 or 1."""
    scenes = jax.jit(jax.vmap(sample_scene))(jax.random.split(jax.random.key(seed), count))
    scenes = jax.tree.map(np.asarray, scenes)
    bindings_NLP = np.zeros((count, _LOOKS, _STARTS[-1]), np.float32)
    for number, one in zip(*np.nonzero(scenes.present), strict=True):
        has = [start + getattr(scenes, name)[number, one] for name, start in zip(PROPERTIES, _STARTS, strict=False)]
        for look in has[:2]:
            bindings_NLP[number, look, has] = 1
    texts = [
        caption(jax.tree.map(lambda leaf, i=i: leaf[i], scenes), np.random.default_rng((seed, i))) for i in range(count)
    ]
    return tokenize(texts, length), bindings_NLP


def read_captions(config: TextConfig, before: dict, steps: int, captions: int, batch: int, seed: int) -> dict:
    """Parameters of the text encoder after so many steps on so many captions.

    Every hundred steps it prints, of captions held out, how many pairs of colour and shape are read without a fault,
    and how far its features are from what they were.
    """
    ids_NL, bindings_NLP = draw(captions + _HELD_OUT, seed, config.length)
    encoder, reader = T5Encoder(config), Reader()
    features = jnp.zeros((1, config.length, config.width))
    fresh = reader.init(jax.random.key(seed), features, jnp.ones((1, config.length), bool))["params"]
    params = {"text": before, "reader": fresh}
    optimizer = make_optimizer(_OPTIMIZER, steps)

    def losses(params, ids_BL, bindings_BLP):
        text_BLD, before_BLD = (encoder.apply({"params": text}, ids_BL) for text in (params["text"], before))
        logits_BLP = reader.apply({"params": params["reader"]}, text_BLD, ids_BL != PAD)
        # Features are zero at the padding, before and after.
        moved = jnp.sum((text_BLD - before_BLD) ** 2) / jnp.sum(before_BLD**2)
        right_BLL = (logits_BLP[..., :_LOOKS] > 0) == (bindings_BLP[..., :_LOOKS] > 0)
        return reading_loss(logits_BLP, bindings_BLP).mean(), moved, right_BLL.all((1, 2)).mean()

    @jax.jit
    def step(params, state, ids_BL, bindings_BLP):
        def total(params):
            reading, moved, _ = losses(params, ids_BL, bindings_BLP)
            return reading + _HELD * moved

        updates, state = optimizer.update(jax.grad(total)(params), state, params)
        return optax.apply_updates(params, updates), state

    measure, state, random = jax.jit(losses), optimizer.init(params), np.random.default_rng(seed)
    bar = trange(steps, unit="step")
    for number in bar:
        chosen = random.integers(captions, size=batch)
        params, state = step(params, state, ids_NL[chosen], bindings_NLP[chosen])
        if (number + 1) % 100 == 0 or number + 1 == steps:
            reading, moved, right = map(float, measure(params, ids_NL[captions:], bindings_NLP[captions:]))
            bar.write(f"{number + 1} steps: loss {reading:.3f}, read without a fault {right:.3f}, moved {moved:.4f}")
    return params["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--captions", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=79)
    options = parser.parse_args()
    try:
        config, tensors, tokenizer = open_model(options.model, "float32")
        if config.text.tokenizer != "bytes":
            raise InputError(f"{options.model}: only a text encoder over bytes learns from the captions of the worlds")
        before = jax.tree.map(lambda tensor: jnp.asarray(tensor.read(), jnp.float32), tensors["text"])
        text = read_captions(config.text, before, options.steps, options.captions, options.batch, options.seed)
        params = {**tensors, "text": jax.tree.map(np.asarray, text)}
        print(write_model_folder(options.out, config, params, tokenizer=getattr(tokenizer, "json", None)))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
