"""What a page shows of a run: curves of training, and depths, layer use, transitions and text by its routes.

Each figure of a run is HTML; what can't be shown goes into `missing`, a line each, and is said in its place.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from radialnet import page, plots
from radialnet.config import Config
from radialnet.routes import PART_OF_CHARACTER, Routes, transitions
from radialnet.run_folder import RunFolder

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


def curves(runs: Sequence[Run], missing: list[str]) -> list[str]:
    """Of all runs, a figure for each of `_CURVES`."""
    found = []
    labels = {label: run.lines for label, run in zip(_labels(runs), runs, strict=True)}
    for key, label, from_zero, caption in _CURVES:
        if key == "bpb" and all(run.config.data.source == "hops" for run in runs):
            label, caption = "bits per answer", "Loss in bits per answer (bpb: a word counts as a byte)."
        drawn = plots.draw_curves(labels, key, label, from_zero)
        if drawn is None:
            found.append(not_shown(missing, f"{label}: no line of metrics.jsonl has a value"))
            continue
        ends = (f"{run.name} {split} {_span(run, split, key)}" for run in runs for split in ("train", "eval"))
        found.append(page.figure(plots.to_svg(drawn, key, label, "; ".join(ends)), caption))
    for run in runs:
        if not run.of("eval"):
            found.append(not_shown(missing, f"{run.name}: no held-out figures: none with a finite loss was logged yet"))
    return found


def _span(run: Run, split: str, key: str) -> str:
    values = [line[key] for line in run.of(split) if line.get(key) is not None]
    return f"from {values[0]:.3f} to {values[-1]:.3f}" if values else "has no value"


def not_shown(missing: list[str], line: str) -> str:
    """Say what can't be shown, in its place and among what is missing."""
    missing.append(line)
    return page.paragraph(line + ".", "missing")


Piece = Callable[[Run, str, list[str]], str]


def by_run(runs: Sequence[Run], pieces: Sequence[Piece], missing: list[str]) -> list[str]:
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


def depth_course(run: Run, number: str, missing: list[str]) -> str:
    """Mean depth, and shares of the depths, by training step.

    Args:
        number: of the run, for ids in the page; so for all figures of one run here.
    """
    if not (train := run.of("train")):
        return not_shown(missing, f"{run.name}: depth over training: no line of training with figures yet")
    drawn = plots.draw_depth(train, run.of("eval"))
    told = f"mean depth {_span(run, 'train', 'depth')} layers; at the end {_shares(train[-1]['depth_hist'])}"
    svg = plots.to_svg(drawn, f"depth-{number}", f"Executed depth over training, {run.name}", told)
    return page.figure(svg, "Executed layers per token over training: mean, and share of the tokens at each depth.")


def _shares(share_D: Sequence[float]) -> str:
    return ", ".join(f"{share:.1%} of tokens {depth} layers" for depth, share in enumerate(share_D) if share)


def depth_histogram(run: Run, number: str, missing: list[str]) -> str:
    """Shares of the depths, of held-out tokens where there are any."""
    line = run.last("eval") or run.last("train")
    if run.routes:
        share_D = run.routes.depth_hist_D()
        where = f"{run.routes.num_tokens:,} held-out tokens, checkpoint of step {run.routes.step:,}"
    elif line:
        share_D = np.asarray(line["depth_hist"])
        where = f"{'held-out' if line['split'] == 'eval' else 'training'} tokens at step {line['step']:,}"
    else:
        return not_shown(missing, f"{run.name}: depth histogram: neither a checkpoint nor a line with figures yet")
    drawn = plots.draw_histogram(100 * share_D)
    svg = plots.to_svg(drawn, f"hist-{number}", f"Depth histogram, {run.name}", _shares(share_D.tolist()))
    return page.figure(svg, f"Share of tokens by executed layers; {where}.")


def layer_use(run: Run) -> np.ndarray | None:
    """The share of held-out tokens that execute each layer at each depth step, [T, L]; None where it isn't known."""
    if run.routes:
        return run.routes.use_TL()
    found = run.last("eval").get("load_by_step")
    return None if found is None else np.asarray(found)


def layer_use_figure(run: Run, number: str, missing: list[str], most: float) -> str:
    """`layer_use` as a heat map, whose darkest colour is the share `most`, and in numbers."""
    use_TL, num_layers = layer_use(run), run.config.model.pool_size
    if use_TL is None:
        return not_shown(missing, f"{run.name}: layer use: neither a checkpoint nor an evaluation yet")
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


def transitions_figure(run: Run, number: str, missing: list[str]) -> str:
    """From which layer to which, and the most frequent ways."""
    if not run.routes:
        return not_shown(missing, f"{run.name}: transitions: {run.why_no_routes}")
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


def text_legend(runs: Sequence[Run], max_depth: int) -> list[str]:
    """What the colours of `text_by_depth` mean; nothing where there is no text."""
    shown = [token for run in runs if run.routes for token in run.routes.shown]
    if not shown:
        return []
    told = (
        "The stronger the colour behind a token, the more layers it executed. Rest the pointer on a token for its way."
    )
    if any(token.text == PART_OF_CHARACTER for token in shown):
        told += f" {PART_OF_CHARACTER} is a part of a character that a later token completes."
    return [page.paragraph(told), page.depth_legend(max_depth)]


def text_by_depth(run: Run, number: str, missing: list[str]) -> str:
    """Held-out text, each token coloured by the layers that it executed."""
    if not run.routes:
        return not_shown(missing, f"{run.name}: coloured text: {run.why_no_routes}")
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


def _labels(runs: Sequence[Run]) -> list[str]:
    """Short names, with a number before them where that leaves two alike."""
    labels = [_short(run.name) for run in runs]
    if len(set(labels)) == len(labels):
        return labels
    return [_short(f"{number} {run.name}") for number, run in enumerate(runs, 1)]


def _short(name: str) -> str:
    """For the legend of a figure, where a dollar would begin a formula and a line before the name hide it."""
    name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return name.replace("$", r"\$").lstrip("_") or "run"
