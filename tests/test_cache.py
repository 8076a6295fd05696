import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet.cache import Packing, UnifiedCache, document_starts
from radialnet.sections import VIEWS
from tests.plain import entries_seen

B, S, T, L, G, K = 2, 7, 4, 3, 1, 2


def history(seed):
    """Random documents and, for every step, who executes which layer (idle steps included) and what is written."""
    rng = np.random.default_rng(seed)
    document = np.sort(rng.integers(0, 3, (B, S)), axis=1)
    document[0, -1] = -1
    executes = (rng.random((T, B, S)) < 0.6) & (document >= 0)
    layer = np.where(executes, rng.integers(0, L, (T, B, S)), L)
    keys = rng.normal(size=(T, B, S, G, K)).astype(np.float32)
    return document, executes, layer, keys


def packed(x_BSX, packing):
    """What each executing token has, side by side. What lies past them is made to be wrong."""
    flat = np.asarray(x_BSX).reshape(B * S, *x_BSX.shape[2:])
    taken = flat[np.minimum(packing.source_N, B * S - 1)]
    taken[np.asarray(packing.source_N) == B * S] = 99
    return jnp.asarray(taken.reshape(x_BSX.shape))


def append(cache, t, executes, layer, keys):
    packing = Packing.of(jnp.asarray(executes[t]))
    entries = [jnp.asarray(x) for x in (keys[t], -keys[t], layer[t])]
    if cache.is_packed:
        entries = [packed(x, packing) for x in entries]
    return cache.append(*entries, packing, jnp.int32(t)), packing


def seen(cache, packing, document, layer_BS):
    """The keys that each executing token's query sees, by row and token."""
    starts = document_starts(jnp.asarray(document))
    visibility = cache.visibility(starts, packed(layer_BS, packing), packing)
    mask, keys = np.asarray(visibility.mask()), np.asarray(cache.k_BCGK)
    np.testing.assert_array_equal(cache.v_BCGK, np.where(keys == 99, 99, -keys))
    found = {}
    for b, place in np.ndindex(B, S):
        token = int(packing.token_BS[b, place])
        if token >= 0:
            found[b, token] = {keys[b, slot].tobytes() for slot in np.flatnonzero(mask[b, place])}
        else:
            assert not mask[b, place].any(), "a place without a query sees nothing"
    return found


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("seed", range(3))
def test_views_against_the_visibility_rule(view, seed):
    document, executes, layer, keys = history(seed)
    cache = UnifiedCache.empty(view, T, B, S, G, K, jnp.float32)
    varying, found = [], []
    for t in range(T):
        cache, packing = append(cache, t, executes, layer, keys)
        found.append(seen(cache, packing, document, layer[t]))
        varying.append(cache.varying())
        assert set(found[t]) == set(zip(*np.nonzero(executes[t]), strict=True))
        for (b, i), entries in found[t].items():
            # Entries are told apart by their keys, which are all different.
            rule = entries_seen(view, document, executes, layer, t, b, i)
            assert entries == {keys[s, b, j].tobytes() for s, j in rule}, (view, t, b, i)
    assert sum(len(entries) for step in found for entries in step.values()) > B * T
    # The last cache gives that of every step back.
    for t in range(T):
        packing = Packing.of(jnp.asarray(executes[t]))
        assert seen(cache.at_step(varying[t]), packing, document, layer[t]) == found[t]


@pytest.mark.parametrize("view", VIEWS)
def test_gradient_of_an_append_equals_autodiff(view):
    """Of a function of the cache's visible entries after each step: what reaches the entries that were appended."""
    document, executes, layer, keys = history(1)
    rng = np.random.default_rng(5)

    def run(keys_TBSGK):
        """A weighted sum of everything that is visible, at each step with other weights."""
        cache, total = UnifiedCache.empty(view, T, B, S, G, K, jnp.float32), 0.0
        for t in range(T):
            packing = Packing.of(jnp.asarray(executes[t]))
            new = keys_TBSGK[t]
            if cache.is_packed:
                new = jnp.take(new.reshape(B * S, G, K), packing.source_N, axis=0, mode="fill", fill_value=0)
                new = new.reshape(B, S, G, K)
            layers = packed(layer[t], packing) if cache.is_packed else jnp.asarray(layer[t])
            cache = cache.append(new, new, layers, packing, jnp.int32(t))
            seen_BC1 = cache.visibility(starts, packed(layer[t], packing), packing).mask().any(1)[..., None, None]
            total += (cache.k_BCGK * weights[t] * seen_BC1).sum()
            states.append((cache, packing, seen_BC1))
        return total

    starts = document_starts(jnp.asarray(document))
    slots = UnifiedCache.empty(view, T, B, S, G, K, jnp.float32).k_BCGK.shape
    weights = jnp.asarray(rng.normal(size=(T, *slots)), jnp.float32)
    states = []
    expected = jax.grad(run)(jnp.asarray(keys))
    states = []
    run(jnp.asarray(keys))
    d_entries = jnp.zeros(slots), jnp.zeros(slots)
    for t in reversed(range(T)):
        cache, packing, seen_BC1 = states[t]
        d_entries = (d_entries[0] + weights[t] * seen_BC1, d_entries[1])
        (d_new, _), d_entries = cache.appended_gradient(*d_entries, packing, jnp.int32(t))
        if cache.is_packed:
            flat = d_new.reshape(B * S, G, K)
            d_new = jnp.take(flat, packing.place_N, axis=0, mode="fill", fill_value=0).reshape(B, S, G, K)
        d_new = np.where(executes[t][..., None, None], d_new, 0)
        np.testing.assert_allclose(d_new, expected[t], atol=1e-6, err_msg=f"step {t}")
    assert (expected != 0).any()


def test_no_more_is_kept_than_the_view_looks_at():
    slots = {view: UnifiedCache.empty(view, T, B, S, G, K, jnp.float32).k_BCGK.shape[1] for view in VIEWS}
    assert slots == {"all": T * S, "same_layer": T * S, "latest": S, "same_step": S, "first": S}


def test_entries_are_packed_without_gaps():
    _, executes, layer, keys = history(0)
    cache = UnifiedCache.empty("all", T, B, S, G, K, jnp.float32)
    for t in range(T):
        cache, _ = append(cache, t, executes, layer, keys)
    np.testing.assert_array_equal(cache.num_B, executes.sum((0, 2)))
    for b in range(B):
        steps_and_tokens = [(t, i) for t in range(T) for i in range(S) if executes[t, b, i]]
        np.testing.assert_array_equal(cache.token_BC[b, : cache.num_B[b]], [i for _, i in steps_and_tokens])
        expected = np.stack([keys[t, b, i] for t, i in steps_and_tokens])
        np.testing.assert_array_equal(cache.k_BCGK[b, : cache.num_B[b]], expected)


def test_document_starts():
    document = jnp.asarray([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, -1, -1]])
    np.testing.assert_array_equal(document_starts(document), [[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 4, 4]])
