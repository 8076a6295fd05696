"""An XProf trace of some training steps."""

from pathlib import Path

import jax


class StepProfile:
    """Traces the training steps from the first to the last one, and nothing before or after them. A context manager.

    The trace goes to `folder` in the layout of TensorBoard's profile plugin. Of several processes the first one traces
    alone. A run that goes on after the first of the steps traces none; one that ends among them leaves those it did.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._is_on = folder, False
        self._first, self._last = steps if steps and jax.process_index() == 0 else (0, 0)

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, *_) -> None:
        if self._is_on:
            self.stop()

    def begins_at(self, step: int) -> bool:
        """Whether the trace begins with a step; `start` it when the steps before are done."""
        return step == self._first

    def ends_at(self, step: int) -> bool:
        """Whether it ends with a step; `stop` it when that is done."""
        return self._is_on and step == self._last

    def start(self) -> None:
        jax.profiler.start_trace(self._folder)
        self._is_on = True

    def stop(self) -> None:
        self._is_on = False
        jax.profiler.stop_trace()
