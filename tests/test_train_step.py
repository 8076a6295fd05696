import itertools
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet.model import init_params
from radialnet.optimizer import learning_rate, make_optimizer
from radialnet.sharding import ONE_DEVICE
from radialnet.train_loop import settle_exit_bias
from radialnet.train_step import SPIKE_WINDOW, eval_step, init_state, spike_limit, train_step
from tests.tiny import VOCAB, make_batch, make_config

BYTES = jnp.ones(VOCAB, jnp.int32)


class Training:
    """A run on batches in memory."""

    def __init__(self, config):
        graph, params = init_params(config, VOCAB)
        optimizer = make_optimizer(config)
        self.config = config
        self.state = init_state(config, params, optimizer)
        self._step = jax.jit(partial(train_step, config=config, graph=graph, optimizer=optimizer))
        self._eval = jax.jit(partial(eval_step, config=config, graph=graph))

    def step(self, batch):
        self.state, sums, scalars = self._step(self.state, batch, BYTES)
        return sums, scalars

    def evaluate(self, batch):
        state = self.state
        return self._eval(state.params, state.controllers, state.step, batch, BYTES)


def ce(sums):
    return float(sums.losses["ce"] / sums.num_targets)


RECIPES = {
    "dense": {"router__form": "sequential", "model__pool_size": 3},
    "radial": {"router__prior": "group", "model__init": "clones"},
    "radial without exits, all entries": {"model__min_depth": 3, "cache__view": "all"},
    "flat, score, noise": {
        "router__form": "flat",
        "router__estimator": "score",
        "router__noise": 1.0,
        "router__noise_steps": 100,
        "router__exit_bias_init": -3.0,
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_batch_can_be_overfitted(recipe):
    config = make_config(
        train__num_steps=200, optimizer__learning_rate=1e-2, optimizer__weight_decay=0.0, **RECIPES[recipe]
    )
    training, batch = Training(config), make_batch(config)
    first = ce(training.step(batch)[0])
    for _ in range(200):
        sums, _ = training.step(batch)
    assert first > 2.5
    assert ce(sums) < 0.2
    assert ce(training.evaluate(batch)) < 0.2, "without noise, by the same parameters"


@pytest.mark.slow
@pytest.mark.parametrize("target", [1.5, 2.5])
def test_exit_bias_controller_reaches_the_target_depth(target):
    config = make_config(
        model__max_depth=4,
        train__batch_size=16,
        train__num_steps=400,
        router__depth_target=target,
        router__exit_warmup_steps=20,
        router__depth_ramp_steps=50,
        router__exit_bias_rate=0.3,
    )
    training = Training(config)
    depths = []
    for step in range(400):
        sums, _ = training.step(make_batch(config, seed=step % 50))
        depths.append(float(sums.routing.mean_depth()))
    assert depths[:20] == [4.0] * 20, "the warm-up has no exits"
    assert np.mean(depths[-100:]) == pytest.approx(target, rel=0.05)
    assert np.std(depths[-100:]) < 0.4, "held, not swinging between the extremes"
    held_out = training.evaluate(make_batch(config, seed=7)).routing.mean_depth()
    assert float(held_out) == pytest.approx(target, rel=0.25)


def settled(num_steps, poison=1.0, **overrides):
    """What `settle_exit_bias` makes of a fresh model after a run, with batches numbered from 0; how many it took."""
    config = make_config(
        model__max_depth=4,
        train__batch_size=64,
        train__num_steps=num_steps,
        router__explore=0.5,
        router__depth_target=2.25,
        **{"router__exit_bias_init": 1.0, "router__load_bias_rate": 0.1, **overrides},
    )
    training, numbers = Training(config), itertools.count()
    state = training.state.replace(params=jax.tree.map(lambda x: x * poison, training.state.params))
    run = types.SimpleNamespace(config=config, state=state, step=num_steps, bytes_V=BYTES, placement=ONE_DEVICE)
    settle_exit_bias(run, training._eval, lambda: make_batch(config, seed=next(numbers)))
    changed = state.replace(controllers=state.controllers.replace(exit_bias=run.state.controllers.exit_bias))
    jax.tree.map(np.testing.assert_array_equal, run.state, changed)
    training.state = run.state
    return training, next(numbers)


def test_the_exit_bias_settles_after_the_last_step():
    """From one with which all leave at once; half of the tokens of training go all the way, of evaluation none."""
    training, num_batches = settled(9999)
    assert num_batches == 64
    held_out = [training.evaluate(make_batch(training.config, seed=seed)).routing for seed in range(1000, 1008)]
    assert np.mean([routing.mean_depth() for routing in held_out]) == pytest.approx(2.25, rel=0.02)


def test_the_exit_bias_settles_for_a_tenth_of_a_short_run():
    training, num_batches = settled(25, router__exit_bias_init=0.0)
    assert num_batches == 3 and training.state.controllers.exit_bias != 0


@pytest.mark.parametrize("closed", [{"router__exit_warmup_steps": 10}, {"poison": np.nan}])
def test_the_exit_bias_stays_where_it_can_not_settle(closed):
    training, num_batches = settled(9, **closed)
    assert training.state.controllers.exit_bias == 1.0 and num_batches == (1 if "poison" in closed else 0)


def test_which_models_hold_a_depth():
    for without in (
        {"model__min_depth": 3},
        {"router__exit_bias_rate": 0.0},
        {"router__form": "sequential", "model__pool_size": 3},
    ):
        assert not make_config(**without).holds_depth
    assert make_config().holds_depth


@pytest.mark.slow
def test_load_bias_controller_evens_out_the_load():
    """A router that favours one layer by a wide margin and does not learn: the bias alone has to make up for it."""

    def largest_share(rate):
        config = make_config(
            train__batch_size=16,
            model__min_depth=3,
            optimizer__learning_rate=0.0,
            router__load_coef=0.0,
            router__load_bias_rate=rate,
        )
        training = Training(config)
        router = training.state.params["router"]
        router["out_bias"] = router["out_bias"].at[2].set(1.0)
        for step in range(150):
            sums, _ = training.step(make_batch(config, seed=step % 50))
        return float(sums.routing.load_L().max())

    assert largest_share(0.0) > 0.9
    assert largest_share(0.02) < 0.4


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(poison):
    config = make_config()
    training, batch = Training(config), make_batch(config)
    training.step(batch)
    before = training.state
    # An embedding that no token of the first batch has spoils the loss; a huge one the gradient alone.
    bad = {**batch, "token": np.full_like(batch["token"], 16)}
    value = np.nan if poison == "loss" else 1e38
    embedding = before.params["embedding"].at[16].set(value)
    training.state = before.replace(params={**before.params, "embedding": embedding})
    poisoned = training.state
    for count in (1, 2):
        sums, scalars = training.step(bad)
        assert scalars["skipped_steps"] == scalars["skipped_in_a_row"] == count
        assert float(sums.num_targets) == 0
    for name in ("params", "optimizer", "controllers"):
        jax.tree.map(np.testing.assert_array_equal, getattr(training.state, name), getattr(poisoned, name))
    assert training.state.step == 3
    training.state = training.state.replace(params=before.params)
    _, scalars = training.step(batch)
    assert scalars["skipped_steps"] == 2 and scalars["skipped_in_a_row"] == 0


def test_after_too_many_steps_that_are_not_finite_training_stands_still():
    """So that what it is ended with is what they came from, however late that is noticed."""
    config = make_config(train__max_skipped_steps=2)
    training, batch = Training(config), make_batch(config)
    before = training.state
    poisoned = {**before.params, "embedding": before.params["embedding"].at[16].set(np.nan)}
    training.state = before.replace(params=poisoned)
    bad = {**batch, "token": np.full_like(batch["token"], 16)}
    good = {**batch, "token": batch["token"] % 16}
    for batch, in_a_row in ((bad, 1), (good, 0), (bad, 1), (bad, 2), (good, 3)):
        params = training.state.params
        _, scalars = training.step(batch)
        assert scalars["skipped_in_a_row"] == in_a_row
        same = jax.tree.map(lambda a, b: bool((a == b).all() | jnp.isnan(a).any()), params, training.state.params)
        assert all(jax.tree.leaves(same)) == (in_a_row > 0)


def test_a_spike_is_skipped_and_a_new_level_is_none():
    window = jnp.stack([jnp.linspace(2.0, 2.2, SPIKE_WINDOW), jnp.full(SPIKE_WINDOW, 1.0)])
    np.testing.assert_allclose(
        spike_limit(window, 6.0), [2.1 + 6 * np.linspace(2.0, 2.2, SPIKE_WINDOW).std(), 1.06], rtol=1e-5
    )
    half = SPIKE_WINDOW // 2
    assert np.isfinite(spike_limit(window.at[:, :half].set(jnp.nan), 6.0)).all()
    assert np.isinf(spike_limit(window.at[:, : half + 1].set(jnp.nan), 6.0)).all(), "too few"
    skipping, taking = (Training(make_config(train__spike_sigmas=sigmas)) for sigmas in (6.0, 0.0))
    batch = make_batch(skipping.config)
    for run in (skipping, taking):
        run.step(batch)
        loss, norm = run.state.recent_2W[:, -1]
        # As if the losses before had all been half of that.
        recent_2W = jnp.tile(jnp.array([[loss / 2], [norm]]), (1, SPIKE_WINDOW))
        before = run.state = run.state.replace(recent_2W=recent_2W + jnp.linspace(0, 0.01, SPIKE_WINDOW))
        _, scalars = run.step(batch)
        assert scalars["skipped_steps"] == (run is skipping) and scalars["skipped_in_a_row"] == 0
        assert (run.state.recent_2W[0, -1] < 0.6 * loss) == (run is skipping), "the next one is told all the same"
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, run.state.params)
        assert any(jax.tree.leaves(moved)) == (run is taking)
        for name in ("optimizer", "controllers") if run is skipping else ():
            jax.tree.map(np.testing.assert_array_equal, getattr(run.state, name), getattr(before, name))
    for _ in range(SPIKE_WINDOW):
        _, scalars = skipping.step(batch)
    assert scalars["skipped_steps"] < SPIKE_WINDOW // 2, "what stays is the usual thing after a while"


def test_frozen_in_evaluation():
    """Evaluation of a run with noise is that of the same parameters in a run without."""
    config = make_config(router__noise=5.0, router__noise_steps=1000)
    training, batch = Training(config), make_batch(config)
    training.step(batch)
    left = training.evaluate(batch)
    silent = Training(make_config())
    silent.state = training.state
    jax.tree.map(np.testing.assert_array_equal, left, silent.evaluate(batch))
    noisy, _ = training.step(batch)
    assert (np.asarray(noisy.routing.executions_TL) != np.asarray(left.routing.executions_TL)).any()


def test_steps_follow_the_seed_and_the_step_alone():
    config = make_config(router__noise=1.0, router__noise_steps=100)
    runs = [Training(config) for _ in range(2)]
    for step in range(3):
        for run in runs:
            run.step(make_batch(config, seed=step))
    jax.tree.map(np.testing.assert_array_equal, runs[0].state, runs[1].state)

    def routes(seed, step):
        run = Training(make_config(router__noise=5.0, router__noise_steps=10**6, train__seed=seed))
        # The parameters of one seed, so that the noise alone makes a difference.
        run.state = run.state.replace(params=runs[0].state.params, step=jnp.int32(step))
        return np.asarray(run.step(make_batch(config))[0].routing.executions_TKL)

    np.testing.assert_array_equal(routes(0, 3), routes(0, 3))
    assert (routes(0, 3) != routes(0, 4)).any(), "another step has other noise"
    assert (routes(0, 3) != routes(1, 3)).any(), "another seed has other noise"


def test_learning_rate_and_decay_mask():
    config = make_config(train__num_steps=100, optimizer__warmup_steps=5, optimizer__learning_rate=0.1)
    rate = learning_rate(config)
    np.testing.assert_allclose([rate(step) for step in (0, 4, 99)], [0.02, 0.1, 0.01], rtol=1e-4)
    decayed = make_config(train__num_steps=100, optimizer__weight_decay=1.0, optimizer__learning_rate=0.1)
    params = init_params(decayed, VOCAB)[1]
    optimizer = make_optimizer(decayed)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="."): (np.asarray(x) != 0).any()
        for path, x in jax.tree.leaves_with_path(updates)
    }
    kept = {name for name, has_moved in moved.items() if not has_moved}
    assert kept == {
        "final_norm",
        "pool.block.attention_norm",
        "pool.block.key_norm",
        "pool.block.mlp_norm",
        "pool.block.query_norm",
        "router.norm",
        "router.out_bias",
    }


def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
    """With rows of unlike numbers of targets. The router's terms, which are means of the parts' own, are off."""
    off = {"router__load_coef": 0.0, "router__z_coef": 0.0, "router__depth_coef": 0.0, "optimizer__warmup_steps": 0}
    states, sums = [], []
    for parts in (1, 3):
        config = make_config(train__batch_size=6, train__accumulate_steps=parts, **off)
        batch = make_batch(config, packed=True)
        batch["is_target"] &= (
            np.random.default_rng(0).random(batch["is_target"].shape) < np.linspace(0.2, 1, 6)[:, None]
        )
        run = Training(config)
        found, _ = run.step(batch)
        states.append(run.state)
        sums.append(found)
    np.testing.assert_allclose(sums[0].num_targets, sums[1].num_targets)
    np.testing.assert_allclose(sums[0].losses["ce"], sums[1].losses["ce"], rtol=1e-5)
    np.testing.assert_array_equal(sums[0].routing.executions_TKL, sums[1].routing.executions_TKL)
    # Adam's first step is the sign of the gradient; its moment is the gradient itself.
    moments = [state.optimizer[0].mu for state in states]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), *moments)
