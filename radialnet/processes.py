"""The processes of a run: how they find each other, wait for each other, and agree on what concerns them all."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from radialnet.sections import ConfigError
from radialnet.sharding import along, replicated


def join_processes(
    how: str, coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Find the other processes of the run, before anything is computed.

    Args:
        how: `on`, `off`, or `auto`: those of a TPU pod, GKE, Slurm or MPI job, if there is one.
        coordinator_address, num_processes, process_id: where none of those tells.

    Raises:
        ConfigError: the other processes can't be found, or what is given does not go together.
    """
    given = coordinator_address, num_processes, process_id
    is_given = any(value is not None for value in given)
    if how == "off":
        if is_given:
            raise ConfigError("--distributed=off does not go with --coordinator_address, --num_processes, --process_id")
        return
    if is_given:
        _check_given(*given)
        # If one of them never comes, JAX ends the others by a signal after five minutes, and doesn't say so before.
        print(f"process {process_id}: waits for all {num_processes} processes at {coordinator_address}", flush=True)
    try:
        jax.distributed.initialize(*given)
    except (ValueError, RuntimeError) as error:
        # What JAX says where there is no job. All else means that there is one, and each process would train alone.
        if how == "auto" and not is_given and "coordinator_address should be defined" in str(error):
            return
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ConfigError(f"--distributed={how}: the other processes of the run can't be found ({reason})") from None


def _check_given(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    # Here, for JAX ends the process by a signal over some of them.
    told = f"--coordinator_address={address} --num_processes={num_processes} --process_id={process_id}"
    if address is None or num_processes is None or process_id is None:
        raise ConfigError(f"{told}: all three are needed, or none where a job tells")
    _, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ConfigError(f"--coordinator_address={address}: host:port is needed, a port of 1 to 65535")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"{told}: a process of 0 to {num_processes - 1} is needed")


def wait_for_processes(name: str) -> None:
    """Until all processes have come to the point of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """What one process can't do none does: an error of one of them becomes one of all, at the end of the block.

    Raises:
        ConfigError: another process failed.
    """
    try:
        yield
    except (ConfigError, OSError):
        _failed(True)
        raise
    failed = _failed(False)
    if failed.any():
        raise ConfigError(f"{what}: process {failed.argmax()} of the run can't, and tells why")


def _failed(here: bool) -> np.ndarray:
    return (
        np.atleast_1d(multihost_utils.process_allgather(np.asarray(here))) if jax.process_count() > 1 else np.zeros(1)
    )


def check_same(values: dict[str, object]) -> None:
    """Raise ConfigError where processes have another value, which JSON can tell, under the same name."""
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in values.values()]
    found_PNX = multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint8).reshape(len(values), -1))
    differs_PN = (found_PNX != found_PNX[0]).any(axis=2)
    if differs_PN.any():
        process, number = np.argwhere(differs_PN)[0]
        raise ConfigError(f"{list(values)[number]}: process {process} of the run has another than process 0")


def max_over_processes(value: int) -> jax.Array:
    """The largest of the values that the processes give, each once; all of them must call. Doesn't wait for it."""
    split, largest = _largest()
    return largest(jax.make_array_from_process_local_data(split, np.full(jax.local_device_count(), value, np.int32)))


@functools.cache
def _largest() -> tuple[NamedSharding, jax.stages.Wrapped]:
    """Once, for it is asked at every step."""
    split = along("device", jax.devices())
    return split, jax.jit(jnp.max, out_shardings=replicated(split))
