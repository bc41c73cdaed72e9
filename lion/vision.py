"""LION vision transformers in the paper's sizes (section 4.1), and the softmax transformer beside them."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from models.vision_transformer import VisionTransformer
from training.errors import UserError, nearest

SIZES: dict[str, dict[str, int]] = {
    "Ti": {"width": 192, "heads": 3, "depth": 12},
    "S": {"width": 384, "heads": 6, "depth": 12},
    "B": {"width": 768, "heads": 12, "depth": 12},
}
"""Tiny, Small and Base."""

_LAYER = "lion.layer.Lion"
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {"name": "models.softmax_attention.SoftmaxAttention"},
    "lion_lit": {"name": _LAYER, "decay": "none"},
    "lion_d": {"name": _LAYER, "decay": "fixed"},
    "lion_s": {"name": _LAYER, "decay": "selective"},
    "lion_d_two_scans": {"name": _LAYER, "decay": "fixed", "scans": 2},
    "lion_s_two_scans": {"name": _LAYER, "decay": "selective", "scans": 2},
    "lion_s_diagonal": {"name": _LAYER, "decay": "diagonal"},
    "retnet": {"name": "lion.mixers.RetNet"},
    "gated_rfa": {"name": "lion.mixers.GatedRfa"},
    "mamba2": {"name": "lion.mixers.Mamba2"},
    "mlstm": {"name": "lion.mixers.MLstm"},
    "hgrn2": {"name": "lion.mixers.Hgrn2"},
    "rwkv6": {"name": "lion.mixers.Rwkv6"},
}
"""Mixers by name; the two-scan variants are those that the paper marks with a natural sign."""

WITHOUT_POSITIONS = ("softmax", "lion_lit")
"""Mixers that see a set of tokens; they get position embeddings unless told otherwise."""


def vision_transformer(
    size: str = "S",
    mixer: str | Mapping[str, Any] = "lion_s",
    *,
    mixer_options: dict[str, Any] | None = None,
    position_embedding: bool | None = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> VisionTransformer:
    """A vision transformer of the paper.

    Args:
      size: a key of `SIZES`; `width`, `heads` and `depth` in `options` change single entries of it.
      mixer: a key of `MIXERS`, or the import path and arguments of another mixer.
      mixer_options: further arguments of the mixer.
      position_embedding: None gives them to the mixers that have no other sense of position.
      **options: see `VisionTransformer`.

    Raises:
      UserError: an unknown size, mixer or option.
    """
    named = isinstance(mixer, str)
    for name, value, choices in (("size", size, SIZES), ("mixer", mixer, MIXERS if named else [mixer])):
        if value not in choices:
            raise UserError(f"{name}={value!r} does not exist: {nearest(value, choices)}")
    if position_embedding is None:
        position_embedding = named and mixer in WITHOUT_POSITIONS
    spec = {**(MIXERS[mixer] if named else mixer), **(mixer_options or {})}
    return VisionTransformer(spec, position_embedding=position_embedding, rngs=rngs, **{**SIZES[size], **options})
