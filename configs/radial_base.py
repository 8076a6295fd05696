"""About a billion parameters active per token, for pods.

What: as radial_small, with 64 layers of width 2048 in 20 groups, 15 to 24 steps per token and 20 on average. 3.0B
parameters in the pool, 0.9B of them used by a token. Give it your own text by --config.data.source=jsonl
--config.data.path=FILE.
Cost: 40 GB for parameters and optimizer, split over 64 chips; memory and FLOPs of a device on pods in docs/DEVICES.md.
Compiled for them, not run.
Expected: not measured.
Command: python train.py --config=configs/radial_base.py --workdir=runs/radial_base
"""

from ml_collections import ConfigDict

from configs import radial_small


def get_config() -> ConfigDict:
    config = radial_small.get_config()

    config.model.pool_size = 64
    config.model.max_depth = 24
    config.model.min_depth = 15
    config.model.d_model = 2048
    config.model.num_heads = 16
    config.model.num_kv_heads = 8
    config.model.d_ff = 5632

    config.model.num_groups = 20
    config.router.hidden = 256
    config.router.depth_target = 20.0

    config.data.vocab_size = 65_536

    config.optimizer.learning_rate = 3e-4

    config.train.num_steps = 100_000
    config.train.batch_size = 512
    config.train.seq_len = 2048

    # 64 chips, or a multiple: a quarter of every layer's heads and hidden units on each, weights split 16 times.
    config.mesh.fsdp = 16
    config.mesh.tensor = 4

    return config
