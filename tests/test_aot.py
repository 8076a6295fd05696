import jax
import pytest

from radialnet import aot
from radialnet.config import ConfigError
from tests.test_cli import run
from tests.tiny import make_config


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
    lowered = aot.lower(config, jax.devices()[0])
    pool = lowered.in_avals[0][0].params["pool"]["block"]
    assert sum(weight.size for weight in jax.tree.leaves(pool)) > 2e11, "would be a terabyte"
    assert "while" in lowered.as_text()


def test_head_is_as_wide_as_the_vocabulary_of_the_run():
    for fields, vocab_size in (
        ({}, 4096),
        ({"data__tokenizer": "byte"}, 257),
        ({"data__source": "hops", "data__hops_symbols": 3, "data__hops_max": 2}, 34),
    ):
        lowered = aot.lower(make_config(**fields), jax.devices()[0])
        assert lowered.in_avals[0][0].params["head"].shape == (24, vocab_size)


def test_unknown_topology():
    with pytest.raises(ConfigError, match="--topology=v5q:2x2"):
        aot.device_of("v5q:2x2")
    command = ("-m", "radialnet.aot", "--config=configs/smoke.py", "--topology=v5q:2x2")
    _, stderr = run(*command, code=2)
    assert stderr.count("\n") == 1 and "v5q:2x2" in stderr
