"""A radial network at two layers per token in the setting of `dense_mini`: words, twice read.

What: a pool of 48 layers of width 128. Which of them a token gets at a step is given by its hash; they are pulled to
their mean, at first so hard that they are one layer, and later hardly. When to leave is learned, after 1 to 3 steps,
and a controller holds the mean at 2.
Cost: 1.13 MFLOP per token forward; 11 million tokens, 20 minutes on one CPU core. 10.4M parameters, 0.6M of them used
by a token.
Expected: 2.084 nats per token held out at mean depth 2.02, with Python 3.11.7. `dense_mini` has 2.079 with this seed
and 2.290 and 2.280 with two others, for whether it learns to copy what it has read is chance (docs/LOG.md).
Command: python train.py --config=configs/radial_mini.py --workdir=runs/radial_mini
"""

from ml_collections import ConfigDict

from configs import dense_mini


def get_config() -> ConfigDict:
    config = dense_mini.get_config()

    config.model.pool_size = 48
    config.model.max_depth = 3
    config.model.min_depth = 1
    # All layers serve all steps: at two layers that is better than a group for each, at four worse (docs/LOG.md).
    config.model.num_groups = 1

    # As in radial_micro: which layer is given, when to leave is learned.
    config.router.form = "hash_exit"
    config.router.exit_training = "benefit"
    # A read_coef of a fifth of the default was as good (docs/LOG.md). The head is an eighth of a token's FLOPs here.
    config.router.read_every = 4
    config.router.explore = 0.05
    config.router.exit_warmup_steps = 80
    config.router.depth_ramp_steps = 200

    config.cache.view = "same_step"

    # One layer at first, in which what all tokens need is found, and then more and more of 48; for 0.6 of the run.
    config.optimizer.group_decay = 0.3
    config.optimizer.group_decay_init = 100.0
    config.optimizer.group_decay_steps = 408

    return config
