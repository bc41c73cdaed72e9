"""How fast language models train and decode (arXiv:2406.06484, section 4, Figure 6)."""

from deltanet.throughput.measure import (
    Decoder,
    RandomTokens,
    Shape,
    Step,
    flops_per_token,
    matrix_rate,
    training_config,
)

__all__ = ["Decoder", "RandomTokens", "Shape", "Step", "flops_per_token", "matrix_rate", "training_config"]
