"""Drawings: each takes what an entry measured and writes a PNG."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training import plotting

BLUE, RED, GREEN, PURPLE, GREY = "tab:blue", "tab:red", "tab:green", "tab:purple", "0.35"


_figure = functools.partial(plotting.figure, width=4.2, height=3.4)


def _band(axes: Any, x: Sequence[float], values: np.ndarray, color: str, label: str, **style: Any) -> None:
    """Mean and standard deviation over seeds, values [points, seeds]."""
    mean, deviation = values.mean(1), values.std(1)
    axes.plot(x, mean, color=color, label=label, lw=1.6, **style)
    axes.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.2, lw=0)


def _level(axes: Any, value: float, color: str, label: str, style: str = "--") -> None:
    axes.axhline(value, color=color, ls=style, lw=1.2, label=label)


def _log_loss(axes: Any, curve: Mapping[str, Any], levels: Sequence[tuple[float, str, str]]) -> None:
    """ln of the test loss over the steps, with horizontal lines at `(loss, color, label)`."""
    _band(axes, curve["step"], np.log(np.array(curve["value"])), BLUE, "linear transformer")
    for loss, color, label in levels:
        _level(axes, np.log(loss), color, f"{label}: {loss:.4g}")
    axes.set(xlabel="step", ylabel="ln test loss")
    axes.legend(fontsize=8)


def _distances(
    axes: Any, layer: int, curves: Mapping[str, Any], names: Mapping[str, tuple[str, str]], title: str
) -> None:
    """Dist over the steps of the layer's matrix, for each `metric: (color, label)`."""
    for name, (color, label) in names.items():
        _band(axes, curves[name]["step"], np.array(curves[name]["value"])[..., layer], color, label)
    axes.set(xlabel="step", ylabel="Dist to multiples of I", ylim=(0, 1.02), title=title)
    axes.legend(fontsize=8)


_A_DISTANCES = {
    "structure/dist_a": (BLUE, r"$\Sigma^{1/2} A \Sigma^{1/2}$"),
    "structure/dist_a_raw": (RED, r"$A$"),
}


def theorem3(values: dict[str, Any], path: Path) -> None:
    """Figure 1: distances of A to the predicted preconditioner and to the identity, and the loss."""
    figure, axes = _figure(4)
    for layer in range(3):
        _distances(axes[0, layer], layer, values["curves"], _A_DISTANCES, f"$A_{layer}$")
    levels = [
        (values["exact"], "black", "exact optimum"),
        (values["pgd"], GREEN, "3 steps of preconditioned GD"),
        (values["gd"], PURPLE, "3 steps of GD"),
    ]
    _log_loss(axes[0, 3], values["curves"]["test/loss"], levels)
    plotting.save(figure, path)


def theorem4(values: dict[str, Any], path: Path) -> None:
    """Figure 3: distances of B and A, and the loss."""
    figure, axes = _figure(3, 2)
    for layer in range(2):
        _distances(axes[0, layer], layer, values["curves"], {"structure/dist_b": (BLUE, "$B$")}, f"$B_{layer}$")
    levels = [
        (loss, color, f"exact optimum, basin {i + 1}")
        for i, (loss, color) in enumerate(zip(values["exact"], ("black", GREY), strict=True))
    ]
    _log_loss(axes[0, 2], values["curves"]["test/loss"], levels)
    for layer in range(3):
        _distances(axes[1, layer], layer, values["curves"], _A_DISTANCES, f"$A_{layer}$")
    plotting.save(figure, path)


def _printed_matrix(axes: Any, entries: Sequence[Sequence[float]], title: str) -> None:
    """A heat map with its entries printed."""
    plotting.matrix(axes, entries, title)
    array = np.array(entries)
    for (row, column), entry in np.ndenumerate(array):
        color = "white" if abs(entry) > 0.6 * np.abs(array).max() else "black"
        axes.text(column, row, f"{entry:.2f}", ha="center", va="center", fontsize=8, color=color)


def heat_maps(values: dict[str, Any], path: Path) -> None:
    """Figures 2, 4 and 5: learned matrices of one seed, their entries printed."""
    matrices = values["matrices"]
    figure, axes = _figure(len(matrices), width=3.4, height=3.4)
    for ax, (title, entries) in zip(axes[0], matrices.items(), strict=True):
        _printed_matrix(ax, entries, title)
    plotting.save(figure, path)


def theorem1(values: dict[str, Any], path: Path) -> None:
    """Theorem 1: the learned block of Q beside the closed form, and the distance over the steps."""
    spectra = values["spectra"]
    figure, axes = _figure(3, len(spectra), width=3.6, height=3.2)
    for row, (name, measured) in zip(axes, spectra.items(), strict=True):
        _printed_matrix(row[0], measured["learned"], f"{name}: learned")
        _printed_matrix(row[1], measured["closed_form"], f"{name}: closed form")
        _band(
            row[2],
            measured["curve"]["step"],
            np.array(measured["curve"]["value"]),
            BLUE,
            "distance from the closed form",
        )
        row[2].set(xlabel="step", yscale="log")
        row[2].legend(fontsize=8)
    plotting.save(figure, path)


def structure_and_loss(values: dict[str, Any], path: Path) -> None:
    """Learned multiples of the identity over the steps, with the exact optimum as lines, and the loss."""
    curves = values["curves"]
    names = [name for name in ("structure/a", "structure/b") if name in curves]
    figure, axes = _figure(len(names) + 1)
    for ax, name in zip(axes[0], names, strict=False):
        series = np.array(curves[name]["value"])
        used = series.shape[-1] - (name == "structure/b")
        for layer in range(used):
            _band(ax, curves[name]["step"], series[..., layer], f"C{layer}", f"layer {layer}")
        for optimum in values["optimum"][name[-1]]:
            ax.axhline(optimum, color="black", ls="--", lw=1)
        ax.plot([], [], "k--", lw=1, label="exact optimum")
        ax.set(xlabel="step", title="whitened $A$" if name.endswith("a") else "$B$", ylabel="multiple of I")
        ax.legend(fontsize=8)
    _log_loss(axes[0, -1], curves["test/loss"], [(values["exact"], "black", "exact optimum")])
    plotting.save(figure, path)


def comparison(values: dict[str, Any], path: Path, xlabel: str, logarithmic: bool) -> None:
    """Figures 6 and 7: the transformer beside gradient descent and least squares."""
    figure, axes = _figure(1, width=6.4, height=4.6)
    ax = axes[0, 0]
    points = values["points"]
    x = [point["x"] for point in points]
    scale = np.log if logarithmic else np.asarray
    _band(ax, x, scale(np.array([p["transformer"]["trimmed"] for p in points])), RED, "linear transformer", marker="o")
    styles = {
        "gd": (BLUE, "gradient descent"),
        "pgd": (GREEN, "preconditioned gradient descent"),
        "ols": (PURPLE, "least squares"),
    }
    for name, (color, label) in styles.items():
        if logarithmic and name == "ols":
            continue
        for variant, style in (("coded", "-"), ("all", ":")):
            losses = np.array([p["baselines"][name][variant]["loss"] for p in points])
            suffix = "as coded by the authors" if variant == "coded" else "with all examples"
            ax.plot(x, scale(losses), style, color=color, marker=".", label=f"{label}, {suffix}", lw=1.2)
    exact = scale(np.array([p["exact"] for p in points]))
    ax.plot(x, exact, "k_", ms=14, label="exact optimum of the stationary family")
    ax.set(xlabel=xlabel, ylabel="ln loss" if logarithmic else "loss", xticks=x)
    ax.legend(fontsize=8)
    plotting.save(figure, path)


def basins(values: dict[str, Any], path: Path) -> None:
    """How often each recipe and learning rate ends in each basin."""
    cells = values["cells"]
    figure, axes = _figure(1, width=1.1 * len(cells) + 2.5, height=4.0)
    ax = axes[0, 0]
    labels = [f"{c['recipe']}\n{c['data']}\nrate {c['rate']:g}" for c in cells]
    bottom = np.zeros(len(cells))
    for kind, color in (("basin 1", BLUE), ("basin 2", RED), ("elsewhere", "0.7"), ("diverged", "0.2")):
        heights = np.array([c["counts"][kind] / sum(c["counts"].values()) for c in cells])
        ax.bar(range(len(cells)), heights, bottom=bottom, color=color, label=kind)
        bottom += heights
    ax.set(xticks=range(len(cells)), ylabel="fraction of seeds", ylim=(0, 1.25))
    ax.set_xticklabels(labels, fontsize=7)
    ax.legend(ncol=4, fontsize=8, loc="upper center")
    plotting.save(figure, path)
