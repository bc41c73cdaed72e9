"""How accurately the mask of Eq. 9 can be built: four constructions against float64 (section 1.6 of the spec, E2)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lion import figures
from lion.attention.decay import cumulative, mask
from training.report import Context, Entry, Row

BAND = 8  # errors are taken within this distance of the diagonal, where the entries are largest


def _op(a: jax.Array) -> jax.Array:
    sums, position = cumulative(a[:, None]), jnp.arange(len(a))
    return mask(sums, sums, position, position, "forward")


def _differences(a: jax.Array) -> jax.Array:
    c = jnp.cumsum(a)
    before = c - a
    lower = jnp.tri(len(a), dtype=bool)
    return jnp.where(lower, jnp.exp(jnp.where(lower, before[:, None] - before[None, :], 0)), 0)


def _ratio(a: jax.Array, epsilon: float) -> jax.Array:
    product = jnp.exp(jnp.cumsum(a) - a)
    return jnp.tril(product[:, None] * (1 / (product[None, :] + epsilon)))


CONSTRUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "this op, float32": _op,
    "difference of sums, float32": _differences,
    "difference of sums, bfloat16": lambda a: _differences(a.astype(jnp.bfloat16)),
    "ratio of products, float32": lambda a: _ratio(a, 0.0),
    "ratio with 1e-7 added, float32": lambda a: _ratio(a, 1e-7),
}
"""Lower triangles `[time, time]` from log-decays `[time]`, key side (Eq. 9); the last two are listings of the paper."""


def measure(time: int, mean_decay: float, seed: int = 0) -> dict[str, dict[str, float]]:
    """For each construction the largest error near the diagonal, and how many entries of the gradient are not finite.

    Args:
      time: tokens.
      mean_decay: decays are the sigmoid of logits that spread with standard deviation 0.5 around the logit of this.
      seed: of the decays.

    Returns:
      Construction -> `error` (infinite or not a number where the mask is) and `bad_gradients` (of the sum of the mask
      towards the log-decays, out of `time`).
    """
    logits = np.log(mean_decay / (1 - mean_decay)) + 0.5 * np.random.default_rng(seed).normal(size=time)
    a = (-np.log1p(np.exp(-logits))).astype(np.float32)
    before = np.concatenate([[0], np.cumsum(a.astype(np.float64))[:-1]])
    distance = np.subtract.outer(np.arange(time), np.arange(time))
    near = (distance >= 0) & (distance <= BAND)
    exact = np.exp(np.where(near, np.subtract.outer(before, before), 0))
    table = {}
    for name, build in CONSTRUCTIONS.items():
        built, pull = jax.vjp(jax.jit(build), jnp.asarray(a))
        with np.errstate(invalid="ignore"):
            error = np.abs(np.asarray(built, np.float64) - exact)[near].max()
        bad = np.sum(~np.isfinite(np.asarray(pull(jnp.ones_like(built))[0], np.float64)))
        table[name] = {"error": float(error), "bad_gradients": int(bad)}
    return table


def unbounded(time: int, seed: int = 0) -> float:
    """The share of entries of the mask that are not finite with gates that nothing bounds: log-decays `softplus(x)`."""
    a = np.logaddexp(0, np.random.default_rng(seed).normal(size=time)).astype(np.float32)
    with np.errstate(over="ignore"):
        entries = np.asarray(jax.jit(_differences)(jnp.asarray(a)))
    return float(np.mean(~np.isfinite(entries[np.tri(time, dtype=bool)])))


# The table.

SPEC = {(128, 0.5): ("2.9e-6", "0.36", "inf", "1.0"), (196, 0.5): ("5.5e-6", "0.52", "NaN", "1.0")}
SPEC |= {(1024, 0.5): ("4.0e-5", "0.98", "NaN", "1.0"), (4096, 0.9): ("2.7e-5", "0.81", "NaN", "1.0")}
"""Errors that an independent measurement found, for all constructions but the op's own."""


def _run(context: Context) -> dict[str, Any]:
    times = (128, 196, 1024) if context.scale == "cpu" else (128, 196, 512, 1024, 2048, 4096, 8192)
    cells = [
        {"time": time, "mean_decay": decay, "table": measure(time, decay)}
        for time in times
        for decay in (0.5, 0.9, 0.99, 0.999)
    ]
    return {"cells": cells, "unbounded": {str(time): unbounded(time) for time in times}}


def _rows(values: dict[str, Any]) -> list[Row]:
    rows = []
    for cell in values["cells"]:
        key, table = (cell["time"], cell["mean_decay"]), cell["table"]
        references = dict(zip(list(CONSTRUCTIONS)[1:], SPEC.get(key, [""] * 4), strict=True))
        for name, found in table.items():
            ours = f"{found['error']:.1e}; {found['bad_gradients']} gradients not finite"
            passed = found["error"] < 1e-4 and found["bad_gradients"] == 0 if "float32" in name else None
            judged = name in ("this op, float32", "difference of sums, float32")
            rows.append(
                Row(
                    f"{key[0]} tokens, mean decay {key[1]}: {name}",
                    references.get(name, ""),
                    ours,
                    "error below 1e-4, all gradients finite" if judged else "",
                    passed if judged else None,
                )
            )
    for time, share in values["unbounded"].items():
        rows.append(Row(f"{time} tokens, unbounded gate: entries not finite", "diverges", f"{100 * share:.0f} %"))
    return rows


def _draw(values: dict[str, Any], path: Path) -> None:
    panels: dict[str, dict[str, dict[float, float]]] = {}
    for cell in values["cells"]:
        lines = panels.setdefault(f"mean decay {cell['mean_decay']}", {})
        for name, found in cell["table"].items():
            if np.isfinite(found["error"]):
                lines.setdefault(name, {})[cell["time"]] = max(found["error"], 1e-9)
    labels = dict.fromkeys(panels, "largest error within 8 tokens")
    figures.curves(panels, "tokens", labels, path)


STABILITY = Entry(
    title="Stability of the mask (E2): four constructions against float64",
    claim="a gate between 0 and 1 and sums of logarithms let the full form train without chunks; products of decays "
    "and their inverses do not (section 3.2; the column named paper holds an independent measurement)",
    scales={
        "cpu": "128 to 1024 tokens",
        "gpu": "128 to 8192 tokens",
    },
    run=_run,
    rows=_rows,
    draw=_draw,
)
