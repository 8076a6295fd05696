"""What decoding costs, as ratios of things timed alternately in one process: `benchmark decode`.

The models have random weights, but for those of `--runs`: what they say means nothing, what it takes to say it is what
a trained one takes.
"""

import dataclasses
import importlib.util
import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from radialnet.baseline import num_heads
from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import prepare
from radialnet.decode import Decoder
from radialnet.decode_requests import Completion, Request
from radialnet.model import init_params
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.sources import evenly
from radialnet.timing import Timings
from radialnet.tokenizer import Tokenizer
from radialnet.trained import TrainedModel, load_trained

VOCAB = 512
PROMPT = 8  # Tokens.
LONG = 1000  # New tokens of the request that `cache bytes/entries` is of.
TEXTS = 4  # Held-out texts that trained runs are read on.
NONE_LEAVES = -1e4  # An exit bias.
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
        """Layers of the pool that each token executed."""
        stages = self.decoder.decoding.stages
        pool = slice(stages.prelude, stages.first_coda)
        return np.concatenate([(done.ran_ST[:, pool] >= 0).sum(1) for done in self()])

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
        trained = {folder: load_trained(folder) for folder in run_folders(runs)}
        _as_trained(timings, trained, sizes["seq_len"])
        _of_depths(timings, trained, new)
        return
    exits = make_trained(sizes, model__min_depth=1)
    dense = make_trained(sizes, router__form="sequential", model__pool_size=max_depth)
    for num_rows, rows, name in ((1, "1 row", "1 row depth=T÷2/depth=T"), (16, "16 rows", None)):
        full, tokens = Run(exits, num_rows, new).with_exit_bias(NONE_LEAVES), num_rows * new
        for part, its_name in ((4, None), (2, name)):
            # Every token leaves after as many layers.
            of_depth = make_trained(sizes, model__min_depth=max(max_depth // part, 1))
            shallow = Run(of_depth, num_rows, new).with_exit_bias(-NONE_LEAVES)
            args = f"{rows}, every token at T/{part}", f"{rows}, depth T", shallow, full
            timings.add(*args, name=its_name, tokens=tokens, **depths_of(shallow))
        held = Run(exits, num_rows, new).hold(max_depth / 2)
        args = f"{rows}, mean T/2 by exit bias", f"{rows}, depth T", held, full
        timings.add(*args, name=None, tokens=tokens, **depths_of(held))
        in_order = Run(dense, num_rows, new)
        timings.add(f"{rows}, T layers in order", f"{rows}, depth T", in_order, full, name=None, tokens=tokens)
        _against_transformers(timings, sizes, rows, (in_order, full), num_rows, new)

    # `held` is of 16 rows now.
    controllers, more = held.decoder.weights.controllers, {"tokens": 16 * new, **depths_of(held)}
    # The named one is what unequal depths in a batch are to give: twice of what rows give that all go to T.
    in_step = Run(exits, 16, new, lockstep=True).with_exit_bias(NONE_LEAVES)
    in_step_held = Run(exits, 16, new, lockstep=True)
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


def run_folders(runs: Path) -> list[Path]:
    # Not those that are half written.
    found = (path.parent for path in runs.glob("**/config.json"))
    folders = sorted(folder for folder in found if not folder.name.startswith("."))
    if not folders:
        raise ConfigError(f"--runs={runs}: no run folder in it")
    return folders


def _as_trained(timings: Timings, trained_runs: dict[Path, TrainedModel], num_tokens: int) -> None:
    """The time in which each run reads a held-out text as one row of decoding, against a dense one, or the first."""
    is_dense = {folder: trained.config.router.form == "sequential" for folder, trained in trained_runs.items()}
    # As many of all of them.
    num_tokens = min(num_tokens, *(trained.config.train.seq_len for trained in trained_runs.values()))
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
        full = Run(trained, 1, num_new, prompts).with_exit_bias(NONE_LEAVES)
        parts = [Run(trained, 1, num_new, prompts).hold(share * model.max_depth) for share in DEPTHS]
        # A text may end; each is written as far as all of them go.
        lengths = np.min([[len(done.tokens) for done in run()] for run in (full, *parts)], axis=0)
        for run in (full, *parts):
            both = zip(run.requests, np.maximum(lengths, 1).tolist(), strict=True)
            run.requests = [dataclasses.replace(request, max_new_tokens=most) for request, most in both]
        num_layers, tokens = full.depths().mean(), int(lengths.sum())
        for run in parts:
            told, depth = depths_of(run), run.depths().mean()
            what = f"{folder.name}, {depth:.4g} layers a token", f"{num_layers:.4g} layers"
            saved = 1 - timings.add(*what, run, full, name=None, tokens=tokens, **told)["ratio"]
            if depth < num_layers:
                timings.rows[-1]["time saved/layers saved"] = round(saved / (1 - depth / num_layers), 3)


def _chooses_depth(trained: TrainedModel) -> bool:
    return trained.config.has_exits and trained.step >= trained.config.router.exit_warmup_steps


def depths_of(run: Run) -> dict:
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
