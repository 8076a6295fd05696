"""A run's folder: what lies where in it, and the trained model that can be restored from it."""

import dataclasses
import json
import os
from pathlib import Path

import jax
from flax import nnx

from radialnet.checkpoint import Checkpoints
from radialnet.config import Config, ConfigError
from radialnet.model import init_params
from radialnet.router import Controllers
from radialnet.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class RunFolder:
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def read_metrics(self) -> list[dict]:
        """The lines of metrics.jsonl; a last line that a kill cut short is left out. Raises ConfigError."""
        if not self.metrics.exists():
            return []
        lines = []
        # Without its newline the last line is not whole.
        for number, line in enumerate(self.metrics.read_text().split("\n")[:-1], start=1):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{self.metrics}, line {number}: not JSON ({error})") from None
        return lines

    def drop_metrics_after(self, step: int) -> None:
        """Forget the lines of steps that will be done again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        partial = self.metrics.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.metrics)


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What evaluation and generation need of a run."""

    config: Config
    graph: nnx.GraphDef
    params: dict
    controllers: Controllers
    tokenizer: Tokenizer
    step: int


def load_trained(workdir: Path) -> TrainedModel:
    """Restore the newest checkpoint of a run by the run's own config and tokenizer.

    Raises:
        ConfigError: the folder is not a run folder, or holds no checkpoint.
    """
    folder = RunFolder(workdir)
    config = Config.load(folder.config)
    tokenizer = Tokenizer.load(folder.tokenizer)
    graph, params = abstract_params(config, tokenizer.vocab_size)
    controllers = jax.eval_shape(lambda: Controllers.init(config.router, config.model.pool_size))
    if not folder.checkpoints.is_dir():
        raise ConfigError(f"{folder.checkpoints}: no checkpoint in this run folder yet")
    with Checkpoints(folder.checkpoints) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise ConfigError(f"{folder.checkpoints}: no checkpoint in this run folder yet")
        trees = checkpoints.restore(step, {"params": params, "controllers": controllers})
    return TrainedModel(config, graph, trees["params"], trees["controllers"], tokenizer, step)


def abstract_params(config: Config, vocab_size: int) -> tuple[nnx.GraphDef, dict]:
    """`init_params` without the arrays: shapes and dtypes only."""
    graph = None

    def build() -> dict:
        nonlocal graph
        graph, params = init_params(config, vocab_size)
        return params

    params = jax.eval_shape(build)
    return graph, params
