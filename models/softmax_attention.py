"""Softmax attention, the baseline of every other mixer."""

import jax
import jax.numpy as jnp
from flax import nnx

from training.errors import UserError


def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's attention without a mask, `[batch, time, heads, dim]`; a token is added where the length is odd.

    cuDNN has no gradients of odd lengths, such as the 197 tokens of an image of 224 pixels.
    """
    batch, time = q.shape[:2]
    if time % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(batch, time, jnp.int32)
    options = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)[:, :time]


class SoftmaxAttention(nnx.Module):
    """Multi-head softmax attention in both directions, with biases, as in ViT and BERT.

    Args:
      width: of the tokens.
      heads: they share the width equally.
      implementation: "xla", "cudnn" (fused, on NVIDIA GPUs, in bfloat16) or None for jax's choice.
      stddev: of the initial weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        implementation: str | None = None,
        stddev: float = 0.02,
        rngs: nnx.Rngs,
        **placement,
    ):
        if width % heads:
            raise UserError(f"a width of {width} does not split into {heads} heads")
        init = nnx.initializers.normal(stddev)
        self.heads, self.implementation = heads, implementation
        self.qkv = nnx.Linear(width, 3 * width, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array, padding_mask: jax.Array | None = None) -> jax.Array:
        """`[batch, time, width]` to the same; `padding_mask` `[batch, time]` is true where a token counts."""
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).transpose(2, 0, 1, 3, 4)
        if self.implementation == "cudnn" and padding_mask is None:
            return self.out(fused_attention(q, k, v).reshape(x.shape))
        mask = None if padding_mask is None else padding_mask[:, None, None, :]
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=self.implementation)
        return self.out(y.reshape(x.shape))
