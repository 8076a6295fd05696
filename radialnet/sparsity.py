"""Skipping within layers, and skipping layers: loss against FLOPs and time of both.

    python -m radialnet.sparsity --workdir=DIR[,DIR] [--methods=deja_vu,…] [--heads=1,…] [--units=0.5,…] [--targets=0,…]
                                 [--data=PATH] [--max_tokens=N] [--seq_len=S] [--train_tokens=N] [--gate_steps=N]
                                 [--exit_bias=B,B] [--results=FILE] [--repeats=R] [--out=DIR] [--json]

For trained runs, of one setting and several seeds: as they are; with DejaVu (`deja_vu`: predictors choose heads and
hidden units by token; `largest`, `static`, `random`: what really is large, what mostly is, anything) at each share of
--heads and --units; with Channel Gating (`gates`: hidden units go by partial sums) trained to each threshold --targets,
of which -100 keeps everything and is what more training alone gives. Runs whose tokens exit or skip are read at each
--exit_bias as well. `time` is that of all layers for a row of decoding, against the layers as they are. A model that
was trained elsewhere is trained and measured on the standard library. --results shows other models beside. The last
line of stdout is one JSON object; --out gets it as sparsity.json, and a plot.
"""

import dataclasses
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from configs import base
from radialnet import cli
from radialnet.checks import expanded
from radialnet.comparisons import plot_sparsity
from radialnet.config import Config
from radialnet.data import Rows, eval_batches, held_out_rows, prepare
from radialnet.evaluate import held_out_text, knows_text
from radialnet.files import finite, write_whole
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.sources import evenly, split_documents
from radialnet.sparse_costs import METHODS, Study
from radialnet.trained import TrainedModel, load_trained

# Documents of the standard library that those are trained on whose run knows no text.
_ELSEWHERE = 200
_FIGURES = ("ce", "depth", "heads", "units", "flops_per_token", "time")


def over_seeds(rows: list[dict]) -> list[dict]:
    """Means over the runs of each method and knob, and the standard deviation of the loss; None for that of one."""
    points = {}
    for row in rows:
        points.setdefault((row["method"], row["knob"]), []).append(row)
    return [
        {
            "method": method,
            "knob": knob,
            "seeds": len(of),
            **{name: None if of[0][name] is None else statistics.fmean(row[name] for row in of) for name in _FIGURES},
            "ce_std": _spread([row["ce"] for row in of]),
        }
        for (method, knob), of in points.items()
    ]


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


# Of docs/RESULTS.md, what sparsity within layers is seen beside.
_BESIDE = tuple(
    f"{name}, rate 3e-3"
    for name in (
        "dense, 6 layers",
        "radial, any order",
        "radial, any order, T/2",
        "Mixture-of-Depths",
        "Mixture-of-Recursions",
    )
)


def peers(path: Path) -> list[dict]:
    """Those of `_BESIDE` that `radialnet.results` wrote there. Raises ConfigError: it wrote no such file."""
    try:
        models = json.loads(path.read_text())["models"]
        names = ("ce", "depth", "flops_per_token", "ce_std")
        return [
            {"method": name, "knob": "", "seeds": len(of["ce_by_seed"]), **{key: of[key] for key in names}}
            for name, of in models.items()
            if name in _BESIDE
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--results={path}: no file that radialnet.results wrote ({error})") from None


def _show(points: list[dict]) -> None:
    table = Table()
    for column in ("method", "knob", "seeds", "loss", "±", "MFLOP per token", "depth", "heads", "units", "time"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for point in points:
        spread, time = point["ce_std"], point.get("time")
        table.add_row(
            point["method"],
            point["knob"],
            str(point["seeds"]),
            f"{point['ce']:.4f}",
            "" if spread is None else f"{spread:.4f}",
            f"{point['flops_per_token'] / 1e6:.3f}",
            f"{point['depth']:.2f}",
            *(f"{point[name]:.3f}" if name in point else "" for name in ("heads", "units")),
            "" if time is None else f"{time:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def texts(trained: TrainedModel, workdir: Path, data: str | None, needs_training: bool) -> tuple[Rows, Rows | None]:
    """Held-out rows, those of `data` if given, and rows to train on.

    Raises:
        ConfigError: the documents of the run are not there any more, or others; or `data` can't be read as text.
    """
    config, folder = trained.config, RunFolder(workdir)
    rows, _ = held_out_text(trained, workdir, data)
    if not needs_training:
        return rows, None
    if knows_text(folder):
        return rows, prepare(config, folder).train
    trains = split_documents(base.get_config().data, is_held_out=False)
    chosen = [trains[index] for index in evenly(len(trains), _ELSEWHERE)]
    return rows, held_out_rows(chosen, trained.tokenizer, config.train.seq_len)


def load(path: Path, seq_len: int | None) -> TrainedModel:
    """A run whose rows are of that length. Raises ConfigError: it can't be studied."""
    trained = load_trained(path)
    config = trained.config
    if config.model.prelude_layers or config.model.coda_layers:
        raise ConfigError(f"--workdir={path}: has layers outside the pool, and those can't be made sparse")
    if config.data.source == "hops":
        raise ConfigError(f"--workdir={path}: of config.data.source='hops', and text is needed")
    seq_len = seq_len or config.train.seq_len
    trained.check_length(seq_len, "--seq_len", f"--workdir={path}")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=seq_len))
    return dataclasses.replace(trained, config=config)


def _setting(config: Config) -> tuple:
    """What runs must have in common, so that means over them are of seeds."""
    data, train = dataclasses.replace(config.data, cache_dir=""), dataclasses.replace(config.train, seed=0)
    return config.model, config.router, config.cache, config.optimizer, data, train


def main() -> None:
    workdirs, out = [expanded(path) for path in _WORKDIR.value], _OUT.value and expanded(_OUT.value)
    if not workdirs:
        raise ConfigError("--workdir=: a run folder at least is needed")
    if unknown := set(_METHODS.value) - set(METHODS):
        raise ConfigError(f"--methods={unknown.pop()}: one of {', '.join(METHODS)} is needed")
    shares = {"heads": _HEADS.value, "units": _UNITS.value}
    for name, values in shares.items():
        if not all(0 < share <= 1 for share in cli.numbers(name, values, float, "numbers")):
            raise ConfigError(f"--{name}={','.join(values)}: shares above 0 and up to 1 are needed")
    keeps = list(itertools.product(*(map(float, values) for values in shares.values())))
    targets = cli.numbers("targets", _TARGETS.value, float, "numbers")
    biases = cli.numbers("exit_bias", _EXIT_BIAS.value, float, "numbers") if _EXIT_BIAS.value else []
    once = {"methods": _METHODS.value, "targets": targets, "exit_bias": biases}
    once |= {name: list(map(float, values)) for name, values in shares.items()}
    for name, values in once.items():
        if len(set(values)) < len(values):
            raise ConfigError(f"--{name}={','.join(map(str, values))}: each of them once is needed")
    for name, value in (("gate_coef", _GATE_COEF.value), ("learning_rate", _LEARNING_RATE.value)):
        if not math.isfinite(value):
            raise ConfigError(f"--{name}={value}: a number of at least 0 is needed")
    if out and out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out}: not a folder")
    others = peers(expanded(_RESULTS.value)) if _RESULTS.value else []
    runs = {path: load(path, _SEQ_LEN.value) for path in workdirs}
    for path, trained in runs.items():
        if _setting(trained.config) != _setting(runs[workdirs[0]].config):
            raise ConfigError(f"--workdir={path}: of another setting than {workdirs[0]}; means are over seeds alone")
    rows = []
    for path, trained in runs.items():
        config = trained.config
        held_out, train_rows = texts(trained, path, _DATA.value, bool(_METHODS.value))
        if num_rows := -(-_MAX_TOKENS.value // config.train.seq_len):
            held_out = [held_out[row] for row in evenly(len(held_out), num_rows)]
        num_batches = 0 if num_rows else config.eval.num_batches
        study = Study(
            trained=trained,
            held_out=list(eval_batches(held_out, config.train.batch_size, num_batches)),
            train_rows=train_rows,
            train_tokens=_TRAIN_TOKENS.value,
            rank=_RANK.value or max(1, config.model.d_model // 8),
            gate_steps=_GATE_STEPS.value,
            gate_coef=_GATE_COEF.value,
            learning_rate=_LEARNING_RATE.value or config.optimizer.learning_rate / 10,
            repeats=_REPEATS.value,
        )
        rows += study.rows(_METHODS.value, keeps, targets, biases)
    points = over_seeds(rows)
    found = {"workdir": [str(path) for path in workdirs], "points": points, "rows": rows}
    if out:
        out.mkdir(parents=True, exist_ok=True)
        plot_sparsity(points, others, out / "sparsity.png")
        write_whole(out / "sparsity.json", json.dumps(finite(found), indent=1))
    if not _JSON.value:
        _show(points + others)
    print(json.dumps(finite(found)))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_list("workdir", None, "Run folders, of one setting and several seeds.", required=True)
    _METHODS = flags.DEFINE_list("methods", list(METHODS), "Which of them, by commas; empty = none.")
    _HEADS = flags.DEFINE_list("heads", ["1", "0.75"], "Shares of the heads that a token keeps.")
    _UNITS = flags.DEFINE_list("units", ["0.75", "0.5", "0.25"], "Shares of the hidden units that it keeps.")
    _TARGETS = flags.DEFINE_list("targets", ["-100", "-1", "0", "1"], "Of gates: what thresholds are drawn to.")
    _EXIT_BIAS = flags.DEFINE_list("exit_bias", [], "Of runs that exit or skip: added to what they trained.")
    _RANK = flags.DEFINE_integer("rank", 0, "Of DejaVu's predictors; 0 = an eighth of d_model.", lower_bound=0)
    _TRAIN_TOKENS = flags.DEFINE_integer("train_tokens", 32768, "That predictors are trained on.", lower_bound=1)
    _GATE_STEPS = flags.DEFINE_integer("gate_steps", 300, "Training steps of gates.", lower_bound=0)
    _GATE_COEF = flags.DEFINE_float("gate_coef", 0.1, "Of what draws thresholds to their target.", lower_bound=0.0)
    _LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.0, "Of gates; 0 = a tenth of the run's.", lower_bound=0.0)
    _DATA = flags.DEFINE_string("data", None, "Text in place of the held-out split.")
    _MAX_TOKENS = flags.DEFINE_integer(
        "max_tokens", 0, "Held out, all over the text; 0 = config.eval.num_batches, as in training.", lower_bound=0
    )
    _SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Tokens a row; by default as the run has.", lower_bound=2)
    _RESULTS = flags.DEFINE_string("results", None, "What radialnet.results wrote: models to be shown beside.")
    _REPEATS = flags.DEFINE_integer("repeats", 9, "Of timing, of which the median counts; 0 = none.", lower_bound=0)
    _OUT = flags.DEFINE_string("out", None, "A folder for sparsity.json and a plot.")
    _JSON = flags.DEFINE_bool("json", False, "Print the JSON line alone.")
    cli.run(main)
