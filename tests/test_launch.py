"""The scripts that start a run elsewhere, with stand-ins for the tools that they call: what those would be told."""

import os
import subprocess
import textwrap

import pytest

from tests.commands import ROOT

# What a user might pass: a value with a blank and one with a quotation mark.
FLAGS = ["--config=configs/smoke.py", "--config.log.sample_prompt=def f(", "--workdir=/shared/it's here"]


@pytest.fixture
def started(tmp_path):
    """Run a script; what each tool was called with, and the exit code."""

    def of(script, *arguments, codes=None):
        told = tmp_path / "told"
        for tool in ("srun", "scontrol", "xpk", "gcloud"):
            stand_in = tmp_path / "bin" / tool
            stand_in.parent.mkdir(exist_ok=True)
            stand_in.write_text(
                textwrap.dedent(f"""\
                #!/usr/bin/env bash
                printf '%s\\0' {tool} "$@" >> {told}
                printf '\\036' >> {told}
                exit {(codes or {}).get(tool, 0)}
            """)
            )
            stand_in.chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        done = subprocess.run([ROOT / "launch" / script, *arguments], env=environment, timeout=60, check=False)
        return [line.split("\0")[:-1] for line in told.read_text().split("\x1e")[:-1]], done.returncode

    return of


def through_a_shell(command):
    """The arguments that a shell on the other side makes of a command, after `train.py`."""
    asked = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    words = asked.stdout.split("\0")[:-1]
    return words[next(index for index, word in enumerate(words) if word.endswith("train.py")) + 1 :]


def test_slurm_passes_the_flags_and_requeues_a_run_that_was_asked_to_end(started):
    calls, code = started("slurm.sh", *FLAGS)
    assert code == 0 and len(calls) == 1
    assert calls[0][-len(FLAGS) - 2 :] == ["train.py", "--distributed=on", *FLAGS]
    calls, code = started("slurm.sh", *FLAGS, codes={"srun": 75})
    assert code == 75 and calls[-1] == ["scontrol", "requeue", "7"]
    calls, code = started("slurm.sh", *FLAGS, codes={"srun": 3})
    assert code == 3 and calls[-1][0] == "srun"


def test_xpk_is_told_the_command_and_when_to_start_it_again(started):
    calls, code = started("gke.sh", "a-cluster", "v5litepod-256", "2", "an/image", *FLAGS)
    assert code == 0 and len(calls) == 1
    tool, *words = calls[0]
    assert (tool, *words[:2]) == ("xpk", "workload", "create")
    options = dict(word.removeprefix("--").split("=", 1) for word in words[2:])
    assert options["cluster"] == "a-cluster" and options["num-slices"] == "2" and options["docker-image"] == "an/image"
    assert options["restart-on-exit-codes"] == "75"
    assert through_a_shell(options["command"]) == FLAGS


def test_all_workers_of_a_tpu_run_the_command(started):
    calls, code = started("tpu_vm.sh", "a-pod", "a-zone", *FLAGS)
    assert code == 0 and [call[4] for call in calls] == ["scp", "ssh", "ssh"]
    assert all("--worker=all" in call and "--zone=a-zone" in call for call in calls)
    command = calls[-1][-1].removeprefix("--command=").split("&&")[1]
    assert through_a_shell(command) == FLAGS
