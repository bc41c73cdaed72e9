"""Training steps and decoding of language models, compiled and timed."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from deltanet.layer import DeltaNet
from models import sampling
from models.causal_attention import CausalAttention
from models.language_model import CausalLanguageModel
from models.losses import next_token_loss
from training.config import base_config, build
from training.loop import make_program
from training.step import State

_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class RandomTokens:
    """Next-token prediction on random tokens, made on the device: training's cost without its data.

    Args:
      model: the model's import path and arguments.
      batch_size: sequences per step.
      length: tokens in a sequence.
      chunk: tokens whose logits exist at once.
    """

    model: Mapping[str, Any]
    batch_size: int
    length: int
    chunk: int = 4096

    examples_per_epoch = None
    resample_every = 1
    batch_axis = 0

    def init(self, key: jax.Array) -> nnx.Module:
        return build(self.model, rngs=nnx.Rngs(params=key))

    def batch(self, key: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        shape = (self.batch_size, self.length + 1)
        tokens = jax.random.randint(jax.random.fold_in(key, index), shape, 0, self.model["vocabulary_size"])
        return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": jnp.ones(shape)[:, 1:]}

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict]:
        return next_token_loss(model, batch, self.chunk)

    def evaluators(self) -> dict:
        return {}


class Shape(NamedTuple):
    """Sequences in a batch and tokens in a sequence."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


def training_config(size: str, mixer: str, shape: Shape, **model: Any) -> ConfigDict:
    """A config of the training loop that trains on random tokens as the paper trains: AdamW, clipping, bfloat16."""
    config = base_config()
    config.task = {"name": "deltanet.throughput.RandomTokens", "length": shape.length, "chunk": 4096}
    config.model = {
        "name": "deltanet.language.language_model",
        "size": size,
        "mixer": mixer,
        "vocabulary_size": 32_000,
        "dtype": "bfloat16",
        **model,
    }
    config.batch_size = shape.batch
    config.optimizer.name = "adamw"
    config.optimizer.options = {"weight_decay": 0.01, "b2": 0.95}
    config.optimizer.learning_rate = 3e-4
    config.optimizer.clip = "global_norm"
    return config


def flops_per_token(model: CausalLanguageModel, length: int) -> float:
    """Operations of forward and backward that a token of a sequence of `length` needs at least, two for a product.

    Six for each weight of a matrix that tokens are multiplied with, so not for an embedding that is looked up; for the
    delta rule those of its chunkwise form without W and U, and one triangular solve in the backward (chunks of 64); for
    softmax those of causal attention, which is half of the square. Other mixers count as their matrices only.
    """
    total = 6 * model.head.size
    for layer in model.layers():
        total += 6 * sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param)) if x.ndim == 2)
        mixer = layer.mixer
        if isinstance(mixer, DeltaNet):
            dim = mixer.keys // mixer.heads
            total += mixer.heads * (22 * dim**2 + 28 * _CHUNK * dim)
        elif isinstance(mixer, CausalAttention):
            seen = length if mixer.window is None else min(2 * mixer.window, length)
            total += 6 * seen * mixer.width
    return total


class Step:
    """A training step, compiled: `length` optimiser steps in one dispatch.

    Attributes:
      parameters: of the model.
      flops: see `flops_per_token`; of a whole step.
      peak_bytes: arguments, results and everything between, as the compiler laid it out.
    """

    def __init__(self, config: ConfigDict, length: int) -> None:
        self._program, self._length = make_program(config), length
        shapes = jax.eval_shape(self._program.init, self._program.replicas)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        tokens, per_token = config.task.length, []
        jax.eval_shape(lambda: per_token.append(flops_per_token(self._program.task().init(jax.random.key(0)), tokens)))
        self.flops = config.batch_size * tokens * per_token[0]
        step = jax.jit(functools.partial(self._program.steps, length=length), donate_argnums=0)
        self._run = step.lower(shapes, self._program.replicas, jax.ShapeDtypeStruct((), jnp.int32)).compile()
        memory = self._run.memory_analysis()
        self.peak_bytes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        self.peak_bytes -= memory.alias_size_in_bytes  # the state is donated

    def init(self) -> State:
        """A fresh state, which all steps of one model can use."""
        return jax.jit(self._program.init)(self._program.replicas)

    def seconds(self, state: State, repeats: int) -> tuple[list[float], list[float], State]:
        """Trains.

        Args:
          state: to go on from; donated.
          repeats: dispatches that are timed, after two that are not.

        Returns:
          The seconds of an optimiser step, a mean for each dispatch; all losses; and the last state.
        """
        samples, losses = [], []
        for i in range(repeats + 2):
            begin = time.perf_counter()
            state, metrics = self._run(state, self._program.replicas, np.int32(i * self._length))
            losses += np.asarray(metrics["loss"]).tolist()
            samples.append((time.perf_counter() - begin) / self._length)
        return samples[2:], losses, state


class Decoder:
    """A model that has read `shape.length` tokens of `shape.batch` sequences, and adds the likeliest tokens.

    What it has read does not matter to its speed, so the caches hold zeros.

    Attributes:
      cache_bytes: of all layers and sequences.
    """

    def __init__(self, size: str, mixer: str, shape: Shape, tokens: int, **model: Any) -> None:
        spec = training_config(size, mixer, shape, **model).model.to_dict()

        def make() -> nnx.Module:
            made = build(spec, rngs=nnx.Rngs(params=jax.random.key(0)))
            made.eval()
            return made

        self._tokens, self._shape = tokens, shape
        self._graph = nnx.graphdef(nnx.eval_shape(make))
        self._make = jax.jit(lambda: nnx.state(make()))
        weights = jax.eval_shape(self._make)
        prompt = jax.ShapeDtypeStruct((shape.batch, 1), jnp.int32)
        self._start = jax.eval_shape(
            lambda state, prompt: sampling.prefill(self._graph, state, prompt, shape.length + tokens),
            weights,
            prompt,
        )
        self.cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._start.caches))
        start, key = self._start, jax.random.key(0)
        self._run = sampling.extend.lower(self._graph, weights, start, key, tokens, 0.0, None).compile()

    def seconds(self, repeats: int) -> list[float]:
        """Seconds for a token of every sequence, `repeats` means over all that are added, after one more."""
        weights, samples = self._make(), []
        for _ in range(repeats + 1):
            # Integers are the numbers of tokens so far.
            start = jax.tree.map(
                lambda x: jnp.full(x.shape, self._shape.length if x.dtype == jnp.int32 else 0, x.dtype), self._start
            )
            jax.block_until_ready(start)
            begin = time.perf_counter()
            added, _ = self._run(weights, start, jax.random.key(0))
            jax.block_until_ready(added)
            samples.append((time.perf_counter() - begin) / self._tokens)
        return samples[1:]


def matrix_rate(size: int, repeats: int = 20) -> float:
    """Operations a second of a product of square bfloat16 matrices, the best of three measurements."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(repeats):
            y = product(x, x)
        y.block_until_ready()
        seconds.append((time.perf_counter() - begin) / repeats)
    return 2 * size**3 / min(seconds)
