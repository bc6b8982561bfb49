"""Wan's parts here and in diffusers, side by side: same random weights, same inputs, float32, in turns.

    pip install -e ".[parity]"
    python experiments/benchmark_vs_diffusers.py [--repeats 5] [--parts decode whole] [--json FILE]

One process runs this project, one diffusers; each loads the same folder (two layers of the 1.3B's transformer, one of
UMT5-XXL with a few words, the whole Wan 2.1 codec), warms up, and then they take turns. Prints the rate of a matrix
product in both, median seconds of both, their ratio (above 1: this project is faster), how far the results are apart,
and peak memory. The codec takes minutes: --parts names what to measure.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PROMPT, NEGATIVE = "a red ball rolls behind a gray wall", "a blue cube"
FRAMES, SIDE, TOKEN_SIDE, STEPS = 17, 256, 320, 4
PRODUCT = 2048
PARTS = {
    "text": "text encoder, 1 layer of XXL, 512 tokens",
    "dit": "DiT step, 2 layers of the 1.3B, 2,000 tokens",
    "encode": "codec encode, 17 frames of 256 x 256",
    "decode": "codec decode, 17 frames of 256 x 256",
    "whole": f"pipeline, 17 frames of 256 x 256, {STEPS} guided steps",
}


def make_folder(folder: Path) -> None:
    """Random weights in the published layout; in a process of its own, so that no one else's memory counts them."""
    import torch
    from diffusers import WanPipeline

    spec = importlib.util.spec_from_file_location("make", ROOT / "tests" / "golden" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    torch.manual_seed(0)
    WanPipeline(
        tokenizer=make.tokenizer(),
        text_encoder=make.text_encoder(width=4096, heads=64, head_width=64, feed_forward=10240, layers=1),
        vae=make.codec("t2v", 16, 96, None, (1, 2, 4, 4), (False, True, True), 2),
        scheduler=make.scheduler("t2v"),
        transformer=make.transformer(16, 12, 128, 8960, 2, 4096, 256),
    ).save_pretrained(folder)


def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    latent, side = TOKEN_SIDE // 8, SIDE // 8
    return {
        "ids": np.where(np.arange(512) < 100, random.integers(3, 12, (1, 512)), 0),
        "latents": random.normal(size=(1, 5, latent, latent, 16)).astype(np.float32),
        "text": random.normal(size=(1, 512, 4096)).astype(np.float32),
        "video": random.uniform(-1, 1, (1, FRAMES, SIDE, SIDE, 3)).astype(np.float32),
        "codes": random.normal(size=(1, 5, side, side, 16)).astype(np.float32),
        "noise": random.normal(size=(1, 5, side, side, 16)).astype(np.float32),
    }


def ours(folder: Path) -> dict:
    """The calls of this project: each returns an array, channels last."""
    import jax

    import sora_jax
    from sora_jax.codec import Codec
    from sora_jax.codec.vae import piece
    from sora_jax.dit import DiT
    from sora_jax.text import T5Encoder

    generator = sora_jax.load(folder)
    config, params, x = generator.config, generator.params, inputs()
    text = jax.jit(lambda p, ids: T5Encoder(config.text).apply({"params": p}, ids))
    dit = jax.jit(lambda p, *args: DiT(config.dit).apply({"params": p}, *args))
    code = jax.jit(partial(piece, Codec(config.codec)), static_argnums=(3, 4), donate_argnums=1)
    level = np.full((1, 5), 0.5, np.float32)

    def in_pieces(video, ends, method):
        """One latent frame after the other, as `generate` does from this size on; so does diffusers."""
        state, results = {}, []
        for start, end in itertools.pairwise((0, *ends)):
            result, state = code(params["codec"], state, video[:, start:end], start == 0, method)
            results.append(np.asarray(jax.tree.leaves(result)[0]))  # of a posterior the mean
        return np.concatenate(results, axis=1)

    def whole():
        options = {"negative_prompt": NEGATIVE, "noise": x["noise"], "size": (SIDE, SIDE), "frames": FRAMES}
        return generator.generate(PROMPT, steps=STEPS, guidance=4.0, progress=False, **options).frames / 255.0

    square = np.full((PRODUCT, PRODUCT), 1 / PRODUCT, np.float32)
    product = jax.jit(lambda x: x @ x)

    return {
        "product": lambda: np.asarray(product(square)),
        "text": lambda: np.asarray(text(params["text"], x["ids"])),
        "dit": lambda: np.asarray(dit(params["dit"], x["latents"], level, x["text"])),
        "encode": lambda: in_pieces(x["video"], range(1, FRAMES + 1, 4), "posterior"),
        "decode": lambda: np.clip(in_pieces(x["codes"], range(1, 6), "reconstruct"), -1, 1),
        "whole": whole,
    }


def theirs(folder: Path) -> dict:
    """The same of diffusers and transformers."""
    import torch
    from diffusers import WanPipeline

    made = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    x = {name: torch.tensor(value) for name, value in inputs().items()}
    for name in ("latents", "video", "codes", "noise"):
        x[name] = x[name].movedim(-1, 1).contiguous()

    def last(tensor):
        return tensor.movedim(1, -1).numpy()

    def text():
        features = made.text_encoder(x["ids"], x["ids"] > 0).last_hidden_state
        return (features * (x["ids"] > 0)[..., None]).numpy()

    def whole():
        options = {"height": SIDE, "width": SIDE, "num_frames": FRAMES, "num_inference_steps": STEPS}
        options |= {"guidance_scale": 4.0, "latents": x["noise"], "output_type": "np"}
        return made(PROMPT, negative_prompt=NEGATIVE, **options).frames[0]

    square = torch.full((PRODUCT, PRODUCT), 1 / PRODUCT)
    calls = {
        "product": lambda: (square @ square).numpy(),
        "text": text,
        "dit": lambda: last(made.transformer(x["latents"], torch.tensor([500]), x["text"], return_dict=False)[0]),
        "encode": lambda: last(made.vae.encode(x["video"]).latent_dist.mean),
        "decode": lambda: last(made.vae.decode(x["codes"]).sample),
        "whole": whole,
    }

    def without_gradients(call):
        def run():
            with torch.no_grad():
                return call()

        return run

    return {name: without_gradients(call) for name, call in calls.items()}


def worker(which: str, folder: Path, pipe) -> None:
    """Loads, then answers (part) with (seconds, result) until there is no more to do, and ends with its peak memory."""
    start = time.perf_counter()
    calls = {"ours": ours, "theirs": theirs}[which](folder)
    pipe.send(time.perf_counter() - start)
    while part := pipe.recv():
        start = time.perf_counter()
        result = calls[part]()
        pipe.send((time.perf_counter() - start, result))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each part (default: 5)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    options = parser.parse_args()
    if any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers", "transformers")):
        print("benchmark: error: this needs diffusers: pip install -e '.[parity]'", file=sys.stderr)
        return 2
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        maker = spawn.Process(target=make_folder, args=(folder,))
        maker.start()
        maker.join()
        if maker.exitcode:
            print("benchmark: error: the random model could not be made", file=sys.stderr)
            return 2
        pipes, results = {}, {"parts": {}, "load_seconds": {}, "peak_bytes": {}}
        for which in ("ours", "theirs"):
            pipes[which], end = spawn.Pipe()
            spawn.Process(target=worker, args=(which, folder, end), daemon=True).start()
            end.close()  # so that a worker that dies ends the wait for it
            results["load_seconds"][which] = pipes[which].recv()

        def call(which, part):
            pipes[which].send(part)
            return pipes[which].recv()

        print(f"{'':54}{'ours s':>9}{'theirs s':>10}{'ratio':>7}{'apart':>10}")
        for part in ("product", *options.parts):
            name = PARTS.get(part, f"matrix product, {PRODUCT} x {PRODUCT} x {PRODUCT}")
            found = {which: call(which, part)[1] for which in pipes}  # warms up
            apart = np.linalg.norm(found["ours"] - found["theirs"]) / np.linalg.norm(found["theirs"])
            times = {which: [] for which in pipes}
            for _ in range(options.repeats):
                for which in pipes:
                    times[which].append(call(which, part)[0])
            ours_s, theirs_s = (statistics.median(times[which]) for which in ("ours", "theirs"))
            print(f"{name:54}{ours_s:9.3f}{theirs_s:10.3f}{theirs_s / ours_s:7.2f}{apart:10.1e}", flush=True)
            results["parts"][part] = {"ours": ours_s, "theirs": theirs_s, "apart": float(apart), "times": times}
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
        for which, pipe in pipes.items():
            pipe.send("")
            results["peak_bytes"][which] = pipe.recv()
    load, peak = results["load_seconds"], results["peak_bytes"]
    print(f"load: {load['ours']:.1f} s and {load['theirs']:.1f} s")
    print(f"peak memory: {peak['ours'] / 2**30:.2f} GiB and {peak['theirs'] / 2**30:.2f} GiB")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
