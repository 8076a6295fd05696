"""A radial network at four layers per token in the setting of `dense_micro`, and 9 % ahead of it.

What: a pool of 50 layers of width 64 in four groups, one for each step and the last one for two. Which layer of the
group a token gets is given by its hash, at every second step by that of the token before it, so that it never moves,
and the layers of a group are pulled to their mean, ever less; when to leave is learned, after 3 to 5 steps, and a
controller holds the mean at 4. docs/LOG.md tells how it came to that.
Cost: 0.62 MFLOP per token forward; 6.1 million tokens, 9 minutes on one CPU core (11,000 tokens/s). 3.3M parameters,
0.3M of them used by a token.
Expected: 1.159 nats per byte held out at mean depth 4.04 (dense_micro: 1.278); 1.157 over five seeds.
Command: python train.py --config=configs/radial_micro.py --workdir=runs/radial_micro
"""

from ml_collections import ConfigDict

from configs import dense_micro


def get_config() -> ConfigDict:
    config = dense_micro.get_config()

    config.model.pool_size = 50
    config.model.max_depth = 5
    config.model.min_depth = 3
    # The fifth step has the layers of the fourth: with a group of its own, which two tokens of five come to, it was 1 %
    # worse (docs/LOG.md).
    config.model.num_groups = 4

    config.router.form = "hash_exit"
    # A token and the one before it say in turn where it goes: 0.6 % better than by its own hash alone, five seeds.
    config.router.hash_span = 2
    config.router.load_coef = 0.0  # Without effect: layers are given, and loaded as the hash does.
    config.router.exit_training = "benefit"
    # With 0.1 it was 0.2 to 0.4 % worse, with 0.4 0.5 % (docs/LOG.md).
    config.router.read_coef = 0.2
    config.router.explore = 0.05
    config.router.exit_warmup_steps = 300
    config.router.depth_ramp_steps = 700

    # It falls for 0.6 of the run: 1.3 % better than 0.3 throughout, five seeds. Three times as much or as little at
    # first changes the loss by no more than a seed does (docs/LOG.md).
    config.optimizer.group_decay = 0.03
    config.optimizer.group_decay_init = 3.0
    config.optimizer.group_decay_steps = 1800

    # Keys of a group meet queries of their own step only: 0.2 % better than "latest", one seed (docs/LOG.md).
    config.cache.view = "same_step"

    return config
