"""Checkpoints by orbax: written atomically, the newest intact one is used, damaged ones are set aside."""

import json
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from training.errors import UserError


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: Any
    iterator: Any  # this process's
    seconds: float


class Checkpoints:
    """The checkpoints of one run, in `<workdir>/checkpoints/<step>`.

    A state is any pytree of arrays; it is stored flat, by the paths of its leaves. Beside it stands the state of the
    data iterator, one per process, where the data come from the host.
    """

    def __init__(self, workdir: Path, keep: int) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports each of its steps as a warning
        self._root = (workdir / "checkpoints").resolve()
        self._keep = keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self._root, options=options, item_names=("state", "extra"))

    def save(self, step: int, state: Any, iterator: Any, seconds: float) -> None:
        """Starts to write a checkpoint; returns once the arrays have been copied off the device.

        Args:
          iterator: state of this process's data iterator, or None; JSON must be able to hold it.
          seconds: spent on the run so far.
        """
        extra = {"iterators": _gather(iterator), "seconds": seconds}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_by_path(state)), extra=ocp.args.JsonSave(extra))
        self._manager.save(step, args=args, force=True)

    def restore(self, like: Any, step: int | None = None) -> Restored | None:
        """The newest intact checkpoint, or that of `step`; None if there is none.

        Args:
          like: arrays, or `jax.ShapeDtypeStruct`s with shardings, in the structure of the state.
          step: a step that must be there, instead of the newest.

        Raises:
          UserError: there is no intact checkpoint at `step`.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise UserError(f"{self._root} has no checkpoint at step {step}; there are {sorted(steps)}")
        for candidate in steps if step is None else [step]:
            try:
                return self._restore(candidate, like)
            except Exception as error:  # orbax raises many kinds, by what part of the checkpoint is damaged
                if step is not None:
                    raise UserError(f"the checkpoint at step {step} is damaged: {_first_line(error)}") from error
                self._set_aside(candidate, error)
        return None

    def _restore(self, step: int, like: Any) -> Restored:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_by_path(like)), extra=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        leaves = [restored.state[path] for path in _by_path(like)]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Restored(step, state, restored.extra["iterators"][jax.process_index()], restored.extra["seconds"])

    def _set_aside(self, step: int, error: Exception) -> None:
        self._manager.close()
        damaged = self._root.parent / "damaged"
        if jax.process_index() == 0:
            print(
                f"warning: the checkpoint at step {step} is damaged ({_first_line(error)}); "
                f"it is moved to {damaged}, and the one before it is used",
                file=sys.stderr,
            )
            damaged.mkdir(exist_ok=True)
            target = damaged / str(step)
            (self._root / str(step)).rename(target if not target.exists() else _unused(target))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoint set aside")
        self._manager = self._open()

    def wait(self) -> None:
        """Returns once everything that was saved is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _by_path(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _gather(iterator: Any) -> list[Any]:
    """The iterator states of all processes, which process 0 writes."""
    if jax.process_count() == 1:
        return [iterator]
    text = np.frombuffer(json.dumps(iterator).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def _unused(path: Path) -> Path:
    return next(p for i in range(1, 10_000) if not (p := path.with_name(f"{path.name}.{i}")).exists())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
