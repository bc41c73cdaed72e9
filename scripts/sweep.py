"""Runs every point of a config file's `sweep()`, here or on a cluster; a second call does only what is left.

  python scripts/sweep.py --config=configs/x.py:scale=cpu --workdir=runs/x
  python scripts/sweep.py --config=... --workdir=... --workers=4 --config.steps="100 steps"
  python scripts/sweep.py --config=... --workdir=... --launcher=submitit \\
      --submitit.slurm_partition=gpu --submitit.gpus_per_node=1 --submitit.timeout_min=600
  python scripts/sweep.py --config=... --workdir=... --launcher=wandb --wandb.project=team/project
  python scripts/sweep.py --config=... --workdir=... --summarize

Run it from the repository's root. `sweep()` returns a list of overrides, for example
[{"optimizer.learning_rate": 1e-3, "model.layers": 2}, ...]. Each point has a folder in --workdir, named after
its overrides: finished points are skipped, stopped and failed ones resume, and no point runs twice at once,
however many sweeps share the folder.

  --config.KEY=VALUE    overrides a key of the config for all points
  --submitit.KEY=VALUE  sets a parameter of submitit's executor; cluster=local tries the jobs on this machine

Exit status: 0 all points are finished (submitit: submitted), 1 some are not, 2 a user error, 130 stopped.
"""

import argparse
import ast
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.sweeping.launchers import (
    Launcher,
    LocalLauncher,
    SubmititLauncher,
    WandbLauncher,
    interrupt_on_terminate,
)
from scripts.sweeping.points import Point, check_folders, read_points, unfinished
from scripts.sweeping.runner import Status
from scripts.sweeping.summary import summarize
from training.errors import UserError


class Arguments(NamedTuple):
    options: argparse.Namespace
    config: dict[str, str]  # --config.key=value, for all points
    submitit: dict[str, Any]  # --submitit.key=value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Sequence[str]) -> Arguments:
    parser = _Parser(
        "sweep.py",
        usage="sweep.py --config=PATH.py[:ARG] --workdir=DIR [options] [--config.KEY=VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="PATH.py[:ARG]", help="file with get_config() and sweep()")
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--launcher", choices=("local", "submitit", "wandb"), default="local", help="where points run")
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="points at a time; default: one per GPU, or one (submitit: all)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands and do nothing")
    parser.add_argument("--summarize", action="store_true", help="print and write the table of results, run nothing")
    parser.add_argument(
        "--wandb.project",
        metavar="[ENTITY/]PROJECT",
        dest="project",
        default="linear-transformers",
        help="where the wandb sweep is",
    )
    parser.add_argument("--wandb.sweep_id", metavar="ID", dest="sweep_id", help="join this wandb sweep")
    options, rest = parser.parse_known_args(argv)
    groups = {"config": {}, "submitit": {}}
    for argument in rest:
        match = re.fullmatch(r"--(config|submitit)\.([^=]+)=(.*)", argument, re.DOTALL)
        if match is None:
            raise UserError(f"unknown argument {argument!r}; overrides are written --config.key=value; see --help")
        groups[match[1]][match[2]] = match[3]
    for given, launcher in ((groups["submitit"], "submitit"), (options.sweep_id, "wandb")):
        if given and options.launcher != launcher:
            raise UserError(f"--{launcher}.* needs --launcher={launcher}")
    return Arguments(options, groups["config"], {key: _literal(text) for key, text in groups["submitit"].items()})


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _literal(text: str) -> Any:
    """submitit checks types, and `4` on the command line means the number."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_launcher(arguments: Arguments, command: Sequence[str]) -> Launcher:
    options = arguments.options
    if options.launcher == "submitit":
        return SubmititLauncher(options.workdir, options.workers, arguments.submitit)
    if options.launcher == "wandb":
        return WandbLauncher(options.workers, options.project, options.sweep_id, command)
    return LocalLauncher(options.workers)


def print_commands(points: Sequence[Point]) -> None:
    for point in points:
        print(f"# finished: {point.name}" if point.finished else shlex.join(point.command))


def run(arguments: Arguments, train: Sequence[str], command: Sequence[str]) -> int:
    """Does what the command line asks for and returns the exit status."""
    options = arguments.options
    points = read_points(options.config, options.workdir, arguments.config, train)
    if not options.summarize:
        check_folders(points)
        if options.dry_run:
            print_commands(points)
            return 0
        if unfinished(points) and not make_launcher(arguments, command).run(points):
            return 0
    statuses = summarize(points, options.workdir)
    left = sum(status is not Status.FINISHED for status in statuses)
    if left and not options.summarize:
        print(f"{left} of {len(points)} points are not finished; to go on: {shlex.join(command)}")
    return int(left > 0)


def main(argv: Sequence[str] | None = None, train: Sequence[str] | None = None) -> int:
    """The script. `train` is the command that trains one config; tests give their own."""
    argv = sys.argv[1:] if argv is None else argv
    train = train or (sys.executable, os.path.relpath(Path(__file__).parent.parent / "train.py"))
    command = ("python", "scripts/sweep.py", *argv)
    try:
        return run(parse(argv), train, command)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from here: {shlex.join(command)}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    interrupt_on_terminate()
    sys.exit(main())
