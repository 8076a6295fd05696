"""The scan over depth with its gradient by hand, against the same steps one after the other under autodiff."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet import attention
from radialnet import model as model_module
from radialnet.depth import scanned, unrolled
from radialnet.sections import VIEWS
from radialnet.train_step import forward
from tests.tiny import TOKEN_EXITS, Model, make_batch, make_config


def value_and_grads(run, monkeypatch, **overrides):
    """Of a loss that everything with a gradient is in."""
    calls = []

    def spy(*arguments):
        calls.append(run)
        return run(*arguments)

    # Without this the model would scan on both sides, and the comparison could not fail.
    monkeypatch.setattr(model_module, "scanned", spy)
    # Several tiles a row, the last one reaching back.
    monkeypatch.setattr(attention, "TILE", 5)
    config = make_config(model__max_depth=4, **overrides)
    model, batch = Model(config), make_batch(config, packed=True)
    if config.router.is_trained:
        model.with_mixed_exits()
    # Controllers as they are in the middle of a run.
    load_bias = jnp.asarray(np.random.default_rng(0).normal(size=5), jnp.float32)
    controllers = model.controllers.replace(load_bias=load_bias, exit_bias=jnp.float32(0.2))

    def loss(params):
        output = forward(model.graph, params, batch, controllers, model.at, jax.random.key(0))
        routing = output.routing
        auxiliary = routing.expected_depth + routing.z + routing.predictor_nats + (routing.p_layer_L**2).sum()
        if config.router.form == "skip":
            # Its scores are in no other part of the loss.
            auxiliary += (output.exit_logit_TBS**2).sum()
        if output.read is not None:
            read = output.read
            of_read_BM = (read.final_BMD**2).mean(-1) + (read.exit_logit_BM - read.num_left_BM) ** 2
            auxiliary += jnp.where(read.is_read_BM, of_read_BM, 0).sum()
        return (output.logits_BSV**2).mean() + 0.01 * auxiliary, output

    (value, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
    assert calls == [run]
    return value, grads, output


CASES = {
    **{view: {"cache__view": view} for view in VIEWS},
    **{estimator: {"router__estimator": estimator} for estimator in ("score", "weighted")},
    "flat with noise": {"router__form": "flat", "router__noise": 0.5, "router__noise_steps": 9},
    "group prior": {"router__prior": "group"},
    "bf16": {"model__dtype": "bfloat16"},
    "bf16 remat": {"model__dtype": "bfloat16", "model__remat": "step", "cache__view": "all"},
    "random": {"router__form": "random", "cache__view": "all"},
    "early exit": {"router__form": "early_exit"},
    "hash exit": {"router__form": "hash_exit", "model__num_groups": 2, "model__min_depth": 1},
    "hash exit by benefit remat": {
        "router__form": "hash_exit",
        "router__exit_training": "benefit",
        "model__remat": "step",
        "model__min_depth": 1,
    },
    "exits by benefit": {"router__exit_training": "benefit"},
    "exits by benefit remat": {
        "router__exit_training": "benefit",
        "router__read_every": 3,
        "model__remat": "step",
        "cache__view": "all",
    },
    "exits by benefit of the token": TOKEN_EXITS,
    "mod": {"router__form": "mod", "router__estimator": "weighted", "model__min_depth": 4, "cache__view": "same_step"},
    "recursion": {"router__form": "recursion", "train__seed": 1, "model__pool_size": 2, "cache__view": "all"},
    "skip": {"router__form": "skip", "router__estimator": "score", "cache__view": "same_layer"},
    "recursion remat": {"router__form": "recursion", "train__seed": 1, "model__pool_size": 2, "model__remat": "step"},
    "linear router": {"router__network": "linear", "router__sees_step": False},
    "low-rank router": {"router__network": "low_rank", "router__hidden": 3},
    "every second step": {"router__every": 2, "router__prior": "group"},
    "every second step remat": {"router__every": 2, "model__remat": "step", "router__estimator": "weighted"},
    "route chosen once": {"router__every": 4, "router__prior": "group", "model__min_depth": 4},
    "exits by benefit, linear, every second step": {
        "router__exit_training": "benefit",
        "router__network": "linear",
        "router__every": 2,
    },
    "prelude and coda": {"model__prelude_layers": 1, "model__coda_layers": 2},
    "other layers": {"model__norm": "layer", "model__mlp": "relu", "model__biases": True},
    "ragged_dot": {"model__grouped_backend": "ragged_dot"},
    "kernels": {"model__grouped_backend": "pallas", "model__attention_backend": "pallas", "cache__view": "all"},
    **{f"remat {view}": {"model__remat": "step", "cache__view": view} for view in VIEWS},
}


@pytest.mark.parametrize("case", CASES)
def test_scan_by_hand_equals_autodiff_of_the_unrolled_loop(monkeypatch, case):
    overrides = CASES[case]
    value, grads, output = value_and_grads(scanned, monkeypatch, **overrides)
    plain = {**overrides, "model__remat": "none", "model__grouped_backend": "masked_dense"}
    plain["model__attention_backend"] = "tiles"
    plain_value, plain_grads, plain_output = value_and_grads(unrolled, monkeypatch, **plain)
    tolerance = 2e-2 if "bf16" in case else 2e-5
    np.testing.assert_allclose(value, plain_value, rtol=tolerance)
    np.testing.assert_array_equal(output.layer_TBS, plain_output.layer_TBS)
    np.testing.assert_allclose(output.h_TBSD, plain_output.h_TBSD, atol=tolerance)
    if case not in ("random", "route chosen once"):
        assert len(np.unique(output.depth_BS)) >= 3, "tokens leave at different depths"
    assert jax.tree.structure(grads) == jax.tree.structure(plain_grads)

    def close(path, left, right):
        scale = np.abs(right).max()
        np.testing.assert_allclose(left, right, atol=tolerance * scale + 1e-9, err_msg=str(path))
        return scale

    scales = jax.tree.map_with_path(close, grads, plain_grads)
    assert all(scale > 0 for scale in jax.tree.leaves(scales)), "every parameter has a gradient"


def test_program_does_not_grow_with_depth_or_pool():
    """So that compile time doesn't either."""

    def size(max_depth, pool_size):
        config = make_config(model__max_depth=max_depth, model__pool_size=pool_size)
        model, batch = Model(config), make_batch(config)

        def loss(params):
            return forward(model.graph, params, batch, model.controllers, model.at, jax.random.key(0)).exit_BSD.sum()

        return len(jax.jit(jax.grad(loss)).lower(model.params).as_text())

    base = size(2, 8)
    assert size(7, 8) < 1.05 * base
    assert size(2, 13) < 1.05 * base


def memory(max_depth, **overrides):
    config = make_config(model__max_depth=max_depth, model__pool_size=3, train__seq_len=64, **overrides)
    model, batch = Model(config), make_batch(config)

    def loss(params):
        output = forward(model.graph, params, batch, model.controllers, model.at, jax.random.key(0))
        return output.exit_BSD.sum() + (output.read.final_BMD.sum() if output.read else 0)

    return jax.jit(jax.grad(loss)).lower(model.params).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("view", ["all", "same_layer"])
def test_one_cache_is_kept_and_not_one_for_each_step(view):
    """Twice as deep is twice the memory; T caches of T steps would be four times."""
    sizes = [memory(depth, cache__view=view) for depth in (8, 16)]
    assert sizes[1] < 2.3 * sizes[0]


def test_rematerialisation_saves_memory():
    kept, again = (memory(16, model__remat=remat) for remat in ("none", "step"))
    assert again < 0.6 * kept


def test_states_that_are_not_read_have_no_gradient_to_keep():
    """A step keeps a gradient of what is read of its states, and not of all."""
    fields = {"model__min_depth": 1, "model__remat": "step"}
    few = memory(16, router__exit_training="benefit", router__read_every=8, **fields)
    config = make_config(train__seq_len=64)
    states = 16 * config.train.batch_size * 64 * config.model.d_model * 4
    assert few - memory(16, **fields) < 0.5 * states


def test_a_step_that_is_not_differentiated_keeps_nothing():
    config = make_config(model__max_depth=16, train__seq_len=64)
    model, batch = Model(config), make_batch(config)
    run = partial(forward, model.graph, controllers=model.controllers, at=model.at, rng=jax.random.key(0))
    program = jax.jit(lambda params: run(params, batch).exit_BSD).lower(model.params).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.3 * memory(16)


def test_gate_of_an_exited_token_gives_no_gradient():
    """It executes nothing, so that nothing depends on what its gate is."""
    config = make_config(model__min_depth=0, router__exit_bias_init=100.0)
    model, batch = Model(config), make_batch(config)

    def loss(router):
        output = forward(
            model.graph, {**model.params, "router": router}, batch, model.controllers, model.at, jax.random.key(0)
        )
        return output.exit_BSD.sum(), output.depth_BS

    grads, depth = jax.grad(loss, has_aux=True)(model.params["router"])
    assert (depth == 0).all()
    assert all((jnp.asarray(grad) == 0).all() for grad in jax.tree.leaves(grads))
