"""What decoding costs, as ratios of things timed alternately in one process: `benchmark decode` and `benchmark cache`.

The models have random weights, but for those of `--runs`: what they say means nothing, what it takes to say it is what
a trained one takes.
"""

import dataclasses
import importlib.util
import math
import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import base
from radialnet.baseline import num_heads
from radialnet.comparisons import plot_tradeoffs
from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import Rows, prepare
from radialnet.decode import Decoder
from radialnet.decode_requests import Completion, Request
from radialnet.evaluate import evaluate_trained
from radialnet.model import init_params
from radialnet.run_folder import RunFolder
from radialnet.sections import PAGE_SIZE, VIEWS, ConfigError
from radialnet.sources import evenly
from radialnet.timing import Timings
from radialnet.tokenizer import Tokenizer
from radialnet.train_step import forward
from radialnet.trained import TrainedModel, load_trained

VOCAB = 512
PROMPT = 8  # Tokens.
LONG = 1000  # New tokens of the request that `cache bytes/entries` is of.
TEXTS = 4  # Held-out texts that trained runs are read on, each of two rows.
WINDOWS, WINDOW_TEXTS = (1, 0.5, 0.25, 0.125), 16  # Shares of the entries that there is room for; all of them first.
DEPTHS = (0.9, 0.75, 0.5)  # Shares of the layers that tokens of trained runs are held at.


def make_trained(sizes: dict, **overrides) -> TrainedModel:
    """A radial network of T steps with random weights, whose routes and exits depend on the token.

    It never ends a document, so that every request is as long as it may be.
    """
    config = base.get_config()
    heads = num_heads(sizes["d_model"])
    config.model.update(num_heads=heads, num_kv_heads=heads, init="distinct", pool_size=2 * sizes["max_depth"])
    config.model.update({name: sizes[name] for name in ("d_model", "d_ff", "max_depth", "dtype")})
    config.model.min_depth = sizes["max_depth"]
    config.train.seq_len = sizes["seq_len"]
    config.router.update(hidden=sizes["d_model"] // 4, exit_warmup_steps=0, depth_ramp_steps=0, exit_bias_init=0.0)
    config.router.depth_target = float(sizes["max_depth"])
    config = Config.from_dict(config, **overrides)
    tokenizer = Tokenizer.of_words([f"w{index}" for index in range(VOCAB - 2)])
    graph, params = init_params(config, VOCAB)
    if config.router.is_trained:
        # At first all layers are nearly as likely for all tokens. Larger weights make routes depend on the token.
        params["router"]["out"] *= 30.0
    # A logit of 0, and it is never the largest.
    params["head"] = params["head"].at[:, tokenizer.separator_id].set(0)
    controllers = Controllers.init(config.router, config.model.pool_size)
    return TrainedModel(config, graph, params, controllers, tokenizer, 0)


class Run:
    """Requests for a number of rows. Call it to decode them all."""

    def __init__(
        self, trained: TrainedModel, num_rows: int, num_new: int, prompts: list[list[int]] | None = None, **options
    ):
        """
        Args:
            prompts: one random one of a row by default.
        """
        rng = np.random.default_rng(0)
        prompts = prompts or rng.integers(2, VOCAB, (num_rows, PROMPT)).tolist()
        self.requests = [Request(tuple(prompt), num_new) for prompt in prompts]
        self.decoder = Decoder(trained, num_rows, **options)

    def __call__(self) -> list[Completion]:
        return self.decoder.run(self.requests)

    def depths(self) -> np.ndarray:
        """Layers of the pool that each token executed; not of the last of a text, which is not run any more."""
        stages = self.decoder.decoding.stages
        pool = slice(stages.prelude, stages.first_coda)
        return np.concatenate([(done.layer_ST[:-1, pool] >= 0).sum(1) for done in self()])

    def with_exit_bias(self, bias: float) -> "Run":
        controllers = self.decoder.controllers.replace(exit_bias=jnp.float32(bias))
        self.decoder.weights = self.decoder.weights.replace(controllers=controllers)
        return self

    def hold(self, depth: float) -> "Run":
        """Set the exit bias, by bisection, so that the mean depth is `depth`, up to a hundredth where it can be."""
        low, high = -100.0, 100.0
        for _ in range(14):
            bias = (low + high) / 2
            found = self.with_exit_bias(bias).depths().mean()
            if abs(found - depth) < 0.01 * depth:
                break
            low, high = (bias, high) if found > depth else (low, bias)
        return self


def benchmark_decode(timings: Timings, sizes: dict, runs: Path | None) -> None:
    """Tokens per second against depth, against lockstep, and against `transformers`; of trained runs against each other
    and against depth."""
    max_depth, new = sizes["max_depth"], sizes["seq_len"] - PROMPT - 1
    if runs is not None:
        trained = {folder: load_trained(folder) for folder in _run_folders(runs)}
        _as_trained(timings, trained, sizes["seq_len"])
        _of_depths(timings, trained, new)
        return
    whole, exits = make_trained(sizes), make_trained(sizes, model__min_depth=1)
    dense = make_trained(sizes, router__form="sequential", model__pool_size=max_depth)
    for num_rows, rows, name in ((1, "1 row", "1 row depth=T÷2/depth=T"), (16, "16 rows", None)):
        full, tokens = Run(whole, num_rows, new), num_rows * new
        for part, its_name in ((4, None), (2, name)):
            # Every token leaves after as many layers.
            depth = max(max_depth // part, 1)
            shallow = Run(make_trained(sizes, model__min_depth=depth, router__exit_bias_init=1e4), num_rows, new)
            args = f"{rows}, every token at T/{part}", f"{rows}, depth T", shallow, full
            timings.add(*args, name=its_name, tokens=tokens, **_depths(shallow))
        held = Run(exits, num_rows, new).hold(max_depth / 2)
        args = f"{rows}, mean T/2 by exit bias", f"{rows}, depth T", held, full
        timings.add(*args, name=None, tokens=tokens, **_depths(held))
        in_order = Run(dense, num_rows, new)
        timings.add(f"{rows}, T layers in order", f"{rows}, depth T", in_order, full, name=None, tokens=tokens)
        _against_transformers(timings, sizes, rows, (in_order, full), num_rows, new)

    # `held` is of 16 rows now.
    controllers, more = held.decoder.weights.controllers, {"tokens": 16 * new, **_depths(held)}
    # The named one is what unequal depths in a batch are to give: twice of what rows give that all go to T.
    in_step, in_step_held = Run(whole, 16, new, lockstep=True), Run(exits, 16, new, lockstep=True)
    in_step_held.decoder.weights = held.decoder.weights
    timings.add("16 rows, lockstep, depth T", "async, mean T/2", in_step, held, name="16 rows async/lockstep", **more)
    timings.add("16 rows, lockstep, mean T/2", "async, mean T/2", in_step_held, held, name=None, **more)

    long = Run(exits, 1, LONG)
    long.decoder.weights = long.decoder.weights.replace(controllers=controllers)
    (done,) = long()
    entries_bytes = int((done.layer_ST >= 0).sum()) * long.decoder.entry_bytes
    what = f"pages of {len(done.layer_ST):,} tokens"
    found_mb = long.decoder.peak_bytes / 1e6, entries_bytes / 1e6
    timings.add_given(what, "their entries", *found_mb, "mb", name="cache bytes/entries")


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
            timings.add(f"D={d_model}, view {view}", "latest", run, against, name=None, **_bytes(run), **_depths(run))
    return None


def _run_folders(runs: Path) -> list[Path]:
    # Not those that are half written.
    found = (path.parent for path in runs.glob("**/config.json"))
    folders = sorted(folder for folder in found if not folder.name.startswith("."))
    if not folders:
        raise ConfigError(f"--runs={runs}: no run folder in it")
    return folders


def _as_trained(timings: Timings, trained_runs: dict[Path, TrainedModel], num_tokens: int) -> None:
    """The time in which each run reads a held-out text as one row of decoding, against a dense one, or the first."""
    is_dense = {folder: trained.config.router.form == "sequential" for folder, trained in trained_runs.items()}
    against = None
    for folder in sorted(trained_runs, key=is_dense.get, reverse=True):
        trained = trained_runs[folder]
        rows, decoder = prepare(trained.config, RunFolder(folder)).eval, Decoder(trained, 1)
        token_RS = rows[0]["token"][None, :num_tokens]
        read = partial(decoder.read, token_RS, np.ones_like(token_RS, bool))
        against = against or (folder.name, read)
        stages = decoder.decoding.stages
        depth = float((read()[1][..., stages.prelude : stages.first_coda] >= 0).sum(2).mean())
        what = f"{folder.name}, as trained", f"{against[0]}, as trained"
        timings.add(*what, read, against[1], name=None, tokens=token_RS.size, depth=round(depth, 2))


def _of_depths(timings: Timings, trained_runs: dict[Path, TrainedModel], num_new: int) -> None:
    """Of each run whose tokens choose their depth: the time of the same requests, one at a time, at parts of that."""
    for folder, trained in trained_runs.items():
        if not _chooses_depth(trained):
            print(f"{folder.name}: its tokens don't choose their depth (yet)", file=sys.stderr)
            continue
        model, rows = trained.config.model, prepare(trained.config, RunFolder(folder)).eval
        texts = (rows[row]["token"] for row in evenly(len(rows), TEXTS))
        prompts = [text[text != trained.tokenizer.separator_id][:PROMPT].tolist() for text in texts]
        full = Run(trained, 1, num_new, prompts).with_exit_bias(-100.0)
        parts = [Run(trained, 1, num_new, prompts).hold(share * model.max_depth) for share in DEPTHS]
        # A text may end; each is written as far as all of them go.
        lengths = np.min([[len(done.tokens) for done in run()] for run in (full, *parts)], axis=0)
        for run in (full, *parts):
            both = zip(run.requests, np.maximum(lengths, 1).tolist(), strict=True)
            run.requests = [dataclasses.replace(request, max_new_tokens=most) for request, most in both]
        num_layers, tokens = full.depths().mean(), int(lengths.sum())
        for run in parts:
            told, depth = _depths(run), run.depths().mean()
            what = f"{folder.name}, {depth:.4g} layers a token", f"{num_layers:.4g} layers"
            saved = 1 - timings.add(*what, run, full, name=None, tokens=tokens, **told)["ratio"]
            if depth < num_layers:
                timings.rows[-1]["time saved/layers saved"] = round(saved / (1 - depth / num_layers), 3)


def _chooses_depth(trained: TrainedModel) -> bool:
    return trained.config.has_exits and trained.step >= trained.config.router.exit_warmup_steps


def _of_runs(timings: Timings, runs: Path) -> None:
    folders, against = _run_folders(runs), None
    for folder in folders:
        trained = load_trained(folder)
        config, rows = trained.config, prepare(trained.config, RunFolder(folder)).eval
        if not (texts := _texts(rows, 2, TEXTS)):
            raise ConfigError(f"--runs={runs}: {folder} has {len(rows)} rows of held-out text; 2 are needed")
        token_RS = texts["token"]
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
    return {"bytes_per_token": round(run.decoder.peak_bytes / sum(len(done.layer_ST) - 1 for done in run()))}


def _depths(run: Run) -> dict:
    depth_S = run.depths()
    return {"depth": round(float(depth_S.mean()), 2), "spread": round(float(depth_S.std()), 2)}


def _against_transformers(timings: Timings, sizes: dict, rows: str, ours: tuple, num_rows: int, num_new: int) -> None:
    """Time greedy decoding by `transformers`, of a Llama of the same dimensions and T layers, against ours; both
    on a GPU where ours is."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        print("no torch and transformers here (requirements-torch.txt): not compared with", file=sys.stderr)
        return
    # Threads that wait busily after their work would take the cores from whatever is timed next.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["d_ff"],
        num_hidden_layers=sizes["max_depth"],
        num_attention_heads=num_heads(sizes["d_model"]),
        num_key_value_heads=num_heads(sizes["d_model"]),
        max_position_embeddings=2 * sizes["seq_len"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).eval().to(device, getattr(torch, sizes["dtype"]))
    prompt_RS = torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (num_rows, PROMPT + 1))).to(device)
    everything = torch.ones_like(prompt_RS)

    def theirs():
        with torch.inference_mode():
            text_RS = model.generate(prompt_RS, attention_mask=everything, max_new_tokens=num_new, do_sample=False)
        assert text_RS.shape == (num_rows, PROMPT + 1 + num_new)

    in_order, routed = ours
    tokens, what = num_rows * num_new, f"transformers, {rows}, T layers"
    timings.add(what, "ours, T layers in order", theirs, in_order, name=f"{rows} vs transformers", tokens=tokens)
    timings.add(what, "ours, depth T out of 2T", theirs, routed, name=None, tokens=tokens)
