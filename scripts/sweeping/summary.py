"""What a sweep found: one row per point, as a table to read and as JSON to compute with."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.sweeping.points import Point
from scripts.sweeping.runner import Status, status, write_atomically


def summarize(points: Sequence[Point], workdir: Path) -> list[Status]:
    """Prints the table, writes `summary.md` and `summary.json`, and returns the points' statuses."""
    statuses = [status(point) for point in points]
    records = [p.record() if s is Status.FINISHED else None for p, s in zip(points, statuses, strict=True)]
    text = table(points, statuses, records)
    print(text)
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "summary.md", f"{text}\n\nMetrics with ±: mean and standard deviation over the seeds.\n")
    rows = [
        {"point": point.name, "overrides": point.overrides, "status": state, **(record or {})}
        for point, state, record in zip(points, statuses, records, strict=True)
    ]
    write_atomically(workdir / "summary.json", json.dumps(rows, indent=2, default=str) + "\n")
    return statuses


def table(points: Sequence[Point], statuses: Sequence[Status], records: Sequence[dict[str, Any] | None]) -> str:
    """A Markdown table whose columns line up: settings, metrics, seconds, status."""
    found = [_scalars(point, record) for point, record in zip(points, records, strict=True)]
    metrics = list(dict.fromkeys(name for values in found for name in values))
    rows = [[*points[0].settings, *metrics, "seconds", "status"]]
    for point, state, record, values in zip(points, statuses, records, found, strict=True):
        seconds = format(record["wall_seconds"], ".1f") if record else ""
        rows.append(
            [
                *(str(value) for value in point.settings.values()),
                *(_format(values[name]) if name in values else "" for name in metrics),
                seconds,
                str(state),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _scalars(point: Point, record: dict[str, Any] | None) -> dict[str, list[float]]:
    """The metrics that are one number per replica; those that are arrays stay in `finished.json`."""
    if record is None:
        return {}
    replicas = len(point.config.seeds) * math.prod(len(values) for _, values in point.config.replicate)
    rows = {name: value if replicas > 1 else [value] for name, value in record["metrics"].items()}
    return {name: row for name, row in rows.items() if not any(isinstance(value, list) for value in row)}


def _format(values: Sequence[float]) -> str:
    """A metric; one value per seed becomes mean ± sample standard deviation."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    return f"{mean:.4g} ± {deviation:.2g}"
