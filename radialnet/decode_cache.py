"""The unified cache of decoding: entries of all layers and steps, in pages that a row takes when it needs them.

An entry is written when a token executes a step, and never for a step that did not happen: the memory of a row is the
sum of its tokens' depths, rounded up to a page. Who sees what is the rule of training (`cache`), with one more case: an
earlier token has finished all its steps, so that entries of later steps than the query's own are there and hidden.

Steps are counted as stages here: a model's prelude layers, its depth steps and its coda layers, one after the other. A
prelude or coda layer sees what it wrote itself.

In the views that look at one entry of a token at most, `shown_RST` names it for every stage of a query, and the cost of
attention follows the tokens. In the views of all steps it follows the entries.
"""

import flax.struct
import jax
import jax.numpy as jnp

from radialnet.cache import APPENDING

# Tokens or entries that attention takes at a time.
BLOCK = 64


@flax.struct.dataclass
class Stages:
    """How the stages of a token are counted."""

    prelude: int = flax.struct.field(pytree_node=False)
    max_depth: int = flax.struct.field(pytree_node=False)
    coda: int = flax.struct.field(pytree_node=False)

    @property
    def first_coda(self) -> int:
        return self.prelude + self.max_depth

    @property
    def total(self) -> int:
        return self.first_coda + self.coda

    def is_routed(self, stage: jax.Array) -> jax.Array:
        return (stage >= self.prelude) & (stage < self.first_coda)


@flax.struct.dataclass
class DecodeCache:
    """Entries of R rows in P pages of A slots. M pages and S tokens a row at most; T stages."""

    k_PAGK: jax.Array
    v_PAGK: jax.Array
    page_RM: jax.Array  # The pages of each row, in the order in which they were filled.
    num_R: jax.Array  # Entries of each row.
    free_P: jax.Array  # A stack: pages that no row has.
    num_free: jax.Array
    first_R: jax.Array  # The first token of each row that is still there; others were given up for want of room.
    # Views that look at one entry of a token: the slot that a token shows to a query at each stage; -1 for none.
    shown_RST: jax.Array | None
    # Views of all steps: who wrote each slot, and as what.
    token_PA: jax.Array | None
    stage_PA: jax.Array | None
    layer_PA: jax.Array | None
    stages: Stages = flax.struct.field(pytree_node=False)
    view: str = flax.struct.field(pytree_node=False)

    @classmethod
    def empty(
        cls,
        view: str,
        stages: Stages,
        num_rows: int,
        max_tokens: int,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_size: int,
        dtype,
    ) -> "DecodeCache":
        """Room for `num_pages` pages; a row never needs more than `max_tokens` tokens of all stages do."""
        assert max(BLOCK, page_size) % min(BLOCK, page_size) == 0
        max_tokens = -(-max_tokens // BLOCK) * BLOCK
        pages_at_a_time = max(BLOCK // page_size, 1)
        max_pages = -(-max_tokens * stages.total // page_size)
        max_pages = -(-max_pages // pages_at_a_time) * pages_at_a_time
        zeros_PAGK = jnp.zeros((num_pages + 1, page_size, kv_heads, head_size), dtype)
        by_slot = None, None, None
        if view in APPENDING:
            by_slot = (jnp.full((num_pages + 1, page_size), -1, jnp.int32),) * 3
        return cls(
            zeros_PAGK,
            zeros_PAGK,
            jnp.zeros((num_rows, max_pages), jnp.int32),
            jnp.zeros(num_rows, jnp.int32),
            jnp.arange(num_pages, dtype=jnp.int32),
            jnp.int32(num_pages),
            jnp.zeros(num_rows, jnp.int32),
            None if view in APPENDING else jnp.full((num_rows, max_tokens, stages.total), -1, jnp.int32),
            *by_slot,
            stages=stages,
            view=view,
        )

    @property
    def page_size(self) -> int:
        return self.k_PAGK.shape[1]

    @property
    def num_pages(self) -> int:
        return self.k_PAGK.shape[0] - 1

    def num_pages_R(self) -> jax.Array:
        """Pages that each row has."""
        return -(-self.num_R // self.page_size)

    def is_page_full_R(self) -> jax.Array:
        """Whether the next entry of a row takes a new page."""
        return self.num_R % self.page_size == 0

    def append(
        self,
        k_RQGK: jax.Array,
        v_RQGK: jax.Array,
        token_RQ: jax.Array,
        stage_R: jax.Array,
        layer_RQ: jax.Array,
        writes_RQ: jax.Array,
    ) -> "DecodeCache":
        """The cache with new entries. There must be free pages enough (`num_free`).

        Args:
            token_RQ: the tokens that write, by their index in the row.
            stage_R: the stage at which those of a row do.
            layer_RQ: the layers that they execute.
            writes_RQ: False for tokens that write nothing.
        """
        if self.view == "first":
            writes_RQ &= ((stage_R == self.stages.prelude) | ~self.stages.is_routed(stage_R))[:, None]
        before_R = self.num_pages_R()
        place_RQ = self.num_R[:, None] + jnp.cumsum(writes_RQ, axis=1, dtype=jnp.int32) - 1
        num_R = self.num_R + writes_RQ.sum(1, dtype=jnp.int32)
        after_R = -(-num_R // self.page_size)
        # Each row takes its new pages off the stack, the first row first.
        taken_R = jnp.cumsum(after_R - before_R)
        top_R = self.num_free - 1 - (taken_R - (after_R - before_R))
        page_M = jnp.arange(self.page_RM.shape[1])
        is_new_RM = (page_M >= before_R[:, None]) & (page_M < after_R[:, None])
        new_RM = self.free_P[jnp.maximum(top_R[:, None] - (page_M - before_R[:, None]), 0)]
        page_RM = jnp.where(is_new_RM, new_RM, self.page_RM)

        page_RQ = jnp.take_along_axis(page_RM, jnp.maximum(place_RQ, 0) // self.page_size, axis=1)
        slot_RQ = page_RQ * self.page_size + place_RQ % self.page_size
        slot_RQ = jnp.where(writes_RQ, slot_RQ, self.num_pages * self.page_size)

        def written(x_PAX, new_RQX):
            return _written(x_PAX, new_RQX.reshape(-1, *x_PAX.shape[2:]), slot_RQ.ravel())

        cache = self.replace(
            k_PAGK=written(self.k_PAGK, k_RQGK),
            v_PAGK=written(self.v_PAGK, v_RQGK),
            page_RM=page_RM,
            num_R=num_R,
            num_free=self.num_free - taken_R[-1],
        )
        if self.view in APPENDING:
            stage_RQ = jnp.broadcast_to(stage_R[:, None], token_RQ.shape)
            return cache.replace(
                token_PA=written(self.token_PA, token_RQ),
                stage_PA=written(self.stage_PA, stage_RQ),
                layer_PA=written(self.layer_PA, layer_RQ),
            )
        return cache.replace(shown_RST=self._shown(slot_RQ, token_RQ, stage_R, writes_RQ))

    def _shown(self, slot_RQ, token_RQ, stage_R, writes_RQ) -> jax.Array:
        """`shown_RST` after tokens have written at a stage."""
        rows, num_tokens, num_stages = self.shown_RST.shape
        stage_T, stage_R1 = jnp.arange(num_stages), stage_R[:, None]
        shows_RT = stage_T == stage_R1
        if self.view in ("latest", "first"):
            # Also to queries of later steps, until the token writes again.
            later_RT = (stage_T >= stage_R1) & self.stages.is_routed(stage_T)
            shows_RT |= later_RT & self.stages.is_routed(stage_R1)
        row_RQ = jnp.broadcast_to(jnp.arange(rows)[:, None], token_RQ.shape)
        token_RQ = jnp.minimum(token_RQ, num_tokens - 1)
        old_RQT = self.shown_RST[row_RQ, token_RQ]
        new_RQT = jnp.where(shows_RT[:, None] & writes_RQ[..., None], slot_RQ[..., None], old_RQT)
        return _written(self.shown_RST, new_RQT.reshape(-1, num_stages), (row_RQ * num_tokens + token_RQ).ravel())

    def row(self, row: jax.Array) -> "DecodeCache":
        """One row as a cache of its own, over the same pages."""
        return self.replace(**{name: getattr(self, name)[row][None] for name in self._by_row()})

    def with_row(self, row: jax.Array, changed: "DecodeCache") -> "DecodeCache":
        """The cache after one row (`row`) was changed."""
        by_row = {name: getattr(self, name).at[row].set(getattr(changed, name)[0]) for name in self._by_row()}
        return changed.replace(**by_row)

    def _by_row(self) -> tuple[str, ...]:
        names = ("page_RM", "num_R", "first_R")
        return names if self.shown_RST is None else (*names, "shown_RST")

    def released(self, row: jax.Array) -> "DecodeCache":
        """The cache after a row has given its pages back."""
        page_M, num = jnp.arange(self.page_RM.shape[1]), self.num_pages_R()[row]
        place_M = jnp.where(page_M < num, self.num_free + page_M, self.num_pages)
        shown_RST = None if self.shown_RST is None else self.shown_RST.at[row].set(-1)
        return self.replace(
            free_P=self.free_P.at[place_M].set(self.page_RM[row], mode="drop"),
            num_free=self.num_free + num,
            num_R=self.num_R.at[row].set(0),
            first_R=self.first_R.at[row].set(0),
            shown_RST=shown_RST,
        )

    def num_spare_R(self, place_R: jax.Array) -> jax.Array:
        """Pages that each row can give up, the oldest ones: all but the last, and none from the first on that holds an
        entry of the token that the row is at, or it would not see itself.

        Args:
            place_R: those tokens, by their index in the row.
        """
        page_M, num_pages_R1 = jnp.arange(self.page_RM.shape[1]), self.num_pages_R()[:, None]
        if self.shown_RST is None:
            slot_MA = page_M[:, None] * self.page_size + jnp.arange(self.page_size)
            is_now_RMA = (self.token_PA[self.page_RM] >= place_R[:, None, None]) & (slot_MA < self.num_R[:, None, None])
            holds_RM = is_now_RMA.any(-1)
        else:
            last_R = jnp.minimum(place_R, self.shown_RST.shape[1] - 1)
            slot_RT = jnp.take_along_axis(self.shown_RST, last_R[:, None, None], axis=1)[:, 0]
            slot_RT = jnp.where((slot_RT >= 0) & (place_R <= last_R)[:, None], slot_RT, self.num_pages * self.page_size)
            holds_RM = (self.page_RM[..., None] == slot_RT[:, None] // self.page_size).any(-1)
        stays_RM = holds_RM | (page_M >= num_pages_R1 - 1)
        return jnp.minimum(stays_RM.argmax(1), jnp.maximum(num_pages_R1[:, 0] - 1, 0))

    def without_first(self, row: jax.Array, num_spare: jax.Array) -> "DecodeCache":
        """The cache after a row has given up its oldest entries, about half of its pages, and given those back.

        A token goes whole: what is left of its entries in pages that stay is not seen any more. So do all tokens before
        it.

        Args:
            num_spare: pages that may go, of `num_spare_R`.
        """
        num_gone = jnp.minimum(self.num_pages_R()[row] // 2, num_spare)
        page_M = jnp.arange(self.page_RM.shape[1])
        if self.shown_RST is None:
            token_MA = self.token_PA[self.page_RM[row]]
            first = jnp.where((page_M < num_gone)[:, None], token_MA + 1, 0).max()
        else:
            place_PA = jnp.full(self.num_pages, self.num_pages).at[self.page_RM[row]].min(page_M)
            of_page_ST = place_PA[jnp.maximum(self.shown_RST[row], 0) // self.page_size]
            is_gone_S = ((self.shown_RST[row] >= 0) & (of_page_ST < num_gone)).any(-1)
            first = jnp.where(is_gone_S, jnp.arange(len(is_gone_S)) + 1, 0).max()
        place_M = jnp.where(page_M < num_gone, self.num_free + page_M, self.num_pages)
        return self.replace(
            free_P=self.free_P.at[place_M].set(self.page_RM[row], mode="drop"),
            num_free=self.num_free + num_gone,
            page_RM=self.page_RM.at[row].set(jnp.roll(self.page_RM[row], -num_gone)),
            num_R=self.num_R.at[row].add(-num_gone * self.page_size),
            first_R=self.first_R.at[row].max(first),
        )

    def grown(self, num_pages: int) -> "DecodeCache":
        """The cache with room for more pages."""
        more = num_pages - self.num_pages

        def padded(x_PAX):
            return None if x_PAX is None else jnp.pad(x_PAX, ((0, more), *((0, 0) for _ in x_PAX.shape[1:])))

        new_P = self.num_pages + jnp.arange(more, dtype=jnp.int32)
        free_P = jax.lax.dynamic_update_slice(padded(self.free_P), new_P, (self.num_free,))
        names = ("k_PAGK", "v_PAGK", "token_PA", "stage_PA", "layer_PA")
        return self.replace(
            **{name: padded(getattr(self, name)) for name in names}, free_P=free_P, num_free=self.num_free + more
        )


def _written(x_PAX: jax.Array, new_NX: jax.Array, slot_N: jax.Array) -> jax.Array:
    """Slots set to new values, one after the other; slot p·A + a is at [p, a].

    Not by one scatter: on CPUs XLA makes a loop of it that copies the whole array several times.
    """
    zeros = (0,) * (x_PAX.ndim - 2)
    new_NX = new_NX.astype(x_PAX.dtype)

    def write(index, x_PAX):
        new_11X = jax.lax.dynamic_index_in_dim(new_NX, index)[None]
        place = *jnp.divmod(slot_N[index], x_PAX.shape[1]), *zeros
        return jax.lax.dynamic_update_slice(x_PAX, new_11X, place)

    return jax.lax.fori_loop(0, len(slot_N), write, x_PAX, unroll=len(slot_N) <= 16)
