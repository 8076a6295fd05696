"""The hop task: does the router send tokens deeper that need more look-ups?

What: rows of 8 pairs of a permutation and queries for 1 to 4 look-ups (radialnet/hop_task.py). After a prelude of two
layers that every token goes through, one layer that is used 1 to 7 times: as often as a token gains by it.
The run logs bits per answer (as bpb, for a word counts as one byte); accuracy and depth by the number of look-ups are
told by python -m radialnet.hops --workdir=runs/hops.
Cost: 0.45 MFLOP per token forward at depth 1.8; 24.6 million tokens, 40 minutes on one CPU core. 0.2M parameters.
Expected: 99.9 % of the answers right or more for each number of look-ups, 2.0 of 7 layers on average, 1.5, 2.7, 5.1 and
5.1 for k = 1 to 4, a rank correlation of 0.85, and 0.92 when read with --exit_bias=0.05. Over three seeds 99.3 %, 1.8
layers and 0.91. Bits per answer stay at 2.8 until step 3,500 to 5,000 (docs/LOG.md).
Command: python train.py --config=configs/hops.py --workdir=runs/hops
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()

    # The prelude tells the tokens of a pair, and of a query, whom they belong to; each look-up is the same layer again.
    # With one layer it depends on the seed whether the task is found at all (docs/LOG.md).
    config.model.prelude_layers = 2
    config.model.pool_size = 1
    config.model.max_depth = 7
    config.model.min_depth = 1
    config.model.init = "distinct"
    config.model.d_model = 64
    config.model.d_ff = 192
    # Wide heads and fast angles: a head has to tell the token before from the one before that (docs/LOG.md).
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.model.rope_base = 100.0

    config.router.hidden = 16
    config.router.prior = "none"
    config.router.load_coef = 0.0
    config.router.exit_training = "benefit"
    config.router.read_coef = 0.03
    # Share of tokens that always go on: without them hardly any is left, once exits begin, to tell what that is worth.
    config.router.explore = 0.2
    # A fixed price in nats per layer, and no controller: what depth the task takes is to be found. A higher one is for
    # reading (--exit_bias): trained at 0.05, a seed lost 2 % of the answers of four look-ups (docs/LOG.md).
    config.router.exit_bias_init = 0.02
    config.router.exit_bias_rate = 0.0
    # What plots and alarms compare the depth with; it steers nothing.
    config.router.depth_target = 2.0
    # Not before the task is learned.
    config.router.exit_warmup_steps = 6500

    config.data.source = "hops"
    config.data.hops_symbols = 8
    config.data.hops_max = 4

    config.optimizer.learning_rate = 4e-3

    config.train.num_steps = 12_000
    config.train.seq_len = 64
    config.train.batch_size = 32
    config.eval.every_steps = 1000
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 50

    # A text to be continued is not what these runs know.
    config.log.sample_prompt = ""

    return config
