"""What the drawings of results share. Matplotlib is imported when something is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def figure(
    columns: int, rows: int = 1, width: float = 3.6, height: float = 3.0, **options: Any
) -> tuple[Any, np.ndarray]:
    """A figure and its axes, [rows, columns], each `width` x `height` inches; further options of `plt.subplots`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def save(drawn: Any, path: Path) -> None:
    """Writes the PNG and frees the figure."""
    import matplotlib.pyplot as plt

    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def spread(axes: Any, x: Sequence[float], values: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """Median over the last axis of values [points, seeds], with a band from the least to the largest."""
    array = np.asarray(values, float)
    line = axes.plot(x, np.median(array, axis=1), label=label, **{"lw": 1.5, **style})[0]
    axes.fill_between(x, array.min(1), array.max(1), color=line.get_color(), alpha=0.2, lw=0)


def matrix(axes: Any, values: Sequence[Sequence[float]], title: str) -> None:
    """A heat map with a symmetric colour scale."""
    array = np.asarray(values, float)
    limit = np.abs(array).max() or 1.0
    axes.imshow(array, cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set(title=title, xticks=[], yticks=[])
