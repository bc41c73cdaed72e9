"""Where arrays live: data parallelism and fully sharded parameters over one `("data", "fsdp")` mesh."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from training.errors import UserError

_SMALLEST_SHARDED = 2**12  # entries; below this a collective costs more than the memory it saves


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh of `data` x `fsdp` devices; one of the two may be -1, for all devices that are left.

    Raises:
      UserError: the devices there are cannot form this mesh.
    """
    count = jax.device_count()
    sizes = [data, fsdp]
    if -1 in sizes:
        known = -data * fsdp
        if known < 1 or count % known:
            raise UserError(f"mesh.data={data}, mesh.fsdp={fsdp}: {count} devices cannot be divided like that")
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or sizes[0] * sizes[1] > count:
        raise UserError(
            f"mesh.data={data}, mesh.fsdp={fsdp} needs {sizes[0] * sizes[1]} devices, and there are {count}; "
            "use sizes whose product is at most that, or -1 for all that are left"
        )
    if jax.process_count() > 1 and sizes[0] * sizes[1] != count:
        raise UserError(f"with several processes the mesh must hold all {count} devices; set mesh.data=-1")
    devices = jax.devices()[: sizes[0] * sizes[1]]
    return jax.make_mesh(tuple(sizes), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises a UserError unless every device gets the same number of examples of every micro-batch."""
    if batch_size % (mesh.size * accumulate):
        raise UserError(
            f"batch_size={batch_size} cannot be divided among {mesh.size} devices x {accumulate} micro-batches; "
            f"use a multiple of {mesh.size * accumulate}, e.g. {_round_up(batch_size, mesh.size * accumulate)}"
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def state_shardings(state: Any, mesh: Mesh, *, replicas: bool) -> Any:
    """Shardings for a pytree of parameters or optimiser state (arrays or their shapes).

    Each large array is split over the `fsdp` axis along its longest dimension that can be; the leading axis is left
    whole where it counts replicas.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh.shape["fsdp"], replicas)), state)


def _fsdp_spec(shape: tuple[int, ...], fsdp: int, replicas: bool) -> P:
    candidates = [axis for axis in range(int(replicas), len(shape)) if shape[axis] % fsdp == 0]
    if fsdp == 1 or not candidates or np.prod(shape) < _SMALLEST_SHARDED:
        return P()
    longest = max(candidates, key=lambda axis: shape[axis])
    return P(*("fsdp" if axis == longest else None for axis in range(len(shape))))


def batch_sharding(mesh: Mesh, ndim: int, batch_axis: int) -> NamedSharding:
    """Examples are split over all devices; `batch_axis` says which of the `ndim` axes counts them."""
    spec = [None] * ndim
    spec[batch_axis] = ("data", "fsdp")
    return NamedSharding(mesh, P(*spec))


def constrain_batch(batch: Any, mesh: Mesh, batch_axis: int) -> Any:
    """Asks the compiler to make a batch where its examples belong."""
    if mesh.size == 1:
        return batch
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh, x.ndim, batch_axis)), batch)


def devices_in_use() -> int:
    """How many devices the training loop's mesh has, where it is in use (`jax.sharding.use_abstract_mesh`); else 1."""
    return max(jax.sharding.get_abstract_mesh().size, 1)


def over_examples(function: Callable[..., Any], *arguments: Any, whole: Sequence[jax.Array] = ()) -> Any:
    """Calls a function of arrays whose first axes count examples on each device for the examples that it holds.

    For kernels, which the compiler cannot divide by itself. Where there are several devices in use, but the number of
    examples cannot be divided by theirs, each device computes all.

    Args:
      function: of `arguments` and then those of `whole`.
      *arguments: arrays and trees of arrays; None stays None.
      whole: arrays that every device has whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if devices_in_use() == 1 or len(jax.tree.leaves(arguments)[0]) % mesh.size:
        return function(*arguments, *whole)
    examples = P(mesh.axis_names)
    specs = (*(examples for _ in arguments), *(P() for _ in whole))
    # All results are divided, so there is nothing that the check of replicated values, which kernels fail, could find.
    run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=examples, check_vma=False)
    return run(*arguments, *whole)


def gathered(parameter: jax.Array) -> jax.Array:
    """A parameter whole on every device, where there are several in use; its gradient is divided again.

    So products are divided by examples. The compiler left to itself may rather gather the examples, which are larger.
    """
    if devices_in_use() == 1:
        return parameter
    return jax.lax.with_sharding_constraint(parameter, NamedSharding(jax.sharding.get_abstract_mesh(), P()))
