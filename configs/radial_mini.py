"""A radial network at two layers per token in the setting of `dense_mini`: words, and 4 % ahead of it.

What: a pool of 48 layers of width 128 in two groups, one for each step and the last one for two. Which layer of the
group a token gets is given by its hash, and the layers of a group are pulled to their mean; when to leave is learned,
after 1 to 3 steps, and a controller holds the mean at 2.
Cost: 1.26 MFLOP per token forward; 14 million tokens, 21 minutes on one CPU core. 10.5M parameters, 0.7M of them used
by a token.
Expected: 2.583 nats per token held out at mean depth 2.00 (dense_mini: 2.682), with Python 3.11.7. Neither of the two
learns to copy what it has read, which is worth more than the pool is (docs/LOG.md).
Command: python train.py --config=configs/radial_mini.py --workdir=runs/radial_mini
"""

from ml_collections import ConfigDict

from configs import dense_mini


def get_config() -> ConfigDict:
    config = dense_mini.get_config()

    config.model.pool_size = 48
    config.model.max_depth = 3
    config.model.min_depth = 1
    config.model.num_groups = 2

    # As in radial_micro: which layer is given, when to leave is learned.
    config.router.form = "hash_exit"
    config.router.exit_training = "benefit"
    # read_coef is the default's: that of radial_micro was not tried alone.
    # The head is a fifth of a token's FLOPs here.
    config.router.read_every = 4
    config.router.explore = 0.05
    config.router.exit_warmup_steps = 80
    config.router.depth_ramp_steps = 200

    config.cache.view = "same_step"

    # 0.3 is as good, 5 too much (docs/LOG.md).
    config.optimizer.group_decay = 1.0

    return config
