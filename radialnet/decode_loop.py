"""The loop of decoding, in which every row goes its own way.

Each iteration executes one layer for every row, through its own layer of the pool and at its own depth. A row whose
token leaves samples the next one and starts again at once. A stage that all rows sit out takes no iteration.
"""

import flax.struct
import jax
import jax.numpy as jnp

from radialnet.decode_cache import DecodeCache
from radialnet.decode_step import Choice, Decoding, Weights, execute, logits, model_of, route
from radialnet.sampling import SamplingRows, sample


@flax.struct.dataclass
class Rows:
    """R rows, each with the one token that it is at."""

    recent_RW: jax.Array  # The token and those before it (`router.recent_tokens`).
    place_R: jax.Array  # The token's index in its row.
    stage_R: jax.Array
    h_RD: jax.Array
    choice: Choice  # What the token does at its stage; Q = 1.
    is_live_R: jax.Array
    num_new_R: jax.Array
    max_new_R: jax.Array
    seen_RV: jax.Array  # Whether a row has a token of the vocabulary.
    sampling: SamplingRows


@flax.struct.dataclass
class Log:
    """What the rows did in each of I iterations."""

    place_IR: jax.Array  # The token that a row was at, by its index in the row,
    stage_IR: jax.Array  # its stage,
    layer_IR: jax.Array  # and the layer that it executed there; -1 for none.
    new_IR: jax.Array  # The token that was sampled for the row; -1 for none.

    @classmethod
    def empty(cls, num_iterations: int, num_rows: int) -> "Log":
        none_IR = jnp.full((num_iterations, num_rows), -1, jnp.int32)
        return cls(none_IR, none_IR, none_IR, none_IR)


# Iterations of a call of `decode` at most, so that its log has an end.
MAX_ITERATIONS = 1024


def start(decoding: Decoding, weights: Weights, rows: Rows, starts_R: jax.Array) -> Rows:
    """The rows, some of them at the beginning of their token."""
    model = model_of(decoding, weights)
    h_RD = jnp.where(starts_R[:, None], model.embed(rows.recent_RW[:, 0], rows.place_R), rows.h_RD)
    stage_R = jnp.where(starts_R, 0, rows.stage_R)
    shape = rows.choice.layer_RQ.shape
    fresh = rows.choice.replace(log_survival_RQ=jnp.zeros(shape), plan=model.router.no_plan(shape))
    begun = _arrive(decoding, weights, rows.replace(h_RD=h_RD, choice=fresh), stage_R, starts_R)

    def of_starting(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(starts_R.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    choice = jax.tree.map(of_starting, begun.choice, rows.choice)
    return begun.replace(choice=choice)


def _arrive(decoding: Decoding, weights: Weights, rows: Rows, stage_R: jax.Array, active_R: jax.Array) -> Rows:
    """The rows with their active tokens at a stage, and what those do there."""
    before = rows.choice
    given = rows.recent_RW[:, None], rows.place_R[:, None], stage_R, active_R[:, None]
    given = rows.h_RD[:, None], *given, before.log_survival_RQ, before.plan
    choice = route(decoding, weights, *given, in_step=len(stage_R) == 1)
    stage_R, choice = _left(decoding, weights, stage_R, choice)
    return rows.replace(stage_R=stage_R, choice=choice)


def _next_stage(decoding: Decoding, weights: Weights, rows: Rows) -> Rows:
    total = decoding.stages.total
    stage_R = jnp.minimum(rows.stage_R + 1, total)
    return _arrive(decoding, weights, rows, stage_R, rows.is_live_R & (stage_R < total))


def _past_idle_stages(decoding: Decoding, weights: Weights, rows: Rows) -> Rows:
    """The rows at a stage at which any of them executes something, or samples.

    Not each at its own: where rows are at the same stage, they share the weights of its layer.
    """

    def all_idle(rows: Rows) -> jax.Array:
        executes_R = rows.is_live_R & (rows.choice.layer_RQ[:, 0] < weights.num_layers)
        return rows.is_live_R.any() & ~executes_R.any() & ~_emits(decoding, rows)

    return jax.lax.while_loop(all_idle, lambda rows: _next_stage(decoding, weights, rows), rows)


def _emits(decoding: Decoding, rows: Rows) -> jax.Array:
    """Whether it is time to sample: a row is at the output node; in lockstep, all of them."""
    at_output_R = rows.is_live_R & (rows.stage_R == decoding.stages.total)
    return jnp.all(at_output_R | ~rows.is_live_R) if decoding.lockstep else jnp.any(at_output_R)


def _left(decoding: Decoding, weights: Weights, stage_R, choice: Choice) -> tuple[jax.Array, Choice]:
    """Stage and choice of tokens after those that leave the pool went on to the coda, or to the output node."""
    stages, exits_RQ = decoding.stages, choice.exits_RQ
    stage_R = jnp.where(exits_RQ[:, 0], stages.first_coda, stage_R)
    first_coda = weights.num_layers - stages.coda  # Without a coda: no layer.
    return stage_R, choice.replace(
        layer_RQ=jnp.where(exits_RQ, first_coda, choice.layer_RQ), gate_RQ=jnp.where(exits_RQ, 1, choice.gate_RQ)
    )


def _emit(decoding: Decoding, weights: Weights, rows: Rows, emits_R: jax.Array) -> tuple[Rows, jax.Array]:
    """Sample the next token of some rows, and let them begin with it: the rows and those tokens, -1 for none."""
    logits_RV = logits(decoding, weights, rows.h_RD)
    token_R = sample(logits_RV, rows.seen_RV, rows.sampling, rows.place_R + 1)
    ends_R = emits_R & (token_R == decoding.separator_id)
    adds_R = emits_R & ~ends_R
    num_new_R = rows.num_new_R + adds_R
    is_live_R = rows.is_live_R & ~ends_R & (num_new_R < rows.max_new_R)
    moved_RW = jnp.concatenate([token_R[:, None], rows.recent_RW[:, :-1]], axis=1)
    is_new_RV = adds_R[:, None] & (jnp.arange(rows.seen_RV.shape[1]) == token_R[:, None])
    rows = rows.replace(
        recent_RW=jnp.where(adds_R[:, None], moved_RW, rows.recent_RW),
        place_R=rows.place_R + adds_R,
        num_new_R=num_new_R,
        seen_RV=rows.seen_RV | is_new_RV,
        is_live_R=is_live_R,
    )
    rows = _past_idle_stages(decoding, weights, start(decoding, weights, rows, emits_R & is_live_R))
    return rows, jnp.where(adds_R, token_R, -1)


def _iterate(decoding: Decoding, weights: Weights, cache: DecodeCache, rows: Rows) -> tuple[DecodeCache, Rows, Log]:
    """One layer for every live row, and what is to be logged of it."""
    stages, num_layers = decoding.stages, weights.num_layers
    choice = rows.choice.replace(layer_RQ=jnp.where(rows.is_live_R[:, None], rows.choice.layer_RQ, num_layers))
    h_RQD, cache = execute(decoding, weights, rows.h_RD[:, None], choice, rows.place_R[:, None], rows.stage_R, cache)
    layer_R = choice.layer_RQ[:, 0]
    log = Log(rows.place_R, rows.stage_R, jnp.where(layer_R < num_layers, layer_R, -1), jnp.full_like(layer_R, -1))

    rows = _next_stage(decoding, weights, rows.replace(h_RD=h_RQD[:, 0]))
    rows = _past_idle_stages(decoding, weights, rows)
    at_output_R = rows.is_live_R & (rows.stage_R == stages.total)
    rows, new_R = jax.lax.cond(
        _emits(decoding, rows),
        lambda rows: _emit(decoding, weights, rows, at_output_R),
        lambda rows: (rows, log.new_IR),
        rows,
    )
    return cache, rows, log.replace(new_IR=new_R)


def decode(
    decoding: Decoding,
    weights: Weights,
    cache: DecodeCache,
    rows: Rows,
    max_iterations: jax.Array,
    until_done: jax.Array,
) -> tuple[DecodeCache, Rows, Log, jax.Array]:
    """Go on with all live rows.

    Stops after `max_iterations` or MAX_ITERATIONS, when no row is live, when the cache might not have a page for every
    live row, and, with `until_done`, as soon as one more row is done.

    Returns:
        The cache, the rows, what they did, and the number of iterations.
    """
    num_live = rows.is_live_R.sum()
    max_iterations = jnp.minimum(max_iterations, MAX_ITERATIONS)

    def goes_on(carry):
        cache, rows, _, iteration = carry
        live = rows.is_live_R.sum()
        # An iteration writes one entry of a row at most.
        has_room = cache.num_free >= (rows.is_live_R & cache.is_page_full_R()).sum()
        return (live > 0) & (iteration < max_iterations) & has_room & ~(until_done & (live < num_live))

    def step(carry):
        cache, rows, log, iteration = carry
        cache, rows, of_rows = _iterate(decoding, weights, cache, rows)
        log = jax.tree.map(lambda x_IR, x_R: x_IR.at[iteration].set(x_R), log, of_rows)
        return cache, rows, log, iteration + 1

    log = Log.empty(MAX_ITERATIONS, len(rows.place_R))
    return jax.lax.while_loop(goes_on, step, (cache, rows, log, jnp.int32(0)))
