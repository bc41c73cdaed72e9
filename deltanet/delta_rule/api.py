"""The delta rule for callers: checks, padding, and the choice of an implementation."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deltanet.delta_rule import pallas_gpu, pallas_tpu, recurrent, reference
from deltanet.delta_rule.chunked import chunked_delta_rule
from models.kernels.choice import first_that_serves, serves

CHUNK = 64  # of the XLA form; the paper's
AUTOMATIC = ("pallas_gpu", "pallas_tpu", "chunked")  # best first

_log = logging.getLogger(__name__)


class _Problem(NamedTuple):
    """The arguments after the checks; queries and keys are normalised, and the state is there."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    g: jax.Array | None
    starts: jax.Array | None  # [batch, time], float32, 1 where a segment starts with a fresh state
    state: jax.Array
    scale: float


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    l2_normalize: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The delta rule of arXiv:2406.06484 section 2.2, with the scalar decay of arXiv:2412.06464 where `g` is given.

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = scale S_t^T q_t

    It is stable where `beta |k|^2 <= 2`: normalise the keys. Differentiable in every array but `segment_ids`; works
    under `jit`, `vmap`, and `shard_map` over batch and heads.

    Args:
      q: queries, [batch, time, heads, dim]; bfloat16, float16, float32 or float64.
      k: keys, like `q`.
      v: values, [batch, time, heads, value_dim], of the same dtype.
      beta: step sizes, [batch, time, heads], any floating dtype; in (0, 1), or in (0, 2) for negative eigenvalues.
      g: logarithms of the decay, like `beta`, finite and not positive; None is no decay.
      scale: of the queries; None is `dim ** -0.5`.
      initial_state: [batch, heads, dim, value_dim], float32 or float64; None is zero. It is that of the first segment.
      segment_ids: integers, [batch, time], for packed sequences: where the number changes, the state starts from zero.
      l2_normalize: divide queries and keys by `sqrt(sum(x ** 2) + 1e-6)` first.
      implementation: "pallas_gpu", "pallas_tpu", "chunked", "recurrent" or "reference"; a sequence of them, of which
        the first that serves here runs; or None for the fastest that serves.

    Returns:
      The output, [batch, time, heads, value_dim], in the dtype of `v`; and the state after the last token of each row,
      [batch, heads, dim, value_dim], in the dtype of `initial_state`, by default in float32, or float64 for float64.

    Raises:
      TypeError: an argument has a wrong dtype.
      ValueError: shapes do not fit, or there is no such implementation.
      NotImplementedError: no implementation that was asked for serves these arguments on this machine.
    """
    problem = _problem(q, k, v, beta, g, scale, initial_state, segment_ids, l2_normalize)
    return _choose(problem, implementation)(problem)


def delta_rule_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    l2_normalize: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One token of `delta_rule`, for decoding: the same arguments without the time axis.

    Args:
      q: query, [batch, heads, dim].
      k: key, like `q`.
      v: value, [batch, heads, value_dim].
      beta: step size, [batch, heads].
      g: log-decay, like `beta`; None is no decay.
      scale: of the query; None is `dim ** -0.5`.
      initial_state: before the token, [batch, heads, dim, value_dim], float32 or float64; None is zero.
      l2_normalize: as in `delta_rule`.

    Returns:
      The output, [batch, heads, value_dim], and the state after the token, as `delta_rule` gives them.

    Raises:
      TypeError, ValueError: as `delta_rule` does.
    """
    for name, x, rank in (("q", q, 3), ("k", k, 3), ("v", v, 3), ("beta", beta, 2), ("g", g, 2)):
        if x is not None and x.ndim != rank:
            raise ValueError(f"{name} of one token must have rank {rank}, not shape {x.shape}")
    q, k, v, beta, g = (None if x is None else x[:, None] for x in (q, k, v, beta, g))
    problem = _problem(q, k, v, beta, g, scale, initial_state, None, l2_normalize)
    token = (x[:, 0] for x in (problem.q, problem.k, problem.v, problem.beta))
    decay = None if g is None else jnp.exp(problem.g[:, 0].astype(problem.state.dtype))
    state, output = recurrent.update(problem.state, *token, decay, problem.scale)
    return output, state


def _problem(q, k, v, beta, g, scale, initial_state, segment_ids, l2_normalize) -> _Problem:
    _check_dtypes(q, k, v, beta, g, initial_state, segment_ids)
    _check_shapes(q, k, v, beta, g, initial_state, segment_ids)
    starts = None
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = jnp.pad(changes.astype(jnp.float32), ((0, 0), (1, 0)))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if l2_normalize:
        q, k = _normalize(q), _normalize(k)
    state = _zero_state(k, v) if initial_state is None else initial_state
    return _Problem(q, k, v, beta, g, starts, state, scale)


def _check_dtypes(q, k, v, beta, g, initial_state, segment_ids) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta), ("g", g), ("initial_state", initial_state)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be of a floating dtype, not {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if initial_state is not None and jnp.finfo(initial_state.dtype).bits < 32:
        raise TypeError(f"initial_state must be float32 or float64, not {initial_state.dtype}")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers, not {segment_ids.dtype}")


def _check_shapes(q, k, v, beta, g, initial_state, segment_ids) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must be [batch, time, heads, dim], none of them 0; its shape is {q.shape}")
    batch, time, heads, dim = q.shape
    if v.ndim != 4 or 0 in v.shape:
        raise ValueError(f"v must be [batch, time, heads, value_dim], none of them 0; its shape is {v.shape}")
    expected = {
        "k": (k, q.shape),
        "v": (v, (batch, time, heads, v.shape[-1])),
        "beta": (beta, (batch, time, heads)),
        "g": (g, (batch, time, heads)),
        "initial_state": (initial_state, (batch, heads, dim, v.shape[-1])),
        "segment_ids": (segment_ids, (batch, time)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must have shape {shape} beside q of shape {q.shape}, not {x.shape}")


def _zero_state(k: jax.Array, v: jax.Array) -> jax.Array:
    """Zeros that vary over the mesh axes that the arguments vary over, as a scan inside `shard_map` requires."""
    wide = jnp.promote_types(k.dtype, jnp.float32)
    return jnp.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :], dtype=wide)


@jax.custom_vjp
def _normalize(x: jax.Array) -> jax.Array:
    """`x / sqrt(sum(x ** 2) + epsilon)` over the last axis. The backward keeps the result instead of `x`."""
    return _normalize_forward(x)[0]


def _normalize_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse_norm = jax.lax.rsqrt((wide * wide).sum(-1, keepdims=True) + reference.NORM_EPSILON)
    y = (wide * inverse_norm).astype(x.dtype)
    return y, (y, inverse_norm)


def _normalize_backward(residuals: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array]:
    y, inverse_norm = residuals
    wide, d_wide = y.astype(inverse_norm.dtype), d_y.astype(inverse_norm.dtype)
    return ((inverse_norm * (d_wide - wide * (wide * d_wide).sum(-1, keepdims=True))).astype(y.dtype),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _pad(x: jax.Array | None, time: int, *, to: int | None = None) -> jax.Array | None:
    """Zeros up to a multiple of `time`, and up to size `to` on the last axis. A token with beta 0 changes nothing."""
    if x is None:
        return None
    missing = [(0, 0)] * x.ndim
    missing[1] = (0, -x.shape[1] % time)
    if to is not None:
        missing[-1] = (0, to - x.shape[-1])
    return jnp.pad(x, missing)


def _padded(problem: _Problem, chunk: int, size: Callable[[int], int], run: Callable) -> tuple[jax.Array, jax.Array]:
    """Runs an implementation on whole chunks and on head sizes that it knows, and cuts its results back."""
    time, dim, value_dim = problem.q.shape[1], problem.q.shape[-1], problem.v.shape[-1]
    q, k = (_pad(x, chunk, to=size(dim)) for x in (problem.q, problem.k))
    v = _pad(problem.v, chunk, to=size(value_dim))
    beta, g, starts = (_pad(x, chunk) for x in (problem.beta, problem.g, problem.starts))
    missing = [(0, 0), (0, 0), (0, size(dim) - dim), (0, size(value_dim) - value_dim)]
    output, state = run(q, k, v, beta, g, starts, jnp.pad(problem.state, missing), problem.scale)
    return output[:, :time, :, :value_dim], state[:, :, :dim, :value_dim]


def _run_chunked(problem: _Problem) -> tuple[jax.Array, jax.Array]:
    chunk = min(CHUNK, problem.q.shape[1])
    return _padded(problem, chunk, lambda dim: dim, lambda *arguments: chunked_delta_rule(*arguments, chunk))


def _run_recurrent(problem: _Problem) -> tuple[jax.Array, jax.Array]:
    return _padded(problem, recurrent.BLOCK, lambda dim: dim, recurrent.recurrent_delta_rule)


def _run_reference(problem: _Problem) -> tuple[jax.Array, jax.Array]:
    q, k, v, beta, g, starts, state, scale = problem
    segment_ids = None if starts is None else jnp.cumsum(starts, axis=1).astype(jnp.int32)
    output, final = reference.delta_rule(q, k, v, beta, g, scale=scale, initial_state=state, segment_ids=segment_ids)
    return output.astype(v.dtype), final.astype(state.dtype)


def run_kernels(module: ModuleType, problem: _Problem, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Runs `pallas_gpu` or `pallas_tpu`; `interpret` is what their functions take to run without the device."""
    return _padded(
        problem, module.CHUNK, module.padded_size, lambda *arguments: module.pallas_delta_rule(*arguments, interpret)
    )


def _refusal_gpu(problem: _Problem) -> str | None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU of the Hopper generation; this is {device.platform}"
    if getattr(device, "compute_capability", "") != "9.0":
        return f"it needs an NVIDIA GPU of the Hopper generation; this is {device.device_kind}"
    return pallas_gpu.refusal(problem.q.dtype, problem.q.shape[-1], problem.v.shape[-1])


def _refusal_tpu(problem: _Problem) -> str | None:
    platform = jax.devices()[0].platform
    if platform != "tpu":
        return f"it needs a TPU; this is {platform}"
    return pallas_tpu.refusal(problem.q.dtype, problem.q.shape[-1], problem.v.shape[-1])


IMPLEMENTATIONS = {
    "pallas_gpu": (_refusal_gpu, partial(run_kernels, pallas_gpu)),
    "pallas_tpu": (_refusal_tpu, partial(run_kernels, pallas_tpu)),
    "chunked": (serves, _run_chunked),
    "recurrent": (serves, _run_recurrent),
    "reference": (serves, _run_reference),
}


def _choose(problem: _Problem, implementation: str | Sequence[str] | None) -> Callable[[_Problem], tuple]:
    """The first implementation that serves; the log says why others do not."""
    names = AUTOMATIC if implementation is None else implementation
    return first_that_serves(IMPLEMENTATIONS, names, problem, f"q of shape {problem.q.shape}", "delta_rule", _log)
