"""Plots of a run, from its metrics.jsonl alone."""

from pathlib import Path

import numpy as np

# Light to dark in one hue: amounts. Chosen to be told apart in grey as well.
_AMOUNTS = "Blues"


def plot_run(lines: list[dict], folder: Path) -> list[Path]:
    """Draw loss, depth and layer use into `folder` and return the files.

    Args:
        lines: of metrics.jsonl. Without a figure in either split nothing is drawn.
    """
    # Here, for it takes a second to import. Agg: no display is needed.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}
    )
    folder.mkdir(parents=True, exist_ok=True)
    # Lines of skipped steps have no figures.
    lines = [line for line in lines if line["bpb"] is not None]
    train = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "eval"]
    if not train or not held_out:
        return []
    drawn = []
    for name, draw in (("loss", _draw_loss), ("depth", _draw_depth), ("layers", _draw_layers)):
        figure = draw(plt, train, held_out)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)
        drawn.append(path)
    return drawn


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
