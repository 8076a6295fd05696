"""What a training step costs, as ratios of things timed alternately in one process.

    python -m radialnet.benchmark train|router|input [--json=FILE] [--repeats=7]

`train`   the step against a plain dense transformer, over pool sizes, depths and views; attention; memory.
`router`  the router's share of the step, over its width.
`input`   the step on real data, read while it runs, against the step on one batch used again.

Every figure is the median over repeats of (time of one) / (time of the other), the two run one after the other in each
repeat. Machines are noisy: compare ratios, not milliseconds.
"""

import itertools
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import base
from radialnet.attention import attend_backward, attend_forward
from radialnet.cache import Packing, UnifiedCache
from radialnet.config import Config
from radialnet.metrics import figures, flops_per_token
from radialnet.model import init_params
from radialnet.optimizer import make_optimizer
from radialnet.train_step import TrainState, init_state, train_step

VOCAB = 512


def ratio(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median of (time of first) / (time of second), and the medians of both in milliseconds."""
    for run in (first, second):
        jax.block_until_ready(run())
    seconds = np.empty((repeats, 2))
    for repeat, (column, run) in itertools.product(range(repeats), enumerate((first, second))):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds[repeat, column] = time.perf_counter() - start
    first_ms, second_ms = np.median(seconds, axis=0) * 1e3
    return float(np.median(seconds[:, 0] / seconds[:, 1])), float(first_ms), float(second_ms)


# A plain dense transformer: what one would write without any of this package


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


def dense_logits(params: dict, token_BS: jax.Array, config: Config) -> jax.Array:
    """Logits [B, S, V] of rows that hold one document each."""
    model = config.model
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_size
    batch, seq = token_BS.shape
    angle_SK = jnp.arange(seq)[:, None] * model.rope_base ** (-jnp.arange(size // 2) / (size // 2))
    cos_S1K, sin_S1K = jnp.cos(angle_SK)[:, None], jnp.sin(angle_SK)[:, None]
    causal_SS = jnp.tril(jnp.ones((seq, seq), bool))

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def rope(x_BSHK):
        left, right = jnp.split(x_BSHK, 2, axis=-1)
        return jnp.concatenate([left * cos_S1K - right * sin_S1K, right * cos_S1K + left * sin_S1K], axis=-1)

    def layer(h_BSD, w):
        qkv_BSX = norm(h_BSD, w["attention_norm"]) @ w["qkv"]
        q, k, v = jnp.split(qkv_BSX, [heads * size, (heads + kv_heads) * size], axis=-1)
        q = rope(norm(q.reshape(batch, seq, heads, size), w["query_norm"]))
        k = rope(norm(k.reshape(batch, seq, kv_heads, size), w["key_norm"]))
        k, v = (jnp.repeat(x.reshape(batch, seq, kv_heads, size), heads // kv_heads, axis=2) for x in (k, v))
        scores = jnp.einsum("BSHK,BCHK->BHSC", q, k) * size**-0.5
        probs = jax.nn.softmax(jnp.where(causal_SS, scores, -1e30), axis=-1)
        mixed = jnp.einsum("BHSC,BCHK->BSHK", probs, v).reshape(batch, seq, -1)
        h_BSD += mixed @ w["attention_out"]
        gate, up = jnp.split(norm(h_BSD, w["mlp_norm"]) @ w["mlp_in"], 2, axis=-1)
        return h_BSD + (jax.nn.silu(gate) * up) @ w["mlp_out"]

    if model.remat == "step":
        layer = jax.checkpoint(layer)
    h_BSD = params["embedding"][token_BS]
    for w in params["layers"]:
        h_BSD = layer(h_BSD, w)
    return norm(h_BSD, params["final_norm"]) @ params["head"]


class DenseStep:
    """A compiled training step of the dense transformer. Call it to run it once."""

    def __init__(self, config: Config, batch: dict):
        optimizer = make_optimizer(config)
        params = dense_params(config)
        self.state, self.batch = (params, optimizer.init(params)), batch

        def step(state, batch):
            params, opt_state = state

            def loss(params):
                logits = dense_logits(params, batch["token"], config)
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"]).mean()

            grads = jax.grad(loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self.program = jax.jit(step, donate_argnums=0).lower(self.state, batch).compile()

    def __call__(self):
        self.state = self.program(self.state, self.batch)
        return self.state


# The radial step


def make_config(sizes: dict, **overrides) -> Config:
    """A radial network that routes by the token and does not learn, so that every repeat runs the same routes."""
    config = base.get_config()
    config.model.update(num_heads=4, num_kv_heads=4, init="distinct", pool_size=8, min_depth=sizes["max_depth"])
    config.model.update({name: sizes[name] for name in ("d_model", "d_ff", "max_depth")})
    config.train.update(batch_size=sizes["batch_size"], seq_len=sizes["seq_len"])
    config.cache.view = "latest"
    config.optimizer.learning_rate = 0.0
    config.router.update(
        hidden=sizes["d_model"] // 4,
        prior="none",
        exit_warmup_steps=0,
        depth_ramp_steps=0,
        exit_bias_init=0.0,
        exit_bias_rate=0.0,
        load_bias_rate=0.0,
        depth_target=float(sizes["max_depth"]),
    )
    for name, value in overrides.items():
        section, field = name.split("__")
        config[section][field] = value
    return Config.from_dict(config)


def make_batch(config: Config) -> dict[str, np.ndarray]:
    """Random tokens, one document a row."""
    shape = config.train.batch_size, config.train.seq_len
    rng = np.random.default_rng(0)
    token, target = rng.integers(0, VOCAB, (2, *shape)).astype(np.int32)
    position = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return {
        "token": token,
        "target": target,
        "document": np.zeros(shape, np.int32),
        "position": position,
        "is_target": np.ones(shape, bool),
    }


class RadialStep:
    """A compiled training step of a radial network. Call it to run it once."""

    def __init__(self, config: Config, batch: dict, depth: float | None = None):
        """
        Args:
            depth: mean executed depth to hold by the exit bias; the full depth by default.
        """
        self.config, self.batch = config, batch
        graph, params = init_params(config, VOCAB)
        # At first all layers are nearly as likely for all tokens. Larger weights make routes depend on the token.
        params["router"]["out"] *= 30.0
        optimizer = make_optimizer(config)
        self.state: TrainState = init_state(config, params, optimizer)
        self.bytes_V = jnp.ones(VOCAB)
        step = partial(train_step, config=config, graph=graph, optimizer=optimizer)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, batch, self.bytes_V)
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - start
        if depth is not None:
            self._hold(depth)
        self()
        self.figures = figures(self.sums)

    def __call__(self):
        self.state, self.sums, _ = self.program(self.state, self.batch, self.bytes_V)
        return self.state

    def _hold(self, depth: float) -> None:
        """Set the exit bias, by bisection, so that the mean executed depth is `depth`."""
        low, high = -100.0, 100.0
        for _ in range(20):
            bias = (low + high) / 2
            controllers = self.state.controllers.replace(exit_bias=jnp.float32(bias))
            self.state = self.state.replace(controllers=controllers)
            self()
            low, high = (bias, high) if figures(self.sums)["depth"] > depth else (low, bias)


def step_memory(program) -> int:
    """Bytes that a compiled step needs beside its batch: state and temporaries."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes


def benchmark_train(sizes: dict, repeats: int) -> tuple[dict, list]:
    found, rows = {}, []
    config = make_config(sizes)
    batch = make_batch(config)
    dense = DenseStep(config, batch)
    num_tokens = config.train.batch_size * config.train.seq_len

    def row(what: str, against: str, result: tuple[float, float, float], **more):
        value, ms, other_ms = result
        rows.append({"what": what, "against": against, "ratio": value, "ms": ms, "against_ms": other_ms, **more})
        print(f"{what} / {against}: {value:.3f}  ({ms:.0f} ms / {other_ms:.0f} ms)  {more or ''}", flush=True)
        return value

    def described(step: RadialStep) -> dict:
        kept = ("depth", "load_entropy", "padding")
        return {**{name: round(step.figures[name], 3) for name in kept}, "compile_s": round(step.compile_s, 1)}

    steps = {}
    for num_layers in (8, 16, 32, 64):
        steps[num_layers] = step = RadialStep(make_config(sizes, model__pool_size=num_layers), batch)
        found[f"step/dense@L={num_layers}"] = row(
            f"step, L={num_layers}", "dense step", ratio(step, dense, repeats), **described(step)
        )
        if num_layers not in (8, 64):
            del steps[num_layers]
    found["step L=64/L=8"] = row("step, L=64", "step, L=8", ratio(steps[64], steps[8], repeats))
    del steps[64]
    full = steps[8]

    for part in (4, 2):
        depth = sizes["max_depth"] / part
        shallow = RadialStep(make_config(sizes, model__min_depth=0), batch, depth)
        value = row(f"step, depth T/{part}", "step, depth T", ratio(shallow, full, repeats), **described(shallow))
        if part == 2:
            found["step depth=T÷2/depth=T"] = value
    for view in ("all", "same_step", "first", "same_layer"):
        step = RadialStep(make_config(sizes, cache__view=view), batch)
        row(f"step, view {view}", "step, view latest", ratio(step, full, repeats), **described(step))

    found["attention all half/full"] = row(
        "attention, half of the entries", "all of them", ratio(*_attention(config, (0.5, 1.0)), repeats)
    )
    found["router share"] = row("router", "step", ratio(_router(config, full, batch), full, repeats))
    found["memory/dense"] = step_memory(full.program) / step_memory(dense.program)
    rows.append({"what": "memory of a step", "against": "dense step", "ratio": found["memory/dense"]})
    remat = make_config(sizes, model__remat="step")
    rematerialised = step_memory(RadialStep(remat, batch).program) / step_memory(DenseStep(remat, batch).program)
    rows.append({"what": "memory of a step, remat", "against": "dense step, remat", "ratio": rematerialised})

    flops = 3 * num_tokens * flops_per_token(config, VOCAB, sizes["max_depth"], sizes["max_depth"])
    found["step/matmul limit"] = row("step, L=8", "a product of the same FLOPs", ratio(full, _product(flops), repeats))
    return found, rows


def _product(flops: float) -> Callable[[], jax.Array]:
    """One matrix product of as many FLOPs."""
    size = max(128, round((flops / 2) ** (1 / 3) / 128) * 128)
    left, right = jnp.ones((size, size)), jnp.ones((size, round(flops / 2 / size**2)))
    program = jax.jit(jnp.matmul)
    return lambda: program(left, right)


def _attention(config: Config, shares: tuple[float, ...]) -> list[Callable[[], object]]:
    """Attention of the last step and its gradient in view `all`, with a share of all tokens executing each step."""
    model, train = config.model, config.train
    shape, heads = (train.batch_size, train.seq_len), (model.num_heads, model.head_size)
    rng, runs = np.random.default_rng(0), []
    for share in shares:
        kv_heads = model.num_kv_heads
        cache = UnifiedCache.empty("all", model.max_depth, *shape, kv_heads, model.head_size, jnp.float32)
        for step in range(model.max_depth):
            executes_BS = jnp.asarray(rng.random(shape) < share)
            packing = Packing.of(executes_BS)
            k, v = (jnp.asarray(rng.normal(size=(*shape, kv_heads, model.head_size)), jnp.float32) for _ in "kv")
            cache = cache.append(k, v, jnp.zeros(shape, jnp.int32), packing, jnp.int32(step))
        visibility = cache.visibility(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32), packing)
        q, d_mixed = (jnp.asarray(rng.normal(size=(*shape, *heads)), jnp.float32) for _ in "qd")

        @jax.jit
        def run(q, d_mixed, cache, visibility):
            kv = cache.k_BCGK, cache.v_BCGK
            mixed, lse = attend_forward(q, *kv, visibility)
            return attend_backward(q, *kv, visibility, mixed, lse, d_mixed, *(jnp.zeros_like(x) for x in kv))

        runs.append(partial(run, q, d_mixed, cache, visibility))
    return runs


def _router(config: Config, step: RadialStep, batch: dict) -> Callable[[], object]:
    """The router alone, at all depth steps, with its gradient."""
    from flax import nnx

    from radialnet.router import Router, schedule

    graph, params = nnx.split(Router(config.model, config.router, nnx.Rngs(0)))
    shape = batch["token"].shape
    h_BSD = jax.random.normal(jax.random.key(0), (*shape, config.model.d_model))
    at = schedule(config.router, config.model.max_depth, jnp.int32(0))
    controllers = step.state.controllers

    @jax.jit
    def run(params, h_BSD, token_BS):
        def outputs(params, h_BSD, depth_step, decided=None):
            active_BS = jnp.ones(shape, bool)
            route = nnx.merge(graph, params)(h_BSD, token_BS, active_BS, depth_step, controllers, at, jax.random.key(0))
            return (route.log_p_layer_BS, route.log_survive_BS, route.p_layer_BSL.sum((0, 1))), route.layer_BS

        def one(total, depth_step):
            values, transpose, layer_BS = jax.vjp(
                lambda params, h: outputs(params, h, depth_step), params, h_BSD, has_aux=True
            )
            grads = transpose(jax.tree.map(jnp.ones_like, values))
            return jax.tree.map(jnp.add, total, grads), layer_BS

        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, (params, h_BSD)), jnp.arange(config.model.max_depth))

    return lambda: run(params, h_BSD, batch["token"])
