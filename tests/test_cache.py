import jax.numpy as jnp
import numpy as np
import pytest

from radialnet.cache import UnifiedCache
from radialnet.config import VIEWS

B, S, T, L, G, K = 2, 7, 4, 3, 1, 2


def history(seed):
    """Random documents and, for every step, who executes which layer (idle steps included) and what is written."""
    rng = np.random.default_rng(seed)
    document = np.sort(rng.integers(0, 3, (B, S)), axis=1)
    document[0, -1] = -1
    executes = rng.random((T, B, S)) < 0.6
    layer = np.where(executes, rng.integers(0, L, (T, B, S)), L)
    keys = rng.normal(size=(T, B, S, G, K)).astype(np.float32)
    return document, executes & (document >= 0), layer, keys


def brute_force(view, document, executes, layer, t, b, i, seq=S):
    """(step, token) of the entries that the query of token i of row b sees at step t, by the rule of the paper."""
    entries = [
        (s, j)
        for s in range(t + 1)
        for j in range(seq)
        if j <= i and executes[s, b, j] and document[b, j] == document[b, i] and document[b, j] >= 0
    ]
    if view == "latest":
        return {(s, j) for s, j in entries if not any(s < later and j == k for later, k in entries)}
    if view == "same_step":
        return {(s, j) for s, j in entries if s == t}
    if view == "first":
        return {(s, j) for s, j in entries if s == 0}
    if view == "same_layer":
        return {(s, j) for s, j in entries if layer[s, b, j] == layer[t, b, i]}
    return set(entries)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("seed", range(3))
def test_views_against_the_visibility_rule(view, seed):
    document, executes, layer, keys = history(seed)
    cache = UnifiedCache.empty(jnp.asarray(document), view)
    num_seen = 0
    for t in range(T):
        cache = cache.append(*(jnp.asarray(x) for x in (keys[t], -keys[t], executes[t], layer[t])))
        k_BCGK, v_BCGK, visible_BSC = (np.asarray(x) for x in cache.look(jnp.asarray(layer[t])))
        np.testing.assert_array_equal(v_BCGK, -k_BCGK)
        for b, i in np.ndindex(B, S):
            if not executes[t, b, i]:
                continue
            # Entries are told apart by their keys, which are all different.
            seen = {k_BCGK[b, slot].tobytes() for slot in np.flatnonzero(visible_BSC[b, i])}
            expected = {keys[s, b, j].tobytes() for s, j in brute_force(view, document, executes, layer, t, b, i)}
            assert seen == expected, (view, t, b, i)
            num_seen += len(seen)
    assert num_seen > B * T


@pytest.mark.parametrize("view", VIEWS)
def test_own_slot_holds_the_entry_just_written(view):
    document, executes, layer, keys = history(0)
    cache = UnifiedCache.empty(jnp.asarray(document), view)
    for t in range(T):
        cache = cache.append(*(jnp.asarray(x) for x in (keys[t], keys[t], executes[t], layer[t])))
        k_BCGK, own_SC = np.asarray(cache.look(jnp.asarray(layer[t]))[0]), np.asarray(cache.own_slots())
        if view == "first" and t > 0:
            assert not own_SC.any()
            continue
        np.testing.assert_array_equal(own_SC.sum(1), 1)
        for b, i in zip(*np.nonzero(executes[t]), strict=True):
            np.testing.assert_array_equal(k_BCGK[b, own_SC[i].argmax()], keys[t, b, i])


def test_no_more_is_kept_than_the_view_looks_at():
    document, executes, layer, keys = history(0)
    kept = {}
    for view in VIEWS:
        cache = UnifiedCache.empty(jnp.asarray(document), view)
        for t in range(T):
            cache = cache.append(*(jnp.asarray(x) for x in (keys[t], keys[t], executes[t], layer[t])))
        kept[view] = len(cache.entries)
    assert kept == {"all": T, "same_layer": T, "latest": 1, "same_step": 1, "first": 1}
