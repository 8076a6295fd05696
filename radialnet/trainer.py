"""Training a run: build it, or resume it, and train until it is done."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import filelock
import jax
import numpy as np
import rich.console
from flax import nnx

from radialnet.checkpoint import Checkpoints
from radialnet.checks import told_groups
from radialnet.cli import warn
from radialnet.config import Config
from radialnet.data import prepare
from radialnet.environment import record_start
from radialnet.model import abstract_params, init_params, place, upcycle
from radialnet.optimizer import make_optimizer
from radialnet.plots import RUN_PLOTS, plot_run
from radialnet.preemption import Preemption
from radialnet.processes import all_or_none, check_same, wait_for_processes
from radialnet.progress import counted
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.sharding import Placement
from radialnet.tokenizer import Tokenizer
from radialnet.trackers import check_trackers
from radialnet.train_loop import Run, train_until_done
from radialnet.train_step import Teacher, TrainState, init_state, state_shardings, trees_of
from radialnet.trained import load_trained
from radialnet.writers import MetricsWriter

# What a run folder was made with and can't be changed on resume. The rest may change, and the change is printed.
_FIXED_SECTIONS = ("model", "cache", "data")
# But for how the same is computed.
_FREE_FIELDS = {
    ("model", "dtype"),
    ("model", "grouped_backend"),
    ("model", "attention_backend"),
    ("model", "remat"),
}
_FIXED_FIELDS = {
    ("router", "form"),
    ("router", "network"),
    ("router", "hidden"),
    ("router", "sees_step"),
    ("router", "exit_training"),
    ("router", "exit_sees"),
    ("router", "hash_span"),
    ("train", "batch_size"),
    ("train", "seq_len"),
    ("train", "seed"),
    ("optimizer", "frozen"),
    ("optimizer", "low_rank"),
}


def train(config: Config, workdir: Path) -> None:
    """Train until `train.num_steps` on the devices of the mesh, from the newest checkpoint in `workdir`, if any.

    Of several processes all must call; they share the folder, to which the first one writes alone, but for its part of
    each checkpoint.

    Raises:
        ConfigError: the folder belongs to a run with another shape or other data, or to one that is being trained; or
            the data can't be read; or the mesh does not go with the devices.
        NonFiniteError: `train.max_skipped_steps` updates in a row were not finite.
        AlarmError: the router goes wrong, and `log.alarms` says to stop.
        PreemptedError: SIGTERM or SIGINT came; the state is saved.
    """
    is_first = jax.process_index() == 0
    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True, quiet=not is_first)
    folder = RunFolder(workdir)
    # The order in which a run is built and resumed; nothing is written before 4, but for the lock of a folder that is
    # there: what is checked is not to change under us.
    with contextlib.ExitStack() as stack:
        with all_or_none("the run can't begin"):
            if (is_there := workdir.is_dir()) and is_first:
                stack.enter_context(_locked(folder))
            # 1. The folder, and whether the config may go on with what is in it.
            _check_folder(config, folder, console)
            if is_first:
                check_trackers(folder, config)
            # 2. The data. A resumed run reads the documents of its manifest, by its own tokenizer, or not at all.
            if config.data.streaming and jax.process_count() > 1:
                raise ConfigError("config.data.streaming=True: one process alone can read what comes once")
            with counted(console) as report:
                dataset = prepare(config, folder, report=report)
            placement = place(config, dataset.tokenizer.vocab_size, jax.devices())
        fields = config.to_dict()
        # Where the data lies may differ, but not what it is.
        del fields["data"]
        values = {f"config.{name}.{field}": value for name, part in fields.items() for field, value in part.items()}
        check_same({**values, f"the data of config.data.source={config.data.source!r}": dataset.manifest})
        _print_processes(placement)
        with all_or_none("the run can't begin"):
            # 3. Fresh parameters, optimizer and controllers, each where it belongs on the mesh; the model's structure.
            #    An up-cycled run reads its dense run.
            graph, state = _fresh_state(config, placement, dataset.tokenizer, is_new=not folder.has_checkpoint())
            teacher = _teacher(config, placement, dataset.tokenizer)
            # 4. All of them from the newest checkpoint.
            if not is_there and is_first:
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(folder))
                if folder.config.exists() or folder.has_checkpoint():
                    raise ConfigError(f"--workdir={workdir}: another process has begun a run in it meanwhile")
        cfg = config.checkpoint
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, cfg.keep, cfg.keep_every))
        step = checkpoints.newest(report=warn) or 0
        if step:
            state = _restore(checkpoints, step, state)
        if step < config.train.num_steps:
            # 5. What the folder is told by, now that all of it is known to work; the config last, for it marks a run.
            if is_first:
                if not folder.config.exists():
                    dataset.tokenizer.save(folder.tokenizer)
                    folder.write_manifest(dataset.manifest)
                record_start(folder, step, placement.parallel)
                config.save(folder.config)
            bytes_V = placement.put_everywhere(dataset.tokenizer.bytes_per_token)
            run = Run(config, folder, dataset, graph, state, step, checkpoints, placement, bytes_V, console, teacher)
            _print_start(run)
            # 6. The metrics of steps that will be done again go; 7. the data goes on from the step.
            with MetricsWriter(folder, config, step) as writer, Preemption() as preemption:
                wait_for_processes("the metrics go on")
                train_until_done(run, writer, preemption)
        elif step < (planned := Config.load(folder.config).train.num_steps) and not _is_evaluated(folder, step):
            raise ConfigError(
                f"config.train.num_steps={config.train.num_steps}: the run in {workdir} was saved at step {step} of "
                f"{planned}, and is evaluated at its last step; more than {step} are needed"
            )
        else:
            console.print(f"{workdir}: done, {step} of {config.train.num_steps} steps")
        # 8. What is made of the finished run, also when a kill came between its last step and here.
        if is_first and (step < config.train.num_steps or not _are_drawn(folder)):
            paths = plot_run(folder.read_metrics(), folder.plots)
            console.print("plots: " + (", ".join(str(path) for path in paths) or "no figures to draw"))


def _is_evaluated(folder: RunFolder, step: int) -> bool:
    return any((line["split"], line["step"]) == ("eval", step) for line in folder.read_metrics())


def _are_drawn(folder: RunFolder) -> bool:
    """Whether the plots are those of the metrics."""
    plots = [folder.plots / name for name in RUN_PLOTS]
    written = folder.metrics.stat().st_mtime if folder.metrics.exists() else 0.0
    return all(plot.exists() and plot.stat().st_mtime >= written for plot in plots)


@contextlib.contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Keep other processes from training in the folder; the lock goes with the process, however that ends."""
    lock = filelock.FileLock(folder.lock, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ConfigError(f"--workdir={folder.root}: another process is training in it") from None
    try:
        yield
    finally:
        lock.release()


def _check_folder(config: Config, folder: RunFolder, console: rich.console.Console) -> None:
    """Whether the config may go on with the run in the folder, if there is one; prints the changes that are allowed."""
    for path in (folder.root, folder.checkpoints):
        # A link to what is not there, as of a disk that is not mounted, is no folder either.
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise ConfigError(f"--workdir={folder.root}: {path} is not a folder")
    if not folder.config.exists():
        if folder.has_checkpoint():
            raise ConfigError(f"--workdir={folder.root}: has checkpoints but no config.json; take a new --workdir")
        return
    before, now = Config.load(folder.config).to_dict(), config.to_dict()
    for section, fields in now.items():
        for field, value in fields.items():
            old, name = before[section][field], f"config.{section}.{field}"
            if old == value or (section, field) == ("data", "cache_dir"):
                continue
            is_free = (section, field) in _FREE_FIELDS
            if (section, field) in _FIXED_FIELDS or (section in _FIXED_SECTIONS and not is_free):
                raise ConfigError(
                    f"{name}={value!r}, but the run in {folder.root} was started with {old!r}; take a new --workdir"
                )
            console.print(f"{name} is now {value!r}, was {old!r}")
    if not folder.has_checkpoint() and (lines := folder.read_metrics()):
        warn(f"{folder.root}: no checkpoint; the run starts anew, and {len(lines)} lines of its metrics go")


def _fresh_state(
    config: Config, placement: Placement, tokenizer: Tokenizer, is_new: bool
) -> tuple[nnx.GraphDef, TrainState]:
    """The state before the first step. With a checkpoint its values don't matter, and no dense run is asked for."""
    optimizer, vocab_size = make_optimizer(config), tokenizer.vocab_size
    upcycles = config.model.init == "upcycle" and is_new
    if upcycles and jax.process_count() > 1:
        raise ConfigError("config.model.init='upcycle': one process is needed to begin the run; more may go on with it")
    if placement.parallel.num_devices == 1:
        graph, params = init_params(config, vocab_size)
        params = _upcycled(config, params, tokenizer, placement) if upcycles else params
        return graph, init_state(config, params, optimizer)
    graph, _ = abstract_params(config, vocab_size, placement.parallel)

    def init() -> TrainState:
        return init_state(config, init_params(config, vocab_size)[1], optimizer)

    # No device, and no host, ever has all of it.
    shardings = state_shardings(placement, optimizer, jax.eval_shape(init))
    state = jax.jit(init, out_shardings=shardings)()
    if upcycles:
        state = state.replace(params=_upcycled(config, state.params, tokenizer, placement))
    return graph, state


def _teacher(config: Config, placement: Placement, tokenizer: Tokenizer) -> Teacher | None:
    """The model of `train.teacher`, on all devices. Raises ConfigError: it can't be restored, or is of other tokens."""
    if not (path := config.train.teacher):
        return None
    if jax.process_count() > 1:
        raise ConfigError(f"config.train.teacher={path!r}: one process alone can read it")
    try:
        trained = load_trained(Path(path))
    except ConfigError as error:
        raise ConfigError(f"config.train.teacher={path!r}: {error}") from None
    if trained.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise ConfigError(f"config.train.teacher={path!r} was trained with another tokenizer")
    trained.check_length(config.train.seq_len, "config.train.seq_len", f"config.train.teacher={path!r}")
    known = {"params": trained.params, "controllers": trained.controllers, "step": np.int32(trained.step)}
    return Teacher(**placement.put_everywhere(known), config=trained.config, graph=trained.graph)


def _upcycled(config: Config, params: dict, tokenizer: Tokenizer, placement: Placement) -> dict:
    model, path = config.model, config.model.upcycle_from
    dense = load_trained(Path(path))
    if dense.config.router.form != "sequential" or dense.config.model.pool_size != model.num_layer_groups:
        raise ConfigError(
            f"config.model.upcycle_from={path!r} is a {dense.config.router.form!r} run of "
            f"{dense.config.model.pool_size} layers; "
            f"a 'sequential' one of as many as there are groups is needed, {told_groups(model)}"
        )
    for field in ("qk_norm", "norm", "norm_eps", "mlp", "biases", "positions", "rope_base"):
        if (theirs := getattr(dense.config.model, field)) != (ours := getattr(model, field)):
            raise ConfigError(
                f"config.model.{field}={ours}, but config.model.upcycle_from={path!r} was trained with {theirs}"
            )
    if dense.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise ConfigError(f"config.model.upcycle_from={path!r} was trained with another tokenizer")
    grow = partial(upcycle, num_layers=model.pool_size, num_groups=model.num_layer_groups)
    grown = jax.eval_shape(grow, params, dense.params)
    if jax.tree.structure(grown) != jax.tree.structure(params):
        raise ConfigError(f"config.model.upcycle_from={path!r} has other prelude or coda layers than config.model")
    for (key, have), want in zip(jax.tree.leaves_with_path(grown), jax.tree.leaves(params), strict=True):
        if have.shape != want.shape:
            raise ConfigError(
                f"config.model.upcycle_from={path!r}: {jax.tree_util.keystr(key)} grows to {have.shape}, "
                f"but the config needs {want.shape}"
            )
    if placement.parallel.num_devices == 1:
        return grow(params, dense.params)
    return jax.jit(grow, out_shardings=placement.shardings())(params, placement.put_everywhere(dense.params))


def _restore(checkpoints: Checkpoints, step: int, state: TrainState) -> TrainState:
    trees = trees_of(state)
    # Runs of before spikes were looked for have no window of them; it fills anew.
    names = [name for name in trees if name != "recent" or checkpoints.has(step, name)]
    trees |= checkpoints.restore(step, {name: trees[name] for name in names})
    counts = trees["counts"]
    if counts["step"] != step:
        raise ConfigError(
            f"{checkpoints.folder / str(step)}: holds step {counts['step']}; give the folder its name back"
        )
    return TrainState(
        step=counts["step"],
        params=trees["params"],
        optimizer=trees["optimizer"],
        controllers=trees["controllers"],
        num_skipped=counts["skipped"],
        num_skipped_in_a_row=counts["skipped_in_a_row"],
        recent_2W=trees["recent"],
    )


def _print_processes(placement: Placement) -> None:
    """Of each process, who it is and what the mesh looks like; where there is one device nothing."""
    parallel, num_devices = placement.parallel, jax.device_count()
    if num_devices > parallel.num_devices:
        warn(f"{parallel.num_devices} of {num_devices} devices are used: config.mesh, config.train.batch_size")
    if parallel.num_devices > 1:
        print(
            f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of {num_devices} "
            f"{jax.devices()[0].device_kind} devices; mesh {parallel}; pool dispatch {parallel.dispatch} "
            f"({placement.dispatch_reason})",
            flush=True,
        )


def _print_start(run: Run) -> None:
    config, dataset = run.config, run.dataset
    if config.data.streaming and run.step:
        warn("config.data.streaming=True: the data begins anew, not where the run was")
    sizes = jax.tree.map(lambda x: x.size, run.state.params)
    num_documents, num_tokens = (dataset.manifest[name]["train"] for name in ("num_documents", "num_tokens"))
    run.console.print(
        f"{run.folder.root}: step {run.step} of {config.train.num_steps} on {run.placement.parallel.num_devices} "
        f"{jax.devices()[0].device_kind} device(s)\n"
        f"model: {config.router.form}, pool of {config.model.pool_size} layers, max depth {config.model.max_depth}, "
        f"{sum(jax.tree.leaves(sizes)):,} parameters, {sum(jax.tree.leaves(sizes['pool'])):,} of them in the pool\n"
        + (f"teacher: {config.train.teacher}, step {int(run.teacher.step)}\n" if run.teacher else "")
        + f"data: {config.data.source}, {num_documents:,} documents of {num_tokens:,} tokens to train on, "
        f"vocabulary {dataset.tokenizer.vocab_size}; {config.train.batch_size * config.train.seq_len:,} tokens a step"
    )
