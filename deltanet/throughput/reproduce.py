"""Figure 6 of "Parallelizing Linear Transformers with the Delta Rule over Sequence Length": training throughput."""

from typing import Any

from deltanet.throughput import run
from deltanet.throughput.measure import Shape
from training.report import Context, Entry, Row

LENGTHS = (2048, 4096, 8192, 16384)
PAPER = {  # thousand tokens a second of the 1.3B models, 16,384 tokens a step, on one H100
    "deltanet": (41.5, 41.6, 40.0, 37.3),
    "softmax": (51.3, 46.7, 38.7, 29.1),
    "gla": (43.8, 43.5, 43.2, 41.1),
}
FLA = 137.0  # thousand tokens a second of flash-linear-attention's DeltaNet with 374 million parameters, on one H200
SPREAD = 1.1  # the fastest length over the slowest that still count as flat

_MODELS = {"cpu": ("deltanet", "softmax"), "gpu": ("deltanet", "softmax"), "paper": tuple(PAPER)}
_SIZES = {"cpu": "tiny", "gpu": "340M", "paper": "1.3B"}
_TOKENS = {"cpu": 512, "gpu": 32_768, "paper": 16_384}


def _lengths(scale: str) -> tuple[int, ...]:
    return (64, 128, 256) if scale == "cpu" else LENGTHS


def _run(context: Context) -> dict[str, Any]:
    scale, small = context.scale, context.scale == "cpu"
    lengths = _lengths(scale)
    model = {"vocabulary_size": 256} if small else {"vocabulary_size": 32_000, "remat": "activations"}
    values = run.compare(
        _SIZES[scale],
        _MODELS[scale],
        [Shape(_TOKENS[scale] // length, length) for length in lengths],
        [Shape(16, lengths[0]), Shape(16, lengths[-1])],
        matrix=512 if small else 8192,
        model={**model, "unroll": 24 if scale == "gpu" else 1},
        report=lambda line: print(f"   {line}", flush=True),
    )
    return {"scale": scale, **values}


def _rows(values: dict[str, Any]) -> list[Row]:
    rows = []
    judged = values["scale"] == "gpu"
    for mixer, shapes in values["training"].items():
        rates = [x["tokens_per_second"] / 1e3 for x in shapes.values() if "seconds" in x]
        bar = judged and mixer == "deltanet"
        for shape, found in shapes.items():
            length = int(shape.partition("x")[2])
            paper = str(PAPER[mixer][LENGTHS.index(length)]) if length in LENGTHS else ""
            rate = found["tokens_per_second"] / 1e3 if "seconds" in found else None
            rows.append(
                Row(
                    f"{mixer}, {shape}, thousand tokens/s",
                    f"{paper} (1.3B, H100)" if paper else "",
                    found["skipped"] if rate is None else f"{rate:.1f}",
                    f"above {FLA:.0f}, fla on the same GPU" if bar else "",
                    (rate is not None and rate > FLA) if bar else None,
                )
            )
        if rates:
            spread = max(rates) / min(rates)
            target, met = (f"at most {SPREAD}", spread <= SPREAD) if bar else ("", None)
            rows.append(Row(f"{mixer}, fastest length over slowest", "", f"{spread:.3f}", target, met))
    for mixer, shapes in values["decoding"].items():
        for shape, found in shapes.items():
            ours = found.get("skipped") or (
                f"{found['tokens_per_second']:.0f}; {found['cache_bytes'] / 2**20:.0f} MiB of cache"
            )
            rows.append(Row(f"{mixer}, decoding after {shape}, tokens/s", "", ours))
    return rows


ENTRIES = {
    "figure6": Entry(
        title="Training throughput of language models by sequence length",
        claim=(
            "DeltaNet trains about as fast as GLA at every length, and faster than a Transformer with FlashAttention-2 "
            "from lengths between 8K and 16K on."
        ),
        scales={
            "cpu": "a model with 128 of width and 2 layers, 512 tokens a step: shows that it runs, no more",
            "gpu": (
                "374 million parameters instead of 1.3 billion and 32,768 tokens a step, on an H200, so that fla's "
                "137 thousand tokens/s can be compared; decoding besides"
            ),
            "paper": "1.3 billion parameters and 16,384 tokens a step; Mamba is missing; the GPU is what there is",
        },
        run=_run,
        rows=_rows,
        draw=run.draw,
    )
}
