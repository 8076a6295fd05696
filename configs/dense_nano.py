"""The dense baseline of radial_nano: a plain transformer of 4 layers, which every token goes through.

What: as many executed layers per token, as wide, on the same data for as many steps as radial_nano; the same code.
Cost: 2.9 MFLOP per token forward; 2 minutes on 2 CPU cores (11,000 tokens/s). 1.9M parameters.
Expected: 1.66 bits per byte held out.
Command: python train.py --config=configs/dense_nano.py --workdir=runs/dense_nano
"""

from ml_collections import ConfigDict

from configs import radial_nano


def get_config() -> ConfigDict:
    config = radial_nano.get_config()

    config.router.form = "sequential"
    config.model.pool_size = config.model.max_depth = config.model.min_depth = 4
    config.model.num_groups = 0
    config.optimizer.group_decay = config.optimizer.group_decay_init = 0.0
    config.optimizer.group_decay_steps = 0

    return config
