"""What a token costs: FLOPs, bytes of weights and of cache; and what devices can do in a second.

FLOPs are 2 per multiply-add of matrix products. The rest of what is computed is small beside them, and is left out.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from radialnet.config import Config


def flops_per_token(config: Config, vocab_size: int, executes_T: Sequence[float]) -> float:
    """FLOPs of a forward pass per token, 2 per multiply-add of matrix products, with attention (`flops_by_part`)."""
    return float(sum(flops_by_part(config, vocab_size, executes_T).values()))


def flops_by_part(config: Config, vocab_size: int, executes_T: Sequence[float]) -> dict[str, float]:
    """`flops_per_token` of the pool's `layers`, their `attention`, the `unshared` layers of prelude and coda and
    `unshared_attention`, the `router` and the `head`.

    Attention is counted over the entries that a causal query sees on average: half of those of its row that are filled.
    In the views `all` and `same_layer` they are those of all steps so far, unless every step has a layer of its own.

    Args:
        executes_T: share of tokens that execute each depth step.
    """
    model, max_depth, weights = config.model, len(executes_T), weights_by_part(config, vocab_size)
    # Of one query, over a step whose entries are all there.
    attention = 4 * model.num_heads * model.head_size * (config.train.seq_len + 1) / 2
    layer = 2 * weights["layer"]
    executes_T = np.asarray(executes_T)
    if (view := config.view_over(max_depth)) == "same_step":
        seen_T = executes_T
    elif view == "first":
        seen_T = np.full(max_depth, executes_T[0])
    elif view == "latest":
        # One entry of each token that executed any step so far: at least of as many as executed one of them.
        seen_T = np.maximum.accumulate(executes_T)
    else:
        seen_T = np.cumsum(executes_T)
    num_unshared = model.prelude_layers + model.coda_layers
    return {
        "layers": float(executes_T.sum() * layer),
        "attention": float((executes_T * attention * seen_T).sum()),
        "unshared": num_unshared * layer,
        "unshared_attention": num_unshared * attention,
        "router": _router_flops(config, executes_T),
        "head": 2 * weights["head"],
    }


def _router_flops(config: Config, executes_T: np.ndarray) -> float:
    """Of all decisions of a token."""
    router = config.router
    a_look = sum(_look(config, outputs) for outputs in _outputs(config))
    if router.form == "skip":
        # Whoever skips a layer was asked first.
        return len(executes_T) * a_look
    if router.form == "mod":
        # At the steps at which tokens compete.
        return len(executes_T) // router.capacity_every * a_look
    if router.form == "recursion":
        return a_look
    # A token that leaves before the last step was routed once more than it executed.
    is_routed_T = np.concatenate([[1.0], executes_T[:-1]])
    if router.gives_layers:
        # It is looked at only where it may leave.
        model = config.model
        return is_routed_T[model.min_depth :].sum() * a_look if model.min_depth < model.max_depth else 0.0
    return is_routed_T[:: router.every].sum() * a_look


def _outputs(config: Config) -> tuple[int, ...]:
    """Of each network of the router, as many as it has."""
    model, router = config.model, config.router
    if not router.is_trained:
        return ()
    if router.form == "mod":
        # A score and its prediction.
        return (1, 1)
    if router.form == "skip":
        return (1,)
    if router.form == "recursion":
        return (model.max_depth // model.pool_size,)
    if router.gives_layers:
        return () if router.has_exit_table else (1,)
    has_exit_network = router.predicts_benefit and not router.has_exit_table
    return (model.pool_size + 1, 1) if has_exit_network else (model.pool_size + 1,)


def _look(config: Config, num_outputs: int) -> int:
    """FLOPs of one network at one state."""
    d_model, hidden = config.model.d_model, config.router.hidden_size(config.model)
    return 2 * (hidden * (d_model + num_outputs) if hidden else d_model * num_outputs)


def weights_by_part(config: Config, vocab_size: int) -> dict[str, int]:
    """Numbers in the matrices of one `layer` (of the pool, prelude or coda), the `router`, the `head` and the
    `embedding`."""
    model, router = config.model, config.router
    q_width, kv_width = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    attention = model.d_model * (q_width + 2 * kv_width) + q_width * model.d_model
    mlp = (3 if model.mlp == "swiglu" else 2) * model.d_model * model.d_ff
    steps = model.max_depth * model.d_model if router.sees_step and router.looks_at_states else 0
    table = model.max_depth * vocab_size if router.has_exit_table else 0
    return {
        "layer": attention + mlp,
        "router": steps + table + sum(_look(config, outputs) // 2 for outputs in _outputs(config)),
        "head": model.d_model * vocab_size,
        "embedding": model.d_model * vocab_size,
    }


def entry_bytes(config: Config) -> int:
    """Of an entry of the cache: the key and the value that a token writes when it executes a layer."""
    model = config.model
    return 2 * model.num_kv_heads * model.head_size * jnp.dtype(model.dtype).itemsize


# Peak dense bf16 FLOP/s of one device, as its maker states it; the start of `device_kind` as JAX reports it.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


# Bytes/s of TPUs as their maker states it: of the memory; of all links of a chip to its neighbours, in both directions.
MEMORY_BYTES_PER_S = {
    "TPU v5 lite": 819e9,
    "TPU v5e": 819e9,
    "TPU v5": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU v6e": 1640e9,
}
WIRE_BYTES_PER_S = {
    "TPU v5 lite": 200e9,
    "TPU v5e": 200e9,
    "TPU v5": 600e9,
    "TPU v6 lite": 448e9,
    "TPU v6e": 448e9,
}


def rate(table: dict[str, float], device: jax.Device) -> float | None:
    """What one of these tables says of a device, None where it is unknown (every CPU)."""
    return next((value for kind, value in table.items() if device.device_kind.startswith(kind)), None)
