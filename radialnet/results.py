"""Does routing pay? All models of docs/RESULTS.md trained and compared, by one command.

    python -m radialnet.results --workdir=runs/results [--seeds=0,1,2] [--model=radial] [--jobs=1] [--out=docs]

Trains what is missing of the models of `study` (from configs/dense_micro.py, dense_mini.py and hops.py), each with
every seed, as `radialnet.sweep` does: the same command again goes on, and finished runs are not trained again. Then
adds their figures to RESULTS.json in --out, and writes RESULTS.md of all runs in it and results.png of the first
table. So a study may be made in parts, on several days or machines; runs of another config than today's are left out.
The models of a table are trained on one text, the library of one version of Python: exit code 2 where they would not
be. 1 when a run failed; nothing is written then.
"""

import datetime
import json
import platform
import re
import statistics
import sys
from pathlib import Path

import jax
from absl import flags
from rich.console import Console

from configs import dense_micro, dense_mini, hops
from radialnet import cli
from radialnet.checks import expanded
from radialnet.comparisons import SweepPoint, plot_sweep
from radialnet.data import prepare
from radialnet.environment import read_starts
from radialnet.evaluate import evaluate_trained
from radialnet.files import write_whole
from radialnet.grid import Cell, Values, parse_axis
from radialnet.hops import hop_figures
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.study import (
    ALL_MODELS,
    CURVE_FIGURES,
    EXIT_BIASES,
    FIGURES,
    FOUR_MODELS,
    HOP_MODELS,
    MINI_MODELS,
    MODELS,
    NOT_DRAWN,
    RATE_MODELS,
    TABLES,
    Table,
    cells_of,
    figures_of,
    loss_ratio,
    mean_curve,
    merged,
    settings_of,
    summary,
)
from radialnet.sweep import EXIT_FAILED_CELLS, command_of, finished, train_grid
from radialnet.trained import load_trained


def _table(table: Table, result: dict) -> list[str]:
    """A section for the models of a table; nothing where none of them was trained."""
    models = {name: found for name, found in result["models"].items() if name in table.models}
    if not models:
        return []
    runs = [run for run in result["runs"] if run["model"] in models]
    where = sorted({f"Python {run['python']}, {run['device']}" for run in runs})
    lines = ["", f"## {table.title}", "", f"{table.said} Trained with {'; '.join(where)}.", ""]
    lines += [
        f"| model | seeds | depth | MFLOP / token | loss | against {table.dense} "
        "| load entropy | route_mi | M tokens | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in models.items():
        spread = "" if found["ce_std"] is None else f" ± {found['ce_std']:.4f}"
        ratio = loss_ratio(found, models[table.dense]) if table.dense in models else None
        against = "–" if ratio is None else f"{100 * (ratio - 1):+.1f} %"
        lines.append(
            f"| {name} | {', '.join(found['ce_by_seed'])} | {found['depth']:.2f} "
            f"| {found['flops_per_token'] / 1e6:.3f} | {found['ce']:.4f}{spread} | {against} "
            f"| {found['load_entropy']:.2f} | {found['route_mi']:.2f} "
            f"| {found['tokens_trained'] / 1e6:.1f} | {found['seconds'] / 60:.0f} |"
        )
    return lines


def markdown(result: dict) -> str:
    """docs/RESULTS.md."""
    lines = [
        "# Results",
        "",
        '    python -m radialnet.results --workdir=runs/results --seeds=… [--model="…"]',
        "",
        f"Written by this command, which adds its runs to those before; last on {result['date']}, {result['machine']}.",
        f"Commits of the runs: {', '.join(sorted({run['commit'] for run in result['runs']}))}.",
        "Held-out loss in nats per token of Python's standard library, means over seeds ± their standard deviation;",
        "one model against another by the seeds that both have. Depth and FLOPs are what held-out tokens executed.",
        "Minutes are those of the training steps, on a device that others may have shared.",
    ]
    if any(name in MODELS for name in result["models"]):
        drawn = "bytes, but for random routes and radial networks that are not pulled"
        lines += ["", f"![Held-out loss against executed FLOPs: {drawn}](results.png)"]
    for table in TABLES:
        lines += _table(table, result)
    lines += [
        "",
        "## Figures",
        "",
        "a/b is a ratio of losses, but for the depth. Hops are at a learning rate of 4e-3, all else at 6e-3.",
        "The best baseline is the best of the other ways to route in the same table.",
        "",
    ]
    lines += ["| figure | |", "|---|---|"]
    lines += [f"| {name} | {'–' if value is None else f'{value:.4f}'} |" for name, value in result["figures"].items()]
    if result["curve"]:
        lines += [
            "",
            "## One model, many depths",
            "",
            "The model `radial`, read with other exit biases than the trained one (+0.00).",
            "",
            "| exit bias | depth | MFLOP per token | loss |",
            "|---|---|---|---|",
        ]
    lines += [
        f"| {'off' if row['exit_bias'] < -1 else format(row['exit_bias'], '+.2f')} | {row['depth']:.2f} "
        f"| {row['flops_per_token'] / 1e6:.3f} | {row['ce']:.4f} |"
        for row in result["curve"]
    ]
    hop_runs = {name: [run for run in result["runs"] if run["model"] == name] for name in HOP_MODELS}
    if any(hop_runs.values()):
        lines += [
            "",
            "## Hop task",
            "",
            "Accuracy and executed depth of the token that answers, by the number of look-ups k (`radialnet.hops`).",
            "Depth counts layers of the pool; those of a prelude are not in it.",
            "",
        ]
    for name, runs in hop_runs.items():
        if not runs:
            continue
        lines += [f"**{name}**", "", "| k | accuracy | depth |", "|---|---|---|"]
        for at in zip(*(run["hops"]["by_k"] for run in runs), strict=True):
            accuracy, depth = (statistics.fmean(line[key] for line in at) for key in ("accuracy", "depth"))
            lines.append(f"| {at[0]['k']} | {accuracy:.3f} | {depth:.2f} |")
        depth = statistics.fmean(run["hops"]["depth"] for run in runs)
        lines += ["", f"Mean depth of all tokens {depth:.2f}; seeds {', '.join(str(run['seed']) for run in runs)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _read_depths(folder: Path) -> list[dict]:
    trained = load_trained(folder)
    rows = prepare(trained.config, RunFolder(folder)).eval
    max_depth = trained.config.model.max_depth
    found = [evaluate_trained(trained, rows, max_depth, bias) for bias in EXIT_BIASES]
    return [{name: figures[name] for name in CURVE_FIGURES} for figures in found]


def _hop_report(folder: Path) -> dict:
    trained = load_trained(folder)
    rows = prepare(trained.config, RunFolder(folder)).eval
    return hop_figures(trained, rows, trained.config.model.max_depth, 0.0)


def trained_with(folder: RunFolder) -> dict[str, str]:
    """Commit, Python (whose library is the text) and device of a run; several where it went on elsewhere."""
    starts = read_starts(folder)
    told = {
        name: " and ".join(dict.fromkeys(start.get(name) or "unknown" for start in starts)) or "unknown"
        for name in ("commit", "python", "device")
    }
    return {**told, "commit": re.sub(r"\b([0-9a-f]{7})[0-9a-f]+", r"\1", told["commit"])}


def check_texts(runs: list[dict]) -> None:
    """Raise ConfigError where models that are compared were trained on the libraries of several versions of Python."""
    for table in TABLES:
        first, *others = [run for run in runs if run["model"] in table.models] or [None]
        for run in others:
            if run["python"] != first["python"]:
                one, other = (f"{at['model']}, seed {at['seed']} (Python {at['python']})" for at in (first, run))
                raise ConfigError(f"{one} and {other} know another text, each its Python's library; take another --out")


def earlier_runs(path: Path, settings: dict[str, dict]) -> list[dict]:
    """The runs in a RESULTS.json that are of today's settings; the others are told.

    Args:
        settings: `settings_of` each model.
    """
    if not path.exists():
        return []
    try:
        runs = json.loads(path.read_text())["runs"]
        names = [f"{run['model']}, seed {run['seed']}" for run in runs]
        kept = [run for run in runs if settings.get(run["model"]) == run["settings"]]
        check_texts(kept)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{path}: not what this command has written; take another --out") from None
    for name, run in zip(names, runs, strict=True):
        if run not in kept:
            cli.warn(f"{path}: {name}: was trained with another config and is left out")
    return kept


# By the name of a config file: the file, and the models that differ from it.
STUDIES = {
    "dense_micro": (dense_micro, MODELS | RATE_MODELS),
    "dense_mini": (dense_mini, MINI_MODELS | FOUR_MODELS),
    "hops": (hops, HOP_MODELS),
}


def _studied(fields: dict, models: dict[str, Values], seeds: list[Values]) -> tuple[dict[str, list[Cell]], dict]:
    """The cells of the models that were asked for, and the settings of all."""
    asked = {name: values for name, values in models.items() if not _MODEL.value or name in _MODEL.value}
    all_cells = cells_of(fields, models, seeds[:1])
    return cells_of(fields, asked, seeds), {name: settings_of(cells[0]) for name, cells in all_cells.items()}


def main() -> None:
    text = ",".join(_SEEDS.value)
    seeds = parse_axis(f"train.seed={text}", dense_micro.get_config().to_dict(), f"--seeds={text}")
    workdir, out, console = expanded(_WORKDIR.value), expanded(_OUT.value), Console(highlight=False, soft_wrap=True)
    cells, settings, asked = {}, {}, []
    for name in _MODEL.value or []:
        if name not in ALL_MODELS:
            raise ConfigError(f"--model={name}: one of {'; '.join(ALL_MODELS)} is needed")
    for file, (config, models) in STUDIES.items():
        cells[file], known = _studied(config.get_config().to_dict(), models, seeds)
        settings |= known
        # Before anything is trained: what is there already must be of these configs.
        rows = finished([cell for runs in cells[file].values() for cell in runs], workdir / file)
        for name, of_model in cells[file].items():
            for cell in of_model:
                run = {"model": name, "seed": cell.config.train.seed, "python": platform.python_version()}
                asked.append(run | (trained_with(RunFolder(workdir / file / cell.name)) if rows[cell.name] else {}))
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out}: not a folder")
    before, runs = earlier_runs(out / "RESULTS.json", settings), []
    check_texts(merged(before, asked))
    for file, models in cells.items():
        every = [cell for of_model in models.values() for cell in of_model]
        if not every:
            continue
        commands = [command_of(cell, f"configs/{file}.py", workdir / file) for cell in every]
        rows, num_failed = train_grid(every, commands, workdir / file, _JOBS.value, console)
        lost = [row["cell"] for row in rows if row["ce"] is None]
        for name in lost:
            print(f"error: {name}: its held-out loss is not finite", file=sys.stderr)
        if num_failed or lost:
            sys.exit(EXIT_FAILED_CELLS)
        found = {row["cell"]: row for row in rows}
        for name, of_model in models.items():
            for cell in of_model:
                run = {"model": name, "seed": cell.config.train.seed, "settings": settings[name]}
                run |= trained_with(RunFolder(workdir / file / cell.name))
                run |= {figure: found[cell.name][figure] for figure in FIGURES}
                if name == "radial":
                    run["curve"] = _read_depths(workdir / file / cell.name)
                if file == "hops":
                    run["hops"] = _hop_report(workdir / file / cell.name)
                runs.append(run)
    runs = merged(before, runs)
    check_texts(runs)
    write_results(runs, out)


def write_results(runs: list[dict], out: Path) -> None:
    """RESULTS.json and RESULTS.md of all runs, results.png of the first table, and a line of figures on stdout."""
    by_model = {name: [run for run in runs if run["model"] == name] for name in ALL_MODELS}
    models = {name: summary(by_model[name]) for table in TABLES for name in table.models if by_model[name]}
    curves = [run["curve"] for run in by_model["radial"]]
    curve = mean_curve(curves) if curves else []
    result = {
        "figures": figures_of(models, curve, by_model["hops, radial"]),
        "models": models,
        "curve": curve,
        "runs": runs,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}",
    }
    out.mkdir(parents=True, exist_ok=True)
    drawn = [name for name in MODELS if name not in NOT_DRAWN]
    points = [SweepPoint(name, "", run["flops_per_token"], run["ce"]) for name in drawn for run in by_model[name]]
    if points:
        plot_sweep(points, out / "results.png")
    write_whole(out / "RESULTS.json", json.dumps(result, indent=1) + "\n")
    write_whole(out / "RESULTS.md", markdown(result))
    print(json.dumps(result["figures"]))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go.", required=True)
    _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "config.train.seed of the runs of each model.")
    _MODEL = flags.DEFINE_multi_string(
        "model", None, "A model to train; may be given again. All by default: 17 hours a seed."
    )
    _JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1)
    _OUT = flags.DEFINE_string("out", "docs", "Where the results are written to, and added to.")
    cli.run(main)
