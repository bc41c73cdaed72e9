"""Reproductions of a paper's tables and figures: what an entry is, how it runs, and what it leaves behind.

A paper's package defines `ENTRIES` in its `reproduce` module; `scripts/reproduce.py` finds and runs them.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from training import loop, metrics
from training.config import differences, load, override
from training.errors import UserError
from training.provenance import provenance


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: a quantity, what the paper says, and what came out."""

    quantity: str
    paper: str  # the paper's number; "" where it gives none
    ours: str
    target: str = ""  # the criterion for this quantity
    passed: bool | None = None  # None: reported, not judged


@dataclasses.dataclass(frozen=True)
class Entry:
    """A table or a figure of a paper.

    Attributes:
      title: what it shows, in one line.
      claim: what the paper says of it.
      scales: for each scale at which it can be run, what differs there from the paper's set-up.
      run: trains and measures; returns numbers that JSON can hold.
      rows: the table, from what `run` returned.
      draw: the figure as a PNG, from what `run` returned.
    """

    title: str
    claim: str
    scales: Mapping[str, str]
    run: Callable[["Context"], dict[str, Any]]
    rows: Callable[[dict[str, Any]], Sequence[Row]]
    draw: Callable[[dict[str, Any], Path], None]


@dataclasses.dataclass
class Run:
    """A finished training that an entry asked for."""

    config: ConfigDict
    workdir: Path
    result: loop.Result | None = None  # None where only its metrics were asked for
    recorded: Mapping[str, Any] | None = None  # its `record` in an earlier result, which then counts

    def series(self, name: str) -> dict[str, Any]:
        """Steps and values of one metric, as arrays; see `training.metrics.read`."""
        return metrics.read(self.workdir)[name]

    def record(self) -> dict[str, Any]:
        """Where the training comes from, what it took, its config, and its last metrics."""
        if self.recorded is not None:
            return dict(self.recorded)
        finished = loop.read_finished(self.workdir)
        return {
            "seconds": finished["wall_seconds"],
            **finished["provenance"],
            "config": self.config.to_dict(),
            "metrics": finished["metrics"],
        }


class Context:
    """What an entry needs to run: its scale, and trainings that entries of one paper share.

    Args:
      scale: one of the entry's.
      workdir: folder of the trainings.
      finished_only: nothing is trained; see `metrics`.
      recorded: trainings of an earlier result by name, see `Run.record`, that count where they had the same config and
        the workdir has none: so a table goes on from another machine's.
    """

    def __init__(
        self,
        scale: str,
        workdir: Path,
        finished_only: bool = False,
        recorded: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.scale, self._workdir, self._finished_only = scale, workdir, finished_only
        self._recorded = recorded or {}
        self.runs: dict[str, Run] = {}

    def train(self, name: str, config: str, overrides: Mapping[str, Any] | None = None) -> Run:
        """Trains `config` (a file with an optional argument) in the folder `name`, or resumes, or reads the result."""
        resolved = override(load(config), overrides or {})
        workdir = self._folder(name)
        if self.leaves_out(name):
            raise UserError(f"the training {workdir} is not finished; leave --finished_only away")
        self.runs[name] = Run(resolved, workdir, loop.train(resolved, workdir))
        return self.runs[name]

    def leaves_out(self, name: str) -> bool:
        """Whether the training `name` is not finished and only finished ones count: its cells stay empty."""
        return self._finished_only and loop.read_finished(self._folder(name)) is None

    def metrics(self, name: str, config: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The last metrics of such a training; of a finished one the model is not loaded.

        None where the training is not finished and only finished ones count.
        """
        resolved, workdir = override(load(config), overrides or {}), self._folder(name)
        finished, recorded = loop.read_finished(workdir), self._recorded.get(name)
        if finished is None and recorded is not None and not differences(json.dumps(recorded["config"]), resolved):
            self.runs[name] = Run(resolved, workdir, recorded=recorded)
            return recorded["metrics"]
        if finished is None and self._finished_only:
            return None
        loop.claim_workdir(workdir, resolved)
        self.runs[name] = Run(resolved, workdir)
        return loop.train(resolved, workdir).metrics if finished is None else finished["metrics"]

    def _folder(self, name: str) -> Path:
        return self._workdir / self.scale / name


def reproduce(
    name: str,
    entry: Entry,
    scale: str,
    workdir: Path,
    results: Path,
    *,
    finished_only: bool = False,
    keep_recorded: bool = False,
) -> dict[str, Any]:
    """Runs an entry and writes `<results>/<name>.<scale>.json`, `.png` and `.md`; returns what the JSON holds.

    With `keep_recorded`, the trainings that the JSON holds already are not run again; see `Context`.
    """
    path = results / f"{name}.{scale}.json"
    recorded = json.loads(path.read_text())["trainings"] if keep_recorded and path.exists() else {}
    context = Context(scale, workdir, finished_only, recorded)
    begin = time.monotonic()
    values = entry.run(context)
    record = {
        "entry": name,
        "title": entry.title,
        "claim": entry.claim,
        "scale": scale,
        "differs": entry.scales[scale],
        "command": f"python scripts/reproduce.py {name} --scale={scale}",
        "seconds": round(time.monotonic() - begin, 1),
        **provenance(),
        "trainings": {key: run.record() for key, run in context.runs.items()},
        "values": values,
        "rows": [dataclasses.asdict(row) for row in entry.rows(values)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.replace(path, json.dumps(record, indent=1) + "\n")
    render(entry, path)
    return record


def render(entry: Entry, path: Path) -> None:
    """Writes the table and the figure that belong to a result, from its JSON file."""
    record = json.loads(path.read_text())
    rows = [Row(**row) for row in record["rows"]]
    metrics.replace(path.with_suffix(".md"), markdown(record, rows))
    entry.draw(record["values"], path.with_suffix(".png"))


def markdown(record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The result as a Markdown page: claim, table, and how it was made."""
    lines = [
        f"# {record['title']}",
        "",
        f"The paper: {record['claim']}",
        "",
        "| quantity | paper | ours | criterion | met |",
        "|---|---|---|---|---|",
        *(f"| {r.quantity} | {r.paper} | {r.ours} | {r.target} | {_mark(r.passed)} |" for r in rows),
        "",
        f"Differs from the paper's set-up: {record['differs']}",
        "",
        f"`{record['command']}`, {record['date']}, revision {record['revision']}, {record['device']}, "
        f"JAX {record['jax']}, {record['seconds']:.0f} s.",
        "",
        *(
            f"* training `{name}`: {t['seconds']:.0f} s on {t['device']}, {t['date']}, revision {t['revision']}"
            for name, t in record["trainings"].items()
        ),
        "",
        f"![{record['title']}]({Path(record['entry']).name}.{record['scale']}.png)",
        "",
    ]
    return "\n".join(lines)


def _mark(passed: bool | None) -> str:
    return "" if passed is None else ("yes" if passed else "**no**")
