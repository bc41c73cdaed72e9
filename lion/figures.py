"""Drawings of the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def dots(
    titles: Mapping[str, str], panels: Mapping[str, Mapping[str, Sequence[float]]], label: str, path: Path
) -> None:
    """A panel for each measurement, a line for each arm, a dot for each seed and a bar at their mean.

    Args:
      titles: of the arms, from top to bottom.
      panels: title of the panel -> arm -> values; an arm that was not measured stays empty.
      label: of the values.
      path: of the PNG.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.2 + 2.6 * len(panels), 0.6 + 0.26 * len(titles)), layout="constrained", sharey=True
    )
    places = {arm: -place for place, arm in enumerate(titles)}
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        for arm, found in values.items():
            axis.plot(found, [places[arm]] * len(found), "o", ms=3, alpha=0.6, color="tab:blue")
            axis.plot(np.mean(found), places[arm], "|", ms=12, mew=2, color="black")
        axis.set(title=name, xlabel=label, yticks=list(places.values()), yticklabels=list(titles.values()))
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
