"""A model that learns from a teacher, and one that learns which of its layers it can do without."""

import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet import losses
from radialnet.controllers import Controllers
from radialnet.data import prepare
from radialnet.evaluate import evaluate_trained
from radialnet.losses import divergence, skip_losses
from radialnet.model import abstract_params, init_params, place, residual_ratio
from radialnet.optimizer import make_optimizer
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.sharding import ONE_DEVICE
from radialnet.train_step import Teacher, forward, init_state, jitted_train_step, state_shardings, train_step
from radialnet.trained import load_trained
from radialnet.trainer import train
from tests.runs import make_run
from tests.tiny import VOCAB, Model, make_batch, make_config, mesh_config, perturbed

LAYERS = 5
ORDERED = {
    "model__pool_size": LAYERS, "model__max_depth": LAYERS, "model__init": "distinct", "cache__view": "same_layer",
    "train__batch_size": 4,
}  # fmt: skip
SKIP = {**ORDERED, "router__form": "skip", "model__min_depth": 1, "router__depth_target": 3.0}


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_divergence_in_chunks_equals_the_whole(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(losses, "LOGITS_IN_MEMORY", 5 * 11)
    rng = np.random.default_rng(0)
    final, taught = (jnp.asarray(rng.normal(size=(13, width)), dtype) for width in (6, 4))
    head, taught_head = (jnp.asarray(rng.normal(size=(width, 11)), jnp.float32) for width in (6, 4))
    is_target = jnp.asarray(rng.random(13) < 0.7)

    def whole(final, head):
        logits, taught_logits = (
            (x @ w.astype(dtype)).astype(jnp.float32) for x, w in ((final, head), (taught, taught_head))
        )
        p, q = jax.nn.softmax(logits), jax.nn.softmax(taught_logits)
        return 3 * jnp.where(is_target, (q * jnp.log(q / p)).sum(-1), 0).sum()

    def chunked(final, head):
        return 3 * divergence(final, head, taught, taught_head, is_target)[0]

    found, expected = (jax.value_and_grad(f, argnums=(0, 1))(final, head) for f in (chunked, whole))
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        scale = np.abs(np.asarray(right, np.float32)).max()
        np.testing.assert_allclose(np.asarray(left, np.float32), np.asarray(right, np.float32), atol=tolerance * scale)
    np.testing.assert_allclose(divergence(final, head, final, head, is_target)[1], 0, atol=1e-5)


def test_what_is_predicted_does_not_bend_to_the_prediction():
    """The scores' own terms have no gradient outside the router."""
    config = make_config(**SKIP, router__exit_bias_init=0.5)
    model, batch = Model(config), make_batch(config, packed=True)

    def terms(params):
        output = forward(model.graph, params, batch, model.controllers, model.at, jax.random.key(0))
        is_target_N, taught_N = batch["is_target"].ravel(), jnp.ones(batch["token"].size)
        skip = skip_losses(output, model.at, is_target_N, taught_N, has_teacher=True)["loss_skip"]
        return skip + skip_losses(output, model.at, is_target_N, None, has_teacher=False)["loss_residual"]

    for name, grad in jax.grad(terms)(model.params).items():
        assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(grad)) == (name == "router"), name


def test_residual_ratios_by_hand():
    h_UBSD = np.array([[[[3.0, 4.0]]], [[[3.0, 4.0]]], [[[3.0, 0.0]]]], np.float32)
    np.testing.assert_allclose(residual_ratio(h_UBSD), [[[0.0]], [[4 / 3]]])


def test_what_skipping_costs_by_hand():
    """Three tokens at two steps; the first skips both, the second one, the third none."""
    skips_TBS = np.array([[[True, False, False]], [[True, True, False]]])
    output = SimpleNamespace(
        skips_TBS=skips_TBS,
        exit_logit_TBS=jnp.array([[[1.0, 2.0, 3.0]], [[0.5, 0.2, 0.1]]]),
        residual_ratio_TBS=jnp.where(skips_TBS, 0, 0.3),
    )
    at = SimpleNamespace(may_exit=jnp.bool_(True))
    is_target_N, taught_N = jnp.array([True, True, True]), jnp.array([0.7, 0.4, 0.9])
    found = skip_losses(output, at, is_target_N, taught_N, True)
    first, second = np.exp(-1) + np.exp(-0.5), np.exp(-0.2)
    expected = (first - 0.7 * np.log(first) + second - 0.4 * np.log(second)) / 2
    np.testing.assert_allclose(found["loss_skip"], expected, rtol=1e-6)
    assert found["loss_residual"] == 0
    # Nobody may skip yet, or there is no teacher.
    squares = [(e + np.log(0.3)) ** 2 for e in (2, 3, 0.1)]
    at = SimpleNamespace(may_exit=jnp.bool_(False))
    found = skip_losses(output, at, is_target_N, taught_N, True)
    np.testing.assert_allclose(found["loss_residual"], np.mean(squares), rtol=1e-6)
    alone = skip_losses(output, SimpleNamespace(may_exit=jnp.bool_(True)), is_target_N, None, False)
    np.testing.assert_allclose(alone["loss_residual"], np.mean(squares), rtol=1e-6)
    assert alone.keys() == {"loss_residual"}
    # Least where the costs add up to the divergence.
    first_N = jnp.array([True, False, False])

    def of(shift):
        shifted = SimpleNamespace(**{**vars(output), "exit_logit_TBS": output.exit_logit_TBS + shift})
        return skip_losses(shifted, at, first_N, taught_N, True)["loss_skip"]

    assert of(np.log(first / 0.7)) < min(of(np.log(first / 0.7) - 0.1), of(np.log(first / 0.7) + 0.1))


class Learning:
    """A model that is a teacher's copy, or a fresh one, and learns from it."""

    def __init__(self, overrides, is_copy=True):
        self.config = make_config(**overrides, train__teacher="the one below")
        graph, params = init_params(self.config, VOCAB)
        dense = make_config(**ORDERED, router__form="sequential", model__min_depth=LAYERS)
        taught_graph, taught = init_params(dense, VOCAB)
        # Louder layers and predictions than those of a fresh model, whose layers hardly matter.
        taught = jax.tree.map(lambda x: jnp.asarray(1.5 * x), perturbed(taught, seed=3))
        if is_copy:
            params = {**params, **taught}
        controllers = Controllers.init(dense.router, LAYERS)
        teacher = Teacher(taught, controllers, jnp.int32(0), dense, taught_graph)
        optimizer = make_optimizer(self.config)
        self.state = init_state(self.config, params, optimizer)
        self.first = jax.tree.map(np.asarray, params)
        step = partial(train_step, config=self.config, graph=graph, optimizer=optimizer)
        self._step = jax.jit(lambda state, batch: step(state, batch, jnp.ones(VOCAB, jnp.int32), teacher))

    def run(self, num_steps):
        lines = []
        for number in range(num_steps):
            batch = make_batch(self.config, seed=number, packed=True)
            self.state, sums, scalars = self._step(self.state, batch)
            line = {name: float(total / sums.num_targets) for name, total in sums.losses.items()}
            lines.append({**line, "depth": float(sums.routing.mean_depth()), **scalars})
        return lines


def mean(lines, name):
    return np.mean([line[name] for line in lines])


def test_a_fresh_model_learns_what_its_teacher_predicts():
    overrides = {"router__form": "sequential", "model__min_depth": LAYERS, "optimizer__learning_rate": 1e-2}
    lines = Learning({**ORDERED, **overrides}, is_copy=False).run(120)
    assert mean(lines[-10:], "loss_distill") < 0.65 * mean(lines[:5], "loss_distill")
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_distill"], rel=1e-4), "nothing of the text itself"


def test_a_part_of_the_loss_may_be_the_text():
    (line,) = Learning({**SKIP, "train__distill_weight": 0.25, "router__load_coef": 0.0, "router__z_coef": 0.0}).run(1)
    expected = 0.75 * line["ce"] + 0.25 * line["loss_distill"] + line["loss_skip"]
    assert line["loss"] == pytest.approx(expected, rel=1e-5) and line["loss_distill"] > 0.01


@pytest.mark.slow
def test_a_copy_learns_which_layers_it_can_do_without():
    """First what each layer adds, with all of them; then to be like its teacher with three of five."""
    schedule = {"router__exit_warmup_steps": 40, "router__depth_ramp_steps": 40, "router__exit_bias_init": 0.0}
    frozen = {"optimizer__frozen": "embedding, pool, head, final_norm", "optimizer__learning_rate": 1e-2}
    learning = Learning({**SKIP, **schedule, **frozen, "train__num_steps": 240, "router__exit_bias_rate": 0.05})
    lines = learning.run(240)
    alone, ramp, rest = lines[:40], lines[40:100], lines[100:]
    assert all(line["depth"] == LAYERS and line["loss_distill"] < 1e-6 for line in alone)
    assert mean(alone[-5:], "loss_residual") < 0.5 * alone[0]["loss_residual"]
    assert all(line["loss_residual"] == 0 for line in ramp)
    assert abs(mean(rest[-60:], "depth") - 3) < 0.4
    # A layer that is skipped costs less than one that is left out at random.
    at_random = {"router__noise": 1e6, "router__noise_steps": 10**9, "router__exit_bias_rate": 0.0}
    learned, lost = (
        mean(part, "loss_distill") / (LAYERS - mean(part, "depth"))
        for part in (rest[-60:], Learning({**SKIP, **frozen, **at_random}).run(30))
    )
    assert 0 < learned < 0.8 * lost
    params = learning.state.params
    for name, first in learning.first.items():
        is_same = jax.tree.map(lambda a, b: np.array_equal(a, b), first, params[name])
        assert all(jax.tree.leaves(is_same)) == (name != "router"), name


@pytest.mark.slow
def test_a_run_learns_from_a_run_and_goes_on(tmp_path):
    """By what train.py calls: up-cycled from its teacher, stopped, gone on with, restored."""
    texts = tmp_path / "text"
    texts.mkdir()
    for index in range(20):
        (texts / f"{index}.txt").write_text(f"document {index}: " + "the quick brown fox " * 3 * (index + 1))
    plain = {
        "model__pool_size": 3, "model__qk_norm": False, "data__source": "text", "data__path": str(texts),
        "data__tokenizer": "byte", "data__eval_fraction": 0.3, "data__cache_dir": str(tmp_path / "cache"),
        "log__every_steps": 1, "log__sample_prompt": "", "train__num_steps": 4,
    }  # fmt: skip
    dense = make_config(**plain, router__form="sequential")
    teacher = make_run(tmp_path / "teacher", dense, prepare(dense))
    fields = {
        **plain, "train__teacher": str(teacher), "model__init": "upcycle", "model__upcycle_from": str(teacher),
        "router__form": "skip", "cache__view": "same_layer", "optimizer__frozen": "embedding, pool, final_norm, head",
        "router__exit_bias_init": 3.0, "router__exit_warmup_steps": 2,
    }  # fmt: skip
    config = make_config(**fields, checkpoint__every_steps=3)
    train(config, tmp_path / "whole")
    # As if a kill had come after step 3.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(config, tmp_path / "again")
    lines, again = (
        [line for line in RunFolder(tmp_path / name).read_metrics() if line["split"] == "train"]
        for name in ("whole", "again")
    )
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    one, other = (load_trained(tmp_path / name) for name in ("whole", "again"))
    jax.tree.map(np.testing.assert_array_equal, (one.params, one.controllers), (other.params, other.controllers))
    (held_out,) = [line for line in RunFolder(tmp_path / "whole").read_metrics() if line["split"] == "eval"]
    assert held_out["loss_distill"] > 1e-4 and held_out["loss_residual"] == 0
    assert all(line["depth"] == 3 and line["loss_distill"] < 1e-6 for line in lines[:2])
    assert all(line["depth"] < 3 and line["loss_distill"] > 1e-4 for line in lines[2:])
    ours, theirs = load_trained(tmp_path / "whole"), load_trained(teacher)
    jax.tree.map(np.testing.assert_array_equal, ours.params["pool"], theirs.params["pool"])
    assert evaluate_trained(ours, prepare(dense).eval, 3, -1e9)["ce"] == pytest.approx(
        evaluate_trained(theirs, prepare(dense).eval, 3, 0.0)["ce"], rel=1e-6
    )
    # On without its teacher: steps have other losses then, also those of the line that is begun.
    alone = {**fields, "train__teacher": "", "train__num_steps": 5}
    train(make_config(**alone), tmp_path / "again")
    assert [line["step"] for line in RunFolder(tmp_path / "again").read_metrics() if "loss_distill" not in line] == [
        5,
        5,
    ]
    with pytest.raises(ConfigError, match="config.train.teacher=.*none"):
        train(make_config(**{**fields, "train__teacher": str(tmp_path / "none")}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_of_low_rank_goes_on_bit_for_bit(tmp_path):
    """Its factors are of the checkpoint, and what is frozen stays."""
    (tmp_path / "texts").mkdir()
    for index in range(20):
        (tmp_path / "texts" / f"{index}.txt").write_text(f"document {index}: " + "the quick brown fox " * 9)
    fields = {
        "data__source": "text", "data__path": str(tmp_path / "texts"), "data__tokenizer": "byte", "log__every_steps": 1,
        "data__cache_dir": str(tmp_path / "cache"), "data__eval_fraction": 0.3, "log__sample_prompt": "",
        "optimizer__low_rank": 2, "optimizer__frozen": "embedding,head", "checkpoint__every_steps": 2, "mesh__data": 1,
        "model__biases": True, "eval__every_steps": 0, "train__num_steps": 4,
    }  # fmt: skip
    config = make_config(**fields)
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(config, tmp_path / "again")
    one, other = (load_trained(tmp_path / name) for name in ("whole", "again"))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    begun = init_params(config, one.tokenizer.vocab_size)[1]
    np.testing.assert_array_equal(one.params["head"], begun["head"])
    change_LDX = np.asarray(one.params["pool"]["block"]["qkv"] - begun["pool"]["block"]["qkv"]).reshape(5, 24, -1)
    sizes = np.linalg.svd(change_LDX, compute_uv=False)
    assert (sizes[:, 2:] < 1e-5).all() and sizes[:, 1].max() > 1e-4
    with pytest.raises(ConfigError, match="config.optimizer.low_rank=3, but the run in .* was started with 2"):
        train(make_config(**{**fields, "optimizer__low_rank": 3}), tmp_path / "whole")


@pytest.mark.parametrize("overrides, told", [
    ({"train__distill_weight": 0.0}, "config.train.distill_weight=0.0: more than 0"),
    ({"optimizer__frozen": "pool,heads"}, "config.optimizer.frozen='heads': one of embedding"),
    ({"optimizer__frozen": "pool,coda"}, "config.optimizer.frozen='pool,coda': this model has no coda"),
    ({"optimizer__low_rank": -1}, "config.optimizer.low_rank=-1"),
    ({"optimizer__low_rank": 2, "optimizer__frozen": "pool"}, "config.optimizer.low_rank=2 with .*frozen='pool'"),
    ({"optimizer__low_rank": 2, "mesh__data": 2}, "config.optimizer.low_rank=2: on one device alone"),
])  # fmt: skip
def test_what_can_not_be_learned(overrides, told):
    with pytest.raises(ConfigError, match=told):
        make_config(**overrides)


def test_without_skips_it_is_the_teacher():
    model = Model(make_config(**{**SKIP, "router__exit_bias_init": -1e9}))
    dense = Model(make_config(**ORDERED, router__form="sequential", model__min_depth=LAYERS))
    batch, shared = make_batch(model.config, packed=True), perturbed(dense.params)
    found = model(batch, {**model.params, **shared})
    np.testing.assert_array_equal(found.logits_BSV, dense(batch, shared).logits_BSV)
    assert (np.asarray(found.depth_BS)[batch["document"] >= 0] == LAYERS).all()


@pytest.mark.slow
def test_eight_devices_learn_as_one():
    """Skips, a teacher, and parts that are frozen, which have no moments, on a mesh."""
    ordered = {"model__pool_size": 4, "model__max_depth": 4, "model__init": "distinct", "cache__view": "same_layer"}
    dense = mesh_config({}, **ordered, router__form="sequential", model__min_depth=4)
    graph, taught = init_params(dense, VOCAB)
    teacher = Teacher(perturbed(taught, seed=3), Controllers.init(dense.router, 4), np.int32(0), dense, graph)
    skips = {"router__form": "skip", "router__exit_bias_init": 0.02, "optimizer__frozen": "embedding,head,final_norm"}
    found = []
    for sizes in ({}, {"tensor": 2, "pool": 2, "fsdp": 2}):
        config = mesh_config(sizes, **ordered, **skips, train__teacher="the one above", train__accumulate_steps=2)
        placement = place(config, VOCAB, jax.devices()) if sizes else ONE_DEVICE
        graph, _ = abstract_params(config, VOCAB, placement.parallel)
        optimizer, batch = make_optimizer(config), make_batch(config, packed=True)
        state = init_state(config, perturbed(init_params(config, VOCAB)[1]), optimizer)
        given = {name: getattr(teacher, name) for name in ("params", "controllers", "step")}
        if sizes:
            state = jax.device_put(state, state_shardings(placement, optimizer, state))
            batch = placement.put_rows(batch, config.train.batch_size)
        of_mesh = teacher.replace(**placement.put_everywhere(given))
        step = jitted_train_step(config, graph, optimizer, placement, state)
        state, sums, scalars = step(state, batch, placement.put_everywhere(np.ones(VOCAB, np.int32)), of_mesh)
        assert 1 < sums.routing.mean_depth() < 3.9 and sums.losses["loss_skip"] != 0
        found.append(jax.tree.map(np.asarray, (state.params, state.optimizer, sums.losses, scalars)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *found)
