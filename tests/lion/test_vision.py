import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lion.vision import MIXERS, vision_transformer
from training.errors import UserError

FAST_COMPILE = {"xla_backend_optimization_level": 0}
SMALL = {"image_size": 16, "patch": 4, "classes": 5, "width": 12, "heads": 3, "depth": 2}


@pytest.mark.parametrize(
    ("size", "mixer", "count"),
    [
        ("Ti", "lion_lit", 5_679_592),
        ("Ti", "lion_d", 5_679_628),
        ("Ti", "lion_s", 5_686_540),
        ("S", "lion_lit", 21_975_016),
        ("S", "lion_d", 21_975_088),
        ("S", "lion_s", 22_002_736),
        ("B", "lion_lit", 86_416_360),
        ("B", "lion_d", 86_416_504),
        ("B", "lion_s", 86_527_096),
        ("Ti", "lion_d_two_scans", 5_679_628 + 36),
        ("S", "lion_s_two_scans", 22_002_736 + 27_720),
        ("B", "softmax", 86_416_360),
    ],
)
def test_parameter_counts_of_section_4_1(size, mixer, count):
    model = nnx.eval_shape(lambda: vision_transformer(size, mixer, position_embedding=False, rngs=nnx.Rngs(0)))
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_positions_are_given_to_mixers_that_need_them():
    for mixer in MIXERS:
        model = nnx.eval_shape(lambda mixer=mixer: vision_transformer(mixer=mixer, rngs=nnx.Rngs(0), **SMALL))
        assert (model.positions is not None) == (mixer in ("softmax", "lion_lit"))


@pytest.mark.parametrize("mixer", MIXERS)
def test_all_blocks_compile_as_one(mixer):
    model = nnx.eval_shape(lambda: vision_transformer(mixer=mixer, rngs=nnx.Rngs(0), **SMALL))
    assert [(len(stack.layers), stack.repeats) for stack in model.stacks] == [(1, 2)]


def test_directions_alternate_from_block_to_block():
    options = {"direction": "alternating"}
    small = {**SMALL, "depth": 4}
    model = nnx.eval_shape(lambda: vision_transformer(mixer_options=options, rngs=nnx.Rngs(0), **small))
    (stack,) = model.stacks
    assert ([block.mixer.direction for block in stack.layers], stack.repeats) == (["forward", "backward"], 2)


@pytest.mark.parametrize(
    "mixer", [m if m == "lion_s_two_scans" else pytest.param(m, marks=pytest.mark.slow) for m in MIXERS]
)
def test_every_parameter_learns(mixer):
    graph, state = nnx.split(vision_transformer("Ti", mixer, drop_path=0.1, rngs=nnx.Rngs(0), **SMALL))

    def loss(state, images):
        model = nnx.merge(graph, state)
        model.train()
        return jnp.square(model(images, nnx.Rngs(3))).sum()

    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    grads = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(state, images)
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(gradient).all()
        of_a_block = gradient if "stacks" in jax.tree_util.keystr(path) else gradient[None]
        assert all((one != 0).any() for one in of_a_block), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "L"}, "size='L' does not exist: choose from: B, S, Ti"),
        ({"mixer": "lion_x"}, "mixer='lion_x' does not exist: did you mean"),
        ({"mixer_options": {"decays": "none"}}, "decays"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises((UserError, TypeError), match=message):
        vision_transformer(rngs=nnx.Rngs(0), **arguments)
