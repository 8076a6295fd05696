"""SmolLM2-135M as a radial network: its 30 layers in their order, of which each token skips those it can do without.

    python -m radialnet.radialize --model=SmolLM2-135M --workdir=runs/smollm2
    python train.py --config=configs/distill_smollm2.py --workdir=runs/distilled

The layers stay as they are, and the router learns what skipping each of them costs: first from the residual ratios of
all layers, then from the divergence of the predictions of those that were left (docs/PRETRAINED.md).
With `--config.optimizer.frozen=embedding,head,final_norm` and a learning rate of 1e-4 the layers learn as well.

Cost: 6 s a step of 256 tokens on one core, half an hour. Expected: the teacher's own predictions (`loss_distill` 0)
until step 40. What the skips that follow cost has not been measured to the end (docs/LOG.md).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    pretrained = "runs/smollm2"
    config.model.update(
        pool_size=30,
        max_depth=30,
        min_depth=1,
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
        depth_target=22.5,
        exit_warmup_steps=40,
        depth_ramp_steps=100,
        exit_bias_init=-2.5,
    )
    config.data.tokenizer = f"{pretrained}/tokenizer.json"
    config.optimizer.update(learning_rate=3e-3, frozen="embedding,pool,final_norm,head")
    config.train.update(num_steps=300, batch_size=2, seq_len=128, teacher=pretrained)
    config.eval.update(every_steps=100, num_batches=8)
    config.checkpoint.every_steps = 100
    return config
