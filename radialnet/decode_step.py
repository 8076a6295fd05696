"""Tokens through the stages of a model, over the decode cache, as pure functions.

    prefill      tokens of one row side by side
    decode_step  one token of each row
    read         given texts token by token

They route and execute as training does, through the same router and the same layers; `decode_loop` is made of the same
`route` and `execute`, for rows that are each at a depth of their own.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from radialnet import grouped
from radialnet.config import Config
from radialnet.controllers import Controllers, Schedule
from radialnet.decode_attention import attend
from radialnet.decode_cache import DecodeCache, Stages
from radialnet.grouping import SMALLEST, gather, plan, scatter
from radialnet.layers import rotation
from radialnet.model import RadialTransformer
from radialnet.router import Plan, StepInputs, choice_gate


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is static.

    Attributes:
        lockstep: whether a token that leaves waits for those of all other rows: for comparison.
    """

    config: Config
    graph: nnx.GraphDef
    stages: Stages
    separator_id: int
    lockstep: bool = False


@flax.struct.dataclass
class Weights:
    """A trained model, the layers of prelude, pool and coda on one axis."""

    params: dict
    block: dict[str, jax.Array] | tuple[dict[str, jax.Array], ...]  # One stack, or one for each layer.
    controllers: Controllers
    at: Schedule
    num_layers: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, graph: nnx.GraphDef, params: dict, controllers: Controllers, at: Schedule) -> "Weights":
        model = nnx.merge(graph, params)
        blocks = [pool.block for pool in (model.prelude, model.pool, model.coda) if pool is not None]
        stacked = [block.weights(block.BEFORE + block.AFTER) for block in blocks]
        block = stacked[0] if len(stacked) == 1 else jax.tree.map(lambda *layers: jnp.concatenate(layers), *stacked)
        num_layers = len(block["qkv"])
        if model.pool.grouped_backend == "block_loop":
            # Each layer on its own, for the sake of single rows (`block_loop`).
            split = {name: jnp.split(weight, num_layers) for name, weight in block.items()}
            block = tuple({name: parts[layer] for name, parts in split.items()} for layer in range(num_layers))
        return cls(params, block, controllers, at, num_layers)

    def half(self, names: tuple[str, ...]):
        """The weights of these names alone."""

        def part(block: dict) -> dict:
            return {name: block[name] for name in names}

        return tuple(map(part, self.block)) if isinstance(self.block, tuple) else part(self.block)


@flax.struct.dataclass
class Choice:
    """Where tokens go at a stage."""

    layer_RQ: jax.Array  # Among all layers, those of the prelude first; their number for a token that executes nothing.
    gate_RQ: jax.Array
    exits_RQ: jax.Array
    log_survival_RQ: jax.Array
    plan: Plan


def model_of(decoding: Decoding, weights: Weights) -> RadialTransformer:
    return nnx.merge(decoding.graph, weights.params)


def route(
    decoding: Decoding,
    weights: Weights,
    h_RQD,
    recent_RQW,
    place_RQ,
    stage_R,
    active_RQ,
    log_survival_RQ,
    plan,
    *,
    in_step: bool,
) -> Choice:
    """Where each active token goes at its row's stage.

    Args:
        recent_RQW: `router.recent_tokens`.
        in_step: whether all rows are at the same stage.

    Random routes are drawn by the token's place here: others than those of the parallel pass, and as random.
    """
    model, stages = model_of(decoding, weights), decoding.stages
    num_layers = model.pool.num_layers
    depth_R = jnp.clip(stage_R - stages.prelude, 0, stages.max_depth - 1)

    def of_row(h_QD, recent_QW, place_Q, active_Q, depth_step, plan_of_Q):
        rng = jax.random.fold_in(jax.random.key(0), place_Q[0])
        plan_of_BS = jax.tree.map(lambda x: x[None], plan_of_Q)
        # Of one text a row.
        begins_BS = place_Q[None] == 0
        step = StepInputs(recent_QW[None], begins_BS, active_Q[None], depth_step, rng[None], plan_of_BS)
        routed = model.router(h_QD[None], step, weights.controllers, weights.at)
        return jax.tree.map(lambda x: x[0] if jnp.ndim(x) else x, routed)

    # A single depth step, so that the looks that `router.every` spares are left out, and not made for nothing.
    depth, axis = (depth_R[0], None) if in_step else (depth_R, 0)
    in_axes = 0, 0, 0, 0, axis, 0
    route = jax.vmap(of_row, in_axes=in_axes)(h_RQD, recent_RQW, place_RQ, active_RQ, depth, plan)
    is_routed_R1 = stages.is_routed(stage_R)[:, None]
    log_survival_RQ = jnp.where(is_routed_R1, log_survival_RQ + route.log_survive_BS, log_survival_RQ)
    gate_RQ = jnp.ones(active_RQ.shape)
    if not model.reads_states:
        gate_RQ *= choice_gate(log_survival_RQ, model.estimator)
    if model.estimator != "dense":
        gate_RQ *= choice_gate(route.log_p_layer_BS, model.estimator)
    # Layers of the prelude are numbered as their stages are; those of the coda come after the pool's.
    in_order_R1 = jnp.where(stage_R < stages.prelude, stage_R, stage_R - stages.max_depth + num_layers)[:, None]
    layer_RQ = jnp.where(is_routed_R1, stages.prelude + route.layer_BS, in_order_R1)
    executes_RQ = active_RQ & (stage_R < stages.total)[:, None] & (~is_routed_R1 | route.executes_BS)
    return Choice(
        layer_RQ=jnp.where(executes_RQ, layer_RQ, stages.prelude + num_layers + stages.coda),
        gate_RQ=jnp.where(is_routed_R1, gate_RQ, 1),
        exits_RQ=is_routed_R1 & active_RQ & route.exits_BS,
        log_survival_RQ=log_survival_RQ,
        plan=route.plan,
    )


def execute(
    decoding: Decoding, weights: Weights, h_RQD, choice: Choice, place_RQ, stage_R, cache: DecodeCache
) -> tuple[jax.Array, DecodeCache]:
    """The residual stream after each token went through its layer, and the cache with what it wrote."""
    model = model_of(decoding, weights)
    cfg, block = model.cfg, model.pool.block
    shape, num_layers = place_RQ.shape, weights.num_layers
    layer_RQ = choice.layer_RQ
    sizes, num_at_once = None, model.pool.num_at_once
    if shape[1] == 1:
        # A single row is what most layers have to do for a batch of rows that are each at a place of their own.
        sizes, num_at_once = tuple(size for size in (SMALLEST, 1) if size <= shape[0]), num_layers
    groups = plan(layer_RQ.ravel(), num_layers, model.pool.grouped_backend, sizes, num_at_once)

    def half(function, names, rows, fixed=()):
        rows, fixed = (tuple(scatter(x, groups) for x in xs) for xs in (rows, fixed))
        outputs = grouped.map_rows(function, weights.half(names), rows, groups, fixed)
        return jax.tree.map(lambda y: gather(y, groups), outputs)

    h_ND = h_RQD.reshape(-1, cfg.d_model)
    turned_NK = rotation(place_RQ.ravel(), cfg)
    qkv = half(block.before_attention, block.BEFORE, (h_ND,), (turned_NK,))
    q_RQHK, k_RQGK, v_RQGK = (x_NX.reshape(*shape, -1, cfg.head_size) for x_NX in qkv)
    cache = cache.append(k_RQGK, v_RQGK, place_RQ, stage_R, layer_RQ, layer_RQ < num_layers)
    # Who executes nothing looks at nothing.
    looks_RQ = jnp.where(layer_RQ < num_layers, place_RQ, -1)
    mixed_RQHK = attend(cache, q_RQHK, looks_RQ, stage_R, layer_RQ)
    update_ND = half(block.after_attention, block.AFTER, (h_ND, mixed_RQHK.reshape(len(h_ND), -1)))
    return h_RQD + choice.gate_RQ[..., None] * update_ND.reshape(h_RQD.shape), cache


def run(
    decoding: Decoding, weights: Weights, cache: DecodeCache, recent_RQW, place_RQ, is_real_RQ
) -> tuple[DecodeCache, jax.Array, jax.Array]:
    """Run tokens through all their stages, those of all rows side by side.

    Args:
        recent_RQW: each token with those before it (`router.recent_tokens`).
        place_RQ: their index in the row; each row's next ones.
        is_real_RQ: False for those that only fill the array up.

    Returns:
        The cache, the residual stream at the output node [R, Q, D], and the layer of each token at each stage
        [R, Q, T], -1 for none.
    """
    model, stages = model_of(decoding, weights), decoding.stages
    num_layers, token_RQ = weights.num_layers, recent_RQW[..., 0]

    def step(stage, carry):
        h_RQD, stays_RQ, log_survival_RQ, plan, cache, layer_TRQ = carry
        stage_R = jnp.full(len(recent_RQW), stage)
        active_RQ = is_real_RQ & (stays_RQ | ~stages.is_routed(stage))
        given = h_RQD, recent_RQW, place_RQ, stage_R, active_RQ, log_survival_RQ, plan
        choice = route(decoding, weights, *given, in_step=True)
        h_RQD, cache = execute(decoding, weights, h_RQD, choice, place_RQ, stage_R, cache)
        layer_RQ = jnp.where(choice.layer_RQ < num_layers, choice.layer_RQ, -1)
        layer_TRQ = layer_TRQ.at[stage].set(layer_RQ.astype(jnp.int16))
        return h_RQD, stays_RQ & ~choice.exits_RQ, choice.log_survival_RQ, choice.plan, cache, layer_TRQ

    layer_TRQ = jnp.full((stages.total, *token_RQ.shape), -1, jnp.int16)
    no_plan = model.router.no_plan(token_RQ.shape)
    carry = model.embed(token_RQ, place_RQ), is_real_RQ, jnp.zeros(token_RQ.shape), no_plan, cache, layer_TRQ
    h_RQD, *_, cache, layer_TRQ = jax.lax.fori_loop(0, stages.total, step, carry)
    return cache, h_RQD, jnp.moveaxis(layer_TRQ, 0, -1)


def prefill(
    decoding: Decoding, weights: Weights, cache: DecodeCache, row: jax.Array, recent_QW, begin, num
) -> tuple[DecodeCache, jax.Array, jax.Array]:
    """`run` the next tokens of one row.

    Args:
        recent_QW: the tokens, each with those before it; the first `num` count, so that one program serves all lengths
            up to Q.
        begin: the first one's index in the row.
    """
    index_Q = jnp.arange(len(recent_QW))
    one_row = cache.row(row), recent_QW[None], (begin + index_Q)[None], (index_Q < num)[None]
    changed, h_RQD, layer_RQT = run(decoding, weights, *one_row)
    return cache.with_row(row, changed), h_RQD[0], layer_RQT[0]


def decode_step(
    decoding: Decoding, weights: Weights, cache: DecodeCache, recent_RW, place_R, is_live_R
) -> tuple[DecodeCache, jax.Array]:
    """`run` one token of each live row, all rows in step: the cache and the logits of what comes next, [R, V]."""
    cache, h_RQD, _ = run(decoding, weights, cache, recent_RW[:, None], place_R[:, None], is_live_R[:, None])
    return cache, logits(decoding, weights, h_RQD[:, 0])


def read(
    decoding: Decoding,
    weights: Weights,
    cache: DecodeCache,
    recent_RSW: jax.Array,
    is_real_RS: jax.Array,
    begin: jax.Array | int = 0,
) -> tuple[DecodeCache, jax.Array, jax.Array]:
    """`run` the tokens of given texts one after the other, as if each had been sampled.

    Args:
        recent_RSW: each token with those before it.
        begin: the place of the first one in its text.

    Returns:
        The cache, the residual stream at the output node [R, S, D], and the layer of each token at each stage
        [R, S, T], -1 for none.
    """

    def step(cache, given):
        recent_RW, place, is_real_R = given
        place_RQ = jnp.full((len(recent_RW), 1), place)
        cache, h_RQD, layer_RQT = run(decoding, weights, cache, recent_RW[:, None], place_RQ, is_real_R[:, None])
        return cache, (h_RQD[:, 0], layer_RQT[:, 0])

    given = recent_RSW.swapaxes(0, 1), begin + jnp.arange(recent_RSW.shape[1]), is_real_RS.T
    cache, (h_SRD, layer_SRT) = jax.lax.scan(step, cache, given)
    return cache, h_SRD.swapaxes(0, 1), layer_SRT.swapaxes(0, 1)


def logits(decoding: Decoding, weights: Weights, h_RD: jax.Array) -> jax.Array:
    """What the head makes of the residual stream at the output node, fp32: [R, V]."""
    model = model_of(decoding, weights)
    final_RD = model.final(h_RD)
    return jnp.matmul(final_RD, model.head[...].astype(final_RD.dtype), preferred_element_type=jnp.float32)
