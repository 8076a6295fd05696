"""Models in the format of OPT (arXiv 2205.01068) as `sequential` radial networks: LayerNorm, a ReLU MLP, biases, and
learned positions, of which the first two rows are of no token.
"""

from collections.abc import Mapping

import numpy as np

from radialnet.config import Config
from radialnet.pretrained import Left, Tensors, check_representable, is_true, needed, sequential_config, stacked
from radialnet.sections import ModelConfig

_OFFSET = 2  # Rows of the table of positions before that of the first token.


def config_of_opt(fields: dict, where: str) -> Config:
    """The config of a `sequential` run with the sizes of an OPT.

    Args:
        fields: of its config.json.
        where: what an error message begins with.

    Raises:
        ConfigError: a field is missing, or says what a radial network has no form of.
    """
    d_model, max_positions = (needed(fields, name, where) for name in ("hidden_size", "max_position_embeddings"))
    check_representable(
        where,
        ("model_type", fields.get("model_type"), "opt"),
        ("activation_function", fields.get("activation_function", "relu"), "relu"),
        # OPT-350m has its norms behind the branches, and an embedding of another width.
        ("do_layer_norm_before", fields.get("do_layer_norm_before", True), True),
        ("word_embed_proj_dim", fields.get("word_embed_proj_dim") or d_model, d_model),
        ("enable_bias", fields.get("enable_bias", True), True),
        ("layer_norm_elementwise_affine", fields.get("layer_norm_elementwise_affine", True), True),
        ("_remove_final_layer_norm", fields.get("_remove_final_layer_norm", False), False),
    )
    heads = needed(fields, "num_attention_heads", where)
    return sequential_config(
        where,
        needed(fields, "num_hidden_layers", where),
        max_positions,
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=heads,
        d_ff=needed(fields, "ffn_dim", where),
        norm="layer",
        norm_eps=1e-5,
        mlp="relu",
        biases=True,
        positions="learned",
        max_positions=max_positions,
    )


def from_opt(tensors: Mapping[str, np.ndarray], fields: dict, model: ModelConfig, num_tokens: int, where: str) -> dict:
    """The parameters of a `sequential` run from the tensors of an OPT, fp32: `from_llama`'s arguments and errors."""
    # Some files name the tensors of the model without its head.
    left = Left({name.removeprefix("model."): x for name, x in tensors.items()}, where)
    d_model, d_ff, heads, vocab_size = model.d_model, model.d_ff, model.num_heads, fields["vocab_size"]

    def layer(prefix: str) -> Tensors:
        def linear(name: str, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
            name = f"{prefix}.{name}"
            return left.take(f"{name}.weight", columns, rows).T, left.take(f"{name}.bias", columns)

        qkv = [linear(f"self_attn.{name}_proj", d_model, d_model) for name in "qkv"]
        (into, into_bias), (out, out_bias) = linear("fc1", d_model, d_ff), linear("fc2", d_ff, d_model)
        attention_out, attention_out_bias = linear("self_attn.out_proj", d_model, d_model)
        return {
            "attention_norm": left.take(f"{prefix}.self_attn_layer_norm.weight", d_model),
            "attention_norm_bias": left.take(f"{prefix}.self_attn_layer_norm.bias", d_model),
            "qkv": np.stack([weight.reshape(d_model, heads, -1) for weight, _ in qkv], axis=2),
            "qkv_bias": np.stack([bias.reshape(heads, -1) for _, bias in qkv], axis=1),
            "attention_out": attention_out,
            "attention_out_bias": attention_out_bias,
            "mlp_norm": left.take(f"{prefix}.final_layer_norm.weight", d_model),
            "mlp_norm_bias": left.take(f"{prefix}.final_layer_norm.bias", d_model),
            "mlp_in": into[:, None],
            "mlp_in_bias": into_bias[None],
            "mlp_out": out,
            "mlp_out_bias": out_bias,
        }

    layers = [layer(f"decoder.layers.{index}") for index in range(model.pool_size)]
    embedding = left.take("decoder.embed_tokens.weight", vocab_size, d_model)
    head = left.take_head(embedding, is_true(fields, "tie_word_embeddings", True, where))
    params = {
        "embedding": embedding[:num_tokens] / np.float32(d_model**0.5),
        "positions": left.take("decoder.embed_positions.weight", _OFFSET + model.max_positions, d_model)[_OFFSET:],
        "final_norm": left.take("decoder.final_layer_norm.weight", d_model),
        "final_norm_bias": left.take("decoder.final_layer_norm.bias", d_model),
        "head": head[:num_tokens].T,
        "pool": stacked(layers),
    }
    left.check_none()
    return params
