"""Checkpoints by Orbax: named pytrees, one folder per step, with the checksum of every file. Knows no model.

Orbax writes a step aside and renames it at the end, so that a kill leaves a whole step or none. But it loads flipped
bits without a word, takes an empty folder for the newest step, and never turns to an older one. So a step counts here
when it has its `checksums.json`, which is written when all the rest is on disk, and every file is what that says.
"""

import hashlib
import json
import shutil
import textwrap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from radialnet.config import ConfigError
from radialnet.files import write_whole
from radialnet.run_folder import CHECKSUMS, is_committed, saved_steps, steps_in

PyTree = object


class Checkpoints:
    """The checkpoints of a run, `folder/<step>/`. Use as a context manager: leaving it waits for the last save."""

    def __init__(self, folder: Path, keep: int | None = None, keep_every: int = 0):
        """Open the folder; the newest `keep` survive a save (None: all), and those of each `keep_every`-th step."""
        self._folder, self._keep, self._keep_every = folder.resolve(), keep, keep_every
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._saving: Future | None = None
        self._saving_step = 0
        self._broken: set[int] = set()  # Steps that were found not to be whole.

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.check(wait=True)
        finally:
            self._worker.shutdown()

    def newest(self, report: Callable[[str], None]) -> int | None:
        """The newest step that is whole; None where no save was ever finished.

        Args:
            report: is told of newer ones that are not, a line for each.

        Raises:
            ConfigError: saves were finished, and what is left of each of them is broken.
        """
        broken = {}
        for step in steps_in(self._folder):
            reason = self._what_is_wrong(step)
            if reason is None:
                return self._taken(step, broken, report)
            broken[step] = f"{self._folder / str(step)}: {reason}"
        if saved_steps(self._folder):
            raise ConfigError(f"{next(iter(broken.values()))}, and there is no older checkpoint that is whole")
        for step in list(broken):
            if is_committed(self._folder / str(step)):
                report(f"{self._folder / str(step)}: has no {CHECKSUMS}; taken as it is")
                del broken[step]
                return self._taken(step, {later: line for later, line in broken.items() if later > step}, report)
        for line in broken.values():
            report(f"{line}; there is no older one")
        return None

    def _taken(self, step: int, broken: dict[int, str], report: Callable[[str], None]) -> int:
        self._broken = set(broken)
        for line in broken.values():
            report(f"{line}; step {step} is taken instead")
        return step

    def save(self, step: int, trees: dict[str, PyTree]) -> None:
        """Save in the background. Raises ConfigError when an earlier save failed."""
        self.check(wait=True)
        # What is there of this step already was not whole, or it would have been gone on from.
        (self._folder / str(step) / CHECKSUMS).unlink(missing_ok=True)
        saving = ocp.save_checkpointables_async(self._folder / str(step), trees, overwrite=True)
        self._saving, self._saving_step = self._worker.submit(self._finish, saving, step), step

    def check(self, wait: bool = False) -> None:
        """Raise ConfigError when the save under way has failed; with `wait`, as soon as it is done."""
        if self._saving is None or not (wait or self._saving.done()):
            return
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except Exception as error:
            self._remove_unfinished()
            raise ConfigError(f"{self._folder / str(self._saving_step)}: can't be saved ({_short(error)})") from error

    def restore(self, step: int, abstract_trees: dict[str, PyTree]) -> dict[str, PyTree]:
        """Restore the named trees with the structure, shapes and dtypes given; others that were saved are left alone.

        Raises:
            ConfigError: there is no such checkpoint, or its trees have another structure, shape or dtype.
        """
        # Without a placement Orbax would take the one that was saved, which may be of another machine.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract_trees)
        try:
            trees = ocp.load_checkpointables(self._folder / str(step), placed)
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self._folder / str(step)}: can't be restored ({_short(error)})") from error
        jax.tree.map_with_path(_check, abstract_trees, {name: trees[name] for name in abstract_trees})
        return trees

    def _finish(self, saving: ocp.AsyncResponse, step: int) -> None:
        """Wait until a step is on disk, add its checksums, and let go of steps that are not kept."""
        saving.result()
        folder = self._folder / str(step)
        sums = {name: _sha256(folder / name) for name in sorted(_files(folder))}
        write_whole(folder / CHECKSUMS, json.dumps(sums, indent=1) + "\n")
        if self._keep is None:
            return
        self._broken.discard(step)
        # Later steps were not whole, or this one would not have been done again.
        whole = [saved for saved in saved_steps(self._folder) if saved <= step and saved not in self._broken]
        kept = {saved for saved in whole if self._keep_every and saved % self._keep_every == 0} | {*whole[: self._keep]}
        for old in steps_in(self._folder):
            if old not in kept:
                # First what makes it count, so that a kill leaves nothing that looks whole.
                (self._folder / str(old) / CHECKSUMS).unlink(missing_ok=True)
                shutil.rmtree(self._folder / str(old), ignore_errors=True)
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """What a kill in the middle of a save has left, or a save that failed."""
        for rest in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(rest, ignore_errors=True)

    def _what_is_wrong(self, step: int) -> str | None:
        folder = self._folder / str(step)
        if not (folder / CHECKSUMS).is_file():
            return "its save was not finished"
        try:
            sums = json.loads((folder / CHECKSUMS).read_bytes())
        except ValueError:
            return f"{CHECKSUMS} is not what was saved"
        if not isinstance(sums, dict):
            return f"{CHECKSUMS} is not what was saved"
        # What can't be read for another reason may be whole: that ends the run.
        for name in sorted({*sums} | {*_files(folder)}):
            if not (folder / name).is_file():
                return f"{name} is gone"
            if sums.get(name) != _sha256(folder / name):
                return f"{name} is not what was saved"
        return None


def _files(folder: Path) -> list[str]:
    """The files of a step, by their place in it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    return [str(path.relative_to(folder)) for path in files]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(error: Exception) -> str:
    # Orbax may list all that it knows.
    return textwrap.shorten(str(error) or type(error).__name__, 200)


def _check(path: tuple, want: jax.ShapeDtypeStruct, have: jax.Array) -> None:
    if (want.shape, want.dtype) != (have.shape, have.dtype):
        raise ConfigError(
            f"checkpoint: {jax.tree_util.keystr(path)} is {have.dtype}{list(have.shape)}, "
            f"but the config needs {want.dtype}{list(want.shape)}"
        )
