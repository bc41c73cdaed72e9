from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.softmax_attention import SoftmaxAttention, fused_attention
from models.vision_transformer import Drop, VisionTransformer, kept
from training.errors import UserError

FAST_COMPILE = {"xla_backend_optimization_level": 0}
SOFTMAX = {"name": "models.softmax_attention.SoftmaxAttention"}
SIZES = {"image_size": 12, "patch": 4, "classes": 5, "width": 8, "heads": 2, "depth": 2}


def make(**options):
    return VisionTransformer(SOFTMAX, rngs=nnx.Rngs(0), **{**SIZES, **options})


def images(count=2):
    return jax.random.normal(jax.random.key(1), (count, 12, 12, 3))


def run(model, *arguments):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, *a: nnx.merge(graph, state)(*a), compiler_options=FAST_COMPILE)(state, *arguments)


def test_patches_are_in_row_major_order():
    x = np.zeros((1, 12, 12, 3), np.float32)
    x[0, 4:8, 8:12] = 1
    patches = jax.jit(make()._patches)(x)
    assert np.flatnonzero(patches[0].any(-1)).tolist() == [5]


def test_pools():
    mean = run(make(), images())
    assert mean.shape == (2, 5)
    assert not np.allclose(mean, run(make(pool="class"), images()))


def test_what_the_backward_keeps_does_not_change_gradients():
    def gradients(remat):
        graph, state = nnx.split(make(remat=remat, image_size=8, drop_path=0.5))

        @partial(jax.jit, compiler_options=FAST_COMPILE)
        @jax.grad
        def gradient(state, x):
            return jnp.square(nnx.merge(graph, state)(x, nnx.Rngs(0))).sum()

        return gradient(state, images(4)[:, :8, :8])

    first, *others = (gradients(remat) for remat in ("none", "full", "products"))
    for other in others:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), other, first)


def one_by_one(model, x):
    """The logits without the loop over blocks."""
    x = model.tokens(x)
    for stack in model.stacks:
        for block in stack.unstacked():
            x = block(x)
    return model.logits(x)


@pytest.mark.parametrize("unroll", [1, 2, 3])
def test_the_loop_over_blocks_is_a_loop_over_blocks(unroll):
    graph, state = nnx.split(make(depth=3, unroll=unroll, image_size=8))

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(state, x):
        model = nnx.merge(graph, state)
        return model(x), one_by_one(model, x)

    np.testing.assert_allclose(*both(state, images()[:, :8, :8]), atol=1e-6)


def test_blocks_of_one_kind_share_a_stack_and_all_have_their_own_parameters():
    model = make(depth=4)
    (stack,) = model.stacks
    assert (len(stack.layers), stack.repeats) == (1, 4)
    kernels = stack.layers[0].mlp.up.kernel[...]
    assert len({float(kernel[0, 0]) for kernel in kernels}) == 4


class Shift(nnx.Module):
    """A mixer that depends on its layer alone."""

    def __init__(self, width, heads, *, layer, shifts, rngs, **place):
        self.shift = shifts[layer]

    def __call__(self, x):
        return jnp.full_like(x, self.shift)


@pytest.mark.parametrize(
    ("shifts", "stacks"),
    [((1, 2, 1, 2), [(2, 2)]), ((1, 1, 1, 3), [(1, 3), (1, 1)]), ((3, 1, 1, 2), [(1, 1), (1, 2), (1, 1)])],
)
def test_blocks_that_differ_keep_their_order(shifts, stacks):
    spec = {"name": f"{__name__}.Shift", "shifts": shifts}
    model = VisionTransformer(spec, rngs=nnx.Rngs(0), **{**SIZES, "depth": 4})
    assert [(len(stack.layers), stack.repeats) for stack in model.stacks] == stacks
    assert [block.mixer.shift for stack in model.stacks for block in stack.unstacked()] == list(shifts)


def test_drop_path_drops_whole_examples_in_training_only():
    model = make(drop_path=0.5)
    model.eval()
    calm = run(model, images(8))
    np.testing.assert_allclose(calm, run(make(), images(8)), atol=1e-6)
    model.train()
    noisy = jax.jit(lambda x: model(x, nnx.Rngs(0)), compiler_options=FAST_COMPILE)(images(8))
    assert not np.allclose(noisy, calm)
    assert model.rates == (0, 0.5)
    with pytest.raises(ValueError, match="drop path needs rngs"):
        model(images())


def test_drop_path_keeps_the_expectation_and_the_first_block_whole():
    x, rates = jnp.ones((4000, 1, 2)), jnp.array([0.0, 0.25])

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def dropped(rate, key):
        return kept(x, Drop(rate, key))

    whole, thinned = (np.asarray(dropped(rate, jax.random.key(0))) for rate in rates)
    np.testing.assert_array_equal(whole, x)
    assert set(np.unique(thinned)) == {0, np.float32(1 / 0.75)}
    assert (thinned[..., 0] == thinned[..., 1]).all()
    np.testing.assert_allclose(thinned.mean(), 1, atol=0.03)
    first, second = Drop(rates[1], jax.random.key(0)).branches()
    assert not np.array_equal(dropped(*first), dropped(*second))


def test_bfloat16():
    graph, state = nnx.split(make())
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state)
    logits = run(nnx.merge(graph, state), images().astype(jnp.bfloat16))
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), run(make(), images()), atol=5e-3)


def test_softmax_attention_ignores_padding():
    layer = SoftmaxAttention(8, 2, stddev=1.0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 7, 8))
    mask = jnp.broadcast_to(jnp.arange(7) < 4, (2, 7))
    outputs = jax.jit(lambda x: (layer(x, mask)[:, :4], layer(x[:, :4])), compiler_options=FAST_COMPILE)(x)
    np.testing.assert_allclose(*outputs, atol=1e-5)
    with pytest.raises(UserError, match="a width of 8 does not split into 3 heads"):
        SoftmaxAttention(8, 3, rngs=nnx.Rngs(0))


@pytest.mark.gpu
@pytest.mark.parametrize("time", [64, 197])
def test_fused_attention_and_its_gradients(time):
    if jax.devices()[0].platform != "gpu":
        pytest.skip(f"fused attention needs an NVIDIA GPU; this is {jax.devices()[0].platform}")
    *inputs, cotangent = jax.random.normal(jax.random.key(0), (4, 2, time, 3, 64), jnp.bfloat16)

    @partial(jax.jit, static_argnums=0)
    def both(attention, *inputs):
        y, pull = jax.vjp(attention, *inputs)
        return y, *pull(cotangent.astype(y.dtype))

    naive = partial(jax.nn.dot_product_attention, implementation="xla")
    wanted = both(naive, *(x.astype(jnp.float32) for x in inputs))
    for got, right in zip(both(fused_attention, *inputs), wanted, strict=True):
        assert jnp.linalg.norm(got - right) < 0.01 * jnp.linalg.norm(right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30, "patch": 16}, "30 pixels does not split into patches of 16; use image_size=16 or 32"),
        ({"image_size": 3}, "use image_size=4 or 4"),
        ({"pool": "max"}, "pool='max': choose from mean, class"),
        ({"remat": "product"}, "remat='product' does not exist: did you mean 'products'"),
    ],
)
def test_errors_of_the_constructor(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 12, 12), np.float32), np.zeros((2, 14, 12, 3), np.float32), np.zeros((2, 12, 12, 3), np.uint8)]
)
def test_what_is_no_image(bad):
    with pytest.raises(UserError, match=r"takes floating-point images \[batch, 12, 12, 3\], got"):
        nnx.eval_shape(lambda: make()(bad))
