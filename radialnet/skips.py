"""How many layers of a plain model can go before its loss moves, and what routers made of those that learned to skip.

    python -m radialnet.skips --workdir=DIR [--data=PATH] [--max_tokens=N] [--seq_len=S] [--most=K] [--orders=R]
                              [--tolerance=X] [--runs=DIR,DIR] [--exit_bias=B,B] [--out=DIR] [--json]

For a `sequential` run, one that was radialized among them, without any training. Layers go one by one: greedily, each
time the one without which the loss is the least; in random orders; and evenly spread over the depth. Along the greedy
order: how many can go for all tokens alike, for each row by itself, and for each token, with a loss that rises by at
most the share --tolerance. The last two choose by the answer, which a router does not know. --runs are such as were
distilled from the model (form `skip`): their layers and loss on the same text, at exit biases. The last line of stdout
is one JSON object; --out gets it as skips.json, and a plot.
"""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from radialnet import cli
from radialnet.checks import expanded
from radialnet.comparisons import plot_skips
from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import eval_batches
from radialnet.evaluate import held_out_text
from radialnet.files import finite, write_whole
from radialnet.llama import PLAIN_VIEWS
from radialnet.sections import ConfigError
from radialnet.shards import Batch
from radialnet.sources import evenly
from radialnet.train_step import forward_as_evaluated
from radialnet.trained import TrainedModel, load_trained


@partial(jax.jit, static_argnames=("config", "graph"))
def _run(
    params, controllers: Controllers, step, batch: Batch, kept_L: jax.Array, *, config: Config, graph: nnx.GraphDef
) -> tuple[jax.Array, jax.Array]:
    """-log p of each target [B, S], of the model without the layers that are not kept, and the depths of its tokens."""
    # A layer without what it writes adds nothing, and nobody looks at its entries but itself.
    writes = ("attention_out", "attention_out_bias", "mlp_out", "mlp_out_bias")
    block = {
        name: w * kept_L.reshape(-1, *[1] * (w.ndim - 1)) if name in writes else w
        for name, w in params["pool"]["block"].items()
    }
    output = forward_as_evaluated(config, graph, {**params, "pool": {"block": block}}, batch, controllers, step)
    return optax.softmax_cross_entropy_with_integer_labels(output.logits_BSV, batch["target"]), output.depth_BS


class Skipping:
    """A model over some rows: a plain one, of which layers can be left out, or one with a router that skips them."""

    def __init__(self, trained: TrainedModel, batches: list[Batch]):
        self.num_layers, self._batches = trained.config.model.pool_size, batches
        self._run = partial(_run, trained.params, config=trained.config, graph=trained.graph)
        self._controllers, self._step = trained.controllers, np.int32(trained.step)
        self.is_target_RS = np.concatenate([batch["is_target"] for batch in batches])
        self._known: dict[frozenset[int], float] = {}

    def nats(self, gone: list[int]) -> np.ndarray:
        """-log p of each target without some layers, [R, S]; 0 where there is no target."""
        kept_L = jnp.ones(self.num_layers).at[jnp.array(gone, int)].set(0.0)
        runs = (self._run(self._controllers, self._step, batch, kept_L)[0] for batch in self._batches)
        return np.where(self.is_target_RS, np.concatenate([np.asarray(nats_BS) for nats_BS in runs]), 0)

    def routed(self, exit_bias: float) -> tuple[float, float]:
        """Mean executed layers of a token, by the router with that added to its exit bias, and the loss."""
        given, kept_L = (self._controllers.lean(exit_bias), self._step), jnp.ones(self.num_layers)
        runs = [jax.tree.map(np.asarray, self._run(*given, batch, kept_L)) for batch in self._batches]
        nats_RS, depth_RS = (np.concatenate(parts) for parts in zip(*runs, strict=True))
        is_real_RS = np.concatenate([batch["document"] >= 0 for batch in self._batches])
        return float(depth_RS[is_real_RS].mean()), float(nats_RS[self.is_target_RS].mean())

    def ce(self, gone: list[int]) -> float:
        """The mean over all targets."""
        if (key := frozenset(gone)) not in self._known:
            self._known[key] = float(self.nats(gone).sum() / self.is_target_RS.sum())
        return self._known[key]

    def greedy(self, most: int) -> list[int]:
        """Layers in the order in which they go, each the one without which the loss is the least."""
        order: list[int] = []
        for _ in range(most):
            rest = [layer for layer in range(self.num_layers) if layer not in order]
            order.append(min(rest, key=lambda layer: self.ce([*order, layer])))
        return order


def evenly_gone(num_layers: int, num_gone: int) -> list[int]:
    """Layers evenly spread between the first and the last, which stay as long as others can go."""
    inner = num_layers - 2
    if num_gone > inner:
        return list(range(1, 1 + num_gone))
    return [1 + (2 * index + 1) * inner // (2 * num_gone) for index in range(num_gone)]


def most_gone(nats_KRS: np.ndarray, is_target_RS: np.ndarray, tolerance: float) -> dict[str, float]:
    """How many layers can go with a loss that is at most so much more, a share of the mean loss.

    Args:
        nats_KRS: without the first 0, 1, … K-1 layers of an order.

    Returns:
        `all`: of all tokens alike; `row`, `token`: the means over rows, and over tokens, that choose by themselves.
    """
    allowed = tolerance * nats_KRS[0].sum() / is_target_RS.sum()

    def most(nats_KX: np.ndarray, allowed_X) -> np.ndarray:
        fits_KX = nats_KX <= nats_KX[0] + allowed_X
        return (fits_KX * np.arange(len(nats_KX)).reshape(-1, *[1] * (nats_KX.ndim - 1))).max(0)

    num_R = is_target_RS.sum(1)
    has_R = num_R > 0
    return {
        "all": float(most(nats_KRS.sum((1, 2)), allowed * num_R.sum())),
        "row": float(most(nats_KRS.sum(2)[:, has_R], allowed * num_R[has_R]).mean()),
        "token": float(most(nats_KRS[:, is_target_RS], allowed).mean()),
    }


def search(skipping: Skipping, most: int, num_orders: int, tolerance: float) -> dict:
    """All figures of the command. `most`: layers that go at most."""
    order, num_layers = skipping.greedy(most), skipping.num_layers
    nats_KRS = np.stack([skipping.nats(order[:num]) for num in range(most + 1)])
    num_targets = int(skipping.is_target_RS.sum())
    random = [np.random.default_rng(seed).permutation(num_layers)[:most].tolist() for seed in range(num_orders)]
    random_RK = [[skipping.ce(of[:num]) for num in range(most + 1)] for of in random]
    return {
        "layers": num_layers,
        "tokens": num_targets,
        "alone": [skipping.ce([layer]) for layer in range(num_layers)],
        "order": order,
        "greedy": (nats_KRS.sum((1, 2)) / num_targets).tolist(),
        "even": [skipping.ce(evenly_gone(num_layers, num)) for num in range(most + 1)],
        "random": np.mean(random_RK, axis=0).tolist() if random else [],
        "random_std": np.std(random_RK, axis=0).tolist() if random else [],
        "tolerance": tolerance,
        "most": most_gone(nats_KRS, skipping.is_target_RS, tolerance),
    }


def _learned(path: Path, plain: TrainedModel, batches: list[Batch], exit_biases: list[float]) -> list[list[float]]:
    """[layers, loss] of a run at each exit bias, the deepest first. Raises ConfigError: it is none of the model."""
    trained = load_trained(path)
    if trained.config.router.form != "skip":
        raise ConfigError(f"--runs={path}: its form is {trained.config.router.form!r}, 'skip' is needed")
    if trained.tokenizer.fingerprint() != plain.tokenizer.fingerprint():
        raise ConfigError(f"--runs={path}: was trained with another tokenizer than that of --workdir")
    if (layers := trained.config.model.pool_size) != (of_plain := plain.config.model.pool_size):
        raise ConfigError(f"--runs={path}: has {layers} layers, and --workdir {of_plain}")
    trained.check_length(batches[0]["token"].shape[1], "--seq_len", f"--runs={path}")
    skipping = Skipping(trained, batches)
    return sorted(([*skipping.routed(bias)] for bias in exit_biases), reverse=True)


def _show(found: dict) -> None:
    print("each layer gone alone: " + " ".join(f"{ce:.3f}" for ce in found["alone"]))
    names = ("greedy", "even", "random")
    print(f"{'layers gone':>11}  {'layer':>5}" + "".join(f"  {name:>8}" for name in names))
    for num in range(len(found["greedy"])):
        layer = f"{found['order'][num - 1]}" if num else ""
        columns = (f"  {found[name][num]:8.4f}" if found[name] else "" for name in names)
        print(f"{num:>11}  {layer:>5}" + "".join(columns))
    for name, points in found["runs"].items():
        print(f"{name}: " + ", ".join(f"{layers:.2f} layers {ce:.4f}" for layers, ce in points))
    most = found["most"]
    print(
        f"at most {found['tolerance']:.1%} more loss: {most['all']:.0f} of {found['layers']} layers for all alike, "
        f"{most['row']:.2f} if each row chooses, {most['token']:.2f} if each token does"
    )


def main() -> None:
    workdir, out = expanded(_WORKDIR.value), _OUT.value and expanded(_OUT.value)
    trained = load_trained(workdir)
    config = trained.config
    if config.router.form != "sequential":
        raise ConfigError(f"--workdir={_WORKDIR.value}: its form is {config.router.form!r}, 'sequential' is needed")
    if config.cache.view not in PLAIN_VIEWS:
        raise ConfigError(
            f"--workdir={_WORKDIR.value}: of config.cache.view={config.cache.view!r}, in which other layers see what a "
            f"layer wrote; one of {', '.join(PLAIN_VIEWS)} is needed"
        )
    if config.data.source == "hops":
        raise ConfigError(f"--workdir={_WORKDIR.value}: a run on config.data.source='hops', which knows no text")
    if config.model.pool_size == 1:
        raise ConfigError(f"--workdir={_WORKDIR.value}: has a single layer, and none can go")
    if out and out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out}: not a folder")
    if not math.isfinite(_TOLERANCE.value):
        raise ConfigError(f"--tolerance={_TOLERANCE.value}: a number of at least 0 is needed")
    most = config.model.pool_size - 1 if _MOST.value is None else _MOST.value
    if not 0 < most < config.model.pool_size:
        raise ConfigError(f"--most={most}: 1 to {config.model.pool_size - 1} of its layers can go")
    biases = cli.numbers("exit_bias", _EXIT_BIAS.value, float, "numbers")
    seq_len = _SEQ_LEN.value or config.train.seq_len
    trained.check_length(seq_len, "--seq_len", f"--workdir={_WORKDIR.value}")
    folders = [expanded(path) for path in _RUNS.value]
    names = [path.name for path in folders]
    if len(set(names)) < len(names):
        raise ConfigError(f"--runs={','.join(_RUNS.value)}: their folders need names of their own")
    of_length = dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=seq_len))
    rows, told = held_out_text(dataclasses.replace(trained, config=of_length), workdir, _DATA.value)
    num_rows = max(1, min(len(rows), _MAX_TOKENS.value // seq_len))
    rows = [rows[index] for index in evenly(len(rows), num_rows)]
    batches = list(eval_batches(rows, min(config.train.batch_size, num_rows), 0))
    runs = {name: _learned(path, trained, batches, biases) for name, path in zip(names, folders, strict=True)}
    found = {"data": told, **search(Skipping(trained, batches), most, _ORDERS.value, _TOLERANCE.value), "runs": runs}
    if out:
        out.mkdir(parents=True, exist_ok=True)
        plot_skips(found, out / "skips.png")
        write_whole(out / "skips.json", json.dumps(finite(found), indent=1))
    if not _JSON.value:
        _show(found)
    print(json.dumps(finite(found)))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)
    _DATA = flags.DEFINE_string(
        "data", None, "Text in place of the held-out part of its own, or of the standard library."
    )
    _MAX_TOKENS = flags.DEFINE_integer("max_tokens", 2048, "About so many tokens.", lower_bound=1)
    _SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Tokens a row; by default as the run has.", lower_bound=2)
    _MOST = flags.DEFINE_integer("most", None, "Layers that go at most; all but one by default.")
    _ORDERS = flags.DEFINE_integer("orders", 3, "Random orders.", lower_bound=0)
    _TOLERANCE = flags.DEFINE_float("tolerance", 0.01, "By what share the loss may rise.", lower_bound=0.0)
    _RUNS = flags.DEFINE_list("runs", [], "Run folders of models that were distilled from it.")
    _EXIT_BIAS = flags.DEFINE_list("exit_bias", ["-100", "-0.5", "0", "0.5"], "Of --runs: added to what they trained.")
    _OUT = flags.DEFINE_string("out", None, "A folder for skips.json and a plot.")
    _JSON = flags.DEFINE_bool("json", False, "Print the JSON line alone.")
    cli.run(main)
