"""What is read from compiled programs, against what was written into them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from radialnet.program import work_of
from radialnet.sharding import along

A, B, C = 33, 47, 59


def compiled(function, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*args).compile()


def test_products_count_as_often_as_their_loops_run():
    def function(x_AB, y_BC, z_CB):
        def outer(x_AB, _):
            x_AB, _ = jax.lax.scan(lambda x_AB, _: (jnp.sin(x_AB @ y_BC) @ z_CB, None), x_AB, None, length=7)
            return jnp.cos(x_AB @ (z_CB.T @ z_CB)), None

        return jax.lax.scan(outer, x_AB, None, length=5)[0]

    program = compiled(function, (A, B), (B, C), (C, B))
    work = work_of(program.as_text())
    inner, once = 2 * 2 * A * B * C, 2 * A * B * B
    # XLA takes what is the same in all rounds out of the loop.
    assert work.flops in (5 * (7 * inner + once) + many * 2 * C * B * B for many in (1, 5))
    assert not work.unknown
    assert program.cost_analysis()["flops"] < work.flops / 10, "XLA counts a body once"


def test_the_dearer_branch_counts():
    def function(x_AB, y_BC, z_CB):
        return jax.lax.cond(x_AB[0, 0] > 0, lambda x: x @ y_BC @ z_CB, lambda x: x * 2, x_AB)

    assert work_of(compiled(function, (A, B), (B, C), (C, B)).as_text()).flops == 2 * 2 * A * B * C


def test_a_loop_of_unknown_length_is_told_and_one_with_a_usual_length_counts_by_it():
    def function(x_AB, z_BB, name):
        with jax.named_scope(name):
            return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ z_BB, x_AB)

    texts = {
        name: compiled(partial(function, name=name), (A, B), (B, B)).as_text() for name in ("some", "rounds_usually_6")
    }
    assert work_of(texts["some"]).flops == 2 * A * B * B and len(work_of(texts["some"]).unknown) == 1
    assert (
        work_of(texts["rounds_usually_6"]).flops == 6 * 2 * A * B * B and not work_of(texts["rounds_usually_6"]).unknown
    )


def test_a_loop_within_one_of_a_usual_length_is_not_taken_for_it():
    def function(x_AB, z_BB):
        def body(x_AB):
            return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ z_BB, x_AB)

        with jax.named_scope("rounds_usually_6"):
            return jax.lax.while_loop(lambda x: x.sum() < 99, body, x_AB)

    work = work_of(compiled(function, (A, B), (B, B)).as_text())
    assert work.flops == 6 * 2 * A * B * B and len(work.unknown) == 1


CONVOLUTIONS = {
    "plain": {},
    "padded": {"padding": [(11, 2), (0, 9)]},
    "cut": {"padding": [(-1, 2), (0, -3)]},
    "strided": {"window_strides": (2, 3), "padding": [(4, 1), (1, 0)]},
    "holes in the input": {"lhs_dilation": (3, 2), "padding": [(1, 0), (0, 2)]},
    "holes in the kernel": {"rhs_dilation": (2, 3)},
    "groups of features": {"feature_group_count": 3},
    # A batch of 11 products: each place of the window finds one element.
    "batched": {"window_strides": (10, 1), "lhs_dilation": (11, 1)},
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_counts_what_lies_on_its_input(case):
    """By XLA's own count. A layer of a TPU's program had 4 to 19 times its FLOPs when windows were counted as a whole:
    its gradient of `qkv` is a window of 12 × 3 over one element and what it is padded with."""
    asked = {"window_strides": (1, 1), "padding": [(0, 0), (0, 0)], **CONVOLUTIONS[case]}
    kernel = (6, 3 // asked.get("feature_group_count", 1), 11 if case == "batched" else 4, 2)
    program = compiled(partial(jax.lax.conv_general_dilated, **asked), (2, 3, 11, 7), kernel)
    assert " convolution(" in program.as_text()
    assert work_of(program.as_text()).flops == program.cost_analysis()["flops"] > 0


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter", "all-to-all"])
def test_collectives_by_kind_and_bytes(kind):
    mesh = along("x", jax.devices()).mesh

    def local(x_8B):
        def step(x_8B, _):
            if kind == "all-gather":
                return x_8B + jax.lax.all_gather(x_8B, "x").sum(0), None
            if kind == "all-reduce":
                return jnp.sin(jax.lax.psum(x_8B, "x")), None
            if kind == "reduce-scatter":
                return x_8B + jax.lax.psum_scatter(x_8B, "x", tiled=True), None
            return jnp.sin(jax.lax.all_to_all(x_8B, "x", 0, 0)), None

        return jax.lax.scan(step, x_8B, None, length=3)[0]

    spec = PartitionSpec("x")
    function = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    work = work_of(compiled(function, (64, B)).as_text())
    # Of the larger side: what 8 devices give, or what one takes.
    size = 8 * 8 * B * 4 if kind == "all-gather" else 8 * B * 4
    assert dict(work.counts) == {kind: 3} and work.collectives[kind] == 3 * size
    # A device sends seven eighths of it; a sum goes around twice.
    assert work.wire == 3 * size * 7 / 8 * (2 if kind == "all-reduce" else 1)
