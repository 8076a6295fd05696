"""The commands, as a user runs them: by subprocess, on small data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(devices=1):
    """Of a command that sees so many virtual devices; those of the tests themselves are eight."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags += f" --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200", "PYTHONUNBUFFERED": "1", "XLA_FLAGS": flags}


def run(*arguments, code=0, devices=1, env=None):
    """Run a command and return its stdout and stderr; its exit code must be `code`."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=env or environment(devices), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def train(workdir, *overrides, code=0, devices=1):
    """Without the sample at the end, which is a program of its own to compile."""
    flags = "--config=configs/smoke.py", f"--workdir={workdir}", "--config.log.sample_prompt=", *overrides
    return run("train.py", *flags, code=code, devices=devices)


def text_flags(tmp_path_factory):
    """A small folder of text, so that the commands spend their time on what is tested."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(40):
        (folder / f"{index}.py").write_text("".join(f"def f{i}(x):\n    return x + {i * index}\n" for i in range(40)))
    return [
        "--config.data.source=text",
        f"--config.data.path={folder}",
        "--config.data.eval_fraction=0.2",
        f"--config.data.cache_dir={tmp_path_factory.mktemp('cache')}",
    ]


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
