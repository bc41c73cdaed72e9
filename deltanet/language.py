"""Language models of the paper (section 4, Tables 1 and 2, and the ablations), their rivals and hybrids, by name."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from models.language_model import CausalLanguageModel
from models.layers import choose

SIZES: dict[str, dict[str, int]] = {
    "1.3B": {"width": 2048, "depth": 24},
    "340M": {"width": 1024, "depth": 24},
    "small": {"width": 512, "depth": 12},
    "tiny": {"width": 128, "depth": 2},
}
"""The paper's two, whose names count one of the two embeddings; one for a single GPU; one for a laptop."""

SLIDING_WINDOW = 2048
"""Of the hybrids; the paper does not state its own. The authors' later hybrids have this."""

Spec = dict[str, Any]


def _delta(width: int, **options: Any) -> Spec:
    return {"name": "deltanet.layer.DeltaNet", "heads": max(width // 128, 2), **options}


def _softmax(width: int, **options: Any) -> Spec:
    return {"name": "models.causal_attention.CausalAttention", "heads": width // 64, **options}


def _delta_only(**options: Any) -> Callable[[int, int], Spec]:
    return lambda width, depth: {"mixers": {"delta": _delta(width, **options)}}


def _one(name: str, heads: Callable[[int], int], **options: Any) -> Callable[[int, int], Spec]:
    return lambda width, depth: {"mixers": {"mixer": {"name": name, "heads": heads(width), **options}}}


def _softmax_only(width: int, depth: int) -> Spec:
    return {"mixers": {"softmax": _softmax(width)}}


def _sliding_only(width: int, depth: int) -> Spec:
    return {"mixers": {"window": _softmax(width, window=SLIDING_WINDOW)}}


def _sliding_hybrid(window: int) -> Callable[[int, int], Spec]:
    """Every other layer, from the second on, is softmax attention in a window."""

    def hybrid(width: int, depth: int) -> Spec:
        mixers = {"delta": _delta(width), "window": _softmax(width, window=window)}
        return {"mixers": mixers, "pattern": ("delta", "window")}

    return hybrid


def _global_hybrid(width: int, depth: int) -> Spec:
    """Layers 2 and N / 2 + 1, counted from one, are softmax attention."""
    pattern = ["delta"] * depth
    pattern[1] = pattern[depth // 2] = "softmax"
    return {"mixers": {"delta": _delta(width), "softmax": _softmax(width)}, "pattern": tuple(pattern)}


def _retnet(width: int, depth: int) -> Spec:
    """Values are twice as wide, and the MLP half as wide, for as many parameters."""
    mixer = {"name": "models.linear_mixers.RetNet", "heads": max(width // 256, 2)}
    return {"mixers": {"retnet": mixer}, "hidden": width * 3 // 2}


def _gated_delta(width: int, depth: int) -> Spec:
    """Heads of 256 key and 512 value channels, six for 1024 of width, in seven eighths of the layers."""
    mixer = {"name": "deltanet.layer.GatedDeltaNet", "heads": max(6 * width // 1024, 2)}
    return {"mixers": {"gated_delta": mixer}, "depth": depth * 7 // 8}


def _mamba2(width: int, depth: int) -> Spec:
    """Twice as many layers without MLPs, as in Mamba."""
    return {"mixers": {"mamba2": {"name": "models.linear_mixers.Mamba2"}}, "mlp": "none", "depth": 2 * depth}


MIXERS: dict[str, Callable[[int, int], Spec]] = {
    "deltanet": _delta_only(),
    "deltanet_no_conv": _delta_only(convolution=0),
    "deltanet_l1_elu": _delta_only(key_norm="l1", feature_map="elu"),
    "deltanet_l2_elu": _delta_only(feature_map="elu"),
    "deltanet_l2_relu": _delta_only(feature_map="relu"),
    "deltanet_negative": _delta_only(negative_eigenvalues=True),
    "deltanet_gate": _delta_only(gate=True),
    "deltanet_sliding": _sliding_hybrid(SLIDING_WINDOW),
    "deltanet_sliding_256": _sliding_hybrid(256),
    "deltanet_global": _global_hybrid,
    "gated_deltanet": _gated_delta,
    "gated_deltanet_matched": _one(
        "deltanet.layer.GatedDeltaNet", lambda width: max(width // 128, 2), expand_k=1.0, expand_v=1.0, gate=False
    ),
    "softmax": _softmax_only,
    "sliding": _sliding_only,
    "linear_attention": _one("models.linear_mixers.LinearAttention", lambda width: max(width // 128, 2)),
    "retnet": _retnet,
    "gla": _one("models.linear_mixers.Gla", lambda width: 4),
    "gla_conv": _one("models.linear_mixers.Gla", lambda width: 4, convolution=4),
    "mamba2": _mamba2,
}
"""From width and depth to what distinguishes the model. "matched" has DeltaNet's sizes, and a decay besides."""


def language_model(
    size: str = "340M",
    mixer: str = "deltanet",
    *,
    vocabulary_size: int = 32_000,
    mixer_options: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> CausalLanguageModel:
    """A language model of the paper.

    Args:
      size: a key of `SIZES`.
      mixer: a key of `MIXERS`.
      vocabulary_size: of tokens.
      mixer_options: further arguments of the first of its mixers, DeltaNet in the hybrids.
      rngs: of the initial parameters.
      **options: of `CausalLanguageModel`, instead of what `size` and `mixer` say.

    Raises:
      UserError: an unknown size or mixer.
    """
    shape = choose(SIZES, size, "size")
    shape = {key: options.pop(key, value) for key, value in shape.items()}
    spec = {**shape, **choose(MIXERS, mixer, "mixer")(**shape)}
    first = next(iter(spec["mixers"]))
    spec["mixers"][first] |= dict(mixer_options or {})
    return CausalLanguageModel(vocabulary_size=vocabulary_size, rngs=rngs, **{**spec, **options})
