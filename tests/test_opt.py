"""OPT's format, against OPT written out in NumPy on its own tensors, and against `transformers` where that is there."""

import json

import numpy as np
import pytest

from radialnet.decode import Decoder
from radialnet.decode_requests import Request
from radialnet.interchange import import_run
from radialnet.sections import ConfigError
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.trained import load_trained
from tests.tiny import logits_of
from tests.tiny_opt import FIELDS, by_hand, tensors_of, write


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """Its tensors, and the run that comes of it."""
    folder = tmp_path_factory.mktemp("opt")
    tensors = tensors_of(np.random.default_rng(0))
    found = import_run(write(folder / "opt", tensors), folder / "run")
    assert (found["format"], found["tensors"]) == ("opt", len(tensors))
    return tensors, load_trained(folder / "run")


def test_logits_are_those_of_the_tensors(opt):
    tensors, trained = opt
    assert (trained.config.cache.view, trained.config.router.form) == ("same_layer", "sequential")
    token_BS = np.random.default_rng(1).integers(0, BYTE_VOCAB_SIZE, (2, 37)).astype(np.int32)
    logits = logits_of(trained, token_BS)
    expected = np.stack([by_hand(tensors, token_S) for token_S in token_BS])[..., :BYTE_VOCAB_SIZE]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    decoded = Decoder(trained, num_rows=2).read(token_BS, np.ones(token_BS.shape, bool))[0]
    np.testing.assert_allclose(decoded, logits, atol=1e-4, rtol=0)


def test_whole_numbers_are_no_weights(opt, tmp_path):
    """As those of a quantised model are, whose config does not say so."""
    tensors = {name: x.astype(np.int8) for name, x in opt[0].items()}
    with pytest.raises(ConfigError, match="embed_tokens.weight is int8, floats are needed|q_proj.weight is int8"):
        import_run(write(tmp_path / "opt", tensors), tmp_path / "run")
    folder = write(tmp_path / "other", opt[0])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"other: neither tokenizer.json nor vocab.json and merges.txt in it"):
        import_run(folder, tmp_path / "run")


def test_there_are_as_many_positions_as_were_learned(opt):
    decoder = Decoder(opt[1], num_rows=1)
    with pytest.raises(ConfigError, match="makes 41 tokens with the prompt, and at most 40 are allowed"):
        decoder.run([Request((5,) * 10, 30)])
    assert decoder.run([Request((5,) * 10, 29)])[0].reason in ("length", "end")


@pytest.mark.parametrize("changed, told", [
    ({"do_layer_norm_before": False}, "do_layer_norm_before=False, only True can be represented"),
    ({"word_embed_proj_dim": 12}, "word_embed_proj_dim=12, only 24 can be"),
    ({"activation_function": "gelu"}, "activation_function='gelu', only 'relu'"),
    ({"ffn_dim": None}, "ffn_dim=None, a whole number of at least 1 is needed"),
    ({"model_type": "bloom"}, "model_type='bloom', one of llama, opt is needed"),
    ({"model_type": ["opt"]}, r"model_type=\['opt'\], one of llama, opt is needed"),
    ({"vocab_size": None}, "vocab_size=None, a whole number of at least 1 is needed"),
    ({"num_hidden_layers": 2}, "decoder.layers.2.* a radial network has no such tensor"),
    ({"num_hidden_layers": 4}, "decoder.layers.3.self_attn.q_proj.weight is missing"),
    ({"max_position_embeddings": 30}, r"embed_positions.weight is \[42, 24\], but its config needs \[32, 24\]"),
])  # fmt: skip
def test_what_is_no_such_model(opt, tmp_path, changed, told):
    with pytest.raises(ConfigError, match=told):
        import_run(write(tmp_path / "opt", opt[0], **changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_in_two_files(opt, tmp_path):
    """As GPT-2 and OPT have it, with special tokens that are merged of nothing."""
    folder, text = write(tmp_path / "opt", opt[0]), "def f(x):\n    return x + 1"
    known = Tokenizer.train([text] * 3, BYTE_VOCAB_SIZE + 2)
    known.save(folder / "tokenizer.json")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = {name: token for name, token in model["vocab"].items() if not name.startswith("<|")}
    vocabulary["</s>"] = known.separator_id
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer.json").unlink()
    import_run(folder, tmp_path / "run")
    found = load_trained(tmp_path / "run").tokenizer
    assert found.encode(text) == known.encode(text) and found.decode(known.encode(text)) == text
    assert found.separator_id == known.separator_id and len(model["merges"]) == 2
    assert found.encode("a</s>b") == known.encode("a</s>b"), "text that quotes it is no separator"
    (folder / "merges.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"vocab.json, merges.txt: not a byte-level BPE"):
        import_run(folder, tmp_path / "other")


@pytest.mark.parametrize("tied, heads, pickled", [(True, 4, False), (False, 3, True)])
def test_an_opt_of_transformers_has_the_same_logits_here(tmp_path, tied, heads, pickled):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        **{**FIELDS, "num_attention_heads": heads, "init_std": 0.3, "dropout": 0.0, "tie_word_embeddings": tied}
    )
    model = transformers.OPTForCausalLM(config).eval()
    for weights in model.parameters():
        if weights.ndim == 1:
            torch.nn.init.normal_(weights, weights.mean().item(), 0.3)
    model.save_pretrained(tmp_path / "opt")
    if pickled:
        (tmp_path / "opt" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "opt" / "pytorch_model.bin")
    Tokenizer.train([], BYTE_VOCAB_SIZE).save(tmp_path / "opt" / "tokenizer.json")
    import_run(tmp_path / "opt", tmp_path / "run")
    token_BS = np.random.default_rng(1).integers(0, BYTE_VOCAB_SIZE, (2, 37)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(token_BS.astype(np.int64))).logits.numpy()[..., :BYTE_VOCAB_SIZE]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits_of(load_trained(tmp_path / "run"), token_BS), expected, atol=1e-4, rtol=0)
