"""The gradient estimators of the whole model, against their formulas and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import VOCAB, Model, make_batch, make_config

NUM_SAMPLES = 1500


def one_step(estimator, **overrides):
    return make_config(
        model__max_depth=1,
        model__min_depth=1,
        model__pool_size=3,
        router__estimator=estimator,
        router__noise=1.0,
        router__noise_steps=10**9,
        router__depth_target=1.0,
        train__batch_size=1,
        train__seq_len=4,
        cache__view="all",
        **overrides,
    )


def test_score_is_the_dense_gradient_in_expectation_under_a_linear_loss():
    """The routes are sampled from p; the loss is linear in the update of the one step.

    Also shows what `straight_through` is not: its gradient p · (…) is not that of `dense`.
    """
    direction = np.random.default_rng(5).normal(size=(1, 4, 24)).astype(np.float32)
    means, errors = {}, {}
    for estimator in ("dense", "score", "straight_through"):
        model = Model(one_step(estimator))
        # The rows are routed far from evenly, or all estimators would differ by a constant alone.
        model.params["router"]["out"] = model.params["router"]["out"] * 20
        batch = make_batch(model.config)

        def loss(router, rng, model=model, batch=batch):
            params = {**model.params, "router": router}
            pool = jax.tree.map(jax.lax.stop_gradient, {k: v for k, v in params.items() if k != "router"})
            return (model(batch, {**params, **pool}, rng=rng).exit_BSD * direction).sum()

        grads = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
        rngs = jax.random.split(jax.random.key(1), NUM_SAMPLES)
        samples = np.asarray(grads(model.params["router"], rngs)["out"])[..., :3]
        means[estimator], errors[estimator] = samples.mean(0), samples.std(0) / NUM_SAMPLES**0.5
    noise = np.hypot(errors["dense"], errors["score"])
    deviation = (means["score"] - means["dense"])[noise > 0] / noise[noise > 0]
    assert (np.abs(deviation) < 5).all()
    assert 0.7 < np.sqrt((deviation**2).mean()) < 1.3, "deviations are as large as chance makes them"
    assert np.abs(means["dense"]).max() > 20 * noise.max()
    wrong = (means["straight_through"] - means["dense"]) / np.maximum(noise, 1e-12)
    assert np.abs(wrong).max() > 20


@pytest.mark.parametrize("estimator", ["straight_through", "score", "weighted", "dense"])
def test_gradient_against_finite_differences_of_its_formula(estimator):
    """d loss / d router over one step equals that of the estimator's formula, written out in numpy.

    Rows of a single token: what a layer would have done to it then depends on no other token's choice.
    """
    sizes = {"model__max_depth": 2, "model__min_depth": 0, "train__batch_size": 26, "train__seq_len": 1}
    model = Model(make_config(router__estimator=estimator, **sizes))
    batch, router = make_batch(model.config), model.params["router"]
    direction = np.random.default_rng(5).normal(size=(26, 1, 24)).astype(np.float32)

    def loss(router):
        output = model(batch, {**model.params, "router": router}, max_depth=1)
        return (output.exit_BSD * direction).sum(), output

    (_, output), grads = jax.value_and_grad(loss, has_aux=True)(router)
    layer_BS = np.asarray(output.layer_TBS[0])
    executes_BS = layer_BS < 5
    assert 0 < executes_BS.sum() < executes_BS.size

    # What each layer does, by pinning the choice with the load bias, which no probability depends on.
    plain, gain_LBS = Model(make_config(**sizes)), np.zeros((5, 26, 1))
    for pinned in range(5):
        controllers = model.controllers.replace(load_bias=1e6 * jnp.eye(5)[pinned], exit_bias=jnp.float32(-1e6))
        output_of_layer = plain(batch, model.params, controllers, max_depth=1)
        gain_LBS[pinned] = ((output_of_layer.exit_BSD - output_of_layer.h_TBSD[0]) * direction).sum(-1)

    h = np.asarray(output.h_TBSD[0], np.float64)
    x = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) + np.asarray(router["step_embedding"])[0]
    hidden = np.asarray(jax.nn.gelu(jnp.asarray(x @ np.asarray(router["hidden"]))), np.float64)
    chosen_BS1 = np.where(executes_BS, layer_BS, 0)[..., None]

    def probabilities(out):
        logits = hidden @ out
        p_layer = np.exp(logits[..., :5]) / np.exp(logits[..., :5]).sum(-1, keepdims=True)
        return p_layer, np.take_along_axis(p_layer, chosen_BS1, -1)[..., 0], 1 / (1 + np.exp(logits[..., 5]))

    def surrogate(out):
        """A smooth function of the probabilities that has the estimator's gradient."""
        p_BSL, p_chosen_BS, survive_BS = probabilities(out)
        gain_BS = np.take_along_axis(np.moveaxis(gain_LBS, 0, -1), chosen_BS1, -1)[..., 0]
        per_token = {
            "dense": np.einsum("BSL,LBS->BS", p_BSL, gain_LBS) + survive_BS * gain_BS,
            "straight_through": (p_chosen_BS + survive_BS) * gain_BS,
            "score": (np.log(p_chosen_BS) + np.log(survive_BS)) * gain_BS,
            "weighted": p_chosen_BS * survive_BS * gain_BS,
        }[estimator]
        return (per_token * executes_BS).sum()

    out = np.asarray(router["out"], np.float64)
    numeric = np.zeros_like(out)
    for index in np.ndindex(*out.shape):
        step = np.zeros_like(out)
        step[index] = 1e-4
        numeric[index] = (surrogate(out + step) - surrogate(out - step)) / 2e-4
    np.testing.assert_allclose(grads["out"], numeric, rtol=2e-3, atol=2e-3 * np.abs(numeric).max())
    np.testing.assert_array_equal(np.abs(numeric).max(0) > 0, True)


def test_weighted_gradient_over_all_steps_equals_finite_differences_of_the_model():
    """With `weighted` gates the forward pass is differentiable while no hard choice changes, the survival product over
    the steps included: an exit decision is credited with all later updates.
    """
    config = make_config(router__estimator="weighted", model__max_depth=3, model__min_depth=0)
    model, batch = Model(config), make_batch(config)
    # Nobody leaves, and p_exit is far from 0 at every step.
    controllers = model.controllers.replace(exit_bias=jnp.float32(-0.7))
    direction = np.random.default_rng(5).normal(size=(2, 13, VOCAB)).astype(np.float32)

    def loss(router):
        output = model(batch, {**model.params, "router": router}, controllers)
        return (output.logits_BSV * direction).sum(), output.layer_TBS

    router = model.params["router"]
    (_, layers), grads = jax.value_and_grad(loss, has_aux=True)(router)
    assert (layers < 5).all()
    exit_column = jnp.zeros_like(router["out_bias"]).at[-1].set(1.0)
    for step in range(3):
        # The exit logit of one step: by the embedding of the step; and of all of them at once, by the bias.
        moves = {"step_embedding": jnp.zeros_like(router["step_embedding"]).at[step].set(0.5)}
        for name, move in {**moves, "out_bias": exit_column}.items():
            values = []
            for sign in (1, -1):
                value, moved_layers = loss({**router, name: router[name] + sign * 0.02 * move})
                np.testing.assert_array_equal(moved_layers, layers)
                values.append(float(value))
            numeric = (values[0] - values[1]) / 0.04
            np.testing.assert_allclose(float((grads[name] * move).sum()), numeric, rtol=0.02, atol=0.02)
