"""Small tasks for the tests of the loop: linear regression with device-made and with host batches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from training.config import base_config, build


class Regressor(nnx.Module):
    """A linear map, optionally behind dropout, with a running mean of its outputs."""

    def __init__(self, features: int = 8, outputs: int = 1, dropout: float = 0.0, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(features, outputs, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.mean = nnx.BatchStat(jnp.zeros(outputs))

    def __call__(self, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
        y = self.linear(self.dropout(x, rngs=rngs))
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * y.mean(0)
        return y


@dataclasses.dataclass
class DeviceRegression:
    """Noisy linear regression whose batches are made on the device."""

    model: Any
    batch_size: int
    noise: float = 0.1
    features: int = 8
    resample_every: int = 1
    explode_at: int = -1  # the step whose loss is not a number

    examples_per_epoch = 1024
    batch_axis = 0

    def init(self, key: jax.Array) -> nnx.Module:
        return build(self.model, features=self.features, rngs=nnx.Rngs(key))

    def batch(self, key: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        kx, ke = jax.random.split(jax.random.fold_in(key, index))
        x = jax.random.normal(kx, (self.batch_size, self.features))
        y = x.sum(-1, keepdims=True) + self.noise * jax.random.normal(ke, (self.batch_size, 1))
        bad = jnp.where(index == self.explode_at, jnp.nan, 0.0)
        return {"x": x, "y": y + bad}

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        model.train()
        error = model(batch["x"], nnx.Rngs(key)) - batch["y"]
        return jnp.mean(error**2), {"mae": jnp.abs(error).mean()}

    def evaluators(self) -> dict[str, Any]:
        def test(model: nnx.Module, key: jax.Array) -> dict[str, jax.Array]:
            model.eval()
            batch = self.batch(jax.random.key(99), 0)
            return {"loss": jnp.mean((model(batch["x"], nnx.Rngs(0)) - batch["y"]) ** 2)}

        return {"test": test}


class ShuffledBatches:
    """Batches of a fixed data set in an order that depends on the position alone."""

    def __init__(self, x: np.ndarray, y: np.ndarray, rows: int, skip: int, batch: int, seed: int) -> None:
        self._x, self._y, self._rows, self._skip, self._batch, self._seed = x, y, rows, skip, batch, seed
        self._position = 0

    def __iter__(self) -> "ShuffledBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        order = np.random.default_rng((self._seed, self._position)).permutation(len(self._x))[: self._batch]
        self._position += 1
        mine = order[self._skip : self._skip + self._rows]
        return {"x": self._x[mine], "y": self._y[mine]}

    def get_state(self) -> dict[str, int]:
        return {"position": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        self._position = state["position"]


@dataclasses.dataclass
class HostRegression:
    """The same regression from a data set in the host's memory."""

    model: Any
    batch_size: int

    examples_per_epoch = 256
    resample_every = 1
    batch_axis = 0

    init = DeviceRegression.init
    loss = DeviceRegression.loss
    features = 8

    def batches(self, seed: int, process_index: int, process_count: int) -> ShuffledBatches:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((256, 8), np.float32)
        rows = self.batch_size // process_count
        return ShuffledBatches(x, x.sum(-1, keepdims=True), rows, process_index * rows, self.batch_size, seed)

    def evaluators(self) -> dict[str, Any]:
        return {}


def get_config(arg: str | None = None) -> ConfigDict:
    """The toy config; the argument `host` chooses host batches."""
    config = base_config()
    name = "HostRegression" if arg == "host" else "DeviceRegression"
    config.task = ConfigDict({"name": f"tests.training.toys.{name}"})
    if arg != "host":
        config.task.update(noise=0.1, features=8, resample_every=1, explode_at=-1)
    config.model = ConfigDict({"name": "tests.training.toys.Regressor", "dropout": 0.0})
    config.steps, config.batch_size, config.steps_per_dispatch = "40 steps", 32, 8
    config.optimizer.learning_rate = 0.05
    config.eval_every = config.checkpoint_every = "10 steps"
    return config
