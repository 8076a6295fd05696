"""What shows the curves of a run: TensorBoard, Weights & Biases, trackio. All optional but the first.

Each of them is told every line of metrics.jsonl and skips what it has already. So a run that goes on goes on in the
same curve, steps that are done again are not drawn twice, and a service that was away for a while catches up.
"""

import html
import importlib
import json
import time
import uuid
from typing import Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import Summary, scalar, text

from radialnet.config import Config
from radialnet.files import write_whole
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError

# What W&B may take to begin, and to send the rest at the end, which lies on the disk as well (`wandb sync`).
WANDB_SECONDS = 20.0


class Tracker(Protocol):
    """Opened for a run that goes on after `resumed_step`; every method may raise what it likes."""

    NAME: str

    def __init__(self, folder: RunFolder, config: Config, resumed_step: int): ...

    def write(self, line: dict, of_process: dict[str, float]) -> None:
        """A line of metrics.jsonl, and figures besides."""

    def write_text(self, name: str, content: str, step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_trackers(folder: RunFolder, config: Config) -> None:
    """Whether the libraries of `log.writers` are there, and the names in the run's folder can be read.

    Raises:
        ConfigError: they aren't.
    """
    for name in _hosted(config):
        try:
            importlib.import_module(name)
        except ImportError as error:
            told = f"pip install -r requirements-tracking.txt ({error})"
            raise ConfigError(f"config.log.writers={config.log.writers!r}: {name} can't be imported; {told}") from None
    if _hosted(config) and folder.tracking.exists():
        _read_identity(folder)


def make_identity(folder: RunFolder, config: Config) -> None:
    """Give the run an `id` and a `name` to be found by where it is tracked, if it needs them and has none."""
    if _hosted(config) and not folder.tracking.exists():
        made = {"id": uuid.uuid4().hex[:12], "name": folder.root.resolve().name}
        write_whole(folder.tracking, json.dumps(made) + "\n")


def _hosted(config: Config) -> list[str]:
    return [name for name in config.log.writer_names if name != TensorBoard.NAME]


def _read_identity(folder: RunFolder) -> dict:
    try:
        identity = json.loads(folder.tracking.read_text())
        return {**identity, "id": str(identity["id"]), "name": str(identity["name"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        told = "not a JSON object with an 'id' and a 'name'; without the file the run gets new curves"
        raise ConfigError(f"{folder.tracking}: {told}") from None


def scalars(line: dict, of_process: dict[str, float]) -> dict[str, float]:
    """The figures of a line that are numbers, by `split/key`."""
    numbers = {key: value for key, value in {**line, **of_process}.items() if isinstance(value, int | float)}
    return {f"{line['split']}/{key}": value for key, value in numbers.items() if key != "step"}


class TensorBoard:
    """Event files in `tensorboard/`, each of which hides what an earlier one has of the steps after its begin."""

    NAME = "tensorboard"

    def __init__(self, folder: RunFolder, config: Config, resumed_step: int):
        folder.tensorboard.mkdir(exist_ok=True)
        # Files of one second have one name, and the later one would take the place of the earlier.
        self._events = EventsWriter(str(folder.tensorboard / "events"), f".{resumed_step}")
        self._resumed_step = resumed_step
        self._add(resumed_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, line: dict, of_process: dict[str, float]) -> None:
        if line["step"] <= self._resumed_step:
            return
        summary = Summary()
        for name, value in scalars(line, of_process).items():
            summary.MergeFrom(scalar(name, value))
        self._add(line["step"], summary=summary)

    def write_text(self, name: str, content: str, step: int) -> None:
        self._add(step, summary=text(name, content))

    def close(self, failed: bool) -> None:
        self._events.close()

    def _add(self, step: int, **what) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))
        self._events.flush()


class Wandb:
    """Weights & Biases; its files lie in `wandb/`.

    A row for each line. W&B's own step must grow with every row, which lines of one step and steps that are done again
    don't; so the training step is a figure, `step`, which all others are drawn over. Online, the service tells a run
    that goes on what its last lines were. Offline nobody does, and each start gets a whole curve of its own: what
    `wandb sync` uploads replaces what was uploaded under the same id before.
    """

    NAME = "wandb"

    def __init__(self, folder: RunFolder, config: Config, resumed_step: int):
        import wandb

        run = _read_identity(folder)
        # What is printed is not captured, for whoever prints waits for that; nor does the process wait for ever to end.
        settings = wandb.Settings(console="off", init_timeout=WANDB_SECONDS, finish_timeout=WANDB_SECONDS)
        self._html, self._last = wandb.Html, {}
        self._run = wandb.init(
            project=config.log.project,
            id=run["id"],
            name=run["name"],
            dir=folder.root,
            config=config.to_dict(),
            resume="allow",
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, line: dict, of_process: dict[str, float]) -> None:
        split, step = line["split"], line["step"]
        if split not in self._last:
            self._last[split] = self._run.summary.get(f"{split}/step") or 0
        if step > self._last[split]:
            self._run.log({"step": step, f"{split}/step": step, **scalars(line, of_process)})

    def write_text(self, name: str, content: str, step: int) -> None:
        self._run.log({"step": step, name: self._html(f"<pre>{html.escape(content)}</pre>")})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """trackio, which keeps its curves on this machine (`TRACKIO_DIR`).

    It finds a run again by its name. What a Space or a server has (`TRACKIO_SPACE_ID`) it doesn't tell, so the last
    steps that it was told stand in the run's folder. On this machine what it has is looked up: it writes twice a
    second, and a kill may have cost it the last lines that it was told.
    """

    NAME = "trackio"

    def __init__(self, folder: RunFolder, config: Config, resumed_step: int):
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        run = _read_identity(folder)
        self._markdown, self._path, self._identity = trackio.Markdown, folder.tracking, run
        self._last = run.setdefault("trackio", {})
        self._run = trackio.init(
            project=config.log.project,
            name=f"{run['name']}-{run['id']}",
            config=config.to_dict(),
            resume="allow",
            embed=False,
        )
        rows = SQLiteStorage.get_logs(config.log.project, self._run.name, run_id=self._run.id)
        for split in self._last if rows else ():
            self._last[split] = max((row["step"] for row in rows if f"{split}/step" in row), default=0)

    def write(self, line: dict, of_process: dict[str, float]) -> None:
        split, step = line["split"], line["step"]
        if step > self._last.get(split, 0):
            self._run.log({f"{split}/step": step, **scalars(line, of_process)}, step=step)
            self._last[split] = step
            write_whole(self._path, json.dumps(self._identity) + "\n")

    def write_text(self, name: str, content: str, step: int) -> None:
        self._run.log({name: self._markdown(f"```\n{content}\n```")}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


TRACKERS = {kind.NAME: kind for kind in (TensorBoard, Wandb, Trackio)}
