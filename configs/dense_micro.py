"""The dense baseline of radial_micro: 4 layers, which every token goes through.

What: as many executed layers per token, as wide, on the same data for as many steps; the same code.
Cost: 0.62 MFLOP per token forward; 6.1 million tokens, 6 minutes on one CPU core (17,000 tokens/s). 0.3M parameters.
Expected: 1.299 nats per byte held out.
Command: python train.py --config=configs/dense_micro.py --workdir=runs/dense_micro
"""

from ml_collections import ConfigDict

from configs import radial_micro


def get_config() -> ConfigDict:
    config = radial_micro.get_config()

    config.router.form = "sequential"
    config.model.pool_size = 4

    return config
