"""The loop over training steps: what runs, and what is written, between the first step and the last."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import rich.console
from flax import nnx

from radialnet.checkpoint import Checkpoints
from radialnet.cli import NonFiniteError, PreemptedError, warn
from radialnet.config import Config
from radialnet.controllers import schedule, update_exit_bias
from radialnet.data import Dataset, batches_from, eval_batches
from radialnet.decode import CacheFullError
from radialnet.evaluate import EvalStep, evaluate
from radialnet.generate import generate
from radialnet.metrics import BatchSums, figures
from radialnet.non_finite import write_reproduction
from radialnet.optimizer import make_optimizer
from radialnet.preemption import Preemption
from radialnet.profiling import StepProfile
from radialnet.progress import Progress
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.sharding import Placement
from radialnet.train_log import TrainLog, line_of, stop_if_not_finite
from radialnet.train_step import Teacher, TrainState, eval_step, jitted_train_step, trees_of
from radialnet.trained import TrainedModel, keep_programs
from radialnet.watchdog import Watchdog
from radialnet.writers import MetricsWriter

# The exit bias is where it stays after 15 to 40 batches of 2,048 tokens; of short runs it has a tenth of their steps.
_SETTLE_BATCHES = 64


@dataclasses.dataclass
class Run:
    """All that the loop works with."""

    config: Config
    folder: RunFolder
    dataset: Dataset
    graph: nnx.GraphDef
    state: TrainState
    step: int  # Of `state`, known without waiting for the device.
    checkpoints: Checkpoints
    placement: Placement
    bytes_V: jax.Array
    console: rich.console.Console
    teacher: Teacher | None

    @property
    def own_rows(self) -> list[int]:
        """Which rows of a batch this process reads."""
        return self.placement.own_rows(self.config.train.batch_size)

    def trained(self) -> TrainedModel:
        state = self.state
        return TrainedModel(self.config, self.graph, state.params, state.controllers, self.dataset.tokenizer, self.step)


def train_until_done(run: Run, writer: MetricsWriter, preemption: Preemption) -> None:
    """Train from the state of the run until `train.num_steps`, and write metrics and checkpoints on the way.

    Raises what `trainer.train` does of the steps themselves.
    """
    config, num_steps, placement = run.config, run.config.train.num_steps, run.placement
    batch_size = config.train.batch_size
    batches = batches_from(run.dataset.train, batch_size, config.train.seed, run.own_rows, run.step)

    def next_batch() -> dict:
        return placement.put_rows(next(batches), batch_size)

    batch = next_batch()
    compiled, no_sums = _compiled_step(run, batch)
    window = _window(run, no_sums)
    eval_fn = jax.jit(partial(eval_step, config=config, graph=run.graph, placement=placement))
    eval_fn = partial(eval_fn, teacher=run.teacher)
    vocab_size, lines = run.dataset.tokenizer.vocab_size, run.folder.read_metrics()

    with (
        Progress(run.console, run.step, num_steps) as progress,
        Watchdog(config.train.stall_factor) as watchdog,
        StepProfile(run.folder.profile, config.log.profiled) as profile,
    ):
        num_devices = placement.parallel.num_devices
        log = TrainLog(config, vocab_size, writer, progress, no_sums, window, lines, num_devices)
        scalars = None
        try:
            while run.step < num_steps:
                watchdog.begins(run.step + 1)
                if profile.begins_at(run.step + 1):
                    jax.block_until_ready(run.state)
                    with log.clock.paused(), watchdog.paused():
                        profile.start()
                before = scalars
                with jax.profiler.StepTraceAnnotation("train", step_num=run.step + 1):
                    run.state, sums, scalars = compiled(run.state, batch, run.bytes_V, run.teacher)
                run.step += 1
                if profile.ends_at(run.step):
                    jax.block_until_ready(run.state)
                    with log.clock.paused(), watchdog.paused():
                        profile.stop()
                is_last = run.step == num_steps
                # While the device works on the step, the next batch is fetched and the figures of the step before are
                # read.
                batch = None if is_last else next_batch()
                # At most two steps are under way, so that it shows when one of them hangs.
                jax.block_until_ready(before)
                log.add(run.step, sums, scalars)
                run.checkpoints.check()
                # Asked now and not again below, so that what is saved is what is left by.
                asked = preemption.asked()
                must_evaluate = is_last or _is_due(run.step, config.eval.every_steps)
                must_save = is_last or asked or _is_due(run.step, config.checkpoint.every_steps)
                if must_evaluate or must_save:
                    # Steps still under way are time of training, and a line must not be younger than its checkpoint.
                    jax.block_until_ready(run.state)
                    log.flush()
                    stop_if_not_finite(config, run.step, scalars)
                    window = placement.put_everywhere(log.window())
                    if is_last and config.holds_depth:
                        with log.clock.paused(), watchdog.paused():
                            settle_exit_bias(run, eval_fn, next_batch)
                        scalars = {**scalars, "exit_bias": run.state.controllers.exit_bias}
                    with log.clock.paused(), watchdog.paused():
                        if must_evaluate:
                            line = _eval_line(run, eval_fn, scalars)
                            writer.write(line)
                            progress.show(line)
                        if must_save:
                            run.checkpoints.save(run.step, {**trees_of(run.state), "window": window})
                if asked and not is_last:
                    with watchdog.paused():
                        run.checkpoints.check(wait=True)
                    raise PreemptedError(
                        f"{asked.name}: saved at step {run.step} of {num_steps}; the same command goes on from it"
                    )
        except NonFiniteError as error:
            raise _with_reproduction(run, placement.put_everywhere(log.window()), error) from None
    run.checkpoints.check(wait=True)
    if config.log.sample_prompt and config.log.sample_tokens:
        _write_sample(run, writer)


def _compiled_step(run: Run, batch: dict) -> tuple[jax.stages.Compiled, BatchSums]:
    """The training step, and the sums of no batch, on all devices."""
    keep_programs(run.config)
    start = time.perf_counter()
    step_fn = jitted_train_step(run.config, run.graph, make_optimizer(run.config), run.placement, run.state)
    lowered = step_fn.lower(run.state, batch, run.bytes_V, run.teacher)
    compiled = lowered.compile()
    run.console.print(f"compiled the training step in {time.perf_counter() - start:.1f} s")
    return compiled, run.placement.put_everywhere(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), lowered.out_info[1])
    )


def _window(run: Run, no_sums: BatchSums) -> dict:
    """What belongs to a line of metrics that wasn't due yet when the checkpoint was saved."""
    empty = {"sums": no_sums, **run.placement.put_everywhere({"num_steps": np.int32(0), "seconds": np.float32(0)})}
    # Runs of before checksums have none: their first line is of the steps since.
    if not run.step or not run.checkpoints.has(run.step, "window"):
        return empty
    try:
        return run.checkpoints.restore(run.step, {"window": empty})["window"]
    except ConfigError as error:
        # With a teacher, or without the one that there was, steps have other losses. Nothing else is lost, whatever the
        # reason.
        warn(f"{error}; the next line of metrics is of the steps from here on")
        return empty


def _with_reproduction(run: Run, window: dict, error: NonFiniteError) -> NonFiniteError:
    """The error, told with the folder that leads to it again; as it is where that can't be written."""
    folder = run.folder.non_finite
    try:
        report = write_reproduction(folder, run.config, run.dataset, {**trees_of(run.state), "window": window}, error)
    except (OSError, ConfigError) as failed:
        # What is there of it would be taken for a run.
        shutil.rmtree(folder, ignore_errors=True)
        warn(f"{folder}: can't be written ({failed})")
        return error
    # What was streamed does not come again.
    comes_again = "" if run.config.data.streaming else ", and its folder is a run that comes to them"
    return NonFiniteError(f"{error}; {report} tells of what{comes_again}", error.first_step)


def _write_sample(run: Run, writer: MetricsWriter) -> None:
    cfg, num_devices = run.config.log, run.placement.parallel.num_devices
    if num_devices > 1:
        command = f"python -m radialnet.generate --workdir={run.folder.root} --prompt='{cfg.sample_prompt}'"
        run.console.print(f"no sample, for the parameters lie on {num_devices} devices: {command}")
        return
    try:
        text = cfg.sample_prompt + generate(run.trained(), cfg.sample_prompt, cfg.sample_tokens)
    except (CacheFullError, ConfigError) as error:
        warn(f"no sample: {error}")
        return
    writer.write_text("sample", text, run.step)
    run.console.print("a sample, greedily:\n" + text)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def settle_exit_bias(run: Run, eval_fn: EvalStep, next_batch: Callable[[], dict]) -> None:
    """Let the exit bias go on over the batches that would come next, while the parameters stay as they are and no token
    explores. They are not counted as tokens or time of training.

    As long as parameters are learned, the exit logits of all tokens move together with each step, and the exit bias
    behind them: what it is after the last one is chance, and the depth up to 2 % off its target. It becomes its mean
    over the second half of the batches; in a run of few steps it only moves towards that depth. It stays where it was
    if that mean is not finite, or exits are still closed.
    """
    config, state, step = run.config, run.state, np.int32(run.step)
    at = schedule(config.router, config.model.max_depth, step)
    if not at.may_exit:
        return

    def update(controllers, sums):
        routing = sums.routing
        return update_exit_bias(controllers, config.router, at, routing.mean_depth(), routing.exit_logit_std())

    out = {} if run.placement.parallel.num_devices == 1 else {"out_shardings": run.placement.everywhere}
    update, controllers, biases = jax.jit(update, **out), state.controllers, []
    for _ in range(min(_SETTLE_BATCHES, 1 + config.train.num_steps // 10)):
        sums = eval_fn(state.params, controllers, step, next_batch(), run.bytes_V)
        controllers = update(controllers, sums)
        biases.append(controllers.exit_bias)
    exit_bias = np.mean(np.array(biases, np.float32)[len(biases) // 2 :])
    if np.isfinite(exit_bias):
        exit_bias = run.placement.put_everywhere(exit_bias)
        run.state = state.replace(controllers=state.controllers.replace(exit_bias=exit_bias))


def _eval_line(run: Run, eval_fn: EvalStep, scalars: dict) -> dict:
    config, state = run.config, run.state
    batch_size = config.train.batch_size
    batches = eval_batches(run.dataset.eval, batch_size, config.eval.num_batches, run.own_rows)
    batches = (run.placement.put_rows(batch, batch_size) for batch in batches)
    sums, seconds = evaluate(eval_fn, state.params, state.controllers, run.step, batches, run.bytes_V)
    num_tokens = float(sums.routing.num_tokens)
    num_batches = num_tokens / (batch_size * config.train.seq_len)
    vocab_size, took = run.dataset.tokenizer.vocab_size, (num_tokens, seconds, num_batches)
    num_devices = run.placement.parallel.num_devices
    return line_of(config, vocab_size, run.step, "eval", figures(sums), scalars, *took, num_devices)
