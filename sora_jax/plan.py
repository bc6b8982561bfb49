"""What a model needs on a TPU slice, told by the TPU's own compiler, without a TPU.

The programs that `generate` runs (text encoder, the scan of denoising steps, decoder) are compiled for a topology,
each in a process of its own: an impossible program can end the process that compiles it. What comes out tells

    memory        arguments, outputs and packed heap: "HBM alloc", the figure by which the compiler refuses
    interconnect  bytes that each chip receives, by kind of collective, loops counted as often as they run

Operations are counted in the traced program: matrix products and convolutions, two for each multiplication and
addition, and taken to be shared equally: a bound for what does not divide. Decoding is that of long videos, one latent
frame after the other.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from tqdm import tqdm

from sora_jax import flow, pipeline, sampler
from sora_jax import mesh as mesh_lib
from sora_jax.counting import count_collectives, count_operations
from sora_jax.dit import DiT
from sora_jax.errors import InputError, one_line
from sora_jax.generate import read_config
from sora_jax.interop.presets import PRESETS
from sora_jax.model_folder import ModelConfig, abstract_params, memory_dtype
from sora_jax.training import state as state_lib

GIB = 2**30
PARTS = ("text", "denoise", "decode")  # of `generate`; "train" is a step of training the transformer
_STEPS = 2  # of the scan that is compiled; what a step costs does not depend on their number


@dataclass(frozen=True)
class Chip:
    """Figures of a chip: HBM in bytes, the rest per second. Interconnect: bytes that come in over all links.

    From https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e.
    """

    hbm: float
    operations: float
    hbm_bandwidth: float
    interconnect: float


CHIPS = {
    "v4": Chip(32e9, 275e12, 1228e9, 300e9),
    "v5e": Chip(16e9, 197e12, 819e9, 200e9),
    "v5p": Chip(95e9, 459e12, 2765e9, 600e9),
    "v6e": Chip(32e9, 918e12, 1640e9, 400e9),
}


@dataclass(frozen=True)
class Job:
    """What to compile: a preset's name or a model folder, one of `PARTS`, and for what."""

    model: str
    part: str
    topology: str
    mesh: str
    size: tuple[int, int]
    frames: int
    batch: int = 1
    dtype: str = "bfloat16"
    offload: bool = False  # each part of `generate` is on the chips only while it works


@dataclass(frozen=True)
class Need:
    """What one part needs, bytes and operations per chip; of the denoising, per step.

    Attributes:
        arguments, heap, hbm: bytes; hbm is what the compiler allocates, with outputs and padding.
        operations: of matrix products and convolutions.
        others: bytes of the parameters of the other parts, which rest on the chip meanwhile.
        weights: bytes of them that the chip's products read.
        collectives: bytes received, by kind.
        seconds: that compiling took.
        error: in place of all these, why it does not compile.
    """

    arguments: int = 0
    heap: int = 0
    hbm: int = 0
    operations: float = 0.0
    others: int = 0
    weights: int = 0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that arithmetic, HBM and interconnect take at least."""
        return {
            "arithmetic": self.operations / chip.operations,
            "hbm": self.weights / chip.hbm_bandwidth,
            "interconnect": sum(self.collectives.values()) / chip.interconnect,
        }


def model_config(model: str) -> ModelConfig:
    """The config of a preset, a model folder, or "bundled"."""
    if model in PRESETS:
        return PRESETS[model]
    if model != "bundled" and not Path(model).is_dir():
        raise InputError(f"{model} is neither a model folder nor one of bundled, {', '.join(PRESETS)}")
    return read_config(None if model == "bundled" else model)


def chips(topology: str) -> tuple[Chip, int]:
    """The kind of chip, and how many there are, in a topology like "v6e:2x4"."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d?(x[1-9]\d?){1,2}", shape):
        raise InputError(
            f"topology {topology!r} must be a kind of chip and their arrangement, such as v6e:2x4 or v5p:2x2x2; "
            f"kinds are {', '.join(CHIPS)}"
        )
    return CHIPS[kind], math.prod(map(int, shape.split("x")))


def choose_mesh(config: ModelConfig, size: tuple[int, int], frames: int, number: int) -> tuple[str, str]:
    """A mesh for generating one video on `number` chips, and why this one."""
    _, Y, X, _ = config.codec.latent_shape(frames, *size)
    tokens = Y * X // math.prod(config.dit.patch)
    context = max(n for n in range(1, number + 1) if number % n == 0 and _divides(config, n, tokens))
    tensor = math.gcd(number // context, config.dit.heads)
    data = number // context // tensor
    reason = f"context={context} divides the {tokens} tokens of a frame and every width"
    if context > 1:
        group = math.gcd(context, config.dit.heads // tensor)
        reason += f", all-to-all among {group}" + (f", rings of {context // group}" if group < context else "")
    if tensor > 1:
        reason += f"; tensor={tensor} takes what is left, dividing {config.dit.heads} heads"
    if data > 1:
        reason += f"; data={data} is of use to several videos"
    return f"data={data},context={context},tensor={tensor}", reason


def _divides(config: ModelConfig, shares: int, tokens: int) -> bool:
    return not (tokens % shares or config.dit.width % shares or config.text.width % shares)


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
            if number % (data * tensor) or config.dit.heads % tensor or config.text.heads % tensor:
                continue
            context = number // data // tensor
            if _divides(config, context, tokens):
                found.append(f"data={data},context={context},tensor={tensor}")
    return found


def needs(job: Job, parts: tuple[str, ...] = PARTS, full: bool = False) -> dict[str, Need]:
    """What each part of a model needs (see `compile_part`); a bar counts the parts."""
    bar = tqdm(parts, desc="compiling", unit="part", leave=False)
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

    Memory grows with the batch along a straight line, nearly: two small batches tell where to look.
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
        growth = need(2).hbm - need(1).hbm
        times = 2 + int((chip.hbm - need(2).hbm) / growth)
        while not fits(times):
            times -= 1
        while fits(times + 1):
            times += 1
    return dataclasses.replace(job, batch=times * job.batch), need(times)


# One program, compiled in a process of its own


def compile_part(job: Job, full: bool = False) -> Need:
    """What a part needs. Only with `full` is code generated, which takes most of the time and tells nothing of this;
    but an impossible kernel is found only there.

    Raises:
        InputError: libtpu is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock file: there is no TPU to share
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*planned",
        }
        command = [sys.executable, "-m", "sora_jax.plan", json.dumps(dataclasses.asdict(job))]
        started = time.perf_counter()
        # Files, since the compiler may say more than a pipe holds.
        with open(f"{folder}/out", "w+") as out, open(f"{folder}/errors", "w+") as errors:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors)
            try:
                while process.poll() is None and (full or not _report(Path(folder))):
                    time.sleep(0.2)
            finally:
                process.kill()
                process.wait()
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
        report = _report(Path(folder))
        if not report or (full and process.returncode):
            return Need(error=_reason(errors), seconds=seconds)
        report, program_text = report
        hbm = int(re.search(r"\(color=0\)\s+Total bytes: (\d+)", report)[1])
        collectives = count_collectives(program_text, _steps(job), chips(job.topology)[1])
        arguments = values["arguments"]
        return Need(
            arguments=arguments,
            heap=hbm - arguments,
            hbm=hbm,
            operations=values["operations"],
            others=values["others"],
            weights=values["weights"],
            collectives=collectives,
            seconds=seconds,
        )


def _report(folder: Path) -> tuple[str, str] | None:
    """The compiler's report on memory and the program it is about, once both are there."""
    reports, programs = (
        folder.glob("*planned*memory-usage-report.txt"),
        folder.glob("*planned*.after_optimizations.txt"),
    )
    found = [(path.read_text(), other.read_text()) for path in reports for other in programs]
    # The report has a part for each kind of memory; the program ends with its entry.
    for report, text in found:
        if report.count("Total bytes") >= 2 and "(color=0)" in report and re.search(r"^ENTRY (?s:.*)^\}", text, re.M):
            return report, text
    return None


def _reason(errors: str) -> str:
    lines = [line for line in errors.splitlines() if "RESOURCE_EXHAUSTED" in line or "Error" in line]
    return " ".join((lines or errors.splitlines() or ["the compiler ended without a word"])[-1].split())[:300]


def _worker(job: Job) -> None:
    """Lowers and compiles; prints what only this process knows before it starts compiling."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        print(json.dumps({"input_error": "planning needs the TPU compiler: pip install 'sora-jax[tpu]'"}))
        return
    from jax.experimental import topologies

    bounds = {"chips_per_host_bounds": [1, 1, 1]} if job.topology.endswith(":1x1") else {}
    try:
        topology = topologies.get_topology_desc(job.topology, platform="tpu", **bounds)
    except Exception as error:  # the compiler's library objects in its own ways
        print(json.dumps({"input_error": f"topology {job.topology}: {one_line(error)}"}))
        return
    try:
        mesh = mesh_lib.parse_mesh(job.mesh, devices=topology.devices)
        function, arguments, donated = program(job, mesh)
    except InputError as error:
        print(json.dumps({"input_error": str(error)}))
        return
    local = jax.tree.map(_on_one_device, arguments)
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, donate_argnums=donated, keep_unused=True).lower(*arguments)
    weights = arguments[0].params if job.part == "train" else arguments[0]
    values = {
        "arguments": sum(_bytes_here(leaf) for leaf in jax.tree.leaves(arguments)),
        "others": 0 if job.part == "train" else _at_rest(job, mesh),
        "operations": count_operations(jax.make_jaxpr(function)(*local).jaxpr, _steps(job)) / mesh.size,
        "weights": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights)) // mesh.shape["tensor"],
    }
    print(json.dumps(values), flush=True)
    lowered.compile()


def _steps(job: Job) -> int:
    return _STEPS if job.part == "denoise" else 1


def _at_rest(job: Job, mesh: jax.sharding.Mesh) -> int:
    """Bytes on a chip of the parameters of all parts but the job's own."""
    config = model_config(job.model)
    own = {"text": "text", "decode": "codec", "denoise": "dit"}[job.part]
    others = [part for part in config.parts if not part.startswith(own)]
    return sum(_bytes_here(leaf) for part in others for leaf in jax.tree.leaves(_held(config, part, mesh, job.dtype)))


def _held(config: ModelConfig, part: str, mesh: jax.sharding.Mesh, dtype: str) -> Any:
    """The abstract parameters of a part as they are in memory."""

    def in_memory(path, leaf):
        kind = memory_dtype(part, jax.tree_util.keystr(path, simple=True, separator="."), dtype)
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=leaf.sharding)

    return jax.tree.map_with_path(in_memory, abstract_params(config, mesh)[part])


def _on_one_device(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _bytes_here(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def program(job: Job, mesh: jax.sharding.Mesh):
    """The function of a part, its abstract arguments with their places, parameters first, and which are donated."""
    config = model_config(job.model)
    dtype = jnp.dtype(job.dtype)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def held(part):
        return _held(config, part, mesh, job.dtype)

    def array(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    F, Y, X, Z = config.codec.latent_shape(job.frames, *job.size)
    if job.part == "train":
        return _training(config, dtype, mesh, job.batch, (F, Y, X, Z))
    guided = config.sampling.guidance != 1
    texts = job.batch * (2 if guided else 1)
    if job.part == "text":

        def planned(params, ids_BL):
            return pipeline.encode_text(config, dtype, params, ids_BL)

        return planned, (held("text"), array((texts, config.text.length), jnp.int32)), ()
    if job.part == "decode":
        # As `generate` decodes: the first latent frame, then one after the other with what went before.
        def planned(params, state, latents_BFYXZ):
            return pipeline.decode(config, params, state, latents_BFYXZ, False)

        codec = held("codec")  # under a mesh of devices that are not there, nothing can be computed
        with jax.set_mesh(mesh):
            first = partial(pipeline.decode, config, first=True)
            _, state = jax.eval_shape(first, codec, {}, array((1, 1, Y, X, Z)))
            state = jax.tree.map(lambda leaf: _by_rows(leaf, mesh), state)
        return planned, (codec, state, array((1, 1, Y, X, Z))), 1

    dits = [held(part) for part in config.parts if part.startswith("dit")]
    schedule = sampler.Schedule(array((_STEPS + 1,)), array((_STEPS,)))
    given = pipeline.Given(
        condition_BFYXC=array((1, F, Y, X, config.dit.condition_channels)) if config.dit.condition_channels else None,
        image_BLD=array((1, config.dit.image_positions or config.vision.tokens, config.vision.width))
        if config.vision
        else None,
    )

    def planned(dits, noise_BFYXZ, text_BLD, schedule, guidance_2, given):
        return pipeline.denoise(
            config, dtype, dits, noise_BFYXZ, text_BLD, schedule, guidance_2, given, is_guided=guided
        )

    text = array((texts, config.text.length, config.text.width))
    return planned, (dits, array((job.batch, F, Y, X, Z)), text, schedule, array((2,)), given), 1


def _training(config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh, batch: int, shape: tuple[int, ...]):
    """A step of training the transformer on latents and text features: AdamW, float32 parameters and averages."""
    dit = dataclasses.replace(config.dit, remat="full", condition_channels=0, image_width=0)
    model = DiT(dit, dtype)
    x0_BFYXZ, text_BLD = jnp.zeros((1, *shape)), jnp.zeros((1, config.text.length, config.text.width))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))

    def create():
        level_BF = jnp.zeros((1, shape[0]))
        return state_lib.create(model.init(jax.random.key(0), x0_BFYXZ, level_BF, text_BLD)["params"], optimizer)

    boxed = jax.eval_shape(create)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        meta.unbox(boxed),
        mesh_lib.shardings(boxed, mesh),
    )

    def loss(params, batch, key):
        x0_BFYXZ, text_BLD = batch
        drawn = flow.noised(key, x0_BFYXZ, shift=3.0, known_share=0.2)
        velocity_BFYXZ = model.apply({"params": params}, drawn.x_BFYXZ, drawn.level_BF, text_BLD)
        return flow.velocity_loss(velocity_BFYXZ, x0_BFYXZ, drawn.noise_BFYXZ, drawn.known_BF), {}

    place = mesh_lib.batch_sharding(mesh)
    clips = tuple(
        jax.ShapeDtypeStruct((batch, *x.shape[1:]), jnp.float32, sharding=place) for x in (x0_BFYXZ, text_BLD)
    )
    step = state_lib.make_step(loss, optimizer, seed=0, ema_decay=0.999)

    def planned(state, clips):
        return step(state, clips)

    return planned, (state, clips), 0


def _by_rows(leaf, mesh):
    with jax.set_mesh(mesh):
        spec = mesh_lib.spec(leaf.shape, ("batch", None, "rows", None, None))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))


# What is printed


def describe(job: Job, needs: dict[str, Need], steps: int) -> str:
    """The plan in words, one row to a part."""
    chip, _ = chips(job.topology)
    rows = [
        f"{job.model} on {job.topology} (chips of {chip.hbm / 1e9:.0f} GB), mesh {job.mesh}: "
        f"{job.frames} frames of {job.size[0]}x{job.size[1]}, batch {job.batch}, {job.dtype}",
        "per chip      arguments     heap      HBM  of all  operations  interconnect  at least  compiled",
    ]
    names = {"text": "text", "denoise": "one step", "decode": "1 latent", "train": "one step"}
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
    times = {"text": 1, "denoise": steps, "decode": F * job.batch}
    words = {"text": "the text", "denoise": f"{steps} steps", "decode": "decoding"}
    seconds = sum(times[part] * max(need.bounds(chip).values()) for part, need in needs.items())
    return (
        f"fits: at most {max(most.values()) / GIB:.2f} of {chip.hbm / GIB:.1f} GiB a chip; "
        f"{' and '.join(words[part] for part in needs)} take {seconds:.1f} s at least"
    )


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    _worker(Job(**{**values, "size": tuple(values["size"])}))
