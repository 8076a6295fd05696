"""The backend `block_loop` of `grouped`: a loop over the segments of rows of one layer, forwards and backwards."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from radialnet.grouping import Segments
from radialnet.row_function import compute, layer_of, replayed


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


def _through(function, weights, layer, rows_P: tuple):
    """Rows of one layer through it.

    From stacks of a single layer each, its weights are read where they lie. A slice of the stack is copied first, which
    takes several times as long as the product of a single row itself.
    """
    if isinstance(weights, tuple):
        return jax.lax.switch(layer, [partial(compute, function, layer_of(one, 0)) for one in weights], rows_P)
    return compute(function, layer_of(weights, layer), rows_P)


def forward(function, weights, rows, groups, fixed, kept, t):
    segments, num_rows = groups.segments, rows[0].shape[0]
    shapes = jax.eval_shape(partial(_through, function, weights, 0), (*rows, *fixed))[0]
    outputs = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    for which, size in enumerate(segments.sizes):

        def body(index, results, size=size):
            outputs, kept = results
            at = _rows_of(segments, index, size, num_rows)
            parts, given = _through(function, weights, segments.layer_M[index], _read((*rows, *fixed), at))
            outputs = jax.tree.map(lambda x_NX, part_PX: _write(x_NX, part_PX, at), outputs, parts)
            return outputs, {name: _write(all_steps, given[name], at, t) for name, all_steps in kept.items()}

        begin, end = segments.first_of_size[which], segments.first_of_size[which + 1]
        outputs, kept = jax.lax.fori_loop(begin, end, body, (outputs, kept))
    return outputs, kept


def backward(function, weights, rows, groups, fixed, kept, t, d_outputs, d_weights):
    # By hand: autodiff of a loop that indexes the weights would add a whole dW of all layers for every segment, and
    # can't go backwards through a dynamic number of them at all. Here dW of a segment's layer is updated in place.
    segments, num_rows = groups.segments, rows[0].shape[0]
    carried = d_weights, jax.tree.map(jnp.zeros_like, rows)
    for which, size in enumerate(segments.sizes):

        def body(index, carried, size=size):
            d_weights, d_rows = carried
            at = _rows_of(segments, index, size, num_rows)
            layer = segments.layer_M[index]
            vectors, matrices = layer_of(weights, layer)
            # Rows of other segments give no gradient.
            rows_P, d_outputs_P = jax.tree.map(
                lambda x_PX: jnp.where(at.is_own_P1, x_PX, 0), _read((rows, d_outputs), at)
            )
            kept_P = {name: _read_step(all_steps, at, t) for name, all_steps in kept.items()}
            transpose = replayed(function, rows_P, _read(fixed, at), kept_P, matrices, lambda dy, w: dy @ w.T)
            d_vectors, d_rows_P, pairs = transpose(vectors, d_outputs_P)
            parts = {name: grad[0] for name, grad in d_vectors.items()}
            for name, (x_PX, dy_PY) in pairs.items():
                parts[name] = jnp.matmul(x_PX.T, dy_PY, preferred_element_type=d_weights[name].dtype)
            d_weights = {name: total.at[layer].add(parts[name]) for name, total in d_weights.items()}
            return d_weights, jax.tree.map(lambda x_NX, part_PX: _write(x_NX, part_PX, at), d_rows, d_rows_P)

        begin, end = segments.first_of_size[which], segments.first_of_size[which + 1]
        carried = jax.lax.fori_loop(begin, end, body, carried)
    return carried
