"""The parts of a transformer layer: norm, rotary positions, attention, and the Block put together from them."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from radialnet import grouped
from radialnet.config import ModelConfig
from radialnet.grouped import Groups

# Finite, so that a query which sees nothing gives zeros and not NaN.
NEG_INF = -1e30


def rms_norm(x: jax.Array, scale: jax.Array | float = 1.0) -> jax.Array:
    """RMSNorm over the last axis (arXiv 1910.07467), computed in fp32, returned in the dtype of x."""
    x_fp32 = x.astype(jnp.float32)
    normed = x_fp32 * jax.lax.rsqrt(jnp.mean(x_fp32 * x_fp32, axis=-1, keepdims=True) + 1e-6)
    return (normed * scale).astype(x.dtype)


def rope(x_BSHK: jax.Array, position_BS: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): the pair (i, i + K/2) turns by position · base^(-2i/K)."""
    half = x_BSHK.shape[-1] // 2
    frequency_K = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BSHK = position_BS[:, :, None, None].astype(jnp.float32) * frequency_K
    cos, sin = jnp.cos(angle_BSHK), jnp.sin(angle_BSHK)
    left, right = x_BSHK[..., :half].astype(jnp.float32), x_BSHK[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x_BSHK.dtype)


def attend(q_BSHK: jax.Array, k_BCGK: jax.Array, v_BCGK: jax.Array, visible_BSC: jax.Array) -> jax.Array:
    """Softmax attention of each query over the cache entries that it may see; fp32 inside. [B, S, H, K].

    H/G query heads share a key and value head. A query that sees no entry gets zeros.
    """
    scores_BHSC = _scores(q_BSHK, k_BCGK)
    probs_BHSC = _softmax(scores_BHSC, visible_BSC[:, None])
    return _mix(probs_BHSC.astype(v_BCGK.dtype), v_BCGK)


def attend_with_own(
    q_BSHK: jax.Array,
    k_BCGK: jax.Array,
    v_BCGK: jax.Array,
    visible_BSC: jax.Array,
    k_own_BSGK: jax.Array,
    v_own_BSGK: jax.Array,
    sees_own_BS: jax.Array,
) -> jax.Array:
    """`attend` over the cache and, beside it, an entry of each query's own that is not in the cache.

    What the `dense` estimator needs: a layer that was not chosen, run as if it had been. [B, S, H, K].
    """
    num_shared = q_BSHK.shape[2] // k_own_BSGK.shape[2]
    k_own_BSHK, v_own_BSHK = (jnp.repeat(own, num_shared, axis=2) for own in (k_own_BSGK, v_own_BSGK))
    own_BHS = jnp.einsum("BSHK,BSHK->BHS", q_BSHK, k_own_BSHK, preferred_element_type=jnp.float32)
    own_BHS *= q_BSHK.shape[-1] ** -0.5
    scores_BHSC = jnp.concatenate([_scores(q_BSHK, k_BCGK), own_BHS[..., None]], axis=-1)
    visible_BSC = jnp.concatenate([visible_BSC, sees_own_BS[..., None]], axis=-1)
    probs_BHSC = _softmax(scores_BHSC, visible_BSC[:, None]).astype(v_BCGK.dtype)
    mixed_BSHK = _mix(probs_BHSC[..., :-1], v_BCGK)
    return mixed_BSHK + jnp.einsum("BHS,BSHK->BSHK", probs_BHSC[..., -1], v_own_BSHK)


def _scores(q_BSHK, k_BCGK):
    batch, seq, heads, size = q_BSHK.shape
    groups = k_BCGK.shape[2]
    q_BSGJK = q_BSHK.reshape(batch, seq, groups, heads // groups, size)
    scores_BGJSC = jnp.einsum("BSGJK,BCGK->BGJSC", q_BSGJK, k_BCGK, preferred_element_type=jnp.float32)
    return scores_BGJSC.reshape(batch, heads, seq, -1) * size**-0.5


def _softmax(scores, visible):
    scores = jnp.where(visible, scores, NEG_INF)
    weights = jnp.where(visible, jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))), 0)
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)


def _mix(probs_BHSC, v_BCGK):
    batch, heads, seq, slots = probs_BHSC.shape
    groups = v_BCGK.shape[2]
    probs_BGJSC = probs_BHSC.reshape(batch, groups, heads // groups, seq, slots)
    return jnp.einsum("BGJSC,BCGK->BSGJK", probs_BGJSC, v_BCGK).reshape(batch, seq, heads, -1)


class Block(nnx.Module):
    """L pre-norm transformer layers, each parameter stacked over them on the first axis.

    The two halves of a layer, before and after attention, work on rows grouped by layer ([M, P, …], `grouped`).
    RMSNorm, QK-norm (arXiv 2302.05442), rotary positions, grouped-query attention, SwiGLU MLP (arXiv 2002.05202).
    """

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

    def before_attention(self, h_MPD: jax.Array, groups: Groups) -> jax.Array:
        """Queries, keys and values side by side, [M, P, (H+2G)·K], normed but not yet turned by position."""
        names = ("attention_norm", "qkv", "query_norm", "key_norm")
        function = partial(_before_attention, widths=self.widths, dtype=self.dtype)
        return grouped.map_blocks(function, self._weights(names), (h_MPD,), groups)

    def after_attention(self, h_MPD: jax.Array, mixed_MPX: jax.Array, groups: Groups) -> jax.Array:
        """The layer's whole update of the residual stream, [M, P, D], from what attention gathered."""
        names = ("attention_out", "mlp_norm", "mlp_in", "mlp_out")
        function = partial(_after_attention, dtype=self.dtype)
        return grouped.map_blocks(function, self._weights(names), (h_MPD, mixed_MPX), groups)

    def _weights(self, names: tuple[str, ...]) -> dict[str, jax.Array]:
        return {name: getattr(self, name)[...] for name in names}


def _before_attention(w, rows, widths, dtype):
    (h_PD,) = rows
    qkv_PX = rms_norm(h_PD, w["attention_norm"]).astype(dtype) @ w["qkv"].astype(dtype)
    q_width, kv_width = widths
    q_PX, k_PX, v_PX = jnp.split(qkv_PX, [q_width, q_width + kv_width], axis=-1)
    normed = [_norm_heads(q_PX, w["query_norm"]), _norm_heads(k_PX, w["key_norm"])]
    return jnp.concatenate([*normed, v_PX], axis=-1)


def _after_attention(w, rows, dtype):
    h_PD, mixed_PX = rows
    attended_PD = (mixed_PX @ w["attention_out"].astype(dtype)).astype(h_PD.dtype)
    normed_PD = rms_norm(h_PD + attended_PD, w["mlp_norm"]).astype(dtype)
    gate_PF, up_PF = jnp.split(normed_PD @ w["mlp_in"].astype(dtype), 2, axis=-1)
    mlp_PD = (jax.nn.silu(gate_PF) * up_PF) @ w["mlp_out"].astype(dtype)
    return attended_PD + mlp_PD.astype(h_PD.dtype)


def _norm_heads(x_PX, scale_K):
    x_PHK = x_PX.reshape(x_PX.shape[0], -1, scale_K.shape[0])
    return rms_norm(x_PHK, scale_K).reshape(x_PX.shape)
