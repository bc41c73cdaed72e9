"""Layers whose parameters are stacked, so that a loop over them compiles the program of one layer only."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx


class Stack(nnx.Module):
    """A group of layers repeated, with the parameters of all repetitions stacked, so that a scan can run over them.

    Args:
      makers: functions from `nnx.Rngs` to a layer, one for each layer of the group.
      repeats: how often the group is repeated.
    """

    def __init__(self, makers: Sequence[Callable[[nnx.Rngs], nnx.Module]], repeats: int, *, rngs: nnx.Rngs):
        def make(key: jax.Array) -> nnx.List:
            keys = jax.random.split(key, len(makers))
            return nnx.List([maker(nnx.Rngs(params=k)) for maker, k in zip(makers, keys, strict=True)])

        self.repeats = repeats
        graph = nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0))))
        states = jax.vmap(lambda key: nnx.state(make(key)))(jax.random.split(rngs.params(), repeats))
        self.layers = nnx.merge(graph, states)

    def unstacked(self) -> list[nnx.Module]:
        """All layers one after the other, each with its own parameters."""
        graph, states = nnx.split(self.layers)
        groups = (nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], states)) for i in range(self.repeats))
        return [layer for group in groups for layer in group]


def runs(kinds: Sequence[Any]) -> list[tuple[list[Any], int]]:
    """Layers of these kinds as repeated groups: one group where the kinds have a period, else runs of one kind."""
    kinds = list(kinds)
    for period in range(1, len(kinds) // 2 + 1):
        if len(kinds) % period == 0 and kinds[:period] * (len(kinds) // period) == kinds:
            return [(kinds[:period], len(kinds) // period)]
    found: list[tuple[list[Any], int]] = []
    for kind in kinds:
        if found and found[-1][0] == [kind]:
            found[-1] = ([kind], found[-1][1] + 1)
        else:
            found.append(([kind], 1))
    return found
