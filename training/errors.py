"""Errors that a user can mend: one message, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user gave is wrong; the message says what, and what would be right."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt `name`: the nearest valid one, or all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(valid)}"
