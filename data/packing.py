"""Documents in windows of one length, and which tokens of a window belong together."""

from typing import Any

import numpy as np


def segments(tokens: Any, document: int, xp: Any = np) -> Any:
    """Numbers of documents within each window.

    Args:
      tokens: [batch, time]; each document begins with the token `document`.
      document: that token.
      xp: numpy or jax.numpy.

    Returns:
      [batch, time], int32: 0 up to the first token `document`, 1 from there to the next, and so on.
    """
    return xp.cumsum(tokens == document, axis=1).astype(xp.int32)
