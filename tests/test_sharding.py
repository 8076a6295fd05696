"""Meshes of eight devices against one: loss, gradients, an update and the controllers."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from radialnet.model import abstract_params, init_params, place
from radialnet.optimizer import make_optimizer
from radialnet.sharding import AXES, ONE_DEVICE
from radialnet.train_step import eval_step, init_state, state_shardings, train_step
from tests.tiny import VOCAB, make_batch, make_config

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
    "exits by benefit, explore, view all, parts": {
        "router__exit_training": "benefit",
        "router__explore": 0.2,
        "router__exit_bias_init": 0.1,
        "cache__view": "all",
        "train__accumulate_steps": 2,
        "train__batch_size": 16,
    },
    "remat, prelude and coda, score": {
        "model__remat": "step",
        "model__prelude_layers": 1,
        "model__coda_layers": 2,
        "router__estimator": "score",
        "router__exit_bias_init": 1.5,
    },
}


def mesh_config(sizes, **more):
    """Sizes that all meshes divide, and no two alike: 4 kv heads of 2 channels, 3 query heads each."""
    fields = {
        "model__d_model": 48,
        "model__num_heads": 12,
        "model__num_kv_heads": 4,
        "model__d_ff": 20,
        "model__pool_size": 8,
        "router__hidden": 12,
        "router__depth_coef": 0.0,
        "train__batch_size": 8,
        "train__seq_len": 13,
    }
    mesh = {f"mesh__{axis}": sizes.get(axis, 1) for axis in AXES}
    return make_config(**{**fields, **mesh, **more})


class Step:
    """A training step of a config on its mesh: new state, sums and scalars, and the gradient by the moments."""

    def __init__(self, config, broken_axes=None):
        self.config = config
        self.placement = make_placement(config)
        if broken_axes:
            self.placement = dataclasses.replace(self.placement, axes=broken_axes(self.placement.axes))
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
        state, sums, scalars = self.train(state, batch, BYTES)
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
    router["out"] = (router["out"] * 20).at[:, -1].mul(5.0)
    router["out_bias"] = router["out_bias"].at[jnp.array([1, 4, 5])].set(-100.0)
    if "exit_out" in router:
        router["exit_out"] = router["out"][:, -1:]
    return params


def batch_of(config):
    """Packed rows, the last ones padding alone: some devices have no token that does anything."""
    batch = make_batch(config, packed=True)
    for name, empty in (("document", -1), ("is_target", False)):
        batch[name][-2:] = empty
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


@pytest.mark.parametrize("dispatch, mesh", [
    *(("gather", mesh) for mesh in MESHES),
    *(("exchange", mesh) for mesh in MESHES if "pool" in mesh),
])  # fmt: skip
@pytest.mark.parametrize("recipe", RECIPES)
def test_eight_devices_equal_one(alone, dispatch, mesh, recipe):
    want = alone(recipe)
    routing = want["sums"].routing
    assert (np.asarray(routing.load_L())[[1, 4, 5]] == 0).all() and (routing.tokens_by_depth[1:] > 0).all(), (
        "uneven, with exits"
    )
    config = mesh_config(MESHES[mesh], mesh__pool_dispatch=dispatch, **RECIPES[recipe])
    step = Step(config)
    assert step.placement.parallel.num_devices == 8
    assert step.placement.parallel.exchanges == (dispatch == "exchange")
    found = step(batch_of(config))
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path)),
        found, want,
    )  # fmt: skip
