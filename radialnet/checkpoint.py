"""Checkpoints by Orbax: named pytrees, one folder per step. Knows no model."""

import textwrap
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from radialnet.config import ConfigError

PyTree = object


class Checkpoints:
    """The checkpoints of a run, `folder/<step>/`. Use as a context manager: leaving it waits for the last save."""

    def __init__(self, folder: Path, keep: int | None = None):
        """Open the folder; `keep` newest checkpoints survive a save (None: all)."""
        self._folder = folder
        policies = ocp.training.preservation_policies
        policy = policies.PreserveAll() if keep is None else policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(folder.resolve(), preservation_policy=policy)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None without any."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, trees: dict[str, PyTree]) -> None:
        """Save in the background. An earlier save that failed raises here."""
        self._checkpointer.save_checkpointables_async(step, trees, force=True)

    def restore(self, step: int, abstract_trees: dict[str, PyTree]) -> dict[str, PyTree]:
        """Restore the named trees with the structure, shapes and dtypes given; others that were saved are left alone.

        Raises:
            ConfigError: there is no such checkpoint, or its trees have another structure, shape or dtype.
        """
        # Without a placement Orbax would take the one that was saved, which may be of another machine.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract_trees)
        try:
            trees = self._checkpointer.load_checkpointables(step, placed)
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            # Orbax may list all that it knows.
            reason = textwrap.shorten(str(error) or type(error).__name__, 200)
            raise ConfigError(f"{self._folder / str(step)}: can't be restored ({reason})") from error
        jax.tree.map_with_path(_check, abstract_trees, {name: trees[name] for name in abstract_trees})
        return trees


def _check(path: tuple, want: jax.ShapeDtypeStruct, have: jax.Array) -> None:
    if (want.shape, want.dtype) != (have.shape, have.dtype):
        raise ConfigError(
            f"checkpoint: {jax.tree_util.keystr(path)} is {have.dtype}{list(have.shape)}, "
            f"but the config needs {want.dtype}{list(want.shape)}"
        )
