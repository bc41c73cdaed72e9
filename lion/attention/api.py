"""The public function: arguments, checks, and the choice of a form."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lion.attention.chunked import chunked
from lion.attention.decay import DIRECTIONS, accumulator, divide
from lion.attention.full import full, full_over_scans
from lion.attention.recurrent import recurrent
from lion.attention.two_sided import two_sided

FORMS = ("full", "recurrent", "chunked", "two_sided")
IMPLEMENTATIONS = ("xla",)
FULL_UP_TO = 256  # tokens
TWO_SIDED_CHUNK = 64
DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)

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
    implementation: str | None = None,
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
        either side: work linear in time). None is "two_sided", but "full" for scalar
        decays, at most `FULL_UP_TO` tokens and no `chunk_size`.
      chunk_size: of the two chunk forms; by default an eighth of the time for "chunked", `TWO_SIDED_CHUNK` for
        "two_sided".
      implementation: "xla" or None.

    Returns:
      `[batch, time, heads, value_dim]` in the dtype of `q`.

    Raises:
      TypeError: dtypes that do not fit.
      ValueError: shapes that do not fit, or an option that does not exist.
    """
    decays = _check(q, k, v, log_decay, padding_mask, orders, direction, form, chunk_size, implementation)
    acc = accumulator(q.dtype)
    decays = [_heads_first(a, acc) for a in decays]
    if padding_mask is not None:
        keep = padding_mask[..., None, None]
        q, k, v = (jnp.where(keep, x, 0) for x in (q, k, v))
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    form = form or ("two_sided" if chunk_size else _choose(q.shape[2], decays))
    places = [np.arange(q.shape[2])] if orders is None else [np.asarray(order) for order in orders]
    if form == "full" and len(places) > 1 and all(a is not None and a.shape[-1] == 1 for a in decays):
        positions = tuple(jnp.asarray(np.argsort(order)) for order in places)
        in_time = tuple(jnp.broadcast_to(a, (*a.shape[:2], q.shape[2], 1)) for a in decays)
        numerator, row_sum = full_over_scans(q, k, v, in_time, positions, direction)
    else:
        scans = zip(decays, places, strict=True)
        parts = [_one_scan(q, k, v, a, order, direction, form, chunk_size) for a, order in scans]
        numerator, row_sum = (sum(x) / len(parts) for x in zip(*parts, strict=True))
    if normalize:
        if padding_mask is not None:
            row_sum = jnp.where(padding_mask[:, None], row_sum, 1)  # a padded query's numerator is zero
        numerator = divide(numerator, row_sum, q.dtype)
    return jnp.moveaxis(numerator, 1, 2).astype(q.dtype)


def _choose(time: int, decays: list[jax.Array | None]) -> str:
    """The form that is used where the caller names none."""
    plain = all(a is None for a in decays)
    diagonal = any(a is not None and a.shape[-1] > 1 for a in decays)
    return "two_sided" if plain or diagonal or time > FULL_UP_TO else "full"


def _one_scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    order: np.ndarray,
    direction: str,
    form: str,
    chunk_size: int | None,
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
        result = chunked(q, k, v, log_decay, direction, chunk_size or max(1, -(-time // 8)))
    else:
        result = two_sided(q, k, v, log_decay, direction, chunk_size or TWO_SIDED_CHUNK)
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
    implementation: str | None,
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
    _choice("implementation", implementation, (None, *IMPLEMENTATIONS))
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
