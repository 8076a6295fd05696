"""A tiny OPT: its files, and what it computes, in NumPy."""

import json

import numpy as np
import safetensors.numpy

from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer

FIELDS = {
    "model_type": "opt", "vocab_size": BYTE_VOCAB_SIZE + 3, "hidden_size": 24, "ffn_dim": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 40, "word_embed_proj_dim": 24, "do_layer_norm_before": True,
    "activation_function": "relu",
}  # fmt: skip
D, F, HEADS = FIELDS["hidden_size"], FIELDS["ffn_dim"], FIELDS["num_attention_heads"]


def tensors_of(rng):
    """Random ones, large enough that attention is far from uniform."""
    shapes = {"decoder.embed_tokens.weight": (FIELDS["vocab_size"], D), "decoder.embed_positions.weight": (42, D)}
    norms, linears = ["decoder.final_layer_norm"], {}
    for layer in range(FIELDS["num_hidden_layers"]):
        prefix = f"decoder.layers.{layer}"
        norms += [f"{prefix}.self_attn_layer_norm", f"{prefix}.final_layer_norm"]
        linears |= {f"{prefix}.self_attn.{name}_proj": (D, D) for name in ("q", "k", "v", "out")}
        linears |= {f"{prefix}.fc1": (F, D), f"{prefix}.fc2": (D, F)}
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {f"{name}.{kind}": (D,) for name in norms for kind in ("weight", "bias")}
    tensors = {f"model.{name}": 0.3 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in norms:
        tensors[f"model.{name}.weight"] += 1
    return tensors


def by_hand(tensors, token_S):
    """Logits [S, V] of one text: OPT, section 2.2 of its paper and its published code."""
    w = {name.removeprefix("model.decoder."): np.asarray(x, np.float64) for name, x in tensors.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    h = w["embed_tokens.weight"][token_S] + w["embed_positions.weight"][2 : 2 + len(token_S)]
    for layer in range(FIELDS["num_hidden_layers"]):
        at = f"layers.{layer}"
        x = norm(h, f"{at}.self_attn_layer_norm")
        q, k, v = (linear(x, f"{at}.self_attn.{name}_proj").reshape(len(x), HEADS, -1) for name in "qkv")
        scores = np.einsum("qhk,chk->hqc", q, k) / np.sqrt(D / HEADS)
        scores[:, np.triu_indices(len(x), 1)[0], np.triu_indices(len(x), 1)[1]] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqc,chk->qhk", p / p.sum(-1, keepdims=True), v).reshape(len(x), D)
        h = h + linear(mixed, f"{at}.self_attn.out_proj")
        hidden = np.maximum(linear(norm(h, f"{at}.final_layer_norm"), f"{at}.fc1"), 0)
        h = h + linear(hidden, f"{at}.fc2")
    return norm(h, "final_layer_norm") @ w["embed_tokens.weight"].T


def write(folder, tensors, **changed):
    folder.mkdir()
    fields = {name: value for name, value in {**FIELDS, **changed}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    Tokenizer.train([], BYTE_VOCAB_SIZE).save(folder / "tokenizer.json")
    return folder
