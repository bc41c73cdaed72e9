"""Which models are compared, and how each is tuned."""

TABLE = (
    "softmax",
    "retnet",
    "mamba2",
    "gla",
    "linear_attention",
    "gated_deltanet_matched",
    "deltanet_no_conv",
    "deltanet",
    "deltanet_sliding_256",
    "deltanet_global",
)
"""Keys of `deltanet.language.MIXERS`: Table 1's rows, and linear attention and Gated DeltaNet."""

ABLATIONS = ("deltanet_l1_elu", "deltanet_l2_elu", "deltanet_l2_relu", "deltanet", "deltanet_no_conv")
"""Feature map, norm and convolution."""

SEEDS = (0, 1, 2)
"""Learning rates are tried at the first seed; the best is trained with the others."""


def rates(scale: str) -> tuple[float, ...]:
    """The learning rates that each row tries."""
    return (1e-3,) if scale == "cpu" else (6e-4, 1e-3, 2e-3)
