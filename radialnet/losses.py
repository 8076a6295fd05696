"""The training loss: cross-entropy and the router's auxiliary terms, all fp32."""

import jax
import jax.numpy as jnp

from radialnet.controllers import Schedule
from radialnet.metrics import RoutingSums
from radialnet.model import Output, Read
from radialnet.sections import RouterConfig
from radialnet.sharding import ALONE, Parallel

# Logits that are in memory at a time.
LOGITS_IN_MEMORY = 2**22
# Of -e: a cost of e^20 nats is more than any.
_LARGEST = 20.0


@jax.custom_vjp
def cross_entropy(
    final_ND: jax.Array, head_DV: jax.Array, target_N: jax.Array, is_target_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) in nats, from what the head gets: the sum over the real targets, and that of each row (0 for one
    that has none), which carries no gradient.

    In chunks of rows, so that the logits are never whole in memory. Their gradient is known as soon as they are, so the
    forward pass takes it along and the backward pass computes nothing again.
    """
    return _over_chunks(_of_targets, final_ND, head_DV, (target_N, is_target_N), with_grads=False)[0]


@jax.custom_vjp
def divergence(
    final_ND: jax.Array, head_DV: jax.Array, taught_ND: jax.Array, taught_DV: jax.Array, is_target_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """KL(teacher, model) in nats, Σ_v q_v · (log q_v - log p_v): as `cross_entropy`, the sum and that of each row.

    Args:
        taught_ND, taught_DV: what the teacher's head gets, and its head; no gradient reaches them.
    """
    return _over_chunks(_of_teacher(taught_DV), final_ND, head_DV, (taught_ND, is_target_N), with_grads=False)[0]


def _of_targets(logits_CV, target_C, is_target_C):
    """The nats of rows, and the gradient of each by its logits."""
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    at_target_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]
    is_it_CV = jnp.arange(logits_CV.shape[-1]) == target_C[:, None]
    d_logits_CV = jnp.where(is_target_C[:, None], jnp.exp(logits_CV - lse_C[:, None]) - is_it_CV, 0)
    return jnp.where(is_target_C, lse_C - at_target_C, 0), d_logits_CV


def _of_teacher(taught_DV):
    def of_rows(logits_CV, taught_CD, is_target_C):
        taught_CV = jnp.matmul(taught_CD, taught_DV.astype(taught_CD.dtype), preferred_element_type=jnp.float32)
        log_p_CV, log_q_CV = jax.nn.log_softmax(logits_CV), jax.nn.log_softmax(taught_CV)
        q_CV = jnp.exp(log_q_CV)
        nats_C = jnp.where(is_target_C, (q_CV * (log_q_CV - log_p_CV)).sum(-1), 0)
        return nats_C, jnp.where(is_target_C[:, None], jnp.exp(log_p_CV) - q_CV, 0)

    return of_rows


def _over_chunks(of_rows, final_ND, head_DV, rows, with_grads: bool):
    """The nats of all rows together and of each, and the gradients of the former by the first two arrays.

    Args:
        of_rows: (logits [C, V], parts of `rows`) -> the nats of each row [C], their gradients [C, V].
    """
    (num_rows, d_model), vocab_size = final_ND.shape, head_DV.shape[1]
    chunk = min(num_rows, max(1, LOGITS_IN_MEMORY // vocab_size))
    head = head_DV.astype(final_ND.dtype)

    def chunked(x_NX):
        padded = jnp.pad(x_NX, ((0, -num_rows % chunk), *((0, 0) for _ in x_NX.shape[1:])))
        return padded.reshape(-1, chunk, *x_NX.shape[1:])

    def step(sums, chunks):
        nats, d_head = sums
        final_CD, *rest = chunks
        with jax.named_scope("head"):
            logits_CV = jnp.matmul(final_CD, head, preferred_element_type=jnp.float32)
        nats_C, d_logits_CV = of_rows(logits_CV, *rest)
        nats += nats_C.sum()
        if not with_grads:
            return (nats, d_head), (nats_C, None)
        d_logits_CV = d_logits_CV.astype(final_CD.dtype)
        with jax.named_scope("head"):
            d_head += jnp.matmul(final_CD.T, d_logits_CV, preferred_element_type=jnp.float32)
            return (nats, d_head), (nats_C, d_logits_CV @ head.T)

    zeros = jnp.float32(0), jnp.zeros((d_model, vocab_size) if with_grads else ())
    (nats, d_head), (nats_N, d_final) = jax.lax.scan(step, zeros, jax.tree.map(chunked, (final_ND, *rows)))
    nats = nats, nats_N.ravel()[:num_rows]
    return nats, (d_final.reshape(-1, d_model)[:num_rows], d_head) if with_grads else None


def _cross_entropy_forward(final_ND, head_DV, target_N, is_target_N):
    return _over_chunks(_of_targets, final_ND, head_DV, (target_N, is_target_N), with_grads=True)


def _cross_entropy_backward(grads, d_outputs):
    return *_times(grads, d_outputs[0]), None, None


def _divergence_forward(final_ND, head_DV, taught_ND, taught_DV, is_target_N):
    return _over_chunks(_of_teacher(taught_DV), final_ND, head_DV, (taught_ND, is_target_N), with_grads=True)


def _divergence_backward(grads, d_outputs):
    return *_times(grads, d_outputs[0]), None, None, None


def _times(grads, d_nats):
    d_final_ND, d_head_DV = grads
    return (d_final_ND * d_nats).astype(d_final_ND.dtype), d_head_DV * d_nats


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
divergence.defvjp(_divergence_forward, _divergence_backward)


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
    """Router z-loss (arXiv 2202.08906, eq. 5): mean of logsumexp² of the layer logits, priors left out, and e², over
    the decisions of all steps, those that look at nothing too: of `recursion` all but the first, so that it is weaker
    there the deeper tokens go."""
    return sums.z / jnp.maximum(sums.num_decisions, 1)


def read_losses(
    read: Read,
    head_DV: jax.Array,
    target_BS: jax.Array,
    is_target_BS: jax.Array,
    nats_BS: jax.Array,
    parallel: Parallel = ALONE,
) -> dict[str, jax.Array]:
    """The terms that train exits by what going on is worth.

    Args:
        target_BS, is_target_BS, nats_BS: of all tokens, those that are not read too; 0 nats of one without a target.

    Returns:
        `loss_read`: mean cross-entropy at the states that were read, without which an exit there would mean nothing;
        `loss_benefit`: mean squared error of -e as a prediction of what each further layer took off the cross-entropy;
        off that of a token without a target, nothing.
    """
    is_read_N, exit_logit_N = (parallel.my_tokens(x_BM.ravel()) for x_BM in (read.is_read_BM, read.exit_logit_BM))
    num_left_N = parallel.my_tokens(read.num_left_BM.ravel(), filling=1)
    final_ND = parallel.my_tokens(read.final_BMD.reshape(-1, read.final_BMD.shape[-1]))
    target_N, is_target_N, nats_N = (
        parallel.my_tokens(x_BS[:, read.column_M].ravel()) for x_BS in (target_BS, is_target_BS, nats_BS)
    )
    of_target_N = is_target_N & is_read_N
    read_nats, read_nats_N = cross_entropy(final_ND, head_DV, target_N, of_target_N)
    error_N = jax.lax.stop_gradient((read_nats_N - nats_N) / num_left_N) + exit_logit_N
    squares = jnp.where(is_read_N, error_N**2, 0).sum()
    sums = is_read_N.sum(), of_target_N.sum(), squares, read_nats
    num_reads, num_read_targets, squares, read_nats = parallel.sum_all(sums)
    return {
        "loss_read": read_nats / jnp.maximum(num_read_targets, 1),
        "loss_benefit": squares / jnp.maximum(num_reads, 1),
    }


def skip_losses(
    output: Output,
    at: Schedule,
    is_target_N: jax.Array,
    taught_N: jax.Array | None,
    has_teacher: bool,
    parallel: Parallel = ALONE,
) -> dict[str, jax.Array]:
    """The terms that train the scores e of the form `skip`, so that exp(-e) is about what skipping a layer costs.

    Args:
        is_target_N: of this device's tokens (`Parallel.my_tokens`).
        taught_N: divergence of each token from the teacher; None where that isn't asked, as in `radialnet.evaluate`.
        has_teacher: whether the run has one.

    Returns:
        `loss_residual`: mean squared error of -e as a prediction of log(‖f(x)‖ / ‖x + f(x)‖), of each layer that a
        token executed. What adds little to a state can be spared first (arXiv 2404.04900, section 3). With a teacher it
        is only where that begins, as long as nobody may skip.
        `loss_skip`: c - d·log c, the mean over the tokens that skipped something, of their divergence d from the
        teacher and the sum c of exp(-e) over the layers that they skipped; the best prediction of d is its mean. What
        the missing keys of earlier tokens did is in d as well, and nobody pays for what their own do to later ones.
    """
    learns = ~at.may_exit if has_teacher else True
    is_known_TBS = (output.residual_ratio_TBS > 0) & learns
    error_TBS = output.exit_logit_TBS + jnp.log(jnp.where(is_known_TBS, output.residual_ratio_TBS, 1))
    squares, count = parallel.sum_rows((jnp.where(is_known_TBS, error_TBS**2, 0).sum(), is_known_TBS.sum()))
    found = {"loss_residual": squares / jnp.maximum(count, 1)}
    if taught_N is None:
        return found
    cost_BS = jnp.where(output.skips_TBS, jnp.exp(-jnp.maximum(output.exit_logit_TBS, -_LARGEST)), 0).sum(0)
    cost_N = parallel.my_tokens(cost_BS.ravel())
    skipped_N = is_target_N & (cost_N > 0)
    cost_N = jnp.where(skipped_N, cost_N, 1)
    deviance_N = jnp.where(skipped_N, cost_N - jax.lax.stop_gradient(taught_N) * jnp.log(cost_N), 0)
    deviance, count = parallel.sum_all((deviance_N.sum(), skipped_N.sum()))
    return {**found, "loss_skip": deviance / jnp.maximum(count, 1)}


def total_loss(
    cfg: RouterConfig,
    mean_nats: jax.Array,
    sums: RoutingSums,
    at: Schedule,
    more: dict[str, jax.Array],
    distill_weight: float = 0.0,
) -> dict[str, jax.Array]:
    """`loss`, which is minimised, and its raw terms by the names they are logged under.

    Args:
        mean_nats: the cross-entropy.
        more: the terms of `read_losses` and `skip_losses`, and `loss_distill`, where there are any.
        distill_weight: of `loss_distill`; the cross-entropy has the rest, of 1.
    """
    load, z = load_loss(sums), router_z_loss(sums)
    depth = depth_loss(sums, cfg.depth_loss, at.depth_target)
    loss, terms = mean_nats, {"loss_load": load, "loss_depth": depth, "loss_router_z": z}
    if cfg.form == "mod":
        # What it predicts from gets no gradient of it, so that it needs no coefficient.
        depth_steps = len(sums.executions_TL)
        share = max(depth_steps // cfg.capacity_every, 1) / depth_steps
        terms["loss_predictor"] = sums.predictor_nats / jnp.maximum(sums.num_decisions * share, 1)
        loss += terms["loss_predictor"]
    if "loss_read" in more:
        loss += cfg.read_coef * more["loss_read"] + more["loss_benefit"]
    loss += more.get("loss_residual", 0) + more.get("loss_skip", 0)
    if "loss_distill" in more:
        loss += distill_weight * (more["loss_distill"] - mean_nats)
    if cfg.is_trained:
        loss += cfg.depth_coef * depth + cfg.z_coef * z
        # Of given layers it is a constant.
        loss += 0 if cfg.gives_layers else cfg.load_coef * load
    return {"loss": loss, "ce": mean_nats, **terms, **more}
