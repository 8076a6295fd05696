"""Attention of decoding: queries of many rows, each at a stage of its own, over the pages of `decode_cache`."""

import jax
import jax.numpy as jnp

from radialnet.cache import APPENDING
from radialnet.decode_cache import BLOCK, DecodeCache
from radialnet.visibility import NEG_INF


def attend(
    cache: DecodeCache, q_RQHK: jax.Array, token_RQ: jax.Array, stage_R: jax.Array, layer_RQ: jax.Array
) -> jax.Array:
    """Softmax attention of queries at a stage over the entries that they see, [R, Q, H, K]; fp32 inside.

    A query that sees nothing gets zeros. The blocks of all rows are one list, of which J = R are taken at a time:
    a short row waits for no long one, and many rows are still large products.

    Args:
        token_RQ: the index in its row of each query's token; negative for one that is not to look at anything.
    """
    (num_rows, num_queries), (kv_heads, size) = token_RQ.shape, cache.k_PAGK.shape[2:]
    q_RQGXK = q_RQHK.reshape(num_rows, num_queries, kv_heads, -1, size).astype(jnp.float32) * size**-0.5
    row_R, block_of = jnp.arange(num_rows), _tokens
    length_R, first_R = token_RQ.max(1) + 1, cache.first_R // BLOCK
    if cache.view in APPENDING:
        block_of = _entries
        length_R, first_R = jnp.where(length_R > 0, cache.num_R, 0), jnp.zeros_like(first_R)
    num_blocks_R = jnp.maximum(-(-length_R // BLOCK) - first_R, 0)
    end_R = jnp.cumsum(num_blocks_R)

    def step(index, carry):
        highest_RQGX, total_RQGX, mixed_RQGXK = carry
        place_J = index * num_rows + row_R
        row_J = jnp.minimum(jnp.searchsorted(end_R, place_J, side="right", method="compare_all"), num_rows - 1)
        block_J = (first_R + num_blocks_R - end_R)[row_J] + place_J
        k_JCY, v_JCY, visible_JQC = block_of(cache, row_J, block_J, token_RQ[row_J], stage_R[row_J], layer_RQ[row_J])
        visible_JQC = (visible_JQC & (place_J < end_R[-1])[:, None, None])[:, :, None, None]
        scores_JQGXC = jnp.where(visible_JQC, _scores(q_RQGXK[row_J], k_JCY), NEG_INF)
        is_of_RJ = row_J == row_R[:, None]
        highest_RJQGX = jnp.where(is_of_RJ[..., None, None, None], scores_JQGXC.max(-1), NEG_INF)
        new_RQGX = jnp.maximum(highest_RQGX, highest_RJQGX.max(1))
        weights_JQGXC = jnp.where(visible_JQC, jnp.exp(scores_JQGXC - new_RQGX[row_J][..., None]), 0)
        fade_RQGX = jnp.exp(highest_RQGX - new_RQGX)

        def added(sum_RX, of_blocks_JX):
            faded_RX = sum_RX * jnp.expand_dims(fade_RQGX, range(4, sum_RX.ndim))
            return faded_RX + jnp.tensordot(is_of_RJ.astype(jnp.float32), of_blocks_JX, 1)

        mixed_JQGXK = _mixed(weights_JQGXC, v_JCY, kv_heads)
        return new_RQGX, added(total_RQGX, weights_JQGXC.sum(-1)), added(mixed_RQGXK, mixed_JQGXK)

    shape = q_RQGXK.shape[:-1]
    carry = jnp.full(shape, NEG_INF), jnp.zeros(shape), jnp.zeros(q_RQGXK.shape)
    _, total_RQGX, mixed_RQGXK = jax.lax.fori_loop(0, -(-end_R[-1] // num_rows), step, carry)
    mixed_RQGXK /= jnp.maximum(total_RQGX, 1e-30)[..., None]
    return mixed_RQGXK.reshape(q_RQHK.shape).astype(q_RQHK.dtype)


def _tokens(cache: DecodeCache, row_J, block_J, token_JQ, stage_J, layer_JQ):
    """What blocks of tokens of rows show to queries at a stage: keys, values and who sees them."""
    token_JC = block_J[:, None] * BLOCK + jnp.arange(BLOCK)
    slot_JC = cache.shown_RST.at[row_J[:, None], token_JC, stage_J[:, None]].get(mode="clip")
    is_there_JC = (slot_JC >= 0) & (token_JC >= cache.first_R[row_J][:, None])
    visible_JQC = is_there_JC[:, None] & (token_JC[:, None] <= token_JQ[..., None])
    of_slots = (jnp.take(_flat(x_PAGK), slot_JC, axis=0, mode="clip") for x_PAGK in (cache.k_PAGK, cache.v_PAGK))
    return *of_slots, visible_JQC


def _entries(cache: DecodeCache, row_J, block_J, token_JQ, stage_J, layer_JQ):
    """Blocks of entries of rows: keys, values and who sees them."""
    place_JC = block_J[:, None] * BLOCK + jnp.arange(BLOCK)
    page_JC = cache.page_RM.at[row_J[:, None], place_JC // cache.page_size].get(mode="clip")
    slot_JC = page_JC * cache.page_size + place_JC % cache.page_size

    def of_slots(x_PA):
        return x_PA.ravel()[slot_JC]

    token_JC, entry_stage_JC, entry_layer_JC = map(of_slots, (cache.token_PA, cache.stage_PA, cache.layer_PA))
    is_there_JC = (place_JC < cache.num_R[row_J][:, None]) & (token_JC >= cache.first_R[row_J][:, None])
    stage_J1 = stage_J[:, None]
    earlier_JC = cache.stages.is_routed(entry_stage_JC) & (entry_stage_JC <= stage_J1)
    is_there_JC &= jnp.where(cache.stages.is_routed(stage_J1), earlier_JC, entry_stage_JC == stage_J1)
    visible_JQC = is_there_JC[:, None] & (token_JC[:, None] <= token_JQ[..., None])
    if cache.view == "same_layer":
        visible_JQC &= entry_layer_JC[:, None] == layer_JQ[..., None]
    return *(_flat(x_PAGK)[slot_JC] for x_PAGK in (cache.k_PAGK, cache.v_PAGK)), visible_JQC


def _flat(x_PAGK: jax.Array) -> jax.Array:
    """Slots of pages one after the other, the heads of each side by side."""
    return x_PAGK.reshape(-1, x_PAGK.shape[2] * x_PAGK.shape[3])


def _scores(q_JQGXK: jax.Array, k_JCY: jax.Array) -> jax.Array:
    """Queries times keys, whose heads lie side by side; fp32: [J, Q, G, X, C]."""
    num_queries, kv_heads, _, size = q_JQGXK.shape[1:]
    k_JCY = k_JCY.astype(jnp.float32)
    if num_queries > 1:
        return jnp.einsum("JQGXK,JCGK->JQGXC", q_JQGXK, k_JCY.reshape(*k_JCY.shape[:2], kv_heads, size))
    # Each head's query stands among zeros for the other heads. That is G times the FLOPs, but a product for each of the
    # heads would have keys and values laid out anew before it, which takes longer than the products themselves.
    q_JGXY = jnp.tile(q_JQGXK[:, 0], kv_heads) * _of_head(kv_heads, size)
    scores_JCZ = jnp.einsum("JCY,JZY->JCZ", k_JCY, q_JGXY.reshape(len(k_JCY), -1, kv_heads * size))
    return scores_JCZ.swapaxes(1, 2).reshape(len(k_JCY), 1, kv_heads, -1, k_JCY.shape[1])


def _mixed(weights_JQGXC: jax.Array, v_JCY: jax.Array, kv_heads: int) -> jax.Array:
    """Weights times values: [J, Q, G, X, K]."""
    num_blocks, num_queries, _, num_shared, num_entries = weights_JQGXC.shape
    size = v_JCY.shape[2] // kv_heads
    v_JCY = v_JCY.astype(jnp.float32)
    if num_queries > 1:
        return jnp.einsum("JQGXC,JCGK->JQGXK", weights_JQGXC, v_JCY.reshape(*v_JCY.shape[:2], kv_heads, size))
    mixed_JZY = jnp.einsum("JZC,JCY->JZY", weights_JQGXC.reshape(num_blocks, -1, num_entries), v_JCY)
    mixed_JGXY = mixed_JZY.reshape(num_blocks, kv_heads, num_shared, -1) * _of_head(kv_heads, size)
    return mixed_JGXY.reshape(num_blocks, 1, kv_heads, num_shared, kv_heads, size).sum(4)


def _of_head(kv_heads: int, size: int) -> jax.Array:
    """1 where a channel is of a head: [G, 1, G·K]."""
    return jnp.repeat(jnp.eye(kv_heads), size, axis=1)[:, None]
