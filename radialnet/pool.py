"""The pool: L layers, each token through the one that its route names, over one unified cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from radialnet import grouped
from radialnet.cache import UnifiedCache
from radialnet.config import ModelConfig
from radialnet.layers import Block, attend, attend_with_own, rope
from radialnet.router import Route, group_of_layer


class LayerPool(nnx.Module):
    """L blocks stacked on the first axis.

    Attention and MLP of a layer run on rows grouped by layer; attention itself runs in token order, over the cache.
    """

    def __init__(self, cfg: ModelConfig, num_layers: int, residual_scale: float, rngs: nnx.Rngs):
        self.cfg, self.num_layers = cfg, num_layers
        self.block = Block(cfg, num_layers, residual_scale, rngs)

    def __call__(
        self, h_BSD: jax.Array, layer_BS: jax.Array, cache: UnifiedCache, position_BS: jax.Array
    ) -> tuple[jax.Array, UnifiedCache]:
        """One depth step: each token's layer writes its entry and reads what it sees.

        Args:
            layer_BS: the layer of each token, 0…L-1; L for a token that executes nothing.

        Returns:
            The update of the residual stream [B, S, D], 0 where nothing was executed, and the cache with the entries.
        """
        batch, seq, d_model = h_BSD.shape
        groups = self._plan(layer_BS.ravel())
        h_MPD = grouped.scatter(h_BSD.reshape(-1, d_model), groups)
        qkv_NX = grouped.gather(self.block.before_attention(h_MPD, groups), groups)
        q_BSHK, k_BSGK, v_BSGK = self._split_heads(qkv_NX.reshape(batch, seq, -1), position_BS)
        cache = cache.append(k_BSGK, v_BSGK, layer_BS < self.num_layers, layer_BS)
        mixed_BSHK = attend(q_BSHK, *cache.look(layer_BS))
        mixed_MPX = grouped.scatter(mixed_BSHK.reshape(batch * seq, -1), groups)
        update_ND = grouped.gather(self.block.after_attention(h_MPD, mixed_MPX, groups), groups)
        return update_ND.reshape(h_BSD.shape), cache

    def all_layers(
        self, h_BSD: jax.Array, executes_BS: jax.Array, cache: UnifiedCache, position_BS: jax.Array
    ) -> jax.Array:
        """The updates [L, B, S, D] that each layer would have made at the step that `cache` holds the entries of.

        A layer that was not chosen sees its own entry of the token in place of the one that the chosen layer wrote.
        """
        (batch, seq, d_model), num_layers = h_BSD.shape, self.num_layers
        layer_LBS = jnp.broadcast_to(jnp.arange(num_layers)[:, None, None], (num_layers, batch, seq))
        layer_LBS = jnp.where(executes_BS, layer_LBS, num_layers)
        groups = self._plan(layer_LBS.ravel())
        h_MPD = grouped.scatter(jnp.tile(h_BSD.reshape(-1, d_model), (num_layers, 1)), groups)
        qkv_RX = grouped.gather(self.block.before_attention(h_MPD, groups), groups)
        own_SC = cache.own_slots()

        def mix(qkv_BSX, layer_BS):
            q_BSHK, k_BSGK, v_BSGK = self._split_heads(qkv_BSX, position_BS)
            keys, values, visible_BSC = cache.look(layer_BS)
            sees_own_BS = executes_BS & own_SC.any(-1)
            return attend_with_own(q_BSHK, keys, values, visible_BSC & ~own_SC, k_BSGK, v_BSGK, sees_own_BS)

        mixed_LBSHK = jax.vmap(mix)(qkv_RX.reshape(num_layers, batch, seq, -1), layer_LBS)
        mixed_MPX = grouped.scatter(mixed_LBSHK.reshape(num_layers * batch * seq, -1), groups)
        update_RD = grouped.gather(self.block.after_attention(h_MPD, mixed_MPX, groups), groups)
        return update_RD.reshape(num_layers, batch, seq, d_model)

    def choose(self, h_BSD, route: Route, cache: UnifiedCache, position_BS) -> tuple[jax.Array, UnifiedCache]:
        """`__call__` with the `dense` estimator: the chosen layer's update, with the gradient of the full one-hot."""
        _, cache = self(h_BSD, route.layer_BS, cache, position_BS)
        update_LBSD = self.all_layers(h_BSD, route.executes_BS, cache, position_BS)
        p_BSL = route.p_layer_BSL
        gate_BSL = jax.nn.one_hot(route.layer_BS, self.num_layers) + p_BSL - jax.lax.stop_gradient(p_BSL)
        return jnp.einsum("BSL,LBSD->BSD", gate_BSL, update_LBSD), cache

    def _plan(self, layer_N: jax.Array) -> grouped.Groups:
        block = grouped.block_size(layer_N.shape[0], self.num_layers)
        return grouped.plan(layer_N, self.num_layers, block, self.cfg.grouped_backend)

    def _split_heads(self, qkv_BSX: jax.Array, position_BS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads, kv_heads = self.cfg.num_heads, self.cfg.num_kv_heads
        qkv_BSJK = qkv_BSX.reshape(*qkv_BSX.shape[:2], heads + 2 * kv_heads, -1)
        turned_BSJK = rope(qkv_BSJK[:, :, : heads + kv_heads], position_BS, self.cfg.rope_base)
        return turned_BSJK[:, :, :heads], turned_BSJK[:, :, heads:], qkv_BSJK[:, :, heads + kv_heads :]


def clone_groups(block: Block, num_layers: int, max_depth: int) -> None:
    """Make all layers of a group start equal to its first (`model.init="clones"`), in place.

    Keys and values of the layers that compete for a token then share a space from the start.
    """
    group_L = group_of_layer(num_layers, max_depth)
    first_L = jnp.searchsorted(group_L, group_L)
    nnx.update(block, jax.tree.map(lambda weights: weights[first_L], nnx.state(block, nnx.Param)))
