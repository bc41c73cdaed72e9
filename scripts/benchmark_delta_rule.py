"""Times the delta rule's implementations, forward and forward with backward, beside attention and fla's kernels.

  python scripts/benchmark_delta_rule.py                                  three shapes, everything that serves here
  python scripts/benchmark_delta_rule.py --shapes 8x2048x16x128           batch x time x heads x head size
  python scripts/benchmark_delta_rule.py --contenders pallas_gpu chunked fla

Contenders: our implementations by name; `attention`, cuDNN's causal attention through JAX; `fla`, the Triton kernels of
flash-linear-attention, where that package and PyTorch are installed, each call one CUDA graph. Before anything is
timed, output and gradients of every contender but attention are held against the float64 recurrence on two heads of the
same length; one that fails is reported and not timed. Queries and keys are normalised beforehand, so that nobody pays
for it.

Writes kernels.json, kernels.md and kernels.png into the results folder.
"""

import argparse
import functools
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the memory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from deltanet.delta_rule import delta_rule, reference  # noqa: E402
from training import plotting  # noqa: E402
from training.errors import UserError, reported  # noqa: E402
from training.provenance import provenance  # noqa: E402
from training.timing import batch_seconds, calls_within  # noqa: E402

SHAPES = ("8x2048x16x128", "1x16384x16x128", "8x2048x32x64")
OURS = ("pallas_gpu", "pallas_tpu", "chunked", "recurrent")
CONTENDERS = (*OURS, "attention", "fla")
# Relative root mean square of the error that a contender may have in bfloat16: output, gradients.
OUTPUT_BOUND, GRADIENT_BOUND = 0.006, 0.008
GRADIENTS = ("dq", "dk", "dv", "dbeta")
# Of an H200 by its data sheet: dense bfloat16 operations and bytes a second.
PEAK_FLOPS, PEAK_BYTES = 989e12, 4.8e12
CHUNK = 64


class Shape(NamedTuple):
    """A problem's sizes; the value size is the head size."""

    batch: int
    time: int
    heads: int
    dim: int

    def __str__(self) -> str:
        """As on the command line."""
        return "x".join(map(str, self))


class Work(NamedTuple):
    """Operations and bytes that the chunkwise form needs at least: arguments read and results written once."""

    flops: float
    bytes: float

    @property
    def floor(self) -> float:
        """Seconds on an H200 at its full rates."""
        return max(self.flops / PEAK_FLOPS, self.bytes / PEAK_BYTES)


def work(shape: Shape) -> dict[str, Work]:
    """Forward, and both passes: no W and U, one triangular product in the backward, states recomputed."""
    tokens, d = shape.batch * shape.time * shape.heads, shape.dim
    forward = Work(tokens * (6 * d**2 + 8 * CHUNK * d), tokens * (8 * d + 2))
    backward = Work(tokens * (16 * d**2 + 20 * CHUNK * d), tokens * (14 * d + 4))
    return {"forward": forward, "both": Work(forward.flops + backward.flops, forward.bytes + backward.bytes)}


def make_inputs(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """Random unit queries and keys, values, step sizes in (0, 1), and the output's cotangent; float32."""
    rng = np.random.default_rng(seed)
    tokens = (shape.batch, shape.time, shape.heads)
    q, k, v, d_output = (rng.standard_normal((*tokens, shape.dim), dtype=np.float32) for _ in range(4))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    return {"q": q, "k": k, "v": v, "beta": rng.random(tokens, dtype=np.float32), "d_output": d_output}


class Contender:
    """A function of JAX to be checked and timed; one of PyTorch overrides all three methods."""

    def __init__(self, forward: Callable[..., jax.Array]) -> None:
        self._forward = jax.jit(forward)

        def both(q, k, v, beta, d_output):
            output, pull = jax.vjp(forward, q, k, v, beta)
            return output, *pull(d_output)

        self._both = jax.jit(both)

    def results(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Output and gradients."""
        return [np.asarray(x, np.float64) for x in self._both(*_on_device(inputs).values())]

    def seconds(self, inputs: dict[str, np.ndarray], budget: float) -> dict[str, list[float]]:
        """Seconds of a call, forward and both passes, several measurements each."""
        arguments = list(_on_device(inputs).values())
        return {
            "forward": _repeat(lambda: self._forward(*arguments[:4]), jax.block_until_ready, budget),
            "both": _repeat(lambda: self._both(*arguments), jax.block_until_ready, budget),
        }

    def peak_bytes(self, inputs: dict[str, np.ndarray]) -> int:
        """Memory of both passes: arguments, results and everything between, as the compiler laid it out."""
        memory = self._both.lower(*_on_device(inputs).values()).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def _on_device(inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}


def _repeat(call: Callable[[], Any], wait: Callable[[Any], Any], budget: float) -> list[float]:
    """Seconds of a call, of ten batches of calls after two that do not count."""
    calls = calls_within(call, budget / 12, wait)
    samples = batch_seconds(call, calls, 12 if calls > 1 else 2, wait)
    return samples[2:] or samples


class Fla(Contender):
    """The Triton kernels of flash-linear-attention, timed as CUDA graphs: Python launches them too slowly."""

    def __init__(self) -> None:
        import torch
        from fla.ops.delta_rule import chunk_delta_rule

        self._torch, self._op = torch, chunk_delta_rule

    def _leaves(self, inputs):
        tensors = {name: self._torch.tensor(x, device="cuda", dtype=self._torch.bfloat16) for name, x in inputs.items()}
        return [tensors[name].requires_grad_() for name in ("q", "k", "v", "beta")], tensors["d_output"]

    def _call(self, leaves):
        return self._op(*leaves, use_qk_l2norm_in_kernel=False)[0]

    def _call_both(self, leaves, d_output):
        output = self._call(leaves)
        return output, *self._torch.autograd.grad(output, leaves, d_output)

    def results(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Output and gradients."""
        return [x.detach().double().cpu().numpy() for x in self._call_both(*self._leaves(inputs))]

    def seconds(self, inputs: dict[str, np.ndarray], budget: float) -> dict[str, list[float]]:
        """Seconds of a call, forward and both passes, several measurements each."""
        leaves, d_output = self._leaves(inputs)

        def forward():
            with self._torch.no_grad():
                return self._call(leaves)

        def wait(_):
            self._torch.cuda.synchronize()

        return {
            "forward": _repeat(self._graph(forward).replay, wait, budget),
            "both": _repeat(self._graph(lambda: self._call_both(leaves, d_output)).replay, wait, budget),
        }

    def _graph(self, call: Callable[[], Any]) -> Any:
        """The call's kernels as one launch; tuned before, because that cannot be captured."""
        cuda = self._torch.cuda
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(3):
                call()
        cuda.current_stream().wait_stream(stream)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            call()
        return graph

    def peak_bytes(self, inputs: dict[str, np.ndarray]) -> int:
        """Memory of both passes, as PyTorch's allocator counts it."""
        leaves, d_output = self._leaves(inputs)
        self._torch.cuda.reset_peak_memory_stats()
        self._call_both(leaves, d_output)
        return self._torch.cuda.max_memory_allocated()


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array) -> jax.Array:
    del beta  # attention has none; its gradient is zero
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def make_contender(name: str) -> Contender:
    """The contender of that name; ImportError or NotImplementedError where it cannot run."""
    if name == "fla":
        return Fla()
    if name == "attention":
        return Contender(_attention)
    return Contender(lambda *arguments: delta_rule(*arguments, implementation=name)[0])


@functools.cache
def _wanted(time: int, dim: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Arguments of two heads, and the float64 recurrence's output and gradients."""
    inputs = make_inputs(Shape(1, time, 2, dim), seed=1)
    rounded = {name: np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for name, x in inputs.items()}

    def both(q, k, v, beta, d_output):
        output, pull = jax.vjp(lambda *leaves: reference.delta_rule(*leaves)[0], q, k, v, beta)
        return output, *pull(d_output)

    with jax.enable_x64(True):
        results = jax.jit(both)(*(jnp.asarray(x, jnp.float64) for x in rounded.values()))
    return inputs, [np.asarray(x) for x in results]


def errors(contender: Contender, shape: Shape) -> dict[str, float]:
    """Relative root mean square errors of the output and of the gradients, against the float64 recurrence."""
    inputs, wanted = _wanted(shape.time, shape.dim)
    named = zip(("output", *GRADIENTS), contender.results(inputs), wanted, strict=True)
    return {name: float(np.linalg.norm(x - y) / np.linalg.norm(y)) for name, x, y in named}


def _too_large(found: dict[str, float]) -> dict[str, float]:
    bounds = {name: OUTPUT_BOUND if name == "output" else GRADIENT_BOUND for name in found}
    return {name: error for name, error in found.items() if not error <= bounds[name]}


def measure(name: str, shape: Shape, budget: float) -> dict[str, Any]:
    """What one contender does on one shape: errors, times, memory; or why there is none."""
    try:
        contender = make_contender(name)
        found = {} if name == "attention" else errors(contender, shape)
        if wrong := _too_large(found):
            return {"errors": found, "skipped": f"errors too large: {wrong}"}
        inputs = make_inputs(shape, seed=0)
        samples, peak = contender.seconds(inputs, budget), contender.peak_bytes(inputs)
    except (ImportError, RuntimeError, ValueError) as error:
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    result = {"errors": found, "peak_bytes": peak}
    for direction, minimal in work(shape).items():
        ordered = sorted(samples[direction])
        median = statistics.median(ordered)
        result[direction] = {
            "seconds": median,
            "tenth": ordered[len(ordered) // 10],
            "ninetieth": ordered[-1 - len(ordered) // 10],
        }
        if name != "attention":  # it has operations of its own
            result[direction] |= {
                "tflops": minimal.flops / median / 1e12,
                "gbytes": minimal.bytes / median / 1e9,
                "of_floor": minimal.floor / median,
            }
    return result


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    lines = [
        "# Kernels of the delta rule",
        "",
        "Median milliseconds in bfloat16; TFLOP/s, GB/s and % of the floor count the operations and bytes that the",
        "chunkwise form needs at least, and the floor is what they take at an H200's full rates.",
        "",
        "| batch x time x heads x dim | contender | forward | both | of fla | TFLOP/s | GB/s | floor | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, results in record["shapes"].items():
        for name, result in results.items():
            lines.append(f"| {shape} | {name} | {_cells(result, results.get('fla', {}))} |")
    lines += [
        "",
        f"`{record['command']}`, {record['date']}, revision {record['revision']}, {record['device']}, "
        f"JAX {record['jax']}.",
        "",
        "![Times](kernels.png)",
        "",
    ]
    return "\n".join(lines)


def _cells(result: dict[str, Any], fla: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"{result['skipped']} | | | | | | "
    directions = [result["forward"], result["both"]]

    def pair(key, form, factor=1.0):
        return " / ".join(form.format(factor * x[key]) for x in directions) if key in directions[0] else ""

    ratio = ""
    if "forward" in fla:
        ratio = " / ".join(f"{result[x]['seconds'] / fla[x]['seconds']:.2f}" for x in ("forward", "both"))
    forward, both = (f"{1e3 * x['seconds']:.3f}" for x in directions)
    peak = f"{result['peak_bytes'] / 2**30:.2f}"
    rates = (pair("tflops", "{:.0f}"), pair("gbytes", "{:.0f}"), pair("of_floor", "{:.0f} %", 100))
    return " | ".join((forward, both, ratio, *rates, peak))


def draw(record: dict[str, Any], path: Path) -> None:
    """Bars of the times, one panel a shape."""
    figure, axes = plotting.figure(len(record["shapes"]), width=4.5, height=3.5)
    for ax, (shape, results) in zip(axes[0], record["shapes"].items(), strict=True):
        timed = {name: result for name, result in results.items() if "forward" in result}
        for offset, direction, label in ((-0.2, "forward", "forward"), (0.2, "both", "forward and backward")):
            positions = np.arange(len(timed)) + offset
            ax.bar(positions, [1e3 * x[direction]["seconds"] for x in timed.values()], width=0.4, label=label)
        ax.set(title=shape, ylabel="ms", yscale="log", xticks=range(len(timed)), xticklabels=list(timed))
    axes[0, 0].legend()
    plotting.save(figure, path)


def write(record: dict[str, Any], folder: Path) -> None:
    """JSON, table and figure of what has been measured so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "kernels.md").write_text(table(record))
    draw(record, folder / "kernels.png")


def parse_shape(text: str) -> Shape:
    """A shape from the command line."""
    try:
        return Shape(*map(int, text.split("x")))
    except (TypeError, ValueError):
        raise UserError(f"a shape is batch x time x heads x dim, such as {SHAPES[0]}, not {text!r}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch x time x heads x head size")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each of a contender's measurements")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "deltanet", help="folder of the results")
    options = parser.parse_args()
    shapes = [parse_shape(text) for text in options.shapes]
    asked = (
        f"--shapes {' '.join(options.shapes)} --contenders {' '.join(options.contenders)} --budget {options.budget:g}"
    )
    record = {"command": f"python scripts/{Path(__file__).name} {asked}", **provenance(), "shapes": {}}
    for shape in shapes:
        results = record["shapes"][str(shape)] = {}
        for name in options.contenders:
            results[name] = measure(name, shape, options.budget)
            print(f"{shape!s:16s} {name:11s} {_cells(results[name], results.get('fla', {}))}", flush=True)
            if found := results[name].get("errors"):
                print(f"{'':29s}errors {', '.join(f'{key} {error:.1e}' for key, error in found.items())}", flush=True)
        write(record, options.results)


if __name__ == "__main__":
    with reported():
        main()
