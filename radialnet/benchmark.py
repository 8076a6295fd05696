"""What a training step costs, as ratios of things timed alternately in one process.

    python -m radialnet.benchmark train|kernels|decode|cache|router|input [--json=FILE] [--repeats=N] [--dtype=D]

`train`   the step against a plain dense transformer, over pool sizes, depths and views; attention; memory.
`kernels` what the step is made of, alone: products of rows with the matrices of their layers against one product of as
          many FLOPs, and attention against that of `jax.nn`.
`decode`  tokens per second over depths, against lockstep, and against `transformers` where it is installed; with --runs
          of trained runs, each against a dense one, and the layers that their tokens leave out and the time it saves.
`cache`   bytes and time of a token over views and sizes; with --runs of trained runs, with their held-out loss, how far
          the logits of decoding are from those of the parallel pass, and what it costs to give up the oldest tokens.
`router`  a router against the layers that it saves, over its width, at the sizes of OPT; S is --seq_len.
`input`   the step on real data, read while it runs, against the step on one batch used again.

Every figure is the median over repeats of (time of one) / (time of the other), the two run one after the other in each
repeat. Machines are noisy: compare ratios, not milliseconds.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from configs import base, radial_nano
from radialnet import attention, cli
from radialnet.baseline import VOCAB, DenseStep, fused_attention, num_heads, program_mb
from radialnet.cache import Packing, UnifiedCache
from radialnet.cache_benchmark import benchmark_cache, plot_windows
from radialnet.checks import expanded
from radialnet.config import Config
from radialnet.controllers import Controllers, schedule
from radialnet.cost import flops_per_token
from radialnet.data import prefetch, prepare, train_batches
from radialnet.decode_benchmark import benchmark_decode
from radialnet.depth import DepthLoop, Inputs, decide, differentiable
from radialnet.files import write_whole
from radialnet.kernel_benchmark import benchmark_kernels
from radialnet.metrics import figures
from radialnet.model import init_params
from radialnet.optimizer import make_optimizer
from radialnet.pool import Positions
from radialnet.router import Plan, Router, recent_tokens, row_keys
from radialnet.router_benchmark import benchmark_router, plot_routers
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.timing import Timings
from radialnet.train_step import TrainState, init_state, train_step

# Of `decode` and `cache`; the others' are the flags' own: the width of configs/radial_nano.py, whose programs take
# minutes to compile and to run.
DECODE_SIZES = {"d_model": 128, "d_ff": 384, "seq_len": 140, "repeats": 3}
# Steps that are timed together for `input`: several times as many as batches are read ahead.
INPUT_STEPS = 32


# The radial step


def make_config(sizes: dict, **overrides) -> Config:
    """A radial network that routes by the token and does not learn, so that every repeat runs the same routes."""
    config = base.get_config()
    heads = num_heads(sizes["d_model"])
    config.model.update(num_heads=heads, num_kv_heads=heads, init="distinct", pool_size=8, min_depth=sizes["max_depth"])
    config.model.update({name: sizes[name] for name in ("d_model", "d_ff", "max_depth", "dtype")})
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
    return Config.from_dict(config, **overrides)


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

    def __init__(self, config: Config, batch: dict, depth: float | None = None, vocab_size: int = VOCAB):
        """
        Args:
            depth: mean executed depth to hold by the exit bias; None leaves the bias as it is.
        """
        self.batch = batch
        graph, params = init_params(config, vocab_size)
        if "out" in params["router"]:
            # At first all layers are nearly as likely for all tokens. Larger weights make routes depend on the token.
            params["router"]["out"] *= 30.0
        optimizer = make_optimizer(config)
        self.state: TrainState = init_state(config, params, optimizer)
        self.bytes_V = jnp.ones(vocab_size)
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

    def mb(self) -> float:
        return program_mb(self.program)

    def described(self) -> dict:
        found = {name: round(self.figures[name], 3) for name in ("depth", "load_entropy", "padding")}
        return {**found, "compile_s": round(self.compile_s, 1)}

    def _hold(self, depth: float) -> None:
        """Set the exit bias, by bisection, so that the mean executed depth is `depth`."""
        low, high = -100.0, 100.0
        for _ in range(20):
            bias = (low + high) / 2
            controllers = self.state.controllers.replace(exit_bias=jnp.float32(bias))
            self.state = self.state.replace(controllers=controllers)
            self()
            low, high = (bias, high) if figures(self.sums)["depth"] > depth else (low, bias)


def benchmark_train(timings: Timings, sizes: dict) -> None:
    max_depth = sizes["max_depth"]
    config = make_config(sizes)
    batch = make_batch(config)
    fused = fused_attention(config.model.num_heads, config.model.head_size, sizes["seq_len"], sizes["dtype"])
    dense, full = DenseStep(config, batch, fused), RadialStep(config, batch)
    if fused:
        timings.add("dense step, plain attention", "dense step", DenseStep(config, batch), dense, name=None)
    timings.add("step, L=8", "dense step", full, dense, name="step/dense@L=8", **full.described())
    for num_layers in (16, 32, 64):
        step = RadialStep(make_config(sizes, model__pool_size=num_layers), batch)
        name = f"step/dense@L={num_layers}"
        timings.add(f"step, L={num_layers}", "dense step", step, dense, name=name, **step.described())
    timings.add("step, L=64", "step, L=8", step, full, name="step L=64/L=8")
    del step

    for part, name in ((4, None), (2, "step depth=T÷2/depth=T")):
        shallow = RadialStep(make_config(sizes, model__min_depth=0), batch, depth=max_depth / part)
        timings.add(f"step, mean depth T/{part}", "step, depth T", shallow, full, name=name, **shallow.described())
    for view in ("all", "same_step", "first", "same_layer"):
        step = RadialStep(make_config(sizes, cache__view=view), batch)
        timings.add(f"step, view {view}", "step, view latest", step, full, name=None, **step.described())

    half, whole = _attention(config, 0.5), _attention(config, 1.0)
    timings.add("attention, view all, half executes", "all of it", half, whole, name="attention all half/full")
    timings.add("router, all steps", "step, L=8", _router(config), full, name="router share")
    flops = 3 * batch["token"].size * flops_per_token(config, VOCAB, [1] * max_depth)
    timings.add("step, L=8", "product of its FLOPs", full, _product(flops, sizes["dtype"]), name="step/matmul limit")
    timings.add("dense step", "product of its FLOPs", dense, _product(flops, sizes["dtype"]), name=None)
    timings.add_given("memory, L=8", "dense step", full.mb(), dense.mb(), "mb", name="memory/dense")
    again = make_config(sizes, model__remat="step")
    radial_mb, dense_mb = RadialStep(again, batch).mb(), DenseStep(again, batch, fused).mb()
    timings.add_given("memory, L=8, remat", "dense step, remat", radial_mb, dense_mb, "mb")


def _product(flops: float, dtype: str) -> Callable[[], jax.Array]:
    """One matrix product of as many FLOPs."""
    size = max(128, round((flops / 2) ** (1 / 3) / 128) * 128)
    left, right = jnp.ones((size, size), dtype), jnp.ones((size, round(flops / 2 / size**2)), dtype)
    program = jax.jit(jnp.matmul)
    return lambda: program(left, right)


def _attention(config: Config, share: float) -> Callable[[], object]:
    """Attention of the last step and its gradient in view `all`, with a share of all tokens executing each step."""
    model, rng = config.model, np.random.default_rng(0)
    shape, kv_heads = (config.train.batch_size, config.train.seq_len), model.num_kv_heads
    cache = UnifiedCache.empty("all", model.max_depth, *shape, kv_heads, model.head_size, jnp.dtype(model.dtype))

    def normal(heads: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(*shape, heads, model.head_size)), model.dtype)

    layer_BS = jnp.zeros(shape, jnp.int32)
    for step in range(model.max_depth):
        packing = Packing.of(jnp.asarray(rng.random(shape) < share))
        cache = cache.append(normal(kv_heads), normal(kv_heads), layer_BS, packing, jnp.int32(step))
    visibility = cache.visibility(jnp.zeros(shape, jnp.int32), layer_BS, packing)
    backend = attention.default_backend(jax.default_backend())

    @jax.jit
    def run(q_BSHK, d_mixed_BSHK, k_BCGK, v_BCGK, visibility):
        given = q_BSHK, k_BCGK, v_BCGK, visibility
        mixed_BSHK, lse_BSH = attention.attend_forward(*given, backend)
        zeros = (jnp.zeros(x.shape, jnp.float32) for x in (k_BCGK, v_BCGK))
        return attention.attend_backward(*given, mixed_BSHK, lse_BSH, d_mixed_BSHK, *zeros, backend)

    arrays = normal(model.num_heads), normal(model.num_heads), cache.k_BCGK, cache.v_BCGK
    return lambda: run(*arrays, visibility)


def _router(config: Config) -> Callable[[], object]:
    """The router alone, as a training step runs it: forward at all depth steps, then again with the gradient."""
    graph, params = nnx.split(Router(config.model, config.router, nnx.Rngs(0)))
    shape = config.train.batch_size, config.train.seq_len
    loop = DepthLoop(
        graph,
        config.cache.view,
        config.model.max_depth,
        config.router.estimator,
        VOCAB,
        keeps_products=True,
        keeps_attended=True,
        has_survival_gate=True,
    )
    token_BS = jnp.zeros(shape, jnp.int32)
    inputs = Inputs(
        recent_BSW=recent_tokens(token_BS, token_BS, config.router.hash_span),
        positions=Positions.of(token_BS, token_BS, config.model),
        controllers=Controllers.init(config.router, config.model.pool_size),
        at=schedule(config.router, config.model.max_depth, jnp.int32(0)),
        rng_B=row_keys(jax.random.key(0), 0, shape[0]),
    )
    h_BSD = jax.random.normal(jax.random.key(0), (*shape, config.model.d_model))
    active_BS = jnp.ones(shape, bool)

    @jax.jit
    def run(params, h_BSD):
        def outputs(params, h_BSD, before_BS, depth_step, decided=None):
            router = nnx.merge(graph, params)
            gate_BS, survival_BS, sums, route = decide(
                loop, router, h_BSD, before_BS, active_BS, depth_step, inputs, Plan(), decided
            )
            return (gate_BS, survival_BS, differentiable(sums)), (route, sums)

        def forward(before_BS, depth_step):
            (_, survival_BS, _), (route, sums) = outputs(params, h_BSD, before_BS, depth_step)
            return survival_BS, (before_BS, route.decided, sums)

        def backward(total, of_step):
            depth_step, (before_BS, decided, sums) = of_step
            again = partial(outputs, depth_step=depth_step, decided=decided)
            values, transpose, _ = jax.vjp(again, params, h_BSD, before_BS, has_aux=True)
            return jax.tree.map(jnp.add, total, transpose(jax.tree.map(jnp.ones_like, values))), sums

        depth_steps = jnp.arange(config.model.max_depth)
        zeros_BS = jnp.zeros(shape)
        _, steps = jax.lax.scan(forward, zeros_BS, depth_steps)
        zeros = jax.tree.map(jnp.zeros_like, (params, h_BSD, zeros_BS))
        return jax.lax.scan(backward, zeros, (depth_steps, steps), reverse=True)

    return lambda: run(params, h_BSD)


def benchmark_input(timings: Timings, sizes: dict) -> None:
    """Steps of `configs/radial_nano.py`, on batches that are read while they run."""
    config = Config.from_dict(radial_nano.get_config())
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare(config, RunFolder(Path(folder))).train
    batches = train_batches(rows, config.train.batch_size, config.train.seed)
    one_batch = next(prefetch(batches, 0))
    step = RadialStep(config, one_batch, vocab_size=config.data.vocab_size)
    start = 0

    def on_real_data():
        # Read ahead from the first step on: what was read in another side's time would hide a slow reader.
        nonlocal start
        ahead = prefetch(batches, start)
        start += INPUT_STEPS
        for _ in range(INPUT_STEPS):
            step.batch = next(ahead)
            step()
        return step.state

    def on_one_batch():
        step.batch = one_batch
        for _ in range(INPUT_STEPS):
            step()
        return step.state

    timings.add("steps, real data", "steps, one batch", on_real_data, on_one_batch, name="step real data/one batch")


def main() -> None:
    runs = expanded(_RUNS.value) if _RUNS.value else None
    commands = {
        "train": benchmark_train,
        "kernels": benchmark_kernels,
        "decode": partial(benchmark_decode, runs=runs),
        "cache": partial(benchmark_cache, runs=runs),
        "router": benchmark_router,
        "input": benchmark_input,
    }
    sizes = {name: flag.value for name, flag in _SIZES.items()}
    if _COMMAND in ("decode", "cache"):
        sizes |= {name: value for name, value in DECODE_SIZES.items() if not _SIZES[name].present}
    for name, value in sizes.items():
        least = 0 if (_COMMAND, name) == ("router", "repeats") else 1
        if value < least:
            raise ConfigError(f"--{name}={value}: at least {least} is needed")
    sizes["dtype"] = _DTYPE.value
    timings = Timings(sizes.pop("repeats"))
    commands[_COMMAND](timings, sizes)
    device = jax.devices()[0]
    machine = {
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    timings.show(f"benchmark {_COMMAND}: {sizes if _COMMAND != 'input' else 'configs/radial_nano.py'} on {machine}")
    result = {"figures": timings.figures, "rows": timings.rows, "machine": machine, "sizes": sizes}
    if _JSON.value:
        write_whole(expanded(_JSON.value), json.dumps(result, indent=1) + "\n")
        picture = expanded(_JSON.value).with_suffix(".png")
        if _COMMAND == "router":
            plot_routers(timings.rows, picture)
        if _COMMAND == "cache" and runs:
            plot_windows(timings.rows, picture)
    print(json.dumps(result["figures"]))


if __name__ == "__main__":
    _COMMAND = cli.command("train", "kernels", "decode", "cache", "router", "input")
    _JSON = flags.DEFINE_string("json", None, "File for the figures; of `router` and `cache --runs` a plot beside it.")
    _DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the products, but for trained runs.")
    _RUNS = flags.DEFINE_string("runs", "", "Of `cache` and `decode`: a folder with run folders in it.")
    _SIZES = {
        name: flags.DEFINE_integer(
            name, value, f"{meaning}; {DECODE_SIZES[name]} for decode and cache." if name in DECODE_SIZES else meaning
        )
        for name, value, meaning in (
            ("d_model", 256, "D"),
            ("d_ff", 1024, "F"),
            ("seq_len", 256, "S"),
            ("batch_size", 16, "B, rows"),
            ("max_depth", 6, "T"),
            ("repeats", 9, "Times that each pair is timed; of `router` 0 = not at all"),
        )
    }
    cli.run(main)
