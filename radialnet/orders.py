"""The orders in which the tokens of a depth step lie.

Sorted by layer, as the halves of a layer compute them; packed by row of the batch, as queries of attention; and as the
cache takes entries, packed or all of them.
"""

import flax.struct
import jax
import jax.numpy as jnp

from radialnet.cache import Packing, UnifiedCache
from radialnet.exchange import Exchange
from radialnet.grouping import Groups, permute
from radialnet.visibility import Visibility


@flax.struct.dataclass
class Orders:
    """What to take where, to get from one order to another (`permute`).

    Attributes:
        sorted_to_packed, …: for each place of the second order its place in the first, [N]; N where nothing comes.
        query_layer_BS, entry_layer_BS: the layers of the tokens as queries lie, and as entries do.
    """

    groups: Groups
    packing: Packing
    sorted_to_packed: jax.Array
    packed_to_sorted: jax.Array
    sorted_to_entries: jax.Array
    entries_to_sorted: jax.Array
    query_layer_BS: jax.Array
    entry_layer_BS: jax.Array
    exchange: Exchange | None  # Where rows go to the devices that have their layers.

    @classmethod
    def of(
        cls,
        groups: Groups,
        layer_BS: jax.Array,
        packing: Packing,
        entries_are_packed: bool,
        exchange: Exchange | None,
    ) -> "Orders":
        """Those of one depth step.

        Args:
            groups: of the same layers.
            layer_BS: the layer of each token, 0…L-1; L for a token that executes nothing.
            entries_are_packed: whether the cache takes entries of executions alone (`UnifiedCache.is_packed`), or S a
                step.
        """
        none = len(groups.row_N)
        to_packed = jnp.take(groups.slot_N, packing.source_N, mode="fill", fill_value=none)
        from_packed = jnp.take(packing.place_N, groups.row_N, mode="fill", fill_value=none)
        to_entries, from_entries = (to_packed, from_packed) if entries_are_packed else (groups.slot_N, groups.row_N)
        packed_layer_BS = jnp.take_along_axis(layer_BS, jnp.maximum(packing.token_BS, 0), axis=1)
        entry_layer_BS = packed_layer_BS if entries_are_packed else layer_BS
        orders = to_packed, from_packed, to_entries, from_entries
        return cls(groups, packing, *orders, packed_layer_BS, entry_layer_BS, exchange)

    def append(self, cache: UnifiedCache, k_NX, v_NX, depth_step: jax.Array) -> UnifiedCache:
        """The cache with the entries of the step, from sorted keys and values."""
        shape = *self.entry_layer_BS.shape, *cache.k_BCGK.shape[2:]
        entries = (permute(x, self.sorted_to_entries, self.entries_to_sorted).reshape(shape) for x in (k_NX, v_NX))
        return cache.append(*entries, self.entry_layer_BS, self.packing, depth_step)

    def visibility(self, cache: UnifiedCache, document_start_BS: jax.Array) -> Visibility:
        """Which entries of the cache the step's queries see."""
        return cache.visibility(document_start_BS, self.query_layer_BS, self.packing)
