"""What the fields of a configuration must be, each and together."""

import math
import re
from collections.abc import Mapping

from radialnet.sections import (
    ATTENTION_BACKENDS,
    ESTIMATORS,
    EXIT_FORMS,
    FIXED_FORMS,
    GROUPED_BACKENDS,
    HOPS_ALPHABET,
    MLPS,
    NETWORKS,
    NORMS,
    PAGE_SIZE,
    PARTS,
    POSITIONS,
    SOURCES,
    TRAINED_FORMS,
    VIEWS,
    WRITERS,
    ConfigError,
    DataConfig,
    ModelConfig,
    RouterConfig,
    Sections,
)


def validate(config: Sections) -> None:
    for checks in (_validate_model, _validate_router, _validate_run):
        checks(config)


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field}={value!r}: one of {', '.join(allowed)} is needed")


def _at_least(section: str, values: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        if not value >= least:
            raise ConfigError(f"config.{section}.{name}={value}: at least {least} is needed")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def told_groups(model: ModelConfig) -> str:
    """Where their number stands, for messages."""
    if model.num_groups:
        return f"config.model.num_groups={model.num_groups}"
    return f"config.model.max_depth={model.max_depth} (config.model.num_groups=0)"


def _validate_model(config: Sections) -> None:
    model, view = config.model, config.cache.view
    _at_least("model", model, 1, "pool_size", "max_depth", "d_model", "num_heads", "num_kv_heads", "d_ff")
    _at_least("model", model, 0, "min_depth", "prelude_layers", "coda_layers")
    _one_of("config.model.init", model.init, ("distinct", "clones", "upcycle"))
    _one_of("config.model.norm", model.norm, NORMS)
    _one_of("config.model.mlp", model.mlp, MLPS)
    _one_of("config.model.positions", model.positions, POSITIONS)
    longest = config.train.seq_len if model.positions == "learned" else 0
    _require(
        model.max_positions >= longest and (longest or not model.max_positions),
        f"config.model.max_positions={model.max_positions}: at least config.train.seq_len={longest} is needed"
        if longest
        else f"config.model.max_positions={model.max_positions}: 0 is needed with config.model.positions='rotary'",
    )
    _one_of("config.model.dtype", model.dtype, ("float32", "bfloat16"))
    _one_of("config.model.grouped_backend", model.grouped_backend, ("auto", *GROUPED_BACKENDS))
    _one_of("config.model.attention_backend", model.attention_backend, ("auto", *ATTENTION_BACKENDS))
    _one_of("config.model.remat", model.remat, ("none", "step"))
    _one_of("config.cache.view", view, VIEWS)
    _one_of("config.cache.when_full", config.cache.when_full, ("error", "slide"))
    capacity = config.cache.capacity
    _require(
        capacity == 0 or capacity >= PAGE_SIZE,
        f"config.cache.capacity={capacity}: 0 or at least {PAGE_SIZE}, a page, is needed",
    )
    _require(model.rope_base > 1, f"config.model.rope_base={model.rope_base}: more than 1 is needed")
    _require(model.norm_eps > 0, f"config.model.norm_eps={model.norm_eps}: more than 0 is needed")
    _require(
        model.d_model % model.num_heads == 0,
        f"config.model.num_heads={model.num_heads} does not divide config.model.d_model={model.d_model}",
    )
    _require(
        model.head_size % 2 == 0,
        f"config.model.num_heads={model.num_heads} gives config.model.d_model={model.d_model} an odd head size of "
        f"{model.head_size}; an even one is needed",
    )
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"config.model.num_kv_heads={model.num_kv_heads} does not divide config.model.num_heads={model.num_heads}",
    )
    _require(
        model.min_depth <= model.max_depth,
        f"config.model.min_depth={model.min_depth} is more than config.model.max_depth={model.max_depth}",
    )
    _require(
        model.max_depth > 1 or view in ("all", "latest"),
        f"config.cache.view={view!r} needs more than one depth step, config.model.max_depth={model.max_depth}: "
        "with one, every view is 'all'",
    )
    _require(
        (model.init == "upcycle") == bool(model.upcycle_from),
        f"config.model.init={model.init!r} with config.model.upcycle_from={model.upcycle_from!r}: "
        "a run folder goes with 'upcycle' and with nothing else",
    )
    _require(
        model.init != "upcycle" or not config.router.is_in_order or model.pool_size == model.max_depth,
        f"config.model.init='upcycle' gives each step a group of layers, of which config.router.form="
        f"{config.router.form!r} executes one: config.model.pool_size={model.pool_size} must equal "
        f"config.model.max_depth={model.max_depth}",
    )
    _require(
        0 <= model.num_groups <= model.max_depth,
        f"config.model.num_groups={model.num_groups}: 0 to config.model.max_depth={model.max_depth} is needed",
    )
    _require(
        not config.router.is_in_order or model.num_groups in (0, model.max_depth),
        f"config.model.num_groups={model.num_groups}: config.router.form={config.router.form!r} has its layers in "
        "order; 0 is needed",
    )
    _require(
        model.init == "distinct" or model.pool_size >= model.num_layer_groups,
        f"config.model.init={model.init!r} needs a layer for each group, but "
        f"config.model.pool_size={model.pool_size} is less than {told_groups(model)}",
    )


def _validate_router(config: Sections) -> None:
    model, router = config.model, config.router
    _one_of("config.router.form", router.form, TRAINED_FORMS + FIXED_FORMS)
    _one_of("config.router.estimator", router.estimator, ESTIMATORS)
    _one_of("config.router.prior", router.prior, ("none", "sequential", "group", "hash", "group_hash"))
    _one_of("config.router.network", router.network, NETWORKS)
    _one_of("config.router.exit_training", router.exit_training, ("gate", "benefit"))
    _one_of("config.router.exit_sees", router.exit_sees, ("state", "token"))
    _require(
        router.exit_sees == "state" or router.exit_training == "benefit",
        f"config.router.exit_sees={router.exit_sees!r} is for config.router.exit_training='benefit', "
        f"got {router.exit_training!r}",
    )
    _one_of("config.router.depth_loss", router.depth_loss, ("price", "target"))
    non_negative = (
        "hidden",
        "prior_weight",
        "prior_steps",
        "noise",
        "noise_steps",
        "load_coef",
        "z_coef",
        "depth_coef",
        "read_coef",
    )
    _at_least("router", router, 0, *non_negative)
    _at_least("router", router, 1, "every", "read_every")
    _require(
        router.every == 1 or router.form in ("factored", "flat"),
        f"config.router.every={router.every} is for the forms factored and flat, config.router.form={router.form!r}",
    )
    _at_least("router", router, 0, "exit_warmup_steps", "depth_ramp_steps", "exit_bias_rate", "load_bias_rate")
    _require(0 <= router.explore < 1, f"config.router.explore={router.explore}: at least 0 and less than 1 is needed")
    if router.exit_training == "benefit":
        _validate_benefit(model, router)
    if validate := _OF_FORM.get(router.form):
        validate(model, router)
    _require(
        not (router.gives_layers and router.load_bias_rate),
        f"config.router.load_bias_rate={router.load_bias_rate}: config.router.form={router.form!r} chooses no layers, "
        "0 is needed",
    )
    if router.form in (*EXIT_FORMS, "skip", "mod", "recursion"):
        _require(
            router.estimator != "dense",
            f"config.router.estimator='dense' is for forms that choose a layer, config.router.form={router.form!r}",
        )
    if not router.is_trained:
        return
    of_form = f"config.router.form={router.form!r}"
    of_groups = of_form if router.gives_layers else f"config.router.prior={router.prior!r}"
    _require(
        not router.needs_groups or model.pool_size >= model.num_layer_groups,
        f"{of_groups} needs a layer for each group, but "
        f"config.model.pool_size={model.pool_size} is less than {told_groups(model)}",
    )
    _require(
        router.noise == 0 or router.noise_steps > 0,
        f"config.router.noise={router.noise} needs steps to fade over, config.router.noise_steps={router.noise_steps}",
    )
    _require(
        model.min_depth == model.max_depth or model.min_depth <= router.depth_target <= model.max_depth,
        f"config.router.depth_target={router.depth_target} is not between config.model.min_depth={model.min_depth} "
        f"and config.model.max_depth={model.max_depth}",
    )


def _validate_benefit(model: ModelConfig, router: RouterConfig) -> None:
    of_benefit = "config.router.exit_training='benefit'"
    _require(
        router.form in ("factored", *EXIT_FORMS) or not router.is_trained,
        f"{of_benefit} is for the forms factored, {' and '.join(EXIT_FORMS)}, config.router.form={router.form!r}",
    )
    _require(
        model.coda_layers == 0,
        f"{of_benefit} reads states as the head would: config.model.coda_layers={model.coda_layers}, 0 is needed",
    )
    _require(
        router.depth_coef == 0,
        f"{of_benefit} has no expected depth: config.router.depth_coef={router.depth_coef}, 0 is needed",
    )
    _require(
        router.exit_sees == "state" or router.explore > 0,
        f"config.router.exit_sees={router.exit_sees!r} learns no more of a token once it always leaves: "
        f"config.router.explore={router.explore}, more than 0 is needed",
    )


def _validate_recursion(model: ModelConfig, router: RouterConfig) -> None:
    _require(
        model.max_depth % model.pool_size == 0,
        f"config.router.form='recursion' goes through the pool in whole rounds: config.model.max_depth="
        f"{model.max_depth} must be a multiple of config.model.pool_size={model.pool_size}",
    )
    _require(
        router.depth_coef == 0,
        f"config.router.depth_coef={router.depth_coef}: config.router.form='recursion' holds its depth by "
        "config.router.exit_bias_rate alone, 0 is needed",
    )


def _validate_mod(model: ModelConfig, router: RouterConfig) -> None:
    _require(
        2 <= router.capacity_every <= model.max_depth,
        f"config.router.capacity_every={router.capacity_every}: at least 2, for all tokens execute the first step, "
        f"and at most config.model.max_depth={model.max_depth} is needed",
    )
    _require(
        0 < router.capacity <= 1,
        f"config.router.capacity={router.capacity}: more than 0 and at most 1 is needed",
    )
    _require(
        model.min_depth == model.max_depth,
        f"config.router.form='mod' has no exits: config.model.min_depth={model.min_depth} must equal "
        f"config.model.max_depth={model.max_depth}",
    )


def _validate_skip(model: ModelConfig, router: RouterConfig) -> None:
    of_skip = "config.router.form='skip'"
    _require(
        model.max_depth <= model.pool_size,
        f"{of_skip} has a layer for each step: config.model.max_depth={model.max_depth} is more than "
        f"config.model.pool_size={model.pool_size}",
    )
    _require(
        router.depth_coef == 0 and router.explore == 0,
        f"{of_skip} holds its depth by config.router.exit_bias_rate alone: config.router.depth_coef="
        f"{router.depth_coef} and explore={router.explore}, 0 is needed",
    )


def _validate_sequential(model: ModelConfig, router: RouterConfig) -> None:
    _require(
        model.pool_size == model.max_depth,
        f"config.router.form='sequential' is a plain dense run: config.model.pool_size={model.pool_size} "
        f"must equal config.model.max_depth={model.max_depth} (form='cyclic' repeats a smaller pool)",
    )


_OF_FORM = {
    "recursion": _validate_recursion,
    "mod": _validate_mod,
    "skip": _validate_skip,
    "sequential": _validate_sequential,
}


def _validate_run(config: Sections) -> None:
    data, optimizer, train = config.data, config.optimizer, config.train
    _validate_data(data)
    _require(
        data.tokenizer == "byte" or data.vocab_size >= 258,
        f"config.data.vocab_size={data.vocab_size}: a byte-level BPE needs at least 258 "
        "(256 bytes, the document separator and one merge)",
    )
    _require(data.vocab_size <= 2**20, f"config.data.vocab_size={data.vocab_size}: at most 2**20 is needed")
    _require(bool(data.cache_dir), f"config.data.cache_dir={data.cache_dir!r}: a folder is needed")
    _require(0 < data.eval_fraction < 1, f"config.data.eval_fraction={data.eval_fraction}: between 0 and 1 is needed")
    _at_least("optimizer", optimizer, 0, "learning_rate", "warmup_steps", "final_fraction", "weight_decay")
    _at_least("optimizer", optimizer, 0, "group_decay", "group_decay_init", "group_decay_steps")
    for name in ("group_decay", "group_decay_init"):
        value = getattr(optimizer, name)
        _require(
            optimizer.learning_rate * value <= 1,
            f"config.optimizer.{name}={value}: at most 1 / config.optimizer.learning_rate (of "
            f"{optimizer.learning_rate}) is needed; with more, layers overshoot the mean of their group",
        )
    _require(
        bool(optimizer.group_decay_init) == bool(optimizer.group_decay_steps)
        and (not optimizer.group_decay_steps or 0 < optimizer.group_decay <= optimizer.group_decay_init),
        f"config.optimizer.group_decay_init={optimizer.group_decay_init}, "
        f"group_decay_steps={optimizer.group_decay_steps}, group_decay={optimizer.group_decay}: the first two "
        "must both be 0, or both above 0 with 0 < group_decay <= group_decay_init",
    )
    has_groups = not config.router.is_in_order and config.model.pool_size > config.model.num_layer_groups
    _require(
        not optimizer.group_decay or (has_groups and "pool" not in optimizer.frozen_parts),
        f"config.optimizer.group_decay={optimizer.group_decay}: 0 is needed where no group has two layers that may "
        f"change, with config.router.form={config.router.form!r}, config.model.pool_size={config.model.pool_size}, "
        f"{told_groups(config.model)}, config.optimizer.frozen={optimizer.frozen!r}",
    )
    _require(
        not (optimizer.group_decay and optimizer.low_rank),
        f"config.optimizer.group_decay={optimizer.group_decay} with config.optimizer.low_rank={optimizer.low_rank}: "
        "one of them must be 0, for factors have no mean",
    )
    _require(0 < optimizer.b2 < 1, f"config.optimizer.b2={optimizer.b2}: between 0 and 1 is needed")
    _require(optimizer.clip_norm > 0, f"config.optimizer.clip_norm={optimizer.clip_norm}: more than 0 is needed")
    _at_least("train", train, 1, "num_steps", "batch_size", "seq_len", "max_skipped_steps", "accumulate_steps")
    _at_least("train", train, 0, "spike_sigmas", "stall_factor")
    _require(
        0 < train.distill_weight <= 1,
        f"config.train.distill_weight={train.distill_weight}: more than 0 and at most 1 is needed",
    )
    model = config.model
    is_there = {
        "prelude": model.prelude_layers > 0,
        "coda": model.coda_layers > 0,
        "router": config.router.is_trained,
        "positions": model.positions == "learned",
        "final_norm_bias": model.norm == "layer",
    }
    for name in optimizer.frozen_parts:
        _one_of("config.optimizer.frozen", name, PARTS)
        _require(is_there.get(name, True), f"config.optimizer.frozen={optimizer.frozen!r}: this model has no {name}")
    _at_least("optimizer", optimizer, 0, "low_rank")
    _require(
        not optimizer.low_rank or "pool" not in optimizer.frozen_parts,
        f"config.optimizer.low_rank={optimizer.low_rank} with config.optimizer.frozen={optimizer.frozen!r}: "
        "what is frozen does not change by any rank",
    )
    _require(
        train.batch_size % train.accumulate_steps == 0,
        f"config.train.accumulate_steps={train.accumulate_steps} does not divide "
        f"config.train.batch_size={train.batch_size}",
    )
    _require(0 <= train.seed < 2**32, f"config.train.seed={train.seed}: at least 0 and less than 2**32 is needed")
    if data.source == "hops":
        check_hops(data.hops_symbols, data.hops_max, train.seq_len)
    _at_least("eval", config.eval, 0, "every_steps", "num_batches")
    _at_least("checkpoint", config.checkpoint, 0, "every_steps", "keep_every")
    _at_least("checkpoint", config.checkpoint, 1, "keep")
    _at_least("log", config.log, 1, "every_steps")
    _at_least("log", config.log, 0, "sample_tokens")
    _validate_tracking(config)
    _validate_mesh(config)
    _one_of("config.log.alarms", config.log.alarms, ("off", "warn", "stop"))


def _validate_data(data: DataConfig) -> None:
    _one_of("config.data.source", data.source, (*SOURCES, "mixture", "hops"))
    _require(
        (data.source == "mixture") == bool(data.mixture.strip(" ;")),
        f"config.data.source={data.source!r} with config.data.mixture={data.mixture!r}: "
        "the parts of a mixture go with 'mixture' and with nothing else",
    )
    _require(
        data.source not in ("stdlib", "hops", "mixture") or not data.path,
        f"config.data.path={data.path!r}: config.data.source={data.source!r} reads no path; 'text', 'jsonl' or another "
        "source is needed",
    )
    parts = [part for _, part in data.parts()]
    is_file = data.tokenizer.endswith((".json", ".model"))
    _require(
        data.tokenizer in ("bpe", "byte") or is_file,
        f"config.data.tokenizer={data.tokenizer!r}: bpe, byte, a tokenizer.json or a .model of SentencePiece is needed",
    )
    for part in parts:
        if data.source == "mixture":
            _one_of("config.data.mixture: source", part.source, SOURCES)
        _require(
            part.source in ("stdlib", "hops") or bool(part.path),
            f"config.data.path={part.path!r}: config.data.source={part.source!r} needs a path",
        )
        _require(
            part.source != "tokens" or data.tokenizer != "bpe",
            f"config.data.tokenizer={data.tokenizer!r}: the one that the rows of config.data.source='tokens' were made "
            "with is needed, a file, or 'byte'",
        )
    _require(
        not data.streaming or (data.source == "hf" and data.tokenizer != "bpe"),
        f"config.data.streaming=True is for config.data.source='hf' and a tokenizer that is there, not for "
        f"config.data.source={data.source!r} with config.data.tokenizer={data.tokenizer!r}",
    )


def _validate_tracking(config: Sections) -> None:
    log, num_steps = config.log, config.train.num_steps
    for name in log.writer_names:
        _require(
            name in WRITERS,
            f"config.log.writers={log.writers!r}: {name!r} is none of {', '.join(WRITERS)}",
        )
    _require(bool(log.project), f"config.log.project={log.project!r}: a name is needed")
    if log.profile_steps:
        named = f"config.log.profile_steps={log.profile_steps!r}"
        are_two = re.fullmatch(r"\d{1,9},\d{1,9}", log.profile_steps, re.ASCII)
        _require(bool(are_two), f"{named}: 'first,last', two training steps, is needed")
        first, last = log.profiled
        _require(1 <= first <= last, f"{named}: a first step of at least 1 and a last one not before it are needed")
        _require(last <= num_steps, f"{named}: the run ends at config.train.num_steps={num_steps}")


def _validate_mesh(config: Sections) -> None:
    mesh = config.mesh
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "pool", "tensor")}
    for axis, size in sizes.items():
        _require(size == -1 or size >= 1, f"config.mesh.{axis}={size}: at least 1, or -1 for the rest, is needed")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    _require(len(open_axes) <= 1, f"config.mesh: {', '.join(open_axes)} are -1; one may be, for the rest")
    _one_of("config.mesh.pool_dispatch", mesh.pool_dispatch, ("auto", "gather", "exchange"))
    _require(
        mesh.pool_dispatch != "exchange" or config.router.estimator != "dense" or not config.router.is_trained,
        "config.mesh.pool_dispatch='exchange' runs the chosen layer alone, config.router.estimator='dense' all of them",
    )
    check_mesh(config, sizes)


def check_mesh(config: Sections, sizes: Mapping[str, int]) -> None:
    """Whether the axes of a mesh divide what is split over them; one of size -1 is not known yet.

    Raises:
        ConfigError: they don't.
    """
    model, train = config.model, config.train
    known = {f"config.mesh.{axis}": max(size, 1) for axis, size in sizes.items()}

    def of(*axes: str) -> dict[str, int]:
        return {name: size for name, size in known.items() if name.rsplit(".", 1)[1] in axes}

    rows = {**of("data", "fsdp", "pool"), "config.train.accumulate_steps": train.accumulate_steps}
    split = [
        (of("pool"), "model.pool_size", model.pool_size),
        (of("tensor"), "model.num_kv_heads", model.num_kv_heads),
        (of("tensor"), "model.d_ff", model.d_ff),
        (of("fsdp", "pool", "tensor"), "model.d_model", model.d_model),
        (rows, "train.batch_size", train.batch_size),
    ]
    if config.router.looks_at_states and config.router.network != "linear":
        split.append((of("tensor"), "router.hidden", config.router.hidden_size(model)))
    for factors, field, value in split:
        product = math.prod(factors.values())
        told = " · ".join(f"{name}={size}" for name, size in factors.items() if size > 1)
        _require(value % product == 0, f"{told} does not divide config.{field}={value}")
    split_over = " · ".join(f"{name}={size}" for name, size in known.items() if size > 1)
    _require(
        not (split_over and config.optimizer.low_rank),
        f"config.optimizer.low_rank={config.optimizer.low_rank}: on one device alone, and not with {split_over}",
    )


def check_hops(
    num_symbols: int,
    max_hops: int,
    seq_len: int,
    names: tuple[str, str] = ("config.data.hops_symbols", "config.data.hops_max"),
) -> None:
    """Whether rows of the hop task can have these sizes.

    Args:
        names: of the first two, as the user gave them.

    Raises:
        ConfigError: they can't.
    """
    symbols, needed = f"{names[0]}={num_symbols}", 3 * num_symbols + 3
    _require(num_symbols <= HOPS_ALPHABET, f"{symbols}: at most {HOPS_ALPHABET}, the whole alphabet, is needed")
    _require(1 <= max_hops < num_symbols, f"{names[1]}={max_hops}: at least 1 and less than {symbols} is needed")
    _require(
        seq_len >= needed,
        f"config.train.seq_len={seq_len}: {symbols} needs at least {needed}, for the pairs and one query",
    )
