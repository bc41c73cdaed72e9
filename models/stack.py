"""Layers whose parameters are stacked, so that a loop over them compiles the program of one layer only."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from models.layers import ACTIVATION

_KERNELS = ("pallas_call", "mpmd_map", "custom_vmap_call", "dot_product_attention_fwd")


def _products_and_kernels(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    if primitive.name.startswith(_KERNELS):
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)


_named = jax.checkpoint_policies.save_only_these_names(ACTIVATION)

REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "products": _products_and_kernels,
    "activations": jax.checkpoint_policies.save_from_both_policies(_products_and_kernels, _named),
}
"""What the backward pass keeps of a layer: everything; only its input; or also products with weights and what fused
kernels return, so that only elementwise operations are done twice; or also those activations, in 16 bits, that are
written to memory anyway, which "none" keeps in float32."""


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

    def loop(
        self, group: Callable[[jax.Array, nnx.List, Any], jax.Array], x: jax.Array, slots: Any, remat: str, unroll: int
    ) -> jax.Array:
        """`x` after all repetitions.

        Args:
          group: what one repetition makes of `x`, its layers and its slot.
          x: what goes in.
          slots: a tree of arrays [repeats, ...], a slot for each repetition.
          remat: a key of `REMAT`.
          unroll: repetitions that a turn of the loop holds.
        """
        graph, states = nnx.split(self.layers)

        def turn(x: jax.Array, one: tuple[nnx.State, Any]) -> tuple[jax.Array, None]:
            state, slot = one
            return group(x, nnx.merge(graph, state), slot), None

        if REMAT[remat] is not None:
            turn = jax.checkpoint(turn, policy=REMAT[remat], prevent_cse=False)
        return jax.lax.scan(turn, x, (states, slots), unroll=min(unroll, self.repeats))[0]

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
