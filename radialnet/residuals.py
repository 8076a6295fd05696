"""Residual ratios: what of a token's state a branch of a layer has just put there (arXiv 2404.04900).

    ratio = ‖f(x)‖ / ‖x + f(x)‖        l2 over the channels of a token, fp32

`Profile` has those of any model; `profile_run` takes those of our own. Ratios near 0 are of branches that a token could
do without. Above 1 a branch takes away what was there.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import Rows, eval_batches
from radialnet.executions import Execution, executions
from radialnet.shards import Batch
from radialnet.sources import evenly
from radialnet.trained import TrainedModel

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MEDIAN = QUANTILES.index(0.5)
BRANCHES = ("attention", "mlp", "layer")


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer, or a depth step, and the ratios [N] of the tokens that it ran, by branch."""

    name: str
    ratios: dict[str, np.ndarray]

    @property
    def num_tokens(self) -> int:
        return len(next(iter(self.ratios.values())))


@dataclasses.dataclass(frozen=True)
class Profile:
    model: str
    kind: str  # `radialnet`, or the model_type of transformers.
    norm: str  # Where norms are: `pre-norm`, `post-norm` (x + f(x) is what the norm gets), or `in the branch`.
    num_parameters: int
    num_tokens: int  # Each counted once; of a ResNet, the positions that the first layer gives.
    skip_first: int  # Positions of each row that were left out.
    data: str
    weights: str  # What they were read from, where that is not what they were trained as.
    layers: list[Place]
    steps: list[Place]  # By depth step, where layers are not executed in their order.

    @property
    def branches(self) -> list[str]:
        return list(self.layers[0].ratios)

    def quantiles(self, branch: str) -> list[float]:
        """Over the tokens of all layers together, so that a layer which ran more tokens weighs more."""
        return quantiles(np.concatenate([place.ratios[branch] for place in self.layers]))

    def summary(self) -> dict:
        """All figures, for JSON. NaN where a layer ran no token."""
        return {
            "model": self.model,
            "kind": self.kind,
            "norm": self.norm,
            "weights": self.weights,
            "parameters": self.num_parameters,
            "data": self.data,
            "tokens": self.num_tokens,
            "skip_first": self.skip_first,
            "median": {branch: self.quantiles(branch)[MEDIAN] for branch in self.branches},
            "quantiles": {branch: _named(self.quantiles(branch)) for branch in self.branches},
            # Over the tokens of a layer; the mean of that over the layers.
            "variance": {branch: _mean_variance(self.layers, branch) for branch in self.branches},
            "layers": [{"layer": place.name, **_figures(place)} for place in self.layers],
            "steps": [{"step": place.name, **_figures(place)} for place in self.steps],
        }


def quantiles(ratio_N: np.ndarray) -> list[float]:
    """Those of `QUANTILES`; NaN of no ratios."""
    # A state that is 0, as a branch of zeros leaves of one, has no ratio.
    ratio_N = ratio_N[np.isfinite(ratio_N)]
    return np.quantile(ratio_N.astype(np.float64), QUANTILES).tolist() if len(ratio_N) else [np.nan] * len(QUANTILES)


def _variance(ratio_N: np.ndarray) -> float:
    ratio_N = ratio_N[np.isfinite(ratio_N)]
    return float(ratio_N.var(dtype=np.float64)) if len(ratio_N) else np.nan


def _mean_variance(places: list[Place], branch: str) -> float:
    found = [_variance(place.ratios[branch]) for place in places if place.num_tokens]
    return float(np.mean(found)) if found else np.nan


def _named(values: list[float]) -> dict[str, float]:
    return {str(quantile): value for quantile, value in zip(QUANTILES, values, strict=True)}


def _figures(place: Place) -> dict:
    figures = {"tokens": place.num_tokens}
    for branch, ratio_N in place.ratios.items():
        values = quantiles(ratio_N)
        figures[branch] = {"median": values[MEDIAN], "variance": _variance(ratio_N), "quantiles": _named(values)}
    return figures


def profile_run(trained: TrainedModel, rows: Rows, max_tokens: int, skip_first: int, name: str, data: str) -> Profile:
    """The profile of a run of ours, as it is evaluated, over rows evenly spread; of tokens that executed something.

    Args:
        max_tokens: rows are run until they have so many, those left out included.
        skip_first: positions of each document that are left out.
        name, data: what it and the text are called.
    """
    config, model = trained.config, trained.config.model
    num_rows = max(1, min(len(rows), max_tokens // config.train.seq_len))
    rows = [rows[row] for row in evenly(len(rows), num_rows)]
    ratio_of = partial(_ratios, config=config, graph=trained.graph)
    names = [f"prelude {layer}" for layer in range(model.prelude_layers)]
    names += [*map(str, range(model.pool_size)), *(f"coda {layer}" for layer in range(model.coda_layers))]
    # Of every depth step, prelude and coda included.
    ratios, layers, num_tokens = [], [], 0
    for batch in eval_batches(rows, min(num_rows, config.train.batch_size), 0):
        ratio_XJBS, layer_XBS = ratio_of(trained.params, trained.controllers, np.int32(trained.step), batch)
        is_kept_BS = (batch["document"] >= 0) & (batch["position"] >= skip_first)
        ratios.append(np.asarray(ratio_XJBS)[:, :, is_kept_BS])
        layers.append(np.asarray(layer_XBS)[:, is_kept_BS])
        num_tokens += int(is_kept_BS.sum())
    ratio_XJN, layer_XN = np.concatenate(ratios, 2), np.concatenate(layers, 1)

    def place(name: str, is_there_XN: np.ndarray) -> Place:
        return Place(name, {branch: ratio_XJN[:, index][is_there_XN] for index, branch in enumerate(BRANCHES)})

    ran_XN = layer_XN >= 0
    steps = range(model.prelude_layers, model.prelude_layers + model.max_depth)
    return Profile(
        model=name,
        kind="radialnet",
        norm="pre-norm",
        num_parameters=sum(
            x.size
            for name, part in trained.params.items()
            if name not in ("head", "router")
            for x in jax.tree.leaves(part)
        ),
        num_tokens=num_tokens,
        skip_first=skip_first,
        data=data,
        weights="",
        layers=[place(name, layer_XN == layer) for layer, name in enumerate(names)],
        steps=[place(str(t), ran_XN & (np.arange(len(ran_XN)) == step)[:, None]) for t, step in enumerate(steps)],
    )


@partial(jax.jit, static_argnames=("config", "graph"))
def _ratios(params, controllers: Controllers, step, batch: Batch, *, config: Config, graph: nnx.GraphDef):
    """The ratios of `BRANCHES` at each step [X, 3, B, S], prelude and coda included, and the layer [X, B, S].

    Attention and MLP by what the layer has, the layer by what the stream gets, its gate included.
    """

    def look(execution: Execution) -> jax.Array:
        before_BSD, attended_BSD = execution.before_BSD, execution.attended_BSD
        pairs = (
            (attended_BSD, before_BSD + attended_BSD),
            (execution.update_BSD - attended_BSD, before_BSD + execution.update_BSD),
            (execution.gated_BSD, execution.after_BSD),
        )
        norm = partial(jnp.linalg.norm, axis=-1)
        return jnp.stack([norm(f_BSD) / norm(sum_BSD) for f_BSD, sum_BSD in pairs])

    return executions(nnx.merge(graph, params), config, batch, controllers, step, look)[1:]
