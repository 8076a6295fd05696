"""Commands that run side by side, and end with the process that started them."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# What a command that is told to end may take, for a run saves its state then.
GRACE_S = 60


def _end(number: int, _frame: object) -> None:
    # Goes through the `finally` that ends the commands.
    sys.exit(128 + number)


def run_all(
    commands: dict[Path, list[str]],
    num_at_a_time: int,
    on_start: Callable[[Path], None],
    on_end: Callable[[Path, int], None],
) -> None:
    """Run commands, so many at a time, each with its output added to a log. However this ends, they have ended too.

    Args:
        commands: by the path of their log.
        on_start: called with the path of the log.
        on_end: called with the path of the log and the exit code.
    """
    waiting, running = list(commands), {}
    # Before any of them runs: a path may be too long, or not one to write to.
    for log in commands:
        log.parent.mkdir(parents=True, exist_ok=True)
    numbers = [signal.SIGINT, signal.SIGTERM]
    # What a terminal that closes sends; ignored under nohup.
    numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    handlers = {number: signal.signal(number, _end) for number in numbers}
    try:
        while waiting or running:
            while waiting and len(running) < num_at_a_time:
                log = waiting.pop(0)
                with log.open("ab") as output:
                    # Out of reach of Ctrl-C, which a terminal sends to all: a run that is asked twice ends unsaved.
                    running[log] = subprocess.Popen(
                        commands[log], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                    )
                on_start(log)
            ended = [log for log, child in running.items() if child.poll() is not None]
            for log in ended:
                on_end(log, running.pop(log).returncode)
            if not ended:
                time.sleep(0.1)
    finally:
        for child in running.values():
            child.terminate()
        try:
            for child in running.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(GRACE_S)
        finally:
            # Does nothing to those that have ended.
            for child in running.values():
                child.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
