"""Commands side by side, and how they end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from radialnet.jobs import run_all
from tests.commands import ROOT


def test_nothing_runs_when_a_folder_can_not_be_made(tmp_path):
    logs = [tmp_path / "a" / "log", tmp_path / ("b" * 300) / "log"]
    started = []
    with pytest.raises(OSError, match="too long"):
        run_all({log: [sys.executable, "-c", ""] for log in logs}, 1, started.append, lambda *_: None)
    assert not started


def test_jobs_run_side_by_side_and_no_more_than_asked_for(tmp_path):
    """Each program notes when it starts and ends."""
    program = "import time; print(time.time(), 1); time.sleep(0.5); print(time.time(), -1)"
    logs = [tmp_path / str(index) / "log" for index in range(5)]
    ended = []
    run_all({log: [sys.executable, "-c", program] for log in logs}, 2, lambda _: None, lambda *end: ended.append(end))
    assert sorted(ended) == [(log, 0) for log in logs]
    events = sorted(tuple(map(float, line.split())) for log in logs for line in log.read_text().splitlines())
    running = [sum(change for _, change in events[: index + 1]) for index in range(len(events))]
    assert max(running) == 2


def test_what_runs_is_ended_when_something_goes_wrong(tmp_path):
    log = tmp_path / "a" / "log"
    sleeps = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    # Ends when the other one is up.
    waits = f"import os, sys, time\nwhile not os.path.getsize({str(log)!r}): time.sleep(0.05)\nsys.exit(5)"
    commands = {log: [sys.executable, "-c", sleeps], tmp_path / "b" / "log": [sys.executable, "-c", waits]}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def fail(log, code):
        raise KeyError(code)

    with pytest.raises(KeyError, match="5"):
        run_all(commands, 2, lambda _: None, fail)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_ends_them(tmp_path):
    """Each writes its process id; none must be alive after the process that started them was told to end."""
    program = (
        "import signal, sys; from pathlib import Path; from radialnet.jobs import run_all\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "logs = [Path(sys.argv[1], name, 'log') for name in 'ab']\n"
        "run_all({log: [sys.executable, '-c', child] for log in logs}, 2, lambda _: None, lambda *_: None)"
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        folder = tmp_path / number.name
        logs = [folder / name / "log" for name in "ab"]
        parent = subprocess.Popen([sys.executable, "-c", program, str(folder)], cwd=ROOT)
        deadline = time.monotonic() + 60
        while not all(log.exists() and log.read_text().endswith("\n") for log in logs):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        parent.send_signal(number)
        assert parent.wait(30) == 128 + number
        for log in logs:
            with pytest.raises(ProcessLookupError):
                os.kill(int(log.read_text()), 0)
