"""One page of HTML that tells of a run, or of several side by side; it needs no server and no network.

    python -m radialnet.report --workdir=DIR[,DIR2…] [--out=FILE] [--data=PATH] [--max_tokens=N] [--json]

Curves come from metrics.jsonl; depths, layer use, transitions and the coloured text from a forward pass of the newest
checkpoint over held-out text. What can't be shown is said in its place. docs/READING.md tells how to read the page.
With --json the last line of stdout is one JSON object: `report`, the file; `runs`, the figures of each; `missing`.
"""

import collections
import dataclasses
import datetime
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags

from configs import base
from radialnet import cli, page, plots
from radialnet.alarms import HISTORY, alarms
from radialnet.config import Config
from radialnet.environment import read_starts
from radialnet.evaluate import eval_rows
from radialnet.files import finite, write_whole
from radialnet.routes import PART_OF_CHARACTER, Routes, read_routes, transitions
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.trained import load_trained

# Rows of the table of transitions; letters of a run's name in a legend.
_TOP_TRANSITIONS, _LONGEST_NAME = 15, 28


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the page tells of a run."""

    name: str
    folder: RunFolder
    config: Config
    lines: list[dict]
    starts: list[dict]
    routes: Routes | None
    why_no_routes: str

    def of(self, split: str) -> list[dict]:
        """The lines of a split that have figures: those of steps that were all skipped have none."""
        return [line for line in self.lines if line["split"] == split and line.get("bpb") is not None]

    def last(self, split: str) -> dict:
        return (self.of(split) or [{}])[-1]


# What is read


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


# What is shown


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
        page.side_by_side(_curves(runs, missing)),
        page.heading("Depth"),
        *_by_run(runs, (_depth_course, _depth_histogram), missing),
        page.heading("Routes"),
        *_routes_note(runs),
        *_by_run(runs, (partial(_layer_use, most=most), _transitions), missing),
        page.heading("Held-out text by depth"),
        *_text_legend(runs, max_depth),
        *_by_run(runs, (_text,), missing),
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
        has_exits = config.router.is_trained and config.model.min_depth < config.model.max_depth
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
                "their target": f"{config.router.depth_target:g}" if has_exits else None,
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


_CURVES = (
    ("bpb", "bits per byte", False, "Loss in bits per byte of text (bpb); what is far above the rest is cut off."),
    (
        "loss",
        "loss (nats per token)",
        False,
        "Total loss: cross-entropy and the router's terms by their coefficients.",
    ),
    ("route_mi", "route_mi (nats)", True, "What a token's layer tells of the token; 0: routing ignores the input."),
    ("load_entropy", "load_entropy", True, "How evenly layers are used: 1 all alike, 0 a single one."),
)


def _curves(runs: Sequence[Run], missing: list[str]) -> list[str]:
    found = []
    labels = {_short(run.name): run.lines for run in runs}
    for key, label, from_zero, caption in _CURVES:
        if key == "bpb" and all(run.config.data.source == "hops" for run in runs):
            label, caption = "bits per answer", "Loss in bits per answer (bpb: a word counts as a byte)."
        drawn = plots.draw_curves(labels, key, label, from_zero)
        if drawn is None:
            found.append(_missing(missing, f"{label}: no line of metrics.jsonl has a value"))
            continue
        ends = (f"{run.name} {split} {_span(run, split, key)}" for run in runs for split in ("train", "eval"))
        found.append(page.figure(plots.to_svg(drawn, key, label, "; ".join(ends)), caption))
    for run in runs:
        if not run.of("eval"):
            found.append(_missing(missing, f"{run.name}: no held-out figures: none with a finite loss was logged yet"))
    return found


def _span(run: Run, split: str, key: str) -> str:
    values = [line[key] for line in run.of(split) if line.get(key) is not None]
    return f"from {values[0]:.3f} to {values[-1]:.3f}" if values else "has no value"


def _missing(missing: list[str], line: str) -> str:
    missing.append(line)
    return page.paragraph(line + ".", "missing")


Piece = Callable[[Run, str, list[str]], str]


def _by_run(runs: Sequence[Run], pieces: Sequence[Piece], missing: list[str]) -> list[str]:
    """Pieces of one run fill the page together; of several, the same piece of all of them stands side by side."""
    if len(runs) == 1:
        return [page.side_by_side(piece(runs[0], "0", missing) for piece in pieces)]
    return [
        page.side_by_side(
            (page.heading(run.name, level=3) + piece(run, str(number), missing) for number, run in enumerate(runs)),
            least=18,
        )
        for piece in pieces
    ]


def _depth_course(run: Run, number: str, missing: list[str]) -> str:
    if not (train := run.of("train")):
        return _missing(missing, f"{run.name}: depth over training: no line of training with figures yet")
    drawn = plots.draw_depth(train, run.of("eval"))
    told = f"mean depth {_span(run, 'train', 'depth')} layers; at the end {_shares(train[-1]['depth_hist'])}"
    svg = plots.to_svg(drawn, f"depth-{number}", f"Executed depth over training, {run.name}", told)
    return page.figure(svg, "Executed layers per token over training: mean, and share of the tokens at each depth.")


def _shares(share_D: Sequence[float]) -> str:
    return ", ".join(f"{share:.1%} of tokens {depth} layers" for depth, share in enumerate(share_D) if share)


def _depth_histogram(run: Run, number: str, missing: list[str]) -> str:
    line = run.last("eval") or run.last("train")
    if run.routes:
        share_D = run.routes.depth_hist_D()
        where = f"{run.routes.num_tokens:,} held-out tokens, checkpoint of step {run.routes.step:,}"
    elif line:
        share_D = np.asarray(line["depth_hist"])
        where = f"{'held-out' if line['split'] == 'eval' else 'training'} tokens at step {line['step']:,}"
    else:
        return _missing(missing, f"{run.name}: depth histogram: neither a checkpoint nor a line with figures yet")
    drawn = plots.draw_histogram(100 * share_D)
    svg = plots.to_svg(drawn, f"hist-{number}", f"Depth histogram, {run.name}", _shares(share_D.tolist()))
    return page.figure(svg, f"Share of tokens by executed layers; {where}.")


def _routes_note(runs: Sequence[Run]) -> list[str]:
    fixed = [f"{run.name} ({run.config.router.form})" for run in runs if not run.config.router.is_trained]
    return [page.paragraph("Fixed routes, nothing of them is learned: " + ", ".join(fixed) + ".")] if fixed else []


def layer_use(run: Run) -> np.ndarray | None:
    """The share of held-out tokens that execute each layer at each depth step, [T, L]; None where it isn't known."""
    if run.routes:
        return run.routes.use_TL()
    found = run.last("eval").get("load_by_step")
    return None if found is None else np.asarray(found)


def _layer_use(run: Run, number: str, missing: list[str], most: float) -> str:
    use_TL, num_layers = layer_use(run), run.config.model.pool_size
    if use_TL is None:
        return _missing(missing, f"{run.name}: layer use: neither a checkpoint nor an evaluation yet")
    where = f"checkpoint of step {run.routes.step:,}" if run.routes else f"step {run.last('eval')['step']:,}"
    unused = np.flatnonzero(use_TL.sum(0) == 0).tolist()
    told = f"{num_layers - len(unused)} of {num_layers} layers are used"
    told += f"; unused: {', '.join(map(str, unused))}" if unused else ""
    drawn = plots.draw_layers(100 * use_TL, 100 * most)
    svg = plots.to_svg(drawn, f"layers-{number}", f"Layer use by depth step, {run.name}", told)
    header = ("layer", *(f"step {step}" for step in range(len(use_TL))), "of all executions")
    rows = [
        (layer, *(f"{share:.1%}" for share in use_T), f"{use_T.sum() / max(use_TL.sum(), 1e-9):.1%}")
        for layer, use_T in enumerate(use_TL.T)
    ]
    caption = f"Share of held-out tokens that execute each layer at each depth step; {where}. {told}."
    return page.figure(svg, caption) + page.details("The numbers", page.table(header, rows))


def _transitions(run: Run, number: str, missing: list[str]) -> str:
    if not run.routes:
        return _missing(missing, f"{run.name}: transitions: {run.why_no_routes}")
    num_layers, num_tokens = run.config.model.pool_size, run.routes.num_tokens
    counts_FT = transitions(run.routes.layer_TN, num_layers)
    rows = []
    for place in np.argsort(-counts_FT, axis=None, kind="stable")[:_TOP_TRANSITIONS]:
        begin, end = divmod(int(place), num_layers + 1)
        if count := counts_FT[begin, end]:
            names = "start" if begin == 0 else str(begin - 1), "exit" if end == num_layers else str(end)
            rows.append((" → ".join(names), f"{count / num_tokens:.3f}", f"{count / counts_FT[begin].sum():.1%}"))
    told = "; ".join(f"{name}: {share} of those that leave it" for name, _, share in rows[:5])
    drawn = plots.draw_transitions(counts_FT)
    svg = plots.to_svg(drawn, f"transitions-{number}", f"Transitions from layer to layer, {run.name}", told)
    most = page.table(("from → to", "times per token", "of those that leave the first"), rows)
    caption = "Where tokens go from the start and from each layer: a row adds up to 100 %. Empty rows: nobody came."
    return page.figure(svg, caption) + page.details("The most frequent ones", most)


def _text_legend(runs: Sequence[Run], max_depth: int) -> list[str]:
    shown = [token for run in runs if run.routes for token in run.routes.shown]
    if not shown:
        return []
    told = (
        "The stronger the colour behind a token, the more layers it executed. Rest the pointer on a token for its way."
    )
    if any(token.text == PART_OF_CHARACTER for token in shown):
        told += f" {PART_OF_CHARACTER} is a part of a character that a later token completes."
    return [page.paragraph(told), page.depth_legend(max_depth)]


def _text(run: Run, number: str, missing: list[str]) -> str:
    if not run.routes:
        return _missing(missing, f"{run.name}: coloured text: {run.why_no_routes}")
    shown = run.routes.shown
    told = (
        f"{len(shown)} tokens, {np.mean([token.depth for token in shown]):.2f} layers each on average. The model reads "
        f"rows of {run.config.train.seq_len} tokens, each by itself."
    )
    return (
        page.paragraph(told, "faint")
        + page.tokens(shown, f"numbers-{number}")
        + page.details("The way of each token", page.token_table(shown))
    )


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
        _missing(missing, f"{run.name}: its environment is not known: there is no environment.json, or a damaged one")
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


def _short(name: str) -> str:
    """For the legend of a figure, where a dollar would begin a formula and a line before the name hide it."""
    name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return name.replace("$", r"\$").lstrip("_") or "run"


def names_of(workdirs: Sequence[Path]) -> list[str]:
    """The folders' own names; where two are the same, their whole paths."""
    names = [workdir.resolve().name for workdir in workdirs]
    return names if len(set(names)) == len(names) else [str(workdir) for workdir in workdirs]


def main() -> None:
    workdirs = [Path(workdir) for workdir in _WORKDIR.value]
    if not workdirs or len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise ConfigError(f"--workdir={','.join(_WORKDIR.value)}: run folders, each of them once, are needed")
    out = Path(_OUT.value) if _OUT.value else workdirs[0] / "report.html"
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
