"""The routes of other models with a dynamic depth, against what their papers say, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet.cost import flops_per_token
from radialnet.sections import ConfigError
from tests.tiny import VOCAB, Model, make_batch, make_config


def mlp(x, hidden, out):
    """In numpy, GELU by its tanh form."""
    x = x @ np.asarray(hidden)
    return (0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))) @ np.asarray(out)


def router_input(params, h, depth_step):
    normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
    return normed * np.asarray(params["router"]["norm"]) + np.asarray(params["router"]["step_embedding"])[depth_step]


def scores(params, h, depth_step):
    return mlp(router_input(params, np.asarray(h), depth_step), params["router"]["hidden"], params["router"]["out"])


def test_skip_leaves_out_the_layers_whose_score_says_so():
    """A numpy score above 0, the bias included, sits the step out; but for the first layer, and for first tokens."""
    config = make_config(
        router__form="skip",
        model__pool_size=4,
        model__max_depth=4,
        cache__view="same_layer",
        router__exit_bias_init=0.1,
    )
    model = Model(config)
    model.params["router"]["out"] *= 30
    batch = make_batch(config, packed=True)
    output, is_real = model(batch), batch["document"] >= 0
    num_skipped = 0
    for step in range(4):
        executes = np.asarray(output.layer_TBS[step]) < 4
        assert (np.asarray(output.layer_TBS[step])[executes] == step).all()
        score = scores(model.params, output.h_TBSD[step], step)[..., 0] + 0.1
        np.testing.assert_array_equal(executes, is_real & ((score <= 0) | (step == 0) | (batch["position"] == 0)))
        num_skipped += (is_real & ~executes).sum()
        if step < 3:
            idle = ~executes
            np.testing.assert_array_equal(output.h_TBSD[step + 1][idle], output.h_TBSD[step][idle])
    assert 5 < num_skipped < 3 * is_real.sum() - 5
    ran_again = (np.diff((np.asarray(output.layer_TBS) < 4)[:, is_real].astype(int), axis=0) > 0).any()
    assert ran_again, "tokens jump forward, and do not only leave"
    before = Model(make_config(**{**SKIP, "router__exit_warmup_steps": 3}), step=2)
    before.params["router"]["out"] *= 30
    assert (np.asarray(before(batch).depth_BS)[is_real] == 4).all(), "not in the warm-up"


SKIP = {"router__form": "skip", "model__pool_size": 4, "model__max_depth": 4, "router__exit_bias_init": 0.1}


@pytest.mark.parametrize("overrides, told", [
    ({"model__max_depth": 5}, "config.model.max_depth=5 is more than config.model.pool_size=4"),
    ({"router__depth_coef": 0.1}, "config.router.depth_coef=0.1 and explore=0.0, 0 is"),
    ({"router__estimator": "dense"}, "'dense' is for forms that choose a layer"),
])  # fmt: skip
def test_skips_that_can_not_work(overrides, told):
    with pytest.raises(ConfigError, match=told):
        make_config(**{**SKIP, **overrides})


def mod_model(**overrides):
    config = make_config(
        **{
            "router__form": "mod",
            "router__capacity": 0.4,
            "model__max_depth": 4,
            "model__min_depth": 4,
            "cache__view": "same_step",
            **overrides,
        }
    )
    return Model(config)


def test_mod_runs_the_tokens_with_the_highest_scores_at_every_second_step():
    model = mod_model()
    batch = make_batch(model.config, packed=True)
    output = model(batch)
    is_real = batch["document"] >= 0
    for depth_step in range(4):
        executes = np.asarray(output.layer_TBS[depth_step]) < 5
        assert (np.asarray(output.layer_TBS[depth_step])[executes] == depth_step).all()
        if depth_step % 2 == 0:
            np.testing.assert_array_equal(executes, is_real)
            continue
        score = scores(model.params, output.h_TBSD[depth_step], depth_step)[..., 0]
        for row in range(2):
            ranked = [token for token in np.argsort(-score[row]) if is_real[row, token]]
            expected = set(ranked[: int(np.ceil(0.4 * len(ranked)))])
            assert set(np.flatnonzero(executes[row])) == expected
        if depth_step < 3:
            idle = is_real & ~executes
            np.testing.assert_array_equal(output.h_TBSD[depth_step + 1][idle], output.h_TBSD[depth_step][idle])
    assert set(np.asarray(output.depth_BS)[is_real]) == {2, 3, 4}


def test_mod_weighs_an_update_by_its_score():
    """By the `weighted` estimator as in the paper; the `straight_through` one leaves its value alone."""
    updates = {}
    for estimator in ("weighted", "straight_through"):
        model = mod_model(router__estimator=estimator, model__max_depth=2, model__min_depth=2)
        output = model(make_batch(model.config))
        executes = np.asarray(output.layer_TBS[1]) < 5
        updates[estimator] = np.asarray(output.exit_BSD - output.h_TBSD[1])[executes]
        score = scores(model.params, output.h_TBSD[1], 1)[executes]
    # The first step is no competition, so that both go into the second one with the same state.
    np.testing.assert_allclose(updates["weighted"], updates["straight_through"] / (1 + np.exp(-score)), atol=1e-5)


def test_mod_evaluates_by_its_predictor_which_looks_at_no_later_token():
    model = mod_model()
    batch = make_batch(model.config)
    predictor = model.params["router"]["predictor_hidden"], model.params["router"]["predictor_out"]
    h_BSD = np.asarray(model(batch).h_TBSD[1])
    bias = -np.median(mlp(router_input(model.params, h_BSD, 1), *predictor))
    # So that it says yes to half of the tokens.
    model.params["router"]["predictor_bias"] += bias
    changed = {**batch, "token": batch["token"].copy()}
    changed["token"][:, 9:] = (changed["token"][:, 9:] + 5) % VOCAB
    evaluated, trained = (
        [np.asarray(model(b, at=at).layer_TBS)[..., :9] for b in (batch, changed)]
        for at in (model.at.for_evaluation(), model.at)
    )
    np.testing.assert_array_equal(*evaluated)
    assert (trained[0] != trained[1]).any(), "the competition looks at the whole row"
    assert 0 < (evaluated[0][1] < 5).mean() < 1
    output = model(batch, at=model.at.for_evaluation())
    expected = mlp(router_input(model.params, np.asarray(output.h_TBSD[1]), 1), *predictor)[..., 0] + bias > 0
    np.testing.assert_array_equal(np.asarray(output.layer_TBS[1]) < 5, expected)


def test_predictor_is_scored_by_the_competition_in_evaluation_too():
    model = mod_model()
    batch = make_batch(model.config)
    at = model.at.for_evaluation()
    losses = {}
    for bias in (-30.0, 30.0):
        params = {**model.params, "router": {**model.params["router"]}}
        params["router"]["predictor_bias"] = params["router"]["predictor_bias"] + bias
        losses[bias] = float(model(batch, params, at=at).routing.predictor_nats)
    # Two of the four steps; 6 of the 13 tokens of a row win. Saying no to all is wrong for those, yes for the others.
    assert losses[-30.0] == pytest.approx(2 * 2 * 6 * 30, rel=0.1)
    assert losses[30.0] == pytest.approx(2 * 2 * 7 * 30, rel=0.1)


def test_predictor_learns_and_changes_nothing_but_itself():
    model = mod_model()
    batch = make_batch(model.config)

    def nats(params):
        routing = model(batch, params).routing
        return routing.predictor_nats / routing.num_decisions

    grads = jax.grad(nats)(model.params)
    for path, grad in jax.tree.leaves_with_path(grads):
        is_predictor = "predictor" in jax.tree_util.keystr(path)
        assert bool((grad != 0).any()) == is_predictor, path
    better = jax.tree.map(lambda param, grad: param - 0.3 * grad, model.params, grads)
    assert nats(better) < nats(model.params)


def recursion_model(**overrides):
    return Model(
        make_config(**{"router__form": "recursion", "model__pool_size": 2, "model__max_depth": 6, **overrides})
    )


def test_recursion_chooses_the_depth_once_and_keeps_to_it():
    # With this seed tokens choose one, two and three rounds.
    model = recursion_model(router__exit_bias_init=0.3, train__seed=1)
    model.params["router"]["out"] *= 50
    batch = make_batch(model.config, packed=True)
    output = model(batch)
    is_real = batch["document"] >= 0
    logits = scores(model.params, output.h_TBSD[0], 0) - 0.3 * np.arange(3)
    expected = np.where(is_real, 2 * (1 + logits.argmax(-1)), 0)
    np.testing.assert_array_equal(output.depth_BS, expected)
    assert set(expected[is_real]) == {2, 4, 6}
    for depth_step in range(6):
        layer = np.where(expected > depth_step, depth_step % 2, 2)
        np.testing.assert_array_equal(output.layer_TBS[depth_step], layer)


def test_recursion_weighs_every_update_by_the_probability_of_the_choice():
    outputs = {}
    for estimator in ("weighted", "straight_through"):
        model = recursion_model(router__estimator=estimator)
        model.params["router"]["out"] *= 50
        outputs[estimator] = model(make_batch(model.config))
    h = {name: np.asarray(output.h_TBSD) for name, output in outputs.items()}
    logits = scores(model.params, h["weighted"][0], 0)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = p.max(-1, keepdims=True)
    updates = {name: states[1] - states[0] for name, states in h.items()}
    np.testing.assert_allclose(updates["weighted"], chosen * updates["straight_through"], atol=1e-5)


def test_recursion_has_a_z_loss_of_its_logits_and_of_how_far_they_are_apart():
    """Once for each token, by what they are without the exit bias, which says how deep the tokens go; of those rounds
    that may be chosen, the fewest and the most."""
    for min_depth, first in ((1, 0), (3, 1)):
        fields = {"model__min_depth": min_depth, "router__depth_target": 4.0, "router__exit_bias_init": 0.3}
        model = recursion_model(**fields, train__seed=1)
        model.params["router"]["out"] *= 50
        batch = make_batch(model.config, packed=True)
        output = model(batch)
        logits = scores(model.params, output.h_TBSD[0], 0)[batch["document"] >= 0]
        expected = np.log(np.exp(logits).sum(-1)) ** 2 + (logits[:, first] - logits[:, -1]) ** 2
        np.testing.assert_allclose(output.routing.z, expected.sum(), rtol=1e-4)


def test_recursion_takes_as_many_rounds_as_the_min_depth_asks_for():
    for min_depth, expected in ((3, {4, 6}), (6, {6})):
        model = recursion_model(model__min_depth=min_depth, router__depth_target=6.0, router__exit_bias_init=9.0)
        model.params["router"]["out"] *= 50
        depth = np.unique(model(make_batch(model.config)).depth_BS)
        assert set(depth) <= expected and min(depth) == min(expected)
    # However large the bias is.
    model = recursion_model(model__min_depth=3, router__depth_target=6.0, router__exit_bias_init=1e9)
    assert (np.asarray(model(make_batch(model.config)).depth_BS) == 4).all()


def test_recursion_at_another_max_depth():
    """Less cuts it off; more changes nothing, for the choice was made before."""
    model = recursion_model(train__seed=1)
    model.params["router"]["out"] *= 50
    batch = make_batch(model.config)
    depth = np.asarray(model(batch).depth_BS)
    assert set(depth.ravel()) == {2, 4, 6}
    np.testing.assert_array_equal(model(batch, max_depth=3).depth_BS, np.minimum(depth, 3))
    np.testing.assert_array_equal(model(batch, max_depth=8).depth_BS, depth)


def test_recursion_runs_all_rounds_before_exits_are_allowed():
    model = recursion_model(router__exit_warmup_steps=5)
    assert (np.asarray(model(make_batch(model.config)).depth_BS) == 6).all()


def test_early_exit_takes_the_layers_in_turn():
    config = make_config(router__form="early_exit", model__pool_size=3, router__exit_bias_init=0.0, train__seed=1)
    model = Model(config).with_mixed_exits()
    batch = make_batch(config)
    output = model(batch)
    assert len(np.unique(output.depth_BS)) == 3
    for depth_step in range(3):
        expected = np.where(np.asarray(output.depth_BS) > depth_step, depth_step, 3)
        np.testing.assert_array_equal(output.layer_TBS[depth_step], expected)
    controllers = model.controllers.replace(exit_bias=jnp.float32(-1e4))
    plain = Model(make_config(router__form="sequential", model__pool_size=3))
    params = {name: param for name, param in model.params.items() if name != "router"}
    np.testing.assert_allclose(
        model(batch, controllers=controllers).logits_BSV, plain(batch, params).logits_BSV, atol=1e-5
    )


@pytest.mark.parametrize("num_groups", [0, 2])
def test_hash_exit_goes_where_a_heavy_group_hash_prior_does(num_groups):
    """And beyond the trained max depth, where it stays at the last step's layer."""
    given, preferred = (
        Model(make_config(model__num_groups=num_groups, **router))
        for router in (
            {"router__form": "hash_exit"},
            {"router__prior": "group_hash", "router__prior_weight": 1000.0},
        )
    )
    batch, never = make_batch(given.config), given.controllers.replace(exit_bias=jnp.float32(-50))
    layer_TBS = given(batch, controllers=never, max_depth=5).layer_TBS
    np.testing.assert_array_equal(layer_TBS, preferred(batch, controllers=never, max_depth=5).layer_TBS)
    assert len(np.unique(layer_TBS[0])) > 1


@pytest.mark.parametrize("exit_training", ["gate", "benefit"])
def test_given_routes_are_looked_at_only_where_a_token_may_leave(exit_training):
    config = make_config(
        router__form="hash_exit", router__exit_training=exit_training, model__min_depth=2, router__exit_bias_init=-9.0
    )
    model, batch = Model(config), make_batch(config)
    model.params["router"]["out_bias"] += 1
    logit_TBS = np.asarray(model(batch).exit_logit_TBS)
    assert (logit_TBS[:2] == 0).all() and (logit_TBS[2] != 0).all()
    assert (
        set(model.params["router"]) & {"out", "exit_out"} == {"gate": {"out"}, "benefit": {"exit_out"}}[exit_training]
    )


def test_given_routes_without_exits_are_the_hash_and_cost_no_more():
    given = Model(make_config(router__form="hash_exit", model__num_groups=1, model__min_depth=3))
    hashed = Model(make_config(router__form="hash", model__min_depth=3))
    batch = make_batch(given.config)
    params = {name: param for name, param in given.params.items() if name != "router"}
    np.testing.assert_array_equal(given(batch).logits_BSV, hashed(batch, params).logits_BSV)
    assert flops_per_token(given.config, VOCAB, [1, 1, 1]) == flops_per_token(hashed.config, VOCAB, [1, 1, 1])


def test_exits_learn_of_given_routes_and_change_nothing_of_what_they_predict_from():
    """The network of exits by benefit learns its norm and its step embedding as well; the embedding of tokens not by
    it."""
    config = make_config(router__form="hash_exit", router__exit_training="benefit", model__min_depth=1)
    model, batch = Model(config), make_batch(config)
    model.params["router"]["exit_out"] += 0.1

    def squares(params):
        return (model(batch, params).exit_logit_TBS ** 2).sum()

    grads = jax.grad(squares)(model.params)
    assert all(
        np.abs(grads["router"][name]).max() > 0 for name in ("norm", "step_embedding", "exit_out", "exit_hidden")
    )
    assert np.abs(grads["embedding"]).max() == 0


def test_flops_of_the_routers():
    given = make_config(router__form="hash_exit", model__min_depth=2, cache__view="same_step")
    plain = flops_per_token(make_config(router__form="random", cache__view="same_step"), VOCAB, [1, 1, 0.5])
    assert flops_per_token(given, VOCAB, [1, 1, 0.5]) - plain == 2 * 24 * (24 + 1), "of the last of three steps"
    of_token = make_config(
        router__form="hash_exit",
        router__exit_training="benefit",
        router__exit_sees="token",
        router__explore=0.1,
        cache__view="same_step",
    )
    assert flops_per_token(of_token, VOCAB, [1, 1, 0.5]) == plain
    mod, recursion = mod_model().config, recursion_model().config
    scored = flops_per_token(mod, VOCAB, [1, 0.4, 1, 0.4])
    plain = flops_per_token(make_config(router__form="random", cache__view="same_step"), VOCAB, [1, 0.4, 1, 0.4])
    assert scored - plain == 2 * 2 * 2 * 24 * (24 + 1)
    chosen = flops_per_token(recursion, VOCAB, [1] * 6)
    plain = flops_per_token(make_config(router__form="random", model__pool_size=2), VOCAB, [1] * 6)
    assert chosen - plain == 2 * 24 * (24 + 3)


@pytest.mark.parametrize(
    "overrides, field",
    [
        ({"router__form": "recursion", "model__pool_size": 4}, "max_depth"),
        ({"router__form": "recursion", "model__pool_size": 1, "router__depth_coef": 0.1}, "depth_coef"),
        ({"router__form": "mod", "router__capacity": 0.0, "model__min_depth": 3}, "capacity"),
        ({"router__form": "mod", "router__capacity_every": 1, "model__min_depth": 3}, "capacity_every"),
        ({"router__form": "mod", "router__capacity_every": 4, "model__min_depth": 3}, "capacity_every"),
        ({"router__form": "mod"}, "min_depth"),
        ({"router__form": "early_exit", "router__estimator": "dense"}, "estimator"),
    ],
)
def test_what_a_form_needs(overrides, field):
    with pytest.raises(ConfigError, match=field):
        make_config(**overrides)
