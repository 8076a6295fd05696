"""Two processes, and meshes of other sizes, for what must work on all of them at once."""

import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from radialnet.checkpoint import Checkpoints
from radialnet.data import row_numbers
from radialnet.processes import join_processes
from radialnet.run_folder import saved_steps
from radialnet.sections import ConfigError
from radialnet.sharding import along, replicated
from tests.commands import ROOT, environment, lines_of, run, text_flags

STEPS = 40


class Pair:
    """Both processes, started."""

    def __init__(self, workdir, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [workdir.with_suffix(f".{process}") for process in (0, 1)]
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    ROOT / "tests" / "two_processes.py",
                    *map(str, (process, port, workdir, STEPS, *more)),
                ],
                env={**environment(), "PYTHONPATH": str(ROOT)},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for process, log in enumerate(self.logs)
        ]

    def wait_for(self, is_there):
        end = time.monotonic() + 120
        while not is_there():
            assert time.monotonic() < end, self.output()
            time.sleep(0.01)

    def output(self):
        return [log.read_text() for log in self.logs]

    def end(self):
        codes = [process.wait(timeout=120) for process in self.processes]
        return codes, self.output()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoints of a pair that nothing happened to."""
    workdir = tmp_path_factory.mktemp("pair") / "whole"
    codes, output = Pair(workdir).end()
    assert codes == [0, 0], output
    return workdir


def state_of(workdir, step):
    """In one process, on the first device."""
    like = {"state": {"w": jax.ShapeDtypeStruct((8, 3), jnp.float32), "norm": jax.ShapeDtypeStruct((), jnp.float32)}}
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.newest(report=print) == step
        return jax.tree.map(np.asarray, checkpoints.restore(step, like))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_step(tmp_path, whole, number):
    workdir = tmp_path / "pair"
    pair = Pair(workdir)
    pair.wait_for(lambda: all("from 0" in text for text in pair.output()))
    pair.wait_for(lambda: saved_steps(workdir))
    pair.processes[1].send_signal(number)
    codes, output = pair.end()
    assert codes == [75, 75], output
    step = saved_steps(workdir)[0]
    # It may be a step at which the clock saves, too.
    assert all(f"saved {step} {number.name}" in text for text in output)
    codes, output = Pair(workdir).end()
    assert codes == [0, 0] and all(f"from {step}" in text for text in output), output
    jax.tree.map(np.testing.assert_array_equal, state_of(workdir, STEPS), state_of(whole, STEPS))


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_from_the_same_step(tmp_path, whole):
    workdir = tmp_path / "pair"
    pair = Pair(workdir)
    pair.wait_for(lambda: saved_steps(workdir))
    pair.processes[1].kill()
    pair.processes[0].kill()
    pair.end()
    step = saved_steps(workdir)[0]
    assert 0 < step < STEPS
    codes, output = Pair(workdir).end()
    assert codes == [0, 0] and all(f"from {step}" in text for text in output), output
    jax.tree.map(np.testing.assert_array_equal, state_of(workdir, STEPS), state_of(whole, STEPS))


@pytest.mark.slow
def test_two_processes_find_a_broken_file_whoever_looks_at_it(tmp_path, whole):
    newest, older = saved_steps(whole)
    files = sorted(path.relative_to(whole) for path in (whole / str(newest)).rglob("*") if path.is_file())
    # The shares are the even ones and the odd ones.
    files = [(number % 2, file) for number, file in enumerate(files) if "checksums" not in file.name]
    shares = [next(file for share, file in files if share == want and (whole / file).stat().st_size) for want in (0, 1)]
    for number, file in enumerate(shares):
        workdir = shutil.copytree(whole, tmp_path / str(number))
        content = bytearray((workdir / file).read_bytes())
        content[len(content) // 2] ^= 1
        (workdir / file).write_bytes(content)
        codes, output = Pair(workdir).end()
        assert codes == [0, 0] and all(f"from {older}" in text for text in output), output
        assert sum("is not what was saved" in text for text in output) == 1
        assert sum("found it broken" in text for text in output) == 1
        jax.tree.map(np.testing.assert_array_equal, state_of(workdir, STEPS), state_of(whole, STEPS))


@pytest.mark.slow
def test_the_process_that_is_behind_is_named(tmp_path):
    codes, output = Pair(tmp_path / "pair", 20).end()
    assert codes == [0, 0], output
    assert "since step 21 began" in output[0] and "process 1 is behind, at step 20" in output[0]
    assert all(f"in {name}" in output[0] for name in ("main", "_watch")), "the stacks"


@pytest.mark.parametrize("given, message", [
    (("on", None, 2, 0), "--coordinator_address=None --num_processes=2 --process_id=0: all three are needed"),
    (("auto", "here", 2, 0), "--coordinator_address=here: host:port is needed"),
    (("auto", "here:abc", 2, 0), "--coordinator_address=here:abc: host:port is needed"),
    (("auto", "here:99999", 2, 0), "--coordinator_address=here:99999: host:port is needed"),
    (("auto", "here:9", 2, 2), "--process_id=2: a process of 0 to 1 is needed"),
    (("off", "here:9", 2, 1), "--distributed=off does not go with"),
])  # fmt: skip
def test_flags_that_cannot_find_other_processes(given, message):
    with pytest.raises(ConfigError, match=message):
        join_processes(*given)


# What a process runs in place of train.py: the same, and it tells which rows it read of which split.
READS = """
import json, sys
from pathlib import Path
import numpy as np
from radialnet import cli, data
read = []

class Told(data.PackedRows):
    splits = ["train", "eval"]

    def __init__(self, stream, seq_len):
        super().__init__(stream, seq_len)
        self.split = self.splits.pop(0)

    def __getitem__(self, row):
        read.append((self.split, int(row)))
        return super().__getitem__(row)

data.PackedRows = Told
import train
told, sys.argv[0] = sys.argv.pop(1), "train.py"
train.flags.mark_flag_as_required("config")
try:
    cli.run(train.main)
finally:
    Path(told).write_text(json.dumps(read))
"""
NUM_STEPS, ROWS, SEQ_LEN = 8, 4, smoke.get_config().train.seq_len


def both(workdir, commands, devices):
    """Exit codes and output of two processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = [f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}", "--num_processes=2", f"--workdir={workdir}"]
    processes = [
        subprocess.Popen(
            [sys.executable, *command, *job, f"--process_id={process}"],
            cwd=ROOT,
            env=environment(devices=devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process, command in enumerate(commands)
    ]
    output = [process.communicate(timeout=600)[0] for process in processes]
    return [process.returncode for process in processes], output


def test_processes_that_do_not_agree_are_told_on_what(tmp_path, tmp_path_factory):
    command = ["train.py", "--config=configs/smoke.py", *text_flags(tmp_path_factory)]
    commands = [[*command, f"--config.optimizer.learning_rate={rate}"] for rate in (0.1, 0.2)]
    codes, output = both(tmp_path / "run", commands, devices=1)
    assert codes == [2, 2], output
    for process in (0, 1):
        assert f"process {process}: waits for all 2 processes at 127.0.0.1:" in output[process]
        told = "error: config.optimizer.learning_rate: process 1 of the run has another than process 0"
        assert told in output[process].splitlines()
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory):
    """A run of two processes with two devices each, their layers and tokens all over them: its folder, the flags of its
    command, what the processes wrote, and the rows that they read.
    """
    workdir = tmp_path_factory.mktemp("pair") / "run"
    flags = [
        "--config=configs/smoke.py",
        *text_flags(tmp_path_factory),
        f"--config.train.num_steps={NUM_STEPS}",
        "--config.log.every_steps=1",
        "--config.checkpoint.every_steps=4",
    ]
    mesh = ["--config.mesh.pool=2", "--config.mesh.tensor=2", "--config.mesh.pool_dispatch=exchange"]
    told = [workdir.with_suffix(f".{process}.json") for process in (0, 1)]
    codes, output = both(workdir, [["-c", READS, path, *flags, *mesh] for path in told], devices=2)
    assert codes == [0, 0], output
    return workdir, flags, output, [json.loads(path.read_text()) for path in told]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, trained_by_two):
    """And a process with one device goes on with their run."""
    workdir, flags, output, _ = trained_by_two
    for process in (0, 1):
        told = (
            f"process {process} of 2: 2 of 4 cpu devices; mesh data=1 · fsdp=1 · pool=2 · tensor=2; pool dispatch exch"
        )
        assert output[process].count(told) == 1
    assert "held out" in output[0] and "held out" not in output[1], "the first one tells alone"
    assert "no sample, for the parameters lie on 4 devices" in output[0]
    flags = [*flags, "--config.log.sample_prompt="]
    run("train.py", *flags, f"--workdir={tmp_path / 'alone'}")
    went_on = shutil.copytree(workdir, tmp_path / "went_on")
    shutil.rmtree(went_on / "checkpoints" / str(NUM_STEPS))
    stdout, _ = run("train.py", *flags, f"--workdir={went_on}")
    assert f"step 4 of {NUM_STEPS} on 1 cpu" in stdout and "process 0" not in stdout
    alone = lines_of(tmp_path / "alone")
    assert [line["step"] for line in alone if line["split"] == "train"] == list(range(1, NUM_STEPS + 1))
    for other in (workdir, went_on):
        for line, want in zip(lines_of(other), alone, strict=True):
            assert line.keys() == want.keys() and line["split"] == want["split"]
            for name in ("loss", "depth", "grad_norm", "load_entropy", "exit_bias"):
                np.testing.assert_allclose(line[name], want[name], rtol=1e-4, err_msg=f"{want['step']} {name}")


@pytest.mark.slow
def test_each_process_reads_its_own_rows(trained_by_two):
    _, flags, _, read = trained_by_two
    cache = Path(next(flag for flag in flags if "cache_dir" in flag).split("=")[1])
    num_tokens = len(np.load(next(cache.glob("tokens-*/*-train-tokens.npy")), mmap_mode="r"))
    order = row_numbers(range(-(-(num_tokens - 1) // SEQ_LEN)), seed=0).batch(ROWS)
    for process, rows in enumerate(read):
        half = slice(process * ROWS // 2, (process + 1) * ROWS // 2)
        trained_on = Counter(row for split, row in rows if split == "train")
        # Some batches are read ahead.
        num_batches = trained_on.total() // (ROWS // 2) + 1
        batches = [np.asarray(order[step])[half].tolist() for step in range(num_batches)]
        assert Counter(itertools.chain(*batches[:NUM_STEPS])) <= trained_on <= Counter(itertools.chain(*batches))
    held_out = [{row for split, row in rows if split == "eval"} for rows in read]
    # Row 0 is looked at for its shape.
    assert len(held_out[1]) > 2 and held_out[0] & held_out[1] <= {0}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Saved by eight devices: an array split over them, and one that each of them has."""
    split = along("data", jax.devices())
    trees = {
        "params": {"w": jax.device_put(jnp.arange(240.0).reshape(24, 10) / 7, split)},
        "counts": jax.device_put(jnp.int32(7), replicated(split)),
    }
    folder = tmp_path_factory.mktemp("eight") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, trees)
    return folder, trees


@pytest.mark.parametrize("num_devices", [1, 3, 4, 8])
def test_what_eight_devices_saved_goes_to_any_other_mesh(eight, num_devices):
    folder, trees = eight
    split = along("other", jax.devices()[8 - num_devices :])
    like = {
        "params": {"w": jax.ShapeDtypeStruct((24, 10), jnp.float32, sharding=split)},
        "counts": jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(split)),
    }
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest(report=print) == 7
        found = checkpoints.restore(7, like)
        alone = checkpoints.restore(7, {"params": {"w": jax.ShapeDtypeStruct((24, 10), jnp.bfloat16)}})
    jax.tree.map(np.testing.assert_array_equal, found, trees)
    assert found["params"]["w"].sharding == split and len(found["params"]["w"].sharding.device_set) == num_devices
    # Some of the trees, as another dtype.
    want = np.asarray(trees["params"]["w"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(alone["params"]["w"]), want)
