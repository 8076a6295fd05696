"""One page of HTML that tells of a run, or of several side by side; it needs no server and no network.

    python -m radialnet.report --workdir=DIR[,DIR2…] [--out=FILE] [--data=PATH] [--max_tokens=N] [--json]

Curves come from metrics.jsonl; depths, layer use, transitions and the coloured text from a forward pass of the newest
checkpoint over held-out text. What can't be shown is said in its place. docs/READING.md tells how to read the page.
With --json the last line of stdout is one JSON object: `report`, the file; `runs`, the figures of each; `missing`.
"""

import collections
import datetime
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from absl import flags

from configs import base
from radialnet import cli, page
from radialnet.alarms import HISTORY, alarms
from radialnet.checks import expanded
from radialnet.config import Config
from radialnet.environment import read_starts
from radialnet.evaluate import eval_rows
from radialnet.files import finite, write_whole
from radialnet.routes import read_routes
from radialnet.run_figures import (
    Run,
    by_run,
    curves,
    depth_course,
    depth_histogram,
    layer_use,
    layer_use_figure,
    not_shown,
    text_by_depth,
    text_legend,
    transitions_figure,
)
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.trained import load_trained


def read_run(workdir: Path, name: str, data: str, max_tokens: int) -> Run:
    """Read a run's folder and, where there is a checkpoint and held-out text, the routes of its tokens.

    Raises:
        ConfigError: not a run folder, or its metrics are damaged; or `data` can't be used.
    """
    folder = RunFolder(workdir)
    config, lines = Config.load(folder.config), folder.read_metrics()
    routes, why = None, ""
    try:
        trained = load_trained(workdir)
        routes = read_routes(trained, eval_rows(trained, workdir, data), max_tokens)
    except ConfigError as error:
        if data and folder.has_checkpoint():
            raise
        why = str(error)
    return Run(name, folder, config, lines, read_starts(folder), routes, why)


def report(runs: Sequence[Run]) -> tuple[str, list[str]]:
    """The page, and what is missing on it, in lines."""
    max_depth = max(run.config.model.max_depth for run in runs)
    title = "Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(run.name for run in runs)
    # One scale of each colour for all runs.
    most = max((use_TL.max() for use_TL in map(layer_use, runs) if use_TL is not None), default=0.0)
    missing: list[str] = []
    body = [
        page.table(("", *(run.name for run in runs)), _summary(runs)),
        *_alarms(runs),
        page.heading("Training"),
        page.side_by_side(curves(runs, missing)),
        page.heading("Depth"),
        *by_run(runs, (depth_course, depth_histogram), missing),
        page.heading("Routes"),
        *_routes_note(runs),
        *by_run(runs, (partial(layer_use_figure, most=most), transitions_figure), missing),
        page.heading("Held-out text by depth"),
        *text_legend(runs, max_depth),
        *by_run(runs, (text_by_depth,), missing),
        page.heading("Config"),
        *_configs(runs),
        page.heading("Environment"),
        *_environments(runs, missing),
        page.paragraph(f"Written {_now()} by radialnet.report.", "faint"),
    ]
    return page.page(title, body, max_depth), missing


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _number(value, form: str) -> str | None:
    return None if value is None else format(value, form)


def _summary(runs: Sequence[Run]) -> list[tuple]:
    """Rows of a table: the figures of each run."""
    per_answer = "bits per answer" if all(run.config.data.source == "hops" for run in runs) else "bits per byte"
    columns = []
    for run in runs:
        config, held_out, train = run.config, run.last("eval"), run.last("train")
        step = run.lines[-1]["step"] if run.lines else 0
        columns.append(
            {
                "training steps": f"{step:,} of {config.train.num_steps:,}",
                "tokens trained on": f"{step * config.train.batch_size * config.train.seq_len:,}",
                "evaluated at step": _number(held_out.get("step"), ","),
                f"held-out {per_answer}": _number(held_out.get("bpb"), ".4f"),
                "held-out nats per token": _number(held_out.get("ce"), ".4f"),
                "router": config.router.form + ("" if config.router.is_trained else " (fixed)"),
                "layers in the pool": config.model.pool_size,
                "executed layers per token": _number(held_out.get("depth", train.get("depth")), ".3f"),
                "their bounds": f"{config.model.min_depth} to {config.model.max_depth}",
                "their target": f"{config.router.depth_target:g}" if config.has_exits else None,
                "forward FLOPs per token": _number(held_out.get("flops_per_token"), ",.0f"),
                "route_mi (nats)": _number(held_out.get("route_mi"), ".3f"),
                "load_entropy (1 = all layers alike)": _number(held_out.get("load_entropy"), ".3f"),
                "training tokens per second": _number(train.get("tokens_per_s"), ",.0f"),
                "skipped steps": run.lines[-1].get("skipped_steps") if run.lines else None,
                "newest checkpoint read": run.routes and f"step {run.routes.step:,}",
            }
        )
    return [(name, *(column[name] for column in columns)) for name in columns[0]]


def _alarms(runs: Sequence[Run]) -> list[str]:
    rows = [row for run in runs for row in raised_alarms(run)]
    found = [page.heading("Alarms")]
    if rows:
        header = ("alarm", "run", "from step", "to step", "lines", "at its last line")
        found.append(page.table(header, rows))
    for run in runs:
        if run.folder.non_finite.exists():
            text = f"{run.name}: {run.folder.non_finite} is there: losses or gradients that were not finite."
            found.append(page.paragraph(text, "warn"))
        if run.config.log.alarms == "off":
            found.append(page.paragraph(f"{run.name}: alarms were off (config.log.alarms).", "missing"))
    return found if len(found) > 1 else [*found, page.paragraph("None was raised.")]


def raised_alarms(run: Run) -> list[tuple]:
    """Each alarm of a run's lines: its name, the run, first and last step, number of lines, what it said last."""
    train = [line for line in run.lines if line["split"] == "train"]
    places = collections.defaultdict(list)
    for place, line in enumerate(train):
        for name in line.get("alarms", ()):
            places[name].append(place)
    rows = []
    for name, at in sorted(places.items()):
        told = alarms(run.config, train[max(0, at[-1] + 1 - HISTORY) : at[-1] + 1]).get(name)
        rows.append((name, run.name, train[at[0]]["step"], train[at[-1]]["step"], len(at), told))
    return rows


def _routes_note(runs: Sequence[Run]) -> list[str]:
    fixed = [f"{run.name} ({run.config.router.form})" for run in runs if not run.config.router.is_trained]
    return [page.paragraph("Fixed routes, nothing of them is learned: " + ", ".join(fixed) + ".")] if fixed else []


def _configs(runs: Sequence[Run]) -> list[str]:
    """The fields that differ between runs, or of one run from their defaults; then all of them."""
    configs = [run.config.to_dict() for run in runs]
    rows, differ = [], []
    for section, defaults in base.get_config().to_dict().items():
        for field, default in defaults.items():
            values = [config[section][field] for config in configs]
            if (len(runs) == 1 and values[0] != default) or any(value != values[0] for value in values):
                differ.append(len(rows))
            rows.append((f"{section}.{field}", *(str(value) if value != "" else "''" for value in values), default))
    header = ("field", *(run.name for run in runs), "default")
    told = "differ from their defaults" if len(runs) == 1 else "differ between the runs"
    if differ:
        first = [page.paragraph(f"{len(differ)} of {len(rows)} fields {told}:")]
        first.append(page.table(header, [rows[number] for number in differ]))
    else:
        first = [page.paragraph(f"No fields {told}.")]
    whole = page.table(header, rows, differ)
    return [*first, page.details(f"All fields; ≠ marks those that {told}", whole)]


def _environments(runs: Sequence[Run], missing: list[str]) -> list[str]:
    found = [
        not_shown(missing, f"{run.name}: its environment is not known: there is no environment.json, or a damaged one")
        for run in runs
        if not run.starts
    ]
    known = [run for run in runs if run.starts]
    if not known:
        return found
    columns = [_environment(run.starts) for run in known]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name) for column in columns)) for name in names]
    differ = [number for number, (_, *cells) in enumerate(rows) if len(set(cells)) > 1]
    return [*found, page.table(("", *(run.name for run in known)), rows, differ)]


def _environment(starts: list[dict]) -> dict:
    """By the newest start; of the others, how many there are and when the first one was."""
    newest = {key: value for key, value in starts[-1].items() if not isinstance(value, dict)}
    packages = starts[-1].get("packages")
    first = {"first start": starts[0].get("time"), "starts": len(starts), "last start": newest.pop("time", None)}
    at = {"last start at step": newest.pop("step", None)}
    return first | at | newest | (packages if isinstance(packages, dict) else {})


def names_of(workdirs: Sequence[Path]) -> list[str]:
    """The folders' own names; where two are the same, their whole paths."""
    names = [workdir.resolve().name for workdir in workdirs]
    return names if len(set(names)) == len(names) else [str(workdir) for workdir in workdirs]


def main() -> None:
    workdirs = [expanded(workdir) for workdir in _WORKDIR.value]
    if not workdirs or len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise ConfigError(f"--workdir={','.join(_WORKDIR.value)}: run folders, each of them once, are needed")
    out = expanded(_OUT.value) if _OUT.value else workdirs[0] / "report.html"
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out={out}: a file in a folder that exists is needed")
    names = names_of(workdirs)
    runs = [
        read_run(workdir, name, _DATA.value, _MAX_TOKENS.value) for workdir, name in zip(workdirs, names, strict=True)
    ]
    text, missing = report(runs)
    write_whole(out, text)
    if not _JSON.value:
        for line in missing:
            print(f"not on the page: {line}")
        print(f"{out}: {len(text) / 1e6:.1f} MB, of {', '.join(names)}")
        return
    figures = ("step", "bpb", "ce", "depth", "route_mi", "load_entropy")
    found = [{"name": run.name, **{key: run.last("eval").get(key) for key in figures}} for run in runs]
    print(json.dumps(finite({"report": str(out), "runs": found, "missing": missing})))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_list("workdir", None, "The run folder, or several by commas.", required=True)
    _OUT = flags.DEFINE_string("out", "", "The file; report.html in the first run's folder by default.")
    _DATA = flags.DEFINE_string("data", "", "A folder of text or a .jsonl file in place of the held-out split.")
    _MAX_TOKENS = flags.DEFINE_integer(
        "max_tokens", 16_384, "Held-out tokens whose routes are read.", lower_bound=1, upper_bound=2**24
    )
    _JSON = flags.DEFINE_bool("json", False, "Print one JSON line alone.")
    cli.run(main)
