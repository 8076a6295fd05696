"""About seven billion parameters active per token out of a pool of 57 billion, for large pods.

What: 320 layers of width 4096 in the pool, 30 to 48 steps per token and 40 on average, a layer of the whole pool by the
token's hash (all are used at every step, so that tokens can go to the devices that have them). bf16 products. 56.7B
parameters in the pool, 7.1B of them used by a token. Give it your own text by --config.data.source=jsonl
--config.data.path=FILE.
Cost: 8.4 million tokens a step; memory and FLOPs of a device on pods in docs/DEVICES.md. Compiled for them, not run.
Expected: not measured.
Command: python train.py --config=configs/radial_large.py --workdir=runs/radial_large
"""

from ml_collections import ConfigDict

from configs import radial_base


def get_config() -> ConfigDict:
    config = radial_base.get_config()

    config.model.pool_size = 320
    config.model.max_depth = 48
    config.model.min_depth = 30
    config.model.d_model = 4096
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.d_ff = 11_008
    config.model.init = "distinct"

    # One group: a hash over the whole pool balances the load of devices.
    config.model.num_groups = 1
    config.router.hidden = 512
    config.router.depth_target = 40.0

    config.optimizer.learning_rate = 1.5e-4

    config.train.batch_size = 2048
    config.train.seq_len = 4096

    # 512 chips: 5 layers on each, its weights split 8 times; more slices are copies.
    config.mesh.fsdp = 8
    config.mesh.pool = 64
    config.mesh.tensor = 1

    return config
