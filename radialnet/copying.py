"""What a run has learned to copy: loss and depth of targets by how much of what leads to them their document has shown.

    python -m radialnet.copying --workdir=DIR [--exit_bias=B] [--data=PATH] [--json]

A target that ends a run of tokens which stood before in its document can be copied from there: what induction heads do
(arXiv 2209.11895), for which two layers of attention are needed at least. What is often repeated is also often met in
training, so compare models at the same targets: the loss of one that copies falls steeply from 1 repeated token to 2.
As in training, `config.eval.num_batches` batches are read, of `--data` too. The last line of stdout is one JSON object.
"""

import json
from functools import partial

import jax
import numpy as np
import optax
from absl import flags
from flax import nnx

from radialnet import cli
from radialnet.checks import expanded
from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import Rows, eval_batches
from radialnet.evaluate import eval_rows
from radialnet.files import finite
from radialnet.sections import ConfigError
from radialnet.shards import Batch
from radialnet.train_step import forward_as_evaluated
from radialnet.trained import TrainedModel, load_trained

# Longer runs are counted as that long.
_LONGEST = 3


@partial(jax.jit, static_argnames=("config", "graph"))
def _nats_and_depth(
    params, controllers: Controllers, step, batch: Batch, *, config: Config, graph: nnx.GraphDef
) -> tuple[jax.Array, jax.Array]:
    """-log p of each target and the executed depth of the token that predicts it, [B, S]."""
    output = forward_as_evaluated(config, graph, params, batch, controllers, step)
    return optax.softmax_cross_entropy_with_integer_labels(output.logits_BSV, batch["target"]), output.depth_BS


def repeated(token_S: np.ndarray, target_S: np.ndarray, document_S: np.ndarray) -> np.ndarray:
    """How long a run of tokens that ends in the target also stands in what was read.

    Read are the tokens of the row up to the one that predicts the target, as far as they are of its document.

    Returns:
        Tokens, [S]: 0 (the target was not read), 1 (it alone), 2 (with the token before it), 3 (or more).
    """
    repeated_S = np.zeros(len(token_S), int)
    read: list[int] = []
    seen: set[tuple[int, ...]] = set()
    for s, (token, target, document) in enumerate(zip(token_S.tolist(), target_S.tolist(), document_S, strict=True)):
        if s and document != document_S[s - 1]:
            read, seen = [], set()
        read.append(token)
        lengths = range(1, _LONGEST + 1)
        seen.update(tuple(read[-length:]) for length in lengths if length <= len(read))
        ends = {length: (*read[len(read) + 1 - length :], target) for length in lengths if length <= len(read) + 1}
        repeated_S[s] = max((length for length, end in ends.items() if end in seen), default=0)
    return repeated_S


def copying_figures(trained: TrainedModel, rows: Rows, exit_bias: float) -> dict:
    """Share of the targets, loss in nats and executed depth of what predicts them, by `repeated`.

    Loss and depth are None where no target is of that kind.

    Args:
        exit_bias: added to the trained exit bias.
    """
    config = trained.config
    controllers = trained.controllers.lean(exit_bias)
    given = trained.params, controllers, np.int32(trained.step)
    run = partial(_nats_and_depth, *given, config=config, graph=trained.graph)
    found: list[list[np.ndarray]] = []
    for batch in eval_batches(rows, config.train.batch_size, config.eval.num_batches):
        by_row = zip(batch["token"], batch["target"], batch["document"], strict=True)
        arrays = (*map(np.asarray, run(batch)), np.stack([repeated(*row) for row in by_row]))
        found.append([x_BS[batch["is_target"]] for x_BS in arrays])
    nats_Q, depth_Q, repeated_Q = map(np.concatenate, zip(*found, strict=True))

    def means(of_Q: np.ndarray) -> dict:
        ce, depth = (float(x_Q[of_Q].mean()) if of_Q.any() else None for x_Q in (nats_Q, depth_Q))
        return {"share": float(of_Q.mean()), "ce": ce, "depth": depth}

    return {
        "step": trained.step,
        "exit_bias": float(controllers.exit_bias),
        "targets": len(nats_Q),
        **means(np.ones(len(nats_Q), bool)),
        "by_repeated": [{"repeated": n, **means(repeated_Q == n)} for n in range(_LONGEST + 1)],
    }


def _show(found: dict) -> None:
    print(f"step {found['step']}  exit bias {found['exit_bias']:+.2f}  {found['targets']:,} targets")
    print(f"{'repeated tokens':>15} {'share':>7} {'ce':>7} {'depth':>7}")
    for line in [*found["by_repeated"], {**found, "repeated": "all"}]:
        name = f"{_LONGEST} or more" if line["repeated"] == _LONGEST else line["repeated"]
        ce, depth = ("–" if line[key] is None else f"{line[key]:.3f}" for key in ("ce", "depth"))
        print(f"{name:>15} {line['share']:>7.3f} {ce:>7} {depth:>7}")


def main() -> None:
    (exit_bias,) = cli.numbers("exit_bias", [str(_EXIT_BIAS.value)], float, "numbers")
    workdir = expanded(_WORKDIR.value)
    trained = load_trained(workdir)
    if trained.config.data.source == "hops":
        raise ConfigError(f"--workdir={workdir}: a run on config.data.source='hops': radialnet.hops is for it")
    found = copying_figures(trained, eval_rows(trained, workdir, _DATA.value), exit_bias)
    if not _JSON.value:
        _show(found)
    print(json.dumps(finite(found)))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)
    _EXIT_BIAS = flags.DEFINE_float("exit_bias", 0.0, "Added to the trained exit bias: more makes tokens leave early.")
    _DATA = flags.DEFINE_string("data", None, "A folder of text or a .jsonl file in place of the held-out split.")
    _JSON = flags.DEFINE_bool("json", False, "Print the JSON line alone.")
    cli.run(main)
