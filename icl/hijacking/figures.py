"""Drawings: each takes what an entry measured and writes a PNG."""

from pathlib import Path
from typing import Any

import numpy as np

from training import plotting


def panels(values: dict[str, Any], path: Path) -> None:
    """Curves in panels, `{"title", "xlabel", "ylabel", "x", "series": {label: [x] or [x][seeds]}}` each."""
    shown = values["panels"]
    columns = min(len(shown), 4)
    drawn, axes = plotting.figure(columns, -(-len(shown) // columns))
    for ax, panel in zip(axes.flat, shown, strict=False):
        for label, series in panel["series"].items():
            plotting.spread(ax, panel["x"], np.reshape(series, (len(panel["x"]), -1)), label, marker=".")
        ax.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"], **panel.get("axes", {}))
        ax.legend(fontsize=6)
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    plotting.save(drawn, path)
