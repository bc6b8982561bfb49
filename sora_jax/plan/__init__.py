"""What a model needs on a TPU slice, told by the TPU's own compiler, without a TPU.

The programs that `generate` runs (text encoder, for models that start from pictures what reads those, the scan of
denoising steps, decoder) are compiled for a topology, each in a process of its own. What comes out tells

    memory        arguments, outputs and packed heap: "HBM alloc", the figure by which the compiler refuses
    interconnect  bytes that each chip receives, by kind of collective, loops counted as often as they run

Operations are counted in the traced program: matrix products and convolutions, two for each multiplication and
addition, and taken to be shared equally: a bound for what does not divide. Encoding and decoding are those of long
videos, one latent frame after the other.

    here         the parts of a job, one after the other; the best mesh; the largest batch
    job.py       chips, jobs and needs
    programs.py  what is compiled
    compile.py   how, and what the compiler's reports say
    words.py     the answer
"""

import dataclasses
import sys

from tqdm import tqdm

from sora_jax import mesh as mesh_lib
from sora_jax.errors import InputError
from sora_jax.mesh_choice import generating_meshes, training_mesh, training_meshes
from sora_jax.plan.compile import NEEDS_LIBTPU, compile_part
from sora_jax.plan.job import GIB, Job, Need, at_a_time, chips, in_windows, model_config, parts
from sora_jax.plan.programs import program
from sora_jax.plan.words import at_least, describe, fits, for_scripts, verdict

__all__ = [
    "GIB", "NEEDS_LIBTPU", "Job", "Need", "at_a_time", "at_least", "chips", "compile_part", "describe", "fits",
    "for_scripts", "in_windows", "largest_batch", "model_config", "needs", "parts", "program", "search", "verdict",
]  # fmt: skip


def needs(job: Job, which: tuple[str, ...], full: bool = False) -> dict[str, Need]:
    """What some parts of a model need (see `compile_part`); a bar counts them."""
    with tqdm(which, desc="compiling", unit="part", leave=False) as bar:  # which is gone before an error is told
        return {part: compile_part(dataclasses.replace(job, part=part), full) for part in bar}


def search(job: Job, which: tuple[str, ...], steps: int, full: bool = False) -> dict[str, dict[str, Need]]:
    """Parts of a model, or ("train",), on every mesh that makes sense; those on which all of them fit come first.

    Among these the fastest do, as far as `at_least` tells for so many steps: by the largest of the bounds of each part,
    and then by their sum, since the others may not hide behind it.

    Raises:
        InputError: there is no such mesh.
    """
    _, number = chips(job.topology)
    config = model_config(job.model)
    if which == ("train",):
        tried = training_meshes(config, job.size, job.batch, number)
    else:
        tried = generating_meshes(config, job.size, number, job.batch)
    if not tried:
        asked = f"{job.model} at {job.size[0]}x{job.size[1]}" + f", batch {job.batch}" * (which == ("train",))
        raise InputError(f"no mesh that makes sense of {number} chips divides {asked}")
    found = {}
    with tqdm(tried, desc="searching", unit="mesh", leave=False) as bar:
        for mesh in bar:
            try:
                found[mesh] = needs(dataclasses.replace(job, mesh=mesh), which, full)
            except RuntimeError as error:  # the others are worth knowing all the same
                found[mesh] = {which[0]: Need(error=str(error))}
            # Minutes lie between them: who has seen enough can stop.
            bar.write(f"mesh {mesh}: {verdict(dataclasses.replace(job, mesh=mesh), found[mesh], steps)}", sys.stderr)

    def rank(mesh):
        here, needed = dataclasses.replace(job, mesh=mesh), found[mesh]
        times = [at_least(here, needed, steps, bound) for bound in (max, sum)]
        return not fits(here, needed), *times, max(need.hbm for need in needed.values())

    return {mesh: found[mesh] for mesh in sorted(found, key=rank)}


def largest_batch(job: Job, full: bool = False) -> tuple[Job, Need]:
    """Training with the largest batch that fits, a multiple of the clips that the mesh takes at once; or with so many,
    if not even they fit.

    Where the mesh is "auto", it is at first the one that `training_mesh` chooses for a clip to each chip. While that
    does not fit, chips share the patches of fewer and fewer clips.
    """
    if job.mesh != "auto":
        sizes = mesh_lib.parse_sizes(job.mesh)
        return _largest_multiple(dataclasses.replace(job, batch=sizes["data"] * sizes["fsdp"]), full)
    _, number = chips(job.topology)
    config = model_config(job.model)
    tokens, tried, found = config.tokens(1, job.size), set(), None
    for clips in range(number, 0, -1):
        if number % clips:
            continue
        try:
            mesh, _ = training_mesh(clips, number, config.dit, tokens=tokens)
        except InputError:  # no mesh divides so many
            if clips == 1 and found is None:
                raise
            continue
        if mesh not in tried:
            tried.add(mesh)
            found = largest_batch(dataclasses.replace(job, mesh=mesh), full)
            if fits(found[0], {"train": found[1]}):
                break
    return found


def _largest_multiple(job: Job, full: bool) -> tuple[Job, Need]:
    """Training with the largest multiple of the job's batch that fits; or with that one, if none does.

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

    def works(times: int) -> bool:
        return fits(job, {"train": need(times)})

    times = 1
    if works(1) and works(2):
        growth = max(need(2).hbm - need(1).hbm, 2**16)  # so that the guess is a batch that can be
        guess = 2 + int((chip.hbm - need(2).hbm) / growth)
        direction, stride = (1, 1) if works(guess) else (-1, 1)
        while works(max(guess + direction * stride, 2)) == works(guess):
            stride *= 2
        times, over = sorted((guess, max(guess + direction * stride, 2)))
        while over - times > 1:
            middle = (times + over) // 2
            times, over = (middle, over) if works(middle) else (times, middle)
    return dataclasses.replace(job, batch=times * job.batch), need(times)
