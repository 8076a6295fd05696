"""The unified cache in training: keys and values of all layers and depth steps, and the views of them.

An entry is (position j, step s, k, v), written when token j executes step s. The query of token i at step t sees it iff

    j <= i   and   s <= t   and   token j executed step s   and   j, i lie in the same document

and the view (`config.VIEWS`) leaves out some of those. In training all tokens of a step write before any of them reads,
and a step reads before the next one writes, so `s <= t` holds by construction.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Entries:
    """One entry slot per token: what the tokens of a row wrote at one step, or the newest of several steps."""

    k_BSGK: jax.Array
    v_BSGK: jax.Array
    is_filled_BS: jax.Array
    layer_BS: jax.Array  # The layer that wrote the entry.


@flax.struct.dataclass
class UnifiedCache:
    """All entries that the view will ever look at; `append` and `look` alternate. C = S · len(entries)."""

    may_see_BSS: jax.Array  # Query, key: causal, same document.
    entries: tuple[Entries, ...] = ()
    num_steps: int = flax.struct.field(pytree_node=False, default=0)
    view: str = flax.struct.field(pytree_node=False, default="all")

    @classmethod
    def empty(cls, document_BS: jax.Array, view: str) -> "UnifiedCache":
        """A cache for rows of packed documents. Tokens of negative document id are padding: nobody sees them."""
        same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
        causal_SS = jnp.tril(jnp.ones(same_BSS.shape[1:], bool))
        return cls(may_see_BSS=same_BSS & causal_SS & (document_BS >= 0)[:, None, :], view=view)

    def append(self, k_BSGK: jax.Array, v_BSGK: jax.Array, executes_BS: jax.Array, layer_BS: jax.Array):
        """The cache after the executing tokens have written their entries of the next step."""
        new = Entries(k_BSGK, v_BSGK, executes_BS, layer_BS)
        if self.view == "first" and self.num_steps > 0:
            entries = self.entries
        elif self.view == "latest" and self.num_steps > 0:
            entries = (_newest(self.entries[0], new),)
        elif self.view in ("first", "latest", "same_step"):
            entries = (new,)
        else:
            entries = (*self.entries, new)
        return self.replace(entries=entries, num_steps=self.num_steps + 1)

    def look(self, layer_BS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What queries of the step written last see: keys, values [B, C, G, K], visible [B, S, C].

        Args:
            layer_BS: the layer of each query (the view `same_layer` needs it).
        """
        visible = [self.may_see_BSS & entry.is_filled_BS[:, None, :] for entry in self.entries]
        if self.view == "same_layer":
            wrote = [layer_BS[:, :, None] == entry.layer_BS[:, None, :] for entry in self.entries]
            visible = [mask & by for mask, by in zip(visible, wrote, strict=True)]
        keys = jnp.concatenate([entry.k_BSGK for entry in self.entries], axis=1)
        values = jnp.concatenate([entry.v_BSGK for entry in self.entries], axis=1)
        return keys, values, jnp.concatenate(visible, axis=2)

    def own_slots(self) -> jax.Array:
        """[S, C]: the slot that holds each token's own entry of the step written last, if the view looks at it."""
        seq = self.may_see_BSS.shape[1]
        own_SC = jnp.eye(seq, seq * len(self.entries), k=seq * (len(self.entries) - 1), dtype=bool)
        return own_SC if self.view != "first" or self.num_steps == 1 else jnp.zeros_like(own_SC)


def _newest(old: Entries, new: Entries) -> Entries:
    """Per token the new entry where it wrote one, else the old."""

    def pick(new_BSX, old_BSX):
        wrote = new.is_filled_BS.reshape(new.is_filled_BS.shape + (1,) * (new_BSX.ndim - 2))
        return jnp.where(wrote, new_BSX, old_BSX)

    return jax.tree.map(pick, new, old).replace(is_filled_BS=new.is_filled_BS | old.is_filled_BS)
