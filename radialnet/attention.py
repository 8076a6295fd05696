"""Softmax attention over the entries of the unified cache, in tiles.

Queries are tokens that execute a layer at this depth step, entries are what tokens wrote at this step and earlier ones.
The cost follows the tiles of queries × entries in which anybody may see anything; a tile of empty slots, of later
tokens or of another document is skipped. No matrix of all scores is ever in memory (online softmax, arXiv 1805.02867;
tiles and recomputation in the backward pass, arXiv 2205.14135). Two backends, the same in values and gradients:
  tiles   a loop over all tiles that matter, in XLA. Runs anywhere; what CPUs use.
  pallas  kernels of our own for GPUs and TPUs (`attention_kernels`).
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from radialnet.visibility import NEG_INF, Visibility, sees

# Queries and entries of a tile. Smaller ones skip more, larger ones spend less on starting their operations.
TILE = 64


def default_backend(platform: str) -> str:
    """The fastest backend of a platform."""
    return "pallas" if platform in ("gpu", "tpu") else "tiles"


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q_BQHK: jax.Array, k_BCGK: jax.Array, v_BCGK: jax.Array, visibility: Visibility, backend: str = "tiles"
) -> jax.Array:
    """Softmax attention of each query over the entries that it sees, [B, Q, H, K]; statistics in fp32.

    H/G query heads share a key and value head. A query that sees no entry gets zeros.

    Args:
        backend: one of ATTENTION_BACKENDS.
    """
    return attend_forward(q_BQHK, k_BCGK, v_BCGK, visibility, backend)[0]


def _attend_forward(q_BQHK, k_BCGK, v_BCGK, visibility, backend):
    mixed_BQHK, lse_BQH = attend_forward(q_BQHK, k_BCGK, v_BCGK, visibility, backend)
    return mixed_BQHK, (q_BQHK, k_BCGK, v_BCGK, visibility, mixed_BQHK, lse_BQH)


def _attend_backward(backend, residuals, d_mixed_BQHK):
    q_BQHK, k_BCGK, v_BCGK, visibility, mixed_BQHK, lse_BQH = residuals
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_BCGK, v_BCGK))
    dq, dk, dv = attend_backward(q_BQHK, k_BCGK, v_BCGK, visibility, mixed_BQHK, lse_BQH, d_mixed_BQHK, *zeros, backend)
    return dq, dk.astype(k_BCGK.dtype), dv.astype(v_BCGK.dtype), None


attend.defvjp(_attend_forward, _attend_backward)


@jax.named_scope("attention")
def attend_forward(
    q_BQHK, k_BCGK, v_BCGK, visibility: Visibility, backend: str = "tiles"
) -> tuple[jax.Array, jax.Array]:
    """`attend`, and logsumexp of each query's scores [B, Q, H]."""
    return _functions(backend)[0](q_BQHK, k_BCGK, v_BCGK, visibility)


@jax.named_scope("attention")
def attend_backward(
    q_BQHK,
    k_BCGK,
    v_BCGK,
    visibility: Visibility,
    mixed_BQHK,
    lse_BQH,
    d_mixed_BQHK,
    dk_BCGK,
    dv_BCGK,
    backend: str = "tiles",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of the queries, and those of keys and values added to `dk` and `dv` (fp32)."""
    # Row sums of weights times their gradients: what the normalisation takes off each of them.
    norm_BQH = (mixed_BQHK.astype(jnp.float32) * d_mixed_BQHK.astype(jnp.float32)).sum(-1)
    args = q_BQHK, k_BCGK, v_BCGK, visibility, lse_BQH, norm_BQH, d_mixed_BQHK
    return _functions(backend)[1](*args, dk_BCGK, dv_BCGK)


def _functions(backend: str):
    """Forward and backward of a backend."""
    if backend == "tiles":
        return _tiles_forward, _tiles_backward
    # Here, for it brings Pallas with it.
    from radialnet import attention_kernels

    return attention_kernels.forward, attention_kernels.backward


# The loop over tiles


@flax.struct.dataclass
class _Tiles:
    """The tiles in which somebody may see something, as a list of which the first `count` are real."""

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

        def part(x, begin, sizes):
            return None if x is None else jax.lax.dynamic_slice(x, (row, *begin), (1, *sizes))[0]

        column, line = ((query, 0), (self.num_queries, 1)), ((0, entry), (1, self.num_entries))
        arrays = zip(visibility.columns_and_rows(), (column, column, line, column, line), strict=True)
        sees_QC = sees(*(part(x, *where) for x, where in arrays))
        is_new_Q = query + jnp.arange(self.num_queries) >= self.query[index] * self.num_queries
        is_new_C = entry + jnp.arange(self.num_entries) >= self.entry[index] * self.num_entries
        return row, query, entry, sees_QC & is_new_Q[:, None] & is_new_C[None, :]


def _tiles(visibility: Visibility, num_queries: int, num_entries: int) -> _Tiles:
    num_queries = min(num_queries, visibility.first_BQ.shape[1])
    num_entries = min(num_entries, visibility.token_BC.shape[1])
    meet_BIJ = visibility.tiles_that_meet(num_queries, num_entries)
    row, query, entry = jnp.nonzero(meet_BIJ, size=meet_BIJ.size, fill_value=0)
    return _Tiles(row, query, entry, meet_BIJ.sum(), num_queries, num_entries)


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


def _tiles_forward(q_BQHK, k_BCGK, v_BCGK, visibility):
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
        sees_QJC = sees_QC[:, None]
        scores_GQJC = jnp.where(sees_QJC, scores_GQJC, NEG_INF)
        at, shape = (row, 0, query, 0), (1, groups, num_q, shared)
        old_best, old_total = (jax.lax.dynamic_slice(x, at, shape)[0] for x in (best_BGQJ, total_BGQJ))
        old_mixed = jax.lax.dynamic_slice(mixed_BGQJK, (*at, 0), (*shape, size))[0]
        best = jnp.maximum(old_best, scores_GQJC.max(-1))
        weights = jnp.where(sees_QJC, jnp.exp(scores_GQJC - best[..., None]), 0)
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


def _tiles_backward(q_BQHK, k_BCGK, v_BCGK, visibility, lse_BQH, norm_BQH, d_mixed_BQHK, dk_BCGK, dv_BCGK):
    groups, size = k_BCGK.shape[2], q_BQHK.shape[-1]
    tiles = _tiles(visibility, TILE, TILE)
    num_q, num_c = tiles.num_queries, tiles.num_entries
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
