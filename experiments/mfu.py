"""How much of their arithmetic devices give to the programs that `sora-jax plan` plans: run here, for real.

    python experiments/mfu.py                       # Wan 2.1's 1.3B at 480p, 81 frames: a denoising, a training step
    python experiments/mfu.py --model wan2.1-t2v-14b --size 720x1280 --mesh context=8 --parts denoise
    python experiments/mfu.py --model bundled --size 128x128 --frames 33 --dtype float32 --batch 8    # on a CPU

Prints seconds, operations per second and device, and their share of two rates: that of a large matrix product in the
same precision, timed in between, and the peak in the device's data sheet (MFU: model FLOP utilisation,
arXiv:2204.02311). Operations are those of the model: two for each multiply-add, both branches of guidance, and for
training three times those forwards, whatever is computed again to save memory. Parameters and inputs are random: zeros
would cost less power, and with it less time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sora_jax import media
from sora_jax.cli import words
from sora_jax.counting import count_operations
from sora_jax.errors import InputError
from sora_jax.mesh import parse_mesh
from sora_jax.mesh_choice import generating_mesh, training_mesh
from sora_jax.plan import Job, at_a_time, model_config, program
from sora_jax.plan.job import peak_operations
from sora_jax.plan.programs import steps
from sora_jax.request import check_shape

HEADER = f"{'':28}{'seconds':>10}{'TFLOP/s a device':>18}{'of the product':>16}{'MFU':>8}"


def random_arrays(arguments: Any) -> Any:
    """Arrays in the places of abstract ones: small random numbers, each made where it belongs."""
    leaves, structure = jax.tree.flatten(arguments)
    draws = (partial(_draw, seed, leaf.shape, leaf.dtype) for seed, leaf in enumerate(leaves))
    made = [jax.jit(draw, out_shardings=leaf.sharding)() for draw, leaf in zip(draws, leaves, strict=True)]
    return jax.tree.unflatten(structure, made)


def _draw(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return jax.random.uniform(jax.random.key(seed), shape, maxval=0.02).astype(dtype)  # optimizers take roots of some


def operations(job: Job, mesh: jax.sharding.Mesh) -> float:
    """Of the model, in a step of this job."""
    if job.part == "train":
        config = model_config(job.model)
        branches = 2 if config.sampling.is_guided else 1
        one = Job(**{**vars(job), "part": "denoise", "batch": 1})
        # Where a mesh has room for several videos, one is filled up.
        return 3 * job.batch * operations(one, mesh) / (branches * at_a_time(one))
    function, arguments, _ = program(job, mesh)
    local = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    return count_operations(jax.make_jaxpr(function)(*local).jaxpr, steps(job))


def repeated(job: Job, mesh: jax.sharding.Mesh) -> Callable[[], Any]:
    """A compiled program that runs again and again; what it was given to reuse is its own last result."""
    function, arguments, donated = program(job, mesh)
    with jax.set_mesh(mesh):
        arrays = list(random_arrays(arguments))
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()

    def run():
        out = compiled(*arrays)
        arrays[donated] = out[0] if job.part == "train" else out
        return out

    return run


def product(dtype: Any, side: int) -> Callable[[], Any]:
    """A matrix product of `side`^3 multiply-adds on the first device."""
    x = (jax.random.normal(jax.random.key(0), (side, side))).astype(dtype)
    multiply = jax.jit(lambda x: jnp.matmul(x, x))
    return lambda: multiply(x)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(job: Job, mesh: jax.sharding.Mesh, repeats: int, peak: float | None) -> dict[str, Any]:
    """A row, printed and returned; times alternate with those of the product."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    multiply, run = product(jnp.dtype(job.dtype), side), repeated(job, mesh)
    seconds(multiply), seconds(run)  # warms up
    pairs = [(seconds(multiply), seconds(run)) for _ in range(repeats)]
    of_product, own = (statistics.median(times) for times in zip(*pairs, strict=True))
    row = {
        "part": job.part,
        "batch": job.batch,
        "seconds": own / steps(job),
        "operations": operations(job, mesh),
        "product_operations_per_second": 2 * side**3 / of_product,
    }
    rate = row["operations"] / row["seconds"] / mesh.size
    row |= {"operations_per_second_and_device": rate, "mfu": rate / peak if peak else None}
    name = {"denoise": "denoising step", "train": f"training step, batch {job.batch}"}[job.part]
    share, mfu = rate / row["product_operations_per_second"], f"{row['mfu']:8.1%}" if peak else f"{'':8}"
    print(f"{name:28}{row['seconds']:10.3f}{rate / 1e12:18.2f}{share:16.0%}{mfu}", flush=True)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="wan2.1-t2v-1.3b", help="a preset's name, bundled, or a model folder")
    add("--size", type=words.size, default=(480, 832), metavar="HxW", help="pixels (default: 480x832)")
    add("--frames", type=words.whole(1), default=81, help="default: 81")
    add("--parts", nargs="+", choices=("denoise", "train"), default=("denoise", "train"), help="default: both")
    add("--batch", type=words.whole(1), default=1, help="clips of a training step (default: 1)")
    add("--mesh", help="such as data=2,context=4 (default: chosen from model, size and devices)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the large products")
    add("--peak", type=words.number(above=0.0), help="TFLOP/s of a device, where its name does not tell")
    add("--repeats", type=words.whole(1), default=5, help="default: 5")
    add("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    options = parser.parse_args(arguments)
    device, number = jax.devices()[0], jax.device_count()
    peak = options.peak * 1e12 if options.peak else peak_operations(device.device_kind)
    rows = []
    try:
        if options.json:
            media.check_writable(options.json)  # and not after all the measuring
        config = model_config(options.model)
        check_shape(config, options.frames, options.size)
        print(f"{number} x {device.device_kind}; {options.model}, {options.frames} frames of", end=" ")
        print(f"{options.size[0]}x{options.size[1]}, {options.dtype}\n\n{HEADER}", flush=True)
        for part in options.parts:
            mesh = None if options.mesh == "auto" else options.mesh
            if mesh is None and part == "denoise":
                mesh, _ = generating_mesh(config, options.size, number, rings=device.platform != "gpu")
            elif mesh is None:
                mesh, _ = training_mesh(options.batch, number, config.dit, tokens=config.tokens(1, options.size))
            batch = options.batch if part == "train" else 1
            job = Job(options.model, part, "", mesh, options.size, options.frames, batch, options.dtype)
            rows.append(measure(job, parse_mesh(mesh), options.repeats, peak))
            if options.json:  # after each row: the next may need more memory than there is
                about = {"device": device.device_kind, "devices": number, "model": options.model, "rows": rows}
                options.json.write_text(json.dumps(about, indent=1) + "\n")
    except (InputError, OSError) as error:
        print(f"mfu: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
