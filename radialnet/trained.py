"""The trained model of a run, restored from its folder: what evaluation and generation work with."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from radialnet.checkpoint import Checkpoints
from radialnet.checks import expanded
from radialnet.cli import warn
from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import tokenizer_of_run
from radialnet.model import abstract_params
from radialnet.run_folder import RunFolder, saved_steps
from radialnet.sections import ConfigError
from radialnet.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    config: Config
    graph: nnx.GraphDef
    params: dict
    controllers: Controllers
    tokenizer: Tokenizer
    step: int

    def check_length(self, seq_len: int, field: str, whose: str) -> None:
        """Raises ConfigError: rows of that `field` are longer than the positions that the model learned, if it did."""
        if 0 < (most := self.config.model.max_positions) < seq_len:
            raise ConfigError(f"{field}={seq_len}: {whose} knows {most} positions")


def load_trained(workdir: Path) -> TrainedModel:
    """Restore the newest whole checkpoint of a run, by the run's own config and tokenizer.

    Raises:
        ConfigError: the folder is not a run folder, or holds no checkpoint, or none that is whole.
    """
    folder = RunFolder(expanded(workdir))
    config = Config.load(folder.config)
    keep_programs(config)
    tokenizer = tokenizer_of_run(folder)
    graph, params = abstract_params(config, tokenizer.vocab_size)
    controllers = jax.eval_shape(lambda: Controllers.init(config.router, config.model.pool_size))
    if not folder.checkpoints.is_dir():
        raise ConfigError(f"{folder.checkpoints}: no checkpoint in this run folder yet")
    abstract_trees = {"params": params, "controllers": controllers}
    while True:
        steps = saved_steps(folder.checkpoints)
        try:
            with Checkpoints(folder.checkpoints) as checkpoints:
                step = checkpoints.newest(report=warn)
                if step is None:
                    raise ConfigError(f"{folder.checkpoints}: no checkpoint in this run folder yet")
                trees = checkpoints.restore(step, abstract_trees)
            break
        except ConfigError:
            # A run that is still being trained may have let go of the step while it was read.
            if saved_steps(folder.checkpoints) == steps:
                raise
    return TrainedModel(config, graph, trees["params"], trees["controllers"], tokenizer, step)


def keep_programs(config: Config) -> None:
    """Keep what is compiled from now on, so that the next process need not compile it again."""
    if not jax.config.jax_compilation_cache_dir:
        cache = expanded(config.data.cache_dir) / "programs"
        jax.config.update("jax_compilation_cache_dir", str(cache))
