"""What is counted while tokens are routed, and the figures made of it.

Counts are sums over tokens, so that batches, steps and devices add up; figures are made from them at the end.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from radialnet.config import Config
from radialnet.router import Route

# Token ids are counted in at most this many buckets (id modulo the number) for `route_mi`, which bounds the memory of
# the counts at T · 1024 · L. Merging ids can only lower the mutual information, so the figure never claims too much.
MAX_TOKEN_BUCKETS = 1024


@flax.struct.dataclass
class StepSums:
    """Sums over the decisions of one depth step. The first four are in the loss and carry gradients."""

    p_layer_L: jax.Array  # Probability of each layer, over executions.
    expected_depth: jax.Array  # Survival probability, over the tokens that came to this step.
    z: jax.Array  # logsumexp^2 of the layer logits + e^2.
    predictor_nats: jax.Array  # `Route.predictor_nats_BS`.
    executions_KL: jax.Array  # Executions by bucket of the token id and by layer.
    num_decisions: jax.Array
    leave_logit: jax.Array  # e + b over the decisions that could be an exit: sum, sum of squares, number.
    leave_logit_squared: jax.Array
    num_exit_decisions: jax.Array

    @classmethod
    def of(cls, route: Route, active_BS: jax.Array, log_survival_BS: jax.Array, token_BS: jax.Array, vocab_size: int):
        """The sums of a step.

        Args:
            active_BS: the tokens that the router decided on.
            log_survival_BS: log of the product of (1 - p_exit) up to this step, this one included.
        """
        num_layers, num_buckets = route.p_layer_BSL.shape[-1], min(vocab_size, MAX_TOKEN_BUCKETS)
        cell_BS = token_BS % num_buckets * (num_layers + 1) + route.layer_BS
        counts = jnp.bincount(cell_BS.ravel(), length=num_buckets * (num_layers + 1))
        active_BS = active_BS.astype(jnp.float32)
        could_exit_BS = active_BS * route.can_exit
        # With the bias, which holds it near 0: the squares of a logit far off would swamp its variance in fp32.
        leave_BS = jax.lax.stop_gradient(route.leave_logit_BS)
        return cls(
            p_layer_L=(route.p_layer_BSL * route.executes_BS[..., None]).sum((0, 1)),
            expected_depth=(active_BS * jnp.exp(log_survival_BS)).sum(),
            z=(active_BS * (route.layer_lse_BS**2 + route.z_exit_BS**2)).sum(),
            predictor_nats=(active_BS * route.predictor_nats_BS).sum(),
            executions_KL=counts.reshape(num_buckets, num_layers + 1)[:, :-1].astype(jnp.float32),
            num_decisions=active_BS.sum(),
            leave_logit=(could_exit_BS * leave_BS).sum(),
            leave_logit_squared=(could_exit_BS * leave_BS**2).sum(),
            num_exit_decisions=could_exit_BS.sum(),
        )


@flax.struct.dataclass
class RoutingSums:
    """Sums over the tokens of a batch, of all depth steps."""

    num_tokens: jax.Array  # Padding excluded.
    tokens_by_depth: jax.Array  # [T+1] Tokens by executed depth.
    executions_TL: jax.Array  # Executions by depth step and layer.
    executions_TKL: jax.Array  # The same by bucket of the token id too.
    num_computed: jax.Array  # Rows that went through a layer's products, padding of segments included.
    p_layer_L: jax.Array  # The rest: `StepSums` of all steps together.
    expected_depth: jax.Array
    z: jax.Array
    predictor_nats: jax.Array
    num_decisions: jax.Array
    leave_logit: jax.Array
    leave_logit_squared: jax.Array
    num_exit_decisions: jax.Array

    @classmethod
    def of(cls, steps: StepSums, num_computed_T: jax.Array, is_real_BS: jax.Array, depth_BS: jax.Array):
        """The sums of a batch.

        Args:
            steps: of each depth step, stacked.
            num_computed_T: rows that each step computed.
            is_real_BS: False for padding.
            depth_BS: executed depth of each token.
        """
        executions_TKL = steps.executions_KL
        num_depths = len(executions_TKL) + 1
        counts = jnp.bincount(jnp.where(is_real_BS, depth_BS, num_depths).ravel(), length=num_depths + 1)
        return cls(
            num_tokens=is_real_BS.sum().astype(jnp.float32),
            tokens_by_depth=counts[:-1].astype(jnp.float32),
            executions_TL=executions_TKL.sum(1),
            executions_TKL=executions_TKL,
            num_computed=num_computed_T.sum().astype(jnp.float32),
            p_layer_L=steps.p_layer_L.sum(0),
            expected_depth=steps.expected_depth.sum(),
            z=steps.z.sum(),
            predictor_nats=steps.predictor_nats.sum(),
            num_decisions=steps.num_decisions.sum(),
            leave_logit=steps.leave_logit.sum(),
            leave_logit_squared=steps.leave_logit_squared.sum(),
            num_exit_decisions=steps.num_exit_decisions.sum(),
        )

    def mean_depth(self) -> jax.Array:
        """Mean executed layers per token."""
        return self.executions_TL.sum() / jnp.maximum(self.num_tokens, 1)

    def load_L(self) -> jax.Array:
        """Each layer's share of all executions."""
        return self.executions_TL.sum(0) / jnp.maximum(self.executions_TL.sum(), 1)

    def exit_logit_std(self) -> jax.Array:
        """Standard deviation of e over the decisions that could be an exit; 0 without any."""
        count = jnp.maximum(self.num_exit_decisions, 1)
        mean = self.leave_logit / count
        return jnp.sqrt(jnp.maximum(self.leave_logit_squared / count - mean**2, 0))


@flax.struct.dataclass
class BatchSums:
    """What a batch adds to a line of metrics."""

    losses: dict[str, jax.Array]  # `loss` and its raw terms, each times num_targets.
    num_targets: jax.Array
    num_bytes: jax.Array  # Of raw text that the targets stand for.
    routing: RoutingSums


@jax.jit
def add(left: BatchSums, right: BatchSums) -> BatchSums:
    """The sums of two batches together."""
    return jax.tree.map(jnp.add, left, right)


def route_mutual_information(executions_TKL: np.ndarray) -> float:
    """Mutual information of layer and token id, given the depth step, in nats; 0 = routing ignores the input.

    Mean over steps by their executions. Few samples of a token show dependence where there is none. What as many
    samples of routing that does ignore the token would show is taken off, so that the figure errs towards 0.
    """
    information = 0.0
    rng = np.random.default_rng(0)
    for counts_KL in np.asarray(executions_TKL).astype(np.int64):
        total = counts_KL.sum()
        if total > 0:
            ignorant_KL = rng.multinomial(counts_KL.sum(1), counts_KL.sum(0) / total)
            information += total * (_plug_in_information(counts_KL) - _plug_in_information(ignorant_KL))
    return max(0.0, float(information / max(np.sum(executions_TKL), 1)))


def _plug_in_information(counts_KL: np.ndarray) -> float:
    """Mutual information of the two indices under the observed frequencies."""
    p_KL = counts_KL / counts_KL.sum()
    independent_KL = p_KL.sum(1, keepdims=True) * p_KL.sum(0)
    seen = p_KL > 0
    return float((p_KL[seen] * np.log(p_KL[seen] / independent_KL[seen])).sum())


def figures(sums: BatchSums) -> dict:
    """The figures of a metrics line that follow from the sums: losses, bpb, depth, load and their like."""
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    routing, num_tokens = sums.routing, max(sums.routing.num_tokens, 1)
    load_L = np.asarray(routing.load_L())
    entropy = -(load_L[load_L > 0] * np.log(load_L[load_L > 0])).sum()
    # Of no target, as where every step was skipped, there is no loss.
    num_targets = sums.num_targets or np.nan
    losses = {name: float(total / num_targets) for name, total in sums.losses.items()}
    return {
        **losses,
        "bpb": float(sums.losses["ce"] / np.log(2) / (sums.num_bytes or np.nan)),
        "depth": float(routing.mean_depth()) if routing.num_tokens else np.nan,
        # Of soft exits; what a token would have done after its hard one is left out (`losses.depth_loss`).
        "expected_depth": float(routing.expected_depth / num_tokens),
        "depth_hist": (routing.tokens_by_depth / num_tokens).tolist(),
        "load": load_L.tolist(),
        "load_entropy": float(entropy / np.log(len(load_L))) if len(load_L) > 1 else 1.0,
        "executed_by_step": (routing.executions_TL.sum(1) / num_tokens).tolist(),
        "load_by_step": (routing.executions_TL / num_tokens).tolist(),
        "padding": float(1 - routing.executions_TL.sum() / max(routing.num_computed, 1)),
        "route_mi": route_mutual_information(routing.executions_TKL),
    }


def flops_per_token(config: Config, vocab_size: int, executes_T: Sequence[float]) -> float:
    """FLOPs of a forward pass per token, 2 per multiply-add of matrix products, with attention (`flops_by_part`)."""
    return float(sum(flops_by_part(config, vocab_size, executes_T).values()))


def flops_by_part(config: Config, vocab_size: int, executes_T: Sequence[float]) -> dict[str, float]:
    """`flops_per_token` of the pool's `layers`, their `attention`, the `unshared` layers of prelude and coda and
    `unshared_attention`, the `router` and the `head`.

    Attention is counted over the entries that a causal query sees on average: half of those of its row that are filled.
    In the views `all` and `same_layer` they are those of all steps so far, unless every step has a layer of its own.

    Args:
        executes_T: share of tokens that execute each depth step.
    """
    model, max_depth = config.model, len(executes_T)
    d_model, q_width = model.d_model, model.num_heads * model.head_size
    kv_width = model.num_kv_heads * model.head_size
    layer = 2 * d_model * (q_width + 2 * kv_width) + 2 * q_width * d_model
    layer += 2 * (3 if model.mlp == "swiglu" else 2) * d_model * model.d_ff
    # Of one query, over a step whose entries are all there.
    attention = 4 * q_width * (config.train.seq_len + 1) / 2
    executes_T = np.asarray(executes_T)
    if (view := config.view_over(max_depth)) == "same_step":
        seen_T = executes_T
    elif view == "first":
        seen_T = np.full(max_depth, executes_T[0])
    elif view == "latest":
        # One entry of each token that executed any step so far: at least of as many as executed one of them.
        seen_T = np.maximum.accumulate(executes_T)
    else:
        seen_T = np.cumsum(executes_T)
    num_unshared = model.prelude_layers + model.coda_layers
    return {
        "layers": float(executes_T.sum() * layer),
        "attention": float((executes_T * attention * seen_T).sum()),
        "unshared": num_unshared * layer,
        "unshared_attention": num_unshared * attention,
        "router": _router_flops(config, executes_T),
        "head": 2 * d_model * vocab_size,
    }


def _router_flops(config: Config, executes_T: np.ndarray) -> float:
    model, form = config.model, config.router.form
    if not config.router.is_trained:
        return 0.0
    hidden = config.router.hidden_size(model)
    if form == "skip":
        # Whoever skips a layer was asked first.
        return len(executes_T) * 2 * hidden * (model.d_model + 1)
    if form == "mod":
        # At the steps at which tokens compete: a score and its prediction for every token.
        return len(executes_T) // config.router.capacity_every * 2 * 2 * hidden * (model.d_model + 1)
    if form == "recursion":
        return 2 * hidden * (model.d_model + model.max_depth // model.pool_size)
    # A token that leaves before the last step was routed once more than it executed.
    num_decisions = 1 + executes_T[:-1].sum()
    return num_decisions * 2 * hidden * (model.d_model + model.pool_size + 1)


# Peak dense bf16 FLOP/s of one device, as its maker states it; the start of `device_kind` as JAX reports it.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device, None where it is unknown (every CPU)."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind)), None)
