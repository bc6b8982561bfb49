"""`sora-jax generate`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import mimetypes
import os
import re
import sys
import unicodedata
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_jax.cli.words import PROMPTS_HELP, lora, number, prompts_of, size, whole
from sora_jax.errors import InputError, NoTimeStamp, Refused

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
    target: _Target

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
    target = _Target(
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
    from tqdm.auto import tqdm

    from sora_jax import hosts
    from sora_jax.mesh import parse_mesh
    from sora_jax.models import load
    from sora_jax.video import Video

    jobs, request = task.jobs, task.request

    def output() -> Any:
        task.target.check(jobs[0][0])
        return _signer(options)

    mesh = parse_mesh(task.mesh) if task.mesh else None
    signer = hosts.by_first(output)
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
    problems: list[tuple[type, str]] = []  # not the errors, whose tracebacks hold all frames

    def write(video: Video, prompt: str, seed: int) -> None:
        target = task.target
        save_by = partial(
            video.save,
            target.path(f"{prompt} seed {seed}" if options.num > 1 else prompt),
            embed_prompt=options.embed_prompt,
            report=target.report(seed),
            replace=target.file is not None,
        )
        try:
            path = save_by(signer=signer)
        except NoTimeStamp as error:  # what was made is kept all the same
            path = save_by(signer=replace(signer, timestamp_url=None))
            tqdm.write(str(path))
            raise NoTimeStamp(f"{path} is signed, but without a time stamp: {error}") from error
        tqdm.write(str(path))  # to stdout, past the progress bar

    def save(nth: int, video: Video) -> None:
        """A problem of one video does not cost the others, but what nothing can be written with ends the run."""
        prompt, seed = jobs[nth]
        try:
            write(video, prompt, seed)
        except (InputError, Refused) as problem:
            if len(jobs) == 1:
                raise
            kind = Refused if isinstance(problem, Refused) else InputError
            problems.append((kind, str(problem)))
            tqdm.write(f"video {nth + 1} of {len(jobs)} (seed {seed}): {problem}", file=sys.stderr)
            if kind is InputError and not isinstance(problem, NoTimeStamp):
                output()

    def finish() -> None:
        if problems:
            kind, text = next((one for one in problems if one[0] is InputError), problems[0])
            raise kind(f"{len(problems)} of {len(jobs)} videos: {text}")

    with contextlib.closing(generator.run(request, progress=True)) as videos:
        for nth, video in enumerate(videos):
            hosts.by_first(partial(save, nth, video))
    hosts.by_first(finish)


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


def _signer(options: argparse.Namespace) -> Any:
    """Who signs the files; a key that cannot sign is found before anything is made."""
    from sora_jax.safety import keys, provenance

    with warnings.catch_warnings(record=True, action="always", category=UserWarning) as notes:
        try:
            signer = keys.load_signer(options.signing_cert, options.signing_key, options.timestamp_url)
            provenance.rehearse(signer)
            keys.watermark_key()  # also the mark's, which is this installation's, whoever signs
        finally:  # a key is made only once
            for note in notes:
                print(note.message, file=sys.stderr)
    return signer


class _Target:
    """Where videos go: the one file that was asked for, or names made from prompts in a folder."""

    def __init__(self, output: str | None, several: bool, frames: int, fps: float):
        self.frames, self.fps, self.made = frames, fps, False
        several |= bool(output) and output.endswith(("/", os.sep))
        self.file = Path(output) if output and not several and not Path(output).is_dir() else None
        self.folder = Path(output or ".")
        kind, _ = mimetypes.guess_type(self.folder.name)
        if self.file is None and not self.folder.is_dir() and (kind or "").startswith(("video/", "image/")):
            raise InputError(f"several videos need a folder, not {output}; give -o the name of a folder")

    def check(self, prompt: str) -> None:
        """Raises InputError if writing cannot succeed; makes the folder if only that is missing."""
        from sora_jax.media import check_output, numbered

        path = self.path(prompt)
        if self.file is None:
            try:
                self.made = not self.folder.exists()
                self.folder.mkdir(exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make the folder {self.folder}: {error.strerror}") from error
            path = next(one for one in numbered(path) if not one.exists())
        check_output(path, self.frames, self.fps)

    def tidy(self) -> None:
        """Takes away the folder that was made, if nothing is in it."""
        if self.made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def path(self, title: str) -> Path:
        """The path of a video; one in the folder gets a number when it is saved, if its name is taken then."""
        if self.file is not None:
            return self.file
        title = unicodedata.normalize("NFC", title.lower())
        # Signs that belong to a letter are none of their own; the others part words.
        parted = "".join(c if c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" else "-" for c in title)
        name = re.sub("-+", "-", parted).strip("-")[:60].strip("-") or "video"
        return self.folder / f"{name}{'.mp4' if self.frames > 1 else '.png'}"

    def report(self, seed: int) -> Path | None:
        """Where it is said why a video is withheld: not under a name that is made from the prompt."""
        return None if self.file else self.folder / f"withheld-seed-{seed}.json"
