"""The arms of the paper's ablations on small images (Tables 13, 14 and 16), and of its claims that have no number."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from lion.vision import vision_transformer
from models.vision_transformer import VisionTransformer
from training.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of the table."""

    title: str
    mixer: str  # a key of `lion.vision.MIXERS`
    positions: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the mixer
    paper: float | None = None  # top-1 on CIFAR-100 in percent; None where the paper prints none


ARMS: dict[str, Arm] = {
    "softmax": Arm("softmax, positions", "softmax", positions=True, paper=77.33),
    "softmax_bare": Arm("softmax, no positions", "softmax", paper=73.15),
    "lit": Arm("LION-LIT, positions", "lion_lit", positions=True, paper=73.61),
    "lit_bare": Arm("LION-LIT, no positions", "lion_lit", paper=65.28),
    "lit_elu": Arm("LION-LIT, positions, ELU + 1", "lion_lit", positions=True, options={"feature_map": "elu"}),
    "d": Arm("LION-D", "lion_d", paper=75.66),
    "d_two_scans": Arm("LION-D♮", "lion_d_two_scans"),
    "d_doubled": Arm("LION-D, doubled diagonal", "lion_d", options={"double_diagonal": True}),
    "s": Arm("LION-S", "lion_s", paper=77.56),
    "s_two_scans": Arm("LION-S♮", "lion_s_two_scans", paper=80.07),
    "s_frozen": Arm("LION-S, frozen gate", "lion_s", options={"freeze_gate": True}),
    "s_vector": Arm("LION-S, a decay for each channel", "lion_s_diagonal", paper=67.55),
    "s_forward": Arm("LION-S, forward only", "lion_s", options={"direction": "forward"}, paper=71.08),
    "s_backward": Arm("LION-S, backward only", "lion_s", options={"direction": "backward"}, paper=69.61),
    "s_alternating": Arm("LION-S, direction alternating", "lion_s", options={"direction": "alternating"}, paper=73.93),
    "s_elu": Arm("LION-S, ELU + 1", "lion_s", options={"feature_map": "elu"}),
    "s_doubled": Arm("LION-S, doubled diagonal", "lion_s", options={"double_diagonal": True}),
}


def model(arm: str = "s", *, implementation: str | None = None, rngs: nnx.Rngs, **options: Any) -> VisionTransformer:
    """The vision transformer of one arm.

    Args:
      arm: a key of `ARMS`.
      implementation: of the mixer; see `lion.layer.LinearMixer` and `models.softmax_attention.SoftmaxAttention`.
      rngs: of the initial parameters.
      **options: see `vision_transformer`.

    Raises:
      UserError: an unknown arm.
    """
    if arm not in ARMS:
        raise UserError(f"arm={arm!r} does not exist: {nearest(arm, ARMS)}")
    one = ARMS[arm]
    mixer_options = {**one.options, "implementation": implementation}
    return vision_transformer(
        mixer=one.mixer, mixer_options=mixer_options, position_embedding=one.positions, rngs=rngs, **options
    )
