import jax
import numpy as np
import pytest
from flax import nnx

from deltanet.language import MIXERS, language_model
from training.errors import UserError


def shapes(size: str, mixer: str, **options) -> nnx.Module:
    return nnx.eval_shape(lambda: language_model(size, mixer, rngs=nnx.Rngs(0), **options))


def count(model: nnx.Module) -> int:
    return sum(np.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    ("size", "mixer", "parameters"),
    [
        ("340M", "deltanet", 374_362_112),
        ("1.3B", "deltanet", 1_365_677_056),
        ("340M", "softmax", 373_867_520),
        ("1.3B", "softmax", 1_364_297_728),
        ("340M", "gla", 374_475_776),
        ("1.3B", "gla", 1_365_514_240),
    ],
)
def test_parameter_counts_of_the_paper(size, mixer, parameters):
    assert count(shapes(size, mixer)) == parameters


@pytest.mark.parametrize(("size", "parameters"), [("340M", 341_594_112), ("1.3B", 1_300_141_056)])
def test_the_sizes_names_count_one_embedding(size, parameters):
    assert count(shapes(size, "deltanet", tied=True)) == parameters


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_model_is_of_about_the_same_size(mixer):
    model = shapes("340M", mixer)
    assert count(model) / 374_362_112 == pytest.approx(1.0, abs=0.4 if mixer == "gated_deltanet" else 0.1)
    assert isinstance(model, nnx.Module)


def test_hybrids():
    def softmax_layers(mixer):
        names = []
        jax.eval_shape(
            lambda: names.extend(type(x.mixer).__name__ for x in language_model(mixer=mixer, rngs=nnx.Rngs(0)).layers())
        )
        return [i + 1 for i, name in enumerate(names) if name == "CausalAttention"]

    assert softmax_layers("deltanet_sliding") == list(range(2, 25, 2))
    assert softmax_layers("deltanet_global") == [2, 13]


def test_errors():
    with pytest.raises(UserError, match="mixer='deltanets' does not exist: did you mean 'deltanet'"):
        language_model(mixer="deltanets", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="size='340' does not exist"):
        language_model("340", rngs=nnx.Rngs(0))
