"""The shared test body: one set of cases, the oracle in float64, and the bars of each dtype."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from lion.attention.reference import reference_attention

BATCH, HEADS, DIM, VALUE_DIM = 2, 3, 4, 5
FAST_COMPILE = {"xla_backend_optimization_level": 0}

FORMS = ("full", "recurrent", "chunked", "two_sided")
OPTIONS = {
    "none": {},
    "fixed": {},
    "selective": {},
    "selective_forward": {"direction": "forward"},
    "selective_two_scans": {"scans": 2, "padded": True},
    "diagonal": {"padded": True},
}
MORE_OPTIONS = {
    "none_forward": {"direction": "forward"},
    "none_two_scans": {"scans": 2},
    "fixed_two_scans": {"scans": 2},
    "selective_padded": {"padded": True},
    "selective_unnormalized": {"normalize": False},
    "diagonal_backward": {"direction": "backward"},
    "diagonal_two_scans": {"scans": 2},
}


def log_decays(rng, shape):
    """Per head: as strong as 1e-4, around a half, and as weak as 1 - 1e-7."""
    heads = shape[0] if len(shape) == 1 else shape[2]
    kinds = [
        lambda s: np.log(10 ** rng.uniform(-4, -2, s)),
        lambda s: np.log(rng.uniform(0.2, 0.7, s)),
        lambda s: np.log1p(-(10 ** rng.uniform(-7, -2, s))),
    ]
    if len(shape) == 1:
        return np.array([kinds[h % 3](()) for h in range(heads)])
    per_head = [kinds[h % 3]((*shape[:2], *shape[3:])) for h in range(heads)]
    return np.stack(per_head, 2)


@lru_cache
def problem(case, time, dtype="float64", batch=BATCH, heads=HEADS):
    """Arguments `(q, k, v, log_decay)`, keyword arguments and a cotangent, all as NumPy arrays.

    The values are those of `dtype`, so that the oracle in float64 sees what the form under test sees.
    """
    rng = np.random.default_rng(len(case) + time)
    spec = dict((OPTIONS | MORE_OPTIONS)[case])
    scans = spec.pop("scans", 1)
    shape = (batch, time, heads)
    q, k = (0.05 + np.abs(rng.normal(size=(*shape, DIM))) for _ in range(2))
    v, cotangent = (rng.normal(size=(*shape, VALUE_DIM)) for _ in range(2))
    q, k, v, cotangent = (x.astype(jnp.dtype(dtype)) for x in (q, k, v, cotangent))
    kind = case.partition("_")[0]
    decay_shape = {"none": None, "fixed": (heads,), "selective": shape, "diagonal": (*shape, DIM)}[kind]
    decays = []
    for _ in range(scans):
        decay = None if decay_shape is None else log_decays(rng, decay_shape)
        if kind == "selective" and scans == 1:
            decay[:, 0] = 0  # the gate of a class token
        decays.append(None if decay is None else decay.astype(np.float64 if dtype == "float64" else np.float32))
    if scans > 1:
        spec["orders"] = tuple(tuple(int(i) for i in rng.permutation(time)) for _ in range(scans))
    if spec.pop("padded", False):
        mask = rng.random((batch, time)) < 0.8
        mask[-1, time // 2 :] = False
        spec["padding_mask"] = mask
    return (q, k, v, decays[0] if scans == 1 else tuple(decays)), spec, cotangent


def value(function, *arguments):
    """The output alone, compiled as the tests do."""
    return jax.jit(function, compiler_options=FAST_COMPILE)(*arguments)


def value_and_gradients(function, arguments, cotangent):
    """The output, and the gradients towards all arguments for this cotangent, as a list."""

    def run(cotangent, *arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(cotangent)

    compiled = jax.jit(run, compiler_options=FAST_COMPILE)
    return jax.tree.leaves(compiled(cotangent, *arguments))


@lru_cache
def expected(case, time, dtype="float64", batch=BATCH, heads=HEADS):
    """What the oracle makes of a problem, in float64."""
    arguments, spec, cotangent = problem(case, time, dtype, batch, heads)
    arguments, cotangent = jax.tree.map(lambda x: x.astype(np.float64), (arguments, cotangent))
    return value_and_gradients(partial(reference_attention, **spec), arguments, cotangent)


def worst_error(got, wanted, dtype):
    """The error over the outputs and gradients, in the measure of the dtype's bar.

    float64 and float32: the largest error, relative to the larger of 1 and the largest value. (All arguments are of
    order 1; the gradients towards q and k are a difference of such terms, and arbitrarily small where a query sees
    almost only itself.) bfloat16: the relative RMS error of the worst head, without a floor; what is zero but for the
    rounding of float64, such as the gradient of a single token's query, is no scale.
    """
    errors = []
    for x, y in zip(got, wanted, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y)
        assert x.shape == y.shape
        assert np.isfinite(x).all()
        if dtype == "bfloat16":
            x, y = (np.moveaxis(a, 2, 0).reshape(a.shape[2], -1) if a.ndim > 1 else a[:, None] for a in (x, y))
            scale = np.sqrt(np.mean(y**2, -1))
            relative = np.sqrt(np.mean((x - y) ** 2, -1)) / np.where(scale > 1e-12, scale, 1)
            errors.append(relative.max())
        else:
            errors.append(np.abs(x - y).max() / max(1, np.abs(y).max()))
    return max(errors)


BARS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2}
