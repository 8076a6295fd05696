from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radialnet import attention
from radialnet.attention import attend, attend_backward, attend_forward, attend_with_own
from radialnet.sections import ATTENTION_BACKENDS
from radialnet.visibility import Visibility

B, Q, C, H, G, K = 2, 13, 29, 6, 2, 4
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


QUERY, KEY, VALUE, GRAD = normal(B, Q, H, K), normal(B, C, G, K), normal(B, C, G, K), normal(B, Q, H, K)


def random_visibility(seed, by_layer=False, share_of_queries=0.8, share_of_entries=0.7):
    """Packed queries and entries of random tokens, documents of random starts, empty slots and places."""
    rng = np.random.default_rng(seed)
    last = np.sort(rng.integers(0, 2 * Q, (B, Q)), axis=1)
    first = np.maximum(last - rng.integers(0, 2 * Q, (B, Q)), 0)
    last = np.where(rng.random((B, Q)) < share_of_queries, last, -1)
    token = np.where(rng.random((B, C)) < share_of_entries, rng.integers(0, 2 * Q, (B, C)), -1)
    layers = [jnp.asarray(rng.integers(0, 3, (B, n)), jnp.int32) for n in (Q, C)] if by_layer else [None, None]
    return Visibility(*(jnp.asarray(x, jnp.int32) for x in (first, last, token)), *layers)


def by_hand(visibility):
    """Each query, head and seen entry on its own, in numpy. The mask is written out here once more."""
    expected = np.zeros((B, Q, H, K))
    fields = ("first_BQ", "last_BQ", "token_BC", "layer_BQ", "layer_BC")
    first, last, token, layer_q, layer_c = (getattr(visibility, name) for name in fields)
    for b, q, h in np.ndindex(B, Q, H):
        seen = [
            c
            for c in range(C)
            if token[b, c] >= 0
            and first[b, q] <= token[b, c] <= last[b, q]
            and (layer_q is None or layer_q[b, q] == layer_c[b, c])
        ]
        if seen:
            keys, values = (np.asarray(x)[b, seen, h // (H // G)] for x in (KEY, VALUE))
            weights = np.exp(keys @ np.asarray(QUERY)[b, q, h] / K**0.5)
            expected[b, q, h] = weights / weights.sum() @ values
    return expected


def whole(q, k, v, visibility):
    """All scores in memory, left to autodiff. `attend_with_own` without an own entry."""
    none = jnp.zeros((B, Q), bool)
    own = jnp.zeros((B, Q, G, K))
    return attend_with_own(q, k, v, visibility.mask(), own, own, none)


@pytest.mark.parametrize("by_layer", [False, True])
def test_against_a_loop_over_queries_and_entries(monkeypatch, by_layer):
    monkeypatch.setattr(attention, "TILE", 4)
    visibility = random_visibility(0, by_layer)
    expected = by_hand(visibility)
    assert (expected == 0).all(-1).any() and (expected != 0).any()
    for function in (attend, whole):
        np.testing.assert_allclose(function(QUERY, KEY, VALUE, visibility), expected, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([1, 3, 5, 13, 64]), st.floats(0, 1), st.floats(0, 1))
def test_tiles_equal_the_whole_in_values_and_gradients(seed, by_layer, tile, share_of_queries, share_of_entries):
    visibility = random_visibility(seed, by_layer, share_of_queries, share_of_entries)
    arrays = (QUERY, KEY, VALUE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TILE", tile)
        found, transpose = jax.vjp(lambda *x: attend(*x, visibility), *arrays)
        grads = transpose(GRAD)
    expected, transpose = jax.vjp(lambda *x: whole(*x, visibility), *arrays)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for left, right in zip(grads, transpose(GRAD), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
@pytest.mark.parametrize("by_layer", [False, True])
def test_kernels_equal_the_tiles_in_values_and_gradients(by_layer, seed, share_of_queries, share_of_entries):
    """The kernels of accelerators, interpreted, with tiles of 8."""
    visibility = random_visibility(seed, by_layer, share_of_queries, share_of_entries)
    for left, right in zip(*(_run_backend(visibility, backend) for backend in ATTENTION_BACKENDS), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


@partial(jax.jit, static_argnums=1)
def _run_backend(visibility, backend):
    mixed, transpose = jax.vjp(lambda *x: attend(*x, visibility, backend), QUERY, KEY, VALUE)
    return mixed, *transpose(GRAD)


def causal_visibility():
    """Queries of later tokens than most entries are of: of tiles of 8 some are seen whole, some in part, some not."""
    token_BQ, token_BC = (jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (B, size)) for size in (Q, C))
    return Visibility(jnp.zeros_like(token_BQ), token_BQ + 13, token_BC)


def test_kernels_where_all_of_a_tile_is_seen():
    visibility = causal_visibility()
    seen_BIJ, all_BIJ = visibility.tiles_that_meet(8, 8), visibility.tiles_that_see_all(8, 8)
    assert all_BIJ.any() and (seen_BIJ & ~all_BIJ).any() and not seen_BIJ.all()
    for left, right in zip(*(_run_backend(visibility, backend) for backend in ATTENTION_BACKENDS), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


@pytest.mark.parametrize("tile", [1, 3, 8])
def test_tiles_that_see_all_are_those_of_the_mask(tile):
    for visibility in (causal_visibility(), *(random_visibility(seed, share_of_entries=1) for seed in range(3))):
        mask_BQC = np.pad(np.asarray(visibility.mask()), ((0, 0), (0, -Q % tile), (0, -C % tile)))
        expected_BIJ = mask_BQC.reshape(B, -(-Q // tile), tile, -1, tile).all((2, 4))
        np.testing.assert_array_equal(visibility.tiles_that_see_all(tile, tile), expected_BIJ)
    assert not random_visibility(0, by_layer=True).tiles_that_see_all(tile, tile).any()


def test_kernels_are_a_program_of_their_own():
    visibility = random_visibility(0)
    for backend, num_kernels in (("tiles", 0), ("pallas", 3)):
        program = jax.make_jaxpr(lambda backend=backend: _run_backend(visibility, backend))()
        # Each kernel is there for GPUs, for TPUs and to be interpreted.
        assert str(program).count("pallas_call[") == 3 * num_kernels


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_backward_adds_to_the_gradients_of_the_entries(backend):
    visibility = random_visibility(1)
    mixed, lse = attend_forward(QUERY, KEY, VALUE, visibility, backend)
    zeros, threes = (tuple(jnp.full(x.shape, value) for x in (KEY, VALUE)) for value in (0.0, 3.0))
    found = attend_backward(QUERY, KEY, VALUE, visibility, mixed, lse, GRAD, *threes, backend)
    alone = attend_backward(QUERY, KEY, VALUE, visibility, mixed, lse, GRAD, *zeros, backend)
    np.testing.assert_allclose(found[0], alone[0])
    for left, right in zip(found[1:], alone[1:], strict=True):
        np.testing.assert_allclose(left - 3, right, atol=1e-5)


def count_tiles(visibility, tile):
    return int(attention._tiles(visibility, tile, tile).count)


def test_cost_follows_what_is_seen():
    """Tiles of later tokens, of other documents, of empty slots and of no queries are left out."""
    index = jnp.tile(jnp.arange(64, dtype=jnp.int32), (1, 1))
    full = Visibility(index * 0, index, index)
    assert count_tiles(full, 8) == 8 * 9 // 2
    documents = Visibility(index // 16 * 16, index, index)
    assert count_tiles(documents, 8) == 4 * 3
    entries = jnp.where(index < 16, index, -1)
    assert count_tiles(Visibility(index * 0, index, entries), 8) == 1 + 7 * 2
    queries = jnp.where(index < 16, index, -1)
    assert count_tiles(Visibility(index * 0, queries, index), 8) == 1 + 2
    assert count_tiles(Visibility(index * 0, queries * 0 - 1, index), 8) == 0
    # Entries of two steps, the first of layers 0 and 1 in turn, the second of layer 2 alone.
    steps, layers = jnp.tile(index, (1, 2)), jnp.concatenate([index % 2, index * 0 + 2], axis=1)
    for layer, num_tiles in ((2, 36), (1, 36), (3, 0)):
        assert count_tiles(Visibility(index * 0, index, steps, index * 0 + layer, layers), 8) == num_tiles
    assert count_tiles(Visibility(index * 0, index, steps), 8) == 72


def test_memory_is_linear_in_the_length():
    """No matrix of all scores: four times the length is about four times the temporaries."""

    def temporaries(length):
        q, k = jnp.zeros((1, length, 2, 8)), jnp.zeros((1, length, 1, 8))
        index = jnp.arange(length, dtype=jnp.int32)[None]

        def loss(q, k, v):
            return attend(q, k, v, Visibility(index * 0, index, index)).sum()

        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
        return program.memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long < 5 * short
    assert long < 4096 * 4096, "less than a byte a score"


def test_own_entry_beside_the_cache_equals_one_in_it():
    q, k, v = normal(B, Q, H, K), normal(B, Q, G, K), normal(B, Q, G, K)
    index = jnp.tile(jnp.arange(Q, dtype=jnp.int32), (B, 1))
    causal = Visibility(index * 0, index, index)
    own = np.eye(Q, dtype=bool)
    # The slots of the cache that hold the own entries are hidden, so what is in them must not matter.
    sees_own = np.ones((B, Q), bool)
    found = attend_with_own(q, k, v, causal.mask() & ~own, k, v, sees_own)
    np.testing.assert_allclose(found, attend(q, k, v, causal), atol=1e-5)
    hidden = attend_with_own(q, k, v, causal.mask() & ~own, k, v, ~sees_own)
    np.testing.assert_allclose(hidden, attend(q, k, v, Visibility(index * 0, index - 1, index)), atol=1e-5)
