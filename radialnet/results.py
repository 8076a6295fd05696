"""Does routing pay? All models of docs/RESULTS.md trained and compared, by one command.

    python -m radialnet.results --workdir=runs/results [--seeds=0,1,2] [--jobs=1] [--out=docs] [--hops=True]

Trains what is missing of `MODELS` (from configs/dense_micro.py) and of the hop task (configs/hops.py), each with every
seed, as `radialnet.sweep` does: the same command again goes on, and finished runs are not trained again. Then writes
RESULTS.json, RESULTS.md and results.png into --out. Exit code 1 when a run failed; nothing is written then.
"""

import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import jax
from absl import flags
from rich.console import Console

from configs import dense_micro, hops
from radialnet import cli
from radialnet.data import prepare
from radialnet.evaluate import evaluate_trained
from radialnet.files import write_whole
from radialnet.grid import Cell, Values, expand, parse_axis
from radialnet.hops import hop_figures
from radialnet.plots import SweepPoint, plot_sweep
from radialnet.run_folder import RunFolder
from radialnet.sweep import EXIT_FAILED_CELLS, command_of, finished, train_grid
from radialnet.trained import load_trained

_DEPTHS: Values = {
    "model.max_depth": 6,
    "model.min_depth": 2,
    "router.exit_warmup_steps": 300,
    "router.depth_ramp_steps": 700,
}
_EXITS: Values = {**_DEPTHS, "router.exit_training": "benefit", "router.explore": 0.05}
_LEARNED: Values = {"router.form": "factored"}
_HASH: Values = {**_LEARNED, "router.prior": "hash", "router.prior_weight": 1000.0, "router.load_coef": 0.0}
# Each is to execute 4 layers per token on average, but where its name says otherwise. What differs from dense_micro.
MODELS: dict[str, Values] = {
    "dense": {},
    "dense, 6 layers": {"model.pool_size": 6, "model.max_depth": 6, "model.min_depth": 6},
    # configs/radial_micro.py.
    "radial": {**_HASH, "model.pool_size": 48, **_EXITS},
    "radial, pool of 24": {**_HASH, "model.pool_size": 24, **_EXITS},
    "radial, pool of 16": {**_HASH, "model.pool_size": 16, **_EXITS},
    "radial, T/2": {**_HASH, "model.pool_size": 48, **_EXITS, "router.depth_target": 3.0},
    "radial, learned routes": {**_LEARNED, "model.pool_size": 24, **_EXITS},
    "radial, learned routes, fixed depth": {**_LEARNED, "model.pool_size": 16},
    "early exit": {"router.form": "early_exit", "model.pool_size": 6, **_EXITS},
    "Mixture-of-Depths": {
        "router.form": "mod",
        "router.estimator": "weighted",
        # All tokens at every other step, a third of them at the steps between: 3 + 3/3 layers.
        "router.capacity": 0.3334,
        "model.pool_size": 6,
        "model.max_depth": 6,
        "model.min_depth": 6,
        "cache.view": "same_step",
    },
    "Mixture-of-Recursions": {
        "router.form": "recursion",
        "router.estimator": "weighted",
        "router.z_coef": 0.02,
        "model.pool_size": 2,
        "model.init": "distinct",
        **_DEPTHS,
    },
    "looped": {"router.form": "cyclic", "model.pool_size": 2, "model.init": "distinct"},
    "random": {"router.form": "random", "model.pool_size": 16},
    "hash": {"router.form": "hash", "model.pool_size": 16},
    "hash, pool of 24": {"router.form": "hash", "model.pool_size": 24},
    "hash, pool of 48": {"router.form": "hash", "model.pool_size": 48},
}
BASELINES = (
    "early exit",
    "Mixture-of-Depths",
    "Mixture-of-Recursions",
    "looped",
    "random",
    "hash",
    "hash, pool of 24",
    "hash, pool of 48",
)
# Added to the trained exit bias (nats that another layer must take off the loss) to read one model at many depths. The
# first one switches exits off.
EXIT_BIASES = (-1e9, -0.1, -0.05, -0.03, -0.02, -0.01, 0.0, 0.01, 0.02, 0.03, 0.05)
# Models of the hop task, by what differs from configs/hops.py.
HOP_MODELS: dict[str, Values] = {
    "hops, radial": {},
    "hops, dense": {"router.form": "sequential", "model.pool_size": 6, "model.min_depth": 6},
}


def cells_of(fields: dict, models: dict[str, Values], seeds: list[Values]) -> dict[str, list[Cell]]:
    """The runs of each model, one for each seed."""
    cells = expand(fields, [list(models.values()), seeds], {})
    return {name: cells[index * len(seeds) : (index + 1) * len(seeds)] for index, name in enumerate(models)}


def summary(rows: list[dict]) -> dict:
    """Mean of each figure over seeds, and the standard deviation of the loss; None for that of a single seed."""
    names = ("ce", "bpb", "depth", "flops_per_token", "load_entropy", "route_mi", "tokens_trained", "seconds")
    losses = [row["ce"] for row in rows]
    spread = statistics.stdev(losses) if len(losses) > 1 else None
    return {**{name: statistics.fmean(row[name] for row in rows) for name in names}, "ce_std": spread}


def mean_curve(curves: list[list[dict]]) -> list[dict]:
    """Means over seeds of what one model reads at each of `EXIT_BIASES`."""
    names = ("ce", "depth", "flops_per_token")
    return [
        {"exit_bias": bias, **{name: statistics.fmean(row[name] for row in rows) for name in names}}
        for bias, rows in zip(EXIT_BIASES, zip(*curves, strict=True), strict=True)
    ]


def layers_saved(curve: list[dict], tolerance: float) -> float:
    """The largest share of executions saved against exits off, at a loss higher by at most `tolerance` of it."""
    off = curve[0]
    return max(1 - row["depth"] / off["depth"] for row in curve if row["ce"] <= (1 + tolerance) * off["ce"])


def figures_of(models: dict[str, dict], curve: list[dict], hop_runs: list[dict]) -> dict[str, float | None]:
    """The figures that users and docs rely on.

    Args:
        models: their summaries.
        curve: `mean_curve` of `radial`.
        hop_runs: the reports of radial networks on the hop task.
    """
    ce = {name: found["ce"] for name, found in models.items()}
    radial, dense = ce["radial"], ce["dense"]
    correlations = [run["spearman"] for run in hop_runs if run["spearman"] is not None]
    return {
        "radial/dense equal depth": radial / dense,
        "depth radial/dense": models["radial"]["depth"] / models["dense"]["depth"],
        "radial learned routes/dense": ce["radial, learned routes"] / dense,
        "radial T÷2/dense T": ce["radial, T/2"] / ce["dense, 6 layers"],
        "layers saved at 0.5 % loss": layers_saved(curve, 0.005),
        "radial/best baseline": radial / min(ce[name] for name in BASELINES),
        "hops spearman": statistics.fmean(correlations) if correlations else None,
        "load entropy": models["radial"]["load_entropy"],
        "route_mi": models["radial"]["route_mi"],
    }


def markdown(result: dict) -> str:
    """docs/RESULTS.md."""
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [
        "# Results",
        "",
        f"    python -m radialnet.results --workdir=runs/results --seeds={seeds.replace(' ', '')}"
        + ("" if result["hops"] else " --hops=False"),
        "",
        f"Written by this command at commit {result['commit']}, {result['date']}; seeds {seeds}; {result['machine']}.",
        "Held-out loss in nats per byte of Python's standard library, means over seeds ± their standard deviation.",
        "Every model is trained with the same optimizer on as many tokens. Depth and FLOPs are what held-out tokens",
        "executed. Minutes are those of the training steps.",
        "",
        "| model | depth | MFLOP per token | loss | against dense | load entropy | route_mi | M tokens | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    dense = result["models"]["dense"]["ce"]
    for name, found in result["models"].items():
        spread = "" if found["ce_std"] is None else f" ± {found['ce_std']:.4f}"
        lines.append(
            f"| {name} | {found['depth']:.2f} | {found['flops_per_token'] / 1e6:.3f} | {found['ce']:.4f}{spread} "
            f"| {100 * (found['ce'] / dense - 1):+.1f} % | {found['load_entropy']:.2f} | {found['route_mi']:.2f} "
            f"| {found['tokens_trained'] / 1e6:.1f} | {found['seconds'] / 60:.0f} |"
        )
    lines += ["", "![Held-out loss against executed FLOPs](results.png)", "", "| figure | |", "|---|---|"]
    lines += [f"| {name} | {'–' if value is None else f'{value:.4f}'} |" for name, value in result["figures"].items()]
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
    if result["hops"]:
        lines += [
            "",
            "## Hop task",
            "",
            "Accuracy and executed depth of the token that answers, by the number of look-ups k (`radialnet.hops`).",
            "",
        ]
    for name, runs in result["hops"].items():
        lines += [f"**{name}**", "", "| k | accuracy | depth |", "|---|---|---|"]
        for at in zip(*(run["by_k"] for run in runs), strict=True):
            accuracy, depth = (statistics.fmean(line[key] for line in at) for key in ("accuracy", "depth"))
            lines.append(f"| {at[0]['k']} | {accuracy:.3f} | {depth:.2f} |")
        lines += ["", f"Mean depth of all tokens {statistics.fmean(run['depth'] for run in runs):.2f}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _read_depths(folder: Path) -> list[dict]:
    trained = load_trained(folder)
    rows = prepare(trained.config, RunFolder(folder)).eval
    return [evaluate_trained(trained, rows, trained.config.model.max_depth, bias) for bias in EXIT_BIASES]


def _hop_report(folder: Path) -> dict:
    trained = load_trained(folder)
    rows = prepare(trained.config, RunFolder(folder)).eval
    return hop_figures(trained, rows, trained.config.model.max_depth, 0.0)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def main() -> None:
    text = ",".join(_SEEDS.value)
    seeds = parse_axis(f"train.seed={text}", dense_micro.get_config().to_dict(), f"--seeds={text}")
    workdir, out, console = Path(_WORKDIR.value), Path(_OUT.value), Console(highlight=False, soft_wrap=True)
    commit, studies = _commit(), {}
    cells_by_file = {"dense_micro": cells_of(dense_micro.get_config().to_dict(), MODELS, seeds)}
    if _HOPS.value:
        cells_by_file["hops"] = cells_of(hops.get_config().to_dict(), HOP_MODELS, seeds)
    # Before anything is trained: what is there already must be of these configs.
    for file, cells in cells_by_file.items():
        finished([cell for runs in cells.values() for cell in runs], workdir / file)
    for file, cells in cells_by_file.items():
        every = [cell for runs in cells.values() for cell in runs]
        commands = [command_of(cell, f"configs/{file}.py", workdir / file) for cell in every]
        rows, num_failed = train_grid(every, commands, workdir / file, _JOBS.value, console)
        lost = [row["cell"] for row in rows if row["ce"] is None]
        for name in lost:
            print(f"error: {name}: its held-out loss is not finite", file=sys.stderr)
        if num_failed or lost:
            sys.exit(EXIT_FAILED_CELLS)
        studies[file] = cells, {row["cell"]: row for row in rows}
    cells, rows = studies["dense_micro"]
    of_model = {name: [rows[cell.name] for cell in runs] for name, runs in cells.items()}
    hop_cells = studies["hops"][0] if _HOPS.value else {}
    hop_runs = {name: [_hop_report(workdir / "hops" / cell.name) for cell in runs] for name, runs in hop_cells.items()}
    models = {name: summary(runs) for name, runs in of_model.items()}
    curve = mean_curve([_read_depths(workdir / "dense_micro" / cell.name) for cell in cells["radial"]])
    result = {
        "figures": figures_of(models, curve, hop_runs.get("hops, radial", [])),
        "models": models,
        "curve": curve,
        "hops": hop_runs,
        "seeds": [seed["train.seed"] for seed in seeds],
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}",
    }
    out.mkdir(parents=True, exist_ok=True)
    points = [
        SweepPoint(name, "", row["flops_per_token"], row["ce"]) for name, runs in of_model.items() for row in runs
    ]
    plot_sweep(points, out / "results.png")
    write_whole(out / "RESULTS.json", json.dumps(result, indent=1) + "\n")
    write_whole(out / "RESULTS.md", markdown(result))
    print(json.dumps(result["figures"]))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go.", required=True)
    _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "config.train.seed of the runs of each model.")
    _JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time.")
    _HOPS = flags.DEFINE_bool("hops", True, "Train the hop task too: two runs of 40 minutes for each seed.")
    _OUT = flags.DEFINE_string("out", "docs", "Where the results are written to.")
    cli.run(main)
