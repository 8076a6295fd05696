"""Runs that are killed, asked to end, or whose checkpoints are broken, against the run that nothing happened to."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from radialnet.checkpoint import Checkpoints
from radialnet.run_folder import saved_steps
from tests.test_cli import ROOT, lines_of, run, text_flags

STEPS = 12
TIMED = {"tokens_per_s", "step_ms", "mfu"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return [
        "train.py",
        "--config=configs/smoke.py",
        *text_flags(tmp_path_factory),
        f"--config.train.num_steps={STEPS}",
        "--config.eval.every_steps=6",
        "--config.eval.num_batches=1",
        "--config.checkpoint.every_steps=2",
        # No multiple of the saves: a line's steps may be of two processes.
        "--config.log.every_steps=3",
        "--config.log.sample_prompt=",
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags):
    """The run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(*flags, f"--workdir={workdir}")
    return outcome(workdir)


def outcome(workdir):
    """All that a run leaves: the lines of its metrics but for times, and what is in its newest checkpoint."""
    lines = [{key: value for key, value in line.items() if key not in TIMED} for line in lines_of(workdir)]
    (step, *_) = saved_steps(workdir / "checkpoints")
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.newest(report=print) == step
    return step, lines, arrays_of(workdir / "checkpoints" / str(step))


def arrays_of(folder):
    names = ("params", "controllers", "optimizer", "counts")
    found = ocp.load_checkpointables(folder, dict.fromkeys(names))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(found)}


def assert_same(workdir, whole):
    step, lines, arrays = outcome(workdir)
    assert step == whole[0] == STEPS
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in whole[1]]
    assert lines == whole[1]
    assert arrays.keys() == whole[2].keys() and len(arrays) > 30
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, whole[2][name], err_msg=name)


class Started:
    """A run in the background, and how far it is."""

    def __init__(self, flags, workdir):
        self.log = workdir.with_suffix(".log")
        self.process = subprocess.Popen(
            [sys.executable, *flags, f"--workdir={workdir}"],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
            stdout=self.log.open("w"),
            stderr=subprocess.PIPE,
            text=True,
        )

    def output(self):
        return self.log.read_text()

    def wait_for(self, is_there, seconds=300):
        end = time.monotonic() + seconds
        while not is_there():
            assert self.process.poll() is None, self.output() + self.process.stderr.read()
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.01)

    def send(self, number):
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=300)
        return self.process.returncode, self.output(), stderr


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(tmp_path, flags, whole):
    """At moments from the start of a save to the steps after it, and once before anything was saved."""
    workdir, rng = tmp_path / "run", np.random.default_rng(0)
    folder, num_after_saves = workdir / "checkpoints", 0
    for kill in range(5):
        before = saved_steps(folder)[:1], set(folder.glob("*tmp*"))
        if before[0] == [STEPS]:
            break
        started = Started(flags, workdir)
        if kill:
            started.wait_for(lambda: (saved_steps(folder)[:1], set(folder.glob("*tmp*"))) != before)  # noqa: B023
        else:
            started.wait_for(lambda: (workdir / "config.json").exists())
        time.sleep(rng.uniform(0, 0.1))
        code, stdout, stderr = started.send(signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), stdout + stderr
        num_after_saves += bool(kill) and code != 0
    assert num_after_saves >= 2
    run(*flags, f"--workdir={workdir}")
    assert_same(workdir, whole)


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_saves_and_says_so(tmp_path, flags, whole):
    workdir = tmp_path / "run"
    for steps_done, number in enumerate((signal.SIGTERM, signal.SIGINT), start=1):
        started = Started(flags, workdir)
        # The step is being compiled.
        started.wait_for(lambda: "training tokens" in started.output())  # noqa: B023
        time.sleep(0.2)
        code, stderr = started.send(number)[::2]
        assert code == 75 and "Traceback" not in stderr
        assert f"{signal.Signals(number).name}: saved at step {steps_done} of {STEPS}" in stderr
        assert saved_steps(workdir / "checkpoints")[0] == steps_done
        assert all(line["step"] <= steps_done for line in lines_of(workdir))
    run(*flags, f"--workdir={workdir}")
    assert_same(workdir, whole)


def test_a_broken_checkpoint_costs_the_steps_after_the_one_before(tmp_path, flags, whole):
    workdir = tmp_path / "run"
    # The same schedules as the whole run's: killed, in place of a smaller number of steps.
    started = Started(flags, workdir)
    started.wait_for(lambda: len(saved_steps(workdir / "checkpoints")) == 2)
    started.send(signal.SIGKILL)
    newest, older = saved_steps(workdir / "checkpoints")
    path = max((workdir / "checkpoints" / str(newest)).rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    stdout, stderr = run(*flags, f"--workdir={workdir}")
    (warning,) = [line for line in stderr.splitlines() if "warning" in line]
    assert f"{newest}: " in warning and f"is not what was saved; step {older} is taken instead" in warning
    assert f"step {older} of {STEPS}" in stdout
    assert_same(workdir, whole)
