"""Where metrics go: metrics.jsonl and TensorBoard."""

import json

import tensorboardX

from radialnet.files import finite
from radialnet.run_folder import RunFolder


class MetricsWriter:
    """Appends lines of figures to `metrics.jsonl` and their scalars to `tensorboard/`. A context manager."""

    def __init__(self, folder: RunFolder, resumed_step: int):
        """Open for appending; what was written of later steps than `resumed_step` is dropped."""
        folder.drop_metrics_after(resumed_step)
        self._file = folder.metrics.open("a")
        self._tensorboard = tensorboardX.SummaryWriter(str(folder.tensorboard), purge_step=resumed_step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._tensorboard.close()

    def write(self, line: dict, of_process: dict[str, float] | None = None) -> None:
        """Write one line. A figure that is not finite becomes null, for JSON has no NaN.

        Args:
            of_process: figures for TensorBoard alone. They are of the process and not of the run: the lines of a run
                that was stopped and went on are those of the run that was not.
        """
        line = {key: finite(value) for key, value in line.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in {**line, **(of_process or {})}.items():
            if isinstance(value, int | float) and key != "step":
                self._tensorboard.add_scalar(f"{line['split']}/{key}", value, line["step"])

    def write_text(self, name: str, text: str, step: int) -> None:
        self._tensorboard.add_text(name, text, step)
