"""The benchmark's figures are figures of what they say; how large they are is no test's business."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import radial_nano, smoke
from radialnet import benchmark, cache_benchmark, decode_benchmark, router_benchmark
from radialnet.aot import devices_of
from radialnet.baseline import dense_logits, dense_params
from radialnet.benchmark import RadialStep, benchmark_input, make_batch, make_config
from radialnet.cache_benchmark import benchmark_cache, line_of_run, plot_windows
from radialnet.config import Config
from radialnet.cost import flops_by_part, weights_by_part
from radialnet.data import prepare
from radialnet.decode_benchmark import benchmark_decode
from radialnet.kernel_benchmark import CALLS, benchmark_kernels
from radialnet.program import work_of
from radialnet.sections import ConfigError
from radialnet.timing import Timings
from tests.commands import run
from tests.plain import plain_network
from tests.runs import make_run

SIZES = {"d_model": 16, "d_ff": 24, "seq_len": 8, "batch_size": 2, "max_depth": 3, "dtype": "float32"}
NAMES = {
    "step/dense@L=8", "step/dense@L=16", "step/dense@L=32", "step/dense@L=64", "step L=64/L=8",
    "step depth=T÷2/depth=T", "attention all half/full", "router share", "memory/dense", "step/matmul limit",
}  # fmt: skip


def test_dense_baseline_is_a_plain_transformer():
    config = make_config(SIZES, router__form="sequential", model__pool_size=3)
    params, batch = dense_params(config), make_batch(config)
    logits = dense_logits(params, batch["token"], config)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *params["layers"])
    # It has all query heads in front, then keys and values; the radial network has those of a group side by side.
    model, layers = config.model, config.model.max_depth
    q_LDX, kv_LDX = jnp.split(stacked["qkv"], [model.d_model], axis=-1)
    q_LDGJK, k_LDG1K, v_LDG1K = (
        x.reshape(layers, model.d_model, model.num_kv_heads, -1, model.head_size)
        for x in (q_LDX, *jnp.split(kv_LDX, 2, axis=-1))
    )
    stacked["qkv"] = jnp.concatenate([q_LDGJK, k_LDG1K, v_LDG1K], axis=-2)
    stacked["mlp_in"] = stacked["mlp_in"].reshape(layers, model.d_model, 2, model.d_ff)
    # The radial network multiplies embeddings by sqrt(D).
    named = {**params, "embedding": params["embedding"] / 4.0, "pool": {"block": stacked}}
    expected, _ = plain_network(config, named, *(batch[name][0] for name in ("token", "document", "position")))
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)


def test_step_holds_the_depth_that_is_asked_for_and_does_not_learn():
    config = make_config({**SIZES, "seq_len": 32}, model__min_depth=0)
    step = RadialStep(config, make_batch(config), depth=1.5)
    assert step.figures["depth"] == pytest.approx(1.5, abs=0.1)
    params = jax.tree.map(np.asarray, step.state.params)
    step()
    jax.tree.map(np.testing.assert_array_equal, params, step.state.params)


def test_routes_of_the_timed_step_differ_by_token():
    config = make_config(SIZES)
    step = RadialStep(config, make_batch(config))
    assert step.figures["depth"] == 3
    assert step.figures["load_entropy"] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_attention_are_what_they_are_measured_as(dtype):
    timings = Timings(repeats=1)
    benchmark_kernels(timings, {**SIZES, "dtype": dtype})
    assert {row["what"].split(" with")[0] for row in timings.rows} == {
        "product of 8 layers", "product of 64 layers", "attention",
    }  # fmt: skip
    for row in timings.rows:
        assert 0 <= row["error"] < {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    flops = {row["what"]: row["tflop_per_s"] * row["ms"] / CALLS * 1e9 for row in timings.rows}
    # 16 rows, of 16 channels each, with a matrix of 2 · 24 columns.
    assert flops["product of 8 layers"] == pytest.approx(2 * 16 * 16 * 48, rel=0.01)
    assert flops["product of 64 layers with its gradient"] == pytest.approx(3 * 2 * 16 * 16 * 48, rel=0.01)


def test_routers_are_measured_against_the_layers_that_they_save(monkeypatch, tmp_path):
    monkeypatch.setattr(router_benchmark, "OPT", {"1K": (16, 2, 5)})
    monkeypatch.setattr(router_benchmark, "NETWORKS", {"linear": None, "D/2": 2})
    timings = Timings(repeats=1)
    router_benchmark.benchmark_router(timings, SIZES)
    rows = {(row["use"], row["by"], row["network"]): row for row in timings.rows}
    assert {use for use, _, _ in rows} == {"training", "decoding"} and len(rows) == len(timings.rows)
    # By hand: the router's products in training are computed four times, a layer's three times; of 8 tokens a query
    # sees 4.5.
    linear, layer, attention = 2 * 16 * 6, 2 * 12 * 16 * 16, 4 * 16 * 4.5
    row = rows["training", "FLOPs", "linear"]
    assert row["ratio"] == pytest.approx(4 * linear / (3 * (layer + attention)))
    assert row["pays_from"] == pytest.approx(6 * row["ratio"] / (1 + row["ratio"]), abs=1e-3)
    untimed = Timings(repeats=0)
    router_benchmark.benchmark_router(untimed, SIZES)
    assert {row["by"] for row in untimed.rows} == {row["by"] for row in timings.rows} - {"this machine"}
    assert rows["decoding", "bytes", "D/2"]["ratio"] == pytest.approx(4 * (16 + 8 * (16 + 6)) / (2 * 12 * 16 * 16))
    assert all(rows[use, "this machine", "D/2"]["ratio"] > 0 for use in ("training", "decoding"))
    router_benchmark.plot_routers(timings.rows, tmp_path / "router.png")
    assert (tmp_path / "router.png").stat().st_size > 5000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_routers_and_layers_are_those_that_their_programs_are_given(dtype):
    """By the compiler's account of the memory. Norms and biases, which the model of costs leaves out, are few."""
    config = router_benchmark.opt_config(256, 2, 5, 4, model__dtype=dtype, model__grouped_backend="masked_dense")
    weights, h_BSD = weights_by_part(config, 0), jax.ShapeDtypeStruct((1, 1, 256), jnp.float32)
    parts = {
        "router": (router_benchmark.router_part, 4),
        "layer": (router_benchmark.layer_part, jnp.dtype(dtype).itemsize),
    }
    for name, (part, num_bytes) in parts.items():
        made = part(config, (1, 1))
        program = jax.jit(made.program(False, 1)).lower(jax.eval_shape(made.init), h_BSD).compile()
        given = program.memory_analysis().argument_size_in_bytes - 4 * h_BSD.size
        assert weights[name] * num_bytes <= given < 1.03 * weights[name] * num_bytes, name


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="compiles for a TPU")
def test_the_best_time_on_a_tpu_is_that_of_flops_and_passes_where_they_bound_it():
    config = router_benchmark.opt_config(512, 4, 5)
    device, shape = devices_of(router_benchmark.TPU)[0], (1, 1024)
    work = router_benchmark.work_of_part(router_benchmark.router_part(config, shape), shape, 512, True, 2, device)
    by_bytes, many = (router_benchmark.seconds_at_best(work, passes, device) for passes in (0, 60))
    flops = 4 * flops_by_part(config, 0, [1.0])["router"] * shape[1]
    assert many == pytest.approx(60 * flops / 197e12, rel=0.03)
    # Passes count where FLOPs bound it; without them there are the bytes.
    assert 0 < by_bytes < many / 60
    # A layer, of rows so short that its attention is next to nothing.
    in_bf16, shape = router_benchmark.opt_config(512, 4, 5, **router_benchmark.ON_TPU), (64, 16)
    part = router_benchmark.layer_part(in_bf16, shape)
    products = 3 * flops_by_part(in_bf16, 0, [1.0])["layers"] * shape[0] * shape[1] / 197e12
    work = router_benchmark.work_of_part(part, shape, 512, True, 1, device)
    found = router_benchmark.seconds_at_best(work, 1, device)
    assert products <= found < 1.03 * products


def test_a_layer_is_timed_with_all_of_its_products():
    config = router_benchmark.opt_config(64, 2, 5, train__seq_len=8, model__grouped_backend="masked_dense")
    part = router_benchmark.layer_part(config, (1, 8))
    h_BSD = jax.ShapeDtypeStruct((1, 8, 64), jnp.float32)
    text = jax.jit(part.program(True, 1)).lower(jax.eval_shape(part.init), h_BSD).compile().as_text()
    flops = flops_by_part(config, 0, [1.0])
    # Products of queries and entries are of whole tiles, and some of them are computed again.
    assert work_of(text).flops >= 3 * 8 * flops["layers"]
    assert work_of(text).flops < 3 * 8 * (flops["layers"] + 6 * flops["attention"])


@pytest.mark.slow
def test_input_is_measured_on_batches_that_are_read_meanwhile(monkeypatch):
    monkeypatch.setattr(benchmark, "INPUT_STEPS", 2)
    tiny = radial_nano.get_config()
    tiny.model.update(smoke.get_config().model, pool_size=5, max_depth=5, min_depth=3, num_groups=4)
    tiny.train.update(smoke.get_config().train)
    monkeypatch.setattr(benchmark.radial_nano, "get_config", lambda: tiny)
    seen, call = [], RadialStep.__call__

    def recorded(step):
        seen.append(step.batch["token"].tobytes())
        return call(step)

    monkeypatch.setattr(RadialStep, "__call__", recorded)
    timings = Timings(repeats=1)
    benchmark_input(timings, SIZES)
    assert timings.figures.keys() == {"step real data/one batch"}
    first, *timed = seen
    assert len(timed) == 8, "both sides once to warm up and once to be timed"
    real = timed[0:2] + timed[4:6]
    assert len(set(real)) == 4
    assert timed[2:4] + timed[6:8] == [first] * 4


@pytest.mark.slow
def test_command_writes_the_figures(tmp_path):
    path = tmp_path / "figures.json"
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    stdout, _ = run("-m", "radialnet.benchmark", "train", f"--json={path}", "--repeats=1", *sizes)
    written = json.loads(path.read_text())
    assert set(written) == {"figures", "rows", "machine", "sizes"}
    assert set(written["figures"]) == NAMES
    assert all(value > 0 for value in written["figures"].values())
    assert json.loads(stdout.splitlines()[-1]) == written["figures"]
    assert all(row["ratio"] > 0 for row in written["rows"])


DECODE_NAMES = {
    "1 row depth=T÷2/depth=T", "16 rows async/lockstep", "1 row vs transformers", "16 rows vs transformers",
    "cache bytes/entries",
}  # fmt: skip


@pytest.mark.slow
def test_decoding_is_measured_at_the_depths_that_are_named(monkeypatch):
    monkeypatch.setattr(decode_benchmark, "LONG", 40)
    has_transformers = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    timings, sizes = Timings(repeats=1), {**SIZES, "max_depth": 4, "seq_len": 32}
    benchmark_decode(timings, sizes, runs=None)
    assert set(timings.figures) == {name for name in DECODE_NAMES if has_transformers or "transformers" not in name}
    rows = {row["what"]: row for row in timings.rows}
    for rows_name in ("1 row", "16 rows"):
        assert rows[f"{rows_name}, every token at T/2"]["depth"] == 2
        assert rows[f"{rows_name}, every token at T/4"]["depth"] == 1
    held = rows["16 rows, mean T/2 by exit bias"]
    assert held["depth"] == pytest.approx(2, abs=0.5) and held["spread"] > 0.3
    assert 1 <= timings.figures["cache bytes/entries"] < 1.6


def test_windows_of_seeds_are_one_line(monkeypatch):
    drawn = {}
    monkeypatch.setattr(cache_benchmark, "plot_tradeoffs", lambda panels, *_: drawn.update(panels))
    figures = [("all", 1, 400, 1.0), ("all", 0.5, 200, 1.5), ("all", 1, 410, 2.0), ("first", 1, 100, 3.0)]
    names = "line", "room", "bytes_per_token", "ce"
    rows = [dict(zip(names, row, strict=True), length=64) for row in figures]
    folders = "views/view=all+seed=3", "views/small/seed=3", "views/seed=3", "views"
    lines = [line_of_run(Path(folder), Path("views")) for folder in folders]
    assert lines == ["view=all", "small", "views", "views"]
    plot_windows([{"what": "not of a window"}, *rows], Path("windows.png"))
    assert drawn == {"64 tokens": {"all": [(405, 1.5)], "first": [(100, 3)]}}, "a room that one run lacks is left out"


@pytest.mark.slow
def test_cache_is_measured_over_views_and_of_trained_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_benchmark, "VIEWS", ("first", "latest"))
    timings = Timings(repeats=1)
    benchmark_cache(timings, {**SIZES, "max_depth": 2, "seq_len": 32}, runs=None)
    assert [row["what"] for row in timings.rows[2:]] == ["D=16, view latest", "D=16, view first"]
    of_view = {row["what"].split()[-1]: row for row in timings.rows[2:]}
    assert of_view["first"]["bytes_per_token"] < of_view["latest"]["bytes_per_token"]
    monkeypatch.setattr(cache_benchmark, "WINDOWS", (1, 0.125))
    runs = tmp_path / "runs"
    runs.mkdir()
    config = Config.from_dict(smoke.get_config())
    dataset = prepare(config)
    # Its exits are closed until step 5.
    make_run(runs / "young", config, dataset, step=4)
    timings = Timings(repeats=1)
    benchmark_cache(timings, SIZES, runs=runs)
    row, short, *long = timings.rows
    assert row["logits_differ_by"] < 1e-5 and row["ce"] > 0 and row["depth"] > 1
    # Of a text of one row an eighth is less than rows can go on with.
    rooms = [(window["length"], window["room"]) for window in (short, *long)]
    assert rooms == [(64, 1), (256, 1), (256, 0.125)]
    whole, least = long
    assert whole["bytes_per_token"] > least["bytes_per_token"] and abs(whole["ce"] - least["ce"]) > 1e-4
    plot_windows(timings.rows, tmp_path / "windows.png")
    assert (tmp_path / "windows.png").stat().st_size > 10_000
    timings = Timings(repeats=1)
    benchmark_decode(timings, SIZES, runs=runs)
    (row,) = timings.rows
    assert row["what"] == "young, as trained" and row["depth"] > 0 and row["tokens_per_s"] > 0
    (runs / "young").rename(tmp_path / "young")
    make_run(runs / "grown", config, dataset, step=6)
    timings = Timings(repeats=1)
    benchmark_decode(timings, {**SIZES, "seq_len": 32}, runs=runs)
    depths = [row["depth"] for row in timings.rows[1:]]
    assert len(depths) == 3 and depths == sorted(depths, reverse=True) and depths[0] > depths[-1] >= 1
    assert "time saved/layers saved" in timings.rows[-1]
    for measure in (benchmark_cache, benchmark_decode):
        with pytest.raises(ConfigError, match="--runs="):
            measure(timings, SIZES, runs=tmp_path / "nothing")


def test_bad_arguments():
    _, stderr = run("-m", "radialnet.benchmark", "trian", code=2)
    assert stderr.count("\n") == 1 and "'trian'" in stderr and "train" in stderr
    _, stderr = run("-m", "radialnet.benchmark", "train", "--repeats=0", code=2)
    assert stderr.count("\n") == 1 and "--repeats=0" in stderr
