import jax
import jax.numpy as jnp
import numpy as np
import optax

from radialnet.optimizer import clip, learning_rate, make_optimizer
from tests.tiny import make_config

RNG = np.random.default_rng(0)


def tree(scale=1.0):
    shapes = {
        "head": (5, 3),
        "router": {"norm": (7,), "out": (4, 2), "out_bias": (2,)},
        "pool": {"qkv": (2, 3, 4), "key_norm": (2, 3), "qkv_bias": (2, 3, 2)},
    }
    return jax.tree.map(lambda s: jnp.asarray(scale * RNG.normal(size=s), jnp.float32), shapes, is_leaf=_is_shape)


def _is_shape(x):
    return isinstance(x, tuple)


def test_is_adamw_with_clipping_by_the_global_norm():
    """Ten steps, some clipped and some not, against optax's own."""
    config = make_config(train__num_steps=20, optimizer__clip_norm=3.0, optimizer__weight_decay=0.3)
    params = plain_params = tree()
    decayed = {
        "head": True,
        "router": {"norm": False, "out": True, "out_bias": False},
        "pool": {"qkv": True, "key_norm": False, "qkv_bias": False},
    }
    ours = make_optimizer(config)
    plain = optax.chain(
        optax.clip_by_global_norm(3.0),
        optax.adamw(learning_rate(config), b1=0.9, b2=config.optimizer.b2, weight_decay=0.3, mask=decayed),
    )
    state, plain_state = ours.init(params), plain.init(params)
    norms = []
    for step in range(10):
        grads = tree(scale=0.2 * (step + 1))
        norms.append(float(optax.tree.norm(grads)))
        updates, state = ours.update(clip(config, grads, optax.tree.norm(grads)), state, params)
        params = optax.apply_updates(params, updates)
        updates, plain_state = plain.update(grads, plain_state, plain_params)
        plain_params = optax.apply_updates(plain_params, updates)
    assert min(norms) < 3 < max(norms)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, plain_params)


def test_the_router_has_a_learning_rate_of_its_own():
    """And nothing else has; a run may change it when it goes on."""
    params, grads, updates, states = tree(), tree(), {}, {}
    for factor in (1.0, 0.1):
        optimizer = make_optimizer(make_config(optimizer__router_scale=factor, optimizer__weight_decay=0.3))
        updates[factor], states[factor] = optimizer.update(grads, optimizer.init(params), params)
    assert jax.tree.structure(states[1.0]) == jax.tree.structure(states[0.1])
    for name in ("head", "pool"):
        jax.tree.map(np.testing.assert_array_equal, updates[0.1][name], updates[1.0][name])
    jax.tree.map(
        lambda tenth, whole: np.testing.assert_allclose(tenth, 0.1 * whole, rtol=1e-6),
        updates[0.1]["router"],
        updates[1.0]["router"],
    )
    optimizer = make_optimizer(make_config(optimizer__frozen="router"))
    frozen, _ = optimizer.update(grads, optimizer.init(params), params)
    assert not any(update.any() for update in frozen["router"].values())


def test_group_decay_pulls_layers_to_the_mean_of_their_group():
    """In numpy, beside what AdamW does; a layer that is alone in its group, and all else, change as they would."""
    fields = {"model__pool_size": 5, "model__num_groups": 3, "model__init": "clones"}
    plain, pulled = make_config(**fields), make_config(optimizer__group_decay=7.0, **fields)
    params = {"head": tree()["head"], "pool": {"qkv": jnp.asarray(RNG.normal(size=(5, 3, 4)), jnp.float32)}}
    grads = jax.tree.map(jnp.ones_like, params)
    states = [make_optimizer(config).init(params) for config in (pulled, plain)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1]), "a run may change it when it goes on"
    with_it, without = (
        make_optimizer(config).update(grads, state, params)[0]
        for config, state in zip((pulled, plain), states, strict=True)
    )
    np.testing.assert_array_equal(with_it["head"], without["head"])
    weights = np.asarray(params["pool"]["qkv"])
    means = np.stack([weights[:2].mean(0)] * 2 + [weights[2:4].mean(0)] * 2 + [weights[4]])
    rate = learning_rate(pulled)(0)
    expected = without["pool"]["qkv"] - rate * 7 * (weights - means)
    np.testing.assert_allclose(with_it["pool"]["qkv"], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(with_it["pool"]["qkv"] - without["pool"]["qkv"])[:4].min() > 0
    optimizer = make_optimizer(make_config(optimizer__group_decay=7.0, optimizer__frozen="head", **fields))
    frozen, _ = optimizer.update(grads, optimizer.init(params), params)
    assert not frozen["head"].any()
    np.testing.assert_allclose(frozen["pool"]["qkv"], with_it["pool"]["qkv"], rtol=1e-5, atol=1e-8)


def test_group_decay_falls_by_the_same_factor_each_step():
    """The layers of a group that have no gradients: each step leaves 1 - ηγ of what parts them, with the γ of then."""
    fields = {
        "model__pool_size": 2,
        "model__num_groups": 1,
        "router__form": "hash_exit",
        "optimizer__weight_decay": 0.0,
        "optimizer__group_decay": 2.0,
        "optimizer__group_decay_init": 32.0,
        "optimizer__group_decay_steps": 4,
        "train__num_steps": 20,
    }
    config = make_config(**fields)
    params = {"pool": {"qkv": jnp.asarray([[1.0], [3.0]])}}
    optimizer = make_optimizer(config)
    state, apart = optimizer.init(params), 2.0
    for step, decay in enumerate([32.0, 16.0, 8.0, 4.0, 2.0, 2.0, 2.0]):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        apart *= 1 - float(learning_rate(config)(step)) * decay
        low, high = params["pool"]["qkv"][:, 0]
        np.testing.assert_allclose([high - low, low + high], [apart, 4.0], rtol=1e-5)


def test_learning_rate_warms_up_and_decays():
    config = make_config(
        train__num_steps=100, optimizer__warmup_steps=5, optimizer__learning_rate=0.5, optimizer__final_fraction=0.1
    )
    rate = learning_rate(config)
    assert rate(0) > 0, "no step is spent at 0"
    np.testing.assert_allclose(rate(4), 0.5, rtol=1e-5)
    np.testing.assert_allclose(rate(99), 0.05, rtol=1e-4)


def test_low_rank_is_adamw_on_the_factors_of_the_pool():
    """Against autodiff through W + A·B; all else, of the pool too, changes as it would."""
    config = make_config(train__num_steps=20, optimizer__weight_decay=0.3, optimizer__low_rank=2)
    params, optimizer = tree(), make_optimizer(config)
    rng, start = np.random.default_rng(1), params
    state = optimizer.init(params)
    (factors,) = state.factors.values()
    assert not factors.right_LrO.any() and factors.left_LIr.std() > 0
    plain = make_optimizer(make_config(train__num_steps=20, optimizer__weight_decay=0.3))

    def whole(apart):
        low = jnp.einsum("lir,lro->lio", apart["factors"]["a"], apart["factors"]["b"])
        vectors = {name: apart[name] for name in ("key_norm", "qkv_bias")}
        return {**apart["rest"], "pool": {"qkv": start["pool"]["qkv"] + low, **vectors}}

    # By the names that the decay goes by.
    apart = {
        "rest": {name: params[name] for name in ("head", "router")},
        "key_norm": params["pool"]["key_norm"],
        "qkv_bias": params["pool"]["qkv_bias"],
        "factors": {"a": factors[0], "b": factors[1]},
    }
    plain_state = plain.init(apart)
    for _ in range(5):
        aim = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)

        def loss(params, aim=aim):
            return sum(((x - y) ** 2).sum() for x, y in zip(*map(jax.tree.leaves, (params, aim)), strict=True))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        slopes = jax.grad(lambda apart, loss=loss: loss(whole(apart)))(apart)
        updates, plain_state = plain.update(slopes, plain_state, apart)
        apart = optax.apply_updates(apart, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, whole(apart))
    change_LDX = np.asarray(params["pool"]["qkv"] - start["pool"]["qkv"])
    sizes = np.linalg.svd(change_LDX, compute_uv=False)
    assert (sizes[:, 2:] < 1e-5).all() and (sizes[:, 1] > 1e-4).all()
