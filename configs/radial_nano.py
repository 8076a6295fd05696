"""A radial network that a laptop trains in minutes.

What: 16 layers in the pool, 4 for each step, of which a token gets one by its hash; 3 to 5 steps per token and 4 on
average, the fifth with the layers of the fourth: after three tokens leave when the router says so, and a controller
holds the mean. Layers of a group are pulled to their mean, ever less. On the source of Python's standard library.
Cost: 2.9 MFLOP per token forward at depth 4; 3 minutes on 2 CPU cores. 4.5M parameters.
Expected: 1.64 bits per byte held out (dense_nano: 1.66), mean depth within 2 % of 4.
Command: python train.py --config=configs/radial_nano.py --workdir=runs/radial_nano
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()

    config.model.pool_size = 16
    config.model.max_depth = 5
    config.model.min_depth = 3
    config.model.num_groups = 4

    # As in radial_micro: which layer is given, when to leave is learned.
    config.router.form = "hash_exit"
    config.router.hidden = 32
    config.router.exit_training = "benefit"
    config.router.explore = 0.05
    config.router.exit_warmup_steps = 100
    config.router.depth_ramp_steps = 200

    config.cache.view = "same_step"

    config.optimizer.learning_rate = 6e-3
    # Each layer sees a quarter of the tokens, which are few. Pulled to the mean of its group it learns from them all;
    # alone it is 1 % behind the dense model (docs/LOG.md).
    config.optimizer.group_decay = 1.0
    config.optimizer.group_decay_init = 100.0
    config.optimizer.group_decay_steps = 400

    config.train.num_steps = 600
    config.eval.every_steps = 150

    return config
