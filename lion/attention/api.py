"""The public function: arguments, checks, and the choice of a form."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lion.attention import block, pallas_gpu, pallas_tpu
from lion.attention.chunked import chunked
from lion.attention.decay import DIRECTIONS, Cumulative, accumulator, divide, scan_sums
from lion.attention.full import full, full_over_scans
from lion.attention.hopper import two_sided as hopper_two_sided
from lion.attention.recurrent import recurrent
from lion.attention.two_sided import two_sided
from models.kernels.choice import first_that_serves, serves

FORMS = ("full", "recurrent", "chunked", "two_sided")
FULL_UP_TO = 256  # tokens
TWO_SIDED_CHUNK = 64
DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)

_log = logging.getLogger(__name__)

Decay = jax.Array | Sequence[jax.Array] | None


def lion_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: Decay = None,
    *,
    normalize: bool = True,
    padding_mask: jax.Array | None = None,
    orders: Sequence[Sequence[int]] | None = None,
    direction: str = "both",
    form: str | None = None,
    chunk_size: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Linear attention in both directions, `SCALE(Q K^T * M) V` (Eq. 8), with the key-side decays of Eq. 9.

    With `c_t = a_1 + ... + a_t` the sum of the log-decays, `M_ij` is `exp(c_{i-1} - c_{j-1})` for a key j before the
    query i, 1 for j = i, and `exp(c_j - c_i)` for a key after it: the decays of the key and of all tokens between, but
    not that of the query. All forms compute the same numbers and have the same gradients.

    Args:
      q: queries with the feature map applied, `[batch, time, heads, dim]`; bfloat16, float32 or float64.
      k: keys with the feature map applied, the shape and dtype of `q`.
      v: values, `[batch, time, heads, value_dim]`, the dtype of `q`.
      log_decay: logarithms of the decays, finite and never positive, in any float dtype; sums are in float32 or wider.
        None (no decay), `[heads]` (fixed), `[batch, time, heads]` (selective) or `[batch, time, heads, dim]`
        (diagonal: one decay for each row of the state, section 1.7 and Theorem B.1). With `orders`, one for each scan.
      normalize: whether to divide by the row sums of the masked scores. Nothing keeps them from zero but the feature
        map: it should be positive. The division comes after the mask.
      padding_mask: `[batch, time]`, true where a token counts. Other tokens are no keys, and their outputs are zero;
        their decays still apply to what reaches across them.
      orders: permutations of the time axis, one for each scan, as lists or NumPy arrays: `order[n]` is the token at
        place n of the scan. The masks of the scans, each with its own decays, are averaged and share one row sum
        (the two-scan variants, section 4.3). None is one scan in the order of the tokens.
      direction: "both"; "forward" lets a query see only itself and what comes before it in the scan, "backward" only
        itself and what comes after.
      form: "full" (Eq. 8; time^2 work and memory), "recurrent" (Theorem 3.1; one step a token, for inference),
        "chunked" (Theorem 3.2, the paper's: time^2 work, time x chunk memory) or "two_sided" (chunks with a state from
        either side: work linear in time). None is the faster of the last and "full": XLA takes "full" for scalar decays
        and at most `FULL_UP_TO` tokens, the kernels for what fits on a chip; a `chunk_size` asks for "two_sided".
      chunk_size: of the two chunk forms; by default an eighth of the time for "chunked", and for "two_sided"
        `TWO_SIDED_CHUNK` in XLA and what the kernels prefer.
      implementation: "pallas_gpu" (Hopper), "pallas_tpu" or "xla"; a sequence of them, of which the first that serves
        here runs; or None for the fastest that serves.

    Returns:
      `[batch, time, heads, value_dim]` in the dtype of `q`.

    Raises:
      TypeError: dtypes that do not fit.
      ValueError: shapes that do not fit, or an option that does not exist.
      NotImplementedError: no implementation that was asked for serves these arguments on this machine.
    """
    decays = _check(q, k, v, log_decay, padding_mask, orders, direction, form, chunk_size, implementation)
    acc = accumulator(q.dtype)
    decays = [_heads_first(a, acc) for a in decays]
    if padding_mask is not None:
        keep = padding_mask[..., None, None]
        q, k, v = (jnp.where(keep, x, 0) for x in (q, k, v))
    places = [np.arange(q.shape[1])] if orders is None else [np.asarray(order) for order in orders]
    problem = _Problem(q, k, v, decays, places, direction, normalize, padding_mask, form, chunk_size)
    names, subject = _names(implementation), f"q of shape {q.shape}"
    run = first_that_serves(IMPLEMENTATIONS, names, problem, subject, "lion_attention", _log)
    return run(problem).astype(q.dtype)


class _Problem(NamedTuple):
    """The arguments after the checks; padded tokens are zero."""

    q: jax.Array  # as k and v with time before heads
    k: jax.Array
    v: jax.Array
    decays: list[jax.Array | None]  # of each scan, [batch or 1, heads, time or 1, dim or 1]
    orders: list[np.ndarray]  # of each scan
    direction: str
    normalize: bool
    padding_mask: jax.Array | None
    form: str | None
    chunk_size: int | None

    @property
    def time(self) -> int:
        return self.q.shape[1]

    @property
    def diagonal(self) -> bool:
        return any(a is not None and a.shape[-1] > 1 for a in self.decays)

    @property
    def plain(self) -> bool:
        return all(a is None for a in self.decays)

    def in_time(self) -> list[jax.Array]:
        """The decays of the scans with a whole time axis; none where no scan has one."""
        if self.plain:
            return []
        none = jnp.zeros((1, 1, 1, 1), accumulator(self.q.dtype))
        decays = [none if a is None else a for a in self.decays]
        return [jnp.broadcast_to(a, (*a.shape[:2], self.time, a.shape[-1])) for a in decays]


def _run_xla(problem: _Problem) -> jax.Array:
    form = problem.form or ("two_sided" if problem.chunk_size or _prefers_chunks(problem) else "full")
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in problem[:3])
    if form == "full" and len(problem.orders) > 1 and not problem.plain and not problem.diagonal:
        positions = tuple(jnp.asarray(np.argsort(order)) for order in problem.orders)
        parts = full_over_scans(q, k, v, tuple(problem.in_time()), positions, problem.direction)
        return _finish(problem, *parts)
    chunk = problem.chunk_size or (max(1, -(-problem.time // 8)) if form == "chunked" else TWO_SIDED_CHUNK)
    return _over_scans(problem, q, k, v, form, chunk, block.within)


def _prefers_chunks(problem: _Problem) -> bool:
    """Whether XLA is faster with chunks than with the full form."""
    return problem.plain or problem.diagonal or problem.time > FULL_UP_TO


def run_kernels(module: ModuleType, problem: _Problem, interpret: Any = False) -> jax.Array:
    """Runs `pallas_gpu` or `pallas_tpu`; `interpret` is what they take to run without the device."""
    if _kernel_form(module, problem) == "full":
        positions = [np.argsort(order) for order in problem.orders]
        sums = [scan_sums(a, position) for a, position in zip(problem.in_time(), positions, strict=not problem.plain)]
        result = module.attention(
            *problem[:3], sums, positions, problem.direction, normalize=problem.normalize, interpret=interpret
        )
        return result if problem.normalize else result[0]
    if _fused(module, problem):
        (log_decay,) = problem.in_time()
        chunk = problem.chunk_size or hopper_two_sided.CHUNK
        return hopper_two_sided.two_sided(
            *problem[:3], log_decay, chunk, normalize=problem.normalize, interpret=interpret
        )

    def within(q: jax.Array, k: jax.Array, v: jax.Array, sums: Cumulative, direction: str) -> tuple:
        outer, time = q.shape[:3], q.shape[3]
        sums = jax.tree.map(lambda x: jnp.broadcast_to(x, (*outer, time, 1)).reshape(-1, 1, time, 1), sums)
        q, k, v = (x.reshape(-1, time, 1, x.shape[-1]) for x in (q, k, v))
        one = [np.arange(time)]
        parts = module.attention(q, k, v, [sums], one, direction, normalize=False, interpret=interpret)
        return tuple(x.reshape(*outer, time, *shape) for x, shape in zip(parts, ((v.shape[-1],), ()), strict=True))

    q, k, v = (jnp.moveaxis(x, 2, 1) for x in problem[:3])
    return _over_scans(problem, q, k, v, "two_sided", _kernel_chunk(module, problem), within)


def _kernel_form(module: ModuleType, problem: _Problem) -> str:
    return problem.form or ("two_sided" if problem.chunk_size or problem.time > module.TIME else "full")


def _fused(module: ModuleType, problem: _Problem) -> bool:
    """Whether the module's kernels also compute what lies between chunks."""
    if module is not pallas_gpu or problem.plain or problem.diagonal or problem.direction != "both":
        return False
    in_order = len(problem.orders) == 1 and np.array_equal(problem.orders[0], np.arange(problem.time))
    return in_order and hopper_two_sided.serves_chunk(problem.chunk_size or hopper_two_sided.CHUNK)


def _kernel_chunk(module: ModuleType, problem: _Problem) -> int:
    """Tokens of a chunk: the fewest chunks that the kernels hold, of equal lengths and whole groups of 8 tokens."""
    count = -(-problem.time // module.TIME)
    return problem.chunk_size or -(-problem.time // (8 * count)) * 8


def _over_scans(
    problem: _Problem, q: jax.Array, k: jax.Array, v: jax.Array, form: str, chunk_size: int, within: Callable
) -> jax.Array:
    """The output from scans that are computed one by one, for q, k and v with heads before time."""
    scans = zip(problem.decays, problem.orders, strict=True)
    parts = [_one_scan(q, k, v, a, order, problem.direction, form, chunk_size, within) for a, order in scans]
    return _finish(problem, *(sum(x) / len(parts) for x in zip(*parts, strict=True)))


def _finish(problem: _Problem, numerator: jax.Array, row_sum: jax.Array) -> jax.Array:
    """`[batch, time, heads, value_dim]` from numerators `[batch, heads, time, value_dim]` and row sums."""
    if problem.normalize:
        if problem.padding_mask is not None:
            row_sum = jnp.where(problem.padding_mask[:, None], row_sum, 1)  # a padded query's numerator is zero
        numerator = divide(numerator, row_sum, problem.q.dtype)
    return jnp.moveaxis(numerator, 1, 2)


def _refusal(module: ModuleType, problem: _Problem) -> str | None:
    if problem.diagonal:
        return "the kernels have no diagonal decays, whose masks are one for each channel"
    if problem.form not in (None, "full", "two_sided"):
        return f"the kernels have the forms 'full' and 'two_sided', not {problem.form!r}"
    full = _kernel_form(module, problem) == "full"
    if problem.form is None and not full and problem.plain and problem.direction == "both":
        return "long sequences without decay are two products of matrices, which XLA has"
    time = problem.time if full else _kernel_chunk(module, problem)
    return module.refusal(problem.q.dtype, time, problem.q.shape[-1], problem.v.shape[-1])


IMPLEMENTATIONS = {
    "pallas_gpu": (partial(_refusal, pallas_gpu), partial(run_kernels, pallas_gpu)),
    "pallas_tpu": (partial(_refusal, pallas_tpu), partial(run_kernels, pallas_tpu)),
    "xla": (serves, _run_xla),
}
"""Best first."""


def _names(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    if implementation is None:
        return tuple(IMPLEMENTATIONS)
    return (implementation,) if isinstance(implementation, str) else tuple(implementation)


def _one_scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    order: np.ndarray,
    direction: str,
    form: str,
    chunk_size: int,
    within: Callable,
) -> tuple[jax.Array, jax.Array]:
    """Numerators `[batch, heads, time, value_dim]` and row sums `[batch, heads, time]` of one scan."""
    time = q.shape[2]
    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay, (*log_decay.shape[:2], time, log_decay.shape[-1]))
    ordered = np.array_equal(order, np.arange(time))
    if not ordered:
        q, k, v = (x[:, :, order] for x in (q, k, v))
        log_decay = None if log_decay is None else log_decay[:, :, order]
    if form == "full":
        result = full(q, k, v, log_decay, direction)
    elif form == "recurrent":
        result = recurrent(q, k, v, log_decay, direction)
    elif form == "chunked":
        result = chunked(q, k, v, log_decay, direction, chunk_size)
    else:
        result = two_sided(q, k, v, log_decay, direction, chunk_size, within)
    if ordered:
        return result
    inverse = np.argsort(order)
    return result[0][:, :, inverse], result[1][:, :, inverse]


def _heads_first(log_decay: jax.Array | None, dtype: jnp.dtype) -> jax.Array | None:
    """`[batch or 1, heads, time or 1, dim or 1]`, ready to broadcast."""
    if log_decay is None:
        return None
    log_decay = log_decay.astype(dtype)
    if log_decay.ndim == 1:
        return log_decay[None, :, None, None]
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    return jnp.moveaxis(log_decay, 2, 1)


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: Decay,
    padding_mask: jax.Array | None,
    orders: Sequence[Sequence[int]] | None,
    direction: str,
    form: str | None,
    chunk_size: int | None,
    implementation: str | Sequence[str] | None,
) -> list[jax.Array | None]:
    """Raises what `lion_attention` says it raises; the log-decay of each scan."""
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3] or not q.shape[1]:
        raise ValueError(
            "q and k are [batch, time, heads, dim] and v is [batch, time, heads, value_dim], with at least one token; "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"q, k and v share one dtype, bfloat16, float32 or float64; got q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )
    _choice("direction", direction, DIRECTIONS)
    _choice("form", form, (None, *FORMS))
    for name in _names(implementation):
        _choice("implementation", name, tuple(IMPLEMENTATIONS))
    if chunk_size is not None and (chunk_size < 1 or form not in (None, "chunked", "two_sided")):
        raise ValueError(
            f"chunk_size is a positive number for the forms 'chunked' and 'two_sided'; got {chunk_size} for {form!r}"
        )
    if padding_mask is not None:
        if padding_mask.shape != q.shape[:2]:
            raise ValueError(f"padding_mask is [batch, time], {q.shape[:2]} here; got {padding_mask.shape}")
        if padding_mask.dtype != jnp.bool_:
            raise TypeError(f"padding_mask is boolean, true where a token counts; got {padding_mask.dtype}")
    decays = _split_decays(log_decay, orders, q.shape[1])
    for one in decays:
        _check_decay(one, q.shape)
    return decays


def _split_decays(log_decay: Decay, orders: Sequence[Sequence[int]] | None, time: int) -> list[jax.Array | None]:
    several = isinstance(log_decay, tuple | list)
    if orders is None:
        if several:
            raise ValueError(f"log_decay holds {len(log_decay)} arrays, one for each scan; give the scans' orders")
        return [log_decay]
    for order in orders:
        if np.shape(order) != (time,) or not np.array_equal(np.sort(order), np.arange(time)):
            raise ValueError(f"each of orders is a permutation of 0 ... {time - 1}, the tokens; got {order}")
    decays = list(log_decay) if several else [log_decay]
    if len(decays) != len(orders) or not decays:
        raise ValueError(f"{len(orders)} orders need as many log-decays in a tuple; got {len(decays)}")
    return decays


def _check_decay(log_decay: jax.Array | None, shape: tuple[int, ...]) -> None:
    if log_decay is None:
        return
    if not jnp.issubdtype(log_decay.dtype, jnp.floating):
        raise TypeError(f"log_decay is floating point; got {log_decay.dtype}")
    if log_decay.shape not in ((shape[2],), shape[:3], shape):
        raise ValueError(
            f"log_decay is [heads], [batch, time, heads] or [batch, time, heads, dim], here {shape[2:3]}, {shape[:3]} "
            f"or {shape}; got {log_decay.shape}"
        )


def _choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} does not exist; choose from {', '.join(map(repr, choices))}")
