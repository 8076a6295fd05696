"""A run of seconds that goes through everything once: routing, exits, evaluation, checkpoint, plots, a sample.

What: a pool of 6 tiny layers, at most 3 of them per token, for 20 steps.
Cost: half a minute on 2 CPU cores, most of it compilation; a few seconds more the first time, to pack the text.
Expected: nothing worth a figure; the loss falls.
Command: python train.py --config=configs/smoke.py --workdir=runs/smoke
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()

    config.model.pool_size = 6
    config.model.max_depth = 3
    config.model.min_depth = 1
    config.model.d_model = 32
    config.model.d_ff = 48
    config.model.num_kv_heads = 2

    config.router.depth_target = 2.0
    config.router.exit_warmup_steps = 5
    config.router.depth_ramp_steps = 5

    config.data.vocab_size = 512
    config.train.num_steps = 20
    config.train.batch_size = 4
    config.train.seq_len = 64
    config.eval.num_batches = 4
    config.log.every_steps = 5
    config.log.sample_tokens = 16

    return config
