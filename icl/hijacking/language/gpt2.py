"""GPT-2 in Flax, and its checkpoints from a local folder in the usual layout. Nothing is ever fetched.

A folder holds `config.json`, `model.safetensors` (or parts with `model.safetensors.index.json`) and, for text,
`vocab.json` and `merges.txt`. Dense weights are stored [in, out], as here.
"""

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2."""

    vocabulary: int
    positions: int
    width: int
    layers: int
    heads: int
    epsilon: float = 1e-5


class Dense(nnx.Module):
    """`x W + b` with W [in, out]."""

    def __init__(self, inputs: int, outputs: int, deviation: float, rngs: nnx.Rngs):
        self.weight = nnx.Param(deviation * jax.random.normal(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight[...] + self.bias[...]


class LayerNorm(nnx.Module):
    """Over the last axis, with scale and shift."""

    def __init__(self, width: int, epsilon: float):
        self._epsilon = epsilon
        self.weight, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self._epsilon) * self.weight[...] + self.bias[...]


class Block(nnx.Module):
    """Attention and a two-layer perceptron, each normalised before and added after."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        width, residual = shape.width, 0.02 / (2 * shape.layers) ** 0.5
        self._heads = shape.heads
        self.ln_1, self.ln_2 = (LayerNorm(width, shape.epsilon) for _ in range(2))
        self.c_attn, self.attn_proj = Dense(width, 3 * width, 0.02, rngs), Dense(width, width, residual, rngs)
        self.c_fc, self.mlp_proj = Dense(width, 4 * width, 0.02, rngs), Dense(4 * width, width, residual, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn_proj(self._attend(self.c_attn(self.ln_1(x))))
        return x + self.mlp_proj(jax.nn.gelu(self.c_fc(self.ln_2(x)), approximate=True))

    def _attend(self, qkv: jax.Array) -> jax.Array:
        batch, time, _ = qkv.shape
        q, k, v = (part.reshape(batch, time, self._heads, -1) for part in jnp.split(qkv, 3, axis=-1))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(batch, time, -1)


class GPT2(nnx.Module):
    """The model of Radford et al. 2019: learned positions, pre-norm blocks, a head tied to the embedding."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        self.shape = shape
        self.wte = nnx.Param(0.02 * jax.random.normal(rngs.params(), (shape.vocabulary, shape.width)))
        self.wpe = nnx.Param(0.01 * jax.random.normal(rngs.params(), (shape.positions, shape.width)))
        self.blocks = nnx.List([Block(shape, rngs) for _ in range(shape.layers)])
        self.ln_f = LayerNorm(shape.width, shape.epsilon)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token, [batch, time, vocabulary], for tokens [batch, time].

        Raises:
          ValueError: more tokens than there are positions.
        """
        if tokens.shape[1] > self.shape.positions:
            raise ValueError(f"{tokens.shape[1]} tokens, but the model has {self.shape.positions} positions")
        x = self.wte[...][tokens] + self.wpe[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x) @ self.wte[...].T


_BLOCK = {
    "ln_1": "ln_1",
    "attn.c_attn": "c_attn",
    "attn.c_proj": "attn_proj",
    "ln_2": "ln_2",
    "mlp.c_fc": "c_fc",
    "mlp.c_proj": "mlp_proj",
}
"""Names within a block: in checkpoints, and here."""


def load(folder: str | Path) -> GPT2:
    """The model of a checkpoint folder, in float32.

    Raises:
      UserError: no folder, config or weights; another architecture; a missing tensor or one of the wrong shape.
    """
    folder = Path(folder)
    shape = _read_shape(folder)
    tensors = {name.removeprefix("transformer."): value for name, value in _read_tensors(folder).items()}
    model = nnx.eval_shape(lambda: GPT2(shape, rngs=nnx.Rngs(0)))
    for name, parameter in _named_parameters(model):
        if name not in tensors:
            raise UserError(f"{folder}: the weights lack {name!r}")
        found, wanted = tensors[name].shape, parameter.get_value().shape
        if found != wanted:
            raise UserError(f"{folder}: {name!r} has the shape {found}, and config.json asks for {wanted}")
        parameter.set_value(jnp.asarray(tensors[name], jnp.float32))
    return model


def _named_parameters(model: GPT2) -> list[tuple[str, nnx.Param]]:
    """Checkpoint name and parameter of every tensor."""
    found = [("wte.weight", model.wte), ("wpe.weight", model.wpe)]
    modules = [("ln_f", model.ln_f)]
    for i, block in enumerate(model.blocks):
        modules += [(f"h.{i}.{theirs}", getattr(block, ours)) for theirs, ours in _BLOCK.items()]
    return found + [
        (f"{name}.{part}", getattr(module, part)) for name, module in modules for part in ("weight", "bias")
    ]


def _read_shape(folder: Path) -> Shape:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {str(folder)!r}")
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is missing or no JSON") from error
    if config.get("model_type") != "gpt2" or config.get("activation_function", "gelu_new") != "gelu_new":
        kind, activation = config.get("model_type"), config.get("activation_function", "gelu_new")
        raise UserError(
            f"{path} describes the architecture {kind!r} with {activation!r}; this loader reads gpt2, gelu_new"
        )
    try:
        sizes = [config[key] for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")]
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error}") from error
    return Shape(*sizes, config.get("layer_norm_epsilon", 1e-5))


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif single.exists():
        files = [single.name]
    else:
        raise UserError(f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= read_safetensors(folder / file)
    return tensors


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file: a length, a JSON header, then the raw values.

    Raises:
      UserError: the file cannot be read, is cut off, or has a data type other than F32, F16, BF16 or U8 and BOOL masks.
    """
    try:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header: Mapping[str, Any] = json.loads(data[8 : 8 + length])
        body = memoryview(data)[8 + length :]
        return {name: _tensor(body, spec, name) for name, spec in header.items() if name != "__metadata__"}
    except (OSError, struct.error, ValueError, KeyError) as error:
        raise UserError(f"{path} is missing, cut off or no safetensors file: {error}") from error


def _tensor(body: memoryview, spec: Mapping[str, Any], name: str) -> np.ndarray:
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "U8": np.uint8, "BOOL": np.bool_}
    if spec["dtype"] not in dtypes:
        raise ValueError(f"{name!r} is of type {spec['dtype']}; there are {', '.join(dtypes)}")
    begin, end = spec["data_offsets"]
    return np.frombuffer(body[begin:end], dtypes[spec["dtype"]]).reshape(spec["shape"])
