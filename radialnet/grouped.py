"""Rows grouped by layer: plan, scatter, a function of the rows with their layers' weights, gather.

Each row (a token at one depth step) goes through the weights of one layer. The rows are sorted by layer:

    groups = plan(layer_N, num_layers)
    x_ND   = scatter(x_ND, groups)          rows of one layer side by side, those that execute nothing last
    y_NF   = map_rows(function, weights, (x_ND,), groups)
    y_NF   = gather(y_NF, groups)           back in their order; zeros for the rows that execute nothing

`function` is written for rows of one layer and multiplies by weight matrices through the `product` that it is given, so
that each backend can bring rows and matrices together in its own way:
  block_loop    loops over segments of a layer's rows. Runs anywhere; what CPUs use.
  ragged_dot    `jax.lax.ragged_dot` on all rows at once; native on TPUs. On CPUs and GPUs it is a masked dense product,
                L times the work, and good for tests alone.
  masked_dense  every row through every layer, masked: L times the work. The reference.
All give the same results and gradients, and cost nothing for rows that execute nothing but in the reference.

A segment is a run of rows of one layer. Its size is one of a few (`sizes`), so that programs are static while group
lengths are not: a group is cut into large segments and smaller ones for the rest. No row is stored as padding: where a
segment reaches beyond its group, what it computes there is not written.
"""

import itertools
from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from radialnet.config import GROUPED_BACKENDS

# A product of fewer rows spends its time on fetching the weights; of more rows, a CPU gets no faster.
SMALLEST, LARGEST = 8, 512


@flax.struct.dataclass
class Segments:
    """Runs of rows of one layer, those of one size side by side. M is a bound; only the counted ones exist."""

    layer_M: jax.Array
    begin_M: jax.Array  # First row, among the sorted rows.
    end_M: jax.Array  # One past the last row.
    first_of_size: jax.Array  # [len(sizes) + 1] Where the segments of each size begin, and where the last ones end.
    sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Groups:
    """How N rows lie when they are sorted by layer."""

    slot_N: jax.Array  # Sorted place of each row; N for the rows that execute nothing.
    row_N: jax.Array  # The inverse: the row at each sorted place; N past the executing rows.
    count_L: jax.Array  # Rows of each layer.
    segments: Segments
    backend: str = flax.struct.field(pytree_node=False)

    def num_computed(self) -> jax.Array:
        """Rows that are computed, padding of the segments included."""
        count = jnp.diff(self.segments.first_of_size)
        return (count * jnp.asarray(self.segments.sizes)).sum()


def default_backend() -> str:
    """The fastest backend of the platform that programs are compiled for by default."""
    return "ragged_dot" if jax.default_backend() == "tpu" else "block_loop"


def segment_sizes(num_rows: int, num_layers: int) -> tuple[int, ...]:
    """Sizes that segments may have: from about an average group down, halving, five at most."""
    size = SMALLEST
    while size < LARGEST and 2 * size * num_layers <= num_rows:
        size *= 2
    sizes = [size]
    while len(sizes) < 5 and sizes[-1] > SMALLEST:
        sizes.append(sizes[-1] // 2)
    # A segment is read as a slice, which must fit among the rows.
    return tuple(sorted({min(size, num_rows) for size in sizes}, reverse=True))


def plan(
    layer_N: jax.Array, num_layers: int, backend: str = "block_loop", sizes: tuple[int, ...] | None = None
) -> Groups:
    """Sort rows by layer and cut each layer's rows into segments.

    Args:
        layer_N: the layer of each row, 0…L-1; L for a row that executes nothing.
        num_layers: L.
        backend: one of GROUPED_BACKENDS.
        sizes: of the segments, falling; `segment_sizes` by default.
    """
    if backend not in GROUPED_BACKENDS:
        raise ValueError(f"backend={backend!r}: one of {GROUPED_BACKENDS} is needed")
    num_rows = layer_N.shape[0]
    order_N = jnp.argsort(layer_N, stable=True).astype(jnp.int32)
    count_L = jnp.bincount(layer_N, length=num_layers + 1)[:num_layers].astype(jnp.int32)
    place_N = jnp.arange(num_rows, dtype=jnp.int32)
    executes_N = place_N < count_L.sum()
    slot_N = jnp.zeros(num_rows, jnp.int32).at[order_N].set(jnp.where(executes_N, place_N, num_rows))
    return Groups(
        slot_N=slot_N,
        row_N=jnp.where(executes_N, order_N, num_rows),
        count_L=count_L,
        segments=_cut(count_L, num_rows, sizes or segment_sizes(num_rows, num_layers)),
        backend=backend,
    )


def _cut(count_L: jax.Array, num_rows: int, sizes: tuple[int, ...]) -> Segments:
    """Cut each group into segments, large ones first.

    A rest of more than three quarters of a size becomes one segment of it: computing the missing rows costs less than
    fetching the weights for several smaller segments.
    """
    rest_L, num_ZL = count_L, []
    for size in sizes:
        num_L = rest_L // size
        rest_L -= num_L * size
        rounds_up_L = (rest_L > 0) if size == sizes[-1] else (4 * rest_L > 3 * size)
        num_ZL.append(num_L + rounds_up_L)
        rest_L = jnp.where(rounds_up_L, 0, rest_L)
    num_ZL = jnp.stack(num_ZL)
    size_Z1 = jnp.asarray(sizes, jnp.int32)[:, None]
    # Where the segments of a size begin within their group: after all larger ones.
    before_ZL = jnp.cumsum(num_ZL * size_Z1, axis=0) - num_ZL * size_Z1
    group_begin_L = jnp.cumsum(count_L) - count_L
    last_ZL = jnp.cumsum(num_ZL.ravel())
    num_layers = count_L.shape[0]
    # Of the largest size as many as fit and one that is rounded up; of each other what the one before it leaves.
    most_of_layer = 1 + sum(-(-larger // size) for larger, size in itertools.pairwise(sizes))
    max_segments = num_rows // sizes[0] + min(num_layers, num_rows) * most_of_layer
    index_M = jnp.arange(max_segments, dtype=jnp.int32)
    cell_M = jnp.minimum(jnp.searchsorted(last_ZL, index_M, side="right"), last_ZL.shape[0] - 1)
    layer_M = (cell_M % num_layers).astype(jnp.int32)
    nth_M = index_M - (last_ZL - num_ZL.ravel())[cell_M]
    size_M = size_Z1[cell_M // num_layers, 0]
    begin_M = group_begin_L[layer_M] + before_ZL.ravel()[cell_M] + nth_M * size_M
    end_M = jnp.minimum(begin_M + size_M, (group_begin_L + count_L)[layer_M])
    first_of_size = jnp.concatenate([jnp.zeros(1, jnp.int32), last_ZL.reshape(len(sizes), -1)[:, -1]])
    return Segments(layer_M, begin_M, end_M, first_of_size, sizes)


@jax.custom_vjp
def permute(x_IX: jax.Array, source_J: jax.Array, target_I: jax.Array) -> jax.Array:
    """Row j of the result is x[source[j]], or zeros where source[j] is out of range.

    Args:
        target_I: the inverse: x[i] becomes row target[i], or none where that is out of range.
    """
    return jnp.take(x_IX, source_J, axis=0, mode="fill", fill_value=0)


def _permute_forward(x_IX, source_J, target_I):
    return permute(x_IX, source_J, target_I), (source_J, target_I)


def _permute_backward(residuals, grad_JX):
    # A partial permutation: its transpose is the gather by the inverse, where autodiff would scatter and add.
    source_J, target_I = residuals
    return permute(grad_JX, target_I, source_J), None, None


permute.defvjp(_permute_forward, _permute_backward)


def scatter(x_NX: jax.Array, groups: Groups) -> jax.Array:
    """Rows sorted by layer; zeros past the executing ones."""
    return permute(x_NX, groups.row_N, groups.slot_N)


def gather(x_NX: jax.Array, groups: Groups) -> jax.Array:
    """Rows back in their order; zeros for rows that execute nothing."""
    return permute(x_NX, groups.slot_N, groups.row_N)


# product(name, x_PX, keep=True): rows times the matrix `name` of their layer, [P, Y]. With keep=False the result is not
# kept for the gradient; right where nothing that follows needs its value for one, as after the last product of a layer.
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
    outputs, kept = map_forward(function, weights, rows, groups, fixed)
    return outputs, (weights, rows, groups, fixed, kept)


def _map_rows_backward(function, residuals, d_outputs):
    weights, rows, groups, fixed, kept = residuals
    zeros = jax.tree.map(jnp.zeros_like, weights)
    d_weights, d_rows = map_backward(function, weights, rows, groups, fixed, kept, d_outputs, zeros)
    return d_weights, d_rows, None, None


_map_rows.defvjp(_map_rows_forward, _map_rows_backward)


def map_forward(function: RowFunction, weights: dict, rows: tuple, groups: Groups, fixed: tuple = ()):
    """`map_rows`, and what its products gave, by name, for `map_backward`."""
    if groups.backend == "block_loop":
        return _loop_forward(function, weights, rows, groups, fixed)
    rows = _zero_idle(rows, groups)
    kept = {}

    def product(name, x_NX, keep=True):
        y_NY = _grouped_product(x_NX, weights[name].astype(x_NX.dtype), groups)
        if keep:
            kept[name] = y_NY
        return y_NY

    outputs = function(_vectors_by_row(weights, groups), (*rows, *fixed), product)
    return _zero_idle(outputs, groups), kept


def map_backward(
    function: RowFunction, weights: dict, rows: tuple, groups: Groups, fixed: tuple, kept: dict, d_outputs, d_weights
):
    """The gradients of `map_rows`: those of the weights added to `d_weights`, and those of the rows.

    Only norms and activations are computed again; the products come from `kept`.
    """
    if groups.backend == "block_loop":
        return _loop_backward(function, weights, rows, groups, fixed, kept, d_outputs, d_weights)
    rows = _zero_idle(rows, groups)
    matrices = {name: weight for name, weight in weights.items() if weight.ndim == 3}
    transpose = _replayed(
        function, rows, fixed, kept, matrices, lambda dy, w: _grouped_product(dy, w.swapaxes(1, 2), groups)
    )
    vectors_N, to_layers = jax.vjp(lambda weights: _vectors_by_row(weights, groups), _vectors(weights))
    d_vectors_N, d_rows, pairs = transpose(vectors_N, _zero_idle(d_outputs, groups))
    grads = {name: _grouped_outer(x, dy, groups) for name, (x, dy) in pairs.items()}
    grads |= to_layers(d_vectors_N)[0]
    d_weights = {name: total + grads[name].astype(total.dtype) for name, total in d_weights.items()}
    return d_weights, _zero_idle(d_rows, groups)


def _vectors(weights):
    return {name: weight for name, weight in weights.items() if weight.ndim == 2}


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


def _rows_of(segments: Segments, index, size: int, num_rows: int):
    """Where a segment's slice of `size` rows starts, and which of its rows [P, 1] are the segment's."""
    start = jnp.minimum(segments.begin_M[index], num_rows - size)
    row_P1 = start + jnp.arange(size, dtype=jnp.int32)[:, None]
    return start, (row_P1 >= segments.begin_M[index]) & (row_P1 < segments.end_M[index])


def _read(tree, start, size):
    return jax.tree.map(lambda x_NX: jax.lax.dynamic_slice_in_dim(x_NX, start, size), tree)


def _write(tree, parts, start, size, is_own_P1):
    """The parts into their place; what lies beyond the segment stays."""

    def one(x_NX, part_PX):
        old_PX = jax.lax.dynamic_slice_in_dim(x_NX, start, size)
        return jax.lax.dynamic_update_slice_in_dim(x_NX, jnp.where(is_own_P1, part_PX, old_PX), start, 0)

    return jax.tree.map(one, tree, parts)


def _layer(weights, layer):
    """The weights of one layer; vectors as [1, X]."""
    return {name: weight[layer] if weight.ndim == 3 else weight[layer][None] for name, weight in weights.items()}


def _loop_forward(function, weights, rows, groups, fixed):
    segments, num_rows = groups.segments, rows[0].shape[0]

    def compute(w, rows):
        kept = {}

        def product(name, x_PX, keep=True):
            y_PY = x_PX @ w[name].astype(x_PX.dtype)
            if keep:
                kept[name] = y_PY
            return y_PY

        return function(_vectors_only(w, weights), rows, product), kept

    shapes = jax.eval_shape(compute, _layer(weights, 0), (*rows, *fixed))
    results = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    for which, size in enumerate(segments.sizes):

        def body(index, results, size=size):
            start, is_own_P1 = _rows_of(segments, index, size, num_rows)
            parts = compute(_layer(weights, segments.layer_M[index]), _read((*rows, *fixed), start, size))
            return _write(results, parts, start, size, is_own_P1)

        begin, end = segments.first_of_size[which], segments.first_of_size[which + 1]
        results = jax.lax.fori_loop(begin, end, body, results)
    return results


def _vectors_only(w, weights):
    return {name: w[name] for name, weight in weights.items() if weight.ndim == 2}


def _loop_backward(function, weights, rows, groups, fixed, kept, d_outputs, d_weights):
    # By hand: autodiff of a loop that indexes the weights would add a whole dW of all layers for every segment, and
    # can't go backwards through a dynamic number of them at all. Here dW of a segment's layer is updated in place.
    segments, num_rows = groups.segments, rows[0].shape[0]
    carried = d_weights, jax.tree.map(jnp.zeros_like, rows)
    for which, size in enumerate(segments.sizes):

        def body(index, carried, size=size):
            d_weights, d_rows = carried
            start, is_own_P1 = _rows_of(segments, index, size, num_rows)
            layer = segments.layer_M[index]
            w = _layer(weights, layer)
            matrices = {name: w[name] for name, weight in weights.items() if weight.ndim == 3}
            fixed_P, kept_P = _read((fixed, kept), start, size)
            # Rows of other segments give no gradient.
            rows_P, d_outputs_P = jax.tree.map(
                lambda x_PX: jnp.where(is_own_P1, x_PX, 0), _read((rows, d_outputs), start, size)
            )
            transpose = _replayed(function, rows_P, fixed_P, kept_P, matrices, lambda dy, w: dy @ w.T)
            d_vectors, d_rows_P, pairs = transpose(_vectors_only(w, weights), d_outputs_P)
            parts = {name: grad[0] for name, grad in d_vectors.items()}
            for name, (x_PX, dy_PY) in pairs.items():
                parts[name] = jnp.matmul(x_PX.T, dy_PY, preferred_element_type=d_weights[name].dtype)
            d_weights = {
                name: total.at[layer].add(parts[name].astype(total.dtype)) for name, total in d_weights.items()
            }
            return d_weights, _write(d_rows, d_rows_P, start, size, is_own_P1)

        begin, end = segments.first_of_size[which], segments.first_of_size[which + 1]
        carried = jax.lax.fori_loop(begin, end, body, carried)
    return carried


# All rows at once: ragged_dot and the reference


def _layer_of_row(groups: Groups) -> jax.Array:
    """The layer of each sorted row; L past the executing ones."""
    place_N = jnp.arange(groups.row_N.shape[0])
    return jnp.searchsorted(jnp.cumsum(groups.count_L), place_N, side="right")


def _vectors_by_row(weights, groups):
    """The weights that are no matrices, of each row's layer: [N, X]."""
    layer_N = _layer_of_row(groups)
    return {name: jnp.take(vector, layer_N, axis=0, mode="clip") for name, vector in _vectors(weights).items()}


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


_BY_LAYER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _grouped_outer(x_NX, dy_NY, groups):
    """The gradient of each layer's matrix, [L, X, Y]: the sum of x · dy over its rows, in fp32."""
    if groups.backend == "ragged_dot":
        fp32 = jnp.float32
        return jax.lax.ragged_dot_general(x_NX, dy_NY, groups.count_L, _BY_LAYER, preferred_element_type=fp32)
    one_hot_NL = jax.nn.one_hot(_layer_of_row(groups), groups.count_L.shape[0], dtype=x_NX.dtype)
    x_LNX = jnp.einsum("NX,NL->LNX", x_NX, one_hot_NL)
    return jnp.einsum("LNX,NY->LXY", x_LNX, dy_NY, preferred_element_type=jnp.float32)
