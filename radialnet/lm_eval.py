"""Evaluate a trained run on tasks of the lm-evaluation-harness, at any max depth and exit bias.

    python -m radialnet.lm_eval --workdir=DIR --tasks=a,b [--include_path=FOLDER] [--limit=N] [--num_fewshot=K]
                                [--batch_size=N] [--max_depth=2,4,8] [--exit_bias=-1,0,1] [--json]

Tasks are names or patterns of the harness, names of YAML files in FOLDER, or YAML files. The mean depth of a task's
tokens stands among its metrics. The last line of stdout is one JSON object (a list when several depths or biases are
asked for). It needs `pip install -r requirements-eval.txt`; docs/EVALUATION.md has more.
"""

import itertools
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from radialnet import cli
from radialnet.checks import expanded
from radialnet.files import finite
from radialnet.sections import ConfigError
from radialnet.trained import load_trained

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from radialnet.harness import RadialLM

# Draws for the standard error of metrics that have no formula for it.
BOOTSTRAP_DRAWS = 1000


def load_tasks(names: list[str], include_path: str | None = None, include_defaults: bool = True) -> "TaskManager":
    """A task manager that has loaded these tasks, with their data, and gives them again whatever it is asked to load.

    Args:
        names: of tasks or groups, patterns of them, or YAML files.
        include_path: folder of YAML files of more tasks.
        include_defaults: whether the harness's own tasks are known.

    Raises:
        ConfigError: there is no such task or folder, or a task or its data can't be loaded.
    """
    from lm_eval.tasks import TaskManager

    if include_path and not Path(include_path).is_dir():
        raise ConfigError(f"--include_path={include_path}: no such folder")
    manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
    found = {name: [name] if Path(name).is_file() else manager.match_tasks([name]) for name in names}
    if missing := [name for name in names if not found[name]]:
        raise ConfigError(f"--tasks={','.join(names)}: no task {', '.join(map(repr, missing))}")
    try:
        loaded = manager.load(list(dict.fromkeys(itertools.chain(*found.values()))))
    except Exception as error:  # Of YAML, of templates, of data that is not there: of a dozen libraries.
        raise ConfigError(f"--tasks={','.join(names)}: can't be loaded ({error!r})") from None
    manager.load = lambda _: loaded
    return manager


def evaluate_tasks(
    lm: "RadialLM", manager: "TaskManager", num_fewshot: int | None = None, limit: float | None = None
) -> dict:
    """The harness's results for the tasks that were loaded, with the mean depth as one more metric of each task.

    Args:
        num_fewshot: examples before each question, in place of the task's own number.
        limit: documents of each task; a share of them if less than 1; None = all.

    Raises:
        ConfigError: a task asks for what the model can't do.
    """
    from lm_eval import simple_evaluate

    # By processes that fork from one with threads otherwise.
    os.environ["DISABLE_MULTIPROC"] = "1"
    results = simple_evaluate(
        lm,
        tasks=["loaded"],
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=BOOTSTRAP_DRAWS,
        log_samples=False,
    )
    for task, metrics in results["results"].items():
        if task in lm.num_tokens:
            metrics["depth,none"] = lm.depth(task)
    return results


def summary(lm: "RadialLM", results: dict) -> dict:
    """What is worth to keep of results: figures by task, and what they were found with."""
    kept = {name: results.get(name, {}) for name in ("results", "groups", "n-samples", "n-shot", "versions")}
    return {
        "step": lm.trained.step,
        "max_depth": lm.max_depth,
        "exit_bias": float(lm.controllers.exit_bias),
        "depth": {task: lm.depth(task) for task in lm.num_tokens},
        "tokens": dict(lm.num_tokens),
        "cut": dict(lm.num_cut),
        **kept,
    }


def _show(lm: "RadialLM", results: dict) -> None:
    from lm_eval.utils import make_table

    print(f"step {lm.trained.step}  max depth {lm.max_depth}  exit bias {float(lm.controllers.exit_bias):+.2f}")
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))


def main() -> None:
    max_depths = cli.numbers("max_depth", _MAX_DEPTH.value or ["1"], int, "whole numbers, by commas,")
    exit_biases = cli.numbers("exit_bias", _EXIT_BIAS.value, float, "numbers, by commas,")
    if _LIMIT.value is not None and not 0 < _LIMIT.value < math.inf:
        raise ConfigError(f"--limit={_LIMIT.value:g}: a number above 0 is needed")
    try:
        from radialnet.harness import RadialLM
    except ModuleNotFoundError as error:
        raise ConfigError(f"lm-eval is needed ({error}): pip install -r requirements-eval.txt") from None
    trained = load_trained(expanded(_WORKDIR.value))
    if trained.config.data.source == "hops":
        raise ConfigError(f"--workdir={_WORKDIR.value}: a run on config.data.source='hops', which knows no text")
    if not _MAX_DEPTH.value:
        max_depths = [trained.config.model.max_depth]
    include = str(expanded(_INCLUDE_PATH.value)) if _INCLUDE_PATH.value else None
    manager = load_tasks([str(expanded(name)) for name in _TASKS.value], include)
    found = []
    for max_depth, exit_bias in itertools.product(max_depths, exit_biases):
        lm = RadialLM(trained, _BATCH_SIZE.value or trained.config.train.batch_size, max_depth, exit_bias)
        results = evaluate_tasks(lm, manager, _NUM_FEWSHOT.value, _LIMIT.value)
        if not _JSON.value:
            _show(lm, results)
        found.append(summary(lm, results))
    for task, num_cut in found[0]["cut"].items():
        if num_cut:
            cli.warn(
                f"task {task}: {num_cut} texts are longer than a row of training "
                f"(config.train.seq_len={trained.config.train.seq_len}), and lost their beginning"
            )
    print(json.dumps(finite(found[0] if len(found) == 1 else found)))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)
    _TASKS = flags.DEFINE_list("tasks", None, "Names or patterns of tasks, or YAML files, by commas.", required=True)
    _INCLUDE_PATH = flags.DEFINE_string("include_path", None, "A folder of YAML files of more tasks.")
    _LIMIT = flags.DEFINE_float("limit", None, "Documents of each task; a share of them if less than 1.")
    _NUM_FEWSHOT = flags.DEFINE_integer(
        "num_fewshot", None, "Examples before each question, in place of the task's own number.", lower_bound=0
    )
    _BATCH_SIZE = flags.DEFINE_integer(
        "batch_size", None, "Texts at a time; by default as many as in training.", lower_bound=1, upper_bound=2**16
    )
    _MAX_DEPTH = flags.DEFINE_list("max_depth", None, "Max depths to evaluate at; the trained one by default.")
    _EXIT_BIAS = flags.DEFINE_list("exit_bias", ["0"], "Added to the trained exit bias: more makes tokens leave early.")
    _JSON = flags.DEFINE_bool("json", False, "Print the JSON line alone.")
    cli.run(main)
