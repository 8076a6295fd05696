"""Settings that must stand before jax is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and run little: half the compile time, by programs that are not optimised.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
