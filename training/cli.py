"""Flags and errors of the command-line entries: one clear message, exit status 2, no traceback."""

import logging
import re
from collections.abc import Callable
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from training.errors import UserError, reported


def define_training_flags() -> flags.FlagHolder:
    """Defines `--config` with its overrides, and the flags that start one process of several."""
    flags.DEFINE_bool("distributed", False, "run as one process of several (jax.distributed)")
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0; SLURM and TPU pods tell it")
    flags.DEFINE_integer("num_processes", None, "number of processes; SLURM and TPU pods tell it")
    flags.DEFINE_integer("process_id", None, "number of this process; SLURM and TPU pods tell it")
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "config file with an optional argument after a colon, e.g. "
        "configs/icl/preconditioned_gd/theorem3.py:scale=cpu; --config.key=value overrides an entry",
        lock_config=True,
    )


def start_distributed() -> None:
    """Joins the other processes if `--distributed` was given."""
    values = flags.FLAGS
    if not values.distributed:
        return
    import jax

    try:
        jax.distributed.initialize(values.coordinator_address, values.num_processes, values.process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed: {error}; give --coordinator_address, --num_processes, --process_id") from error


def required(holder: flags.FlagHolder) -> Any:
    """The value of a flag that must be given."""
    if holder.value is None:
        raise UserError(f"--{holder.name} is missing; see --help")
    return holder.value


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; a UserError or a bad flag ends in one message and exit status 2."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("jax").setLevel(logging.WARNING)
    with reported(interrupted="interrupted; the same command resumes the run"):
        app.run(lambda _: main(), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            flags.FLAGS.config.to_dict()  # a file that could not be loaded is reported when it is first used
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_key(str(error))) from error
    except (flags.Error, ValueError, TypeError, OSError) as error:
        raise UserError(_one_line(str(error))) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    return rest


def _unknown_key(message: str) -> str:
    """Rewrites ml_collections' report of an unknown config key."""
    if hint := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message):
        return f"the config has no key {hint[2]!r}; did you mean {hint[1]!r}?"
    key = _one_line(message).strip('"')
    return f"the config has no key {key}; train.py --print_config shows them all"


def _one_line(message: str) -> str:
    message = re.sub(r"^Configuration is not available because of an earlier failure to load: ", "", message)
    return " ".join(message.split()).replace("config_config", "").replace("  ", " ")
