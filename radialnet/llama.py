"""A `sequential` radial network as a model in the format of Llama (arXiv 2302.13971), and back: on fields of its
config.json and NumPy arrays by the names of its safetensors. docs/INTERCHANGE.md has both lists.

Without QK-norm a layer of the pool is a layer of Llama, whose matrices lie transposed and one for each part. The rotary
positions turn the same pairs; embeddings are multiplied by sqrt(D) here and not there.
"""

from collections.abc import Mapping

import jax
import numpy as np

from radialnet.config import Config
from radialnet.pretrained import (
    Left,
    Tensors,
    check_representable,
    is_true,
    needed,
    number,
    sequential_config,
    stacked,
)
from radialnet.sections import ConfigError, ModelConfig

# In which a token at step t sees what the others wrote at step t, if all tokens execute all steps in the same order.
PLAIN_VIEWS = ("latest", "same_step", "same_layer")
# Buffers that older files hold, and that follow from the config.
_IGNORED = "rotary_emb.inv_freq"


def check_is_plain(config: Config) -> None:
    """Raise ConfigError, with the reason, when a run is no plain transformer with the layers of Llama."""
    model, form, view = config.model, config.router.form, config.cache.view
    for holds, reason in (
        (form == "sequential", f"config.router.form={form!r}: every layer in its turn, 'sequential', is needed"),
        (not model.qk_norm, "config.model.qk_norm=True: Llama normalises no queries and keys"),
        (model.norm == "rms", f"config.model.norm={model.norm!r}: 'rms' is needed"),
        (model.mlp == "swiglu", f"config.model.mlp={model.mlp!r}: 'swiglu' is needed"),
        (not model.biases, "config.model.biases=True: no product of a Llama has a bias"),
        (model.positions == "rotary", f"config.model.positions={model.positions!r}: 'rotary' is needed"),
        (
            view in PLAIN_VIEWS or model.max_depth == 1,
            f"config.cache.view={view!r} shows entries of other steps: one of {', '.join(PLAIN_VIEWS)} is needed",
        ),
    ):
        if not holds:
            raise ConfigError(f"no Llama is equal to this run, {reason}")


def llama_fields(config: Config, vocab_size: int, separator_id: int) -> dict:
    """The config.json of a Llama with the sizes of a run. Raises ConfigError as `check_is_plain`."""
    check_is_plain(config)
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.prelude_layers + model.max_depth + model.coda_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "max_position_embeddings": config.train.seq_len,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "torch_dtype": "float32",
    }


def to_llama(params: dict, model: ModelConfig) -> Tensors:
    """The parameters of a plain run as tensors of Llama; prelude and coda are layers like the others."""
    blocks = [jax.tree.map(np.asarray, params[part]["block"]) for part in ("prelude", "pool", "coda") if part in params]
    layers = [{name: w[layer] for name, w in block.items()} for block in blocks for layer in range(len(block["qkv"]))]
    tensors = {
        "model.embed_tokens.weight": np.asarray(params["embedding"]) * np.float32(model.d_model**0.5),
        "model.norm.weight": np.asarray(params["final_norm"]),
        "lm_head.weight": np.asarray(params["head"]).T,
    }
    for layer, w in enumerate(layers):
        tensors |= {f"model.layers.{layer}.{name}.weight": x for name, x in _layer_to_llama(w).items()}
    return tensors


def _layer_to_llama(w: Tensors) -> Tensors:
    qkv_DGJK = w["qkv"]

    def rows(x_DGJK: np.ndarray) -> np.ndarray:
        return x_DGJK.reshape(len(qkv_DGJK), -1).T

    return {
        "input_layernorm": w["attention_norm"],
        "self_attn.q_proj": rows(qkv_DGJK[:, :, :-2]),
        "self_attn.k_proj": rows(qkv_DGJK[:, :, -2]),
        "self_attn.v_proj": rows(qkv_DGJK[:, :, -1]),
        "self_attn.o_proj": w["attention_out"].T,
        "post_attention_layernorm": w["mlp_norm"],
        "mlp.gate_proj": w["mlp_in"][:, 0].T,
        "mlp.up_proj": w["mlp_in"][:, 1].T,
        "mlp.down_proj": w["mlp_out"].T,
    }


def config_of_llama(fields: dict, where: str) -> Config:
    """The config of a `sequential` run with the sizes of a Llama.

    Args:
        fields: of its config.json.
        where: what an error message begins with.

    Raises:
        ConfigError: a field is missing, or says what a radial network has no form of.
    """

    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{where}: rope_parameters={rope!r}, an object is needed")
    heads, d_model = (needed(fields, name, where) for name in ("num_attention_heads", "hidden_size"))
    check_representable(
        where,
        ("model_type", fields.get("model_type"), "llama"),
        ("hidden_act", fields.get("hidden_act", "silu"), "silu"),
        ("attention_bias", fields.get("attention_bias") or False, False),
        ("mlp_bias", fields.get("mlp_bias") or False, False),
        ("quantization_config", fields.get("quantization_config"), None),
        # Older files say `type`.
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1)), 1),
        ("head_dim · num_attention_heads", (fields.get("head_dim") or d_model // heads) * heads, d_model),
    )
    return sequential_config(
        where,
        needed(fields, "num_hidden_layers", where),
        needed({"max_position_embeddings": 2048, **fields}, "max_position_embeddings", where),
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=heads
        if fields.get("num_key_value_heads") is None
        else needed(fields, "num_key_value_heads", where),
        d_ff=needed(fields, "intermediate_size", where),
        rope_base=number(rope if "rope_theta" in rope else fields, "rope_theta", 10_000.0, where),
        norm_eps=number(fields, "rms_norm_eps", 1e-6, where),
    )


def from_llama(
    tensors: Mapping[str, np.ndarray], fields: dict, model: ModelConfig, num_tokens: int, where: str
) -> dict:
    """The parameters of a `sequential` run from the tensors of a Llama, fp32.

    Args:
        fields: of its config.json, of which `config_of_llama` made `model`.
        num_tokens: that its tokenizer has; rows of embedding and head beyond them, which fill those up, are left out.
        where: what an error message begins with.

    Raises:
        ConfigError: a tensor is missing, or of another shape, or has no place here.
    """
    left = Left({name: x for name, x in tensors.items() if not name.endswith(_IGNORED)}, where)

    def take(name: str, *shape: int) -> np.ndarray:
        return left.take(f"{name}.weight", *shape)

    d_model, kv_width, vocab_size = model.d_model, model.num_kv_heads * model.head_size, fields["vocab_size"]

    def layer(prefix: str) -> Tensors:
        q, k, v = (
            take(f"{prefix}.self_attn.{name}_proj", width, d_model).T.reshape(
                d_model, model.num_kv_heads, -1, model.head_size
            )
            for name, width in (("q", d_model), ("k", kv_width), ("v", kv_width))
        )
        gate, up = (take(f"{prefix}.mlp.{name}_proj", model.d_ff, d_model).T for name in ("gate", "up"))
        return {
            "attention_norm": take(f"{prefix}.input_layernorm", d_model),
            "qkv": np.concatenate([q, k, v], axis=2),
            "attention_out": take(f"{prefix}.self_attn.o_proj", d_model, d_model).T,
            "mlp_norm": take(f"{prefix}.post_attention_layernorm", d_model),
            "mlp_in": np.stack([gate, up], axis=1),
            "mlp_out": take(f"{prefix}.mlp.down_proj", d_model, model.d_ff).T,
        }

    layers = [layer(f"model.layers.{index}") for index in range(model.pool_size)]
    embedding = take("model.embed_tokens", vocab_size, d_model)
    head = left.take_head(embedding, is_true(fields, "tie_word_embeddings", False, where))
    params = {
        "embedding": embedding[:num_tokens] / np.float32(d_model**0.5),
        "final_norm": take("model.norm", d_model),
        "head": head[:num_tokens].T,
        "pool": stacked(layers),
    }
    left.check_none()
    return params
