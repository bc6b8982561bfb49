"""Where a codec's time goes: each layer of its encoder and decoder by itself, on the next piece of a video.

    python experiments/codec_levels.py                                        # Wan 2.1's, 256x256
    python experiments/codec_levels.py --model wan2.2-ti2v-5b --size 704x1280 --repeats 3

A piece is one latent frame or the frames that become one, with what the layers remember of the frames before. Prints
median seconds, operations per second and their share of the rate of a matrix product timed in between, by layer as the
code names them, and the part of the sum that each level takes. Parameters and inputs are random. Operations as in
`benchmark.py`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from benchmark import Bench, operations
from mfu import random_arrays

from sora_jax.cli import words
from sora_jax.codec import Codec
from sora_jax.codec.vae import piece
from sora_jax.errors import InputError
from sora_jax.model_config import abstract_params
from sora_jax.plan import model_config


def calls(codec: Codec, params: Any, chunk: Any, method: str) -> Iterator[tuple[str, Callable, tuple]]:
    """What the encoder or decoder calls for the next piece of a video, in that order.

    Args:
        params, chunk: abstract; chunk (B, T, H, W, 3) or (B, 1, Y, X, Z).

    Yields:
        a layer's name, the function of its parameters, state and input, and these, abstract.
    """
    found = []

    def note(call, args, kwargs, context):
        if context.method_name == "__call__" and len(context.module.path) == 2:
            found.append((context.module.clone(parent=None), args))
        return call(*args, **kwargs)

    def run(params, chunk):
        state = piece(codec, params, {}, chunk[:, :1], True, method)[1]
        found.clear()  # those of a video's first frame
        return piece(codec, params, state, chunk, False, method)[1]

    with nn.intercept_methods(note):
        streams = jax.eval_shape(run, params, chunk)
    side = f"{method}r"
    for layer, (x, *rest) in found:

        def call(params, state, x, layer=layer, rest=rest):
            return layer.apply({"params": params, "stream": state}, x, *rest, mutable=["stream"])

        x = jax.ShapeDtypeStruct(x.shape, x.dtype)
        yield layer.name, call, (params[side][layer.name], streams[side].get(layer.name, {}), x)


def measure(bench: Bench, codec: Codec, params: Any, chunk: Any, method: str) -> None:
    """Prints a row for each layer, and what part of their sum each level takes."""
    levels = {}
    for name, call, arguments in calls(codec, params, chunk, method):
        arguments = random_arrays(arguments)
        compiled = jax.jit(call).lower(*arguments).compile()
        run = lambda compiled=compiled, arguments=arguments: compiled(*arguments)  # noqa: E731
        shape = "x".join(map(str, arguments[2].shape[1:]))
        row = bench.measure(f"{method} {name}, {shape}", run, operations(call, *arguments))
        level = re.sub(r"(level\d+)_.*", r"\1", name)
        levels[level] = levels.get(level, 0.0) + row.seconds
    total = sum(levels.values())
    shares = ", ".join(f"{level} {spent / total:.1%}" for level, spent in levels.items())
    print(f"{method}: {total:.4f} s in all layers, of that {shares}\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan2.1-t2v-1.3b", help="a preset, a model folder, or bundled")
    parser.add_argument("--size", type=words.size, default=(256, 256), metavar="HxW")
    parser.add_argument("--repeats", type=words.whole(1), default=5)
    options = parser.parse_args()
    try:
        config = model_config(options.model).codec
    except InputError as error:
        parser.error(str(error))
    if any(side % config.stride_space for side in options.size):
        parser.error(f"--size must be multiples of {config.stride_space}")
    params = abstract_params(model_config(options.model))["codec"]
    _, Y, X, Z = config.latent_shape(1, *options.size)
    bench = Bench(options.repeats)
    for method, shape in (("encode", (config.stride_time, *options.size, 3)), ("decode", (1, Y, X, Z))):
        measure(bench, Codec(config), params, jax.ShapeDtypeStruct((1, *shape), jnp.float32), method)
    return 0


if __name__ == "__main__":
    sys.exit(main())
