"""A function of rows, each with the weights of its layer.

    groups = plan(layer_N, num_layers)                                    (`grouping`)
    y_NF   = map_rows(function, weights, (scatter(x_ND, groups),), groups)
    y_NF   = gather(y_NF, groups)

`function` is written for rows of one layer and multiplies by weight matrices through the `product` that it is given, so
that each backend can bring rows and matrices together in its own way:
  block_loop    loops over segments of a layer's rows. Runs anywhere; what CPUs and GPUs use.
  ragged_dot    `jax.lax.ragged_dot` on all rows at once, and megablox for the gradient of the weights: for TPUs, where
                both are native. On CPUs and GPUs it is a masked dense product, L times the work, and good for tests
                alone. Compiled ahead of time for a TPU v5e, not yet run on one (docs/PERFORMANCE.md).
  masked_dense  every row through every layer, masked: L times the work. The reference.
All give the same results and gradients. In the first two no product is computed for rows that execute nothing; the
block loop leaves out their norms and activations as well.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from radialnet.grouping import Groups, Segments


def default_backend() -> str:
    """The fastest backend of the platform that programs are compiled for by default."""
    return "ragged_dot" if jax.default_backend() == "tpu" else "block_loop"


# product(name, x_PX, keep=True): rows times the matrix `name` of their layer, [P, Y]. With keep=False the result is not
# kept for the gradient; right where nothing that follows needs its value for one, as after the last product of a layer.
# A function uses each matrix once.
Product = Callable[..., jax.Array]
# function(vectors, rows, product): `vectors` holds the weights that are no matrices, [P or 1, X] each; the rows are
# arrays [P, X]; returns arrays [P, Y] in any tree.
RowFunction = Callable[[dict[str, jax.Array], tuple[jax.Array, ...], Product], object]


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
    shapes = jax.eval_shape(partial(_compute, function), _layer(weights, 0), (*rows, *fixed))[1]
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
        return _loop_forward(function, weights, rows, groups, fixed, kept, t)
    rows, given = _zero_idle(rows, groups), {}

    def product(name, x_NX, keep=True):
        assert name not in given, f"the matrix {name} is used twice"
        given[name] = _grouped_product(x_NX, weights[name].astype(x_NX.dtype), groups)
        return given[name]

    outputs = function(_vectors_by_row(_split(weights)[0], groups), (*rows, *fixed), product)
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
        return _loop_backward(function, weights, rows, groups, fixed, kept, t, d_outputs, d_weights)
    rows, kept = _zero_idle(rows, groups), {name: all_steps[t] for name, all_steps in kept.items()}
    vectors, matrices = _split(weights)
    transpose = _replayed(
        function, rows, fixed, kept, matrices, lambda dy, w: _grouped_product(dy, w.swapaxes(1, 2), groups)
    )
    vectors_N, to_layers = jax.vjp(lambda vectors: _vectors_by_row(vectors, groups), vectors)
    d_vectors_N, d_rows, pairs = transpose(vectors_N, _zero_idle(d_outputs, groups))
    grads = {name: _grouped_outer(x, dy, groups) for name, (x, dy) in pairs.items()}
    grads |= to_layers(d_vectors_N)[0]
    d_weights = {name: total + grads[name].astype(total.dtype) for name, total in d_weights.items()}
    return d_weights, _zero_idle(d_rows, groups)


def _compute(function, layer, rows):
    """A function of rows of one layer, with its weights; and the products that are to be kept."""
    (vectors, matrices), kept = layer, {}

    def product(name, x_PX, keep=True):
        y_PY = x_PX @ matrices[name].astype(x_PX.dtype)
        if keep:
            kept[name] = y_PY
        return y_PY

    return function(vectors, rows, product), kept


def _split(weights):
    """Vectors [L, X] and matrices [L, X, Y], by name."""
    vectors = {name: weight for name, weight in weights.items() if weight.ndim == 2}
    return vectors, {name: weight for name, weight in weights.items() if name not in vectors}


def _replayed(function, rows, fixed, kept, matrices, times_transposed):
    """The function's gradients with its products replaced by what they gave.

    Returns:
        (vectors, d_outputs) -> d_vectors, d_rows and, for each product, its input and the gradient of its output.
    """

    def transpose(vectors, d_outputs):
        shapes = {}

        def record(vectors, rows):
            def product(name, x_PX, keep=True):
                shapes[name] = jax.ShapeDtypeStruct((x_PX.shape[0], matrices[name].shape[-1]), x_PX.dtype)
                return jnp.zeros(shapes[name].shape, x_PX.dtype)

            return function(vectors, (*rows, *fixed), product)

        jax.eval_shape(record, vectors, rows)
        zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}

        def replay(vectors, rows, taps):
            inputs = {}

            def product(name, x_PX, keep=True):
                assert name not in inputs, f"the matrix {name} is used twice"
                inputs[name] = x_PX
                value = kept[name] if keep else zeros[name]
                return _known_product(times_transposed, x_PX, matrices[name].astype(x_PX.dtype), value, taps[name])

            return function(vectors, (*rows, *fixed), product), inputs

        _, pull, inputs = jax.vjp(replay, vectors, rows, zeros, has_aux=True)
        d_vectors, d_rows, d_taps = pull(d_outputs)
        return d_vectors, d_rows, {name: (inputs[name], d_taps[name]) for name in inputs}

    return transpose


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known_product(times_transposed, x_PX, weights, value_PY, tap_PY):
    """`value`, with the gradient of x · weights; the gradient of `tap` is that of the result."""
    return value_PY


def _known_product_forward(times_transposed, x_PX, weights, value_PY, tap_PY):
    return value_PY, weights


def _known_product_backward(times_transposed, weights, dy_PY):
    return times_transposed(dy_PY, weights), None, None, dy_PY


_known_product.defvjp(_known_product_forward, _known_product_backward)


# Block loop


class _Place(NamedTuple):
    """Where a segment's slice of P rows starts, and which of its rows are the segment's."""

    start: jax.Array
    size: int
    is_own_P1: jax.Array


def _rows_of(segments: Segments, index, size: int, num_rows: int) -> _Place:
    start = jnp.minimum(segments.begin_M[index], num_rows - size)
    row_P1 = start + jnp.arange(size, dtype=jnp.int32)[:, None]
    return _Place(start, size, (row_P1 >= segments.begin_M[index]) & (row_P1 < segments.end_M[index]))


def _read(tree, at: _Place):
    return jax.tree.map(lambda x_NX: jax.lax.dynamic_slice_in_dim(x_NX, at.start, at.size), tree)


def _read_step(x_TNX, at: _Place, t):
    return jax.lax.dynamic_slice(x_TNX, (t, at.start, 0), (1, at.size, x_TNX.shape[-1]))[0]


def _write(x_NX, part_PX, at: _Place, t=None):
    """A part into its place, of a step if the array is of several; what lies beyond the segment stays."""
    if t is None:
        old_PX = jax.lax.dynamic_slice_in_dim(x_NX, at.start, at.size)
        return jax.lax.dynamic_update_slice_in_dim(x_NX, jnp.where(at.is_own_P1, part_PX, old_PX), at.start, 0)
    new_PX = jnp.where(at.is_own_P1, part_PX, _read_step(x_NX, at, t))
    return jax.lax.dynamic_update_slice(x_NX, new_PX[None], (t, at.start, 0))


def _layer(weights, layer):
    """Vectors [1, X] and matrices [X, Y] of one layer, by name."""
    vectors, matrices = _split(weights)
    return {name: vector[layer][None] for name, vector in vectors.items()}, _at(matrices, layer)


def _at(tree, index):
    return jax.tree.map(lambda array: array[index], tree)


def _loop_forward(function, weights, rows, groups, fixed, kept, t):
    segments, num_rows = groups.segments, rows[0].shape[0]
    shapes = jax.eval_shape(partial(_compute, function), _layer(weights, 0), (*rows, *fixed))[0]
    outputs = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    for which, size in enumerate(segments.sizes):

        def body(index, results, size=size):
            outputs, kept = results
            at = _rows_of(segments, index, size, num_rows)
            parts, given = _compute(function, _layer(weights, segments.layer_M[index]), _read((*rows, *fixed), at))
            outputs = jax.tree.map(lambda x_NX, part_PX: _write(x_NX, part_PX, at), outputs, parts)
            return outputs, {name: _write(all_steps, given[name], at, t) for name, all_steps in kept.items()}

        begin, end = segments.first_of_size[which], segments.first_of_size[which + 1]
        outputs, kept = jax.lax.fori_loop(begin, end, body, (outputs, kept))
    return outputs, kept


def _loop_backward(function, weights, rows, groups, fixed, kept, t, d_outputs, d_weights):
    # By hand: autodiff of a loop that indexes the weights would add a whole dW of all layers for every segment, and
    # can't go backwards through a dynamic number of them at all. Here dW of a segment's layer is updated in place.
    segments, num_rows = groups.segments, rows[0].shape[0]
    carried = d_weights, jax.tree.map(jnp.zeros_like, rows)
    for which, size in enumerate(segments.sizes):

        def body(index, carried, size=size):
            d_weights, d_rows = carried
            at = _rows_of(segments, index, size, num_rows)
            layer = segments.layer_M[index]
            vectors, matrices = _layer(weights, layer)
            # Rows of other segments give no gradient.
            rows_P, d_outputs_P = jax.tree.map(
                lambda x_PX: jnp.where(at.is_own_P1, x_PX, 0), _read((rows, d_outputs), at)
            )
            kept_P = {name: _read_step(all_steps, at, t) for name, all_steps in kept.items()}
            transpose = _replayed(function, rows_P, _read(fixed, at), kept_P, matrices, lambda dy, w: dy @ w.T)
            d_vectors, d_rows_P, pairs = transpose(vectors, d_outputs_P)
            parts = {name: grad[0] for name, grad in d_vectors.items()}
            for name, (x_PX, dy_PY) in pairs.items():
                parts[name] = jnp.matmul(x_PX.T, dy_PY, preferred_element_type=d_weights[name].dtype)
            d_weights = {name: total.at[layer].add(parts[name]) for name, total in d_weights.items()}
            return d_weights, jax.tree.map(lambda x_NX, part_PX: _write(x_NX, part_PX, at), d_rows, d_rows_P)

        begin, end = segments.first_of_size[which], segments.first_of_size[which + 1]
        carried = jax.lax.fori_loop(begin, end, body, carried)
    return carried


# All rows at once: ragged_dot and the reference


def _layer_of_row(groups: Groups) -> jax.Array:
    """The layer of each sorted row; L past the executing ones."""
    place_N = jnp.arange(groups.row_N.shape[0])
    return jnp.searchsorted(jnp.cumsum(groups.count_L), place_N, side="right")


def _vectors_by_row(vectors, groups):
    """The vectors of each row's layer: [N, X]."""
    layer_N = _layer_of_row(groups)
    return {name: jnp.take(vector, layer_N, axis=0, mode="clip") for name, vector in vectors.items()}


def _zero_idle(tree, groups):
    """Rows that execute nothing set to 0: a backend may leave anything in them."""
    executes_N1 = (groups.row_N < groups.row_N.shape[0])[:, None]
    return jax.tree.map(lambda x_NX: jnp.where(executes_N1, x_NX, 0), tree)


def _grouped_product(x_NX, w_LXY, groups):
    """Each row times the matrix of its layer, [N, Y]; zeros for rows that execute nothing."""
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


def _grouped_outer(x_NX, dy_NY, groups):
    """The gradient of each layer's matrix, [L, X, Y]: the sum of x · dy over its rows, in fp32."""
    if groups.backend == "ragged_dot":
        # TPUs have ragged_dot by itself, but of this one, where the sums are ragged, XLA makes a masked dense product.
        return jax.lax.platform_dependent(x_NX, dy_NY, groups.count_L, tpu=_megablox_outer, default=_ragged_outer)
    one_hot_NL = jax.nn.one_hot(_layer_of_row(groups), groups.count_L.shape[0], dtype=x_NX.dtype)
    x_LNX = jnp.einsum("NX,NL->LNX", x_NX, one_hot_NL)
    return jnp.einsum("LNX,NY->LXY", x_LNX, dy_NY, preferred_element_type=jnp.float32)
