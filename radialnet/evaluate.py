"""Evaluation of a trained run on held-out text, at any max depth and exit bias.

    python -m radialnet.evaluate --workdir=DIR [--max_depth=2,4,8] [--exit_bias=-1,0,1] [--data=PATH] [--json]
                                 [--path=forward|decode] [--max_tokens=N] [--capacity=N,N]

`--path=decode` runs the text token by token through the cache of decoding (`decode_step`) in place of the parallel pass
that trains: the same figures, up to rounding, or something is wrong. With `--capacity` it has room for so many entries
a row alone, and gives up the oldest tokens: what a window costs. The last line of stdout is one JSON object (a list
when several depths, biases or capacities are asked for).
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from radialnet import cli
from radialnet.checks import expanded
from radialnet.controllers import Controllers
from radialnet.cost import flops_per_token
from radialnet.data import Rows, eval_batches, held_out_rows, prepare
from radialnet.decode import Decoder
from radialnet.files import finite
from radialnet.metrics import BatchSums, add, figures
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.shards import PADDING, Batch
from radialnet.sources import documents, open_held_out
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
    jax.block_until_ready(step_fn(params, controllers, np.int32(step), first, bytes_V))
    start = time.perf_counter()
    total = None
    for batch in itertools.chain([first], batches):
        sums = step_fn(params, controllers, np.int32(step), batch, bytes_V)
        total = sums if total is None else add(total, sums)
    jax.block_until_ready(total)
    return total, time.perf_counter() - start


def evaluate_trained(
    trained: TrainedModel, rows: Rows, max_depth: int, exit_bias: float, num_batches: int | None = None
) -> dict:
    """The figures of a trained model over rows.

    Args:
        max_depth: T in place of the trained one.
        exit_bias: added to the trained exit bias.
        num_batches: of `config.train.batch_size` rows, in place of `config.eval.num_batches`; 0 = all.
    """
    config = trained.config
    num_batches = config.eval.num_batches if num_batches is None else num_batches
    step_fn = partial(_eval_step, config=config, graph=trained.graph, max_depth=max_depth)
    controllers = trained.controllers.lean(exit_bias)
    batches = eval_batches(rows, config.train.batch_size, num_batches)
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


def evaluate_decoding(
    trained: TrainedModel,
    rows: Rows,
    max_depth: int,
    exit_bias: float,
    num_batches: int | None = None,
    capacity: int | None = None,
) -> dict:
    """`evaluate_trained` token by token through the cache, without the figures that only a whole pass knows.

    A document of a row is a row of the batch here: decoding knows one text a row.

    Args:
        capacity: entries that a row of the batch may hold on average; what has no room gives up the oldest tokens. None
            is all that there are.
    """
    config, num_rows = trained.config, trained.config.train.batch_size
    num_batches = config.eval.num_batches if num_batches is None else num_batches
    decoder = Decoder(trained, num_rows, max_depth, exit_bias, (capacity or 0) * num_rows, "slide")
    stages = decoder.decoding.stages
    texts = list(_documents(_first(rows, num_batches * num_rows)))
    nats, num_bytes, num_targets, ran, seconds = 0.0, 0, 0, [], 0.0
    for begin in range(0, len(texts), num_rows):
        batch = _side_by_side(texts[begin : begin + num_rows], num_rows, config.train.seq_len)
        start = time.perf_counter()
        logits_RSV, layer_RST = jax.block_until_ready(decoder.read(batch["token"], batch["is_real"]))
        # The first call compiles.
        seconds += time.perf_counter() - start if begin else 0
        is_target_RS = batch["is_target"]
        nats_RS = optax.softmax_cross_entropy_with_integer_labels(logits_RSV, batch["target"])
        nats += float(jnp.where(is_target_RS, nats_RS, 0).sum())
        num_targets += int(is_target_RS.sum())
        num_bytes += int(trained.tokenizer.bytes_per_token[batch["target"][is_target_RS]].sum())
        ran.append(layer_RST[batch["is_real"]][:, stages.prelude : stages.first_coda] >= 0)
    ran_NT = np.concatenate(ran)
    depth_N, executed_by_step = ran_NT.sum(1), ran_NT.mean(0).tolist()
    timed = len(depth_N) - len(ran[0])
    return {
        "step": trained.step,
        "max_depth": max_depth,
        "exit_bias": float(decoder.controllers.exit_bias),
        "capacity": capacity,
        "cache_bytes": decoder.peak_bytes / num_rows,
        "ce": nats / num_targets,
        "bpb": nats / np.log(2) / num_bytes,
        "depth": float(depth_N.mean()),
        "depth_hist": (np.bincount(depth_N, minlength=max_depth + 1) / len(depth_N)).tolist(),
        "executed_by_step": executed_by_step,
        "tokens": len(depth_N),
        "tokens_per_s": timed / seconds if timed else None,
        "flops_per_token": flops_per_token(config, trained.tokenizer.vocab_size, executed_by_step),
    }


def _first(rows: Rows, num_rows: int) -> Rows:
    """The first rows; 0 = all of them."""
    return [rows[row] for row in range(min(num_rows, len(rows)))] if num_rows else rows


def _documents(rows: Rows) -> Iterator[Batch]:
    """The parts of rows that are of one document, one after the other, without the padding."""
    for row in range(len(rows)):
        item = rows[row]
        for document in np.unique(item["document"][item["document"] != PADDING]):
            is_of_it_S = item["document"] == document
            yield {name: item[name][is_of_it_S] for name in ("token", "target", "is_target")}


def _side_by_side(texts: list[Batch], num_rows: int, seq_len: int) -> Batch:
    """Arrays [R, S] of some texts, filled up."""
    batch = {"token": np.int32, "target": np.int32, "is_target": bool, "is_real": bool}
    batch = {name: np.zeros((num_rows, seq_len), dtype) for name, dtype in batch.items()}
    for row, text in enumerate(texts):
        for name, values in {**text, "is_real": True}.items():
            batch[name][row, : len(text["token"])] = values
    return batch


def eval_rows(trained: TrainedModel, workdir: Path, data: str | None) -> Rows:
    """The rows of the run's own held-out split, or of the text in `data`.

    Raises:
        ConfigError: the documents of the run are not there any more, or others; or `data` can't be read as text.
    """
    folder = RunFolder(workdir)
    if not data:
        return prepare(trained.config, folder).eval
    if trained.config.data.source == "hops":
        raise ConfigError(f"--data={data}: not for a run on config.data.source='hops', which knows no text")
    path = expanded(data)
    if not path.exists():
        raise ConfigError(f"--data={data}: no such file or folder")
    source = open_held_out(path, trained.config.data.text_key)
    return held_out_rows(source, trained.tokenizer, trained.config.train.seq_len)


def knows_text(folder: RunFolder) -> bool:
    """Whether a run has documents that it was trained on; what was trained elsewhere has none."""
    return bool(json.loads(folder.manifest.read_text()).get("num_documents"))


def held_out_text(trained: TrainedModel, workdir: Path, data: str | None) -> tuple[Rows, str]:
    """`eval_rows`; of a model that was trained elsewhere, whose folder knows no text, rows of `documents`. And what
    they are."""
    if knows_text(RunFolder(workdir)):
        return eval_rows(trained, workdir, data), f"text of {data}" if data else "held-out part of what the run read"
    source, told = documents(expanded(data) if data else None)
    return held_out_rows(source, trained.tokenizer, trained.config.train.seq_len), told


def main() -> None:
    workdir = expanded(_WORKDIR.value)
    max_depths = cli.numbers("max_depth", _MAX_DEPTH.value or ["1"], int, "whole numbers, by commas,")
    exit_biases = cli.numbers("exit_bias", _EXIT_BIAS.value, float, "numbers, by commas,")
    capacities = cli.numbers("capacity", _CAPACITY.value, int, "whole numbers, by commas,") if _CAPACITY.value else []
    if capacities and _PATH.value != "decode":
        raise ConfigError(f"--capacity={','.join(_CAPACITY.value)}: needs --path=decode")
    trained = load_trained(workdir)
    if not _MAX_DEPTH.value:
        max_depths = [trained.config.model.max_depth]
    least = Decoder(trained, max_depth=max(max_depths)).least_capacity if capacities else 0
    if min(capacities, default=least) < least:
        raise ConfigError(f"--capacity={','.join(_CAPACITY.value)}: at least {least} entries a row are needed")
    rows = eval_rows(trained, workdir, _DATA.value)
    num_batches = None
    if _MAX_TOKENS.value:
        rows, num_batches = _first(rows, -(-_MAX_TOKENS.value // trained.config.train.seq_len)), 0
    by_path = evaluate_decoding if _PATH.value == "decode" else evaluate_trained
    windows = [{"capacity": capacity} for capacity in capacities] or [{}]
    results = []
    for max_depth, exit_bias, window in itertools.product(max_depths, exit_biases, windows):
        result = by_path(trained, rows, max_depth, exit_bias, num_batches, **window)
        results.append(result)
        if not _JSON.value:
            print(
                f"step {result['step']}  max depth {max_depth}  exit bias {result['exit_bias']:+.2f}"
                f"{'  capacity {capacity}'.format(**window) if window else ''}:  "
                f"bpb {result['bpb']:.4f}  ce {result['ce']:.4f}  depth {result['depth']:.3f}  "
                f"{result['tokens_per_s'] or math.nan:,.0f} tokens/s"
            )
    print(json.dumps(finite(results[0] if len(results) == 1 else results)))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)
    _MAX_DEPTH = flags.DEFINE_list("max_depth", None, "Max depths to evaluate at; the trained one by default.")
    _EXIT_BIAS = flags.DEFINE_list("exit_bias", ["0"], "Added to the trained exit bias: more makes tokens leave early.")
    _DATA = flags.DEFINE_string("data", None, "A folder of text or a .jsonl file in place of the held-out split.")
    _PATH = flags.DEFINE_enum("path", "forward", ["forward", "decode"], "In parallel, or token by token.")
    _MAX_TOKENS = flags.DEFINE_integer(
        "max_tokens",
        0,
        "The first rows alone, as many as have so many tokens; 0 = config.eval.num_batches of them, as in training.",
        lower_bound=0,
    )
    _CAPACITY = flags.DEFINE_list("capacity", None, "Of --path=decode: entries a row may hold, on average over rows.")
    _JSON = flags.DEFINE_bool("json", False, "Print the JSON line alone.")
    cli.run(main)
