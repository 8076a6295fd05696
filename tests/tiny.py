"""Tiny configs of odd sizes, batches for them, and a model to call on those."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from radialnet.config import Config
from radialnet.controllers import Controllers, schedule
from radialnet.metrics import RoutingSums
from radialnet.model import init_params
from radialnet.sharding import AXES
from radialnet.train_step import forward

VOCAB = 17
# What a file of a Llama can hold, with a norm whose epsilon shows.
AS_LLAMA = {"router__form": "sequential", "model__pool_size": 3, "model__qk_norm": False, "model__norm_eps": 1e-3}
# So few explore that in a test nobody does.
TOKEN_EXITS = {"router__exit_training": "benefit", "router__exit_sees": "token", "router__explore": 1e-9}


def make_config(**overrides) -> Config:
    """A tiny radial network that routes and exits; override by `section__field=value`."""
    config = base.get_config()
    config.model.update(
        pool_size=5, max_depth=3, min_depth=1, d_model=24, num_heads=6, num_kv_heads=2, d_ff=20, init="distinct"
    )
    config.router.update(prior="none", depth_target=2.0)
    config.train.update(batch_size=2, seq_len=13)
    return Config.from_dict(config, **overrides)


def mesh_config(sizes, **more):
    """Sizes that all meshes divide: 4 kv heads of 4 channels, 3 query heads each."""
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


def make_batch(config: Config, seed: int = 0, packed: bool = False) -> dict[str, np.ndarray]:
    """Random tokens; `packed`: several documents a row, the last one followed by padding."""
    rng = np.random.default_rng(seed)
    shape = (config.train.batch_size, config.train.seq_len)
    token = rng.integers(0, VOCAB, shape).astype(np.int32)
    document, position = np.zeros(shape, np.int32), np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    if packed:
        for row in range(shape[0]):
            cuts = np.sort(rng.choice(np.arange(1, shape[1]), 3, replace=False))
            document[row] = np.searchsorted(cuts, np.arange(shape[1]), side="right")
            for cut in cuts:
                position[row, cut:] = np.arange(shape[1] - cut)
        document[document == 3] = -1
    return {
        "token": token,
        "target": rng.integers(0, VOCAB, shape).astype(np.int32),
        "document": document,
        "position": position,
        "is_target": document >= 0,
    }


def zero_sums(max_depth: int, num_layers: int) -> RoutingSums:
    zero = jnp.float32(0)
    names = RoutingSums.__dataclass_fields__
    sums = RoutingSums(**dict.fromkeys(names, zero))
    return sums.replace(
        tokens_by_depth=jnp.zeros(max_depth + 1),
        executions_TL=jnp.zeros((max_depth, num_layers)),
        executions_TKL=jnp.zeros((max_depth, VOCAB, num_layers)),
        p_layer_L=jnp.zeros(num_layers),
    )


# Compiled once for all tests with equal configs and shapes.
_forward = partial(jax.jit, static_argnums=(0, 6))(forward)


class Model:
    """A freshly initialised model with its controllers, to call on batches."""

    def __init__(self, config: Config, step: int = 0, vocab_size: int = VOCAB):
        self.config = config
        self.graph, self.params = init_params(config, vocab_size)
        self.controllers = Controllers.init(config.router, config.model.pool_size)
        self.at = schedule(config.router, config.model.max_depth, jnp.int32(step))

    @classmethod
    def of(cls, trained) -> "Model":
        """A trained one."""
        model = cls.__new__(cls)
        model.config, model.graph, model.params = trained.config, trained.graph, trained.params
        model.controllers = trained.controllers
        model.at = schedule(trained.config.router, trained.config.model.max_depth, jnp.int32(trained.step))
        return model

    def __call__(self, batch, params=None, controllers=None, rng=None, max_depth=None, at=None):
        return _forward(
            self.graph,
            self.params if params is None else params,
            batch,
            self.controllers if controllers is None else controllers,
            self.at if at is None else at,
            jax.random.key(0) if rng is None else rng,
            max_depth,
        )

    def with_mixed_exits(self) -> "Model":
        """Make the exit logit depend strongly on the token, so that about half of the tokens leave at each step."""
        router = self.params["router"]
        if "out" in router:
            router["out"] = router["out"].at[:, -1].mul(30.0)
        mix_predicted_exits(router)
        return self


def mix_predicted_exits(router: dict) -> None:
    """Let what predicts exits, and begins at 0, differ by token."""
    for name, scale in (("exit_out", 0.6), ("exit_table", 1.0)):
        if name in router:
            router[name] = scale * jax.random.normal(jax.random.key(1), router[name].shape)


def logits_of(trained, token_BS: np.ndarray) -> np.ndarray:
    """Of a trained model, each row one document."""
    shape = token_BS.shape
    position_BS = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {"token": token_BS, "document": np.zeros(shape, np.int32), "position": position_BS}
    return np.asarray(Model.of(trained)(batch).logits_BSV)


def perturbed(params, seed=0):
    """Parameters off their initial values, so that a norm scale of 1 hides nothing."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])
