"""A function of rows that go through one layer: with that layer's weights, and backwards from its products."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

# product(name, x_PX, keep=True): rows times the matrix `name` of their layer, [P, Y]. With keep=False the result is not
# kept for the gradient; right where nothing that follows needs its value for one, as after the last product of a layer.
# A function uses each matrix once.
Product = Callable[..., jax.Array]
# function(vectors, rows, product): `vectors` holds the weights that are no matrices, [P or 1, X] each; the rows are
# arrays [P, X]; returns arrays [P, Y] in any tree.
RowFunction = Callable[[dict[str, jax.Array], tuple[jax.Array, ...], Product], object]


def compute(function, layer, rows):
    """A function of rows of one layer, with its weights; and the products that are to be kept."""
    (vectors, matrices), kept = layer, {}

    def product(name, x_PX, keep=True):
        y_PY = x_PX @ matrices[name].astype(x_PX.dtype)
        if keep:
            kept[name] = y_PY
        return y_PY

    return function(vectors, rows, product), kept


def split(weights):
    """Vectors [L, X] and matrices [L, X, Y], by name."""
    vectors = {name: weight for name, weight in weights.items() if weight.ndim == 2}
    return vectors, {name: weight for name, weight in weights.items() if name not in vectors}


def replayed(function, rows, fixed, kept, matrices, times_transposed):
    """The function's gradients with its products replaced by what they gave.

    Returns:
        (vectors, d_outputs) -> d_vectors, d_rows and, for each product, its input and the gradient of its output.
    """

    def transpose(vectors, d_outputs):
        shapes = {}

        def record(vectors, rows):
            def product(name, x_PX, keep=True):
                shapes[name] = jax.ShapeDtypeStruct((x_PX.shape[0], matrices[name].shape[-1]), x_PX.dtype)
                return jnp.zeros(shapes[name].shape, x_PX.dtype)

            return function(vectors, (*rows, *fixed), product)

        jax.eval_shape(record, vectors, rows)
        zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}

        def replay(vectors, rows, taps):
            inputs = {}

            def product(name, x_PX, keep=True):
                assert name not in inputs, f"the matrix {name} is used twice"
                inputs[name] = x_PX
                value = kept[name] if keep else zeros[name]
                return _known_product(times_transposed, x_PX, matrices[name].astype(x_PX.dtype), value, taps[name])

            return function(vectors, (*rows, *fixed), product), inputs

        _, pull, inputs = jax.vjp(replay, vectors, rows, zeros, has_aux=True)
        d_vectors, d_rows, d_taps = pull(d_outputs)
        return d_vectors, d_rows, {name: (inputs[name], d_taps[name]) for name in inputs}

    return transpose


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known_product(times_transposed, x_PX, weights, value_PY, tap_PY):
    """`value`, with the gradient of x · weights; the gradient of `tap` is that of the result."""
    return value_PY


def _known_product_forward(times_transposed, x_PX, weights, value_PY, tap_PY):
    return value_PY, weights


def _known_product_backward(times_transposed, weights, dy_PY):
    return times_transposed(dy_PY, weights), None, None, dy_PY


_known_product.defvjp(_known_product_forward, _known_product_backward)


def layer_of(weights, layer):
    """Vectors [1, X] and matrices [X, Y] of one layer, by name."""
    vectors, matrices = split(weights)
    return {name: vector[layer][None] for name, vector in vectors.items()}, _at(matrices, layer)


def _at(tree, index):
    return jax.tree.map(lambda array: array[index], tree)
