"""Cumulative decays, and the mask that they make: Eq. 9 of the paper with every exponent at most zero.

With `a_t <= 0` the log-decays and `c_t = a_1 + ... + a_t`, the mask is `exp(c_{i-1} - c_{j-1})` below the diagonal and
`exp(c_j - c_i)` above it. `before` below is `c_{t-1}` and `through` is `c_t`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DIRECTIONS = ("both", "forward", "backward")
NEVER = 2.0**14  # minus this is the logarithm of a decay that leaves nothing; its multiples are exact


class Sum(NamedTuple):
    """A running sum in two parts.

    Differences of one long float32 sum lose the digits that the sum has before the point: with decays near 0.4 and a
    thousand tokens the entries of the mask next to the diagonal are off by 4e-5. The coarse part counts in units of
    1/64 and is exact, so that only the small fine part is rounded.
    """

    coarse: jax.Array
    fine: jax.Array

    def at(self, index: Any) -> "Sum":
        return Sum(self.coarse[index], self.fine[index])

    def minus(self, other: "Sum") -> jax.Array:
        return (self.coarse - other.coarse) + (self.fine - other.fine)

    def value(self) -> jax.Array:
        return self.coarse + self.fine


class Cumulative(NamedTuple):
    """The running sums of log-decays at each token, `[..., time, dim or 1]`."""

    before: Sum  # of all earlier tokens
    through: Sum  # the same, with the token's own


def cumulative(log_decay: jax.Array) -> Cumulative:
    """Running sums along the last axis but one of `[..., time, dim or 1]`, in its dtype (float32 or float64)."""
    coarse = jax.lax.stop_gradient(jnp.round(log_decay * 64)) / 64
    fine = log_decay - coarse
    through = Sum(jnp.cumsum(coarse, -2), jnp.cumsum(fine, -2))
    return Cumulative(Sum(through.coarse - coarse, through.fine - fine), through)


def scan_sums(log_decay: jax.Array, position: jax.Array) -> Cumulative:
    """Running sums in the order of a scan, given back in the order of the tokens.

    Args:
      log_decay: `[batch or 1, heads or 1, time, dim or 1]`, in the order of the tokens.
      position: the place of each token in the scan, `[time]`; a NumPy array in their own order costs nothing.
    """
    if isinstance(position, np.ndarray) and np.array_equal(position, np.arange(len(position))):
        return cumulative(log_decay)
    order = jnp.argsort(position)
    return jax.tree.map(lambda x: x[:, :, position], cumulative(log_decay[:, :, order]))


def one_sided_min(
    scans: Sequence[Cumulative], positions: Sequence[np.ndarray], direction: str, heads: int
) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
    """`before` and `through` of each scan, with which a mask is `exp(min(before_i - before_j, through_j - through_i))`.

    Of the two differences one is that of Eq. 9, and the other is not negative (DERIVATION.md, section 7). With one
    direction, the sum that the other side would use falls by `NEVER` from token to token instead.

    Args:
      scans: cumulative scalar log-decays, `[batch or 1, heads or 1, time, 1]`; none for no decay.
      positions: the places of the tokens in each scan, `[time]`; one at least.
      direction: "both", "forward" or "backward".
      heads: how many.

    Returns:
      Two arrays `[batch or 1, heads, scans, time]` in float32; None where the mask is 1 everywhere.
    """
    if not scans and direction == "both":
        return None, None
    if scans:
        before, through = (jnp.stack([s[x].value()[..., 0] for s in scans], 2) for x in (0, 1))
    else:
        before = through = jnp.zeros((1, heads, len(positions), len(positions[0])), jnp.float32)
    shape = (before.shape[0], heads, *before.shape[2:])
    before, through = (jnp.broadcast_to(x, shape).astype(jnp.float32) for x in (before, through))
    never = jnp.broadcast_to(NEVER * np.stack(positions).astype(np.float32), shape)
    return (never if direction == "backward" else before), (-never if direction == "forward" else through)


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums, masks and states: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def narrower(x: jax.Array, y: jax.Array) -> jnp.dtype:
    return min(x.dtype, y.dtype, key=lambda dtype: jnp.finfo(dtype).bits)


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` with the values that it has in a narrower dtype, in its own dtype; the gradient is not rounded."""
    return x + jax.lax.stop_gradient(_precision(x, dtype) - x)


def _precision(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` rounded to the values of a dtype. XLA would leave out a conversion to it and back."""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Products in the dtype of the narrower operand, summed in at least float32; never with operands cut to TF32.

    The same holds for its gradients. Those of a float32 operand are float32, even where the other is bfloat16: the row
    normaliser subtracts numbers from them that are almost equal where decays are strong.
    """
    dtype = narrower(x, y)
    precision = jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(
        subscripts, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=accumulator(dtype)
    )


def _dot_forward(subscripts: str, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dot(subscripts, x, y), (x, y)


def _dot_backward(
    subscripts: str, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, y = operands
    cotangent = cotangent.astype(narrower(x, y))
    operands, _, result = subscripts.partition("->")
    of_x, _, of_y = operands.partition(",")
    d_x = dot(f"{result},{of_y}->{of_x}", cotangent, y)
    d_y = dot(f"{of_x},{result}->{of_y}", x, cotangent)
    return d_x.astype(x.dtype), d_y.astype(y.dtype)


dot.defvjp(_dot_forward, _dot_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def divide(numerator: jax.Array, row_sum: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The normalised output, `[..., time, value_dim]`, from numerators and row sums `[..., time]`.

    Its gradient towards a score is `dn_i (v_j - y_i)` with `dn = dy / row_sum`. Where a query sees almost only itself
    the difference is small, and survives only if both terms have the same `dn`: it is rounded to `dtype`, the one of
    the products that follow, before the second term is made from it.
    """
    return numerator / row_sum[..., None]


def _divide_forward(
    numerator: jax.Array, row_sum: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = divide(numerator, row_sum, dtype)
    return y, (y, row_sum)


def _divide_backward(
    dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], d_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y, row_sum = residuals
    d_numerator = _precision(d_y / row_sum[..., None], dtype)
    return d_numerator, -jnp.sum(d_numerator * y, -1)


divide.defvjp(_divide_forward, _divide_backward)


def mask(
    rows: Cumulative, columns: Cumulative, row_position: jax.Array, column_position: jax.Array, direction: str
) -> jax.Array:
    """The block of Eq. 9 between queries `rows` and keys `columns`, `[..., rows, columns]`.

    Args:
      rows: scalar cumulative decays of the queries, `[..., rows, 1]`.
      columns: those of the keys, `[..., columns, 1]`.
      row_position: integer places of the queries in the order of the scan, `[rows]`.
      column_position: those of the keys, `[columns]`.
      direction: "forward" keeps the entries on and below the diagonal, "backward" those on and above it.
    """
    across = jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), columns)
    below, above = triangles(row_position, column_position)
    exponent = jnp.where(below, rows.before.minus(across.before), across.through.minus(rows.through))
    if direction != "both":
        exponent = jnp.where(above if direction == "forward" else below, -jnp.inf, exponent)
    return jnp.exp(exponent)


def triangles(row_position: jax.Array, column_position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where a key comes before its query (below the diagonal), and where after it, both `[rows, columns]`."""
    difference = row_position[:, None] - column_position[None, :]
    return difference > 0, difference < 0
