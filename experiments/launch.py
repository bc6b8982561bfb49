"""Turns a config and a sweep into runs, each with its own work directory, and starts them.

    python experiments/launch.py --config configs/worlds_codec.py --on local --config.steps=1000
    python experiments/launch.py --config configs/worlds_dit.py --on processes=4 --config.codec=runs/worlds_codec
    python experiments/launch.py --config configs/... --on tpu-vm=my-pod --zone us-west4-a --folder sora_jax --runs /mnt
    python experiments/launch.py --config configs/... --on slurm --nodes 2 --gpus-per-node 8
    python experiments/launch.py --config configs/... --on gke --image IMAGE --claim runs --runs /mnt/runs

`--sweep config.optimizer.learning_rate=1e-3,2e-3` makes a run of every value, and of every combination where it is
given twice. `--dry-run` prints what would be run, ready to be pasted into a shell. Runs on this machine come one after
another; the exit code is 1 if one of them failed. The processes of `--on processes=4` have a GPU each, or share the
CPUs; the chips of a TPU belong to one process of their host (`--on local`).

A run that was started before goes on from its newest checkpoint. With several hosts the folder of the runs must be
one that all of them share (Filestore, NFS, a mounted bucket), and `sora-jax` must be installed on each. Paths in a
config, such as `config.codec`, are those on the hosts; the batch is a multiple of data x fsdp. A run that was
preempted ends with exit code 143, so that GKE starts it again; SLURM needs `sbatch` once more where its time was up.
To stop one on a TPU VM, end it there: `gcloud` passes no signal on. `kubectl delete jobset NAME` makes place for a run
of the same name.
"""

import argparse
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers import Command, Run, kubernetes_name, on_gke, on_slurm, on_this_machine, on_tpu_vm

from sora_jax.cli.config_file import load_config
from sora_jax.errors import InputError
from sora_jax.mesh import parse_sizes, whole_sizes
from sora_jax.training.config import check_config, check_local, check_shares

# Options that only one of the launchers reads.
OWN = {
    "tpu-vm": ("zone", "folder", "python"),
    "slurm": ("nodes", "gpus_per_node", "sbatch"),
    "gke": ("image", "claim", "tpu", "topology", "chips_per_host", "restarts"),
}


def make_runs(
    config: str,
    sweep: Sequence[str],
    overrides: Sequence[str],
    folder: str,
    mesh: str | None = None,
    devices: int | None = None,
) -> list[Run]:
    """One run for every combination of the swept values.

    Args:
        sweep: words like "config.optimizer.learning_rate=1e-3,2e-3".
        overrides: words like "--config.steps=1000", for all runs.
        folder: where the work directories are.
        mesh: in place of the config's.
        devices: how many there will be, if that is known.

    Raises:
        InputError: the config does not take these values, the devices make no such mesh, or two runs would have the
            same name.
    """
    check_local(folder, "--runs")
    fields, values = [], []
    for word in sweep:
        name, equals, text = word.removeprefix("--").partition("=")
        choices = _split(text)
        if not name.startswith("config.") or not equals or "" in choices:
            raise InputError(f"--sweep {word} must look like config.FIELD=VALUE,VALUE")
        if name in fields:
            raise InputError(f"--sweep {name} is given twice; all its values belong into one")
        fields.append(name)
        values.append(choices)
    # The last part of a field's name is enough, unless two of them have the same.
    short = [name.rsplit(".", 1)[1] for name in fields]
    short = [last if short.count(last) == 1 else name for last, name in zip(short, fields, strict=True)]
    path, _, argument = config.partition(":")
    runs = []
    for chosen in itertools.product(*values):
        swept = [f"--{name}={value}" for name, value in zip(fields, chosen, strict=True)]
        # Better here than on a cluster an hour later.
        loaded = load_config(config, [*overrides, *swept])
        check_config(loaded)
        if mesh != "auto":
            sizes = dict(loaded.get("mesh", {})) if mesh is None else parse_sizes(mesh)
            check_shares(loaded, whole_sizes(devices or abs(math.prod(sizes.values())), **sizes))
        parts = [f"{name}={value}" for name, value in zip(short, chosen, strict=True)]
        name = re.sub(r"[^\w.=+-]+", "-", "-".join([Path(path).stem, *[argument][: bool(argument)], *parts]))
        arguments = ["train", "--config", config, "--workdir", f"{folder}/{name}", *overrides, *swept]
        arguments += [] if mesh is None else ["--mesh", mesh]
        runs.append(Run(name, arguments))
    if len({run.name for run in runs}) < len(runs):
        raise InputError("two runs of this sweep have the same name; a value is given twice")
    if len({kubernetes_name(run.name) for run in runs}) < len(runs):
        raise InputError("two runs of this sweep would have the same name in Kubernetes")
    return runs


def devices_of(options: argparse.Namespace) -> int | None:
    """How many devices a run will have, where the options tell."""
    kind, _, value = options.on.partition("=")
    if kind == "processes" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        return int(value)
    if kind == "slurm" and options.gpus_per_node:
        return options.nodes * options.gpus_per_node
    if kind == "gke" and re.match(r"tpu-v[456]", options.tpu):  # whose chips are one device each
        return math.prod(int(side) for side in options.topology.split("x"))
    return None


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets or quotes: of 8,16 two values, of (8,8),((1,2),3) two tuples."""
    values, depth = [""], 0
    for part in re.findall(r"""'[^']*'|"[^"]*"|.""", text):
        depth += (part in "([{") - (part in ")]}")
        if part == "," and depth <= 0:
            values.append("")
        else:
            values[-1] += part
    return values


class Stopped(Exception):
    """SIGINT or SIGTERM."""


def start(commands: Sequence[Command], grace: int) -> str | None:
    """Runs the commands side by side until all have ended; if one fails, the others are stopped.

    Args:
        grace: seconds that they have for saving, once they are to stop.

    Returns:
        What went wrong, or None.

    Raises:
        Stopped: a signal came; it has been passed on, and nothing runs here any more.
    """
    children = []
    try:
        for command in commands:
            # In sessions of their own: Ctrl-C in the terminal reaches them through this program alone, once.
            child = subprocess.Popen(
                command.words,
                env={**os.environ, **command.environment},
                stdin=subprocess.PIPE if command.text else subprocess.DEVNULL,
                start_new_session=True,
            )
            children.append(child)
            if command.text:
                child.communicate(command.text.encode())
        codes = [None]
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [child.poll() for child in children]
        failed = next((index for index, code in enumerate(codes) if code), None)
        if failed is None:
            return None
        code, which = codes[failed], f"process {failed}: " if len(children) > 1 else ""
        # The others notice by themselves that one is gone, and say so.
        _end(children, None, grace)
        return f"{which}exit code {code}" if code > 0 else f"{which}killed by {signal.Signals(-code).name}"
    except FileNotFoundError as error:
        raise InputError(f"there is no command {error.filename} here") from error
    except Stopped as stopped:
        _end(children, stopped.args[0], grace)
        raise
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()


def _end(children: Sequence[subprocess.Popen], number: int | None, grace: int) -> None:
    """Waits until the children have ended, after a signal if one is given."""
    deadline = time.monotonic() + grace
    for child in children:
        if number and child.poll() is None:
            child.send_signal(number)
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)


def launcher(options: argparse.Namespace) -> Callable[[Run], list[Command]]:
    """What makes the commands of a run, by `--on`."""
    kind, _, value = options.on.partition("=")
    for owner, names in OWN.items():
        for name in names if owner != kind else ():
            if getattr(options, name) != _parser().get_default(name):
                raise InputError(f"--{name.replace('_', '-')} is for --on {owner}, not {options.on}")
    if kind == "local" and not value:
        return lambda run: on_this_machine(run, 1)
    if kind == "processes" and value.isdecimal() and int(value) > 0:
        return lambda run: on_this_machine(run, int(value))
    if kind == "tpu-vm" and value:
        return lambda run: [on_tpu_vm(run, options, value)]
    if kind == "slurm" and not value:
        return lambda run: [on_slurm(run, options)]
    if kind == "gke" and not value:
        return lambda run: [on_gke(run, options)]
    raise InputError(f"--on {options.on} is none of: local, processes=N, tpu-vm=NAME, slurm, gke")


def _topology(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", text):
        raise argparse.ArgumentTypeError(f"must be like 4x4 or 2x2x4, not {text!r}")
    return text


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, not {text!r}")
        return int(text)

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:ARG]", help="as for sora-jax train; --config.FIELD=VALUE likewise")
    add("--on", required=True, metavar="WHERE", help="local, processes=N, tpu-vm=NAME, slurm or gke")
    add("--sweep", action="append", default=[], metavar="config.FIELD=A,B", help="a run for each; can be repeated")
    add("--mesh", metavar="AXIS=N,...", help="as for sora-jax train, in place of config.mesh")
    add("--runs", default="runs", metavar="DIR", help="where the work directories are (default: runs)")
    add("--dry-run", action="store_true", help="print the commands and manifests")
    add("--grace", type=_at_least(1), default=60, metavar="S", help="seconds for saving before the end (default: 60)")
    add("--zone", help="tpu-vm: the zone (default: gcloud's)")
    add("--folder", metavar="DIR", help="tpu-vm: the folder on the hosts that the config's path starts from")
    add(
        "--python",
        default="python3",
        metavar="PATH",
        help="tpu-vm: Python on the hosts, a whole path (default: python3)",
    )
    add("--nodes", type=_at_least(1), default=1, help="slurm: nodes (default: 1)")
    add("--gpus-per-node", type=_at_least(0), default=0, help="slurm: GPUs on each, a process for each (default: none)")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="slurm: partition=a100, cpus-per-task=8, ...")
    add("--image", help="gke: the container image, with sora-jax installed and the config's path in its folder")
    add("--claim", help="gke: the persistent volume claim that is mounted at --runs")
    add("--tpu", default="tpu-v5-lite-podslice", help="gke: the kind of TPU (default: tpu-v5-lite-podslice)")
    add("--topology", type=_topology, default="4x4", help="gke: the chips of the slice (default: 4x4)")
    add("--chips-per-host", type=_at_least(1), default=4, help="gke: chips on each host of it (default: 4)")
    add("--restarts", type=_at_least(0), default=10, help="gke: new starts when a host fails, at most (default: 10)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 if a run failed, 2 for a mistake, 128 + the number of the signal that stopped it."""
    options, overrides = _parser().parse_known_args(arguments)

    def stop(number, _):
        raise Stopped(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    failures = 0
    try:
        make = launcher(options)
        for run in make_runs(options.config, options.sweep, overrides, options.runs, options.mesh, devices_of(options)):
            commands = make(run)
            print(f"# {run.name}\n" + " &\n".join(map(str, commands)), flush=True)
            if options.dry_run:
                continue
            if options.on == "slurm":  # which cannot write its output into a folder that is not there
                Path(options.runs).mkdir(parents=True, exist_ok=True)
            problem = start(commands, options.grace)
            failures += problem is not None
            if problem:  # what ended in the middle of its progress bar has left the line unfinished
                print(f"\n# {run.name}: {problem}", file=sys.stderr, flush=True)
            else:
                print(f"# {run.name}: {'handed over' if options.on in ('slurm', 'gke') else 'done'}", flush=True)
    except InputError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Stopped as stopped:
        print(f"launch: stopped by {signal.Signals(stopped.args[0]).name}", file=sys.stderr)
        return 128 + stopped.args[0]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
