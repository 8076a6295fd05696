"""The loop over depth steps: router, pool, residual stream, until every token has left.

`scanned` is the one that trains: a scan, so that compile time doesn't grow with T, with a gradient written by hand.
Autodiff of a scan that carries the cache would keep T caches; but an entry never changes once written, so that the
cache of every step is a part of the last one (`UnifiedCache.at_step`; the views that look at S slots alone keep those
of every step, which is no more). And it would add a gradient of the whole pool to another at every step; by hand each
step adds in place what its layers got.

`unrolled` is the reference, by autodiff. It has the `dense` estimator too, which runs all layers at every step.
"""

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from radialnet.controllers import Controllers, Schedule
from radialnet.metrics import StepSums
from radialnet.pool import Attended, LayerPool, Positions, Products
from radialnet.router import Decision, Plan, Router, StepInputs, choice_gate


@flax.struct.dataclass
class Inputs:
    """What the loop reads at every step and never changes."""

    recent_BSW: jax.Array  # `router.recent_tokens`.
    positions: Positions
    controllers: Controllers
    at: Schedule
    rng_B: jax.Array  # A key for each row.
    # Columns whose states the loss reads (`Trace.read_BMD`), the same in all rows, no two alike.
    column_M: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros(0, jnp.int32))


@dataclasses.dataclass(frozen=True)
class DepthLoop:
    """What is static in the loop.

    Attributes:
        graph: of the pair (router, pool).
        keeps_products: whether the backward pass finds what the layers computed, or computes it again, a step at a time
            (rematerialisation: memory of a step's activations instead of T steps').
        keeps_attended: whether it finds what attention did; needed where it finds the products.
        has_survival_gate: whether updates carry the gradient of the exits before them; not where exits are trained by
            what is read of the states between steps.
    """

    graph: nnx.GraphDef
    view: str
    max_depth: int
    estimator: str
    vocab_size: int
    keeps_products: bool
    keeps_attended: bool
    has_survival_gate: bool

    def modules(self, params) -> tuple[Router, LayerPool]:
        return nnx.merge(self.graph, params)

    def with_all_layers(self, params, dtype=None):
        """The parameters with those of all layers on this device (`LayerPool.gather_weights`)."""
        router, pool = self.modules(params)
        pool.gather_weights(dtype)
        return nnx.split((router, pool))[1]


@flax.struct.dataclass
class Trace:
    """What happened, by depth step."""

    sums: StepSums
    num_computed: jax.Array  # Rows that were computed, for nothing or not; in `unrolled` those that execute.
    layer_BS: jax.Array  # The layer that each token executed; L for none.
    h_BSD: jax.Array  # The residual stream before the step; without a gradient.
    # The same at the columns `Inputs.column_M`, with its gradient: of all columns it would be kept for all T steps.
    read_BMD: jax.Array
    exit_logit_BS: jax.Array  # `Route.exit_logit_BS`.


@jax.named_scope("router")
def decide(
    loop: DepthLoop, router: Router, h_BSD, log_survival_BS, active_BS, depth_step, inputs, plan: Plan, decided=None
):
    """The router's part of a step.

    Args:
        plan: `Route.plan` of the step before.

    Returns:
        The gate of the update, the log of the product of (1 - p_exit) so far, the sums, and the route.
    """
    begins_BS = inputs.positions.document_start_BS == jnp.arange(active_BS.shape[1])
    step = StepInputs(inputs.recent_BSW, begins_BS, active_BS, depth_step, inputs.rng_B, plan, decided)
    route = router(h_BSD, step, inputs.controllers, inputs.at)
    log_survival_BS += route.log_survive_BS
    gate_BS = jnp.ones(active_BS.shape)
    if loop.has_survival_gate:
        gate_BS *= choice_gate(log_survival_BS, loop.estimator)
    if loop.estimator != "dense":
        gate_BS *= choice_gate(route.log_p_layer_BS, loop.estimator)
    sums = StepSums.of(route, active_BS, log_survival_BS, step.token_BS, loop.vocab_size)
    return gate_BS, log_survival_BS, sums, route


def unrolled(loop: DepthLoop, params, h_BSD: jax.Array, is_real_BS: jax.Array, inputs: Inputs):
    """All depth steps, one after the other in the program. Returns the residual stream at the exits and the trace."""
    # As they are, for so are their gradients by autodiff summed up.
    router, pool = loop.modules(loop.with_all_layers(params))
    active_BS, log_survival_BS = is_real_BS, jnp.zeros(is_real_BS.shape)
    cache = pool.empty_cache(loop.view, loop.max_depth, *is_real_BS.shape)
    plan, steps = router.no_plan(is_real_BS.shape), []
    for t in range(loop.max_depth):
        depth_step = jnp.int32(t)
        gate_BS, log_survival_BS, sums, route = decide(
            loop, router, h_BSD, log_survival_BS, active_BS, depth_step, inputs, plan
        )
        before_BSD, read_BMD = jax.lax.stop_gradient(h_BSD), h_BSD[:, inputs.column_M]
        steps.append(Trace(sums, route.executes_BS.sum(), route.layer_BS, before_BSD, read_BMD, route.exit_logit_BS))
        if loop.estimator == "dense":
            update_BSD, cache = pool.choose(h_BSD, route, cache, inputs.positions, depth_step)
        else:
            update_BSD, cache = pool(h_BSD, route.layer_BS, cache, inputs.positions, depth_step)
        # The update of a token that executes nothing is exactly 0: its state stays as it is.
        h_BSD += gate_BS[..., None] * update_BSD
        active_BS, plan = active_BS & ~route.exits_BS, route.plan
    return h_BSD, jax.tree.map(lambda *xs: jnp.stack(xs), *steps)


def differentiable(sums: StepSums):
    """What of the sums is in the loss."""
    return sums.p_layer_L, sums.expected_depth, sums.z, sums.predictor_nats


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scanned(loop: DepthLoop, params, h_BSD: jax.Array, is_real_BS: jax.Array, inputs: Inputs):
    """`unrolled` as a scan. No gradient reaches `inputs`."""
    loop = dataclasses.replace(loop, keeps_products=False, keeps_attended=False)
    return _forward(loop, params, h_BSD, is_real_BS, inputs)[:2]


@flax.struct.dataclass
class _StepState:
    """What the backward pass needs of a step, beside the trace."""

    log_survival_BS: jax.Array
    active_BS: jax.Array
    logits_BSN: jax.Array | None  # `Plan.logits_BSN` of the step before.
    decided: Decision
    cache: object  # `UnifiedCache.varying` after the step.
    attended: Attended | None


def _forward(loop: DepthLoop, params, h_BSD, is_real_BS, inputs):
    # In the precision that they are multiplied in. Their gradients are summed up in fp32 by hand.
    params = loop.with_all_layers(params, loop.modules(params)[1].block.dtype)
    router, pool = loop.modules(params)
    active_BS, log_survival_BS = is_real_BS, jnp.zeros(is_real_BS.shape)
    cache = pool.empty_cache(loop.view, loop.max_depth, *is_real_BS.shape)
    products = pool.empty_products(loop.max_depth, is_real_BS.size) if loop.keeps_products else Products({}, {})

    @jax.named_scope("depth_step")
    def step(carry, depth_step):
        h_BSD, before_BS, active_BS, plan, cache, products = carry
        gate_BS, log_survival_BS, sums, route = decide(
            loop, router, h_BSD, before_BS, active_BS, depth_step, inputs, plan
        )
        update_BSD, cache, attended, products, num_computed = pool.forward(
            h_BSD, route.layer_BS, cache, inputs.positions, depth_step, products, depth_step
        )
        trace = Trace(sums, num_computed, route.layer_BS, h_BSD, h_BSD[:, inputs.column_M], route.exit_logit_BS)
        state = _StepState(
            log_survival_BS=before_BS,
            active_BS=active_BS,
            logits_BSN=plan.logits_BSN,
            decided=route.decided,
            cache=cache.varying(),
            attended=attended if loop.keeps_attended else None,
        )
        # The update of a token that executes nothing is exactly 0: its state stays as it is.
        h_BSD = h_BSD + gate_BS[..., None] * update_BSD
        active_BS = active_BS & ~route.exits_BS
        return (h_BSD, log_survival_BS, active_BS, route.plan, cache, products), (trace, state)

    carry = (h_BSD, log_survival_BS, active_BS, router.no_plan(is_real_BS.shape), cache, products)
    (h_BSD, *_, cache, products), (trace, states) = jax.lax.scan(step, carry, jnp.arange(loop.max_depth))
    return h_BSD, trace, (params, inputs, trace.h_BSD, states, cache, products)


def _scanned_forward(loop, params, h_BSD, is_real_BS, inputs):
    h_BSD, trace, residuals = _forward(loop, params, h_BSD, is_real_BS, inputs)
    return (h_BSD, trace), residuals


def _scanned_backward(loop: DepthLoop, residuals, d_outputs):
    params, inputs, h_TBSD, states, last_cache, products_T = residuals
    d_h_BSD, d_trace = d_outputs
    router, pool = loop.modules(params)
    router_graph, router_params = nnx.split(router)

    @jax.named_scope("depth_step")
    def step(carry, of_step):
        d_h_BSD, d_log_survival_BS, d_logits_BSN, d_entries, d_block, d_router = carry
        depth_step, h_BSD, state, d_sums, d_exit_logit_BS, d_read_BMD = of_step
        cache = last_cache.at_step(state.cache)

        def redecide(router_params, h_BSD, log_survival_BS, logits_BSN):
            router, plan = nnx.merge(router_graph, router_params), Plan(logits_BSN=logits_BSN)
            gate_BS, log_survival_BS, sums, route = decide(
                loop, router, h_BSD, log_survival_BS, state.active_BS, depth_step, inputs, plan, state.decided
            )
            outputs = gate_BS, log_survival_BS, route.plan.logits_BSN, differentiable(sums), route.exit_logit_BS
            return outputs, route.layer_BS

        (gate_BS, *_), transpose, layer_BS = jax.vjp(
            redecide, router_params, h_BSD, state.log_survival_BS, state.logits_BSN, has_aux=True
        )
        attended, products, t = state.attended, products_T, depth_step
        if attended is None:
            products, t = pool.empty_products(1, layer_BS.size), 0
            _, _, attended, products, _ = pool.forward(
                h_BSD, layer_BS, cache, inputs.positions, depth_step, products, t, is_again=True
            )
        d_layer_BSD, d_entries, d_block = pool.backward(
            h_BSD,
            layer_BS,
            cache,
            inputs.positions,
            depth_step,
            attended,
            products,
            t,
            gate_BS[..., None] * d_h_BSD,
            d_entries,
            d_block,
        )
        d_gate_BS = (d_h_BSD * attended.update_ND.reshape(h_BSD.shape)).sum(-1)
        d_of_router, d_routed_BSD, d_log_survival_BS, d_logits_BSN = transpose(
            (d_gate_BS, d_log_survival_BS, d_logits_BSN, d_sums, d_exit_logit_BS)
        )
        d_router = jax.tree.map(jnp.add, d_router, d_of_router)
        d_h_BSD += d_layer_BSD + d_routed_BSD
        d_h_BSD = d_h_BSD.at[:, inputs.column_M].add(d_read_BMD, unique_indices=True)
        return (d_h_BSD, d_log_survival_BS, d_logits_BSN, d_entries, d_block, d_router), None

    d_entries = tuple(jnp.zeros(x.shape, jnp.float32) for x in (last_cache.k_BCGK, last_cache.v_BCGK))
    block = pool.block
    weights = block.weights(block.BEFORE + block.AFTER)
    d_block = {name: jnp.zeros(weight.shape, jnp.float32) for name, weight in weights.items()}
    d_router = jax.tree.map(jnp.zeros_like, router_params)
    d_log_survival_BS, d_logits_BSN = jnp.zeros(h_TBSD.shape[1:3]), router.no_plan(h_TBSD.shape[1:3]).logits_BSN
    carry = d_h_BSD, d_log_survival_BS, d_logits_BSN, d_entries, d_block, d_router
    d_sums = differentiable(d_trace.sums)
    steps = jnp.arange(loop.max_depth), h_TBSD, states, d_sums, d_trace.exit_logit_BS, d_trace.read_BMD
    (d_h_BSD, *_, d_block, d_router), _ = jax.lax.scan(step, carry, steps, reverse=True)

    nnx.update(router, d_router)
    pool.scatter_sum(d_block)
    return nnx.split((router, pool))[1], d_h_BSD, None, None


scanned.defvjp(_scanned_forward, _scanned_backward)
