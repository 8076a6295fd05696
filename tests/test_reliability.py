"""Runs that are killed, asked to end, or whose checkpoints are broken, against the run that nothing happened to."""

import json
import shutil
import signal
import subprocess
import sys
import time

import filelock
import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from radialnet.checkpoint import Checkpoints
from radialnet.config import Config
from radialnet.data import prepare
from radialnet.run_folder import RunFolder, saved_steps
from tests.commands import ROOT, environment, lines_of, run, text_flags

TIMED = {"tokens_per_s", "step_ms", "mfu"}


@pytest.fixture(scope="module")
def steps(pytestconfig):
    return pytestconfig.getoption("--killed_steps")


@pytest.fixture(scope="module")
def flags(tmp_path_factory, pytestconfig, steps):
    config = pytestconfig.getoption("--killed_config")
    cache = f"--config.data.cache_dir={tmp_path_factory.mktemp('cache')}"
    is_small = config == "configs/smoke.py"
    return [
        "train.py",
        f"--config={config}",
        *(text_flags(tmp_path_factory) if is_small else [cache]),
        f"--config.train.num_steps={steps}",
        f"--config.eval.every_steps={steps // 2}",
        "--config.eval.num_batches=1",
        "--config.checkpoint.every_steps=2",
        # No multiple of the saves: a line's steps may be of two processes.
        f"--config.log.every_steps={3 if is_small else 1}",
        "--config.log.sample_prompt=",
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags):
    """The run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(*flags, f"--workdir={workdir}")
    return outcome(workdir)


@pytest.fixture(scope="module")
def half(tmp_path_factory, flags):
    """A run that was killed when it had saved twice."""
    workdir = tmp_path_factory.mktemp("runs") / "half"
    started = Started(flags, workdir)
    started.wait_for(lambda: len(saved_steps(workdir / "checkpoints")) == 2)
    started.send(signal.SIGKILL)
    return workdir


def outcome(workdir):
    """All that a run leaves: the lines of its metrics but for times, and what is in its newest checkpoint."""
    lines = [{key: value for key, value in line.items() if key not in TIMED} for line in lines_of(workdir)]
    (step, *_) = saved_steps(workdir / "checkpoints")
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.newest(report=print) == step
    return step, lines, arrays_of(workdir / "checkpoints" / str(step))


def arrays_of(folder):
    names = ("params", "controllers", "optimizer", "counts", "recent")
    found = ocp.load_checkpointables(folder, dict.fromkeys(names))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(found)}


def assert_same(workdir, whole):
    step, lines, arrays = outcome(workdir)
    assert step == whole[0]
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
            env=environment(),
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
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(tmp_path, flags, whole, pytestconfig):
    """At random moments: before anything was saved, in a save, in the steps after one, while it starts."""
    workdir, rng = tmp_path / "run", np.random.default_rng(0)
    folder, num_kills, num_in_saves, steps = workdir / "checkpoints", 0, 0, []
    while num_kills < pytestconfig.getoption("--kills"):
        saved, saving = saved_steps(folder)[:1], set(folder.glob("*tmp*"))
        if saved == [whole[0]]:
            break
        started = Started(flags, workdir)
        # The first time before anything is saved, then at each of three kinds of moments in turn.
        moments = {
            0: (lambda: (workdir / "config.json").exists(), 0.1),
            1: (lambda: saved_steps(folder)[:1] != saved, max(0.1, whole[0] / 15 - 0.5)),  # noqa: B023
            2: (lambda: set(folder.glob("*tmp*")) - saving, 0.3),  # noqa: B023
            3: (lambda: True, 8.0),
        }
        has_come, seconds = moments[num_kills and 1 + (num_kills - 1) % 3]
        started.wait_for(has_come)
        time.sleep(rng.uniform(0, seconds))
        code, stdout, stderr = started.send(signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), stdout + stderr
        num_kills += code != 0
        num_in_saves += bool(set(folder.glob("*tmp*")) - saving)
        steps += saved_steps(folder)[:1] or [0]
    print(f"{num_kills} kills, {num_in_saves} of them in saves; after them the newest steps saved were {steps}")
    assert num_kills >= 4 and num_in_saves and len(set(steps) - {0}) >= 2
    run(*flags, f"--workdir={workdir}")
    assert_same(workdir, whole)


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_saves_and_says_so(tmp_path, flags, whole):
    workdir = tmp_path / "run"
    for steps_done, number in enumerate((signal.SIGTERM, signal.SIGINT), start=1):
        started = Started(flags, workdir)
        # The step is being compiled.
        started.wait_for(lambda: "tokens to train on" in started.output())  # noqa: B023
        time.sleep(0.2)
        code, stderr = started.send(number)[::2]
        assert code == 75 and "Traceback" not in stderr
        assert f"{signal.Signals(number).name}: saved at step {steps_done} of {whole[0]}" in stderr
        assert saved_steps(workdir / "checkpoints")[0] == steps_done
        assert all(line["step"] <= steps_done for line in lines_of(workdir))
    run(*flags, f"--workdir={workdir}")
    assert_same(workdir, whole)


def test_a_second_signal_ends_at_once():
    script = """
import os, signal
from radialnet.preemption import Preemption
with Preemption() as preemption:
    assert preemption.asked() is None
    os.kill(os.getpid(), signal.SIGTERM)
    print(preemption.asked().name, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""
    stdout, _ = run("-c", script, code=-signal.SIGINT)
    assert stdout == "SIGTERM\n"


@pytest.mark.slow
def test_a_broken_checkpoint_costs_the_steps_after_the_one_before(tmp_path, flags, whole, half, pytestconfig):
    newest, older = saved_steps(half / "checkpoints")
    root = half / "checkpoints" / str(newest)
    files = sorted(path.relative_to(half) for path in root.rglob("*") if path.is_file())
    if not pytestconfig.getoption("--every_file"):
        files = [max(files, key=lambda file: (half / file).stat().st_size)]
    for number, file in enumerate(files):
        workdir = shutil.copytree(half, tmp_path / str(number))
        content = bytearray((workdir / file).read_bytes())
        if content:
            content[len(content) // 2] ^= 1
        (workdir / file).write_bytes(content or b"x")
        stdout, stderr = run(*flags, f"--workdir={workdir}")
        (warning,) = [line for line in stderr.splitlines() if "warning" in line]
        # A bit of the checksums may make another name of a file's.
        what = "is gone" if file.name == "checksums.json" and "is gone" in warning else "is not what was saved"
        assert f"{newest}: " in warning and f"{what}; step {older} is taken instead" in warning, file
        assert f"step {older} of {whole[0]}" in stdout
        assert_same(workdir, whole)
    print(f"{len(files)} files of step {newest}, a bit of one at a time: step {older} was taken, the end was the same")


# The commands of a shell in which the folder $1 is a file system of its own, for whoever may make one.
OWN_DISK = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-e", "-c"]


def has_own_disks():
    try:
        asked = subprocess.run([*OWN_DISK, "mount -t tmpfs none /mnt"], capture_output=True, check=False, timeout=30)
    except OSError:
        return False
    return asked.returncode == 0


needs_own_disks = pytest.mark.skipif(not has_own_disks(), reason="no user may mount a file system here")


def shell(script, *arguments):
    command = [*OWN_DISK, script, "sh", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


@needs_own_disks
@pytest.mark.slow
def test_a_disk_that_is_full_while_saving_loses_nothing(tmp_path, flags, whole):
    """Room for one checkpoint and not for two; then there is more room, and the same command goes on."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    script = """
        disk=$1 copy=$2; shift 2
        mount -t tmpfs -o size=1300k none $disk
        code=0; "$@" --workdir=$disk/run || code=$?
        test $code = 2
        ls $disk/run/checkpoints
        mount -o remount,size=100m $disk
        "$@" --workdir=$disk/run
        cp -r $disk/run $copy
        mount -o remount,ro $disk
        code=0; "$@" --workdir=$disk/run --config.train.num_steps=99 || code=$?
        test $code = 2
    """
    stdout, stderr = shell(script, disk, copy, sys.executable, *flags)
    full, read_only = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "can't be saved (No space left on device)" in full and "Traceback" not in stderr
    assert read_only.startswith(f"error: {disk}/run/") and read_only.endswith("Read-only file system")
    first = next(line for line in stdout.splitlines() if line.isdigit())
    assert f"step {first} of {whole[0]}" in stdout
    assert_same(copy, whole)


@needs_own_disks
def test_a_disk_that_is_full_while_tokenising_leaves_nothing_to_be_trusted(tmp_path, flags):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = """
        disk=$1; shift
        mount -t tmpfs -o size=40k none $disk
        code=0; "$@" --config.data.cache_dir=$disk/cache --workdir=$disk/run || code=$?
        test $code = 2
        find $disk -name index.json -o -name run
        mount -o remount,ro $disk
        code=0; "$@" --workdir=$disk/run || code=$?
        test $code = 2
    """
    stdout, stderr = shell(script, disk, sys.executable, *flags)
    full, read_only = stderr.splitlines()
    assert full.startswith(f"error: {disk}/cache: the tokenised documents can't be written")
    assert read_only == f"error: {disk}/run: Read-only file system"
    assert str(disk) not in stdout


def test_two_processes_do_not_train_in_one_folder(tmp_path, flags):
    workdir = tmp_path / "run"
    first = Started(flags, workdir)
    first.wait_for(lambda: "tokens to train on" in first.output())
    _, stderr = run(*flags, f"--workdir={workdir}", code=2)
    assert stderr == f"error: --workdir={workdir}: another process is training in it\n"
    # The lock goes with its process, however that ends.
    first.send(signal.SIGKILL)
    with filelock.FileLock(workdir / ".lock", timeout=0):
        pass


def test_updates_that_are_not_finite_can_be_seen_again(tmp_path, flags):
    """A learning rate that makes the parameters overflow: what the first step makes of them has no loss any more."""
    workdir = tmp_path / "run"
    overflow = ["--config.optimizer.learning_rate=1e38", "--config.train.max_skipped_steps=3"]
    saves = "--config.checkpoint.every_steps=1"
    _, stderr = run(*flags, *overflow, saves, f"--workdir={workdir}", code=3)
    report = json.loads((workdir / "non_finite" / "report.json").read_text())
    assert "max_skipped_steps=3" in stderr and str(workdir / "non_finite" / "report.json") in stderr
    first = report["steps"][0]
    assert report["steps"] == [first, first + 1, first + 2] and report["seed"] == 0
    # Nothing was saved once training stood still, and what was saved before it is what they came from.
    assert saved_steps(workdir / "checkpoints")[0] == first + 1
    here, there = (
        arrays_of(workdir / part / str(step))
        for part, step in (("checkpoints", first), ("non_finite/checkpoints", first - 1))
    )
    for name, array in there.items():
        if "counts" not in name:
            np.testing.assert_array_equal(array, here[name], err_msg=name)
    # The rows by their numbers, read anew.
    config = Config.load(workdir / "config.json")
    rows = prepare(config, RunFolder(workdir)).train
    batches = np.load(workdir / "non_finite" / "batches.npz")
    for step in report["steps"]:
        want = np.stack([rows[row]["token"] for row in report["rows"][str(step)]])
        np.testing.assert_array_equal(batches[f"token_{step}"], want)
    again, stderr = run(*flags, *overflow, f"--workdir={workdir / 'non_finite'}", code=3)
    assert f"step {first - 1} of" in again
    repeated = json.loads((workdir / "non_finite" / "non_finite" / "report.json").read_text())
    assert (repeated["steps"], repeated["rows"]) == (report["steps"], report["rows"])


def test_an_alarm_ends_the_run_where_that_is_asked_for(tmp_path, flags):
    """All tokens leave as soon as they may, and nothing holds them: the layers of later steps are used by none."""
    collapse = ["--config.router.exit_bias_init=50", "--config.router.exit_bias_rate=0", "--config.log.every_steps=1"]
    schedule = ["--config.router.exit_warmup_steps=0", "--config.router.depth_ramp_steps=0"]
    _, stderr = run(*flags, *collapse, *schedule, "--config.log.alarms=stop", f"--workdir={tmp_path}", code=4)
    warning, error = stderr.splitlines()
    assert warning.startswith("warning: step 3: load_entropy: few layers are used")
    assert error.startswith("error: step 3: few layers are used") and "config.log.alarms='stop'" in error
    raised = [line["alarms"] for line in lines_of(tmp_path) if line["split"] == "train"]
    assert raised == [[], [], ["load_entropy"]], "three lines in a row make an alarm"


def test_a_standstill_is_told_with_all_stacks(tmp_path, flags):
    script = """
import sys, time
from radialnet import cli, train_loop, watchdog
watchdog.LEAST_SECONDS = 2.0
batches_from = train_loop.batches_from

def slow_disk(*arguments):
    for number, batch in enumerate(batches_from(*arguments)):
        if number == 11:
            time.sleep(6)
        yield batch

train_loop.batches_from = slow_disk
import train
sys.argv[0] = "train.py"
train.flags.mark_flag_as_required("config")
cli.run(train.main)
"""
    _, stderr = run("-c", script, *flags[1:], "--config.train.stall_factor=3", f"--workdir={tmp_path / 'run'}")
    assert stderr.count("no progress since step 11 began") == 1
    assert "in slow_disk" in stderr and "Thread" in stderr
