"""Settings that must stand before jax is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and run little: half the compile time, by programs that are not optimised.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let go of what a module compiled. Linux allows a process 65,530 memory maps, of which every program takes some:
    with those of all modules a process was aborted by its compiler.
    """
    yield
    jax.clear_caches()
