"""A function of rows, each with the weights of its layer.

    groups = plan(layer_N, num_layers)                                    (`grouping`)
    y_NF   = map_rows(function, weights, (scatter(x_ND, groups),), groups)
    y_NF   = gather(y_NF, groups)

`function` is written for rows of one layer and multiplies by weight matrices through the `product` that it is given, so
that each backend can bring rows and matrices together in its own way:
  block_loop    loops over segments of a layer's rows. Runs anywhere; what CPUs use.
  ragged_dot    `jax.lax.ragged_dot` on all rows at once, and megablox for the gradient of the weights: for TPUs, where
                both are native. On CPUs and GPUs it is a masked dense product, L times the work, and good for tests
                alone. Compiled ahead of time for a TPU v5e, not yet run on one (docs/PERFORMANCE.md).
  pallas        kernels of our own for GPUs (`grouped_kernels`). Elsewhere they are interpreted, for tests alone.
  masked_dense  every row through every layer, masked: L times the work. The reference.
All give the same results and gradients. No product but those of the reference is computed for rows that execute
nothing; the block loop leaves out their norms and activations as well.
"""

from functools import partial

import jax
import jax.numpy as jnp

from radialnet import block_loop
from radialnet.grouping import Groups
from radialnet.row_function import RowFunction, compute, layer_of, replayed, split


def default_backend(platform: str) -> str:
    """The fastest backend of a platform."""
    return {"tpu": "ragged_dot", "gpu": "pallas"}.get(platform, "block_loop")


def map_rows(function: RowFunction, weights: dict[str, jax.Array], rows: tuple, groups: Groups, fixed: tuple = ()):
    """`function` of the sorted rows with their layers' weights: arrays [N, Y]; zeros for rows that execute nothing.

    Args:
        function: closes over no traced array.
        weights: stacked over the layers on the first axis, matrices [L, X, Y] and vectors [L, X].
        rows: arrays [N, X], sorted.
        fixed: more of them, which carry no gradient; the function gets them after `rows`.

    The gradient of the weights is summed in their own precision.
    """
    return _map_rows(function, weights, rows, groups, fixed)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_rows(function, weights, rows, groups, fixed):
    return map_forward(function, weights, rows, groups, fixed)[0]


def _map_rows_forward(function, weights, rows, groups, fixed):
    kept = empty_kept(function, weights, rows, fixed, num_depth_steps=1)
    outputs, kept = map_forward(function, weights, rows, groups, fixed, kept)
    return outputs, (weights, rows, groups, fixed, kept)


def _map_rows_backward(function, residuals, d_outputs):
    weights, rows, groups, fixed, kept = residuals
    zeros = jax.tree.map(jnp.zeros_like, weights)
    d_weights, d_rows = map_backward(function, weights, rows, groups, fixed, kept, 0, d_outputs, zeros)
    return d_weights, d_rows, None, None


_map_rows.defvjp(_map_rows_forward, _map_rows_backward)


def empty_kept(
    function: RowFunction, weights: dict, rows: tuple, fixed: tuple, num_depth_steps: int
) -> dict[str, jax.Array]:
    """Room for what the products of a function give, at T depth steps: [T, N, Y] by name."""
    shapes = jax.eval_shape(partial(compute, function), layer_of(weights, 0), (*rows, *fixed))[1]
    return {name: jnp.zeros((num_depth_steps, *shape.shape), shape.dtype) for name, shape in shapes.items()}


def map_forward(
    function: RowFunction,
    weights: dict,
    rows: tuple,
    groups: Groups,
    fixed: tuple = (),
    kept: dict | None = None,
    t: jax.Array | int = 0,
):
    """`map_rows`, with what its products gave written into `kept` (`empty_kept`) at depth step t, for `map_backward`.

    Into one array for all steps, and by the rows that execute: whole arrays of a step, put together afterwards, would
    cost as much for the rows that execute nothing.
    """
    kept = kept or {}
    if groups.backend == "block_loop":
        return block_loop.forward(function, weights, rows, groups, fixed, kept, t)
    rows, given = _zero_idle(rows, groups), {}

    def product(name, x_NX, keep=True):
        assert name not in given, f"the matrix {name} is used twice"
        given[name] = _grouped_product(x_NX, weights[name].astype(x_NX.dtype), groups)
        return given[name]

    outputs = function(_vectors_by_row(split(weights)[0], groups), (*rows, *fixed), product)
    return _zero_idle(outputs, groups), {name: all_steps.at[t].set(given[name]) for name, all_steps in kept.items()}


def map_backward(
    function: RowFunction,
    weights: dict,
    rows: tuple,
    groups: Groups,
    fixed: tuple,
    kept: dict,
    t: jax.Array | int,
    d_outputs,
    d_weights: dict,
):
    """The gradients of `map_forward`: those of the weights added to `d_weights`, and those of the rows.

    Only norms and activations are computed again; the products come from `kept`.
    """
    if groups.backend == "block_loop":
        return block_loop.backward(function, weights, rows, groups, fixed, kept, t, d_outputs, d_weights)
    rows, kept = _zero_idle(rows, groups), {name: all_steps[t] for name, all_steps in kept.items()}
    vectors, matrices = split(weights)
    transpose = replayed(
        function, rows, fixed, kept, matrices, lambda dy, w: _grouped_product(dy, w, groups, is_transposed=True)
    )
    d_vectors_N, d_rows, pairs = transpose(_vectors_by_row(vectors, groups), _zero_idle(d_outputs, groups))
    d_matrices = {name: _add_grouped_outer(d_weights[name], x, dy, groups) for name, (x, dy) in pairs.items()}
    sums = {name: _sum_by_layer(grad_NX, groups) for name, grad_NX in d_vectors_N.items()}
    d_vectors = {name: d_weights[name] + sum_LX.astype(d_weights[name].dtype) for name, sum_LX in sums.items()}
    return d_matrices | d_vectors, _zero_idle(d_rows, groups)


# All rows at once: ragged_dot and the reference


def _layer_of_row(groups: Groups) -> jax.Array:
    """The layer of each sorted row; L past the executing ones."""
    place_N = jnp.arange(groups.row_N.shape[0])
    return jnp.searchsorted(jnp.cumsum(groups.count_L), place_N, side="right", method="compare_all")


def _vectors_by_row(vectors, groups):
    """The vectors of each row's layer: [N, X]."""
    layer_N = _layer_of_row(groups)
    return {name: jnp.take(vector, layer_N, axis=0, mode="clip") for name, vector in vectors.items()}


def _sum_by_layer(x_NX, groups):
    """The transpose of `_vectors_by_row`, [L, X]: as a product, for a scatter would have rows wait for each other."""
    one_hot_NL = jax.nn.one_hot(_layer_of_row(groups), groups.count_L.shape[0], dtype=jnp.float32)
    return jnp.einsum("NL,NX->LX", one_hot_NL, x_NX.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _zero_idle(tree, groups):
    """Rows that execute nothing set to 0: a backend may leave anything in them."""
    executes_N1 = (groups.row_N < groups.row_N.shape[0])[:, None]
    return jax.tree.map(lambda x_NX: jnp.where(executes_N1, x_NX, 0), tree)


def _grouped_product(x_NX, w_LXY, groups, is_transposed: bool = False):
    """Each row times the matrix of its layer, or its transpose, [N, Y]; zeros for rows that execute nothing."""
    if groups.backend == "pallas":
        # Here, for it brings Pallas with it.
        from radialnet import grouped_kernels

        return _zero_idle(grouped_kernels.product(x_NX, w_LXY, groups, is_transposed), groups)
    if is_transposed:
        w_LXY = w_LXY.swapaxes(1, 2)
    if groups.backend == "ragged_dot":
        return _zero_idle(jax.lax.ragged_dot(x_NX, w_LXY, groups.count_L), groups)
    one_hot_NL = jax.nn.one_hot(_layer_of_row(groups), w_LXY.shape[0], dtype=x_NX.dtype)
    return jnp.einsum("LNY,NL->NY", jnp.einsum("NX,LXY->LNY", x_NX, w_LXY), one_hot_NL)


# Rows, X and Y of a tile.
_MEGABLOX_TILING = (128, 512, 512)
_BY_LAYER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _ragged_outer(x_NX, dy_NY, count_L):
    return jax.lax.ragged_dot_general(x_NX, dy_NY, count_L, _BY_LAYER, preferred_element_type=jnp.float32)


def _megablox_outer(x_NX, dy_NY, count_L, interpret: bool = False):
    # Here, for it brings Pallas with it.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    # It takes whole tiles of rows; those of no layer are not read.
    padding = (0, -x_NX.shape[0] % _MEGABLOX_TILING[0]), (0, 0)
    x_NX, dy_NY = jnp.pad(x_NX, padding), jnp.pad(dy_NY, padding)
    return tgmm(x_NX.T, dy_NY, count_L, jnp.float32, _MEGABLOX_TILING, interpret=interpret)


def _add_grouped_outer(total_LXY, x_NX, dy_NY, groups):
    """`total` and the gradient of each layer's matrix, the sum of x · dy over its rows, which is taken in fp32."""
    if groups.backend == "pallas":
        from radialnet import grouped_kernels

        return grouped_kernels.add_outer(total_LXY, x_NX, dy_NY, groups)
    if groups.backend == "ragged_dot":
        # TPUs have ragged_dot by itself, but of this one, where the sums are ragged, XLA makes a masked dense product.
        args = x_NX, dy_NY, groups.count_L
        outer_LXY = jax.lax.platform_dependent(*args, tpu=_megablox_outer, default=_ragged_outer)
    else:
        one_hot_NL = jax.nn.one_hot(_layer_of_row(groups), groups.count_L.shape[0], dtype=x_NX.dtype)
        x_LNX = jnp.einsum("NX,NL->LNX", x_NX, one_hot_NL)
        outer_LXY = jnp.einsum("LNX,NY->LXY", x_LNX, dy_NY, preferred_element_type=jnp.float32)
    return total_LXY + outer_LXY.astype(total_LXY.dtype)
