"""AdamW with linear warm-up and cosine decay."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from radialnet.config import Config
from radialnet.low_rank import is_matrix, low_rank
from radialnet.router import group_of_layer


def learning_rate(config: Config) -> optax.Schedule:
    """Learning rate of the update after `count` others."""
    cfg, num_steps = config.optimizer, config.train.num_steps
    warmup = min(cfg.warmup_steps, num_steps // 10)
    final = cfg.final_fraction * cfg.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.learning_rate, warmup, max(num_steps, warmup + 1), final)
    # From 1, so that no step is spent at a learning rate of 0.
    return lambda count: schedule(count + 1)


def group_decay(config: Config) -> optax.Schedule:
    """γ of the update after `count` others: from `group_decay_init` to `group_decay`, by the same factor each step."""
    cfg = config.optimizer
    if not cfg.group_decay_steps:
        return optax.constant_schedule(cfg.group_decay)
    ratio = cfg.group_decay / cfg.group_decay_init
    return optax.exponential_decay(cfg.group_decay_init, cfg.group_decay_steps, ratio, end_value=cfg.group_decay)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Frozen parts get updates of 0, and have no moments; with `low_rank` the pool's matrices have those of factors."""
    cfg, model = config.optimizer, config.model
    scale = _with_router_scale(optax.scale_by_learning_rate(learning_rate(config)), cfg.router_scale)
    if cfg.group_decay:
        scale = _with_group_decay(scale, group_decay(config), group_of_layer(model.pool_size, model.num_layer_groups))
    adamw = optax.chain(
        _scale_by_adam(b1=0.9, b2=cfg.b2, eps=1e-8),
        optax.add_decayed_weights(cfg.weight_decay, _decayed),
        scale,
    )
    if cfg.low_rank:
        adamw = low_rank(adamw, cfg.low_rank, config.train.seed)
    if not cfg.frozen_parts:
        return adamw

    def is_frozen(params: dict, wanted: bool) -> dict:
        return {name: (name in cfg.frozen_parts) == wanted for name in params}

    return optax.chain(
        optax.masked(adamw, partial(is_frozen, wanted=False)),
        optax.masked(optax.set_to_zero(), partial(is_frozen, wanted=True)),
    )


def without_frozen(config: Config, grads: dict) -> dict:
    """Gradients with zeros for the parts that are frozen: they are not in the norm."""
    frozen = config.optimizer.frozen_parts
    return {name: jax.tree.map(jnp.zeros_like, grad) if name in frozen else grad for name, grad in grads.items()}


def clip(config: Config, grads: dict, grad_norm: jax.Array) -> dict:
    """Gradients scaled down to a global norm of at most `clip_norm`.

    By one factor, which XLA can compute where a gradient is used; optax's form has it write all of them out once more.
    """
    factor = jnp.minimum(1, config.optimizer.clip_norm / grad_norm)
    return jax.tree.map(lambda grad: grad * factor, grads)


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, with the moments updated in place.

    XLA would compute the moments once more where the update uses them, from the old ones, and so has to copy those
    before it writes the new. In a large pool, of which a batch uses little, that costs more than the layers do.
    """

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        mu_hat, nu_hat = (optax.tree.bias_correction(x, decay, count) for x, decay in ((mu, b1), (nu, b2)))
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def _with_router_scale(scale: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """`scale` by the learning rate, of which the router has a multiple. The state is that of `scale`."""

    def update(updates: dict, state: optax.OptState, params: dict) -> tuple[dict, optax.OptState]:
        updates, state = scale.update(updates, state, params)
        of_router = {name: jax.tree.map(lambda x: x * factor, updates[name]) for name in updates if name == "router"}
        return {**updates, **of_router}, state

    return optax.GradientTransformation(scale.init, update)


def _with_group_decay(
    scale: optax.GradientTransformation, decay: optax.Schedule, group_L: np.ndarray
) -> optax.GradientTransformation:
    """`scale` by the learning rate, and before it a pull of the pool's layers to the mean of their group: as if all
    weights of a layer were drawn around it.

    By the learning rate, as weight decay is, so that it fades with that besides its own fall. The state is that of
    `scale`, which counts the updates: a run may go on with another pull, or none.
    """
    num_groups, size_L = int(group_L.max()) + 1, np.bincount(group_L)[group_L]

    def away(w_LX: jax.Array) -> jax.Array:
        """From the mean."""
        sums_GX = jax.ops.segment_sum(w_LX, group_L, num_groups)
        return w_LX - sums_GX[group_L] / size_L.reshape(-1, *(1 for _ in w_LX.shape[1:]))

    def update(updates: dict, state: optax.OptState, params: dict) -> tuple[dict, optax.OptState]:
        decay_now = decay(state.count)
        pulled = jax.tree.map(lambda update, w_LX: update + decay_now * away(w_LX), updates["pool"], params["pool"])
        return scale.update({**updates, "pool": pulled}, state, params)

    return optax.GradientTransformation(scale.init, update)


def _decayed(params: dict) -> dict:
    return jax.tree.map_with_path(lambda path, _: is_matrix(path), params)
