"""Configs: the loop's own settings, import paths, argument strings and overrides.

A config file defines `get_config(arg=None)`; it starts from `base_config()`, names its task and model by import path
and fills in the rest. The loop locks it, so that a misspelt key is an error.
"""

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from training.errors import UserError, nearest


def base_config() -> ConfigDict:
    """The settings of the loop with their defaults. Durations are written as `training.durations` reads them."""
    return ConfigDict(
        {
            "task": {"name": ""},  # import path of a training.task.Task, and its arguments
            "model": {"name": ""},  # import path of an nnx.Module, and its arguments
            "seeds": (0,),  # one replica per seed, all trained at once
            "replicate": (),  # pairs (dotted key, values): one replica per seed and value
            "steps": "1000 steps",
            "batch_size": 256,
            "precision": "float32",  # of the computation; parameters and optimiser state stay float32
            "optimizer": {
                "name": "adam",  # an optimiser of optax
                "learning_rate": 1e-3,
                "options": {},  # further arguments of the optimiser
                "schedule": "constant",  # see training.optimizer.SCHEDULES
                "halve_every": "10%",  # schedule "halving" only
                "warmup": "0 steps",
                "final_fraction": 0.0,  # of the peak learning rate, where the schedule decays to an end
                "clip": "none",  # see training.optimizer.CLIPS
                "clip_threshold": 1.0,
                "decay_exclude": "",  # regular expression: parameters whose weights do not decay
                "accumulate": 1,  # micro-batches that a step's batch is split into
            },
            "ema_decay": 0.0,  # of a moving average of the parameters, evaluated beside them; 0: none
            "steps_per_dispatch": 100,
            "log_every": "1 step",  # a metrics line per interval, the mean over it
            "eval_every": "10%",
            "checkpoint_every": "10%",
            "keep_checkpoints": 2,
            # Ends the run at the evaluation where, of every seed, a replica's metric is at least this; "" is never.
            "stop": {"metric": "", "at_least": 0.0},
            "on_nonfinite": "stop",  # or "record": go on, as long as one replica is finite
            "mesh": {"data": 1, "fsdp": 1},  # devices along each axis; -1: all that are left
            "wandb": {"mode": "disabled", "project": "linear-transformers", "name": ""},
            "profile": {"start": 0, "steps": 0},  # a trace of these steps in <workdir>/profile
        }
    )


# What may differ between two runs that share a workdir: none of it changes what is computed.
_FREE_KEYS = ("wandb", "profile", "keep_checkpoints")


def load(file: str) -> ConfigDict:
    """The config of a file, with an argument after a colon where it is given: `"configs/x.py:scale=cpu"`.

    Raises:
      UserError: no such file, or no `get_config` in it.
    """
    path, colon, argument = file.partition(":")
    config = load_module(path).get_config(*([argument] if colon else []))
    config.lock()
    return config


def load_module(path: str) -> ModuleType:
    """The module of a config file.

    Raises:
      UserError: no such file, an error in it, or no `get_config`.
    """
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"there is no config file {path!r}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file's author let happen
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} defines no get_config(arg=None)")
    return module


def parse_argument(argument: str | None, **defaults: Any) -> Any:
    """Reads the text after the colon of `--config=file.py:key=value,...`.

    Args:
      argument: that text, or None.
      **defaults: the value of each key; a tuple lists the values that are allowed, the first being the default.

    Returns:
      A ConfigDict with the keys of `defaults`, each value of its default's type.

    Raises:
      UserError: an unknown key, a value of the wrong type, or a piece without `=`.
    """
    values = {key: default[0] if isinstance(default, tuple) else default for key, default in defaults.items()}
    for piece in filter(None, (argument or "").split(",")):
        key, equals, text = piece.partition("=")
        if not equals or key not in defaults:
            raise UserError(f"config argument {piece!r}: write key=value; {nearest(key, defaults)}")
        values[key] = _convert(text, defaults[key], f"config argument {key!r}")
    return ConfigDict(values)


def _convert(text: str, default: Any, what: str) -> Any:
    if isinstance(default, tuple):
        if text not in default:
            raise UserError(f"{what} is {text!r}: {nearest(text, default)}")
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{what} is true or false, not {text!r}")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError as error:
        raise UserError(f"{what} is of type {type(default).__name__}, not {text!r}") from error


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with dotted keys replaced, e.g. `{"optimizer.learning_rate": 0.1}`.

    Raises:
      UserError: a key that the config does not have, or a value of another type than it has.
    """
    config = config.copy_and_resolve_references()
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        node = config
        for part in (*path, last):
            if not isinstance(node, ConfigDict) or part not in node:
                raise UserError(f"the config has no key {dotted!r}: {nearest(dotted, flatten(config))}")
            parent, node = node, node[part]
        try:
            if isinstance(value, bool) and not isinstance(node, bool):
                raise TypeError("Python takes True for a number")
            parent[last] = value
        except TypeError as error:
            raise UserError(
                f"config key {dotted!r} is of type {type(node).__name__}, not {type(value).__name__} ({value!r})"
            ) from error
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of a nested mapping, e.g. `{"optimizer.name": "adam", ...}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The resolved config as JSON text, keys sorted."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=str) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; JSON's lists become the tuples that configs use."""
    return ConfigDict(json.loads(text, object_hook=lambda node: {k: _tuples(v) for k, v in node.items()}))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def differences(stored: str, config: ConfigDict) -> list[str]:
    """What differs between a stored config (JSON text) and `config`, a line per key, free keys left out.

    A key of the loop that did not exist when the config was stored had what is now its default.
    """
    old, new = flatten(json.loads(stored)), flatten(json.loads(to_json(config)))
    for key, value in flatten(json.loads(to_json(base_config()))).items():
        if key in new:
            old.setdefault(key, value)
    keys = sorted(key for key in old.keys() | new.keys() if key.partition(".")[0] not in _FREE_KEYS)
    return [
        f"{key}: {old.get(key, '(absent)')!r} there, {new.get(key, '(absent)')!r} now"
        for key in keys
        if old.get(key, "(absent)") != new.get(key, "(absent)")
    ]


def resolve(path: str) -> Any:
    """The object at an import path such as `"icl.models.LinearTransformer"`.

    Raises:
      UserError: no such module or attribute.
    """
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise UserError(f"{path!r} is not an import path; write it like 'package.module.Class'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"import path {path!r}: {error}; check the module's name and that it is installed") from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UserError(f"import path {path!r}: {module_name} has no {attribute!r}; {nearest(attribute, public)}")
    return getattr(module, attribute)


def build(spec: Mapping[str, Any], **more: Any) -> Any:
    """Calls the class that `spec["name"]` names with the rest of `spec` and `more` as arguments.

    Raises:
      UserError: an unknown import path or an argument that the class does not take.
    """
    arguments = {**spec, **more}
    path = arguments.pop("name")
    cls = resolve(path)
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in arguments:
            if key not in parameters:
                raise UserError(f"{path} takes no argument {key!r}: {nearest(key, parameters)}")
    return cls(**arguments)
