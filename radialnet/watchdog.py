"""What tells that the process itself is in trouble: training stands still, or its memory grows and grows."""

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Iterator

import jax
import psutil
from jax._src import distributed  # The service has no public interface.

from radialnet.cli import warn

# However short the steps are, this long a wait is none: machines are shared, and disks spin up.
LEAST_SECONDS = 60.0
# Evaluation and saving have no usual time. What takes longer than this hangs.
PAUSE_SECONDS = 1800.0
# Steps whose time is remembered, and how many make a usual one.
_WINDOW, _LEAST_STEPS = 100, 5
# Looks at the memory before it counts as grown: until then evaluation and saving take theirs for the first time.
_FIRST_LOOKS = 10


class Watchdog:
    """Writes the stacks of all threads to stderr when no step has begun for `factor` times the median step.

    Once for each standstill; the run is left alone, for it may go on. Use as a context manager.
    """

    def __init__(self, factor: float):
        """Watch from the first steps on; 0: don't."""
        self._factor = factor
        self._seconds = collections.deque(maxlen=_WINDOW)
        self._step, self._since, self._limit = 0, None, PAUSE_SECONDS
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._factor:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()

    def begins(self, step: int) -> None:
        """A step is about to be dispatched. (A dispatch may wait for other processes.)"""
        now = time.monotonic()
        if self._since is not None:
            self._seconds.append(now - self._since)
        if len(self._seconds) >= _LEAST_STEPS:
            self._limit = max(LEAST_SECONDS, self._factor * statistics.median(self._seconds))
        self._step, self._since = step, now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Something else than steps is done for a while."""
        limit, self._limit = self._limit, PAUSE_SECONDS
        self._since = time.monotonic()
        try:
            yield
        finally:
            # In this order, so that the pause is never held against the limit of a step. Its time is none of a step.
            self._since = None
            self._limit = limit

    def _watch(self) -> None:
        told = None
        while not self._end.wait(1.0):
            _tell(self._step)
            limit, since = self._limit, self._since
            if since is None or since == told or time.monotonic() - since < limit:
                continue
            told = since
            seconds = time.monotonic() - since
            warn(f"no progress since step {self._step} began {seconds:.0f} s ago{_behind()}; what each thread does:")
            faulthandler.dump_traceback(sys.stderr, all_threads=True)


# What the processes of a run tell each other, through the service that they found each other by: it answers while all
# devices wait for a step.
_STEPS = "radialnet/step"


def _tell(step: int) -> None:
    # A service that is gone went with its process, and the run goes with it: nothing for a watchdog to die of.
    if jax.process_count() == 1:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.key_value_set(
            f"{_STEPS}/{jax.process_index()}", str(step), allow_overwrite=True
        )


def _behind() -> str:
    """Which processes have begun fewer steps than others."""
    if jax.process_count() == 1:
        return ""
    try:
        told = distributed.global_state.client.key_value_dir_get(f"{_STEPS}/")
    except jax.errors.JaxRuntimeError as error:
        return f"; the other processes can't be asked ({error})"
    steps = {int(key.rsplit("/", 1)[1]): int(step) for key, step in told}
    behind = sorted(process for process, step in steps.items() if step < max(steps.values()))
    if not behind:
        return f"; all {jax.process_count()} processes are there"
    return f"; process {', '.join(map(str, behind))} is behind, at step {min(steps.values())}"


class MemoryWatch:
    """Tells when the memory has doubled since it last did; by less than a GB is no growth."""

    def __init__(self):
        self._num_looks, self._before = 0, 0.0

    def look(self) -> tuple[float, str | None]:
        """The GB in use now, of the devices where they tell and of the process elsewhere; and the alarm, if any."""
        stats = [device.memory_stats() for device in jax.local_devices()]
        if all(stats):
            now = max(found["bytes_in_use"] for found in stats) / 1e9
        else:
            now = psutil.Process().memory_info().rss / 1e9
        before, self._num_looks = self._before, self._num_looks + 1
        if self._num_looks <= _FIRST_LOOKS:
            self._before = max(now, before)
            return now, None
        if now < 2 * before or now - before < 1:
            return now, None
        self._before = now
        return now, f"memory grows: {now:.1f} GB, {before:.1f} before"
