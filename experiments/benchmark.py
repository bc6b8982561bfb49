"""How long each part of the model takes, next to the rate of a plain matrix product on the same machine.

    python experiments/benchmark.py [--model DIR] [--json FILE] [--quick]

Prints a row for each part as soon as it is measured: median seconds, operations per second, the share of the rate of
a 2048 x 2048 x 2048 product (float32) that was timed in between, and compile time, cold and from a persistent cache
(in a temporary folder). Operations are those of matrix products and convolutions, two for each multiply-add. Those of a
convolution are what its definition takes; on CPUs the codec takes two thirds of them, where it doubles rows and columns
four ninths, and its share can pass 100 %.
"""

import argparse
import dataclasses
import functools
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict

from sora_jax import attention, media
from sora_jax.cli.config_file import load_config
from sora_jax.codec import Codec
from sora_jax.codec.layers import convolve
from sora_jax.counting import count_operations
from sora_jax.data.worlds.layout import CHANNELS
from sora_jax.dit import DiT, DiTConfig
from sora_jax.errors import InputError
from sora_jax.generate import Generator
from sora_jax.media import check_writable
from sora_jax.model_config import ModelConfig, SamplingConfig, abstract_params
from sora_jax.model_folder import read_model_folder
from sora_jax.models import BUNDLED
from sora_jax.safety import keys, mark, provenance
from sora_jax.safety.gate import load_gate
from sora_jax.safety.policy import load_policy
from sora_jax.safety.scan import scan
from sora_jax.text import T5Encoder, TextConfig, tokenize
from sora_jax.training import state as state_lib
from sora_jax.training.config import codec_config
from sora_jax.training.dit_task import Aligner, DiTTask
from sora_jax.video import Video

CONFIGS = Path(__file__).parents[1] / "configs"
PRODUCT = 2048
_MOST_MIB = 8192  # of attention, whose scores are not to fill the device
PROMPT = "a red ball rolls behind a gray wall"


def operations(function: Callable, *args: Any) -> int:
    """Operations of the matrix products and convolutions of `function(*args)`; args may be ShapeDtypeStructs."""
    return count_operations(jax.make_jaxpr(function)(*args).jaxpr)


@dataclasses.dataclass
class Row:
    """One line of the table; seconds are medians."""

    name: str
    seconds: float
    operations: int
    product_rate: float
    compile_cold: float | None = None
    compile_cached: float | None = None

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds

    def __str__(self) -> str:
        compiles = [f"{t:9.2f}" if t is not None else f"{'':9}" for t in (self.compile_cold, self.compile_cached)]
        share = f"{self.rate / self.product_rate:7.0%}"
        return f"{self.name:40}{self.seconds:11.4f}{self.rate / 1e9:10.1f}{share}{''.join(compiles)}"


HEADER = f"{'':40}{'seconds':>11}{'GFLOP/s':>10}{'share':>7}{'cold s':>9}{'cached s':>9}"


def seconds(call: Callable[[], Any]) -> float:
    """One call, until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


class Bench:
    """Measures, prints and collects rows."""

    def __init__(self, repeats: int):
        self.repeats, self.rows = repeats, []
        x = jnp.asarray(np.random.default_rng(0).normal(size=(PRODUCT, PRODUCT)), jnp.float32)
        product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest")).lower(x).compile()
        self._product = lambda: product(x)
        seconds(self._product)
        print(HEADER, flush=True)

    def measure(self, name: str, call: Callable[[], Any], count: int, **compile_times: float) -> Row:
        """Times `call`, alternating with the matrix product: whatever else the machine does meets both."""
        seconds(call)  # warms up
        pairs = [(seconds(self._product), seconds(call)) for _ in range(self.repeats)]
        product, own = (statistics.median(times) for times in zip(*pairs, strict=True))
        row = Row(name, own, count, 2 * PRODUCT**3 / product, **compile_times)
        self.rows.append(row)
        print(row, flush=True)
        return row

    def measure_function(self, name: str, function: Callable, *args: Any) -> Row:
        """The same for a function of arrays, which is compiled twice: cold, and from the persistent cache."""
        compiled, times = compile_twice(jax.jit(function), *args)
        return self.measure(name, lambda: compiled(*args), operations(function, *args), **times)


def compile_twice(jitted: Any, *args: Any) -> tuple[Any, dict[str, float]]:
    """The compiled function, and seconds from tracing to executable without and with the persistent cache."""
    times = {}
    for name in ("compile_cold", "compile_cached"):
        jax.clear_caches()
        start = time.perf_counter()
        compiled = jitted.lower(*args).compile()
        times[name] = time.perf_counter() - start
    return compiled, times


def random_model(training: ConfigDict, quick: bool) -> tuple[ModelConfig, Any]:
    """A model of the sizes in `configs/` with random parameters; `quick` narrows it."""
    codec = codec_config(load_config(str(CONFIGS / "worlds_codec.py")))
    if quick:
        codec = dataclasses.replace(codec, width=8, decoder_width=8)
        training.dit.update(heads=2, feed_forward=128, layers=2)
        training.align.layer = 1
    config = ModelConfig(
        text=TextConfig(**training.text),
        codec=codec,
        dit=DiTConfig(latent_channels=codec.latent_channels, text_width=training.text.width, **training.dit),
        sampling=SamplingConfig(**training.sampling, frames=training.frames, size=(training.size,) * 2),
    )
    random = np.random.default_rng(0)
    return config, jax.tree.map(
        lambda leaf: (random.normal(size=leaf.shape) / max(math.prod(leaf.shape[-2:-1]), 1) ** 0.5).astype(np.float32),
        abstract_params(config),
    )


class Task(DiTTask):
    """The loss of DiT training alone, without the data and the codec."""

    def __init__(self, config: ConfigDict, model: ModelConfig):
        self.config, self.text_config, self.dit_config = config, model.text, model.dit
        self.text = T5Encoder(model.text)
        self.dit = DiT(model.dit, keep_after=config.align.layer if config.align.weight else 0)
        self.aligner = Aligner(model.dit.width)
        self.latent_shape = model.codec.latent_shape(config.frames, config.size, config.size)
        self._weight_Z = np.ones(model.codec.latent_channels, np.float32)


def measure_model(bench: Bench, config: ModelConfig, params: Any, training: ConfigDict) -> None:
    """Rows for the parts of the model, for a whole generation and for a training step."""
    random, sampling = np.random.default_rng(0), config.sampling
    latent_shape = config.codec.latent_shape(sampling.frames, *sampling.size)
    video = jnp.asarray(random.uniform(-1, 1, (1, sampling.frames, *sampling.size, 3)), jnp.float32)

    def encode_text(params, ids_BL):
        return T5Encoder(config.text).apply({"params": params}, ids_BL)

    def denoise(params, x_BFYXZ, level_BF, text_BLD):
        return DiT(config.dit).apply({"params": params}, x_BFYXZ, level_BF, text_BLD)

    def codec(method):
        return lambda params, x: Codec(config.codec).apply({"params": params}, x, method=method)

    def dit_inputs(batch):
        return (
            jnp.asarray(random.normal(size=(batch, *latent_shape)), jnp.float32),
            jnp.full((batch, latent_shape[0]), 0.5),
            jnp.asarray(random.normal(size=(batch, config.text.length, config.text.width)), jnp.float32),
        )

    params = jax.device_put(params)
    ids_2L = tokenize([PROMPT, ""], config.text.length)
    text = bench.measure_function("text encoding, 2 prompts", encode_text, params["text"], ids_2L)
    step = bench.measure_function("DiT, batch 2 (guidance)", denoise, params["dit"], *dit_inputs(2))
    bench.measure_function(
        f"DiT, batch {training.batch} (training)", denoise, params["dit"], *dit_inputs(training.batch)
    )
    bench.measure_function("codec encode, 1 clip", codec("encode"), params["codec"], video)
    decode = bench.measure_function("codec decode, 1 clip", codec("decode"), params["codec"], dit_inputs(1)[0])

    generator = Generator(config, params)
    bench.measure(
        f"generation, {sampling.steps} steps",
        lambda: generator.generate(PROMPT, progress=False).frames,
        text.operations + sampling.steps * step.operations + decode.operations,
    )
    measure_exit(bench, generator.generate(PROMPT, progress=False))
    measure_training(bench, config, training)


def measure_exit(bench: Bench, video: Video) -> None:
    """Rows for what stands between frames and a file (see `sora_jax.safety.release`), and for the prompt gate."""
    gate, signer, key = load_gate(load_policy()), keys.load_signer(), keys.watermark_key()
    frames, fps = video.frames, video.fps
    with tempfile.TemporaryDirectory() as folder:
        encode = lambda: media.encode(frames, fps, ".mp4")  # noqa: E731
        plain, saved = encode(), Path(folder, "saved.mp4")
        bench.measure("gate, one prompt", lambda: gate.check(PROMPT), 0)
        bench.measure("exit: frame scan", lambda: scan(frames), 0)
        bench.measure("exit: mark", lambda: mark.embed(frames, 1, key), 0)
        bench.measure("exit: encode", encode, 0)
        bench.measure("exit: sign", lambda: provenance.sign(plain, ".mp4", video.claim, signer), 0)
        bench.measure("exit, whole", lambda: video.save(saved, signer=signer), 0)
        bench.measure("exit: verify", lambda: provenance.verify_signed(saved, signer), 0)
        bench.measure("exit: read back", lambda: media.count(saved), 0)


def measure_training(bench: Bench, config: ModelConfig, training: ConfigDict) -> None:
    """A row for one step of DiT training: forward, backward and update (whose products, in Muon, count too)."""
    task = Task(training, config)
    optimizer = state_lib.make_optimizer(training.optimizer, training.steps)
    state = jax.jit(lambda: meta.unbox(state_lib.create(task.initialize(jax.random.key(0)), optimizer)))()
    random, (F, Y, X, Z) = np.random.default_rng(0), task.latent_shape
    _, rows, columns = config.dit.patch
    batch = {
        "latents": random.normal(size=(training.batch, F, Y, X, Z)).astype(np.float16),
        "layout": random.normal(size=(training.batch, F, Y // rows, X // columns, CHANNELS)).astype(np.float16),
        "ids": tokenize([PROMPT] * training.batch, config.text.length),
    }
    step = state_lib.make_step(task.loss, optimizer, training.seed, training.ema_decay, state)
    compiled, times = compile_twice(step, state, batch)
    count = operations(step, state, batch)

    def call():
        nonlocal state  # the old one is donated to the step
        state, metrics = compiled(state, batch)
        return state, metrics

    bench.measure(f"training step, batch {training.batch}", call, count, **times)


def measure_convolutions(bench: Bench, quick: bool) -> None:
    """Rows that compare the codec's convolution with XLA's 3-D one, forwards and with both gradients."""
    channels, side = (32, 16) if quick else (96, 32)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(1, 7, side, side, channels)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(3, 3, 3, channels, channels)) / (27 * channels) ** 0.5, jnp.float32)

    def direct(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), ((0, 0), (1, 1), (1, 1)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    def gradients(function):
        return jax.grad(lambda x, kernel: jnp.sum(function(x, kernel) ** 2), argnums=(0, 1))

    for name, function in (("convolve", convolve), ("lax 3-D convolution", direct)):
        bench.measure_function(f"{name}, forward", function, x, kernel)
        bench.measure_function(f"{name}, gradients", gradients(function), x, kernel)


def measure_attention(bench: Bench, quick: bool) -> None:
    """Rows that compare the kernels of attention that this device has, and JAX's own, by the number of tokens.

    float32 on CPUs, bfloat16 elsewhere; peak memory is that of the compiled program, beside queries, keys, values.
    """
    platform = jax.default_backend()
    kernels = {"cpu": ("xla", "heads"), "gpu": ("xla", "cudnn"), "tpu": ("xla", "splash")}.get(platform, ("xla",))
    dtype, (heads, width) = (jnp.float32, (4, 64)) if platform == "cpu" else (jnp.bfloat16, (12, 128))
    for tokens in (64, 128) if quick else (1024, 4096, 8192) if platform == "cpu" else (4096, 16384, 65536):
        ours = [
            jax.random.normal(key, (1, heads, tokens, width), dtype) for key in jax.random.split(jax.random.key(0), 3)
        ]
        theirs = [x_BKNE.swapaxes(1, 2) for x_BKNE in ours]
        functions = {kernel: functools.partial(attention.attend, kernel=kernel) for kernel in kernels}
        functions["jax.nn"] = jax.nn.dot_product_attention
        for name, function in functions.items():
            arrays = theirs if name == "jax.nn" else ours
            compiled = jax.jit(function).lower(*arrays).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
            if memory > _MOST_MIB:
                print(f"attention {name}, {tokens} tokens: left out, it takes {memory:.0f} MiB")
                continue
            count = 4 * tokens**2 * heads * width
            bench.measure(
                f"attention {name}, {tokens} tokens, {memory:.0f} MiB", functools.partial(compiled, *arrays), count
            )


def peak_bytes() -> int:
    """The most main memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def run(model: Path | None, quick: bool) -> dict[str, Any]:
    """Measures everything; a dict for JSON."""
    training = load_config(str(CONFIGS / "worlds_dit.py"))
    if model is None and (quick or not BUNDLED.is_dir()):
        (config, params), source = random_model(training, quick), "random parameters"
    else:
        (config, params), source = read_model_folder(model or BUNDLED), str(model or "bundled")
    training.frames, training.size = config.sampling.frames, config.sampling.size[0]
    if quick:
        stride = config.codec.stride_space * config.dit.patch[1]
        small = dict(frames=1 + config.codec.stride_time, size=(2 * stride, 2 * stride), steps=2)
        config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **small))
        training.update(batch=2, frames=small["frames"], size=2 * stride)
    counts = {part: sum(x.size for x in jax.tree.leaves(params[part])) / 1e6 for part in params}
    sampling, device = config.sampling, jax.devices()[0]
    print(f"JAX {jax.__version__}, {device.device_kind}; {source}", end="; ")
    print(", ".join(f"{part} {count:.1f} M parameters" for part, count in counts.items()))
    print(f"{sampling.frames} frames of {sampling.size[0]} x {sampling.size[1]} pixels\n", flush=True)

    bench = Bench(repeats=1 if quick else 7)
    measure_model(bench, config, params, training)
    measure_convolutions(bench, quick)
    measure_attention(bench, quick)
    product_rate = statistics.median(row.product_rate for row in bench.rows)
    print(f"\nmatrix product {product_rate / 1e9:.1f} GFLOP/s; peak memory {peak_bytes() / 2**30:.2f} GiB")
    return {
        "jax": jax.__version__,
        "device": device.device_kind,
        "model": source,
        "parameters_millions": counts,
        "sampling": dataclasses.asdict(sampling),
        "quick": quick,
        "product_operations_per_second": product_rate,
        "peak_bytes": peak_bytes(),
        "rows": [{**dataclasses.asdict(row), "operations_per_second": row.rate} for row in bench.rows],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model folder (default: the bundled model)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--quick", action="store_true", help="small random model, measured once: does it run?")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        try:
            if args.json:
                check_writable(args.json)  # and not after all the measuring
            results = run(args.model, args.quick)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")
        except (InputError, OSError) as error:
            print(f"benchmark: error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
