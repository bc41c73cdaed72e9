"""Drawings: each takes what an entry measured and writes a PNG."""

from pathlib import Path
from typing import Any

import numpy as np

from icl.versatile.paper import problem_name
from training import plotting

MODELS = {"gdpp": ("GD++", "tab:green"), "diagonal": ("Diag", "tab:orange"), "full": ("Full", "tab:blue")}
_TOP = 10.0
BASELINES = {"ConstRR": "0.6", "AdaRR": "0.35", "TunedRR": "0.0"}


def _baseline_levels(axes: Any, baselines: dict[str, Any]) -> None:
    for name, color in BASELINES.items():
        axes.axhline(baselines[name]["mean"], color=color, ls="--", lw=1.1, label=name)


def table1(values: dict[str, Any], path: Path, problems: tuple[str, ...] | None = None) -> None:
    """Figure 1 (and the top left of figure 3): adjusted loss by depth, a panel for each noise problem.

    Dotted: without the largest 0.1 % of the prompts' losses. What is above `_TOP`, or not finite, is drawn there.
    """
    shown = [p for p in values["problems"] if problems is None or p in problems]
    drawn, axes = plotting.figure(min(len(shown), 5), -(-len(shown) // 5))
    for ax, problem in zip(axes.flat, shown, strict=False):
        for form, (label, color) in MODELS.items():
            cells = [c for c in values["cells"] if c["form"] == form and c["problem"] == problem]
            layers = [c["layers"] for c in cells]
            for key, style in (("best", "o-"), ("trimmed", ":")):
                loss = np.minimum([c[key] for c in cells], _TOP)
                ax.plot(layers, loss, style, color=color, label=label if key == "best" else None, ms=4)
        _baseline_levels(ax, values["baselines"][problem])
        ax.set(title=problem_name(problem), xlabel="layers", yscale="log")
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    axes[0, 0].set_ylabel("adjusted loss")
    axes[0, 0].legend(fontsize=7)
    plotting.save(drawn, path)


def profiles(values: dict[str, Any], path: Path) -> None:
    """Figures 2, 3 and 6: loss by noise level; a panel for each training problem and depth.

    Dotted: without the largest 0.1 % of the prompts' losses, which can make the mean of a deep model.
    """
    panels = values["panels"]
    columns = min(len(panels), 4)
    drawn, axes = plotting.figure(columns, -(-len(panels) // columns))
    for ax, panel in zip(axes.flat, panels, strict=False):
        for form, profile in panel["models"].items():
            label, color = MODELS[form]
            ax.plot(panel["sigmas"], profile, color=color, label=label)
            ax.plot(panel["sigmas"], panel["trimmed"][form], ":", color=color)
        for name, color in BASELINES.items():
            ax.plot(panel["sigmas"], panel["baselines"][name], "--", color=color, label=name, lw=1.1)
        top = max(3 * np.median(panel["baselines"]["TunedRR"]), 0.02) if values["adjusted"] else 6
        ax.set(title=f"{problem_name(panel['problem'])}, {panel['layers']} layers", xlabel="noise level", ylim=(0, top))
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    axes[0, 0].legend(fontsize=7)
    plotting.save(drawn, path)


def readouts(values: dict[str, Any], path: Path) -> None:
    """Figure 5: loss by the number of layers after which the prediction is read, a panel for each model."""
    forms = list(dict.fromkeys(curve["form"] for curve in values["curves"]))
    drawn, axes = plotting.figure(len(forms))
    for ax, form in zip(axes[0], forms, strict=True):
        for curve in values["curves"]:
            if curve["form"] == form:
                x = range(len(curve["loss"]))
                plotting.spread(ax, x, np.clip(curve["loss"], 1e-12, 1e3), f"{curve['layers']} layers", marker=".")
        ax.set(title=MODELS[form][0], xlabel="read after layer", yscale="log")
    axes[0, 0].set_ylabel("adjusted loss")
    axes[0, 0].legend(fontsize=7)
    plotting.save(drawn, path)


def readout_profiles(values: dict[str, Any], path: Path) -> None:
    """Figure 7: loss by noise level after each layer; rows are depths, columns models."""
    depths = sorted({p["layers"] for p in values["panels"]})
    forms = list(dict.fromkeys(p["form"] for p in values["panels"]))
    drawn, axes = plotting.figure(len(forms), len(depths), height=2.4)
    for panel in values["panels"]:
        ax = axes[depths.index(panel["layers"]), forms.index(panel["form"])]
        for layer in range(1, panel["layers"] + 1):
            ax.plot(values["sigmas"], [row[layer] for row in panel["loss"]], label=f"layer {layer}", lw=1.1)
        ax.set(title=f"{MODELS[panel['form']][0]}, {panel['layers']} layers", ylim=(0, 1))
    axes[-1, -1].legend(fontsize=6)
    plotting.save(drawn, path)


def weights(values: dict[str, Any], path: Path) -> None:
    """Figure 4: Q above, P below."""
    drawn, axes = plotting.figure(len(values["q"]), 2, width=2.6, height=2.6)
    for layer, (q, p) in enumerate(zip(values["q"], values["p"], strict=True)):
        plotting.matrix(axes[0, layer], q, f"$Q^{layer}$")
        plotting.matrix(axes[1, layer], p, f"$P^{layer}$")
    plotting.save(drawn, path)


def algorithm(values: dict[str, Any], path: Path) -> None:
    """What the layers of a diagonal model do, by noise level."""
    drawn, axes = plotting.figure(4)
    for ax, name, label in (
        (axes[0, 0], "rescale", r"$\omega_{yy} \lambda$: rescaling of w"),
        (axes[0, 1], "step", r"$\|\Pi g\|$: gradient step"),
        (axes[0, 2], "momentum", r"$\|\Phi u\|$: momentum"),
    ):
        for layer in range(len(values["terms"][name][0])):
            ax.plot(values["sigmas"], [row[layer] for row in values["terms"][name]], label=f"layer {layer + 1}")
        ax.set(xlabel="noise level", title=label)
    axes[0, 0].legend(fontsize=7)
    for name, numbers in values["omegas"].items():
        axes[0, 3].plot(range(1, len(numbers) + 1), numbers, "o-", label=rf"$\omega_{{{name}}}$", ms=4)
    axes[0, 3].set(xlabel="layer", title="learned numbers")
    axes[0, 3].legend(fontsize=7)
    plotting.save(drawn, path)


def bars(values: dict[str, Any], path: Path) -> None:
    """The paper's numbers beside ours, one group for each line of the table."""
    groups = values["bars"]
    drawn, axes = plotting.figure(1, width=max(5.0, 0.45 * len(groups)), height=3.6)
    x = np.arange(len(groups))
    axes[0, 0].bar(x - 0.2, [g["paper"] for g in groups], 0.4, label="paper", color="0.6")
    axes[0, 0].bar(x + 0.2, [g["ours"] for g in groups], 0.4, label="ours", color="tab:blue")
    axes[0, 0].set_xticks(x, [g["name"] for g in groups], rotation=90, fontsize=7)
    axes[0, 0].legend()
    plotting.save(drawn, path)


def descent(values: dict[str, Any], path: Path) -> None:
    """Loss of AdaRR by gradient descent over the steps, relative to the closed form."""
    drawn, axes = plotting.figure(1, width=5.0, height=3.4)
    axes[0, 0].plot(values["loss"], label="gradient descent")
    axes[0, 0].axhline(values["closed_form"], color="0.3", ls="--", label="AdaRR")
    axes[0, 0].set(xlabel="iterations", ylabel="adjusted loss", yscale="log")
    axes[0, 0].legend()
    plotting.save(drawn, path)
