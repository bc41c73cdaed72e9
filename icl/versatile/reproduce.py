"""The table and figures of "Linear Transformers are Versatile In-Context Learners" (arXiv:2402.14180).

Losses are half squared errors above those of ridge regression with each prompt's own noise level, as in Table 1. The
paper reports the best of five seeds; here a validation set chooses the seed, and fresh prompts test it in float64.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from icl.reporting import config_file, judged, numbers
from icl.versatile import figures, gd_plus_plus, measure, theory
from icl.versatile.baselines import descent_losses, estimated_variance, oracle_losses, ridge_losses
from icl.versatile.models import FORMS
from icl.versatile.paper import PROBLEMS, TABLE1, TABLE1_BASELINES, problem_name
from training.report import Context, Entry, Row, Run
from training.step import replica_points

CONFIGS = "configs/icl/versatile"
Values = dict[str, Any]

# Half adjusted losses by an independent computation with 2e5 to 4e5 prompts, in the order of `PROBLEMS`.
_REFERENCE = {
    "ConstRR": (0, 0.0085, 0.0633, 0.1558, 0.2600, 0.3591, 0.4492, 0.5266, 0.2194, 0.4245),
    "AdaRR": (0, 0.0027, 0.0157, 0.0340, 0.0526, 0.0694, 0.0834, 0.0947, 0.0510, 0.0826),
    "TunedRR": (0, 0.0016, 0.0105, 0.0238, 0.0375, 0.0501, 0.0604, 0.0686, 0.0215, 0.0551),
}
# The least losses of GD++ by depth, an independent computation on 4e4 to 6e4 prompts.
_GDPP_REFERENCE = {
    2: {"uniform:5": 0.374, "levels:1,3": 0.249},
    3: {"uniform:5": 0.362, "levels:1,3": 0.221},
    4: {"uniform:5": 0.362, "levels:1,3": 0.221},
}


def _by_scale(context: Context, cpu: Any, larger: Any) -> Any:
    return cpu if context.scale == "cpu" else larger


def _prompts(context: Context) -> dict[str, int]:
    return _by_scale(context, {"tuning": 50_000, "test": 20_000}, {"tuning": 1_000_000, "test": 100_000})


def _depths(context: Context) -> tuple[int, ...]:
    return _by_scale(context, (1, 2, 3, 4), tuple(range(1, 8)))


def _grid(context: Context, form: str, layers: int, optimizer: str = "adam") -> Run:
    config = config_file(CONFIGS, "grid", context, form=form, layers=layers, optimizer=optimizer)
    return context.train(_grid_name(form, layers, optimizer), config)


def _grid_name(form: str, layers: int, optimizer: str = "adam") -> str:
    folder = "grid" if optimizer == "adam" else optimizer
    return f"{folder}/form={form},layers={layers}"


def _models(run: Run) -> dict[str, tuple[list[nnx.Module], int]]:
    """For each noise problem the models of all seeds, and the index of the one with the least validation loss."""
    points = replica_points(run.config)
    problems = [run.config.task.problems[int(values["task.problem"])] for _, values in points]
    losses = np.asarray(run.result.metrics["validation/loss"], float)
    found = {}
    for problem in dict.fromkeys(problems):
        members = [i for i, other in enumerate(problems) if other == problem]
        best = int(np.argmin(np.where(np.isfinite(losses[members]), losses[members], np.inf)))
        found[problem] = [run.result.models[i] for i in members], best
    return found


def _baselines(context: Context, problem: str) -> Values:
    return measure.baselines(problem, **_prompts(context))


# The baselines.


def _run_baselines(context: Context) -> Values:
    return {"scale": context.scale, "baselines": {problem: _baselines(context, problem) for problem in PROBLEMS}}


def _rows_baselines(values: Values) -> list[Row]:
    rows = []
    for i, (problem, found) in enumerate(values["baselines"].items()):
        for name, reference in _REFERENCE.items():
            ours, printed = found[name]["mean"], TABLE1_BASELINES[name, problem]
            near = abs(ours - reference[i]) <= 0.001 + 0.03 * reference[i] + 3 * found[name]["error"]
            like = abs(ours - printed) <= 2 * found[name]["error"] + 0.02 * printed + 0.001
            rows.append(
                Row(
                    f"{problem_name(problem)}: {name}",
                    f"{printed:g}",
                    f"{ours:.4f} ± {found[name]['error']:.4f}",
                    f"{reference[i]:g} within 0.001 + 3 % + 3 standard errors; the paper's likewise",
                    near and like,
                )
            )
        constants = found["tuned"]
        rows.append(
            Row(
                f"{problem_name(problem)}: tuned constant; factor and threshold; oracle's squared error",
                "",
                f"{numbers(list(constants.values()))}; {found['oracle']:.4f}",
            )
        )
    return rows


def _draw_baselines(values: Values, path: Path) -> None:
    groups = [
        {
            "name": f"{name} {problem_name(problem)}",
            "paper": TABLE1_BASELINES[name, problem],
            "ours": found[name]["mean"],
        }
        for problem, found in values["baselines"].items()
        for name in _REFERENCE
    ]
    figures.bars({"bars": groups}, path)


# One layer: a closed form.


def _run_one_layer(context: Context) -> Values:
    runs = {form: context.train(f"one_layer/{form}", f"{CONFIGS}/one_layer.py:form={form}") for form in FORMS}
    count = _by_scale(context, 100_000, 400_000)
    cells = []
    for form, run in runs.items():
        for problem, (models, best) in _models(run).items():
            with jax.enable_x64(True):
                oracle = float(oracle_losses(measure.prompts_of(problem, measure.TEST_SEED, count)).mean())
            errors = measure.adjusted_errors(models[best : best + 1], problem, count, (1,))[0, 0]
            cells.append(
                {
                    "form": form,
                    "problem": problem,
                    "step": _one_layer_step(models[best]),
                    "adjusted": measure.summarize(errors),
                    "loss": float(errors.mean()) + oracle,
                    "oracle": oracle,
                }
            )
    return {"scale": context.scale, "cells": cells}


def _one_layer_step(model: nnx.Module) -> float:
    """What multiplies `<alpha, x>` in the prediction; for the full model the mean diagonal entry."""
    if hasattr(model, "omegas"):
        return float(model.omegas()["yx"][0])
    p, q = np.asarray(model.p[...])[0, 0], np.asarray(model.q[...])[0, 0]
    return float(p[-1, -1] * np.diag(q)[:-1].mean())


def _rows_one_layer(values: Values) -> list[Row]:
    rows = []
    for cell in values["cells"]:
        problem, (n, d) = cell["problem"], (measure.EXAMPLES, measure.DIMENSION)
        step, loss = theory.one_layer_step(problem, n, d), theory.one_layer_loss(problem, n, d)
        name = f"{figures.MODELS[cell['form']][0]}, {problem_name(problem)}"
        rows += [
            Row(
                f"{name}: omega_yx",
                "",
                f"{cell['step']:.5f}",
                f"within 2 % of {step:.5f}",
                abs(cell["step"] / step - 1) <= 0.02,
            ),
            Row(
                f"{name}: half squared error; adjusted",
                f"adjusted {TABLE1[1, cell['form'], problem]:g}",
                f"{cell['loss']:.4f}; {cell['adjusted']['mean']:.4f}",
                f"within 0.5 % and 3 standard errors of {loss:.4f}",
                abs(cell["loss"] - loss) <= 0.005 * loss + 3 * cell["adjusted"]["error"],
            ),
        ]
    return rows


def _draw_one_layer(values: Values, path: Path) -> None:
    groups = [
        {
            "name": f"{figures.MODELS[c['form']][0]} {problem_name(c['problem'])}",
            "paper": TABLE1[1, c["form"], c["problem"]],
            "ours": c["adjusted"]["mean"],
        }
        for c in values["cells"]
    ]
    figures.bars({"bars": groups}, path)


# GD++ at its optimum, without training by gradients of prompts.


def _run_gdpp(context: Context) -> Values:
    train, test = _by_scale(context, (20_000, 50_000), (200_000, 400_000))
    cells = []
    with jax.enable_x64(True):
        for problem in PROBLEMS:
            prompts = measure.prompts_of(problem, measure.TUNING_SEED, train)
            fresh = measure.prompts_of(problem, measure.TEST_SEED, test)
            for layers in (2, 3, 4):
                found = gd_plus_plus.optimum(prompts, layers)
                errors = np.asarray(gd_plus_plus.losses(fresh, found.yx, found.xx) - oracle_losses(fresh))
                adjusted = found.loss - float(oracle_losses(prompts).mean())
                cells.append(
                    {
                        "layers": layers,
                        "problem": problem,
                        "training": adjusted,
                        **measure.summarize(errors),
                        "yx": found.yx.tolist(),
                        "xx": found.xx.tolist(),
                    }
                )
    return {"scale": context.scale, "cells": cells}


def _rows_gdpp(values: Values) -> list[Row]:
    rows = []
    for cell in values["cells"]:
        layers, problem = cell["layers"], cell["problem"]
        reference = _GDPP_REFERENCE[layers].get(problem)
        near = reference is None or abs(cell["trimmed"] - reference) <= 0.03 * reference + 3 * cell["error"]
        rows.append(
            Row(
                f"{layers} layers, {problem_name(problem)}: on fresh prompts (on the training set)",
                f"{TABLE1[layers, 'gdpp', problem]:g}",
                f"{cell['mean']:.4g} ± {cell['error']:.1g}, trimmed {cell['trimmed']:.4g} ({cell['training']:.4g})",
                "" if reference is None else f"trimmed within 3 % + 3 standard errors of {reference}",
                None if reference is None else bool(near),
            )
        )
    return rows


def _draw_gdpp(values: Values, path: Path) -> None:
    groups = [
        {
            "name": f"{c['layers']} layers {problem_name(c['problem'])}",
            "paper": TABLE1[c["layers"], "gdpp", c["problem"]],
            "ours": c["trimmed"],
        }
        for c in values["cells"]
    ]
    figures.bars({"bars": groups}, path)


# Table 1 and figure 1: the grid; the second-order route.


def _run_table(context: Context, optimizer: str, forms: Sequence[str], depths: Sequence[int]) -> Values:
    cells, problems = [], ()
    for layers in depths:
        for form in forms:
            found = _models(_grid(context, form, layers, optimizer))
            problems = tuple(found)
            for problem, (models, best) in found.items():
                errors = measure.adjusted_errors(models, problem, _prompts(context)["test"], (layers,))[:, 0]
                seeds = [measure.summarize(row) for row in errors]
                cells.append(
                    {
                        "layers": layers,
                        "form": form,
                        "problem": problem,
                        "best": seeds[best]["mean"],
                        "trimmed": seeds[best]["trimmed"],
                        "seeds": seeds,
                    }
                )
    baselines = {problem: _baselines(context, problem) for problem in problems}
    return {"scale": context.scale, "problems": list(problems), "cells": cells, "baselines": baselines}


def _run_grid(context: Context) -> Values:
    return _run_table(context, "adam", FORMS, _depths(context))


def _bound(layers: int, form: str, problem: str) -> float:
    printed = TABLE1[layers, form, problem]
    return 1.15 * printed + 0.002 if layers <= 5 else 1.25 * printed + 0.003


def _rows_table(values: Values) -> list[Row]:
    rows, met = [], []
    for cell in values["cells"]:
        key = cell["layers"], cell["form"], cell["problem"]
        bound = _bound(*key)
        below_precision = TABLE1[key] < 1e-6  # for the noise-free problem the paper is at the floor of float32
        if not below_precision:
            met.append(cell["best"] <= bound)
        means = [seed["mean"] for seed in cell["seeds"]]
        nonfinite = max(seed["nonfinite"] for seed in cell["seeds"])
        rows.append(
            judged(
                values["scale"],
                f"{cell['layers']} layers, {figures.MODELS[cell['form']][0]}, {problem_name(cell['problem'])}",
                f"{TABLE1[key]:g}",
                f"{cell['best']:.3g}; trimmed {cell['trimmed']:.3g}; seeds {np.median(means):.3g} "
                f"({min(means):.3g} to {max(means):.3g})" + (f"; {nonfinite:.1g} not finite" if nonfinite else ""),
                f"<= {bound:.3g}" + (" (not counted)" if below_precision else ""),
                cell["best"] <= bound,
            )
        )
    share = float(np.mean(met)) if met else math.nan
    rows.insert(
        0,
        judged(
            values["scale"],
            "cells at most 1.15 x Table 1 + 0.002 (1.25 x + 0.003 from 6 layers on)",
            "",
            f"{sum(met)} of {len(met)}",
            "at least 80 %",
            share >= 0.8,
        ),
    )
    return rows + _orderings(values)


def _orderings(values: Values) -> list[Row]:
    """The paper's claims about figure 1, each over all cells to which it applies."""
    best = {(c["layers"], c["form"], c["problem"]): c["best"] for c in values["cells"]}

    def row(
        text: str, depth: int, top: int, forms: Sequence[str], holds: Callable[[float, float, Values], bool]
    ) -> Row:
        found = [
            holds(loss, best[layers, "gdpp", problem], values["baselines"][problem])
            for (layers, form, problem), loss in best.items()
            if form in forms and layers >= depth and problem.startswith("uniform") and int(problem[-1]) >= top
        ]
        where = f"{text}, from {depth} layers and sigma_max {top} on"
        return judged(values["scale"], where, "claimed", f"{sum(found)} of {len(found)}", "all", all(found))

    def near_constant(loss: float, _: float, baselines: Values) -> bool:
        return abs(loss / baselines["ConstRR"]["mean"] - 1) <= 0.05

    adaptive = ("diagonal", "full")
    return [
        row("Full and Diag below GD++", 3, 2, adaptive, lambda loss, gdpp, _: loss < gdpp),
        row("GD++ within 5 % of ConstRR", 4, 2, ("gdpp",), near_constant),
        row("Full and Diag below AdaRR", 4, 4, adaptive, lambda loss, _, b: loss < b["AdaRR"]["mean"]),
        row(
            "Full and Diag below 1.05 x TunedRR", 5, 5, adaptive, lambda loss, _, b: loss < 1.05 * b["TunedRR"]["mean"]
        ),
    ]


def _run_second_order(context: Context) -> Values:
    return _run_table(context, "lbfgs", ("gdpp", "diagonal"), (2, 3, 4))


# Figures 2, 3 and 6: by noise level.


def _panel(context: Context, problem: str, layers: int, sigmas: Sequence[float], adjusted: bool = True) -> Values:
    """Loss by noise level of the best seed of each model, and of the baselines tuned for this problem."""
    count = _by_scale(context, 4000, 20_000)
    tuned = measure.tuned_baselines(problem, _prompts(context)["tuning"])
    levels = [measure.baseline_profile(f"fixed:{sigma}", tuned, count) for sigma in sigmas]
    lift = np.array([0.0 if adjusted else level["oracle"] / 2 for level in levels])
    found: dict[str, dict[str, list]] = {"mean": {}, "trimmed": {}}
    for form in FORMS:
        models, best = _models(_grid(context, form, layers))[problem]
        profile = measure.profile(models[best : best + 1], sigmas, count, (layers,))
        for name, by_form in found.items():
            by_form[form] = (np.array(profile[name])[:, 0, 0] + lift).tolist()
    baselines = {name: (np.array([level[name]["mean"] for level in levels]) + lift).tolist() for name in _REFERENCE}
    return {
        "problem": problem,
        "layers": layers,
        "sigmas": list(sigmas),
        "models": found["mean"],
        "trimmed": found["trimmed"],
        "baselines": baselines,
    }


def _levels(context: Context, top: float) -> list[float]:
    step = _by_scale(context, 0.5, 0.25)
    return [step * i for i in range(round(top / step) + 1)]


def _run_figure2(context: Context) -> Values:
    deepest = _depths(context)[-1]
    tops = _by_scale(context, (2, 5), range(8))
    panels = [_panel(context, f"uniform:{top}", deepest, _levels(context, top + 1)) for top in tops]
    panels += [_panel(context, "uniform:5", layers, _levels(context, 6)) for layers in range(2, deepest)]
    return {"scale": context.scale, "adjusted": True, "panels": panels}


def _run_figure3(context: Context) -> Values:
    problems = _by_scale(context, ("levels:1,3",), ("levels:1,3", "levels:1,3,5"))
    depths = _depths(context)[1:]
    panels = [_panel(context, p, layers, _levels(context, 6)) for p in problems for layers in depths]
    return {"scale": context.scale, "adjusted": True, "panels": panels}


def _run_figure6(context: Context) -> Values:
    panel = _panel(context, "uniform:5", _depths(context)[-1], _levels(context, 6), adjusted=False)
    return {"scale": context.scale, "adjusted": False, "panels": [panel]}


def _at(panel: Values, series: Sequence[float], sigma: float) -> float:
    return float(np.interp(sigma, panel["sigmas"], series))


def _rows_figure2(values: Values) -> list[Row]:
    rows = []
    for panel in values["panels"]:
        name = f"{problem_name(panel['problem'])}, {panel['layers']} layers"
        top = float(panel["problem"].partition(":")[2])
        inside = [i for i, sigma in enumerate(panel["sigmas"]) if 1 <= sigma <= top]
        gdpp, constant = np.array(panel["models"]["gdpp"])[inside], np.array(panel["baselines"]["ConstRR"])[inside]
        if inside and panel["layers"] >= 4:
            gap = np.abs(gdpp - constant)
            passed = (gap <= 0.02 + 0.1 * constant).all()
            what, target = (
                f"{name}: GD++ beside ConstRR, largest gap",
                "within 0.02 + 10 % for noise from 1 to sigma_max",
            )
            rows.append(judged(values["scale"], what, "tracks", f"{gap.max():.3f}", target, passed))
        at_zero = {form: panel["models"][form][0] for form in FORMS}
        what, text = f"{name}: GD++, Diag, Full without noise", numbers(list(at_zero.values()))
        if panel["problem"] == "uniform:5" and panel["layers"] == 7:
            passed = max(at_zero["diagonal"], at_zero["full"]) < 0.1 and at_zero["gdpp"] > 0.5
            rows.append(judged(values["scale"], what, "", text, "> 0.5, < 0.1, < 0.1", passed))
        else:
            rows.append(Row(what, "", text))
    return rows


def _rows_figure3(values: Values) -> list[Row]:
    rows = []
    for panel in values["panels"]:
        name = f"{problem_name(panel['problem'])}, {panel['layers']} layers"
        claim = "Full better in distribution, Diag at 0 and 5"
        judge = panel["problem"] == "levels:1,3" and panel["layers"] == 7
        text, holds = _inside_and_outside(panel, "models")
        if judge:
            rows.append(judged(values["scale"], f"{name}: Diag, Full", claim, text, claim, holds))
        else:
            rows.append(Row(f"{name}: Diag, Full", "", text))
        rows.append(Row(f"{name}: the same without the largest 0.1 %", "", _inside_and_outside(panel, "trimmed")[0]))
    return rows


def _inside_and_outside(panel: Values, series: str) -> tuple[str, bool]:
    """Diag and Full at the levels of the training, and without noise and at 5; whether the paper's order holds."""
    levels = [float(level) for level in panel["problem"].partition(":")[2].split(",")]
    inside = [np.mean([_at(panel, panel[series][form], s) for s in levels]) for form in ("diagonal", "full")]
    outside = [[_at(panel, panel[series][form], s) for s in (0, 5)] for form in ("diagonal", "full")]
    text = f"in distribution {numbers(inside)}; without noise, at 5: {numbers(outside[0])}; {numbers(outside[1])}"
    return text, bool(inside[1] < inside[0] and np.less(*outside).all())


def _rows_figure6(values: Values) -> list[Row]:
    panel = values["panels"][0]
    series = {**{figures.MODELS[f][0]: v for f, v in panel["models"].items()}, **panel["baselines"]}
    return [
        Row(f"{name}: half squared error at noise 0, 1, 3, 5", "", numbers([_at(panel, s, x) for x in (0, 1, 3, 5)]))
        for name, s in series.items()
    ]


# Figure 4: learned matrices.


def _run_figure4(context: Context) -> Values:
    models, best = _models(_grid(context, "full", 4))["levels:1,3"]
    p, q = (np.asarray(m[...], float)[:, 0] for m in (models[best].p, models[best].q))
    return {"scale": context.scale, "p": p.tolist(), "q": q.tolist(), "shares": measure.diagonal_share(p, q)}


def _rows_figure4(values: Values) -> list[Row]:
    return [
        judged(
            values["scale"],
            f"layer {layer}: tied diagonal of {name.upper()}, share of the norm",
            "very diagonal heavy",
            f"{share[name]:.3f}",
            "> 0.9",
            share[name] > 0.9,
        )
        for layer, share in enumerate(values["shares"])
        for name in "qp"
    ]


# Figures 5 and 7: reading the prediction earlier.


def _run_figure5(context: Context) -> Values:
    curves = []
    for form in FORMS:
        for layers in _depths(context):
            models, _ = _models(_grid(context, form, layers))["uniform:5"]
            errors = measure.adjusted_errors(models, "uniform:5", _prompts(context)["test"], range(layers + 1))
            loss = [[measure.summarize(row)["trimmed"] for row in rows] for rows in errors.swapaxes(0, 1)]
            curves.append({"form": form, "layers": layers, "loss": loss})
    return {"scale": context.scale, "curves": curves}


def _rows_figure5(values: Values) -> list[Row]:
    rows = []
    for curve in values["curves"]:
        medians = np.median(curve["loss"], axis=1)
        name = f"{figures.MODELS[curve['form']][0]}, {curve['layers']} layers: median over seeds after each layer"
        if curve["layers"] == 1:
            rows.append(Row(name, "", numbers(medians)))
        else:
            falls = bool((np.diff(medians) < 0).all())
            rows.append(judged(values["scale"], name, "falls", numbers(medians), "falls with every layer", falls))
    return rows


def _run_figure7(context: Context) -> Values:
    depths = (*_depths(context)[1:], *_by_scale(context, (), (8,)))
    sigmas = [float(s) for s in range(11)] if context.scale == "cpu" else [0.5 * i for i in range(21)]
    panels = []
    for layers in depths:
        for form in FORMS:
            if context.leaves_out(_grid_name(form, layers)):
                continue
            models, _ = _models(_grid(context, form, layers))["uniform:5"]
            found = measure.profile(models, sigmas, _by_scale(context, 4000, 20_000), range(layers + 1))
            panels.append({"form": form, "layers": layers, "loss": np.median(found["trimmed"], axis=1).tolist()})
    return {"scale": context.scale, "sigmas": sigmas, "panels": panels}


def _rows_figure7(values: Values) -> list[Row]:
    """Where on the noise axis each layer helps most: the level at which the loss falls by the largest factor."""
    rows = []
    inside = [i for i, sigma in enumerate(values["sigmas"]) if sigma <= 5]
    for panel in values["panels"]:
        loss = np.maximum(np.array(panel["loss"])[inside], 1e-12)
        gains = np.log(loss[:, :-1] / loss[:, 1:])
        where = [values["sigmas"][inside[i]] for i in gains.argmax(0)]
        rows.append(
            Row(
                f"{figures.MODELS[panel['form']][0]}, {panel['layers']} layers: noise level that each layer helps most",
                {"gdpp": "high first, low last", "diagonal": "high, then low", "full": "low first"}[panel["form"]],
                numbers(where),
            )
        )
    return rows


# What the layers of a diagonal model do.


def _run_algorithm(context: Context) -> Values:
    layers = 4
    models, best = _models(_grid(context, "diagonal", layers))["uniform:5"]
    sigmas = [float(s) for s in range(6)]
    return {
        "scale": context.scale,
        "sigmas": sigmas,
        "omegas": {name: np.asarray(value).tolist() for name, value in models[best].omegas().items()},
        "terms": measure.layer_terms(models[best], sigmas, 1000),
    }


def _rows_algorithm(values: Values) -> list[Row]:
    rows = [Row(f"omega_{name} by layer", "", numbers(value)) for name, value in values["omegas"].items()]
    texts = {
        "rescale": "factor s of (1 + s) w",
        "step": "norm of the gradient step",
        "momentum": "norm of the momentum term",
    }
    for name, text in texts.items():
        for sigma in (0, 5):
            row = values["terms"][name][values["sigmas"].index(float(sigma))]
            rows.append(Row(f"{text} by layer, at noise {sigma}, median over prompts", "", numbers(row)))
    return rows


# AdaRR by gradient descent.


def _run_descent(context: Context) -> Values:
    steps = 400
    with jax.enable_x64(True):
        prompts = measure.prompts_of("uniform:5", measure.TEST_SEED, _by_scale(context, 10_000, 100_000))
        oracle = float(oracle_losses(prompts).mean())
        variance = estimated_variance(prompts, measure.EXAMPLES)
        path = np.asarray(descent_losses(prompts, variance, steps).mean(1)) - oracle
        closed = float(ridge_losses(prompts, variance).mean()) - oracle
    return {"scale": context.scale, "loss": path.tolist(), "closed_form": closed}


def _rows_descent(values: Values) -> list[Row]:
    loss, closed = np.array(values["loss"]), values["closed_form"]
    within = np.flatnonzero(np.abs(loss / closed - 1) > 0.05)[-1] + 1
    return [
        Row("adjusted loss of AdaRR, closed form", f"{TABLE1_BASELINES['AdaRR', 'uniform:5']:g}", f"{closed:.4f}"),
        Row("iterations until the loss stays within 5 % of it, each prompt's best step", "about 100", f"{within}"),
    ]


_DIFFERS_CPU = (
    "3 noise problems instead of 10, 1 to 4 layers instead of 1 to 7, 2 seeds instead of 5, 10000 steps of batch 256 "
    "instead of 200000 of 2048, learning rate 3e-3 with cosine decay instead of 1e-4"
)
_DIFFERS_GPU = (
    "40000 steps (20000 from 4 layers on) of batch 1024 and learning rate 2e-3 with cosine decay, instead of 200000 of "
    "2048 and 1e-4"
)
_DIFFERS_PAPER = "the paper's steps, batch and learning rate; initialisation 0.01 and clipping at norm 1 are ours"
_SCALES = {"cpu": _DIFFERS_CPU, "gpu": _DIFFERS_GPU, "paper": _DIFFERS_PAPER}


def _entry(
    title: str,
    claim: str,
    run: Callable[[Context], Values],
    rows: Callable[[Values], list[Row]],
    draw: Callable[[Values, Path], None],
    scales: dict[str, str] | None = None,
) -> Entry:
    return Entry(title, claim, scales or _SCALES, run, rows, draw)


ENTRIES = {
    "baselines": _entry(
        "Baselines of Table 1: ridge regression with constant, estimated and tuned noise level",
        "closed forms, tuned on each noise problem",
        _run_baselines,
        _rows_baselines,
        _draw_baselines,
        {"cpu": "tuned on 5e4 prompts, tested on 2e4", "gpu": "tuned on 1e6 prompts, tested on 1e5 as in the paper"},
    ),
    "one_layer": _entry(
        "Table 1, one layer: all models are one gradient step",
        "1 layer: the three models agree in every column",
        _run_one_layer,
        _rows_one_layer,
        _draw_one_layer,
        dict.fromkeys(
            ("cpu", "gpu"),
            "3000 steps of batch 1024, learning rate 0.01 decaying to 0, 4 of the 10 noise problems, 1 seed",
        ),
    ),
    "gd_plus_plus": _entry(
        "Table 1, GD++: its optimum, found directly",
        "GD++ with 2 to 4 layers; the printed values for two layers and weak noise are above what the model can reach",
        _run_gdpp,
        _rows_gdpp,
        _draw_gdpp,
        {
            "cpu": "BFGS on 2e4 prompts, tested on 5e4, instead of Adam",
            "gpu": "BFGS on 2e5 prompts, tested on 4e5, instead of Adam",
        },
    ),
    "second_order": _entry(
        "Table 1, two to four layers, by a quasi-Newton method",
        "the paper trains with Adam; three layers and more have local minima",
        _run_second_order,
        _rows_table,
        figures.table1,
        {
            "cpu": "L-BFGS, 200 steps on a fixed set of 16384 prompts; 3 noise problems, 2 seeds",
            "gpu": "L-BFGS, 200 steps on a fixed set of 131072 prompts",
        },
    ),
    "figure1": _entry(
        "Table 1 and figure 1: adjusted loss by depth and noise problem",
        "Full and Diag are close; GD++ stops at constant ridge regression; with 4 layers Full and Diag beat "
        "AdaRR, with 5 TunedRR, where the noise is strong",
        _run_grid,
        _rows_table,
        figures.table1,
    ),
    "figure2": _entry(
        "Figure 2: loss by noise level, models trained on U(0, sigma_max)",
        "GD++ follows constant ridge regression; AdaRR is exact without noise; from 3 layers on Full and Diag adapt",
        _run_figure2,
        _rows_figure2,
        figures.profiles,
    ),
    "figure3": _entry(
        "Figure 3: loss by noise level, models trained on two and three noise levels",
        "on {1, 3} Full is better in distribution and Diag extrapolates better; on {1, 3, 5} Full is wiggly",
        _run_figure3,
        _rows_figure3,
        figures.profiles,
    ),
    "figure4": _entry(
        "Figure 4: the matrices that four full layers learn on {1, 3}",
        "dominated by the diagonal",
        _run_figure4,
        _rows_figure4,
        figures.weights,
    ),
    "figure5": _entry(
        "Figure 5: the prediction read after each layer, U(0, 5)",
        "the error falls with every layer",
        _run_figure5,
        _rows_figure5,
        figures.readouts,
    ),
    "figure6": _entry(
        "Figure 6: unadjusted loss by noise level, U(0, 5)",
        "all methods grow with the noise",
        _run_figure6,
        _rows_figure6,
        figures.profiles,
    ),
    "figure7": _entry(
        "Figure 7: the prediction read after each layer, by noise level",
        "early layers of GD++ fit strong noise and late ones weak noise; Full improves weak noise first",
        _run_figure7,
        _rows_figure7,
        figures.readout_profiles,
    ),
    "algorithm": _entry(
        "The algorithm of four diagonal layers: gradient steps, momentum and rescaling by noise level",
        "omega_xy makes the step depend on the noise, omega_yy rescales the weights (sections 4 and 5); no numbers",
        _run_algorithm,
        _rows_algorithm,
        figures.algorithm,
    ),
    "descent": _entry(
        "AdaRR by gradient descent: how many iterations",
        "about 100 iterations match AdaRR",
        _run_descent,
        _rows_descent,
        figures.descent,
        {"cpu": "1e4 prompts; the paper does not say how its steps are chosen", "gpu": "1e5 prompts; likewise"},
    ),
}
