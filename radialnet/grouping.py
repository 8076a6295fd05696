"""Rows sorted by the layer that they go through, and cut into segments.

    groups = plan(layer_N, num_layers)
    x_ND   = scatter(x_ND, groups)          rows of one layer side by side, those that execute nothing last
    y_ND   = gather(x_ND, groups)           back in their order; zeros for the rows that execute nothing

A segment is a run of rows of one layer. Its size is one of a few (`segment_sizes`), so that programs are static while
group lengths are not: a group is cut into large segments and smaller ones for the rest. No row is stored as padding:
where a segment reaches beyond its group, what is computed there is not written.
"""

import itertools

import flax.struct
import jax
import jax.numpy as jnp

from radialnet.sections import GROUPED_BACKENDS

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
        """Rows that the backend puts through products, for nothing or not."""
        if self.backend in ("block_loop", "pallas"):
            return (jnp.diff(self.segments.first_of_size) * jnp.asarray(self.segments.sizes)).sum()
        if self.backend == "ragged_dot":
            return self.count_L.sum()
        return jnp.int32(self.row_N.shape[0] * self.count_L.shape[0])


def segment_sizes(num_rows: int, num_at_once: int) -> tuple[int, ...]:
    """Sizes that segments may have: from four average groups down, for loads are uneven, halving, six at most."""
    size = SMALLEST
    while size < LARGEST and size * num_at_once <= 2 * num_rows:
        size *= 2
    # A segment is read as a slice, which must fit among the rows.
    return tuple(sorted({min(max(size >> n, SMALLEST), num_rows) for n in range(6)}, reverse=True))


def kernel_segment_size(num_rows: int, num_at_once: int) -> int:
    """The one size of segments that GPU kernels take: a power of two, about an average group, 16 at least."""
    size = 16
    while size < 128 and 2 * size * num_at_once <= num_rows:
        size *= 2
    return size


def plan(
    layer_N: jax.Array,
    num_layers: int,
    backend: str = "block_loop",
    sizes: tuple[int, ...] | None = None,
    num_at_once: int | None = None,
) -> Groups:
    """Sort rows by layer and cut each layer's rows into segments.

    Args:
        layer_N: the layer of each row, 0…L-1; L for a row that executes nothing.
        num_layers: L.
        backend: one of GROUPED_BACKENDS.
        sizes: of the segments, falling; `segment_sizes` by default. Kernels take one, `kernel_segment_size`.
        num_at_once: among how many of the layers the rows are spread; all by default.
    """
    if backend not in GROUPED_BACKENDS:
        raise ValueError(f"backend={backend!r}: one of {GROUPED_BACKENDS} is needed")
    num_rows = layer_N.shape[0]
    num_at_once = num_at_once or num_layers
    sizes = sizes or segment_sizes(num_rows, num_at_once)
    if backend == "pallas":
        sizes = (kernel_segment_size(num_rows, num_at_once),)
    order_N = jnp.argsort(layer_N, stable=True).astype(jnp.int32)
    count_L = jnp.bincount(layer_N, length=num_layers + 1)[:num_layers].astype(jnp.int32)
    place_N = jnp.arange(num_rows, dtype=jnp.int32)
    executes_N = place_N < count_L.sum()
    slot_N = jnp.zeros(num_rows, jnp.int32).at[order_N].set(jnp.where(executes_N, place_N, num_rows))
    return Groups(
        slot_N=slot_N,
        row_N=jnp.where(executes_N, order_N, num_rows),
        count_L=count_L,
        segments=_cut(count_L, num_rows, sizes),
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
    cell_M = jnp.searchsorted(last_ZL, index_M, side="right", method="compare_all")
    cell_M = jnp.minimum(cell_M, last_ZL.shape[0] - 1)
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
