"""Plots of a run, from its metrics.jsonl alone, and of the routes of its tokens."""

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# The hue of amounts, from nothing to all of it: the more, the less of the background is seen through it. So it can be
# read on white and on black, and told apart in grey as well.
AMOUNT = "#1a5fb4"
# Of runs, or of training and held out. Told apart by their lines and markers as well.
SERIES = ("#1f77b4", "#d95f02", "#2a8c3f", "#b3369b", "#8c6d1f", "#7a7a7a")
# One more than colours, so that no two of many series look the same.
MARKERS = "osD^vPX<>*h"
# Inches. At its own size a figure of this width goes onto a phone.
SIZE = (5.2, 3.4)

# The files of `plot_run`.
RUN_PLOTS = ("loss.png", "depth.png", "layers.png")


def plot_run(lines: list[dict], folder: Path) -> list[Path]:
    """Draw loss, depth and layer use into `folder` and return the files.

    Args:
        lines: of metrics.jsonl. Without a figure in either split nothing is drawn.
    """
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    # Lines of skipped steps have no figures.
    lines = [line for line in lines if line["bpb"] is not None]
    train = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "eval"]
    if not train or not held_out:
        return []
    loss = draw_curves({"": lines}, "bpb", "bits per byte")
    loss.axes[0].set_title("Loss")
    depth = draw_depth(train, held_out)
    depth.axes[0].set_title("Executed depth")
    layers = draw_layers(100 * np.asarray(held_out[-1]["load_by_step"]))
    layers.axes[0].set_title(f"Where held-out tokens are routed, step {held_out[-1]['step']}")
    for name, figure in zip(RUN_PLOTS, (loss, depth, layers), strict=True):
        save(plt, figure, folder / name, dpi=170)
    return [folder / name for name in RUN_PLOTS]


# Tokens in a line of a trace, and characters of one: what can still be read.
_TRACE_WIDTH, _TRACE_CHARACTERS = 48, 10


def plot_trace(texts: list[str], layer_ST: np.ndarray, num_layers: int, path: Path, first_new: int) -> None:
    """Draw the way of each token: depth steps upwards, the layer in each cell, tokens in lines from left to right.

    Args:
        texts: of the S tokens.
        layer_ST: the layer that each executed at each depth step; negative for none.
        num_layers: L.
        first_new: where the tokens of the prompt end.
    """
    plt = pyplot()
    num_tokens, max_depth = layer_ST.shape
    width = min(num_tokens, _TRACE_WIDTH)
    num_lines = -(-num_tokens // width)
    figure, lines = plt.subplots(
        num_lines,
        1,
        figsize=(1.8 + 0.27 * width, num_lines * (1.1 + 0.27 * max_depth) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    colours = plt.get_cmap("turbo", num_layers)
    for line, axes in enumerate(lines[:, 0]):
        first = line * width
        part_ST = layer_ST[first : first + width]
        shown_TS = np.full((max_depth, width), np.nan)
        shown_TS[:, : len(part_ST)] = np.where(part_ST >= 0, part_ST, np.nan).T
        image = axes.imshow(shown_TS, cmap=colours, vmin=-0.5, vmax=num_layers - 0.5, origin="lower", aspect="auto")
        for (step, place), layer in np.ndenumerate(shown_TS):
            if not np.isnan(layer):
                red, green, blue, _ = colours(int(layer))
                # Black or white, by the brightness of what is below.
                colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
                axes.text(place, step, int(layer), ha="center", va="center", fontsize=6.5, color=colour)
        if first < first_new <= first + width:
            axes.axvline(first_new - first - 0.5, color="black", linewidth=1.5)
        labels = [_shown(text) for text in texts[first : first + width]]
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8, family="monospace", parse_math=False)
        axes.set(yticks=range(max_depth), ylabel="depth step", xlim=(-0.5, width - 0.5))
        axes.grid(False)
    ticks = np.unique(np.linspace(0, num_layers - 1, min(num_layers, 12)).astype(int))
    figure.colorbar(image, ax=list(lines[:, 0]), label="layer", ticks=ticks, fraction=0.03, pad=0.01)
    depth = (layer_ST >= 0).sum(1)
    figure.suptitle(
        f"Way of each token through the pool: {depth.mean():.2f} layers on average. "
        f"Black line: the end of the prompt ({first_new} tokens)",
        fontsize=10,
    )
    save(plt, figure, path)


def _shown(text: str) -> str:
    """A token's text, its white space visible."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text.replace(" ", "·"))
    return text if len(text) <= _TRACE_CHARACTERS else text[: _TRACE_CHARACTERS - 1] + "…"


def pyplot():
    # Here, for it takes a second to import. Agg: no display is needed.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}
    )
    return plt


def save(plt, figure, path: Path, dpi: int = 130) -> None:
    # Aside, so that a kill leaves the old picture or the new one.
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=dpi, bbox_inches="tight", format="png")
    partial.replace(path)
    plt.close(figure)


def to_svg(figure, name: str, title: str, description: str) -> str:
    """A figure as an SVG to be put into a page of HTML, with the page's colours; the figure is closed.

    Args:
        name: what its ids begin with: no other figure of the page may have the same.
        title, description: for those who don't see it.
    """
    plt, file = pyplot(), io.StringIO()
    # Text as text. The salt makes the file the same each time.
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}
    with plt.rc_context(style):
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", dpi=100)
    plt.close(figure)
    drawn = file.getvalue()
    # A style of an SVG would hold for the whole page, and its metadata are of no use to a reader.
    drawn = re.sub(r"<(metadata|style)\b.*?</\1>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    head, drawn = drawn.split(">", 1)
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r'xlink:href="(#?)', lambda found: f'href="#{name}-' if found[1] else 'href="', drawn)
    drawn = drawn.replace("url(#", f"url(#{name}-").replace("#000000", "currentColor")
    for name_of_colour, colour in (("amount", AMOUNT), *((f"series-{n}", colour) for n, colour in enumerate(SERIES))):
        drawn = drawn.replace(colour, f"var(--{name_of_colour})")
    width, box = (re.search(rf' {key}="([^"]+)"', head)[1] for key in ("width", "viewBox"))
    return (
        f'<svg role="img" aria-labelledby="{name}-title {name}-description" viewBox="{box}" style="--width: {width}">'
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-description">{html.escape(description)}</desc>{drawn.strip()}'
    )


def _series(lines: Sequence[dict], key: str) -> np.ndarray:
    """Steps and values [2, N] of the lines that have the figure: it is None where it was not finite."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return np.asarray(points, float).reshape(-1, 2).T


def draw_curves(runs: dict[str, list[dict]], key: str, label: str, from_zero: bool = False):
    """The figure of a key of metrics.jsonl over training, both splits of each run; None where no line has a value.

    Args:
        runs: lines of metrics.jsonl by the name of the run. That of a single run is not told.
        from_zero: for figures that mean something at 0. The first values of others are cut off if they are far above.
    """
    figure, axes = pyplot().subplots(figsize=SIZE)
    highest, values = [], []
    is_alone = len(runs) == 1
    for index, (name, lines) in enumerate(runs.items()):
        colours = SERIES[:2] if is_alone else [SERIES[index % len(SERIES)]] * 2
        train_2N, held_out_2N = (
            _series([line for line in lines if line["split"] == split], key) for split in ("train", "eval")
        )
        if train_2N.size:
            told = "training" if is_alone else None if held_out_2N.size else name
            axes.plot(*train_2N, color=colours[0], linewidth=1, alpha=0.8, label=told)
        if held_out_2N.size:
            told = "held out" if is_alone else f"{name}: {held_out_2N[1, -1]:.3f}"
            look = {"marker": MARKERS[index % len(MARKERS)], "markersize": 4, "linewidth": 1.5}
            axes.plot(*held_out_2N, color=colours[1], **look, label=told)
        if held_out_2N.size and is_alone:
            above = {"textcoords": "offset points", "xytext": (-4, 8), "ha": "right"}
            axes.annotate(f"{held_out_2N[1, -1]:.3f}", held_out_2N[:, -1], **above)
        for _, values_N in (train_2N, held_out_2N):
            values += values_N.tolist()
            # The first steps fall from log V and would leave the rest of the run to a corner.
            highest += [np.quantile(values_N, 0.95), values_N[-1]] if values_N.size else []
    if not values:
        pyplot().close(figure)
        return None
    low, high = min(values), max(values if from_zero else highest)
    axes.set_ylim(*((min(0, low), 1.1 * high or 1) if from_zero else (low - 0.05 * abs(low), high + 0.1 * abs(high))))
    axes.set(xlabel="training step", ylabel=label)
    if is_alone:
        axes.legend(frameon=False)
    else:
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "title": "thin: training; with marks: held out"}
        axes.legend(frameon=False, alignment="left", title_fontsize=9, **above)
    return figure


def draw_depth(train: Sequence[dict], held_out: Sequence[dict]):
    """The figure of executed depth over training: its mean and target, and the share of tokens at each depth.

    Args:
        train, held_out: lines of metrics.jsonl, without those that have no figures. A line of training is needed.
    """
    plt = pyplot()
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(SIZE[0] - 0.9, 4.2), sharex=True, gridspec_kw={"height_ratios": [2, 3]}
    )
    above.plot(*_series(train, "depth"), color=SERIES[0], linewidth=1, label="training")
    look = {"color": SERIES[1], "marker": "o", "markersize": 4, "linestyle": "", "clip_on": False}
    above.plot(*_series(held_out, "depth"), **look, label="held out")
    above.plot(*_series(train, "depth_target"), color="black", linewidth=1, linestyle=":", label="target")
    max_depth = len(train[0]["depth_hist"]) - 1
    above.set(ylabel="mean depth\n(layers)", ylim=(0, max_depth + 0.3))
    above.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))

    shares_DX = 100 * np.asarray([line["depth_hist"] for line in train]).T
    steps = [line["step"] for line in train]
    shown = [depth for depth in range(max_depth + 1) if shares_DX[depth].max() > 0]
    colours = _amounts(plt)(np.linspace(0.1, 1, max_depth + 1))[shown]
    labels = [f"{depth} layer{'s' * (depth != 1)}" for depth in shown]
    below.stackplot(steps, shares_DX[shown], colors=colours, labels=labels, edgecolor="black", linewidth=0.4)
    below.set(xlabel="training step", ylabel="% of tokens", ylim=(0, 100), xlim=(min(0, steps[0]), steps[-1] or 1))
    below.grid(False)
    below.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return figure


def draw_histogram(percent_D: np.ndarray):
    """The figure of the share of tokens, in percent, that execute 0…T layers."""
    figure, axes = pyplot().subplots(figsize=SIZE)
    bars = axes.bar(range(len(percent_D)), percent_D, color=AMOUNT, width=0.8)
    axes.bar_label(bars, [_percent(percent) for percent in percent_D], fontsize=9)
    axes.set(xticks=range(len(percent_D)), xlabel="executed layers", ylabel="% of tokens", ylim=(0, 106))
    axes.grid(False, axis="x")
    axes.set_axisbelow(True)
    return figure


def draw_layers(percent_TL: np.ndarray, most: float = 0.0):
    """The figure of the share of tokens, in percent, that execute each layer at each depth step.

    Args:
        most: where the scale ends, for figures to be compared; 0 = at the largest share.
    """
    num_steps, num_layers = percent_TL.shape
    height = max(1.6, 0.9 + (0.36 if num_steps < 8 else 0.26) * num_steps)
    figure = _draw_table(percent_TL, (SIZE[0], height), "% of tokens", "auto", most)
    axes = figure.axes[0]
    axes.set_xticks(range(num_layers)[:: 1 + num_layers // 24])
    axes.set_yticks(range(num_steps))
    axes.set(xlabel="layer of the pool", ylabel="depth step")
    return figure


def draw_transitions(counts_FT: np.ndarray):
    """The figure of where tokens go from each node, in percent of those that leave it (`routes.transitions`)."""
    num_layers = len(counts_FT) - 1
    total_F1 = counts_FT.sum(1, keepdims=True)
    # Of a layer that nobody comes to nothing is shown.
    percent_FT = np.where(total_F1 > 0, 100 * counts_FT / np.maximum(total_F1, 1), np.nan)
    figure = _draw_table(percent_FT, (SIZE[0], 4.4), "% of those that leave the node", "equal")
    axes = figure.axes[0]
    every = 1 + num_layers // 20
    # Where not all of them have room, 0 would stand on the start.
    layers = range(0 if every == 1 else every, num_layers, every)
    axes.set_xticks([*layers, num_layers], [*map(str, layers), "exit"])
    axes.set_yticks([0, *(1 + layer for layer in layers)], ["start", *map(str, layers)])
    axes.tick_params(axis="x", rotation=90 if num_layers > 9 else 0)
    axes.set(xlabel="to layer", ylabel="from layer")
    return figure


# Columns of a table whose numbers can still be read.
_MAX_NUMBERED = 17


def _draw_table(percent_RC: np.ndarray, size: tuple[float, float], label: str, aspect: str, most: float = 0.0):
    plt = pyplot()
    figure, axes = plt.subplots(figsize=size)
    most = most or max(np.nan_to_num(percent_RC).max(), 1)
    image = axes.imshow(percent_RC, cmap=_amounts(plt), vmin=0, vmax=most, aspect=aspect, interpolation="none")
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.03)
    # Else each of its steps is a shape of its own in an SVG.
    bar.solids.set_rasterized(True)
    num_columns = percent_RC.shape[1]
    if num_columns <= _MAX_NUMBERED:
        for (row, column), percent in np.ndenumerate(percent_RC):
            if percent >= 0.5:
                colour = "white" if percent > 0.8 * most else "black"
                look = {"color": colour, "fontsize": 8 if num_columns <= 13 else 6.5}
                axes.text(column, row, f"{percent:.0f}", ha="center", va="center", **look)
    axes.grid(False)
    return figure


def _percent(percent: float) -> str:
    """In few letters; what is there is never told as 0."""
    return f"{percent:.0f}" if percent >= 0.5 or percent == 0 else "<1"


def _amounts(plt):
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("amounts", [to_rgba(AMOUNT, 0), to_rgba(AMOUNT, 1)])
