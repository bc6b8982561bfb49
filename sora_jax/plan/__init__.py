"""What a model needs on a TPU slice, told by the TPU's own compiler, without a TPU.

The programs that `generate` runs (text encoder, for models that start from pictures what reads those, the scan of
denoising steps, decoder) are compiled for a topology, each in a process of its own. What comes out tells

    memory        arguments, outputs and packed heap: "HBM alloc", the figure by which the compiler refuses
    interconnect  bytes that each chip receives, by kind of collective, loops counted as often as they run

Operations are counted in the traced program: matrix products and convolutions, two for each multiplication and
addition, and taken to be shared equally: a bound for what does not divide. Encoding and decoding are those of long
videos, one latent frame after the other.

    here         which meshes make sense, what is asked, and the answer in words
    job.py       chips, jobs and needs
    programs.py  what is compiled
    compile.py   how, and what the compiler's reports say
"""

import dataclasses
import math

from tqdm import tqdm

from sora_jax.errors import InputError
from sora_jax.model_folder import ModelConfig
from sora_jax.plan.compile import compile_part
from sora_jax.plan.job import GIB, Job, Need, chips, model_config, parts
from sora_jax.plan.programs import program

__all__ = [
    "GIB", "Job", "Need", "chips", "choose_mesh", "compile_part", "describe", "largest_batch",
    "meshes", "model_config", "needs", "occupied", "parts", "program", "search", "training_mesh", "verdict",
]  # fmt: skip


def choose_mesh(config: ModelConfig, size: tuple[int, int], frames: int, number: int) -> tuple[str, str]:
    """A mesh for generating one video on `number` chips, and why this one."""
    _, Y, X, _ = config.codec.latent_shape(frames, *size)
    tokens = Y * X // math.prod(config.dit.patch)
    context = max(n for n in range(1, number + 1) if number % n == 0 and _divides(config, n, tokens))
    tensor = max(n for n in range(1, number + 1) if number // context % n == 0 and _splits(config, n))
    data = number // context // tensor
    reason = f"context={context} divides the {tokens} tokens of a frame and every width"
    if context > 1:
        group = math.gcd(context, config.dit.heads // tensor)
        reason += f", all-to-all among {group}" + (f", rings of {context // group}" if group < context else "")
    if tensor > 1:
        reason += f"; tensor={tensor} takes what is left, dividing heads and feed-forward widths"
    if data > 1:
        reason += f"; data={data} is of use to the branches of guidance and to several videos"
    return f"data={data},context={context},tensor={tensor}", reason


def _divides(config: ModelConfig, shares: int, tokens: int) -> bool:
    return not (tokens % shares or config.dit.width % shares or config.text.width % shares)


def _splits(config: ModelConfig, shares: int) -> bool:
    return not any(part.heads % shares or part.feed_forward % shares for part in (config.dit, config.text))


def training_mesh(batch: int, number: int) -> tuple[str, str]:
    """A mesh for training on `number` chips, and why this one."""
    fsdp = math.gcd(batch, number)
    reason = f"fsdp={fsdp} divides the batch of {batch} and the parameters"
    if fsdp < number:
        reason += f", context={number // fsdp} the patches of each video"
    return f"data=1,fsdp={fsdp},context={number // fsdp},tensor=1", reason


def meshes(config: ModelConfig, size: tuple[int, int], frames: int, number: int) -> list[str]:
    """Meshes that make sense for one video with guidance: its two branches along `data`, the rest shared."""
    _, Y, X, _ = config.codec.latent_shape(frames, *size)
    tokens = Y * X // math.prod(config.dit.patch)
    found = []
    for data in (1, 2):
        for tensor in range(1, number + 1):
            if number % (data * tensor) or not _splits(config, tensor):
                continue
            context = number // data // tensor
            if _divides(config, context, tokens):
                found.append(f"data={data},context={context},tensor={tensor}")
    return found


def needs(job: Job, which: tuple[str, ...], full: bool = False) -> dict[str, Need]:
    """What some parts of a model need (see `compile_part`); a bar counts them."""
    bar = tqdm(which, desc="compiling", unit="part", leave=False)
    return {part: compile_part(dataclasses.replace(job, part=part), full) for part in bar}


def search(job: Job, full: bool = False) -> dict[str, dict[str, Need]]:
    """The denoising step on every mesh that makes sense, the fastest of those that fit first.

    Raises:
        InputError: there is no such mesh.
    """
    chip, number = chips(job.topology)
    config = model_config(job.model)
    found = {}
    if not meshes(config, job.size, job.frames, number):
        raise InputError(f"no mesh of {number} chips divides {job.model} at {job.size[0]}x{job.size[1]}")
    for mesh in tqdm(meshes(config, job.size, job.frames, number), desc="searching", unit="mesh"):
        found[mesh] = needs(dataclasses.replace(job, mesh=mesh), ("denoise",), full)

    def rank(mesh):
        need = found[mesh]["denoise"]
        return bool(need.error) or occupied(job, need) > chip.hbm, sum(need.bounds(chip).values()), need.hbm

    return {mesh: found[mesh] for mesh in sorted(found, key=rank)}


def largest_batch(job: Job, full: bool = False) -> tuple[Job, Need]:
    """Training with the largest batch, a multiple of the job's own, that fits; or with that one, if none does.

    Memory grows with the batch along a straight line, nearly: two small batches tell where to look. From there it looks
    further and further away for one that fits and one that does not, and halves what is between.
    """
    chip, _ = chips(job.topology)
    found = {}

    def need(times: int) -> Need:
        if times not in found:
            larger = dataclasses.replace(job, batch=times * job.batch)
            found[times] = needs(larger, ("train",), full)["train"]
        return found[times]

    def fits(times: int) -> bool:
        return not need(times).error and need(times).hbm <= chip.hbm

    times = 1
    if fits(1) and fits(2):
        growth = max(need(2).hbm - need(1).hbm, 1)
        guess = 2 + int((chip.hbm - need(2).hbm) / growth)
        direction, stride = (1, 1) if fits(guess) else (-1, 1)
        while fits(max(guess + direction * stride, 2)) == fits(guess):
            stride *= 2
        times, over = sorted((guess, max(guess + direction * stride, 2)))
        while over - times > 1:
            middle = (times + over) // 2
            times, over = (middle, over) if fits(middle) else (times, middle)
    return dataclasses.replace(job, batch=times * job.batch), need(times)


# What is printed


def describe(job: Job, needs: dict[str, Need], steps: int) -> str:
    """The plan in words, one row to a part."""
    chip, _ = chips(job.topology)
    rows = [
        f"{job.model} on {job.topology} (chips of {chip.hbm / GIB:.1f} GiB), mesh {job.mesh}: "
        f"{job.frames} frames of {job.size[0]}x{job.size[1]}, batch {job.batch}, {job.dtype}",
        "per chip      arguments     heap      HBM  of all  operations  interconnect  at least  compiled",
    ]
    names = {"text": "text", "see": "pictures", "encode": "to 1 latent", "denoise": "one step", "decode": "1 latent"}
    names["train"] = "one step"
    for part, need in needs.items():
        if need.error:
            rows.append(f"  {names[part]:<11} does not compile: {need.error}")
            continue
        received = sum(need.collectives.values())
        rows.append(
            f"  {names[part]:<11} {need.arguments / GIB:6.2f} GiB {need.heap / GIB:5.2f} GiB {need.hbm / GIB:5.2f} GiB "
            f"{need.hbm / chip.hbm:6.0%} {need.operations / 1e12:8.2f} T {received / GIB:10.2f} GiB "
            f"{max(need.bounds(chip).values()):8.3f} s {need.seconds:7.0f} s"
        )
        if need.collectives:
            parts = ", ".join(f"{kind} {size / GIB:.2f} GiB" for kind, size in need.collectives.items())
            rows.append(f"  {'':<11} {parts}")
    rows.append(verdict(job, needs, steps))
    return "\n".join(rows)


def occupied(job: Job, need: Need) -> int:
    """Bytes on a chip while a part works: its own, and the parameters of the others unless they are taken off."""
    return need.hbm + (0 if job.offload else need.others)


def verdict(job: Job, needs: dict[str, Need], steps: int) -> str:
    """Whether it fits, and how long a video takes at least."""
    chip, _ = chips(job.topology)
    if failed := [part for part, need in needs.items() if need.error]:
        return f"does not fit: {', '.join(failed)} cannot be compiled"
    if "train" in needs:
        need = needs["train"]
        fits = "fits" if need.hbm <= chip.hbm else "does not fit"
        seconds = max(need.bounds(chip).values())
        return f"{fits}: {need.hbm / GIB:.2f} of {chip.hbm / GIB:.1f} GiB a chip; a step takes {seconds:.2f} s at least"
    # The parts run one after the other.
    most = {part: occupied(job, need) for part, need in needs.items()}
    if over := [part for part, size in most.items() if size > chip.hbm]:
        others = "" if job.offload else " with the parameters of the others"
        sizes = ", ".join(f"{part} needs {most[part] / GIB:.1f} GiB{others}" for part in over)
        enough = not job.offload and all(need.hbm <= chip.hbm for need in needs.values())
        return f"does not fit in {chip.hbm / GIB:.1f} GiB: {sizes}{'; with --offload it fits' if enough else ''}"
    F = model_config(job.model).codec.latent_shape(job.frames, *job.size)[0]
    times = {"text": 1, "see": 1, "encode": F, "denoise": steps, "decode": F * job.batch}
    words = {"text": "the text", "see": "the pictures", "encode": "encoding the picture", "decode": "decoding"}
    words["denoise"] = f"{steps} steps"
    seconds = sum(times[part] * max(need.bounds(chip).values()) for part, need in needs.items())
    return (
        f"fits: at most {max(most.values()) / GIB:.2f} of {chip.hbm / GIB:.1f} GiB a chip; "
        f"{' and '.join(words[part] for part in needs)} take {seconds:.1f} s at least"
    )
