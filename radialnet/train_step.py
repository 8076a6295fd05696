"""TrainState, train_step and eval_step: pure functions, no I/O."""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from radialnet.config import Config
from radialnet.controllers import Controllers, Schedule, schedule, update_exit_bias, update_load_bias
from radialnet.losses import cross_entropy, divergence, read_losses, skip_losses, total_loss
from radialnet.metrics import BatchSums
from radialnet.model import Output
from radialnet.optimizer import clip, learning_rate, without_frozen
from radialnet.sharding import ONE_DEVICE, Parallel, Placement

Batch = dict[str, jax.Array]

# Updates that a spike is told by.
SPIKE_WINDOW = 128


@flax.struct.dataclass
class TrainState:
    step: jax.Array  # Optimizer steps done, the skipped ones included.
    params: dict
    optimizer: optax.OptState
    controllers: Controllers
    num_skipped: jax.Array  # Steps whose update was not finite, or a spike, and left the state as it was.
    num_skipped_in_a_row: jax.Array  # Of those that were not finite.
    recent_2W: jax.Array  # Loss and gradient norm of the last steps, the oldest first; NaN before there were any.


def init_state(config: Config, params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=params,
        optimizer=optimizer.init(params),
        controllers=Controllers.init(config.router, config.model.pool_size),
        num_skipped=jnp.int32(0),
        num_skipped_in_a_row=jnp.int32(0),
        recent_2W=jnp.full((2, SPIKE_WINDOW), jnp.nan, jnp.float32),
    )


def trees_of(state: TrainState) -> dict:
    """The state as the named trees of a checkpoint: evaluation restores the first two alone."""
    return {
        "params": state.params,
        "controllers": state.controllers,
        "optimizer": state.optimizer,
        "counts": {"step": state.step, "skipped": state.num_skipped, "skipped_in_a_row": state.num_skipped_in_a_row},
        "recent": state.recent_2W,
    }


def state_shardings(placement: Placement, optimizer: optax.GradientTransformation, state: TrainState) -> TrainState:
    """Where each array of a state lies: what the optimizer knows of a parameter with it, the rest on all devices."""
    everywhere = jax.tree.map(lambda _: placement.everywhere, state)
    if placement.parallel.num_devices == 1:
        return everywhere
    params = placement.shardings()
    moments = optax.tree.map_params(
        optimizer,
        # Nothing is known of what is frozen.
        lambda known, sharding: known if isinstance(known, optax.MaskedNode) else sharding,
        state.optimizer,
        params,
        transform_non_params=lambda _: placement.everywhere,
        is_leaf=lambda known: isinstance(known, optax.MaskedNode),
    )
    return everywhere.replace(params=params, optimizer=moments)


def forward(
    graph: nnx.GraphDef,
    params: dict,
    batch: Batch,
    controllers: Controllers,
    at: Schedule,
    rng: jax.Array,
    max_depth: int | None = None,
) -> Output:
    """The model's output for a batch of packed rows."""
    model = nnx.merge(graph, params)
    return model(batch["token"], batch["document"], batch["position"], controllers, at, rng, max_depth)


def forward_as_evaluated(
    config: Config,
    graph: nnx.GraphDef,
    params: dict,
    batch: Batch,
    controllers: Controllers,
    step: jax.Array,
    max_depth: int | None = None,
) -> Output:
    """`forward` as `eval_step` routes."""
    at = schedule(config.router, config.model.max_depth, step).for_evaluation()
    return forward(graph, params, batch, controllers, at, jax.random.key(0), max_depth)


@flax.struct.dataclass
class Teacher:
    """A model whose predictions are learned, routed as in its evaluation. Each device has all of it."""

    params: dict
    controllers: Controllers
    step: jax.Array
    config: Config = flax.struct.field(pytree_node=False)
    graph: nnx.GraphDef = flax.struct.field(pytree_node=False)

    def final(self, batch: Batch) -> jax.Array:
        """What its head gets of each token, [B, S, D]."""
        given = self.params, batch, self.controllers, self.step
        return forward_as_evaluated(self.config, self.graph, *given).final_BSD


@jax.named_scope("loss")
def _sums(
    config: Config,
    batch: Batch,
    output: Output,
    head_DV: jax.Array,
    at: Schedule,
    bytes_V: jax.Array,
    num_targets: jax.Array,
    parallel: Parallel,
    teacher: Teacher | None = None,
    learns_states: bool = True,
) -> tuple[jax.Array, BatchSums]:
    """The loss of a batch, with the cross-entropy as a mean over `num_targets`, and its sums.

    With a teacher, a part of the loss, or all of it, is the divergence from what that predicts.

    `learns_states`: whether a gradient goes into what the head gets.

    On several devices all are those of the whole batch, `batch` and `output` those of this device's rows. Where devices
    have copies of tokens, each of them takes its part of those to the head.
    """
    final_ND = parallel.my_tokens(output.final_BSD.reshape(-1, output.final_BSD.shape[-1]))
    target_N, is_target_N = (parallel.my_tokens(batch[name].ravel()) for name in ("target", "is_target"))
    weight = config.train.distill_weight if teacher else 0.0
    # What is only looked at takes no gradient of the head.
    if not learns_states:
        final_ND, head_DV = jax.lax.stop_gradient((final_ND, head_DV))
    learned = jax.lax.stop_gradient if weight == 1 else lambda x: x
    nats, nats_N = cross_entropy(learned(final_ND), learned(head_DV), target_N, is_target_N)
    num_bytes = jnp.where(batch["is_target"], bytes_V[batch["target"]], 0).sum().astype(jnp.float32)
    num_bytes, routing = parallel.sum_rows((num_bytes, output.routing))
    more = {}
    if output.read is not None:
        nats_BS = parallel.all_tokens(nats_N, batch["target"].size).reshape(batch["target"].shape)
        more |= read_losses(output.read, head_DV, batch["target"], batch["is_target"], nats_BS, parallel)
    taught_N = None
    if teacher:
        taught_ND = parallel.my_tokens(teacher.final(batch).reshape(-1, teacher.config.model.d_model))
        taught, taught_N = divergence(final_ND, head_DV, taught_ND, teacher.params["head"], is_target_N)
        more["loss_distill"] = parallel.sum_all(taught) / jnp.maximum(num_targets, 1)
    if config.router.form == "skip":
        more |= skip_losses(output, at, is_target_N, taught_N, bool(config.train.teacher), parallel)
    mean_nats = parallel.sum_all(nats) / jnp.maximum(num_targets, 1)
    losses = total_loss(config.router, mean_nats, routing, at, more, weight)
    weighted = {name: loss * num_targets for name, loss in losses.items()}
    return losses["loss"], BatchSums(weighted, num_targets, num_bytes, routing)


def _grads(
    params: dict,
    batch: Batch,
    controllers: Controllers,
    at: Schedule,
    bytes_V: jax.Array,
    rng: jax.Array,
    teacher: Teacher | None,
    *,
    config: Config,
    graph: nnx.GraphDef,
    placement: Placement,
) -> tuple[dict, BatchSums]:
    """The gradient of a batch and its sums, in `train.accumulate_steps` parts one after the other. On several devices:
    from the parts of parameters and batch of one of them, within `Placement.on_each_device`.

    Each part takes every num_parts-th row. The cross-entropy is the mean over all targets of the batch; the router's
    terms are means of those of the parts, for a part knows no other's routes.
    """
    num_parts, parallel = config.train.accumulate_steps, placement.parallel
    # A router that skips learns nothing of its choices by the states that they lead to.
    learns_states = config.router.form != "skip" or not params.keys() <= {*config.optimizer.frozen_parts, "router"}
    num_targets = parallel.sum_rows(batch["is_target"].sum().astype(jnp.float32)) / num_parts

    def of_part(part, rng):
        def loss_of(params):
            params = placement.whole_params(params)
            output = forward(graph, params, part, controllers, at, rng)
            given = at, bytes_V, num_targets, parallel, teacher, learns_states
            loss, sums = _sums(config, part, output, params["head"], *given)
            # What is differentiated is the sum over all devices (`sharding`).
            return loss / parallel.num_devices, sums

        return jax.grad(loss_of, has_aux=True)(params)

    if num_parts == 1:
        grads, sums = of_part(batch, rng)
        return placement.sum_of_copies(grads), sums
    parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts), rng))

    def add(totals, numbered):
        index, part = numbered
        return jax.tree.map(jnp.add, totals, of_part(part, jax.random.fold_in(rng, index))), None

    (grads, sums), _ = jax.lax.scan(add, zeros, (jnp.arange(num_parts), parts))
    return placement.sum_of_copies(jax.tree.map(lambda grad: grad / num_parts, grads)), sums


def train_step(
    state: TrainState,
    batch: Batch,
    bytes_V: jax.Array,
    teacher: Teacher | None = None,
    *,
    config: Config,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    placement: Placement = ONE_DEVICE,
) -> tuple[TrainState, BatchSums, dict[str, jax.Array]]:
    """One optimizer step.

    A step with a loss or gradient that is not finite, or far above those before it (`spike_limit`), changes nothing but
    the counts of steps. After `train.max_skipped_steps` in a row that were not finite no step does, until the run is
    ended: what it leaves is the state that they came from.

    Args:
        batch: `token`, `target`, `document`, `position`, `is_target`, each [B, S].
        bytes_V: bytes of raw text that each token stands for.
        teacher: of `config.train.teacher`.
        graph: of the model for that placement.

    Returns:
        The new state, the sums of the batch (zeros for a skipped step), and scalars by their names in metrics.jsonl.
    """
    rng = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    at = schedule(config.router, config.model.max_depth, state.step)
    grads_of = placement.on_each_device(partial(_grads, config=config, graph=graph, placement=placement), (True, False))
    grads, sums = grads_of(state.params, batch, state.controllers, at, bytes_V, rng, teacher)
    grads = without_frozen(config, grads)
    grad_norm = optax.tree.norm(grads)
    mean_loss = sums.losses["loss"] / jnp.maximum(sums.num_targets, 1)
    is_finite = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm)
    size_2 = jnp.stack([mean_loss, grad_norm])
    is_finite &= state.num_skipped_in_a_row < config.train.max_skipped_steps
    is_good = is_finite
    if config.train.spike_sigmas:
        limit_2 = spike_limit(state.recent_2W, config.train.spike_sigmas)
        is_good &= (size_2 <= limit_2).all()
        # One spike must not hide the next; and what was one is the usual thing when it stays.
        size_2 = jnp.minimum(size_2, limit_2)

    @jax.named_scope("optimizer")
    def update(params, opt_state, controllers):
        updates, opt_state = optimizer.update(clip(config, grads, grad_norm), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, _update_controllers(config, controllers, at, sums)

    # A branch, and not a choice between new and old: that would keep both in memory.
    old = state.params, state.optimizer, state.controllers
    params, opt_state, controllers = jax.lax.cond(is_good, update, lambda *same: same, *old)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        optimizer=opt_state,
        controllers=controllers,
        num_skipped=state.num_skipped + ~is_good,
        num_skipped_in_a_row=jnp.where(is_finite, 0, state.num_skipped_in_a_row + 1),
        recent_2W=jnp.where(
            is_finite, jnp.concatenate([state.recent_2W[:, 1:], size_2[:, None]], axis=1), state.recent_2W
        ),
    )
    scalars = {
        "exit_bias": controllers.exit_bias,
        "grad_norm": grad_norm,
        "router_grad_norm": optax.tree.norm(grads.get("router", {})),
        "lr": learning_rate(config)(state.step - state.num_skipped),
        "skipped_steps": new_state.num_skipped,
        "skipped_in_a_row": new_state.num_skipped_in_a_row,
        "depth_target": at.depth_target,
    }
    return new_state, jax.tree.map(lambda x: jnp.where(is_good, x, 0), sums), scalars


def jitted_train_step(
    config: Config,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    state: TrainState,
) -> jax.stages.Wrapped:
    """`train_step` on the devices of a placement: takes the old state's memory, and puts the new one where it was."""
    step = partial(train_step, config=config, graph=graph, optimizer=optimizer, placement=placement)
    if placement.parallel.num_devices == 1:
        return jax.jit(step, donate_argnums=0)
    out = state_shardings(placement, optimizer, state), placement.everywhere, placement.everywhere
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def spike_limit(recent_2W: jax.Array, sigmas: float) -> jax.Array:
    """What is no spike yet: `sigmas` standard deviations above the mean of the recent sizes, [2].

    A deviation of less than a hundredth of the mean counts as that. Infinite until half of the window is known.
    """
    mean_2 = jnp.nanmean(recent_2W, axis=1)
    std_2 = jnp.maximum(jnp.nanstd(recent_2W, axis=1), 0.01 * jnp.abs(mean_2))
    is_known = jnp.isfinite(recent_2W[0]).sum() >= recent_2W.shape[1] // 2
    return jnp.where(is_known, mean_2 + sigmas * std_2, jnp.inf)


def _update_controllers(config: Config, controllers: Controllers, at: Schedule, sums: BatchSums) -> Controllers:
    cfg, model, routing = config.router, config.model, sums.routing
    if config.holds_depth:
        # Those that explore go all the way; the target is for the others.
        depth = (routing.mean_depth() - cfg.explore * model.max_depth) / (1 - cfg.explore)
        controllers = update_exit_bias(controllers, cfg, at, depth, routing.exit_logit_std())
    if cfg.is_trained and cfg.load_bias_rate:
        controllers = update_load_bias(controllers, cfg, routing.load_L())
    return controllers


def eval_step(
    params: dict,
    controllers: Controllers,
    step: jax.Array,
    batch: Batch,
    bytes_V: jax.Array,
    teacher: Teacher | None = None,
    *,
    config: Config,
    graph: nnx.GraphDef,
    max_depth: int | None = None,
    placement: Placement = ONE_DEVICE,
) -> BatchSums:
    """The sums of a held-out batch, routed without noise, with the controllers frozen, as of training step `step`.

    `random` routes are the same in every batch, so that an evaluation gives the same figures every time.
    """
    at = schedule(config.router, config.model.max_depth, step).for_evaluation()
    parallel = placement.parallel

    def sums_of(params, batch, controllers, at, bytes_V, teacher):
        params = placement.whole_params(params)
        output = forward(graph, params, batch, controllers, at, jax.random.key(0), max_depth)
        num_targets = parallel.sum_rows(batch["is_target"].sum().astype(jnp.float32))
        return (_sums(config, batch, output, params["head"], at, bytes_V, num_targets, parallel, teacher)[1],)

    return placement.on_each_device(sums_of, (False,))(params, batch, controllers, at, bytes_V, teacher)[0]
