"""Checkpoints by orbax: each host writes its own shards; a half-written checkpoint is never taken for a whole one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sora_jax.errors import HostLost, InputError, one_line
from sora_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one work directory; the newest `keep` stay. Several processes do everything together.

    As a context it waits at the end for what is being written, unless a process is lost that was to write some of it.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is not HostLost:
            self.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Writes in the background; `close` waits for it.

        Raises:
          InputError: this checkpoint or the one before cannot be written, as on a full disk.
        """
        with self._writing():
            self._manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest checkpoint, placed as the shardings of `abstract` say.

        Raises:
          InputError: the checkpoint belongs to a model of another shape, or is damaged.
        """
        step = self.latest()
        # Before anything is read: a restore that fails on the way leaves half of its work behind.
        with self._reading(step):
            tree = self._manager.item_metadata(step).tree
        wanted, found = _shapes(abstract), _shapes(tree)
        if wanted != found:
            name = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            has, needs = (list(shapes[name]) if name in shapes else "absent" for shapes in (found, wanted))
            raise InputError(
                f"checkpoint {step} in {self._manager.directory} does not fit this configuration: "
                f"{name} is {has} there, and {needs} here"
            )
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def read(self, *parts: str) -> dict:
        """Parts of the newest checkpoint, such as "ema", by name: trees of NumPy arrays, without knowing the model.

        Raises:
          InputError: there is no checkpoint, or it is damaged.
        """
        step = self.latest()
        if step is None:
            raise InputError(f"there is no checkpoint in {self._manager.directory}")
        # It may have been written by more devices than are here, with more memory: it goes to that of the host.
        try:
            device = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS leaves it out
            device = jax.local_devices()[0]
        here = jax.sharding.SingleDeviceSharding(device)
        with self._reading(step):
            tree = self._manager.item_metadata(step).tree
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                {part: tree[part] for part in parts},
            )
            restore = ocp.args.PyTreeRestore(
                target, ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
            )
            with ocp.CheckpointManager(self._manager.directory, item_handlers=ocp.PyTreeCheckpointHandler()) as reader:
                return jax.tree.map(np.asarray, reader.restore(step, args=restore))

    def close(self) -> None:
        """Waits for what is being written; raises InputError if that fails."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of memory, or of a lost host
            raise
        except Exception as error:  # of many kinds, by which file is damaged and how
            where = self._manager.directory / str(step)
            raise InputError(
                f"cannot read the checkpoint {where}: {one_line(error)}; without that folder, the one before it counts"
            ) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            # orbax makes such a ValueError of a full disk; another one may come from the loss of a host.
            if isinstance(error, ValueError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            latest = self.latest()
            kept = "there is none yet" if latest is None else f"the newest that is whole is {latest}"
            where = self._manager.directory
            raise InputError(f"cannot write a checkpoint in {where}, {kept}: {one_line(error)}") from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays in a tree by their names, which are the same for a state and for what is said of it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}
