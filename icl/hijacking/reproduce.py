"""The figures of "On the Robustness of Transformers against Context Hijacking for Linear Classification" (v1).

The theory's optima are computed, not trained. For trained transformers the clean excess stands beside the robust
accuracy: the paper's depths differ in clean quality, and only depths of equal excess say something about depth itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icl.hijacking import figures, measure, theory
from icl.hijacking.theory import SIGN_MEAN
from icl.reporting import config_file, judged, numbers
from training.report import Context, Entry, Row, Run
from training.step import replica_points

CONFIGS = "configs/icl/hijacking"
DEPTHS = (1, 2, 4, 8)
COUNTS = (0, 1, 2, 5, 10, 20, 30, 40, 60, 80, 120, 160)
WIDE, NARROW = math.sqrt(0.1), 0.1

Values = dict[str, Any]


def _by_scale(context: Context, cpu: Any, larger: Any) -> Any:
    return cpu if context.scale == "cpu" else larger


def _spread_name(spread: float) -> str:
    return f"s^2 = {spread**2:.2g}"


# The optimum of the theory.


def _optimum(spread: float, d: int, n: int, layers: int, prompts: int) -> theory.Optimum:
    return theory.optimum(theory.sample_spectra(11, d, spread, n, prompts), layers, n)


def _run_optima(context: Context) -> Values:
    prompts, lengths = _by_scale(context, (1500, (10, 50, 400)), (6000, (10, 20, 30, 40, 50, 100, 400, 1600)))
    cells = []
    for spread in _by_scale(context, (NARROW, WIDE), (0.05, NARROW, WIDE)):
        for d in _by_scale(context, (20,), (15, 20, 25)):
            constants = theory.prior(d, spread)
            for n in lengths:
                spectra = theory.sample_spectra(11, d, spread, n, prompts)
                for layers in DEPTHS:
                    best = theory.optimum(spectra, layers, n)
                    cells.append(
                        {"spread": spread, "d": d, "n": n, "layers": layers, **best._asdict(), "m": constants.m}
                    )
    return {"scale": context.scale, "cells": cells}


# alpha n L at d = 20 by an independent computation, for L = 1, 2, 4, 8.
_ALPHA_N_L = {
    (NARROW, 10): (0.0080, 0.0081, 0.0081, 0.0081),
    (NARROW, 50): (0.0393, 0.0399, 0.0402, 0.0404),
    (NARROW, 400): (0.2452, 0.2642, 0.2743, 0.2794),
    (NARROW, 1600): (0.5615, 0.6812, 0.7532, 0.7928),
    (WIDE, 10): (0.0624, 0.0663, 0.0683, 0.0693),
    (WIDE, 50): (0.2506, 0.2851, 0.3023, 0.3109),
    (WIDE, 400): (0.7287, 1.0358, 1.2226, 1.3299),
    (WIDE, 1600): (0.9135, 1.4993, 1.9521, 2.2544),
}


def _grouped(cells: Sequence[Values], *keys: str) -> dict[tuple, list[Values]]:
    groups: dict[tuple, list[Values]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    return groups


def _rows_optima(values: Values) -> list[Row]:
    rows = []
    for (spread, d, n), cells in _grouped(values["cells"], "spread", "d", "n").items():
        name = f"{_spread_name(spread)}, d = {d}, n = {n}"
        products = [cell["alpha"] * n * cell["layers"] for cell in cells]
        reference = _ALPHA_N_L.get((spread, n)) if d == 20 else None
        target = "" if reference is None else f"within 5 % of {numbers(reference)}"
        passed = None if reference is None else bool(np.allclose(products, reference, rtol=0.05))
        rows.append(Row(f"{name}: alpha n L for L = 1, 2, 4, 8", "~ 1/(n L)", numbers(products), target, passed))
        if n <= 50:
            flat = max(products) / min(products)
            rows.append(Row(f"{name}: largest / least alpha L", "1", f"{flat:.3f}", "< 1.25", flat < 1.25))
        if n <= 100:
            starts = [cell["c"] for cell in cells]
            ideal = SIGN_MEAN * cells[0]["m"]
            text = f"within 0.005 of {ideal:.4f}"
            near = bool(max(abs(c - ideal) for c in starts) < 0.005)
            rows.append(Row(f"{name}: c", f"constant, {SIGN_MEAN:.3f}", numbers(starts, 4), text, near))
        rows.append(Row(f"{name}: excess", "O(d/n)", numbers([cell["excess"] for cell in cells])))
    for (spread, d), cells in _grouped(values["cells"], "spread", "d").items():
        alphas = {cell["n"]: cell["alpha"] for cell in cells if cell["layers"] == 1}
        first, last = (alphas[n] for n in (10, 50))
        ours = f"{first:.3g}, {last:.3g}"
        what = f"{_spread_name(spread)}, d = {d}: alpha of one step at n = 10, 50"
        rows.append(Row(what, "falls as 1/n (figure 2: 3.5 x)", ours))
    return rows


def _draw_optima(values: Values, path: Path) -> None:
    shown = []
    for (spread, d), cells in _grouped(values["cells"], "spread", "d").items():
        lengths = sorted({cell["n"] for cell in cells})
        found = {(cell["n"], cell["layers"]): cell["alpha"] * cell["layers"] for cell in cells}
        series = {f"L = {layers}": [found[n, layers] for n in lengths] for layers in DEPTHS}
        shown.append(
            {
                "title": f"{_spread_name(spread)}, d = {d}",
                "xlabel": "context length n",
                "ylabel": "optimal alpha L",
                "x": lengths,
                "series": series,
                "axes": {"xscale": "log", "yscale": "log"},
            }
        )
    figures.panels({"panels": shown}, path)


# Robust accuracy of the optimum.


def _run_exact(context: Context) -> Values:
    prompts, draws = _by_scale(context, (1500, 100_000), (6000, 1_000_000))
    cells = []
    for spread in (NARROW, WIDE):
        geometry, start = theory.sample_geometry(12, 20, spread, draws), SIGN_MEAN * theory.prior(20, spread).m
        for n in _by_scale(context, (20, 40, 400), (20, 40, 100, 400, 1600)):
            spectra = theory.sample_spectra(11, 20, spread, n, prompts)
            for layers in DEPTHS:
                best = theory.optimum(spectra, layers, n)
                fixed = theory.Optimum(1 / (n * layers), start, math.nan)
                for sigma in (0.1, 0.4):
                    accuracy, constant = (
                        [theory.robust_accuracy(geometry, sigma, chosen, count, layers) for count in COUNTS]
                        for chosen in (best, fixed)
                    )
                    cells.append(
                        {
                            "spread": spread,
                            "n": n,
                            "layers": layers,
                            "sigma": sigma,
                            "alpha": best.alpha,
                            "accuracy": accuracy,
                            "fixed": constant,
                        }
                    )
    return {"scale": context.scale, "cells": cells}


def _rows_exact(values: Values) -> list[Row]:
    """The sign of the effect of depth by `rho = N r / n`, over cells that are neither saturated nor divergent."""
    below, above, rows = [], [], []
    for (spread, n, sigma), cells in _grouped(values["cells"], "spread", "n", "sigma").items():
        shallow, deep = cells[0], cells[-1]
        for i, count in enumerate(COUNTS):
            pair = shallow["accuracy"][i], deep["accuracy"][i]
            if count and shallow["alpha"] * count * 20 < 1 and all(0.05 <= a <= 0.95 for a in pair):
                ratio = count * 19 / n
                (below if ratio <= 0.5 else above if ratio >= 2 else []).append(pair[1] - pair[0])
        at = [COUNTS.index(count) for count in (1, 5, 20)]
        name = f"{_spread_name(spread)}, n = {n}, sigma = {sigma:g}"
        constant = [cell["fixed"][at[-1]] for cell in cells]
        what = f"{name}: alpha = 1 / (n L) instead of the optimum, N = 20, L = 1, 2, 4, 8"
        rises = bool(np.all(np.diff(constant) > -0.002)) if n >= 400 else None
        rows.append(Row(what, "rises with L", numbers(constant), "rises (n >= 400)" if n >= 400 else "", rises))
        for cell in (shallow, deep):
            what = f"{name}, L = {cell['layers']}: accuracy at N = 1, 5, 20"
            rows.append(Row(what, "", numbers([cell["accuracy"][i] for i in at])))
    verdicts = [
        ("accuracy of 8 layers minus that of 1, mean rho <= 1/2", below, "deeper is more robust", "negative", max),
        ("the same, mean rho >= 2", above, "deeper is more robust", "positive", min),
    ]
    for name, found, paper, target, worst in verdicts:
        holds = bool(found) and (worst(found) < 0.002 if target == "negative" else worst(found) > -0.002)
        ours = f"{min(found):+.4f} to {max(found):+.4f} in {len(found)} cells" if found else "no such cell"
        rows.insert(0, Row(name, paper, ours, target, holds))
    return rows


def _draw_exact(values: Values, path: Path) -> None:
    shown = [
        {
            "title": f"{_spread_name(spread)}, n = {n}, sigma = {sigma:g}",
            "xlabel": "hijacking tokens N",
            "ylabel": "accuracy",
            "x": COUNTS,
            "series": {f"L = {cell['layers']}": cell["accuracy"] for cell in cells},
        }
        for (spread, n, sigma), cells in _grouped(values["cells"], "spread", "n", "sigma").items()
    ]
    figures.panels({"panels": shown}, path)


# Figure 2: the stated set-up, and the noise of a search on single queries.


_FIGURE2_RATES = {10: (11.9, 1.5), 30: (7.2, 0.9), 50: (3.4, 0.4)}  # x 1e-4, at 1 and 8 steps
_FIGURE2_ACCURACY = {10: (0.49, 0.735), 30: (0.35, 0.85), 50: (0.63, 0.98)}


def _run_figure2(context: Context) -> Values:
    prompts = _by_scale(context, 1500, 6000)
    cells = []
    for spread in (0.05, NARROW, WIDE):
        geometry = theory.sample_geometry(12, 20, spread, 100_000)
        for n in (10, 30, 50):
            spectra = theory.sample_spectra(11, 20, spread, n, prompts)
            for layers in range(1, 9):
                best = theory.optimum(spectra, layers, n)
                accuracy = {str(k): theory.robust_accuracy(geometry, 0.1, best, k, layers) for k in (1, n, 50)}
                cells.append({"spread": spread, "n": n, "layers": layers, "alpha": best.alpha, "accuracy": accuracy})
    noise = [
        {"n": n, "prompts": count, "alphas": [theory.searched_rate(seed, 20, NARROW, n, count) for seed in range(6)]}
        for n in (10, 50)
        for count in _by_scale(context, (1000, 10_000), (1000, 10_000, 100_000))
    ]
    return {"scale": context.scale, "cells": cells, "noise": noise}


def _rows_figure2(values: Values) -> list[Row]:
    rows = []
    for (spread, n), cells in _grouped(values["cells"], "spread", "n").items():
        name = f"{_spread_name(spread)}, n = {n}"
        alphas = [cell["alpha"] for cell in cells]
        falls = np.array(alphas) * np.arange(1, 9) / alphas[0]
        printed = numbers([1e-4 * rate for rate in _FIGURE2_RATES[n]])
        rows.append(
            Row(
                f"{name}: step size at L = 1, 8",
                printed,
                f"{alphas[0]:.3g}, {alphas[-1]:.3g}",
                "alpha L constant within 5 % (s^2 <= 0.01)",
                bool(np.abs(falls - 1).max() <= 0.05) if spread <= NARROW else None,
            )
        )
        for count in dict.fromkeys(("1", str(n), "50")):
            ends = [cells[i]["accuracy"][count] for i in (0, -1)]
            rows.append(
                Row(f"{name}: accuracy with N = {count} at L = 1, 8", numbers(_FIGURE2_ACCURACY[n]), numbers(ends))
            )
    for cell in values["noise"]:
        mean, deviation = np.mean(cell["alphas"]), np.std(cell["alphas"])
        rows.append(
            Row(
                f"step size found on {cell['prompts']} single queries, n = {cell['n']}, L = 1",
                "",
                f"{mean:.2g} ± {deviation:.2g}",
            )
        )
    return rows


def _draw_figure2(values: Values, path: Path) -> None:
    shown = []
    for n in (10, 30, 50):
        cells = [cell for cell in values["cells"] if cell["n"] == n]
        for what, ylabel in (("alpha", "optimal step size"), ("accuracy", "accuracy, N = n, sigma = 0.1")):
            series = {
                _spread_name(spread): [c["alpha"] if what == "alpha" else c["accuracy"][str(n)] for c in group]
                for (spread,), group in _grouped(cells, "spread").items()
            }
            axes = {"yscale": "log"} if what == "alpha" else {}
            shown.append(
                {"title": f"n = {n}", "xlabel": "L", "ylabel": ylabel, "x": range(1, 9), "series": series, "axes": axes}
            )
    figures.panels({"panels": shown}, path)


# The Bayes ceiling of figure 4.


def _run_ceiling(context: Context) -> Values:
    prompts, sweeps = _by_scale(context, (200, 60), (400, 1000))
    lengths = (0, 1, 10, 40, 160)
    found = {str(s): measure.bayes_accuracy(20, s, lengths, prompts, sweeps) for s in (0.05, NARROW, WIDE)}
    return {"scale": context.scale, "lengths": lengths, "ceiling": found}


_CEILING = {NARROW: (0.9695, 0.9697, 0.9700, 0.9716, 0.9766), WIDE: (0.9058, 0.9053, 0.9123, 0.9247, 0.9569)}


def _rows_ceiling(values: Values) -> list[Row]:
    rows = []
    for text, found in values["ceiling"].items():
        spread = float(text)
        means, errors = ([point[key] for point in found] for key in ("mean", "error"))
        reference = next((r for s, r in _CEILING.items() if math.isclose(s, spread)), None)
        target, passed = "", None
        if reference:
            target = f"within 4 standard errors + 0.002 of {numbers(reference, 4)}"
            passed = bool(np.all(np.abs(np.subtract(means, reference)) <= 4 * np.array(errors) + 0.002))
        paper = "0.999 to 1.000 from 10 examples on" if math.isclose(spread, NARROW) else ""
        what = f"{_spread_name(spread)}: posterior mean with 0, 1, 10, 40, 160 examples"
        rows.append(Row(what, paper, numbers(means, 4), target, passed))
    return rows


def _draw_ceiling(values: Values, path: Path) -> None:
    series = {_spread_name(float(s)): [p["mean"] for p in found] for s, found in values["ceiling"].items()}
    panel = {
        "title": "posterior-mean classifier",
        "xlabel": "examples",
        "ylabel": "accuracy",
        "x": values["lengths"],
        "series": series,
    }
    figures.panels({"panels": [panel]}, path)


# Figures 3, 4 and 6: trained linear transformers.


def _depths(context: Context) -> tuple[int, ...]:
    return _by_scale(context, (1, 2, 4), tuple(range(1, 9)))


def _transformers(context: Context) -> Iterator[tuple[bool, int, Run]]:
    """The trainings by length of the context and depth; with `--finished_only` those that are finished."""
    for varied in (False, True):
        for layers in _depths(context):
            name = f"transformers/varied={varied},layers={layers}"
            config = config_file(CONFIGS, "transformers", context, layers=layers, varied=str(varied).lower())
            if context.scale == "paper":
                config += ",reduced=true"
            if not context.leaves_out(name):
                yield varied, layers, context.train(name, config)


def _by_spread(run: Run) -> dict[float, list]:
    groups: dict[float, list] = {}
    for (_, replicated), model in zip(replica_points(run.config), run.result.models, strict=True):
        groups.setdefault(replicated["task.spread"], []).append(model)
    return groups


def _run_transformers(context: Context, sigmas: Sequence[float]) -> Values:
    prompts = _by_scale(context, 4000, 20_000)
    cells = []
    for varied, layers, run in _transformers(context):
        d, n = run.config.task.dimension, run.config.task.examples
        for spread, models in _by_spread(run).items():
            clean = measure.clean_quality(models, d, spread, (n,), prompts)
            for sigma in sigmas:
                cells.append(
                    {
                        "varied": varied,
                        "layers": layers,
                        "spread": spread,
                        "sigma": sigma,
                        "excess": clean["excess"][0],
                        "median": clean["median"][0],
                        **measure.robust_accuracy(models, d, spread, sigma, COUNTS, prompts),
                        "descent": _descent(d, n, spread, sigma, layers),
                    }
                )
    return {"scale": context.scale, "cells": cells, "panels": _panels(cells)}


def _descent(d: int, n: int, spread: float, sigma: float, layers: int) -> list[float]:
    """Robust accuracy of the theory's optimum."""
    best = _optimum(spread, d, n, layers, 3000)
    geometry = theory.sample_geometry(12, d, spread, 100_000)
    return [theory.robust_accuracy(geometry, sigma, best, count, layers) for count in COUNTS]


def _panels(cells: Sequence[Values]) -> list[Values]:
    panels = []
    for (varied, spread, sigma), group in _grouped(cells, "varied", "spread", "sigma").items():
        length = "varied length" if varied else "fixed length"
        series = {f"L = {c['layers']}": c["accuracy"] for c in group} | {"descent, L = 1": group[0]["descent"]}
        panels.append(
            {
                "title": f"{_spread_name(spread)}, {length}, sigma = {sigma:g}",
                "xlabel": "hijacking tokens N",
                "ylabel": "accuracy",
                "x": COUNTS,
                "series": series,
            }
        )
    return panels


def _rows_transformers(values: Values) -> list[Row]:
    rows = []
    for (varied, spread, sigma), group in _grouped(values["cells"], "varied", "spread", "sigma").items():
        name = f"{_spread_name(spread)}, {'varied' if varied else 'fixed'} length, sigma = {sigma:g}"
        for cell in group:
            at = [COUNTS.index(count) for count in (1, 5, 10, 20)]
            accuracy = np.array(cell["accuracy"])[at]
            text = "; ".join(f"{np.mean(a):.3f} ({np.min(a):.3f} to {np.max(a):.3f})" for a in accuracy)
            rows.append(
                Row(
                    f"{name}, L = {cell['layers']}: excess (median over prompts); accuracy at N = 1, 5, 10, 20",
                    "rises with L",
                    f"{np.mean(cell['excess']):.5f} ({np.mean(cell['median']):.5f}); {text}" + _lost(cell),
                )
            )
        rows.append(_depth_trend(values["scale"], name, group))
    return rows


def _lost(cell: Values) -> str:
    """The largest share of answers that are not finite, where there are any."""
    lost = np.max(cell["nonfinite"])
    return f"; {lost:.2g} not finite at most" if lost else ""


def _depth_trend(scale: str, name: str, group: Sequence[Values]) -> Row:
    """The trend of the accuracy over depths of equal excess."""
    best = min(np.mean(cell["excess"]) for cell in group)
    equal = [cell for cell in group if np.mean(cell["excess"]) <= 1.01 * best]
    if len(equal) < 2:
        return Row(f"{name}: trend with depth", "rises", "fewer than two depths have equal excess")
    accuracy = np.array([cell["accuracy"] for cell in equal])[:, [COUNTS.index(c) for c in (1, 2, 5, 10)]].mean(1)
    text, verdict = measure.depth_trend([cell["layers"] for cell in equal], accuracy)
    ours = f"{text}: {verdict}, over L = {', '.join(str(cell['layers']) for cell in equal)}"
    complete = len(equal) == len(group)
    what = f"{name}: trend with depth at equal excess, mean accuracy over N = 1, 2, 5, 10"
    return judged(scale, what, "rises", ours, "excess equal across all depths within 1 %; either sign", complete)


def _run_figure3(context: Context) -> Values:
    return _run_transformers(context, (0.1, 0.4))


def _run_figure6(context: Context) -> Values:
    return _run_transformers(context, (0.1, 0.2, 0.4, 0.8))


def _rows_figure6(values: Values) -> list[Row]:
    rows = []
    for (varied, spread, layers), group in _grouped(values["cells"], "varied", "spread", "layers").items():
        accuracy = [np.mean(cell["accuracy"][COUNTS.index(5)]) for cell in group]
        name = f"{_spread_name(spread)}, {'varied' if varied else 'fixed'} length, L = {layers}"
        rises = bool(np.all(np.diff(accuracy) > 0))
        what = f"{name}: accuracy at N = 5 for sigma = 0.1, 0.2, 0.4, 0.8"
        rows.append(judged(values["scale"], what, "rises with sigma", numbers(accuracy), "rises", rises))
    return rows


def _run_figure4(context: Context) -> Values:
    prompts, lengths = _by_scale(context, 4000, 20_000), (0, 1, 5, 10, 20, 40, 75, 150)
    cells = []
    for varied, layers, run in _transformers(context):
        for spread, models in _by_spread(run).items():
            clean = measure.clean_quality(models, run.config.task.dimension, spread, lengths, prompts)
            cells.append({"varied": varied, "layers": layers, "spread": spread, **clean})
    d = 20 if context.scale == "paper" else 10
    ceilings = {}
    for spread in dict.fromkeys(cell["spread"] for cell in cells):
        ceilings[str(spread)] = measure.bayes_accuracy(d, spread, lengths, *_by_scale(context, (200, 60), (2000, 400)))
    panels = [
        {
            "title": f"{_spread_name(spread)}, {'varied' if varied else 'fixed'} length",
            "xlabel": "examples",
            "ylabel": "clean accuracy",
            "x": lengths,
            "series": {f"L = {cell['layers']}": cell["accuracy"] for cell in group}
            | {"posterior mean": [p["mean"] for p in ceilings[str(spread)]]},
        }
        for (varied, spread), group in _grouped(cells, "varied", "spread").items()
    ]
    return {"scale": context.scale, "lengths": lengths, "cells": cells, "ceilings": ceilings, "panels": panels}


def _rows_figure4(values: Values) -> list[Row]:
    rows = []
    for cell in values["cells"]:
        ceiling = values["ceilings"][str(cell["spread"])]
        accuracy = np.array(cell["accuracy"])
        margin = np.array([point["mean"] + 0.002 + 4 * point["error"] for point in ceiling])
        name = f"{_spread_name(cell['spread'])}, {'varied' if cell['varied'] else 'fixed'} length, L = {cell['layers']}"
        rows.append(
            Row(
                f"{name}: clean accuracy with {', '.join(map(str, values['lengths']))} examples",
                "about 1.000 for L >= 5",
                numbers(accuracy.mean(1), 4) + _lost(cell),
                f"below the Bayes ceiling {numbers([p['mean'] for p in ceiling], 4)} + 0.002 + 4 standard errors",
                bool(np.all(accuracy.max(1) <= margin)),
            )
        )
    return rows


def _entry(
    title: str,
    claim: str,
    scales: dict[str, str],
    run: Callable[[Context], Values],
    rows: Callable[[Values], list[Row]],
    draw: Callable[[Values, Path], None] = figures.panels,
) -> Entry:
    return Entry(title, claim, scales, run, rows, draw)


_THEORY = {
    "cpu": "d = 20, continuous optimum on 1500 prompts with common random numbers",
    "gpu": "continuous optimum on 6000 prompts with common random numbers; a CPU is enough",
}
_TRAINED = {
    "cpu": "d = 10, n = 20, L = 1, 2, 4, 2 seeds, 2000 steps of batch 512, expected loss over the query",
    "gpu": "d = 10, n = 20 instead of d = 20, 5 seeds, 20000 steps of batch 512, expected loss over the query",
    "paper": "60000 steps at 10 times the learning rate instead of 600000, 1 seed; n = 40 only; spreads 0.05, 0.1",
}

ENTRIES = {
    "optima": _entry(
        "Theorem 4.3: optimal step size and start",
        "alpha is of order 1 / (n L) and c an absolute constant; excess O(d / n)",
        _THEORY,
        _run_optima,
        _rows_optima,
        _draw_optima,
    ),
    "exact": _entry(
        "Theorem 4.5: robust accuracy of the exact optimum by depth, context and number of tokens",
        "error grows with N and falls with n and with L",
        _THEORY,
        _run_exact,
        _rows_exact,
        _draw_exact,
    ),
    "figure2": _entry(
        "Figure 2: optimal step size and robust accuracy of gradient descent by depth",
        "the step size falls with n and L, the accuracy rises with both",
        _THEORY,
        _run_figure2,
        _rows_figure2,
        _draw_figure2,
    ),
    "ceiling": _entry(
        "The Bayes ceiling of figure 4",
        "clean accuracy of 0.999 to 1.000 after a few examples",
        {"cpu": "200 prompts, 60 Gibbs sweeps; not in the paper", "gpu": "400 prompts, 1000 sweeps; not in the paper"},
        _run_ceiling,
        _rows_ceiling,
        _draw_ceiling,
    ),
    "figure3": _entry(
        "Figure 3: robust accuracy of linear transformers by number of hijacking tokens and depth",
        "accuracy falls with N to about a half and rises with L",
        _TRAINED,
        _run_figure3,
        _rows_transformers,
    ),
    "figure4": _entry(
        "Figure 4: clean accuracy by context length and depth",
        "rises with context length and depth, to 1.000",
        _TRAINED,
        _run_figure4,
        _rows_figure4,
    ),
    "figure6": _entry(
        "Figure 6: robust accuracy by the distance of the query",
        "falls as the query comes nearer to the boundary",
        _TRAINED,
        _run_figure6,
        _rows_figure6,
    ),
}
