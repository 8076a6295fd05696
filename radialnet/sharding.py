"""Where arrays live on several devices and processes. No other file says PartitionSpec.

The mesh has four axes, with the sizes of `config.mesh`. Rows of the batch are split over the first three of them:
  data    nothing else: each device, or each slice of a pod, has a copy of what the other axes leave of the parameters
  fsdp    the width of every parameter too, gathered for each step of training (ZeRO-3, arXiv 1910.02054)
  pool    the layers of the pool too: gathered, or tokens go to the devices that have their layers (`exchange`)
  tensor  heads and hidden units of every layer (arXiv 1909.08053); each device has all tokens of its rows

A parameter names its axes where it is made; `RULES` says which mesh axes they are split over.

A training step computes its gradient inside of a `shard_map` over all axes: grouping is local to a device and exact,
and nothing is computed twice. What the code in there has to know of the mesh is `Parallel`. Its collectives are
written out, and so is what they mean for a gradient: what is differentiated is the sum over all devices of what each
of them calls its loss. So each takes the loss of the whole batch, divided by the number of devices. A cotangent on one
device is its own share, where the devices of `tensor` have copies of a value; those of all devices add up to the
gradient. A psum is then its own transpose, and the gradient of a parameter is the sum over the axes that it isn't split
over (`Parallel.sum_of_copies`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from radialnet.config import Config
from radialnet.sections import ConfigError

PyTree = object
# The logical axes of a parameter, a name or None for each of its dimensions.
Axes = tuple[str | None, ...]

AXES = ("data", "fsdp", "pool", "tensor")
# Those that rows of the batch are split over.
ROW_AXES = AXES[:3]

# Logical axis of a parameter -> the mesh axes that it is split over. None is split over nothing.
RULES: dict[str | None, tuple[str, ...]] = {
    "layer": ("pool",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "hidden": ("tensor",),
    # Of the tables of the vocabulary, which nothing is computed of in parts.
    "width": ("fsdp", "pool", "tensor"),
    None: (),
}
# What stays split where it is used.
_COMPUTED_IN_PARTS = ("heads", "mlp", "hidden")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The part of one device of a mesh in what all of them compute. By default there is only one.

    Its methods are for code inside of a `shard_map` over all axes; on one device they do nothing.
    """

    data: int = 1
    fsdp: int = 1
    pool: int = 1
    tensor: int = 1
    exchange: str = ""  # How tokens go to the layers of the pool (`exchange`); empty: layers come to the tokens.

    @property
    def exchanges(self) -> bool:
        return bool(self.exchange)

    @property
    def dispatch(self) -> str:
        """`gather` or `exchange`."""
        return "exchange" if self.exchanges else "gather"

    def sizes(self) -> dict[str, int]:
        """Of the axes of the mesh."""
        return {axis: getattr(self, axis) for axis in AXES}

    def __str__(self) -> str:
        return " · ".join(f"{axis}={size}" for axis, size in self.sizes().items())

    @property
    def num_devices(self) -> int:
        return self.data * self.fsdp * self.pool * self.tensor

    @property
    def num_row_parts(self) -> int:
        """Parts that the rows of a batch are split into."""
        return self.data * self.fsdp * self.pool

    def _split_axes(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Those of more than one device."""
        return tuple(axis for axis in axes if getattr(self, axis) > 1)

    def sum_rows(self, tree: PyTree) -> PyTree:
        """The sums over the rows of the whole batch, from those of this device's rows."""
        return self._sum(tree, ROW_AXES)

    def sum_tensor(self, x: jax.Array) -> jax.Array:
        """The sum over the parts of a layer that the devices of `tensor` have."""
        return self._sum(x, ("tensor",))

    def sum_all(self, tree: PyTree) -> PyTree:
        """The sums over all devices."""
        return self._sum(tree, AXES)

    def _sum(self, tree: PyTree, axes: Sequence[str]) -> PyTree:
        axes = self._split_axes(axes)
        return jax.lax.psum(tree, axes) if axes else tree

    def first_row(self, num_rows: int) -> jax.Array | int:
        """Which row of the whole batch is the first one here; `num_rows`: those of a device."""
        axes = self._split_axes(ROW_AXES)
        return num_rows * jax.lax.axis_index(axes) if axes else 0

    def my_tokens(self, x_NX: jax.Array, filling=0) -> jax.Array:
        """This device's part of what all devices of `tensor` have, filled up so that the parts are equal."""
        if self.tensor == 1:
            return x_NX
        size = -(-x_NX.shape[0] // self.tensor)
        padding = (0, size * self.tensor - x_NX.shape[0]), *((0, 0) for _ in x_NX.shape[1:])
        x_NX = jnp.pad(x_NX, padding, constant_values=filling)
        return jax.lax.dynamic_slice_in_dim(x_NX, jax.lax.axis_index("tensor") * size, size)

    def all_tokens(self, x_NX: jax.Array, num_tokens: int) -> jax.Array:
        """What `my_tokens` took its part of, put together again."""
        return x_NX if self.tensor == 1 else jax.lax.all_gather(x_NX, "tensor", tiled=True)[:num_tokens]

    def gather(self, x: jax.Array, axes: Axes) -> jax.Array:
        """A parameter put together from the parts of all devices, but for what is computed in parts. Differentiable."""
        for dimension, over in self._gathered_dimensions(axes):
            x = jax.lax.all_gather(x, over, axis=dimension, tiled=True)
        return x

    def scatter_sum(self, grad: jax.Array, axes: Axes) -> jax.Array:
        """The transpose of `gather`: this device's part of the sum of all gradients."""
        for dimension, over in reversed(self._gathered_dimensions(axes)):
            grad = jax.lax.psum_scatter(grad, over, scatter_dimension=dimension, tiled=True)
        return grad

    def _gathered_dimensions(self, axes: Axes) -> list[tuple[int, tuple[str, ...]]]:
        stays = (*_COMPUTED_IN_PARTS, "layer") if self.exchanges else _COMPUTED_IN_PARTS
        split = [(dimension, self._split_axes(RULES[axis])) for dimension, axis in enumerate(axes) if axis not in stays]
        return [(dimension, over) for dimension, over in split if over]

    def sum_of_copies(self, grad: jax.Array, axes: Axes) -> jax.Array:
        """The gradient of a parameter from the shares of all devices that have the same part of it."""
        split = {axis for name in axes for axis in RULES[name]}
        return self._sum(grad, [axis for axis in AXES if axis not in split])


ALONE = Parallel()


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and how a model's parameters lie on it."""

    mesh: Mesh | None = None  # None: on one device, where arrays are anyway.
    parallel: Parallel = ALONE
    axes: PyTree = None  # Of every parameter.
    dispatch_reason: str = ""  # Why tokens go to layers or layers to tokens.

    def whole_params(self, params: PyTree) -> PyTree:
        """The parameters on one device, whole but for what is computed in parts; the pool as it lies, for it is
        gathered where it is used (`LayerPool.gather_weights`). Within `on_each_device`.
        """
        if self.parallel.num_devices == 1:
            return params
        rest, axes = ({name: x for name, x in tree.items() if name != "pool"} for tree in (params, self.axes))
        return jax.tree.map(self.parallel.gather, rest, axes) | {"pool": params["pool"]}

    def sum_of_copies(self, grads: PyTree) -> PyTree:
        """Gradients of the parameters, from what each device has of them (`Parallel.sum_of_copies`)."""
        if self.parallel.num_devices == 1:
            return grads
        return jax.tree.map(self.parallel.sum_of_copies, grads, self.axes)

    def shardings(self) -> PyTree:
        """Of the parameters."""
        return jax.tree.map(lambda axes: NamedSharding(self.mesh, _spec(axes)), self.axes, is_leaf=_is_axes)

    @property
    def everywhere(self) -> NamedSharding:
        """A copy on each device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def by_row(self) -> NamedSharding:
        """Of a batch: its first axis is that of rows."""
        return NamedSharding(self.mesh, PartitionSpec(ROW_AXES))

    def on_each_device(self, function: Callable, out_is_params: tuple[bool, ...]) -> Callable:
        """function(params, batch, *rest), run on each device with its parts of the first two and copies of the rest.

        Args:
            out_is_params: of each result, whether it lies as the parameters do; or is the same on all devices.
        """
        if self.parallel.num_devices == 1:
            return function
        params = jax.tree.map(_spec, self.axes, is_leaf=_is_axes)

        def sharded(params_tree, batch, *rest):
            specs = (params, PartitionSpec(ROW_AXES), *(PartitionSpec() for _ in rest))
            out_specs = tuple(params if is_params else PartitionSpec() for is_params in out_is_params)
            mapped = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
            return mapped(params_tree, batch, *rest)

        return sharded

    def own_rows(self, num_rows: int) -> list[int]:
        """Which rows of a batch the devices of this process hold, in order."""
        if self.parallel.num_devices == 1:
            return list(range(num_rows))
        parts = self.by_row.addressable_devices_indices_map((num_rows,)).values()
        return sorted({row for (part,) in parts for row in range(*part.indices(num_rows))})

    def put_rows(self, own: dict[str, np.ndarray], num_rows: int) -> dict[str, jax.Array]:
        """A batch on the devices, from the rows that this process read (`own_rows`)."""
        if self.parallel.num_devices == 1:
            return own
        place = {row: index for index, row in enumerate(self.own_rows(num_rows))}

        def put(x_BX: np.ndarray) -> jax.Array:
            def part(index):
                rows = range(*index[0].indices(num_rows))
                return x_BX[place[rows[0]] : place[rows[-1]] + 1]

            return jax.make_array_from_callback((num_rows, *x_BX.shape[1:]), self.by_row, part)

        return jax.tree.map(put, own)

    def put_everywhere(self, tree: PyTree) -> PyTree:
        """Copies on all devices, of values that all processes have."""
        if self.parallel.num_devices == 1:
            return jax.tree.map(jnp.asarray, tree)

        def put(x) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, self.everywhere, lambda index: x[index])

        return jax.tree.map(put, tree)


ONE_DEVICE = Placement()


def _is_axes(tree: PyTree) -> bool:
    return isinstance(tree, tuple)


def _spec(axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(RULES[axis] or None for axis in axes))


def mesh_sizes(config: Config, num_devices: int, num_slices: int = 1, num_processes: int = 1) -> dict[str, int]:
    """The sizes of the mesh's axes on that many devices, -1 being what the others leave.

    With one process and `data=-1` that is as many as rows of the batch can be split over; others go unused.

    Args:
        num_slices, num_processes: that the devices are of. Where there are several all devices are used.

    Raises:
        ConfigError: they don't go together, or with the devices.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    told = " · ".join(f"config.mesh.{axis}={size}" for axis, size in sizes.items())
    given = math.prod(size for size in sizes.values() if size > 0)
    must_use_all = num_processes > 1 or num_slices > 1
    for axis, size in sizes.items():
        if size < 0:
            rest = num_devices // given
            if axis == "data" and not must_use_all:
                rows, others = config.train.batch_size, sizes["fsdp"] * sizes["pool"] * config.train.accumulate_steps
                rest = max((n for n in range(1, rest + 1) if rows % (n * others) == 0), default=rest)
            elif num_devices % given:
                raise ConfigError(f"{told}: {given} does not divide the {num_devices} devices")
            sizes[axis] = rest
    needed = math.prod(sizes.values())
    if needed > num_devices or needed == 0 or (needed < num_devices and must_use_all):
        raise ConfigError(f"{told}: a mesh of {max(needed, given)} devices, but there are {num_devices}")
    if sizes["data"] % num_slices:
        raise ConfigError(f"{told}: config.mesh.data must be a multiple of the {num_slices} slices")
    return sizes


def make_mesh(config: Config, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh on those devices, or the first of them if it needs fewer. Slices of TPUs lie side by side on `data`.

    Raises:
        ConfigError: as `mesh_sizes`; or no such mesh can be laid onto the devices.
    """
    # GPUs call each host a slice, but what joins them is no slower than what most of them have.
    is_tpu = devices[0].platform == "tpu"
    num_slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    # Of the devices, which may be of a topology that isn't here.
    num_processes = len({device.process_index for device in devices})
    sizes = tuple(mesh_sizes(config, len(devices), num_slices, num_processes).values())
    try:
        if num_slices > 1:
            inner, outer = (sizes[0] // num_slices, *sizes[1:]), (num_slices, 1, 1, 1)
            grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
        else:
            used = list(devices)[: math.prod(sizes)]
            grid = mesh_utils.create_device_mesh(sizes, used, allow_split_physical_axes=True)
    except (ValueError, NotImplementedError) as error:
        told = " · ".join(f"config.mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(f"{told}: can't be laid onto the devices ({str(error).splitlines()[0]})") from None
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def along(axis: str, devices: list[jax.Device]) -> NamedSharding:
    """The first axis of an array split over devices, as the mesh axis of that name."""
    mesh = jax.make_mesh((len(devices),), (axis,), axis_types=(AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec(axis))


def replicated(like: NamedSharding) -> NamedSharding:
    """A copy on each device of a mesh."""
    return NamedSharding(like.mesh, PartitionSpec())
