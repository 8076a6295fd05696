"""The parts of a transformer layer: norm, rotary positions, attention, and the Block put together from them."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from radialnet.config import ModelConfig
from radialnet.grouped import RowFunction


def rms_norm(x: jax.Array, scale: jax.Array | float = 1.0) -> jax.Array:
    """RMSNorm over the last axis (arXiv 1910.07467), computed in fp32, returned in the dtype of x."""
    x_fp32 = x.astype(jnp.float32)
    normed = x_fp32 * jax.lax.rsqrt(jnp.mean(x_fp32 * x_fp32, axis=-1, keepdims=True) + 1e-6)
    return (normed * scale).astype(x.dtype)


def rotation(position_N: jax.Array, head_size: int, base: float) -> jax.Array:
    """Cosines and sines of the rotary angles position · base^(-2i/K), side by side: [N, K], fp32."""
    half = head_size // 2
    frequency_K = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_NK = position_N[:, None].astype(jnp.float32) * frequency_K
    return jnp.concatenate([jnp.cos(angle_NK), jnp.sin(angle_NK)], axis=-1)


def rope(x_NHK: jax.Array, rotation_NK: jax.Array) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): the pair (i, i + K/2) turns by its angle (`rotation`)."""
    cos_N1K, sin_N1K = jnp.split(rotation_NK[:, None], 2, axis=-1)
    left, right = jnp.split(x_NHK.astype(jnp.float32), 2, axis=-1)
    turned = [left * cos_N1K - right * sin_N1K, right * cos_N1K + left * sin_N1K]
    return jnp.concatenate(turned, axis=-1).astype(x_NHK.dtype)


class Block(nnx.Module):
    """L pre-norm transformer layers, each parameter stacked over them on the first axis.

    The two halves of a layer, before and after attention, are functions of rows of one layer (`row_function`).
    RMSNorm, QK-norm (arXiv 2302.05442), rotary positions, grouped-query attention, SwiGLU MLP (arXiv 2002.05202).
    """

    BEFORE = ("attention_norm", "qkv", "query_norm", "key_norm")  # The weights of each half.
    AFTER = ("attention_out", "mlp_norm", "mlp_in", "mlp_out")

    def __init__(self, cfg: ModelConfig, num_layers: int, residual_scale: float, rngs: nnx.Rngs):
        d_model, size = cfg.d_model, cfg.head_size
        q_width, kv_width = cfg.num_heads * size, cfg.num_kv_heads * size
        self.widths = (q_width, kv_width)
        self.dtype = jnp.dtype(cfg.dtype)

        def normal(rows: int, columns: int, scale: float = 1.0) -> nnx.Param:
            weights = jax.random.normal(rngs.params(), (num_layers, rows, columns)) * (scale * rows**-0.5)
            return nnx.Param(weights)

        def ones(width: int) -> nnx.Param:
            return nnx.Param(jnp.ones((num_layers, width)))

        self.attention_norm, self.mlp_norm = ones(d_model), ones(d_model)
        self.query_norm, self.key_norm = ones(size), ones(size)
        self.qkv = normal(d_model, q_width + 2 * kv_width)
        self.attention_out = normal(q_width, d_model, residual_scale)
        self.mlp_in = normal(d_model, 2 * cfg.d_ff)
        self.mlp_out = normal(cfg.d_ff, d_model, residual_scale)

    def weights(self, names: tuple[str, ...]) -> dict[str, jax.Array]:
        return {name: getattr(self, name)[...] for name in names}

    @property
    def before_attention(self) -> RowFunction:
        """Of the rows h [P, D] and rotation [P, K]: queries [P, H·K], keys and values [P, G·K], ready for attention."""
        return partial(_before_attention, widths=self.widths, dtype=self.dtype)

    @property
    def after_attention(self) -> RowFunction:
        """Of the rows h [P, D] and what attention gave [P, H·K]: the layer's whole update of the residual stream."""
        return partial(_after_attention, dtype=self.dtype)


def _before_attention(w, rows, product, widths, dtype):
    h_PD, rotation_PK = rows
    qkv_PX = product("qkv", rms_norm(h_PD, w["attention_norm"]).astype(dtype))
    q_width, kv_width = widths
    q_PX, k_PX, v_PX = jnp.split(qkv_PX, [q_width, q_width + kv_width], axis=-1)

    def turned(x_PX, scale_PK):
        x_PHK = x_PX.reshape(x_PX.shape[0], -1, scale_PK.shape[-1])
        return rope(rms_norm(x_PHK, scale_PK[:, None]), rotation_PK).reshape(x_PX.shape)

    return turned(q_PX, w["query_norm"]), turned(k_PX, w["key_norm"]), v_PX


def _after_attention(w, rows, product, dtype):
    h_PD, mixed_PX = rows
    attended_PD = product("attention_out", mixed_PX).astype(h_PD.dtype)
    normed_PD = rms_norm(h_PD + attended_PD, w["mlp_norm"]).astype(dtype)
    gate_PF, up_PF = jnp.split(product("mlp_in", normed_PD), 2, axis=-1)
    mlp_PD = product("mlp_out", jax.nn.silu(gate_PF) * up_PF, keep=False)
    return attended_PD + mlp_PD.astype(h_PD.dtype)
