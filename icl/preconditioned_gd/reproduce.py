"""The figures of "Transformers learn to implement preconditioned gradient descent for in-context learning".

The paper prints numbers in the heat maps of figures 2, 4 and 5 only; the rest is held against the theorems' exact
optima (`icl.preconditioned_gd.theory`). At scale gpu a row has a criterion to meet; a smaller run says how far it got.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icl.preconditioned_gd import figures, measure, stationary, theory
from icl.reporting import config_file, judged, numbers
from training.report import Context, Entry, Row, Run
from training.step import data_key, replica_points

CONFIGS = "configs/icl/preconditioned_gd"
EXAMPLES, DIMENSION = 20, 5
SAME_SETUP = (
    "the paper's steps and batch, 5 seeds; rotations are uniform over the orthogonal group (the authors' are singular "
    "vectors of a uniform matrix)"
)

Values = dict[str, Any]


def _test_prompts(context: Context) -> int:
    return 2**17 if context.scale == "cpu" else 2**21


def _list(values: Sequence[float] | np.ndarray, digits: int = 4) -> str:
    return numbers(values, digits)


def _spread(values: Sequence[float] | np.ndarray, digits: int = 4) -> str:
    """Mean over seeds, and the range where there are several."""
    values = np.ravel(np.asarray(values, float))
    ends = f" ({values.min():.{digits}g} to {values.max():.{digits}g})" if values.size > 1 else ""
    return f"{values.mean():.{digits}g}{ends}"


def _within(values: Any, reference: Any, tolerance: float) -> bool:
    return bool(np.all(np.abs(np.asarray(values) / np.asarray(reference) - 1) <= tolerance))


# Theorem 1: one layer, full P and Q.


def _run_theorem1(context: Context) -> Values:
    spectra = {}
    for name in ("paper", "geometric"):
        run = context.train(f"theorem1_{name}", config_file(CONFIGS, "theorem1", context, spectrum=name))
        spectra[name] = _measure_theorem1(run, _test_prompts(context))
    return {"scale": context.scale, "spectra": spectra}


def _measure_theorem1(run: Run, prompts: int) -> Values:
    task = measure.task_of(run)
    roots = [np.asarray(task.covariance(data_key(seed)).sqrt, float) for seed in run.config.seeds]
    optima = np.array([theory.theorem1_optimum(root @ root.T, task.examples) for root in roots])
    blocks = run.series("structure/q_top")
    learned = blocks["value"][:, :, 0]
    distance = np.linalg.norm(learned - optima, axis=(-2, -1)) / np.linalg.norm(optima, axis=(-2, -1))
    keep = np.arange(0, len(distance), max(len(distance) // 60, 1))
    return {
        "distance": distance[-1].tolist(),
        "loss_ratio": measure.loss_ratios(run, optima, prompts),
        "p_off": measure.last_value(run, "structure/p_off")[:, 0].tolist(),
        "q_off": measure.last_value(run, "structure/q_off")[:, 0].tolist(),
        "learned": learned[-1, 0].tolist(),
        "closed_form": optima[0].tolist(),
        "curve": {"step": blocks["step"][keep].tolist(), "value": distance[keep].tolist()},
    }


def _rows_theorem1(values: Values) -> list[Row]:
    rows = []
    for name, found in values["spectra"].items():
        distance, ratio = np.array(found["distance"]), np.array(found["loss_ratio"])
        passed = (distance < 0.05).all(), (ratio < 1.001).all()
        rows += [
            Row(
                f"{name} spectrum: distance of Q's block from eq. (6)",
                "0",
                _spread(distance),
                "< 0.05",
                bool(passed[0]),
            ),
            Row(f"{name} spectrum: loss / loss of eq. (6)", "1", _spread(ratio, 6), "< 1.001", bool(passed[1])),
            Row(
                f"{name} spectrum: rest of P's last row, of Q's block", "0", _spread(found["p_off"] + found["q_off"], 2)
            ),
        ]
    return rows


# Theorem 2: two layers, isotropic covariates.


def _run_theorem2(context: Context) -> Values:
    run = context.train("theorem2", config_file(CONFIGS, "theorem2", context))
    optimum = stationary.optima(2, EXAMPLES, DIMENSION, with_b=False, tail=0.0)[0]
    return {
        "scale": context.scale,
        "exact": optimum.loss,
        "optimum": {"a": list(optimum.a)},
        "losses": measure.last_losses(run, 0.1).mean(0).tolist(),
        "a": measure.last_value(run, "structure/a").tolist(),
        "distances": measure.last_value(run, "structure/dist_a").tolist(),
        "curves": {name: measure.curve(run, name) for name in ("test/loss", "structure/a")},
    }


def _rows_theorem2(values: Values) -> list[Row]:
    a, losses, distances = (np.array(values[name]) for name in ("a", "losses", "distances"))
    expected = np.sort(values["optimum"]["a"])
    return [
        Row(
            "training loss, last 10 % of the steps",
            "",
            _spread(losses, 5),
            f"within 1 % of {values['exact']:.5f}",
            _within(losses, values["exact"], 0.01),
        ),
        Row(
            "Dist of A to multiples of I, largest",
            "0",
            _spread(distances.max(1), 2),
            "< 0.04",
            bool((distances < 0.04).all()),
        ),
        Row(
            "A, sorted, mean over seeds",
            "",
            _list(np.sort(a).mean(0)),
            f"each seed within 3 % of {_list(expected)}",
            _within(np.sort(a), expected, 0.03),
        ),
    ]


# Figures 1 and 2: three layers, eq. (8).


def _run_theorem3(context: Context) -> Values:
    run = context.train("theorem3", config_file(CONFIGS, "theorem3", context))
    baselines = measure.descent_baselines(
        EXAMPLES, 3, run.config.task.variances, measure.COARSE_STEPS, measure.FINER_STEPS
    )
    optimum = stationary.optima(3, EXAMPLES, DIMENSION, with_b=False, tail=0.0)[0]
    names = ("test/loss", "structure/dist_a", "structure/dist_a_raw")
    return {
        "scale": context.scale,
        "exact": optimum.loss,
        "optimum": list(optimum.a),
        "gd": baselines["gd"]["tuned"]["loss"],
        "pgd": baselines["pgd"]["tuned"]["loss"],
        "losses": measure.last_losses(run, 1 / 15).mean(0).tolist(),
        "test": measure.summarize_errors(measure.final_errors(run, _test_prompts(context))),
        "a": measure.last_value(run, "structure/a").tolist(),
        "distances": measure.last_value(run, "structure/dist_a").tolist(),
        "raw_distances": measure.last_value(run, "structure/dist_a_raw").tolist(),
        "curves": {name: measure.curve(run, name) for name in names},
    }


def _rows_figure1(values: Values) -> list[Row]:
    a, losses, distances, raw = (np.array(values[name]) for name in ("a", "losses", "distances", "raw_distances"))
    expected, exact = np.sort(values["optimum"]), values["exact"]
    predicted = 0.7844  # Dist of Sigma^-1 for the eigenvalues 1, 1, 4, 16, 1
    return [
        Row("three steps of gradient descent, best step size", "", f"{values['gd']:.4f}"),
        Row("three steps of preconditioned gradient descent", "", f"{values['pgd']:.4f}"),
        Row(
            "linear transformer below both",
            "",
            _spread(losses),
            f"< {values['pgd']:.4f}",
            bool((losses < values["pgd"]).all()),
        ),
        judged(
            values["scale"],
            "training loss, last 2000 steps",
            "ln about -2",
            _spread(losses, 5),
            f"within 2 % of the exact optimum {exact:.5f}",
            _within(losses, exact, 0.02),
        ),
        Row("loss on fresh prompts", "", _spread(values["test"]["mean"], 5)),
        judged(
            values["scale"],
            "whitened A, sorted, mean over seeds",
            "-1.71, -0.69, -0.42",
            _list(np.sort(a).mean(0)),
            f"each seed within 2 % of {_list(expected)}",
            _within(np.sort(a), expected, 0.02),
        ),
        judged(
            values["scale"],
            "Dist of whitened A by layer, mean over seeds",
            "towards 0",
            _list(distances.mean(0), 2),
            "< 0.03",
            (distances.mean(0) < 0.03).all(),
        ),
        judged(
            values["scale"],
            "Dist of raw A",
            "stays constant",
            _spread(raw),
            f"within {predicted} ± 0.01",
            (np.abs(raw - predicted) <= 0.01).all(),
        ),
    ]


def _run_matrices(training: str, matrix: str, layers: Sequence[int], context: Context) -> Values:
    run = context.train(training, config_file(CONFIGS, training, context))
    learned = np.array(measure.learned_matrices(run)[matrix])[0]
    letter = "$B_{}$" if matrix == "b" else r"$\Sigma^{{1/2}} A_{} \Sigma^{{1/2}}$"
    return {
        "scale": context.scale,
        "matrices": {letter.format(layer): learned[layer].round(6).tolist() for layer in layers},
    }


def _rows_matrices(paper: Sequence[str], sort: bool, off_diagonal: float, values: Values) -> list[Row]:
    """Diagonals and off-diagonal entries of one seed's matrices; sorted where their order is an accident."""
    matrices = [np.array(m) for m in values["matrices"].values()]
    if sort:
        matrices.sort(key=lambda m: -np.trace(m))
    rows = []
    for printed, matrix in zip(paper, matrices, strict=True):
        diagonal = np.diag(matrix)
        off = matrix - np.diag(diagonal)
        ours = f"{diagonal.min():.3f} to {diagonal.max():.3f}; off the diagonal at most {np.abs(off).max():.3f}"
        rows.append(
            judged(
                values["scale"],
                "diagonal",
                printed,
                ours,
                f"off the diagonal <= {off_diagonal}",
                np.abs(off).max() <= off_diagonal,
            )
        )
    return rows


# Figures 3 to 5 and the identity covariance: three layers, eq. (11).


def _run_three_layers(training: str, context: Context) -> Values:
    run = context.train(training, config_file(CONFIGS, training, context))
    first, second = stationary.three_layer_basins(EXAMPLES, DIMENSION)
    losses = measure.last_losses(run, 0.1)
    names = ["test/loss", *(f"structure/{name}" for name in ("dist_a", "dist_a_raw", "dist_b", "a", "b"))]
    return {
        "scale": context.scale,
        "exact": [first.loss, second.loss],
        "basins": [{"a": list(basin.a), "b": list(basin.b)} for basin in (first, second)],
        "losses": losses.mean(0).tolist(),
        "median_losses": np.median(losses, axis=0).tolist(),
        "test": measure.summarize_errors(measure.final_errors(run, _test_prompts(context))),
        **{name: measure.last_value(run, f"structure/{name}").tolist() for name in ("a", "b", "dist_a", "dist_b")},
        "curves": {name: measure.curve(run, name) for name in names},
    }


def _rows_figure3(values: Values) -> list[Row]:
    a, b, losses = (np.array(values[name]) for name in ("a", "b", "losses"))
    basin = values["basins"][0]
    inside = [_within(x, basin["a"], 0.05) and _within(y[:2], basin["b"][:2], 0.03) for x, y in zip(a, b, strict=True)]
    log_test = np.log(values["test"]["mean"])
    return [
        judged(
            values["scale"],
            "seeds in basin 1",
            "all shown",
            f"{sum(inside)} of {len(inside)}",
            f"at least 4 of 5 with A within 5 % of {_list(basin['a'])}, B within 3 % of {_list(basin['b'][:2])}",
            sum(inside) >= 4,
        ),
        judged(
            values["scale"],
            "training loss, last 10 % of the steps",
            "",
            _spread(losses),
            f"6.4e-4 to 7.6e-4 (exact optimum {values['exact'][0]:.3g})",
            ((losses > 6.4e-4) & (losses < 7.6e-4)).all(),
        ),
        Row("the same, median over its batches: without rare prompts", "", _spread(values["median_losses"])),
        judged(
            values["scale"],
            "ln loss on fresh prompts, mean over seeds",
            "-7.12",
            _spread(log_test),
            f"<= -7.1 (exact optimum {np.log(values['exact'][0]):.3f})",
            log_test.mean() <= -7.1,
        ),
        Row(
            "median and trimmed loss on fresh prompts",
            "",
            f"{np.mean(values['test']['median']):.3g}, {np.mean(values['test']['trimmed']):.3g}",
        ),
        judged(
            values["scale"],
            "Dist of B, mean over seeds",
            "about 0.02, 0.01",
            _list(np.mean(values["dist_b"], axis=0)[:2], 2),
            "< 0.03",
            (np.mean(values["dist_b"], axis=0)[:2] < 0.03).all(),
        ),
        judged(
            values["scale"],
            "Dist of whitened A, mean over seeds",
            "about 0.04, 0.01, 0.01",
            _list(np.mean(values["dist_a"], axis=0), 2),
            "< 0.06",
            (np.mean(values["dist_a"], axis=0) < 0.06).all(),
        ),
        Row("A, mean over seeds", "-0.38, -2.40, -9.55", _list(a.mean(0))),
        Row("B, mean over seeds", "0.90, 0.56", _list(b.mean(0)[:2])),
    ]


def _rows_identity(values: Values) -> list[Row]:
    a, b, losses = (np.array(values[name]) for name in ("a", "b", "losses"))
    distances = np.concatenate([np.array(values["dist_a"]), np.array(values["dist_b"])[:, :2]], axis=1)
    basin = values["basins"][1]
    return [
        judged(
            values["scale"],
            "training loss, last 10 % of the steps",
            "1.55e-3, 1.31e-3, 1.19e-3 (notebook)",
            _spread(losses),
            f"1.1e-3 to 1.6e-3 (exact optimum of basin 2: {values['exact'][1]:.3g})",
            ((losses >= 1.1e-3) & (losses <= 1.6e-3)).all(),
        ),
        judged(
            values["scale"],
            "A, mean over seeds",
            "-0.71, -2.65, -7.1 (notebook)",
            _list(a.mean(0)),
            f"each seed within 3 % of -0.71, -2.65, -7.1; basin 2 is {_list(basin['a'])}",
            _within(a, (-0.71, -2.65, -7.1), 0.03),
        ),
        judged(
            values["scale"],
            "B, mean over seeds",
            "0.34, 0.34 (notebook)",
            _list(b.mean(0)[:2]),
            f"each seed within 3 % of 0.34, 0.34; basin 2 is {_list(basin['b'][:2])}",
            _within(b[:, :2], (0.34, 0.34), 0.03),
        ),
        judged(
            values["scale"],
            "largest Dist of A and B",
            "0.012 to 0.026 (notebook)",
            _spread(distances.max(1), 2),
            "< 0.04",
            (distances < 0.04).all(),
        ),
        Row("this is basin 2: loss relative to that of basin 1", "", f"{losses.mean() / values['exact'][0]:.2f}"),
    ]


def _draw_identity(values: Values, path: Path) -> None:
    basin = values["basins"][1]
    figures.structure_and_loss(values | {"optimum": basin, "exact": values["exact"][1]}, path)


def _rows_lbfgs(values: Values) -> list[Row]:
    losses, test = np.array(values["losses"]), np.array(values["test"]["mean"])
    return [
        judged(
            values["scale"],
            "loss on the fixed batch",
            "6.24e-4, 5.27e-4, 6.09e-4 (notebook)",
            _spread(losses),
            "5.0e-4 to 6.6e-4",
            ((losses >= 5.0e-4) & (losses <= 6.6e-4)).all(),
        ),
        judged(
            values["scale"],
            "loss on fresh prompts",
            "8.5e-4 (notebook)",
            _spread(test),
            "7e-4 to 9.5e-4",
            ((test >= 7e-4) & (test <= 9.5e-4)).all(),
        ),
        Row("A, mean over seeds", "", _list(np.mean(values["a"], axis=0))),
        Row("B, mean over seeds", "", _list(np.mean(values["b"], axis=0)[:2])),
    ]


# Figures 6 and 7: against gradient descent, by context length and by depth.


def _run_context_length(context: Context) -> Values:
    lengths = (4, 8, 12, 16, 20) if context.scale == "cpu" else tuple(range(2, 21, 2))
    points = []
    for n in lengths:
        run = context.train(f"context_length/examples={n}", config_file(CONFIGS, "context_length", context, examples=n))
        baselines = measure.descent_baselines(
            n, 3, run.config.task.variances, measure.FINER_STEPS, measure.COARSE_STEPS
        )
        exact = stationary.optima(3, n, DIMENSION, with_b=True)[0].loss
        points.append(_compare(run, n, baselines, exact, context, selected=10))
    return {"scale": context.scale, "points": points}


def _run_depth(context: Context) -> Values:
    points = []
    for layers in (1, 2, 3, 4):
        run = context.train(f"depth/layers={layers}", config_file(CONFIGS, "depth", context, layers=layers))
        baselines = measure.descent_baselines(
            EXAMPLES, layers, run.config.task.variances, measure.COARSE_STEPS, measure.FINER_STEPS
        )
        exact = stationary.optima(layers, EXAMPLES, DIMENSION, with_b=True)[0].loss
        points.append(_compare(run, layers, baselines, exact, context, selected=20))
    return {"scale": context.scale, "points": points}


def _compare(run: Run, x: int, baselines: Values, exact: float, context: Context, selected: int) -> Values:
    errors = measure.final_errors(run, _test_prompts(context))
    return {
        "x": x,
        "transformer": measure.summarize_errors(errors),
        "selected": measure.selected_losses(run, selected),
        "baselines": baselines,
        "exact": exact,
    }


# Losses of the baselines by context length, Monte Carlo with 1e5 prompts each: gradient descent as coded (one example
# left out) and with all examples, then the preconditioned one likewise.
_BY_LENGTH = {
    2: (4.396, 3.887, 4.154, 3.426),
    4: (3.456, 3.093, 2.813, 2.314),
    6: (2.797, 2.575, 1.933, 1.746),
    8: (2.390, 2.303, 1.731, 1.525),
    10: (2.306, 2.229, 1.299, 1.104),
    12: (2.094, 1.977, 0.933, 0.790),
    14: (1.874, 1.779, 0.670, 0.567),
    16: (1.693, 1.618, 0.482, 0.416),
    18: (1.547, 1.487, 0.365, 0.334),
    20: (1.434, 1.389, 0.320, 0.332),
}
# The same by depth, with 20 examples, as coded: plain, preconditioned.
_BY_DEPTH = {1: (2.296, 1.200), 2: (1.707, 0.542), 3: (1.435, 0.325), 4: (1.246, 0.257)}


def _rows_context_length(values: Values) -> list[Row]:
    rows = []
    for point in values["points"]:
        n, ours, exact = point["x"], np.array(point["transformer"]["trimmed"]), point["exact"]
        baselines = point["baselines"]
        descent = [baselines[name][variant]["loss"] for name in ("gd", "pgd") for variant in ("coded", "all")]
        bound = 1.5 * exact if n in (6, 8, 10, 20) else np.inf
        target = "below gradient descent" + (" and 1.5 times the exact optimum" if np.isfinite(bound) else "")
        rows.append(
            judged(
                values["scale"],
                f"n = {n}: transformer, trimmed mean",
                "below GD and PGD",
                _spread(ours),
                f"{target} ({exact:.3g})",
                ours.mean() < min(*descent, bound),
            )
        )
        rows.append(
            Row(
                f"n = {n}: GD as coded, with all examples; PGD likewise",
                "",
                _list(descent),
                f"within 3 % of {_list(_BY_LENGTH[n])}",
                _within(descent, _BY_LENGTH[n], 0.03),
            )
        )
        least, ideal = baselines["ols"]["all"]["loss"], max(0, DIMENSION - n)
        passed = abs(least - ideal) <= max(0.03 * ideal, 1e-6)
        rows.append(Row(f"n = {n}: least squares", "0 for n >= d", f"{least:.3g}", f"{ideal} within 3 %", passed))
    return rows


_DEPTH_TARGETS = {1: (0.123, 0.163), 2: (-np.inf, -2.35), 3: (-np.inf, -6.4), 4: (-np.inf, -7.5)}


def _rows_depth(values: Values) -> list[Row]:
    rows = []
    for point in values["points"]:
        layers = point["x"]
        # From three layers on a few prompts in a million decide the mean, so the authors' own protocol is judged there.
        heavy = layers >= 3
        log_loss = np.log(point["selected"] if heavy else point["transformer"]["mean"])
        how = "selected and tested as in the authors' code" if heavy else "on fresh prompts"
        low, high = _DEPTH_TARGETS[layers]
        target = f"{low} to {high}" if np.isfinite(low) else f"<= {high}"
        rows.append(
            judged(
                values["scale"],
                f"{layers} layers: ln loss {how}, mean over seeds",
                "near or below -8" if layers == 4 else "",
                _spread(log_loss),
                f"{target} (exact optimum {np.log(point['exact']):.3f})",
                low <= log_loss.mean() <= high,
            )
        )
        fresh = [np.log(np.mean(point["transformer"][kind])) for kind in ("mean", "trimmed", "median")]
        rows.append(Row(f"{layers} layers: ln of mean, trimmed mean and median on fresh prompts", "", _list(fresh)))
        found = [point["baselines"][name]["coded"]["loss"] for name in ("gd", "pgd")]
        rows.append(
            Row(
                f"{layers} steps: GD, PGD as coded",
                "",
                _list(found),
                f"within 3 % of {_list(_BY_DEPTH[layers])}",
                _within(found, _BY_DEPTH[layers], 0.03),
            )
        )
    return rows


# The basins that the paper does not mention.


def _run_basins(context: Context) -> Values:
    cells = []
    first, second = stationary.three_layer_basins(EXAMPLES, DIMENSION)
    small = context.scale == "cpu"
    rates = (1e-3, 0.02, 0.1)
    for recipe, config in (("clipped, halved", "theorem4"), ("plain Adam", "identity")):
        for data, variances in (("rotated", (1.0, 1.0, 0.25, 0.0625, 1.0)), ("identity", (1.0,) * DIMENSION)):
            overrides = {
                "seeds": tuple(range(2 if small else 10)),
                "replicate": (("optimizer.learning_rate", rates),),
                "batch_size": 500 if small else 4000,
                "steps": "4000 steps" if small else "20000 steps",
                "on_nonfinite": "record",
                "task.variances": variances,
                "task.rotated": data == "rotated",
                "task.resample_every": 100,
            }
            if config == "theorem4" and small:
                overrides["optimizer.halve_every"] = "1000 steps"
            run = context.train(f"basins/{config}_{data}", config_file(CONFIGS, config, context), overrides)
            ends = zip(
                replica_points(run.config),
                run.result.metrics["structure/a"],
                run.result.metrics["structure/b"],
                strict=True,
            )
            counts: dict[float, Counter] = {rate: Counter() for rate in rates}
            for (_, replicated), a, b in ends:
                counts[replicated["optimizer.learning_rate"]][_basin(np.array(a), np.array(b), (first, second))] += 1
            kinds = ("basin 1", "basin 2", "elsewhere", "diverged")
            cells += [
                {"recipe": recipe, "data": data, "rate": rate, "counts": {kind: c[kind] for kind in kinds}}
                for rate, c in counts.items()
            ]
    return {"scale": context.scale, "cells": cells, "exact": [first.loss, second.loss]}


def _basin(a: np.ndarray, b: np.ndarray, basins: Sequence[Any]) -> str:
    """Which optimum a run ended at: all of A and B within 10 % of it."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return "diverged"
    for number, basin in enumerate(basins, start=1):
        if _within(a, basin.a, 0.1) and _within(b[:2], basin.b[:2], 0.1):
            return f"basin {number}"
    return "elsewhere"


def _rows_basins(values: Values) -> list[Row]:
    return [
        Row(
            f"{c['recipe']}; {c['data']} data; learning rate {c['rate']:g}",
            "not mentioned",
            ", ".join(f"{kind} {count}" for kind, count in c["counts"].items() if count),
        )
        for c in values["cells"]
    ]


def _entry(
    title: str,
    claim: str,
    cpu: str,
    gpu: str,
    run: Callable[[Context], Values],
    rows: Callable[[Values], list[Row]],
    draw: Callable[[Values, Path], None],
) -> Entry:
    """The paper's scale is what one GPU does."""
    scales: Mapping[str, str] = {"cpu": cpu, "gpu": gpu}
    return Entry(title, claim, scales, run, rows, draw)


_SMALL = "batch 4000 instead of 20000, 1 seed instead of 5"
_OPEN = "nothing: the theorem leaves the training open; batch {}"
_STRUCTURE = "three layers learn A = a_l Sigma^-1 and B = b_l I: preconditioned gradient descent with GD++ steps"

ENTRIES = {
    "theorem1": _entry(
        "Theorem 1: one layer learns the closed form",
        "the best single layer is one step of gradient descent, preconditioned by a ridge-like inverse (eq. 6)",
        _OPEN.format("2000, 20000 steps, 2 seeds"),
        _OPEN.format("2000, 20000 steps, 2 seeds"),
        _run_theorem1,
        _rows_theorem1,
        figures.theorem1,
    ),
    "theorem2": _entry(
        "Theorem 2: two layers, isotropic covariates",
        "some pair of diagonal matrices is a global minimum of two layers",
        _OPEN.format("4000, 6000 steps, 3 seeds"),
        _OPEN.format("4000, 6000 steps, 3 seeds"),
        _run_theorem2,
        _rows_theorem2,
        figures.structure_and_loss,
    ),
    "figure1": _entry(
        "Figure 1: three layers learn preconditioned gradient descent",
        "the distance of Sigma^1/2 A Sigma^1/2 to multiples of the identity goes to 0, that of A does not; the loss "
        "goes to 0 (its axis, and theory, show that it stops at ln = -2.01)",
        _SMALL,
        SAME_SETUP,
        _run_theorem3,
        _rows_figure1,
        figures.theorem3,
    ),
    "figure2": _entry(
        "Figure 2: the learned A, whitened",
        "multiples of the identity: -.69; -.42/-.43; -1.69..-1.72; off the diagonal at most .01",
        _SMALL,
        SAME_SETUP,
        functools.partial(_run_matrices, "theorem3", "a_whitened", (0, 1, 2)),
        functools.partial(_rows_matrices, ("-.42/-.43", "-.69", "-1.69..-1.72"), True, 0.03),
        figures.heat_maps,
    ),
    "figure3": _entry(
        "Figure 3: three layers with trained B",
        _STRUCTURE,
        _SMALL,
        SAME_SETUP,
        functools.partial(_run_three_layers, "theorem4"),
        _rows_figure3,
        figures.theorem4,
    ),
    "figure4": _entry(
        "Figure 4: the learned B",
        "multiples of the identity: .90-.91, .56-.57; off the diagonal at most .02",
        _SMALL,
        SAME_SETUP,
        functools.partial(_run_matrices, "theorem4", "b", (0, 1)),
        functools.partial(_rows_matrices, (".90-.91", ".56-.57"), False, 0.03),
        figures.heat_maps,
    ),
    "figure5": _entry(
        "Figure 5: the learned A, whitened, with trained B",
        "multiples of the identity, growing with depth: -.38, -2.38..-2.42, -9.46..-9.65; off the diagonal up to .06",
        _SMALL,
        SAME_SETUP,
        functools.partial(_run_matrices, "theorem4", "a_whitened", (0, 1, 2)),
        functools.partial(_rows_matrices, ("-.38", "-2.38..-2.42", "-9.46..-9.65"), False, 0.3),
        figures.heat_maps,
    ),
    "identity": _entry(
        "Identity covariance: the authors' demonstration notebook",
        "A and B become multiples of the identity. It is another critical point than that of figures 3 to 5",
        "batch 1000 instead of 4000, 1 seed instead of 3",
        "5 seeds instead of 3; otherwise nothing",
        functools.partial(_run_three_layers, "identity"),
        _rows_identity,
        _draw_identity,
    ),
    "basins": _entry(
        "Which critical point: by data, recipe and learning rate",
        "the paper does not mention that there are two; they differ by a factor of two in loss",
        "an extension: batch 500, 4000 steps, 2 seeds a cell",
        "an extension: batch 4000, 20000 steps, 10 seeds a cell",
        _run_basins,
        _rows_basins,
        figures.basins,
    ),
    "figure6": _entry(
        "Figure 6: loss by the number of examples in the context",
        "three layers stay below three steps of gradient descent, plain and preconditioned; least squares is 0 for "
        "n >= d",
        "batch 2000 instead of 40000, 1 seed instead of 5, 5 lengths instead of 10",
        f"{SAME_SETUP}; baselines exact or within 1 %, instead of tuned and tested on 5000 prompts",
        _run_context_length,
        _rows_context_length,
        functools.partial(figures.comparison, xlabel="examples in the context", logarithmic=False),
    ),
    "figure7": _entry(
        "Figure 7: loss by depth",
        "the transformer's loss falls far faster with depth than that of gradient descent; the curve ends near ln = -8",
        _SMALL,
        f"{SAME_SETUP}; baselines exact or within 1 %, instead of tuned and tested on 5000 prompts",
        _run_depth,
        _rows_depth,
        functools.partial(figures.comparison, xlabel="layers, or steps", logarithmic=True),
    ),
    "lbfgs": _entry(
        "Figure 3's setting with L-BFGS on one fixed batch",
        "the text of section 5.1 speaks of L-BFGS; the figure is Adam's. The notebook stops at 5.3e-4 to 6.2e-4",
        "batch 4000 instead of 20000, 1 seed; optax's L-BFGS (memory 200) instead of PyTorch's (history 600)",
        "5 seeds instead of 3; optax's L-BFGS (memory 200, zoom line search) instead of PyTorch's (history 600)",
        functools.partial(_run_three_layers, "lbfgs"),
        _rows_lbfgs,
        figures.theorem4,
    ),
}
