"""What is done with a whole model: `sora-jax convert`, `plan` and `evaluate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sora_jax.cli.words import number, size, whole
from sora_jax.errors import InputError


def add_commands(commands: Any) -> None:
    convert = commands.add_parser("convert", help="turn a published Wan folder into a model folder", allow_abbrev=False)
    convert.set_defaults(run=_convert)
    convert.add_argument("source", metavar="SRC", help="a folder in the diffusers layout, or a model folder")
    convert.add_argument("output", metavar="DST", help="the model folder to write")
    convert.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="precision of its parameters")

    plan = commands.add_parser("plan", help="what a model needs on a TPU slice, without one", allow_abbrev=False)
    plan.set_defaults(run=_plan)
    add = plan.add_argument
    add("--model", required=True, metavar="NAME|DIR", help="bundled, a published one (wan2.1-t2v-14b), or a folder")
    add("--topology", required=True, metavar="KIND:SHAPE", help="such as v5e:1x1, v6e:2x4, v5p:2x2x2")
    add("--mesh", default="auto", metavar="AXIS=N,...", help="chips along data, fsdp, context, tensor (default: auto)")
    add("--size", type=size, metavar="HxW", help="height and width in pixels (default: the model's)")
    add("--frames", type=whole(1), help="frames of the video (default: the model's)")
    add("--window", type=whole(1), metavar="N", help="frames sampled at a time; longer videos go on from the last ones")
    add("--overlap", type=whole(1), metavar="N", help="frames a window has from the one before (default: 1)")
    add(
        "--batch",
        type=_batch,
        default=1,
        help="videos, as many at a time as generate samples (default: 1); with --train clips of a step, or max: what "
        "fits",
    )
    add("--steps", type=whole(1), help="steps of the sampler (default: the model's)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the large products (default: bfloat16; bundled: float32)")
    add("--full", action="store_true", help="generate code too: minutes, but finds kernels that cannot be")
    add(
        "--train",
        action="store_true",
        help="a step of training the transformer, in place of generating: it alone, by AdamW",
    )
    add(
        "--offload",
        action="store_true",
        help="each part is on the chips only while it works, as in generate; with --train, what blocks keep for the "
        "backward pass is in the hosts' memory, as with dit.remat=offload",
    )
    add("--search", action="store_true", help="try the meshes that make sense, and rank them")
    add("--json", action="store_true", help="print JSON")

    evaluate = commands.add_parser("evaluate", help="measure how well videos follow prompts", allow_abbrev=False)
    evaluate.set_defaults(run=_evaluate)
    add = evaluate.add_argument
    add("--model", metavar="DIR", help="a model folder (default: the bundled model)")
    add("-o", "--out", "--output", dest="output", required=True, metavar="DIR", help="folder for the report")
    add("--num", type=whole(1), default=240, help="number of prompts (default: 240)")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="seed of prompts and noise (default: 0)")
    add("--steps", type=whole(1), help="steps of the sampler (default: the model's)")
    add("--guidance", type=number(), help="weight of the prompt; up to 1 there is no guidance (default: the model's)")


def _batch(text: str) -> int | str:
    return text if text == "max" else whole(1)(text)


def _convert(options: argparse.Namespace) -> None:
    from sora_jax.models import convert

    print(convert(options.source, options.output, options.dtype))


def _plan(options: argparse.Namespace) -> None:
    import dataclasses
    import json

    from sora_jax import mesh as mesh_lib
    from sora_jax import mesh_choice, plan
    from sora_jax.request import check_shape

    if options.search and options.mesh != "auto":
        raise InputError("--search tries the meshes that make sense: give no --mesh with it")
    if options.batch == "max" and (options.search or not options.train):
        raise InputError("--batch max is for --train with one mesh: give a number")
    if options.train and (options.window or options.overlap):
        raise InputError("--window and --overlap are for generating: give --train the frames of a clip")
    if options.train and options.steps:
        raise InputError("--steps are those of the sampler: with --train one step is planned")
    config = plan.model_config(options.model)
    sampling = config.sampling
    size, frames = options.size or sampling.size, options.frames or sampling.frames
    check_shape(config, frames, size)
    _, number = plan.chips(options.topology)
    mesh, batch = options.mesh, 1 if options.batch == "max" else options.batch
    dtype = options.dtype or ("float32" if options.model == "bundled" else "bfloat16")  # as `load` has it
    job = plan.Job(options.model, "", options.topology, mesh, size, frames, batch, dtype, options.offload)
    job = plan.in_windows(job, options.window, options.overlap)
    if mesh == "auto" and not options.search and options.batch != "max":
        if options.train:
            mesh, reason = mesh_choice.training_mesh(batch, number, config.dit, tokens=config.tokens(1, size))
        else:
            mesh, reason = mesh_choice.generating_mesh(config, size, number)
        print(f"mesh {mesh}: {reason}", file=sys.stderr)
    if mesh != "auto":
        sizes = mesh_lib.parse_sizes(mesh)
        mesh_lib.check_mesh(sizes, number)
        if options.train and options.batch != "max" and batch % (shares := sizes["data"] * sizes["fsdp"]):
            raise InputError(f"--batch {batch} must be a multiple of {shares}, among which mesh {mesh} shares it")
    job = dataclasses.replace(job, mesh=mesh)
    steps = options.steps or sampling.steps
    which = ("train",) if options.train else plan.parts(options.model, job.windows)
    if options.batch == "max":
        job, need = plan.largest_batch(job, options.full)
        results = {job.mesh: {"train": need}}
    elif options.search:
        results = plan.search(job, which, steps, options.full)
    else:
        results = {mesh: plan.needs(job, which, options.full)}
    for mesh, needs in results.items():
        here = dataclasses.replace(job, mesh=mesh)
        said = plan.for_scripts(here, needs, steps) if options.json else plan.describe(here, needs, steps)
        print(json.dumps(said) if options.json else said)


def _evaluate(options: argparse.Namespace) -> None:
    from sora_jax.evaluation import report

    result = report.evaluate(
        options.model,
        options.output,
        options.num,
        options.seed,
        steps=options.steps,
        guidance=options.guidance,
    )
    if limits := report.limits_of_reading(result):
        print(limits, file=sys.stderr)
    print(Path(options.output, "report.md"))
