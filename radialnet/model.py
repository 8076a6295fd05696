"""RadialTransformer: embedding, T depth steps of router and pool, output node, head."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from radialnet.checks import check_mesh
from radialnet.config import Config
from radialnet.controllers import Controllers, Schedule
from radialnet.depth import DepthLoop, Inputs, Trace, scanned, unrolled
from radialnet.exchange import choose_dispatch, default_kind
from radialnet.layers import normed
from radialnet.metrics import RoutingSums
from radialnet.peer_routers import make_router
from radialnet.pool import LayerPool, Positions, clone_groups
from radialnet.router import draw, group_of_layer, recent_tokens, row_keys
from radialnet.sections import view_over
from radialnet.sharding import ALONE, Axes, Parallel, Placement, make_mesh


@flax.struct.dataclass
class Output:
    exit_BSD: jax.Array  # The residual stream at the output node.
    final_BSD: jax.Array  # What the head gets: the same, normed, in the compute dtype.
    logits_BSV: jax.Array  # fp32. A program that doesn't use them doesn't compute them.
    routing: RoutingSums
    depth_BS: jax.Array  # Executed layers of the pool.
    layer_TBS: jax.Array  # The layer that each token executed at each depth step; L for none.
    h_TBSD: jax.Array  # The residual stream before each depth step; without a gradient.
    exit_logit_TBS: jax.Array  # e.
    skips_TBS: jax.Array  # Steps at which a token executed nothing; False for padding.
    residual_ratio_TBS: jax.Array  # ‖f(x)‖ / ‖x + f(x)‖ of each executed step, 0 elsewhere; without a gradient.
    read: "Read | None"  # Where exits are trained by what going on is worth.


@flax.struct.dataclass
class Read:
    """One state of a token on its way, at a depth step at which it could have left but went on: of M tokens a row."""

    column_M: jax.Array  # Where they stand, the same in all rows.
    is_read_BM: jax.Array  # False for tokens that left as soon as they could.
    final_BMD: jax.Array  # What the head would have got.
    exit_logit_BM: jax.Array  # e there.
    num_left_BM: jax.Array  # Layers that the token still executed.

    @classmethod
    def of(cls, trace: Trace, column_M: jax.Array, depth_BS: jax.Array, min_depth: int, rng_B: jax.Array) -> "Read":
        """Of each token that is read, a step drawn at random from those it could have left at; `final_BMD` is the bare
        state there, for the caller to norm."""
        depth_BM = depth_BS[:, column_M]
        num_steps_BM = depth_BM - min_depth
        step_BM = min_depth + (draw(jax.random.uniform, rng_B, depth_BM.shape) * num_steps_BM).astype(jnp.int32)
        step_BM = jnp.clip(step_BM, min(min_depth, len(trace.read_BMD) - 1), len(trace.read_BMD) - 1)
        rows_B1 = jnp.arange(len(depth_BS))[:, None]
        return cls(
            column_M=column_M,
            is_read_BM=num_steps_BM > 0,
            final_BMD=trace.read_BMD[step_BM, rows_B1, jnp.arange(len(column_M))],
            exit_logit_BM=trace.exit_logit_BS[step_BM, rows_B1, column_M],
            num_left_BM=jnp.maximum(depth_BM - step_BM, 1),
        )


def spread_columns(num_columns: int, every: int, rng: jax.Array) -> jax.Array:
    """Every so-many-th column of a row, from a random one on, round its end: [M]. One at least."""
    every = min(every, num_columns)
    first = jax.random.randint(rng, (), 0, num_columns)
    return (first + every * jnp.arange(num_columns // every)) % num_columns


class RadialTransformer(nnx.Module):
    """A radial network (arXiv 2404.04900) over packed rows of tokens.

        h_{t+1} = h_t + g_t · Layer_{c_t}(h_t, cache)    for tokens that are still active
        logits  = Head(norm(h_exit))

    `depth` has the loop over depth steps.
    """

    def __init__(self, config: Config, vocab_size: int, rngs: nnx.Rngs, parallel: Parallel = ALONE):
        """
        Args:
            parallel: the part of a device in it, where it runs on several.
        """
        model, self.parallel = config.model, parallel
        self.cfg, self.view, self.is_in_order = model, config.cache.view, config.router.is_in_order
        # A fixed route has no probabilities to learn: nothing is gained by running all layers.
        self.estimator = config.router.estimator if config.router.is_trained else "straight_through"
        self.vocab_size = vocab_size
        self.read_every = config.router.read_every
        self.reads_states = config.router.predicts_benefit and model.min_depth < model.max_depth
        # Keeps the variance of the residual stream about constant in depth (GPT-2's rule): two branches a layer.
        num_executed = model.prelude_layers + model.max_depth + model.coda_layers
        scale = (2 * num_executed) ** -0.5

        def normal(rows: int, columns: int, scale: float, axes: Axes) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), (rows, columns)) * scale, axes=axes)

        def unshared(num_layers: int) -> LayerPool | None:
            at_home = dataclasses.replace(parallel, exchange="")
            return LayerPool(model, num_layers, scale, rngs, True, parallel=at_home) if num_layers else None

        self.embedding = normal(vocab_size, model.d_model, model.d_model**-0.5, (None, "width"))
        self.prelude = unshared(model.prelude_layers)
        self.router = make_router(model, config.router, vocab_size, rngs, parallel)
        self.pool = LayerPool(model, model.pool_size, scale, rngs, self.is_in_order, "layer", parallel)
        self.coda = unshared(model.coda_layers)
        self.final_norm = nnx.Param(jnp.ones(model.d_model), axes=(None,))
        self.final_norm_bias = nnx.Param(jnp.zeros(model.d_model), axes=(None,)) if model.norm == "layer" else None
        is_learned = model.positions == "learned"
        self.positions = normal(model.max_positions, model.d_model, 0.02, (None, "width")) if is_learned else None
        self.head = normal(model.d_model, vocab_size, 0.02, ("width", None))
        if model.init == "clones":
            clone_groups(self.pool.block, model.pool_size, model.num_layer_groups)

    def __call__(
        self,
        token_BS: jax.Array,
        document_BS: jax.Array,
        position_BS: jax.Array,
        controllers: Controllers,
        at: Schedule,
        rng: jax.Array,
        max_depth: int | None = None,
    ) -> Output:
        """Run packed rows.

        Args:
            token_BS: token ids.
            document_BS: which document of the row each token belongs to; negative for padding, which is not routed.
            position_BS: position of each token in its document.
            controllers: the router's biases.
            at: the router's schedule at this training step.
            rng: for the selection noise and random routes, each row of the whole batch by a key of its own.
            max_depth: overrides the trained T; a trained router takes the steps beyond it as the last trained one.
        """
        max_depth = max_depth or self.cfg.max_depth
        is_real_BS = document_BS >= 0
        positions = Positions.of(document_BS, position_BS, self.cfg)
        h_BSD = self._run_unshared(self.prelude, self.embed(token_BS, position_BS), is_real_BS, positions)

        graph, params = nnx.split((self.router, self.pool))
        loop = DepthLoop(
            graph,
            self.view_over(max_depth),
            max_depth,
            self.estimator,
            self.vocab_size,
            # Of rows that are computed elsewhere nothing is kept but what comes back.
            keeps_products=self.cfg.remat == "none" and not self.parallel.exchanges,
            keeps_attended=self.cfg.remat == "none" or self.parallel.exchanges,
            has_survival_gate=not self.reads_states,
        )
        run = unrolled if self.estimator == "dense" else scanned
        first_row, batch = self.parallel.first_row(len(token_BS)), len(token_BS)
        route_rng, read_rng = jax.random.split(rng)
        column_rng, step_rng = jax.random.split(read_rng)
        recent_BSW = recent_tokens(token_BS, positions.document_start_BS, self.router.cfg.hash_span)
        inputs = Inputs(recent_BSW, positions, controllers, at, row_keys(route_rng, first_row, batch))
        if self.reads_states:
            # Evaluation has one key for all batches, and should not look at the same columns in each of them.
            column_rng = jax.random.fold_in(column_rng, self.parallel.sum_rows(token_BS.sum()))
            inputs = inputs.replace(column_M=spread_columns(token_BS.shape[1], self.read_every, column_rng))
        h_BSD, trace = run(loop, params, h_BSD, is_real_BS, inputs)
        depth_BS = (trace.layer_BS < self.cfg.pool_size).sum(0)
        ratio_TBS = residual_ratio(jnp.concatenate([trace.h_BSD, h_BSD[None]]))

        h_BSD = self._run_unshared(self.coda, h_BSD, is_real_BS, positions)
        final_BSD, read = self.final(h_BSD), None
        if self.reads_states:
            rng_B = row_keys(step_rng, first_row, batch)
            read = Read.of(trace, inputs.column_M, depth_BS, self.cfg.min_depth, rng_B)
            read = read.replace(final_BMD=self.final(read.final_BMD))
        head = self.head[...].astype(final_BSD.dtype)
        return Output(
            exit_BSD=h_BSD,
            final_BSD=final_BSD,
            logits_BSV=jnp.matmul(final_BSD, head, preferred_element_type=jnp.float32),
            routing=RoutingSums.of(trace.sums, trace.num_computed, is_real_BS, depth_BS),
            depth_BS=depth_BS,
            layer_TBS=trace.layer_BS,
            h_TBSD=trace.h_BSD,
            exit_logit_TBS=trace.exit_logit_BS,
            skips_TBS=(trace.layer_BS == self.cfg.pool_size) & is_real_BS,
            residual_ratio_TBS=ratio_TBS,
            read=read,
        )

    def view_over(self, max_depth: int) -> str:
        """`Sections.view_over`."""
        return view_over(self.view, self.is_in_order, self.cfg.pool_size, max_depth)

    @jax.named_scope("embed")
    def embed(self, token: jax.Array, position: jax.Array) -> jax.Array:
        """The residual stream that tokens begin with, [..., D]."""
        h = self.embedding[...][token] * self.cfg.d_model**0.5
        return h if self.positions is None else h + self.positions[...][position]

    @jax.named_scope("head")
    def final(self, h: jax.Array) -> jax.Array:
        """What the head gets of the residual stream at the output node, [..., D], in the compute dtype."""
        weights = {"final_norm": self.final_norm[...]}
        if self.final_norm_bias is not None:
            weights["final_norm_bias"] = self.final_norm_bias[...]
        return normed(h, weights, "final_norm", self.cfg.norm_eps).astype(jnp.dtype(self.cfg.dtype))

    def _run_unshared(self, pool: LayerPool | None, h_BSD, is_real_BS, positions: Positions) -> jax.Array:
        """Every token through all layers of a prelude or coda, each layer over the entries of its own."""
        for layer in range(pool.num_layers if pool else 0):
            layer_BS = jnp.where(is_real_BS, layer, pool.num_layers)
            cache = pool.empty_cache("same_step", 1, *is_real_BS.shape)
            update_BSD, _ = pool(h_BSD, layer_BS, cache, positions, jnp.int32(0))
            h_BSD += update_BSD
        return h_BSD


def residual_ratio(h_UBSD: jax.Array) -> jax.Array:
    """How much of a state each step made, ‖h_{t+1} - h_t‖ / ‖h_{t+1}‖ of the T+1 states: [T, B, S], fp32."""
    h_UBSD = jax.lax.stop_gradient(h_UBSD).astype(jnp.float32)
    size_TBS = jnp.linalg.norm(h_UBSD[1:], axis=-1)
    return jnp.linalg.norm(h_UBSD[1:] - h_UBSD[:-1], axis=-1) / jnp.maximum(size_TBS, 1e-20)


def init_params(config: Config, vocab_size: int, parallel: Parallel = ALONE) -> tuple[nnx.GraphDef, dict]:
    """The model's structure and its freshly initialised parameters, a nested dict of arrays.

    Args:
        parallel: the part of a device in the model, where that runs on several; its structure alone depends on it.
    """
    model = RadialTransformer(config, vocab_size, nnx.Rngs(config.train.seed), parallel)
    graph, params = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(params)


def abstract_params(config: Config, vocab_size: int, parallel: Parallel = ALONE) -> tuple[nnx.GraphDef, dict]:
    """`init_params` without the arrays: shapes and dtypes only."""
    graph = None

    def build() -> dict:
        nonlocal graph
        graph, params = init_params(config, vocab_size, parallel)
        return params

    params = jax.eval_shape(build)
    return graph, params


def param_axes(graph: nnx.GraphDef, params: dict) -> dict:
    """The logical axes of each parameter."""
    state = nnx.split(nnx.merge(graph, params), nnx.Param)[1]
    return nnx.to_pure_dict(jax.tree.map(lambda param: param.axes, state, is_leaf=lambda x: isinstance(x, nnx.Param)))


def place(config: Config, vocab_size: int, devices: Sequence[jax.Device]) -> Placement:
    """How a model lies on devices, by the mesh of its config. Raises ConfigError: they don't go together."""
    axes = param_axes(*abstract_params(config, vocab_size))
    mesh = make_mesh(config, devices)
    check_mesh(config, mesh.shape)
    exchanges, reason = choose_dispatch(config, mesh.shape)
    exchange = default_kind(devices[0]) if exchanges else ""
    reason += f"; {exchange} messages" if exchanges else ""
    return Placement(mesh, Parallel(**mesh.shape, exchange=exchange), axes, reason)


def upcycle(params: dict, dense_params: dict, num_layers: int, num_groups: int) -> dict:
    """Parameters of a radial network grown from a dense one of `num_groups` layers (arXiv 2212.05055).

    Every layer of group t starts as the dense layer t; embedding, norm and head are taken over; the router is fresh.
    """
    group_L = group_of_layer(num_layers, num_groups)
    grown_pool = jax.tree.map(lambda weights: weights[group_L], dense_params["pool"])
    return {**params, **dense_params, "pool": grown_pool}
