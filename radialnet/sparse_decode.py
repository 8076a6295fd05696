"""One token through layers that read only the weights of what is selected: what sparsity takes by the clock.

Here a head's and a unit's weights lie in rows that are gathered, so that what is not kept is not read. Layers run in
their order, each in the program by itself; the stream goes from the embedding to the last layer.

A gather copies what it reads. Heads are read one by one and units some at a time, so that the copy is still in the
core's cache when it is multiplied (docs/SPARSITY.md has the times).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from radialnet.layers import ACTIVATIONS, normed, rms_norm
from radialnet.sections import ModelConfig
from radialnet.sparse import Gates, TopShare, num_kept
from radialnet.trained import TrainedModel

# Three matrices of so many rows are 0.4 MB at D = 576: less than a core has of cache beside what all cores share.
UNITS_AT_ONCE = 64


def rows_of(trained: TrainedModel, gates: Gates | None = None) -> list[dict[str, jax.Array]]:
    """The weights of each layer of a plain or sparse model, for `one_token`: those of a head, and of a unit, in rows.

    `q`, `out` [H, K, D] of heads; `into` (gates and values), `mlp_out` [F, D] of units; `base` [F, D/4] of gates.
    """
    cfg, block = trained.config.model, trained.params["pool"]["block"]
    kv_heads, shared, size = cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_size
    layers = []
    for layer in range(cfg.pool_size):
        w = {name: weights[layer] for name, weights in block.items()}
        qkv_DGJK = w.pop("qkv")
        w["q"] = qkv_DGJK[:, :, :shared].reshape(-1, kv_heads * shared, size).transpose(1, 2, 0)
        w["out"] = w.pop("attention_out").reshape(kv_heads * shared, size, -1)
        w["kv"] = qkv_DGJK[:, :, shared:].reshape(qkv_DGJK.shape[0], -1)
        # Apart, for XLA gathers whole rows of a matrix faster than parts of a larger array.
        w["into"] = tuple(w.pop("mlp_in").transpose(1, 2, 0))
        if gates:
            w["base"] = w["into"][0][:, : gates.channels]
        layers.append(w)
    return layers


@partial(jax.jit, static_argnames=("cfg", "selection", "units", "units_at_once"))
def one_token(
    layers: list[dict[str, jax.Array]],
    h_D: jax.Array,
    cache_LCJGK: jax.Array,
    *,
    cfg: ModelConfig,
    selection: TopShare | Gates | None,
    units: float = 1.0,
    units_at_once: int = UNITS_AT_ONCE,
) -> jax.Array:
    """The stream [D] behind the last layer of a token at position 0 that sees some entries and its own.

    Args:
        cache_LCJGK: keys and values that earlier tokens left, [L, C, 2, G, K].
        selection: None keeps everything.
        units: of `Gates`, the share of the units that are read: the most above their thresholds.
    """
    for w, cache_CJGK in zip(layers, cache_LCJGK, strict=True):
        h_D = _layer(w, h_D, cache_CJGK, cfg, selection, units, units_at_once)
    return h_D


def _layer(w, h_D, cache_CJGK, cfg: ModelConfig, selection, units: float, at_once: int) -> jax.Array:
    h_D += _plus_bias(w, "attention_out", _attention(w, h_D, cache_CJGK, cfg, selection))
    return h_D + _plus_bias(w, "mlp_out", _mlp(w, h_D, cfg, selection, units, at_once))


def _attention(w, h_D, cache_CJGK, cfg: ModelConfig, selection) -> jax.Array:
    kv_heads, shared, size, eps = cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_size, cfg.norm_eps
    x_D = normed(h_D, w, "attention_norm", eps)
    bias_GJK = w["qkv_bias"] if cfg.biases else jnp.zeros((kv_heads, shared + 2, size))
    k_GK, v_GK = ((x_D @ w["kv"]).reshape(kv_heads, 2, size) + bias_GJK[:, shared:]).swapaxes(0, 1)
    k_GK = rms_norm(k_GK, w["key_norm"], eps) if cfg.qk_norm else k_GK
    entries_CJGK = jnp.concatenate([cache_CJGK, jnp.stack([k_GK, v_GK])[None]])

    def query(q_XKD, bias_XK) -> jax.Array:
        q_XK = q_XKD @ x_D + bias_XK
        return (rms_norm(q_XK, w["query_norm"], eps) if cfg.qk_norm else q_XK) / math.sqrt(size)

    if not isinstance(selection, TopShare) or (num := num_kept(cfg.num_heads, selection.heads)) == cfg.num_heads:
        q_GJK = query(w["q"], bias_GJK[:, :shared].reshape(-1, size)).reshape(kv_heads, shared, size)
        score_GJC = jnp.einsum("GJK,CGK->GJC", q_GJK, entries_CJGK[:, 0])
        mixed_GJK = jnp.einsum("GJC,CGK->GJK", jax.nn.softmax(score_GJC, axis=-1), entries_CJGK[:, 1])
        return mixed_GJK.ravel() @ w["out"].reshape(-1, len(h_D))
    heads_H = _best(w, "heads", rms_norm(h_D, 1.0, eps), num)

    def add(index, sum_D):
        head = heads_H[index]
        group, place = head // shared, head % shared
        k_CK, v_CK = entries_CJGK[:, 0, group], entries_CJGK[:, 1, group]
        score_C = k_CK @ query(w["q"][head], bias_GJK[group, place])
        return sum_D + jax.nn.softmax(score_C) @ v_CK @ w["out"][head]

    return jax.lax.fori_loop(0, num, add, jnp.zeros(len(h_D)))


def _mlp(w, h_D, cfg: ModelConfig, selection, units: float, at_once: int) -> jax.Array:
    y_D = normed(h_D, w, "mlp_norm", cfg.norm_eps)
    bias_JF = w["mlp_in_bias"] if cfg.biases else jnp.zeros((len(w["into"]), cfg.d_ff))
    if isinstance(selection, Gates):
        partial_F = w["base"] @ y_D[: selection.channels]
        above_F = selection.above(partial_F, w["gate_mean"], w["gate_std"], w["threshold"])
        best_above_U, units_U = jax.lax.top_k(above_F, num_kept(cfg.d_ff, units))
        # As many as a program of fixed sizes reads; those of them that are below count for nothing.
        return _of_units(w, y_D, bias_JF, units_U, best_above_U > 0, cfg, at_once)
    if selection and (num := num_kept(cfg.d_ff, selection.units)) < cfg.d_ff:
        units_U = _best(w, "units", y_D, num)
        return _of_units(w, y_D, bias_JF, units_U, jnp.ones(num, bool), cfg, at_once)
    return _hidden(w["into"], y_D, bias_JF, cfg) @ w["mlp_out"]


def _of_units(w, y_D, bias_JF, units_U, is_kept_U, cfg: ModelConfig, at_once: int) -> jax.Array:
    """The sum over the units that are kept, [D]."""
    at_once = min(at_once, len(units_U))
    # The last part is padded with unit 0, masked out.
    beyond = -len(units_U) % at_once
    units_PU, is_kept_PU = (jnp.pad(x_U, (0, beyond)).reshape(-1, at_once) for x_U in (units_U, is_kept_U))

    def add(part, sum_D):
        units_U = units_PU[part]
        hidden_U = _hidden([matrix_FD[units_U] for matrix_FD in w["into"]], y_D, bias_JF[:, units_U], cfg)
        return sum_D + (hidden_U * is_kept_PU[part]) @ w["mlp_out"][units_U]

    return jax.lax.fori_loop(0, len(units_PU), add, jnp.zeros(len(y_D)))


def _hidden(into, y_D, bias_JU, cfg: ModelConfig) -> jax.Array:
    return ACTIVATIONS[cfg.mlp](jnp.concatenate([matrix_UD @ y_D for matrix_UD in into]) + bias_JU.ravel())


def _plus_bias(w, name: str, y_D: jax.Array) -> jax.Array:
    return y_D + w[f"{name}_bias"] if f"{name}_bias" in w else y_D


def _best(w, what: str, x_D, num: int) -> jax.Array:
    """The heads or units that a predictor has the highest scores for."""
    low_R = jax.nn.relu(x_D @ w[f"{what}_in"])
    return jax.lax.top_k(low_R @ w[f"{what}_out"] + w[f"{what}_bias"], num)[1]
