"""The vision transformer of DeiT (Touvron et al. 2021), with any sequence mixer in the place of attention."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Block(nnx.Module):
    """Pre-norm: the mixer and the MLP, each behind a LayerNorm, each dropped for whole examples (drop path)."""

    def __init__(self, mixer: nnx.Module, width: int, hidden: int, drop_path: float, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.mixer = mixer
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(width, hidden, rngs=rngs)
        self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2))

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """`[batch, time, width]` to the same. `rngs` is needed in training where `drop_path` is not zero."""
        x = x + self.drop_path(self.mixer(self.norm1(x)), rngs=rngs)
        return x + self.drop_path(self.mlp(self.norm2(x)), rngs=rngs)


class VisionTransformer(nnx.Module):
    """Patches, a class token in front, blocks, LayerNorm, a pooled token and a linear head.

    Args:
      mixer: import path and arguments of the sequence mixer. It is also given `width`, `heads`, `rngs` and its place:
        `layer`, `grid` (rows and columns of patches; the tokens are in row-major order) and `class_token`.
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
      remat: whether the backward pass computes each block again instead of keeping its activations.
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
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if image_size % patch:
            below = image_size - image_size % patch
            raise UserError(
                f"an image of {image_size} pixels does not split into patches of {patch}; "
                f"use image_size={below or patch} or {below + patch}, or another patch"
            )
        if pool not in ("mean", "class"):
            raise UserError(f"pool={pool!r}: choose from mean, class")
        side = image_size // patch
        self.image_size, self.patch, self.channels, self.pool, self.remat = image_size, patch, channels, pool, remat
        self.embed = nnx.Linear(patch * patch * channels, width, kernel_init=INIT, rngs=rngs)
        self.class_token = nnx.Param(INIT(rngs.params(), (1, 1, width)))
        self.positions = nnx.Param(INIT(rngs.params(), (1, side**2 + 1, width))) if position_embedding else None
        place = {"grid": (side, side), "class_token": True}
        self.blocks = nnx.List(
            Block(
                build(mixer, width=width, heads=heads, layer=layer, rngs=rngs, **place),
                width,
                mlp_ratio * width,
                drop_path * layer / max(depth - 1, 1),
                rngs=rngs,
            )
            for layer in range(depth)
        )
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(width, classes, kernel_init=INIT, rngs=rngs)

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits `[batch, classes]` of images `[batch, height, width, channels]`, any float dtype.

        Raises:
          UserError: what is given are no images of the model's size.
        """
        x = self.tokens(images)
        for block in self.blocks:
            x = nnx.remat(Block.__call__)(block, x, rngs) if self.remat else block(x, rngs)
        return self.logits(x)

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
