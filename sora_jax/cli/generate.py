"""`sora-jax generate`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sora_jax.cli.saving import Saver, Target
from sora_jax.cli.words import PROMPTS_HELP, lora, number, prompts_of, size, whole
from sora_jax.errors import InputError

if TYPE_CHECKING:  # mistakes are told without waiting for JAX
    from sora_jax.model_config import ModelConfig
    from sora_jax.request import Request


def add_commands(commands: Any) -> None:
    generate = commands.add_parser("generate", help="make a video from a prompt", allow_abbrev=False)
    generate.set_defaults(run=_generate)
    add = generate.add_argument
    add("prompt", nargs="?", help="what the video shows")
    add("--prompts", metavar="FILE", help=PROMPTS_HELP)
    add(
        "-o",
        "--output",
        metavar="PATH",
        help=".mp4, .gif or .png file; the folder when there are several videos",
    )
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="the same seed gives the same video (default: 0)")
    add(
        "--num",
        type=whole(1),
        default=1,
        help="videos per prompt, with seeds SEED, SEED+1, ... (default: 1)",
    )
    add("--frames", type=whole(0), help="frames of the video (default: the model's)")
    add("--window", type=whole(0), metavar="N", help="frames sampled at a time; longer videos go on from the last ones")
    add("--overlap", type=whole(0), metavar="N", help="frames a window has from the one before (default: 1)")
    add("--size", type=size, metavar="HxW", help="height and width in pixels (default: the model's)")
    add("--fps", type=number(0), help="frames per second of the file (default: the model's)")
    add("--steps", type=whole(1), help="steps of the sampler (default: the model's)")
    add("--guidance", type=number(), help="weight of the prompt; up to 1 there is no guidance (default: the model's)")
    add("--guidance-low", type=number(), help="the same at low noise levels, for models with two transformers")
    add(
        "--shift",
        type=number(0),
        help="time shift of the noise levels; larger spends more steps at high noise (default: the model's)",
    )
    add("--negative-prompt", default="", metavar="TEXT", help="what the video should not show")
    add("--image", metavar="FILE", help="the picture that the video starts with, for models that take one")
    add("--last-image", metavar="FILE", help="the picture that the video ends with, likewise")
    add("--model", metavar="DIR", help="a model folder, ours or a published Wan (default: the bundled model)")
    add("--lora", action="append", type=lora, metavar="FILE[:SCALE]", help="a low-rank adaptation; can be repeated")
    add("--lora-low", action="append", type=lora, metavar="FILE[:SCALE]", help="likewise, for low noise levels")
    add("--dtype", choices=("float32", "bfloat16"), help="precision of the large products (default: by the device)")
    kernels = ("auto", "xla", "heads", "splash", "cudnn")
    add("--kernel", choices=kernels, default="auto", help="what computes attention (default: auto, by the device)")
    add(
        "--mesh",
        metavar="AXIS=N,...",
        help="devices along data, fsdp, context, tensor, or auto (default: one device; with --hosts auto)",
    )
    add("--hosts", action="store_true", help="started on each of several hosts: they share the work, the first writes")
    add("--offload", action="store_true", help="each part of the model is on the device only while it works")
    add("--policy", metavar="FILE", help="a TOML file that changes what prompts may ask for (see docs/safety.md)")
    add(
        "--embed-prompt",
        action="store_true",
        help="the manifest holds the prompt itself, not only its digest",
    )
    add("--signing-cert", metavar="FILE", help="PEM: the certificate chain that signs (default: this installation's)")
    add("--signing-key", metavar="FILE", help="PEM: the private key of that certificate")
    add("--timestamp-url", metavar="URL", help="a time-stamp server (RFC 3161) to confirm when a file was signed")


def _generate(options: argparse.Namespace) -> None:
    # A cache that cannot be written only makes the next start slower.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    if not options.hosts:
        return _to_the_end(options, _prepare(options))

    from sora_jax import hosts

    hosts.connect(preemptible=False)
    hosts.check_found()
    with hosts.watched():
        task = hosts.by_all(partial(_prepare, options))
        hosts.check_same("model, prompts, pictures, policy and options", task.said(options))
        _to_the_end(options, task)


def _to_the_end(options: argparse.Namespace, task: _Task) -> None:
    try:
        _sample(options, task)
    finally:
        task.target.tidy()


@dataclass(frozen=True)
class _Task:
    """What is asked: a prompt and seed for each video, the checked request, the mesh in words, where videos go."""

    jobs: list[tuple[str, int]]
    config: ModelConfig
    request: Request
    mesh: str | None
    target: Target

    def said(self, options: argparse.Namespace) -> str:
        """All of it that decides what is sampled."""
        request, words = self.request, vars(options)
        pictures = [hashlib.sha256(one.data).hexdigest() for one in request.ingredients]
        sampled = ("model", "lora", "lora_low", "dtype", "kernel", "offload", "negative_prompt")
        shape = (request.frames, request.window, request.overlap, request.size, request.fps)
        solver = (request.steps, request.guidance, request.guidance_low, request.shift)
        chosen = [words[name] for name in sampled]
        return repr((self.jobs, self.config, self.mesh, shape, solver, request.policy.digest, pictures, chosen))


def _prepare(options: argparse.Namespace) -> _Task:
    """What can be refused is refused here, before a model is loaded, which may take minutes."""
    for name in ("output", "model", "mesh", "policy", "image", "last_image", "prompts"):
        if vars(options)[name] == "":  # as a variable of a shell is that is not set
            raise InputError(f"--{name.replace('_', '-')} is empty; give a name, or leave it out")
    prompts = prompts_of(options)
    seeds = range(options.seed, options.seed + options.num)
    if seeds[-1] >= 2**32:
        raise InputError(f"--seed {options.seed} with --num {options.num} passes the largest seed, {2**32 - 1}")
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]

    from sora_jax.models import read_config
    from sora_jax.request import make_request
    from sora_jax.safety.policy import load_policy

    config = read_config(options.model)
    request = make_request(
        config,
        [prompt for prompt, _ in jobs],
        seed=[seed for _, seed in jobs],
        negative_prompt=options.negative_prompt,
        frames=options.frames,
        window=options.window,
        overlap=options.overlap,
        size=options.size,
        steps=options.steps,
        guidance=options.guidance,
        guidance_low=options.guidance_low,
        shift=options.shift,
        fps=options.fps,
        image=options.image,
        last_image=options.last_image,
        policy=load_policy(options.policy),
    )
    target = Target(
        options.output, several=len(jobs) > 1 or bool(options.prompts), frames=request.frames, fps=request.fps
    )
    words = ("auto" if options.hosts else None) if options.mesh is None else options.mesh
    if words == "auto":
        import jax

        from sora_jax.mesh_choice import generating_mesh

        words, reason = generating_mesh(
            config,
            request.size,
            jax.device_count(),
            request.is_guided,
            rings=jax.default_backend() != "gpu",
        )
        _say(f"mesh {words}: {reason}")
    return _Task(jobs, config, request, words, target)


def _sample(options: argparse.Namespace, task: _Task) -> None:
    from sora_jax import hosts
    from sora_jax.mesh import parse_mesh
    from sora_jax.models import load

    request, saver = task.request, Saver(options, task.target, task.jobs)
    mesh = parse_mesh(task.mesh) if task.mesh else None
    hosts.by_first(saver.prepare)
    lora, lora_low = _adaptations(options.lora), _adaptations(options.lora_low)
    generator = load(
        options.model,
        options.dtype,
        kernel=options.kernel,
        lora=lora,
        lora_low=lora_low,
        mesh=mesh,
        offload=options.offload,
        policy=request.policy,
    )
    for note in generator.notes(request):
        _say(note)
    with contextlib.closing(generator.run(request, progress=True)) as videos:
        for nth, video in enumerate(videos):
            hosts.by_first(partial(saver.save, nth, video))
    hosts.by_first(saver.finish)


def _adaptations(given: list[tuple[str, float]] | None) -> dict[str, float]:
    """Files with their scales; a file that is given twice counts with the sum."""
    found: dict[str, float] = {}
    for path, scale in given or []:
        found[path] = found.get(path, 0.0) + scale
    return found


def _say(line: str) -> None:
    """To stderr, once, however many hosts there are."""
    from sora_jax import hosts

    if hosts.is_first():
        print(line, file=sys.stderr)
