"""From a config file and its `sweep()` to the points of a sweep: names, folders and commands, all checked."""

import ast
import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from training.config import differences, flatten, load_module, override
from training.errors import UserError, nearest

LONGEST_NAME = 120  # file systems allow 255 bytes; the rest is left to the files that a run adds


@dataclass(frozen=True)
class Point:
    """One training run of a sweep."""

    overrides: dict[str, Any]  # what `sweep()` sets here, in the config's own types
    settings: dict[str, Any]  # the value here of every key that some point of the sweep sets
    config: ConfigDict  # resolved
    folder: Path
    command: tuple[str, ...]  # runs or resumes it

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        return (self.folder / "finished.json").exists()

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def record(self) -> dict[str, Any]:
        """What a finished run left: `step`, `metrics` and `wall_seconds`."""
        return json.loads((self.folder / "finished.json").read_text())


def unfinished(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if not point.finished]


def read_points(config: str, workdir: Path, common: Mapping[str, str], train: Sequence[str]) -> list[Point]:
    """The points that a config file's `sweep()` asks for.

    Args:
      config: `PATH.py` or `PATH.py:arg`.
      workdir: the sweep's folder; each point gets a folder in it.
      common: overrides as they stand on the command line, for all points.
      train: the command that trains one config.

    Raises:
      UserError: no such file or function, an unknown key, a value of the wrong type, or the same point twice.
    """
    base, overrides = _load(config)
    base = _override(base, {key: _parse(text, flatten(base).get(key)) for key, text in common.items()}, "command line")
    configs = [_override(base, values, f"point {i} of sweep()") for i, values in enumerate(overrides)]
    keys = list(dict.fromkeys(key for values in overrides for key in values))
    if clash := sorted(common.keys() & set(keys)):
        raise UserError(f"sweep() sets {clash[0]!r}, and so does the command line; take one of them away")

    points = []
    for values, resolved in zip(overrides, configs, strict=True):
        flat = flatten(resolved)
        own = {key: flat[key] for key in sorted(values)}
        folder = workdir / point_name(own)
        flags = {**common, **{key: _text(value) for key, value in own.items()}}
        command = (
            *train,
            f"--config={config}",
            f"--workdir={folder}",
            *(f"--config.{k}={v}" for k, v in flags.items()),
        )
        points.append(Point(own, {key: flat[key] for key in keys}, resolved, folder, command))
    name, count = Counter(point.name for point in points).most_common(1)[0]
    if count > 1:
        raise UserError(f"sweep() has the point {name} {count} times")
    return points


def point_name(overrides: Mapping[str, Any]) -> str:
    """A folder name that tells what is set and depends on nothing else, neither on order nor on other points.

    Where it would be too long, or a value has characters that do not belong in a folder's name, a hash of the
    full text keeps it unique.
    """
    if not overrides:
        return "default"
    texts = {key: _text(value) for key, value in sorted(overrides.items())}
    clean = {key: re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("_") for key, text in texts.items()}
    name = ",".join(f"{key}={text}" for key, text in clean.items())
    if clean == texts and len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(repr(texts).encode()).hexdigest()[:8]}"


def check_folders(points: Sequence[Point]) -> None:
    """Makes sure that what stands in the points' folders came from the same config.

    Without this, a finished point would be skipped although the config, or an override for all, has changed.

    Raises:
      UserError: a folder holds a run of another config.
    """
    for point in points:
        stored = point.folder / "config.json"
        if stored.exists() and (lines := differences(stored.read_text(), point.config)):
            raise UserError(f"{point.folder} holds a run of another config ({lines[0]}); choose another --workdir")


def _load(config: str) -> tuple[ConfigDict, list[dict[str, Any]]]:
    """What `get_config` and `sweep` of a config file return."""
    path, _, argument = config.partition(":")
    module = load_module(path)
    if not callable(getattr(module, "sweep", None)):
        raise UserError(f"{path} defines no sweep()")
    try:
        base = module.get_config(argument) if argument else module.get_config()
        overrides = module.sweep(argument or None) if inspect.signature(module.sweep).parameters else module.sweep()
    except UserError:
        raise
    except Exception as error:  # whatever the file's author let happen
        raise UserError(f"{config}: {type(error).__name__}: {error}") from error
    if not isinstance(overrides, list | tuple) or not all(isinstance(values, Mapping) for values in overrides):
        raise UserError(f"{path}: sweep() returns a list of dicts of overrides")
    if not overrides:
        raise UserError(f"{path}: sweep() has no points")
    return base, list(overrides)


def _override(base: ConfigDict, overrides: Mapping[str, Any], where: str) -> ConfigDict:
    """`base` with `overrides`, or an error that says `where` the bad one stands."""
    known = flatten(base)
    for key, value in overrides.items():
        if key not in known:
            raise UserError(f"{where}: the config has no key {key!r}; {nearest(key, known)}")
        if value is None or isinstance(known[key], list | None):
            raise UserError(f"{where}: a command line cannot set {key!r} from {known[key]!r} to {value!r}")
    try:
        return override(base, overrides)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _parse(text: str, default: Any) -> Any:
    """The value of an override on the command line, for a key whose value so far is `default`."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    return value if isinstance(value, str) else repr(value)
