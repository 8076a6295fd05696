"""The whole model against oracles: a plain transformer, causality by gradient, isolation of rows and documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet.model import RadialTransformer, init_params, upcycle
from radialnet.sections import VIEWS
from radialnet.train_step import forward
from tests.plain import plain_network
from tests.tiny import VOCAB, Model, make_batch, make_config, perturbed


def dense_config(**overrides):
    return make_config(model__pool_size=4, model__max_depth=4, router__form="sequential", **overrides)


@pytest.mark.parametrize("backend", ["block_loop", "ragged_dot", "pallas", "masked_dense"])
@pytest.mark.parametrize("view", ["latest", "same_step", "same_layer"])
def test_sequential_routes_equal_a_plain_transformer(view, backend):
    """In these three views a token in layer t sees what the others wrote in layer t, as in a plain transformer."""
    config = dense_config(cache__view=view, model__grouped_backend=backend)
    model, batch = Model(config), make_batch(config, packed=True)
    params = perturbed(model.params)
    output = model(batch, params)
    np.testing.assert_array_equal(output.depth_BS, np.where(batch["document"] >= 0, 4, 0))
    for row in range(2):
        real = batch["document"][row] >= 0
        fields = (batch[name][row][real] for name in ("token", "document", "position"))
        expected, _ = plain_network(config, params, *fields)
        np.testing.assert_allclose(output.logits_BSV[row][real], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("view, estimator", [*((view, "straight_through") for view in VIEWS), ("all", "weighted")])
def test_a_routed_network_equals_the_plain_one(view, estimator):
    """Routes, exits, what an exited token leaves behind for the others, and the value of the `weighted` gate."""
    config = make_config(cache__view=view, router__estimator=estimator, model__max_depth=4, model__min_depth=0)
    model, batch = Model(config), make_batch(config, packed=True)
    # This seed sends real tokens to every depth from 0 to 4.
    params = perturbed(model.params, seed=1)
    params["router"]["out"] *= np.where(np.arange(6) == 5, 2.0, 4.0)
    params["router"]["out_bias"] *= 0
    output = model(batch, params)
    if estimator != "weighted":
        assert set(np.asarray(output.depth_BS)[batch["document"] >= 0]) == {0, 1, 2, 3, 4}
    for row in range(2):
        real = batch["document"][row] >= 0
        fields = (batch[name][row][real] for name in ("token", "document", "position"))
        expected, depth = plain_network(config, params, *fields)
        np.testing.assert_array_equal(output.depth_BS[row][real], depth)
        np.testing.assert_allclose(output.logits_BSV[row][real], expected, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("of", [dense_config, make_config])
def test_without_qk_norm_and_with_another_epsilon(of):
    config = of(model__qk_norm=False, model__norm_eps=0.1)
    model, batch = Model(config), make_batch(config)
    params = perturbed(model.params)
    assert not {"query_norm", "key_norm"} & set(params["pool"]["block"])
    logits_SV, fields = (
        model(batch, params).logits_BSV[0],
        [batch[name][0] for name in ("token", "document", "position")],
    )
    np.testing.assert_allclose(logits_SV, plain_network(config, params, *fields)[0], atol=5e-4, rtol=1e-3)
    smaller = dataclasses.replace(config, model=dataclasses.replace(config.model, norm_eps=1e-6))
    assert np.abs(logits_SV - plain_network(smaller, params, *fields)[0]).max() > 0.01


OPT = {"norm": "layer", "mlp": "relu", "biases": True, "positions": "learned", "max_positions": 14, "qk_norm": False}


@pytest.mark.parametrize("parts, num_biases", [(OPT, 7), ({"norm": "layer", "mlp": "gelu"}, 3), ({"biases": True}, 4)])
def test_layers_of_other_parts(parts, num_biases):
    config = make_config(**{f"model__{name}": value for name, value in parts.items()})
    model, batch = Model(config), make_batch(config, packed=True)
    params = perturbed(model.params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    assert sum("bias" in name and "router" not in name for name in names) == num_biases
    real = batch["document"][0] >= 0
    logits_SV = model(batch, params).logits_BSV[0][real]
    fields = (batch[name][0][real] for name in ("token", "document", "position"))
    np.testing.assert_allclose(logits_SV, plain_network(config, params, *fields)[0], atol=5e-4, rtol=1e-3)


def test_other_views_are_not_a_plain_transformer():
    """So that the parity above has something to tell apart."""
    outputs = {}
    for view in VIEWS:
        config = dense_config(cache__view=view)
        outputs[view] = np.asarray(Model(config)(make_batch(config)).logits_BSV)
    for view in ("all", "first"):
        assert np.abs(outputs[view] - outputs["latest"]).max() > 0.01


def test_backends_agree_on_the_dense_estimator():
    """Values and gradients, with exits: the block loop of executed rows against all layers masked."""
    results, programs = [], set()
    for backend in ("block_loop", "masked_dense"):
        config = make_config(model__grouped_backend=backend, router__estimator="dense")
        model, batch = Model(config).with_mixed_exits(), make_batch(config, packed=True)

        def loss(params, model=model, batch=batch):
            output = model(batch, params)
            return (output.logits_BSV**2).mean() + output.routing.expected_depth, output.depth_BS

        program = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(model.params)
        programs.add(str(program.jaxpr).count("while["))
        results.append(program.lower().compile()(model.params))
    left, right = results
    assert len(programs) == 2, "two paths, not one compared with itself"
    assert len(np.unique(left[0][1])) >= 3, "tokens leave at different depths"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), left, right)


@pytest.mark.parametrize("num_groups, group", [(0, [0, 0, 0, 1, 1, 2, 2]), (2, [0, 0, 0, 0, 1, 1, 1])])
def test_clones_of_a_group_start_equal_and_groups_differ(num_groups, group):
    config = make_config(model__init="clones", model__pool_size=7, model__num_groups=num_groups)
    weights = np.asarray(Model(config).params["pool"]["block"]["qkv"])
    for left, right in np.ndindex(7, 7):
        assert (weights[left] == weights[right]).all() == (group[left] == group[right])


def test_prelude_and_coda_are_layers_like_the_others():
    """A prelude of one, a pool of two in order and a coda of one are a plain transformer of four."""
    config = make_config(
        model__pool_size=2,
        model__max_depth=2,
        model__prelude_layers=1,
        model__coda_layers=1,
        router__form="sequential",
    )
    model, batch = Model(config), make_batch(config)
    params = perturbed(model.params)
    stacked = jax.tree.map(
        lambda *parts: jnp.concatenate(parts), *(params[name]["block"] for name in ("prelude", "pool", "coda"))
    )
    merged = {**params, "pool": {"block": stacked}}
    output = model(batch, params)
    for row in range(2):
        fields = (batch[name][row] for name in ("token", "document", "position"))
        expected, _ = plain_network(dense_config(), merged, *fields)
        np.testing.assert_allclose(output.logits_BSV[row], expected, atol=2e-4, rtol=1e-4)
    assert (output.depth_BS == 2).all(), "unshared layers are no depth steps"


def test_upcycled_network_computes_what_the_dense_one_does():
    """All layers of a group are copies, so that any route within the groups is the dense model."""
    dense = Model(make_config(model__pool_size=3, router__form="sequential"))
    dense_params = perturbed(dense.params)
    config = make_config(model__pool_size=7, model__min_depth=3, router__prior="group", router__prior_weight=100.0)
    model, batch = Model(config), make_batch(config)
    grown = upcycle(model.params, dense_params, 7, 3)
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, model.params)
    output = model(batch, grown)
    assert len(np.unique(output.layer_TBS)) > 3, "layers beside the first of each group are used"
    np.testing.assert_allclose(output.logits_BSV, dense(batch, dense_params).logits_BSV, atol=1e-4)


@pytest.mark.parametrize(
    "view, form", [*((view, "factored") for view in VIEWS), *(("latest", form) for form in ("flat", "random", "hash"))]
)
def test_causality_and_documents_by_gradient(view, form):
    """The logits at a token depend on the inputs of its document up to it, and on nothing else."""
    config = make_config(cache__view=view, router__form=form)
    model, batch = Model(config), make_batch(config, packed=True)
    row, at = 1, 6
    document = batch["document"][row]
    batch["document"][row] = document = np.where(np.arange(13) < 3, 0, np.where(np.arange(13) < 10, 1, -1))
    vectors = jnp.asarray(model.params["embedding"])[batch["token"]]

    def logit(vectors_BSD):
        # One embedding per position, looked up by position, so that the gradient is by position.
        params = {**model.params, "embedding": vectors_BSD.reshape(-1, vectors_BSD.shape[-1])}
        positions = {**batch, "token": np.arange(26, dtype=np.int32).reshape(2, 13)}
        return model(positions, params).logits_BSV[row, at].sum()

    influence = np.abs(np.asarray(jax.jit(jax.grad(logit))(vectors))).sum(-1)
    past = (document == document[at]) & (np.arange(13) <= at)
    # In `same_layer` a token sees of the past only those that happened to take its layers.
    assert (influence[row][past] > 0).all() or (view == "same_layer" and influence[row, at] > 0)
    assert (influence[row][~past] == 0).all()
    assert (influence[1 - row] == 0).all(), "other rows of the batch"


@pytest.mark.parametrize("view", VIEWS)
def test_a_row_does_not_depend_on_the_rows_beside_it(view):
    config = make_config(cache__view=view, train__batch_size=3)
    model, batch = Model(config).with_mixed_exits(), make_batch(config)
    other = make_batch(config, seed=1)
    mixed = {name: np.concatenate([batch[name][:1], other[name][1:]]) for name in batch}
    alone = {name: array[:1] for name, array in batch.items()}
    logits = [np.asarray(model(rows).logits_BSV) for rows in (batch, mixed, alone)]
    np.testing.assert_allclose(logits[0][0], logits[1][0], atol=1e-5)
    np.testing.assert_allclose(logits[0][0], logits[2][0], atol=1e-5)
    assert np.abs(logits[0][1] - logits[1][1]).max() > 0.01


@pytest.mark.parametrize("view", VIEWS)
def test_an_exited_token_is_frozen_and_writes_nothing(view):
    """Its state stays as it was, bit for bit; with the same exits and one step less, its logits are the same."""
    config = make_config(cache__view=view, model__max_depth=4)
    model, batch = Model(config).with_mixed_exits(), make_batch(config)
    output = model(batch)
    depth, layers, states = (np.asarray(x) for x in (output.depth_BS, output.layer_TBS, output.h_TBSD))
    assert len(np.unique(depth)) >= 2
    for t in range(4):
        np.testing.assert_array_equal(layers[t] == 5, depth <= t, "after the exit no layer is executed")
    for t in range(1, 4):
        frozen = depth < t
        np.testing.assert_array_equal(states[t][frozen], states[t - 1][frozen])
        assert (states[t][~frozen] != states[t - 1][~frozen]).any(-1).all()
    shallower = model(batch, max_depth=3)
    np.testing.assert_array_equal(shallower.depth_BS, np.minimum(depth, 3))
    done = (depth < 3).cumprod(1).astype(bool)
    assert done.any()
    np.testing.assert_allclose(output.logits_BSV[done], shallower.logits_BSV[done], atol=1e-5)


@pytest.mark.parametrize("prior", ["group", "group_hash"])
@pytest.mark.parametrize("num_groups, last_group", [(0, [4]), (2, [3, 4])])
def test_max_depth_beyond_the_trained_one_goes_on_as_the_last_step(prior, num_groups, last_group):
    config = make_config(model__num_groups=num_groups, router__prior=prior, router__prior_weight=1000.0)
    model, batch = Model(config), make_batch(config)
    never = model.controllers.replace(exit_bias=jnp.float32(-50))
    output = model(batch, controllers=never, max_depth=5)
    assert (output.depth_BS == 5).all()
    assert np.isin(output.layer_TBS[2:], last_group).all()
    if prior == "group_hash":
        np.testing.assert_array_equal(output.layer_TBS[3:], np.stack([output.layer_TBS[2]] * 2))


def test_without_trained_exits_a_larger_max_depth_has_none():
    """Min and max depth were equal, so that no exit logit was ever trained: 2 of 26 tokens used to leave by it."""
    model = Model(make_config(model__min_depth=3)).with_mixed_exits()
    output = model(make_batch(model.config), max_depth=6)
    assert (output.depth_BS == 6).all()


def test_routing_sums_count_what_was_executed():
    config = make_config()
    model, batch = Model(config).with_mixed_exits(), make_batch(config, packed=True)
    output = model(batch)
    layers, real = np.asarray(output.layer_TBS), batch["document"] >= 0
    depth = (layers < 5).sum(0)
    np.testing.assert_array_equal(output.depth_BS, depth)
    sums = output.routing
    assert sums.num_tokens == real.sum()
    np.testing.assert_array_equal(sums.tokens_by_depth, np.bincount(depth[real], minlength=4))
    expected = np.stack([np.bincount(layers[t].ravel(), minlength=6)[:5] for t in range(3)])
    np.testing.assert_array_equal(sums.executions_TL, expected)
    by_token = np.zeros((3, VOCAB, 5))
    for t, b, s in np.ndindex(3, 2, 13):
        if layers[t, b, s] < 5:
            by_token[t, batch["token"][b, s], layers[t, b, s]] += 1
    np.testing.assert_array_equal(sums.executions_TKL, by_token)
    assert (~real).any()
    assert (layers[:, ~real] == 5).all(), "padding is not routed"


def test_bf16_is_near_fp32_and_keeps_fp32_parameters_and_router():
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        config = dense_config(model__dtype=dtype)
        model = Model(config)
        assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"float32"}
        outputs[dtype] = np.asarray(model(make_batch(config)).logits_BSV)
        assert outputs[dtype].dtype == np.float32
    scale = np.abs(outputs["float32"]).max()
    error = np.abs(outputs["float32"] - outputs["bfloat16"]).max()
    assert 0 < error < 0.03 * scale


def test_initialisation_follows_the_seed():
    def leaves(seed):
        return jax.tree.leaves(init_params(make_config(train__seed=seed), VOCAB)[1])

    assert all((a == b).all() for a, b in zip(leaves(0), leaves(0), strict=True))
    assert any((a != b).any() for a, b in zip(leaves(0), leaves(1), strict=True))


@pytest.mark.parametrize("form", ["sequential", "skip"])
def test_where_each_layer_comes_once_the_entries_of_its_step_are_all_of_the_layer(monkeypatch, form):
    """`same_layer` is computed as `same_step` there; against itself, with its gradient."""
    config = make_config(
        router__form=form, cache__view="same_layer", model__pool_size=4, model__max_depth=4, router__exit_bias_init=0.01
    )
    model, batch = Model(config), make_batch(config, packed=True)

    def loss_and_grads():
        def loss(params):
            output = forward(model.graph, params, batch, model.controllers, model.at, jax.random.key(0))
            return (output.final_BSD**2 * jnp.arange(24)).sum(), output

        (_, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
        return output.logits_BSV, output.depth_BS, grads

    assert [config.view_over(depth) for depth in (4, 5)] == ["same_step", "same_layer"]
    fast = loss_and_grads()
    monkeypatch.setattr(RadialTransformer, "view_over", lambda model, _: model.view)
    plain = loss_and_grads()
    assert form == "sequential" or 1 < plain[1].mean() < 3.9
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), fast, plain)
