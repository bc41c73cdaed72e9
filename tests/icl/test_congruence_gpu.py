import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl import congruence_gpu
from icl.linear_attention import product

needs_kernels = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need JAX 0.11")


def _operands(d, batch):
    """T, a symmetric S and a cotangent that is not symmetric."""
    t, s, cotangent = jax.random.normal(jax.random.key(0), (3, d, d, batch))
    return t, s + jnp.swapaxes(s, 0, 1), cotangent


def _plain(t, s):
    return product(product(t, s), jnp.swapaxes(t, 0, 1))


def _check(d, batch, interpret):
    t, s, cotangent = _operands(d, batch)
    got, pullback = jax.vjp(lambda t, s: congruence_gpu.congruence(t, s, interpret), t, s)
    want, plain_pullback = jax.vjp(_plain, t, s)
    d_t, d_s = plain_pullback(cotangent)
    expected = (want, d_t, (d_s + jnp.swapaxes(d_s, 0, 1)) / 2)
    for a, b in zip((got, *pullback(cotangent)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@needs_kernels
def test_values_and_gradients_interpreted():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    _check(3, 2 * congruence_gpu.LANES, plgpu.InterpretGPUParams())


@needs_kernels
def test_lowers_for_cuda_under_vmap():
    def gradient(t, s, cotangent):
        return jax.vjp(congruence_gpu.congruence, t, s)[1](cotangent)

    operands = jax.ShapeDtypeStruct((2, 4, 4, congruence_gpu.LANES), jnp.float32)
    lowered = jax.jit(jax.vmap(gradient)).trace(*[operands] * 3).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 2


def test_serves_no_cpu():
    t, s, _ = _operands(3, congruence_gpu.LANES)
    assert not congruence_gpu.serves(t, s) or jax.default_backend() == "gpu"


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("d", [6, 11, 12])
def test_values_and_gradients_compiled(d):
    _check(d, 8 * congruence_gpu.LANES, False)
