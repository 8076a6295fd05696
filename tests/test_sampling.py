"""Draws against the probabilities that the settings define."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet.sampling import Sampling, SamplingRows, sample
from radialnet.sections import ConfigError

P = np.array([0.1, 0.4, 0.02, 0.3, 0.18])
DRAWS = 4000


def drawn(seen=(), num=DRAWS, scale=1.0, **settings):
    """Shares of the tokens in many draws, each at its own position."""
    rows = SamplingRows.of([Sampling(**settings)])
    rows = jax.tree.map(lambda x: jnp.repeat(x, num, axis=0), rows)
    logits_RV = jnp.tile(jnp.log(P) * scale, (num, 1))
    seen_RV = jnp.zeros((num, len(P)), bool).at[:, jnp.asarray(seen, int)].set(True)
    tokens = jax.jit(sample)(logits_RV, seen_RV, rows, jnp.arange(num))
    return np.bincount(tokens, minlength=len(P)) / num


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0}, P),
        ({"temperature": 0.5}, P**2),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        # 0.4 and 0.3 fall short of 0.75; with 0.18 it is there.
        ({"temperature": 1.0, "top_p": 0.75}, [0, 0.4, 0, 0.3, 0.18]),
        ({"temperature": 1.0, "top_p": 0.4}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.3}, [0, 0.4, 0, 0.3, 0.18]),
        # Of what top_k has left: 0.4 of 0.88.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.45}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 99}, P),
    ],
)
def test_shares_are_the_probabilities_of_the_settings(settings, expected):
    expected = np.asarray(expected) / np.sum(expected)
    found = drawn(**settings)
    np.testing.assert_allclose(found, expected, atol=0.03)
    np.testing.assert_array_equal(found > 0, expected > 0)


def test_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones():
    # Negative logits: p^2 for the tokens that were seen.
    changed = P.copy()
    changed[[1, 3]] **= 2
    np.testing.assert_allclose(
        drawn(seen=(1, 3), temperature=1.0, repetition_penalty=2.0), changed / changed.sum(), atol=0.03
    )
    # All logits positive: the largest one, 3.9, becomes 1.95 and is no longer it.
    assert drawn(seen=(2,), scale=-1.0, repetition_penalty=2.0)[0] == 1.0


def test_draws_follow_seed_and_position():
    rows = SamplingRows.of([Sampling(temperature=1.0, seed=seed) for seed in (1, 2, 1)])
    logits_RV, seen_RV = jnp.tile(jnp.log(P), (3, 1)), jnp.zeros((3, len(P)), bool)
    tokens = np.array([sample(logits_RV, seen_RV, rows, jnp.full(3, place)) for place in range(50)])
    np.testing.assert_array_equal(tokens[:, 0], tokens[:, 2])
    assert (tokens[:, 0] != tokens[:, 1]).any() and len(set(tokens[:, 0])) > 1


@pytest.mark.parametrize(
    "name, value",
    [("temperature", -1.0), ("temperature", np.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1),
     ("repetition_penalty", 0.0), ("seed", 2**32)],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value}: "):
        Sampling(**{name: value})
