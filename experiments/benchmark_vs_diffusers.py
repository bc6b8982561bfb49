"""Wan's parts here and in diffusers, side by side: same random weights, same inputs, in turns.

    pip install -e ".[parity]"          # on a GPU ".[parity,cuda]"
    python experiments/benchmark_vs_diffusers.py [--repeats 5] [--parts decode whole] [--json FILE]
    python experiments/benchmark_vs_diffusers.py --on gpu       # the 1.3B at 480p and 81 frames, in bfloat16

One process runs this project, one diffusers; each loads the same folder (two layers of the 1.3B's transformer, on a GPU
all 30; one of UMT5-XXL with a few words; the whole Wan 2.1 codec), warms up, and then they take turns. Prints the rate
of a matrix product in both, median seconds of both, their ratio (above 1: this project is faster), how far the results
are apart, what the transformer makes of the machine, and peak memory: of the process, on a GPU of the device.

On CPUs all is float32, and the codec takes minutes: --parts names what to measure. On GPUs text encoder and transformer
are bfloat16 and the codec float32, as both projects run it; attention is cuDNN's here and what torch chooses there,
where the transformer goes through torch.compile. Products of float32 are TF32 here and float32 there, convolutions TF32
in both, unless one asks for more.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.cli import words

ROOT = Path(__file__).parents[1]
PROMPT, NEGATIVE = "a red ball rolls behind a gray wall", "a blue cube"
STEPS = 4
WARM_UPS = 20  # of the product, which is too short to bring a GPU to its clock by itself
NEEDED = ("torch", "diffusers", "transformers")
PARTS = ("text", "dit", "encode", "decode", "whole")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured, and on what.

    Attributes:
        on: "cpu" or "gpu".
        dtype: of text encoder and transformer.
        layers: of the transformer.
        frames, size: of the video, in pixels; those of the transformer's step have `dit_size`.
        narrow: a few channels in place of Wan's: does it run?
    """

    on: str
    dtype: str
    layers: int
    frames: int
    size: tuple[int, int]
    dit_size: tuple[int, int]
    product: int
    narrow: bool = False

    @property
    def widths(self) -> dict[str, dict[str, Any]]:
        """Arguments of `make.py` in `tests/golden`, by part."""
        if self.narrow:
            text = dict(width=32, heads=2, head_width=16, feed_forward=40, layers=1)
            return {
                "text": text,
                "dit": dict(channels=16, heads=2, head_width=16, feed_forward=48, text=32, frequencies=32),
                "codec": dict(channels=16, base=4, multipliers=(1, 1, 1, 1), blocks=1),
            }
        return {
            "text": dict(width=4096, heads=64, head_width=64, feed_forward=10240, layers=1),
            "dit": dict(channels=16, heads=12, head_width=128, feed_forward=8960, text=4096, frequencies=256),
            "codec": dict(channels=16, base=96, multipliers=(1, 2, 4, 4), blocks=2),
        }

    def names(self) -> dict[str, str]:
        """Of the rows."""
        video = f"{self.frames} frames of {self.size[0]} x {self.size[1]}"
        tokens = (self.frames // 4 + 1) * self.dit_size[0] * self.dit_size[1] // 16**2
        return {
            "product": f"matrix product, {self.product} x {self.product} x {self.product}",
            "text": "text encoder, 1 layer of XXL, 512 tokens",
            "dit": f"DiT step, {self.layers} layers of the 1.3B, {tokens:,} tokens",
            "encode": f"codec encode, {video}",
            "decode": f"codec decode, {video}",
            "whole": f"pipeline, {video}, {STEPS} guided steps",
        }


SETTINGS = {
    "cpu": Setting("cpu", "float32", 2, 17, (256, 256), (320, 320), 2048),
    "gpu": Setting("gpu", "bfloat16", 30, 81, (480, 832), (480, 832), 8192),
}
QUICK = dict(narrow=True, frames=5, size=(32, 32), dit_size=(32, 32), product=64)


def make_folder(folder: Path, setting: Setting) -> None:
    """Random weights in the published layout; in a process of its own, so that no one else's memory counts them."""
    import torch
    from diffusers import WanPipeline

    spec = importlib.util.spec_from_file_location("make", ROOT / "tests" / "golden" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    torch.manual_seed(0)
    widths = setting.widths
    WanPipeline(
        tokenizer=make.tokenizer(),
        text_encoder=make.text_encoder(**widths["text"]),
        vae=make.codec("t2v", decoder=None, time=(False, True, True), **widths["codec"]),
        scheduler=make.scheduler("t2v"),
        transformer=make.transformer(layers=setting.layers, **widths["dit"]),
    ).save_pretrained(folder)


def inputs(setting: Setting) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    latents = 1 + (setting.frames - 1) // 4
    (height, width), (dit_height, dit_width) = setting.size, setting.dit_size
    return {
        "ids": np.where(np.arange(512) < 100, random.integers(3, 12, (1, 512)), 0),
        "latents": normal(1, latents, dit_height // 8, dit_width // 8, 16),
        "text": normal(1, 512, setting.widths["dit"]["text"]),
        "video": random.uniform(-1, 1, (1, setting.frames, height, width, 3)).astype(np.float32),
        "codes": normal(1, latents, height // 8, width // 8, 16),
        "noise": normal(1, latents, height // 8, width // 8, 16),
    }


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two projects.

    Attributes:
        calls: by part; each starts the work and gives the result, channels last.
        wait: until a result is there.
        fetch: a result as an array of NumPy.
        peak_bytes: the most memory so far.
        load_seconds: from the folder to parameters on the device.
        versions: of the packages that compute.
        facts: name of the device and operations of the transformer's step, where this side knows them.
    """

    calls: dict[str, Callable[[], Any]]
    wait: Callable[[Any], Any]
    fetch: Callable[[Any], np.ndarray]
    peak_bytes: Callable[[], int]
    load_seconds: float
    versions: dict[str, str]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def process_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def ours(folder: Path, setting: Setting) -> Side:
    import jax
    import jax.numpy as jnp

    import sora_jax
    from sora_jax import pipeline
    from sora_jax.codec import Codec
    from sora_jax.codec.vae import piece
    from sora_jax.counting import count_operations
    from sora_jax.dit import DiT

    device, dtype = jax.devices(setting.on)[0], jnp.dtype(setting.dtype)
    start = time.perf_counter()
    generator = sora_jax.load(folder, setting.dtype)
    jax.block_until_ready(generator.params)
    load_seconds = time.perf_counter() - start
    generator.weights()  # their digest, for the signature, comes from a thread beside
    config, params = generator.config, generator.params
    x = jax.device_put(inputs(setting))
    text = jax.jit(partial(pipeline.encode_text, config, dtype))
    dit = jax.jit(lambda p, *args: DiT(config.dit, dtype).apply({"params": p}, *args))
    options = pipeline.codec_options(setting.on)
    run = partial(piece, Codec(config.codec))
    code = jax.jit(run, static_argnums=(3, 4), donate_argnums=1, compiler_options=options)
    level = jnp.full(x["latents"].shape[:2], 0.5)

    def in_pieces(video, ends, method):
        """One latent frame after the other, as `generate` does from this size on; so does diffusers."""
        state, results = {}, []
        for start, end in itertools.pairwise((0, *ends)):
            result, state = code(params["codec"], state, video[:, start:end], start == 0, method)
            results.append(jax.tree.leaves(result)[0])  # of a posterior the mean
        return jnp.concatenate(results, axis=1)

    def whole():
        options = {"negative_prompt": NEGATIVE, "noise": x["noise"], "size": setting.size, "frames": setting.frames}
        return generator.generate(PROMPT, steps=STEPS, guidance=4.0, progress=False, **options).frames / 255.0

    square = jnp.full((setting.product, setting.product), 1 / setting.product, dtype)
    product = jax.jit(lambda x: x @ x)
    step = params["dit"], x["latents"], level, x["text"]
    return Side(
        calls={
            "product": lambda: product(square),
            "text": lambda: text(params["text"], x["ids"]),
            "dit": lambda: dit(*step),
            "encode": lambda: in_pieces(x["video"], range(1, setting.frames + 1, 4), "posterior"),
            "decode": lambda: jnp.clip(in_pieces(x["codes"], range(1, x["codes"].shape[1] + 1), "reconstruct"), -1, 1),
            "whole": whole,
        },
        wait=jax.block_until_ready,
        fetch=lambda result: np.asarray(result, np.float32),
        peak_bytes=lambda: (device.memory_stats() or {}).get("peak_bytes_in_use") or process_peak_bytes(),
        load_seconds=load_seconds,
        versions={"jax": jax.__version__},
        facts={"device": device.device_kind, "dit_operations": count_operations(jax.make_jaxpr(dit)(*step).jaxpr)},
    )


def theirs(folder: Path, setting: Setting) -> Side:
    """The same of diffusers and transformers."""
    import diffusers
    import torch
    import transformers
    from diffusers import AutoencoderKLWan, WanPipeline

    is_gpu, dtype = setting.on == "gpu", getattr(torch, setting.dtype)
    device = "cuda" if is_gpu else "cpu"
    torch.backends.cudnn.benchmark = True  # XLA looks for the fastest convolutions, too
    start = time.perf_counter()
    codec = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    made = WanPipeline.from_pretrained(folder, vae=codec, torch_dtype=dtype).to(device)
    load_seconds = time.perf_counter() - start
    made.set_progress_bar_config(disable=True)
    if is_gpu:
        made.transformer.compile()
    x = {name: torch.tensor(value, device=device) for name, value in inputs(setting).items()}
    for name in ("latents", "video", "codes", "noise"):
        x[name] = x[name].movedim(-1, 1).contiguous()
    x |= {name: x[name].to(dtype) for name in ("latents", "text")}

    def text():
        features = made.text_encoder(x["ids"], x["ids"] > 0).last_hidden_state
        return features * (x["ids"] > 0)[..., None]

    def step():
        level = torch.tensor([500], device=device)
        return made.transformer(x["latents"], level, x["text"], return_dict=False)[0].movedim(1, -1)

    def whole():
        height, width = setting.size
        options = {"height": height, "width": width, "num_frames": setting.frames, "num_inference_steps": STEPS}
        options |= {"guidance_scale": 4.0, "latents": x["noise"], "output_type": "np"}
        return made(PROMPT, negative_prompt=NEGATIVE, **options).frames[0]

    square = torch.full((setting.product, setting.product), 1 / setting.product, dtype=dtype, device=device)
    calls = {
        "product": lambda: square @ square,
        "text": text,
        "dit": step,
        "encode": lambda: made.vae.encode(x["video"]).latent_dist.mean.movedim(1, -1),
        "decode": lambda: made.vae.decode(x["codes"]).sample.movedim(1, -1),
        "whole": whole,
    }

    def wait(result):
        if is_gpu:
            torch.cuda.synchronize()

    return Side(
        calls={name: torch.no_grad()(call) for name, call in calls.items()},
        wait=wait,
        fetch=lambda result: result if isinstance(result, np.ndarray) else result.float().cpu().numpy(),
        peak_bytes=torch.cuda.max_memory_allocated if is_gpu else process_peak_bytes,
        load_seconds=load_seconds,
        versions={package.__name__: package.__version__ for package in (torch, diffusers, transformers)},
    )


def worker(which: str, folder: Path, setting: Setting, pipe: Any) -> None:
    """Loads, then answers (part) with (seconds, result) until there is no more to do, and ends with its peak memory."""
    side = {"ours": ours, "theirs": theirs}[which](folder, setting)
    pipe.send((side.load_seconds, side.versions, side.facts))
    while part := pipe.recv():
        start = time.perf_counter()
        result = side.calls[part]()
        side.wait(result)
        pipe.send((time.perf_counter() - start, side.fetch(result)))
    pipe.send(side.peak_bytes())


def compare(setting: Setting, parts: Sequence[str], repeats: int, save: Callable[[dict], None]) -> None:
    """Prints the table; `save` gets what there is after each row."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        maker = spawn.Process(target=make_folder, args=(folder, setting))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise EOFError  # as where a worker fails
        pipes, facts = {}, {}
        results = {"setting": dataclasses.asdict(setting), "versions": {}, "parts": {}}
        results |= {"load_seconds": {}, "peak_bytes": {}}
        for which in ("ours", "theirs"):
            pipes[which], end = spawn.Pipe()
            spawn.Process(target=worker, args=(which, folder, setting, end), daemon=True).start()
            end.close()  # so that a worker that dies ends the wait for it
            results["load_seconds"][which], versions, known = pipes[which].recv()
            results["versions"] |= versions
            facts |= known

        def call(which, part):
            pipes[which].send(part)
            return pipes[which].recv()

        print(f"{'':56}{'ours s':>9}{'theirs s':>10}{'ratio':>7}{'apart':>10}")
        seconds = {}
        for part in ("product", *parts):
            for _ in range(WARM_UPS if part == "product" else 1):
                found = {which: call(which, part)[1] for which in pipes}
            apart = float(np.linalg.norm(found["ours"] - found["theirs"]) / np.linalg.norm(found["theirs"]))
            times = {which: [] for which in pipes}
            for _ in range(repeats):
                for which in pipes:
                    times[which].append(call(which, part)[0])
            own, other = seconds[part] = [statistics.median(times[which]) for which in pipes]
            name = setting.names()[part]
            print(f"{name:56}{own:9.3f}{other:10.3f}{other / own:7.2f}{apart:10.1e}", flush=True)
            results["parts"][part] = {"name": name, "ours": own, "theirs": other, "ratio": other / own}
            results["parts"][part] |= {"apart": apart, "times": times}
            save(results)
        for which, pipe in pipes.items():
            pipe.send("")
            results["peak_bytes"][which] = pipe.recv()
    if "dit" in parts:
        sides = zip(seconds["dit"], seconds["product"], strict=True)
        print("DiT: " + " and ".join(utilisation(setting, facts, *side) for side in sides))
    load, peak = results["load_seconds"], results["peak_bytes"]
    print(f"load: {load['ours']:.1f} s and {load['theirs']:.1f} s")
    print(f"peak memory: {peak['ours'] / 2**30:.2f} GiB and {peak['theirs'] / 2**30:.2f} GiB")
    save(results | facts)


def utilisation(setting: Setting, facts: dict[str, Any], dit_seconds: float, product_seconds: float) -> str:
    """What the transformer's step makes of the machine."""
    from sora_jax.plan.job import peak_operations

    rate, product = facts["dit_operations"] / dit_seconds, 2 * setting.product**3 / product_seconds
    peak = peak_operations(facts["device"]) if setting.dtype == "bfloat16" else None
    return f"{rate / 1e12:.2f} TFLOP/s, {rate / product:.0%} of the product" + (
        f", MFU {rate / peak:.1%}" if peak else ""
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--on", choices=SETTINGS, default="cpu", help="default: cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="of text encoder and transformer (default: see above)")
    add("--repeats", type=words.whole(1), default=5, help="timed calls of each part (default: 5)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    add("--quick", action="store_true", help="a few channels and pixels: does it run?")
    add("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    options = parser.parse_args(arguments)
    if options.json and not options.json.absolute().parent.is_dir():  # and not after all the measuring
        print(f"benchmark: error: there is no folder for --json {options.json}", file=sys.stderr)
        return 2
    setting = SETTINGS[options.on]
    setting = dataclasses.replace(setting, dtype=options.dtype or setting.dtype, **(QUICK if options.quick else {}))
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        print("benchmark: error: this needs diffusers: pip install -e '.[parity]'", file=sys.stderr)
        return 2
    import torch

    if options.on == "gpu" and not torch.cuda.is_available():
        print("benchmark: error: torch finds no CUDA device here", file=sys.stderr)
        return 2
    # Of the processes that are started: what computes, and a GPU that both of them use.
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda,cpu"}[options.on]
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

    def save(results):
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    try:
        compare(setting, options.parts, options.repeats, save)
    except (EOFError, ConnectionError):
        print("benchmark: error: one of the processes failed, as it says above", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
