"""Memory of the host while a model is read: `python experiments/loading_memory.py` [--layers N] [--shards N].

Writes a published folder of random parameters (1.1 GB in 4 shards, unless told otherwise), and in a process of its own
for each row reads or converts it, and reports the peak of resident memory, beyond what was resident before and beyond
the parameters themselves where they end: on a CPU, the devices' memory is the host's. Linux only. Found:

    bound                333 MB   1.2 times the largest shard, and the largest tensor
    load                 178 MB
    load on 8 devices    253 MB
    load bfloat16        166 MB
    load with a LoRA     123 MB
    convert              101 MB
    load converted       118 MB

Some 90 MB are there for models of any size: programs that are compiled, and pieces of 8 MB, three of which are read at
a time (one at a time took 114, 190, 118, 43 and 52 MB, and in float32 three to four times as long).
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "tests" / "golden" / "t2v"
ROWS = ("load", "load on 8 devices", "load bfloat16", "load with a LoRA", "convert", "load converted")


def write_folder(folder: Path, layers: int, shards: int, feed_forward: int = 1 << 15) -> None:
    """The small published model with more and larger layers in its transformer, 8 MB each."""
    shutil.copytree(SMALL, folder)
    transformer = folder / "transformer"
    config = json.loads((transformer / "config.json").read_text())
    before = config["ffn_dim"]
    config |= {"num_layers": layers, "ffn_dim": feed_forward}
    (transformer / "config.json").write_text(json.dumps(config))
    single = transformer / "diffusion_pytorch_model.safetensors"
    small = safetensors.numpy.load_file(single)
    single.unlink()
    random, weight_map = np.random.default_rng(0), {}
    for shard in range(shards):
        chosen = {name: x for name, x in small.items() if not name.startswith("blocks.")} if shard == 0 else {}
        for layer in range(layers)[shard::shards]:
            for name, x in small.items():
                if name.startswith("blocks.0."):
                    shape = [feed_forward if size == before else size for size in x.shape]
                    name = name.replace("blocks.0.", f"blocks.{layer}.")
                    chosen[name] = x if shape == [*x.shape] else random.random(shape, np.float32)
        file = f"diffusion_pytorch_model-{shard + 1:05}-of-{shards:05}.safetensors"
        safetensors.numpy.save_file(chosen, transformer / file)
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_lora(path: Path, folder: Path, rank: int = 4) -> None:
    """An adaptation of every matrix of the feed-forwards of a folder's transformer."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    random, matrices = np.random.default_rng(1), {}
    for layer in range(config["num_layers"]):
        for name, (to, of) in {"0.proj": (config["ffn_dim"], width), "2": (width, config["ffn_dim"])}.items():
            stem = f"transformer.blocks.{layer}.ffn.net.{name}"
            matrices[f"{stem}.lora_A.weight"] = random.random((rank, of), np.float32)
            matrices[f"{stem}.lora_B.weight"] = random.random((to, rank), np.float32)
    safetensors.numpy.save_file(matrices, path)


def bound(folder: Path) -> int:
    """What reading the folder may take, in bytes: 1.2 times its largest shard, and its largest tensor."""
    files = list(folder.rglob("*.safetensors"))
    largest = 0
    for path in files:
        with safetensors.safe_open(path, "np") as file:
            sizes = [4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys()]
            largest = max(largest, *sizes)
    return int(1.2 * max(path.stat().st_size for path in files)) + largest


def measure(row: str, folder: Path) -> int:
    """Bytes of the host, beyond what was there before and what the devices hold afterwards. For a fresh process."""
    import jax

    import sora_jax
    from sora_jax.mesh import make_mesh
    from sora_jax.models import convert

    mesh = make_mesh(fsdp=2, tensor=1, data=4) if row == "load on 8 devices" else None
    dtype = "bfloat16" if row == "load bfloat16" else "float32"

    def run(folder, target):
        if row == "convert":
            return convert(folder, target)
        lora = {folder.parent / f"{folder.name}.safetensors": 0.5} if row == "load with a LoRA" else None
        return sora_jax.load(folder, dtype, mesh=mesh, lora=lora).params

    if row == "load with a LoRA":
        shutil.copytree(SMALL, folder.parent / "before", dirs_exist_ok=True)
        for one in (folder, folder.parent / "before"):
            write_lora(one.with_name(f"{one.name}.safetensors"), one)

    run(
        folder.parent / "before" if row == "load with a LoRA" else SMALL, folder.parent / "small"
    )  # what is compiled and imported once
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    params = run(folder, folder.parent / "converted")
    peak = _resident("VmHWM")
    arrays = [] if row == "convert" else jax.tree.leaves(params)
    return peak - before - sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)


def _resident(what: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[what].split()[0])


def figures(layers: int, shards: int, rows=ROWS) -> tuple[int, dict[str, int]]:
    """The bound, and what each row took; bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "published")
        write_folder(folder, layers, shards)
        took = {}
        for row in rows:
            source = Path(scratch, "converted") if row == "load converted" else folder
            devices = 8 if row == "load on 8 devices" else 1
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
            }
            command = [sys.executable, __file__, "--measure", row, "--folder", str(source)]
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(result.stderr[-3000:])
            took[row] = int(result.stdout.split()[-1])
        return bound(folder), took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure, options.folder))
        return
    limit, took = figures(options.layers, options.shards)
    print(f"bound {limit / 1e6:.0f} MB: 1.2 times the largest shard and the largest tensor")
    for row, size in took.items():
        print(f"{row:20} {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
