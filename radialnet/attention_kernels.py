"""`attention` as Pallas kernels, for GPUs (by way of Triton) and TPUs.

A program of the grid takes one tile of queries, or of entries, of one head, and loops over the tiles of the other kind
in which somebody may see something, which are listed beforehand: a tile of empty slots, of later tokens or of another
document costs nothing. Tiles in which everybody sees everything come first, in a loop that looks at no positions. The
backward pass is two kernels, one that sums over entries and one that sums over queries, so that no two programs write
to one place (arXiv 2307.08691). On a TPU the keys and values of a row and head have to fit into VMEM. Run on an H200;
compiled ahead of time for TPUs, not yet run on one (docs/PERFORMANCE.md). Elsewhere they run interpreted, for tests.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

from radialnet.visibility import NEG_INF, Visibility, sees

# Queries and entries of a tile. TPUs have lanes of 128; small where kernels are interpreted, for tests to have many.
_TILE = {"gpu": 64, "tpu": 128, "interpreted": 8}
_VMEM_BYTES = 64 * 2**20
# Sums over the last axes of both sides, the first ones, or as a matrix product.
_LAST, _FIRST, _PLAIN = ((1,), (1,)), ((0,), (0,)), ((1,), (0,))


def forward(q_BQHK, k_BCGK, v_BCGK, visibility: Visibility) -> tuple[jax.Array, jax.Array]:
    """`attention.attend_forward`."""
    return _by_platform(_forward, q_BQHK, k_BCGK, v_BCGK, visibility)


def backward(
    q_BQHK, k_BCGK, v_BCGK, visibility: Visibility, lse_BQH, norm_BQH, d_mixed_BQHK, dk_BCGK, dv_BCGK
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`attention.attend_backward`, with the row sums of weights times their gradients, [B, Q, H]."""
    args = q_BQHK, k_BCGK, v_BCGK, visibility, lse_BQH, norm_BQH, d_mixed_BQHK
    dq_BQHK, new_dk_BCGK, new_dv_BCGK = _by_platform(_backward, *args)
    return dq_BQHK, dk_BCGK + new_dk_BCGK, dv_BCGK + new_dv_BCGK


def _by_platform(function, *args):
    on = {platform: partial(function, platform) for platform in _TILE}
    return jax.lax.platform_dependent(*args, cuda=on["gpu"], rocm=on["gpu"], tpu=on["tpu"], default=on["interpreted"])


@flax.struct.dataclass
class _Tiled:
    """Who sees whom, cut into I tiles of queries and J tiles of entries; and for each tile those that it meets, and of
    how many of these, which are the first ones, it sees all."""

    first_BIQ1: jax.Array
    last_BIQ1: jax.Array
    layer_BIQ1: jax.Array
    token_BJ1C: jax.Array
    layer_BJ1C: jax.Array
    count_B2I: jax.Array
    entries_BIJ: jax.Array
    count_B2J: jax.Array
    queries_BJI: jax.Array

    @classmethod
    def of(cls, visibility: Visibility, tile: int) -> "_Tiled":
        def queries(x_BQ, empty=0):
            return _cut(x_BQ[..., None], tile, empty)

        def entries(x_BC, empty=0):
            return _cut(x_BC[..., None], tile, empty).swapaxes(2, 3)

        # Queries and entries of one layer all see each other where layers don't matter.
        layer_BQ, layer_BC = visibility.layer_BQ, visibility.layer_BC
        layer_BQ = jnp.zeros_like(visibility.first_BQ) if layer_BQ is None else layer_BQ
        layer_BC = jnp.zeros_like(visibility.token_BC) if layer_BC is None else layer_BC
        meet_BIJ, all_BIJ = visibility.tiles_that_meet(tile, tile), visibility.tiles_that_see_all(tile, tile)
        return cls(
            queries(visibility.first_BQ),
            queries(visibility.last_BQ, -1),
            queries(layer_BQ),
            entries(visibility.token_BC, -1),
            entries(layer_BC),
            *_those_that_meet(meet_BIJ, all_BIJ),
            *_those_that_meet(meet_BIJ.swapaxes(1, 2), all_BIJ.swapaxes(1, 2)),
        )

    def positions(self):
        return self.first_BIQ1, self.last_BIQ1, self.layer_BIQ1, self.token_BJ1C, self.layer_BJ1C


def _those_that_meet(meet_BXY, all_BXY):
    """Of the last axis, how many see all and how many meet, [B, 2, X], and their indices, in this order and in front of
    all others, [B, X, Y]."""
    order_BXY = jnp.argsort(2 - meet_BXY.astype(jnp.int32) - all_BXY, axis=-1, stable=True)
    count_B2X = jnp.stack([all_BXY.sum(-1, dtype=jnp.int32), meet_BXY.sum(-1, dtype=jnp.int32)], axis=1)
    return count_B2X, order_BXY.astype(jnp.int32)


def _cut(x_BQX, tile, empty=0):
    """[B, I, tile, X], what is missing in the last tile filled up."""
    batch, length, size = x_BQX.shape
    x_BQX = jnp.pad(x_BQX, ((0, 0), (0, -length % tile), (0, 0)), constant_values=empty)
    return x_BQX.reshape(batch, -1, tile, size)


def _to_tiles(x_BQHK, tile):
    """Heads first and channels up to a power of two, as kernels read it: [B, H, I, tile, K]."""
    batch, _, heads, size = x_BQHK.shape
    width = max(16, pl.next_power_of_2(size)) if size > 1 else 1
    x_BHQK = jnp.pad(x_BQHK, ((0, 0), (0, 0), (0, 0), (0, width - size))).swapaxes(1, 2)
    return _cut(x_BHQK.reshape(batch * heads, -1, width), tile).reshape(batch, heads, -1, tile, width)


def _from_tiles(x_BHIQK, like_BQHK):
    batch, length, heads, size = like_BQHK.shape
    x_BHQK = x_BHIQK.reshape(batch, heads, -1, x_BHIQK.shape[-1])
    return x_BHQK[:, :, :length, :size].swapaxes(1, 2)


def _one_tile(x):
    """The block of a program (row, head, tile): of arrays [B, I, …] or [B, H, I, …]."""
    if x.ndim == 4:
        return pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, h, i: (b, i, 0, 0))
    return pl.BlockSpec((1, 1, 1, *x.shape[3:]), lambda b, h, i: (b, h, i, 0, 0))


def _all_tiles(x, shared=1, num_heads=1):
    """All tiles of the row: of one head for each `shared` heads of the grid, or of `num_heads` heads for each."""
    # lax.div: of `//` Pallas can make nothing for a TPU that is not there.
    if x.ndim == 4:
        return pl.BlockSpec((1, *x.shape[1:]), lambda b, h, i: (b, 0, 0, 0))
    return pl.BlockSpec((1, num_heads, *x.shape[2:]), lambda b, h, i: (b, jax.lax.div(h, shared), 0, 0, 0))


def _dot(left, right, sums):
    return jax.lax.dot_general(left, right, (sums, ((), ())), preferred_element_type=jnp.float32)


def _cost(num_products, q, k, inputs):
    """What a kernel costs that takes so many products of queries and entries, if tokens see all those before them.

    For XLA to order its work by, and for `program` to count. Entries of n steps are there by and by.
    """
    batch, heads, num_tiles, tile, size = q.shape
    num_entries, num_steps = k.shape[2] * k.shape[3], max(k.shape[2] // num_tiles, 1)
    share = (num_tiles + 1) / (2 * num_tiles) * (num_steps + 1) / (2 * num_steps)
    pairs = int(batch * heads * num_tiles * tile * num_entries * share)
    read = sum(x.size * x.dtype.itemsize for x in inputs)
    return pl.CostEstimate(flops=2 * num_products * pairs * size, transcendentals=pairs, bytes_accessed=read)


def _call(kernel, platform, grid, scalars, in_specs, inputs, out_specs, out_shape, cost):
    """Run a kernel. `scalars` are what its loops go by; those of a row lie in a TPU's scalar memory."""

    def of_row(x):
        memory = tpu.SMEM if platform == "tpu" else None
        return pl.BlockSpec((1, *x.shape[1:]), lambda b, h, i: (b, 0, 0), memory_space=memory)

    # Programs that run side by side take tiles of one head, which read the same of it. The axis that varies
    # fastest is the last on a TPU, and the first on a GPU.
    specs, results, axis = [*map(of_row, scalars), *in_specs], out_specs, 2
    if platform == "gpu":
        grid, axis = grid[::-1], 0
        specs, results = jax.tree.map(_reversed, (specs, results))
    params = {
        "gpu": triton.CompilerParams(num_warps=4, num_stages=2),
        "tpu": tpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES),
        "interpreted": None,
    }
    return pl.pallas_call(
        partial(kernel, axis=axis),
        grid=grid,
        in_specs=specs,
        out_specs=results,
        out_shape=out_shape,
        compiler_params=params[platform],
        cost_estimate=cost,
        interpret=platform == "interpreted",
        name=kernel.func.__name__.strip("_"),
    )(*scalars, *inputs)


def _loops(count, index, body, state):
    """Over the tiles in which everybody sees everything, and over those where it is to be looked at."""
    num_all, num_tiles = count[0, 0, index], count[0, 1, index]
    state = jax.lax.fori_loop(0, num_all, partial(body, sees_all=True), state)
    return jax.lax.fori_loop(num_all, num_tiles, partial(body, sees_all=False), state)


def _masked(x_QC, sees_QC, empty):
    return x_QC if sees_QC is None else jnp.where(sees_QC, x_QC, empty)


def _reversed(spec: pl.BlockSpec) -> pl.BlockSpec:
    """The same block for the axes of the grid in reversed order."""
    index_map = spec.index_map
    return pl.BlockSpec(spec.block_shape, lambda i, h, b: index_map(b, h, i))


def _forward_kernel(count, entries, first, last, layer_q, token, layer_c, q, k, v, mixed, lse, *, scale, axis):
    i = pl.program_id(axis)
    q_QK = q[0, 0, 0]
    num_queries, size = q_QK.shape

    def body(n, state, sees_all):
        best_Q1, total_Q1, mixed_QK = state
        j = entries[0, i, n]
        sees_QC = None if sees_all else sees(first[0, 0], last[0, 0], token[0, j], layer_q[0, 0], layer_c[0, j])
        scores_QC = _masked(_dot(q_QK, k[0, 0, j], _LAST) * scale, sees_QC, NEG_INF)
        new_best_Q1 = jnp.maximum(best_Q1, scores_QC.max(-1, keepdims=True))
        weights_QC = _masked(jnp.exp(scores_QC - new_best_Q1), sees_QC, 0)
        fade_Q1 = jnp.exp(best_Q1 - new_best_Q1)
        v_CK = v[0, 0, j]
        mixed_QK = mixed_QK * fade_Q1 + _dot(weights_QC.astype(v_CK.dtype), v_CK, _PLAIN)
        return new_best_Q1, total_Q1 * fade_Q1 + weights_QC.sum(-1, keepdims=True), mixed_QK

    zeros_Q1, zeros_QK = (jnp.zeros((num_queries, width), jnp.float32) for width in (1, size))
    best_Q1, total_Q1, mixed_QK = _loops(count, i, body, (zeros_Q1 + NEG_INF, zeros_Q1, zeros_QK))
    total_Q1 = jnp.maximum(total_Q1, 1e-30)
    mixed[0, 0, 0] = (mixed_QK / total_Q1).astype(mixed.dtype)
    lse[0, 0, 0] = best_Q1 + jnp.log(total_Q1)


def _gradient_of_scores(q_QK, k_CK, v_CK, d_mixed_QK, lse_Q1, norm_Q1, sees_QC, scale):
    """The weights of a tile, and the gradient of its scores before they are scaled: [Q, C] each."""
    weights_QC = _masked(jnp.exp(_dot(q_QK, k_CK, _LAST) * scale - lse_Q1), sees_QC, 0)
    d_scores_QC = weights_QC * (_dot(d_mixed_QK, v_CK, _LAST) - norm_Q1) * scale
    return weights_QC.astype(v_CK.dtype), d_scores_QC.astype(k_CK.dtype)


def _queries_kernel(
    count, entries, first, last, layer_q, token, layer_c, q, k, v, d_mixed, lse, norm, dq, *, scale, axis
):  # fmt: skip
    i = pl.program_id(axis)
    of_queries = q[0, 0, 0], d_mixed[0, 0, 0], lse[0, 0, 0], norm[0, 0, 0]

    def body(n, dq_QK, sees_all):
        j = entries[0, i, n]
        q_QK, d_mixed_QK, lse_Q1, norm_Q1 = of_queries
        k_CK = k[0, 0, j]
        sees_QC = None if sees_all else sees(first[0, 0], last[0, 0], token[0, j], layer_q[0, 0], layer_c[0, j])
        _, d_scores_QC = _gradient_of_scores(q_QK, k_CK, v[0, 0, j], d_mixed_QK, lse_Q1, norm_Q1, sees_QC, scale)
        return dq_QK + _dot(d_scores_QC, k_CK, _PLAIN)

    zeros_QK = jnp.zeros(of_queries[0].shape, jnp.float32)
    dq[0, 0, 0] = _loops(count, i, body, zeros_QK).astype(dq.dtype)


def _entries_kernel(
    count, queries, first, last, layer_q, token, layer_c, q, k, v, d_mixed, lse, norm, dk, dv, *, scale, axis
):  # fmt: skip
    j = pl.program_id(axis)
    k_CK, v_CK = k[0, 0, 0], v[0, 0, 0]

    def body(n, grads, sees_all):
        dk_CK, dv_CK = grads
        i = queries[0, j, n]
        sees_QC = None if sees_all else sees(first[0, i], last[0, i], token[0, 0], layer_q[0, i], layer_c[0, 0])
        for head in range(q.shape[1]):
            q_QK, d_mixed_QK = q[0, head, i], d_mixed[0, head, i]
            of_queries = d_mixed_QK, lse[0, head, i], norm[0, head, i]
            weights_QC, d_scores_QC = _gradient_of_scores(q_QK, k_CK, v_CK, *of_queries, sees_QC, scale)
            dk_CK += _dot(d_scores_QC, q_QK, _FIRST)
            dv_CK += _dot(weights_QC, d_mixed_QK, _FIRST)
        return dk_CK, dv_CK

    zeros_CK = jnp.zeros(k_CK.shape, jnp.float32)
    dk[0, 0, 0], dv[0, 0, 0] = _loops(count, j, body, (zeros_CK, zeros_CK))


def _forward(platform, q_BQHK, k_BCGK, v_BCGK, visibility):
    tiled = _Tiled.of(visibility, _TILE[platform])
    q, k, v = (_to_tiles(x, _TILE[platform]) for x in (q_BQHK, k_BCGK, v_BCGK))
    shared = q.shape[1] // k.shape[1]
    queries, entries = tiled.positions()[:3], tiled.positions()[3:]
    lse = jax.ShapeDtypeStruct((*q.shape[:-1], 1), jnp.float32)
    inputs = *queries, *entries, q, k, v
    mixed, lse = _call(
        partial(_forward_kernel, scale=q_BQHK.shape[-1] ** -0.5),
        platform,
        grid=q.shape[:3],
        scalars=(tiled.count_B2I, tiled.entries_BIJ),
        in_specs=[*map(_one_tile, queries), *map(_all_tiles, entries), _one_tile(q), *[_all_tiles(k, shared)] * 2],
        inputs=inputs,
        out_specs=(_one_tile(q), _one_tile(lse)),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), lse),
        cost=_cost(2, q, k, inputs),
    )
    return _from_tiles(mixed, q_BQHK), _from_tiles(lse, q_BQHK[..., :1])[..., 0]


def _backward(platform, q_BQHK, k_BCGK, v_BCGK, visibility, lse_BQH, norm_BQH, d_mixed_BQHK):
    tiled = _Tiled.of(visibility, _TILE[platform])
    arrays = q_BQHK, k_BCGK, v_BCGK, d_mixed_BQHK, lse_BQH[..., None], norm_BQH[..., None]
    q, k, v, d_mixed, lse, norm = (_to_tiles(x, _TILE[platform]) for x in arrays)
    shared = q.shape[1] // k.shape[1]
    queries, entries = tiled.positions()[:3], tiled.positions()[3:]
    inputs = *queries, *entries, q, k, v, d_mixed, lse, norm
    scale = q_BQHK.shape[-1] ** -0.5
    dq = _call(
        partial(_queries_kernel, scale=scale),
        platform,
        grid=q.shape[:3],
        scalars=(tiled.count_B2I, tiled.entries_BIJ),
        in_specs=[
            *map(_one_tile, queries),
            *map(_all_tiles, entries),
            _one_tile(q),
            *[_all_tiles(k, shared)] * 2,
            *map(_one_tile, (d_mixed, lse, norm)),
        ],
        inputs=inputs,
        out_specs=_one_tile(q),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        cost=_cost(3, q, k, inputs),
    )
    of_heads = partial(_all_tiles, num_heads=shared)
    dk, dv = _call(
        partial(_entries_kernel, scale=scale),
        platform,
        grid=k.shape[:3],
        scalars=(tiled.count_B2J, tiled.queries_BJI),
        in_specs=[
            *map(_all_tiles, queries),
            *map(_one_tile, entries),
            of_heads(q),
            *[_one_tile(k)] * 2,
            *map(of_heads, (d_mixed, lse, norm)),
        ],
        inputs=inputs,
        out_specs=(_one_tile(k), _one_tile(k)),
        out_shape=(jax.ShapeDtypeStruct(k.shape, jnp.float32),) * 2,
        cost=_cost(4, q, k, inputs),
    )
    return _from_tiles(dq, q_BQHK), _from_tiles(dk, k_BCGK), _from_tiles(dv, v_BCGK)
