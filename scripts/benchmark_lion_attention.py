"""Times LION's attention by form and implementation beside softmax attention, forward and with backward, and memory.

  python scripts/benchmark_lion_attention.py                                   images of 224 to 2496 px, patch 16
  python scripts/benchmark_lion_attention.py --pixels 224 512 --tokens 100000  fewer and smaller

Contenders: `decay/form/implementation` of ours, `softmax/fused` (cuDNN) and `softmax/naive`. The batch is what makes
`--tokens` tokens. Before one of ours is timed, its output and gradients are held against the float64 recurrence on one
image; one that fails is reported and not timed. Memory is that of both passes as the compiler laid it out.

Writes attention.json, attention.md and attention.png into the results folder.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lion.attention import lion_attention  # noqa: E402
from lion.attention.reference import reference_attention  # noqa: E402
from models.softmax_attention import fused_attention  # noqa: E402
from training import plotting  # noqa: E402
from training.errors import UserError, reported  # noqa: E402
from training.provenance import provenance  # noqa: E402
from training.timing import batch_seconds, calls_within  # noqa: E402

PIXELS = (224, 384, 512, 736, 1024, 1248, 1536, 2496)
PATCH = 16
CONTENDERS = (
    "softmax/fused",
    "softmax/naive",
    "selective/full/pallas_gpu",
    "selective/full/xla",
    "selective/two_sided/pallas_gpu",
    "selective/two_sided/xla",
    "fixed/full/pallas_gpu",
    "none/full/pallas_gpu",
    "none/two_sided/xla",
)
BOUND = 0.01  # relative root mean square of the error in bfloat16
CHECKED = 2048  # tokens; what is longer is checked on its first ones
QUADRATIC_BYTES = 2**36  # of the scores that a naive form may hold


def tokens_of(pixels: int) -> int:
    """Patches of an image and the class token."""
    return (pixels // PATCH) ** 2 + 1


def make_inputs(batch: int, time_: int, heads: int, dim: int, seed: int) -> list[np.ndarray]:
    """q and k as the paper's feature map leaves them, v, selective log-decays, the cotangent; float32."""
    rng = np.random.default_rng(seed)
    q, k, v, cotangent = (rng.standard_normal((batch, time_, heads, dim), np.float32) for _ in range(4))
    q, k = (x / (1 + np.exp(-x)) + 0.5 for x in (q, k))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    decay = -np.log1p(np.exp(-2 * rng.standard_normal((batch, time_, heads), np.float32)))
    decay[:, 0] = 0
    return [q, k, v, decay, cotangent]


def attention_of(name: str) -> Callable[..., jax.Array]:
    """A contender as a function of q, k, v and selective log-decays."""
    decay, _, how = name.partition("/")
    if decay == "softmax":
        naive = partial(jax.nn.dot_product_attention, implementation="xla")
        softmax = {"fused": fused_attention, "naive": naive}[how]
        return lambda q, k, v, a: softmax(q, k, v)
    return partial(_ours, decay, *how.split("/"))


def _decays(decay: str, a: jax.Array) -> jax.Array | None:
    return {"none": None, "fixed": a[0, -1], "selective": a}[decay]


def _ours(decay: str, form: str, implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, a: jax.Array):
    return lion_attention(q, k, v, _decays(decay, a), form=form, implementation=implementation)


def both(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Output and gradients."""

    def run(q, k, v, a, cotangent):
        y, pull = jax.vjp(function, q, k, v, a)
        return y, *pull(cotangent)

    return run


def _rounded(inputs: list[np.ndarray]) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.float32 if x.ndim == 3 else jnp.bfloat16) for x in inputs]


@cache
def _wanted(decay: str, time_: int, dim: int) -> list[np.ndarray]:
    """What the oracle makes of one image with one head, in float64."""
    inputs = [np.asarray(x.astype(jnp.float32)) for x in _rounded(make_inputs(1, time_, 1, dim, 1))]
    with jax.enable_x64(True):
        oracle = both(lambda q, k, v, a: reference_attention(q, k, v, _decays(decay, a)))
        return [np.asarray(x) for x in jax.jit(oracle)(*(jnp.asarray(x, jnp.float64) for x in inputs))]


def errors(name: str, time_: int, dim: int) -> dict[str, float]:
    """Relative root mean square errors; of fixed decays without the gradient of the decay, which sums over all."""
    time_ = min(time_, CHECKED)
    got = jax.jit(both(attention_of(name)))(*_rounded(make_inputs(1, time_, 1, dim, 1)))
    decay = name.partition("/")[0]
    parts = zip(("output", "dq", "dk", "dv", "ddecay"), got, _wanted(decay, time_, dim), strict=True)
    found = {part: (np.asarray(x, np.float64), y) for part, x, y in parts if part != "ddecay" or decay == "selective"}
    return {part: float(np.linalg.norm(x - y) / np.linalg.norm(y)) for part, (x, y) in found.items()}


def _seconds(compiled: Callable[..., Any], arguments: list[jax.Array], budget: float) -> float:
    """The median time of a call, of six batches of calls."""
    run = partial(compiled, *arguments)
    return statistics.median(batch_seconds(run, calls_within(run, budget / 6), 6))


def measure(name: str, batch: int, time_: int, heads: int, dim: int, budget: float) -> dict[str, Any]:
    """Errors, seconds and bytes of a contender, or why there are none."""
    decay, _, how = name.partition("/")
    if how == "naive" or how == "full/xla":
        scores = 4 * batch * heads * time_**2
        if scores > QUADRATIC_BYTES:
            return {"skipped": f"scores of {scores / 2**30:.0f} GiB"}
    try:
        found = {} if decay == "softmax" else errors(name, time_, dim)
        if wrong := {part: error for part, error in found.items() if not error <= BOUND}:
            return {"errors": found, "skipped": f"errors too large: {wrong}"}
        arguments = _rounded(make_inputs(batch, time_, heads, dim, 0))
        result: dict[str, Any] = {"errors": found}
        for direction, function, given in (
            ("forward", attention_of(name), arguments[:4]),
            ("both", both(attention_of(name)), arguments),
        ):
            compiled = jax.jit(function).lower(*given).compile()
            memory = compiled.memory_analysis()
            result[direction] = {
                "seconds": _seconds(compiled, given, budget),
                "temporary_bytes": memory.temp_size_in_bytes,
            }
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    return result


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    lines = [
        "# LION's attention beside softmax attention",
        "",
        f"{record['heads']} heads of {record['dim']}, bfloat16, about {record['tokens']} tokens a call; median "
        "milliseconds, and GiB of temporary memory of both passes.",
        "",
        "| pixels | batch x tokens | contender | forward | both | GiB |",
        "|---|---|---|---|---|---|",
    ]
    for pixels, row in record["rows"].items():
        for name, result in row["contenders"].items():
            cells = f"{result.get('skipped')} | | "
            if "both" in result:
                forward, both_ = (f"{1e3 * result[x]['seconds']:.3f}" for x in ("forward", "both"))
                cells = f"{forward} | {both_} | {result['both']['temporary_bytes'] / 2**30:.2f}"
            lines.append(f"| {pixels} | {row['batch']} x {row['time']} | {name} | {cells} |")
    end = f"`{record['command']}`, {record['date']}, revision {record['revision']}, {record['device']}"
    return "\n".join([*lines, "", f"{end}, JAX {record['jax']}.", "", "![Times](attention.png)", ""])


def draw(record: dict[str, Any], path: Path) -> None:
    """Nanoseconds for a token and head over the length, forward and both passes."""
    figure, axes = plotting.figure(2, width=5.5, height=4.5, sharey=True)
    for ax, direction in zip(axes[0], ("forward", "both"), strict=True):
        for name in record["contenders"]:
            points = [
                (row["time"], 1e9 * row["contenders"][name][direction]["seconds"] / (row["batch"] * row["time"]))
                for row in record["rows"].values()
                if direction in row["contenders"].get(name, {})
            ]
            if points:
                x, y = zip(*points, strict=True)
                ax.plot(x, np.array(y) / record["heads"], marker=".", label=name)
        ax.set(xscale="log", yscale="log", xlabel="tokens", title=direction)
    axes[0, 0].set_ylabel("ns for a token and head")
    axes[0, 1].legend(fontsize=7)
    plotting.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", nargs="+", type=int, default=PIXELS)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--tokens", type=int, default=100_000, help="of a call")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds for each measurement")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "lion", help="folder of the results")
    options = parser.parse_args()
    if small := [x for x in options.pixels if x < PATCH]:
        raise UserError(f"--pixels {small[0]}: an image has at least one patch of {PATCH} pixels")
    asked = f"--pixels {' '.join(map(str, options.pixels))} --tokens {options.tokens} --heads {options.heads}"
    record = {
        "command": f"python scripts/{Path(__file__).name} {asked} --dim {options.dim}",
        **provenance(),
        **{name: getattr(options, name) for name in ("contenders", "tokens", "heads", "dim")},
        "rows": {},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    for pixels in options.pixels:
        time_ = tokens_of(pixels)
        batch = max(1, options.tokens // time_)
        row = record["rows"][str(pixels)] = {"time": time_, "batch": batch, "contenders": {}}
        for name in options.contenders:
            result = measure(name, batch, time_, options.heads, options.dim, options.budget)
            row["contenders"][name] = result
            print(pixels, name, json.dumps(result), flush=True)
        (options.results / "attention.json").write_text(json.dumps(record, indent=1) + "\n")
        (options.results / "attention.md").write_text(table(record))
        draw(record, options.results / "attention.png")


if __name__ == "__main__":
    with reported():
        main()
