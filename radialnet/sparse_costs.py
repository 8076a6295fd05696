"""What a trained run costs and loses, measured and timed: whole, with layers skipped, with parts of them left out."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import Rows, batches_from
from radialnet.executions import Execution, executions
from radialnet.shards import Batch
from radialnet.sparse import Gates, TopShare, flops_per_token, sparsified
from radialnet.sparse_decode import one_token, rows_of
from radialnet.sparse_training import Seen, fit_predictors, gated, see, train_gates, unlearned
from radialnet.timing import ratio
from radialnet.trained import TrainedModel

# By what each chooses (`TopShare`), gates but for themselves.
METHODS = {"deja_vu": "predicted", "largest": "largest", "static": "static", "random": "random", "gates": None}
# Of a row of decoding that is timed.
_CONTEXT = 128
# Executions of each layer that predictors are trained on.
_SEEN = 8192
_PREDICTOR_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of a model on some text.

    Attributes:
        executes_T: the share of the tokens that execute each depth step.
        units: the share of the hidden units that gates keep, over all executions; 1 without gates.
    """

    ce: float
    executes_T: tuple[float, ...]
    units: float


def measure(model: TrainedModel, batches: list[Batch], exit_bias: float = 0.0) -> Measured:
    """The model as it is evaluated, with that added to its exit bias."""
    nats = units = 0.0
    executed_T, num_targets, num_real = 0, 0, 0
    controllers = model.controllers.lean(exit_bias)
    for batch in batches:
        nats_BS, units_TBS, layer_TBS = jax.tree.map(
            np.asarray,
            _measured(model.params, controllers, np.int32(model.step), batch, config=model.config, graph=model.graph),
        )
        nats += float(nats_BS[batch["is_target"]].sum(dtype=np.float64))
        units += float(units_TBS[layer_TBS >= 0].sum(dtype=np.float64))
        executed_T = executed_T + (layer_TBS >= 0).sum((1, 2))
        num_targets += int(batch["is_target"].sum())
        num_real += int((batch["document"] >= 0).sum())
    # Where all leave before the first layer, nothing is kept of nothing.
    units /= max(int(executed_T.sum()), 1)
    return Measured(nats / num_targets, tuple((executed_T / num_real).tolist()), units)


@partial(jax.jit, static_argnames=("config", "graph"))
def _measured(params, controllers: Controllers, step, batch: Batch, *, config: Config, graph: nnx.GraphDef):
    """-log p of each target [B, S], and of each step the kept share of hidden units and the layer [T, B, S]."""
    model = nnx.merge(graph, params)

    def look(execution: Execution) -> jax.Array:
        if "gate_base" not in execution.pool.block.AFTER:
            return jnp.ones(execution.layer_BS.shape)
        weights = map(execution.of_layer, ("gate_mean", "gate_std", "threshold"))
        return (Gates.above(execution.product("gate_base"), *weights) > 0).mean(-1)

    h_BSD, units_TBS, layer_TBS = executions(model, config, batch, controllers, step, look)
    final_BSD = model.final(h_BSD)
    head_DV = model.head[...].astype(final_BSD.dtype)
    logits_BSV = jnp.matmul(final_BSD, head_DV, preferred_element_type=jnp.float32)
    nats_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, batch["target"])
    return nats_BS, units_TBS, layer_TBS


@dataclasses.dataclass(frozen=True)
class Study:
    """One run, the text that it is measured on, and how the rest is trained."""

    trained: TrainedModel
    held_out: list[Batch]
    train_rows: Rows
    train_tokens: int
    rank: int
    gate_steps: int
    gate_coef: float
    learning_rate: float
    repeats: int

    def train_batches(self) -> Iterator[Batch]:
        """Of the training split, by another seed than the run's."""
        train = self.trained.config.train
        return batches_from(self.train_rows, train.batch_size, train.seed + 1000, range(train.batch_size), 0)

    def seen(self) -> Seen:
        train = self.trained.config.train
        num_batches = max(1, self.train_tokens // (train.batch_size * train.seq_len))
        return see(self.trained, itertools.islice(self.train_batches(), num_batches), _SEEN)

    def rows(
        self, methods: list[str], keeps: list[tuple[float, float]], targets: list[float], biases: list[float]
    ) -> Iterator[dict]:
        """What each method costs and loses.

        Args:
            keeps: shares of heads and of hidden units.
        """
        everything, cfg = Gates(0), self.trained.config
        yield self._row("as it is", "", self.trained, everything)
        for bias in biases:
            yield self._row("exits", f"{bias:g}", self.trained, everything, exit_bias=bias)
        if not methods:
            return
        seen = self.seen()
        for method in (method for method in methods if method != "gates"):
            choice = METHODS[method]
            if learned := choice == "predicted":
                added = fit_predictors(seen, self.rank, _PREDICTOR_STEPS, cfg.train.seed)
            else:
                added = unlearned(self.trained, choice, seen)
            for heads, units in keeps:
                selection = TopShare(choice, heads, units)
                model = sparsified(self.trained, selection, added)
                yield self._row(method, f"{heads:g}, {units:g}", model, selection, timed=learned)
        for target in targets if "gates" in methods else ():
            gates = Gates(max(1, cfg.model.d_model // 4))
            given = self.gate_steps, self.learning_rate, self.gate_coef
            model = gated(self.trained, seen, gates.channels, target)
            model = train_gates(model, self.train_batches(), target, *given)
            yield self._row("gates", f"{target:g}", model, gates, timed=True)

    def _row(self, method, knob, model: TrainedModel, selection, exit_bias: float = 0.0, timed: bool = False) -> dict:
        config, measured = model.config, measure(model, self.held_out, exit_bias)
        heads, units = selection.kept(config) if isinstance(selection, TopShare) else (1.0, measured.units)
        vocab_size, executes_T = model.tokenizer.vocab_size, measured.executes_T
        row = {
            "method": method,
            "knob": knob,
            "seed": config.train.seed,
            "ce": measured.ce,
            "depth": sum(executes_T),
            "heads": heads,
            "units": units,
            "flops_per_token": flops_per_token(config, vocab_size, executes_T, selection, units, self.rank),
            "time": self._time(model, selection, units) if timed and self.repeats else None,
        }
        told = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
        print(", ".join(told), file=sys.stderr, flush=True)
        return row

    def _time(self, model: TrainedModel, selection: TopShare | Gates, units: float) -> float | None:
        """Of the layers for a row of decoding, against all of them; None where they don't run in their order."""
        cfg = model.config.model
        if model.config.router.form != "sequential":
            return None
        rng = np.random.default_rng(0)
        h_D = jnp.asarray(rng.normal(size=cfg.d_model), jnp.float32)
        shape = cfg.pool_size, _CONTEXT, 2, cfg.num_kv_heads, cfg.head_size
        cache_LCJGK = jnp.asarray(rng.normal(size=shape), jnp.float32)
        given = rows_of(model, selection if isinstance(selection, Gates) else None), h_D, cache_LCJGK
        return ratio(
            lambda: one_token(*given, cfg=cfg, selection=selection, units=units),
            lambda: one_token(*given, cfg=cfg, selection=None),
            self.repeats,
        )[0]
