"""SmolLM2-135M as a radial network: its 30 layers in their order, of which each token skips those it can do without.

    python -m radialnet.radialize --model=SmolLM2-135M --workdir=runs/smollm2
    python train.py --config=configs/distill_smollm2.py --workdir=runs/distilled

The router learns what skipping each layer costs: first from the residual ratios of all of them, then from the
divergence of the predictions of those that were left, with noise at first, so that all are tried. The layers learn to
do without, by changes of rank 16 (docs/PRETRAINED.md), on one device. With layers that stay as they are, on any:
`--config.optimizer.frozen=embedding,head,final_norm,pool --config.optimizer.low_rank=0` with
`--config.train.distill_weight=1.0 --config.optimizer.learning_rate=3e-3`.

Cost: 9 s a step of 256 tokens on one core, 50 minutes. Expected: held out 3.09 nats at 25.2 layers, of which the
teacher has 2.85 with 30; and 2.92 at 25.7 when the run goes on to 680 steps (`--config.train.num_steps=680`).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    pretrained = "runs/smollm2"
    config.model.update(
        pool_size=30,
        max_depth=30,
        min_depth=3,
        d_model=576,
        num_heads=9,
        num_kv_heads=3,
        d_ff=1536,
        rope_base=100_000.0,
        qk_norm=False,
        norm_eps=1e-5,
        init="upcycle",
        upcycle_from=pretrained,
    )
    config.cache.view = "same_layer"
    config.router.update(
        form="skip",
        hidden=64,
        z_coef=0.0,
        load_coef=0.0,
        noise=1.5,
        noise_steps=120,
        depth_target=22.5,
        exit_warmup_steps=20,
        depth_ramp_steps=130,
        exit_bias_init=-2.5,
        exit_bias_rate=0.05,
    )
    config.data.tokenizer = f"{pretrained}/tokenizer.json"
    config.optimizer.update(learning_rate=1e-3, frozen="embedding,head,final_norm", low_rank=16)
    config.train.update(num_steps=340, batch_size=2, seq_len=128, teacher=pretrained, distill_weight=0.3)
    config.eval.update(every_steps=100, num_batches=8)
    config.checkpoint.every_steps = 100
    return config
