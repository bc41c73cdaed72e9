"""Errors that a user can mend: one message, no traceback."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Something that the user gave is wrong; the message says what, and what would be right."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt `name`: the nearest valid one, or all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(valid)}"


@contextlib.contextmanager
def reported(interrupted: str | None = None) -> Iterator[None]:
    """Ends the program with one message where its body raises: exit status 2 for a `UserError`.

    Args:
      interrupted: what to say where it is interrupted, with exit status 130; None leaves that alone.
    """
    try:
        yield
    except UserError as error:
        _fail(str(error), status=2)
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        _fail(interrupted, status=130)


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
