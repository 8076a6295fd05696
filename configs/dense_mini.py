"""The dense baseline of words: a BPE of 1,024 tokens, twice as wide as `dense_micro`, 20 tokens per active parameter.

What: a plain transformer of 4 layers of width 128, which every token goes through.
Cost: 2.2 MFLOP per token forward; 22 million tokens, the standard library six times over: an hour on a CPU core, a
minute on a GPU. 1.1M parameters.
Expected: 2.316 nats per token held out, with Python 3.12.3 and an H200.
Command: python train.py --config=configs/dense_mini.py --workdir=runs/dense_mini
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()

    config.model.pool_size = 4

    config.router.form = "sequential"
    # Of forms that have a router: a quarter of the width.
    config.router.hidden = 32

    config.data.vocab_size = 1024

    # A text that is read six times over is learned by heart: both take off loss, 13 % together (docs/LOG.md).
    config.optimizer.learning_rate = 6e-3
    config.optimizer.weight_decay = 1.0

    config.train.num_steps = 1350
    config.train.batch_size = 64
    config.train.seq_len = 256
    config.eval.every_steps = 450
    config.eval.num_batches = 20
    config.log.every_steps = 50
    # Generating is another program to compile, and these runs take a minute.
    config.log.sample_prompt = ""

    return config
