"""`sora-jax generate`."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from sora_jax.cli.words import lora, number, size, whole
from sora_jax.errors import InputError


def add_commands(commands: Any) -> None:
    generate = commands.add_parser("generate", help="make a video from a prompt", allow_abbrev=False)
    generate.set_defaults(run=_generate)
    add = generate.add_argument
    add("prompt", nargs="?", help="what the video shows")
    add(
        "--prompts",
        metavar="FILE",
        help="a file with one prompt per line; blank lines and # comments are skipped",
    )
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
    add("--frames", type=whole(1), help="frames of the video (default: the model's)")
    add("--size", type=size, metavar="HxW", help="height and width in pixels (default: the model's)")
    add("--fps", type=number(0), help="frames per second of the file (default: the model's)")
    add("--steps", type=whole(1), help="steps of the sampler (default: the model's)")
    add("--guidance", type=number(), help="weight of the prompt; 1 is no guidance (default: the model's)")
    add("--guidance-low", type=number(), help="the same at low noise levels, for models with two transformers")
    add("--negative-prompt", default="", metavar="TEXT", help="what the video should not show")
    add("--image", metavar="FILE", help="the picture that the video starts with, for models that take one")
    add("--last-image", metavar="FILE", help="the picture that the video ends with, likewise")
    add("--model", metavar="DIR", help="a model folder, ours or a published Wan (default: the bundled model)")
    add("--lora", action="append", type=lora, metavar="FILE[:SCALE]", help="a low-rank adaptation; can be repeated")
    add("--lora-low", action="append", type=lora, metavar="FILE[:SCALE]", help="likewise, for low noise levels")
    add("--dtype", choices=("float32", "bfloat16"), help="precision of the large products (default: by the device)")

    add("--mesh", metavar="AXIS=N,...", help="devices along data, fsdp, context, tensor, or auto (default: one device)")


def _generate(options: argparse.Namespace) -> None:
    prompts = _prompts(options)
    seeds = range(options.seed, options.seed + options.num)
    if seeds[-1] >= 2**32:
        raise InputError(f"--seed {options.seed} with --num {options.num} passes the largest seed, {2**32 - 1}")
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]

    # A cache that cannot be written only makes the next start slower.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")

    from tqdm.auto import tqdm

    from sora_jax.generate import load, read_config
    from sora_jax.mesh import parse_mesh
    from sora_jax.request import make_request

    # What can be refused is refused before a model is loaded, which may take minutes.
    config = read_config(options.model)
    request = make_request(
        config,
        [prompt for prompt, _ in jobs],
        seed=[seed for _, seed in jobs],
        negative_prompt=options.negative_prompt,
        frames=options.frames,
        size=options.size,
        steps=options.steps,
        guidance=options.guidance,
        guidance_low=options.guidance_low,
        fps=options.fps,
        image=options.image,
        last_image=options.last_image,
    )
    target = _Target(options.output, several=len(jobs) > 1 or bool(options.prompts), frames=request.frames)
    target.check(prompts[0])
    words = options.mesh
    if words == "auto":
        import jax

        from sora_jax.plan import choose_mesh

        words, reason = choose_mesh(config, request.size, request.frames, jax.device_count())
        print(f"mesh {words}: {reason}", file=sys.stderr)
    mesh = parse_mesh(words) if words else None
    lora, lora_low = dict(options.lora or []), dict(options.lora_low or [])
    generator = load(options.model, options.dtype, lora=lora, lora_low=lora_low, mesh=mesh)
    for note in generator.notes(request):
        print(note, file=sys.stderr)
    with contextlib.closing(generator.run(request, progress=True)) as videos:
        for (prompt, seed), video in zip(jobs, videos, strict=True):
            path = video.save(target.path(f"{prompt} seed {seed}" if options.num > 1 else prompt))
            tqdm.write(str(path))  # to stdout, past the progress bar


def _prompts(options: argparse.Namespace) -> list[str]:
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("give one prompt, or a file of prompts with --prompts FILE")
    if options.prompt is not None:
        return [options.prompt]
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {options.prompts}: it is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"cannot read {options.prompts}: {error.strerror}") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not prompts:
        raise InputError(f"{options.prompts} holds no prompts")
    return prompts


class _Target:
    """Where videos go: the one file that was asked for, or names made from prompts in a folder."""

    def __init__(self, output: str | None, several: bool, frames: int):
        self.frames = frames
        self.file = Path(output) if output and not several and not Path(output).is_dir() else None
        self.folder = Path(output or ".")
        if self.file is None and not self.folder.is_dir() and self.folder.suffix in (".mp4", ".gif", ".png"):
            raise InputError(f"several videos need a folder, not {output}; give -o the name of a folder")

    def check(self, prompt: str) -> None:
        """Raises InputError if writing cannot succeed; makes the folder if only that is missing."""
        from sora_jax.media import check_output

        if self.file is None:
            try:
                self.folder.mkdir(exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        check_output(self.path(prompt), self.frames)

    def path(self, title: str) -> Path:
        """The path of the next video; a name that is taken gets a number."""
        if self.file is not None:
            return self.file
        name = re.sub(r"\W+", "-", title.lower()).strip("-")[:60].strip("-") or "video"
        suffix = ".mp4" if self.frames > 1 else ".png"
        path, number = self.folder / f"{name}{suffix}", 1
        while path.exists():
            number += 1
            path = self.folder / f"{name}-{number}{suffix}"
        return path
