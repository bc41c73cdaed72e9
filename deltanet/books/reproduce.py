"""Language models of one size and recipe with different mixers, on classic books; held-out books, WikiText-2, LAMBADA.

The paper's Table 1 has models of 340 million parameters on 15 billion tokens; its order is what can be compared.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deltanet.books.rows import ABLATIONS, SEEDS, TABLE, rates
from training import plotting
from training.report import Context, Entry, Row
from training.step import replica_points

CONFIG = "configs/deltanet/books.py"
Values = dict[str, Any]


class Printed(NamedTuple):
    """What the paper prints of a row at 340 million parameters."""

    title: str
    wikitext: float | None = None
    lambada: float | None = None


TITLES = {
    "softmax": Printed("Transformer++ (softmax, RoPE)", 28.39, 42.69),
    "retnet": Printed("RetNet", 32.33, 49.19),
    "mamba2": Printed("Mamba-2-like"),
    "gla": Printed("GLA", 28.65, 43.35),
    "linear_attention": Printed("linear attention"),
    "deltanet": Printed("DeltaNet", 28.24, 37.37),
    "deltanet_no_conv": Printed("DeltaNet without convolution", 29.08, 50.87),
    "deltanet_sliding_256": Printed("DeltaNet + sliding attention (window 256)", 27.06, 38.17),
    "deltanet_global": Printed("DeltaNet + two layers of attention", 27.51, 35.04),
    "gated_deltanet_matched": Printed("Gated DeltaNet"),
    "deltanet_l1_elu": Printed("DeltaNet, L1 and 1 + ELU", 31.12, 55.96),
    "deltanet_l2_elu": Printed("DeltaNet, L2 and 1 + ELU", 28.03, 37.62),
    "deltanet_l2_relu": Printed("DeltaNet, L2 and ReLU", 28.75, 43.53),
}


MEASURES = {
    "books": ("books/word_perplexity", "held-out books, perplexity of words"),
    "wikitext_valid": ("wikitext_valid/word_perplexity", "WikiText-2 validation, perplexity of words"),
    "wikitext_test": ("wikitext_test/word_perplexity", "WikiText-2 test, perplexity of words"),
    "lambada": ("lambada/perplexity", "LAMBADA, perplexity of last words"),
    "lambada_accuracy": ("lambada/accuracy", "LAMBADA, accuracy"),
    "repeated": ("books/loss_repeated", "held-out books, loss of repeated bigrams"),
    "new": ("books/loss_new", "held-out books, loss of other tokens"),
    "last": ("books/loss_by_position", "held-out books, loss in the last eighth of the window"),
}

ROWS: dict[str, dict[str, Sequence[str]]] = {
    "table1": {"cpu": ("softmax", "deltanet"), "gpu": TABLE, "paper": TABLE},
    "ablations": {"gpu": ABLATIONS, "paper": ABLATIONS},
}


def _run(name: str, context: Context) -> Values:
    found = {}
    for row in ROWS[name][context.scale]:
        first = _train(context, row, f"model.mixer={row}", {})
        if first is None:
            continue
        losses = [result["books/loss"] for result in first]
        best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
        rate = rates(context.scale)[best]
        overrides = {"seeds": SEEDS[1:], "replicate": (("optimizer.learning_rate", (rate,)),)}
        others = None if context.scale == "cpu" else _train(context, row, f"seeds/model.mixer={row}", overrides)
        tried = {str(rate): loss for rate, loss in zip(rates(context.scale), losses, strict=True)}
        found[row] = {"rate": rate, "tried": tried, "measures": _measures([first[best], *(others or ())])}
    return {"scale": context.scale, "rows": found}


def _train(context: Context, row: str, name: str, overrides: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The metrics of each replica; None where only finished trainings count and this is not."""
    name, config = f"books/{name}", f"{CONFIG}:scale={context.scale}"
    metrics = context.metrics(name, config, {"model.mixer": row, **overrides})
    if metrics is None:
        return None
    count = len(replica_points(context.runs[name].config))
    return [{key: value[i] if count > 1 else value for key, value in metrics.items()} for i in range(count)]


def _measures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Each measure that was taken, by seed."""
    return {
        name: [float(np.ravel(result[key])[-1]) for result in metrics]
        for name, (key, _) in MEASURES.items()
        if key in metrics[0]
    }


def _rows(values: Values) -> list[Row]:
    rows = []
    for name, found in values["rows"].items():
        title, wikitext, lambada = TITLES[name]
        paper = {"wikitext_test": wikitext, "lambada": lambada}
        for measure, seeds in found["measures"].items():
            printed = f"{paper[measure]} (340M, 15B tokens)" if paper.get(measure) else ""
            rows.append(Row(f"{title}: {MEASURES[measure][1]}", printed, _mean_and_range(seeds)))
        tried = ", ".join(f"{loss:.4f} at {rate}" for rate, loss in found["tried"].items())
        rows.append(Row(f"{title}: loss of held-out books by learning rate, first seed", "", tried))
    return rows


def _mean_and_range(seeds: Sequence[float]) -> str:
    mean = f"{np.mean(seeds):.4g}"
    return mean if len(seeds) == 1 else f"{mean} ({min(seeds):.4g} to {max(seeds):.4g}, {len(seeds)} seeds)"


def _draw(values: Values, path: Path) -> None:
    shown = [m for m in ("books", "wikitext_test", "lambada") if m in next(iter(values["rows"].values()))["measures"]]
    height = 1.2 + 0.3 * len(values["rows"])
    drawn, axes = plotting.figure(len(shown), width=4, height=height)
    names = list(values["rows"])
    for i, (axis, measure) in enumerate(zip(axes[0], shown, strict=True)):
        for place, name in enumerate(names):
            seeds = values["rows"][name]["measures"][measure]
            axis.plot(seeds, [place] * len(seeds), "o", ms=4, color=f"C{place}")
        axis.set(title=MEASURES[measure][1].replace(", ", "\n"), yticks=range(len(names)))
        axis.set_yticklabels([TITLES[name].title for name in names] if i == 0 else [])
        axis.title.set_fontsize(9)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
    plotting.save(drawn, path)


_CPU = "models with 2 layers of width 128, 400 steps, held-out books alone: shows that it runs, no more"
_BOOKS = (
    "models of 29 million parameters (6 layers of width 512, tied embeddings) and {tokens} million tokens ({epochs} of "
    "45 classic books) instead of 340 million and 15 billion; windows of 1024; WikiText-2's validation and test texts "
    "detokenised, in windows without context before them; for each row the best of three learning rates by the loss of "
    "held-out books at the first seed, then three seeds"
)
_SCALES = {
    "cpu": _CPU,
    "gpu": _BOOKS.format(tokens=7, epochs="one epoch"),
    "paper": _BOOKS.format(tokens=29, epochs="four epochs"),
}


def _entry(name: str, title: str, claim: str) -> Entry:
    scales = {scale: _SCALES[scale] for scale in ROWS[name]}
    return Entry(title, claim, scales, partial(_run, name), _rows, _draw)


ENTRIES = {
    "table1": _entry(
        "table1",
        "Table 1 in miniature: ten mixers on classic books",
        "at 340M parameters WikiText perplexity is 28.24 for DeltaNet, 27.06 with sliding attention in every other "
        "layer, 27.51 with two layers of attention, 28.39 for Transformer++, 28.65 for GLA, 32.33 for RetNet",
    ),
    "ablations": _entry(
        "ablations",
        "Ablations in miniature: feature map, norm and convolution of DeltaNet on classic books",
        "WikiText perplexity 28.24 with L2 and SiLU, 28.03 with L2 and 1 + ELU, 28.75 with L2 and ReLU, 31.12 with L1 "
        "and 1 + ELU, 29.08 without convolution",
    ),
}
