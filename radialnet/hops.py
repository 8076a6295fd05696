"""How a run trained on the hop task answers, and how deep its tokens go, by the look-ups that an answer needs.

    python -m radialnet.hops --workdir=DIR [--symbols=N] [--max_hops=K] [--max_depth=T] [--exit_bias=B] [--json]

On the held-out rows of `hop_task`, as long as those of training. A row with more symbols has room for fewer queries.
The last line of stdout is one JSON object.
"""

import json
from functools import partial

import jax
import numpy as np
from absl import flags
from flax import nnx

from radialnet import cli
from radialnet.checks import check_hops, expanded
from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import eval_batches
from radialnet.files import finite
from radialnet.hop_task import HopRows, hops_of
from radialnet.sections import ConfigError
from radialnet.shards import PADDING, Batch
from radialnet.train_step import forward_as_evaluated
from radialnet.trained import TrainedModel, load_trained


@partial(jax.jit, static_argnames=("config", "graph", "max_depth"))
def _answers(
    params, controllers: Controllers, step, batch: Batch, *, config: Config, graph: nnx.GraphDef, max_depth: int
) -> tuple[jax.Array, jax.Array]:
    """The most likely next token and the executed depth of each token, [B, S]."""
    output = forward_as_evaluated(config, graph, params, batch, controllers, step, max_depth)
    return output.logits_BSV.argmax(-1), output.depth_BS


def hop_figures(trained: TrainedModel, rows: HopRows, max_depth: int, exit_bias: float) -> dict:
    """The figures of a trained model over all rows.

    Args:
        max_depth: T in place of the trained one.
        exit_bias: added to the trained exit bias.
    """
    config = trained.config
    controllers = trained.controllers.lean(exit_bias)
    answer = partial(_answers, config=config, graph=trained.graph, max_depth=max_depth)
    hops, is_right, answer_depth, depth = [], [], [], []
    for batch in eval_batches(rows, config.train.batch_size, num_batches=0):
        answer_BS, depth_BS = map(np.asarray, answer(trained.params, controllers, trained.step, batch))
        asks_BS = batch["is_target"]
        hops.append(hops_of(batch["token"][asks_BS]))
        is_right.append((answer_BS == batch["target"])[asks_BS])
        answer_depth.append(depth_BS[asks_BS])
        depth.append(depth_BS[batch["document"] != PADDING])
    by_query = map(np.concatenate, (hops, is_right, answer_depth))
    return {
        "step": trained.step,
        "symbols": rows.num_symbols,
        "max_hops": rows.max_hops,
        "trained_symbols": config.data.hops_symbols,
        "trained_max_hops": config.data.hops_max,
        "max_depth": max_depth,
        "exit_bias": float(controllers.exit_bias),
        **query_figures(*by_query, rows.max_hops),
        "depth": float(np.concatenate(depth).mean()),
    }


def query_figures(hops_Q: np.ndarray, is_right_Q: np.ndarray, depth_Q: np.ndarray, max_hops: int) -> dict:
    """The figures of the answers to Q queries. None stands for what there is no query for.

    Args:
        hops_Q: k of each query, 1…max_hops.
        depth_Q: executed depth of the token that answers.
    """

    def means(of_Q: np.ndarray) -> dict:
        num_queries = int(of_Q.sum())
        accuracy, depth = (float(x_Q[of_Q].mean()) if num_queries else None for x_Q in (is_right_Q, depth_Q))
        return {"queries": num_queries, "accuracy": accuracy, "depth": depth}

    overall = means(np.ones(len(hops_Q), bool))
    return {
        "by_k": [{"k": k, **means(hops_Q == k)} for k in range(1, max_hops + 1)],
        "queries": overall["queries"],
        "accuracy": overall["accuracy"],
        "answer_depth": overall["depth"],
        "spearman": spearman(hops_Q, depth_Q),
    }


def spearman(x_Q: np.ndarray, y_Q: np.ndarray) -> float | None:
    """Spearman's rank correlation, equal values sharing the mean of their ranks; None where x or y does not vary."""
    ranks = [_ranks(x_Q), _ranks(y_Q)]
    if any(np.ptp(rank_Q) == 0 for rank_Q in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(x_Q: np.ndarray) -> np.ndarray:
    _, value_Q, counts = np.unique(x_Q, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[value_Q]


def _show(found: dict) -> None:
    print(
        f"step {found['step']}  symbols {found['symbols']}  max depth {found['max_depth']}  "
        f"exit bias {found['exit_bias']:+.2f}"
    )
    print(f"{'k':>5} {'queries':>9} {'accuracy':>9} {'depth':>7}")
    for line in [*found["by_k"], {**found, "k": "all", "depth": found["answer_depth"]}]:
        accuracy, depth = ("–" if line[name] is None else f"{line[name]:.3f}" for name in ("accuracy", "depth"))
        untrained = "  k not trained" if line["k"] != "all" and line["k"] > found["trained_max_hops"] else ""
        print(f"{line['k']:>5} {line['queries']:>9,} {accuracy:>9} {depth:>7}{untrained}")
    rho = "none, for one of them does not vary" if found["spearman"] is None else f"{found['spearman']:.3f}"
    print(f"mean depth of all tokens {found['depth']:.3f}; rank correlation of k and depth: {rho}")


def main() -> None:
    (exit_bias,) = cli.numbers("exit_bias", [str(_EXIT_BIAS.value)], float, "numbers")
    trained = load_trained(expanded(_WORKDIR.value))
    data, seq_len = trained.config.data, trained.config.train.seq_len
    if data.source != "hops":
        raise ConfigError(f"--workdir={_WORKDIR.value}: a run on config.data.source={data.source!r}, not on 'hops'")
    num_symbols, max_hops = _SYMBOLS.value or data.hops_symbols, _MAX_HOPS.value or data.hops_max
    check_hops(num_symbols, max_hops, seq_len, names=("--symbols", "--max_hops"))
    rows = HopRows("eval", num_symbols, max_hops, seq_len)
    max_depth = _MAX_DEPTH.value or trained.config.model.max_depth
    found = hop_figures(trained, rows, max_depth, exit_bias)
    if not _JSON.value:
        _show(found)
    print(json.dumps(finite(found)))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)
    _SYMBOLS = flags.DEFINE_integer("symbols", None, "n in place of the trained one.", lower_bound=2)
    _MAX_HOPS = flags.DEFINE_integer("max_hops", None, "K in place of the trained one.", lower_bound=1)
    _MAX_DEPTH = flags.DEFINE_integer(
        "max_depth", None, "T in place of the trained one.", lower_bound=1, upper_bound=2**16
    )
    _EXIT_BIAS = flags.DEFINE_float("exit_bias", 0.0, "Added to the trained exit bias: more makes tokens leave early.")
    _JSON = flags.DEFINE_bool("json", False, "Print the JSON line alone.")
    cli.run(main)
