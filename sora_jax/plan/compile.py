"""One program, compiled for a topology in a process of its own, and what the compiler's reports say of it.

An impossible program can end the process that compiles it.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sora_jax import mesh as mesh_lib
from sora_jax import pipeline
from sora_jax.counting import count_collectives, count_operations
from sora_jax.errors import InputError, one_line
from sora_jax.plan.job import Job, Need, chips
from sora_jax.plan.programs import at_rest, bytes_here, program, spared, steps

NEEDS_LIBTPU = "planning needs the TPU compiler: on Linux x86-64, in the clone, pip install -e '.[tpu]'"


def compile_part(job: Job, full: bool = False) -> Need:
    """What a part needs. Only with `full` is code generated, which takes most of the time and tells nothing of this;
    but an impossible kernel is found only there.

    Raises:
        InputError: libtpu is not installed, or there is no such topology or mesh.
        RuntimeError: the program could not be made; a fault of this package.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock file: there is no TPU to share
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is not compiled is not reported on
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*planned",
        }
        command = [sys.executable, "-m", "sora_jax.plan", json.dumps(dataclasses.asdict(job))]
        started = time.perf_counter()
        # Files, since the compiler may say more than a pipe holds.
        with open(f"{folder}/out", "w+") as out, open(f"{folder}/errors", "w+") as errors:
            # A pipe that closes when this process ends.
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=errors)
            with process:
                try:
                    while process.poll() is None and (full or not _report(Path(folder))):
                        time.sleep(0.2)
                finally:
                    process.kill()
            seconds = time.perf_counter() - started
            texts = []
            for file in (out, errors):
                file.seek(0)
                texts.append(file.read())
        out, errors = texts
        answer = next((line for line in reversed(out.splitlines()) if line.startswith("{")), None)
        values = json.loads(answer) if answer else {}
        if "input_error" in values:
            raise InputError(values["input_error"])
        if not values:  # it never came to the compiler: that says nothing of what fits
            raise RuntimeError(f"the program of {job.part} could not be made for {job.mesh}: {_reason(errors)}")
        # Small programs have a single part in the report, which is whole when the compiler is done.
        report = _report(Path(folder), 1 if process.returncode == 0 else 2)
        if not report or (full and process.returncode):
            return Need(error=_reason(errors), seconds=seconds)
        report, program_text = report
        hbm = int(re.search(r"\(color=0\)\s+Total bytes: (\d+)", report)[1])
        collectives = count_collectives(program_text, steps(job), chips(job.topology)[1])
        arguments = values["arguments"]
        return Need(
            arguments=arguments,
            heap=hbm - arguments,
            hbm=hbm,
            operations=values["operations"],
            others=values["others"],
            moved=values["moved"],
            collectives=collectives,
            seconds=seconds,
        )


def _report(folder: Path, parts: int = 2) -> tuple[str, str] | None:
    """The compiler's report on memory and the program it is about, once both are there."""
    reports = [path.read_text() for path in folder.glob("*planned*memory-usage-report.txt")]
    programs = [path.read_text() for path in folder.glob("*planned*.after_optimizations.txt")]
    # The report has a part for each kind of memory; the program ends with its entry.
    for report, text in itertools.product(reports, programs):
        if (
            report.count("Total bytes") >= parts
            and "(color=0)" in report
            and re.search(r"^ENTRY (?s:.*)^\}", text, re.M)
        ):
            return report, text
    return None


def _reason(errors: str) -> str:
    lines = [line for line in errors.splitlines() if "RESOURCE_EXHAUSTED" in line or "Error" in line]
    return " ".join((lines or errors.splitlines() or ["the compiler ended without a word"])[-1].split())[:300]


def work(job: Job) -> None:
    """What such a process does: lowers and compiles; prints what only this process knows before it starts compiling."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        print(json.dumps({"input_error": NEEDS_LIBTPU}))
        return
    from jax.experimental import topologies

    sides = [int(side) for side in job.topology.partition(":")[2].split("x")]
    # By default a host has 2 x 2 chips. A slice that is not made of such hosts is taken for a single one.
    bounds = {"chips_per_host_bounds": [*sides, 1][:3]} if sides[0] % 2 or sides[1] % 2 else {}
    if job.topology.startswith("v4"):
        bounds["chip_config_name"] = "megacore"  # as JAX runs it: the two cores of a chip are one device
    try:
        topology = topologies.get_topology_desc(job.topology, platform="tpu", **bounds)
    except Exception as error:  # the compiler's library objects in its own ways
        print(json.dumps({"input_error": f"topology {job.topology}: {one_line(error)}"}))
        return
    try:
        mesh = mesh_lib.parse_mesh(job.mesh, devices=topology.devices)
        function, arguments, donated = program(job, mesh)
        with jax.set_mesh(mesh):
            lowered = jax.jit(function, donate_argnums=donated, keep_unused=True).lower(*arguments)
    except InputError as error:
        print(json.dumps({"input_error": str(error)}))
        return
    local = jax.tree.map(_on_one_device, arguments)
    operations = count_operations(jax.make_jaxpr(function)(*local).jaxpr, steps(job)) - spared(job)
    values = {
        "arguments": _here(arguments),
        "others": 0 if job.part == "train" else at_rest(job, mesh),
        "operations": operations / _shares(job, mesh),
        "moved": _moved(job, arguments[0], mesh),
    }
    print(json.dumps(values), flush=True)
    lowered.compile(pipeline.codec_options("tpu") if job.part in ("encode", "decode") else None)


def _shares(job: Job, mesh: jax.sharding.Mesh) -> int:
    """Chips among which the operations of a part are split: not those of pictures along the axes of a batch, nor those
    of the text along `context`."""
    if job.part == "text":
        axes = mesh_lib.RULES["heads"] + mesh_lib.RULES["batch"]
    else:
        axes = mesh_lib.RULES["rows"] if job.part in ("see", "encode", "decode") else mesh_lib.AXES
    return math.prod(mesh.shape[axis] for axis in axes)


def _moved(job: Job, held: Any, mesh: jax.sharding.Mesh) -> int:
    """Bytes between a chip and its HBM at least: its share of every product's weights, once; in training also the
    state, read and written."""

    def weights(tree, dtype=None):
        return sum(leaf.size * jnp.dtype(dtype or leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))

    if job.part == "train":
        return weights(held.params, job.dtype) // mesh.shape["tensor"] + 2 * _here(held)
    if job.part == "denoise":  # of two transformers a step reads one
        read = max(map(weights, held))
    elif job.part == "text":  # of its embedding a few rows are read
        read = weights({name: tree for name, tree in held.items() if name != "embedding"})
    else:
        read = weights(held)
    return read // mesh.shape["tensor"]


def _here(tree: Any) -> int:
    return sum(bytes_here(leaf) for leaf in jax.tree.leaves(tree))


def _on_one_device(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
