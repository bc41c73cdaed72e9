"""Text from a causal language model, token by token."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.language_model import CausalLanguageModel
from models.recurrent_mixer import Cache
from training.errors import UserError


class Decoding(NamedTuple):
    """Where a continuation stands: the logits of the next token [batch, vocabulary], tokens so far, and the caches."""

    logits: jax.Array
    position: jax.Array
    caches: Sequence[Cache]


def generate(
    model: CausalLanguageModel,
    prompt: jax.Array,
    *,
    tokens: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Continuations of prompts.

    Args:
      model: the model.
      prompt: [batch, time], integers, at least one token.
      tokens: how many are added.
      key: of the draws.
      temperature: that the logits are divided by; 0 takes the likeliest token.
      top_k: only so many likeliest tokens are drawn from; None is all.

    Returns:
      What was added, [batch, tokens].

    Raises:
      UserError: an empty prompt, or a setting out of range.
    """
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise UserError(f"a prompt is [batch, time] with at least one token, not {prompt.shape}")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise UserError(f"temperature={temperature} and top_k={top_k}: not negative, and at least 1")
    model.eval()
    graph, state = nnx.split(model)
    start = prefill(graph, state, prompt, prompt.shape[1] + tokens)
    return extend(graph, state, start, key, tokens, temperature, top_k)[0]


@partial(jax.jit, static_argnums=(0, 3))
def prefill(graph: nnx.GraphDef, state: nnx.State, prompt: jax.Array, length: int) -> Decoding:
    """Reads prompts [batch, time]; there will be room for `length` tokens in all."""
    logits, caches = nnx.merge(graph, state).prefill(prompt, length)
    return Decoding(logits, jnp.full((), prompt.shape[1], jnp.int32), caches)


@partial(jax.jit, static_argnums=(0, 4, 5, 6), donate_argnums=2)
def extend(
    graph: nnx.GraphDef,
    state: nnx.State,
    start: Decoding,
    key: jax.Array,
    tokens: int,
    temperature: float,
    top_k: int | None,
) -> tuple[jax.Array, Decoding]:
    """The next tokens [batch, tokens], drawn as `generate` says, and where that leads. `start` is donated."""
    model = nnx.merge(graph, state)
    layers = [_with_matrices_in(model.dtype, layer) for layer in model.layers()]
    model = _with_matrices_in(model.dtype, model)

    def add(at: Decoding, key: jax.Array) -> tuple[Decoding, jax.Array]:
        token = _draw(at.logits, key, temperature, top_k)
        logits, caches = model.step(token, at.position, at.caches, layers)
        return Decoding(logits, at.position + 1, caches), token

    end, added = jax.lax.scan(add, start, jax.random.split(key, tokens))
    return added.T, end


def _with_matrices_in(dtype: jnp.dtype, module: nnx.Module) -> nnx.Module:
    """The module with its matrices in the dtype that it computes in, so that no token converts them again."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, state))


def _draw(logits: jax.Array, key: jax.Array, temperature: float, top_k: int | None) -> jax.Array:
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits / temperature)
