"""Plots of models against each other."""

import collections
import dataclasses
from pathlib import Path

import numpy as np

from radialnet.plots import AMOUNT, MARKERS, SERIES, SIZE, pyplot, save


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
    plt = pyplot()
    seeds = collections.defaultdict(list)
    for point in points:
        seeds[point.series, point.depth].append((point.flops, point.ce))
    means = {key: tuple(np.mean(values, axis=0)) for key, values in seeds.items()}
    least, most = min(map(len, seeds.values())), max(map(len, seeds.values()))
    figure, axes = plt.subplots(figsize=(8, 5))
    names = list(dict.fromkeys(point.series for point in points))
    colors = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
    for index, series in enumerate(names):
        keys = [key for key in seeds if key[0] == series]
        mean_XP = np.transpose([means[key] for key in keys])
        low_XP, high_XP = (np.transpose([edge(seeds[key], axis=0) for key in keys]) for edge in (np.min, np.max))
        axes.errorbar(
            *mean_XP,
            # In the order of their arguments. Bars without a length would still be drawn in the legend.
            *(np.stack([mean_XP - low_XP, high_XP - mean_XP], axis=1)[::-1] if most > 1 else ()),
            linestyle="",
            marker=MARKERS[index % len(MARKERS)],
            color=colors(index % colors.N),
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
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(names) > _MAX_INSIDE else {}
    axes.legend(frameon=False, fontsize=9, title=several if most > 1 else None, title_fontsize=9, **beside)
    save(plt, figure, path)


_MEANINGS = {"T": "T: max depth", "d*": "d*: target of the mean depth"}
# More labels than this are not legible beside their points.
_MAX_LABELLED = 40
# A legend of more series would cover points.
_MAX_INSIDE = 8


def plot_residuals(
    boxes: dict[str, list[list[float]]], medians: dict[str, float], names: list[str], axis: str, title: str, path: Path
) -> None:
    """Draw residual ratios: a panel for each branch, in it a box for each layer or depth step.

    Args:
        boxes: by branch, five quantiles of each place: the whiskers', the box's and in the midst the median.
        medians: by branch, that of the whole model.
        names: of the places, of which `axis` says what they are.
    """
    plt = pyplot()
    width = max(SIZE[0], 0.24 * len(names) + 1)
    figure, panels = plt.subplots(
        len(boxes), 1, figsize=(width, 0.6 + 1.7 * len(boxes)), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, (branch, quantiles) in zip(panels[:, 0], boxes.items(), strict=True):
        there = [place for place, values in enumerate(quantiles) if np.isfinite(values).all()]
        labels = "whislo", "q1", "med", "q3", "whishi"
        axes.bxp(
            [dict(zip(labels, quantiles[place], strict=True)) for place in there],
            positions=there,
            widths=0.6,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": AMOUNT, "alpha": 0.35, "linewidth": 0},
            medianprops={"color": AMOUNT, "linewidth": 1.6},
            whiskerprops={"linewidth": 0.8},
            capprops={"linewidth": 0.8},
        )
        axes.axhline(medians[branch], color=SERIES[1], linewidth=1, linestyle="--", zorder=1)
        axes.set_title(f"{branch}: median {medians[branch]:.3f}", fontsize=10, loc="left")
        axes.set_ylim(bottom=0)
        axes.grid(False, axis="x")
    every = 1 + len(names) // 32
    panels[-1, 0].set_xticks(range(len(names))[::every], names[::every], rotation=90 if max(map(len, names)) > 2 else 0)
    panels[-1, 0].set(xlabel=axis, xlim=(-0.7, len(names) - 0.3))
    figure.supylabel("residual ratio", fontsize=10)
    figure.suptitle(title, fontsize=11)
    save(plt, figure, path, dpi=100)


def plot_medians(models: list[tuple[str, int, dict[str, float]]], path: Path) -> None:
    """Draw the median residual ratios of models, by branch, against their parameters.

    Args:
        models: name, number of parameters, and median by branch, of each.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=SIZE)
    for index, branch in enumerate(dict.fromkeys(branch for _, _, medians in models for branch in medians)):
        points = [(size, medians[branch]) for _, size, medians in models if branch in medians]
        # Without lines: models may be of kinds whose ratios mean different things.
        look = {"marker": MARKERS[index], "color": SERIES[index % len(SERIES)], "linestyle": ""}
        axes.plot(*zip(*points, strict=True), label=branch, **look)
    for name, size, medians in models:
        place = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center", "fontsize": 8, "color": "0.3"}
        axes.annotate(name, (size, max(medians.values())), **place)
    axes.margins(0.2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="parameters", ylabel="median residual ratio")
    _scale_costs(axes, [size for _, size, _ in models])
    axes.legend(frameon=False)
    save(plt, figure, path, dpi=100)


def plot_skips(found: dict, path: Path) -> None:
    """Draw the loss of a model against the layers that it executes.

    Args:
        found: `skips.search`.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=SIZE)
    for index, name in enumerate(("greedy", "even", "random")):
        if not (losses := found[name]):
            continue
        executed = found["layers"] - np.arange(len(losses))
        look = {"marker": MARKERS[index], "color": SERIES[index], "markersize": 4, "linewidth": 1}
        axes.errorbar(executed, losses, yerr=found["random_std"] if name == "random" else None, label=name, **look)
    for index, (name, points) in enumerate(found["runs"].items(), 3):
        layers, losses = zip(*points, strict=True)
        look = {"marker": MARKERS[index % len(MARKERS)], "color": SERIES[index % len(SERIES)], "markersize": 5}
        axes.plot(layers, losses, label=name, linewidth=1.6, **look)
    limit = found["greedy"][0] * (1 + found["tolerance"])
    axes.axhline(limit, color="0.6", linestyle="--", linewidth=1, label=f"{found['tolerance']:.0%} more loss")
    # Beyond three times the loss nothing is left of the model.
    drawn = [found["greedy"], found["even"], *([ce for _, ce in points] for points in found["runs"].values())]
    lowest, highest = min(map(min, drawn)), max(map(max, drawn))
    axes.set_ylim(0.95 * lowest, min(3 * found["greedy"][0], 1.05 * highest))
    axes.invert_xaxis()
    axes.set(xlabel="layers executed", ylabel="loss (nats per token)")
    # Lines may go behind it.
    axes.legend(edgecolor="none", framealpha=0.9, fontsize=8)
    save(plt, figure, path, dpi=100)


def plot_sparsity(points: list[dict], others: list[dict], path: Path) -> None:
    """Draw the loss of sparse models against their FLOPs, each method a line, beside other models.

    Args:
        points: `sparsity.over_seeds`.
        others: `sparsity.peers`.
    """
    # As papers and readers call them.
    called = {"deja_vu": "DejaVu", "gates": "Channel Gating", "largest": "largest (a bound)"}
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.6, 4.6))
    lines = {}
    for point in points:
        heads = point["heads"]
        name = called.get(point["method"], point["method"])
        lines.setdefault(name + (f", {heads:.0%} of the heads" if heads < 1 else ""), []).append(point)
    for index, (name, of) in enumerate(lines.items()):
        of.sort(key=lambda point: point["flops_per_token"])
        look = {"marker": MARKERS[index % len(MARKERS)], "color": SERIES[index % len(SERIES)], "markersize": 5}
        look["linestyle"] = ("-", "--", ":")[index // len(SERIES) % 3]
        spread = [point["ce_std"] or 0 for point in of] if any(point["ce_std"] for point in of) else None
        x, y = ([point[name] for point in of] for name in ("flops_per_token", "ce"))
        axes.errorbar(x, y, yerr=spread, label=name, linewidth=1.2, elinewidth=1, capsize=2, **look)
    for index, point in enumerate(sorted(others, key=lambda point: point["ce"])):
        place = point["flops_per_token"], point["ce"]
        axes.plot(*place, "k.", markersize=5)
        # Many lie one above the other.
        offset = {"xytext": (5, -2), "ha": "left"} if index % 2 else {"xytext": (-5, -2), "ha": "right"}
        axes.annotate(point["method"], place, textcoords="offset points", fontsize=7, color="0.3", **offset)
    # What has lost much says no more than that.
    shown = [point["ce"] for point in [*points, *others] if point["ce"] < 1.25 * points[0]["ce"]]
    low, high = min(shown), max(shown)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    _scale_costs(axes, [point["flops_per_token"] for point in [*points, *others]])
    axes.set(xlabel="executed forward FLOPs per token", ylabel="held-out loss (nats per token)")
    axes.legend(edgecolor="none", framealpha=0.9, fontsize=8)
    save(plt, figure, path, dpi=100)


def plot_tradeoffs(panels: dict[str, dict[str, list[tuple[float, float]]]], x: str, y: str, path: Path) -> None:
    """Draw what a cost buys: panels side by side, by their titles; lines in them by name."""
    plt = pyplot()
    size = 3.9 * len(panels), 3.9
    figure, axes_1P = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axes, (title, lines) in zip(axes_1P[0], panels.items(), strict=True):
        for index, (name, line) in enumerate(lines.items()):
            look = {"marker": MARKERS[index % len(MARKERS)], "color": SERIES[index % len(SERIES)], "markersize": 5}
            axes.plot(*zip(*line, strict=True), label=name, linewidth=1.3, **look)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x)
        _scale_costs(axes, [cost for line in lines.values() for cost, _ in line])
    axes_1P[0, 0].set_ylabel(y)
    _legend_below(figure)
    save(plt, figure, path, dpi=100)


def plot_fit(points: list[tuple[str, float, float]], band: list[tuple[float, ...]], largest: float, path: Path) -> None:
    """Draw residual ratios against parameters, with a fit.

    Args:
        points: name, number of parameters, ratio.
        band: parameters, and the fit's ratio, its lower and its upper end.
        largest: parameters beyond which it is an extrapolation.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=SIZE)
    size_P, middle_P, low_P, high_P = np.transpose(band)
    axes.fill_between(size_P, low_P, high_P, color=AMOUNT, alpha=0.15, linewidth=0, label="90 % band, nominal")
    known_P = size_P <= largest
    axes.plot(size_P[known_P], middle_P[known_P], color=AMOUNT, label="fit")
    axes.plot(size_P[~known_P], middle_P[~known_P], color=AMOUNT, linestyle=":", label="extrapolation")
    for index, (name, size, ratio) in enumerate(points):
        axes.plot(size, ratio, MARKERS[index % len(MARKERS)], color=SERIES[index % len(SERIES)], label=name)
    axes.set(xlabel="parameters", ylabel="median residual ratio", xscale="log", yscale="log", ylim=(0.001, 1.5))
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    save(plt, figure, path, dpi=100)


def plot_lines(panels: dict[str, dict[str, list[tuple[float, float]]]], x: str, title: str, path: Path) -> None:
    """Draw amounts over orders of magnitude: panels side by side, by what is on their y axes; lines in them by name."""
    plt = pyplot()
    rows = -(-len(panels) // 2)
    figure, axes_RC = plt.subplots(
        rows, 2, figsize=(7.6, 0.5 + 2.7 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (y, lines) in zip(axes_RC.flat, panels.items(), strict=False):
        for name, line in lines.items():
            index = names.index(name)
            look = {"marker": MARKERS[index % len(MARKERS)], "color": SERIES[index % len(SERIES)], "markersize": 3}
            # So that lines one upon the other are seen.
            style = ("-", "--", "-.", ":")[index % 4]
            shown = [(x, y) for x, y in line if y > 0]
            axes.plot(*zip(*shown, strict=True), label=name, linewidth=1.5, linestyle=style, **look)
        axes.set(xscale="log", yscale="log")
        axes.set_title(y, fontsize=10, loc="left")
    for axes in axes_RC[-1]:
        axes.set_xlabel(x)
    _legend_below(figure)
    figure.suptitle(title, fontsize=11)
    save(plt, figure, path, dpi=100)


def _legend_below(figure) -> None:
    """Of the lines in all axes, beside these: the lines may be anywhere in them."""
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=5, frameon=False, fontsize=8)


def _scale_costs(axes, costs: list[float]) -> None:
    from matplotlib import ticker

    span = max(costs) / min(costs)
    if span > 4:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if span > 6 else (1, 1.5, 2, 3, 4, 6)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.EngFormatter())
