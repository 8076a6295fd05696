"""A forward pass that looks at each execution of a layer: where residual ratios and sparsity are taken from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from radialnet.cache import UnifiedCache
from radialnet.config import Config
from radialnet.controllers import Controllers, schedule
from radialnet.depth import DepthLoop, Inputs, decide
from radialnet.grouping import gather
from radialnet.layers import normed
from radialnet.model import RadialTransformer
from radialnet.pool import LayerPool, Positions
from radialnet.router import recent_tokens, row_keys
from radialnet.shards import Batch


class Execution:
    """What one depth step gave, of all tokens; of those that execute nothing, it stands for nothing."""

    def __init__(self, pool: LayerPool, h_BSD, layer_BS, cache: UnifiedCache, positions: Positions, depth_step, gate):
        self.pool, self.before_BSD, self.layer_BS = pool, h_BSD, layer_BS
        products = pool.empty_products(1, layer_BS.size)
        self.update_BSD, self.cache, _, products, _ = pool.forward(
            h_BSD, layer_BS, cache, positions, depth_step, products, 0
        )
        self.gated_BSD = gate * self.update_BSD
        self.after_BSD = h_BSD + self.gated_BSD
        self._products, self._groups = products.after, pool.groups(layer_BS.ravel())

    def product(self, name: str) -> jax.Array:
        """What a matrix of a layer's second half gave, [B, S, Y]."""
        return gather(self._products[name][0], self._groups).reshape(*self.layer_BS.shape, -1)

    def of_layer(self, name: str) -> jax.Array:
        """A weight of each token's layer, [B, S, …]."""
        return getattr(self.pool.block, name)[...][jnp.minimum(self.layer_BS, self.pool.num_layers - 1)]

    @property
    def attended_BSD(self) -> jax.Array:
        """What attention adds to the stream."""
        attended_BSD = self.product("attention_out").astype(jnp.float32)
        if "attention_out_bias" in self.pool.block.AFTER:
            attended_BSD += self.of_layer("attention_out_bias")
        return attended_BSD

    @property
    def mlp_in_BSD(self) -> jax.Array:
        """What the MLP gets: the stream with what attention has added, normed."""
        names = [name for name in ("mlp_norm", "mlp_norm_bias") if name in self.pool.block.AFTER]
        weights = {name: self.of_layer(name) for name in names}
        return normed(self.before_BSD + self.attended_BSD, weights, "mlp_norm", self.pool.cfg.norm_eps)


def executions(
    model: RadialTransformer,
    config: Config,
    batch: Batch,
    controllers: Controllers,
    step: jax.Array,
    look: Callable[[Execution], object],
) -> tuple[jax.Array, object, jax.Array]:
    """Run packed rows as they are evaluated.

    Args:
        look: returns arrays of an execution, in any tree.

    Returns:
        The residual stream [B, S, D] behind the last layer; what `look` returned, stacked over the X steps of prelude,
        pool and coda; and the layer of each step [X, B, S], counted through all three, −1 for none.
    """
    cfg = config.model
    positions = Positions.of(batch["document"], batch["position"], cfg)
    is_real_BS = batch["document"] >= 0
    found, ran = [], []

    def through(pool: LayerPool | None, h_BSD: jax.Array, first: int) -> jax.Array:
        for layer in range(pool.num_layers if pool else 0):
            layer_BS = jnp.where(is_real_BS, layer, pool.num_layers)
            cache = pool.empty_cache("same_step", 1, *is_real_BS.shape)
            execution = Execution(pool, h_BSD, layer_BS, cache, positions, jnp.int32(0), 1.0)
            h_BSD = execution.after_BSD
            found.append(jax.tree.map(lambda x: x[None], look(execution)))
            ran.append(jnp.where(is_real_BS, first + layer, -1)[None])
        return h_BSD

    h_BSD = through(model.prelude, model.embed(batch["token"], batch["position"]), 0)

    loop_graph, view = nnx.split((model.router, model.pool))[0], config.view_over(cfg.max_depth)
    loop = DepthLoop(
        loop_graph,
        view,
        cfg.max_depth,
        model.estimator,
        model.vocab_size,
        keeps_products=False,
        keeps_attended=False,
        has_survival_gate=not model.reads_states,
    )
    at = schedule(config.router, cfg.max_depth, step).for_evaluation()
    rng_B = row_keys(jax.random.split(jax.random.key(0))[0], 0, len(h_BSD))
    recent_BSW = recent_tokens(batch["token"], positions.document_start_BS, config.router.hash_span)
    inputs = Inputs(recent_BSW, positions, controllers, at, rng_B)

    def depth_step(carry, t):
        h_BSD, log_survival_BS, active_BS, plan, cache = carry
        gate_BS, log_survival_BS, _, route = decide(
            loop, model.router, h_BSD, log_survival_BS, active_BS, t, inputs, plan
        )
        execution = Execution(model.pool, h_BSD, route.layer_BS, cache, positions, t, gate_BS[..., None])
        layer_BS = jnp.where(route.executes_BS, cfg.prelude_layers + route.layer_BS, -1)
        carry = execution.after_BSD, log_survival_BS, active_BS & ~route.exits_BS, route.plan, execution.cache
        return carry, (look(execution), layer_BS)

    cache = model.pool.empty_cache(view, cfg.max_depth, *is_real_BS.shape)
    none = jnp.zeros(is_real_BS.shape)
    carry = h_BSD, none, is_real_BS, model.router.no_plan(is_real_BS.shape), cache
    (h_BSD, *_), (found_T, layer_TBS) = jax.lax.scan(depth_step, carry, jnp.arange(cfg.max_depth))
    found.append(found_T)
    ran.append(layer_TBS)
    h_BSD = through(model.coda, h_BSD, cfg.prelude_layers + cfg.pool_size)
    return h_BSD, jax.tree.map(lambda *parts: jnp.concatenate(parts), *found), jnp.concatenate(ran)
