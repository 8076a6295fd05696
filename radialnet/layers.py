"""The parts of a transformer layer: norms, positions, MLPs, and the Block put together from them."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from radialnet.grouped import RowFunction
from radialnet.sections import ModelConfig
from radialnet.sharding import ALONE, Axes, Parallel


def rms_norm(x: jax.Array, scale: jax.Array | float, eps: float) -> jax.Array:
    """RMSNorm over the last axis (arXiv 1910.07467), computed in fp32, returned in the dtype of x."""
    x_fp32 = x.astype(jnp.float32)
    normed = x_fp32 * jax.lax.rsqrt(jnp.mean(x_fp32 * x_fp32, axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis (arXiv 1607.06450), computed in fp32, returned in the dtype of x."""
    x_fp32 = x.astype(jnp.float32)
    centred = x_fp32 - jnp.mean(x_fp32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (normed * scale + bias).astype(x.dtype)


def normed(x: jax.Array, weights: Mapping[str, jax.Array], name: str, eps: float) -> jax.Array:
    """LayerNorm where the norm of that name has a bias, else RMSNorm."""
    if (bias := f"{name}_bias") in weights:
        return layer_norm(x, weights[name], weights[bias], eps)
    return rms_norm(x, weights[name], eps)


def rotation(position_N: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Cosines and sines of the rotary angles position · base^(-2i/K), side by side: [N, K], fp32.

    Of no turn where positions are learned: the embedding tells them.
    """
    half = cfg.head_size // 2
    frequency_K = cfg.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half) * (cfg.positions == "rotary")
    angle_NK = position_N[:, None].astype(jnp.float32) * frequency_K
    return jnp.concatenate([jnp.cos(angle_NK), jnp.sin(angle_NK)], axis=-1)


def rope(x_NHK: jax.Array, rotation_NK: jax.Array) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): the pair (i, i + K/2) turns by its angle (`rotation`)."""
    cos_N1K, sin_N1K = jnp.split(rotation_NK[:, None], 2, axis=-1)
    left, right = jnp.split(x_NHK.astype(jnp.float32), 2, axis=-1)
    turned = [left * cos_N1K - right * sin_N1K, right * cos_N1K + left * sin_N1K]
    return jnp.concatenate(turned, axis=-1).astype(x_NHK.dtype)


def swiglu(gate_and_value_PX: jax.Array) -> jax.Array:
    """The gated unit of arXiv 2002.05202: of gates and values side by side, [P, 2·F] to [P, F]."""
    gate_PF, value_PF = jnp.split(gate_and_value_PX, 2, axis=-1)
    return jax.nn.silu(gate_PF) * value_PF


# By `model.mlp`, what stands between the two products of an MLP. GELU is GPT-2's, by tanh.
ACTIVATIONS = {"swiglu": swiglu, "relu": jax.nn.relu, "gelu": jax.nn.gelu}


class Block(nnx.Module):
    """L pre-norm transformer layers, each parameter stacked over them on the first axis.

    The two halves of a layer, before and after attention, are functions of rows of one layer (`row_function`).
    Grouped-query attention with QK-norm (arXiv 2302.05442) where `model.qk_norm` is set, and an MLP. A norm is the one
    that its weights are of, and a product has a bias where there are weights for it.

    Heads that share a key and value head, and it, lie side by side in `qkv` [L, D, G, H/G + 2, K], and so do gates and
    values of `mlp_in` [L, D, 2, F]: any part of the heads or of the hidden units is a layer of its own, but for a sum.
    An MLP without gates has `mlp_in` [L, D, 1, F].
    """

    # The weights of each half, those that not every block has included.
    # Those of the products, in `dtype`; all else is multiplied in float32.
    MATRICES = ("qkv", "attention_out", "mlp_in", "mlp_out")
    _BEFORE = ("attention_norm", "attention_norm_bias", "qkv", "qkv_bias", "query_norm", "key_norm")
    _AFTER = ("attention_out", "attention_out_bias", "mlp_norm", "mlp_norm_bias")
    _AFTER += ("mlp_in", "mlp_in_bias", "mlp_out", "mlp_out_bias")

    def __init__(
        self,
        cfg: ModelConfig,
        num_layers: int,
        residual_scale: float,
        rngs: nnx.Rngs,
        layer_axis: str | None = None,
        parallel: Parallel = ALONE,
    ):
        """
        Args:
            layer_axis: the logical name of the first axis (`sharding.RULES`).
        """
        d_model, size, kv_heads = cfg.d_model, cfg.head_size, cfg.num_kv_heads
        self.shared = cfg.num_heads // kv_heads  # Query heads of a key and value head.
        self.dtype, self.eps, self.parallel = jnp.dtype(cfg.dtype), cfg.norm_eps, parallel

        def normal(rows: int, *columns: int, axes: Axes, scale: float = 1.0) -> nnx.Param:
            weights = jax.random.normal(rngs.params(), (num_layers, rows, *columns)) * (scale * rows**-0.5)
            return nnx.Param(weights, axes=(layer_axis, *axes))

        def full(value: float, *shape: int, axes: Axes = (None,)) -> nnx.Param:
            return nnx.Param(jnp.full((num_layers, *shape), value), axes=(layer_axis, *axes))

        self.activation = ACTIVATIONS[cfg.mlp]
        columns = 2 if cfg.mlp == "swiglu" else 1
        self.attention_norm, self.mlp_norm = full(1.0, d_model), full(1.0, d_model)
        if cfg.norm == "layer":
            self.attention_norm_bias, self.mlp_norm_bias = full(0.0, d_model), full(0.0, d_model)
        if cfg.qk_norm:
            self.query_norm, self.key_norm = full(1.0, size), full(1.0, size)
        if cfg.biases:
            self.qkv_bias = full(0.0, kv_heads, self.shared + 2, size, axes=("heads", None, None))
            self.mlp_in_bias = full(0.0, columns, cfg.d_ff, axes=(None, "mlp"))
            self.attention_out_bias, self.mlp_out_bias = full(0.0, d_model), full(0.0, d_model)
        self.qkv = normal(d_model, kv_heads, self.shared + 2, size, axes=("embed", "heads", None, None))
        self.attention_out = normal(cfg.num_heads * size, d_model, axes=("heads", "embed"), scale=residual_scale)
        self.mlp_in = normal(d_model, columns, cfg.d_ff, axes=("embed", None, "mlp"))
        self.mlp_out = normal(cfg.d_ff, d_model, axes=("mlp", "embed"), scale=residual_scale)

    @property
    def BEFORE(self) -> tuple[str, ...]:
        """The weights that the first half of a layer has."""
        return tuple(name for name in self._BEFORE if hasattr(self, name))

    @property
    def AFTER(self) -> tuple[str, ...]:
        """Those of the second half."""
        return tuple(name for name in self._AFTER if hasattr(self, name))

    def params(self) -> dict[str, nnx.Param]:
        return {name: getattr(self, name) for name in (*self.BEFORE, *self.AFTER)}

    def weights(self, names: tuple[str, ...]) -> dict[str, jax.Array]:
        """Vectors [L, X] and matrices [L, X, Y], by name."""
        weights = {name: getattr(self, name)[...] for name in names}
        num_axes = {name: 1 if name.endswith(("_norm", "_bias")) else 2 for name in names}
        return {name: x.reshape(*x.shape[: num_axes[name]], -1) for name, x in weights.items()}

    def folded(self, d_weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Gradients of the parameters, from those of `weights`."""
        return d_weights

    @property
    def before_attention(self) -> RowFunction:
        """Of the rows h [P, D] and rotation [P, K]: queries [P, H·K], keys and values [P, G·K], ready for attention."""
        return partial(_before_attention, shared=self.shared, dtype=self.dtype, eps=self.eps)

    @property
    def after_attention(self) -> RowFunction:
        """Of the rows h [P, D] and what attention gave [P, H·K]: the layer's whole update of the residual stream."""
        return partial(
            _after_attention,
            activation=self.activation,
            dtype=self.dtype,
            eps=self.eps,
            total=self.parallel.sum_tensor,
        )


@jax.named_scope("attention")
def _before_attention(w, rows, product, shared, dtype, eps):
    h_PD, rotation_PK = rows
    qkv_PX = _plus_bias(w, "qkv", product("qkv", normed(h_PD, w, "attention_norm", eps).astype(dtype)))
    num_rows, size = len(h_PD), rotation_PK.shape[-1]
    qkv_PGJK = qkv_PX.reshape(num_rows, -1, shared + 2, size)

    def turned(x_PHK, norm):
        x_PHK = rms_norm(x_PHK, w[norm][:, None], eps) if norm in w else x_PHK
        return rope(x_PHK, rotation_PK).reshape(num_rows, -1)

    q_PHK, k_PGK = qkv_PGJK[:, :, :shared].reshape(num_rows, -1, size), qkv_PGJK[:, :, shared]
    v_PX = qkv_PGJK[:, :, shared + 1].reshape(num_rows, -1)
    return turned(q_PHK, "query_norm"), turned(k_PGK, "key_norm"), v_PX


def _after_attention(w, rows, product, activation, dtype, eps, total, selection=None):
    h_PD, mixed_PX = rows
    if selection:
        mixed_PX = mixed_PX * selection.of_heads(w, rms_norm(h_PD, 1.0, eps), mixed_PX, product)
    # Of the heads and hidden units that are here, so that the sums over all devices of a layer are still to be taken.
    with jax.named_scope("attention"):
        attended_PD = _plus_bias(w, "attention_out", total(product("attention_out", mixed_PX))).astype(h_PD.dtype)
    with jax.named_scope("mlp"):
        normed_PD = normed(h_PD + attended_PD, w, "mlp_norm", eps).astype(dtype)
        hidden_PF = activation(_plus_bias(w, "mlp_in", product("mlp_in", normed_PD)))
        if selection:
            hidden_PF = hidden_PF * selection.of_units(w, normed_PD, hidden_PF, product)
        mlp_PD = _plus_bias(w, "mlp_out", total(product("mlp_out", hidden_PF, keep=False)))
    return attended_PD + mlp_PD.astype(h_PD.dtype)


def _plus_bias(w, name: str, y_PX: jax.Array) -> jax.Array:
    """What a product gave, and the bias where the layer has one."""
    bias = f"{name}_bias"
    return y_PX + w[bias].astype(y_PX.dtype) if bias in w else y_PX
