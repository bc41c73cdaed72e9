"""LION-LIT, LION-D and LION-S as layers, with the two-scan variants (Afzal et al. 2025, sections 3.2 and C.14).

The defaults are the paper's. Options switch to what its released code does instead, and to its ablations:

| option | paper | elsewhere |
|---|---|---|
| `feature_map` | "silu": shifted, unit length | "elu": released LION-LIT for images; "identity": released text code |
| `normalize` | True: division by the row sums | False: released text code |
| `norm_after` | False | True: a LayerNorm before the output projection, released LION-LIT for text |
| `freeze_gate` | False | True: released vision code, whose gate of LION-S gets no gradient |
| `double_diagonal` | False | True: a token counts itself once in each direction (section 3.2) |
| `direction` | "both" | "forward", "backward", "alternating" over layers (Table 16) |
| `decay` | "none", "fixed", "selective" | "diagonal": a gate for each channel (Table 13) |

The released code writes its gate as `1 - sigmoid(W x + b)`, which is the paper's with the signs of W and b turned, and
adds 1e-6 to row sums, which changes nothing that float32 can show.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lion.attention import lion_attention
from training.errors import UserError, nearest


@jax.custom_vjp
def unit_silu(x: jax.Array) -> jax.Array:
    """The paper's feature map, `(SiLU(x) + 1/2) / |SiLU(x) + 1/2|` over the last axis. All entries are positive.

    The gradient is written out, because differentiating would keep several arrays in float32 where one in the dtype of
    `x` is enough.
    """
    y, inverse, _ = _shifted_silu(x)
    return (y * inverse).astype(x.dtype)


def _shifted_silu(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`SiLU(x) + 1/2`, the inverse of its length, and the derivative of SiLU; float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    s = jax.nn.sigmoid(x)
    y = x * s + 0.5
    return y, jax.lax.rsqrt(jnp.sum(y * y, -1, keepdims=True)), s * (1 + x * (1 - s))


def _unit_silu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return unit_silu(x), x


def _unit_silu_backward(x: jax.Array, d_unit: jax.Array) -> tuple[jax.Array]:
    y, inverse, slope = _shifted_silu(x)
    d_unit = d_unit.astype(y.dtype)
    along = jnp.sum(d_unit * y, -1, keepdims=True) * inverse**3  # a sum beside that of the length, in one pass
    return (((d_unit * inverse - along * y) * slope).astype(x.dtype),)


unit_silu.defvjp(_unit_silu_forward, _unit_silu_backward)


FEATURE_MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": unit_silu,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}
DECAYS = ("none", "fixed", "selective", "diagonal")
DIRECTIONS = ("both", "forward", "backward", "alternating")


def snake_orders(grid: tuple[int, int], class_token: bool) -> tuple[np.ndarray, np.ndarray]:
    """The two scans of a grid of patches in row-major order: along its rows and along its columns, turning at each end.

    The class token, if there is one, is token 0 and stays first (appendix C.14).
    """
    index = np.arange(grid[0] * grid[1]).reshape(grid)

    def snake(lines: np.ndarray) -> np.ndarray:
        lines = lines.copy()
        lines[1::2] = lines[1::2, ::-1]
        order = lines.reshape(-1)
        return np.concatenate([[0], order + 1]) if class_token else order

    return snake(index), snake(index.T)


class LinearMixer(nnx.Module):
    """What all mixers over `lion_attention` share: projections with biases, heads, the choice of the form.

    Args:
      width: of the tokens.
      heads: they share the width equally.
      layer: index of the block, for mixers that depend on it.
      grid: rows and columns of patches, where the tokens are an image's.
      class_token: whether token 0 is a class token.
      form, chunk_size, implementation: see `lion_attention`.
      stddev: of the initial weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        layer: int = 0,
        grid: tuple[int, int] | None = None,
        class_token: bool = False,
        form: str | None = None,
        chunk_size: int | None = None,
        implementation: str | None = None,
        stddev: float = 0.02,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise UserError(f"a width of {width} does not split into {heads} heads")
        self.heads, self.dim, self.grid, self.class_token = heads, width // heads, grid, class_token
        self.form, self.chunk_size, self.implementation = form, chunk_size, implementation
        self.stddev = stddev
        self.qkv = self.linear(width, 3 * width, rngs=rngs)
        self.out = self.linear(width, width, rngs=rngs)

    def linear(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> nnx.Linear:
        """A linear layer with the model's initial weights and a zero bias."""
        return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.normal(self.stddev), rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, `[batch, time, heads, dim]` each, of tokens `[batch, time, width]`."""
        q, k, v = jnp.split(self.qkv(x).reshape(*x.shape[:2], 3 * self.heads, self.dim), 3, 2)
        return q, k, v

    def attend(self, *arguments, **options) -> jax.Array:
        """`lion_attention` in the form that the layer was made for."""
        how = {"form": self.form, "chunk_size": self.chunk_size, "implementation": self.implementation}
        return lion_attention(*arguments, **how, **options)


def gate_logits(gate: nnx.Linear, x: jax.Array, heads: int) -> jax.Array:
    """A gate's logits `[batch, time, heads]`, or `[..., heads, dim]` where it has more outputs; float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = gate(x).astype(wide)
    return logits if gate.out_features == heads else logits.reshape(*x.shape[:2], heads, -1)


class Lion(LinearMixer):
    """LION-LIT (`decay="none"`), LION-D ("fixed") or LION-S ("selective"), and their variants; see the module.

    Args:
      decay: "none"; "fixed": `sigmoid(a)` with a learned a for each head; "selective": `sigmoid(w x + b)` for each head
        and token; "diagonal": the same for each channel.
      scans: 1, the order of the tokens, or 2, the rows and the columns of `grid` in snake order, each with its decays.
      feature_map: of queries and keys; a key of `FEATURE_MAPS`.
      normalize: whether to divide by the row sums. Otherwise the scores are divided by `sqrt(dim)`.
      norm_after: whether to normalise the output before its projection.
      freeze_gate: whether the decays get no gradient.
      double_diagonal: whether a token counts itself twice.
      direction: "both", "forward", "backward", or "alternating": forward in even layers, backward in odd ones.
      layer: index of the block.
      **shared: see `LinearMixer`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        decay: str = "selective",
        scans: int = 1,
        feature_map: str = "silu",
        normalize: bool = True,
        norm_after: bool = False,
        freeze_gate: bool = False,
        double_diagonal: bool = False,
        direction: str = "both",
        layer: int = 0,
        rngs: nnx.Rngs,
        **shared,
    ):
        super().__init__(width, heads, layer=layer, rngs=rngs, **shared)
        for name, value, choices in (
            ("decay", decay, DECAYS),
            ("feature_map", feature_map, FEATURE_MAPS),
            ("direction", direction, DIRECTIONS),
        ):
            if value not in choices:
                raise UserError(f"{name}={value!r} does not exist: {nearest(value, choices)}")
        if scans not in (1, 2) or (scans == 2 and self.grid is None):
            raise UserError(f"scans={scans}: choose 1, or 2 for the patches of an image, which need their grid")
        self.decay, self.feature_map, self.normalize = decay, feature_map, normalize
        self.freeze_gate, self.double_diagonal = freeze_gate, double_diagonal
        self.direction = ("forward", "backward")[layer % 2] if direction == "alternating" else direction
        orders = snake_orders(self.grid, self.class_token) if scans == 2 and decay != "none" else None
        self.orders = None if orders is None else tuple(tuple(map(int, order)) for order in orders)
        gates = 1 if self.orders is None else len(self.orders)
        if decay == "fixed":
            self.fixed = nnx.List(nnx.Param(jax.random.normal(rngs.params(), (heads,))) for _ in range(gates))
        elif decay != "none":
            outputs = heads if decay == "selective" else width
            self.gates = nnx.List(self.linear(width, outputs, rngs=rngs) for _ in range(gates))
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs) if norm_after else None

    def __call__(self, x: jax.Array, padding_mask: jax.Array | None = None) -> jax.Array:
        """`[batch, time, width]` to the same; `padding_mask` `[batch, time]` is true where a token counts."""
        q, k, v = self.project(x)
        q, k = (FEATURE_MAPS[self.feature_map](z) for z in (q, k))
        decays = self.log_decays(x)
        options = {"padding_mask": padding_mask, "orders": self.orders, "direction": self.direction}
        decays = decays if self.orders else decays[0]
        if not self.normalize:
            q = q * self.dim**-0.5
        if self.double_diagonal:
            y = self._with_double_diagonal(q, k, v, decays, options)
        else:
            y = self.attend(q, k, v, decays, normalize=self.normalize, **options)
        y = y.reshape(x.shape)
        return self.out(y if self.norm is None else self.norm(y))

    def log_decays(self, x: jax.Array) -> tuple[jax.Array | None, ...]:
        """The log-decays of each scan, in float32, for tokens `[batch, time, width]`.

        The gate of a class token is 1: it is no place in the image that a scan could forget by passing it.
        """
        if self.decay == "none":
            return (None,)
        if self.decay == "fixed":
            logits = [a[...].astype(jnp.promote_types(x.dtype, jnp.float32)) for a in self.fixed]
        else:
            logits = [gate_logits(gate, x, self.heads) for gate in self.gates]
        decays = [jax.nn.log_sigmoid(z) for z in logits]
        if self.class_token and self.decay != "fixed":
            decays = [a.at[:, 0].set(0) for a in decays]
        if self.freeze_gate:
            decays = [jax.lax.stop_gradient(a) for a in decays]
        return tuple(decays)

    def _with_double_diagonal(
        self, q: jax.Array, k: jax.Array, v: jax.Array, decays: jax.Array | tuple | None, options: dict
    ) -> jax.Array:
        """What the sum of a forward and a backward model would give: the diagonal of the scores is added once more."""
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)  # the last column becomes the row sum
        own = jnp.sum(q * k, -1, keepdims=True)
        y = self.attend(q, k, v, decays, normalize=False, **options) + own * v
        return y[..., :-1] / y[..., -1:] if self.normalize else y[..., :-1]
