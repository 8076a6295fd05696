"""Layers that go, against models that never had them, and against a search by brute force."""

import itertools
import json

import jax
import numpy as np
import pytest

from radialnet.data import eval_batches, held_out_rows
from radialnet.skips import Skipping, evenly_gone, most_gone, search
from radialnet.sources import Document
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.trained import TrainedModel
from tests.commands import run
from tests.runs import make_run
from tests.tiny import Model, make_config, perturbed

LAYERS = 4


def config_of(num_layers, **overrides):
    layers = {f"model__{name}": num_layers for name in ("pool_size", "max_depth", "min_depth")}
    fields = {"router__form": "sequential", "router__depth_target": float(num_layers), "cache__view": "same_step"}
    return make_config(**{**layers, **fields, "model__biases": True, **overrides})


def skipping_config():
    return config_of(LAYERS, router__form="skip", model__min_depth=1, router__depth_target=3.0)


@pytest.fixture(scope="module")
def trained():
    config = config_of(LAYERS)
    model = Model(config, vocab_size=BYTE_VOCAB_SIZE)
    params = perturbed(model.params)
    tokenizer = Tokenizer.train([], BYTE_VOCAB_SIZE)
    return TrainedModel(config, model.graph, params, model.controllers, tokenizer, 0)


@pytest.fixture(scope="module")
def skipping(trained):
    text = "".join(np.random.default_rng(0).choice(list("abc de\n"), 70))
    rows = held_out_rows([Document("a", text), Document("b", text[::-1])], trained.tokenizer, 13)
    return Skipping(trained, list(eval_batches(rows, 2, 0)))


def test_a_model_without_layers_is_one_that_never_had_them(trained, skipping):
    block = jax.tree.map(lambda w: w[np.array([0, 3])], trained.params["pool"])
    small = Model(config_of(2), vocab_size=BYTE_VOCAB_SIZE)
    other = TrainedModel(small.config, small.graph, {**trained.params, "pool": block}, small.controllers, None, 0)
    expected = Skipping(other, skipping._batches).nats([])
    np.testing.assert_allclose(skipping.nats([1, 2]), expected, atol=1e-5)
    assert np.abs(skipping.nats([]) - expected).max() > 0.01
    assert skipping.ce([]) == pytest.approx(skipping.nats([]).sum() / skipping.is_target_RS.sum())


def test_greedy_takes_the_layer_whose_loss_is_least(skipping):
    first, second = skipping.greedy(2)
    losses = {pair: skipping.ce(list(pair)) for pair in itertools.permutations(range(LAYERS), 2)}
    assert skipping.ce([first]) == min(skipping.ce([layer]) for layer in range(LAYERS))
    assert losses[first, second] == min(loss for pair, loss in losses.items() if pair[0] == first)


def test_layers_that_go_evenly():
    assert [evenly_gone(6, num) for num in range(6)] == [[], [3], [2, 4], [1, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5]]


def test_how_many_can_go_by_hand():
    """Two rows of two targets and one without; the mean loss is 1, so that a tenth more is 0.1 a target."""
    first = [[1.0, 1.0, 0.0], [0.5, 1.5, 0.0]]
    second = [[1.05, 1.3, 0.0], [0.5, 1.5, 0.0]]
    third = [[2.0, 1.0, 0.0], [0.6, 1.6, 0.0]]
    is_target = np.array([[True, True, False]] * 2)
    found = most_gone(np.array([first, second, third]), is_target, 0.1)
    # All: 4.35 and 5.2 of 4.4; rows: the second gets to 2.2 of 2.2, the first to 2.35 of 2.2; tokens 1, 2, 2, 2.
    assert found == {"all": 1.0, "row": 1.0, "token": pytest.approx((1 + 2 + 2 + 2) / 4)}


def test_search_has_all_curves(skipping):
    found = search(skipping, 2, 2, 0.05)
    assert [len(found[name]) for name in ("greedy", "even", "random", "random_std")] == [3] * 4
    for name in ("greedy", "even", "random"):
        assert found[name][0] == pytest.approx(skipping.ce([]), rel=1e-6)
    assert found["random_std"][0] == 0 < found["random_std"][1]
    assert found["greedy"][2] == pytest.approx(skipping.ce(found["order"]))


def test_a_router_that_skips_is_measured_as_the_model_routes(skipping):
    model = Model(skipping_config(), vocab_size=BYTE_VOCAB_SIZE).with_mixed_exits()
    trained = TrainedModel(model.config, model.graph, model.params, model.controllers, None, 0)
    nats, depths = [], []
    for batch in skipping._batches:
        output = model(batch, controllers=model.controllers.lean(3.0), at=model.at.for_evaluation())
        log_p_BSV = np.asarray(jax.nn.log_softmax(output.logits_BSV))
        nats += (-np.take_along_axis(log_p_BSV, batch["target"][..., None], -1)[..., 0])[batch["is_target"]].tolist()
        depths += np.asarray(output.depth_BS)[batch["document"] >= 0].tolist()
    layers, ce = Skipping(trained, skipping._batches).routed(3.0)
    assert (layers, ce) == (pytest.approx(np.mean(depths)), pytest.approx(np.mean(nats)))
    assert 1 < layers < LAYERS - 0.2 and len(nats) < len(depths), "tokens skip, and some rows have padding"


@pytest.mark.slow
def test_the_command(tmp_path):
    make_run(tmp_path / "run", config_of(LAYERS))
    make_run(tmp_path / "learned", skipping_config())
    (tmp_path / "a.txt").write_text("some text and more of it " * 9)
    flags = [f"--data={tmp_path / 'a.txt'}", "--max_tokens=30", "--orders=1", f"--out={tmp_path / 'out'}"]
    flags += [f"--runs={tmp_path / 'learned'}", "--exit_bias=0,-100", "--seq_len=9"]
    stdout, _ = run("-m", "radialnet.skips", f"--workdir={tmp_path / 'run'}", *flags)
    found = json.loads(stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "out" / "skips.json").read_text())
    (deepest, _), (other, _) = found["runs"]["learned"]
    assert deepest == LAYERS >= other
    assert len(found["alone"]) == 4 and min(found["alone"]) == found["alone"][found["order"][0]]
    assert len(found["order"]) == 3 and (tmp_path / "out" / "skips.png").stat().st_size > 5000
    _, stderr = run("-m", "radialnet.skips", f"--workdir={tmp_path / 'run'}", "--most=4", code=2)
    assert stderr == "error: --most=4: 1 to 3 of its layers can go\n"
    seen_by_others = config_of(LAYERS, cache__view="all")
    _, stderr = run("-m", "radialnet.skips", f"--workdir={make_run(tmp_path / 'all', seen_by_others)}", code=2)
    assert "config.cache.view='all', in which other layers see what a layer wrote" in stderr
    for flag, told in (
        ("--most=0", "--most=0: 1 to 3 of its layers can go"),
        (f"--out={tmp_path / 'a.txt'}", f"--out={tmp_path / 'a.txt'}: not a folder"),
        ("--tolerance=nan", "--tolerance=nan: a number of at least 0 is needed"),
    ):
        _, stderr = run("-m", "radialnet.skips", f"--workdir={tmp_path / 'run'}", flag, code=2)
        assert stderr == f"error: {told}\n"
    _, stderr = run("-m", "radialnet.skips", f"--workdir={tmp_path / 'run'}", f"--runs={tmp_path / 'run'}", code=2)
    assert stderr == f"error: --runs={tmp_path / 'run'}: its form is 'sequential', 'skip' is needed\n"
