"""Settings that must stand before jax is imported."""

import importlib.metadata
import os
import tempfile

# Or JAX_PLATFORMS=cuda, for the kernels' own tests on a GPU (docs/PERFORMANCE.md).
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
# Tests compile much and run little: a fifth of the compile time, by programs that are not optimised. What takes several
# devices finds eight.
if os.environ["JAX_PLATFORMS"] == "cpu":
    flags = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_force_host_platform_device_count=8",
    ]
    # A flag that XLA does not know ends the process; the first of these is gone since. The second takes 5 % less time.
    if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

import jax
import pytest


def pytest_addoption(parser):
    """For tests/test_reliability.py at length; docs/RELIABILITY.md has the commands."""
    parser.addoption("--kills", type=int, default=5, help="How often a run is killed.")
    parser.addoption("--killed_config", default="configs/smoke.py", help="What it trains.")
    parser.addoption("--killed_steps", type=int, default=12, help="Its training steps.")
    parser.addoption("--every_file", action="store_true", help="A run for each file of a checkpoint that may break.")


def pytest_configure(config):
    """All processes of one run of the tests, and the commands that they start, compile each program once."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        programs = tempfile.TemporaryDirectory(prefix="radialnet-programs-", ignore_cleanup_errors=True)
        config.add_cleanup(programs.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
        jax.config.update("jax_compilation_cache_dir", programs.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let go of what a module compiled. Linux allows a process 65,530 memory maps, of which every program takes some:
    with those of all modules a process was aborted by its compiler.
    """
    yield
    jax.clear_caches()
