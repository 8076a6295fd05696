"""The pool: L layers, each token through the one that its route names, over one unified cache."""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from radialnet import attention, exchange, grouped
from radialnet.attention import attend, attend_backward, attend_forward, attend_with_own
from radialnet.cache import Packing, UnifiedCache, document_starts
from radialnet.exchange import Exchange
from radialnet.grouping import Groups, gather, permute, plan, scatter
from radialnet.layers import Block, rotation
from radialnet.orders import Orders
from radialnet.router import Route, group_of_layer
from radialnet.sections import ModelConfig
from radialnet.sharding import ALONE, Parallel


@flax.struct.dataclass
class Positions:
    """What attention needs to know of a batch of packed rows; the same at every depth step."""

    rotation_NK: jax.Array
    document_start_BS: jax.Array

    @classmethod
    def of(cls, document_BS: jax.Array, position_BS: jax.Array, cfg: ModelConfig) -> "Positions":
        turned_NK = rotation(position_BS.ravel(), cfg)
        return cls(turned_NK, document_starts(document_BS))


@flax.struct.dataclass
class Attended:
    """What a depth step leaves behind, beside its products, so that its backward pass need not compute it again."""

    q_BSHK: jax.Array
    mixed_BSHK: jax.Array
    lse_BSH: jax.Array
    update_ND: jax.Array


@flax.struct.dataclass
class Products:
    """What the matrix products of both halves of a layer gave, by name, of sorted rows, at T steps: [T, N, Y]."""

    before: dict[str, jax.Array]
    after: dict[str, jax.Array]


class LayerPool(nnx.Module):
    """L blocks stacked on the first axis.

    The two halves of a layer run on rows sorted by layer; attention runs on tokens packed by row of the batch, over the
    cache. `__call__` leaves the gradient to autodiff. `forward` and `backward` are the same by hand, for loops over
    depth that keep one cache for all steps and add up the gradient of the weights in place.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        num_layers: int,
        residual_scale: float,
        rngs: nnx.Rngs,
        is_in_order: bool,
        layer_axis: str | None = None,
        parallel: Parallel = ALONE,
    ):
        """
        Args:
            is_in_order: whether all tokens of a depth step go through one layer.
            layer_axis: the logical name of the axis of layers (`sharding.RULES`).
        """
        self.cfg, self.num_layers, self.parallel = cfg, num_layers, parallel
        self.num_at_once = 1 if is_in_order else num_layers
        self.block = Block(cfg, num_layers, residual_scale, rngs, layer_axis, parallel)

    def gather_weights(self, dtype: jnp.dtype | None) -> None:
        """Bring the weights of all layers to this device, in place: once for all depth steps.

        Args:
            dtype: of the matrices of products from here on; None: as they are.
        """
        for name, param in self.block.params().items():
            casts = dtype is not None and name in self.block.MATRICES
            weights = param[...].astype(dtype) if casts else param[...]
            param.set_value(self.parallel.gather(weights, param.axes))

    def scatter_sum(self, d_block: dict[str, jax.Array]) -> None:
        """The transpose of `gather_weights`: this device's part of the gradients' sums, in place of the weights.

        Args:
            d_block: the gradients, in the form that `Block.weights` gives the weights.
        """
        d_block = self.block.folded(d_block)
        for name, param in self.block.params().items():
            param.set_value(self.parallel.scatter_sum(d_block[name].reshape(param.shape), param.axes))

    def empty_cache(self, view: str, max_depth: int, batch: int, seq: int) -> UnifiedCache:
        cfg = self.cfg
        heads = cfg.num_kv_heads // self.parallel.tensor
        return UnifiedCache.empty(view, max_depth, batch, seq, heads, cfg.head_size, jnp.dtype(cfg.dtype))

    def empty_products(self, num_depth_steps: int, num_tokens: int) -> Products:
        """Room for the products of some depth steps."""
        cfg, block, shape = self.cfg, self.block, jax.ShapeDtypeStruct
        h_ND, rotation_NK = (shape((num_tokens, width), jnp.float32) for width in (cfg.d_model, cfg.head_size))
        mixed_NX = shape((num_tokens, cfg.d_model // self.parallel.tensor), jnp.dtype(cfg.dtype))
        before, after = block.weights(block.BEFORE), block.weights(block.AFTER)
        return Products(
            grouped.empty_kept(block.before_attention, before, (h_ND,), (rotation_NK,), num_depth_steps),
            grouped.empty_kept(block.after_attention, after, (h_ND, mixed_NX), (), num_depth_steps),
        )

    @jax.named_scope("layer")
    def __call__(
        self, h_BSD: jax.Array, layer_BS: jax.Array, cache: UnifiedCache, positions: Positions, depth_step: jax.Array
    ) -> tuple[jax.Array, UnifiedCache]:
        """One depth step: each token's layer writes its entry and reads what it sees.

        Args:
            layer_BS: the layer of each token, 0…L-1; L for a token that executes nothing.

        Returns:
            The update of the residual stream [B, S, D], 0 where nothing was executed, and the cache with the entries.
        """
        orders, block = self._orders(layer_BS, cache), self.block
        groups, to_packed, to_sorted = orders.groups, orders.sorted_to_packed, orders.packed_to_sorted
        h_ND = scatter(h_BSD.reshape(-1, h_BSD.shape[-1]), groups)
        fixed = (scatter(positions.rotation_NK, groups),)
        q_NX, k_NX, v_NX = grouped.map_rows(block.before_attention, block.weights(block.BEFORE), (h_ND,), groups, fixed)
        q_BSHK = self._heads(permute(q_NX, to_packed, to_sorted), layer_BS.shape)
        cache = orders.append(cache, k_NX, v_NX, depth_step)
        visibility = orders.visibility(cache, positions.document_start_BS)
        mixed_BSHK = attend(q_BSHK, cache.k_BCGK, cache.v_BCGK, visibility, self.attention_backend)
        mixed_NX = permute(mixed_BSHK.reshape(q_NX.shape), to_sorted, to_packed)
        update_ND = grouped.map_rows(block.after_attention, block.weights(block.AFTER), (h_ND, mixed_NX), groups)
        return gather(update_ND, groups).reshape(h_BSD.shape), cache

    @jax.named_scope("layer")
    def forward(
        self,
        h_BSD: jax.Array,
        layer_BS: jax.Array,
        cache: UnifiedCache,
        positions: Positions,
        depth_step: jax.Array,
        products: Products,
        t: jax.Array | int,
        is_again: bool = False,
    ) -> tuple[jax.Array, UnifiedCache, Attended, Products, jax.Array]:
        """`__call__`, with what `backward` needs, and the number of rows that were computed.

        Args:
            products: where they are written to, at step t. Without any room, none are kept.
            is_again: the step was run before and `cache` has its entries.
        """
        orders, block = self._orders(layer_BS, cache), self.block
        groups, to_packed, to_sorted = orders.groups, orders.sorted_to_packed, orders.packed_to_sorted
        h_ND = scatter(h_BSD.reshape(-1, h_BSD.shape[-1]), groups)
        fixed = (scatter(positions.rotation_NK, groups),)
        (q_NX, k_NX, v_NX), before, num_computed = self._map_forward(
            block.before_attention, block.BEFORE, (h_ND,), orders, fixed, products.before, t
        )
        q_BSHK = self._heads(permute(q_NX, to_packed, to_sorted), layer_BS.shape)
        if not is_again:
            cache = orders.append(cache, k_NX, v_NX, depth_step)
        visibility = orders.visibility(cache, positions.document_start_BS)
        mixed_BSHK, lse_BSH = attend_forward(q_BSHK, cache.k_BCGK, cache.v_BCGK, visibility, self.attention_backend)
        mixed_NX = permute(mixed_BSHK.reshape(q_NX.shape), to_sorted, to_packed)
        update_ND, after, _ = self._map_forward(
            block.after_attention, block.AFTER, (h_ND, mixed_NX), orders, (), products.after, t
        )
        update_ND = gather(update_ND, groups)
        attended = Attended(q_BSHK, mixed_BSHK, lse_BSH, update_ND)
        return update_ND.reshape(h_BSD.shape), cache, attended, Products(before, after), num_computed

    @jax.named_scope("layer")
    def backward(
        self,
        h_BSD: jax.Array,
        layer_BS: jax.Array,
        cache: UnifiedCache,
        positions: Positions,
        depth_step: jax.Array,
        attended: Attended,
        products: Products,
        t: jax.Array | int,
        d_update_BSD: jax.Array,
        d_entries: tuple[jax.Array, jax.Array],
        d_block: dict[str, jax.Array],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
        """The gradient of `forward`.

        Args:
            cache: as it was after the step.
            d_entries: of keys and values of that cache, from all later steps; fp32.
            d_block: of the weights, from all later steps.

        Returns:
            The gradients of h, of the entries of the cache before the step, and of the weights.
        """
        orders, block = self._orders(layer_BS, cache), self.block
        groups, to_packed, to_sorted = orders.groups, orders.sorted_to_packed, orders.packed_to_sorted
        h_ND = scatter(h_BSD.reshape(-1, h_BSD.shape[-1]), groups)
        mixed_NX = permute(attended.mixed_BSHK.reshape(len(h_ND), -1), to_sorted, to_packed)
        d_update_ND = scatter(d_update_BSD.reshape(h_ND.shape), groups)
        d_after, (d_h_ND, d_mixed_NX) = self._map_backward(
            block.after_attention,
            block.AFTER,
            (h_ND, mixed_NX),
            orders,
            (),
            products.after,
            t,
            d_update_ND,
            d_block,
        )

        d_mixed_BSHK = permute(d_mixed_NX, to_packed, to_sorted).reshape(attended.mixed_BSHK.shape)
        d_q_BSHK, *d_entries = attend_backward(
            attended.q_BSHK,
            cache.k_BCGK,
            cache.v_BCGK,
            orders.visibility(cache, positions.document_start_BS),
            attended.mixed_BSHK,
            attended.lse_BSH,
            d_mixed_BSHK,
            *d_entries,
            self.attention_backend,
        )
        d_new, d_entries = cache.appended_gradient(*d_entries, orders.packing, depth_step)

        d_qkv = (
            permute(d_q_BSHK.reshape(len(h_ND), -1), to_sorted, to_packed),
            *(
                permute(grad.reshape(len(h_ND), -1), orders.entries_to_sorted, orders.sorted_to_entries)
                for grad in (grad.astype(d_q_BSHK.dtype) for grad in d_new)
            ),
        )
        d_before, (d_h_before_ND,) = self._map_backward(
            block.before_attention,
            block.BEFORE,
            (h_ND,),
            orders,
            (scatter(positions.rotation_NK, groups),),
            products.before,
            t,
            d_qkv,
            d_block,
        )
        d_h_BSD = gather(d_h_ND + d_h_before_ND, groups).reshape(h_BSD.shape)
        return d_h_BSD, d_entries, {**d_before, **d_after}

    def _map_forward(self, function, names, rows, orders: Orders, fixed, kept, t):
        """Outputs and products of a half of the layers, and the number of rows that were computed here."""
        weights = self.block.weights(names)
        if orders.exchange is None:
            outputs, kept = grouped.map_forward(function, weights, rows, orders.groups, fixed, kept, t)
            return outputs, kept, orders.groups.num_computed()
        assert not kept, "rows that are computed elsewhere leave no products here"
        outputs, num_computed = exchange.map_forward(function, weights, rows, orders.exchange, fixed)
        return outputs, {}, num_computed

    def _map_backward(self, function, names, rows, orders: Orders, fixed, kept, t, d_outputs, d_block):
        """The gradients of `_map_forward`, those of the weights added to what `d_block` has of them."""
        weights, d_weights = self.block.weights(names), {name: d_block[name] for name in names}
        if orders.exchange is None:
            return grouped.map_backward(function, weights, rows, orders.groups, fixed, kept, t, d_outputs, d_weights)
        return exchange.map_backward(function, weights, rows, orders.exchange, fixed, d_outputs, d_weights)

    def all_layers(
        self, h_BSD: jax.Array, layer_BS: jax.Array, cache: UnifiedCache, positions: Positions, depth_step: jax.Array
    ) -> jax.Array:
        """The updates [L, B, S, D] that each layer would have made at the step that `cache` holds the entries of.

        A layer that was not chosen sees its own entry of the token in place of the one that the chosen layer wrote.
        Attention is whole in memory here: for the `dense` estimator, which is for tests and small studies.
        """
        (batch, seq, d_model), num_layers = h_BSD.shape, self.num_layers
        executes_BS = layer_BS < num_layers
        all_LBS = jnp.broadcast_to(jnp.arange(num_layers)[:, None, None], (num_layers, batch, seq))
        all_LBS = jnp.where(executes_BS, all_LBS, num_layers)
        groups, packing = self.groups(all_LBS.ravel()), Packing.of(executes_BS)
        block = self.block
        h_RD = scatter(jnp.tile(h_BSD.reshape(-1, d_model), (num_layers, 1)), groups)
        fixed = (scatter(jnp.tile(positions.rotation_NK, (num_layers, 1)), groups),)
        qkv = grouped.map_rows(block.before_attention, block.weights(block.BEFORE), (h_RD,), groups, fixed)
        q_LBSHK, k_LBSGK, v_LBSGK = (self._heads(gather(x, groups), (num_layers, batch, seq)) for x in qkv)
        # The slot of each token's own entry of this step, if the view looks at it.
        token_BC = cache.token_BC
        if len(token_BC[0]) > seq:
            is_new_BC = jnp.arange(token_BC.shape[1]) >= (cache.num_B - packing.num_B)[:, None]
        else:
            is_new_BC = jnp.broadcast_to(depth_step == 0 if cache.view == "first" else True, token_BC.shape)
        own_BSC = (token_BC[:, None, :] == jnp.arange(seq)[None, :, None]) & is_new_BC[:, None]
        own_BSC &= executes_BS[..., None]

        def mix(q_BSHK, k_BSGK, v_BSGK, layer_BS):
            in_order = Packing(
                jnp.where(executes_BS, jnp.arange(seq), -1), packing.source_N, packing.place_N, packing.num_B
            )
            visible_BSC = cache.visibility(positions.document_start_BS, layer_BS, in_order).mask() & ~own_BSC
            return attend_with_own(q_BSHK, cache.k_BCGK, cache.v_BCGK, visible_BSC, k_BSGK, v_BSGK, own_BSC.any(-1))

        mixed_LBSHK = jax.vmap(mix)(q_LBSHK, k_LBSGK, v_LBSGK, all_LBS)
        mixed_RX = scatter(mixed_LBSHK.reshape(len(h_RD), -1), groups)
        update_RD = grouped.map_rows(block.after_attention, block.weights(block.AFTER), (h_RD, mixed_RX), groups)
        return gather(update_RD, groups).reshape(num_layers, batch, seq, d_model)

    def choose(
        self, h_BSD, route: Route, cache: UnifiedCache, positions: Positions, depth_step: jax.Array
    ) -> tuple[jax.Array, UnifiedCache]:
        """`__call__` with the `dense` estimator: the chosen layer's update, with the gradient of the full one-hot."""
        _, cache = self(h_BSD, route.layer_BS, cache, positions, depth_step)
        update_LBSD = self.all_layers(h_BSD, route.layer_BS, cache, positions, depth_step)
        p_BSL = route.p_layer_BSL
        gate_BSL = jax.nn.one_hot(route.layer_BS, self.num_layers) + p_BSL - jax.lax.stop_gradient(p_BSL)
        return jnp.einsum("BSL,LBSD->BSD", gate_BSL, update_LBSD), cache

    @property
    def attention_backend(self) -> str:
        """The one of the config, or what "auto" means here."""
        backend = self.cfg.attention_backend
        return attention.default_backend(jax.default_backend()) if backend == "auto" else backend

    @property
    def grouped_backend(self) -> str:
        backend = self.cfg.grouped_backend
        return grouped.default_backend(jax.default_backend()) if backend == "auto" else backend

    def groups(self, layer_N: jax.Array) -> Groups:
        """How the tokens of a depth step lie when they are sorted by layer."""
        return plan(layer_N, self.num_layers, self.grouped_backend, num_at_once=self.num_at_once)

    def _orders(self, layer_BS: jax.Array, cache: UnifiedCache) -> Orders:
        packing = Packing.of(layer_BS < self.num_layers)
        groups, parallel = self.groups(layer_BS.ravel()), self.parallel
        exchange = Exchange.of(groups, parallel.pool, parallel.exchange) if parallel.exchanges else None
        return Orders.of(groups, layer_BS, packing, cache.is_packed, exchange)

    def _heads(self, x_NX: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return x_NX.reshape(*shape, -1, self.cfg.head_size)


def clone_groups(block: Block, num_layers: int, num_groups: int) -> None:
    """Make all layers of a group start equal to its first (`model.init="clones"`), in place.

    Keys and values of the layers that compete for a token then share a space from the start.
    """
    group_L = group_of_layer(num_layers, num_groups)
    first_L = jnp.searchsorted(group_L, group_L)
    nnx.update(block, jax.tree.map(lambda weights: weights[first_L], nnx.state(block, nnx.Param)))
