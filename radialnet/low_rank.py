"""Training the matrices of the pool in few directions: W + A·B, with A and B of rank r (LoRA, arXiv 2106.09685).

The factors are a part of the optimizer's state, and the weights are the sum at every step: who reads a checkpoint need
know nothing of it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# In fp32 on accelerators too, where the default is less: what a step changes is the difference of two products.
_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Factors(NamedTuple):
    left_LIr: jax.Array  # A.
    right_LrO: jax.Array  # B.


class LowRankState(NamedTuple):
    factors: dict[str, Factors]  # By the path of their matrix.
    inner: optax.OptState


def low_rank(inner: optax.GradientTransformation, rank: int, seed: int) -> optax.GradientTransformation:
    """`inner` for the factors of the pool's matrices, [L, I, …], and for all else as it is.

    A begins at random and B with zeros, so that the weights begin as they were. Weight decay is that of the factors:
    towards the weights that a run began with.
    """

    def init(params) -> LowRankState:
        paths = (path for path, _ in jax.tree.leaves_with_path(params))
        matrices = [path for path in paths if path[0].key == "pool" and is_matrix(path)]
        named, factors = _named(params), {}
        for index, path in enumerate(matrices):
            name = jax.tree_util.keystr(path)
            num_layers, rows, columns = _flat(named[name]).shape
            rng = jax.random.fold_in(jax.random.key(seed), index)
            left_LIr = jax.random.normal(rng, (num_layers, rows, rank)) * rows**-0.5
            factors[name] = Factors(left_LIr, jnp.zeros((num_layers, rank, columns)))
        return LowRankState(factors, inner.init(_replaced(params, factors)))

    def update(grads, state: LowRankState, params):
        named, factors = _named(grads), state.factors
        slopes = {name: _slopes(_flat(named[name]), of) for name, of in factors.items()}
        given = _replaced(grads, slopes), state.inner, _replaced(params, factors)
        updates, inner_state = inner.update(*given)
        changes = dict(zip(named, jax.tree.structure(grads).flatten_up_to(updates), strict=True))
        moved = {name: optax.apply_updates(of, changes[name]) for name, of in factors.items()}
        sums = {name: (_product(moved[name]) - _product(of)).reshape(named[name].shape) for name, of in factors.items()}
        return _replaced(grads, changes | sums), LowRankState(moved, inner_state)

    return optax.GradientTransformation(init, update)


def is_matrix(path: tuple) -> bool:
    """Whether the parameter at a path is a matrix or an embedding. By name, for in a pool all are stacks of arrays."""
    return not jax.tree_util.keystr(path[-1:], simple=True).endswith(("norm", "bias"))


def _flat(w_LIX: jax.Array) -> jax.Array:
    return w_LIX.reshape(*w_LIX.shape[:2], -1)


def _product(factors: Factors) -> jax.Array:
    return _matmul(factors.left_LIr, factors.right_LrO)


def _slopes(grad_LIO: jax.Array, factors: Factors) -> Factors:
    """The gradients of the factors by that of their matrix."""
    left, right = factors
    return Factors(_matmul(grad_LIO, right.swapaxes(1, 2)), _matmul(left.swapaxes(1, 2), grad_LIO))


def _named(tree) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def _replaced(tree, parts: dict):
    """The tree with other things at some of its leaves' paths."""
    return jax.tree.map_with_path(lambda path, x: parts.get(jax.tree_util.keystr(path), x), tree)
