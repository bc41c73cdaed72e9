"""Drawings of the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from training import plotting


def dots(
    titles: Mapping[str, str], panels: Mapping[str, Mapping[str, Sequence[float]]], label: str, path: Path
) -> None:
    """A panel for each measurement, a line for each arm, a dot for each seed and a bar at their mean.

    What is below half of a panel's median is written at the edge in place of a dot, and such an arm has no mean.

    Args:
      titles: of the arms, from top to bottom.
      panels: title of the panel -> arm -> values; an arm that was not measured stays empty.
      label: of the values.
      path: of the PNG.
    """
    width = 2.6 + 2.2 / len(panels)
    figure, axes = plotting.figure(len(panels), width=width, height=0.9 + 0.26 * len(titles), sharey=True)
    places = {arm: -place for place, arm in enumerate(titles)}
    for axis, (name, values) in zip(axes[0], panels.items(), strict=True):
        edge = np.median([x for found in values.values() for x in found]) / 2 if values else 0
        for arm, found in values.items():
            shown, far = ([x for x in found if (x >= edge) == near] for near in (True, False))
            axis.plot(shown, [places[arm]] * len(shown), "o", ms=3, alpha=0.6, color="tab:blue")
            if far:
                text = "\u2190 " + ", ".join(f"{x:.3g}" for x in far)
                axis.text(0.02, places[arm], text, transform=axis.get_yaxis_transform(), va="center", fontsize=7)
            else:
                axis.plot(np.mean(found), places[arm], "|", ms=12, mew=2, color="black")
        axis.set(title=name, xlabel=label, yticks=list(places.values()), yticklabels=list(titles.values()))
        axis.set_ylim(0.6 - len(titles), 0.6)  # also where the last arms were not measured
        axis.grid(axis="y", alpha=0.3)
    plotting.save(figure, path)


def curves(
    panels: Mapping[str, Mapping[str, Mapping[float, float]]], x_label: str, y_labels: Mapping[str, str], path: Path
) -> None:
    """A panel for each quantity, a line for each name, over a common axis; both axes are logarithmic.

    Args:
      panels: title of the panel -> name of the line -> x -> y; what was not measured is left out.
      x_label: of the common axis.
      y_labels: by title of the panel.
      path: of the PNG.
    """
    from matplotlib import colormaps

    figure, axes = plotting.figure(len(panels), width=5.2, height=4)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colors = colormaps["tab20"]
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            style = {"marker": "o", "ms": 3, "lw": 1.2, "color": colors(names.index(name) % 20)}
            axis.plot(list(points), list(points.values()), label=name, **style)
        axis.set(title=title, xlabel=x_label, ylabel=y_labels[title], xscale="log", yscale="log")
        measured = sorted({x for points in lines.values() for x in points})
        axis.set_xticks(measured, [f"{x:g}" for x in measured])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    plotting.save(figure, path)
