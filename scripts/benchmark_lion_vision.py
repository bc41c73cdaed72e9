"""Images per second of a training step: LION's vision transformers beside the softmax transformer, synthetic images.

  python scripts/benchmark_lion_vision.py                                  Small at batch 512, Base at 256, all mixers
  python scripts/benchmark_lion_vision.py --models S:512 --mixers softmax lion_s

A step is forward, backward and AdamW at 224 px; parameters are float32 and the model computes in bfloat16. `softmax` is
cuDNN's fused attention. Beside each rate stand the authors' PyTorch code on an H200 (autocast bfloat16, the same batch)
and the time that the mixers' op alone takes in a step, measured by itself.

Writes vision.json, vision.md and vision.png into the results folder.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from lion.attention import lion_attention  # noqa: E402
from lion.layer import snake_orders  # noqa: E402
from lion.vision import SIZES, vision_transformer  # noqa: E402
from models.softmax_attention import fused_attention  # noqa: E402
from training.errors import UserError  # noqa: E402
from training.provenance import provenance  # noqa: E402

MODELS = ("S:512", "B:256")
MIXERS = ("softmax", "lion_lit", "lion_d", "lion_d_two_scans", "lion_s", "lion_s_two_scans")
AUTHORS = {
    "S": dict(zip(MIXERS, (6574, 3127, 2200, 2098, 1754, 1286), strict=True)),
    "B": dict(zip(MIXERS, (2749, 1437, 1037, 971, 832, 610), strict=True)),
}
"""Images per second of the authors' code, batch 512 and 256."""
DIM = 64


def training_step(size: str, mixer: str, batch: int, pixels: int) -> tuple[Callable, list[Any]]:
    """A step, and its arguments: parameters, optimiser state, images and labels."""
    options = {"mixer_options": {"implementation": "cudnn"}} if mixer == "softmax" else {}
    if jax.default_backend() != "gpu":
        options = {}
    model = vision_transformer(size, mixer, image_size=pixels, rngs=nnx.Rngs(0), **options)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(1e-3, weight_decay=0.05)

    def loss(params: nnx.State, images: jax.Array, labels: jax.Array) -> jax.Array:
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        logits = nnx.merge(graph, narrow, rest, copy=True)(images).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params: nnx.State, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, images, labels)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    images = jax.random.normal(jax.random.key(0), (batch, pixels, pixels, 3), jnp.bfloat16)
    labels = jax.random.randint(jax.random.key(1), (batch,), 0, 1000)
    return jax.jit(step, donate_argnums=(0, 1)), [params, optimizer.init(params), images, labels]


def step_seconds(step: Callable, arguments: list[Any], repeats: int) -> tuple[float, int]:
    """The median time of a step, and its temporary memory in bytes."""
    compiled = step.lower(*arguments).compile()
    params, state, *batch = arguments
    samples = []
    for repeat in range(repeats + 1):
        begin = time.perf_counter()
        for _ in range(5):
            params, state, value = compiled(params, state, *batch)
        if not np.isfinite(value):
            raise RuntimeError(f"the loss is {value}")
        if repeat:
            samples.append((time.perf_counter() - begin) / 5)
    return statistics.median(samples), compiled.memory_analysis().temp_size_in_bytes


def op_seconds(size: str, mixer: str, batch: int, pixels: int, repeats: int) -> float:
    """What the attention of all layers takes in a step, forward and backward, without projections and feature maps."""
    side, heads = pixels // 16, SIZES[size]["heads"]
    tokens = (batch, side**2 + 1, heads)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.uniform(key, (*tokens, DIM), jnp.bfloat16) for key in keys[:3])
    shape = {"l": (), "d": (heads,), "s": tokens}[mixer.removeprefix("lion_")[0] if mixer != "softmax" else "l"]
    decay = jax.nn.log_sigmoid(jax.random.normal(keys[3], shape))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array) -> jax.Array:
        if mixer == "softmax":
            return fused_attention(q, k, v)
        if mixer.endswith("two_scans"):
            return lion_attention(q, k, v, (decay, decay), orders=snake_orders((side, side), True))
        return lion_attention(q, k, v, decay if decay.ndim else None)

    @jax.jit
    def both(*arguments: jax.Array) -> Any:
        y, pull = jax.vjp(attend, *arguments)
        return y, pull(y)

    jax.block_until_ready(both(q, k, v, decay))
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(10):
            last = both(q, k, v, decay)
        jax.block_until_ready(last)
        samples.append((time.perf_counter() - begin) / 10)
    return SIZES[size]["depth"] * statistics.median(samples)


def measure(size: str, mixer: str, batch: int, pixels: int, repeats: int) -> dict[str, Any]:
    """Rate, memory and the op's share of one model, or why there are none."""
    try:
        step, arguments = training_step(size, mixer, batch, pixels)
        seconds, memory = step_seconds(step, arguments, repeats)
        op = op_seconds(size, mixer, batch, pixels, repeats)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    return {"rate": batch / seconds, "seconds": seconds, "op_seconds": op, "temporary_bytes": memory}


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    lines = [
        "# Training vision transformers",
        "",
        f"Images per second at {record['pixels']} px, bfloat16, AdamW; milliseconds of a step, and of it those of the "
        "attention op by itself.",
        "",
        "| model | mixer | images/s | authors' PyTorch, H200 | ratio | of softmax | step | op | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, results in record["models"].items():
        softmax = results.get("softmax", {}).get("rate")
        for mixer, result in results.items():
            if "skipped" in result:
                lines.append(f"| {model} | {mixer} | {result['skipped']} | | | | | | |")
                continue
            rate, authors = result["rate"], AUTHORS.get(model.partition(":")[0], {}).get(mixer)
            beside = f"{authors} | {rate / authors:.2f}" if authors else " | "
            share = f"{100 * rate / softmax:.0f} %" if softmax else ""
            step, op = 1e3 * result["seconds"], 1e3 * result["op_seconds"]
            memory = result["temporary_bytes"] / 2**30
            lines.append(
                f"| {model} | {mixer} | {rate:.0f} | {beside} | {share} | {step:.1f} | {op:.1f} | {memory:.1f} |"
            )
    end = f"`{record['command']}`, {record['date']}, revision {record['revision']}, {record['device']}"
    return "\n".join([*lines, "", f"{end}, JAX {record['jax']}.", "", "![Rates](vision.png)", ""])


def draw(record: dict[str, Any], path: Path) -> None:
    """Bars of the rates, one panel a model, with what is to be reached: 1.5 times the authors' code."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(record["models"]), figsize=(6 * len(record["models"]), 3.8), squeeze=False)
    for ax, (model, results) in zip(axes[0], record["models"].items(), strict=True):
        rates = {mixer: result["rate"] for mixer, result in results.items() if "rate" in result}
        authors = AUTHORS.get(model.partition(":")[0], {})
        ax.bar(range(len(rates)), list(rates.values()), label="this code")
        for x, mixer in enumerate(rates):
            if mixer in authors:
                ax.hlines(1.5 * authors[mixer], x - 0.4, x + 0.4, color="black", label=None if x else "1.5 x authors")
        ax.set(title=model, ylabel="images/s", xticks=range(len(rates)))
        ax.set_xticklabels(list(rates), rotation=20, fontsize=8)
        ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_model(text: str) -> tuple[str, int]:
    """Size and batch from the command line."""
    size, _, batch = text.partition(":")
    if size not in SIZES or not batch.isdigit() or not int(batch):
        raise UserError(
            f"a model is size:batch, such as {MODELS[0]}, with a size among {', '.join(SIZES)}; not {text!r}"
        )
    return size, int(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="size:batch")
    parser.add_argument("--mixers", nargs="+", default=MIXERS, choices=MIXERS)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of five steps each")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "lion", help="folder of the results")
    options = parser.parse_args()
    models = [parse_model(text) for text in options.models]
    asked = f"--models {' '.join(options.models)} --mixers {' '.join(options.mixers)} --pixels {options.pixels}"
    command = f"python scripts/{Path(__file__).name} {asked}"
    record = {"command": command, **provenance(), "pixels": options.pixels, "models": {}}
    options.results.mkdir(parents=True, exist_ok=True)
    for text, (size, batch) in zip(options.models, models, strict=True):
        results = record["models"][text] = {}
        for mixer in options.mixers:
            results[mixer] = measure(size, mixer, batch, options.pixels, options.repeats)
            print(text, mixer, json.dumps(results[mixer]), flush=True)
            (options.results / "vision.json").write_text(json.dumps(record, indent=1) + "\n")
            (options.results / "vision.md").write_text(table(record))
        draw(record, options.results / "vision.png")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
