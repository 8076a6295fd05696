import jax.numpy as jnp
import numpy as np

from radialnet.layers import attend, attend_with_own, rms_norm, rope

B, S, C, H, G, K = 2, 5, 7, 6, 2, 4
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_attend_against_a_loop_over_queries():
    q, k, v, visible = normal(B, S, H, K), normal(B, C, G, K), normal(B, C, G, K), RNG.random((B, S, C)) < 0.5
    visible[0, 0] = False
    expected = np.zeros((B, S, H, K))
    for b, s, h in np.ndindex(B, S, H):
        slots, group = np.flatnonzero(visible[b, s]), h // (H // G)
        if len(slots):
            weights = np.exp(k[b, slots, group] @ q[b, s, h] / K**0.5)
            expected[b, s, h] = weights / weights.sum() @ v[b, slots, group]
    result = attend(q, k, v, visible)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert (np.asarray(result[0, 0]) == 0).all(), "a query that sees nothing gets zeros"


def test_own_entry_beside_the_cache_equals_one_in_it():
    q, k, v = normal(B, S, H, K), normal(B, S, G, K), normal(B, S, G, K)
    causal = np.broadcast_to(np.tril(np.ones((S, S), bool)), (B, S, S))
    own = np.eye(S, dtype=bool)
    # The slots of the cache that hold the own entries are hidden, so what is in them must not matter.
    sees_own = np.ones((B, S), bool)
    result = attend_with_own(q, k, v, causal & ~own, k, v, sees_own)
    np.testing.assert_allclose(result, attend(q, k, v, causal), atol=1e-5)
    hidden = attend_with_own(q, k, v, causal & ~own, k, v, ~sees_own)
    np.testing.assert_allclose(hidden, attend(q, k, v, causal & ~own), atol=1e-5)


def test_rope_scores_depend_on_the_distance_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8)

    def score(i, j):
        turned = [rope(x, np.full((1, 1), at), 100.0) for x, at in ((q, i), (k, j))]
        return float(jnp.sum(turned[0] * turned[1]))

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    np.testing.assert_array_equal(rope(q, np.zeros((1, 1), int), 100.0), q)


def test_rms_norm_is_fp32_inside_and_keeps_the_dtype():
    x = 1000 * normal(3, 300)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True)) * 2
    np.testing.assert_allclose(rms_norm(x, 2.0), wanted, rtol=1e-5)
    half = rms_norm(jnp.asarray(x, jnp.bfloat16), 2.0)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), wanted, rtol=0.02)
