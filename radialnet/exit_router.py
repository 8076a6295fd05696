"""The router of given routes: which layer a token gets is settled, when it leaves is learned.

`early_exit`  the layers in turn: a transformer of trained early exits.
`hash_exit`   the layer of step t's group (`model.num_groups`) that a hash says: of the token itself, or by turns
              of it and those before it (`router.hash_span`).
"""

import jax
import jax.numpy as jnp

from radialnet.controllers import Controllers, Schedule
from radialnet.router import Decision, Route, Router, StepInputs, draw, hashed_layer, keys_at_step


class ExitRouter(Router):
    """An exit logit, and no logits of layers: so a token is looked at only where it may leave.

    Where several rows are generated, each of them at a step of its own, it is looked at at every step all the same.
    """

    def __call__(self, h_BSD: jax.Array, step: StepInputs, controllers: Controllers, at: Schedule) -> Route:
        """`Router.__call__`."""
        depth_step, decided, shape = step.depth_step, step.decided, step.active_BS.shape
        trained_step = jnp.minimum(depth_step, self.max_depth - 1)
        exit_logit_BS = jnp.zeros(shape)
        if self.min_depth < self.max_depth:
            given = h_BSD, step.token_BS, trained_step
            exit_logit_BS = jax.lax.cond(depth_step >= self.min_depth, self._look, lambda *_: exit_logit_BS, *given)
        leave_BS = exit_logit_BS + controllers.exit_bias
        can_exit = self._can_exit(depth_step, at)
        if decided is None:
            noise_BS = 0.0
            if self.cfg.noise > 0:
                noise_BS = at.noise * draw(jax.random.logistic, keys_at_step(step.rng_B, depth_step), shape)
            if self.cfg.form == "hash_exit":
                guide_BS = self._guide(step, trained_step)
                layer_BS = hashed_layer(guide_BS, trained_step, self.num_layers, self.num_layer_groups)
            else:
                layer_BS = jnp.full(shape, depth_step % self.num_layers, jnp.int32)
            decided = Decision(layer_BS, self._may_exit(step, at) & (leave_BS + noise_BS > 0))
        return Route.of(
            decided,
            step.active_BS,
            self.num_layers,
            log_survive_BS=jnp.where(can_exit, jax.nn.log_sigmoid(-leave_BS), 0),
            exit_logit_BS=exit_logit_BS,
            z_exit_BS=jnp.zeros(shape) if self.cfg.predicts_benefit else exit_logit_BS,
            leave_logit_BS=leave_BS,
            can_exit=can_exit,
        )

    def _look(self, h_BSD: jax.Array, token_BS: jax.Array, trained_step: jax.Array) -> jax.Array:
        """The exit logit, [B, S]."""
        if not self.cfg.predicts_benefit:
            return self._logits(self._inputs(h_BSD, trained_step))[..., 0]
        # It learns to predict, and changes nothing of what it predicts from.
        h_BSD = jax.lax.stop_gradient(h_BSD)
        x_BSD = self._inputs(h_BSD, trained_step) if self.cfg.looks_at_states else None
        return self._benefit(x_BSD, token_BS, trained_step)
