"""Rows grouped by layer: plan, scatter, grouped matmul, gather. The products cost what the executing rows do.

Each row (a token at one depth step) goes through the weights of one layer. The rows are sorted by layer and every
layer's group is padded to whole blocks, so that a block meets the weights of one layer only:

    groups = plan(layer_N, num_layers, block_size(N, num_layers))
    x_MPD  = scatter(x_ND, groups)              M blocks of P rows; only the first groups.num_blocks hold rows
    y_MPF  = matmul(x_MPD, w_LDF, groups)
    y_NF   = gather(y_MPF, groups)              zeros for the rows that execute nothing

`matmul` has one function per backend, all with the same results and gradients:
  block_loop    a loop over the blocks that hold rows. Runs anywhere; what CPUs use.
  masked_dense  every block through every layer, masked: L times the work. The reference.
A faster backend for another platform is one more function beside these two and one more line in `matmul`.

(`jax.lax.ragged_dot` is no such backend on CPU and GPU: it is a masked dense product there.)
"""

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

    def per_block(self, values_LX: jax.Array) -> jax.Array:
        """A vector of each layer, such as a norm's scale, laid out for its blocks: [M, 1, X]."""
        return values_LX[self.layer_M][:, None]


def block_size(num_rows: int, num_layers: int) -> int:
    """Rows per block: a power of two of at most an average group, so that padding stays below the rows themselves.

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


def matmul(x_MPD: jax.Array, w_LDF: jax.Array, groups: Groups) -> jax.Array:
    """Each block times the weights of its layer, in the dtype of x: [M, P, F]. Blocks without rows give zeros.

    The weights may be of a higher precision than x: they are cast a layer at a time, and their gradient is summed
    over the blocks in their own precision.
    """
    if groups.backend == "masked_dense":
        return _masked_dense(x_MPD, w_LDF, groups.layer_M, groups.num_blocks)
    return _block_loop(x_MPD, w_LDF, groups.layer_M, groups.num_blocks)


def _masked_dense(x_MPD, w_LDF, layer_M, num_blocks):
    is_layer_ML = (layer_M[:, None] == jnp.arange(w_LDF.shape[0])) & (jnp.arange(layer_M.shape[0]) < num_blocks)[
        :, None
    ]
    y_LMPF = jnp.einsum("MPD,LDF->LMPF", x_MPD, w_LDF.astype(x_MPD.dtype))
    return jnp.einsum("LMPF,ML->MPF", y_LMPF, is_layer_ML.astype(x_MPD.dtype))


@jax.custom_vjp
def _block_loop(x_MPD, w_LDF, layer_M, num_blocks):
    def multiply(block, y_MPF):
        return y_MPF.at[block].set(x_MPD[block] @ w_LDF[layer_M[block]].astype(x_MPD.dtype))

    y_MPF = jnp.zeros((*x_MPD.shape[:2], w_LDF.shape[-1]), x_MPD.dtype)
    return jax.lax.fori_loop(0, num_blocks, multiply, y_MPF)


def _block_loop_forward(x_MPD, w_LDF, layer_M, num_blocks):
    return _block_loop(x_MPD, w_LDF, layer_M, num_blocks), (x_MPD, w_LDF, layer_M, num_blocks)


def _block_loop_backward(residuals, dy_MPF):
    # By hand: autodiff of a loop that indexes the weights would add a whole dW of all layers for every block, and
    # can't go backwards through a dynamic number of blocks at all. Here dW of one layer is updated in place.
    x_MPD, w_LDF, layer_M, num_blocks = residuals

    def accumulate(block, grads):
        dx_MPD, dw_LDF = grads
        layer, dy_PF = layer_M[block], dy_MPF[block]
        dx_MPD = dx_MPD.at[block].set(dy_PF @ w_LDF[layer].astype(dy_PF.dtype).T)
        dw_DF = jnp.matmul(x_MPD[block].T, dy_PF, preferred_element_type=dw_LDF.dtype)
        return dx_MPD, dw_LDF.at[layer].add(dw_DF)

    zeros = jnp.zeros_like(x_MPD), jnp.zeros_like(w_LDF)
    dx_MPD, dw_LDF = jax.lax.fori_loop(0, num_blocks, accumulate, zeros)
    return dx_MPD, dw_LDF, None, None


_block_loop.defvjp(_block_loop_forward, _block_loop_backward)
