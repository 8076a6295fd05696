"""Decoding through the cache, against the forward pass that trains."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet import decode_cache
from radialnet.config import VIEWS
from radialnet.decode_cache import DecodeCache, Stages
from radialnet.decode_step import Decoding, Weights, decode_step, logits, prefill
from radialnet.router import schedule
from tests.tiny import Model, make_config

SEQ, PAGE = 13, 4


class Decoder:
    """A tiny model with tokens that leave at different depths, and a cache for some rows."""

    def __init__(self, num_rows=2, max_depth=None, exit_bias=-3.0, **overrides):
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
        self.cache = DecodeCache.empty(config.cache.view, self.stages, *sizes, jnp.dtype(cfg.dtype))
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

    def prefill(self, row, tokens, begin, num_more=0):
        padded = np.concatenate([tokens, np.full(num_more, 5)]).astype(np.int32)
        self.cache, h_QD, layer_QT = self._prefill(self.weights, self.cache, row, padded, begin, len(tokens))
        return np.asarray(self._logits(self.weights, h_QD))[: len(tokens)], np.asarray(layer_QT)[: len(tokens)]

    def step(self, tokens, places, is_live):
        self.cache, logits_RV = self._step(self.weights, self.cache, *map(np.asarray, (tokens, places, is_live)))
        return np.asarray(logits_RV)


def tokens_of(num_rows=2, seed=0, seq=SEQ):
    return np.random.default_rng(seed).integers(1, 17, (num_rows, seq)).astype(np.int32)


CASES = {
    **{view: {"cache__view": view} for view in VIEWS},
    "bf16": {"model__dtype": "bfloat16"},
    "weighted": {"router__estimator": "weighted"},
    "flat": {"router__form": "flat"},
    "hash": {"router__form": "hash", "cache__view": "all"},
    "early exit by benefit": {"router__form": "early_exit", "router__exit_training": "benefit"},
    "mod": {"router__form": "mod", "router__estimator": "weighted", "model__min_depth": 4},
    "mod, all": {"router__form": "mod", "router__estimator": "weighted", "model__min_depth": 4, "cache__view": "all"},
    "recursion": {"exit_bias": 0.0, "router__form": "recursion", "train__seed": 1, "model__pool_size": 2},
    "prelude and coda": {"exit_bias": -1.0, "model__prelude_layers": 1, "model__coda_layers": 2},
    "prelude and coda, same layer": {
        "exit_bias": -1.0,
        "model__prelude_layers": 2,
        "model__coda_layers": 1,
        "cache__view": "same_layer",
    },
    "deeper than trained": {"max_depth": 7, "exit_bias": -4.0, "cache__view": "all"},
}


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_steps_give_the_logits_of_the_forward_pass(monkeypatch, case):
    """Rows of different lengths, one prompt in two parts, and a page boundary within tokens."""
    monkeypatch.setattr(decode_cache, "BLOCK", 8)
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
    same(decoder.prefill(0, tokens[0, 5:9], 5, num_more=3)[0], expected[0, 5:9])
    same(decoder.prefill(1, tokens[1, :2], 0, num_more=5)[0], expected[1, :2])
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
