"""The three linear transformers of the paper by name, so that one config covers them."""

from flax import nnx

from icl.models import DiagonalLinearTransformer, LinearTransformer
from training.errors import UserError, nearest

FORMS = ("gdpp", "diagonal", "full")


def linear_transformer(
    form: str, layers: int, dimension: int, heads: int = 1, init_std: float = 0.01, *, rngs: nnx.Rngs
) -> nnx.Module:
    """GD++, DIAG or FULL, all parameters normal with deviation `init_std` at the start.

    Without the factor 1/n in the attention, 0.05 is already too much: four layers begin at a loss of 1e34.
    """
    if form not in FORMS:
        raise UserError(f"model.form={form!r}: {nearest(form, FORMS)}")
    if form == "full":
        return LinearTransformer(layers, dimension, heads, init_std, rngs=rngs)
    return DiagonalLinearTransformer(layers, dimension, heads, form == "diagonal", init_std, rngs=rngs)
