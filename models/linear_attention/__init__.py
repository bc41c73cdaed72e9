"""Causal linear attention with decay as an operation. It needs nothing but JAX.

`linear_attention` for sequences, `linear_attention_step` for one token; `reference` has the oracle.
"""

from models.linear_attention.api import linear_attention, linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]
