"""Cases of the short convolution, and its oracle: a matrix for each channel, in float64."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.short_convolution import Part

FAST_COMPILE = {"xla_backend_optimization_level": 0}
BARS = {"float32": 1e-5, "bfloat16": 8e-3}


class Case(NamedTuple):
    """A problem."""

    time: int = 9
    parts: tuple[Part, ...] = (Part(6),)
    size: int = 4
    silu: bool = True
    batch: int = 2
    dtype: str = "float32"
    segments: tuple[int, ...] = ()  # lengths of those of the first sequence; the others are whole
    scale: float = 1.0  # of the inputs: small ones are below the norm's epsilon, large ones at SiLU's ends


def problem(case):
    """`x`, `kernel`, segment ids or None, and the parts' cotangents, whose values are those of the dtype."""
    rng = np.random.default_rng(case.time)
    channels = sum(part.channels for part in case.parts)
    x = (case.scale * rng.standard_normal((case.batch, case.time, channels))).astype(jnp.dtype(case.dtype))
    kernel = rng.standard_normal((case.size, channels)).astype(np.float32)
    segment_ids = None
    if case.segments:
        segment_ids = np.zeros((case.batch, case.time), np.int32)
        segment_ids[0] = np.repeat(np.arange(len(case.segments)), case.segments)
    cotangents = [rng.standard_normal((*x.shape[:2], part.channels)).astype(x.dtype) for part in case.parts]
    return x, kernel, segment_ids, cotangents


def oracle(case):
    """The parts, and the gradients of `x` and `kernel`, in float64."""
    x, kernel, segment_ids, cotangents = problem(case)
    t = np.arange(case.time)
    taps = np.stack([t[:, None] - t == steps for steps in range(case.size)]).astype(np.float64)
    same = np.ones((case.batch, case.time, case.time))
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None]

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(x, kernel, cotangents):
        parts, pull = jax.vjp(function, x, kernel)
        return [*parts, *pull(cotangents)]

    def function(x, kernel):
        u = sum(tap * jnp.einsum("ij,bij,bjc->bic", at, same, x) for tap, at in zip(kernel[::-1], taps, strict=True))
        y = u / (1 + jnp.exp(-u)) if case.silu else u
        parts, begin = [], 0
        for part in case.parts:
            z = y[..., begin : begin + part.channels]
            begin += part.channels
            for i in range(0, part.channels if part.head else 0, part.head or 1):
                head = slice(i, i + part.head)
                z = z.at[..., head].divide(jnp.sqrt((z[..., head] ** 2).sum(-1, keepdims=True) + 1e-6))
            parts.append(z)
        return parts

    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda z: jnp.asarray(z, jnp.float64), (x, kernel, cotangents))
        return [np.asarray(z) for z in run(*arguments)]


def results(function, case):
    """The same of `function(x, kernel, segment_ids)`."""
    x, kernel, segment_ids, cotangents = problem(case)

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(x, kernel, cotangents):
        parts, pull = jax.vjp(lambda x, kernel: function(x, kernel, segment_ids), x, kernel)
        return [*parts, *pull(cotangents)]

    return run(jnp.asarray(x), jnp.asarray(kernel), [jnp.asarray(c) for c in cotangents])


def worst_error(got, wanted):
    """The largest relative root mean square error of all arrays."""
    pairs = [(np.asarray(g, np.float64), w) for g, w in zip(got, wanted, strict=True)]
    return max(np.linalg.norm(g - w) / np.linalg.norm(w) for g, w in pairs)
