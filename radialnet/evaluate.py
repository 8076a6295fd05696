"""Evaluation of a trained run on held-out text, at any max depth and exit bias.

    python -m radialnet.evaluate --workdir=DIR [--max_depth=2,4,8] [--exit_bias=-1,0,1] [--data=PATH] [--json]

The last line of stdout is one JSON object (a list when several depths or biases are asked for).
"""

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from radialnet import cli
from radialnet.config import ConfigError
from radialnet.corpus import read_held_out
from radialnet.data import Batch, PackedRows, Rows, eval_batches, prepare, write_rows
from radialnet.files import finite
from radialnet.metrics import BatchSums, add, figures, flops_per_token
from radialnet.router import Controllers
from radialnet.run_folder import RunFolder
from radialnet.train_step import eval_step
from radialnet.trained import TrainedModel, load_trained

EvalStep = Callable[..., BatchSums]
# One function for all calls, so that a max depth is compiled once, whatever the number of exit biases.
_eval_step = jax.jit(eval_step, static_argnames=("config", "graph", "max_depth"))


def evaluate(
    step_fn: EvalStep, params: dict, controllers: Controllers, step: int, batches: Iterable[Batch], bytes_V: jax.Array
) -> tuple[BatchSums, float]:
    """The sums over all batches, and the seconds that it took, without the compilation.

    Args:
        step_fn: `eval_step` with its static arguments bound, jitted.
        step: the training step that the parameters are of.
    """
    batches = iter(batches)
    first = next(batches)
    jax.block_until_ready(step_fn(params, controllers, jnp.int32(step), first, bytes_V))
    start = time.perf_counter()
    total = None
    for batch in itertools.chain([first], batches):
        sums = step_fn(params, controllers, jnp.int32(step), batch, bytes_V)
        total = sums if total is None else add(total, sums)
    jax.block_until_ready(total)
    return total, time.perf_counter() - start


def evaluate_trained(trained: TrainedModel, rows: Rows, max_depth: int, exit_bias: float) -> dict:
    """The figures of a trained model over rows.

    Args:
        max_depth: T in place of the trained one.
        exit_bias: added to the trained exit bias.
    """
    config = trained.config
    step_fn = partial(_eval_step, config=config, graph=trained.graph, max_depth=max_depth)
    controllers = trained.controllers.replace(exit_bias=trained.controllers.exit_bias + exit_bias)
    batches = eval_batches(rows, config.train.batch_size, config.eval.num_batches)
    bytes_V = jnp.asarray(trained.tokenizer.bytes_per_token)
    sums, seconds = evaluate(step_fn, trained.params, controllers, trained.step, batches, bytes_V)
    found = figures(sums)
    return {
        "step": trained.step,
        "max_depth": max_depth,
        "exit_bias": float(controllers.exit_bias),
        **found,
        "tokens": int(sums.routing.num_tokens),
        "tokens_per_s": float(sums.routing.num_tokens) / seconds,
        "flops_per_token": flops_per_token(config, trained.tokenizer.vocab_size, found["executed_by_step"]),
    }


def _held_out_rows(trained: TrainedModel, workdir: Path, data: str | None, scratch: Path) -> Rows:
    folder = RunFolder(workdir)
    if not data:
        return prepare(trained.config, folder).eval
    if trained.config.data.source == "hops":
        raise ConfigError(f"--data={data}: not for a run on config.data.source='hops', which knows no text")
    if not Path(data).exists():
        raise ConfigError(f"--data={data}: no such file or folder")
    documents = read_held_out(Path(data), trained.config.data.text_key)
    write_rows(scratch / "rows", documents, trained.tokenizer, trained.config.train.seq_len)
    return PackedRows(scratch / "rows")


def main() -> None:
    workdir = Path(_WORKDIR.value)
    max_depths = cli.numbers("max_depth", _MAX_DEPTH.value or ["1"], int, "whole numbers, by commas,")
    exit_biases = cli.numbers("exit_bias", _EXIT_BIAS.value, float, "numbers, by commas,")
    trained = load_trained(workdir)
    if not _MAX_DEPTH.value:
        max_depths = [trained.config.model.max_depth]
    with tempfile.TemporaryDirectory() as scratch:
        rows = _held_out_rows(trained, workdir, _DATA.value, Path(scratch))
        results = []
        for max_depth, exit_bias in itertools.product(max_depths, exit_biases):
            result = evaluate_trained(trained, rows, max_depth, exit_bias)
            results.append(result)
            if not _JSON.value:
                print(
                    f"step {result['step']}  max depth {max_depth}  exit bias {result['exit_bias']:+.2f}:  "
                    f"bpb {result['bpb']:.4f}  ce {result['ce']:.4f}  depth {result['depth']:.3f}  "
                    f"{result['tokens_per_s']:,.0f} tokens/s"
                )
    print(json.dumps(finite(results[0] if len(results) == 1 else results)))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)
    _MAX_DEPTH = flags.DEFINE_list("max_depth", None, "Max depths to evaluate at; the trained one by default.")
    _EXIT_BIAS = flags.DEFINE_list("exit_bias", ["0"], "Added to the trained exit bias: more makes tokens leave early.")
    _DATA = flags.DEFINE_string("data", None, "A folder of text or a .jsonl file in place of the held-out split.")
    _JSON = flags.DEFINE_bool("json", False, "Print the JSON line alone.")
    cli.run(main)
