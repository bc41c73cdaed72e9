"""Which of an op's implementations runs."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Refusal = Callable[[Any], str | None]


def first_that_serves(
    implementations: Mapping[str, tuple[Refusal, Callable[[Any], Any]]],
    names: str | Sequence[str],
    problem: Any,
    subject: str,
    op: str,
    log: logging.Logger,
) -> Callable[[Any], Any]:
    """The first implementation among `names` that serves; the log says why others do not.

    Args:
      implementations: name -> why it does not serve a problem, or None; and what runs it.
      names: one of them, or several in the order of preference.
      problem: the op's checked arguments.
      subject: what they are, for the error: one of them and its shape.
      op: its name, for the log.
      log: where to.

    Raises:
      ValueError: there is no implementation of such a name.
      NotImplementedError: none of them serves.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    if unknown := [name for name in names if name not in implementations]:
        raise ValueError(f"no implementation {unknown[0]!r}: choose from {', '.join(implementations)}")
    reasons = []
    for name in names:
        refusal, run = implementations[name]
        if (reason := refusal(problem)) is None:
            log.debug("%s runs %s; %s", op, name, "; ".join(reasons) or "it is the first choice")
            return run
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"no implementation serves {subject}: {'; '.join(reasons) or 'none was named'}")


def serves(problem: Any) -> None:
    """The refusal of an implementation that serves everything."""
