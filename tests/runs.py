"""Run folders without the training, and what lines of metrics hold."""

import jax
import jax.numpy as jnp

from radialnet.checkpoint import Checkpoints
from radialnet.controllers import Controllers
from radialnet.model import init_params
from radialnet.run_folder import RunFolder
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from tests.tiny import perturbed

# Of a healthy run whose tokens may leave after 1 to 3 layers and whose target is 2; and what in it raises each alarm.
LINE = {
    "step": 500,
    "split": "train",
    "bpb": 2.0,
    "route_mi": 0.8,
    "load_entropy": 0.9,
    "load": [0.2] * 5,
    "depth": 2.0,
    "expected_depth": 1.8,
    "depth_hist": [0.0, 0.3, 0.4, 0.3],
    "loss_router_z": 4.0,
    "router_grad_norm": 0.1,
}
SICK = {
    "route_mi": {"route_mi": 0.01},
    "load_entropy": {"load_entropy": 0.3, "load": [0.9, 0.1, 0, 0, 0]},
    "depth": {"depth_hist": [0.0, 1.0, 0.0, 0.0]},
    "soft_depth": {"expected_depth": 0.9},
    "router_logits": {"loss_router_z": 1e4},
    "router_gradient": {"router_grad_norm": 50.0},
}


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
