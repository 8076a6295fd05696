"""Rows grouped by layer: plan, scatter, a function of each block with its layer's weights, gather.

Each row (a token at one depth step) goes through the weights of one layer. The rows are sorted by layer and every
layer's group is padded to whole blocks, so that a block meets the weights of one layer only:

    groups = plan(layer_N, num_layers, block_size(N, num_layers))
    x_MPD  = scatter(x_ND, groups)              M blocks of P rows; only the first groups.num_blocks hold rows
    y_MPF  = map_blocks(function, weights, (x_MPD,), groups)
    y_NF   = gather(y_MPF, groups)              zeros for the rows that execute nothing

`map_blocks` costs what the blocks that hold rows cost: products, norms and activations of the function alike. It has
one form per backend, all with the same results and gradients:
  block_loop    a loop over the blocks that hold rows. Runs anywhere; what CPUs use.
  masked_dense  every block through every layer, masked: L times the work. The reference.
A faster backend for another platform is one more form beside these two and one more line in `map_blocks`.

(`jax.lax.ragged_dot` is no such backend on CPU and GPU: it is a masked dense product there.)
"""

from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

BACKENDS = ("block_loop", "masked_dense")


@flax.struct.dataclass
class Groups:
    """Where each of N rows goes among M blocks of P rows. R = M·P, the padded rows."""

    slot_N: jax.Array  # Padded row of each row; R for the rows that execute nothing.
    row_R: jax.Array  # The inverse: the row in each padded row; N where it is padding.
    layer_M: jax.Array  # The layer of each block.
    num_blocks: jax.Array  # Blocks that hold rows; they are the first ones.
    backend: str = flax.struct.field(pytree_node=False)


def block_size(num_rows: int, num_layers: int) -> int:
    """Rows per block: a power of two of at most an average group, but 8 at least.

    Larger blocks than 128 rows don't make a CPU's matrix product any faster; smaller ones than 8 make it slow.
    """
    size = 8
    while size < 128 and 2 * size * num_layers <= num_rows:
        size *= 2
    return size


def plan(layer_N: jax.Array, num_layers: int, block: int, backend: str = "block_loop") -> Groups:
    """Sort rows by layer and pad each group to whole blocks.

    Args:
        layer_N: the layer of each row, 0…L-1; L for a row that executes nothing.
        num_layers: L.
        block: P, rows per block.
        backend: one of BACKENDS.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: one of {BACKENDS} is needed")
    num_rows = layer_N.shape[0]
    # Enough for any routing: whole blocks for all rows, and one begun block for each layer.
    max_blocks = num_rows // block + min(num_layers, num_rows)
    order_N = jnp.argsort(layer_N, stable=True).astype(jnp.int32)
    sorted_N = layer_N[order_N]
    count_L = jnp.bincount(layer_N, length=num_layers + 1)[:num_layers].astype(jnp.int32)
    blocks_L = -(-count_L // block)
    last_block_L = jnp.cumsum(blocks_L)
    # What to add to a sorted row's index to get its padded row. The idle rows come last, past all groups.
    shift_L = (last_block_L - blocks_L) * block - (jnp.cumsum(count_L) - count_L)
    padded_N = jnp.arange(num_rows, dtype=jnp.int32) + shift_L[jnp.minimum(sorted_N, num_layers - 1)]
    num_padded = max_blocks * block
    padded_N = jnp.where(sorted_N < num_layers, padded_N, num_padded)
    return Groups(
        slot_N=jnp.zeros(num_rows, jnp.int32).at[order_N].set(padded_N, unique_indices=True),
        row_R=jnp.full(num_padded, num_rows, jnp.int32).at[padded_N].set(order_N, mode="drop"),
        layer_M=jnp.minimum(
            jnp.searchsorted(last_block_L, jnp.arange(max_blocks), side="right"), num_layers - 1
        ).astype(jnp.int32),
        num_blocks=last_block_L[-1],
        backend=backend,
    )


@jax.custom_vjp
def _permute(x_IX: jax.Array, source_J: jax.Array, target_I: jax.Array) -> jax.Array:
    """Row j of the result is x[source[j]], or zeros where source[j] is out of range."""
    return jnp.take(x_IX, source_J, axis=0, mode="fill", fill_value=0)


def _permute_forward(x_IX, source_J, target_I):
    return _permute(x_IX, source_J, target_I), (source_J, target_I)


def _permute_backward(residuals, grad_JX):
    # A partial permutation: its transpose is the gather by the inverse, where autodiff would scatter and add.
    source_J, target_I = residuals
    return _permute(grad_JX, target_I, source_J), None, None


_permute.defvjp(_permute_forward, _permute_backward)


def scatter(x_NX: jax.Array, groups: Groups) -> jax.Array:
    """Rows to their places in the blocks, [M, P, X]; padding is zero."""
    x_RX = _permute(x_NX, groups.row_R, groups.slot_N)
    return x_RX.reshape(groups.layer_M.shape[0], -1, x_NX.shape[-1])


def gather(x_MPX: jax.Array, groups: Groups) -> jax.Array:
    """Rows back in their order, [N, X]; zeros for rows that execute nothing."""
    return _permute(x_MPX.reshape(-1, x_MPX.shape[-1]), groups.slot_N, groups.row_R)


# Weights of one layer and rows of one block, [P, X] each, to rows [P, Y].
BlockFunction = Callable[[dict[str, jax.Array], tuple[jax.Array, ...]], jax.Array]


def map_blocks(
    function: BlockFunction, weights: dict[str, jax.Array], rows: tuple[jax.Array, ...], groups: Groups
) -> jax.Array:
    """`function` of each block's rows and its layer's weights: [M, P, Y]. Blocks without rows give zeros.

    Args:
        function: closes over no traced array.
        weights: arrays stacked over the layers on the first axis.
        rows: arrays [M, P, X].

    The gradient of the weights is summed over the blocks in their own precision.
    """
    if groups.backend == "masked_dense":
        return _masked_dense(function, weights, rows, groups.layer_M, groups.num_blocks)
    return _block_loop(function, weights, rows, groups.layer_M, groups.num_blocks)


def _masked_dense(function, weights, rows, layer_M, num_blocks):
    num_layers = jax.tree.leaves(weights)[0].shape[0]
    over_blocks = jax.vmap(function, in_axes=(None, 0))
    y_LMPY = jax.vmap(over_blocks, in_axes=(0, None))(weights, rows)
    is_layer_ML = (layer_M[:, None] == jnp.arange(num_layers)) & (jnp.arange(len(layer_M)) < num_blocks)[:, None]
    return jnp.einsum("LMPY,ML->MPY", y_LMPY, is_layer_ML.astype(y_LMPY.dtype))


def _at(tree, index):
    return jax.tree.map(lambda array: array[index], tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_loop(function, weights, rows, layer_M, num_blocks):
    one = jax.eval_shape(function, _at(weights, 0), _at(rows, 0))

    def apply(block, y_MPY):
        return y_MPY.at[block].set(function(_at(weights, layer_M[block]), _at(rows, block)))

    return jax.lax.fori_loop(0, num_blocks, apply, jnp.zeros((len(layer_M), *one.shape), one.dtype))


def _block_loop_forward(function, weights, rows, layer_M, num_blocks):
    y_MPY = _block_loop(function, weights, rows, layer_M, num_blocks)
    return y_MPY, (weights, rows, layer_M, num_blocks)


def _block_loop_backward(function, residuals, dy_MPY):
    # By hand: autodiff of a loop that indexes the weights would add a whole dW of all layers for every block, and
    # can't go backwards through a dynamic number of blocks at all. Here a block is computed again, which is cheaper
    # than keeping what lies inside it for all padded rows, and dW of its layer is updated in place.
    weights, rows, layer_M, num_blocks = residuals

    def accumulate(block, grads):
        d_weights, d_rows = grads
        layer = layer_M[block]
        _, transpose = jax.vjp(function, _at(weights, layer), _at(rows, block))
        d_layer, d_block = transpose(dy_MPY[block])
        d_weights = jax.tree.map(lambda total, part: total.at[layer].add(part), d_weights, d_layer)
        d_rows = jax.tree.map(lambda all_rows, part: all_rows.at[block].set(part), d_rows, d_block)
        return d_weights, d_rows

    zeros = jax.tree.map(jnp.zeros_like, (weights, rows))
    d_weights, d_rows = jax.lax.fori_loop(0, num_blocks, accumulate, zeros)
    return d_weights, d_rows, None, None


_block_loop.defvjp(_block_loop_forward, _block_loop_backward)
