"""About the active size of GPT-2 small (12 layers of width 768 per token), for one accelerator.

What: 48 layers in the pool, 4 for each of 12 groups, of which a token gets one by its hash; 9 to 16 steps per token and
12 on average, those after the twelfth with its layers. bf16 products. 340M parameters in the pool, 85M of them used by
a token. The default text is small for a model of this size: give it your own by --config.data.source=jsonl
--config.data.path=FILE.
Cost: 240 MFLOP per token forward. 5 GB for parameters and optimizer; about 0.1 GB a row for the state and the cache of
all depth steps, and the activations of one of them beside it (rematerialised). 50,000 steps of 32 rows are 1.6 billion
tokens. With learned routes, as it was, it compiled in 101 s on an H200 and ran two steps; as it is, it was not run.
Expected: not measured.
Command: python train.py --config=configs/radial_small.py --workdir=runs/radial_small
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()

    config.model.pool_size = 48
    config.model.max_depth = 16
    config.model.min_depth = 9
    config.model.d_model = 768
    config.model.num_heads = 12
    config.model.num_kv_heads = 12
    config.model.d_ff = 2048
    config.model.dtype = "bfloat16"
    config.model.remat = "step"

    # What won at small sizes (radial_micro); at this one no recipe was compared with another.
    config.model.num_groups = 12
    config.router.form = "hash_exit"
    config.router.hidden = 96  # An eighth of the width, as docs/ROUTER.md advises.
    config.router.depth_target = 12.0
    config.router.exit_training = "benefit"
    # The head is a fifth of a forward pass: a quarter of the tokens teach exits as well as all (docs/LOG.md).
    config.router.read_every = 4
    config.router.explore = 0.05
    config.router.exit_warmup_steps = 2000
    config.router.depth_ramp_steps = 4000
    config.cache.view = "same_step"

    config.data.vocab_size = 32_768

    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.weight_decay = 0.1

    config.train.num_steps = 50_000
    config.train.batch_size = 32
    config.train.seq_len = 1024
    config.eval.every_steps = 1000
    config.eval.num_batches = 50
    config.checkpoint.every_steps = 1000
    config.log.every_steps = 20

    return config
