"""The lines of metrics.jsonl that a run writes while it trains, and the alarms that they raise."""

import collections

import jax
import numpy as np

from radialnet.alarms import HISTORY, alarms
from radialnet.cli import AlarmError, NonFiniteError, warn
from radialnet.config import Config
from radialnet.cost import PEAK_FLOPS, flops_per_token, rate
from radialnet.files import finite
from radialnet.metrics import BatchSums, add, figures
from radialnet.progress import Clock, Progress
from radialnet.watchdog import MemoryWatch
from radialnet.writers import MetricsWriter


class TrainLog:
    """Sums up steps and writes their lines, each after the next step was dispatched, so that the device never waits."""

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        writer: MetricsWriter,
        progress: Progress,
        no_sums: BatchSums,
        window: dict,
        before: list[dict],
        num_devices: int = 1,
    ):
        """
        Args:
            no_sums: zeros.
            window: what another process had summed up since its last line.
            before: the lines of metrics.jsonl so far.
        """
        self.clock = Clock(float(window["seconds"]))
        self._config, self._vocab_size, self._writer, self._progress = config, vocab_size, writer, progress
        self._num_devices = num_devices
        self._no_sums, self._sums, self._num_steps = no_sums, window["sums"], int(window["num_steps"])
        self._lines = collections.deque((line for line in before if line["split"] == "train"), HISTORY)
        self._alarms = alarms(config, list(self._lines)) if config.log.alarms != "off" else {}
        self._memory = MemoryWatch()
        self._pending = None

    def window(self) -> dict:
        """What was summed up since the last line, for a checkpoint. No line may be due."""
        assert self._pending is None
        seconds = np.float32(self.clock.seconds())
        return {"sums": self._sums, "num_steps": np.int32(self._num_steps), "seconds": seconds}

    def add(self, step: int, sums: BatchSums, scalars: dict[str, jax.Array]) -> None:
        """Add the step that was just dispatched; write the line of the step before if one is due.

        Raises:
            NonFiniteError, AlarmError: as `flush`.
        """
        self.flush()
        self._sums = add(self._sums, sums)
        self._num_steps += 1
        self._progress.move(step)
        if step == self._config.train.num_steps or step % self._config.log.every_steps == 0:
            self._pending = (step, self._sums, scalars, self._num_steps)
            self._sums, self._num_steps = self._no_sums, 0

    def flush(self) -> None:
        """Write the line that is due, if any. Waits for its steps.

        Raises:
            NonFiniteError: the last `train.max_skipped_steps` updates were not finite.
            AlarmError: an alarm was raised, and `log.alarms` says to stop.
        """
        if self._pending is None:
            return
        step, sums, scalars, num_steps = self._pending
        self._pending = None
        # The figures wait for the device; only then are the seconds those of the steps.
        found = figures(sums)
        seconds = self.clock.seconds()
        self.clock.restart()
        took = float(sums.routing.num_tokens), seconds, num_steps, self._num_devices
        line = line_of(self._config, self._vocab_size, step, "train", found, scalars, *took)
        memory_gb, growth = self._memory.look()
        before, raised = self._alarms, {}
        if self._config.log.alarms != "off":
            # As it will be read back by a run that goes on.
            self._lines.append(finite(line))
            self._alarms = alarms(self._config, list(self._lines))
            raised = {**self._alarms, **({"memory": growth} if growth else {})}
        # Without that of the memory, which is the process's and not the run's.
        self._writer.write({**line, "alarms": sorted(self._alarms)}, {"memory_gb": memory_gb})
        self._progress.show(line)
        for name in sorted(raised.keys() - before.keys()):
            warn(f"step {step}: {name}: {raised[name]}")
        stop_if_not_finite(self._config, step, scalars)
        # The memory is that of a process: of several, one can't stop for all.
        if (raised if jax.process_count() == 1 else self._alarms) and self._config.log.alarms == "stop":
            raise AlarmError(f"step {step}: {'; '.join(raised.values())} (config.log.alarms='stop')")


def line_of(
    config: Config,
    vocab_size: int,
    step: int,
    split: str,
    found: dict,
    scalars: dict[str, jax.Array],
    num_tokens: float,
    seconds: float,
    num_steps: float,
    num_devices: int,
) -> dict:
    """A line of metrics.jsonl. Those of an evaluation carry the scalars of the training step before it,
    but for the exit bias after the last one, which has settled.

    Args:
        found: `figures`.
        seconds: that num_steps steps of num_tokens tokens in all took on num_devices devices.
    """
    peak = rate(PEAK_FLOPS, jax.devices()[0])
    tokens_per_s = num_tokens / seconds
    # A step of training takes three times the products of a forward pass.
    flops = flops_per_token(config, vocab_size, found["executed_by_step"]) * (3 if split == "train" else 1)
    return {
        "step": step,
        "split": split,
        **found,
        **{name: float(scalars[name]) for name in _SCALARS},
        "skipped_steps": int(scalars["skipped_steps"]),
        "tokens_per_s": tokens_per_s,
        "step_ms": 1000 * seconds / num_steps,
        "flops_per_token": flops,
        "mfu": None if peak is None else flops * tokens_per_s / (peak * num_devices),
    }


_SCALARS = ("exit_bias", "depth_target", "grad_norm", "router_grad_norm", "lr")


def stop_if_not_finite(config: Config, step: int, scalars: dict[str, jax.Array]) -> None:
    """Raise NonFiniteError when so many updates in a row up to `step` were not finite that training stands still."""
    in_a_row, allowed = int(scalars["skipped_in_a_row"]), config.train.max_skipped_steps
    if in_a_row >= allowed:
        first = step - in_a_row + 1
        raise NonFiniteError(
            f"step {first + allowed - 1}: {allowed} losses or gradients in a row were not finite "
            f"(config.train.max_skipped_steps={allowed})",
            first,
        )
