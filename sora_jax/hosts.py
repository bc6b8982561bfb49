"""Several processes, one on each host, that do one thing: `jax.distributed`, and what they have to agree about.

All of them run the same program; in training, on the same work directory. A process alone does none of this.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sora_jax import mesh as mesh_lib
from sora_jax.errors import HostLost, InputError, Refused, one_line

# Seconds without a sign of life after which JAX ends all processes, and that one which is done waits for the others.
_HEARTBEAT, _SHUTDOWN = 40, 60
_LONGEST = 1024  # bytes of a message that goes from one process to the others
_KINDS = (InputError, Refused)  # of failures that all processes end with alike

# In errors of JAX that would come without any other process.
_OF_ITS_OWN = ("RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "Mosaic")

Result = TypeVar("Result")


def connect(preemptible: bool = True) -> None:
    """Joins the other processes of this run, if there are any. It comes before everything else of JAX.

    JAX itself finds them on TPU pods, under SLURM (a task for each GPU) and in Kubernetes (where there is no TPU, with
    the package `kubernetes`). Elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID name them; JAX_NUM_PROCESSES=1 says that there are none.

    Args:
      preemptible: SIGTERM is for `preempted` to hear; otherwise it is left to whoever listens, or ends the process.

    Raises:
      InputError: there are others, but they cannot be joined.
    """
    count, index = (_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if count == 1 or jax.distributed.is_initialized():
        return
    told = "JAX_COORDINATOR_ADDRESS" in os.environ or count is not None
    jax.config.update("jax_enable_preemption_service", preemptible)
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=index,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except ValueError as error:
        # Nothing says that there are others: a laptop, a notebook, a single host.
        if told:
            raise InputError(f"cannot join the other processes: {one_line(error)}") from error
    except (RuntimeError, OSError) as error:
        # A program that has used JAX before is alone, unless it was told of others: each would train by itself.
        if told or "must be called before" not in str(error):
            raise InputError(
                f"cannot join the other processes: {one_line(error)}; if there are none, set JAX_NUM_PROCESSES=1"
            ) from error
    # The first exchange has little patience, so it comes before work that may take one of them longer.
    with watched():
        wait("start")


def check_found() -> None:
    """Raises InputError if there are no others, though the user speaks of hosts, and nothing says so.

    Each of several hosts that do not know of one another would do all of the work.
    """
    if not jax.distributed.is_initialized() and os.environ.get("JAX_NUM_PROCESSES") != "1":
        raise InputError(
            "no other host was found: set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID on each; "
            "if there is none, leave --hosts out"
        )


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise InputError(f"the environment variable {name} is {text!r}; it must be a whole number")
    return None if text is None else int(text)


def is_first() -> bool:
    """Whether this is the process that writes what is written once: logs, previews, configurations."""
    return jax.process_index() == 0


def leads() -> bool:
    """Whether there are other processes that cannot go on without this one."""
    return jax.distributed.is_initialized() and is_first()


def alone() -> contextlib.AbstractContextManager:
    """Sets a mesh of the devices of this process, for what each process computes by itself."""
    return jax.set_mesh(mesh_lib.make_mesh(devices=jax.local_devices()))


def whole(array: jax.Array) -> np.ndarray:
    """The whole of an array whose shards several processes hold; every process has to call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def by_all(work: Callable[[], Result]) -> Result:
    """Does in every process what may fail in some of them; where it fails in one, it fails in all."""
    if jax.process_count() == 1:
        return work()
    failure, result = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must not wait for this process
        failure = error
    kind = next((one for one in _KINDS if isinstance(failure, one)), type(failure)).__name__
    said = "" if failure is None else f"{kind}: {failure}"
    letters = np.frombuffer(said.encode(errors="replace")[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    heard = [one.tobytes().rstrip(b"\0").decode(errors="replace") for one in multihost_utils.process_allgather(letters)]
    if failure is not None:
        raise failure
    for number, said in enumerate(heard):
        kind, _, text = said.partition(": ")
        for one in _KINDS:
            if kind == one.__name__:
                raise one(text)
        if kind:
            raise HostLost(f"process {number} has failed: {said}")
    return result


def by_first(work: Callable[[], Result]) -> Result | None:
    """The same for what only one process may do, such as writing a file: the first does it."""
    return by_all(work if is_first() else lambda: None)


def check_same(what: str, value: str) -> None:
    """Raises InputError, which says `what` must be the same, if `value` is not so in all processes."""
    if jax.process_count() > 1:
        digest = np.frombuffer(hashlib.sha256(value.encode(errors="replace")).digest(), np.uint8)
        others = multihost_utils.process_allgather(digest)
        if (others != others[0]).any():
            raise InputError(f"{what} must be the same on all hosts")


def of_first(array: np.ndarray) -> np.ndarray:
    """What the first process has computed, in all of them, where rounding may differ."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def wait(name: str) -> None:
    """Returns when all processes are here; what each of them has written until then, all of them see."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_shared(folder: Path) -> None:
    """Raises InputError if the processes do not see the same folder."""
    if jax.process_count() == 1:
        return
    path, token = folder / ".shared", int.from_bytes(secrets.token_bytes(3))
    token = int(multihost_utils.broadcast_one_to_all(token))
    if is_first():
        path.write_text(str(token))
    wait("shared folder")
    seen = path.read_text() if path.exists() else ""
    all_see = multihost_utils.process_allgather(int(seen == str(token)))
    if is_first():
        path.unlink()
    if not all_see.all():
        missing = ", ".join(str(index) for index, sees in enumerate(all_see) if not sees)
        raise InputError(f"{folder} must be one folder that all hosts share; process {missing} sees another one")


def preempted(step: int) -> bool:
    """Whether all processes are to save and stop after this step, since one of them was sent SIGTERM.

    JAX agrees on a step that none of them has passed; every process has to ask at every step.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Turns the errors that JAX raises where another process is gone into HostLost."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # The CPU's collectives raise a ValueError.
        from_jax = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        of_its_own = any(word in str(error) for word in _OF_ITS_OWN)
        if jax.process_count() == 1 or not from_jax or of_its_own:
            raise
        raise HostLost(
            f"process {jax.process_index()} of {jax.process_count()} has lost another one ({one_line(error)})"
        ) from error
