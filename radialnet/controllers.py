"""What in a router follows training steps and no gradient: schedules, and controllers of its depth and load."""

import flax.struct
import jax
import jax.numpy as jnp

from radialnet.sections import RouterConfig


@flax.struct.dataclass
class Controllers:
    """Gradient-free state of the router, kept in TrainState, saved with it, frozen in evaluation."""

    exit_bias: jax.Array
    exit_logit_std: jax.Array  # Running, for the gain of the exit-bias controller.
    load_bias: jax.Array

    @classmethod
    def init(cls, cfg: RouterConfig, num_layers: int) -> "Controllers":
        return cls(
            exit_bias=jnp.float32(cfg.exit_bias_init),
            exit_logit_std=jnp.float32(1),
            load_bias=jnp.zeros(num_layers, jnp.float32),
        )

    def lean(self, exit_bias: float) -> "Controllers":
        """With that added to the exit bias: more makes tokens leave early."""
        return self.replace(exit_bias=self.exit_bias + exit_bias)


@flax.struct.dataclass
class Schedule:
    """What the router's schedule pieces are at one training step."""

    noise: jax.Array
    prior_weight: jax.Array
    may_exit: jax.Array
    depth_target: jax.Array
    explore: jax.Array  # Share of tokens that don't leave before the last step, so that what they gain is known.
    # Whether a token's route may depend on tokens before it only; training of Mixture-of-Depths looks at whole rows.
    is_causal: jax.Array

    def for_evaluation(self) -> "Schedule":
        """The same without noise and exploration, and causal."""
        return self.replace(noise=jnp.float32(0), explore=jnp.float32(0), is_causal=jnp.bool_(True))


def schedule(cfg: RouterConfig, max_depth: int, step: jax.Array) -> Schedule:
    """The schedule at training step `step`."""
    step = jnp.asarray(step, jnp.float32)
    since_warmup = step - cfg.exit_warmup_steps
    ramp = jnp.clip(since_warmup / max(cfg.depth_ramp_steps, 1), 0, 1) if cfg.depth_ramp_steps else since_warmup >= 0
    return Schedule(
        noise=cfg.noise * jnp.maximum(0, 1 - step / max(cfg.noise_steps, 1)),
        prior_weight=cfg.prior_weight * (jnp.maximum(0, 1 - step / cfg.prior_steps) if cfg.prior_steps else 1.0),
        may_exit=since_warmup >= 0,
        depth_target=max_depth + (cfg.depth_target - max_depth) * ramp,
        explore=jnp.float32(cfg.explore),
        is_causal=jnp.bool_(False),
    )


def update_exit_bias(
    controllers: Controllers, cfg: RouterConfig, at: Schedule, depth: jax.Array, exit_logit_std: jax.Array
) -> Controllers:
    """One step of the exit-bias controller: b += u · std(e) · clip(depth - d*, ±1), std running. Off in the warm-up:
    without an exit decision there is no e to take the std of.

    The gain follows std(e) because a fixed one swings between the extremes while e hardly varies over tokens.
    """
    std = 0.9 * controllers.exit_logit_std + 0.1 * exit_logit_std
    step = cfg.exit_bias_rate * std * jnp.clip(depth - at.depth_target, -1, 1)
    return controllers.replace(
        exit_bias=controllers.exit_bias + jnp.where(at.may_exit, step, 0),
        exit_logit_std=jnp.where(at.may_exit, std, controllers.exit_logit_std),
    )


def update_load_bias(controllers: Controllers, cfg: RouterConfig, load_L: jax.Array) -> Controllers:
    """One step of auxiliary-loss-free balancing (arXiv 2408.15664); `load_L` is each layer's share of executions."""
    load_bias_L = controllers.load_bias + cfg.load_bias_rate * jnp.sign(1 / load_L.shape[0] - load_L)
    # What all layers share chooses none of them, but in the flat form it would count against the exit.
    return controllers.replace(load_bias=load_bias_L - load_bias_L.mean())
