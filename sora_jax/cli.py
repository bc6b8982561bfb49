"""The command `sora-jax`: generate, train, export, evaluate.

Every mistake a user can make ends in one line on stderr and exit code 2; Ctrl-C ends in exit code 130.
JAX and the model are imported by the command that needs them, so that help and mistakes are quick.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib.util
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import sora_jax
from sora_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for a mistake, 130 for Ctrl-C."""
    # XLA's own notes about its caches are of no use to someone who wants a video.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        options, options.rest = _parser().parse_known_args(arguments)
        if options.rest and options.command != "train":
            rest = " ".join(options.rest)
            raise InputError(f"unrecognized arguments: {rest}; see sora-jax {options.command} --help")
        with _one_interrupt(repeat=options.command == "generate"):
            options.run(options)
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
        if arguments is None:
            # The command ends here: a normal exit waits until JAX has finished the abandoned sampling.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail("not enough memory; try a smaller size, fewer frames or a smaller batch", 2)
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"sora-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _one_interrupt(repeat: bool) -> Iterator[None]:
    """Turns Ctrl-C into exactly one KeyboardInterrupt, wherever it strikes.

    While JAX is imported it may surface as an ImportError, and inside a garbage collection callback it is
    lost with a traceback. `repeat` asks for it again every second until it arrives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = []

    def interrupt(*_: Any) -> NoReturn:
        asked.append(True)
        if repeat:
            signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt

    def report_lost(lost: Any) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(lost)

    hook, sys.unraisablehook = sys.unraisablehook, report_lost
    numbers = (signal.SIGINT, signal.SIGALRM) if repeat else (signal.SIGINT,)
    older = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        if repeat:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in older.items():
            signal.signal(number, handler)


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are InputErrors, like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sora-jax", description="Text to video with diffusion transformers in JAX.")
    parser.add_argument("--version", action="version", version=f"sora-jax {sora_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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
    add("--seed", type=_whole(0, 2**32 - 1), default=0, help="the same seed gives the same video (default: 0)")
    add(
        "--num",
        type=_whole(1),
        default=1,
        help="videos per prompt, with seeds SEED, SEED+1, ... (default: 1)",
    )
    add("--frames", type=_whole(1), help="frames of the video (default: the model's)")
    add("--size", type=_size, metavar="HxW", help="height and width in pixels (default: the model's)")
    add("--fps", type=_number(0), help="frames per second of the file (default: the model's)")
    add("--steps", type=_whole(1), help="steps of the sampler (default: the model's)")
    add("--guidance", type=_number(), help="weight of the prompt; 1 is no guidance (default: the model's)")
    add("--guidance-low", type=_number(), help="the same at low noise levels, for models with two transformers")
    add("--negative-prompt", default="", metavar="TEXT", help="what the video should not show")
    add("--image", metavar="FILE", help="the picture that the video starts with, for models that take one")
    add("--last-image", metavar="FILE", help="the picture that the video ends with, likewise")
    add("--model", metavar="DIR", help="a model folder, ours or a published Wan (default: the bundled model)")
    add("--lora", action="append", type=_lora, metavar="FILE[:SCALE]", help="a low-rank adaptation; can be repeated")
    add("--lora-low", action="append", type=_lora, metavar="FILE[:SCALE]", help="likewise, for low noise levels")
    add("--dtype", choices=("float32", "bfloat16"), help="precision of the large products (default: by the device)")

    add("--mesh", metavar="AXIS=N,...", help="devices along data, fsdp, context, tensor, or auto (default: one device)")

    train = commands.add_parser("train", help="train a model from a config file", allow_abbrev=False)
    train.set_defaults(run=_train)
    train.add_argument("--config", required=True, metavar="FILE[:ARG]", help="Python file with get_config([ARG])")
    train.add_argument("--workdir", required=True, metavar="DIR", help="folder of checkpoints and logs")
    train.epilog = "Any field of the config can be set: --config.steps=1000 --config.optimizer.learning_rate=1e-3"

    export = commands.add_parser("export", help="turn a training run into a model folder", allow_abbrev=False)
    export.set_defaults(run=_export)
    export.add_argument("--workdir", required=True, metavar="DIR", help="folder of the training run")
    export.add_argument("--codec", metavar="DIR", help="a codec run that trained only the decoder, to take it from")
    export.add_argument("output", metavar="OUT", help="the model folder to write")

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
    add("--size", type=_size, metavar="HxW", help="height and width in pixels (default: the model's)")
    add("--frames", type=_whole(1), help="frames of the video (default: the model's)")
    add("--batch", type=_whole(1), default=1, help="videos at a time (default: 1)")
    add("--steps", type=_whole(1), help="steps of the sampler (default: the model's)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="precision of the large products")
    add("--full", action="store_true", help="generate code too: minutes, but finds kernels that cannot be")
    add("--train", action="store_true", help="a step of training the transformer, in place of generating")
    add("--search", action="store_true", help="try the meshes that make sense, and rank them")
    add("--json", action="store_true", help="print JSON")

    evaluate = commands.add_parser("evaluate", help="measure how well videos follow prompts", allow_abbrev=False)
    evaluate.set_defaults(run=_evaluate)
    add = evaluate.add_argument
    add("--model", metavar="DIR", help="a model folder (default: the bundled model)")
    add("-o", "--out", dest="output", required=True, metavar="DIR", help="folder for the report")
    add("--num", type=_whole(1), default=240, help="number of prompts (default: 240)")
    add("--seed", type=_whole(0, 2**32 - 1), default=0, help="seed of prompts and noise (default: 0)")
    add("--steps", type=_whole(1), help="steps of the sampler (default: the model's)")
    add("--guidance", type=_number(), help="weight of the prompt; 1 is no guidance (default: the model's)")
    return parser


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


def _train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.rest)

    from sora_jax.training import hosts

    hosts.connect()
    from sora_jax.training import loop

    try:
        loop.train(config, options.workdir)
    except hosts.HostLost as lost:
        code = _fail(str(lost), 1)
        sys.stdout.flush()
        # A normal exit would wait for the one that is gone. Where the first process goes, the others are stopped by
        # JAX, which says much: it leaves them the time to end with a line of their own.
        if hosts.is_first():
            time.sleep(2)
        os._exit(code)


def _export(options: argparse.Namespace) -> None:
    from sora_jax.training import loop

    print(loop.export(options.workdir, options.output, options.codec))


def _convert(options: argparse.Namespace) -> None:
    from sora_jax.generate import convert

    print(convert(options.source, options.output, options.dtype))


def _plan(options: argparse.Namespace) -> None:
    import dataclasses
    import json

    from sora_jax import plan
    from sora_jax.request import check_shape

    if options.search and (options.train or options.mesh != "auto"):
        raise InputError("--search tries the meshes for generating: give neither --train nor --mesh with it")
    config = plan.model_config(options.model)
    sampling = config.sampling
    size, frames = options.size or sampling.size, options.frames or sampling.frames
    check_shape(config, frames, size)
    _, number = plan.chips(options.topology)
    mesh = options.mesh
    if mesh == "auto":
        if options.train:
            mesh, reason = plan.training_mesh(options.batch, number)
        else:
            mesh, reason = plan.choose_mesh(config, size, frames, number)
        if not options.search:
            print(f"mesh {mesh}: {reason}", file=sys.stderr)
    job = plan.Job(options.model, "", options.topology, mesh, size, frames, options.batch, options.dtype)
    steps = options.steps or sampling.steps
    if options.search:
        results = plan.search(job, options.full)
    else:
        results = {mesh: plan.needs(job, ("train",) if options.train else plan.PARTS, options.full)}
    for mesh, needs in results.items():
        here = dataclasses.replace(job, mesh=mesh)
        if options.json:
            parts = {part: dataclasses.asdict(need) for part, need in needs.items()}
            print(json.dumps({**dataclasses.asdict(here), "parts": parts, "verdict": plan.verdict(here, needs, steps)}))
        else:
            print(plan.describe(here, needs, steps))


def _evaluate(options: argparse.Namespace) -> None:
    from sora_jax.evaluation import report

    report.evaluate(
        options.model,
        options.output,
        options.num,
        options.seed,
        steps=options.steps,
        guidance=options.guidance,
    )
    print(Path(options.output, "report.md"))


def load_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """The ConfigDict that `get_config()` of the Python file returns, with overrides applied, locked.

    Args:
        path: the config file; of "FILE:ARGUMENT" the second part is given to `get_config`.
        overrides: command-line words, "--config.a.b=value" or "--config.a.b", "value".

    Raises:
        InputError: for a file that cannot be used, an unknown field, or a value of the wrong type.
    """
    import ml_collections

    path, *argument = path.split(":", 1)
    spec = importlib.util.spec_from_file_location("sora_jax_config", path)
    if spec is None or not Path(path).is_file():
        raise InputError(f"there is no config file {path}; it must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = ml_collections.ConfigDict(module.get_config(*argument))
    except Exception as error:  # the file is the user's code and can fail in any way
        raise InputError(f"the config {path} fails: {type(error).__name__}: {error}") from error
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            raise InputError(f"unrecognized argument: {word}; see sora-jax train --help")
        name, equals, text = word.removeprefix("--config.").partition("=")
        if not equals and not words:
            raise InputError(f"--config.{name} needs a value")
        _override(config, name, text if equals else words.pop(0))
    return config.lock()


def _override(config: Any, name: str, text: str) -> None:
    *parents, last = name.split(".")
    for depth, key in enumerate([*parents, last]):
        fields = list(config.keys()) if hasattr(config, "keys") else []
        if key not in fields:
            prefix = ".".join(name.split(".")[:depth])
            close = difflib.get_close_matches(key, fields, 3, 0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(fields)}"
            raise InputError(f"the config has no field {name}; {prefix or 'the top level'}: {hint}")
        if depth < len(parents):
            config = config[key]
    kind = config.get_type(last)
    if isinstance(config[last], type(config)):
        raise InputError(f"--config.{name} is a group of fields; set one of: {', '.join(config[last].keys())}")
    try:
        config[last] = text if kind is str else _literal(text)
    except TypeError as error:
        raise InputError(f"--config.{name} must be {kind.__name__}, not {text!r}") from error


def _literal(text: str) -> Any:
    """A Python literal, true/false as people write them, or else the text itself."""
    try:
        return (
            {"true": True, "false": False}.get(text.lower())
            if text.lower() in ("true", "false")
            else (ast.literal_eval(text))
        )
    except (ValueError, SyntaxError):
        return text


def _whole(low: int, high: int | None = None):
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text) or int(text) < low or (high is not None and int(text) > high):
            limits = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, not '{text}'")
        return int(text)

    return parse


def _number(above: float = -math.inf):
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > above):
            limits = "" if above == -math.inf else f" above {above}"
            raise argparse.ArgumentTypeError(f"must be a number{limits}, not '{text}'")
        return value

    return parse


def _lora(text: str) -> tuple[str, float]:
    """FILE, or FILE:SCALE."""
    match = re.fullmatch(r"(.+):(-?[\d.]+(?:e-?\d+)?)", text)
    return (match[1], _number()(match[2])) if match else (text, 1.0)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 128x128, not '{text}'")
    return int(match[1]), int(match[2])
