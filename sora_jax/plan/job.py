"""What is asked of the compiler and what it answers: chips, jobs and needs."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

from sora_jax import mesh, pipeline
from sora_jax.errors import InputError
from sora_jax.interop.presets import PRESETS
from sora_jax.model_config import ModelConfig
from sora_jax.models import read_config
from sora_jax.request import check_window, windows

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Figures of a chip: HBM in bytes, the rest per second. Interconnect: bytes that come in over all links, two for
    each of the `sides` that an arrangement of them has.

    From https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e; HBM as the compiler has it ("exceeds available
    HBM"), but for v4, whose limit was not asked for.
    """

    hbm: float
    operations: float
    hbm_bandwidth: float
    interconnect: float
    sides: int


CHIPS = {
    "v4": Chip(32e9, 275e12, 1228e9, 300e9, 3),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 200e9, 2),
    "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 600e9, 3),
    "v6e": Chip(31.25 * GIB, 918e12, 1640e9, 400e9, 2),
}
# Slices that the same pages list, by their number of sides; of three sides also multiples of 4x4x4.
_LISTED = {2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split(), 3: "2x2x1 2x2x2 2x2x4 2x4x4".split()}
# Operations per second, dense bfloat16, by a word in the name of a device. GPUs: NVIDIA's data sheets, SXM.
_PEAKS = {"TPU v4": CHIPS["v4"].operations, "TPU v5 lite": CHIPS["v5e"].operations, "TPU v5": CHIPS["v5p"].operations}
_PEAKS |= {"TPU v6 lite": CHIPS["v6e"].operations, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_operations(device_kind: str) -> float | None:
    """Operations per second in the data sheet of the device of that name, dense bfloat16; None where none is known."""
    if re.search("PCIe|NVL", device_kind):  # slower ones of the same name
        return None
    return next((rate for word, rate in _PEAKS.items() if word in device_kind), None)


@dataclass(frozen=True)
class Job:
    """What to compile: a preset's name or a model folder, one of its `parts` or "train", and for what.

    A video of several `windows` is sampled `frames` at a time, each but the first starting with `overlap` frames of
    the one before. `batch` is of videos, sampled `at_a_time`, or of clips that a step trains with.
    """

    model: str
    part: str
    topology: str
    mesh: str
    size: tuple[int, int]
    frames: int
    batch: int = 1
    dtype: str = "bfloat16"
    # Each part of `generate` is on the chips only while it works; training leaves what each block got with the hosts.
    offload: bool = False
    windows: int = 1
    overlap: int = 1


def in_windows(job: Job, window: int | None, overlap: int | None) -> Job:
    """The job for a video of `job.frames` frames, of which `window` are sampled at a time.

    Raises:
        InputError: see `check_window`.
    """
    window, overlap = check_window(model_config(job.model), job.frames, window, overlap)
    return dataclasses.replace(job, frames=window, windows=windows(job.frames, window, overlap), overlap=overlap or 1)


@dataclass(frozen=True)
class Need:
    """What one part needs, bytes and operations per chip; of the denoising, per step.

    Attributes:
        arguments, heap, hbm: bytes; hbm is what the compiler allocates, with outputs and padding.
        operations: of matrix products and convolutions.
        others: bytes of the parameters of the other parts, which rest on the chip meanwhile.
        moved: bytes that go from HBM and back at least: of the weights that the chip's products read, and in training
            of the state, which is read and written.
        collectives: bytes received, by kind.
        seconds: that compiling took.
        error: in place of all these, why it does not compile.
    """

    arguments: int = 0
    heap: int = 0
    hbm: int = 0
    operations: float = 0.0
    others: int = 0
    moved: int = 0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that arithmetic, HBM and interconnect take at least."""
        received = sum(self.collectives.values())
        return {
            "arithmetic": self.operations / chip.operations,
            "hbm": self.moved / chip.hbm_bandwidth,
            "interconnect": received / chip.interconnect if received else 0.0,
        }


def model_config(model: str) -> ModelConfig:
    """The config of a preset, a model folder, or "bundled"."""
    if model in PRESETS:
        return PRESETS[model]
    if model != "bundled" and not Path(model).is_dir():
        raise InputError(f"{model} is neither a model folder nor one of bundled, {', '.join(PRESETS)}")
    return read_config(None if model == "bundled" else model)


def parts(model: str, windows: int = 1) -> tuple[str, ...]:
    """What `generate` runs of a model, in this order; to see and to encode pictures if it always starts from one.

    Windows after the first encode frames of the one before.
    """
    config = model_config(model)
    see, encode = config.vision is not None, config.dit.condition_channels > 0 or windows > 1
    return ("text", *["see"] * see, *["encode"] * encode, "denoise", "decode")


def at_a_time(job: Job) -> int:
    """Videos that `generate` samples at a time, of the `batch` it is asked for."""
    is_guided, pixels = model_config(job.model).sampling.is_guided, job.frames * math.prod(job.size)
    return pipeline.at_a_time(job.batch, pixels, is_guided, mesh.parse_sizes(job.mesh))


def chips(topology: str) -> tuple[Chip, int]:
    """The kind of chip, and how many there are, in a topology like "v6e:2x4".

    The chip's interconnect is what the links bring that it has there: one along a side of two chips, else at most two.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d?(x[1-9]\d?){1,2}", shape):
        raise InputError(
            f"topology {topology!r} must be a kind of chip and their arrangement, such as v6e:2x4 or v5p:2x2x2; "
            f"kinds are {', '.join(CHIPS)}"
        )
    chip, sides = CHIPS[kind], [*map(int, shape.split("x"))]
    if len(sides) != chip.sides:
        example = {2: "2x4", 3: "2x2x2"}[chip.sides]
        raise InputError(
            f"topology {topology}: {kind} has arrangements of {chip.sides} sides, such as {kind}:{example}"
        )
    links = sum(min(side - 1, 2) for side in sides)
    return dataclasses.replace(chip, interconnect=chip.interconnect * links / (2 * chip.sides)), math.prod(sides)


def unlisted(topology: str) -> str:
    """What to tell of a topology that the compiler knows, and that Google Cloud does not list; empty for others."""
    chip, _ = chips(topology)
    shape = topology.partition(":")[2]
    cubes = chip.sides == 3 and all(int(side) % 4 == 0 for side in shape.split("x"))
    if cubes or shape in _LISTED[chip.sides]:
        return ""
    more = " and multiples of 4x4x4" if chip.sides == 3 else ""
    return f"{topology} is not among the slices that are listed: {', '.join(_LISTED[chip.sides])}{more}"
