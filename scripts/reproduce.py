"""Reproduces tables and figures of the papers.

  python scripts/reproduce.py --list
  python scripts/reproduce.py icl/preconditioned_gd/figure1 --scale=cpu
  python scripts/reproduce.py icl/preconditioned_gd --scale=gpu       all of a paper's entries

An entry trains what it needs (a training that was killed is resumed, a finished one is not run again) and writes
JSON, a figure and a table with the paper's numbers into the results folder.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training.durations import format_seconds  # noqa: E402
from training.errors import UserError, nearest, reported  # noqa: E402


def find_entries() -> dict:
    """All entries by full name, such as `icl/preconditioned_gd/figure1`: those of every `reproduce` module."""
    entries = {}
    for path in sorted(ROOT.glob("*/**/reproduce.py")):
        package = path.parent.relative_to(ROOT)
        if package.parts[0] in ("icl", "deltanet", "lion"):
            module = importlib.import_module(".".join([*package.parts, "reproduce"]))
            entries |= {f"{package.as_posix()}/{name}": entry for name, entry in module.ENTRIES.items()}
    return entries


def select(entries: dict, names: list[str]) -> dict:
    """The entries with these names, or below these folders."""
    chosen = {}
    for name in names:
        name = name.rstrip("/")
        found = {key: entry for key, entry in entries.items() if key == name or key.startswith(f"{name}/")}
        if not found:
            raise UserError(f"there is no entry {name!r}: {nearest(name, entries)}")
        chosen |= found
    return chosen


def show_list(entries: dict, results: Path) -> None:
    """Every entry: its scales, and for each result what it cost, how many criteria it met, and where it stands."""
    for name, entry in entries.items():
        print(f"{name}\n    {entry.title}")
        for scale, differs in entry.scales.items():
            print(f"    {scale:6s}{_status(results / f'{name}.{scale}.json')}\n          {differs}")


def _status(path: Path) -> str:
    if not path.exists():
        return "no result yet"
    record = json.loads(path.read_text())
    judged = [row["passed"] for row in record["rows"] if row["passed"] is not None]
    trainings = record["trainings"].values()
    if trainings:
        devices = ", ".join(sorted({training["device"] for training in trainings}))
        cost = f"{format_seconds(sum(training['seconds'] for training in trainings))} of training on {devices}"
    else:
        cost = f"{format_seconds(record['seconds'])} on {record['device']}"
    return f"{sum(judged)} of {len(judged)} criteria met; {cost}; {path}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="entries, or folders of entries")
    parser.add_argument("--list", action="store_true", help="print all entries and the state of their results")
    parser.add_argument("--scale", choices=("cpu", "gpu", "paper"), default="cpu")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "reproduce", help="folder of the trainings")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--redraw", action="store_true", help="only draw figures and tables again, from the JSON")
    parser.add_argument("--finished_only", action="store_true", help="train nothing; unfinished cells stay empty")
    parser.add_argument(
        "--keep_recorded",
        action="store_true",
        help="do not train again what the result's JSON holds, where an entry needs no more than its metrics: goes on "
        "with a table from another machine",
    )
    options = parser.parse_args()
    entries = find_entries()
    if options.list:
        show_list(entries, options.results)
        return
    if not options.names:
        parser.error("name an entry, or use --list")
    chosen = select(entries, options.names)
    for name, entry in chosen.items():
        if options.scale not in entry.scales and len(chosen) == 1:
            raise UserError(f"{name} has no scale {options.scale!r}; it has {', '.join(entry.scales)}")
        if options.scale in entry.scales:
            _one(name, entry, options)


def _one(name: str, entry, options: argparse.Namespace) -> None:
    from training import report  # imports jax, which --list need not wait for

    path = options.results / f"{name}.{options.scale}.json"
    if options.redraw:
        if path.exists():
            report.render(entry, path)
        return
    begin = time.monotonic()
    print(f"== {name} at scale {options.scale}: {entry.title}", flush=True)
    record = report.reproduce(
        name,
        entry,
        options.scale,
        options.workdir,
        options.results,
        finished_only=options.finished_only,
        keep_recorded=options.keep_recorded,
    )
    for row in record["rows"]:
        mark = {True: "met", False: "NOT MET", None: ""}[row["passed"]]
        print(f"   {row['quantity']}: {row['ours']}   paper: {row['paper'] or '-'}   {row['target']} {mark}")
    took = format_seconds(time.monotonic() - begin)
    print(f"   {took}; {path.with_suffix('.md')}, {path.with_suffix('.png')}", flush=True)


if __name__ == "__main__":
    with reported(interrupted="interrupted; the same command resumes"):
        main()
