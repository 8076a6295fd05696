import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radialnet import grouped, grouped_kernels, grouping
from radialnet.sections import GROUPED_BACKENDS

N, D, F, L, SIZES = 21, 6, 10, 5, (4, 2)
RNG = np.random.default_rng(0)
X_ND = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
OTHER_NF = jnp.asarray(RNG.normal(size=(N, F)), jnp.float32)
DY_NF = jnp.asarray(RNG.normal(size=(N, F)), jnp.float32)
WEIGHTS = {
    "up": jnp.asarray(RNG.normal(size=(L, D, F)), jnp.float32),
    "scale": jnp.asarray(RNG.normal(size=(L, D)), jnp.float32),
    "out": jnp.asarray(RNG.normal(size=(L, F, F)), jnp.float32),
}


def layer(w, rows, product):
    """A norm with a scale, a product, an activation that joins in another kind of rows, and a last product."""
    x_PD, other_PF = rows
    normed_PD = x_PD / (1 + (x_PD**2).sum(-1, keepdims=True)) * w["scale"]
    return product("out", jnp.tanh(product("up", normed_PD)) * other_PF, keep=False) + x_PD[:, :1]


def run(weights, x_ND, other_NF, layer_N, backend, sizes=SIZES):
    groups = grouping.plan(layer_N, L, backend, sizes)
    rows = grouping.scatter(x_ND, groups), grouping.scatter(other_NF, groups)
    return grouping.gather(grouped.map_rows(layer, weights, rows, groups), groups)


def value_and_grads(function, weights=WEIGHTS):
    y_NF, transpose = jax.vjp(function, weights, X_ND, OTHER_NF)
    return y_NF, transpose(DY_NF)


@jax.jit
def by_backend(layer_N):
    return [value_and_grads(lambda *args, b=backend: run(*args, layer_N, b)) for backend in GROUPED_BACKENDS]


@jax.jit
def by_row(layer_N):
    """The same without any grouping: autodiff of each row with a copy of its layer's weights."""

    def plain(weights, x_ND, other_NF):
        def one(w, x_D, other_F):
            return layer(
                {"scale": w["scale"][None]}, (x_D[None], other_F[None]), lambda name, x, keep=True: x @ w[name]
            )

        of_row = jax.tree.map(lambda array: array[jnp.minimum(layer_N, L - 1)], weights)
        return jnp.where((layer_N < L)[:, None], jax.vmap(one)(of_row, x_ND, other_NF)[:, 0], 0)

    return value_and_grads(plain)


def assert_equal(found, expected, message=""):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, err_msg=message), found, expected)


ROUTINGS = {
    "random with idle rows": RNG.integers(0, L + 1, N),
    "empty groups": np.where(np.arange(N) % 2, 1, 3),
    "one layer": np.full(N, 2),
    "all rows idle": np.full(N, L),
    "one row": np.where(np.arange(N) == 7, 4, L),
    "uneven": np.sort(np.where(np.arange(N) < 15, 0, np.arange(N) % L)),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_backends_equal_the_layers_row_by_row(name):
    layer_N = ROUTINGS[name].astype(np.int32)
    expected = by_row(layer_N)
    for backend, found in zip(GROUPED_BACKENDS, by_backend(layer_N), strict=True):
        assert_equal(found, expected, backend)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, L), min_size=N, max_size=N))
def test_any_routing(layers):
    layer_N = np.asarray(layers, np.int32)
    for found in by_backend(layer_N):
        assert_equal(found, by_row(layer_N))


def test_backends_are_different_programs():
    """So that the parity above compares different things."""
    programs = {
        backend: str(jax.make_jaxpr(lambda b=backend: run(WEIGHTS, X_ND, OTHER_NF, jnp.zeros(N, jnp.int32), b))())
        for backend in GROUPED_BACKENDS
    }
    marks = "while[", "ragged_dot_general[", "pallas_call["
    found = {backend: [mark for mark in marks if mark in text] for backend, text in programs.items()}
    expected = {"block_loop": marks[:1], "ragged_dot": marks[1:2], "pallas": marks[2:], "masked_dense": ()}
    assert found == {backend: list(marks) for backend, marks in expected.items()}


@pytest.mark.parametrize("sizes", [(1,), (3,), (8, 4, 2), (16, 1), (21,)])
def test_result_does_not_depend_on_the_sizes_of_segments(sizes):
    layer_N = ROUTINGS["random with idle rows"].astype(np.int32)
    found = value_and_grads(lambda *args: run(*args, layer_N, "block_loop", sizes))
    assert_equal(found, by_row(layer_N))


@given(st.lists(st.integers(0, L), min_size=N, max_size=N), st.sampled_from([(1,), (3,), (4, 2), (16, 8, 1)]))
@settings(deadline=None, max_examples=100)
def test_segments_cover_every_executing_row_once_and_no_other(layers, sizes):
    layer_N = np.asarray(layers, np.int32)
    groups = grouping.plan(layer_N, L, sizes=sizes)
    executes = layer_N < L
    slots, rows = np.asarray(groups.slot_N), np.asarray(groups.row_N)
    assert sorted(slots[executes]) == list(range(executes.sum()))
    assert (slots[~executes] == N).all() and (rows[executes.sum() :] == N).all()
    assert (rows[slots[executes]] == np.flatnonzero(executes)).all()
    segments = groups.segments
    bounds, covered = np.asarray(segments.first_of_size), []
    for which, size in enumerate(sizes):
        for index in range(bounds[which], bounds[which + 1]):
            begin, end = int(segments.begin_M[index]), int(segments.end_M[index])
            assert 0 < end - begin <= size
            covered += range(begin, end)
            assert (layer_N[rows[begin:end]] == segments.layer_M[index]).all()
    assert sorted(covered) == list(range(executes.sum()))
    counts = np.bincount(layer_N[executes], minlength=L)
    assert int(groups.num_computed()) >= executes.sum()
    # What is computed for nothing is less than a third of a group, or less than a segment of the smallest size.
    assert groups.num_computed() <= sum(count + max(count / 3, sizes[-1] - 1) for count in counts if count)


def test_loop_runs_only_over_rows_that_execute():
    """Rows past them are not read as anybody's: what is wrong in them does not show."""
    layer_N = np.where(np.arange(N) < 5, 0, L).astype(np.int32)
    for backend in ("block_loop", "ragged_dot", "pallas"):
        groups = grouping.plan(layer_N, L, backend, SIZES)
        rows = [grouping.scatter(x, groups).at[5:].set(jnp.nan) for x in (X_ND, OTHER_NF)]
        y_NF, transpose = jax.vjp(
            lambda w, x, other, g=groups: grouped.map_rows(layer, w, (x, other), g), WEIGHTS, *rows
        )
        grads = transpose(DY_NF.at[5:].set(jnp.nan))
        for array in jax.tree.leaves((y_NF, grads)):
            assert np.isfinite(array).all(), backend
        assert (y_NF[:5] != 0).any()


def test_only_the_products_that_are_asked_for_are_kept():
    groups = grouping.plan(ROUTINGS["one layer"].astype(np.int32), L, "block_loop", SIZES)
    rows = grouping.scatter(X_ND, groups), grouping.scatter(OTHER_NF, groups)
    kept = grouped.empty_kept(layer, WEIGHTS, rows, (), num_depth_steps=3)
    assert {name: array.shape for name, array in kept.items()} == {"up": (3, N, F)}
    for backend in GROUPED_BACKENDS:
        groups = grouping.plan(ROUTINGS["one layer"].astype(np.int32), L, backend, SIZES)
        _, after = grouped.map_forward(layer, WEIGHTS, rows, groups, (), kept, 1)
        assert after.keys() == {"up"}
        np.testing.assert_array_equal((np.asarray(after["up"]) != 0).any((1, 2)), [False, True, False])


def test_backward_adds_to_what_is_there():
    layer_N = ROUTINGS["random with idle rows"].astype(np.int32)
    expected = by_row(layer_N)[1][0]
    for backend in GROUPED_BACKENDS:
        groups = grouping.plan(layer_N, L, backend, SIZES)
        rows = grouping.scatter(X_ND, groups), grouping.scatter(OTHER_NF, groups)
        kept = grouped.empty_kept(layer, WEIGHTS, rows, (), num_depth_steps=3)
        _, kept = grouped.map_forward(layer, WEIGHTS, rows, groups, (), kept, 2)
        before = jax.tree.map(lambda w: jnp.full_like(w, 3.0), WEIGHTS)
        dy_NF = grouping.scatter(DY_NF, groups)
        d_weights, _ = grouped.map_backward(layer, WEIGHTS, rows, groups, (), kept, 2, dy_NF, before)
        assert_equal(jax.tree.map(lambda x: x - 3, d_weights), expected, backend)


def test_permutations_have_the_gradient_of_plain_indexing():
    groups = grouping.plan(ROUTINGS["random with idle rows"].astype(np.int32), L)
    dy = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)

    def plain(indices):
        return lambda x_ND: jnp.concatenate([x_ND, jnp.zeros((1, D))])[indices]

    for ours, indices in ((grouping.scatter, groups.row_N), (grouping.gather, groups.slot_N)):
        found, expected = (jax.vjp(f, X_ND) for f in (lambda x, f=ours: f(x, groups), plain(indices)))
        np.testing.assert_allclose(found[0], expected[0])
        np.testing.assert_allclose(found[1](dy)[0], expected[1](dy)[0], atol=1e-6)


def test_weight_gradient_is_summed_in_the_precision_of_the_weights():
    """With bf16 rows a sum of many segments in bf16 would stand still: 256 + 1 = 256."""
    rows = 512
    for backend in ("block_loop", "ragged_dot", "pallas"):
        groups = grouping.plan(np.zeros(rows, np.int32), L, backend, (1,))
        x_ND = grouping.scatter(jnp.ones((rows, D), jnp.bfloat16), groups)

        def total(w, x_ND=x_ND, groups=groups):
            y_NF = grouped.map_rows(lambda w, rows, product: product("up", rows[0]), {"up": w}, (x_ND,), groups)
            assert y_NF.dtype == jnp.bfloat16
            return y_NF.astype(jnp.float32).sum()

        dw_LDF = jax.grad(total)(WEIGHTS["up"])
        assert dw_LDF.dtype == jnp.float32
        np.testing.assert_array_equal(dw_LDF[0], rows)


def test_sizes_follow_rows_per_layer():
    assert grouping.segment_sizes(4096, 8) == (512, 256, 128, 64, 32, 16)
    assert grouping.segment_sizes(4096, 64) == (256, 128, 64, 32, 16, 8)
    assert grouping.segment_sizes(10**6, 8) == (512, 256, 128, 64, 32, 16)
    assert grouping.segment_sizes(3, 50) == (3,)
    assert [grouping.kernel_segment_size(*args) for args in ((4096, 8), (4096, 64), (64, 64), (3, 50))] == [
        128,
        64,
        16,
        16,
    ]


def test_unknown_backend():
    with pytest.raises(ValueError, match="'magic'"):
        grouping.plan(np.zeros(N, np.int32), L, "magic")


@pytest.mark.parametrize(
    ("sizes", "width", "inner"),
    [((64, 256), 256, 32), ((96, 128), 128, 32), ((128, 384), 128, 32), ((40, 320), 64, 32)],
)
@pytest.mark.parametrize("num_rows", [5, 150])
def test_kernels_in_tiles_of_several_sizes(sizes, width, inner, num_rows):
    """Against a loop over layers. Idle rows hold what is no number."""
    channels, columns = sizes
    layer_N = np.sort(np.concatenate([np.full(num_rows - 4, 1), [2, 2, 4, 4]]))
    groups = grouping.plan(jnp.asarray(layer_N), 4, "pallas", num_at_once=1)
    (segment_size,) = groups.segments.sizes
    found = grouped_kernels._product_tiling(segment_size, channels, columns, itemsize=4)
    assert (found.width, found.inner) == (width, inner)
    x_NX, dy_NY = (RNG.normal(size=(num_rows, size)).astype(np.float32) for size in sizes)
    w_LXY = RNG.normal(size=(4, *sizes)).astype(np.float32)
    idle_N1 = (layer_N == 4)[:, None]
    arrays = jnp.where(idle_N1, jnp.nan, x_NX), jnp.where(idle_N1, jnp.nan, dy_NY)
    runs = {layer: layer_N == layer for layer in range(4)}
    for rows_NX, is_transposed in zip(arrays, (False, True), strict=True):
        y_NY = grouped_kernels.product(rows_NX, jnp.asarray(w_LXY), groups, is_transposed)
        for layer, here_N in runs.items():
            w_XY = w_LXY[layer].T if is_transposed else w_LXY[layer]
            np.testing.assert_allclose(y_NY[here_N], rows_NX[here_N] @ w_XY, rtol=1e-4, atol=1e-4)
    total_LXY = grouped_kernels.add_outer(jnp.ones_like(w_LXY), *arrays, groups)
    for layer, here_N in runs.items():
        np.testing.assert_allclose(total_LXY[layer], 1 + x_NX[here_N].T @ dy_NY[here_N], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROUTINGS)
def test_gradient_of_the_weights_by_megablox(name):
    """The kernel that TPUs run, interpreted."""
    groups = grouping.plan(ROUTINGS[name].astype(np.int32), L, "masked_dense")
    x_ND, dy_NF = grouping.scatter(X_ND, groups), grouping.scatter(DY_NF, groups)
    expected = grouped._add_grouped_outer(jnp.zeros((L, D, F)), x_ND, dy_NF, groups)
    found = grouped._megablox_outer(x_ND, dy_NF, groups.count_L, interpret=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
