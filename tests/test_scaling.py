"""The model of costs at sizes that nobody has, by what it must come to at those that are known."""

import importlib.util
import json

import numpy as np
import pytest

from radialnet.exchange import wire_bytes
from radialnet.scaling import Fit, Use, _distinct, check, dense, measured, mixture, radial, width
from radialnet.sections import ConfigError
from tests.commands import run
from tests.tiny import make_config

USE = Use()


def test_widths_are_those_of_dense_models():
    assert width(12 * 96 * 12_288**2) == pytest.approx(12_288, rel=1e-6)


@pytest.mark.parametrize("size", [1e9, 1e12])
def test_a_radial_network_that_executes_all_is_the_dense_one(size):
    plain, grouped = dense(size, USE), radial(size, 1.0, USE, is_grouped=True)
    assert grouped.cache_bytes == pytest.approx(plain.cache_bytes)
    # All rows share the one layer of a step.
    assert grouped.read_bytes == pytest.approx(plain.read_bytes, rel=1e-3)
    assert 1 < grouped.flops / plain.flops < 1.01, "the router is beside it"
    free = radial(size, 1.0, USE, is_grouped=False)
    # Of rows that choose any of the layers, few share one.
    assert free.read_bytes > 5 * plain.read_bytes


def test_sparse_models_cost_what_they_execute():
    layers, experts, plain = radial(1e12, 1 / 8, USE, False), mixture(1e12, 1 / 8, USE), dense(1.25e11, USE)
    assert layers.flops == pytest.approx(plain.flops, rel=0.02)
    assert experts.flops == pytest.approx(plain.flops, rel=0.02)
    assert layers.cache_bytes == experts.cache_bytes == pytest.approx(plain.cache_bytes)


def test_bytes_over_the_wire_by_hand():
    """At a trillion parameters, on 4,096 devices of 8,192 tokens."""
    d_model = width(1e12)
    # It is least where four devices share a layer: 1,024 parts of a quarter, and each state goes to the three others.
    gathered = 8 * 1e12 / 4 * (1 - 1 / 1024) / 8192 + d_model / 128 * 16 * d_model * 3
    assert dense(1e12, USE).wire_bytes == pytest.approx(gathered)
    d_model = width(1.25e11)
    # Tokens as in `exchange.wire_bytes`; weights of the pool lie on 512 groups of eight.
    exchanged = d_model / 128 * (32 + 2 * 5.5) * d_model + 6 * 1e12 / 512 * (7 / 8) / 8192
    assert radial(1e12, 1 / 8, USE, False).wire_bytes == pytest.approx(exchanged)


def test_the_exchange_is_that_of_the_code():
    config = make_config(
        model__d_model=64, model__num_heads=8, model__num_kv_heads=1, model__pool_size=8, model__dtype="bfloat16"
    )
    sizes = {"data": 1, "fsdp": 1, "pool": 4096, "tensor": 1}
    tokens = config.train.batch_size * config.train.seq_len / 4096
    _, exchanged = wire_bytes(config, sizes, depth=3)
    assert exchanged / tokens == pytest.approx(3 * (32 + 2 * 5.5) * 64 * 4095 / 4096)


def test_distinct_layers_against_draws():
    rng = np.random.default_rng(0)
    for number, chosen, rows in ((7, 1, 5), (9, 2, 4)):
        drawn = [len(set(np.concatenate([rng.permutation(number)[:chosen] for _ in range(rows)]))) for _ in range(4000)]
        assert _distinct(number, chosen, rows) == pytest.approx(np.mean(drawn), rel=0.01)


def test_a_power_law_is_found_and_its_band_holds_other_models():
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1e8, 1e11, 6)
    inside = 0
    for _ in range(300):
        noisy = 3 * sizes**-0.2 * np.exp(rng.normal(size=6) * 0.1)
        fit = Fit.of([("", size, ratio) for size, ratio in zip(sizes, noisy, strict=True)])
        assert fit.slope == pytest.approx(-0.2, abs=0.1)
        _, low, high = fit.ratio(1e12)
        inside += low < 3 * 1e12**-0.2 * np.exp(rng.normal() * 0.1) < high
    assert inside / 300 == pytest.approx(0.9, abs=0.05)


def test_the_command_draws_what_it_tells_and_refuses_what_is_no_profile(tmp_path):
    profile = [
        {"model": "small", "norm": "pre-norm", "parameters": 10**8, "median": {"layer": 0.3}},
        {"model": "other", "norm": "post-norm", "parameters": 10**8, "median": {"layer": 0.6}},
    ]
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    assert measured([tmp_path / "profile.json"]) == [("small", 10**8, 0.3)]
    out = tmp_path / "out"
    stdout, _ = run("-m", "radialnet.scaling", f"--out={out}", f"--profile={tmp_path / 'profile.json'}", "--json")
    found = json.loads(stdout.splitlines()[-1])
    assert found == json.loads((out / "scaling.json").read_text())
    assert [point[0] for point in found["points"]][-1] == "small" and len(found["points"]) == 4
    assert {path.name for path in out.iterdir()} == {"scaling.json", "ratios.png", "costs.png"}
    (tmp_path / "none.json").write_text('{"model": 1}')
    with pytest.raises(ConfigError, match="none.json"):
        measured([tmp_path / "none.json"])
    with pytest.raises(ConfigError, match="no configs/nothing.py"):
        check("nothing", "v5e:2x2")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="compiles for a TPU")
def test_the_model_is_near_what_is_compiled():
    found = check("radial_small", "v5e:4x4")
    assert found["flops_over_model"] == pytest.approx(1, abs=0.04)
    assert found["wire_over_model"] == pytest.approx(1, abs=0.1)
