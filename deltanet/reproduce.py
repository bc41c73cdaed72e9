"""Figure 1 of "Parallelizing linear transformers with the delta rule over sequence length" (arXiv:2406.06484)."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deltanet.delta_rule import delta_rule, pallas_gpu, recurrent_gpu
from training import plotting
from training.errors import UserError
from training.report import Context, Entry, Row
from training.timing import batch_seconds, calls_within

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Speed-up of the chunkwise over the recurrent form by head size, read off the paper's figure (an H100).
PAPER = {
    64: (4.0, 4.5, 5.8, 9.5, 15.7, 23.7),
    128: (7.1, 7.45, 7.3, 10.55, 15.8, 32.8),
    256: (10.2, 10.2, 10.2, 17.5, 28.7, 36.6),
}
WIDTH = 2048  # head size times heads
MARGIN = 0.95  # of the speed-up at the length before, that a growing speed-up may fall to by noise

Values = dict[str, Any]


def seconds(call: Callable[..., jax.Array], arguments: Sequence[jax.Array], budget: float) -> float:
    """Median time of a compiled call, of five batches of calls."""
    run = partial(call, *arguments)
    return statistics.median(batch_seconds(run, calls_within(run, budget / 5), 5))


def _inputs(batch: int, length: int, heads: int, dim: int) -> list[jax.Array]:
    """Unit queries and keys, values and step sizes in (0, 1), bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (batch, length, heads, dim)) for key in keys[:3])
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    beta = jax.random.uniform(keys[3], (batch, length, heads))
    return [x.astype(jnp.bfloat16) for x in (q, k, v, beta)]


def _output(implementation: str, *arguments: jax.Array) -> jax.Array:
    return delta_rule(*arguments, implementation=implementation)[0]


def _run(context: Context) -> Values:
    if context.scale == "cpu":
        tokens, lengths, width = 1024, (256, 512), 128
        chunkwise, recurrent = (partial(_output, name) for name in ("chunked", "recurrent"))
    else:
        if jax.default_backend() != "gpu" or pallas_gpu.refusal(jnp.dtype("bfloat16"), 128, 128):
            raise UserError("figure 1 at scale gpu needs an NVIDIA GPU of the Hopper generation and JAX 0.11")
        tokens, lengths, width, chunkwise = LENGTHS[-1], LENGTHS, WIDTH, partial(_output, "pallas_gpu")

        def recurrent(*arguments):
            return recurrent_gpu.recurrent_forward(*arguments, scale=arguments[0].shape[-1] ** -0.5)

    dims = PAPER if context.scale != "cpu" else (64,)
    shapes = [(dim, (tokens // length, length, width // dim, dim)) for dim in dims for length in lengths]
    with ThreadPoolExecutor() as pool:  # to compile takes far longer than to run
        compiling = [
            [pool.submit(jax.jit(form).lower(*arguments).compile) for form in (chunkwise, recurrent)]
            for arguments in (jax.eval_shape(partial(_inputs, *shape)) for _, shape in shapes)
        ]
        calls = [[future.result() for future in pair] for pair in compiling]
    sizes = {str(dim): {"chunkwise": [], "recurrent": [], "difference": []} for dim in dims}
    for (dim, shape), pair in zip(shapes, calls, strict=True):
        found, arguments = sizes[str(dim)], _inputs(*shape)
        outputs = [call(*arguments).astype(jnp.float32) for call in pair]
        difference = jnp.linalg.norm(outputs[0] - outputs[1]) / jnp.linalg.norm(outputs[1])
        found["difference"].append(float(difference))
        for name, call in zip(("chunkwise", "recurrent"), pair, strict=True):
            found[name].append(seconds(call, arguments, 0.1))
    return {"scale": context.scale, "lengths": list(lengths), "sizes": sizes}


def _speedups(found: Values) -> list[float]:
    return [slow / fast for slow, fast in zip(found["recurrent"], found["chunkwise"], strict=True)]


def _list(values: Sequence[float]) -> str:
    return ", ".join(str(value) if isinstance(value, int) else f"{value:.3g}" for value in values)


def _rows(values: Values) -> list[Row]:
    rows = []
    judge = values["scale"] != "cpu"
    for dim, found in values["sizes"].items():
        ratios = _speedups(found)
        grows = all(after >= MARGIN * before for before, after in itertools.pairwise(ratios))
        paper = _list(PAPER[int(dim)]) if judge else ""
        rows += [
            Row(
                f"head size {dim}: speed-up forward at lengths {_list(values['lengths'])}",
                paper,
                _list(ratios),
                "grows with the length",
                grows if judge else None,
            ),
            Row(f"head size {dim}: ms forward, chunkwise", "", _list([1e3 * x for x in found["chunkwise"]])),
            Row(f"head size {dim}: ms forward, recurrent", "", _list([1e3 * x for x in found["recurrent"]])),
            Row(
                f"head size {dim}: relative RMS between both outputs, largest",
                "",
                f"{max(found['difference']):.1e}",
                "<= 0.01",
                max(found["difference"]) <= 0.01,
            ),
        ]
    if judge:
        longest = _speedups(values["sizes"]["128"])[-1]
        rows.append(
            Row("head size 128 at 16384 tokens: speed-up", "32.8", f"{longest:.3g}", "at least 20", longest >= 20)
        )
    return rows


def _draw(values: Values, path: Path) -> None:
    figure, ((axes,),) = plotting.figure(1, width=5, height=3.6)
    for color, (dim, found) in zip(("tab:blue", "tab:red", "tab:green"), values["sizes"].items(), strict=False):
        axes.plot(values["lengths"], _speedups(found), "o-", color=color, label=f"head size {dim}, ours")
        if values["scale"] != "cpu":
            axes.plot(values["lengths"], PAPER[int(dim)], "x--", color=color, label=f"head size {dim}, paper", lw=1)
    axes.set(xlabel="sequence length", ylabel="times faster than recurrent", xscale="log", yscale="log")
    axes.set_xticks(values["lengths"], [str(x) for x in values["lengths"]])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    plotting.save(figure, path)


ENTRIES = {
    "figure1": Entry(
        title="Figure 1: the chunkwise form's speed-up over the recurrent form",
        claim="with 16384 tokens in a batch and heads of 64, 128 and 256 that are 2048 wide together, the chunkwise "
        "form is faster by 4 to 37 times; the more, the longer the sequence and the larger the head",
        scales={
            "gpu": "forward only (the paper does not say what it timed); both forms are Mosaic GPU kernels: the "
            "recurrent one keeps 64 columns of the state in a warpgroup's registers, the paper's Triton kernel 8 in a "
            "warp's",
            "cpu": "1024 tokens, one head size, both forms in plain XLA: shows that the entry runs",
        },
        run=_run,
        rows=_rows,
        draw=_draw,
    )
}
