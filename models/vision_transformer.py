"""The vision transformer of DeiT (Touvron et al. 2021), with any sequence mixer in the place of attention."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import choose
from models.stack import REMAT, Stack, runs
from training.config import build
from training.errors import UserError

# timm's truncation at two is a hundred standard deviations away, so that its "truncated" normal is a normal.
INIT = nnx.initializers.normal(0.02)


class Mlp(nnx.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, hidden, kernel_init=INIT, rngs=rngs)
        self.down = nnx.Linear(hidden, width, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(gelu(self.up(x)))


def gelu(x: jax.Array) -> jax.Array:
    """`x Phi(x)` with the distribution function Phi of the normal distribution, computed in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm: the mixer and the MLP, each behind a LayerNorm, each dropped for whole examples (drop path)."""

    def __init__(self, mixer: nnx.Module, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.mixer = mixer
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(width, hidden, rngs=rngs)

    def __call__(self, x: jax.Array, drop: "Drop | None" = None) -> jax.Array:
        """`[batch, time, width]` to the same; nothing is dropped without `drop`."""
        mixer, mlp = (None, None) if drop is None else drop.branches()
        x = x + kept(self.mixer(self.norm1(x)), mixer)
        return x + kept(self.mlp(self.norm2(x)), mlp)


class Drop(NamedTuple):
    """The probability that a branch is dropped, and what decides it; of one block or, stacked, of several."""

    rate: jax.Array
    key: jax.Array

    def branches(self) -> tuple["Drop", "Drop"]:
        """Those of a block's two branches."""
        first, second = jax.random.split(self.key)
        return Drop(self.rate, first), Drop(self.rate, second)


def kept(x: jax.Array, drop: Drop | None) -> jax.Array:
    """`[batch, time, width]` without some of the examples, the others scaled so that the expectation stays."""
    if drop is None:
        return x
    keep = jax.random.bernoulli(drop.key, 1 - drop.rate, (len(x), 1, 1))
    return jnp.where(keep, x / (1 - drop.rate).astype(x.dtype), 0)


class Blocks(Stack):
    """Blocks, run by a scan."""

    def __call__(self, x: jax.Array, drops: Drop | None, remat: str, unroll: int) -> jax.Array:
        """As `Block`; `drops` has an entry for each block."""
        drops = jax.tree.map(lambda leaf: leaf.reshape(self.repeats, -1), drops)

        def group(x: jax.Array, blocks: nnx.List, drops: Drop | None) -> jax.Array:
            for i, block in enumerate(blocks):
                x = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], drops))
            return x

        return self.loop(group, x, drops, remat, unroll)


class VisionTransformer(nnx.Module):
    """Patches, a class token in front, blocks, LayerNorm, a pooled token and a linear head.

    Blocks that differ in their parameters alone are one stack, and compile as one; so do groups of them, such as those
    whose directions alternate.

    Args:
      mixer: import path and arguments of the sequence mixer. It is also given `width`, `heads`, `rngs` and its place:
        `layer`, `grid` (rows and columns of patches; the tokens are in row-major order) and `class_token`. Its initial
        values do not depend on `layer`, but what it computes may.
      image_size: of the square images, in pixels; the patch divides it.
      patch: side of a patch, in pixels.
      channels: of the images.
      classes: of the head.
      width: of the tokens.
      depth: blocks.
      heads: of the mixer.
      mlp_ratio: hidden units of the MLP per unit of width.
      position_embedding: whether a learned table is added to the tokens.
      pool: "mean" over all tokens, the class token included, or "class", the class token alone.
      drop_path: probability that the last block's branches are dropped; it grows linearly from zero in the first.
      remat: a key of `models.stack.REMAT`, what the backward pass keeps of a block.
      unroll: repetitions that a turn of the loop over blocks holds. With all of them nothing is copied into and out of
        the loop's stacks, and compilation takes as many times longer.
    """

    def __init__(
        self,
        mixer: Mapping[str, Any],
        *,
        image_size: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: int = 4,
        position_embedding: bool = False,
        pool: str = "mean",
        drop_path: float = 0.0,
        remat: str = "products",
        unroll: int = 1,
        rngs: nnx.Rngs,
    ):
        if image_size % patch:
            below = image_size - image_size % patch
            raise UserError(
                f"an image of {image_size} pixels does not split into patches of {patch}; "
                f"use image_size={below or patch} or {below + patch}, or another patch"
            )
        choose(REMAT, remat, "remat")
        if pool not in ("mean", "class"):
            raise UserError(f"pool={pool!r}: choose from mean, class")
        side = image_size // patch
        self.image_size, self.patch, self.channels, self.pool = image_size, patch, channels, pool
        self.remat, self.unroll = remat, unroll
        self.deterministic = False  # set by `train` and `eval`, as that of nnx.Dropout
        self.rates = tuple(drop_path * layer / max(depth - 1, 1) for layer in range(depth))
        self.embed = nnx.Linear(patch * patch * channels, width, kernel_init=INIT, rngs=rngs)
        self.class_token = nnx.Param(INIT(rngs.params(), (1, 1, width)))
        self.positions = nnx.Param(INIT(rngs.params(), (1, side**2 + 1, width))) if position_embedding else None
        place = {"grid": (side, side), "class_token": True}

        def block(layer: int, rngs: nnx.Rngs) -> Block:
            built = build(mixer, width=width, heads=heads, layer=layer, rngs=rngs, **place)
            return Block(built, width, mlp_ratio * width, rngs=rngs)

        self.stacks, first = nnx.List([]), 0
        for group, repeats in runs([_kind(partial(block, layer)) for layer in range(depth)]):
            makers = [partial(block, first + i) for i in range(len(group))]
            self.stacks.append(Blocks(makers, repeats, rngs=rngs))
            first += len(group) * repeats
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(width, classes, kernel_init=INIT, rngs=rngs)

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits `[batch, classes]` of images `[batch, height, width, channels]`, any float dtype.

        Raises:
          UserError: what is given are no images of the model's size.
          ValueError: no `rngs` in training, where there is drop path.
        """
        x, drops, first = self.tokens(images), self._drops(rngs), 0
        for stack in self.stacks:
            last = first + len(stack.layers) * stack.repeats
            own = jax.tree.map(lambda leaf, first=first, last=last: leaf[first:last], drops)
            x, first = stack(x, own, self.remat, self.unroll), last
        return self.logits(x)

    def _drops(self, rngs: nnx.Rngs | None) -> Drop | None:
        """What is dropped of the blocks."""
        if self.deterministic or not any(self.rates):
            return None
        if rngs is None:
            raise ValueError("in training, drop path needs rngs; give them, or call eval() first")
        return Drop(jnp.asarray(self.rates), jax.random.split(rngs.dropout(), len(self.rates)))

    def tokens(self, images: jax.Array) -> jax.Array:
        """What the first block sees, `[batch, 1 + patches, width]`, of images as `__call__` takes them."""
        size = (self.image_size, self.image_size, self.channels)
        if images.ndim != 4 or images.shape[1:] != size or not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"the model takes floating-point images [batch, {', '.join(map(str, size))}], "
                f"got {images.dtype} {list(images.shape)}; resize and scale them, or set image_size and channels"
            )
        x = self.embed(self._patches(images))
        x = jnp.concatenate([jnp.broadcast_to(self.class_token[...], (len(x), 1, x.shape[-1])), x], 1)
        return x if self.positions is None else x + self.positions[...]

    def logits(self, x: jax.Array) -> jax.Array:
        """`[batch, classes]` of what the last block gives."""
        x = self.norm(x)
        return self.head(x.mean(1) if self.pool == "mean" else x[:, 0])

    def _patches(self, images: jax.Array) -> jax.Array:
        """`[batch, patches, patch * patch * channels]`, in row-major order of the patches."""
        side = self.image_size // self.patch
        x = images.reshape(len(images), side, self.patch, side, self.patch, self.channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), side * side, -1)


def _kind(make: Callable[[nnx.Rngs], Block]) -> tuple[Any, ...]:
    """Equal for blocks that differ in nothing but the values of their parameters."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=jax.random.key(0)))))
    return graph, *((x.shape, x.dtype) for x in jax.tree.leaves(state))
