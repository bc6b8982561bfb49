"""What published models need on TPU slices, as a table: `python experiments/plan_report.py [-o docs/plan.md]`.

Needs `sora-jax[tpu]` for the TPU's compiler, and no TPU. Each row takes half a minute on two quiet cores.
"""

import argparse
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sora_jax import mesh_choice, plan

CASES = (
    # model, topology, size, frames; perhaps that each part is on the chips only while it works, frames of a window, or
    # that code is generated
    ("wan2.1-t2v-14b", "v6e:2x4", (720, 1280), 81),
    ("wan2.1-t2v-14b", "v6e:2x4", (720, 1280), 81, {"full": True}),
    ("wan2.1-t2v-14b", "v5p:2x2x2", (720, 1280), 81),
    ("wan2.1-t2v-1.3b", "v6e:1x1", (480, 832), 81),
    ("wan2.1-t2v-1.3b", "v5e:1x1", (480, 832), 81),
    ("wan2.1-t2v-1.3b", "v5e:1x1", (480, 832), 81, {"offload": True}),
    ("wan2.2-t2v-a14b", "v6e:2x4", (720, 1280), 81),
    ("wan2.2-t2v-a14b", "v5p:2x2x1", (720, 1280), 81),
    ("wan2.1-i2v-14b", "v6e:2x4", (720, 1280), 81),
    ("wan2.2-ti2v-5b", "v6e:4x4", (704, 1280), 121),
    ("wan2.2-ti2v-5b", "v6e:4x4", (704, 1280), 1441),
    ("wan2.2-ti2v-5b", "v6e:4x4", (704, 1280), 1441, {"window": 121}),
)
TRAINING = (
    # model, topology, size, frames, and whether what blocks keep is in the hosts' memory: the largest batch that fits
    ("wan2.1-t2v-1.3b", "v5p:2x2x4", (480, 832), 81),
    ("wan2.1-t2v-1.3b", "v5p:2x2x4", (480, 832), 81, True),
    ("wan2.2-ti2v-5b", "v5p:2x2x4", (704, 1280), 121),
    ("wan2.2-ti2v-5b", "v5p:2x2x4", (704, 1280), 121, True),
)
HEAD = """# What models need on TPU slices

Written by `python experiments/plan_report.py`, from the TPU compiler's own memory report; no TPU was used. GiB per
chip; the step is one of the sampler, bfloat16, both branches of guidance as one batch on several chips and one after
the other on a single one. "At least" is the largest of arithmetic at the chip's peak, weights once from HBM, and bytes
over the links that a chip of this slice has: no measurement of time. "Received" is in GiB a step. With libtpu
{version}, which JAX 0.10 asks for; others pack the heap in another way. The last column but one: seconds from the start
of a process until the compiler's report on the step is there, of tracing and compiling, on two CPU cores; with --full
those of all parts, with the code that is generated where the programs are to run.

The codec is compiled with less effort than the rest (`pipeline.codec_options`). With the usual effort the decoder of
the second row took 702 s in place of 103 (both beside other work; 218 s alone), needed 4.29 GiB in place of 4.59, and
was expected to run for 182 million cycles a latent frame in place of 232: for all 21 of them about a second less, of
some ninety. An effort of -0.2 makes the same program as 0, one of -1 took more than twice the cycles.

A block of the 1.3B on one v6e is expected to take 22.0 million cycles beside the kernels of attention. It was 28.6
before whole tiles of queries, keys and values changed places (`attention.heads_first`): twelve copies of all tokens in
a block became six. As one batch the two branches of guidance would then need 3.72 GiB in place of 3.92.

"""
COLUMNS = (
    ("model", "slice", "video", "mesh", "step: arguments + heap = HBM", "text, [pictures, encoding,] decoding: HBM")
    + ("received", "a step at least", "compiled", "")
)  # fmt: skip


TRAINING_HEAD = """
Training the transformer from scratch, float32 parameters, AdamW and averages, bfloat16 products, blocks recomputed,
with the largest batch that fits, a multiple of the clips that the mesh takes at once. With --offload
(`dit.remat="offload"` in a configuration) the tokens that each block keeps for that wait in the hosts' memory; the way
there and back is not in "at least":

| model | slice | video | mesh | batch | arguments + heap = HBM | received | compiled | |
|---|---|---|---|---|---|---|---|---|
"""


def received(need: plan.Need) -> str:
    return ", ".join(f"{kind} {size / plan.GIB:.2f}" for kind, size in need.collectives.items()) or "-"


def training_row(model: str, topology: str, size: tuple[int, int], frames: int, offload: bool = False) -> str:
    job, need = plan.largest_batch(plan.Job(model, "", topology, "auto", size, frames, offload=offload))
    sizes = [f"{x / plan.GIB:.2f}" for x in (need.arguments, need.heap, need.hbm)]
    memory = need.error or f"{sizes[0]} + {sizes[1]} = {sizes[2]}"
    words = f"{model} --offload" if offload else model
    cells = [words, topology, f"{frames} x {size[0]} x {size[1]}", job.mesh, str(job.batch), memory]
    cells.append(received(need))
    cells.append(f"{need.seconds:.0f} s")
    return f"| {' | '.join(cells)} | {plan.verdict(job, {'train': need}, 1)} |\n"


def row(model: str, topology: str, size: tuple[int, int], frames: int, options: dict[str, Any] | None = None) -> str:
    options = options or {}
    config = plan.model_config(model)
    chip, number = plan.chips(topology)
    mesh, _ = mesh_choice.generating_mesh(config, size, number)
    job = plan.Job(model, "", topology, mesh, size, frames, offload="offload" in options)
    job = plan.in_windows(job, options.get("window"), None)
    needs = plan.needs(job, plan.parts(model, job.windows), "full" in options)
    words = " ".join([model, *[f"--{name}" + f" {value}" * (value is not True) for name, value in options.items()]])
    step, cells = needs["denoise"], [words, topology, f"{frames} x {size[0]} x {size[1]}", mesh]
    if step.error:
        cells += [step.error, "", "", "", ""]
    else:
        sizes = [f"{x / plan.GIB:.2f}" for x in (step.arguments, step.heap, step.hbm)]
        others = [need.error or f"{need.hbm / plan.GIB:.2f}" for part, need in needs.items() if part != "denoise"]
        cells += [
            f"{sizes[0]} + {sizes[1]} = {sizes[2]}",
            ", ".join(others),
            received(step),
            f"{max(step.bounds(chip).values()):.3f} s",
            ", ".join(f"{need.seconds:.0f}" for need in (needs.values() if "full" in options else [step])) + " s",
        ]
    return f"| {' | '.join(cells)} | {plan.verdict(job, needs, config.sampling.steps)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/plan.md"))
    output = parser.parse_args().output
    if find_spec("libtpu") is None:
        parser.error(plan.NEEDS_LIBTPU)
    text = HEAD.format(version=version("libtpu")) + f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"

    def add(more: str) -> None:
        nonlocal text
        text += more
        output.write_text(text)  # after each row: a long run may be cut short
        print(more, end="", flush=True)

    for case in CASES:
        add(row(*case))
    add(TRAINING_HEAD)
    for case in TRAINING:
        add(training_row(*case))


if __name__ == "__main__":
    main()
