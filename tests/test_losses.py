"""Losses against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from radialnet import losses
from radialnet.controllers import schedule
from radialnet.layers import rms_norm
from radialnet.losses import cross_entropy, depth_loss, load_loss, read_losses, router_z_loss, total_loss
from tests.tiny import Model, make_batch, make_config, zero_sums

T, L = 2, 3


def sums(**fields):
    return zero_sums(T, L).replace(**{name: jnp.asarray(value, jnp.float32) for name, value in fields.items()})


def test_cross_entropy_counts_real_targets_only():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    target, is_target, head = jnp.array([1, 2]), jnp.array([True, False]), jnp.eye(3)
    np.testing.assert_allclose(cross_entropy(logits, head, target, is_target)[0], np.log(4), rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logits, head, target, ~is_target)[0], -np.log(0.8), rtol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_cross_entropy_in_chunks_equals_the_whole(monkeypatch, dtype, tolerance):
    """Values and gradients, with a last chunk that is not full; and no matrix of all logits in the program."""
    monkeypatch.setattr(losses, "LOGITS_IN_MEMORY", 5 * 11)
    rng = np.random.default_rng(0)
    final, head = jnp.asarray(rng.normal(size=(13, 6)), dtype), jnp.asarray(rng.normal(size=(6, 11)), jnp.float32)
    target, is_target = jnp.asarray(rng.integers(0, 11, 13)), jnp.asarray(rng.random(13) < 0.7)

    def whole(final, head):
        logits = (final @ head.astype(dtype)).astype(jnp.float32)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return 3 * jnp.where(is_target, nats, 0).sum()

    def chunked(final, head):
        return 3 * cross_entropy(final, head, target, is_target)[0]

    found, expected = (jax.value_and_grad(f, argnums=(0, 1))(final, head) for f in (chunked, whole))
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        scale = np.abs(np.asarray(right, np.float32)).max()
        np.testing.assert_allclose(np.asarray(left, np.float32), np.asarray(right, np.float32), atol=tolerance * scale)
    programs = [str(jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(final, head)) for f in (chunked, whole)]
    assert ["13,11]" in program for program in programs] == [False, True]


@pytest.mark.parametrize("every", [1, 3])
def test_exits_are_trained_by_what_each_further_layer_took_off_the_loss(every):
    """Against the definition, from the states and logits of a model whose tokens leave at 1, 2 or 3 layers; a
    quarter of them have no target, and gain nothing."""
    config = make_config(
        router__exit_training="benefit", router__read_every=every, model__max_depth=4, train__batch_size=18
    )
    model, batch = Model(config).with_mixed_exits(), make_batch(config, seed=3, packed=True)
    output = model(batch, rng=jax.random.key(2))
    read, depth, head = output.read, np.asarray(output.depth_BS), model.params["head"]
    columns = np.asarray(read.column_M)
    np.testing.assert_array_equal(read.is_read_BM, depth[:, columns] > 1)
    assert len(columns) == 13 // every and (np.diff(columns) % 13 == every).all()
    others = {int(model(batch, rng=jax.random.key(rng)).read.column_M[0]) for rng in range(9)}
    assert len(others) > 3, "not the same tokens at every step"
    assert set(depth[batch["is_target"]]) == {1, 2, 3, 4}

    def nats_of(h_BSD):
        final_BSD = rms_norm(h_BSD, model.params["final_norm"], model.config.model.norm_eps)
        return optax.softmax_cross_entropy_with_integer_labels(final_BSD @ head, batch["target"])

    steps, errors, nats = depth[:, columns] - np.asarray(read.num_left_BM), [], []
    is_target = batch["is_target"] & (np.arange(batch["target"].shape[1]) % 4 > 0)
    is_read = np.asarray(read.is_read_BM)
    for row, number in zip(*is_read.nonzero(), strict=True):
        step, exit_logit, column = steps[row, number], read.exit_logit_BM[row, number], columns[number]
        assert 1 <= step < depth[row, column], "it could have left there and went on"
        np.testing.assert_allclose(exit_logit, output.exit_logit_TBS[step, row, column], rtol=1e-5)
        if not is_target[row, column]:
            errors.append(exit_logit)
            continue
        before, after = (nats_of(h)[row, column] for h in (output.h_TBSD[step], output.exit_BSD))
        errors.append((before - after) / (depth[row, column] - step) + exit_logit)
        nats.append(before)
    assert len(set(steps[is_read])) == 3
    assert 0 < len(nats) < len(errors)
    nats_BS = jnp.where(is_target, nats_of(output.exit_BSD), 0)
    found = read_losses(read, head, batch["target"], is_target, nats_BS)
    np.testing.assert_allclose(found["loss_benefit"], np.square(errors).mean(), rtol=1e-4)
    np.testing.assert_allclose(found["loss_read"], np.mean(nats), rtol=1e-4)


def test_load_loss_is_pooled_over_steps():
    """4 executions: layer 0 three times, layer 1 once; probabilities summed over them 2, 1.2, 0.8."""
    found = sums(executions_TL=[[2, 0, 0], [1, 1, 0]], p_layer_L=[2.0, 1.2, 0.8])
    np.testing.assert_allclose(load_loss(found), 3 * (3 / 4 * 2.0 / 4 + 1 / 4 * 1.2 / 4), rtol=1e-6)
    # Each step sends everything to one layer, but over the steps the layers are used alike: balanced.
    staggered = sums(executions_TL=[[4, 0, 0], [0, 4, 0]], p_layer_L=[4.0, 4.0, 0.0])
    np.testing.assert_allclose(load_loss(staggered), 3 * (0.5 * 0.5 + 0.5 * 0.5), rtol=1e-6)
    uniform = sums(executions_TL=[[2, 2, 2], [2, 2, 2]], p_layer_L=[4.0, 4.0, 4.0])
    np.testing.assert_allclose(load_loss(uniform), 1.0, rtol=1e-6)


def test_load_loss_has_a_gradient_through_the_probabilities_only():
    found = sums(executions_TL=[[2, 0, 0], [1, 1, 0]], p_layer_L=[2.0, 1.2, 0.8])
    slope = jax.grad(load_loss)(found)
    np.testing.assert_allclose(slope.p_layer_L, 3 * np.array([3 / 4, 1 / 4, 0]) / 4, rtol=1e-6)


def test_depth_loss():
    found = sums(num_tokens=4, expected_depth=6)
    np.testing.assert_allclose(depth_loss(found, "price", 1.0), 1.5)
    np.testing.assert_allclose(depth_loss(found, "target", 1.0), 0.25)


def test_router_z_loss():
    np.testing.assert_allclose(router_z_loss(sums(z=10.0, num_decisions=4)), 2.5)


def test_total_loss_weighs_the_terms_and_leaves_them_raw():
    cfg = make_config(
        router__load_coef=0.5, router__depth_coef=0.25, router__z_coef=0.125, router__depth_loss="target"
    ).router
    found = sums(
        executions_TL=[[2, 2, 2], [2, 2, 2]], p_layer_L=[4, 4, 4], num_tokens=4, expected_depth=16, z=8, num_decisions=4
    )
    at = schedule(cfg, T, jnp.int32(0))
    terms = total_loss(cfg, jnp.float32(3.0), found, at, {})
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {
            "loss": 3.0 + 0.5 * 1.0 + 0.25 * 4.0 + 0.125 * 2.0,
            "ce": 3.0,
            "loss_load": 1.0,
            "loss_depth": 4.0,
            "loss_router_z": 2.0,
        }
    )
    fixed = total_loss(make_config(router__form="hash", router__load_coef=0.5).router, jnp.float32(3.0), found, at, {})
    assert fixed["loss"] == 3.0, "a fixed route has nothing to be taught"


def test_sums_of_a_model_from_its_logits():
    """What the losses are made of, by hand from the router's own probabilities of a one-layer-deep run."""
    config = make_config(model__max_depth=2, model__min_depth=0, router__prior="sequential", router__prior_weight=1.5)
    model, batch = Model(config).with_mixed_exits(), make_batch(config)
    routing = model(batch).routing
    router = {name: np.asarray(array) for name, array in model.params["router"].items()}
    # Step 0 routes the embeddings themselves.
    h = np.asarray(model.params["embedding"])[batch["token"]] * 24**0.5
    x = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) + router["step_embedding"][0]
    logits = np.asarray(jax.nn.gelu(x @ router["hidden"])) @ router["out"] + router["out_bias"]
    layers, leave = logits[..., :5], logits[..., 5]
    z = np.log(np.exp(layers).sum(-1)) ** 2 + leave**2
    survive = 1 / (1 + np.exp(leave))
    only = model(batch, max_depth=1).routing
    np.testing.assert_allclose(only.z, z.sum(), rtol=1e-4)
    np.testing.assert_allclose(only.expected_depth, survive.sum(), rtol=1e-4)
    np.testing.assert_allclose(only.exit_logit_std(), leave.std(), rtol=1e-3)
    layers[..., 0] += 1.5
    p_layer = np.exp(layers) / np.exp(layers).sum(-1, keepdims=True)
    np.testing.assert_allclose(only.p_layer_L, p_layer[leave <= 0].sum(0), rtol=1e-3, atol=1e-5)
    assert 0 < only.tokens_by_depth[0] < 26 and routing.expected_depth > only.expected_depth
