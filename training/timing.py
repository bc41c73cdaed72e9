"""How long a call takes on a device that works while the host goes on."""

import time
from collections.abc import Callable
from typing import Any

import jax

Wait = Callable[[Any], Any]


def calls_within(call: Callable[[], Any], seconds: float, wait: Wait = jax.block_until_ready) -> int:
    """How many calls take about `seconds`, from 1 to 50; the second call counts, the first may compile.

    Args:
      call: starts work, and returns what `wait` waits for.
      seconds: of a batch of calls.
      wait: returns when the work is done.
    """
    wait(call())
    begin = time.perf_counter()
    wait(call())
    return int(min(50, max(1, seconds / (time.perf_counter() - begin))))


def batch_seconds(call: Callable[[], Any], calls: int, batches: int, wait: Wait = jax.block_until_ready) -> list[float]:
    """Seconds of a call, a mean for each batch of `calls`, which keep the device busy without waiting between them."""
    samples = []
    for _ in range(batches):
        begin = time.perf_counter()
        for _ in range(calls):
            last = call()
        wait(last)
        samples.append((time.perf_counter() - begin) / calls)
    return samples
