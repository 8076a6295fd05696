"""Products of rows sorted by layer with their layers' matrices, as Pallas kernels for GPUs (by way of Triton).

A program of the grid takes one segment of rows, all of one layer, or one part of one layer's matrix; segments that do
not exist and layers without rows end at once. Run on an H200 (docs/PERFORMANCE.md); where there is no GPU the same
kernels run interpreted, which is for tests alone.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from radialnet.grouping import Groups


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How a kernel cuts its work: powers of two, 16 at least."""

    width: int  # Columns of a tile of the result, for `add_outer` its rows as well.
    inner: int  # How much of the summed axis is read at a time.
    num_warps: int

    def params(self) -> triton.CompilerParams:
        return triton.CompilerParams(num_warps=self.num_warps, num_stages=3)


def _product_tiling(rows: int, num_channels: int, num_columns: int, itemsize: int) -> _Tiling:
    """Tiles as large as the registers of eight warps hold, where they fit: each reads its rows and matrix once more.

    Three stages of them have to fit into the shared memory of a multiprocessor: 150 KB.
    """
    width = _largest_divisor((256, 128, 64), num_columns)
    inner = _largest_divisor((128 // itemsize, 32), num_channels)
    return _Tiling(width, inner, num_warps=8 if rows * width >= 2**15 else 4)


def _outer_tiling(rows: int, num_columns: int, num_others: int, itemsize: int) -> _Tiling:
    width = _largest_divisor((128, 64), math.gcd(num_columns, num_others))
    return _Tiling(width, min(rows, 128 // itemsize), num_warps=4)


def _largest_divisor(sizes: tuple[int, ...], size: int) -> int:
    """The first of the sizes that divides; the last one if none does."""
    return next((tile for tile in sizes if size % tile == 0), sizes[-1])


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


def _at_least(x_NX, num_rows):
    """Zeros behind fewer rows than one segment reads."""
    return jnp.pad(x_NX, ((0, max(num_rows - x_NX.shape[0], 0)), (0, 0)))


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
    segments, num_given = groups.segments, x_NX.shape[0]
    (rows,) = segments.sizes
    x_NX = _at_least(x_NX, rows)
    num_rows = x_NX.shape[0]
    num_columns = w_LXY.shape[1 if is_transposed else 2]
    tiling = _product_tiling(rows, x_NX.shape[1], num_columns, x_NX.dtype.itemsize)
    x_NX = _to_tiles(x_NX, (1, tiling.inner))
    w_LXY = _to_tiles(
        w_LXY, *(((1, tiling.width), (2, tiling.inner)) if is_transposed else ((1, tiling.inner), (2, tiling.width)))
    )
    num_inner = x_NX.shape[1] // tiling.inner
    width = w_LXY.shape[1 if is_transposed else 2]

    def kernel(layer_M, begin_M, end_M, x_NX, w_LXY, y_NY):
        index = pl.program_id(0)
        layer, begin, end = layer_M[index], begin_M[index], end_M[index]

        @pl.when(begin < end)
        def _():
            start, is_own_P1 = _own_rows(begin, end, rows, num_rows)

            def body(inner, sum_PY):
                x_PI = x_NX[pl.ds(start, rows), pl.ds(inner * tiling.inner, tiling.inner)]
                if is_transposed:
                    w_IY = w_LXY[layer, :, pl.ds(inner * tiling.inner, tiling.inner)].T
                else:
                    w_IY = w_LXY[layer, pl.ds(inner * tiling.inner, tiling.inner), :]
                return sum_PY + jnp.dot(x_PI, w_IY, preferred_element_type=jnp.float32)

            sum_PY = jax.lax.fori_loop(0, num_inner, body, jnp.zeros((rows, tiling.width), jnp.float32))
            triton.store(y_NY.at[pl.ds(start, rows), :], sum_PY.astype(y_NY.dtype), mask=is_own_P1)

    def call(layer_M, begin_M, end_M, x_NX, w_LXY, interpret):
        whole = pl.BlockSpec(memory_space=pl.ANY)
        w_block = (w_LXY.shape[0], tiling.width, w_LXY.shape[2]) if is_transposed else (*w_LXY.shape[:2], tiling.width)
        return pl.pallas_call(
            kernel,
            grid=(len(layer_M), width // tiling.width),
            in_specs=[whole, whole, whole, whole, pl.BlockSpec(w_block, partial(_column_block, is_transposed))],
            out_specs=pl.BlockSpec((num_rows, tiling.width), lambda m, n: (0, n)),
            out_shape=jax.ShapeDtypeStruct((num_rows, width), x_NX.dtype),
            compiler_params=tiling.params(),
            interpret=interpret,
            name="grouped_product",
        )(layer_M, begin_M, end_M, x_NX, w_LXY)

    exists_M = jnp.arange(len(segments.layer_M)) < segments.first_of_size[-1]
    end_M = jnp.where(exists_M, segments.end_M, 0)
    return _on_gpu(call, segments.layer_M, segments.begin_M, end_M, x_NX, w_LXY)[:num_given, :num_columns]


def _column_block(is_transposed, m, n):
    return (0, n, 0) if is_transposed else (0, 0, n)


def _outer(x_PX, dy_PY):
    return jnp.dot(x_PX.T, dy_PY, preferred_element_type=jnp.float32)


def add_outer(total_LXY: jax.Array, x_NX: jax.Array, dy_NY: jax.Array, groups: Groups) -> jax.Array:
    """`total` and the gradient of each layer's matrix, the sum of x · dy over its rows, in the precision of `total`.

    In place where XLA lets it: the matrices of layers without rows are not touched.
    """
    shape, (segment_size,) = total_LXY.shape, groups.segments.sizes
    tiling = _outer_tiling(segment_size, *shape[1:], x_NX.dtype.itemsize)
    rows, width = tiling.inner, tiling.width
    x_NX, dy_NY = _at_least(x_NX, rows), _at_least(dy_NY, rows)
    num_rows = x_NX.shape[0]
    tiled = _to_tiles(total_LXY, (1, width), (2, width))
    x_NX, dy_NY = _to_tiles(x_NX, (1, width)), _to_tiles(dy_NY, (1, width))

    def kernel(begin_L, end_L, x_NX, dy_NY, old_LXY, new_LXY):
        begin, end = begin_L[pl.program_id(0)], end_L[pl.program_id(0)]

        @pl.when(begin < end)
        def _():
            def body(index, sum_XY):
                here = pl.ds(begin + index * rows, rows)
                return sum_XY + _outer(x_NX[here, :], dy_NY[here, :])

            num_whole = (end - begin) // rows
            sum_XY = jax.lax.fori_loop(0, num_whole, body, jnp.zeros((width, width), jnp.float32))
            # The rest by itself: a mask would keep the others from coming to their product as they lie.
            start, is_own_P1 = _own_rows(begin + num_whole * rows, end, rows, num_rows)
            here = pl.ds(start, rows)
            # Both: what lies in other rows may be no number at all.
            x_PX, dy_PY = (jnp.where(is_own_P1, x[here, :], 0).astype(x.dtype) for x in (x_NX, dy_NY))
            sum_XY += _outer(x_PX, dy_PY)
            new_LXY[0] = old_LXY[0] + sum_XY.astype(old_LXY.dtype)

    def call(begin_L, end_L, x_NX, dy_NY, total_LXY, interpret):
        whole = pl.BlockSpec(memory_space=pl.ANY)
        weights = pl.BlockSpec((1, width, width), lambda layer, m, n: (layer, m, n))
        return pl.pallas_call(
            kernel,
            grid=(total_LXY.shape[0], total_LXY.shape[1] // width, total_LXY.shape[2] // width),
            in_specs=[
                whole,
                whole,
                pl.BlockSpec((num_rows, width), lambda layer, m, n: (0, m)),
                pl.BlockSpec((num_rows, width), lambda layer, m, n: (0, n)),
                weights,
            ],
            out_specs=weights,
            out_shape=jax.ShapeDtypeStruct(total_LXY.shape, total_LXY.dtype),
            input_output_aliases={4: 0},
            compiler_params=tiling.params(),
            interpret=interpret,
            name="grouped_outer",
        )(begin_L, end_L, x_NX, dy_NY, total_LXY)

    end_L = jnp.cumsum(groups.count_L)
    tiled = _on_gpu(call, end_L - groups.count_L, end_L, x_NX, dy_NY, tiled)
    return tiled[:, : shape[1], : shape[2]]
