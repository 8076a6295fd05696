"""A pretrained model made a run by the command, and compared with what it was made of."""

import json
import math

import numpy as np
import pytest

from radialnet.interchange import import_pretrained
from radialnet.radialize import compare, logits_of_transformers, text_rows
from radialnet.sections import ConfigError
from radialnet.sources import Document, documents
from radialnet.trained import load_trained
from tests.commands import run
from tests.tiny_opt import by_hand, tensors_of, write


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """Its tensors, its folder, and text."""
    folder = tmp_path_factory.mktemp("radialize")
    tensors = tensors_of(np.random.default_rng(0))
    (folder / "text.txt").write_text("some text, which is longer than a row of forty tokens is")
    return tensors, write(folder / "opt", tensors), folder / "text.txt"


@pytest.mark.slow
def test_the_command(opt, tmp_path):
    _, model, _ = opt
    stdout, _ = run("-m", "radialnet.radialize", f"--model={model}", f"--workdir={tmp_path / 'run'}", "--json")
    found = json.loads(stdout)
    assert found["format"] == "opt" and found["parameters"] > 1000
    config = load_trained(tmp_path / "run").config
    assert (config.cache.view, config.router.form, config.model.max_depth) == ("same_layer", "sequential", 3)
    _, stderr = run("-m", "radialnet.radialize", f"--model={model}", f"--workdir={tmp_path / 'run'}", code=2)
    assert stderr.startswith(f"error: --workdir={tmp_path / 'run'}: is there already") and stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["bert", None])
def test_other_kinds_are_refused_with_a_list(opt, tmp_path, kind):
    folder = write(tmp_path / "other", opt[0], model_type=kind)
    with pytest.raises(ConfigError, match=f"model_type={kind!r}, one of llama, opt is needed"):
        import_pretrained(folder, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--model=.*none: no such file"):
        import_pretrained(tmp_path / "none", tmp_path / "run")
    with pytest.raises(ConfigError, match=f"model_type={kind!r}"):
        import_pretrained(folder, tmp_path / "new" / "folders" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_run_predicts_what_its_model_does(opt, tmp_path):
    tensors, model, text = opt
    import_pretrained(model, tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    rows = text_rows(trained, documents(text)[0], 100)
    assert [len(row) for row in rows] == [40] and rows[0][0] == trained.tokenizer.separator_id
    found = compare(trained, lambda row: by_hand(tensors, np.array(row)), rows)
    assert found["tokens"] == 39 and found["logits_differ_by"] < 1e-4 < found["largest_logit"]
    # Of theirs, three are of no token.
    assert found["perplexity"] == pytest.approx(found["their_perplexity"], rel=0.05)
    logits_SV = by_hand(tensors, np.array(rows[0]))[:-1]
    log_p = logits_SV - np.log(np.exp(logits_SV).sum(-1, keepdims=True))
    expected = math.exp(-np.mean([row[token] for row, token in zip(log_p, rows[0][1:], strict=True)]))
    assert found["their_perplexity"] == pytest.approx(expected, rel=1e-5)
    other = compare(
        trained,
        lambda row: by_hand(
            {**tensors, "model.decoder.layers.1.fc1.bias": tensors["model.decoder.layers.0.fc1.bias"]}, np.array(row)
        ),
        rows,
    )
    assert other["logits_differ_by"] > 0.01
    with pytest.raises(ConfigError, match="--check: no text that rows of 40 tokens"):
        text_rows(trained, [Document("empty", "")], 100)


def test_transformers_gives_the_same(opt, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    tensors, model, _ = opt
    row = list(range(1, 30))
    np.testing.assert_allclose(logits_of_transformers(model)(row), by_hand(tensors, np.array(row)), atol=1e-4)
    with pytest.raises(ConfigError, match="can't be loaded by transformers"):
        logits_of_transformers(tmp_path)
