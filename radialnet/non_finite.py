"""What a run that ended on non-finite updates leaves behind: all that is needed to see them again."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from radialnet.checkpoint import Checkpoints
from radialnet.cli import NonFiniteError
from radialnet.config import Config
from radialnet.data import Dataset, row_numbers, train_batches
from radialnet.files import write_whole
from radialnet.processes import wait_for_processes
from radialnet.run_folder import RunFolder


def write_reproduction(folder: Path, config: Config, dataset: Dataset, trees: dict, error: NonFiniteError) -> Path:
    """Write a run folder that stands right before the first of the updates: training in it does them again. All
    processes call it.

    Beside it, `report.json` tells the steps, the seed and the numbers of the training rows, and `batches.npz` has the
    rows themselves. What was there of an earlier end goes.

    Args:
        folder: where to.
        trees: the run's state as it is saved, after the last of the updates or later.

    Returns:
        The report.
    """
    is_first = jax.process_index() == 0
    if is_first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    wait_for_processes("begin a report")
    run, batch_size, seed = RunFolder(folder), config.train.batch_size, config.train.seed
    steps = range(error.first_step, error.first_step + config.train.max_skipped_steps)
    if is_first:
        rows = {}
        # What was streamed is gone.
        if not config.data.streaming:
            # Step n is the n-th, so that it reads the batch before it in the order of the data.
            numbers = row_numbers(dataset.train, seed).batch(batch_size)
            rows = {step: numbers[step - 1].tolist() for step in steps}
            batches = train_batches(dataset.train, batch_size, seed)
            names = {f"{name}_{step}": array for step in steps for name, array in batches[step - 1].items()}
            np.savez_compressed(folder / "batches.npz", **names)
        report = {"error": str(error), "steps": list(steps), "seed": seed, "rows": rows}
        write_whole(folder / "report.json", json.dumps(report, indent=1) + "\n")
        dataset.tokenizer.save(run.tokenizer)
        run.write_manifest(dataset.manifest)
    # Neither they nor what came after them changed any of the state but the counts.
    counts, in_a_row = trees["counts"], trees["counts"]["skipped_in_a_row"]
    counts = {
        "step": counts["step"] - in_a_row,
        "skipped": counts["skipped"] - in_a_row,
        "skipped_in_a_row": jnp.zeros_like(in_a_row),
    }
    # What was summed up of the steps before them is part of a line that was written.
    window = jax.tree.map(jnp.zeros_like, trees["window"])
    if error.first_step > 1:
        with Checkpoints(run.checkpoints) as checkpoints:
            checkpoints.save(error.first_step - 1, {**trees, "counts": counts, "window": window})
    if is_first:
        # Last, for it marks a run.
        config.save(run.config)
    return folder / "report.json"
