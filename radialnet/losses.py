"""The training loss: cross-entropy and the router's auxiliary terms, all fp32."""

import jax
import jax.numpy as jnp

from radialnet.metrics import RoutingSums
from radialnet.model import Read
from radialnet.router import Schedule
from radialnet.sections import RouterConfig
from radialnet.sharding import ALONE, Parallel

# Logits that are in memory at a time.
LOGITS_IN_MEMORY = 2**22


@jax.custom_vjp
def cross_entropy(
    final_ND: jax.Array, head_DV: jax.Array, target_N: jax.Array, is_target_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) in nats, from what the head gets: the sum over the real targets, and that of each row (0 for one
    that has none), which carries no gradient.

    In chunks of rows, so that the logits are never whole in memory. Their gradient is known as soon as they are, so the
    forward pass takes it along and the backward pass computes nothing again.
    """
    return _cross_entropy(final_ND, head_DV, target_N, is_target_N, with_grads=False)[0]


def _cross_entropy(final_ND, head_DV, target_N, is_target_N, with_grads: bool):
    (num_rows, d_model), vocab_size = final_ND.shape, head_DV.shape[1]
    chunk = min(num_rows, max(1, LOGITS_IN_MEMORY // vocab_size))
    head = head_DV.astype(final_ND.dtype)

    def chunked(x_NX):
        padded = jnp.pad(x_NX, ((0, -num_rows % chunk), *((0, 0) for _ in x_NX.shape[1:])))
        return padded.reshape(-1, chunk, *x_NX.shape[1:])

    def step(sums, rows):
        nats, d_head = sums
        final_CD, target_C, is_target_C = rows
        with jax.named_scope("head"):
            logits_CV = jnp.matmul(final_CD, head, preferred_element_type=jnp.float32)
        lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
        at_target_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]
        nats_C = jnp.where(is_target_C, lse_C - at_target_C, 0)
        nats += nats_C.sum()
        if not with_grads:
            return (nats, d_head), (nats_C, None)
        is_it_CV = jnp.arange(vocab_size) == target_C[:, None]
        d_logits_CV = jnp.where(is_target_C[:, None], jnp.exp(logits_CV - lse_C[:, None]) - is_it_CV, 0)
        d_logits_CV = d_logits_CV.astype(final_CD.dtype)
        with jax.named_scope("head"):
            d_head += jnp.matmul(final_CD.T, d_logits_CV, preferred_element_type=jnp.float32)
            return (nats, d_head), (nats_C, d_logits_CV @ head.T)

    zeros = jnp.float32(0), jnp.zeros((d_model, vocab_size) if with_grads else ())
    rows = chunked(final_ND), chunked(target_N), chunked(is_target_N)
    (nats, d_head), (nats_N, d_final) = jax.lax.scan(step, zeros, rows)
    nats = nats, nats_N.ravel()[:num_rows]
    return nats, (d_final.reshape(-1, d_model)[:num_rows], d_head) if with_grads else None


def _cross_entropy_forward(final_ND, head_DV, target_N, is_target_N):
    return _cross_entropy(final_ND, head_DV, target_N, is_target_N, with_grads=True)


def _cross_entropy_backward(grads, d_outputs):
    d_nats, _ = d_outputs
    d_final_ND, d_head_DV = grads
    return (d_final_ND * d_nats).astype(d_final_ND.dtype), d_head_DV * d_nats, None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


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


def read_losses(
    read: Read,
    head_DV: jax.Array,
    target_N: jax.Array,
    is_target_N: jax.Array,
    nats_N: jax.Array,
    parallel: Parallel = ALONE,
) -> dict[str, jax.Array]:
    """The terms that train exits by what going on is worth.

    Args:
        target_N, is_target_N, nats_N: of this device's tokens (`Parallel.my_tokens`).

    Returns:
        `loss_read`: mean cross-entropy at the states that were read, without which an exit there would mean nothing;
        `loss_benefit`: mean squared error of -e as a prediction of what each further layer took off the cross-entropy.
    """
    is_read_N = is_target_N & parallel.my_tokens(read.is_read_BS.ravel())
    final_ND = parallel.my_tokens(read.final_BSD.reshape(-1, read.final_BSD.shape[-1]))
    read_nats, read_nats_N = cross_entropy(final_ND, head_DV, target_N, is_read_N)
    benefit_N = (read_nats_N - nats_N) / parallel.my_tokens(read.num_left_BS.ravel(), filling=1)
    error_N = jax.lax.stop_gradient(benefit_N) + parallel.my_tokens(read.exit_logit_BS.ravel())
    squares = jnp.where(is_read_N, error_N**2, 0).sum()
    num_reads, read_nats, squares = parallel.sum_all((is_read_N.sum(), read_nats, squares))
    num_reads = jnp.maximum(num_reads, 1)
    return {"loss_read": read_nats / num_reads, "loss_benefit": squares / num_reads}


def total_loss(
    cfg: RouterConfig, mean_nats: jax.Array, sums: RoutingSums, at: Schedule, read: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """`loss`, which is minimised, and its raw terms by the names they are logged under; `read`: `read_losses`."""
    load, z = load_loss(sums), router_z_loss(sums)
    depth = depth_loss(sums, cfg.depth_loss, at.depth_target)
    loss, terms = mean_nats, {"loss_load": load, "loss_depth": depth, "loss_router_z": z}
    if cfg.form == "mod":
        # What it predicts from gets no gradient of it, so that it needs no coefficient.
        depth_steps = len(sums.executions_TL)
        share = max(depth_steps // cfg.capacity_every, 1) / depth_steps
        terms["loss_predictor"] = sums.predictor_nats / jnp.maximum(sums.num_decisions * share, 1)
        loss += terms["loss_predictor"]
    if read:
        loss += cfg.read_coef * read["loss_read"] + read["loss_benefit"]
    if cfg.is_trained:
        loss += cfg.load_coef * load + cfg.depth_coef * depth + cfg.z_coef * z
    return {"loss": loss, "ce": mean_nats, **terms, **read}
