"""Bidirectional linear attention with decay, in every form of LION (arXiv:2502.16249) and one that it lacks."""

from lion.attention.api import lion_attention

__all__ = ["lion_attention"]
