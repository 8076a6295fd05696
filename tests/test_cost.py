"""The model of costs against plain programs, what XLA counts, and the arrays of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from radialnet.baseline import VOCAB as BASELINE_VOCAB
from radialnet.baseline import dense_logits, dense_params
from radialnet.cache import UnifiedCache
from radialnet.controllers import Controllers, schedule
from radialnet.cost import entry_bytes, flops_by_part, flops_per_token, weights_by_part
from radialnet.model import abstract_params
from radialnet.peer_routers import make_router
from radialnet.router import StepInputs, row_keys
from tests.tiny import TOKEN_EXITS, VOCAB, make_config


def count_flops(function, *arguments, in_branches: bool = True) -> int:
    """2 per multiply-add of every matrix product of a program without loops; of branches the dearest."""

    def count(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "cond" and in_branches:
                total += max(count(branch.jaxpr) for branch in equation.params["branches"])
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                total += 2 * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_flop_model_against_a_plain_program():
    """A row through a router and one layer twice, and the head, as products of matrices of these shapes."""
    config = make_config(model__max_depth=2, cache__view="all", router__hidden=9)
    seq, d_model, q_width, kv_width, d_ff = 13, 24, 24, 8, 20
    h = jnp.ones((seq, d_model))

    def layer_and_router(num_slots):
        q, k, v = h @ jnp.ones((d_model, q_width)), h @ jnp.ones((d_model, kv_width)), h @ jnp.ones((d_model, kv_width))
        # The half of the slots that causality leaves on average.
        keys, values = jnp.ones((4, num_slots, 6)), jnp.ones((4, num_slots, 6))
        mixed = jnp.einsum("hst,htk->hsk", jnp.einsum("hsk,htk->hst", q.reshape(4, seq, 6), keys), values)
        mlp = (h @ jnp.ones((d_model, d_ff))) * (h @ jnp.ones((d_model, d_ff)))
        routed = (h @ jnp.ones((d_model, 9))) @ jnp.ones((9, 6))
        return q, k, v, mixed, h @ jnp.ones((q_width, d_model)), mlp @ jnp.ones((d_ff, d_model)), routed

    half = (seq + 1) // 2
    steps = [count_flops(lambda t=t: layer_and_router(t * half)) for t in (1, 2)]
    head = count_flops(lambda: h @ jnp.ones((d_model, VOCAB)))
    assert flops_per_token(config, VOCAB, [1, 1]) == pytest.approx((sum(steps) + head) / seq)


def test_flops_follow_the_depth():
    """Half of the tokens leave after one layer, the others never do: by hand, for each view."""
    layer, attention, router = 2 * (24 * (24 + 16) + 24 * 24 + 3 * 24 * 20), 4 * 24 * 14 / 2, 2 * 24 * (24 + 6)
    head = 2 * 24 * VOCAB
    # The others decide three times, those that leave at the second decision twice.
    seen = {"all": 1 + 0.5 * 1.5 + 0.5 * 2, "latest": 2, "first": 2, "same_step": 1 + 0.25 + 0.25}
    for view, entries in seen.items():
        found = flops_per_token(make_config(cache__view=view), VOCAB, [1, 0.5, 0.5])
        assert found == pytest.approx(2 * layer + entries * attention + 2.5 * router + head), view


def test_a_token_that_skipped_the_first_step_is_seen_in_latest_once_it_executed_another():
    config = make_config(router__form="skip", model__min_depth=0, cache__view="latest")
    late, early = (flops_per_token(config, VOCAB, executes_T) for executes_T in ([0.1, 0.9, 0.9], [0.9, 0.9, 0.1]))
    attention = 4 * 24 * 14 / 2
    # By the tokens that have an entry at each step: 0.1, 0.9, 0.9, and 0.9 at all three.
    assert late - early == pytest.approx(attention * (0.1 * 0.1 - 0.9 * 0.9 + 0.9 * 0.9 - 0.1 * 0.9))


def test_flop_model_against_what_xla_counts():
    """Of a dense transformer of realistic width, written plainly: within 2 %. XLA counts all of S x S."""
    config = make_config(
        model__d_model=256,
        model__num_heads=4,
        model__num_kv_heads=4,
        model__d_ff=1024,
        model__pool_size=3,
        train__seq_len=64,
        router__form="sequential",
        cache__view="latest",
    )
    token_BS = jnp.zeros((2, 64), jnp.int32)
    program = jax.jit(lambda params: dense_logits(params, token_BS, config)).lower(dense_params(config)).compile()
    counted = program.cost_analysis()["flops"] / token_BS.size
    beyond_causal = 3 * 4 * 256 * 63 / 2
    model = flops_per_token(config, BASELINE_VOCAB, [1, 1, 1]) + beyond_causal
    assert model == pytest.approx(counted, rel=0.02)


ROUTERS = {
    "mlp": {},
    "linear": {"router__network": "linear", "router__sees_step": False},
    "low rank": {"router__network": "low_rank", "router__hidden": 3},
    "exits by benefit": {"router__exit_training": "benefit", "router__hidden": 7},
    "exits by benefit of the token": TOKEN_EXITS,
    "early exit": {"router__form": "early_exit", "model__min_depth": 0},
    "hash exit by benefit": {"router__form": "hash_exit", "router__exit_training": "benefit", "model__min_depth": 0},
    "hash exit by benefit of the token": {"router__form": "hash_exit", **TOKEN_EXITS, "model__min_depth": 0},
    "skip": {"router__form": "skip"},
    "mod": {"router__form": "mod", "model__min_depth": 3, "router__estimator": "weighted"},
    "recursion": {"router__form": "recursion", "model__pool_size": 1},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_router_against_the_products_of_its_own_program(name):
    """FLOPs of one step, and what its matrices hold."""
    config = make_config(**ROUTERS[name])
    graph, params = nnx.split(make_router(config.model, config.router, VOCAB, nnx.Rngs(0)))
    token_BS = jnp.zeros((1, 1), jnp.int32)

    def step(params, h_BSD):
        router = nnx.merge(graph, params)
        given = token_BS[..., None], token_BS < 0, token_BS == 0, jnp.int32(0), row_keys(jax.random.key(0), 0, 1)
        inputs = StepInputs(*given, router.no_plan((1, 1)))
        at = schedule(config.router, 3, jnp.int32(0))
        return router(h_BSD, inputs, Controllers.init(config.router, config.model.pool_size), at)

    counted = count_flops(step, params, jnp.zeros((1, 1, config.model.d_model)))
    # Of a token that leaves, or ends, after the first step: `mod` looks at the second step alone, as often as here.
    executes_T = [1, 1] if name == "mod" else [1]
    assert flops_by_part(config, VOCAB, executes_T)["router"] == counted
    assert (counted == 0) == (name == "hash exit by benefit of the token")
    if config.router.gives_layers:
        always = count_flops(step, params, jnp.zeros((1, 1, config.model.d_model)), in_branches=False)
        assert always == 0, "a step at which nobody may leave computes none of it"
    matrices = [x.size for x in jax.tree.leaves(params) if x.ndim == 2]
    assert weights_by_part(config, VOCAB)["router"] == sum(matrices)


def test_routing_every_second_step_asks_half_as_often():
    each, second, once = (
        flops_by_part(make_config(router__every=every, model__max_depth=5), VOCAB, [1, 1, 0.5, 0.5, 0.5])["router"]
        for every in (1, 2, 5)
    )
    # Decided at steps 0, 1, 2 by all tokens, at 3 and 4 by half of them.
    assert (second / once, each / once) == (1 + 1 + 0.5, 1 + 1 + 1 + 0.5 + 0.5)


@pytest.mark.parametrize("overrides", [{}, {"model__mlp": "relu", "model__prelude_layers": 1}])
def test_weights_and_entries_against_the_arrays_of_the_model(overrides):
    config = make_config(**overrides)
    _, params = abstract_params(config, VOCAB)
    found = weights_by_part(config, VOCAB)
    of_block = [x.size // 5 for x in jax.tree.leaves(params["pool"]["block"]) if x.ndim > 2]
    assert found["layer"] == sum(of_block)
    assert (found["head"], found["embedding"]) == (params["head"].size, params["embedding"].size)
    assert entry_bytes(config) == 2 * 2 * 4 * 4
    assert entry_bytes(make_config(model__dtype="bfloat16")) == 2 * 2 * 4 * 2


@pytest.mark.parametrize(("view", "entries"), [("all", 3 * 13), ("latest", 13)])
def test_bytes_of_the_cache_against_the_memory_of_its_program(view, entries):
    config = make_config(cache__view=view)
    graph, params = abstract_params(config, VOCAB)

    def empty(params) -> UnifiedCache:
        return nnx.merge(graph, params).pool.empty_cache(view, 3, 2, 13)

    made = jax.jit(empty).lower(params).compile().memory_analysis().output_size_in_bytes
    # Besides the entry itself each slot knows its token and its layer, and each row how many it has.
    told = 2 * entries * 8 + 2 * 4
    # Arrays of the program start at multiples of 8 bytes, and there is a pointer to each of the five.
    assert made - told == pytest.approx(2 * entries * entry_bytes(config), abs=5 * 16)
