"""A run's folder: what lies where in it, and the lines of its metrics."""

import dataclasses
import json
from pathlib import Path

from radialnet.files import write_whole
from radialnet.sections import ConfigError

# The checksums of the files beside it, written when all of them are on disk: what makes a checkpoint count.
CHECKSUMS = "checksums.json"


def saved_steps(folder: Path) -> list[int]:
    """The steps whose save was finished, the newest first; whether they are still whole is not looked at."""
    return [step for step in steps_in(folder) if (folder / str(step) / CHECKSUMS).exists()]


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a step to go on from, or was one before it broke."""
    return bool(saved_steps(folder)) or any(is_committed(folder / str(step)) for step in steps_in(folder))


def is_committed(folder: Path) -> bool:
    """Whether Orbax wrote all of a step; without checksums it is of a run of before there were any, or a kill came."""
    return (folder / "commit_success.txt").exists()


def steps_in(folder: Path) -> list[int]:
    """The steps that there is anything of, the newest first."""
    found = (path for path in folder.glob("[0-9]*") if path.name.isascii() and path.name.isdigit() and path.is_dir())
    # Not every name of digits is that of a step.
    return sorted({int(path.name) for path in found if path.name == str(int(path.name))}, reverse=True)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def non_finite(self) -> Path:
        return self.root / "non_finite"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def tracking(self) -> Path:
        return self.root / "tracking.json"

    @property
    def profile(self) -> Path:
        return self.root / "profile"

    def has_checkpoint(self) -> bool:
        return has_checkpoint(self.checkpoints)

    def write_manifest(self, manifest: dict) -> None:
        """Write the manifest of the corpus, whole or not at all."""
        write_whole(self.manifest, json.dumps(manifest, indent=1) + "\n")

    def read_metrics(self) -> list[dict]:
        """The lines of metrics.jsonl; a last line that a kill cut short is left out. Raises ConfigError."""
        if not self.metrics.exists():
            return []
        lines = []
        # Without its newline the last line is not whole.
        for number, text in enumerate(self.metrics.read_bytes().split(b"\n")[:-1], start=1):
            try:
                line = json.loads(text)
                lines.append({**line, "step": int(line["step"]), "split": str(line["split"])})
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                told = "not a JSON object with a 'step' and a 'split'"
                raise ConfigError(f"{self.metrics}, line {number}: {told}") from None
        return lines

    def drop_metrics_after(self, step: int) -> None:
        """Forget the lines of steps that will be done again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_whole(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
