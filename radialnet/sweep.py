"""Quality against compute: a grid of runs, or one trained model at many depths and exit biases.

    python -m radialnet.sweep --config=FILE --workdir=DIR [--config.a.b=…] [--max_depth=2,4,8] [--target_depth=2,3]
                              [--seeds=0,1,2] [--set=section.field=a,b]… [--jobs=1] [--print] [--json]
    python -m radialnet.sweep --workdir=RUN [--max_depth=2,3,4] [--exit_bias=-1,0,1] [--json]

The first form trains every cell of the grid by `train.py`, in a folder of its own under DIR; the same command again
goes on and leaves finished cells as they are. Each `--set` is an axis of the grid. Fields that change together are
joined by a plus: `--set=router.form=random,router.form=factored+router.load_coef=0.1`. No value has a comma in it.

The second form trains nothing: RUN is the folder of a run. Both write `sweep.csv`, `sweep.json` and `sweep.png` into
the folder, a row for every cell that is finished; with --json the last line of stdout is the list of the rows.

On a cluster, `--print > commands` writes a command a line. When all of them ran, the same without --print collects:

    sbatch --array=1-9 --wrap='eval "$(sed -n ${SLURM_ARRAY_TASK_ID}p commands)"'

Exit codes: 0 done, 1 some cells failed (a line each on stderr), 2 bad configuration or input, nothing was trained.
"""

import csv
import io
import itertools
import json
import os
import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from radialnet import cli
from radialnet.checks import expanded
from radialnet.comparisons import SweepPoint, plot_sweep
from radialnet.config import Config
from radialnet.files import finite, write_whole
from radialnet.grid import Cell, expand, joined, parse_axis
from radialnet.jobs import run_all
from radialnet.run_folder import RunFolder, is_committed, saved_steps
from radialnet.sections import ConfigError

EXIT_FAILED_CELLS = 1
# What a row takes from a held-out evaluation.
FIGURES = ("ce", "bpb", "depth", "load_entropy", "route_mi", "flops_per_token")


# A grid of runs


def command_of(cell: Cell, config_file: str, workdir: Path) -> list[str]:
    """The plain command that trains a cell, from this folder."""
    train = os.path.relpath(Path(__file__).parents[1] / "train.py")
    overrides = [f"--config.{field}={value}" for field, value in cell.overrides.items()]
    return [sys.executable, train, f"--config={config_file}", f"--workdir={workdir / cell.name}", *overrides]


def _is_saved(checkpoints: Path, step: int) -> bool:
    if saved := saved_steps(checkpoints):
        return step in saved
    # Of before there were checksums; or who took all checkpoints away doesn't want the cell trained again.
    return is_committed(checkpoints / str(step)) or not (checkpoints.exists() and any(checkpoints.iterdir()))


def row_of(cell: Cell, folder: RunFolder) -> dict | None:
    """The row of a finished cell; None while the evaluation after its last step is missing, or that step isn't saved.

    `seconds` and `tokens_per_s` are those of its training steps: no compilation, evaluation or saving.
    """
    lines, train = folder.read_metrics(), cell.config.train
    held_out = [line for line in lines if line["split"] == "eval" and line["step"] == train.num_steps]
    if not (held_out and _is_saved(folder.checkpoints, train.num_steps)):
        return None
    seconds, before = 0.0, 0
    for line in lines:
        if line["split"] == "train":
            seconds += (line["step"] - before) * line["step_ms"] / 1e3
            before = line["step"]
    tokens = train.num_steps * train.batch_size * train.seq_len
    return {
        "cell": cell.name,
        **{field: value for field, value in cell.swept.items() if field != "train.seed"},
        "seed": train.seed,
        "step": train.num_steps,
        "tokens_trained": tokens,
        **{name: held_out[-1][name] for name in FIGURES},
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }


def check_same(cell: Cell, folder: RunFolder) -> None:
    """Raise ConfigError where the run in the folder had another config: its figures are not those of the cell."""
    before, now = Config.load(folder.config).to_dict(), cell.config.to_dict()
    for section, name in ((section, name) for section, fields in now.items() for name in fields):
        old, new = before[section][name], now[section][name]
        if old != new and (section, name) != ("data", "cache_dir"):
            raise ConfigError(
                f"config.{section}.{name}={new!r}, but the run in {folder.root} has {old!r}; take a new --workdir"
            )


def finished(cells: list[Cell], workdir: Path) -> dict[str, dict | None]:
    """The row of each cell by its name, None for those that are to be trained.

    Raises:
        ConfigError: a cell was trained, in part at least, with another config.
    """
    rows = {cell.name: row_of(cell, RunFolder(workdir / cell.name)) for cell in cells}
    for cell in cells:
        if (folder := RunFolder(workdir / cell.name)).config.exists():
            check_same(cell, folder)
    return rows


def train_grid(
    cells: list[Cell],
    commands: list[list[str]],
    workdir: Path,
    jobs: int,
    console: Console,
) -> tuple[list[dict], int]:
    """Train the cells that are not finished. Returns the rows of all that are, and how many failed.

    Args:
        commands: of each cell.
        jobs: cells trained at a time.

    Raises:
        ConfigError: a finished cell was trained with another config; nothing was trained then.
    """
    folders = {cell.name: RunFolder(workdir / cell.name) for cell in cells}
    rows = finished(cells, workdir)
    logs = {folders[cell.name].root / "train.log": cell for cell in cells}
    waiting = {log: line for (log, cell), line in zip(logs.items(), commands, strict=True) if not rows[cell.name]}

    num_failed = 0

    def write() -> list[dict]:
        done = [(cell, rows[cell.name]) for cell in cells if rows[cell.name]]
        write_sweep(workdir, [row for _, row in done], [(cell.series, cell.depth) for cell, _ in done])
        return [row for _, row in done]

    def on_start(log: Path) -> None:
        console.print(f"{logs[log].name}: training, its output is in {log}")

    def on_end(log: Path, code: int) -> None:
        nonlocal num_failed
        cell = logs[log]
        rows[cell.name] = row_of(cell, folders[cell.name])
        if code or not rows[cell.name]:
            num_failed += 1
            print(f"error: cell {cell.name}: ended with exit code {code}, see {log}", file=sys.stderr)
        else:
            console.print(f"{cell.name}: done")
        write()

    console.print(f"{workdir}: {len(cells) - len(waiting)} of {len(cells)} cells are done")
    run_all(waiting, jobs, on_start, on_end)
    return write(), num_failed


def _grid() -> list[Cell]:
    fields = cli.config_fields(_CONFIG)

    def of_flag(name: str, field: str) -> list[tuple[str, str]]:
        values = flags.FLAGS[name].value
        return [] if values is None else [(f"--{name}={','.join(values)}", f"{field}={','.join(values)}")]

    said = [
        *of_flag("max_depth", "model.max_depth"),
        *of_flag("target_depth", "router.depth_target"),
        *((f"--set={text}", text) for text in _SET.value),
        *of_flag("seeds", "train.seed"),
    ]
    axes = [parse_axis(text, fields, flag) for flag, text in said]
    return expand(fields, axes, config_flags.get_override_values(flags.FLAGS["config"]))


# One trained model


def read_run(workdir: Path, console: Console) -> list[dict]:
    """Evaluate the newest checkpoint of a run at every max depth and exit bias asked for. Returns the rows.

    `exit_bias_added` is what was asked for, `exit_bias` what the model ran with; `tokens_per_s` is of evaluation.
    """
    counted = "whole numbers, by commas,"
    max_depths = _MAX_DEPTH.value and cli.numbers("max_depth", _MAX_DEPTH.value, int, counted)
    exit_biases = cli.numbers("exit_bias", _EXIT_BIAS.value or ["0"], float, "numbers, by commas,")
    # Here, for training a grid needs no jax in this process.
    from radialnet.data import prepare
    from radialnet.evaluate import evaluate_trained
    from radialnet.trained import load_trained

    trained = load_trained(workdir)
    train, held_out = trained.config.train, prepare(trained.config, RunFolder(workdir)).eval
    rows, labels = [], []
    for exit_bias, max_depth in itertools.product(exit_biases, max_depths or [trained.config.model.max_depth]):
        found = evaluate_trained(trained, held_out, max_depth, exit_bias)
        name = joined({"max_depth": max_depth, "exit_bias_added": exit_bias})
        row = {
            "cell": name,
            "max_depth": max_depth,
            "exit_bias_added": exit_bias,
            "exit_bias": found["exit_bias"],
            "seed": train.seed,
            "step": found["step"],
            "tokens_trained": found["step"] * train.batch_size * train.seq_len,
            **{key: found[key] for key in FIGURES},
            "tokens_per_s": found["tokens_per_s"],
        }
        rows.append(finite(row))
        labels.append((f"exit bias {exit_bias:+g}", f"T={max_depth}"))
        console.print(f"{name}: bpb {row['bpb']:.4f}")
    write_sweep(workdir, rows, labels)
    return rows


# What comes out


def write_sweep(workdir: Path, rows: list[dict], labels: list[tuple[str, str]]) -> None:
    """Write the rows as CSV and JSON, and the plot; nothing without any row.

    Args:
        labels: of each row, its series in the plot and its depth.
    """
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(workdir / "sweep.csv", text.getvalue())
    write_whole(workdir / "sweep.json", json.dumps(rows, indent=1) + "\n")
    # A run whose last losses were not finite has no place in the plot.
    shown = [(row, label) for row, label in zip(rows, labels, strict=True) if row["ce"] is not None]
    points = [SweepPoint(series, depth, row["flops_per_token"], row["ce"]) for row, (series, depth) in shown]
    if points:
        plot_sweep(points, workdir / "sweep.png")


def show(rows: list[dict], console: Console) -> None:
    """Print the table for people."""
    formats = {"ce": ".4f", "bpb": ".4f", "depth": ".3f", "load_entropy": ".3f", "route_mi": ".3f"}
    formats |= {"flops_per_token": ",.0f", "tokens_per_s": ",.0f"}
    table = Table()
    table.add_column("cell", overflow="fold")
    for name in formats:
        table.add_column(name, justify="right")
    for row in rows:
        shown = ("–" if row[name] is None else format(row[name], formats[name]) for name in formats)
        table.add_row(row["cell"], *shown)
    console.print(table, soft_wrap=False)


def _check_flags() -> None:
    """Raise ConfigError where flags of both forms are mixed."""
    trains = flags.FLAGS["config"].present
    for name in ("exit_bias",) if trains else ("target_depth", "seeds", "set", "jobs", "print"):
        if flags.FLAGS[name].present:
            why = "with --config: it reads a trained run" if trains else "without --config: it is for training a grid"
            raise ConfigError(f"--{name} {why}; without --config, --workdir is the run to read")
    if not trains and not (flags.FLAGS["max_depth"].present or flags.FLAGS["exit_bias"].present):
        raise ConfigError("--config is missing; without it --max_depth or --exit_bias says where to read a trained run")
    if _JOBS.value < 1:
        raise ConfigError(f"--jobs={_JOBS.value}: at least 1 is needed")


def main() -> None:
    _check_flags()
    workdir = expanded(_WORKDIR.value)
    stream = sys.stderr if _JSON.value else sys.stdout
    width = None if stream.isatty() else 160
    console = Console(file=stream, width=width, highlight=False, markup=False, soft_wrap=True)
    if not flags.FLAGS["config"].present:
        rows, num_failed = read_run(workdir, console), 0
    else:
        cells = _grid()
        config_file = config_flags.get_config_filename(flags.FLAGS["config"])
        commands = [command_of(cell, config_file, workdir) for cell in cells]
        if _PRINT.value:
            print("\n".join(map(shlex.join, commands)))
            return
        rows, num_failed = train_grid(cells, commands, workdir, _JOBS.value, console)
    show(rows, console)
    if _JSON.value:
        print(json.dumps(rows))
    if num_failed:
        sys.exit(EXIT_FAILED_CELLS)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, to train a grid.", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go; without --config a run folder.", required=True)
    _MAX_DEPTH = flags.DEFINE_list(
        "max_depth",
        None,
        "config.model.max_depth. Takes along what is not set itself: exits that are off stay off, min_depth, "
        "depth_target and num_groups are lowered to it, the pool of a dense run is as large. Without --config: depths "
        "to read at.",
    )
    flags.DEFINE_list("target_depth", None, "config.router.depth_target.")
    flags.DEFINE_list("seeds", None, "config.train.seed.")
    _SET = flags.DEFINE_multi_string("set", [], "An axis of the grid, as written above; may be given several times.")
    _EXIT_BIAS = flags.DEFINE_list("exit_bias", None, "Added to the exit bias of a trained run.")
    _JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time. Leave it at 1 where they would share an accelerator.")
    _PRINT = flags.DEFINE_bool("print", False, "Print the command of each cell and do nothing.")
    _JSON = flags.DEFINE_bool("json", False, "Print the rows as one line of JSON on stdout, all else on stderr.")
    cli.run(main)
