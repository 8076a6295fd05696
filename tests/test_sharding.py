"""Meshes of eight devices against one: loss, gradients, an update and the controllers."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from radialnet.exchange import Exchange, choose_dispatch, map_forward
from radialnet.grouping import gather, plan, scatter
from radialnet.model import abstract_params, init_params, place
from radialnet.optimizer import make_optimizer
from radialnet.sections import ConfigError
from radialnet.sharding import AXES, ONE_DEVICE, RULES, Parallel, make_mesh, mesh_sizes
from radialnet.train_step import eval_step, init_state, state_shardings, train_step
from tests.tiny import TOKEN_EXITS, VOCAB, make_batch, mesh_config, mix_predicted_exits

BYTES = jnp.arange(VOCAB, dtype=jnp.int32)
MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "pool=4,data=2": {"pool": 4, "data": 2},
    "tensor=2,pool=2,fsdp=2": {"tensor": 2, "pool": 2, "fsdp": 2},
    "data=2,tensor=4": {"data": 2, "tensor": 4},
}
# Router with noise, exploration and read states; some rows of padding; accumulation.
RECIPES = {
    "exits by gate, noise": {"router__noise": 0.5, "router__noise_steps": 100, "router__load_bias_rate": 0.01},
    "exits by benefit, explore, view all, in parts, other layers": {
        "router__exit_training": "benefit",
        "router__read_every": 3,
        "router__explore": 0.2,
        # At 0.1 a token is so near to leaving that its rounding, another on each machine, decides.
        "router__exit_bias_init": 0.16,
        "cache__view": "all",
        "model__norm": "layer",
        "model__mlp": "gelu",
        "model__biases": True,
        "model__positions": "learned",
        "model__max_positions": 24,
        "train__accumulate_steps": 2,
        "train__batch_size": 16,
    },
    "exits by benefit of the token, layers that are pulled to their mean": {
        **TOKEN_EXITS,
        "router__explore": 0.2,
        "cache__view": "latest",
        "optimizer__group_decay": 50.0,
    },
    "remat, prelude and coda, score, a linear router at every second step": {
        "model__remat": "step",
        "router__network": "linear",
        "router__every": 2,
        "model__prelude_layers": 1,
        "model__coda_layers": 1,
        "router__estimator": "score",
        "router__exit_bias_init": 6.0,
    },
}


class Step:
    """A training step of a config on its mesh: new state, sums and scalars, and the gradient by the moments."""

    def __init__(self, config, exchange=""):
        self.config = config
        self.placement = make_placement(config)
        parallel = self.placement.parallel
        assert parallel.exchanges == bool(exchange)
        self.placement = dataclasses.replace(self.placement, parallel=dataclasses.replace(parallel, exchange=exchange))
        self.graph, _ = abstract_params(config, VOCAB, self.placement.parallel)
        self.optimizer = make_optimizer(config)
        kwargs = {"config": config, "graph": self.graph, "placement": self.placement}
        self.train = jax.jit(partial(train_step, optimizer=self.optimizer, **kwargs))
        self.eval = jax.jit(partial(eval_step, **kwargs))

    def __call__(self, batch, step=0):
        params = with_uneven_routes(init_params(self.config, VOCAB)[1])
        state = init_state(self.config, params, self.optimizer).replace(step=jnp.int32(step))
        if self.placement.mesh is not None:
            state = jax.device_put(state, state_shardings(self.placement, self.optimizer, state))
            batch = self.placement.put_rows(batch, self.config.train.batch_size)
        self.before = state
        state, sums, scalars = self.train(state, batch, BYTES)
        self.state = state
        evaluated = self.eval(state.params, state.controllers, state.step, batch, BYTES)
        # How rows are padded is up to each device.
        sums, evaluated = (x.replace(routing=x.routing.replace(num_computed=0)) for x in (sums, evaluated))
        # The first moments after one step are (1 - b1) times the clipped gradient.
        grads = jax.tree.map(lambda mu: mu / 0.1, optax.tree.get(state.optimizer, "mu"))
        return jax.tree.map(np.asarray, {
            "grads": grads, "params": state.params, "controllers": state.controllers, "sums": sums,
            "scalars": scalars, "eval": evaluated,
        })  # fmt: skip


def make_placement(config):
    size = math.prod(getattr(config.mesh, axis) for axis in AXES)
    if size == 1:
        return ONE_DEVICE
    return place(config, VOCAB, jax.devices())


def with_uneven_routes(params):
    """Routers that exit by token and leave some layers without any."""
    router = params["router"]
    if "out" in router:
        router["out"] = (router["out"] * 20).at[:, -1].mul(5.0)
        router["out_bias"] = router["out_bias"].at[jnp.array([1, 4, 5])].set(-100.0)
    mix_predicted_exits(router)
    return params


def batch_of(config):
    """Packed rows, a third of their tokens without a target, the last rows padding alone: some devices have no token
    that does anything."""
    batch = make_batch(config, packed=True)
    for name, empty in (("document", -1), ("is_target", False)):
        batch[name][-2:] = empty
    batch["is_target"][:, ::3] = False
    return batch


@pytest.fixture(scope="module")
def alone():
    """The same on one device, once for each recipe."""
    found = {}

    def of(recipe):
        if recipe not in found:
            config = mesh_config({}, **RECIPES[recipe])
            found[recipe] = Step(config)(batch_of(config))
        return found[recipe]

    return of


# Of each recipe in turn: the second mesh that it runs on, after the one of three axes, and its exchange; all pairs take
# minutes.
SECOND_MESHES = ("data=8", "data=2,tensor=4", "fsdp=8", "pool=4,data=2")
EXCHANGES = {"padded": "pool=4,data=2", "ragged": "tensor=2,pool=2,fsdp=2"}


def mesh_cases():
    for recipe, mesh, exchange in zip(RECIPES, SECOND_MESHES, [*EXCHANGES] * 2, strict=True):
        yield "", "tensor=2,pool=2,fsdp=2", recipe
        yield "", mesh, recipe
        yield exchange, EXCHANGES[exchange], recipe


@pytest.mark.parametrize("exchange, mesh, recipe", list(mesh_cases()))
def test_eight_devices_equal_one(alone, exchange, mesh, recipe):
    want = alone(recipe)
    routing = want["sums"].routing
    assert (np.asarray(routing.load_L())[[1, 4, 5]] == 0).all() and (routing.tokens_by_depth[1:] > 0).all(), (
        "uneven, with exits"
    )
    dispatch = "exchange" if exchange else "gather"
    step = Step(mesh_config(MESHES[mesh], mesh__pool_dispatch=dispatch, **RECIPES[recipe]), exchange)
    assert step.placement.parallel.num_devices == 8
    assert_equal(step(batch_of(step.config)), want)
    # What the table says is split is nowhere whole.
    for state in (step.before, step.state):
        moments = (optax.tree.get(state.optimizer, name) for name in ("mu", "nu"))
        for params in (state.params, *moments):
            jax.tree.map(partial(assert_split, MESHES[mesh]), params, step.placement.axes)


@pytest.mark.parametrize("exchange", ["", "ragged"])
def test_given_routes_on_eight_devices_equal_those_on_one(exchange):
    """Their network is in a branch, with the sum over its parts."""
    fields = {
        "router__form": "hash_exit",
        "router__hash_span": 2,
        "router__exit_training": "benefit",
        "router__read_every": 2,
        "router__explore": 0.2,
        "model__num_groups": 1,
    }
    config = mesh_config({}, **fields)
    want = Step(config)(batch_of(config))
    assert (want["sums"].routing.tokens_by_depth[1:] > 0).all() and want["grads"]["router"]["exit_hidden"].any()
    sizes, dispatch = MESHES["tensor=2,pool=2,fsdp=2"], "exchange" if exchange else "gather"
    step = Step(mesh_config(sizes, mesh__pool_dispatch=dispatch, **fields), exchange)
    assert_equal(step(batch_of(step.config)), want)


def assert_equal(found, want):
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path)),
        found, want,
    )  # fmt: skip


def assert_split(mesh, param, axes):
    parts = math.prod(mesh.get(axis, 1) for name in axes for axis in RULES[name])
    assert {shard.data.size * parts for shard in param.addressable_shards} == {param.size}, (param.shape, axes)


@pytest.mark.parametrize("broken", ["mlp", "hidden"])
def test_a_broken_rule_is_found(monkeypatch, alone, broken):
    """Each device of `tensor` then computes all hidden units, of layers or of the router: their sum is too large."""
    recipe = next(iter(RECIPES))
    monkeypatch.setitem(RULES, broken, ())
    config = mesh_config({"data": 4, "tensor": 2}, **RECIPES[recipe])
    found = Step(config)(batch_of(config))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(found, alone(recipe))


@pytest.mark.parametrize("kind", ["ragged", "padded"])
def test_tokens_are_exchanged_in_several_rounds_and_come_back(kind):
    """Four devices with rows for each other as unevenly as can be: all for one of them, none, many for one of many."""
    num_parts, num_rows, width, layers_each = 4, 37, 3, 2
    rng = np.random.default_rng(0)
    layer_PN = rng.integers(0, num_parts * layers_each + 1, (num_parts, num_rows))
    layer_PN[0], layer_PN[1], layer_PN[2, :20], layer_PN[3] = 5, num_parts * layers_each, 0, 4
    x_PNX = rng.normal(size=(num_parts, num_rows, width)).astype(np.float32)
    scale_L = 1 + np.arange(num_parts * layers_each, dtype=np.float32)

    def scaled(vectors, rows, product):
        return rows[0] * vectors["scale"]

    def local(x_PNX, layer_PN, scale_L):
        groups = plan(layer_PN[0], num_parts * layers_each)
        exchange = Exchange.of(groups, num_parts, kind)
        weights = {"scale": jnp.broadcast_to(scale_L[:, None], (layers_each, width))}
        y_NX, _ = map_forward(scaled, weights, (scatter(x_PNX[0], groups),), exchange)
        num_rounds = exchange.run(lambda _, number: number + 1, jnp.int32(0))
        return gather(y_NX, groups)[None], num_rounds[None]

    mesh = make_mesh(mesh_config({"pool": num_parts}), jax.devices())
    spec = jax.sharding.PartitionSpec("pool")
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    y_PNX, rounds_P = run(x_PNX, layer_PN, scale_L)
    np.testing.assert_allclose(y_PNX, x_PNX * np.append(scale_L, 0)[layer_PN][..., None], rtol=1e-6)
    assert len(set(rounds_P.tolist())) == 1 and rounds_P[0] > 4


def test_meshes_that_do_not_go_with_the_config_or_the_devices():
    for fields, message in (
        ({"mesh__pool": 3}, "config.mesh.pool=3 does not divide config.model.pool_size=8"),
        ({"mesh__tensor": 8}, "config.mesh.tensor=8 does not divide config.model.num_kv_heads=4"),
        ({"mesh__data": 16}, "config.mesh.data=16 does not divide config.train.batch_size=8"),
        ({"mesh__fsdp": 0}, "config.mesh.fsdp=0: at least 1, or -1"),
        ({"mesh__fsdp": -1, "mesh__data": -1}, "config.mesh: data, fsdp are -1; one may be"),
        ({"mesh__pool_dispatch": "send"}, "config.mesh.pool_dispatch='send': one of auto, gather, exchange"),
    ):
        with pytest.raises(ConfigError, match=message):
            mesh_config({}, **fields)
    for mesh, num_devices, message in (
        ({"fsdp": 4, "data": 2}, 7, "a mesh of 8 devices, but there are 7"),
        ({"fsdp": 2, "pool": -1}, 7, "2 does not divide the 7 devices"),
    ):
        with pytest.raises(ConfigError, match=message):
            place(mesh_config(mesh), VOCAB, jax.devices()[:num_devices])
    # As many as rows can be split over.
    for num_devices, batch_size, sizes in ((8, 8, (4, 2)), (7, 8, (2, 2)), (8, 6, (3, 2))):
        config = mesh_config({"data": -1, "tensor": 2}, train__batch_size=batch_size)
        parallel = place(config, VOCAB, jax.devices()[:num_devices]).parallel
        assert parallel == Parallel(data=sizes[0], tensor=sizes[1])
    with pytest.raises(ConfigError, match="multiple of the 3 slices"):
        mesh_sizes(mesh_config({"data": 8}), 8, num_slices=3)
    # Of several processes none is left out, also those of a topology that isn't here.
    assert mesh_sizes(mesh_config({"data": -1}), 16)["data"] == 8
    assert mesh_sizes(mesh_config({"data": -1}), 16, num_processes=4)["data"] == 16


def test_dispatch_is_chosen_by_bytes():
    """Gather moves layers, exchange tokens: many tokens and few layers want the one, the opposite the other."""
    sizes = {"data": 1, "fsdp": 1, "pool": 4, "tensor": 1}
    many_tokens = {"train__seq_len": 4096, "model__pool_size": 8}
    many_layers = {"train__seq_len": 16, "model__pool_size": 256}
    for fields, expected in (
        ({**many_tokens, "router__prior": "none"}, False),
        ({**many_layers, "router__prior": "none"}, True),
        ({**many_layers, "router__prior": "group"}, False),
        ({**many_layers, "router__prior": "group_hash"}, False),
        ({**many_layers, "router__prior": "group_hash", "model__num_groups": 1}, True),
        ({**many_layers, "router__form": "hash_exit"}, False),
        ({**many_layers, "router__form": "hash_exit", "model__num_groups": 1}, True),
        ({**many_layers, "router__form": "hash"}, True),
        ({**many_layers, "router__form": "cyclic"}, False),
        ({**many_layers, "router__prior": "none", "mesh__pool_dispatch": "gather"}, False),
    ):
        exchanges, why = choose_dispatch(mesh_config({"pool": 4}, **fields), sizes)
        assert exchanges == expected and why, fields
