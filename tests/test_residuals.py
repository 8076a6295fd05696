"""Residual ratios of our own runs, against what the model itself gives; figures and files of profiles. Without torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from radialnet import torch_residuals
from radialnet.layers import rms_norm
from radialnet.plots import plot_medians, plot_residuals
from radialnet.profile import documents, write
from radialnet.residuals import Place, Profile, profile_run, quantiles
from radialnet.sections import ConfigError
from radialnet.shards import PackedRows, Stream
from radialnet.sources import Document
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.torch_residuals import check_kind, kind_of
from radialnet.train_step import forward_as_evaluated
from radialnet.trained import TrainedModel
from tests.test_cli import run
from tests.test_interchange import make_run
from tests.tiny import Model, make_config

SEQ, MAX_DEPTH = 13, 4


def make_trained(**overrides):
    """A model of bytes whose tokens leave at different depths, and rows of documents of several lengths."""
    config = make_config(model__max_depth=MAX_DEPTH, router__exit_bias_init=-3.0, train__batch_size=3, **overrides)
    model = Model(config, vocab_size=BYTE_VOCAB_SIZE).with_mixed_exits()
    tokenizer = Tokenizer.train([], BYTE_VOCAB_SIZE)
    trained = TrainedModel(config, model.graph, model.params, model.controllers, tokenizer, 0)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc def"), length)) for length in (20, 5, 31, 7)]
    return trained, PackedRows(Stream.of([Document(text, text) for text in texts], tokenizer), SEQ)


def direct(trained, rows, skip_first):
    """Ratios of whole layers by depth step, each with the layers, from the states that the forward pass gives."""
    items = [rows[row] for row in range(len(rows))]
    batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
    arguments = trained.params, batch, trained.controllers, np.int32(0)
    output = jax.jit(forward_as_evaluated, static_argnums=(0, 1))(trained.config, trained.graph, *arguments)
    state_TBSD = np.concatenate([output.h_TBSD, output.exit_BSD[None]])
    is_kept_BS = (batch["document"] >= 0) & (batch["position"] >= skip_first)
    norm = np.linalg.norm(state_TBSD[1:], axis=-1)
    ratio_TBS = np.linalg.norm(np.diff(state_TBSD, axis=0), axis=-1) / norm
    return ratio_TBS[:, is_kept_BS], np.asarray(output.layer_TBS)[:, is_kept_BS]


@pytest.mark.parametrize("estimator, skip_first", [("straight_through", 0), ("weighted", 2)])
def test_layers_of_a_run_against_its_states(estimator, skip_first):
    """With `weighted` what the stream gets is less than what the layer gives."""
    trained, rows = make_trained(router__estimator=estimator)
    found = profile_run(trained, rows, 10**6, skip_first, "name", "data")
    ratio_TN, layer_TN = direct(trained, rows, skip_first)
    pool_size = trained.config.model.pool_size
    assert found.num_tokens == ratio_TN.shape[1]
    # Some leave early, and not all steps and layers have all tokens.
    assert 0 < (layer_TN[-1] < pool_size).sum() < found.num_tokens
    for t, place in enumerate(found.steps):
        expected = ratio_TN[t][layer_TN[t] < pool_size]
        np.testing.assert_allclose(place.ratios["layer"], expected, rtol=1e-4, atol=1e-6)
    for layer, place in enumerate(found.layers):
        np.testing.assert_allclose(place.ratios["layer"], ratio_TN[layer_TN == layer], rtol=1e-4, atol=1e-6)
    assert sum(place.num_tokens for place in found.layers) == (layer_TN < pool_size).sum()


def test_branches_of_a_run_by_hand():
    """Of a pool of one layer and one step, where all entries are its own: attention, MLP and layer by plain NumPy."""
    trained, rows = make_trained(
        model__pool_size=1, router__form="sequential", model__qk_norm=False, model__num_kv_heads=6
    )
    trained = TrainedModel(
        make_config(**{
            "model__pool_size": 1, "model__max_depth": 1, "router__form": "sequential", "model__qk_norm": False,
            "train__batch_size": 3,
        }),
        *_fresh(),
    )  # fmt: skip
    found = profile_run(trained, rows, 10**6, 0, "name", "data")
    w = {name: np.asarray(x[0], np.float64) for name, x in trained.params["pool"]["block"].items()}
    model, expected = trained.config.model, {"attention": [], "mlp": [], "layer": []}
    for row in range(len(rows)):
        item = rows[row]
        for document in np.unique(item["document"][item["document"] >= 0]):
            token_S = item["token"][item["document"] == document]
            x_SD = np.asarray(trained.params["embedding"], np.float64)[token_S] * model.d_model**0.5
            attended_SD = _attention(x_SD, w, model)
            after_SD = x_SD + attended_SD
            gate_SF, up_SF = (_norm(after_SD, w["mlp_norm"], model.norm_eps) @ w["mlp_in"][:, part] for part in (0, 1))
            mlp_SD = (gate_SF / (1 + np.exp(-gate_SF)) * up_SF) @ w["mlp_out"]
            pairs = {
                "attention": (attended_SD, after_SD),
                "mlp": (mlp_SD, after_SD + mlp_SD),
                "layer": (attended_SD + mlp_SD, after_SD + mlp_SD),
            }
            for branch, (f_SD, sum_SD) in pairs.items():
                expected[branch].append(np.linalg.norm(f_SD, axis=1) / np.linalg.norm(sum_SD, axis=1))
    for branch, parts in expected.items():
        ratio_N = np.concatenate(parts)
        assert ratio_N.std() > 0.01
        np.testing.assert_allclose(found.layers[0].ratios[branch], ratio_N, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(found.layers[0].ratios[branch], found.steps[0].ratios[branch])


def _fresh():
    config = make_config(
        model__pool_size=1, model__max_depth=1, router__form="sequential", model__qk_norm=False, train__batch_size=3
    )
    model = Model(config, vocab_size=BYTE_VOCAB_SIZE)
    return model.graph, model.params, model.controllers, Tokenizer.train([], BYTE_VOCAB_SIZE), 0
