"""The unified cache in training: keys and values of all layers and depth steps, and the views of them.

An entry is (position j, step s, k, v), written when token j executes step s. The query of token i at step t sees it iff

    j <= i   and   s <= t   and   token j executed step s   and   j, i lie in the same document

and the view (`config.VIEWS`) leaves out some of those. In training all tokens of a step write before any of them reads,
and a step reads before the next one writes, so `s <= t` holds by construction.

Entries are packed: a row's executing tokens lie side by side (`Packing`), step after step, with no gaps for tokens that
did not execute. Only what the view will look at is kept: S slots a row, or T·S in the views of all steps. A slot that
was written never changes in the views that append, so that the cache at any step is a part of the final one.
"""

import flax.struct
import jax
import jax.numpy as jnp

from radialnet.visibility import Visibility

APPENDING = ("all", "same_layer")


@flax.struct.dataclass
class Packing:
    """Where the executing tokens of one step lie when each row of the batch is packed. N = B·S."""

    token_BS: jax.Array  # The token, by its index in the row, at each packed place; -1 past the executing ones.
    source_N: jax.Array  # The same as an index among all N tokens; N past the executing ones.
    place_N: jax.Array  # The inverse: the packed place of each token; N for those that execute nothing.
    num_B: jax.Array

    @classmethod
    def of(cls, executes_BS: jax.Array) -> "Packing":
        batch, seq = executes_BS.shape
        num_tokens = batch * seq
        order_BS = jnp.argsort(~executes_BS, axis=1, stable=True).astype(jnp.int32)
        num_B = executes_BS.sum(1, dtype=jnp.int32)
        token_BS = jnp.where(jnp.arange(seq) < num_B[:, None], order_BS, -1)
        row_B1 = seq * jnp.arange(batch, dtype=jnp.int32)[:, None]
        rank_BS = jnp.cumsum(executes_BS, axis=1, dtype=jnp.int32) - 1
        return cls(
            token_BS=token_BS,
            source_N=jnp.where(token_BS >= 0, row_B1 + token_BS, num_tokens).ravel(),
            place_N=jnp.where(executes_BS, row_B1 + rank_BS, num_tokens).ravel(),
            num_B=num_B,
        )


@flax.struct.dataclass
class UnifiedCache:
    """All entries that the view will ever look at. C slots a row."""

    k_BCGK: jax.Array
    v_BCGK: jax.Array
    token_BC: jax.Array  # The token that wrote each slot, by its index in the row; -1 in empty slots.
    layer_BC: jax.Array  # The layer that wrote it.
    num_B: jax.Array  # Filled slots of the views that append.
    view: str = flax.struct.field(pytree_node=False)

    @classmethod
    def empty(cls, view: str, max_depth: int, batch: int, seq: int, kv_heads: int, head_size: int, dtype):
        slots = seq * max_depth if view in APPENDING else seq
        zeros_BCGK = jnp.zeros((batch, slots, kv_heads, head_size), dtype)
        return cls(
            k_BCGK=zeros_BCGK,
            v_BCGK=zeros_BCGK,
            token_BC=jnp.full((batch, slots), -1, jnp.int32),
            layer_BC=jnp.full((batch, slots), -1, jnp.int32),
            num_B=jnp.zeros(batch, jnp.int32),
            view=view,
        )

    @property
    def is_packed(self) -> bool:
        """Whether `append` takes packed entries, or those of all tokens in their order."""
        return self.view != "latest"

    def append(
        self, k_BSGK: jax.Array, v_BSGK: jax.Array, layer_BS: jax.Array, packing: Packing, depth_step: jax.Array
    ) -> "UnifiedCache":
        """The cache after the executing tokens have written their entries of a step.

        Args:
            k_BSGK, v_BSGK, layer_BS: packed, or in the tokens' order (`is_packed`).
        """
        if not self.is_packed:
            wrote_BS = (packing.place_N < packing.place_N.shape[0]).reshape(layer_BS.shape)
            index_BS = jnp.broadcast_to(jnp.arange(layer_BS.shape[1], dtype=jnp.int32), layer_BS.shape)
            new = k_BSGK, v_BSGK, index_BS, layer_BS
            return self._replaced(jax.tree.map(lambda new, old: _where(wrote_BS, new, old), new, self._slots()))
        new = k_BSGK, v_BSGK, packing.token_BS, layer_BS
        if self.view == "same_step":
            return self._replaced(new)
        if self.view == "first":
            is_first = depth_step == 0
            return self._replaced(jax.tree.map(lambda new, old: jnp.where(is_first, new, old), new, self._slots()))
        # What lies past the executing tokens goes in too, and the next step writes over it.
        written = jax.tree.map(lambda old, new: _write_rows(old, new, self.num_B), self._slots(), new)
        return self._replaced(written).replace(num_B=self.num_B + packing.num_B)

    def appended_gradient(
        self, d_k_BCGK: jax.Array, d_v_BCGK: jax.Array, packing: Packing, depth_step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """Backwards through `append`, of which `self` is the result.

        Returns:
            The gradients of the entries that were appended (of places past the executing tokens they mean nothing),
            and those of keys and values of the cache before.
        """
        grads = d_k_BCGK, d_v_BCGK
        if self.view == "latest":
            wrote_BS = (packing.place_N < packing.place_N.shape[0]).reshape(self.token_BC.shape)
            return grads, tuple(_where(wrote_BS, jnp.zeros_like(grad), grad) for grad in grads)
        if self.view == "same_step":
            return grads, tuple(jnp.zeros_like(grad) for grad in grads)
        if self.view == "first":
            is_first = depth_step == 0
            return tuple(jnp.where(is_first, grad, 0) for grad in grads), grads
        seq = packing.token_BS.shape[1]
        return tuple(_read_rows(grad, self.num_B - packing.num_B, seq) for grad in grads), grads

    def varying(self):
        """What has to be kept of every step so that `at_step` can give the cache of that step back."""
        if self.view in (*APPENDING, "first"):
            return self.num_B
        return self._slots()

    def at_step(self, varying) -> "UnifiedCache":
        """The cache as it was when `varying` was taken; `self` is a later one."""
        if self.view == "first":
            return self
        if self.view in APPENDING:
            return self.replace(num_B=varying)
        return self._replaced(varying)

    def visibility(self, document_start_BS: jax.Array, layer_BS: jax.Array, packing: Packing) -> Visibility:
        """Who sees what: packed queries of the step written last, and the slots.

        Args:
            document_start_BS: the index of the first token of each token's document.
            layer_BS: the layer of each packed query.
        """
        is_query_BS = packing.token_BS >= 0
        token_BC = self.token_BC
        if self.view in APPENDING:
            token_BC = jnp.where(jnp.arange(token_BC.shape[1]) < self.num_B[:, None], token_BC, -1)
        start_BS = jnp.take_along_axis(document_start_BS, jnp.maximum(packing.token_BS, 0), axis=1)
        by_layer = (layer_BS, self.layer_BC) if self.view == "same_layer" else (None, None)
        return Visibility(jnp.where(is_query_BS, start_BS, 0), packing.token_BS, token_BC, *by_layer)

    def _slots(self):
        return self.k_BCGK, self.v_BCGK, self.token_BC, self.layer_BC

    def _replaced(self, slots) -> "UnifiedCache":
        k_BCGK, v_BCGK, token_BC, layer_BC = slots
        return self.replace(k_BCGK=k_BCGK, v_BCGK=v_BCGK, token_BC=token_BC, layer_BC=layer_BC)


def document_starts(document_BS: jax.Array) -> jax.Array:
    """The index in the row of the first token of each token's document, [B, S]; documents are runs of equal ids."""
    index_BS = jnp.broadcast_to(jnp.arange(document_BS.shape[1], dtype=jnp.int32), document_BS.shape)
    begins_BS = jnp.pad(document_BS[:, 1:] != document_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins_BS, index_BS, 0), axis=1)


def _where(condition_BS, yes, no):
    return jnp.where(condition_BS.reshape(condition_BS.shape + (1,) * (yes.ndim - 2)), yes, no)


def _write_rows(x_BCX, new_BSX, start_B):
    """Each row's new part at its own place."""

    def write(row, x_BCX):
        at = (row, start_B[row], *(0 for _ in x_BCX.shape[2:]))
        return jax.lax.dynamic_update_slice(x_BCX, jax.lax.dynamic_slice_in_dim(new_BSX, row, 1), at)

    return jax.lax.fori_loop(0, x_BCX.shape[0], write, x_BCX)


def _read_rows(x_BCX, start_B, length):
    return jax.vmap(lambda x_CX, start: jax.lax.dynamic_slice_in_dim(x_CX, start, length))(x_BCX, start_B)
