"""A training step compiled ahead of time for an accelerator that is not there.

    python -m radialnet.aot --config=configs/radial_small.py --topology=v5e:2x2
    python -m radialnet.aot --config=configs/radial_small.py --topology=h100

Runs on any machine. For TPUs it needs `pip install "jax[tpu]"`, for an H100 `pip install "jax[cuda12]"`; run it with
JAX_PLATFORMS=cpu. The step is compiled for one device of the topology. The last line of stdout is one JSON object:
`peak_memory_gb`, `compile_s`, `kernels` (calls of Pallas kernels in the program), and `flops` as XLA counts them: the
body of a loop once, the inside of a kernel not at all. Exit code 1 if the program does not fit.
"""

import dataclasses
import json
import os
import re
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from ml_collections import config_flags

from radialnet import attention, cli, grouped
from radialnet.config import Config, ConfigError
from radialnet.hop_task import make_tokenizer
from radialnet.model import init_params
from radialnet.optimizer import make_optimizer
from radialnet.tokenizer import BYTE_VOCAB_SIZE
from radialnet.train_step import init_state, train_step

EXIT_DOES_NOT_FIT = 1

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


def device_of(topology: str):
    """One device of a topology: `h100`, or a TPU's name and shape like `v5e:2x2`. Raises ConfigError."""
    # libtpu asks the cloud's metadata server who it is, and waits for an answer.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        if topology == "h100":
            return topologies.get_topology_desc(
                topology, platform="cuda", target_config=_H100, topology="1x1x1"
            ).devices[0]
        return topologies.get_topology_desc(topology, platform="tpu").devices[0]
    except (RuntimeError, ValueError, NotImplementedError, KeyError) as error:
        needed = "cuda12" if topology == "h100" else "tpu"
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ConfigError(f"--topology={topology}: {reason} (jax[{needed}] is needed for it)") from None


def for_platform(config: Config, platform: str) -> Config:
    """The config with the backends that `auto` means on a platform."""
    model = config.model
    if model.grouped_backend == "auto":
        model = dataclasses.replace(model, grouped_backend=grouped.default_backend(platform))
    if model.attention_backend == "auto":
        model = dataclasses.replace(model, attention_backend=attention.default_backend(platform))
    return dataclasses.replace(config, model=model)


def lower(config: Config, device) -> jax.stages.Lowered:
    """The training step of a config for one device. Nothing of the size of the model is ever made."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    optimizer = make_optimizer(config)
    graphs, vocab_size = [], _vocab_size(config)

    def init():
        graph, params = init_params(config, vocab_size)
        graphs.append(graph)
        return init_state(config, params, optimizer)

    shape = config.train.batch_size, config.train.seq_len
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("token", "target", "document", "position")}
    batch["is_target"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    inputs = jax.eval_shape(init), batch, jax.ShapeDtypeStruct((vocab_size,), jnp.int32)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs)
    step = partial(train_step, config=config, graph=graphs[0], optimizer=optimizer)
    return jax.jit(step, donate_argnums=0).lower(*inputs)


def _vocab_size(config: Config) -> int:
    """That of the run's tokenizer, without the data that it may be trained on."""
    if config.data.source == "hops":
        return make_tokenizer().vocab_size
    return BYTE_VOCAB_SIZE if config.data.tokenizer == "byte" else config.data.vocab_size


def main() -> None:
    config = cli.read_config(_CONFIG)
    device = device_of(_TOPOLOGY.value)
    config = for_platform(config, "gpu" if _TOPOLOGY.value == "h100" else "tpu")
    start = time.perf_counter()
    try:
        program = lower(config, device).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("error: does not fit:", " ".join(str(error).split())[:500], file=sys.stderr)
        sys.exit(EXIT_DOES_NOT_FIT)
    memory = program.memory_analysis()
    # Not all platforms tell the peak or FLOPs; together these are a bound of the peak.
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    found = {
        "device": device.device_kind,
        "grouped_backend": config.model.grouped_backend,
        "attention_backend": config.model.attention_backend,
        "peak_memory_gb": (memory.peak_memory_in_bytes or total - memory.alias_size_in_bytes) / 1e9,
        "flops": (program.cost_analysis() or {}).get("flops"),
        "kernels": len(re.findall(r'custom_call_target="(?:tpu_custom_call|[^"]*triton[^"]*)"', program.as_text())),
        "compile_s": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    _TOPOLOGY = flags.DEFINE_string("topology", None, "What to compile for: h100, or a TPU's like v5e:2x2.")
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(main)
