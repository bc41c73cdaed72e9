"""The models of the synthetic benchmarks: small stacks whose mixer is an argument."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.language_model import CausalLanguageModel
from models.layers import Linear, RmsNorm, choose

_DELTA, _GATED = "deltanet.layer.DeltaNet", "deltanet.layer.GatedDeltaNet"
_MATCHED = {"expand_k": 1.0, "expand_v": 1.0, "gate": False}  # Gated DeltaNet with DeltaNet's sizes

Spec = dict[str, Any]


def _softmax(heads: int, **options: Any) -> Spec:
    # These sequences are too short for fused kernels, and replicas are trained side by side.
    return {"name": "models.causal_attention.CausalAttention", "heads": heads, "implementation": "xla", **options}


MIXERS: dict[str, Callable[[int], Spec]] = {
    "deltanet": lambda heads: {"name": _DELTA, "heads": heads},
    "deltanet_no_conv": lambda heads: {"name": _DELTA, "heads": heads, "convolution": 0},
    "gated_deltanet": lambda heads: {"name": _GATED, "heads": heads, **_MATCHED},
    "gated_deltanet_no_conv": lambda heads: {"name": _GATED, "heads": heads, "convolution": 0, **_MATCHED},
    "linear_attention": lambda heads: {"name": "models.linear_mixers.LinearAttention", "heads": heads},
    "retnet": lambda heads: {"name": "models.linear_mixers.RetNet", "heads": heads},
    "gla": lambda heads: {"name": "models.linear_mixers.Gla", "heads": heads},
    "gla_conv": lambda heads: {"name": "models.linear_mixers.Gla", "heads": heads, "convolution": 4},
    "mamba2": lambda heads: {"name": "models.linear_mixers.Mamba2", "state": 16},
    "softmax": lambda heads: _softmax(heads),
}
"""From the number of heads to the mixer. Mamba-2 has heads of 64 channels, a convolution of its own, and Mamba's state
of 16."""


def mqar_model(
    mixer: str, width: int, *, heads: int = 2, length: int, dtype: str, rngs: nnx.Rngs, vocabulary_size: int
):
    """Zoology's model: two mixers without MLPs, layer norms, a tied head, dropout of the embedded tokens.

    Softmax attention has one head and a learned position embedding instead of the rotary one; others have neither.

    Args:
      mixer: a key of `MIXERS`.
      width: of the tokens.
      heads: of the mixer.
      length: tokens in a sequence.
      dtype: of the computation.
      rngs: of the initial parameters.
      vocabulary_size: of tokens.
    """
    softmax = mixer == "softmax"
    spec = _softmax(1, rotary_base=None) if softmax else choose(MIXERS, mixer, "mixer")(heads)
    return CausalLanguageModel(
        vocabulary_size=vocabulary_size,
        width=width,
        depth=2,
        mixers={mixer: spec},
        mlp="none",
        norm="layer",
        norm_epsilon=1e-5,
        tied=True,
        positions=length if softmax else None,
        dropout=0.1,
        unroll=2,
        dtype=dtype,
        rngs=rngs,
    )


class Autoencoder(CausalLanguageModel):
    """MAD's model of compression: what the layers make of the last token is decoded at every position.

    Positions are told by a sine and cosine code that is added; the decoder is norm, linear map and GELU, twice.
    """

    def __init__(self, *, width: int, rngs: nnx.Rngs, **options: Any):
        super().__init__(width=width, rngs=rngs, **options)
        self.decoder = nnx.List([nnx.List([RmsNorm(width), Linear(width, width, bias=True, rngs=rngs)]) for _ in "12"])

    def hidden(self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, rngs: nnx.Rngs | None = None):
        time = tokens.shape[1]
        x = self.embedding[...][tokens].astype(self.dtype)
        for stack in self.stacks:
            x = stack(x, segment_ids, self.remat, self.unroll)
        x = x[:, -1:] + position_code(time, x.shape[-1]).astype(x.dtype)
        for norm, linear in self.decoder:
            x = jax.nn.gelu(linear(norm(x)), approximate=False)
        return self.norm(x)


def position_code(time: int, width: int) -> jax.Array:
    """Sines and cosines of the positions, [time, width] (Vaswani et al. 2017)."""
    rates = 1e4 ** (-jnp.arange(0, width, 2) / width)
    angles = jnp.arange(time)[:, None] * rates
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(time, -1)[:, :width]


def mad_model(
    mixer: str,
    *,
    heads: int = 1,
    width: int = 128,
    autoencoder: bool = False,
    dtype: str,
    rngs: nnx.Rngs,
    vocabulary_size: int,
):
    """MAD's model: mixer, SwiGLU, mixer, SwiGLU, with root mean square norms and a head of its own.

    The SwiGLU has 352 units for 128 of width, as the benchmark's code (its text says 512). Softmax attention has 16
    heads with rotary positions, whatever `heads` says; GLA eight.

    Args:
      mixer: a key of `MIXERS`.
      heads: of the mixer.
      width: of the tokens.
      autoencoder: whether the task is compression.
      dtype: of the computation.
      rngs: of the initial parameters.
      vocabulary_size: of tokens.
    """
    heads = {"softmax": 16, "gla": 8}.get(mixer, heads)
    kind = Autoencoder if autoencoder else CausalLanguageModel
    return kind(
        vocabulary_size=vocabulary_size,
        width=width,
        depth=2,
        mixers={mixer: choose(MIXERS, mixer, "mixer")(heads)},
        mlp="swiglu",
        hidden=16 * -(-int(width * 8 / 3) // 16),
        unroll=2,
        dtype=dtype,
        rngs=rngs,
    )


def regbench_model(
    mixer: str, *, heads: int = 2, width: int = 128, depth: int = 4, dtype: str, rngs: nnx.Rngs, vocabulary_size: int
):
    """RegBench's model: mixers and GELU MLPs with layer norms, dropout of the embedded tokens, a tied head.

    Args:
      mixer: a key of `MIXERS`; softmax attention has rotary positions.
      heads: of the mixer.
      width: of the tokens.
      depth: layers.
      dtype: of the computation.
      rngs: of the initial parameters.
      vocabulary_size: of tokens.
    """
    return CausalLanguageModel(
        vocabulary_size=vocabulary_size,
        width=width,
        depth=depth,
        mixers={mixer: choose(MIXERS, mixer, "mixer")(heads)},
        mlp="gelu",
        norm="layer",
        norm_epsilon=1e-5,
        tied=True,
        dropout=0.1,
        unroll=depth,
        dtype=dtype,
        rngs=rngs,
    )
