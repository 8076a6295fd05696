"""The training loss: cross-entropy and the router's auxiliary terms, all fp32."""

import jax
import jax.numpy as jnp
import optax

from radialnet.config import RouterConfig
from radialnet.metrics import RoutingSums
from radialnet.router import Schedule


def cross_entropy(logits_BSV: jax.Array, target_BS: jax.Array, is_target_BS: jax.Array) -> jax.Array:
    """Sum over the real targets of -log p(target), in nats."""
    nats_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, target_BS)
    return jnp.where(is_target_BS, nats_BS, 0).sum()


def load_loss(sums: RoutingSums) -> jax.Array:
    """Load-balancing loss of the Switch Transformer (arXiv 2101.03961, eq. 4): L · Σ_l f_l · P_l; 1 = uniform.

    f and P are pooled over all steps and the whole batch, over the tokens that execute: balance at every single step
    would forbid layers to specialise by depth, and the exit is no layer. Only P carries a gradient.
    """
    num_executions = jnp.maximum(sums.executions_TL.sum(), 1)
    return len(sums.p_layer_L) * (sums.load_L() * sums.p_layer_L / num_executions).sum()


def depth_loss(sums: RoutingSums, kind: str, target: jax.Array) -> jax.Array:
    """`price`: the mean expected depth; `target`: its squared distance from the target.

    The expected depth of a token is the sum of its survival probabilities over the steps that it came to. What it would
    have done after its hard exit is not known, for nothing is computed for it there: that part is left out.
    """
    expected = sums.expected_depth / jnp.maximum(sums.num_tokens, 1)
    return expected if kind == "price" else (expected - target) ** 2


def router_z_loss(sums: RoutingSums) -> jax.Array:
    """Router z-loss (arXiv 2202.08906, eq. 5): mean of logsumexp² of the layer logits, priors left out, and e²."""
    return sums.z / jnp.maximum(sums.num_decisions, 1)


def total_loss(cfg: RouterConfig, mean_nats: jax.Array, sums: RoutingSums, at: Schedule) -> dict[str, jax.Array]:
    """`loss`, which is minimised, and its raw terms by the names they are logged under."""
    load, z = load_loss(sums), router_z_loss(sums)
    depth = depth_loss(sums, cfg.depth_loss, at.depth_target)
    loss = mean_nats
    if cfg.is_trained:
        loss += cfg.load_coef * load + cfg.depth_coef * depth + cfg.z_coef * z
    return {"loss": loss, "ce": mean_nats, "loss_load": load, "loss_depth": depth, "loss_router_z": z}
