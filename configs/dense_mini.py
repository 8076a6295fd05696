"""The dense baseline of words: a BPE of 512 tokens, twice as wide as `dense_micro`, 20 tokens per active parameter.

What: a plain transformer of 2 layers of width 128, which every token goes through; the baseline of `radial_mini`.
Cost: 1.1 MFLOP per token forward; 11 million tokens, the standard library twice over: 13 minutes on one CPU core
(14,000 tokens/s). 0.6M parameters.
Expected: 2.079 nats per token held out, with Python 3.11.7; 2.290 and 2.280 with seeds 1 and 2, which don't learn to
copy what they have read, as this one does (docs/LOG.md).
Command: python train.py --config=configs/dense_mini.py --workdir=runs/dense_mini
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()

    config.model.pool_size = 2
    config.model.max_depth = 2
    config.model.min_depth = 2

    config.router.form = "sequential"
    # Of forms that have a router: a quarter of the width.
    config.router.hidden = 32
    config.router.depth_target = 2.0

    config.data.vocab_size = 512

    # Chosen for four layers that read Python 3.12's text six times over and learn it by heart: 13 % off their loss
    # together (docs/LOG.md). For two layers a decay of 0.5 or 2 is 1 % worse; other rates were not tried.
    config.optimizer.learning_rate = 6e-3
    config.optimizer.weight_decay = 1.0

    config.train.num_steps = 680
    config.train.batch_size = 64
    config.train.seq_len = 256
    config.eval.every_steps = 340
    config.eval.num_batches = 20
    config.log.every_steps = 50
    # Generating is another program to compile.
    config.log.sample_prompt = ""

    return config
