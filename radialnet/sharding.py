"""Where arrays live when there are several devices and processes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def along(axis: str, devices: list[jax.Device]) -> NamedSharding:
    """The first axis of an array split over devices, as the mesh axis of that name."""
    mesh = jax.make_mesh((len(devices),), (axis,), axis_types=(AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec(axis))


def replicated(like: NamedSharding) -> NamedSharding:
    """A copy on each device of a mesh."""
    return NamedSharding(like.mesh, PartitionSpec())


def max_over_processes(value: int) -> jax.Array:
    """The largest of the values that the processes give, each once; all of them must call. Doesn't wait for it."""
    split, largest = _largest()
    return largest(jax.make_array_from_process_local_data(split, np.full(jax.local_device_count(), value, np.int32)))


@functools.cache
def _largest():
    """Once, for it is asked at every step."""
    split = along("device", jax.devices())
    return split, jax.jit(jnp.max, out_shardings=replicated(split))
