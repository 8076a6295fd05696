"""Run folders without the training."""

import jax
import jax.numpy as jnp

from radialnet.checkpoint import Checkpoints
from radialnet.controllers import Controllers
from radialnet.model import init_params
from radialnet.run_folder import RunFolder
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from tests.tiny import perturbed


def make_run(folder, config, dataset=None, step=3):
    """One with parameters and controllers off their initial values."""
    run, tokenizer = RunFolder(folder), dataset.tokenizer if dataset else Tokenizer.train([], BYTE_VOCAB_SIZE)
    folder.mkdir()
    tokenizer.save(run.tokenizer)
    run.write_manifest(dataset.manifest if dataset else {"sha256": "0", "tokenizer": tokenizer.fingerprint()})
    config.save(run.config)
    params = perturbed(init_params(config, tokenizer.vocab_size)[1])
    controllers = jax.tree.map(lambda x: x + 0.3, Controllers.init(config.router, config.model.pool_size))
    with Checkpoints(run.checkpoints) as checkpoints:
        checkpoints.save(step, {"params": jax.tree.map(jnp.asarray, params), "controllers": controllers})
    return folder
