"""Decoding of many requests at a time: rows, the queue behind them, and the memory of the cache.

    decoder = Decoder(load_trained(workdir), num_rows=16)
    for piece in decoder.stream(requests):        text as it is written, row by row
        …
    completions = decoder.run(requests)           or all at the end

What runs on the device is `decode_loop` and `decode_step`; here is what happens between their calls: a row that is done
takes the next request of the queue, the cache grows. Which part of a text is shown, and where it ends, is in
`decode_requests`.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from radialnet.controllers import schedule
from radialnet.cost import entry_bytes
from radialnet.decode_cache import DecodeCache, Stages
from radialnet.decode_loop import Log, Rows, decode, start
from radialnet.decode_requests import Completion, Piece, Request, Writing, check_requests
from radialnet.decode_step import Choice, Decoding, Weights, logits, prefill, read
from radialnet.sampling import Sampling, SamplingRows
from radialnet.sections import PAGE_SIZE, ConfigError
from radialnet.trained import TrainedModel

# Tokens that a prompt is prefilled by at a time; shorter prompts take the next smaller bucket.
CHUNKS = (16, 64, 256)
# Pages of a row to begin with; the cache doubles when it is full.
FIRST_PAGES = 64


# One of each for all decoders, so that equal ones share their programs. The cache and the rows are given away to each
# call, which writes into them in place.
_weights = jax.jit(Weights.of, static_argnums=0)
_prefill = jax.jit(prefill, static_argnums=0, donate_argnums=2)
_decode = jax.jit(decode, static_argnums=0, donate_argnums=(2, 3))
_read = jax.jit(read, static_argnums=0)
_logits = jax.jit(logits, static_argnums=0)
_num_spare = jax.jit(DecodeCache.num_spare_R)
_slide = jax.jit(DecodeCache.without_first, donate_argnums=0)


_OR_SLIDE = ", or config.cache.when_full='slide' to give up the oldest tokens"


class CacheFullError(ConfigError):
    """There is no room for the next entries, and nothing may be given up for them."""


class Decoder:
    """Decodes requests in a batch of rows. One at a time calls it; the memory it takes is kept for the next call."""

    def __init__(
        self,
        trained: TrainedModel,
        num_rows: int = 1,
        max_depth: int | None = None,
        exit_bias: float = 0.0,
        capacity: int | None = None,
        when_full: str | None = None,
        lockstep: bool = False,
    ):
        """
        Args:
            max_depth: T in place of the trained one.
            exit_bias: added to the trained exit bias: more makes tokens leave early.
            capacity, when_full: in place of those of `config.cache`.
            lockstep: whether rows wait for each other at every token: for comparison.
        """
        config = trained.config
        self.trained, self.num_rows = trained, num_rows
        self.capacity = config.cache.capacity if capacity is None else capacity
        self.when_full = when_full or config.cache.when_full
        model = config.model
        stages = Stages(model.prelude_layers, max_depth or model.max_depth, model.coda_layers)
        self.decoding = Decoding(config, trained.graph, stages, trained.tokenizer.separator_id, lockstep)
        self.controllers = trained.controllers.lean(exit_bias)
        at = schedule(config.router, model.max_depth, trained.step).for_evaluation()
        self.weights = _weights(trained.graph, trained.params, self.controllers, at)
        # What was run, and the pages that were needed at most.
        self.num_iterations, self.peak_pages, self._max_tokens = 0, 0, 0
        self._in_use: set[int] = set()  # Rows that have something in the cache.
        self.cache: DecodeCache | None = None
        self.rows: Rows | None = None

    @property
    def entry_bytes(self) -> int:
        return entry_bytes(self.trained.config)

    @property
    def peak_bytes(self) -> int:
        """Keys and values of the pages that were needed at most, so far."""
        return self.peak_pages * PAGE_SIZE * self.entry_bytes

    @property
    def least_capacity(self) -> int:
        """Entries with which rows that slide can always go on: a page of each that stays, and those of a next token."""
        return self.num_rows * PAGE_SIZE * (1 + -(-self.decoding.stages.total // PAGE_SIZE))

    def run(self, requests: Iterable[Request]) -> list[Completion]:
        """All completions, in the order of the requests."""
        completions = [piece.completion for piece in self.stream(requests, every=2**30) if piece.completion]
        return sorted(completions, key=lambda completion: completion.index)

    def stream(self, requests: Iterable[Request], every: int = 16) -> Iterator[Piece]:
        """Pieces of text, at least every so many iterations, of all requests that are at work.

        A request waits for a row, and for room in the cache that is enough for its last token at full depth.

        Raises:
            ConfigError: `check_requests`.
            CacheFullError: a request alone fills the cache and `when_full` is "error"; or nothing is left to give up.
        """
        requests = list(requests)
        check_requests(requests, self.trained.config.model.max_positions)
        queue = list(enumerate(requests))
        if not queue:
            return
        # What a call that was not seen to its end has left behind.
        for row in list(self._in_use):
            self._finish(row)
        self._make_room(max(request.num_tokens for request in requests))
        at_work: dict[int, Writing] = {}
        # Stop strings can't be seen on the device: it comes back often enough not to write far beyond one.
        every = min(every, 16) if any(request.stop for request in requests) else every
        while queue or at_work:
            for row in range(self.num_rows):
                if row not in at_work and queue and self._has_room(at_work.values(), queue[0][1]):
                    at_work[row] = self._admit(row, *queue.pop(0))
            needed = int(np.asarray(self.cache.is_page_full_R())[list(at_work)].sum())
            self.cache = self._with_room(self.cache, needed, self.rows.place_R)
            given = self.decoding, self.weights, self.cache, self.rows, every, bool(queue)
            self.cache, self.rows, log, num_iterations = _decode(*given)
            self.num_iterations += int(num_iterations)
            self.peak_pages = max(self.peak_pages, self.cache.num_pages - int(self.cache.num_free))
            yield from self._collect(at_work, jax.tree.map(np.asarray, log))

    def read(self, token_RS: np.ndarray, is_real_RS: np.ndarray) -> tuple[jax.Array, np.ndarray]:
        """Run given texts token by token, each a row from its beginning, as if they had been sampled.

        With a capacity, what has no room is given up as `when_full` says, before every few tokens.

        Args:
            is_real_RS: False for what fills a row up.

        Returns:
            Logits [R, S, V] of what follows each token, and the layer that it executed at each stage [R, S, T], -1 for
            none.

        Raises:
            CacheFullError: the texts fill the cache and `when_full` is "error"; or it hasn't room for a few tokens.
        """
        num_tokens = token_RS.shape[1]
        most = -(-num_tokens * self.decoding.stages.total // PAGE_SIZE) * self.num_rows
        num_pages = self._num_pages_allowed(most)
        cache = self._empty_cache(num_tokens, num_pages)
        at_a_time = num_tokens
        if num_pages < most:
            # What they may need at most is asked for beforehand: of a quarter of the room.
            of_token = 4 * self.num_rows * self.decoding.stages.total
            at_a_time = max(1, min(CHUNKS[0], num_pages * PAGE_SIZE // of_token))
        found, recent_RSW = [], self._recent(token_RS)
        for begin in range(0, num_tokens, at_a_time):
            part_RSW, is_real_part_RS = (x[:, begin : begin + at_a_time] for x in (recent_RSW, is_real_RS))
            if num_pages < most:
                num_R = np.asarray(cache.num_R) + is_real_part_RS.sum(1) * self.decoding.stages.total
                needed = -(-num_R // PAGE_SIZE) - np.asarray(cache.num_pages_R())
                cache = self._with_room(cache, int(needed.sum()), jnp.full(self.num_rows, begin))
            cache, *parts = _read(self.decoding, self.weights, cache, part_RSW, is_real_part_RS, begin)
            found.append(parts)
            self.peak_pages = max(self.peak_pages, num_pages - int(cache.num_free))
        h_RSD, layer_RST = (jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        return _logits(self.decoding, self.weights, h_RSD), np.asarray(layer_RST)

    def _make_room(self, max_tokens: int) -> None:
        """A cache and rows for requests of this size, unless those that are there will do."""
        # In steps, so that requests of about the same size share their programs.
        max_tokens = 1 << (max_tokens - 1).bit_length()
        if max_tokens <= self._max_tokens:
            return
        self._max_tokens = max_tokens
        model, num_rows = self.trained.config.model, self.num_rows
        self.cache = self._empty_cache(max_tokens, self._num_pages_allowed(FIRST_PAGES * num_rows))
        zeros_R, no_layer = jnp.zeros(num_rows, jnp.int32), jnp.full((num_rows, 1), 0, jnp.int32)
        plan = nnx.merge(self.trained.graph, self.trained.params).router.no_plan((num_rows, 1))
        self.rows = Rows(
            recent_RW=jnp.zeros((num_rows, self.trained.config.router.hash_span), jnp.int32),
            place_R=zeros_R,
            stage_R=zeros_R,
            h_RD=jnp.zeros((num_rows, model.d_model)),
            choice=Choice(no_layer, jnp.ones((num_rows, 1)), no_layer > 0, jnp.zeros((num_rows, 1)), plan),
            is_live_R=zeros_R > 0,
            num_new_R=zeros_R,
            max_new_R=zeros_R,
            seen_RV=jnp.zeros((num_rows, self.trained.tokenizer.vocab_size), bool),
            sampling=SamplingRows.of([Sampling()] * num_rows),
        )
        # Arrays that are given away must not share their memory.
        self.cache, self.rows = jax.tree.map(jnp.copy, (self.cache, self.rows))

    def _recent(self, token_RS: np.ndarray) -> np.ndarray:
        """`router.recent_tokens` of whole texts, without a program for each length."""
        span = self.trained.config.router.hash_span
        return token_RS[:, np.maximum(np.arange(token_RS.shape[1])[:, None] - np.arange(span), 0)]

    def _empty_cache(self, max_tokens: int, num_pages: int) -> DecodeCache:
        config = self.trained.config
        model, sizes = config.model, (self.num_rows, max_tokens, num_pages, PAGE_SIZE)
        heads = model.num_kv_heads, model.head_size, jnp.dtype(model.dtype)
        stages = self.decoding.stages
        return DecodeCache.empty(config.view_over(stages.max_depth), stages, *sizes, *heads)

    def _num_pages_allowed(self, num_pages: int) -> int:
        return min(num_pages, self.capacity // PAGE_SIZE) if self.capacity else num_pages

    def _has_room(self, at_work: Iterable[Writing], request: Request) -> bool:
        """Whether a request surely fits in beside those at work. One that is alone has all the room there is."""

        def most_pages(request: Request) -> int:
            return -(-request.num_tokens * self.decoding.stages.total // PAGE_SIZE)

        pages = [most_pages(writing.request) for writing in at_work]
        if not pages or not self.capacity or self.when_full == "slide":
            return True
        return sum(pages) + most_pages(request) <= self.capacity // PAGE_SIZE

    def _with_room(self, cache: DecodeCache, num_needed: int, place_R: jax.Array) -> DecodeCache:
        """The cache with so many free pages: more memory, up to the capacity; then what `when_full` says.

        Args:
            place_R: the token that each row is at, which stays.
        """
        while (num_free := int(cache.num_free)) < num_needed:
            num_pages = cache.num_pages
            more = self._num_pages_allowed(max(2 * num_pages, num_pages + num_needed - num_free))
            if more > num_pages:
                cache = cache.grown(more)
                continue
            # Asked beforehand, for the cache that slides is given away.
            if self.when_full == "slide":
                num_spare_R = np.asarray(_num_spare(cache, place_R))
                if num_free + num_spare_R.sum() >= num_needed:
                    row = int(np.where(num_spare_R, cache.num_R, 0).argmax())
                    cache = _slide(cache, row, num_spare_R[row])
                    continue
            entries = int(cache.num_R.sum())
            raise CacheFullError(
                f"config.cache.capacity={self.capacity}: {entries} entries of {self.num_rows} rows are there and the "
                f"next ones have no room; give it more or decode fewer rows at a time"
                f"{'' if self.when_full == 'slide' else _OR_SLIDE}"
            )
        return cache

    def _finish(self, row: int) -> None:
        self.cache, self.rows = _finish(self.cache, self.rows, row)
        self._in_use.remove(row)

    def _admit(self, row: int, index: int, request: Request) -> Writing:
        """Let a row begin with a request: all of its prompt but the last token goes into the cache."""
        tokens = np.asarray([self.decoding.separator_id, *request.prompt], np.int32)
        recent_SW = self._recent(tokens[None])[0]
        layer_ST = np.full((request.num_tokens, self.decoding.stages.total), -1, np.int32)
        begin, last = 0, len(tokens) - 1
        # A prefill writes the first entries of all its tokens first, so that they would all be given up together.
        largest = CHUNKS[0] if self.when_full == "slide" else CHUNKS[-1]
        self._in_use.add(row)
        while begin < last:
            # As many as surely have room: how deep they go is not known yet.
            worst = self.decoding.stages.total
            free = int(self.cache.num_free) + self._num_pages_allowed(2**30) - self.cache.num_pages
            # In the page that the row has begun.
            room = -int(self.cache.num_R[row]) % PAGE_SIZE
            num = max(min(last - begin, largest, (free * PAGE_SIZE + room) // worst), 1)
            chunk = next(size for size in CHUNKS if size >= num)
            place_R = self.rows.place_R.at[row].set(begin)
            self.cache = self._with_room(self.cache, -(-(num * worst - room) // PAGE_SIZE), place_R)
            part = np.zeros((chunk, recent_SW.shape[1]), np.int32)
            part[:num] = recent_SW[begin : begin + num]
            self.cache, _, layer_QT = _prefill(self.decoding, self.weights, self.cache, row, part, begin, num)
            layer_ST[begin : begin + num] = np.asarray(layer_QT)[:num]
            begin += num
        seen_V = np.zeros(self.trained.tokenizer.vocab_size, bool)
        seen_V[tokens[1:]] = True
        given = recent_SW[last], last, request.max_new_tokens, seen_V, SamplingRows.of([request.sampling])
        self.rows = _begin(self.decoding, self.weights, self.rows, row, *given)
        return Writing(index, request, self.trained.tokenizer, layer_ST)

    def _collect(self, at_work: dict[int, Writing], log: Log) -> Iterator[Piece]:
        """What the rows have written since the last time; those that are done leave."""
        is_live_R = np.asarray(self.rows.is_live_R)
        for row, writing in list(at_work.items()):
            ran_I = log.layer_IR[:, row] >= 0
            writing.layer_ST[log.place_IR[ran_I, row], log.stage_IR[ran_I, row]] = log.layer_IR[ran_I, row]
            writing.tokens += log.new_IR[log.new_IR[:, row] >= 0, row].tolist()
            piece = writing.next_piece(bool(is_live_R[row]))
            if piece and piece.completion:
                self._finish(row)
                del at_work[row]
            if piece:
                yield piece


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _begin(
    decoding: Decoding, weights: Weights, rows: Rows, row, recent_W, place, max_new, seen_V, sampling: SamplingRows
) -> Rows:
    """The rows, one of them at the last token of a new prompt."""
    rows = rows.replace(
        recent_RW=rows.recent_RW.at[row].set(recent_W),
        place_R=rows.place_R.at[row].set(place),
        is_live_R=rows.is_live_R.at[row].set(True),
        num_new_R=rows.num_new_R.at[row].set(0),
        max_new_R=rows.max_new_R.at[row].set(max_new),
        seen_RV=rows.seen_RV.at[row].set(seen_V),
        sampling=rows.sampling.with_row(row, sampling),
    )
    return start(decoding, weights, rows, jnp.arange(len(rows.place_R)) == row)


@partial(jax.jit, donate_argnums=(0, 1))
def _finish(cache: DecodeCache, rows: Rows, row) -> tuple[DecodeCache, Rows]:
    """Cache and rows after a row is done."""
    return cache.released(row), rows.replace(is_live_R=rows.is_live_R.at[row].set(False))
