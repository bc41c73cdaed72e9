"""Times training steps and decoding of language models, DeltaNet beside softmax attention of the same size.

  python scripts/benchmark_language_model.py                                 340M, 32,768 tokens a step, 2K to 16K
  python scripts/benchmark_language_model.py --mixers deltanet gla --shapes 16x2048 --decode
  python scripts/benchmark_language_model.py --size tiny --shapes 2x64 --decode 2x64 --matrix 64             a CPU

A training step is whole: random tokens, forward, chunked cross-entropy, backward, clipping, AdamW, with float32
parameters and bfloat16 computation, as the training loop runs it. Every program is compiled before the first is timed.

Writes language_model_throughput.json, .md and .png into the results folder.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deltanet.language import MIXERS, SIZES  # noqa: E402
from deltanet.throughput import run  # noqa: E402
from deltanet.throughput.measure import Shape  # noqa: E402
from training.errors import UserError, reported  # noqa: E402
from training.provenance import provenance  # noqa: E402

NAME = "language_model_throughput"


def parse_shape(text: str) -> Shape:
    """A shape from the command line."""
    try:
        return Shape(*map(int, text.split("x")))
    except (TypeError, ValueError):
        raise UserError(f"a shape is batch x length, such as 16x2048, not {text!r}") from None


def page(record: dict) -> str:
    """The record as a Markdown page."""
    parameters = ", ".join(f"{mixer} {count:,}" for mixer, count in record["values"]["parameters"].items() if count)
    lines = [
        f"# Throughput of language models, size {record['values']['size']}",
        "",
        f"Parameters: {parameters}.",
        "",
        *run.tables(record["values"]),
        "",
        f"`{record['command']}`, {record['date']}, revision {record['revision']}, {record['device']}, "
        f"JAX {record['jax']}.",
        "",
        f"![Tokens a second]({NAME}.png)",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="340M")
    parser.add_argument("--mixers", nargs="+", choices=tuple(MIXERS), default=("deltanet", "softmax"), metavar="MIXER")
    parser.add_argument("--shapes", nargs="*", default=("16x2048", "8x4096", "4x8192", "2x16384"), metavar="BxT")
    parser.add_argument("--decode", nargs="*", default=("16x2048", "16x16384"), metavar="BxT", help="and context")
    parser.add_argument("--repeats", type=int, default=5, help="dispatches of two steps that are timed")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--matrix", type=int, default=8192, help="size of the product whose rate is the yardstick")
    parser.add_argument("--remat", default="activations", help="what the backward keeps, see models.language_model")
    parser.add_argument("--unroll", type=int, default=24, help="layers in a turn of the loop over them")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "deltanet", help="folder of the results")
    options = parser.parse_args()
    model = {"vocabulary_size": options.vocabulary, "remat": options.remat, "unroll": options.unroll}
    values = run.compare(
        options.size,
        options.mixers,
        [parse_shape(text) for text in options.shapes],
        [parse_shape(text) for text in options.decode],
        repeats=options.repeats,
        matrix=options.matrix,
        model=model,
        report=lambda line: print(line, flush=True),
    )
    command = f"python scripts/{Path(__file__).name} {' '.join(sys.argv[1:])}".rstrip()
    record = {"command": command, **provenance(), "values": values}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / f"{NAME}.md").write_text(page(record))
    run.draw(values, options.results / f"{NAME}.png")


if __name__ == "__main__":
    with reported():
        main()
