"""Sparsity within a layer: which heads and hidden units each token pays for, in a pool of any model.

`SparseBlock` is a `Block` whose second half leaves out what its `Selection` does not keep. In the program it is masked,
so that any router, view and backend works with it; what it would save is counted (`flops_per_token`) and, for a row of
decoding, done (`sparse_decode`). With everything kept it gives the layer itself, bit for bit.

DejaVu (arXiv 2310.17157): two products of low rank predict, for each token, which heads and hidden units will add most
to the stream; those of the highest scores are kept. Trained on a model that stays as it is.

Channel Gating (arXiv 1805.12549): of each hidden unit first the sum over a part of the input's channels is taken; where
it is below a threshold of the unit's own, standardised, the unit is given up. Threshold and model are trained together,
each threshold drawn to a target. The paper gives what is left out the partial sum, which ReLU makes 0 where it is
negative; behind a gated unit the rest of the gate would not be enough for that, and it is 0 here.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from radialnet.config import Config
from radialnet.cost import flops_by_part
from radialnet.layers import Block
from radialnet.row_function import Product, RowFunction
from radialnet.trained import TrainedModel


@dataclasses.dataclass(frozen=True)
class TopShare:
    """The share of the heads and of the hidden units of a layer that each token keeps, the highest by `choice`.

    Attributes:
        choice: `largest`: what they add to the stream, which it takes all of them to know. `predicted`: by DejaVu's
            predictors. `static`: how often they are large, whatever the token is. `random`: nothing.
    """

    choice: str
    heads: float
    units: float

    def kept(self, config: Config) -> tuple[float, float]:
        """The shares of heads and of units, in whole ones."""
        pairs = (config.model.num_heads, self.heads), (config.model.d_ff, self.units)
        heads, units = (num_kept(num, share) / num for num, share in pairs)
        return heads, units

    def of_heads(self, w, x_PD, mixed_PX, product: Product) -> jax.Array:
        """1 or 0 for each channel of what attention gave, [P, H·K]; `x`: the stream, normed."""
        size, largest_PH = mixed_PX.shape[1] // w["heads_bias"].shape[-1], None
        if self.choice == "largest":
            largest_PH = head_sizes(product("head_gain", mixed_PX.astype(jnp.float32)), size)
        keeps_PH = self._top(w, "heads", x_PD, largest_PH, self.heads, product)
        return jnp.repeat(keeps_PH, size, axis=1, total_repeat_length=mixed_PX.shape[1]).astype(mixed_PX.dtype)

    def of_units(self, w, y_PD, hidden_PF, product: Product) -> jax.Array:
        """1 or 0 for each hidden unit, [P, F]; `y`: what the MLP got."""
        largest_PF = jnp.abs(hidden_PF) * w["unit_gain"] if self.choice == "largest" else None
        return self._top(w, "units", y_PD, largest_PF, self.units, product).astype(hidden_PF.dtype)

    def _top(self, w, what: str, x_PD, largest_PX, share: float, product: Product) -> jax.Array:
        bias_PX = jnp.broadcast_to(w[f"{what}_bias"], (len(x_PD), w[f"{what}_bias"].shape[-1]))
        if self.choice == "largest":
            return top(largest_PX, share)
        if self.choice == "static":
            return top(bias_PX, share)
        if self.choice == "random":
            return top(_noise(x_PD, bias_PX.shape[1]), share)
        low_PR = jax.nn.relu(product(f"{what}_in", x_PD.astype(jnp.float32)))
        return top(product(f"{what}_out", low_PR) + bias_PX, share)


# Of the sigmoid that stands for the step in the gradient.
_SLOPE = 2.0


@dataclasses.dataclass(frozen=True)
class Gates:
    """The hidden units whose partial sum, over the first `channels` of the input, is above their threshold."""

    channels: int

    def of_heads(self, w, x_PD, mixed_PX, product: Product) -> jax.Array:
        return jnp.ones((), mixed_PX.dtype)

    def of_units(self, w, y_PD, hidden_PF, product: Product) -> jax.Array:
        partial_PF = product("gate_base", y_PD[:, : self.channels])
        above_PF = self.above(partial_PF, w["gate_mean"], w["gate_std"], w["threshold"])
        soft_PF = jax.nn.sigmoid(_SLOPE * above_PF)
        hard_PF = (above_PF > 0).astype(jnp.float32)
        # The sigmoid last, so that its rounding leaves 1 and 0 as they are.
        return (hard_PF + (soft_PF - jax.lax.stop_gradient(soft_PF))).astype(hidden_PF.dtype)

    @staticmethod
    def above(partial, mean, std, threshold) -> jax.Array:
        """By how much standardised partial sums are above their thresholds."""
        return (partial.astype(jnp.float32) - mean) / std - threshold


def top(score_PX: jax.Array, share: float) -> jax.Array:
    """True for the highest of each row, that share of them, at least one; of equal ones the first."""
    num = num_kept(score_PX.shape[1], share)
    if num == score_PX.shape[1]:
        return jnp.ones(score_PX.shape, bool)
    least_P1 = jax.lax.top_k(score_PX, num)[0][:, -1:]
    above_PX, equal_PX = score_PX > least_P1, score_PX == least_P1
    return above_PX | (equal_PX & (jnp.cumsum(equal_PX, axis=1) <= num - above_PX.sum(1, keepdims=True)))


def num_kept(num: int, share: float) -> int:
    """How many of so many are that share of them, at least one."""
    return max(1, round(share * num))


def head_sizes(gained_PX: jax.Array, size: int) -> jax.Array:
    """The squared size of what each head adds to the stream [P, H], from what `head_gain` gave."""
    return jnp.square(gained_PX).reshape(len(gained_PX), -1, size).sum(-1)


def _noise(x_PD: jax.Array, num: int) -> jax.Array:
    """Numbers [P, num] in 0…1 that follow from a token's state, and have nothing to do with it."""
    of_state_P1 = 1e3 * jnp.abs(x_PD.astype(jnp.float32)).sum(1, keepdims=True)
    turned_PX = jnp.sin(of_state_P1 + 12.9898 * jnp.arange(1, num + 1)) * 43758.5453
    return turned_PX - jnp.floor(turned_PX)


class SparseBlock(Block):
    """Layers whose second half leaves out heads and hidden units, with what its selection needs to know."""

    def __init__(self, block: Block, selection: TopShare | Gates, added: dict[str, jax.Array]):
        """
        Args:
            added: matrices [L, X, Y] and vectors [L, X] of the selection.
        """
        for name, param in block.params().items():
            setattr(self, name, param)
        self.shared, self.dtype, self.eps, self.parallel = block.shared, block.dtype, block.eps, block.parallel
        self.activation, self.selection, self.added = block.activation, selection, tuple(added)
        for name, weights in added.items():
            setattr(self, name, nnx.Param(weights, axes=("layer", *[None] * (weights.ndim - 1))))

    @property
    def AFTER(self) -> tuple[str, ...]:
        derived = ("gate_base",) if isinstance(self.selection, Gates) else ()
        return (*super().AFTER, *self.added, *derived)

    def params(self) -> dict[str, nnx.Param]:
        return {name: getattr(self, name) for name in (*self.BEFORE, *self.AFTER) if name != "gate_base"}

    def weights(self, names: tuple[str, ...]) -> dict[str, jax.Array]:
        own = {name: getattr(self, name)[...] for name in names if name in self.added}
        if "gate_base" in names:
            own["gate_base"] = self.mlp_in[:, : self.selection.channels, 0]
        return super().weights(tuple(name for name in names if name not in own)) | own

    def folded(self, d_weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if "gate_base" not in d_weights:
            return d_weights
        d_in = d_weights["mlp_in"].reshape(self.mlp_in.shape)
        d_in = d_in.at[:, : self.selection.channels, 0].add(d_weights["gate_base"])
        return {**d_weights, "mlp_in": d_in}

    @property
    def after_attention(self) -> RowFunction:
        return partial(super().after_attention, selection=self.selection)


def sparsified(trained: TrainedModel, selection: TopShare | Gates, added: dict[str, jax.Array]) -> TrainedModel:
    """The model with layers of its pool that leave out what is not selected."""
    model = nnx.merge(trained.graph, trained.params)
    model.pool.block = SparseBlock(model.pool.block, selection, added)
    graph, params = nnx.split(model, nnx.Param)
    return dataclasses.replace(trained, graph=graph, params=nnx.to_pure_dict(params))


def gains(trained: TrainedModel) -> dict[str, jax.Array]:
    """What turns a unit's, or a head's, output into the size of what it adds to the stream.

    `unit_gain` [L, F]: the norms of the rows of `mlp_out`. `head_gain` [L, H·K, H·K]: of each head the R of its rows'
    QR decomposition, whose products are as large as those of the rows.
    """
    model, block = trained.config.model, trained.params["pool"]["block"]
    out_LHKD = block["attention_out"].reshape(model.pool_size, model.num_heads, model.head_size, -1)
    r_LHKK = jnp.linalg.qr(out_LHKD.swapaxes(2, 3), mode="r").swapaxes(2, 3)
    apart_LHKHK = jnp.einsum("LHKR,HJ->LHKJR", r_LHKK, jnp.eye(model.num_heads))
    width = model.num_heads * model.head_size
    return {
        "unit_gain": jnp.linalg.norm(block["mlp_out"], axis=-1),
        "head_gain": apart_LHKHK.reshape(model.pool_size, width, width),
    }


def flops_per_token(
    config: Config, vocab_size: int, executes_T, selection: TopShare | Gates, units: float, rank: int = 0
) -> float:
    """`cost.flops_per_token` of a model whose layers leave out what is not selected, with what it takes to select.

    Keys and values are those of all heads, for later tokens may look at them. A choice that no predictor makes is for
    nothing: what is known of the largest heads and units is a bound.

    Args:
        executes_T: share of tokens that execute each depth step.
        units: the share of the hidden units that gates keep, measured; of another selection it is known.
        rank: of the predictors.
    """
    model, parts = config.model, flops_by_part(config, vocab_size, executes_T)
    executed, width = float(np.sum(executes_T)), model.num_heads * model.head_size
    matrices = 3 if model.mlp == "swiglu" else 2
    unit = 2 * matrices * model.d_model
    if isinstance(selection, Gates):
        # The base of a gate is taken of all.
        saved = (1 - units) * (unit - 2 * selection.channels) * model.d_ff
    else:
        heads, units = selection.kept(config)
        saved = (1 - units) * unit * model.d_ff + (1 - heads) * 4 * model.d_model * width
        parts["attention"] *= heads
        if selection.choice == "predicted":
            outputs = (heads, model.num_heads), (units, model.d_ff)
            saved -= sum(2 * rank * (model.d_model + num) for share, num in outputs if share < 1)
    parts["layers"] -= executed * saved
    return sum(parts.values())
