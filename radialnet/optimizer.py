"""AdamW with linear warm-up and cosine decay."""

import jax
import optax

from radialnet.config import Config


def learning_rate(config: Config) -> optax.Schedule:
    """Learning rate of the update after `count` others."""
    cfg, num_steps = config.optimizer, config.train.num_steps
    warmup = min(cfg.warmup_steps, num_steps // 10)
    final = cfg.final_fraction * cfg.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.learning_rate, warmup, max(num_steps, warmup + 1), final)
    # From 1, so that no step is spent at a learning rate of 0.
    return lambda count: schedule(count + 1)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    cfg = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(learning_rate(config), b1=0.9, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=_decayed),
    )


def _decayed(params: dict) -> dict:
    """Matrices and embeddings. By name, for the norms of a pool are stacked to look like matrices."""

    def is_decayed(path, _):
        return not path[-1].key.endswith(("norm", "bias"))

    return jax.tree.map_with_path(is_decayed, params)
