"""Checkpoints by Orbax: named pytrees, one folder per step, with the checksum of every file. Knows no model.

Orbax writes a step aside and renames it at the end, so that a kill leaves a whole step or none. But it loads flipped
bits without a word, takes an empty folder for the newest step, and never turns to an older one. So a step counts here
when it has its `checksums.json`, which is written when all the rest is on disk, and every file is what that says. Where
no step has one, as in runs of before there were any, what Orbax has finished is taken as it is.

Several processes share the folder, and the work: each takes the checksums of its share of the files, when a step is
saved and when it is looked at. All of them must call each method, with global arrays.
"""

import json
import logging
import shutil
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import logging as absl_logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from radialnet.files import sha256_of, write_whole
from radialnet.run_folder import CHECKSUMS, is_committed, saved_steps, steps_in
from radialnet.sections import ConfigError

PyTree = object

# How long a process waits for the checksums of the others.
_PATIENCE_SECONDS = 600


# Checksums of one process, until the first one has put them together.
_PART = "checksums.{}.json"


class Checkpoints:
    """The checkpoints of a run, `folder/<step>/`. Use as a context manager: leaving it waits for the last save."""

    def __init__(self, folder: Path, keep: int | None = None, keep_every: int = 0):
        """Open the folder; the newest `keep` survive a save (None: all), and those of each `keep_every`-th step."""
        self.folder, self._keep, self._keep_every = folder.resolve(), keep, keep_every
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._saving: Future | None = None
        self._filter = _ReportedHere()
        self._saving_step = 0
        self._broken: set[int] = set()  # Steps that were found not to be whole.
        self._process, self._num_processes = jax.process_index(), jax.process_count()

    def __enter__(self) -> "Checkpoints":
        absl_logging.get_absl_logger().addFilter(self._filter)
        return self

    def __exit__(self, *_) -> None:
        try:
            self.check(wait=True)
        finally:
            self._worker.shutdown()
            absl_logging.get_absl_logger().removeFilter(self._filter)

    def newest(self, report: Callable[[str], None]) -> int | None:
        """The newest step that is whole; None where no save was ever finished.

        Args:
            report: is told of newer ones that are not, a line for each.

        Raises:
            ConfigError: saves were finished, and what is left of each of them is broken.
        """
        broken = {}
        for step in steps_in(self.folder):
            reason = self._what_is_wrong(step)
            if reason is None:
                return self._taken(step, broken, report)
            broken[step] = f"{self.folder / str(step)}: {reason}"
        if saved_steps(self.folder):
            raise ConfigError(f"{next(iter(broken.values()))}, and there is no older checkpoint that is whole")
        for step in list(broken):
            if is_committed(self.folder / str(step)):
                report(f"{self.folder / str(step)}: has no {CHECKSUMS}; taken as it is")
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
        # The first process: the others wait for it in the save.
        if self._process == 0:
            # A full disk needs the room.
            self._remove_unfinished()
            # What is there of this step already was not whole, or it would have been gone on from. Orbax would remove
            # it too, but each of its processes looks whether it is there, and one that looks too late waits for ever.
            folder = self.folder / str(step)
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.unlink(missing_ok=True)
        saving = ocp.save_checkpointables_async(self.folder / str(step), trees, overwrite=True)
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
            raise ConfigError(f"{self.folder / str(self._saving_step)}: can't be saved ({_short(error)})") from error

    def has(self, step: int, tree: str) -> bool:
        """Whether a tree of that name was saved at the step; one of before there was such a tree has none."""
        return (self.folder / str(step) / tree).is_dir()

    def restore(self, step: int, abstract_trees: dict[str, PyTree]) -> dict[str, PyTree]:
        """Restore the named trees with the structure and shapes given, cast to the dtypes given; others that were saved
        are left alone.

        Arrays go to where the given ones are, or are said to be by their `sharding`, whatever mesh and processes saved
        them; without either to the first device.

        Raises:
            ConfigError: there is no such checkpoint, or its trees have another structure or shape.
        """
        # Without a placement Orbax would take the one that was saved, which may be of another machine.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), abstract_trees
        )
        try:
            trees = ocp.load_checkpointables(self.folder / str(step), placed)
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.folder / str(step)}: can't be restored ({_short(error)})") from error
        jax.tree.map_with_path(_check, abstract_trees, {name: trees[name] for name in abstract_trees})
        return trees

    def _finish(self, saving: ocp.AsyncResponse, step: int) -> None:
        """Wait until a step is on disk, add its checksums, and let go of steps that are not kept."""
        saving.result()
        folder = self.folder / str(step)
        sums = {name: sha256_of(folder / name) for name in self._share(_files(folder))}
        if self._num_processes > 1:
            sums = self._shared(folder, sums)
        if self._process > 0:
            return
        write_whole(folder / CHECKSUMS, json.dumps(sums, indent=1) + "\n")
        if self._keep is None:
            return
        self._broken.discard(step)
        # Later steps were not whole, or this one would not have been done again.
        whole = [saved for saved in saved_steps(self.folder) if saved <= step and saved not in self._broken]
        kept = {saved for saved in whole if self._keep_every and saved % self._keep_every == 0} | {*whole[: self._keep]}
        for old in steps_in(self.folder):
            if old not in kept:
                # First what makes it count, so that a kill leaves nothing that looks whole.
                (self.folder / str(old) / CHECKSUMS).unlink(missing_ok=True)
                shutil.rmtree(self.folder / str(old), ignore_errors=True)
        self._remove_unfinished()

    def _share(self, names: list[str]) -> list[str]:
        """This process's part of the files."""
        return sorted(names)[self._process :: self._num_processes]

    def _shared(self, folder: Path, sums: dict[str, str]) -> dict[str, str]:
        """The checksums of all processes, in the first; the others give theirs and wait until all are written.

        By files and not by a collective: this is a thread, and the devices are at work on steps.
        """
        parts = [folder / _PART.format(process) for process in range(self._num_processes)]
        if self._process > 0:
            write_whole(parts[self._process], json.dumps(sums))
            _wait_for((folder / CHECKSUMS).exists, folder)
            return {}
        for part in parts[1:]:
            _wait_for(part.exists, part)
            sums |= json.loads(part.read_bytes())
            part.unlink()
        return sums

    def _remove_unfinished(self) -> None:
        """What a kill in the middle of a save has left, or a save that failed."""
        for rest in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(rest, ignore_errors=True)

    def _what_is_wrong(self, step: int) -> str | None:
        """Why a step doesn't count; the same in all processes."""
        reason = self._what_is_wrong_here(step)
        if self._num_processes == 1:
            return reason
        found = multihost_utils.process_allgather(np.asarray(reason is not None))
        return reason or (f"process {found.argmax()} found it broken" if found.any() else None)

    def _what_is_wrong_here(self, step: int) -> str | None:
        folder = self.folder / str(step)
        if not (folder / CHECKSUMS).is_file():
            return "its save was not finished"
        try:
            sums = json.loads((folder / CHECKSUMS).read_bytes())
        except (ValueError, RecursionError):
            return f"{CHECKSUMS} is not what was saved"
        if not isinstance(sums, dict):
            return f"{CHECKSUMS} is not what was saved"
        # What can't be read for another reason may be whole: that ends the run.
        for name in self._share(list({*sums} | {*_files(folder)})):
            if not (folder / name).is_file():
                return f"{name} is gone"
            if sums.get(name) != sha256_of(folder / name):
                return f"{name} is not what was saved"
        return None


class _ReportedHere(logging.Filter):
    """Keeps back the stacks of all threads of a save that failed; `check` raises what it failed by, in a line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


def _files(folder: Path) -> list[str]:
    """The files of a step, by their place in it."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    # Those of Orbax: ours have no checksum, nor what they are while they are written.
    return [str(file) for file in files if len(file.parts) > 1 or not file.name.lstrip(".").startswith("checksums.")]


def _wait_for(is_there: Callable[[], bool], path: Path) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while not is_there():
        if time.monotonic() > end:
            raise TimeoutError(f"{path}: another process did not write its checksums in {_PATIENCE_SECONDS} s")
        time.sleep(0.05)


def _short(error: Exception) -> str:
    # Orbax may list all that it knows, before what matters.
    if "No space left on device" in str(error):
        return "No space left on device"
    return textwrap.shorten(str(error) or type(error).__name__, 200)


def _check(path: tuple, want: jax.ShapeDtypeStruct, have: jax.Array) -> None:
    if (want.shape, want.dtype) != (have.shape, have.dtype):
        raise ConfigError(
            f"checkpoint: {jax.tree_util.keystr(path)} is {have.dtype}{list(have.shape)}, "
            f"but the config needs {want.dtype}{list(want.shape)}"
        )
