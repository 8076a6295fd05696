"""Decoding through the cache, against the forward pass that trains."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from radialnet import decode, decode_attention, decode_cache
from radialnet.controllers import schedule
from radialnet.decode_cache import DecodeCache, Stages
from radialnet.decode_requests import Request
from radialnet.decode_step import Decoding, Weights, decode_step, logits, prefill, route
from radialnet.sampling import Sampling
from radialnet.sections import VIEWS
from radialnet.tokenizer import Tokenizer
from radialnet.trained import TrainedModel
from tests.tiny import TOKEN_EXITS, VOCAB, Model, make_config

SEQ, PAGE, CHUNK = 13, 4, 7


class Decoder:
    """A tiny model with tokens that leave at different depths, and a cache for some rows."""

    def __init__(self, num_rows=2, max_depth=None, exit_bias=-3.0, is_as_decoded=True, **overrides):
        config = make_config(**{"model__max_depth": 4, "train__seq_len": SEQ, **overrides})
        model = Model(config)
        if config.router.is_trained:
            model.with_mixed_exits()
        self.model, cfg = model, config.model
        self.stages = Stages(cfg.prelude_layers, max_depth or cfg.max_depth, cfg.coda_layers)
        self.decoding = Decoding(config, model.graph, self.stages, separator_id=0)
        at = schedule(config.router, cfg.max_depth, jnp.int32(0)).for_evaluation()
        controllers = model.controllers.replace(exit_bias=jnp.float32(exit_bias))
        self.weights = Weights.of(model.graph, model.params, controllers, at)
        sizes = num_rows, 40, 90, PAGE, cfg.num_kv_heads, cfg.head_size
        view = config.view_over(self.stages.max_depth) if is_as_decoded else config.cache.view
        self.cache = DecodeCache.empty(view, self.stages, *sizes, jnp.dtype(cfg.dtype))
        self.text = [[] for _ in range(num_rows)]
        self._prefill = jax.jit(partial(prefill, self.decoding))
        self._step = jax.jit(partial(decode_step, self.decoding))
        self._logits = jax.jit(partial(logits, self.decoding))

    def whole(self, token_BS):
        """Logits and depths of the forward pass."""
        seq = token_BS.shape[1]
        batch = {
            "token": token_BS,
            "document": np.zeros_like(token_BS),
            "position": np.tile(np.arange(seq, dtype=np.int32), (len(token_BS), 1)),
        }
        weights = self.weights
        output = self.model(batch, controllers=weights.controllers, at=weights.at, max_depth=self.stages.max_depth)
        return np.asarray(output.logits_BSV), np.asarray(output.depth_BS)

    def prefill(self, row, tokens, begin):
        """In a bucket of CHUNK tokens, whatever their number is."""
        padded = self.recent(row, tokens, begin)
        padded = np.pad(padded, ((0, CHUNK - len(tokens)), (0, 0)), constant_values=5)
        self.cache, h_QD, layer_QT = self._prefill(self.weights, self.cache, row, padded, begin, len(tokens))
        return np.asarray(self._logits(self.weights, h_QD))[: len(tokens)], np.asarray(layer_QT)[: len(tokens)]

    def step(self, tokens, places, is_live):
        recent_RW = np.concatenate([self.recent(row, [token], places[row]) for row, token in enumerate(tokens)])
        self.cache, logits_RV = self._step(self.weights, self.cache, *map(np.asarray, (recent_RW, places, is_live)))
        return np.asarray(logits_RV)

    def recent(self, row, tokens, begin):
        """Tokens of a row with those before them, the newest first."""
        self.text[row] = [*self.text[row][:begin], *tokens]
        places, span = range(begin, begin + len(tokens)), self.decoding.config.router.hash_span
        return np.array([[self.text[row][max(s - n, 0)] for n in range(span)] for s in places], np.int32)


def tokens_of(num_rows=2, seed=0, seq=SEQ):
    return np.random.default_rng(seed).integers(1, 17, (num_rows, seq)).astype(np.int32)


def has_spared_products(jaxpr) -> bool:
    """Whether there are products that a condition leaves out."""
    for equation in jaxpr.eqns:
        inner = [x.jaxpr for value in equation.params.values() for x in jax.tree.leaves(value) if hasattr(x, "jaxpr")]
        if equation.primitive.name == "cond" and len({"dot_general" in str(branch) for branch in inner}) == 2:
            return True
        if any(map(has_spared_products, inner)):
            return True
    return False


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("fields", [{"router__every": 2}, {"router__form": "hash_exit"}])
def test_rows_in_step_leave_out_the_looks_that_their_router_is_spared(in_step, fields):
    decoder = Decoder(**fields)
    shape, stage_R = (2, 1), jnp.ones(2, jnp.int32)
    plan = nnx.merge(decoder.decoding.graph, decoder.weights.params).router.no_plan(shape)

    def step(h_RQD):
        zeros_RQ = jnp.zeros(shape, jnp.int32)
        given = h_RQD, zeros_RQ[..., None], zeros_RQ, stage_R, zeros_RQ == 0, jnp.zeros(shape), plan
        return route(decoder.decoding, decoder.weights, *given, in_step=in_step)

    assert has_spared_products(jax.make_jaxpr(step)(jnp.zeros((*shape, 24))).jaxpr) == in_step


CASES = {
    **{view: {"cache__view": view} for view in VIEWS},
    "bf16": {"model__dtype": "bfloat16"},
    "weighted": {"router__estimator": "weighted"},
    "flat": {"router__form": "flat"},
    "linear router at every second step": {"exit_bias": 0.0, "router__network": "linear", "router__every": 2},
    "hash": {"router__form": "hash", "cache__view": "all", "router__hash_span": 3},
    "group hash, deeper than trained": {
        "max_depth": 7,
        "exit_bias": -4.0,
        "router__prior": "group_hash",
        "router__hash_span": 2,
        "model__num_groups": 2,
    },
    "early exit by benefit": {"exit_bias": 0.0, "router__form": "early_exit", "router__exit_training": "benefit"},
    "hash exit, deeper than trained": {
        "max_depth": 7,
        "exit_bias": -0.5,
        "router__form": "hash_exit",
        "router__hash_span": 2,
        "router__exit_training": "benefit",
        "model__num_groups": 2,
        "model__min_depth": 2,
    },
    "by benefit of the token": {"exit_bias": 0.0, **TOKEN_EXITS},
    "mod": {"router__form": "mod", "router__estimator": "weighted", "model__min_depth": 4},
    "mod, all": {"router__form": "mod", "router__estimator": "weighted", "model__min_depth": 4, "cache__view": "all"},
    "skip": {"router__form": "skip", "cache__view": "same_layer"},
    "skip, of the layer": {"router__form": "skip", "cache__view": "same_layer", "is_as_decoded": False},
    "skip, the newest of each token": {"router__form": "skip", "cache__view": "latest"},
    "recursion": {"exit_bias": 0.0, "router__form": "recursion", "train__seed": 1, "model__pool_size": 2},
    "prelude and coda": {"exit_bias": -1.0, "model__prelude_layers": 1, "model__coda_layers": 2},
    "prelude and coda, same layer": {
        "exit_bias": -1.0,
        "model__prelude_layers": 2,
        "model__coda_layers": 1,
        "cache__view": "same_layer",
    },
    "other layers": {
        "model__norm": "layer",
        "model__mlp": "relu",
        "model__biases": True,
        "model__positions": "learned",
        "model__max_positions": 40,
        "model__coda_layers": 1,
    },
    "no QK-norm": {"model__qk_norm": False, "model__norm_eps": 0.1},
    "deeper than trained": {"max_depth": 7, "exit_bias": -4.0, "cache__view": "all"},
}


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_steps_give_the_logits_of_the_forward_pass(monkeypatch, case):
    """Rows of different lengths, one prompt in two parts, and a page boundary within tokens."""
    for module in (decode_cache, decode_attention):
        monkeypatch.setattr(module, "BLOCK", 8)
    decoder, tokens = Decoder(**CASES[case]), tokens_of()
    expected, depth = decoder.whole(tokens)
    if decoder.decoding.config.router.is_trained and "mod" not in case:
        assert (np.unique(depth, return_counts=True)[1] > 1).sum() >= 2, "tokens leave at different depths"
    tolerance = 0.05 if case == "bf16" else 2e-5
    same = partial(np.testing.assert_allclose, atol=tolerance)
    found, layer = decoder.prefill(0, tokens[0, :5], 0)
    same(found, expected[0, :5])
    routed = layer[:, decoder.stages.prelude : decoder.stages.first_coda]
    np.testing.assert_array_equal((routed >= 0).sum(1), depth[0, :5])
    same(decoder.prefill(0, tokens[0, 5:9], 5)[0], expected[0, 5:9])
    same(decoder.prefill(1, tokens[1, :2], 0)[0], expected[1, :2])
    at = np.array([9, 2])
    for _ in range(SEQ):
        is_live = at < SEQ
        places = np.minimum(at, SEQ - 1)
        found = decoder.step(tokens[np.arange(2), places], at, is_live)
        for row in np.flatnonzero(is_live):
            same(found[row], expected[row, at[row]])
        at = at + is_live
    num_entries = depth.sum(1) + SEQ * (decoder.stages.prelude + decoder.stages.coda)
    if decoder.decoding.config.cache.view == "first":
        num_entries = np.full(2, SEQ)
    np.testing.assert_array_equal(decoder.cache.num_R, num_entries)
    num_pages = -(-num_entries // PAGE)
    assert int(decoder.cache.num_free) == 90 - num_pages.sum()


def sees(view, query, entry):
    """The rule, and what a view makes of it. Queries and entries are (row, token, stage, layer)."""
    (row, i, t, layer), (other_row, j, step, other_layer) = query, entry
    if other_row != row or j > i or step > t:
        return False
    executed = DEPTHS[row][j]
    return {
        "all": True,
        "latest": step == min(t, executed - 1),
        "same_step": step == t,
        "first": step == 0,
        "same_layer": layer == other_layer,
    }[view]


DEPTHS = ((3, 1, 4, 2, 4), (2, 4, 1, 1, 3))  # Executed steps of the tokens of two rows.


@pytest.mark.parametrize("view", VIEWS)
def test_a_query_sees_what_the_rule_lets_it_see_and_nothing_else(view, monkeypatch):
    """Each entry is changed in turn, and with it what those queries give that are to see it. Tokens went deeper than
    the query is, and later tokens are there, as in a prefill.
    """
    for module in (decode_cache, decode_attention):
        monkeypatch.setattr(module, "BLOCK", 8)
    rng = np.random.default_rng(0)
    stages, kv_heads, size = Stages(0, 4, 0), 2, 6
    cache = DecodeCache.empty(view, stages, 2, 8, 20, PAGE, kv_heads, size, jnp.float32)
    entries, slots = [], {}
    for token in range(5):
        for stage in range(4):
            writes_R = np.array([stage < DEPTHS[row][token] for row in range(2)])
            layer_R = rng.integers(0, 3, 2)
            k, v = rng.normal(size=(2, 2, 1, kv_heads, size)).astype(np.float32)
            before_R = np.asarray(cache.num_R)
            token_R1 = jnp.full((2, 1), token)
            cache = cache.append(k, v, token_R1, jnp.full(2, stage), layer_R[:, None], writes_R[:, None])
            for row in np.flatnonzero(np.asarray(cache.num_R) > before_R):
                page, place = divmod(int(before_R[row]), PAGE)
                entry = int(row), token, stage, int(layer_R[row])
                slots[entry] = int(cache.page_RM[row, page]), place
                entries.append(entry)
    assert len(entries) == (10 if view == "first" else np.sum(DEPTHS))
    q = jnp.asarray(rng.normal(size=(2, 1, 4, size)), jnp.float32)
    attend = jax.jit(lambda cache, token, stage, layer: decode_attention.attend(
        cache, q, jnp.full((2, 1), token), jnp.full(2, stage), jnp.full((2, 1), layer)))  # fmt: skip
    num_seen = 0
    for token, stage in ((0, 0), (1, 3), (3, 1), (4, 2), (4, 3)):
        given = token, stage, 1
        before = np.asarray(attend(cache, *given))
        for entry in entries:
            changed = cache.replace(v_PAGK=cache.v_PAGK.at[slots[entry]].add(1.0))
            moved_R = np.abs(np.asarray(attend(changed, *given)) - before).max((1, 2, 3)) > 1e-6
            expected = [sees(view, (row, *given), entry) for row in range(2)]
            assert moved_R.tolist() == expected, (given, entry)
            num_seen += sum(expected)
    assert num_seen >= 10


def test_reading_a_given_text_is_the_forward_pass_of_it(trained):
    """Token by token; what fills a row up changes nothing."""
    tokens = tokens_of(3)
    is_real = np.arange(SEQ) < np.array([[SEQ], [4], [9]])
    logits_RSV, layer_RST = decode.Decoder(trained, 3).read(np.where(is_real, tokens, 3), is_real)
    batch = {
        "token": tokens,
        "document": np.where(is_real, 0, -1),
        "position": np.tile(np.arange(SEQ, dtype=np.int32), (3, 1)),
    }
    model = Model(trained.config)
    output = model(batch, params=trained.params, controllers=trained.controllers, at=model.at.for_evaluation())
    np.testing.assert_allclose(logits_RSV[is_real], output.logits_BSV[is_real], atol=1e-3, rtol=1e-5)
    np.testing.assert_array_equal((layer_RST >= 0).sum(2)[is_real], output.depth_BS[is_real])
    assert (layer_RST[~is_real] == -1).all()


@pytest.mark.parametrize("view", ["latest", "all"])
def test_reading_through_a_window_is_reading_what_is_left(view):
    """Of one step, so that an entry knows its own token alone: what comes after the oldest were given up is what a text
    that begins where they end gives. Another row, which is short, keeps all of its own."""
    trained = make_trained(model__max_depth=1, model__min_depth=1, cache__view=view, router__depth_target=1.0)
    num, page = 4 * decode.PAGE_SIZE, decode.PAGE_SIZE
    token_RS = np.random.default_rng(0).integers(2, VOCAB, (2, num)).astype(np.int32)
    is_real_RS = np.arange(num) < np.array([[num], [page]])
    decoder = decode.Decoder(trained, 2, capacity=3 * page, when_full="slide")
    found_RSV = np.asarray(decoder.read(token_RS, is_real_RS)[0])
    assert decoder.peak_pages == 3
    whole_RSV = np.asarray(decode.Decoder(trained, 2).read(token_RS, is_real_RS)[0])
    near = {"atol": 2e-3, "rtol": 1e-4}
    np.testing.assert_allclose(found_RSV[1, :page], whole_RSV[1, :page], **near)
    # Two pages of the first row, and one of the second: half of the former go when the next tokens may need a page.
    np.testing.assert_allclose(found_RSV[0, : 2 * page - 6], whole_RSV[0, : 2 * page - 6], **near)
    for begin in (2 * page, 3 * page):
        part_RS = token_RS[:1, begin - page : begin + page]
        left_RSV = np.asarray(decode.Decoder(trained, 1).read(part_RS, np.ones(part_RS.shape, bool))[0])
        np.testing.assert_allclose(found_RSV[0, begin : begin + page], left_RSV[0, page:], **near)
        assert np.abs(found_RSV[0, begin : begin + page] - whole_RSV[0, begin : begin + page]).max() > 0.1
    with pytest.raises(decode.CacheFullError, match="config.cache.capacity=48"):
        decode.Decoder(trained, 2, capacity=3 * page, when_full="error").read(token_RS, is_real_RS)


def make_trained(**overrides):
    config = make_config(**{"model__max_depth": 4, "router__exit_bias_init": -3.0, **overrides})
    model = Model(config).with_mixed_exits()
    # Sharper, so that argmax is the same whatever the order of a sum is.
    params = {**model.params, "head": model.params["head"] * 50}
    tokenizer = Tokenizer.of_words([f"w{index}" for index in range(VOCAB - 2)])
    return TrainedModel(config, model.graph, params, model.controllers, tokenizer, 0)


@pytest.fixture(scope="module")
def trained():
    return make_trained()


@pytest.fixture(scope="module")
def endless(trained):
    """A model that never ends its document."""
    head = trained.params["head"]
    return dataclasses.replace(trained, params={**trained.params, "head": head.at[:, 0].set(0)})


def continued(trained, request):
    """The greedy continuation by a whole forward pass for every token."""
    model = Model(trained.config)
    tokens = [trained.tokenizer.separator_id, *request.prompt]
    at = model.at.for_evaluation()
    for _ in range(request.max_new_tokens):
        row = np.full((1, 40), 5, np.int32)
        row[0, : len(tokens)] = tokens
        index = np.arange(40, dtype=np.int32)[None]
        batch = {"token": row, "document": np.where(index < len(tokens), 0, -1), "position": index}
        output = model(batch, params=trained.params, controllers=trained.controllers, at=at)
        token = int(output.logits_BSV[0, len(tokens) - 1].argmax())
        if token == trained.tokenizer.separator_id:
            break
        tokens.append(token)
    return tokens[1 + len(request.prompt) :]


def requests_of(num, **sampling):
    rng = np.random.default_rng(0)
    return [
        Request(
            tuple(rng.integers(1, VOCAB, 1 + 3 * index % 7).tolist()),
            3 + 5 * index % 9,
            Sampling(seed=index, **sampling),
        )
        for index in range(num)
    ]


def test_rows_of_their_own_equal_lockstep_and_one_at_a_time_and_the_forward_pass(trained):
    """Five requests of different lengths, in two rows: each row takes the next one when it is done."""
    requests = requests_of(5)
    expected = [continued(trained, request) for request in requests]
    ended = [len(tokens) < request.max_new_tokens for tokens, request in zip(expected, requests, strict=True)]
    assert 0 < sum(ended) < 5
    together, lockstep = decode.Decoder(trained, 2), decode.Decoder(trained, 2, lockstep=True)
    done = together.run(requests)
    assert [one.tokens for one in done] == expected
    assert [one.reason == "end" for one in done] == ended
    assert [done.tokens for done in lockstep.run(requests)] == expected
    alone = decode.Decoder(trained)
    assert [alone.run([request])[0].tokens for request in requests] == expected
    # Nobody waits: the iterations are those of the fuller row, where in lockstep they are those of the deeper token.
    assert together.num_iterations < lockstep.num_iterations
    for done in together.run(requests):
        executed = (done.layer_ST >= 0).sum(1)
        assert (executed[:-1] >= 1).all() and len(executed) == 1 + len(requests[done.index].prompt) + len(done.tokens)
    assert int(together.cache.num_free) == together.cache.num_pages, "all pages are back"


def test_a_stage_that_is_sat_out_takes_no_iteration():
    """Of one row; two rows wait for each other, for they share a layer's weights where they are at the same stage."""
    model = make_trained(**CASES["skip"], model__max_depth=4)
    request, other = requests_of(2)
    alone = decode.Decoder(model)
    (done,) = alone.run([request])
    written_ST = done.layer_ST[len(request.prompt) :][: len(done.tokens)]
    assert (written_ST < 0).any() and alone.num_iterations == (written_ST >= 0).sum()
    expected = [continued(model, one) for one in (request, other)]
    for lockstep in (False, True):
        together = decode.Decoder(model, 2, lockstep=lockstep)
        assert [done.tokens for done in together.run([request, other])] == expected


@pytest.mark.parametrize(
    "overrides",
    [
        {"router__estimator": "weighted", "model__coda_layers": 1, "router__exit_bias_init": -0.5},
        {"model__min_depth": 0, "router__exit_bias_init": 0.0},
        {"model__prelude_layers": 1, "cache__view": "same_layer"},
        {"cache__view": "all"},
        {"router__every": 2, "router__exit_bias_init": 0.0},
        {"router__form": "hash_exit", "router__hash_span": 3, "router__exit_bias_init": 0.0, "model__num_groups": 1},
        {"router__form": "skip", "cache__view": "same_layer", "model__coda_layers": 1},
        {"router__form": "skip", "cache__view": "same_layer", "model__min_depth": 0, "router__exit_bias_init": 0.0},
    ],
    ids=str,
)
def test_the_loop_is_the_forward_pass_and_a_call_that_was_given_up_leaves_nothing_behind(overrides):
    """Once the first layer of a coda was scaled by the gate of the step at which a token left, and an exit before the
    first step was not seen; and the next request saw the entries of one that nobody had waited for.
    """
    model = make_trained(**overrides)
    requests = requests_of(3)
    expected = [continued(model, request) for request in requests]
    decoder = decode.Decoder(model, 2)
    for _ in decoder.stream(requests[1:], every=1):
        break
    done = decoder.run(requests)
    assert [one.tokens for one in done] == expected
    stages = decoder.decoding.stages
    depth = np.concatenate([(one.layer_ST[:-1, stages.prelude : stages.first_coda] >= 0).sum(1) for one in done])
    assert len(np.unique(depth)) > 1
    assert int(decoder.cache.num_free) == decoder.cache.num_pages


def test_draws_follow_the_seed_and_not_the_batch(endless):
    requests = requests_of(5, temperature=2.0, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
    alone = decode.Decoder(endless)
    expected = [alone.run([request])[0].tokens for request in requests]
    assert [done.tokens for done in decode.Decoder(endless, 3).run(requests)] == expected
    other = dataclasses.replace(requests[1], sampling=dataclasses.replace(requests[1].sampling, seed=99))
    assert alone.run([other])[0].tokens != expected[1]


def test_pieces_are_the_text_and_stop_strings_cut_it(endless):
    request = dataclasses.replace(requests_of(3)[2], max_new_tokens=12)
    decoder = decode.Decoder(endless)
    whole = decoder.run([request])[0]
    pieces = list(decoder.stream([request], every=1))
    assert len(pieces) > 3 and "".join(piece.text for piece in pieces) == whole.text
    assert [piece.completion is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert whole.reason == "length" and len(whole.tokens) == 12
    stop = whole.text[len(whole.text) // 2 :][:4]
    stopped = decoder.run([dataclasses.replace(request, stop=("never", stop))])[0]
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.reason == "stop"
    texts = [piece.text for piece in decoder.stream([dataclasses.replace(request, stop=(stop,))], every=1)]
    assert "".join(texts) == stopped.text, "no part of a stop string was shown before it was whole"


def test_the_cache_grows_to_its_capacity_and_then_says_so(endless, monkeypatch):
    request = dataclasses.replace(requests_of(1)[0], max_new_tokens=30)
    decoder = decode.Decoder(endless, capacity=10**6)
    expected = decoder.run([request])[0]
    entries = int((expected.layer_ST >= 0).sum())
    assert decoder.peak_pages == -(-entries // decode.PAGE_SIZE)
    monkeypatch.setattr(decode, "FIRST_PAGES", 1)
    grown = decode.Decoder(endless, capacity=entries + 2 * decode.PAGE_SIZE)
    assert grown.run([request])[0].tokens == expected.tokens
    long = dataclasses.replace(request, prompt=tuple(range(1, 11)))
    assert len(decode.Decoder(endless, capacity=48, when_full="slide").run([long])[0].tokens) == 30
    small = decode.Decoder(endless, capacity=3 * decode.PAGE_SIZE)
    with pytest.raises(decode.CacheFullError, match="config.cache.capacity=48: .*slide"):
        small.run([request])
    sliding = decode.Decoder(endless, capacity=3 * decode.PAGE_SIZE, when_full="slide").run([request])[0]
    assert len(sliding.tokens) == 30
    # The same as long as nothing had to go.
    num_before = (
        int((np.cumsum((expected.layer_ST >= 0).sum(1)) <= 2 * decode.PAGE_SIZE).sum()) - 1 - len(request.prompt)
    )
    assert num_before > 3 and sliding.tokens[:num_before] == expected.tokens[:num_before]


@pytest.mark.parametrize("view", ["latest", "same_step", "all"])
def test_a_token_that_a_row_is_at_is_not_given_up(view):
    """It would see nothing of itself at its later stages."""
    page, heads, stages = 4, (1, 2), Stages(0, 3, 0)
    cache = DecodeCache.empty(view, stages, 2, 8, 8, page, *heads, jnp.float32)
    # Row 0: three entries of token 0, which end before the page does, then three of token 1. Row 1 has one.
    for token, stage in itertools.product((0, 1), range(3)):
        kv, writes = jnp.ones((2, 1, *heads)), jnp.array([[True], [token + stage == 0]])
        layer = jnp.full((2, 1), stage)
        cache = cache.append(kv, kv, jnp.full((2, 1), token), jnp.full(2, stage), layer, writes)
    assert cache.num_pages_R().tolist() == [2, 1]
    for place, spare in ((1, 0), (2, 1)):
        assert cache.num_spare_R(jnp.array([place, 1])).tolist() == [spare, 0]
    kept = cache.without_first(0, jnp.int32(1))
    assert kept.first_R.tolist() == [2, 0] and kept.num_free == cache.num_free + 1, "with token 1 goes what was begun"


def test_requests_wait_for_room_in_the_cache(endless):
    """With pages enough for two of them at full depth, three are never at work, and the two don't run out of pages."""
    requests = [dataclasses.replace(request, max_new_tokens=14) for request in requests_of(3)]
    alone = [decode.Decoder(endless).run([request])[0].tokens for request in requests]
    stages = decode.Decoder(endless).decoding.stages
    pages = [-(-(1 + len(request.prompt) + 14) * stages.total // decode.PAGE_SIZE) for request in requests]
    for exit_bias in (0.0, -1e9):
        narrow = decode.Decoder(
            endless, num_rows=3, capacity=sum(sorted(pages)[1:]) * decode.PAGE_SIZE, exit_bias=exit_bias
        )
        most_at_once = 0
        for piece in narrow.stream(requests, every=1):
            most_at_once = max(most_at_once, len(narrow._in_use))
            if piece.completion and not exit_bias:
                assert piece.completion.tokens == alone[piece.index]
        assert most_at_once == 2 and narrow.peak_pages * decode.PAGE_SIZE <= narrow.capacity
