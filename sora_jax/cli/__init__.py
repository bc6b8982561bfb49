"""The command `sora-jax`.

Every mistake a user can make ends in one line on stderr and exit code 2, a refusal in exit code 3, Ctrl-C in 130,
SIGTERM in 143 (training saves first), the loss of another host of the run in 1.
JAX and the model are imported by the command that needs them, so that help and mistakes are quick.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import sora_jax
from sora_jax.cli import generate, model, safety, train
from sora_jax.errors import HostLost, InputError, Refused


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0, 1 where another host is lost, 2 for a mistake, 3 for a refusal, 130 or 143 if stopped, 141 if nobody reads on;
    `verify` has codes of its own.
    """
    # XLA's own notes about its caches are of no use to someone who wants a video.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        options, options.rest = _parser().parse_known_args(arguments)
        if options.rest and options.command != "train":
            # Not what they are: they may be the rest of a prompt that was not quoted.
            flags = " ".join(word.partition("=")[0] for word in options.rest if word.startswith("-"))
            few = "1 word" if len(options.rest) == 1 else f"{len(options.rest)} words"
            quoted = "file's name" if options.command == "verify" else "prompt"
            what = f"unrecognized arguments: {flags}" if flags else f"{few} too many: quote the {quoted}"
            raise InputError(f"{what}; see sora-jax {options.command} --help")
        with _one_interrupt(options.command):
            code = options.run(options) or 0
        sys.stdout.flush()  # here, where a failure to write can still be said in one line
        return code
    except InputError as error:
        return _fail(str(error), 2)
    except Refused as refusal:
        return _fail(str(refusal), 3, "refused")
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        code = _fail("interrupted" if number == signal.SIGINT else "terminated", 128 + number)
        if arguments is None:
            _leave(code)  # a normal exit waits until JAX has finished the abandoned sampling
        return code
    except HostLost as lost:
        code = _fail(str(lost), 1)
        _leave(code)  # a normal exit would wait for the one that is gone
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        options = "--offload, --dtype bfloat16 or --mesh"  # of `generate`
        return _fail(f"not enough memory; try a smaller size, fewer frames or a smaller batch, or {options}", 2)
    except BrokenPipeError:
        # Whoever read the output has enough of it, as `head` has: nothing to say, and nothing left to write at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ImportError as error:
        return _fail(f"a package is missing or damaged ({error}); install sora_jax again", 2)
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)


def _leave(code: int) -> NoReturn:
    """Ends the command without waiting for what it has begun."""
    sys.stdout.flush()
    sys.stderr.flush()
    hosts = sys.modules.get("sora_jax.hosts")  # it may have been stopped before that was imported
    if hosts and hosts.leads():
        # Where the first process goes, the others are stopped by JAX, which says much: it leaves them the time to end
        # with a line of their own.
        time.sleep(3)
    os._exit(code)


def _fail(message: str, code: int, kind: str = "error") -> int:
    print(f"sora-jax: {kind}: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _one_interrupt(command: str) -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into exactly one KeyboardInterrupt with the signal's number, wherever they strike.

    While JAX is imported it may surface as an ImportError, and inside a garbage collection callback it is
    lost with a traceback: `generate` asks for it again every second until it arrives. Training has its own way with
    SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked, repeat = [], command == "generate"

    def interrupt(number: int, _: Any) -> NoReturn:
        asked.append(number)
        if repeat:
            signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt(asked[0])

    def report_lost(lost: Any) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(lost)

    hook, sys.unraisablehook = sys.unraisablehook, report_lost
    numbers = [signal.SIGINT]
    if command != "train":
        numbers.append(signal.SIGTERM)
    if repeat:
        numbers.append(signal.SIGALRM)
    older = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except Exception as error:
        if asked:
            raise KeyboardInterrupt(asked[0]) from error
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
        # Not what was given for a command: it may be a prompt.
        message = re.sub(r"^(argument COMMAND: invalid choice): .* \(", r"\1 (", message, flags=re.DOTALL)
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sora-jax", description="Text to video with diffusion transformers in JAX.")
    parser.add_argument("--version", action="version", version=f"sora-jax {sora_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for part in (generate, train, model, safety):
        part.add_commands(commands)
    return parser
