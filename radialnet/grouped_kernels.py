"""Products of rows sorted by layer with their layers' matrices, as Pallas kernels for GPUs (by way of Triton).

A program of the grid takes one segment of rows, all of one layer, or one part of one layer's matrix; segments that do
not exist and layers without rows end at once. Compiled ahead of time for an H100, not yet run on one
(docs/PERFORMANCE.md); where there is no GPU the same kernels run interpreted, which is for tests alone.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from radialnet.grouping import Groups

# Columns of a tile of the result, and how much of the summed axis is read at a time: powers of two, 16 at least.
_TILE, _INNER = 64, 32


def _on_gpu(call, *args):
    """`call(*args, interpret)`: a kernel on GPUs, its interpretation elsewhere."""
    compiled, interpreted = partial(call, interpret=False), partial(call, interpret=True)
    return jax.lax.platform_dependent(*args, cuda=compiled, rocm=compiled, default=interpreted)


def _to_tiles(x, *sizes_by_axis):
    """Zeros behind the end of some axes, given as (axis, size of a tile), up to whole tiles."""
    padding = [(0, 0)] * x.ndim
    for axis, size in sizes_by_axis:
        padding[axis] = 0, -x.shape[axis] % size
    return jnp.pad(x, padding)


def _own_rows(begin, end, size, num_rows):
    """The first of `size` rows in which the rows begin…end lie, and which of them are those: [P, 1]."""
    start = jnp.minimum(begin, num_rows - size)
    row_P1 = start + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return start, (row_P1 >= begin) & (row_P1 < end)


def product(x_NX: jax.Array, w_LXY: jax.Array, groups: Groups, is_transposed: bool = False) -> jax.Array:
    """Each row times the matrix of its layer, [N, Y]; rows that execute nothing are left uninitialised.

    Args:
        w_LXY: [L, Y, X] if `is_transposed`.
        groups: with segments of one size.
    """
    segments, num_rows = groups.segments, x_NX.shape[0]
    (rows,) = segments.sizes
    num_columns = w_LXY.shape[1 if is_transposed else 2]
    x_NX = _to_tiles(x_NX, (1, _INNER))
    w_LXY = _to_tiles(w_LXY, *(((1, _TILE), (2, _INNER)) if is_transposed else ((1, _INNER), (2, _TILE))))
    num_inner = x_NX.shape[1] // _INNER
    width = w_LXY.shape[1 if is_transposed else 2]

    def kernel(layer_M, begin_M, end_M, x_NX, w_LXY, y_NY):
        index = pl.program_id(0)
        layer, begin, end = layer_M[index], begin_M[index], end_M[index]

        @pl.when(begin < end)
        def _():
            start, is_own_P1 = _own_rows(begin, end, rows, num_rows)

            def body(inner, sum_PY):
                x_PI = x_NX[pl.ds(start, rows), pl.ds(inner * _INNER, _INNER)]
                if is_transposed:
                    w_IY = w_LXY[layer, :, pl.ds(inner * _INNER, _INNER)].T
                else:
                    w_IY = w_LXY[layer, pl.ds(inner * _INNER, _INNER), :]
                return sum_PY + jnp.dot(x_PI, w_IY, preferred_element_type=jnp.float32)

            sum_PY = jax.lax.fori_loop(0, num_inner, body, jnp.zeros((rows, _TILE), jnp.float32))
            triton.store(y_NY.at[pl.ds(start, rows), :], sum_PY.astype(y_NY.dtype), mask=is_own_P1)

    def call(layer_M, begin_M, end_M, x_NX, w_LXY, interpret):
        whole = pl.BlockSpec(memory_space=pl.ANY)
        w_block = (w_LXY.shape[0], _TILE, w_LXY.shape[2]) if is_transposed else (*w_LXY.shape[:2], _TILE)
        return pl.pallas_call(
            kernel,
            grid=(len(layer_M), width // _TILE),
            in_specs=[whole, whole, whole, whole, pl.BlockSpec(w_block, partial(_column_block, is_transposed))],
            out_specs=pl.BlockSpec((num_rows, _TILE), lambda m, n: (0, n)),
            out_shape=jax.ShapeDtypeStruct((num_rows, width), x_NX.dtype),
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
            interpret=interpret,
            name="grouped_product",
        )(layer_M, begin_M, end_M, x_NX, w_LXY)

    exists_M = jnp.arange(len(segments.layer_M)) < segments.first_of_size[-1]
    end_M = jnp.where(exists_M, segments.end_M, 0)
    return _on_gpu(call, segments.layer_M, segments.begin_M, end_M, x_NX, w_LXY)[:, :num_columns]


def _column_block(is_transposed, m, n):
    return (0, n, 0) if is_transposed else (0, 0, n)


def add_outer(total_LXY: jax.Array, x_NX: jax.Array, dy_NY: jax.Array, groups: Groups) -> jax.Array:
    """`total` and the gradient of each layer's matrix, the sum of x · dy over its rows, in the precision of `total`.

    In place where XLA lets it: the matrices of layers without rows are not touched.
    """
    num_rows, shape = x_NX.shape[0], total_LXY.shape
    (rows,) = groups.segments.sizes
    tiled = _to_tiles(total_LXY, (1, _TILE), (2, _TILE))
    x_NX, dy_NY = _to_tiles(x_NX, (1, _TILE)), _to_tiles(dy_NY, (1, _TILE))

    def kernel(begin_L, end_L, x_NX, dy_NY, old_LXY, new_LXY):
        begin, end = begin_L[pl.program_id(0)], end_L[pl.program_id(0)]

        @pl.when(begin < end)
        def _():
            def body(index, sum_XY):
                first = begin + index * rows
                start, is_own_P1 = _own_rows(first, end, rows, num_rows)
                # Both: what lies in other rows may be no number at all.
                x_PX = jnp.where(is_own_P1, x_NX[pl.ds(start, rows), :], 0).astype(x_NX.dtype)
                dy_PY = jnp.where(is_own_P1, dy_NY[pl.ds(start, rows), :], 0).astype(dy_NY.dtype)
                return sum_XY + jnp.dot(x_PX.T, dy_PY, preferred_element_type=jnp.float32)

            zeros_XY = jnp.zeros((_TILE, _TILE), jnp.float32)
            sum_XY = jax.lax.fori_loop(0, (end - begin + rows - 1) // rows, body, zeros_XY)
            new_LXY[0] = old_LXY[0] + sum_XY.astype(old_LXY.dtype)

    def call(begin_L, end_L, x_NX, dy_NY, total_LXY, interpret):
        whole = pl.BlockSpec(memory_space=pl.ANY)
        weights = pl.BlockSpec((1, _TILE, _TILE), lambda layer, m, n: (layer, m, n))
        return pl.pallas_call(
            kernel,
            grid=(total_LXY.shape[0], total_LXY.shape[1] // _TILE, total_LXY.shape[2] // _TILE),
            in_specs=[
                whole,
                whole,
                pl.BlockSpec((num_rows, _TILE), lambda layer, m, n: (0, m)),
                pl.BlockSpec((num_rows, _TILE), lambda layer, m, n: (0, n)),
                weights,
            ],
            out_specs=weights,
            out_shape=jax.ShapeDtypeStruct(total_LXY.shape, total_LXY.dtype),
            input_output_aliases={4: 0},
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
            interpret=interpret,
            name="grouped_outer",
        )(begin_L, end_L, x_NX, dy_NY, total_LXY)

    end_L = jnp.cumsum(groups.count_L)
    tiled = _on_gpu(call, end_L - groups.count_L, end_L, x_NX, dy_NY, tiled)
    return tiled[:, : shape[1], : shape[2]]
