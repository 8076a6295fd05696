"""Where metrics go: metrics.jsonl, and what `log.writers` names besides.

metrics.jsonl is the truth, and what can't be written to it ends the run. The others get the same lines on threads of
their own that nothing waits for: a network that is away, a full disk or a library that raises costs a warning and no
training. (tensorboardX's own `SummaryWriter` has a thread that dies without a word when the disk is full, and then
whoever writes waits for it for good.)
"""

import json
import queue
import threading
import time

import jax

from radialnet.cli import warn
from radialnet.config import Config
from radialnet.files import finite
from radialnet.run_folder import RunFolder
from radialnet.trackers import TRACKERS, Tracker, make_identity

# What trackers may still take at the end of a run, to send what they have.
CLOSE_SECONDS = 30.0


class MetricsWriter:
    """Appends lines of figures to `metrics.jsonl` and hands them to the trackers. A context manager."""

    def __init__(self, folder: RunFolder, config: Config, resumed_step: int):
        """Open for appending; what was written of later steps than `resumed_step` is dropped.

        Of several processes the first one writes alone.
        """
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        folder.drop_metrics_after(resumed_step)
        self._file = folder.metrics.open("a")
        names = dict.fromkeys(config.log.writer_names)
        make_identity(folder, config)
        self._threads = [_TrackerThread(TRACKERS[name], folder, config, resumed_step) for name in names]
        # A tracker that was away, or is new, gets what it lacks of the curves.
        for line in folder.read_metrics():
            self._tell("write", line, {})

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if not self._writes:
            return
        self._file.close()
        self._tell("close", kind is not None)
        until = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.wait(until)

    def write(self, line: dict, of_process: dict[str, float] | None = None) -> None:
        """Write one line. A figure that is not finite becomes null, for JSON has no NaN.

        Args:
            of_process: figures for the trackers alone. They are of the process and not of the run: the lines of a run
                that was stopped and went on are those of the run that was not.
        """
        if not self._writes:
            return
        line = {key: finite(value) for key, value in line.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._tell("write", line, of_process or {})

    def write_text(self, name: str, content: str, step: int) -> None:
        if self._writes:
            self._tell("write_text", name, content, step)

    def _tell(self, method: str, *arguments) -> None:
        for thread in self._threads:
            thread.tell(method, *arguments)


class _TrackerThread:
    """A tracker on a thread of its own, from its opening to its end. One that fails is told of once and left."""

    def __init__(self, kind: type[Tracker], folder: RunFolder, config: Config, resumed_step: int):
        self._name, self._calls = kind.NAME, queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(kind, folder, config, resumed_step), name=self._name, daemon=True
        )
        self._thread.start()

    def tell(self, method: str, *arguments) -> None:
        if self._thread.is_alive():
            self._calls.put((method, arguments))

    def wait(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            warn(f"config.log.writers: {self._name} does not come to an end; what it has not sent yet may be lost")

    def _run(self, kind: type[Tracker], *arguments) -> None:
        try:
            tracker, method = kind(*arguments), ""
            while method != "close":
                method, given = self._calls.get()
                getattr(tracker, method)(*given)
        except Exception as error:
            told = " ".join(str(error).split()) or type(error).__name__
            warn(f"config.log.writers: {self._name} fails ({told}); the run goes on without it")
