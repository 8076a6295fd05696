"""A training step, and a step of decoding, compiled ahead of time for accelerators that are not there.

    python -m radialnet.aot --config=configs/radial_base.py --topology=v5e:16x16
    python -m radialnet.aot --config=configs/radial_large.py --topology=v5p:8x8x8 --num_slices=2
    python -m radialnet.aot --config=configs/radial_small.py --topology=h100

Runs on any machine, without accelerator. For TPUs it needs `pip install -r requirements-tpu.txt`, for an H100
`pip install "jax[cuda12]"`. The training step is compiled for all devices of the topology, on the mesh of the config;
decoding, which one device does, for one of them.

It prints what the program takes and does on each device, and as the last line one JSON object: `peak_memory_gb`;
`flops` and `flops_over_ideal`, what it computes against what the layers that are executed, head, router and attention
come to (every token at full depth, each device its part), null on GPUs, whose kernels don't tell; `collectives` by
kind, how often and how many GB; `wire_gb`, what a device sends for them at best; `compute_s` and `wire_s`, what both
would take at the chip's peak and with all of its links busy, also between slices; `compile_s`. Exit code 1 if the
program does not fit into memory.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from absl import flags
from jax.experimental import topologies
from ml_collections import config_flags

from radialnet import attention, cli, grouped
from radialnet.checks import expanded
from radialnet.config import Config
from radialnet.controllers import Controllers, schedule
from radialnet.cost import PEAK_FLOPS, WIRE_BYTES_PER_S, flops_by_part, rate
from radialnet.decode_cache import DecodeCache, Stages
from radialnet.decode_step import Decoding, Weights, decode_step
from radialnet.hop_task import make_tokenizer
from radialnet.model import abstract_params, init_params, place
from radialnet.optimizer import make_optimizer
from radialnet.program import work_of
from radialnet.sections import PAGE_SIZE, ConfigError
from radialnet.sharding import Placement
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.train_step import init_state, jitted_train_step, state_shardings

EXIT_DOES_NOT_FIT = 1
# Rows that decode side by side.
DECODE_ROWS = 16

# What XLA has to know of a GPU to compile for it: the fields of its GpuTargetConfigProto, by NVIDIA's data sheet and
# CUDA's table of compute capability 9.0.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 85899345920
}
"""


class DoesNotFitError(RuntimeError):
    """A program needs more memory than a device has."""


def devices_of(topology: str, num_slices: int = 1) -> list:
    """The devices of a topology: `h100`, or a TPU's name and shape like `v5e:2x2`. Raises ConfigError."""
    # libtpu asks the cloud's metadata server who it is, and waits for an answer; and it allows one process at a time to
    # have the TPUs of a machine, which nobody wants here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if topology == "h100" and num_slices > 1:
        raise ConfigError(f"--num_slices={num_slices}: --topology=h100 is one device")
    options = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        if topology == "h100":
            return topologies.get_topology_desc(
                topology, platform="cuda", target_config=_H100, topology="1x1x1"
            ).devices
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except (RuntimeError, ValueError, NotImplementedError, KeyError) as error:
        needed = "cuda12" if topology == "h100" else "tpu"
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ConfigError(f"--topology={topology}: {reason} (jax[{needed}] is needed for it)") from None


def platform_of(topology: str) -> str:
    return "gpu" if topology == "h100" else "tpu"


def for_platform(config: Config, platform: str) -> Config:
    """The config with the backends that `auto` means on a platform."""
    model = config.model
    if model.grouped_backend == "auto":
        model = dataclasses.replace(model, grouped_backend=grouped.default_backend(platform))
    if model.attention_backend == "auto":
        model = dataclasses.replace(model, attention_backend=attention.default_backend(platform))
    return dataclasses.replace(config, model=model)


def trace(config: Config, devices: Sequence) -> tuple[jax.stages.Traced, Placement]:
    """The training step of a config on devices. Nothing of the size of the model is ever made."""
    if config.train.teacher:
        raise ConfigError(
            f"config.train.teacher={config.train.teacher!r}: only a step without a teacher is compiled here"
        )
    vocab_size, optimizer = vocab_size_of(config), make_optimizer(config)
    placement = place(config, vocab_size, devices)
    graph, _ = abstract_params(config, vocab_size, placement.parallel)
    state = jax.eval_shape(lambda: init_state(config, init_params(config, vocab_size)[1], optimizer))
    state = jax.tree.map(_on, state, state_shardings(placement, optimizer, state))
    shape = config.train.batch_size, config.train.seq_len
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("token", "target", "document", "position")}
    batch["is_target"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    batch = {name: _on(x, placement.by_row) for name, x in batch.items()}
    bytes_V = _on(jax.ShapeDtypeStruct((vocab_size,), jnp.int32), placement.everywhere)
    with _told_to_kernels(placement.mesh):
        return jitted_train_step(config, graph, optimizer, placement, state).trace(state, batch, bytes_V), placement


def trace_decode(config: Config, device) -> jax.stages.Traced:
    """A step of decoding, of `DECODE_ROWS` rows that may become as long as those of training, on one device."""
    vocab_size, model = vocab_size_of(config), config.model
    graph, params = abstract_params(config, vocab_size)
    stages = Stages(model.prelude_layers, model.max_depth, model.coda_layers)
    num_pages = DECODE_ROWS * -(-config.train.seq_len * stages.total // PAGE_SIZE)

    def inputs(params):
        controllers = Controllers.init(config.router, model.pool_size)
        at = schedule(config.router, model.max_depth, jnp.int32(config.train.num_steps)).for_evaluation()
        sizes = DECODE_ROWS, config.train.seq_len, num_pages, PAGE_SIZE, model.num_kv_heads, model.head_size
        cache = DecodeCache.empty(config.view_over(model.max_depth), stages, *sizes, jnp.dtype(model.dtype))
        place_R, recent_RW = (
            jnp.zeros(DECODE_ROWS, jnp.int32),
            jnp.zeros((DECODE_ROWS, config.router.hash_span), jnp.int32),
        )
        return Weights.of(graph, params, controllers, at), cache, recent_RW, place_R, place_R > 0

    sharding = jax.sharding.SingleDeviceSharding(device)
    given = jax.tree.map(lambda x: _on(x, sharding), jax.eval_shape(inputs, params))
    decoding = Decoding(config, graph, stages, separator_id=0)
    with _told_to_kernels(jax.sharding.Mesh(np.asarray([device]), ("device",))):
        return jax.jit(partial(decode_step, decoding), donate_argnums=1).trace(*given)


def _told_to_kernels(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager:
    """While a program is traced: what GPU it is for. Its kernels would ask the machine, from jax 0.11 on."""
    if mesh.devices.flat[0].platform != "gpu":
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _on(x: jax.ShapeDtypeStruct, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def vocab_size_of(config: Config) -> int:
    """That of the run's tokenizer, without the data that it may be trained on."""
    if config.data.source == "hops":
        return make_tokenizer().vocab_size
    if config.data.tokenizer not in ("byte", "bpe"):
        return Tokenizer.load(expanded(config.data.tokenizer)).vocab_size
    return BYTE_VOCAB_SIZE if config.data.tokenizer == "byte" else config.data.vocab_size


def ideal_flops(config: Config, placement: Placement) -> float:
    """FLOPs of a training step on one device, if nothing is computed twice or for nothing: its part of all tokens',
    each of them at full depth.

    Backwards a product costs twice what it does forwards. What is rematerialised counts as it is meant to be: layers
    and their attention (`model.remat`), the last product of a layer only where its choice has a gradient; in `exchange`
    the products but the last; the router, always; and what the kernels of attention compute of scores again.
    """
    model, exchanges = config.model, placement.parallel.exchanges
    part = flops_by_part(config, vocab_size_of(config), [1.0] * model.max_depth)
    last = 2 * model.d_model * model.d_ff * model.max_depth / part["layers"]
    again, attended_again = (1.0, 1.0) if model.remat == "step" else (0.0, 0.0)
    if exchanges or (again and not config.router.learns_choices):
        again = 1 - last
    if exchanges:
        attended_again = 0.0
    # Forwards two products of queries and entries; backwards five of them, and two computed again by each kernel.
    attention_backward = 7 / 2
    has_reads = config.router.predicts_benefit and model.min_depth < model.max_depth
    heads = 1 + 1 / config.router.read_every if has_reads else 1
    total = (
        (3 + again) * part["layers"]
        + (1 + attended_again + attention_backward) * part["attention"]
        + 3 * part["unshared"]
        + (1 + attention_backward) * part["unshared_attention"]
        + 4 * part["router"]
        + 3 * heads * part["head"]
    )
    return total * config.train.batch_size * config.train.seq_len / placement.parallel.num_devices


def compiled(traced: jax.stages.Traced) -> tuple[jax.stages.Compiled, float]:
    """The program, and the seconds that it took. Raises DoesNotFitError."""
    start = time.perf_counter()
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split()).removeprefix("RESOURCE_EXHAUSTED: ")[:300]
        raise DoesNotFitError(f"{reason} The largest arrays: {', '.join(_largest(traced.jaxpr))}") from None
    return program, time.perf_counter() - start


def _largest(jaxpr, number: int = 5) -> list[str]:
    """The largest arrays of what runs on one device."""
    sizes = {}

    def look(jaxpr, is_here):
        for equation in jaxpr.eqns:
            for inner in _inner(equation.params):
                look(inner, is_here or equation.primitive.name == "shard_map")
            for array in (variable.aval for variable in equation.outvars) if is_here else ():
                if hasattr(array, "shape"):
                    label = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
                    sizes[label] = math.prod(array.shape) * array.dtype.itemsize

    has_mesh = any(equation.primitive.name == "shard_map" for equation in jaxpr.eqns)
    look(jaxpr.jaxpr, not has_mesh)
    largest = sorted(sizes, key=sizes.get, reverse=True)[:number]
    return [f"{label} {sizes[label] / 1e9:.2f} GB" for label in largest]


def _inner(params: dict) -> list:
    """The programs within an equation: bodies of loops, branches, functions."""
    values = jax.tree.leaves(params, is_leaf=lambda value: hasattr(value, "eqns"))
    return [value.jaxpr if hasattr(value, "jaxpr") else value for value in values if hasattr(value, "eqns")]


def _memory_gb(program: jax.stages.Compiled) -> float:
    memory = program.memory_analysis()
    # Not all platforms tell the peak; together these are a bound of it.
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (memory.peak_memory_in_bytes or total - memory.alias_size_in_bytes) / 1e9


def report(config: Config, devices: Sequence) -> dict:
    """What the training step takes and does on each device. Raises DoesNotFitError, ConfigError."""
    traced, placement = trace(config, devices)
    program, seconds = compiled(traced)
    text = program.as_text()
    work, ideal = work_of(text), ideal_flops(config, placement)
    kernels = re.findall(r'custom_call_target="(tpu_custom_call|[^"]*triton[^"]*)"', text)
    # Those for GPUs don't say in the program what they compute, and they are all layers and attention.
    flops = None if any("triton" in kernel for kernel in kernels) else work.flops
    return {
        "device": devices[0].device_kind,
        "num_devices": placement.parallel.num_devices,
        "mesh": placement.parallel.sizes(),
        "dispatch": placement.parallel.dispatch,
        "dispatch_reason": placement.dispatch_reason,
        "grouped_backend": config.model.grouped_backend,
        "attention_backend": config.model.attention_backend,
        "kernels": len(kernels),
        "peak_memory_gb": round(_memory_gb(program), 3),
        "flops": flops,
        "ideal_flops": ideal,
        "flops_over_ideal": flops and round(flops / ideal, 4),
        "compute_s": flops and _over(flops, rate(PEAK_FLOPS, devices[0])),
        "wire_gb": round(work.wire / 1e9, 3),
        "wire_s": _over(work.wire, rate(WIRE_BYTES_PER_S, devices[0])),
        "loops_of_unknown_length": list(work.unknown),
        "collectives": {
            kind: {"count": round(work.counts[kind]), "gb": round(work.collectives[kind] / 1e9, 3)}
            for kind in sorted(work.collectives)
        },
        "compile_s": round(seconds, 1),
    }


def _over(amount: float, per_second: float | None) -> float | None:
    return None if per_second is None else round(amount / per_second, 3)


def report_decode(config: Config, device) -> dict:
    """What a step of decoding takes and does. Raises DoesNotFitError."""
    program, seconds = compiled(trace_decode(config, device))
    return {"rows": DECODE_ROWS, "peak_memory_gb": round(_memory_gb(program), 3), "compile_s": round(seconds, 1)}


def _print(found: dict) -> None:
    console, table = rich.console.Console(highlight=False), rich.table.Table(show_header=False, box=None)
    table.add_row("devices", f"{found['num_devices']} {found['device']}")
    table.add_row("mesh", " · ".join(f"{axis}={size}" for axis, size in found["mesh"].items()))
    table.add_row("dispatch", f"{found['dispatch']} ({found['dispatch_reason']})")
    table.add_row("peak memory", f"{found['peak_memory_gb']:.2f} GB a device")
    if found["flops"]:
        table.add_row("FLOPs", f"{found['flops'] / 1e12:.2f} T a device, {found['flops_over_ideal']:.3f} of the ideal")
        table.add_row("at best", f"{found['compute_s']} s of computing, {found['wire_s']} s of the wire")
    for kind, moved in found["collectives"].items():
        table.add_row(kind, f"{moved['gb']:.3f} GB a device, {moved['count']} times")
    table.add_row("compiled in", f"{found['compile_s']} s")
    console.print(table)


def main() -> None:
    topology, num_slices = _TOPOLOGY.value, _NUM_SLICES.value
    config = for_platform(cli.read_config(_CONFIG), platform_of(topology))
    devices = devices_of(topology, num_slices)
    try:
        found = report_decode(config, devices[0]) if _PROGRAM.value == "decode" else report(config, devices)
    except DoesNotFitError as error:
        print("error: does not fit:", error, file=sys.stderr)
        sys.exit(EXIT_DOES_NOT_FIT)
    if _PROGRAM.value == "train" and not _JSON.value:
        _print(found)
    print(json.dumps(found))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    _TOPOLOGY = flags.DEFINE_string("topology", None, "What to compile for: h100, or a TPU's like v5e:2x2.")
    _NUM_SLICES = flags.DEFINE_integer(
        "num_slices", 1, "How many such topologies, joined by their network.", lower_bound=1
    )
    _JSON = flags.DEFINE_bool("json", False, "Print the JSON line alone.")
    _PROGRAM = flags.DEFINE_enum("program", "train", ["train", "decode"], "The step of what.")
    flags.mark_flags_as_required(["config", "topology"])
    if not os.environ.get("JAX_PLATFORMS"):
        # Nothing runs here, so that no accelerator is looked for.
        jax.config.update("jax_platforms", "cpu")
    cli.run(main)
