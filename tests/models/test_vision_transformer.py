import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.softmax_attention import SoftmaxAttention
from models.vision_transformer import VisionTransformer
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


def test_pools_and_remat():
    mean, kept = run(make(), images()), run(make(remat=True), images())
    assert mean.shape == (2, 5)
    np.testing.assert_allclose(mean, kept, atol=1e-6)
    assert not np.allclose(mean, run(make(pool="class"), images()))


def test_drop_path_drops_whole_examples_in_training_only():
    model = make(drop_path=0.5)
    model.eval()
    calm = run(model, images(8))
    np.testing.assert_allclose(calm, run(make(), images(8)), atol=1e-6)
    model.train()
    noisy = jax.jit(lambda x: model(x, nnx.Rngs(0)), compiler_options=FAST_COMPILE)(images(8))
    assert not np.allclose(noisy, calm)
    assert [block.drop_path.rate for block in model.blocks] == [0, 0.5]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30, "patch": 16}, "30 pixels does not split into patches of 16; use image_size=16 or 32"),
        ({"image_size": 3}, "use image_size=4 or 4"),
        ({"pool": "max"}, "pool='max': choose from mean, class"),
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
