"""A plain dense transformer, as one would write it without this package: what the benchmark compares with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from radialnet.config import Config
from radialnet.optimizer import clip, make_optimizer

VOCAB = 512
HEAD_SIZE = 64


def program_mb(program: jax.stages.Compiled) -> float:
    """What a compiled step needs: its state, its batch and its temporaries."""
    memory = program.memory_analysis()
    return (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e6


def dense_params(config: Config, seed: int = 0) -> dict:
    model, rng = config.model, np.random.default_rng(seed)
    q_width, kv_width = model.num_heads * model.head_size, model.num_kv_heads * model.head_size

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, jnp.float32)

    def layer():
        return {
            "attention_norm": jnp.ones(model.d_model),
            "qkv": normal(model.d_model, q_width + 2 * kv_width),
            "query_norm": jnp.ones(model.head_size),
            "key_norm": jnp.ones(model.head_size),
            "attention_out": normal(q_width, model.d_model),
            "mlp_norm": jnp.ones(model.d_model),
            "mlp_in": normal(model.d_model, 2 * model.d_ff),
            "mlp_out": normal(model.d_ff, model.d_model),
        }

    return {
        "embedding": normal(VOCAB, model.d_model),
        "layers": [layer() for _ in range(model.max_depth)],
        "final_norm": jnp.ones(model.d_model),
        "head": normal(model.d_model, VOCAB),
    }


def num_heads(d_model: int) -> int:
    """Of `HEAD_SIZE` channels where that makes four or more of them."""
    return d_model // HEAD_SIZE if d_model % HEAD_SIZE == 0 and d_model >= 4 * HEAD_SIZE else 4


def fused_attention(num_heads: int, head_size: int, seq_len: int, dtype: str) -> str | None:
    """The `implementation` of `jax.nn.dot_product_attention` that is a kernel of NVIDIA's library; None where there is
    none, or not for these heads and this precision."""
    x_BSHK = jax.ShapeDtypeStruct((1, seq_len, num_heads, head_size), dtype)
    fused = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        jax.jit(fused).lower(x_BSHK, x_BSHK, x_BSHK).compile()
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    return "cudnn"


def dense_logits(params: dict, token_BS: jax.Array, config: Config, implementation: str | None = None) -> jax.Array:
    """Logits [B, S, V] of rows that hold one document each.

    Args:
        implementation: of `jax.nn.dot_product_attention`; by default plain products.
    """
    model = config.model
    dtype = jnp.dtype(model.dtype)
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_size
    batch, seq = token_BS.shape
    angle_SK = jnp.arange(seq)[:, None] * model.rope_base ** (-jnp.arange(size // 2) / (size // 2))
    cos_S1K, sin_S1K = jnp.cos(angle_SK)[:, None], jnp.sin(angle_SK)[:, None]

    def norm(x, scale):
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale).astype(dtype)

    def rope(x_BSHK):
        left, right = jnp.split(x_BSHK, 2, axis=-1)
        turned = [left * cos_S1K - right * sin_S1K, right * cos_S1K + left * sin_S1K]
        return jnp.concatenate(turned, axis=-1).astype(dtype)

    def layer(h_BSD, w):
        w = {name: x.astype(dtype) if x.ndim == 2 else x for name, x in w.items()}
        qkv_BSX = norm(h_BSD, w["attention_norm"]) @ w["qkv"]
        q, k, v = jnp.split(qkv_BSX, [heads * size, (heads + kv_heads) * size], axis=-1)
        q = rope(norm(q.reshape(batch, seq, heads, size), w["query_norm"]))
        k = rope(norm(k.reshape(batch, seq, kv_heads, size), w["key_norm"]))
        v = v.reshape(batch, seq, kv_heads, size)
        mixed_BSHK = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        h_BSD += mixed_BSHK.reshape(batch, seq, -1) @ w["attention_out"]
        gate, up = jnp.split(norm(h_BSD, w["mlp_norm"]) @ w["mlp_in"], 2, axis=-1)
        return h_BSD + (jax.nn.silu(gate) * up) @ w["mlp_out"]

    if model.remat == "step":
        layer = jax.checkpoint(layer)
    h_BSD = params["embedding"][token_BS]
    for w in params["layers"]:
        h_BSD = layer(h_BSD, w)
    return jnp.matmul(
        norm(h_BSD, params["final_norm"]), params["head"].astype(dtype), preferred_element_type=jnp.float32
    )


class DenseStep:
    """A compiled training step of the dense transformer. Call it to run it once."""

    def __init__(self, config: Config, batch: dict, implementation: str | None = None):
        optimizer = make_optimizer(config)
        params = dense_params(config)
        self.state, self.batch = (params, optimizer.init(params)), batch

        def step(state, batch):
            params, opt_state = state

            def loss(params):
                logits = dense_logits(params, batch["token"], config, implementation)
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"]).mean()

            grads = jax.grad(loss)(params)
            grads = clip(config, grads, optax.tree.norm(grads))
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self.program = jax.jit(step, donate_argnums=0).lower(self.state, batch).compile()

    def __call__(self):
        self.state = self.program(self.state, self.batch)
        return self.state

    def mb(self) -> float:
        return program_mb(self.program)
