"""Which queries see which entries of the unified cache, and in which tiles of queries × entries anybody does."""

import flax.struct
import jax
import jax.numpy as jnp

# The score of a pair that doesn't see. Finite, so that a query which sees nothing gives zeros and not NaN.
NEG_INF = -1e30


@flax.struct.dataclass
class Visibility:
    """Which of C entry slots each of Q queries sees: those of the tokens first…last of its row of the batch.

    A token is named by its index in the row. One interval says it all: a token sees itself and those before it, back to
    the beginning of its document. A query that is none has last < first; an empty slot has token -1.
    """

    first_BQ: jax.Array
    last_BQ: jax.Array
    token_BC: jax.Array
    # In the view `same_layer`: the layers that queries and entries must have in common.
    layer_BQ: jax.Array | None = None
    layer_BC: jax.Array | None = None

    def mask(self) -> jax.Array:
        """[B, Q, C], whole in memory: for references and tests."""
        return sees(*self.columns_and_rows())

    def columns_and_rows(self):
        """Its arrays as [B, Q, 1] and [B, 1, C]; `sees` takes them, or parts of them."""
        first_BQ1, last_BQ1, layer_BQ1 = (
            None if x_BQ is None else x_BQ[:, :, None] for x_BQ in (self.first_BQ, self.last_BQ, self.layer_BQ)
        )
        token_B1C, layer_B1C = (None if x_BC is None else x_BC[:, None] for x_BC in (self.token_BC, self.layer_BC))
        return first_BQ1, last_BQ1, token_B1C, layer_BQ1, layer_B1C

    def tiles_that_meet(self, num_queries: int, num_entries: int) -> jax.Array:
        """Tiles in which somebody may see something, [B, I, J]: I of `num_queries` queries, J of `num_entries` entries.

        By the ranges of tokens, and of layers, in a tile: one of several documents or steps may turn out to hold no
        visible pair.
        """
        is_query_BQ, is_entry_BC = self.first_BQ <= self.last_BQ, self.token_BC >= 0

        def overlap(first_BQ, last_BQ, of_entry_BC):
            first_BI, last_BI = _ranges(first_BQ, last_BQ, is_query_BQ, num_queries)
            lowest_BJ, highest_BJ = _ranges(of_entry_BC, of_entry_BC, is_entry_BC, num_entries)
            return (lowest_BJ[:, None] <= last_BI[..., None]) & (highest_BJ[:, None] >= first_BI[..., None])

        meet_BIJ = overlap(self.first_BQ, self.last_BQ, self.token_BC)
        if self.layer_BQ is not None:
            meet_BIJ &= overlap(self.layer_BQ, self.layer_BQ, self.layer_BC)
        return meet_BIJ

    def tiles_that_see_all(self, num_queries: int, num_entries: int) -> jax.Array:
        """Tiles in which every query sees every entry, [B, I, J], so that nobody has to ask. Layers are not looked at:
        where they matter there is none."""
        latest_first_BI = _tiled(self.first_BQ, num_queries, 0).max(-1)
        earliest_last_BI = _tiled(self.last_BQ, num_queries, -1).min(-1)
        token_BJC = _tiled(self.token_BC, num_entries, -1)
        sees_lowest_BIJ = latest_first_BI[..., None] <= token_BJC.min(-1)[:, None]
        sees_highest_BIJ = token_BJC.max(-1)[:, None] <= earliest_last_BI[..., None]
        return sees_lowest_BIJ & sees_highest_BIJ & (self.layer_BQ is None)


def _ranges(low_BX, high_BX, is_there_BX, size: int) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest of each tile of X, [B, I] each; of a tile with nothing in it, none between them."""

    def of_tile(x_BX, empty):
        return _tiled(jnp.where(is_there_BX, x_BX, empty), size, empty)

    return of_tile(low_BX, jnp.iinfo(jnp.int32).max).min(-1), of_tile(high_BX, -1).max(-1)


def _tiled(x_BX, size, empty):
    """[B, I, size], what is missing in the last tile filled up."""
    padding = -x_BX.shape[1] % size
    return jnp.pad(x_BX, ((0, 0), (0, padding)), constant_values=empty).reshape(len(x_BX), -1, size)


def sees(first_Q1, last_Q1, token_1C, layer_Q1, layer_1C):
    """`Visibility.mask` of a part of it: columns of queries and rows of entries."""
    seen = (first_Q1 <= token_1C) & (token_1C <= last_Q1)
    return seen if layer_Q1 is None else seen & (layer_Q1 == layer_1C)
