"""A radial network that a laptop trains in minutes.

What: 10 layers in the pool, 3 to 5 of them per token and 4 on average: after three steps tokens leave when the router
says so, and a controller holds the mean. On the source of Python's standard library.
Cost: 3.0 MFLOP per token forward at depth 4; 3 minutes on 2 CPU cores (7,500 tokens/s). 3.2M parameters.
Expected: 1.75 bits per byte held out, mean depth within 5 % of 4, no layer below a third of its share of the load.
Command: python train.py --config=configs/radial_nano.py --workdir=runs/radial_nano
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()

    config.model.pool_size = 10
    config.model.max_depth = 5
    config.model.min_depth = 3

    config.router.depth_target = 4.0
    config.router.load_coef = 0.1
    # Holds the exit logits near 0. At 1e-3 they drift by 10 when exits begin, and the depth with them (docs/LOG.md).
    config.router.z_coef = 0.02
    config.router.exit_warmup_steps = 100
    config.router.depth_ramp_steps = 200
    config.router.exit_bias_init = -2.0
    config.router.exit_bias_rate = 0.2

    config.train.num_steps = 600
    config.eval.every_steps = 150

    return config
