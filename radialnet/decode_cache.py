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
from radialnet.visibility import NEG_INF

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

    def attend(self, q_RQHK: jax.Array, token_RQ: jax.Array, stage_R: jax.Array, layer_RQ: jax.Array) -> jax.Array:
        """Softmax attention of queries at a stage over the entries that they see, [R, Q, H, K]; fp32 inside.

        A query that sees nothing gets zeros. The blocks of all rows are one list, of which J = R are taken at a time:
        a short row waits for no long one, and many rows are still large products.

        Args:
            token_RQ: the index in its row of each query's token; negative for one that is not to look at anything.
        """
        (num_rows, num_queries), (kv_heads, size) = token_RQ.shape, self.k_PAGK.shape[2:]
        q_RQGXK = q_RQHK.reshape(num_rows, num_queries, kv_heads, -1, size).astype(jnp.float32) * size**-0.5
        row_R, block_of = jnp.arange(num_rows), self._tokens
        length_R, first_R = token_RQ.max(1) + 1, self.first_R // BLOCK
        if self.view in APPENDING:
            block_of = self._entries
            length_R, first_R = jnp.where(length_R > 0, self.num_R, 0), jnp.zeros_like(first_R)
        num_blocks_R = jnp.maximum(-(-length_R // BLOCK) - first_R, 0)
        end_R = jnp.cumsum(num_blocks_R)

        def step(index, carry):
            highest_RQGX, total_RQGX, mixed_RQGXK = carry
            place_J = index * num_rows + row_R
            row_J = jnp.minimum(jnp.searchsorted(end_R, place_J, side="right", method="compare_all"), num_rows - 1)
            block_J = (first_R + num_blocks_R - end_R)[row_J] + place_J
            k_JCY, v_JCY, visible_JQC = block_of(row_J, block_J, token_RQ[row_J], stage_R[row_J], layer_RQ[row_J])
            visible_JQC = (visible_JQC & (place_J < end_R[-1])[:, None, None])[:, :, None, None]
            scores_JQGXC = jnp.where(visible_JQC, _scores(q_RQGXK[row_J], k_JCY), NEG_INF)
            is_of_RJ = row_J == row_R[:, None]
            highest_RJQGX = jnp.where(is_of_RJ[..., None, None, None], scores_JQGXC.max(-1), NEG_INF)
            new_RQGX = jnp.maximum(highest_RQGX, highest_RJQGX.max(1))
            weights_JQGXC = jnp.where(visible_JQC, jnp.exp(scores_JQGXC - new_RQGX[row_J][..., None]), 0)
            fade_RQGX = jnp.exp(highest_RQGX - new_RQGX)

            def added(sum_RX, of_blocks_JX):
                faded_RX = sum_RX * jnp.expand_dims(fade_RQGX, range(4, sum_RX.ndim))
                return faded_RX + jnp.tensordot(is_of_RJ.astype(jnp.float32), of_blocks_JX, 1)

            mixed_JQGXK = _mixed(weights_JQGXC, v_JCY, kv_heads)
            return new_RQGX, added(total_RQGX, weights_JQGXC.sum(-1)), added(mixed_RQGXK, mixed_JQGXK)

        shape = q_RQGXK.shape[:-1]
        carry = jnp.full(shape, NEG_INF), jnp.zeros(shape), jnp.zeros(q_RQGXK.shape)
        _, total_RQGX, mixed_RQGXK = jax.lax.fori_loop(0, -(-end_R[-1] // num_rows), step, carry)
        mixed_RQGXK /= jnp.maximum(total_RQGX, 1e-30)[..., None]
        return mixed_RQGXK.reshape(q_RQHK.shape).astype(q_RQHK.dtype)

    def _tokens(self, row_J, block_J, token_JQ, stage_J, layer_JQ):
        """What blocks of tokens of rows show to queries at a stage: keys, values and who sees them."""
        token_JC = block_J[:, None] * BLOCK + jnp.arange(BLOCK)
        slot_JC = self.shown_RST.at[row_J[:, None], token_JC, stage_J[:, None]].get(mode="clip")
        is_there_JC = (slot_JC >= 0) & (token_JC >= self.first_R[row_J][:, None])
        visible_JQC = is_there_JC[:, None] & (token_JC[:, None] <= token_JQ[..., None])
        of_slots = (jnp.take(_flat(x_PAGK), slot_JC, axis=0, mode="clip") for x_PAGK in (self.k_PAGK, self.v_PAGK))
        return *of_slots, visible_JQC

    def _entries(self, row_J, block_J, token_JQ, stage_J, layer_JQ):
        """Blocks of entries of rows: keys, values and who sees them."""
        place_JC = block_J[:, None] * BLOCK + jnp.arange(BLOCK)
        page_JC = self.page_RM.at[row_J[:, None], place_JC // self.page_size].get(mode="clip")
        slot_JC = page_JC * self.page_size + place_JC % self.page_size

        def of_slots(x_PA):
            return x_PA.ravel()[slot_JC]

        token_JC, entry_stage_JC, entry_layer_JC = map(of_slots, (self.token_PA, self.stage_PA, self.layer_PA))
        is_there_JC = (place_JC < self.num_R[row_J][:, None]) & (token_JC >= self.first_R[row_J][:, None])
        stage_J1 = stage_J[:, None]
        earlier_JC = self.stages.is_routed(entry_stage_JC) & (entry_stage_JC <= stage_J1)
        is_there_JC &= jnp.where(self.stages.is_routed(stage_J1), earlier_JC, entry_stage_JC == stage_J1)
        visible_JQC = is_there_JC[:, None] & (token_JC[:, None] <= token_JQ[..., None])
        if self.view == "same_layer":
            visible_JQC &= entry_layer_JC[:, None] == layer_JQ[..., None]
        return *(_flat(x_PAGK)[slot_JC] for x_PAGK in (self.k_PAGK, self.v_PAGK)), visible_JQC

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

    def without_first(self, row: jax.Array) -> "DecodeCache":
        """The cache after a row has given up its oldest entries, about half of its pages, and given those back.

        A token goes whole: what is left of its entries in pages that stay is not seen any more. So do all tokens before
        it.
        """
        num_gone = self.num_pages_R()[row] // 2
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


def _flat(x_PAGK: jax.Array) -> jax.Array:
    """Slots of pages one after the other, the heads of each side by side."""
    return x_PAGK.reshape(-1, x_PAGK.shape[2] * x_PAGK.shape[3])


def _scores(q_JQGXK: jax.Array, k_JCY: jax.Array) -> jax.Array:
    """Queries times keys, whose heads lie side by side; fp32: [J, Q, G, X, C]."""
    num_queries, kv_heads, _, size = q_JQGXK.shape[1:]
    k_JCY = k_JCY.astype(jnp.float32)
    if num_queries > 1:
        return jnp.einsum("JQGXK,JCGK->JQGXC", q_JQGXK, k_JCY.reshape(*k_JCY.shape[:2], kv_heads, size))
    # Each head's query stands among zeros for the other heads. That is G times the FLOPs, but a product for each of the
    # heads would have keys and values laid out anew before it, which takes longer than the products themselves.
    q_JGXY = jnp.tile(q_JQGXK[:, 0], kv_heads) * _of_head(kv_heads, size)
    scores_JCZ = jnp.einsum("JCY,JZY->JCZ", k_JCY, q_JGXY.reshape(len(k_JCY), -1, kv_heads * size))
    return scores_JCZ.swapaxes(1, 2).reshape(len(k_JCY), 1, kv_heads, -1, k_JCY.shape[1])


def _mixed(weights_JQGXC: jax.Array, v_JCY: jax.Array, kv_heads: int) -> jax.Array:
    """Weights times values: [J, Q, G, X, K]."""
    num_blocks, num_queries, _, num_shared, num_entries = weights_JQGXC.shape
    size = v_JCY.shape[2] // kv_heads
    v_JCY = v_JCY.astype(jnp.float32)
    if num_queries > 1:
        return jnp.einsum("JQGXC,JCGK->JQGXK", weights_JQGXC, v_JCY.reshape(*v_JCY.shape[:2], kv_heads, size))
    mixed_JZY = jnp.einsum("JZC,JCY->JZY", weights_JQGXC.reshape(num_blocks, -1, num_entries), v_JCY)
    mixed_JGXY = mixed_JZY.reshape(num_blocks, kv_heads, num_shared, -1) * _of_head(kv_heads, size)
    return mixed_JGXY.reshape(num_blocks, 1, kv_heads, num_shared, kv_heads, size).sum(4)


def _of_head(kv_heads: int, size: int) -> jax.Array:
    """1 where a channel is of a head: [G, 1, G·K]."""
    return jnp.repeat(jnp.eye(kv_heads), size, axis=1)[:, None]
