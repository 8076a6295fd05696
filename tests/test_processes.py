"""Two processes, and meshes of other sizes, for what must work on all of them at once."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet.checkpoint import Checkpoints
from radialnet.run_folder import saved_steps
from radialnet.sharding import along, replicated
from tests.test_cli import ROOT

STEPS = 40


class Pair:
    """Both processes, started."""

    def __init__(self, workdir, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [workdir.with_suffix(f".{process}") for process in (0, 1)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        # The tests' own devices are not those of the pair.
        environment.pop("XLA_FLAGS", None)
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    ROOT / "tests" / "two_processes.py",
                    *map(str, (process, port, workdir, STEPS, *more)),
                ],
                env=environment,
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
    assert step % 10 and all(f"saved {step} {number.name}" in text for text in output), "between the saves by the clock"
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
