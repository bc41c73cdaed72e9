"""What `lion_attention` says when it is called wrongly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lion.attention import lion_attention

X = np.ones((2, 5, 3, 4), np.float32)
DECAY = -np.ones((2, 5, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], X[0], X[0]), {}, ValueError, r"q and k are \[batch, time, heads, dim\].*got q \(5, 3, 4\)"),
        ((X, X[:, :4], X), {}, ValueError, r"got q \(2, 5, 3, 4\), k \(2, 4, 3, 4\)"),
        ((X, X, X[:, :, :2]), {}, ValueError, r"v \(2, 5, 2, 4\)"),
        ((X[:, :0], X[:, :0], X[:, :0]), {}, ValueError, "at least one token"),
        ((X, X, X.astype(np.float16)), {}, TypeError, "share one dtype.*float16"),
        ((X.astype(int),) * 3, {}, TypeError, "share one dtype.*int"),
        ((X, X, X, DECAY[:, :, :2]), {}, ValueError, r"log_decay is \[heads\].*got \(2, 5, 2\)"),
        ((X, X, X, DECAY[0]), {}, ValueError, r"got \(5, 3\)"),
        ((X, X, X, DECAY.astype(int)), {}, TypeError, "log_decay is floating point; got int"),
        ((X, X, X, (DECAY, DECAY)), {}, ValueError, "give the scans' orders"),
        ((X, X, X, (DECAY,)), {"orders": (range(5), range(5))}, ValueError, "2 orders need as many log-decays"),
        ((X, X, X, DECAY), {"orders": (range(5), range(5))}, ValueError, "2 orders need as many log-decays"),
        ((X, X, X, DECAY), {"orders": ([0, 1, 2, 3, 3],)}, ValueError, "permutation of 0 ... 4"),
        ((X, X, X), {"padding_mask": np.ones((2, 4), bool)}, ValueError, r"padding_mask is \[batch, time\], \(2, 5\)"),
        ((X, X, X), {"padding_mask": np.ones((2, 5))}, TypeError, "boolean, true where a token counts"),
        ((X, X, X), {"form": "chunk"}, ValueError, "form='chunk' does not exist; choose from None, 'full', 'recurr"),
        ((X, X, X), {"direction": "left"}, ValueError, "direction='left' does not exist"),
        ((X, X, X), {"implementation": "cuda"}, ValueError, "implementation='cuda' does not exist"),
        ((X, X, X), {"chunk_size": 0, "form": "chunked"}, ValueError, "chunk_size is a positive number"),
        ((X, X, X), {"chunk_size": 4, "form": "full"}, ValueError, "for the forms 'chunked' and 'two_sided'; got 4"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        lion_attention(*arguments, **options)


def test_the_output_has_the_dtype_of_the_queries():
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jax.ShapeDtypeStruct(X.shape, dtype)
        assert jax.eval_shape(lion_attention, x, x, x, DECAY).dtype == dtype
