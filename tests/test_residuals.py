"""Residual ratios of our own runs, against what the model itself gives; figures and files of profiles. No torch."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from radialnet.profile import checked_kinds, profile, show, write
from radialnet.residuals import BRANCHES, Place, Profile, profile_run, quantiles
from radialnet.sections import ConfigError
from radialnet.shards import PackedRows, Stream
from radialnet.sources import Document, documents
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.torch_residuals import check_kind, kind_of
from radialnet.train_step import forward_as_evaluated
from radialnet.trained import TrainedModel
from tests.commands import run
from tests.runs import make_run
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
    """Of a plain transformer with prelude and coda: attention, MLP and layer in NumPy, document by document."""
    config = make_config(
        model__pool_size=2, model__max_depth=2, model__prelude_layers=1, model__coda_layers=1, model__qk_norm=False,
        router__form="sequential", cache__view="same_step", train__batch_size=3,
    )  # fmt: skip
    model = Model(config, vocab_size=BYTE_VOCAB_SIZE)
    trained, rows = make_trained()
    trained = TrainedModel(config, model.graph, model.params, model.controllers, trained.tokenizer, 0)
    found = profile_run(trained, rows, 10**6, 0, "name", "data")
    expected = [{branch: [] for branch in BRANCHES} for _ in range(4)]
    for row in range(len(rows)):
        item = rows[row]
        for document in np.unique(item["document"][item["document"] >= 0]):
            is_of_it_S = item["document"] == document
            x_SD = np.asarray(model.params["embedding"])[item["token"][is_of_it_S]] * config.model.d_model**0.5
            for place, w in zip(expected, _layers(model.params), strict=True):
                attended_SD = _attention(x_SD, w, config.model)
                between_SD = x_SD + attended_SD
                normed_SD = _norm(between_SD, w["mlp_norm"], config.model.norm_eps)
                gate_SF, up_SF = normed_SD @ w["mlp_in"][:, 0], normed_SD @ w["mlp_in"][:, 1]
                mlp_SD = (gate_SF / (1 + np.exp(-gate_SF)) * up_SF) @ w["mlp_out"]
                after_SD = between_SD + mlp_SD
                for branch, f_SD, sum_SD in (
                    ("attention", attended_SD, between_SD),
                    ("mlp", mlp_SD, after_SD),
                    ("layer", attended_SD + mlp_SD, after_SD),
                ):
                    place[branch].append(np.linalg.norm(f_SD, axis=1) / np.linalg.norm(sum_SD, axis=1))
                x_SD = after_SD
    assert [place.name for place in found.layers] == ["prelude 0", "0", "1", "coda 0"]
    for place, parts in zip(found.layers, expected, strict=True):
        for branch in BRANCHES:
            ratio_N = np.concatenate(parts[branch])
            assert ratio_N.std() > 0.01
            np.testing.assert_allclose(place.ratios[branch], ratio_N, rtol=1e-4, atol=1e-6)


def _layers(params):
    """The weights of each layer, in their order."""
    for part in ("prelude", "pool", "coda"):
        block = params[part]["block"]
        for layer in range(len(block["qkv"])):
            yield {name: np.asarray(x[layer], np.float64) for name, x in block.items()}


def _norm(x_SD, scale_D, eps):
    return x_SD / np.sqrt((x_SD**2).mean(1, keepdims=True) + eps) * scale_D


def _attention(x_SD, w, cfg):
    """Causal, with rotary positions, query heads side by side with the key and value head that they share."""
    seq, half = len(x_SD), cfg.head_size // 2
    qkv_SGJK = np.einsum("SD,DGJK->SGJK", _norm(x_SD, w["attention_norm"], cfg.norm_eps), w["qkv"])
    angle_SK = np.arange(seq)[:, None] * cfg.rope_base ** (-np.arange(half) / half)
    cos_SK, sin_SK = (np.tile(turn(angle_SK), 2)[:, None, None] for turn in (np.cos, np.sin))
    turned_SGJK = np.concatenate([-qkv_SGJK[..., half:], qkv_SGJK[..., :half]], -1)
    rotated_SGJK = qkv_SGJK * cos_SK + turned_SGJK * sin_SK
    score_GJSC = np.einsum("SGJK,CGK->GJSC", rotated_SGJK[:, :, :-2], rotated_SGJK[:, :, -2]) * cfg.head_size**-0.5
    score_GJSC = np.where(np.tri(seq, dtype=bool), score_GJSC, -np.inf)
    p_GJSC = np.exp(score_GJSC - score_GJSC.max(-1, keepdims=True))
    p_GJSC /= p_GJSC.sum(-1, keepdims=True)
    return np.einsum("GJSC,CGK->SGJK", p_GJSC, qkv_SGJK[:, :, -1]).reshape(seq, -1) @ w["attention_out"]


def make_profile(name="name", empty=False):
    rng = np.random.default_rng(len(name))
    sizes = [40, 0 if empty else 30]
    places = [
        Place(str(layer), {branch: rng.random(size, np.float32) for branch in BRANCHES})
        for layer, size in enumerate(sizes)
    ]
    return Profile(name, "llama", "pre-norm", 1000 * len(name), 40, 1, "some text", "", places, [])


def test_figures():
    """Over the model all tokens count alike, and the variance is that within a layer."""
    found = make_profile()
    summary = found.summary()
    first, second = (place.ratios["mlp"] for place in found.layers)
    assert summary["median"] == {branch: summary["quantiles"][branch]["0.5"] for branch in BRANCHES}
    assert summary["median"]["mlp"] == pytest.approx(np.median(np.concatenate([first, second])))
    assert summary["variance"]["mlp"] == pytest.approx((first.var() + second.var()) / 2)
    of_layer = summary["layers"][1]
    assert of_layer["tokens"] == 30 and of_layer["mlp"]["variance"] == pytest.approx(second.var())
    assert of_layer["mlp"]["quantiles"]["0.95"] == pytest.approx(np.quantile(second, 0.95))
    # A state of zeros has no ratio.
    assert quantiles(np.array([np.nan, 1, np.inf, 3], np.float32))[2] == 2
    assert np.isnan(quantiles(np.zeros(0, np.float32))).all()


def test_files(tmp_path):
    """Of models that are called the same, and of a layer that no token was sent to."""
    write([make_profile("a", empty=True), make_profile("a"), make_profile("other")], tmp_path / "new" / "out")
    names = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert names == ["0-a.png", "1-a.png", "other.png", "parameters.png", "profile.json"]
    first, *rest = json.loads((tmp_path / "new" / "out" / "profile.json").read_text())
    assert first["layers"][1]["mlp"]["median"] is None and first["median"]["mlp"] > 0 and len(rest) == 2


def test_what_is_shown(capsys):
    found = make_profile(empty=True)
    show(found)
    head, told, names, *layers, medians = capsys.readouterr().out.splitlines()
    assert head == "name: llama, pre-norm, 4,000 parameters"
    assert told == "40 tokens without the first 1 of each row; some text"
    assert names.split() == ["layer", "tokens", *BRANCHES] and [line.split()[0] for line in layers] == ["0", "1"]
    assert medians.split() == ["median", *(f"{median:.3f}" for median in found.summary()["median"].values())]


def write_config(folder, **fields):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_kinds(tmp_path):
    assert kind_of(write_config(tmp_path / "theirs", model_type="opt")) == "opt"
    assert kind_of(write_config(tmp_path / "ours", model={})) is None and kind_of(tmp_path) is None
    assert kind_of(tmp_path / "some.gguf") == "gguf"
    with pytest.raises(ConfigError, match="'t5'; bert, gpt2, llama, .*opt, .*resnet, vit, GGUF .*runs of radialnet"):
        check_kind("t5", tmp_path)


@pytest.mark.parametrize("kind, needed", [("opt", "torch"), ("gguf", "gguf")])
def test_what_is_not_installed_is_told(tmp_path, monkeypatch, kind, needed):
    for name in ("torch", "transformers", "gguf"):
        # Of what is there as well: a module, or None, which can't be imported.
        monkeypatch.setitem(sys.modules, name, None if name == needed else sys)
    with pytest.raises(ConfigError, match=rf"{needed} is needed: pip install -r requirements-torch.txt"):
        check_kind(kind, tmp_path / ("a.gguf" if kind == "gguf" else ""))


def test_documents(tmp_path):
    """By default those that no run on the standard library is trained on."""
    held_out, told = documents(None)
    assert 0 < len(held_out) < 200 and all(document.is_held_out(0.05) for document in held_out)
    assert told.startswith("held-out part of the standard library of Python 3.")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    source, told = documents(tmp_path / "a.jsonl")
    assert source[0].content == "one" and told == f"text of {tmp_path / 'a.jsonl'}"
    with pytest.raises(ConfigError, match=f"--data={tmp_path}/none: no such file or folder"):
        documents(tmp_path / "none")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = make_config(train__seq_len=SEQ, train__batch_size=3)
    return make_run(tmp_path_factory.mktemp("runs") / "run", config)


def test_the_command_of_a_run(tmp_path, workdir):
    (tmp_path / "a.txt").write_text("some text to be read, " * 20)
    flags = [f"--model={workdir}", f"--data={tmp_path / 'a.txt'}", "--max_tokens=60", f"--out={tmp_path / 'out'}"]
    stdout, _ = run("-m", "radialnet.profile", *flags, "--json")
    found = json.loads(stdout.splitlines()[-1])
    assert found["kind"] == "radialnet" and set(found["median"]) == set(BRANCHES)
    assert len(found["layers"]) == 5 and len(found["steps"]) == 3
    # Four rows, without their first positions.
    assert found["tokens"] == 4 * (SEQ - 1) and found["skip_first"] == 1
    assert all(0 < median < 2 for median in found["median"].values())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["profile.json", "run-steps.png", "run.png"]


@pytest.mark.parametrize(
    "paths, told",
    [
        (("{0}/nothing", None, None), "--model={0}/nothing: no such file or folder"),
        (("{0}", None, None), "--model={0}: a run folder, a folder of transformers .* or a .gguf file is needed"),
        (("{0}/t5", None, None), "--model={0}/t5: a model of the kind 't5'; bert, gpt2"),
        (("{1}", "{0}/nothing", None), "--data={0}/nothing: no such file or folder"),
        (("{1}", None, "{0}/t5/config.json"), "--out={0}/t5/config.json: not a folder"),
    ],
)
def test_errors(tmp_path, workdir, paths, told):
    write_config(tmp_path / "t5", model_type="t5")
    model, data, out = (path and Path(path.format(tmp_path, workdir)) for path in paths)
    with pytest.raises(ConfigError, match=told.format(tmp_path, workdir)):
        checked_kinds([workdir, model], data, out)


def test_no_token_is_left(tmp_path, workdir):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=f"--skip_first=99: leaves no token of text of {tmp_path}"):
        profile(workdir, None, tmp_path, 100, 99)


def test_an_error_of_the_command(tmp_path):
    _, stderr = run("-m", "radialnet.profile", f"--model={tmp_path}/no", "--json", code=2)
    assert stderr == f"error: --model={tmp_path}/no: no such file or folder\n"
    _, stderr = run("-m", "radialnet.profile", "--model=", code=2)
    assert stderr.startswith("error: --model=: run folders") and stderr.count("\n") == 1
