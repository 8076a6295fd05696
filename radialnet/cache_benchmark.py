"""What the cache of decoding holds and costs, by view and by the room that there is: `benchmark cache`."""

import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from radialnet.comparisons import plot_tradeoffs
from radialnet.config import Config
from radialnet.data import Rows, prepare
from radialnet.decode import Decoder
from radialnet.decode_benchmark import PROMPT, TEXTS, Run, depths_of, make_trained, run_folders
from radialnet.evaluate import evaluate_trained
from radialnet.run_folder import RunFolder
from radialnet.sections import PAGE_SIZE, VIEWS, ConfigError
from radialnet.sources import evenly
from radialnet.timing import Timings
from radialnet.train_step import forward
from radialnet.trained import TrainedModel, load_trained

WINDOWS, WINDOW_TEXTS = (1, 0.5, 0.25, 0.125), 16  # Shares of the entries that there is room for; all of them first.


def benchmark_cache(timings: Timings, sizes: dict, runs: Path | None) -> None:
    """Each view: bytes and time of a token, over sizes; of trained runs their held-out loss, what decoding gives, and
    what it costs to give up the oldest tokens."""
    if runs is not None:
        return _of_runs(timings, runs)
    max_depth, new = sizes["max_depth"], sizes["seq_len"] - PROMPT - 1
    for d_model in (sizes["d_model"] // 2, sizes["d_model"]):
        of_size = {**sizes, "d_model": d_model, "d_ff": sizes["d_ff"] * d_model // sizes["d_model"]}
        against = None
        for view in ("latest", *(view for view in VIEWS if view != "latest")):
            run = Run(make_trained(of_size, model__min_depth=1, cache__view=view), 1, new).hold(max_depth / 2)
            against = against or run
            timings.add(f"D={d_model}, view {view}", "latest", run, against, name=None, **_bytes(run), **depths_of(run))
    return None


def _of_runs(timings: Timings, runs: Path) -> None:
    folders, against = run_folders(runs), None
    # All of them read as many tokens, and none more than it has positions for.
    configs = [Config.load(RunFolder(folder).config) for folder in folders]
    lengths = [2 * config.train.seq_len for config in configs]
    length = min(lengths + [config.model.max_positions for config in configs if config.model.max_positions])
    for folder in folders:
        trained = load_trained(folder)
        config, rows = trained.config, prepare(trained.config, RunFolder(folder)).eval
        if not (texts := _texts(rows, 2, TEXTS)):
            raise ConfigError(f"--runs={runs}: {folder} has {len(rows)} rows of held-out text; 2 are needed")
        token_RS = texts["token"][:, :length]
        decoder = Decoder(trained, len(token_RS), capacity=0)
        stages = decoder.decoding.stages
        read = partial(decoder.read, token_RS, np.ones_like(token_RS, bool))
        logits_RSV, layer_RST = read()
        against = against or read
        found = {
            "ce": evaluate_trained(trained, rows, config.model.max_depth, 0.0)["ce"],
            "depth": float((layer_RST[..., stages.prelude : stages.first_coda] >= 0).sum(2).mean()),
            "bytes_per_token": round(decoder.peak_bytes / token_RS.size),
            "logits_differ_by": float(jnp.abs(logits_RSV - _forward_logits(decoder, token_RS)).max()),
        }
        what = f"{folder.name}: view {config.cache.view}"
        found = {key: float(f"{value:.4g}") for key, value in found.items()}
        timings.add(what, folders[0].name, read, against, name=None, tokens=token_RS.size, **found)
        for length in (config.train.seq_len, 4 * config.train.seq_len):
            _of_windows(timings, what, line_of_run(folder, runs), trained, rows, length)
        # Programs of one run are of no use to the next, and of seven runs they were more than a process may map.
        jax.clear_caches()


def line_of_run(folder: Path, runs: Path) -> str:
    """What the runs of a sweep that differ by their seed have in common: the folder, and the name but for the seed."""
    path = folder.relative_to(runs)
    name = "+".join(part for part in path.name.split("+") if not part.startswith("seed="))
    line = path.parent / name
    return str(line) if line.parts else runs.name


def _texts(rows: Rows, rows_of_text: int, most: int) -> dict[str, np.ndarray]:
    """Texts from all over the rows, each of some rows that follow each other; none where there are too few."""
    firsts = [text * rows_of_text for text in evenly(len(rows) // rows_of_text, most)]
    texts = [[rows[first + row] for row in range(rows_of_text)] for first in firsts]
    names = ("token", "target", "is_target") if texts else ()
    return {name: np.stack([np.concatenate([row[name] for row in text]) for text in texts]) for name in names}


def _of_windows(timings: Timings, what: str, line: str, trained: TrainedModel, rows: Rows, length: int) -> None:
    """The loss on texts of a length, by the share of their entries that the cache has room for."""
    texts = _texts(rows, length // trained.config.train.seq_len, WINDOW_TEXTS)
    if not texts or 0 < trained.config.model.max_positions < length:
        print(f"{what}: no text of {length} tokens, or no positions for it", file=sys.stderr)
        return
    token_RS, target_RS, is_target_RS = (texts[name] for name in ("token", "target", "is_target"))
    given, whole_pages = (token_RS, np.ones(token_RS.shape, bool)), 0
    for share in WINDOWS:
        # Of the first, which is all, it is not known yet how many entries there are.
        capacity = math.ceil(share * whole_pages) * PAGE_SIZE
        decoder = Decoder(trained, len(token_RS), capacity=capacity, when_full="slide")
        if 0 < capacity < decoder.least_capacity:
            continue
        logits_RSV, _ = decoder.read(*given)
        whole_pages = whole_pages or decoder.peak_pages
        nats_RS = optax.softmax_cross_entropy_with_integer_labels(logits_RSV, target_RS)
        found = {
            "line": line,
            "length": length,
            "room": share,
            "ce": float(nats_RS[is_target_RS].mean()),
            "bytes_per_token": round(decoder.peak_bytes / token_RS.size),
        }
        # Not timed: what reads a given text comes back after every few tokens, which what writes one doesn't.
        both = (pages * PAGE_SIZE * decoder.entry_bytes / 1e6 for pages in (decoder.peak_pages, whole_pages))
        timings.add_given(f"{what}, {length} tokens, room for {share:g}", "for all", *both, "mb", **found)


def plot_windows(rows: list[dict], path: Path) -> None:
    """Draw the loss against the bytes of the cache, a panel for each length of text; runs that differ by the seed are
    one line, of the means of all of them."""
    panels = {}
    for row in (row for row in rows if "room" in row):
        line = panels.setdefault(f"{row['length']} tokens", {}).setdefault(row["line"], {})
        line.setdefault(row["room"], []).append((row["bytes_per_token"], row["ce"]))
    panels = {title: {name: _means(line) for name, line in lines.items()} for title, lines in panels.items()}
    plot_tradeoffs(panels, "bytes of the cache per token of the text", "loss (nats per token)", path)


def _means(line: dict[float, list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Of each room that all runs of a line have."""
    num_runs = max(map(len, line.values()))
    return [tuple(np.mean(points, 0)) for points in line.values() if len(points) == num_runs]


def _forward_logits(decoder: Decoder, token_RS: np.ndarray) -> jax.Array:
    """Logits of the parallel pass that trains."""
    trained, weights = decoder.trained, decoder.weights
    position_RS = np.broadcast_to(np.arange(token_RS.shape[1], dtype=np.int32), token_RS.shape)
    batch = {"token": token_RS, "document": np.zeros_like(token_RS), "position": position_RS}
    given = trained.params, batch, weights.controllers, weights.at, jax.random.key(0)
    return jax.jit(partial(forward, trained.graph))(*given).logits_BSV


def _bytes(run: Run) -> dict:
    return {"bytes_per_token": round(run.decoder.peak_bytes / sum(len(done.ran_ST) for done in run()))}
