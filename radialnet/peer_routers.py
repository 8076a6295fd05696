"""Routers of other models with a dynamic depth, over the same pool and cache: the baselines of a radial network, and
the form in which a pretrained model becomes one.

`skip`       the layers in their order, of which each token skips those that it can do without.
`mod`        Mixture-of-Depths (arXiv 2404.02258): at every `capacity_every`-th step the tokens of a row compete, and
             only the `capacity` share with the highest scores executes the layer; the others sit it out.
`recursion`  Mixture-of-Recursions, token choice (arXiv 2507.10524): before the first step each token is told how often
             it goes through the layers of the pool, in their order.

Of all forms `make_router` knows the router.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from radialnet.controllers import Controllers, Schedule
from radialnet.exit_router import ExitRouter
from radialnet.router import Decision, Plan, Route, Router, StepInputs, draw, keys_at_step
from radialnet.sections import ModelConfig, RouterConfig
from radialnet.sharding import ALONE, Parallel

# The score of a token that can't be chosen.
_NEVER = -1e9


def make_router(
    model_cfg: ModelConfig, cfg: RouterConfig, vocab_size: int, rngs: nnx.Rngs, parallel: Parallel = ALONE
) -> Router:
    """The router of a form."""
    forms = {"skip": SkipRouter, "mod": CapacityRouter, "recursion": RecursionRouter}
    if cfg.form in forms:
        return forms[cfg.form](model_cfg, cfg, rngs, parallel)
    if cfg.gives_layers:
        return ExitRouter(model_cfg, cfg, rngs, parallel, 0 if cfg.predicts_benefit else 1, vocab_size)
    return Router(model_cfg, cfg, rngs, parallel, vocab_size=vocab_size)


class SkipRouter(Router):
    """One score per token and step: above 0, with the exit bias, it sits the step out.

    So a token jumps forward over any layers, and leaves early when it sits out all that is left. As step t has layer t,
    a token that jumped sees the keys of layer t of all before it that executed it: they wrote them at this very step.
    A score e predicts what skipping costs, exp(-e) (`losses.skip_losses`), so that the exit bias, by which its
    controller holds the mean depth, is the log of what a layer may cost. The first `model.min_depth` layers are never
    skipped, and by the first token of a document none: much attention has nowhere else to go than to its keys, and what
    it costs others to miss them no score of its own tells.
    Nothing is learned through the choice: `router.estimator` has no meaning here.
    """

    def __init__(self, model_cfg: ModelConfig, cfg: RouterConfig, rngs: nnx.Rngs, parallel: Parallel):
        super().__init__(model_cfg, cfg, rngs, parallel, num_outputs=1)

    def __call__(self, h_BSD: jax.Array, step: StepInputs, controllers: Controllers, at: Schedule) -> Route:
        """`Router.__call__`; nobody exits."""
        depth_step, decided = step.depth_step, step.decided
        # It learns to predict, and changes nothing of what it predicts from.
        x_BSD = self._inputs(jax.lax.stop_gradient(h_BSD), jnp.minimum(depth_step, self.max_depth - 1))
        score_BS = self._logits(x_BSD)[..., 0]
        skip_BS = score_BS + controllers.exit_bias
        may_skip = self._can_exit(depth_step, at) & ~step.begins_BS
        if decided is None:
            noise_BS = 0.0
            if self.cfg.noise > 0:
                noise_BS = at.noise * draw(jax.random.logistic, keys_at_step(step.rng_B, depth_step), skip_BS.shape)
            layer_BS = jnp.full(skip_BS.shape, depth_step % self.num_layers, jnp.int32)
            idles_BS = may_skip & (skip_BS + noise_BS > 0)
            decided = Decision(layer_BS, jnp.zeros(skip_BS.shape, bool), idles_BS=idles_BS)
        return Route.of(
            decided,
            step.active_BS,
            self.num_layers,
            exit_logit_BS=score_BS,
            leave_logit_BS=skip_BS,
            can_exit=may_skip,
        )


class CapacityRouter(Router):
    """One score per token, and a predictor of whether it is among the highest of its row.

    The choice looks at the whole row, which a model that writes token by token can't: so a second head learns to
    predict it from the token alone, and decides in evaluation (section 3.5 of the paper).
    """

    def __init__(self, model_cfg: ModelConfig, cfg: RouterConfig, rngs: nnx.Rngs, parallel: Parallel):
        super().__init__(model_cfg, cfg, rngs, parallel, num_outputs=1)
        self.predictor_hidden, self.predictor_out = self._new_network(model_cfg, 1, 0.1, rngs)
        self.predictor_bias = nnx.Param(jnp.zeros(1), axes=(None,))

    def __call__(self, h_BSD: jax.Array, step: StepInputs, controllers: Controllers, at: Schedule) -> Route:
        """`Router.__call__`; nobody exits."""
        active_BS, depth_step, decided = step.active_BS, step.depth_step, step.decided
        x_BSD = self._inputs(h_BSD, jnp.minimum(depth_step, self.max_depth - 1))
        score_BS = self._logits(x_BSD)[..., 0]
        # It learns to predict, and changes nothing of what it predicts from.
        predicted_BS1 = self._network(jax.lax.stop_gradient(x_BSD), self.predictor_hidden, self.predictor_out)
        predicted_BS = (predicted_BS1 + self.predictor_bias[...])[..., 0]
        every = self.cfg.capacity_every
        is_routed = depth_step % every == every - 1
        if decided is None:
            is_highest_BS = _highest(score_BS, active_BS, self.cfg.capacity)
            chosen_BS = jnp.where(at.is_causal, predicted_BS > 0, is_highest_BS)
            layer_BS = jnp.full(active_BS.shape, depth_step % self.num_layers, jnp.int32)
            decided = Decision(layer_BS, jnp.zeros(active_BS.shape, bool), idles_BS=is_routed & ~chosen_BS)
        else:
            # A backward pass is one of training, in which those that don't idle are the highest.
            is_highest_BS = ~decided.idles_BS
        sign_BS = jnp.where(is_highest_BS, 1, -1)
        return Route.of(
            decided,
            active_BS,
            self.num_layers,
            log_p_layer_BS=jnp.where(is_routed, jax.nn.log_sigmoid(score_BS), 0),
            exit_logit_BS=jnp.where(is_routed, score_BS, 0),
            z_exit_BS=jnp.where(is_routed, score_BS, 0),
            predictor_nats_BS=jnp.where(is_routed & active_BS, -jax.nn.log_sigmoid(sign_BS * predicted_BS), 0),
        )


def _highest(score_BS: jax.Array, active_BS: jax.Array, share: float) -> jax.Array:
    """The active tokens with the highest scores of their row, a share of the active ones, rounded up; more at a tie."""
    score_BS = jnp.where(active_BS, score_BS, _NEVER)
    num_B = jnp.ceil(share * active_BS.sum(1)).astype(jnp.int32)
    falling_BS = -jnp.sort(-score_BS, axis=1)
    last_B1 = jnp.take_along_axis(falling_BS, jnp.maximum(num_B - 1, 0)[:, None], axis=1)
    return active_BS & (score_BS >= last_B1)


class RecursionRouter(Router):
    """A score for each number of rounds through the pool, 1 … T/L.

    The exit bias counts against every round after the first, so that its controller holds the mean depth.
    """

    def __init__(self, model_cfg: ModelConfig, cfg: RouterConfig, rngs: nnx.Rngs, parallel: Parallel):
        self.num_rounds = model_cfg.max_depth // model_cfg.pool_size
        self.first = model_cfg.fewest_rounds - 1  # The shortest choice that there is.
        super().__init__(model_cfg, cfg, rngs, parallel, num_outputs=self.num_rounds)

    def no_plan(self, shape: tuple[int, ...]) -> Plan:
        return Plan(leaves_at_BS=jnp.zeros(shape, jnp.int32))

    def __call__(self, h_BSD: jax.Array, step: StepInputs, controllers: Controllers, at: Schedule) -> Route:
        """`Router.__call__`; all is chosen at depth step 0."""
        active_BS, depth_step, decided = step.active_BS, step.depth_step, step.decided
        is_first, num_layers, num_rounds, first = depth_step == 0, self.num_layers, self.num_rounds, self.first
        logits_BSR = self._logits(self._inputs(h_BSD, jnp.int32(0)))
        # Counted from the first that may be chosen, whose score no bias then drowns.
        more_R = jnp.arange(num_rounds) - first
        biased_BSR = jnp.where(more_R >= 0, logits_BSR - controllers.exit_bias * more_R, _NEVER)
        if decided is None:
            all_rounds_BS = jnp.full(active_BS.shape, num_rounds - 1)
            round_BS = jnp.where(at.may_exit, jnp.argmax(biased_BSR, axis=-1), all_rounds_BS)
            chosen_BS = (num_layers * (1 + round_BS)).astype(jnp.int32)
            leaves_at_BS = jnp.where(is_first, chosen_BS, step.plan.leaves_at_BS)
            layer_BS = jnp.full(active_BS.shape, depth_step % num_layers, jnp.int32)
            decided = Decision(layer_BS, active_BS & (leaves_at_BS <= depth_step), leaves_at_BS=leaves_at_BS)
        round_BS = decided.leaves_at_BS // num_layers - 1
        log_p_BSR = jax.nn.log_softmax(biased_BSR, axis=-1)
        log_p_BS = jnp.take_along_axis(log_p_BSR, round_BS[..., None], axis=-1)[..., 0]
        # How much shorter is liked better than longer, the e of this form: the controller takes its spread, and the
        # z-loss holds it where the controller can follow, or it grows against the exit bias without end (docs/LOG.md).
        shorter_BS = logits_BSR[..., first] - logits_BSR[..., -1]
        return Route.of(
            decided,
            active_BS,
            num_layers,
            log_survive_BS=jnp.where(is_first, log_p_BS, 0),
            layer_lse_BS=jnp.where(is_first, jax.nn.logsumexp(logits_BSR, axis=-1), 0),
            z_exit_BS=jnp.where(is_first, shorter_BS, 0),
            leave_logit_BS=shorter_BS + controllers.exit_bias * (num_rounds - 1 - first),
            can_exit=is_first & at.may_exit & (self.min_depth < self.max_depth),
            plan=Plan(leaves_at_BS=decided.leaves_at_BS),
        )
