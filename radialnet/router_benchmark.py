"""What routing costs against the layers that it saves: `benchmark router`.

Of one depth step, the router and a layer, at the sizes of OPT (arXiv 2205.01068), whose layers make up the pool, for
routers of several widths; in training, of a row of tokens, and in decoding, of a single token that sees nothing but
itself (what a layer reads of a cache is left out, so that it costs rather more than here). By FLOPs, by bytes, by
the time of this machine as far as a layer fits into it (unless --repeats=0), and by that of a TPU v5e at best, compiled
ahead of time: FLOPs over its peak, or bytes over what its memory gives, whichever takes longer.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from configs import base
from radialnet.aot import devices_of
from radialnet.comparisons import plot_lines
from radialnet.config import Config
from radialnet.controllers import Controllers, schedule
from radialnet.cost import MEMORY_BYTES_PER_S, PEAK_FLOPS, flops_by_part, rate, weights_by_part
from radialnet.pool import LayerPool, Positions
from radialnet.program import work_of
from radialnet.router import Router, StepInputs, recent_tokens, row_keys
from radialnet.sections import ConfigError
from radialnet.timing import Timings

# D, H and the number of layers.
OPT = {
    "125M": (768, 12, 12),
    "350M": (1024, 16, 24),
    "1.3B": (2048, 32, 24),
    "2.7B": (2560, 32, 32),
    "6.7B": (4096, 32, 32),
    "13B": (5120, 40, 40),
    "30B": (7168, 56, 48),
    "66B": (9216, 72, 64),
}
# D over the width of the hidden layer; without one the router is linear.
NETWORKS = {"linear": None, "D/8": 8, "D/4": 4, "D/2": 2, "D": 1}
TPU = "v5e:2x2"
# Of a row; that of a device that is compiled for is told by its name.
MEASURES = ("FLOPs", "bytes", "this machine", "device")
# Passes of a TPU's matrix unit for one product: of bfloat16, and of float32 at the highest precision.
LAYER_PASSES, ROUTER_PASSES = 1, 6
# Of a single layer the reference is a plain product; attention whose FLOPs XLA counts.
ON_TPU = {
    "model__dtype": "bfloat16",
    "model__grouped_backend": "masked_dense",
    "model__attention_backend": "tiles",
}
# Rows that a TPU trains on, of as many tokens as this machine's single one: with fewer, memory bounds all of it.
TPU_ROWS = 16


def opt_config(d_model: int, num_heads: int, num_layers: int, divisor: int | None = 1, **overrides: object) -> Config:
    """A radial network whose pool is the layers of an OPT, of one depth step.

    Args:
        divisor: D over the width of the router's hidden layer; None for a linear router.
    """
    config = base.get_config()
    config.model.update(pool_size=num_layers, max_depth=1, min_depth=0, init="distinct", d_model=d_model)
    config.model.update(num_heads=num_heads, num_kv_heads=num_heads, d_ff=4 * d_model, qk_norm=False)
    config.model.update(norm="layer", mlp="relu", biases=True)
    config.router.update(prior="none", depth_target=1.0)
    config.router.network = "mlp" if divisor else "linear"
    config.router.hidden = max(1, d_model // divisor) if divisor else 0
    return Config.from_dict(config, **overrides)


@dataclasses.dataclass(frozen=True)
class Part:
    """The router or a layer, of one depth step.

    Attributes:
        value: of its parameters and the residual stream [B, S, D], what a step goes on with.
        init: its parameters.
    """

    value: Callable
    init: Callable[[], dict]

    def program(self, trains: bool, passes_forward: int) -> Callable:
        """A function of the parameters and the residual stream.

        Args:
            trains: with the gradient of both.
            passes_forward: how often a training step computes the value: the router's again in its backward pass.
        """
        if not trains:
            return self.value

        def run(params, h_BSD):
            first, given = None, (params, h_BSD)
            if passes_forward == 2:
                first = self.value(*given)
                # Or the compiler would find that both are the same.
                given = jax.lax.optimization_barrier(given)
            value, transpose = jax.vjp(self.value, *given)
            # What is not asked for, the compiler leaves out.
            return first, value, transpose(jax.tree.map(jnp.ones_like, value))

        return run


def router_part(config: Config, shape: tuple[int, int]) -> Part:
    graph = nnx.graphdef(nnx.eval_shape(lambda: Router(config.model, config.router, nnx.Rngs(0))))

    def value(params, h_BSD):
        router, token_BS = nnx.merge(graph, params), jnp.zeros(shape, jnp.int32)
        keys = row_keys(jax.random.key(0), 0, shape[0])
        recent_BSW = recent_tokens(token_BS, token_BS, config.router.hash_span)
        step = StepInputs(recent_BSW, token_BS > 0, token_BS == 0, jnp.int32(0), keys, router.no_plan(shape))
        controllers = Controllers.init(config.router, config.model.pool_size)
        route = router(h_BSD, step, controllers, schedule(config.router, 1, jnp.int32(0)))
        # The choice is a part of what is timed, and of no gradient.
        chosen_BS = jax.lax.stop_gradient(route.layer_BS + route.executes_BS).astype(jnp.float32)
        return route.log_p_layer_BS + route.log_survive_BS + chosen_BS

    return Part(value, lambda: nnx.state(Router(config.model, config.router, nnx.Rngs(0))))


def layer_part(config: Config, shape: tuple[int, int]) -> Part:
    def make() -> LayerPool:
        return LayerPool(config.model, 1, 0.1, nnx.Rngs(0), is_in_order=True)

    def init() -> dict:
        # Matrices in the precision that they are multiplied in, as they come to a training step and to decoding.
        dtype = jnp.dtype(config.model.dtype)
        return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 2 else x, nnx.state(make()))

    graph = nnx.graphdef(nnx.eval_shape(make))

    def value(params, h_BSD):
        pool, zeros_BS = nnx.merge(graph, params), jnp.zeros(shape, jnp.int32)
        position_BS = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        positions = Positions.of(zeros_BS, position_BS, config.model)
        return pool(h_BSD, zeros_BS, pool.empty_cache("all", 1, *shape), positions, jnp.int32(0))[0]

    return Part(value, init)


def timed(part: Part, shape: tuple[int, int], d_model: int, trains: bool, passes_forward: int) -> Callable:
    """The part on this machine; call it to run it once."""
    run, params = jax.jit(part.program(trains, passes_forward)), part.init()
    h_BSD = jax.random.normal(jax.random.key(0), (*shape, d_model))
    return lambda: run(params, h_BSD)


def work_of_part(
    part: Part, shape: tuple[int, int], d_model: int, trains: bool, passes_forward: int, device: jax.Device
) -> tuple[float, float]:
    """FLOPs of the part, and the bytes that it can't do without, as compiled for a device that need not be there."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    given = jax.eval_shape(part.init), jax.ShapeDtypeStruct((*shape, d_model), jnp.float32)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), given)
    program = jax.jit(part.program(trains, passes_forward)).lower(*given).compile()
    # Each argument read once and each result written once. What XLA counts as accessed is no bound: of a layer of 2 GB
    # in training 492 GB, for operations count whatever they read, from wherever.
    memory = program.memory_analysis()
    return work_of(program.as_text()).flops, memory.argument_size_in_bytes + memory.output_size_in_bytes


def seconds_at_best(work: tuple[float, float], passes: int, device: jax.Device) -> float:
    """The time that the work (`work_of_part`) can't fall short of.

    Args:
        passes: of the matrix unit, of each product.
    """
    flops, num_bytes = work
    return max(passes * flops / rate(PEAK_FLOPS, device), num_bytes / rate(MEMORY_BYTES_PER_S, device))


def fits(config: Config) -> bool:
    """Whether a layer's weights, their gradient and one more copy on its way fit into half of this machine's memory."""
    needed = 3 * 4 * weights_by_part(config, 0)["layer"]
    return needed < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def skipped_layers_that_pay(ratio: float, num_layers: int) -> float:
    """How many of its layers a token has to skip, so that its decisions cost no more than it saves.

    A token that executes d of T layers decides d + 1 times, at a cost of `ratio` layers each.
    """
    return ratio * (num_layers + 1) / (1 + ratio)


def benchmark_router(timings: Timings, sizes: dict) -> None:
    """
    Args:
        sizes: S of a row in training, `seq_len`.
    """
    device = _tpu()
    for size, dimensions in OPT.items():
        for use, seq_len in (("training", sizes["seq_len"]), ("decoding", 1)):
            _compare(timings, size, dimensions, use, seq_len, sizes["dtype"], device)


def _compare(
    timings: Timings,
    size: str,
    dimensions: tuple[int, int, int],
    use: str,
    seq_len: int,
    dtype: str,
    device: jax.Device | None,
) -> None:
    """Rows of the routers of all widths against a layer of one size, in one use."""
    d_model, _, num_layers = dimensions
    trains = use == "training"
    shape, on_tpu = (1, seq_len), (TPU_ROWS if trains else 1, seq_len)
    config, in_bf16 = opt_config(*dimensions, model__dtype=dtype), opt_config(*dimensions, **ON_TPU)
    layer = timed(layer_part(config, shape), shape, d_model, trains, 1) if timings.repeats and fits(config) else None
    if device:
        work = work_of_part(layer_part(in_bf16, on_tpu), on_tpu, d_model, trains, 1, device)
        layer_best_s = seconds_at_best(work, LAYER_PASSES, device)
    for network, divisor in NETWORKS.items():
        config = opt_config(*dimensions, divisor, train__seq_len=seq_len)
        what, against = f"router {network}", f"layer of OPT-{size}, {use}"

        def described(measure: str, ratio: float, by: str = "", network=network) -> dict:
            pays = round(skipped_layers_that_pay(ratio, num_layers), 3)
            return {
                "measure": measure,
                "by": by or measure,
                "size": size,
                "d_model": d_model,
                "network": network,
                "use": use,
                "pays_from": pays,
            }

        if trains:
            flops = flops_by_part(config, 0, [1.0])
            # Forwards and backwards, and the router's once more.
            both = 4 * flops["router"] / 1e6, 3 * (flops["layers"] + flops["attention"]) / 1e6
            timings.add_given(what, against, *both, "mflop", **described("FLOPs", both[0] / both[1]))
        else:
            weights = weights_by_part(config, 0)
            # The router's are float32, a layer's bfloat16.
            both = 4 * weights["router"] / 1e6, 2 * weights["layer"] / 1e6
            timings.add_given(what, against, *both, "mb", **described("bytes", both[0] / both[1]))
        if layer:
            run = timed(router_part(config, shape), shape, d_model, trains, 2)
            row = timings.add(what, against, run, layer, name=None)
            row |= described("this machine", row["ratio"])
        if device:
            router = router_part(config, on_tpu)
            work = work_of_part(router, on_tpu, d_model, trains, 2, device)
            best_s = seconds_at_best(work, ROUTER_PASSES, device)
            both = 1e6 * best_s, 1e6 * layer_best_s
            timings.add_given(
                what, against, *both, "us", **described("device", both[0] / both[1], by=device.device_kind)
            )


def plot_routers(rows: list[dict], path: Path) -> None:
    """Draw the rows of `benchmark_router`: a panel for each use and measure."""
    panels = {}
    for row in sorted(rows, key=lambda row: (MEASURES.index(row["measure"]), row["use"] != "training")):
        lines = panels.setdefault(f"{row['use']}: {row['by']}", {})
        lines.setdefault(row["network"], []).append((row["d_model"], row["ratio"]))
    plot_lines(panels, "D", "One router over one layer of OPT, by the router's width", path)


def _tpu():
    """A device that is compiled for; None where there is no compiler."""
    try:
        return devices_of(TPU)[0]
    except ConfigError as error:
        print(f"without a TPU: {error}", file=sys.stderr)
        return None
