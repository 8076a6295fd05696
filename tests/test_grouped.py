import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radialnet import grouped

N, D, F, L, P = 21, 6, 10, 5, 4
RNG = np.random.default_rng(0)
X_ND = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
W_LDF = jnp.asarray(RNG.normal(size=(L, D, F)), jnp.float32)
DY_NF = jnp.asarray(RNG.normal(size=(N, F)), jnp.float32)


def product(weights, rows):
    return rows[0] @ weights["w"].astype(rows[0].dtype)


def run(x_ND, w_LDF, layer_N, backend, block=P):
    groups = grouped.plan(layer_N, L, block, backend)
    return grouped.gather(grouped.map_blocks(product, {"w": w_LDF}, (grouped.scatter(x_ND, groups),), groups), groups)


@jax.jit
def value_and_grads(layer_N):
    """y, dx, dw of both backends."""
    results = []
    for backend in grouped.BACKENDS:
        y_NF, transpose = jax.vjp(lambda x, w, b=backend: run(x, w, layer_N, b), X_ND, W_LDF)
        results.append((y_NF, *transpose(DY_NF)))
    return results


def by_row(layer_N):
    """The same without any grouping: row by row in numpy."""
    y_NF, dx_ND, dw_LDF = np.zeros((N, F)), np.zeros((N, D)), np.zeros((L, D, F))
    for n, layer in enumerate(layer_N):
        if layer < L:
            y_NF[n] = X_ND[n] @ W_LDF[layer]
            dx_ND[n] = W_LDF[layer] @ DY_NF[n]
            dw_LDF[layer] += np.outer(X_ND[n], DY_NF[n])
    return y_NF, dx_ND, dw_LDF


ROUTINGS = {
    "random with idle rows": RNG.integers(0, L + 1, N),
    "empty groups": np.where(np.arange(N) % 2, 1, 3),
    "one layer": np.full(N, 2),
    "all rows idle": np.full(N, L),
    "one row": np.where(np.arange(N) == 7, 4, L),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_backends_equal_the_row_by_row_product(name):
    layer_N = ROUTINGS[name].astype(np.int32)
    expected = by_row(layer_N)
    for backend, results in zip(grouped.BACKENDS, value_and_grads(layer_N), strict=True):
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, wanted, atol=1e-5, err_msg=backend)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, L), min_size=N, max_size=N))
def test_any_routing(layers):
    layer_N = np.asarray(layers, np.int32)
    for results in value_and_grads(layer_N):
        for result, wanted in zip(results, by_row(layer_N), strict=True):
            np.testing.assert_allclose(result, wanted, atol=1e-5)


def test_backends_are_different_programs():
    """So that the parity above compares two things."""
    programs = {
        backend: str(jax.make_jaxpr(lambda x, b=backend: run(x, W_LDF, jnp.zeros(N, jnp.int32), b))(X_ND))
        for backend in grouped.BACKENDS
    }
    assert "while" in programs["block_loop"]
    assert "while" not in programs["masked_dense"]


@pytest.mark.parametrize("block", [1, 8, 64])
def test_result_does_not_depend_on_the_block_size(block):
    layer_N = ROUTINGS["random with idle rows"].astype(np.int32)
    np.testing.assert_allclose(run(X_ND, W_LDF, layer_N, "block_loop", block), by_row(layer_N)[0], atol=1e-5)


@given(st.lists(st.integers(0, L), min_size=N, max_size=N), st.sampled_from([1, 3, 4, 32]))
@settings(deadline=None, max_examples=60)
def test_plan_places_every_row_in_a_block_of_its_layer(layers, block):
    layer_N = np.asarray(layers, np.int32)
    groups = grouped.plan(layer_N, L, block)
    slots = np.asarray(groups.slot_N)
    executed = layer_N < L
    assert len(set(slots[executed])) == executed.sum(), "two rows share a place"
    assert (np.asarray(groups.layer_M)[slots[executed] // block] == layer_N[executed]).all()
    assert (slots[executed] // block < groups.num_blocks).all()
    assert (slots[~executed] == len(groups.row_R)).all()
    assert (np.asarray(groups.row_R)[slots[executed]] == np.flatnonzero(executed)).all()
    assert (np.asarray(groups.row_R) < N).sum() == executed.sum()
    counts = np.bincount(layer_N[executed], minlength=L)
    assert groups.num_blocks == np.ceil(counts / block).sum(), "work is more than the rows and their padding"


def test_loop_runs_only_over_blocks_with_rows():
    """Blocks without rows are not read: what is wrong in them does not show."""
    groups = grouped.plan(np.where(np.arange(N) < 5, 0, L).astype(np.int32), L, P)
    x_MPD = grouped.scatter(X_ND, groups)
    x_MPD = x_MPD.at[groups.num_blocks :].set(jnp.nan)
    y_MPF, transpose = jax.vjp(lambda x, w: grouped.map_blocks(product, {"w": w}, (x,), groups), x_MPD, W_LDF)
    dx_MPD, dw_LDF = transpose(jnp.ones_like(y_MPF))
    for array in (y_MPF, dx_MPD, dw_LDF):
        assert np.isfinite(array).all()


def test_permutations_have_the_gradient_of_plain_indexing():
    groups = grouped.plan(ROUTINGS["random with idle rows"].astype(np.int32), L, P)
    dy = jnp.asarray(RNG.normal(size=(len(groups.layer_M), P, D)), jnp.float32)

    def plain_scatter(x_ND):
        padded = jnp.concatenate([x_ND, jnp.zeros((1, D))])
        return padded[groups.row_R].reshape(dy.shape)

    ours, plain = (jax.vjp(f, X_ND)[1](dy)[0] for f in (lambda x: grouped.scatter(x, groups), plain_scatter))
    np.testing.assert_allclose(ours, plain, atol=1e-6)

    def plain_gather(x_MPD):
        return jnp.concatenate([x_MPD.reshape(-1, D), jnp.zeros((1, D))])[groups.slot_N]

    ours, plain = (jax.vjp(f, dy)[1](X_ND)[0] for f in (lambda x: grouped.gather(x, groups), plain_gather))
    np.testing.assert_allclose(ours, plain, atol=1e-6)


def test_weight_gradient_is_summed_in_the_precision_of_the_weights():
    """With bf16 rows a sum of many blocks in bf16 would stand still: 256 + 1 = 256."""
    rows = 512
    groups = grouped.plan(np.zeros(rows, np.int32), L, 1)
    x_MPD = grouped.scatter(jnp.ones((rows, D), jnp.bfloat16), groups)
    dw_LDF = jax.grad(lambda w: grouped.map_blocks(product, {"w": w}, (x_MPD,), groups).astype(jnp.float32).sum())(
        W_LDF
    )
    assert dw_LDF.dtype == jnp.float32
    np.testing.assert_array_equal(dw_LDF[0], rows)


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_function_of_several_weights_and_rows(name):
    """Norm, two products and an activation, of two kinds of rows: both backends against autodiff row by row."""
    layer_N = jnp.asarray(ROUTINGS[name], jnp.int32)
    other_NF = jnp.asarray(RNG.normal(size=(N, F)), jnp.float32)
    weights = {"up": W_LDF, "scale": jnp.asarray(RNG.normal(size=(L, D)), jnp.float32)}

    def function(w, rows):
        x, other = rows
        return jnp.tanh((x / (1 + (x**2).sum(-1, keepdims=True)) * w["scale"]) @ w["up"]) * other

    def plain(weights, x_ND, other_NF):
        one = jax.vmap(lambda w, x, o: function(w, (x[None], o[None]))[0])
        y_NF = one(jax.tree.map(lambda array: array[jnp.minimum(layer_N, L - 1)], weights), x_ND, other_NF)
        return jnp.where((layer_N < L)[:, None], y_NF, 0)

    def grouped_by(backend, weights, x_ND, other_NF):
        groups = grouped.plan(layer_N, L, P, backend)
        rows = grouped.scatter(x_ND, groups), grouped.scatter(other_NF, groups)
        return grouped.gather(grouped.map_blocks(function, weights, rows, groups), groups)

    def value_and_transpose(f):
        y_NF, transpose = jax.vjp(f, weights, X_ND, other_NF)
        return y_NF, transpose(DY_NF)

    expected = value_and_transpose(plain)
    for backend in grouped.BACKENDS:
        found = value_and_transpose(lambda *arguments, b=backend: grouped_by(b, *arguments))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_block_size_follows_rows_per_layer():
    assert grouped.block_size(2048, 16) == 128
    assert grouped.block_size(2048, 64) == 32
    assert grouped.block_size(10**6, 8) == 128
    assert grouped.block_size(3, 50) == 8


def test_unknown_backend():
    with pytest.raises(ValueError, match="'magic'"):
        grouped.plan(np.zeros(N, np.int32), L, P, "magic")
