"""What the products and the attention of a layer take against plain ones: `benchmark kernels`.

Of rows that are spread at random over the layers of a pool, and of causal attention, by the backends that this machine
trains with; forwards, and with the gradient. Each row of the table tells, too, how far the result is from the same in
float32 (the norm of the difference over the norm), and how many TFLOP/s both come to. The matrices are float32, as
parameters are: with --dtype=bfloat16 the times of both sides have the cast in them, of all layers or of the one.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from radialnet import attention, grouped
from radialnet.baseline import HEAD_SIZE, fused_attention
from radialnet.grouping import plan
from radialnet.timing import Timings
from radialnet.visibility import Visibility

POOLS = 8, 64  # Layers.
CALLS = 10  # Timed together.


def benchmark_kernels(timings: Timings, sizes: dict) -> None:
    _products(timings, sizes)
    _attention(timings, sizes)


def _products(timings: Timings, sizes: dict) -> None:
    d_model, d_ff, dtype = sizes["d_model"], 2 * sizes["d_ff"], jnp.dtype(sizes["dtype"])
    num_rows, rng = sizes["batch_size"] * sizes["seq_len"], np.random.default_rng(0)
    x_ND, dy_NF = (jnp.asarray(rng.normal(size=(num_rows, size)), dtype) for size in (d_model, d_ff))
    flops = 2 * num_rows * d_model * d_ff
    w_DF = jnp.asarray(rng.normal(size=(d_model, d_ff)) * d_model**-0.5, jnp.float32)
    plain = _both(lambda w_DF, x_ND: x_ND @ w_DF.astype(x_ND.dtype), w_DF, x_ND, dy_NF)
    for num_layers in POOLS:
        layer_N = jnp.asarray(rng.integers(0, num_layers, num_rows), jnp.int32)
        w_LDF = jnp.asarray(rng.normal(size=(num_layers, d_model, d_ff)) * d_model**-0.5, jnp.float32)
        backend = grouped.default_backend(jax.default_backend())
        groups = plan(layer_N, num_layers, backend)
        of_layers = _both(partial(_product, groups=groups), w_LDF, x_ND[groups.row_N], dy_NF[groups.row_N])
        errors = _product_errors(of_layers, groups, w_LDF, x_ND, dy_NF)
        names = f"product of {num_layers} layers", "one product", f"product@L={num_layers}"
        _compare(timings, names, of_layers, plain, errors, (flops, 3 * flops), backend)


def _product(w_LDF, x_ND, groups):
    return grouped.map_rows(lambda _, rows, product: product("w", rows[0]), {"w": w_LDF}, (x_ND,), groups)


def _both(function: Callable, *arrays) -> tuple[Callable, Callable]:
    """`function` of all arrays but the last, and the same with its gradient; the last is the gradient of the result."""

    @jax.jit
    def backward(*given):
        value, transpose = jax.vjp(function, *given[:-1])
        return value, transpose(given[-1])

    return partial(jax.jit(function), *arrays[:-1]), partial(backward, *arrays)


def _several(run: Callable) -> Callable:
    """Calls that wait for the last of them alone, for one is soon over on an accelerator."""
    return lambda: [run() for _ in range(CALLS)][-1]


def _product_errors(of_layers, groups, w_LDF, x_ND, dy_NF) -> tuple[float, float]:
    """Relative to the same in float32, a layer at a time: of the result, and at most of it and both gradients."""
    order_N = np.asarray(groups.row_N)
    x_ND, dy_NF, w_LDF = (np.asarray(x, np.float32) for x in (x_ND[order_N], dy_NF[order_N], w_LDF))
    ends = np.cumsum(np.asarray(groups.count_L))
    spans = [slice(end - count, end) for end, count in zip(ends, np.asarray(groups.count_L), strict=True)]
    y = np.concatenate([x_ND[span] @ w for span, w in zip(spans, w_LDF, strict=True)])
    dw = np.stack([x_ND[span].T @ dy_NF[span] for span in spans])
    dx = np.concatenate([dy_NF[span] @ w.T for span, w in zip(spans, w_LDF, strict=True)])
    found_y, (found_dw, found_dx) = of_layers[1]()
    errors = [_error(*pair) for pair in ((of_layers[0](), y), (found_y, y), (found_dw, dw), (found_dx, dx))]
    return errors[0], max(errors)


def _attention(timings: Timings, sizes: dict) -> None:
    batch, seq, dtype = sizes["batch_size"], sizes["seq_len"], jnp.dtype(sizes["dtype"])
    heads, rng = max(sizes["d_model"] // HEAD_SIZE, 1), np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(batch, seq, heads, HEAD_SIZE)), dtype) for _ in range(4)]
    token_BS = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (batch, seq))
    visibility = Visibility(jnp.zeros_like(token_BS), token_BS, token_BS)
    backend = attention.default_backend(jax.default_backend())
    ours = _both(lambda q, k, v: attention.attend(q, k, v, visibility, backend), *arrays)
    flops = 2 * batch * heads * seq * seq * HEAD_SIZE  # Half of the pairs, two products.
    plain = partial(jax.nn.dot_product_attention, is_causal=True)
    exact = [x.astype(jnp.float32) for x in arrays]
    with jax.default_matmul_precision("highest"):
        value, gradients = _both(plain, *exact)[1]()
    found_value, found_gradients = ours[1]()
    pairs = zip((found_value, *found_gradients), (value, *gradients), strict=True)
    errors = [_error(*pair) for pair in pairs]
    fused = fused_attention(heads, HEAD_SIZE, seq, sizes["dtype"])
    for implementation in dict.fromkeys((None, fused)):
        theirs = _both(partial(plain, implementation=implementation), *arrays)
        its = implementation or "XLA"
        names = "attention", f"attention of {its}", f"attention/{its}"
        _compare(timings, names, ours, theirs, (errors[0], max(errors)), (flops, 3.5 * flops), backend)


def _error(found, exact) -> float:
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    return float(f"{np.linalg.norm(found - exact) / np.linalg.norm(exact):.2g}")


def _compare(timings: Timings, names: tuple[str, str, str], ours, theirs, errors, flops, backend: str) -> None:
    """A row forwards and one with the gradient: of what, against what, and the name of the figure."""
    for ending, *of_use in zip(("", " with its gradient"), ours, theirs, errors, flops, strict=True):
        run, other, error, num_flops = of_use
        what, against, name = (text + ending for text in names)
        row = timings.add(what, against, _several(run), _several(other), name=name, backend=backend, error=error)
        for rate, ms in (("tflop_per_s", row["ms"]), ("against_tflop_per_s", row["against_ms"])):
            row[rate] = float(f"{CALLS * num_flops / ms / 1e9:.3g}")
