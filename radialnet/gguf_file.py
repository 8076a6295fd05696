"""Llamas in the GGUF format of llama.cpp, read by the library `gguf`, by the names that `transformers` has."""

import re
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from radialnet.sections import ConfigError

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
# How a text is cut before merges, by the name that llama.cpp gives it; digits one by one or not.
_SPLITS_DIGITS = {"gpt-2": False, "smollm": True}
# Kinds of tokens.
_CONTROL, _USER_DEFINED = 3, 4


def read_gguf(path: Path) -> tuple[dict, dict[str, np.ndarray], Tokenizer]:
    """The fields of a config.json, the tensors, dequantised to fp32, and the tokenizer of a Llama.

    Raises:
        ConfigError: the file can't be read, or is of another architecture, or its tokenizer is of a kind that is not
            known here; or the library is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(f"{path}: reading it needs the library gguf (pip install gguf)") from None
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # Of whatever what is not the format leads to.
        raise ConfigError(f"{path}: not a GGUF file ({error})") from None

    def get(key: str):
        field = reader.get_field(key)
        return None if field is None else field.contents()

    if (architecture := get("general.architecture")) != "llama":
        raise ConfigError(f"{path}: general.architecture={architecture!r}, 'llama' is needed")
    fields = {"model_type": "llama"} | {name: get(f"llama.{key}") for name, key in _FIELDS.items()}
    tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
    fields["tie_word_embeddings"] = "lm_head.weight" not in tensors
    fields["rope_scaling"] = {"rope_type": get("llama.rope.scaling.type") or "default"}
    # They are fp32: 1e-5, and not what that is in a longer form.
    for name, key in (("rope_theta", "rope.freq_base"), ("rms_norm_eps", "attention.layer_norm_rms_epsilon")):
        if (value := get(f"llama.{key}")) is not None:
            fields[name] = float(str(np.float32(value)))
    for name in ("num_attention_heads", "hidden_size", "num_key_value_heads"):
        if name == "num_key_value_heads" and fields[name] is None:
            continue
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise ConfigError(f"{path}: llama.{_FIELDS[name]}={fields[name]!r}, a whole number of at least 1 is needed")
    if "model.embed_tokens.weight" not in tensors:
        raise ConfigError(f"{path}: token_embd.weight is missing")
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"] or fields["num_attention_heads"]
    if rotary := get("llama.rope.dimension_count"):
        fields["partial_rotary_factor"] = rotary * heads / fields["hidden_size"]
    arrays = {}
    for name, tensor in tensors.items():
        try:
            arrays[name] = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ConfigError(f"{path}: {tensor.name}: can't be dequantised ({error})") from None
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            arrays[name] = _halves_together(arrays[name], heads if name.endswith("q_proj.weight") else kv_heads)
    tokenizer = _tokenizer(get, path)
    fields["vocab_size"] = len(arrays["model.embed_tokens.weight"])
    return fields, arrays, tokenizer


def _name(name: str) -> str:
    """Of a tensor, as transformers has it; others stay as they are."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not found or found[2] not in _NAMES:
        return name
    layer = f"model.layers.{found[1]}." if found[1] else ""
    return f"{layer}{_NAMES[found[2]]}.{found[3]}"


def _halves_together(x_XD: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from pairs (2i, 2i + 1), which llama.cpp turns, to (i, i + K/2)."""
    return x_XD.reshape(heads, -1, 2, x_XD.shape[1]).swapaxes(1, 2).reshape(x_XD.shape)


def _tokenizer(get, path: Path) -> Tokenizer:
    """A byte-level BPE from the metadata."""
    kind, split = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLITS_DIGITS:
        raise ConfigError(
            f"{path}: tokenizer.ggml.model={kind!r}, tokenizer.ggml.pre={split!r}: 'gpt2' and one of "
            f"{', '.join(_SPLITS_DIGITS)} are known; a folder with a tokenizer.json is the other way in"
        )
    tokens, merges, types = (get(f"tokenizer.ggml.{name}") or [] for name in ("tokens", "merges", "token_type"))
    if not tokens or len(tokens) != len(types):
        raise ConfigError(f"{path}: tokenizer.ggml.tokens are {len(tokens)}, tokenizer.ggml.token_type {len(types)}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(get("tokenizer.ggml.add_space_prefix")))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _SPLITS_DIGITS[split] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, its_type in zip(tokens, types, strict=True):
        if its_type in (_CONTROL, _USER_DEFINED):
            is_special = its_type == _CONTROL
            add = tokenizer.add_special_tokens if is_special else tokenizer.add_tokens
            add([AddedToken(token, special=is_special, normalized=False)])
    return tokenizer
