import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet.controllers import Controllers, schedule, update_exit_bias, update_load_bias
from radialnet.router import Router, StepInputs, choice_gate, group_of_layer, prior_logits, row_keys
from tests.tiny import TOKEN_EXITS, VOCAB, Model, make_batch, make_config

L, T = 5, 3


def route(config, num_rows=400, depth_step=1, seed=0, controllers=None, router=None, spread=1.0, **at):
    """One step's route of random states, as (route, logits of layers, exit logit)."""
    from flax import nnx

    router = router or Router(config.model, config.router, nnx.Rngs(3))
    if config.router.is_trained:
        router.out[...] *= 20 * spread
    h = jax.random.normal(jax.random.key(seed), (num_rows, 1, config.model.d_model))
    token = jax.random.randint(jax.random.key(seed + 1), (num_rows, 1), 0, VOCAB)
    plan = schedule(config.router, T, jnp.int32(0)).replace(**at)
    controllers = controllers or Controllers.init(config.router, L)
    active = jnp.arange(num_rows)[:, None] % 7 != 0
    keys = row_keys(jax.random.key(9), 0, len(h))
    found = router(h, StepInputs(token[..., None], active & False, active, depth_step, keys, None), controllers, plan)
    if not config.router.is_trained:
        return found, token
    x = np.asarray(h)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) + np.asarray(router.step_embedding[...])[depth_step]
    logits = np.asarray(jax.nn.gelu(x @ router.hidden[...])) @ np.asarray(router.out[...])
    return found, logits[..., :L], logits[..., L]


def test_flat_is_one_softmax_over_all_nodes():
    config = make_config(router__form="flat", router__exit_bias_init=0.5)
    found, layers, leave = route(config)
    nodes = np.concatenate([layers, leave[..., None] + 0.5], axis=-1)
    p = np.exp(nodes) / np.exp(nodes).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(found.log_survive_BS), 1 - p[..., L], rtol=1e-4)
    node_p = np.exp(np.asarray(found.log_survive_BS))[..., None] * np.asarray(found.p_layer_BSL)
    np.testing.assert_allclose(node_p, p[..., :L], rtol=1e-3, atol=1e-6)
    choice, active = nodes.argmax(-1), np.arange(400)[:, None] % 7 != 0
    np.testing.assert_array_equal(found.exits_BS, active & (choice == L))
    np.testing.assert_array_equal(found.layer_BS, np.where(active, choice, L))
    assert 20 < found.exits_BS.sum() < 330


def test_factored_decides_to_leave_before_it_picks_a_layer():
    config = make_config(router__exit_bias_init=0.5)
    found, layers, leave = route(config)
    p_exit = 1 / (1 + np.exp(-(leave + 0.5)))
    p_layer = np.exp(layers) / np.exp(layers).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(found.log_survive_BS), 1 - p_exit, rtol=1e-4)
    np.testing.assert_allclose(found.p_layer_BSL, p_layer, rtol=1e-3, atol=1e-6)
    active = np.arange(400)[:, None] % 7 != 0
    np.testing.assert_array_equal(found.exits_BS, active & (p_exit > 0.5))
    np.testing.assert_array_equal(found.layer_BS, np.where(active & (p_exit <= 0.5), layers.argmax(-1), L))
    chosen = np.take_along_axis(p_layer, layers.argmax(-1)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.exp(found.log_p_layer_BS), chosen, rtol=1e-3)
    np.testing.assert_array_equal(found.executes_BS, active & ~np.asarray(found.exits_BS))


def test_exits_that_see_the_token_alone_go_by_its_number_for_the_step():
    config = make_config(**TOKEN_EXITS, router__exit_bias_init=-0.3)
    model = Model(config).with_mixed_exits()
    batch = make_batch(config)
    output, other = (model(batch | {"token": token}) for token in (batch["token"], batch["token"][:, ::-1]))
    table_TV = np.asarray(model.params["router"]["exit_table"])
    assert table_TV.shape == (T, VOCAB)
    # After one step, the first that a token may leave at, and after two.
    leaves_TBS = table_TV[1:, batch["token"]] - 0.3 > 0
    depth_BS = np.where(leaves_TBS[0], 1, np.where(leaves_TBS[1], 2, T))
    np.testing.assert_array_equal(output.depth_BS, depth_BS)
    np.testing.assert_array_equal(other.depth_BS, depth_BS[:, ::-1])
    assert len(np.unique(depth_BS)) == T


@pytest.mark.parametrize("form", ["flat", "factored"])
def test_noise_of_scale_one_samples_from_the_probabilities(form):
    config = make_config(router__form=form, router__noise=1.0, router__noise_steps=10)
    found, _, _ = route(config, num_rows=20_000, spread=0.5)
    active = np.arange(20_000)[:, None] % 7 != 0
    p_node = np.exp(np.asarray(found.log_survive_BS))[..., None] * np.asarray(found.p_layer_BSL)
    expected = p_node[active].mean(0)
    counts = np.bincount(np.asarray(found.layer_BS)[active], minlength=L + 1)[:L] / active.sum()
    np.testing.assert_allclose(counts, expected, atol=4 * (0.25 / active.sum()) ** 0.5)


def test_no_exit_before_min_depth_nor_in_the_warmup():
    config = make_config(model__min_depth=2, router__exit_bias_init=50.0)
    assert not route(config, depth_step=1)[0].exits_BS.any()
    assert (route(config, depth_step=1)[0].log_survive_BS == 0).all()
    assert route(config, depth_step=2)[0].exits_BS.any()
    assert not route(config, depth_step=2, may_exit=jnp.bool_(False))[0].exits_BS.any()


def test_load_bias_moves_the_choice_but_not_the_probabilities():
    config = make_config()
    controllers = Controllers.init(config.router, L)
    plain, _, _ = route(config)
    biased, _, _ = route(config, controllers=controllers.replace(load_bias=jnp.array([0, 0, 100.0, 0, 0])))
    executes = np.asarray(biased.executes_BS)
    assert (np.asarray(biased.layer_BS)[executes] == 2).all()
    assert not (np.asarray(plain.layer_BS)[executes] == 2).all()
    np.testing.assert_array_equal(plain.p_layer_BSL, biased.p_layer_BSL)


def test_priors():
    np.testing.assert_array_equal(prior_logits("sequential", L, T, 1), np.eye(L)[1])
    np.testing.assert_array_equal(prior_logits("none", L, T, 1), np.zeros(L))
    np.testing.assert_array_equal(group_of_layer(16, 4), np.repeat(np.arange(4), 4))
    np.testing.assert_array_equal(group_of_layer(L, T), [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(prior_logits("group", L, T, 1), [0, 0, 1, 1, 0])
    for step, of_group in enumerate(([1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1])):
        np.testing.assert_array_equal(prior_logits("group", L, 2, step), of_group)


def test_prior_steers_the_choice_but_not_the_z_loss():
    """A prior that counted there would be fought by the z-loss."""
    plain, layers, _ = route(make_config(router__prior="none"))
    steered, _, _ = route(make_config(router__prior="sequential", router__prior_weight=100.0))
    assert (np.asarray(steered.layer_BS)[np.asarray(steered.executes_BS)] == 1).all()
    np.testing.assert_array_equal(plain.layer_lse_BS, steered.layer_lse_BS)
    np.testing.assert_allclose(plain.layer_lse_BS, np.log(np.exp(layers).sum(-1)), rtol=1e-4, atol=1e-4)


def test_fixed_routes():
    token = np.asarray(route(make_config(router__form="cyclic"), depth_step=7)[1])
    active = np.arange(400)[:, None] % 7 != 0

    def layers(form, depth_step, **fields):
        found, _ = route(make_config(router__form=form, **fields), depth_step=depth_step)
        assert not found.exits_BS.any()
        assert (np.asarray(found.layer_BS)[~active] == L).all()
        return np.asarray(found.layer_BS)[active]

    assert (layers("cyclic", 7) == 7 % L).all()
    assert (layers("sequential", 2, model__max_depth=L) == 2).all()
    random = layers("random", 1)
    assert set(random) == set(range(L))
    assert (random != layers("random", 2)).any()
    hashed, again = layers("hash", 1), layers("hash", 2)
    assert len(set(hashed)) > 2
    for name in set(token[active]):
        assert len(set(hashed[token[active] == name])) == 1, "the same token goes to the same layer"
    assert (hashed != again).any(), "a token takes another layer at another step"


def test_schedule():
    config = make_config(
        router__noise=2.0,
        router__noise_steps=100,
        router__prior="group",
        router__prior_weight=8.0,
        router__prior_steps=50,
        router__exit_warmup_steps=10,
        router__depth_ramp_steps=20,
        router__depth_target=2.0,
    )
    at = {step: schedule(config.router, T, jnp.int32(step)) for step in (0, 9, 10, 20, 25, 30, 99, 200)}
    np.testing.assert_allclose([at[s].noise for s in (0, 25, 99, 200)], [2.0, 1.5, 0.02, 0.0], rtol=1e-4)
    np.testing.assert_allclose([at[s].prior_weight for s in (0, 25, 200)], [8.0, 4.0, 0.0], rtol=1e-4)
    assert [bool(at[s].may_exit) for s in (0, 9, 10)] == [False, False, True]
    np.testing.assert_allclose([at[s].depth_target for s in (0, 10, 20, 30, 200)], [3, 3, 2.5, 2, 2])
    kept = schedule(make_config(router__prior="group").router, T, jnp.int32(10**6))
    assert kept.prior_weight == 8.0


@pytest.mark.parametrize(
    "estimator, value, gradient",
    [
        ("straight_through", lambda p: 1, lambda p: p),
        ("dense", lambda p: 1, lambda p: p),
        ("score", lambda p: 1, lambda p: 1),
        ("weighted", lambda p: p, lambda p: p),
    ],
)
def test_gate_value_and_gradient(estimator, value, gradient):
    """Gradients are with respect to log p: that of p is p, that of log p is 1."""
    for p in (0.05, 0.7):
        gate, slope = jax.value_and_grad(choice_gate)(jnp.log(p), estimator)
        np.testing.assert_allclose(gate, value(p), rtol=1e-5)
        np.testing.assert_allclose(slope, gradient(p), rtol=1e-5)


def test_exit_bias_controller_follows_its_formula():
    cfg = make_config(router__exit_bias_rate=0.5, router__depth_target=2.0).router
    before = Controllers.init(cfg, L).replace(exit_bias=jnp.float32(-1), exit_logit_std=jnp.float32(3))
    at = schedule(cfg, T, jnp.int32(0))
    std = 0.9 * 3 + 0.1 * 1
    for depth, error in ((2.75, 0.75), (1.5, -0.5), (9.0, 1.0), (0.0, -1.0)):
        after = update_exit_bias(before, cfg, at, jnp.float32(depth), jnp.float32(1))
        np.testing.assert_allclose(after.exit_bias, -1 + 0.5 * std * error, rtol=1e-5)
        np.testing.assert_allclose(after.exit_logit_std, std, rtol=1e-5)
    held = update_exit_bias(before, cfg, at.replace(may_exit=jnp.bool_(False)), jnp.float32(9), jnp.float32(1))
    assert held.exit_bias == -1, "no exits yet: nothing to control"
    assert held.exit_logit_std == 3, "nor to take the std of; it used to decay to 0 in the warm-up"


def test_load_bias_controller_raises_the_layers_that_are_used_too_little():
    cfg = make_config(router__load_bias_rate=0.01).router
    after = update_load_bias(Controllers.init(cfg, 4), cfg, jnp.array([0.5, 0.25, 0.25, 0.0]))
    np.testing.assert_allclose(after.load_bias, [-0.01, 0, 0, 0.01], atol=1e-7)


def test_a_heavy_hash_prior_is_the_hash_route():
    """With learned exits; a light one is not, or the comparison says nothing."""
    fields = {"model__min_depth": 3, "router__estimator": "straight_through"}
    hashed, heavy, light = (
        Model(make_config(**fields, **more))(make_batch(make_config()))
        for more in (
            {"router__form": "hash"},
            {"router__prior": "hash", "router__prior_weight": 1000.0},
            {"router__prior": "hash", "router__prior_weight": 0.01},
        )
    )
    np.testing.assert_array_equal(heavy.layer_TBS, hashed.layer_TBS)
    assert (light.layer_TBS != hashed.layer_TBS).any()


@pytest.mark.parametrize(
    "fields",
    [
        {"router__form": "hash"},
        {"router__form": "hash_exit", "model__num_groups": 1},
        {"router__prior": "hash", "router__prior_weight": 1000.0},
    ],
)
def test_the_hash_of_a_span_is_that_of_the_token_so_many_places_before(fields):
    """Which layer each id has at each step is what the tokens themselves are given; of documents side by side."""
    own, spanned = (make_config(**fields, model__min_depth=T, router__hash_span=span) for span in (1, 2))
    batch = make_batch(own, packed=True)
    own_TBS, spanned_TBS = (np.asarray(Model(config)(batch).layer_TBS) for config in (own, spanned))
    document_BS, num_seen = batch["document"], 0
    for t, b, s in np.argwhere(spanned_TBS < L):
        said_by = s - 1 if t == 1 and s > 0 and document_BS[b, s - 1] == document_BS[b, s] else s
        assert spanned_TBS[t, b, s] == own_TBS[t, b, said_by]
        num_seen += spanned_TBS[t, b, s] != own_TBS[t, b, s]
    assert num_seen > 3 and (np.diff(document_BS, axis=1) > 0).any()
    if own.router.is_trained:
        # Beyond the trained steps a token stays with the last one's layer, which it has by the turn of that step.
        model, never = Model(spanned), jnp.float32(-50)
        deeper_TBS = model(batch, controllers=model.controllers.replace(exit_bias=never), max_depth=T + 1).layer_TBS
        np.testing.assert_array_equal(deeper_TBS[T], deeper_TBS[T - 1])


@pytest.mark.parametrize("num_groups, groups", [(0, ([0, 1], [2, 3], [4])), (2, ([0, 1, 2], [3, 4], [3, 4]))])
def test_a_heavy_group_hash_prior_gives_each_token_one_layer_of_the_group(num_groups, groups):
    """All layers of a group are used, and a token goes to the same one wherever it stands."""
    config = make_config(
        model__min_depth=3, model__num_groups=num_groups, router__prior="group_hash", router__prior_weight=1000.0
    )
    batch = make_batch(config)
    layer_TBS = np.asarray(Model(config)(batch).layer_TBS)
    token_BS = batch["token"]
    for step, group in enumerate(groups):
        chosen = [set(layer_TBS[step][token_BS == token]) for token in np.unique(token_BS)]
        assert all(len(layers) == 1 for layers in chosen)
        assert set.union(*chosen) == set(group)
    if num_groups:
        assert (layer_TBS[1] != layer_TBS[2]).any(), "steps that share a group have a hash each"
