"""Where metrics go: metrics.jsonl and TensorBoard."""

import json
import time

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import Summary, scalar, text

from radialnet.files import finite
from radialnet.run_folder import RunFolder


class MetricsWriter:
    """Appends lines of figures to `metrics.jsonl` and their scalars to `tensorboard/`. A context manager.

    Both at once, and not by a thread: tensorboardX's `SummaryWriter` has one, which dies without a word when the disk
    is full, and then whoever writes waits for it for good.
    """

    def __init__(self, folder: RunFolder, resumed_step: int):
        """Open for appending; what was written of later steps than `resumed_step` is dropped.

        Of several processes the first one writes alone.
        """
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        folder.drop_metrics_after(resumed_step)
        self._file = folder.metrics.open("a")
        folder.tensorboard.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder.tensorboard / "events"))
        self._add(resumed_step + 1, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._writes:
            self._file.close()
            self._events.close()

    def write(self, line: dict, of_process: dict[str, float] | None = None) -> None:
        """Write one line. A figure that is not finite becomes null, for JSON has no NaN.

        Args:
            of_process: figures for TensorBoard alone. They are of the process and not of the run: the lines of a run
                that was stopped and went on are those of the run that was not.
        """
        if not self._writes:
            return
        line = {key: finite(value) for key, value in line.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        summary = Summary()
        for key, value in {**line, **(of_process or {})}.items():
            if isinstance(value, int | float) and key != "step":
                summary.MergeFrom(scalar(f"{line['split']}/{key}", value))
        self._add(line["step"], summary=summary)

    def write_text(self, name: str, content: str, step: int) -> None:
        if self._writes:
            self._add(step, summary=text(name, content))

    def _add(self, step: int, **what) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))
        self._events.flush()
