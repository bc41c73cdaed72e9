"""Figures 1 and 5 of "On the Robustness of Transformers against Context Hijacking", as far as they need no weights.

Figure 1 of the paper is GPT-2 in four sizes, where depth, width and the number of parameters grow together; with local
weights `scripts/score_hijacking.py` measures it. Here depth alone varies, on a corpus of invented facts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from icl.hijacking import figures
from icl.hijacking.language import scoring
from icl.hijacking.language.corpus import hijacking_prompts
from icl.hijacking.measure import depth_trend
from icl.reporting import config_file, judged, numbers
from training.loop import make_program
from training.report import Context, Entry, Row
from training.step import replica_points

CONFIGS = "configs/icl/hijacking"
MOST = 7

Values = dict[str, Any]


def _run_facts(context: Context) -> Values:
    cells = []
    for layers in (1, 2) if context.scale == "cpu" else (1, 2, 4, 8):
        name = f"facts/layers={layers}"
        if context.leaves_out(name):
            continue
        run = context.train(name, config_file(CONFIGS, "facts", context, layers=layers))
        facts, corpora = make_program(run.config).task().facts, run.config.task.corpora
        chosen = np.array([int(values["task.corpus"]) for _, values in replica_points(run.config)])
        asked = [
            hijacking_prompts(facts, 200 if context.scale == "cpu" else 500, MOST, other) for other in (False, True)
        ]
        for number, (redrawn, negation) in enumerate(corpora):
            models = [model for model, corpus in zip(run.result.models, chosen, strict=True) if corpus == number]
            seeds = [_hijack(model, asked) for model in models]
            losses = {kind: _of(run.result.metrics[f"{kind}/loss"], chosen == number) for kind in ("stated", "redrawn")}
            corpus = {"corpus": number, "context": redrawn, "negation": negation}
            cells.append({"layers": layers, **corpus, "seeds": seeds, "losses": losses})
    cells.sort(key=lambda cell: cell["corpus"])  # depths of one corpus together
    return {"scale": context.scale, "cells": cells, "panels": _panels(cells)}


def _of(metric: Any, chosen: np.ndarray) -> list[float]:
    return np.atleast_1d(metric)[chosen].tolist()


def _hijack(model: nnx.Module, asked: Sequence[tuple[list, list]]) -> Values:
    """One model under 0 to `MOST` denials of the subject asked about, and of another subject."""
    found: Values = {}
    for name, prompts in zip(("attack", "control"), asked, strict=True):
        scores = scoring.score_tokens(model, *prompts)
        known = scoring.known(scores)
        kept = scoring.Scores(*(array[known] for array in scores)) if known.any() else scores
        flips = scoring.first_flips(kept)["error"]
        found[name] = {
            "known": float(known.mean()),
            "right": (kept.top == kept.correct_token[:, None]).mean(0).tolist(),
            "hijacked": (kept.top == kept.error_token[:, None]).mean(0).tolist(),
            "survival": scoring.survival(flips, MOST).tolist(),
            "time": scoring.flip_time(flips, MOST)._asdict(),
        }
    return found


def _panels(cells: list[Values]) -> list[Values]:
    """Share of answers that are the denied value, attack and control, a panel for each corpus."""
    panels = []
    for key in dict.fromkeys((cell["context"], cell["negation"]) for cell in cells):
        series = {}
        for cell in cells:
            if (cell["context"], cell["negation"]) == key:
                for name in ("attack", "control"):
                    series[f"{cell['layers']} layers, {name}"] = np.array(
                        [seed[name]["hijacked"] for seed in cell["seeds"]]
                    ).T.tolist()
        panels.append(
            {
                "title": f"redrawn {key[0]:g}, negations {key[1]:g}",
                "xlabel": "true denials k",
                "ylabel": "answers with the denied value",
                "x": list(range(MOST + 1)),
                "series": series,
            }
        )
    return panels


def _rows_facts(values: Values) -> list[Row]:
    rows = []
    for cell in values["cells"]:
        name = f"{cell['layers']} layers, redrawn {cell['context']:g}, negations {cell['negation']:g}"
        known = [seed["attack"]["known"] for seed in cell["seeds"]]
        rows.append(
            judged(
                values["scale"], f"{name}: recall without denials", "", numbers(known), ">= 0.98", min(known) >= 0.98
            )
        )
        excess = np.array(
            [np.subtract(seed["attack"]["hijacked"], seed["control"]["hijacked"]) for seed in cell["seeds"]]
        )
        at = [1, 4, MOST]
        attack = np.mean([seed["attack"]["hijacked"] for seed in cell["seeds"]], axis=0)[at]
        times = [seed["attack"]["time"] for seed in cell["seeds"]]
        rows += [
            Row(
                f"{name}: hijacked at k = 1, 4, {MOST}; in excess of the control (mean, least, largest)",
                "falls with depth",
                f"{numbers(attack)}; "
                + "; ".join(f"{e.mean():+.3f}, {e.min():+.3f}, {e.max():+.3f}" for e in excess[:, at].T),
            ),
            Row(
                f"{name}: denials to flip, restricted mean (95 %, first seed); mean over flipped, by seed",
                "grows with depth",
                f"{np.mean([t['restricted_mean'] for t in times]):.2f} "
                f"({times[0]['low']:.2f} to {times[0]['high']:.2f}); {numbers([t['flipped_mean'] for t in times])}",
            ),
            Row(
                f"{name}: loss on stated and on redrawn documents",
                "",
                numbers([np.mean(cell["losses"][kind]) for kind in ("stated", "redrawn")], 4),
            ),
        ]
        if cell["layers"] == values["cells"][-1]["layers"]:
            rows.append(_fact_trend(values["cells"], cell["context"], cell["negation"]))
    return rows


def _fact_trend(cells: list[Values], redrawn: float, negation: float) -> Row:
    group = [cell for cell in cells if (cell["context"], cell["negation"]) == (redrawn, negation)]
    excess = [
        [np.mean(np.subtract(seed["attack"]["hijacked"], seed["control"]["hijacked"])[1:]) for seed in cell["seeds"]]
        for cell in group
    ]
    text, verdict = depth_trend([cell["layers"] for cell in group], excess)
    name = f"redrawn {redrawn:g}, negations {negation:g}: hijacked in excess of the control, mean over k = 1 to {MOST}"
    return Row(f"{name}, by depth", "falls with depth", f"{text}: {verdict}")


def _run_figure5(context: Context) -> Values:
    cells = []
    for layers in (4, 5) if context.scale == "cpu" else (1, 2, 3, 4, 5, 6, 7, 8):
        run = context.train(f"in_context/layers={layers}", config_file(CONFIGS, "in_context", context, layers=layers))
        accuracy = np.atleast_2d(run.result.metrics["hijacked/accuracy"])
        cells.append({"layers": layers, "accuracy": accuracy.T.tolist(), "last": run.result.metrics["last"]})
    panel = {
        "title": "GPT-2-style models",
        "xlabel": "hijacking tokens N",
        "ylabel": "accuracy",
        "x": list(range(len(cells[0]["accuracy"]))),
        "series": {f"L = {cell['layers']}": cell["accuracy"] for cell in cells},
    }
    return {"scale": context.scale, "cells": cells, "panels": [panel]}


_FIGURE5 = {
    7: (0.805, 0.75, 0.725, 0.72),
    6: (0.79, 0.735, 0.705, 0.705),
    5: (0.80, 0.695, 0.63, 0.61),
    4: (0.80, 0.66, 0.565, 0.51),
}


def _rows_figure5(values: Values) -> list[Row]:
    rows = []
    for cell in values["cells"]:
        accuracy = np.mean(cell["accuracy"], axis=1)
        at = [n for n in (2, 5, 10, 20) if n < len(accuracy)]
        paper = numbers(_FIGURE5[cell["layers"]]) if cell["layers"] in _FIGURE5 else ""
        rows.append(
            Row(f"L = {cell['layers']}: accuracy at N = {', '.join(map(str, at))}", paper, numbers(accuracy[at]))
        )
        ends = f"{accuracy[-2]:.3f}, {accuracy[-1]:.3f}"
        rows.append(Row(f"L = {cell['layers']}: at the last two lengths", "falls off a cliff at 40", ends))
    return rows


ENTRIES = {
    "facts": Entry(
        "Figure 1's question on invented facts: does depth protect an answer against true denials?",
        "more denials are needed to flip larger GPT-2 models; depth, width and size grow together there",
        {
            "cpu": "100 facts' subjects, width 64, 1 and 2 layers, 1 seed, 2400 steps; no pretrained weights",
            "gpu": "400 subjects, width 128, 1, 2, 4 and 8 layers, 5 seeds, 6 corpora; no pretrained weights",
        },
        _run_facts,
        _rows_facts,
        figures.panels,
    ),
    "figure5": Entry(
        "Figure 5: GPT-2-style models that classify in context, by depth",
        "accuracy falls with N and rises with L; at N = 40 the curves fall off a cliff",
        {
            "cpu": "d = 5, 10 pairs, width 32, 4 and 5 layers, 1 seed, 1000 steps",
            "gpu": "60000 steps instead of 600000; 3 seeds; 1 to 8 layers instead of 4 to 7",
            "paper": "3 seeds; 1 to 8 layers instead of 4 to 7; spread 0.1",
        },
        _run_figure5,
        _rows_figure5,
        figures.panels,
    ),
}
