"""What the loop needs of an experiment, and no more."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
from flax import nnx

Batch = Any
Metrics = dict[str, jax.Array]
Evaluator = Callable[[nnx.Module, jax.Array], Metrics]


class Task(Protocol):
    """An experiment. A config names the class; the loop calls `Task(model=..., batch_size=..., **config.task)`.

    A task is rebuilt inside the traced step when the config replicates one of its arguments, so its constructor only
    stores what it is given. A task whose data stay on the device defines `residents()`, a pytree of host arrays; the
    loop puts them there once, and builds the task in its compiled programs with `resident=` those arrays. (A compiled
    program would otherwise carry them as constants.)
    """

    examples_per_epoch: int | None  # None: data without end
    resample_every: int  # steps that share one batch; 1 is a fresh batch each step
    batch_axis: int  # the axis of a batch's arrays that counts examples

    def init(self, key: jax.Array) -> nnx.Module:
        """A freshly initialised model."""

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The mean loss over `batch`, a scalar, and further scalars to log. `key` is fresh for each step."""

    def evaluators(self) -> Mapping[str, Evaluator]:
        """Pure functions of `(model, data key)`; the loop compiles them and logs their results as `name/metric`."""


class DeviceTask(Task, Protocol):
    """A task whose batches are made on the device: any number of steps can share one dispatch."""

    def batch(self, key: jax.Array, index: jax.Array) -> Batch:
        """Batch number `index`, a pure function. `key` is the same during the whole run."""


class BatchIterator(Iterator[Batch], Protocol):
    """An iterator over batches that can be checkpointed, as grain's are."""

    def get_state(self) -> Any:
        """What `set_state` needs to go on from here; JSON can hold it."""

    def set_state(self, state: Any) -> None:
        """Goes on from where `get_state` was called."""


class HostTask(Task, Protocol):
    """A task whose batches come from the host."""

    def batches(self, seed: int, process_index: int, process_count: int) -> BatchIterator:
        """The batches of this process, each with `batch_size / process_count` examples, without end."""
