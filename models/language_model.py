"""A causal language model whose sequence mixer is an argument, for each layer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import INIT, MLPS, NORMS, Linear, choose, kept
from models.recurrent_mixer import Cache
from models.stack import REMAT, Stack, runs
from training.config import build
from training.errors import UserError, nearest
from training.sharding import gathered

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


class Block(nnx.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))` where there is an MLP."""

    def __init__(
        self,
        mixer: Mapping[str, Any],
        width: int,
        mlp: str,
        hidden: int | None,
        norm: str,
        norm_epsilon: float,
        *,
        rngs: nnx.Rngs,
    ):
        make_norm = partial(choose(NORMS, norm, "norm"), width, norm_epsilon)
        self.norm1 = make_norm()
        self.mixer = build(mixer, width=width, rngs=rngs)
        kind = None if mlp == "none" else choose(MLPS, mlp, "mlp")
        self.norm2 = make_norm() if kind else None
        self.mlp = kind(width, hidden or kind.default_hidden(width), rngs=rngs) if kind else None

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        return self._feed_forward(kept(x + self.mixer(self.norm1(x), segment_ids)))

    def prefill(self, x: jax.Array, length: int) -> tuple[jax.Array, Cache]:
        y, cache = self.mixer.prefill(self.norm1(x), length)
        return self._feed_forward(x + y), cache

    def step(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        y, cache = self.mixer.step(self.norm1(x), cache)
        return self._feed_forward(x + y), cache

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class Layers(Stack):
    """Layers of a language model, run by a scan."""

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None, remat: str, unroll: int) -> jax.Array:
        def group(x: jax.Array, layers: nnx.List, _: None) -> jax.Array:
            for layer in layers:
                x = layer(x, segment_ids)
            return x

        return self.loop(group, x, None, remat, unroll)

    def prefill(self, x: jax.Array, length: int) -> tuple[jax.Array, list[Cache]]:
        """As `Block.prefill`, with a cache for each layer, in their order."""
        graph, states = nnx.split(self.layers)

        def group(x: jax.Array, state: nnx.State) -> tuple[jax.Array, list[Cache]]:
            caches = []
            for layer in nnx.merge(graph, state):
                x, cache = layer.prefill(x, length)
                caches.append(cache)
            return x, caches

        x, caches = jax.lax.scan(group, x, states)
        return x, [cache for i in range(self.repeats) for cache in jax.tree.map(lambda leaf, i=i: leaf[i], caches)]


class CausalLanguageModel(nnx.Module):
    """Embedded tokens, layers, a norm and a head.

    Args:
      vocabulary_size: of tokens.
      width: of the embedded tokens.
      depth: layers.
      mixers: import path and further arguments of each kind of mixer, by a name. A mixer is given `width` and `rngs`;
        its methods are those that `models.recurrent_mixer` describes.
      pattern: names of mixers by layer, from the first on, repeated until `depth`; None where there is only one.
      mlp: "swiglu", "gelu", or "none": the layers are mixers only.
      hidden: units of the MLP; None is that of its kind.
      norm: "rms" or "layer".
      norm_epsilon: of the norms.
      tied: whether the head is the embedding.
      positions: rows of a learned position embedding; None is no such embedding.
      dropout: of the embedded tokens in training.
      dtype: of the computation, "float32" or "bfloat16"; parameters have their own.
      remat: a key of `models.stack.REMAT`.
      unroll: repetitions of the pattern that a turn of the loop over layers holds. With all of them nothing is copied
        into and out of the loop's stacks, and compilation takes as many times longer.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        width: int,
        depth: int,
        mixers: Mapping[str, Mapping[str, Any]],
        pattern: Sequence[str] | None = None,
        mlp: str = "swiglu",
        hidden: int | None = None,
        norm: str = "rms",
        norm_epsilon: float = 1e-6,
        tied: bool = False,
        positions: int | None = None,
        dropout: float = 0.0,
        dtype: str = "float32",
        remat: str = "none",
        unroll: int = 1,
        rngs: nnx.Rngs,
    ):
        choose(REMAT, remat, "remat")
        self.dtype, self.remat, self.unroll = choose(DTYPES, dtype, "dtype"), remat, unroll
        self.embedding = nnx.Param(INIT(rngs.params(), (vocabulary_size, width)))
        self.positions = None if positions is None else nnx.Param(INIT(rngs.params(), (positions, width)))
        self.dropout = nnx.Dropout(dropout)

        def maker(name: str) -> Callable[[nnx.Rngs], Block]:
            return lambda rngs: Block(mixers[name], width, mlp, hidden, norm, norm_epsilon, rngs=rngs)

        groups = runs(_by_layer(mixers, pattern, depth))
        self.stacks = nnx.List([Layers([maker(name) for name in group], n, rngs=rngs) for group, n in groups])
        self.norm = choose(NORMS, norm, "norm")(width, norm_epsilon)
        self.unembedding = None if tied else Linear(width, vocabulary_size, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Logits of the next tokens; arguments as of `hidden`."""
        return self.logits(self.hidden(tokens, segment_ids=segment_ids, rngs=rngs))

    def hidden(
        self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """What the head is applied to, [batch, time, width], in the model's dtype.

        Args:
          tokens: [batch, time], integers.
          segment_ids: [batch, time], integers, for packed sequences: a token sees those before it with its number, and
            sequences with different numbers touch.
          rngs: for the dropout; needed where there is one and the model is in training mode.

        Raises:
          UserError: more tokens than the model has positions.
        """
        x = self._embed(tokens, _positions(tokens, segment_ids))
        x = self.dropout(x, rngs=rngs)
        for stack in self.stacks:
            x = stack(x, segment_ids, self.remat, self.unroll)
        return self.norm(x)

    @property
    def head(self) -> jax.Array:
        """The matrix of the head, [width, vocabulary], in the model's dtype."""
        kernel = self.embedding[...].T if self.unembedding is None else self.unembedding.kernel[...]
        return gathered(kernel.astype(self.dtype))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., vocabulary] of what `hidden` returns, float32 at least."""
        return jnp.matmul(hidden, self.head, preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32))

    def prefill(self, tokens: jax.Array, length: int) -> tuple[jax.Array, list[Cache]]:
        """Reads a prompt.

        Args:
          tokens: [batch, time], at least one.
          length: tokens, those of the prompt included, that the caches have room for.

        Returns:
          The logits of the token that follows, [batch, vocabulary], and a cache for each layer.
        """
        x = self._embed(tokens, _positions(tokens, None))
        caches = []
        for stack in self.stacks:
            x, more = stack.prefill(x, length)
            caches += more
        return self.logits(self.norm(x[:, -1])), caches

    def step(
        self, tokens: jax.Array, position: jax.Array, caches: Sequence[Cache], layers: Sequence[Block] | None = None
    ) -> tuple[jax.Array, list[Cache]]:
        """Reads one token more.

        Args:
          tokens: [batch].
          position: how many tokens came before, a scalar.
          caches: of `prefill` or of the step before.
          layers: `self.layers()`, where the caller has taken them apart once for many steps.

        Returns:
          As `prefill`.
        """
        x = self._embed(tokens, jnp.broadcast_to(position, tokens.shape))
        new = []
        for layer, cache in zip(self.layers() if layers is None else layers, caches, strict=True):
            x, cache = layer.step(x, cache)
            new.append(cache)
        return self.logits(self.norm(x)), new

    def layers(self) -> list[Block]:
        """All layers, each with its own parameters."""
        return [layer for stack in self.stacks for layer in stack.unstacked()]

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = gathered(self.embedding[...])[tokens]  # in float32, in which its gradient adds up
        if self.positions is not None:
            if tokens.ndim > 1 and tokens.shape[1] > len(self.positions[...]):
                raise UserError(f"{tokens.shape[1]} tokens, but the model has {len(self.positions[...])} positions")
            x = x + self.positions[...][positions]
        return x.astype(self.dtype)


def _by_layer(mixers: Mapping[str, Any], pattern: Sequence[str] | None, depth: int) -> list[str]:
    """The name of each layer's mixer.

    Raises:
      UserError: the pattern names none of the mixers, or is missing.
    """
    if pattern is None:
        if len(mixers) != 1:
            raise UserError(f"the model has the mixers {', '.join(mixers)}; give a pattern of them")
        pattern = tuple(mixers)
    for name in pattern:
        if name not in mixers:
            raise UserError(f"the pattern has {name!r}, which is none of the mixers: {nearest(name, mixers)}")
    return [pattern[layer % len(pattern)] for layer in range(depth)]


def _positions(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The place of each token in its segment, [batch, time]."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        return index
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
