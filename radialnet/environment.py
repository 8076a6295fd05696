"""What a run was trained with: versions, devices, command. An entry of `environment.json` for each start of the run."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import jax

from radialnet.files import write_whole
from radialnet.run_folder import RunFolder
from radialnet.sharding import Parallel

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def record_start(folder: RunFolder, step: int, parallel: Parallel) -> None:
    """Add this process to the starts of a run, which goes on from a step; of several processes the first one calls."""
    starts = [*read_starts(folder), {"step": step, **_environment(), "mesh": str(parallel)}]
    write_whole(folder.environment, json.dumps(starts, indent=1) + "\n")


def read_starts(folder: RunFolder) -> list[dict]:
    """The starts of a run, the newest last; none of a run of before they were kept, or where the file is damaged."""
    try:
        starts = json.loads(folder.environment.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _environment() -> dict:
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "system": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
    }


def _commit() -> str | None:
    """The commit of this source, with "-dirty" where files were changed since; None where it is not in a repository."""
    root = Path(__file__).parents[1]
    # An installed package may lie in a repository of somebody else's.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
