"""What a person sees of a run while it goes on, and the time that its steps take."""

import contextlib
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress


class Clock:
    """Seconds since the last line of metrics, pauses for evaluation and saving left out."""

    def __init__(self, seconds: float = 0.0):
        """With the seconds that have passed already, before the run went on."""
        self._start, self._paused = time.perf_counter(), -seconds

    def restart(self) -> None:
        self._start, self._paused = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._paused


@contextlib.contextmanager
def counted(console: rich.console.Console) -> Iterator[Callable[[str, int, int], None]]:
    """Live bars of work that takes its time, by a function of (what, done, total); where there is no terminal, a line
    when there is something to do."""
    columns = rich.progress
    bar = columns.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(),
        columns.MofNCompleteColumn(),
        columns.TimeElapsedColumn(),
        columns.TextColumn("ETA"),
        columns.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks and done < total:
            tasks[what] = bar.add_task(what, total=total)
            if not console.is_terminal:
                console.print(f"{what}: {done:,} of {total:,} are there")
        if what in tasks:
            bar.update(tasks[what], completed=done)

    with bar:
        yield report


class Progress:
    """A live bar with ETA on a terminal; elsewhere a line at every evaluation and at every tenth of the run."""

    def __init__(self, console: rich.console.Console, step: int, num_steps: int):
        self._console, self._num_steps, self._printed_tenth = console, num_steps, None
        columns = rich.progress
        self._bar = columns.Progress(
            columns.TextColumn("step {task.completed}/{task.total}"),
            columns.BarColumn(),
            columns.TextColumn("{task.description}"),
            columns.TimeElapsedColumn(),
            columns.TextColumn("ETA"),
            columns.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=step)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def move(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def show(self, line: dict) -> None:
        """Show the figures of a line of metrics."""
        step = line["step"]
        text = f"bpb {line['bpb']:.3f}  depth {line['depth']:.2f}  {line['tokens_per_s']:,.0f} tok/s"
        if line["split"] == "eval":
            self._console.print(f"step {step}  held out: {text}")
            return
        self._bar.update(self._task, description=text)
        tenth = 10 * step // self._num_steps
        if not self._console.is_terminal and tenth != self._printed_tenth:
            self._printed_tenth = tenth
            self._console.print(f"step {step}  training: {text}")
            # Not only when the buffer of a pipe or a file is full.
            self._console.file.flush()
