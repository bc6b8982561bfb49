"""A plan in words, and the same for scripts."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sora_jax.plan.job import GIB, Chip, Job, Need, at_a_time, chips, model_config, unlisted

# Of the parts, in the rows and in what is said below them. The codec's are about one latent frame.
_NAMES = {"text": "text", "see": "pictures", "encode": "encoding", "denoise": "one step", "decode": "decoding"}
_NAMES["train"] = "one step"


def describe(job: Job, needs: dict[str, Need], steps: int) -> str:
    """The plan in words, one row to a part."""
    chip, _ = chips(job.topology)
    frames = f"{job.frames} frames" if job.windows == 1 else f"{job.windows} windows of {job.frames} frames"
    batch = f"batch {job.batch}"
    if "train" in needs:
        batch += " (transformer alone, AdamW, blocks recomputed)"
    elif (several := at_a_time(job)) != job.batch:
        batch += f" ({several} at a time{', as many as the mesh has copies' if several > job.batch else ''})"
    one = ", one of its two transformers" * ("train" in needs and model_config(job.model).boundary is not None)
    rows = [
        f"{job.model}{one} on {job.topology} (chips of {chip.hbm / GIB:.1f} GiB), mesh {job.mesh}: "
        f"{frames} of {job.size[0]}x{job.size[1]}, {batch}, {job.dtype}",
        "per chip       arguments       heap        HBM  of all  operations: at least      moved: at least"
        "   received: at least  compiled",
    ]
    for part, need in needs.items():
        if need.error:
            rows.append(f"  {_NAMES[part]:<11} does not compile: {need.error}")
            continue
        received = sum(need.collectives.values())
        bounds = need.bounds(chip)
        rows.append(
            f"  {_NAMES[part]:<11} {_bytes(need.arguments):>10} {_bytes(need.heap):>10} {_bytes(need.hbm):>10} "
            f"{need.hbm / chip.hbm:7.0%} {_operations(need.operations):>11} {_seconds(bounds['arithmetic']):>9} "
            f"{_bytes(need.moved):>10} {_seconds(bounds['hbm']):>9} {_bytes(received):>10} "
            f"{_seconds(bounds['interconnect']):>9} {need.seconds:7.0f} s"
        )
        if need.collectives:
            parts = ", ".join(f"{kind} {_bytes(size)}" for kind, size in need.collectives.items())
            rows.append(f"  {'':<11} {parts}")
    rows += [verdict(job, needs, steps), *filter(None, [unlisted(job.topology)])]
    return "\n".join(rows)


def occupied(job: Job, need: Need) -> int:
    """Bytes on a chip while a part works: its own, and the parameters of the others unless they are taken off."""
    return need.hbm + (0 if job.offload else need.others)


def with_hosts(job: Job) -> int:
    """Bytes that offloaded training leaves in the hosts' memory, for each chip: the tokens that each block is given."""
    config, (_, number) = model_config(job.model), chips(job.topology)
    tokens = job.batch * config.tokens(job.frames, job.size)
    return config.dit.layers * tokens * config.dit.width * (4 if job.dtype == "float32" else 2) // number


def fits(job: Job, needs: dict[str, Need]) -> bool:
    """Whether every part compiles, and within the chip's memory."""
    chip, _ = chips(job.topology)
    return not any(need.error or occupied(job, need) > chip.hbm for need in needs.values())


def verdict(job: Job, needs: dict[str, Need], steps: int) -> str:
    """Whether it fits, and how long a video takes at least."""
    chip, _ = chips(job.topology)
    if failed := [part for part, need in needs.items() if need.error]:
        memory = all("RESOURCE_EXHAUSTED" in needs[part].error for part in failed)
        return f"{'does not fit' if memory else 'does not compile'}: {', '.join(_NAMES[part] for part in failed)}"
    if "train" in needs:
        need = needs["train"]
        words = "fits" if fits(job, needs) else "does not fit"
        hosts = f", and {with_hosts(job) / GIB:.1f} GiB of its host" if job.offload else ""
        seconds = at_least(job, needs, steps)
        return f"{words}: {_share(need.hbm, chip)} a chip{hosts}; a step takes {_seconds(seconds)} at least"
    # The parts run one after the other.
    most = {part: occupied(job, need) for part, need in needs.items()}
    if over := [part for part, size in most.items() if size > chip.hbm]:
        others = "" if job.offload else " with the parameters of the others"
        sizes = ", ".join(f"{_NAMES[part]} needs {most[part] / GIB:.1f} GiB{others}" for part in over)
        enough = not job.offload and all(need.hbm <= chip.hbm for need in needs.values())
        return f"does not fit in {chip.hbm / GIB:.1f} GiB: {sizes}{'; with --offload it fits' if enough else ''}"
    words = {"text": "the text", "see": "the pictures", "encode": "encoding", "decode": "decoding"}
    times = _rounds(job) * job.windows
    words["denoise"] = f"{steps} steps" if times == 1 else f"{times} times {steps} steps"
    return (
        f"fits: at most {_share(max(most.values()), chip)} a chip; "
        f"{' and '.join(words[part] for part in needs)} take {_seconds(at_least(job, needs, steps))} at least"
    )


def _bytes(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= 0.1 * GIB or not number else f"{number / 2**20:.2f} MiB"


def _share(number: float, chip: Chip) -> str:
    return f"{_bytes(number).removesuffix(' GiB')} of {chip.hbm / GIB:.1f} GiB"


def _operations(number: float) -> str:
    return f"{number / 1e12:.2f} T" if number >= 1e11 or not number else f"{number / 1e9:.2f} G"


def _seconds(number: float) -> str:
    if number >= 10 or not number:
        return f"{number:.1f} s"
    if number >= 0.1:
        return f"{number:.2f} s"
    return f"{1e3 * number:.3g} ms" if number >= 1e-4 else f"{1e6 * number:.3g} us"


def _rounds(job: Job) -> int:
    """How often so many videos are sampled as go at a time."""
    return -(-job.batch // at_a_time(job))


def at_least(job: Job, needs: dict[str, Need], steps: int, bound: Callable[..., float] = max) -> float:
    """Seconds that the parts take at least, each as often as it runs: for the videos, or for a step of training.

    With `bound=sum`, if none of a part's bounds hides behind another.
    """
    chip, _ = chips(job.topology)
    config = model_config(job.model)

    def latents(frames):
        return config.codec.latent_shape(frames, *job.size)[0]

    # The first latent frame is that of one frame, all others of `stride_time`: it takes at least that share of their
    # time.
    first = 1 - 1 / config.codec.stride_time
    F, rounds = latents(job.frames), _rounds(job)
    # The first picture is that of all videos; later windows go on from frames of each. What has a condition encodes a
    # whole window of it, everything else the frames that windows share.
    later = (job.windows - 1) * job.batch
    encoded = (1 + later) * (F - first) if config.dit.condition_channels else later * (latents(job.overlap) - first)
    times = {"text": rounds, "see": 1 + later, "encode": encoded, "denoise": rounds * job.windows * steps, "train": 1}
    times["decode"] = job.windows * (F - first) * job.batch
    return sum(times[part] * bound(need.bounds(chip).values()) for part, need in needs.items())


def for_scripts(job: Job, needs: dict[str, Need], steps: int) -> dict[str, Any]:
    """All of a plan, for JSON: bytes and seconds."""
    chip, number = chips(job.topology)
    parts = {}
    for part, need in needs.items():
        parts[part] = dataclasses.asdict(need)
        if not need.error:
            bounds = need.bounds(chip)
            parts[part] |= {"occupied": occupied(job, need), "bounds": bounds, "at_least": max(bounds.values())}
    works = not any(need.error for need in needs.values())
    return {
        **{name: value for name, value in dataclasses.asdict(job).items() if name != "part"},
        "video_frames": job.frames + (job.windows - 1) * (job.frames - job.overlap),
        "at_a_time": at_a_time(job),
        "chips": number,
        "chip": dataclasses.asdict(chip),
        "parts": parts,
        "steps": steps,
        "fits": fits(job, needs),
        **({"with_hosts": with_hosts(job)} if "train" in needs and job.offload else {}),
        "at_least": at_least(job, needs, steps) if works else None,
        "verdict": verdict(job, needs, steps),
        "unlisted": unlisted(job.topology),
    }
