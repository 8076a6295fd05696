"""Plots of a run, from its metrics.jsonl alone, and of runs against each other."""

import collections
import dataclasses
from pathlib import Path

import numpy as np

# Light to dark in one hue: amounts. Chosen to be told apart in grey as well.
_AMOUNTS = "Blues"


# The files of `plot_run`.
RUN_PLOTS = ("loss.png", "depth.png", "layers.png")


def plot_run(lines: list[dict], folder: Path) -> list[Path]:
    """Draw loss, depth and layer use into `folder` and return the files.

    Args:
        lines: of metrics.jsonl. Without a figure in either split nothing is drawn.
    """
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    # Lines of skipped steps have no figures.
    lines = [line for line in lines if line["bpb"] is not None]
    train = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "eval"]
    if not train or not held_out:
        return []
    drawn = []
    for name, draw in zip(RUN_PLOTS, (_draw_loss, _draw_depth, _draw_layers), strict=True):
        figure = draw(plt, train, held_out)
        drawn.append(folder / name)
        _save(plt, figure, drawn[-1])
    return drawn


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
    plt = _pyplot()
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
    _save(plt, figure, path)


def _shown(text: str) -> str:
    """A token's text, its white space visible."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text.replace(" ", "·"))
    return text if len(text) <= _TRACE_CHARACTERS else text[: _TRACE_CHARACTERS - 1] + "…"


def _pyplot():
    # Here, for it takes a second to import. Agg: no display is needed.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}
    )
    return plt


def _save(plt, figure, path: Path) -> None:
    # Aside, so that a kill leaves the old picture or the new one.
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=130, bbox_inches="tight", format="png")
    partial.replace(path)
    plt.close(figure)


def _series(lines: list[dict], key: str) -> tuple[list, list]:
    return [line["step"] for line in lines], [line[key] for line in lines]


def _draw_loss(plt, train, held_out):
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(*_series(train, "bpb"), color="tab:blue", linewidth=1, alpha=0.8, label="training")
    axes.plot(*_series(held_out, "bpb"), color="tab:orange", marker="o", markersize=4, label="held out")
    steps, values = _series(held_out, "bpb")
    trained = _series(train, "bpb")[1]
    last = (steps[-1], values[-1])
    axes.annotate(f"{values[-1]:.3f}", last, textcoords="offset points", xytext=(-4, 8), ha="right")
    # The first steps fall from log V and would leave the rest of the run to a corner.
    axes.set_ylim(0.95 * min(values + trained), 1.1 * max(np.quantile(trained, 0.95), values[-1]))
    axes.set(xlabel="training step", ylabel="bits per byte", title="Loss")
    axes.legend(frameon=False)
    return figure


def _draw_depth(plt, train, held_out):
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, gridspec_kw={"height_ratios": [2, 3]})
    above.plot(*_series(train, "depth"), color="tab:blue", linewidth=1, label="training")
    above.plot(
        *_series(held_out, "depth"), color="tab:orange", marker="o", markersize=4, linestyle="", label="held out"
    )
    above.plot(*_series(train, "depth_target"), color="black", linewidth=1, linestyle=":", label="target")
    max_depth = len(train[0]["depth_hist"]) - 1
    above.set(ylabel="mean depth (layers)", ylim=(0, max_depth + 0.3), title="Executed depth")
    above.legend(frameon=False, ncols=3, loc="lower right")

    shares_DX = np.asarray([line["depth_hist"] for line in train]).T
    steps = [line["step"] for line in train]
    colours = plt.get_cmap(_AMOUNTS)(np.linspace(0.15, 0.95, max_depth + 1))
    shown = [depth for depth in range(max_depth + 1) if shares_DX[depth].max() > 0]
    below.stackplot(steps, shares_DX[shown], colors=colours[shown], labels=[f"{depth} layers" for depth in shown])
    below.set(xlabel="training step", ylabel="share of tokens", ylim=(0, 1), xlim=(0, steps[-1]))
    below.grid(False)
    below.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return figure


def _draw_layers(plt, train, held_out):
    last = held_out[-1]
    use_TL = 100 * np.asarray(last["load_by_step"])
    num_steps, num_layers = use_TL.shape
    size = (max(5, 0.45 * num_layers + 2), max(2.5, 0.5 * num_steps + 1.5))
    figure, axes = plt.subplots(figsize=size)
    image = axes.imshow(use_TL, cmap=_AMOUNTS, vmin=0, aspect="auto")
    figure.colorbar(image, ax=axes, label="% of tokens")
    if num_layers <= 32:
        for (step, layer), share in np.ndenumerate(use_TL):
            if share >= 0.5:
                dark = share > 0.6 * use_TL.max()
                colour = "white" if dark else "black"
                axes.text(layer, step, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(num_layers)[:: 1 + num_layers // 32])
    axes.set_yticks(range(num_steps))
    axes.grid(False)
    axes.set(xlabel="layer of the pool", ylabel="depth step")
    axes.set_title(f"Where held-out tokens are routed, step {last['step']}")
    return figure


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """The quality and the cost of one run."""

    series: str  # What shares a colour.
    depth: str  # Written beside the point; equal ones of a series differ by the seed alone.
    flops: float  # Executed forward FLOPs per token.
    ce: float  # Held-out loss, nats per token.


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, loss) that no other one beats in both, or in one at the same of the other; by cost."""
    front = []
    for cost, loss in sorted(set(points)):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def plot_sweep(points: list[SweepPoint], path: Path) -> None:
    """Draw held-out loss against executed FLOPs: means over seeds, and their Pareto front. Needs a point at least."""
    plt = _pyplot()
    seeds = collections.defaultdict(list)
    for point in points:
        seeds[point.series, point.depth].append((point.flops, point.ce))
    means = {key: tuple(np.mean(values, axis=0)) for key, values in seeds.items()}
    least, most = min(map(len, seeds.values())), max(map(len, seeds.values()))
    figure, axes = plt.subplots(figsize=(8, 5))
    for index, series in enumerate(dict.fromkeys(point.series for point in points)):
        keys = [key for key in seeds if key[0] == series]
        mean_XP = np.transpose([means[key] for key in keys])
        low_XP, high_XP = (np.transpose([edge(seeds[key], axis=0) for key in keys]) for edge in (np.min, np.max))
        axes.errorbar(
            *mean_XP,
            # In the order of their arguments. Bars without a length would still be drawn in the legend.
            *(np.stack([mean_XP - low_XP, high_XP - mean_XP], axis=1)[::-1] if most > 1 else ()),
            linestyle="",
            marker=_MARKERS[index % len(_MARKERS)],
            color=plt.get_cmap("tab10")(index % 10),
            markersize=6,
            elinewidth=1,
            capsize=2,
            label=series or "runs",
        )
        if len(means) <= _MAX_LABELLED:
            for key, mean in zip(keys, mean_XP.T, strict=True):
                axes.annotate(key[1], mean, textcoords="offset points", xytext=(6, 5), fontsize=8, color="0.3")
    front = pareto_front(list(means.values()))
    axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1.2, linestyle="--", zorder=1, label="Pareto front")
    _scale_costs(axes, [cost for cost, _ in means.values()])
    shown = [meaning for sign, meaning in _MEANINGS.items() if any(f"{sign}=" in point.depth for point in points)]
    axes.set_xlabel("executed forward FLOPs per token" + ("\n" + ", ".join(shown) if shown else ""))
    axes.set(ylabel="held-out loss (nats per token)", title="Quality against compute")
    several = f"means of {least if least == most else f'{least} to {most}'} seeds,\nbars from min to max"
    axes.legend(frameon=False, fontsize=9, title=several if most > 1 else None, title_fontsize=9)
    _save(plt, figure, path)


# One more than colours, so that no two of many series look the same.
_MARKERS = "osD^vPX<>*h"
_MEANINGS = {"T": "T: max depth", "d*": "d*: target of the mean depth"}
# More labels than this are not legible beside their points.
_MAX_LABELLED = 40


def _scale_costs(axes, costs: list[float]) -> None:
    from matplotlib import ticker

    span = max(costs) / min(costs)
    if span > 4:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if span > 30 else (1, 1.5, 2, 3, 4, 6)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.EngFormatter())
