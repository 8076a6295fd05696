"""Sparsity within layers, against the layers as they are, layers that lack weights, and programs that read less."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import radialnet.model
from radialnet.data import eval_batches, held_out_rows, prepare, train_batches
from radialnet.depth import unrolled
from radialnet.losses import cross_entropy
from radialnet.program import work_of
from radialnet.sources import Document
from radialnet.sparse import Gates, TopShare, flops_per_token, gains, head_sizes, sparsified, top
from radialnet.sparse_costs import Study, measure
from radialnet.sparse_decode import one_token, rows_of
from radialnet.sparse_training import LARGE_UNITS, fit_predictors, gated, see, train_gates, unlearned
from radialnet.sparsity import _setting, load, over_seeds, texts
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.train_step import forward_as_evaluated
from radialnet.trained import TrainedModel
from tests.commands import run
from tests.runs import make_run
from tests.tiny import Model, make_config, perturbed

LAYERS, RANK = 3, 6
_forward = jax.jit(forward_as_evaluated, static_argnums=(0, 1))


def plain_config(**overrides):
    layers = {f"model__{name}": LAYERS for name in ("pool_size", "max_depth", "min_depth")}
    fields = {"router__form": "sequential", "router__depth_target": float(LAYERS), "cache__view": "same_step"}
    return make_config(**{**layers, **fields, **overrides})


def make_trained(config, mixed=False):
    model = Model(config, vocab_size=BYTE_VOCAB_SIZE)
    if mixed:
        model.with_mixed_exits()
    tokenizer = Tokenizer.train([], BYTE_VOCAB_SIZE)
    params = jax.tree.map(jnp.asarray, perturbed(model.params))
    return TrainedModel(config, model.graph, params, model.controllers, tokenizer, 0)


def make_batches(trained, num_characters=90, seed=0):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abc de\n"), num_characters)) for _ in range(3)]
    rows = held_out_rows([Document(text, text) for text in texts], trained.tokenizer, 13)
    return list(eval_batches(rows, 2, 0))


@pytest.fixture(scope="module")
def plain():
    return make_trained(plain_config())


@pytest.fixture(scope="module")
def routed():
    """Routes by token, with exits: layers that some tokens skip."""
    return make_trained(make_config(), mixed=True)


@pytest.fixture(scope="module")
def seen(plain):
    return see(plain, make_batches(plain, 400, seed=1), 1024)


@pytest.fixture(scope="module")
def predictors(seen):
    return fit_predictors(seen, RANK, 400)


def logits(trained, batch):
    given = trained.params, batch, trained.controllers, np.int32(trained.step)
    return np.asarray(_forward(trained.config, trained.graph, *given).logits_BSV)


@pytest.mark.parametrize("choice", ["predicted", "largest", "static", "random"])
@pytest.mark.parametrize("which", ["plain", "routed"])
def test_with_everything_kept_nothing_changes(which, choice, request):
    """Bit for bit, whatever chooses; and half of the heads and units are another model."""
    trained = request.getfixturevalue(which)
    batch = make_batches(trained)[0]
    seen = see(trained, make_batches(trained, 200), 64)
    added = fit_predictors(seen, RANK, 5) if choice == "predicted" else unlearned(trained, choice, seen)
    everything = sparsified(trained, TopShare(choice, 1.0, 1.0), added)
    np.testing.assert_array_equal(logits(everything, batch), logits(trained, batch))
    for selection in (TopShare(choice, 0.5, 1.0), TopShare(choice, 1.0, 0.5)):
        assert np.abs(logits(sparsified(trained, selection, added), batch) - logits(trained, batch)).max() > 1e-3


@pytest.mark.parametrize("which", ["plain", "routed"])
def test_gates_that_are_open_change_nothing(which, request):
    trained = request.getfixturevalue(which)
    batch, seen = make_batches(trained)[0], see(trained, make_batches(trained, 200), 256)
    open_gates = gated(trained, seen, 6, -100.0)
    np.testing.assert_array_equal(logits(open_gates, batch), logits(trained, batch))
    half = measure(gated(trained, seen, 6, 0.0), make_batches(trained, 200))
    # The mean of a unit's partial sums is about where half of them lie.
    assert measure(open_gates, [batch]).units == 1.0 and 0.4 < half.units < 0.6
    closed = gated(trained, seen, 6, 100.0)
    weights = {**trained.params["pool"]["block"], "mlp_out": jnp.zeros_like(trained.params["pool"]["block"]["mlp_out"])}
    without_mlp = dataclasses.replace(trained, params={**trained.params, "pool": {"block": weights}})
    np.testing.assert_allclose(logits(closed, batch), logits(without_mlp, batch), atol=1e-5)


def test_a_fixed_choice_is_a_model_without_those_weights(plain):
    model, batch = plain.config.model, make_batches(plain)[0]
    rng = np.random.default_rng(0)
    score_LH, score_LF = (rng.normal(size=(LAYERS, num)).astype(np.float32) for num in (model.num_heads, model.d_ff))
    sparse = sparsified(
        plain, TopShare("static", 0.5, 0.25), {"heads_bias": jnp.asarray(score_LH), "units_bias": jnp.asarray(score_LF)}
    )
    keeps_LH, keeps_LF = np.asarray(top(score_LH, 0.5)), np.asarray(top(score_LF, 0.25))
    assert (keeps_LH.sum(1) == 3).all() and (keeps_LF.sum(1) == 5).all()
    block = plain.params["pool"]["block"]
    heads_LX1 = np.repeat(keeps_LH, model.head_size, axis=1)[..., None]
    kept = {"attention_out": heads_LX1, "mlp_out": keeps_LF[..., None]}
    block = {**block, **{name: block[name] * keeps for name, keeps in kept.items()}}
    small = dataclasses.replace(plain, params={**plain.params, "pool": {"block": block}})
    np.testing.assert_allclose(logits(sparse, batch), logits(small, batch), atol=1e-5)


def test_what_is_large_is_what_adds_most(plain):
    """Of one token in the first layer, by hand: the heads' and units' own parts of the update."""
    model, block = plain.config.model, {name: np.asarray(w[0]) for name, w in plain.params["pool"]["block"].items()}
    token = 70
    x_D = np.asarray(plain.params["embedding"])[token] * model.d_model**0.5

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + model.norm_eps) * scale

    shared = model.num_heads // model.num_kv_heads
    v_GK = np.einsum("D,DGK->GK", norm(x_D, block["attention_norm"]), block["qkv"][:, :, shared + 1])
    v_HK = np.repeat(v_GK, shared, axis=0)
    out_HKD = block["attention_out"].reshape(model.num_heads, model.head_size, -1)
    y_D = norm(x_D + np.einsum("HK,HKD->D", v_HK, out_HKD), block["mlp_norm"])
    gate_F, value_F = y_D @ block["mlp_in"][:, 0], y_D @ block["mlp_in"][:, 1]
    size_F = np.abs(gate_F / (1 + np.exp(-gate_F)) * value_F) * np.linalg.norm(block["mlp_out"], axis=1)
    batch = {
        "token": np.array([[token]], np.int32), "target": np.zeros((1, 1), np.int32),
        "is_target": np.ones((1, 1), bool), "document": np.zeros((1, 1), np.int32),
        "position": np.zeros((1, 1), np.int32),
    }  # fmt: skip
    found = see(plain, [batch], 1)
    np.testing.assert_allclose(found.mlp_LMD[0, 0], y_D, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(found.units_LMF[0, 0], np.asarray(top(size_F[None], LARGE_UNITS))[0])
    added_HD = np.einsum("HK,HKD->HD", v_HK, out_HKD)
    expected_H = np.square(added_HD).sum(1)
    gained_1X = v_HK.reshape(1, -1) @ np.asarray(gains(plain)["head_gain"])[0]
    np.testing.assert_allclose(head_sizes(gained_1X, model.head_size)[0], expected_H, rtol=1e-4)
    np.testing.assert_array_equal(found.heads_LMH[0, 0], np.asarray(top(expected_H[None], 0.5))[0])


def test_predictors_beat_random_selection(plain, seen, predictors):
    """At equal sparsity, on text that they were not trained on: nearer to the model as it is, than any and fixed ones;
    what really is large is nearer yet."""
    batches = make_batches(plain, 200, seed=2)
    expected = [logits(plain, batch) for batch in batches]

    def error(choice, added):
        model = sparsified(plain, TopShare(choice, 0.5, 0.25), added)
        pairs = zip(batches, expected, strict=True)
        return np.mean([np.square(logits(model, batch) - right).mean() for batch, right in pairs])

    errors = {choice: error(choice, unlearned(plain, choice, seen)) for choice in ("largest", "static", "random")}
    errors["predicted"] = error("predicted", predictors)
    assert errors["largest"] < errors["predicted"] < errors["static"] < errors["random"]
    assert errors["predicted"] < 0.7 * errors["random"]


@pytest.fixture(scope="module")
def biased():
    """Like an OPT: what a gate is, is one product; with biases."""
    return make_trained(plain_config(model__mlp="relu", model__biases=True, model__norm="layer", model__qk_norm=False))


@pytest.mark.parametrize("selection", [TopShare("predicted", 0.5, 0.25), Gates(6), None])
@pytest.mark.parametrize("which", ["plain", "biased"])
def test_a_program_that_reads_only_what_is_kept(which, selection, request):
    """Against the masked one: a token that sees its own entry alone."""
    trained = request.getfixturevalue(which)
    batch = make_batches(trained)[0]
    batch = {name: np.zeros_like(x[:1, :1]) for name, x in batch.items()} | {"token": np.array([[70]], np.int32)}
    model, seen = trained, see(trained, make_batches(trained, 200), 256)
    if isinstance(selection, TopShare):
        model = sparsified(trained, selection, fit_predictors(seen, RANK, 50))
    elif selection:
        model = gated(trained, seen, selection.channels, 0.3)
    cfg = trained.config.model
    h_D = model.params["embedding"][70] * cfg.d_model**0.5
    none = jnp.zeros((LAYERS, 0, 2, cfg.num_kv_heads, cfg.head_size))
    given = model.params, batch, model.controllers, np.int32(0)
    expected_D = _forward(model.config, model.graph, *given).exit_BSD[0, 0]
    layers = rows_of(model, selection if isinstance(selection, Gates) else None)
    # Of 5 units, or 20, so that the last part is not full.
    found_D = one_token(layers, h_D, none, cfg=cfg, selection=selection, units_at_once=3)
    np.testing.assert_allclose(found_D, expected_D, atol=2e-5)
    if selection:
        assert np.abs(found_D - one_token(layers, h_D, none, cfg=cfg, selection=None)).max() > 1e-3


def test_of_equal_scores_the_first_are_kept():
    score = jnp.array([[0.0, 0, 0, 1], [3, 2, 2, 2], [1, 2, 3, 4]])
    np.testing.assert_array_equal(top(score, 0.5), [[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(top(score, 0.1), [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1]])


def test_units_that_add_nothing_are_not_large(biased):
    """Most units behind a ReLU are 0; a quarter of them would be large if those counted."""
    shut = jax.tree.map(jnp.asarray, biased.params)
    block = {**shut["pool"]["block"], "mlp_in_bias": shut["pool"]["block"]["mlp_in_bias"] - 100.0}
    found = see(dataclasses.replace(biased, params={**shut, "pool": {"block": block}}), make_batches(biased), 64)
    assert not found.units_LMF.any() and found.heads_LMH.any()
    assert 0 < see(biased, make_batches(biased), 64).units_LMF.mean() <= LARGE_UNITS


@pytest.mark.parametrize("selection, units", [(TopShare("predicted", 0.5, 0.25), 0.25), (Gates(24), 0.5), (None, 1.0)])
def test_flops_against_the_compiled_program(selection, units):
    """Of a program that reads only what is kept, of a token that sees itself alone."""
    config = plain_config(
        model__d_model=96, model__d_ff=512, model__num_heads=6, model__num_kv_heads=2, train__seq_len=2,
        model__qk_norm=False,
    )  # fmt: skip
    trained = make_trained(config)
    cfg, rank = config.model, 12
    if isinstance(selection, TopShare):
        shapes = {"heads": cfg.num_heads, "units": cfg.d_ff}
        added = {f"{what}_in": jnp.ones((LAYERS, cfg.d_model, rank)) for what in shapes}
        added |= {f"{what}_out": jnp.ones((LAYERS, rank, num)) for what, num in shapes.items()}
        added |= {f"{what}_bias": jnp.ones((LAYERS, num)) for what, num in shapes.items()}
        trained = sparsified(trained, selection, added)
    elif selection:
        trained = sparsified(
            trained, selection, {name: jnp.ones((LAYERS, cfg.d_ff)) for name in ("gate_mean", "gate_std", "threshold")}
        )
    gates = selection if isinstance(selection, Gates) else None
    given = rows_of(trained, gates), jnp.ones(cfg.d_model), jnp.ones((LAYERS, 1, 2, cfg.num_kv_heads, cfg.head_size))
    program = one_token.lower(*given, cfg=cfg, selection=selection, units=units).compile()
    expected = flops_per_token(config, 0, (1.0,) * LAYERS, selection or Gates(0), units, rank)
    # XLA counts the base of the units that are kept twice, for the program takes the whole gate of them.
    again = 2 * LAYERS * units * cfg.d_ff * selection.channels if isinstance(selection, Gates) else 0
    # XLA's own count takes the body of a loop once.
    counted = work_of(program.as_text()).flops
    assert counted == pytest.approx(expected + again, rel=0.08)
    assert selection is None or counted < 0.75 * flops_per_token(config, 0, (1.0,) * LAYERS, Gates(0), 1.0)


def test_gradients_of_gates_against_autodiff(plain, seen, monkeypatch):
    """Of the loop whose gradient is written by hand, where the base of a gate is a part of another matrix."""
    model, batch = gated(plain, seen, 6, 0.2), make_batches(plain)[0]

    def loss_of(params):
        output = forward_as_evaluated(model.config, model.graph, params, batch, model.controllers, np.int32(0))
        rows = batch["target"].ravel(), batch["is_target"].ravel()
        return cross_entropy(output.final_BSD.reshape(len(rows[0]), -1), params["head"], *rows)[0]

    by_hand = jax.jit(jax.grad(loss_of))(model.params)
    monkeypatch.setattr(radialnet.model, "scanned", unrolled)
    expected = jax.jit(lambda params: jax.grad(loss_of)(params))(model.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), by_hand, expected)
    threshold = by_hand["pool"]["block"]["threshold"]
    assert np.abs(threshold).max() > 1e-4


def test_training_of_gates(plain, seen):
    """Thresholds go to their target, and the loss falls."""
    batches = make_batches(plain, 300)
    begun = gated(plain, seen, 6, -1.0)
    model = train_gates(begun, iter(batches * 3), 1.0, 40, 1e-2, 10.0)
    before, after = (x.params["pool"]["block"] for x in (begun, model))
    assert float(after["threshold"].mean()) > float(before["threshold"].mean()) + 0.1
    np.testing.assert_array_equal(after["gate_mean"], before["gate_mean"])
    assert measure(model, batches).units < measure(begun, batches).units
    learned = train_gates(begun, iter(batches * 3), -1.0, 40, 1e-2, 1.0)
    assert measure(learned, batches).ce < measure(begun, batches).ce - 0.1
    assert train_gates(begun, iter(batches), 1.0, 0, 1e-2, 1.0) is begun


def test_routes_and_frozen_parts_stay(routed):
    """Without the losses of its own training a router would change the depth."""
    config = dataclasses.replace(routed.config, optimizer=dataclasses.replace(routed.config.optimizer, frozen="pool"))
    batches = make_batches(routed, 200)
    begun = gated(dataclasses.replace(routed, config=config), see(routed, batches, 64), 6, 0.0)
    model = train_gates(begun, iter(batches), 0.0, 3, 1e-2, 1.0)
    changed = {
        path[-1].key: bool(np.any(x != y))
        for (path, x), y in zip(jax.tree.leaves_with_path(model.params), jax.tree.leaves(begun.params), strict=True)
    }
    assert changed["threshold"] and changed["embedding"] and changed["head"]
    assert not any(changed[name] for name in ("qkv", "mlp_in", "gate_mean", *routed.params["router"]))


def test_measure_against_the_forward_pass(routed):
    batches = make_batches(routed)
    found, nats, num, executed, real = measure(routed, batches), 0.0, 0, 0, 0
    for batch in batches:
        given = routed.params, batch, routed.controllers, np.int32(0)
        output = _forward(routed.config, routed.graph, *given)
        nats_BS = optax.softmax_cross_entropy_with_integer_labels(output.logits_BSV, batch["target"])
        nats += float(nats_BS[batch["is_target"]].sum())
        num, real = num + batch["is_target"].sum(), real + (batch["document"] >= 0).sum()
        executed += int(np.asarray(output.depth_BS)[batch["document"] >= 0].sum())
    assert found.ce == pytest.approx(nats / num, rel=1e-5)
    assert sum(found.executes_T) == pytest.approx(executed / real) and found.units == 1
    assert 1 < executed / real < routed.config.model.max_depth
    assert sum(measure(routed, batches, 100.0).executes_T) == routed.config.model.min_depth


def test_means_over_seeds():
    def row(method, seed, ce):
        same = {"knob": "1", "depth": 3, "heads": 1, "units": 1, "flops_per_token": 8, "time": None}
        return {"method": method, "seed": seed, "ce": ce, **same}

    points = over_seeds([row("a", 0, 1.0), row("b", 0, 5.0), row("a", 1, 3.0)])
    assert [(point["method"], point["seeds"], point["ce"]) for point in points] == [("a", 2, 2.0), ("b", 1, 5.0)]
    assert points[0]["ce_std"] == pytest.approx(2**0.5) and points[1]["ce_std"] is None


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    text = tmp_path_factory.mktemp("text")
    for index in range(20):
        (text / f"{index}.txt").write_text(f"{index} and some more words to be read\n" * 12)
    config = plain_config(
        data__source="text", data__path=str(text), data__tokenizer="byte", data__eval_fraction=0.3,
        data__cache_dir=str(tmp_path_factory.mktemp("cache")), train__seq_len=16,
    )  # fmt: skip
    return make_run(tmp_path_factory.mktemp("runs") / "plain", config, prepare(config))


def test_the_command(workdir, tmp_path):
    out = tmp_path / "out"
    flags = [
        "--heads=1,0.5",
        "--units=1",
        "--targets=0",
        "--gate_steps=2",
        "--train_tokens=200",
        "--max_tokens=100",
        "--repeats=1",
    ]
    flags += ["--methods=deja_vu,random,gates", f"--out={out}", f"--data={workdir.parent}/text.txt"]
    (workdir.parent / "text.txt").write_text("some words to be read, and more of them\n" * 20)
    stdout, _ = run("-m", "radialnet.sparsity", f"--workdir={workdir}", *flags)
    found = json.loads(stdout.splitlines()[-1])
    points = {(point["method"], point["knob"]): point for point in found["points"]}
    assert set(points) == {
        ("as it is", ""), ("deja_vu", "1, 1"), ("deja_vu", "0.5, 1"), ("random", "1, 1"), ("random", "0.5, 1"),
        ("gates", "0"),
    }  # fmt: skip
    dense, whole, half = points["as it is", ""], points["deja_vu", "1, 1"], points["deja_vu", "0.5, 1"]
    assert whole["ce"] == dense["ce"] == points["random", "1, 1"]["ce"] != half["ce"]
    assert points["random", "0.5, 1"]["flops_per_token"] < half["flops_per_token"] < dense["flops_per_token"]
    assert half["time"] > 0 and points["gates", "0"]["units"] < 1
    assert json.loads((out / "sparsity.json").read_text()) == found and (out / "sparsity.png").stat().st_size > 10_000
    assert "deja_vu" in stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--units=0"], "--units=0: shares above 0 and up to 1 are needed"),
        (["--methods=deja_vu,pruning"], "--methods=pruning: one of deja_vu, largest"),
        (["--results=README.md"], "--results=README.md: no file that radialnet.results wrote"),
        (["--out=README.md"], "--out=README.md: not a folder"),
        (["--units=0.5,0.50"], "--units=0.5,0.5: each of them once is needed"),
        (["--gate_coef=nan"], "--gate_coef=nan: a number of at least 0 is needed"),
    ],
)
def test_refusals(workdir, flags, message):
    _, stderr = run("-m", "radialnet.sparsity", f"--workdir={workdir}", *flags, code=2)
    assert message in stderr and len(stderr.strip().splitlines()) == 1


def test_a_loss_that_is_not_finite_has_no_spread():
    row = {"method": "gates", "knob": "0", **dict.fromkeys(("depth", "heads", "units", "flops_per_token", "time"), 1.0)}
    (point,) = over_seeds([{**row, "ce": math.nan}, {**row, "ce": 1.0}])
    assert point["seeds"] == 2 and point["ce_std"] is None and math.isnan(point["ce"])


def test_runs_that_cannot_be_studied_are_refused(tmp_path, workdir):
    folder = make_run(tmp_path / "run", make_config(model__prelude_layers=1))
    _, stderr = run("-m", "radialnet.sparsity", f"--workdir={folder}", code=2)
    assert "has layers outside the pool" in stderr
    folder = make_run(tmp_path / "other", make_config())
    _, stderr = run("-m", "radialnet.sparsity", f"--workdir={workdir},{folder}", "--seq_len=13", code=2)
    assert "of another setting than" in stderr
    plain = load(workdir, None).config
    assert _setting(plain) == _setting(dataclasses.replace(plain, train=dataclasses.replace(plain.train, seed=5)))
    other = dataclasses.replace(plain, optimizer=dataclasses.replace(plain.optimizer, learning_rate=0.5))
    assert _setting(plain) != _setting(other), "no seed of it"


def test_a_study_reads_other_batches_than_the_run_began_with(plain):
    rows = held_out_rows([Document("a", "".join(map(chr, range(97, 123))) * 50)], plain.tokenizer, 13)
    study = Study(plain, [], rows, 100, RANK, 1, 0.1, 1e-3, 0)
    first, again = next(study.train_batches()), next(study.train_batches())
    np.testing.assert_array_equal(first["token"], again["token"])
    train = plain.config.train
    assert not np.array_equal(first["token"], train_batches(rows, train.batch_size, train.seed)[0]["token"])


def test_a_model_that_was_trained_elsewhere_reads_the_standard_library(tmp_path, plain):
    """Its folder knows no documents; what it is trained on is not what it is measured on."""
    folder = make_run(tmp_path / "run", plain.config)
    held_out, trains = texts(load(folder, 11), folder, None, True)
    assert held_out[0]["token"].shape == trains[0]["token"].shape == (11,)
    first, other = (np.stack([rows[row]["token"] for row in range(40)]) for rows in (held_out, trains))
    assert not np.array_equal(first, other) and len(trains) > 1000
    assert texts(load(folder, 11), folder, None, False)[1] is None
