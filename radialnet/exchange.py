"""Tokens that go to the devices which have their layers, and back: the dispatch `exchange` of a sharded pool.

The devices along the mesh axis `pool` have L/P consecutive layers each. Rows sorted by layer are sorted by owner too;
each device sends every owner its rows, the owner runs `grouped` on what came in, and sends back what came out. Nothing
is dropped: an owner takes in as many rows at a time as there is room for, in as many rounds as are needed.

`ragged`: messages are as long as they have to be. In a round an owner gets the rows of a window of all that are on
their way to it, of the first device, the second, …; there are as many rounds as the fullest owner needs.
`padded`: all messages of a round are equally long; there are as many rounds as the fullest pair of devices needs. For
platforms that have no `ragged_all_to_all` (`default_kind`).

The backward pass sends the rows again and computes the products once more, for the rounds are as many as the routes
want and nothing of unknown size can be kept.
"""

import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from radialnet import grouped
from radialnet.config import Config
from radialnet.cost import weights_by_part
from radialnet.grouping import Groups, gather, plan, scatter
from radialnet.row_function import RowFunction, compute, layer_of
from radialnet.sections import RouterConfig

# Rounds where all owners get as many rows: the more, the closer the time to the rows that come, and the shorter the
# messages. And how much more room there is than that, so that the usual unevenness takes no round more.
_ROUNDS, _SLACK = 4, 1.03


@flax.struct.dataclass
class Exchange:
    """Which rows go where, of one depth step. P devices, this one the `here`-th of them."""

    count_PPL: jax.Array  # Rows of each device, owner and layer of the owner.
    here: jax.Array
    num_slots: int = flax.struct.field(pytree_node=False)  # Rows that come in at a time.
    kind: str = flax.struct.field(pytree_node=False)  # ragged or padded.
    backend: str = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, groups: Groups, num_parts: int, kind: str) -> "Exchange":
        """Of rows sorted by layer, of all layers. Within a `shard_map` over `pool`, an axis of size `num_parts`."""
        count_PL = jax.lax.all_gather(groups.count_L, "pool")
        unit = num_parts if kind == "padded" else 8
        return cls(
            count_PPL=count_PL.reshape(num_parts, num_parts, -1),
            here=jax.lax.axis_index("pool"),
            num_slots=math.ceil(len(groups.row_N) * _SLACK / _ROUNDS / unit) * unit,
            kind=kind,
            backend=groups.backend,
        )

    @property
    def _message(self) -> int:
        """Rows of a message, if all are equally long."""
        return self.num_slots // len(self.count_PPL)

    @property
    def _count_PP(self) -> jax.Array:
        """Rows of each device for each owner."""
        return self.count_PPL.sum(-1)

    def run(self, body, carry):
        """carry = body(round, carry) for all rounds; as many on all devices of the axis, for they meet in each."""
        if self.kind == "padded":
            num_rounds = -(-self._count_PP.max() // self._message)
        else:
            num_rounds = -(-self._count_PP.sum(0).max() // self.num_slots)
        # What reads the compiled program (`aot`) can't know how many there will be.
        with jax.named_scope(f"rounds_usually_{_ROUNDS}"):
            return jax.lax.fori_loop(0, num_rounds, body, carry)

    def _window(self, index: jax.Array):
        """Of the rows of each device for each owner: the first one in a round, its slot there, and their number."""
        # Where an owner's rows begin among those of a device.
        row_PP = jnp.cumsum(self._count_PP, axis=1) - self._count_PP
        if self.kind == "padded":
            low_PP, high_PP = (jnp.minimum((index + n) * self._message, self._count_PP) for n in (0, 1))
            slot_PP = jnp.broadcast_to(jnp.arange(len(low_PP))[:, None] * self._message, low_PP.shape)
            return row_PP + low_PP, slot_PP, high_PP - low_PP
        begin_PP = jnp.cumsum(self._count_PP, axis=0) - self._count_PP
        first, end = index * self.num_slots, (index + 1) * self.num_slots
        low_PP, high_PP = (jnp.clip(at, begin_PP, begin_PP + self._count_PP) for at in (first, end))
        return row_PP + low_PP - begin_PP, low_PP - first, high_PP - low_PP

    def groups(self, index: jax.Array) -> Groups:
        """The rows that come in, by layer of this device; some slots stay empty."""
        count_PL = self.count_PPL[:, self.here]
        num_layers = count_PL.shape[1]
        if self.kind == "padded":
            row_Q = index * self._message + jnp.arange(self._message)
            # Of each device's rows in turn; beyond its last one: no layer.
            of_device = jax.vmap(lambda count_L: jnp.searchsorted(jnp.cumsum(count_L), row_Q, side="right"))
            layer_R = of_device(count_PL).ravel()
        else:
            end_X = jnp.cumsum(count_PL.ravel())
            row_R = index * self.num_slots + jnp.arange(self.num_slots)
            cell_R = jnp.searchsorted(end_X, row_R, side="right")
            layer_R = jnp.where(row_R < end_X[-1], cell_R % num_layers, num_layers)
        return plan(layer_R.astype(jnp.int32), num_layers, self.backend)

    @jax.named_scope("exchange")
    def bring(self, x_NX: jax.Array, index: jax.Array, groups: Groups) -> jax.Array:
        """The rows of a round at their owners, sorted: [R, X]."""
        row_PP, slot_PP, size_PP = self._window(index)
        came_RX = jnp.zeros((self.num_slots, x_NX.shape[1]), x_NX.dtype)
        here = self.here
        came_RX = self._send(x_NX, came_RX, row_PP[here], size_PP[here], slot_PP[here], size_PP[:, here])
        return scatter(came_RX, groups)

    @jax.named_scope("exchange")
    def bring_back(self, y_RX: jax.Array, into_NX: jax.Array, index: jax.Array, groups: Groups) -> jax.Array:
        """What came out of a round's rows, written into their places."""
        row_PP, slot_PP, size_PP = self._window(index)
        here = self.here
        y_RX = gather(y_RX, groups)
        return self._send(y_RX, into_NX, slot_PP[:, here], size_PP[:, here], row_PP[:, here], size_PP[here])

    def _send(self, x_NX, into_MX, row_P, size_P, at_P, came_P) -> jax.Array:
        """Send each device of the axis some rows, and write what they send to here into `into`.

        Args:
            row_P, size_P, at_P: of the rows for each device: where they begin, how many, and where they go to there.
            came_P: how many come from each device.
        """
        args = x_NX, into_MX, *(x.astype(jnp.int32) for x in (row_P, size_P, at_P, came_P))
        if self.kind == "padded":
            return _send_padded(self._message, *args)
        # CPUs, which take this for tests alone, send as much as there may be.
        longest = partial(_send_padded, min(len(x_NX), len(into_MX)))
        ragged = partial(jax.lax.ragged_all_to_all, axis_name="pool")
        return jax.lax.platform_dependent(*args, cpu=longest, default=ragged)


def map_forward(function: RowFunction, weights: dict, rows: tuple, exchange: Exchange, fixed: tuple = ()):
    """`grouped.map_rows` of this device's sorted rows, at their owners; and the rows that this device computed.

    Args:
        weights: of the layers of this device.
    """
    shapes = jax.eval_shape(partial(compute, function), layer_of(weights, 0), (*rows, *fixed))[0]
    outputs = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def body(index, carry):
        outputs, num_computed = carry
        groups = exchange.groups(index)
        here = jax.tree.map(lambda x_NX: exchange.bring(x_NX, index, groups), (rows, fixed))
        new, _ = grouped.map_forward(function, weights, here[0], groups, here[1])
        outputs = jax.tree.map(lambda y_RX, into: exchange.bring_back(y_RX, into, index, groups), new, outputs)
        return outputs, num_computed + groups.num_computed()

    return exchange.run(body, (outputs, jnp.int32(0)))


def map_backward(
    function: RowFunction, weights: dict, rows: tuple, exchange: Exchange, fixed: tuple, d_outputs, d_weights: dict
):
    """The gradients of `map_forward`: those of this device's weights added to `d_weights`, and those of its rows."""

    def body(index, carry):
        d_weights, d_rows = carry
        groups = exchange.groups(index)
        of_rows, of_fixed, d_here = jax.tree.map(
            lambda x_NX: exchange.bring(x_NX, index, groups), (rows, fixed, d_outputs)
        )
        kept = grouped.empty_kept(function, weights, of_rows, of_fixed, num_depth_steps=1)
        _, kept = grouped.map_forward(function, weights, of_rows, groups, of_fixed, kept)
        d_weights, new = grouped.map_backward(function, weights, of_rows, groups, of_fixed, kept, 0, d_here, d_weights)
        d_rows = jax.tree.map(lambda y_RX, into: exchange.bring_back(y_RX, into, index, groups), new, d_rows)
        return d_weights, d_rows

    return exchange.run(body, (d_weights, jax.tree.map(jnp.zeros_like, rows)))


def _send_padded(length, x_NX, into_MX, row_P, size_P, at_P, came_P):
    """`Exchange._send` with messages of one length."""
    index_Q = jnp.arange(length)
    message_PQX = jnp.take(x_NX, row_P[:, None] + index_Q, axis=0, mode="clip")
    came_PQX = jax.lax.all_to_all(message_PQX, "pool", 0, 0, tiled=True)
    at_P = jax.lax.all_to_all(at_P, "pool", 0, 0, tiled=True)
    place_PQ = jnp.where(index_Q < came_P[:, None], at_P[:, None] + index_Q, len(into_MX))
    return into_MX.at[place_PQ].set(came_PQX, mode="drop")


def default_kind(device: jax.Device) -> str:
    """What the platform of a device has: TPUs v5e only where they are 16 at most, CPUs not at all."""
    is_v5e = device.device_kind in ("TPU v5 lite", "TPU v5e")
    return "padded" if device.platform == "cpu" or is_v5e else "ragged"


def choose_dispatch(config: Config, sizes: dict[str, int]) -> tuple[bool, str]:
    """Whether a training step exchanges tokens or gathers layers, and why: by `wire_bytes`."""
    mesh, router = config.mesh, config.router
    if sizes["pool"] == 1:
        return False, "config.mesh.pool=1"
    depth = router.depth_target if config.has_exits else config.model.max_depth
    gather_gb, exchange_gb = (num_bytes / 1e9 for num_bytes in wire_bytes(config, sizes, depth))
    told = f"{gather_gb:.2f} GB of layers to a device and step, {exchange_gb:.2f} GB of tokens"
    if mesh.pool_dispatch != "auto":
        return mesh.pool_dispatch == "exchange", f"config.mesh.pool_dispatch; {told}"
    if router.estimator == "dense" and router.is_trained:
        return False, "config.router.estimator='dense' runs all layers"
    if _goes_by_step(config.router, config.model.num_layer_groups):
        return False, f"a depth step uses few layers, and so few devices; {told}"
    return exchange_gb < gather_gb, told


def wire_bytes(config: Config, sizes: dict[str, int], depth: float) -> tuple[float, float]:
    """Bytes that a device gets for the pool in a training step: if layers are gathered, and if tokens are exchanged.

    Layers: once for all depth steps in the precision of the products, and their gradient in fp32. Tokens: at each step,
    forwards and backwards, the residual stream eight times in fp32, what attention gets twice and what it gives three
    times. (With tensors split, a part of the latter two.)

    Args:
        depth: executed layers of a token.
    """
    model = config.model
    fsdp, pool, tensor = sizes["fsdp"], sizes["pool"], sizes["tensor"]
    kv_width = model.num_kv_heads * model.head_size
    num_weights = model.pool_size * weights_by_part(config, 0)["layer"] / tensor
    size = 2 if model.dtype == "bfloat16" else 4
    layers = num_weights * (size + 4) * config.train.accumulate_steps
    qkv, mixed = (model.d_model + 2 * kv_width) / tensor, model.d_model / tensor
    token = 8 * 4 * model.d_model + size * (2 * qkv + 3 * mixed)
    num_tokens = config.train.batch_size * config.train.seq_len / (sizes["data"] * fsdp * pool)
    gathered = layers * (1 - 1 / (fsdp * pool))
    return gathered, layers / pool * (1 - 1 / fsdp) + num_tokens * depth * token * (1 - 1 / pool)


def _goes_by_step(router: RouterConfig, num_groups: int) -> bool:
    """Whether all tokens go to the same few layers at a depth step."""
    if router.form in ("factored", "flat"):
        is_by_step = router.prior == "sequential" or (router.needs_groups and num_groups > 1)
        return is_by_step and router.prior_steps == 0 and router.prior_weight > 0
    if router.gives_layers:
        return router.is_in_order or num_groups > 1
    return router.form not in ("random", "hash")
