"""How the selections of `sparse` are trained: predictors on a model that stays as it is, gates together with theirs."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from functools import cache, partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.executions import Execution, executions
from radialnet.layers import rms_norm
from radialnet.losses import cross_entropy
from radialnet.shards import Batch
from radialnet.sparse import Gates, TopShare, gains, head_sizes, sparsified, top
from radialnet.train_step import forward_as_evaluated
from radialnet.trained import TrainedModel

# Of the heads and units of a layer, those that count as large.
LARGE_HEADS, LARGE_UNITS = 0.5, 0.25


@flax.struct.dataclass
class Seen:
    """Executions of each layer, M of them: what a selection is given, and what is right.

    Attributes:
        stream_LMD: the stream before the layer, normed.
        mlp_LMD: what its MLP got.
        heads_LMH, units_LMF: whether they are among the `LARGE_HEADS`, `LARGE_UNITS` that add most to the stream.
    """

    stream_LMD: np.ndarray
    mlp_LMD: np.ndarray
    heads_LMH: np.ndarray
    units_LMF: np.ndarray


def watched(trained: TrainedModel) -> TrainedModel:
    """The model as it is, with layers that know how much each head and unit adds."""
    return sparsified(trained, TopShare("largest", 1.0, 1.0), gains(trained) | _no_bias(trained))


def see(trained: TrainedModel, batches: Iterable[Batch], num: int) -> Seen:
    """The first executions of each layer, so many; of one that has fewer again and again, and zeros of one without."""
    model, num_layers = watched(trained), trained.config.model.pool_size
    parts: dict[str, list[list[np.ndarray]]] = {}
    num_seen_L = np.zeros(num_layers, int)
    for batch in batches:
        found, layer_XBS = _look(
            model.params, model.controllers, np.int32(model.step), batch, config=model.config, graph=model.graph
        )
        layer_XBS = np.asarray(layer_XBS)
        for name, x_XBSY in found.items():
            x_XBSY = np.asarray(x_XBSY)
            for layer, rows in enumerate(parts.setdefault(name, [[] for _ in range(num_layers)])):
                # Not more than are wanted: those of a large model fill the memory.
                rows.append(x_XBSY[layer_XBS == layer][: num - num_seen_L[layer]])
        num_seen_L = np.minimum(num_seen_L + [(layer_XBS == layer).sum() for layer in range(num_layers)], num)
    return Seen(**{name: np.stack([_filled(rows, num) for rows in by_layer]) for name, by_layer in parts.items()})


def _filled(parts: list[np.ndarray], num: int) -> np.ndarray:
    rows = np.concatenate(parts)
    return np.resize(rows, (num, *rows.shape[1:])) if len(rows) else np.zeros((num, *rows.shape[1:]), rows.dtype)


@partial(jax.jit, static_argnames=("config", "graph"))
def _look(params, controllers: Controllers, step, batch: Batch, *, config: Config, graph: nnx.GraphDef):
    model = nnx.merge(graph, params)

    def look(execution: Execution) -> dict[str, jax.Array]:
        block, hidden_BSX = execution.pool.block, execution.product("mlp_in")
        if "mlp_in_bias" in block.AFTER:
            hidden_BSX += execution.of_layer("mlp_in_bias").reshape(hidden_BSX.shape)
        size_BSF = jnp.abs(block.activation(hidden_BSX)) * execution.of_layer("unit_gain")
        # Half precision: there are many of them.
        return {
            "stream_LMD": rms_norm(execution.before_BSD, 1.0, block.eps).astype(jnp.float16),
            "mlp_LMD": execution.mlp_in_BSD.astype(jnp.float16),
            "heads_LMH": _large(_head_sizes(execution, model.cfg.head_size), LARGE_HEADS),
            "units_LMF": _large(size_BSF, LARGE_UNITS),
        }

    return executions(model, config, batch, controllers, step, look)[1:]


def _head_sizes(execution: Execution, size: int) -> jax.Array:
    gained_BSX = execution.product("head_gain")
    return head_sizes(gained_BSX.reshape(-1, gained_BSX.shape[-1]), size).reshape(*gained_BSX.shape[:2], -1)


def _large(size_BSX: jax.Array, share: float) -> jax.Array:
    # Units that add nothing, as most behind a ReLU, are none.
    return top(size_BSX.reshape(-1, size_BSX.shape[-1]), share).reshape(size_BSX.shape) & (size_BSX > 0)


def _no_bias(trained: TrainedModel) -> dict[str, jax.Array]:
    model = trained.config.model
    sizes = {"heads_bias": model.num_heads, "units_bias": model.d_ff}
    return {name: jnp.zeros((model.pool_size, size)) for name, size in sizes.items()}


def unlearned(trained: TrainedModel, choice: str, seen: Seen) -> dict[str, jax.Array]:
    """What the choices need that nothing is learned for: `largest`, `static`, `random`."""
    if choice == "static":
        # How often they are large.
        shares = {"heads_bias": seen.heads_LMH.mean(1), "units_bias": seen.units_LMF.mean(1)}
        return {name: jnp.asarray(share, jnp.float32) for name, share in shares.items()}
    return _no_bias(trained) | (gains(trained) if choice == "largest" else {})


def fit_predictors(seen: Seen, rank: int, num_steps: int, seed: int = 0) -> dict[str, jax.Array]:
    """DejaVu's predictors: two products with ReLU between them, by the logistic loss of what is large."""
    key = jax.random.split(jax.random.key(seed))
    heads = _fit(seen.stream_LMD, seen.heads_LMH, key[0], rank=rank, num_steps=num_steps)
    units = _fit(seen.mlp_LMD, seen.units_LMF, key[1], rank=rank, num_steps=num_steps)
    named = ("heads", heads), ("units", units)
    return {f"{what}_{name}": weights for what, fitted in named for name, weights in fitted.items()}


_ROWS = 256  # Of each layer, a step.


@partial(jax.jit, static_argnames=("rank", "num_steps"))
def _fit(x_LMD, large_LMX, key, *, rank: int, num_steps: int) -> dict[str, jax.Array]:
    num_layers, num_rows, d_model = x_LMD.shape
    init_key, draw_key = jax.random.split(key)
    in_key, out_key = jax.random.split(init_key)
    share_LX = jnp.clip(large_LMX.mean(1, dtype=jnp.float32), 1e-3, 1 - 1e-3)
    # As large as what comes in, of which an RMSNorm with a scale says nothing.
    size_L11 = jnp.sqrt(jnp.square(x_LMD.astype(jnp.float32)).mean((1, 2), keepdims=True)) + 1e-6
    params = {
        "in": jax.random.normal(in_key, (num_layers, d_model, rank)) * d_model**-0.5 / size_L11,
        "out": jax.random.normal(out_key, (num_layers, rank, large_LMX.shape[-1])) * rank**-0.5,
        "bias": jnp.log(share_LX) - jnp.log1p(-share_LX),
    }

    def loss_of(params, x_LPD, large_LPX):
        low_LPR = jax.nn.relu(jnp.einsum("LPD,LDR->LPR", x_LPD.astype(jnp.float32), params["in"]))
        score_LPX = jnp.einsum("LPR,LRX->LPX", low_LPR, params["out"]) + params["bias"][:, None]
        return optax.sigmoid_binary_cross_entropy(score_LPX, large_LPX).mean((1, 2)).sum()

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))

    def step(carry, number):
        params, moments = carry
        row_P = jax.random.randint(jax.random.fold_in(draw_key, number), (_ROWS,), 0, num_rows)
        grads = jax.grad(loss_of)(params, x_LMD[:, row_P], large_LMX[:, row_P])
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(num_steps))
    return params


def gated(trained: TrainedModel, seen: Seen, channels: int, target: float) -> TrainedModel:
    """The model with gates whose thresholds, in standard deviations of the partial sums, begin at the target."""
    weights_LDF = trained.params["pool"]["block"]["mlp_in"][:, :channels, 0]

    def moments(given):
        partial_MF = given[0].astype(jnp.float32) @ given[1]
        return partial_MF.mean(0), partial_MF.std(0) + 1e-6

    # A layer at a time: all at once fill the memory.
    mean_LF, std_LF = jax.lax.map(moments, (jnp.asarray(seen.mlp_LMD[..., :channels]), weights_LDF))
    added = {"gate_mean": mean_LF, "gate_std": std_LF, "threshold": jnp.full(mean_LF.shape, target, jnp.float32)}
    return sparsified(trained, Gates(channels), added)


def train_gates(
    model: TrainedModel, batches: Iterator[Batch], target: float, num_steps: int, learning_rate: float, coef: float
) -> TrainedModel:
    """Channel Gating's training: the cross-entropy and coef · mean (threshold - target)², of model and thresholds.

    Routes are those that were trained: without the losses of its own training a router would change the depth. What
    the run has frozen stays so.

    Args:
        learning_rate: peak, of all but the thresholds, which are in standard deviations and have their own.
    """
    if not num_steps:
        return model
    optimizer = _optimizer(num_steps, learning_rate)
    params, moments = model.params, None
    for batch in itertools.islice(batches, num_steps):
        moments = optimizer.init(params) if moments is None else moments
        params, moments = _train_step(
            params,
            moments,
            model.controllers,
            np.int32(model.step),
            batch,
            target,
            coef,
            config=model.config,
            graph=model.graph,
            update=optimizer.update,
        )
    return dataclasses.replace(model, params=params)


_THRESHOLD_RATE = 1e-2  # Peak.


@cache
def _optimizer(num_steps: int, learning_rate: float) -> optax.GradientTransformation:
    # One for all targets, so that they share a program.
    def adam(peak: float) -> optax.GradientTransformation:
        return optax.adam(
            optax.warmup_cosine_decay_schedule(0.0, peak, num_steps // 10, num_steps, 0.1 * peak), b2=0.98
        )

    def kinds(params: dict) -> dict:
        return jax.tree.map_with_path(lambda path, _: "threshold" if path[-1].key == "threshold" else "weights", params)

    by_kind = optax.multi_transform({"weights": adam(learning_rate), "threshold": adam(_THRESHOLD_RATE)}, kinds)
    return optax.chain(optax.clip_by_global_norm(1.0), by_kind)


@partial(jax.jit, static_argnames=("config", "graph", "update"), donate_argnames=("moments",))
def _train_step(params, moments, controllers, step, batch, target, coef, *, config, graph, update):
    def loss_of(params):
        output = forward_as_evaluated(config, graph, params, batch, controllers, step)
        rows = batch["target"].ravel(), batch["is_target"].ravel()
        nats, _ = cross_entropy(output.final_BSD.reshape(len(rows[0]), -1), params["head"], *rows)
        pull = jnp.square(params["pool"]["block"]["threshold"] - target).mean()
        return nats / batch["is_target"].sum() + coef * pull

    grads = jax.grad(loss_of)(params)
    threshold = grads["pool"]["block"]["threshold"]
    frozen = {"router", *config.optimizer.frozen_parts}
    grads = {name: jax.tree.map(jnp.zeros_like, grad) if name in frozen else grad for name, grad in grads.items()}
    # What standardises the partial sums stays as it was measured.
    block = grads["pool"]["block"]
    block |= {name: jnp.zeros_like(block[name]) for name in ("gate_mean", "gate_std")} | {"threshold": threshold}
    updates, moments = update(grads, moments, params)
    return optax.apply_updates(params, updates), moments
