"""`sora-jax train` and `sora-jax export`."""

from __future__ import annotations

import argparse
import signal
from typing import Any

from sora_jax.cli.config_file import load_config
from sora_jax.errors import HostLost


def add_commands(commands: Any) -> None:
    train = commands.add_parser("train", help="train a model from a config file", allow_abbrev=False)
    train.set_defaults(run=_train)
    train.add_argument("--config", required=True, metavar="FILE[:ARG]", help="Python file with get_config([ARG])")
    train.add_argument("--workdir", required=True, metavar="DIR", help="folder of checkpoints and logs")
    train.add_argument(
        "--mesh", metavar="AXIS=N,...", help="devices along data, fsdp, context, tensor, or auto (default: config.mesh)"
    )
    train.epilog = "Any field of the config can be set: --config.steps=1000 --config.optimizer.learning_rate=1e-3"

    export = commands.add_parser("export", help="turn a training run into a model folder", allow_abbrev=False)
    export.set_defaults(run=_export)
    export.add_argument("--workdir", required=True, metavar="DIR", help="folder of the training run")
    export.add_argument("--codec", metavar="DIR", help="a codec run that trained only the decoder, to take it from")
    export.add_argument("output", metavar="OUT", help="the model folder to write")


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.rest)

    from sora_jax import hosts

    hosts.connect()
    from sora_jax.training import loop

    _quiet()

    try:
        # Saved by SIGTERM is not done: whoever starts runs again after a preemption goes by the exit code.
        return 0 if loop.train(config, options.workdir, options.mesh) else 128 + signal.SIGTERM
    except HostLost as lost:
        raise HostLost(f"{lost}; started again, the run goes on from its newest checkpoint") from lost


def _export(options: argparse.Namespace) -> None:
    from sora_jax.training import loop

    _quiet()
    print(loop.export(options.workdir, options.output, options.codec))


def _quiet() -> None:
    """Orbax logs by absl what the errors it raises say once more, and how long it waited."""
    from absl import logging

    logging.set_verbosity(logging.FATAL)
