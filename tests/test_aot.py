import importlib.util
import json
import math

import jax
import pytest

from radialnet import aot
from radialnet.model import place
from radialnet.sections import ConfigError
from tests.commands import environment, run
from tests.tiny import make_config


def for_tpus(test):
    """Compiled for TPUs, which needs no TPU, but their compiler."""
    there = importlib.util.find_spec("libtpu") is not None
    test = pytest.mark.skipif(not there, reason="pip install -r requirements-tpu.txt")(test)
    return pytest.mark.tpu(pytest.mark.slow(test))


def test_backends_are_those_of_the_platform_unless_chosen():
    backends = {
        platform: (model.grouped_backend, model.attention_backend)
        for platform in ("cpu", "gpu", "tpu")
        for model in (aot.for_platform(make_config(), platform).model,)
    }
    assert backends == {
        "cpu": ("block_loop", "tiles"),
        "gpu": ("pallas", "pallas"),
        "tpu": ("ragged_dot", "pallas"),
    }
    chosen = aot.for_platform(make_config(model__grouped_backend="masked_dense"), "gpu").model
    assert chosen.grouped_backend == "masked_dense"


def test_the_whole_step_is_lowered_and_no_parameter_made():
    config = make_config(model__d_model=4800, model__d_ff=40_000, model__pool_size=500)
    lowered = aot.trace(config, jax.devices()[:1])[0].lower()
    pool = lowered.in_avals[0][0].params["pool"]["block"]
    assert sum(weight.size for weight in jax.tree.leaves(pool)) > 2e11, "would be a terabyte"
    assert "while" in lowered.as_text()


@pytest.mark.parametrize("fields", [{}, {"router__form": "hash_exit", "router__hash_span": 2}])
def test_a_step_of_decoding_is_traced(fields):
    traced = aot.trace_decode(make_config(**fields), jax.devices()[0])
    assert traced.out_info[1].shape == (aot.DECODE_ROWS, 4096)


def test_head_is_as_wide_as_the_vocabulary_of_the_run():
    for fields, vocab_size in (
        ({}, 4096),
        ({"data__tokenizer": "byte"}, 257),
        ({"data__source": "hops", "data__hops_symbols": 3, "data__hops_max": 2}, 34),
    ):
        lowered = aot.trace(make_config(**fields), jax.devices()[:1])[0].lower()
        assert lowered.in_avals[0][0].params["head"].shape == (24, vocab_size)


def test_ideal_is_what_the_layers_that_are_executed_come_to():
    """By hand, for a plain recipe; and twice the devices have half of it each, twice the pool hardly more."""
    config = make_config(
        model__min_depth=3, train__batch_size=8, router__hidden=8, model__remat="step", model__prelude_layers=1
    )
    model, seq, vocab = config.model, config.train.seq_len, 4096
    width, kv = model.d_model, model.num_kv_heads * model.head_size
    layer = 2 * width * (width + 2 * kv) + 2 * width * width + 3 * 2 * width * model.d_ff
    # A query and what it sees: itself and half of the others.
    pair = 2 * width * (seq + 1) / 2
    router = 2 * 8 * (width + model.pool_size + 1)
    token = 3 * (4 * layer + (2 + 2 + 7) * pair + 4 * router) + 3 * layer + (2 + 7) * pair + 3 * 2 * width * vocab

    def ideal(num_devices, **fields):
        changed = make_config(**{**vars_of(config), "mesh__data": num_devices, **fields})
        return aot.ideal_flops(changed, place(changed, vocab, jax.devices()))

    assert math.isclose(ideal(1), token * 8 * seq)
    assert math.isclose(ideal(4), ideal(1) / 4)
    assert 1 < ideal(1, model__pool_size=10) / ideal(1) < 1.02
    # Nobody asks then what the last product was: the choice has no gradient.
    unrouted = token - 3 * 4 * router - 3 * 2 * width * model.d_ff
    assert math.isclose(ideal(1, router__form="random"), unrouted * 8 * seq)
    given = {"router__form": "hash_exit", "model__min_depth": 2, "model__prelude_layers": 0}
    by_gate, by_benefit = (ideal(1, router__exit_training=how, **given) for how in ("gate", "benefit"))
    heads = 3 * 2 * width * vocab
    assert math.isclose(by_gate - by_benefit, (3 * 2 * width * model.d_ff - heads) * 8 * seq)


def vars_of(config):
    return {
        f"{section}__{name}": value for section, fields in config.to_dict().items() for name, value in fields.items()
    }


def test_unknown_topology():
    with pytest.raises(ConfigError, match="--topology=v5q:2x2"):
        aot.devices_of("v5q:2x2")
    command = ("-m", "radialnet.aot", "--config=configs/smoke.py", "--topology=v5q:2x2")
    _, stderr = run(*command, code=2)
    assert stderr.splitlines()[-1].startswith("error: --topology=v5q:2x2")
    with pytest.raises(ConfigError, match="--num_slices=2: --topology=h100 is one device"):
        aot.devices_of("h100", 2)


def compiled_for(topology, *flags, code=0):
    """What the command tells, by its last line."""
    environment_without = environment()
    # Those of the tests: they would leave the TPU's program as it is written.
    environment_without.pop("XLA_FLAGS")
    stdout, stderr = run("-m", "radialnet.aot", f"--topology={topology}", *flags, code=code, env=environment_without)
    return stderr if code else json.loads(stdout.splitlines()[-1])


@for_tpus
def test_radial_small_on_sixteen_chips():
    mesh = "--config.mesh.fsdp=4", "--config.mesh.pool=2", "--config.mesh.tensor=2"
    found = compiled_for("v5e:4x4", "--config=configs/radial_small.py", *mesh)
    assert found["num_devices"] == 16 and found["mesh"] == {"data": 1, "fsdp": 4, "pool": 2, "tensor": 2}
    assert found["dispatch"] == "gather" and found["grouped_backend"] == "ragged_dot"
    assert 1 <= found["flops_over_ideal"] <= 1.05 and not found["loops_of_unknown_length"]
    assert found["peak_memory_gb"] < 16
    moved = found["collectives"]
    # Gathered once a step: each matrix of the layers, embedding and head; and each gradient scattered.
    weights_gb = 48 * (768 * 2304 + 768 * 768 + 3 * 768 * 2048) / 2 * 2 / 1e9
    assert weights_gb < moved["all-gather"]["gb"] < 2 * weights_gb and moved["all-gather"]["count"] < 20
    assert moved["reduce-scatter"]["gb"] > weights_gb and moved["reduce-scatter"]["count"] < 20
    # Two sums of each layer over its parts, forwards, again, and backwards, of 16 depth steps.
    assert moved["all-reduce"]["count"] > 16 * 6


@for_tpus
def test_tokens_are_exchanged_on_two_slices():
    sizes = "--config.model.d_model=384", "--config.model.num_heads=6", "--config.model.num_kv_heads=6"
    more = "--config.model.pool_size=16", "--config.train.seq_len=512", "--config.train.batch_size=16"
    mesh = "--config.mesh.pool=4", "--config.mesh.pool_dispatch=exchange", "--num_slices=2"
    found = compiled_for("v5e:2x2", "--config=configs/radial_small.py", *sizes, *more, *mesh)
    assert found["mesh"] == {"data": 2, "fsdp": 1, "pool": 4, "tensor": 1} and found["dispatch"] == "exchange"
    # A v5e has no ragged messages on larger pods, and is not asked for them on small ones.
    assert "padded messages" in found["dispatch_reason"] and not found["loops_of_unknown_length"]
    assert found["collectives"]["all-to-all"]["count"] > 16
    assert found["collectives"]["all-gather"]["gb"] < 0.2, "the tables of the vocabulary, and no layer"


@for_tpus
def test_what_does_not_fit_is_told_with_its_largest_arrays():
    flags = "--config=configs/radial_base.py", "--config.mesh.fsdp=4", "--config.mesh.tensor=1"
    stderr = compiled_for("v5e:2x2", *flags, code=1)
    assert "error: does not fit:" in stderr.splitlines()[-1] and "The largest arrays: float32[" in stderr
