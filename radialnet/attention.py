"""Softmax attention over the entries of the unified cache, in tiles.

Queries are tokens that execute a layer at this depth step, entries are what tokens wrote at this step and earlier ones.
The cost follows the tiles of queries × entries in which anybody may see anything; a tile of empty slots, of later
tokens or of another document is skipped. No matrix of all scores is ever in memory (online softmax, arXiv 1805.02867;
tiles and recomputation in the backward pass, arXiv 2205.14135).
"""

import flax.struct
import jax
import jax.numpy as jnp

# Queries and entries of a tile. Smaller ones skip more, larger ones spend less on starting their operations.
TILE = 64
# Finite, so that a query which sees nothing gives zeros and not NaN.
NEG_INF = -1e30


@flax.struct.dataclass
class Visibility:
    """Which of C entry slots each of Q queries sees: those of the tokens first…last of its row of the batch.

    A token is named by its index in the row. One interval says it all: a token sees itself and those before it, back to
    the beginning of its document. A query that is none has last < first; an empty slot has token -1.
    """

    first_BQ: jax.Array
    last_BQ: jax.Array
    token_BC: jax.Array
    # In the view `same_layer`: the layers that queries and entries must have in common.
    layer_BQ: jax.Array | None = None
    layer_BC: jax.Array | None = None

    def mask(self) -> jax.Array:
        """[B, Q, C], whole in memory: for references and tests."""
        arrays = (self.first_BQ, self.last_BQ, self.token_BC, self.layer_BQ, self.layer_BC)
        return _sees(*arrays)


def _sees(first, last, token, layer_q, layer_c):
    seen = (first[..., :, None] <= token[..., None, :]) & (token[..., None, :] <= last[..., :, None])
    if layer_q is None:
        return seen
    return seen & (layer_q[..., :, None] == layer_c[..., None, :])


@jax.custom_vjp
def attend(q_BQHK: jax.Array, k_BCGK: jax.Array, v_BCGK: jax.Array, visibility: Visibility) -> jax.Array:
    """Softmax attention of each query over the entries that it sees, [B, Q, H, K]; statistics in fp32.

    H/G query heads share a key and value head. A query that sees no entry gets zeros.
    """
    return attend_forward(q_BQHK, k_BCGK, v_BCGK, visibility)[0]


def _attend_forward(q_BQHK, k_BCGK, v_BCGK, visibility):
    mixed_BQHK, lse_BQH = attend_forward(q_BQHK, k_BCGK, v_BCGK, visibility)
    return mixed_BQHK, (q_BQHK, k_BCGK, v_BCGK, visibility, mixed_BQHK, lse_BQH)


def _attend_backward(residuals, d_mixed_BQHK):
    q_BQHK, k_BCGK, v_BCGK, visibility, mixed_BQHK, lse_BQH = residuals
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_BCGK, v_BCGK))
    dq, dk, dv = attend_backward(q_BQHK, k_BCGK, v_BCGK, visibility, mixed_BQHK, lse_BQH, d_mixed_BQHK, *zeros)
    return dq, dk.astype(k_BCGK.dtype), dv.astype(v_BCGK.dtype), None


attend.defvjp(_attend_forward, _attend_backward)


@flax.struct.dataclass
class _Tiles:
    """The tiles in which somebody may see something, as a list of which the first `count` are real.

    By the ranges of tokens in a tile: one of several documents or steps may turn out to hold no visible pair.
    """

    row: jax.Array
    query: jax.Array
    entry: jax.Array
    count: jax.Array
    num_queries: int = flax.struct.field(pytree_node=False)
    num_entries: int = flax.struct.field(pytree_node=False)

    def at(self, index, visibility: Visibility):
        """Row and first query and entry of a tile, and who sees whom in it, [Q, C].

        The last tile of a row may reach back into the one before it; what belongs there is masked.
        """
        all_queries, all_entries = visibility.first_BQ.shape[1], visibility.token_BC.shape[1]
        row = self.row[index]
        query = jnp.minimum(self.query[index] * self.num_queries, all_queries - self.num_queries)
        entry = jnp.minimum(self.entry[index] * self.num_entries, all_entries - self.num_entries)

        def part(x_BX, start, size):
            return None if x_BX is None else jax.lax.dynamic_slice(x_BX, (row, start), (1, size))[0]

        queries = [part(x, query, self.num_queries) for x in (visibility.first_BQ, visibility.last_BQ)]
        layers = part(visibility.layer_BQ, query, self.num_queries), part(visibility.layer_BC, entry, self.num_entries)
        sees_QC = _sees(*queries, part(visibility.token_BC, entry, self.num_entries), *layers)
        is_new_Q = query + jnp.arange(self.num_queries) >= self.query[index] * self.num_queries
        is_new_C = entry + jnp.arange(self.num_entries) >= self.entry[index] * self.num_entries
        return row, query, entry, sees_QC & is_new_Q[:, None] & is_new_C[None, :]


def _tiles(visibility: Visibility, num_queries: int, num_entries: int) -> _Tiles:
    (batch, all_queries), all_entries = visibility.first_BQ.shape, visibility.token_BC.shape[1]
    num_queries, num_entries = min(num_queries, all_queries), min(num_entries, all_entries)

    def tiled(x_BX, size, empty):
        padding = -x_BX.shape[1] % size
        return jnp.pad(x_BX, ((0, 0), (0, padding)), constant_values=empty).reshape(batch, -1, size)

    big = jnp.iinfo(jnp.int32).max
    is_query_BQ = visibility.first_BQ <= visibility.last_BQ
    first_BI = tiled(jnp.where(is_query_BQ, visibility.first_BQ, big), num_queries, big).min(-1)
    last_BI = tiled(jnp.where(is_query_BQ, visibility.last_BQ, -1), num_queries, -1).max(-1)
    token_BC = visibility.token_BC
    lowest_BJ = tiled(jnp.where(token_BC >= 0, token_BC, big), num_entries, big).min(-1)
    highest_BJ = tiled(token_BC, num_entries, -1).max(-1)
    needed_BIJ = (lowest_BJ[:, None] <= last_BI[..., None]) & (highest_BJ[:, None] >= first_BI[..., None])
    row, query, entry = jnp.nonzero(needed_BIJ, size=needed_BIJ.size, fill_value=0)
    return _Tiles(row, query, entry, needed_BIJ.sum(), num_queries, num_entries)


def _read(x_BXHK, row, start, size, heads):
    """A tile of one row, heads first: [heads, size · shared, K], the heads that share an entry side by side."""
    tile = jax.lax.dynamic_slice(x_BXHK, (row, start, 0, 0), (1, size, *x_BXHK.shape[2:]))[0]
    tile = tile.reshape(size, heads, -1, x_BXHK.shape[-1])
    return tile.swapaxes(0, 1).reshape(heads, -1, x_BXHK.shape[-1])


def _add(x_BXHK, part, row, start, size):
    """Add a tile, laid out as `_read` gives it, in place."""
    part = part.reshape(part.shape[0], size, -1, part.shape[-1]).swapaxes(0, 1).reshape(1, size, *x_BXHK.shape[2:])
    old = jax.lax.dynamic_slice(x_BXHK, (row, start, 0, 0), part.shape)
    return jax.lax.dynamic_update_slice(x_BXHK, old + part, (row, start, 0, 0))


def _dot(left, right, contract):
    """A product for each head, fp32."""
    dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def attend_forward(q_BQHK, k_BCGK, v_BCGK, visibility: Visibility) -> tuple[jax.Array, jax.Array]:
    """`attend`, and logsumexp of each query's scores [B, Q, H]."""
    batch, all_queries, heads, size = q_BQHK.shape
    groups = k_BCGK.shape[2]
    tiles = _tiles(visibility, TILE, TILE)
    num_q, num_c, shared = tiles.num_queries, tiles.num_entries, heads // groups

    # The state of the online softmax lies in the order in which tiles use it: [B, G, Q, J].
    state_shape = (batch, groups, all_queries, shared)

    def body(index, state):
        best_BGQJ, total_BGQJ, mixed_BGQJK = state
        row, query, entry, sees_QC = tiles.at(index, visibility)
        q_GRK = _read(q_BQHK, row, query, num_q, groups)
        k_GCK, v_GCK = (_read(x, row, entry, num_c, groups) for x in (k_BCGK, v_BCGK))
        scores_GQJC = (_dot(q_GRK, k_GCK, (2, 2)) * size**-0.5).reshape(groups, num_q, shared, num_c)
        sees = sees_QC[None, :, None]
        scores_GQJC = jnp.where(sees, scores_GQJC, NEG_INF)
        at, shape = (row, 0, query, 0), (1, groups, num_q, shared)
        old_best, old_total = (jax.lax.dynamic_slice(x, at, shape)[0] for x in (best_BGQJ, total_BGQJ))
        old_mixed = jax.lax.dynamic_slice(mixed_BGQJK, (*at, 0), (*shape, size))[0]
        best = jnp.maximum(old_best, scores_GQJC.max(-1))
        weights = jnp.where(sees, jnp.exp(scores_GQJC - best[..., None]), 0)
        fade = jnp.exp(old_best - best)
        total = old_total * fade + weights.sum(-1)
        part = _dot(weights.reshape(groups, -1, num_c).astype(v_GCK.dtype), v_GCK, (2, 1))
        mixed = old_mixed * fade[..., None] + part.reshape(groups, num_q, shared, size)
        return (
            jax.lax.dynamic_update_slice(best_BGQJ, best[None], at),
            jax.lax.dynamic_update_slice(total_BGQJ, total[None], at),
            jax.lax.dynamic_update_slice(mixed_BGQJK, mixed[None], (*at, 0)),
        )

    zeros = jnp.zeros(state_shape, jnp.float32)
    state = jnp.full(state_shape, NEG_INF, jnp.float32), zeros, jnp.zeros((*state_shape, size), jnp.float32)
    best, total, mixed = jax.lax.fori_loop(0, tiles.count, body, state)
    total = jnp.maximum(total, 1e-30)
    mixed_BQHK = (mixed / total[..., None]).swapaxes(1, 2).reshape(q_BQHK.shape).astype(q_BQHK.dtype)
    return mixed_BQHK, (best + jnp.log(total)).swapaxes(1, 2).reshape(q_BQHK.shape[:3])


def attend_backward(
    q_BQHK, k_BCGK, v_BCGK, visibility: Visibility, mixed_BQHK, lse_BQH, d_mixed_BQHK, dk_BCGK, dv_BCGK
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of the queries, and those of keys and values added to `dk` and `dv` (fp32)."""
    groups, size = k_BCGK.shape[2], q_BQHK.shape[-1]
    tiles = _tiles(visibility, TILE, TILE)
    num_q, num_c = tiles.num_queries, tiles.num_entries
    # Row sums of weights times their gradients: what the normalisation takes off each of them.
    norm_BQH = (mixed_BQHK.astype(jnp.float32) * d_mixed_BQHK.astype(jnp.float32)).sum(-1)
    statistics_BQH2 = jnp.stack([lse_BQH, norm_BQH], axis=-1)

    def body(index, grads):
        dq, dk, dv = grads
        row, query, entry, sees_QC = tiles.at(index, visibility)
        q_GRK, d_mixed_GRK, statistics = (
            _read(x, row, query, num_q, groups) for x in (q_BQHK, d_mixed_BQHK, statistics_BQH2)
        )
        k_GCK, v_GCK = (_read(x, row, entry, num_c, groups) for x in (k_BCGK, v_BCGK))
        scores_GRC = _dot(q_GRK, k_GCK, (2, 2)) * size**-0.5
        sees_RC = jnp.repeat(sees_QC, q_GRK.shape[1] // num_q, axis=0)
        weights_GRC = jnp.where(sees_RC, jnp.exp(scores_GRC - statistics[..., :1]), 0)
        d_weights_GRC = _dot(d_mixed_GRK, v_GCK, (2, 2))
        d_scores_GRC = weights_GRC * (d_weights_GRC - statistics[..., 1:]) * size**-0.5
        d_scores_GRC, weights_GRC = d_scores_GRC.astype(k_GCK.dtype), weights_GRC.astype(v_GCK.dtype)
        dq = _add(dq, _dot(d_scores_GRC, k_GCK, (2, 1)), row, query, num_q)
        dk = _add(dk, _dot(d_scores_GRC, q_GRK, (1, 1)), row, entry, num_c)
        dv = _add(dv, _dot(weights_GRC, d_mixed_GRK, (1, 1)), row, entry, num_c)
        return dq, dk, dv

    zeros = jnp.zeros(q_BQHK.shape, jnp.float32)
    dq, dk, dv = jax.lax.fori_loop(0, tiles.count, body, (zeros, dk_BCGK, dv_BCGK))
    return dq.astype(q_BQHK.dtype), dk, dv


def attend_with_own(
    q_BSHK: jax.Array,
    k_BCGK: jax.Array,
    v_BCGK: jax.Array,
    visible_BSC: jax.Array,
    k_own_BSGK: jax.Array,
    v_own_BSGK: jax.Array,
    sees_own_BS: jax.Array,
) -> jax.Array:
    """Attention over the cache and, beside it, an entry of each query's own that is not in the cache.

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
