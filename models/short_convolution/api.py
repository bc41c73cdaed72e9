"""The short convolution for callers: checks, and the choice of an implementation."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.kernels import mosaic_gpu
from models.kernels.choice import first_that_serves, serves
from models.short_convolution import pallas_gpu
from models.short_convolution.xla import Part, xla_short_convolution

_log = logging.getLogger(__name__)


class _Problem(NamedTuple):
    """The arguments after the checks."""

    x: jax.Array
    kernel: jax.Array
    segment_ids: jax.Array | None
    parts: tuple[Part, ...]
    silu: bool


def short_convolution(
    x: jax.Array,
    kernel: jax.Array,
    parts: Sequence[Part],
    segment_ids: jax.Array | None = None,
    *,
    silu: bool = False,
    implementation: str | None = None,
) -> list[jax.Array]:
    """A causal convolution of each channel on its own, and what linear mixers have after it (arXiv:2406.06484, 3.3).

        u_t = sum over s of kernel[-1 - s] x_{t - s},  y_t = SiLU(u_t),  y_t / |y_t| for each head of a part

    Sums, SiLU and norms are in float32 at least, and rounded once. Differentiable in `x` and `kernel`; the backward
    pass keeps these and nothing else.

    Args:
      x: [batch, time, channels], of a floating dtype.
      kernel: [size, channels]; the last row meets the token itself.
      parts: of the result, together as many channels as `x` has.
      segment_ids: integers, [batch, time], for packed sequences: tokens of other segments count as zeros.
      silu: whether SiLU follows.
      implementation: "pallas_gpu" or "xla"; None is the fastest that serves.

    Returns:
      The parts, [batch, time, channels of the part], in the dtype of `x`.

    Raises:
      TypeError: an argument has a wrong dtype.
      ValueError: shapes do not fit, or there is no such implementation.
      NotImplementedError: the implementation that was asked for does not serve these arguments on this machine.
    """
    parts = tuple(parts)
    _check(x, kernel, parts, segment_ids)
    wide = jnp.promote_types(jnp.promote_types(x.dtype, kernel.dtype), jnp.float32)
    problem = _Problem(x, kernel.astype(wide), segment_ids, parts, silu)
    names = tuple(IMPLEMENTATIONS) if implementation is None else implementation
    run = first_that_serves(IMPLEMENTATIONS, names, problem, f"x of shape {x.shape}", "short_convolution", _log)
    return run(problem)


def _check(x, kernel, parts, segment_ids) -> None:
    for name, array in (("x", x), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be of a floating dtype, not {array.dtype}")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers, not {segment_ids.dtype}")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be [batch, time, channels], none of them 0; its shape is {x.shape}")
    if kernel.ndim != 2 or not len(kernel) or kernel.shape[1] != x.shape[2]:
        raise ValueError(f"kernel must have shape [size, {x.shape[2]}] beside x of shape {x.shape}, not {kernel.shape}")
    if sum(part.channels for part in parts) != x.shape[2]:
        raise ValueError(f"the parts {[part.channels for part in parts]} do not make up the {x.shape[2]} channels of x")
    for part in parts:
        if part.head is not None and part.channels % part.head:
            raise ValueError(f"{part.channels} channels do not split into heads of {part.head}")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(f"segment_ids must have shape {x.shape[:2]}, not {segment_ids.shape}")


def run_kernels(problem: _Problem, interpret: Any = False) -> list[jax.Array]:
    """Runs the GPU kernels; `interpret` is what they take to run without the device."""
    return pallas_gpu.pallas_short_convolution(*problem, interpret)


def _refusal_gpu(problem: _Problem) -> str | None:
    return mosaic_gpu.refusal() or pallas_gpu.refusal(problem.x, problem.kernel, problem.parts)


IMPLEMENTATIONS = {  # best first
    "pallas_gpu": (_refusal_gpu, run_kernels),
    "xla": (serves, lambda problem: xla_short_convolution(*problem)),
}
