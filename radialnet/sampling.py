"""The next token from logits, one request a row, by the request's own settings and seed."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from radialnet.sections import ConfigError

_NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are drawn. What is left at its default changes nothing.

    The penalty comes first, then the temperature, then the cuts, each of what the one before it has left.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: only the k most likely tokens; 0 = all.
        top_p: only the most likely tokens that together have this probability (arXiv 1904.09751).
        min_p: only tokens that have this share of the highest probability (arXiv 2407.01082).
        repetition_penalty: divides positive logits of tokens that are in the row already, and multiplies negative ones
            (arXiv 1909.05858).
        seed: of the draws; the same request draws the same whatever runs beside it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        """Raises ConfigError, naming the setting as the flag or field it was given by."""
        for name, is_right, allowed in (
            ("temperature", 0 <= self.temperature <= 1e6, "0 to 1e6"),
            ("top_k", 0 <= self.top_k < 2**31, "at least 0 (all)"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "1e-6 to 1e6"),
            ("seed", 0 <= self.seed < 2**32, "at least 0 and less than 2**32"),
        ):
            if not is_right:
                raise ConfigError(f"{name}={getattr(self, name)}: {allowed} is needed")


@flax.struct.dataclass
class SamplingRows:
    """`Sampling` of R rows."""

    temperature_R: jax.Array
    top_k_R: jax.Array
    top_p_R: jax.Array
    min_p_R: jax.Array
    penalty_R: jax.Array
    seed_R: jax.Array

    @classmethod
    def of(cls, requests: list[Sampling]) -> "SamplingRows":
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        dtypes = {"top_k": np.int32, "seed": np.uint32}
        columns = ([getattr(request, name) for request in requests] for name in names)
        return cls(
            *(np.asarray(column, dtypes.get(name, np.float32)) for name, column in zip(names, columns, strict=True))
        )

    def with_row(self, row: jax.Array, request: "SamplingRows") -> "SamplingRows":
        """These, with one row's settings replaced by those of `request`, which has one row."""
        return jax.tree.map(lambda rows, one: rows.at[row].set(one[0]), self, request)


def sample(logits_RV: jax.Array, seen_RV: jax.Array, rows: SamplingRows, position_R: jax.Array) -> jax.Array:
    """The next token of each row, [R].

    Args:
        seen_RV: whether a token is in the row already.
        position_R: the position that the token will have; the draw follows it and the seed.
    """
    penalty_R1 = rows.penalty_R[:, None]
    penalised_RV = jnp.where(logits_RV > 0, logits_RV / penalty_R1, logits_RV * penalty_R1)
    logits_RV = jnp.where(seen_RV, penalised_RV, logits_RV)

    def draw():
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
            rows.seed_R, position_R
        )
        return jax.vmap(_draw)(logits_RV, rows, keys)

    greedy_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
    # Sorting a vocabulary costs more than a small model: not where nobody asks for it.
    drawn_R = jax.lax.cond(jnp.any(rows.temperature_R > 0), draw, lambda: greedy_R)
    return jnp.where(rows.temperature_R > 0, drawn_R, greedy_R)


def _draw(logits_V, row: SamplingRows, key) -> jax.Array:
    order_V = jnp.argsort(-logits_V)
    logits_V = logits_V[order_V] / jnp.maximum(row.temperature_R, 1e-6)
    rank_V, num_tokens = jnp.arange(len(logits_V)), len(logits_V)
    logits_V = jnp.where(rank_V < jnp.where(row.top_k_R > 0, row.top_k_R, num_tokens), logits_V, _NEVER)
    p_V = jax.nn.softmax(logits_V)
    # A token stays if those before it don't have the probability yet: the first always does.
    logits_V = jnp.where((jnp.cumsum(p_V) - p_V < row.top_p_R) | (rank_V == 0), logits_V, _NEVER)
    p_V = jax.nn.softmax(logits_V)
    logits_V = jnp.where(p_V >= row.min_p_R * p_V[0], logits_V, _NEVER)
    return order_V[jax.random.categorical(key, logits_V)].astype(jnp.int32)
