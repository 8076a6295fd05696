"""What the fields of a run must be beside those of its model, each and together; else ConfigError."""

import re

from radialnet.checks import at_least, check_hops, check_mesh, one_of, require, told_groups
from radialnet.sections import PARTS, SOURCES, WRITERS, DataConfig, Sections


def validate_run(config: Sections) -> None:
    data, train = config.data, config.train
    _validate_data(data)
    _validate_optimizer(config)
    at_least("train", train, 1, "num_steps", "batch_size", "seq_len", "max_skipped_steps", "accumulate_steps")
    at_least("train", train, 0, "spike_sigmas", "stall_factor")
    require(
        0 < train.distill_weight <= 1,
        f"config.train.distill_weight={train.distill_weight}: more than 0 and at most 1 is needed",
    )
    require(
        train.batch_size % train.accumulate_steps == 0,
        f"config.train.accumulate_steps={train.accumulate_steps} does not divide "
        f"config.train.batch_size={train.batch_size}",
    )
    require(0 <= train.seed < 2**32, f"config.train.seed={train.seed}: at least 0 and less than 2**32 is needed")
    if data.source == "hops":
        check_hops(data.hops_symbols, data.hops_max, train.seq_len)
    at_least("eval", config.eval, 0, "every_steps", "num_batches")
    at_least("checkpoint", config.checkpoint, 0, "every_steps", "keep_every")
    at_least("checkpoint", config.checkpoint, 1, "keep")
    at_least("log", config.log, 1, "every_steps")
    at_least("log", config.log, 0, "sample_tokens")
    _validate_tracking(config)
    _validate_mesh(config)
    one_of("config.log.alarms", config.log.alarms, ("off", "warn", "stop"))


def _validate_data(data: DataConfig) -> None:
    one_of("config.data.source", data.source, (*SOURCES, "mixture", "hops"))
    require(
        (data.source == "mixture") == bool(data.mixture.strip(" ;")),
        f"config.data.source={data.source!r} with config.data.mixture={data.mixture!r}: "
        "the parts of a mixture go with 'mixture' and with nothing else",
    )
    require(
        data.source not in ("stdlib", "hops", "mixture") or not data.path,
        f"config.data.path={data.path!r}: config.data.source={data.source!r} reads no path; 'text', 'jsonl' or another "
        "source is needed",
    )
    parts = [part for _, part in data.parts()]
    is_file = data.tokenizer.endswith((".json", ".model"))
    require(
        data.tokenizer in ("bpe", "byte") or is_file,
        f"config.data.tokenizer={data.tokenizer!r}: bpe, byte, a tokenizer.json or a .model of SentencePiece is needed",
    )
    for part in parts:
        if data.source == "mixture":
            one_of("config.data.mixture: source", part.source, SOURCES)
        require(
            part.source in ("stdlib", "hops") or bool(part.path),
            f"config.data.path={part.path!r}: config.data.source={part.source!r} needs a path",
        )
        require(
            part.source not in ("stdlib", "hops") or not part.path,
            f"config.data.mixture: {part.source} reads no path, got {part.path!r}",
        )
        require(
            part.source != "tokens" or data.tokenizer != "bpe",
            f"config.data.tokenizer={data.tokenizer!r}: the one that the rows of config.data.source='tokens' were made "
            "with is needed, a file, or 'byte'",
        )
    require(
        not data.streaming or (data.source == "hf" and data.tokenizer != "bpe"),
        f"config.data.streaming=True is for config.data.source='hf' and a tokenizer that is there, not for "
        f"config.data.source={data.source!r} with config.data.tokenizer={data.tokenizer!r}",
    )
    require(
        data.tokenizer == "byte" or data.vocab_size >= 258,
        f"config.data.vocab_size={data.vocab_size}: a byte-level BPE needs at least 258 "
        "(256 bytes, the document separator and one merge)",
    )
    require(data.vocab_size <= 2**20, f"config.data.vocab_size={data.vocab_size}: at most 2**20 is needed")
    require(bool(data.cache_dir), f"config.data.cache_dir={data.cache_dir!r}: a folder is needed")
    require(0 < data.eval_fraction < 1, f"config.data.eval_fraction={data.eval_fraction}: between 0 and 1 is needed")


def _validate_optimizer(config: Sections) -> None:
    model, optimizer = config.model, config.optimizer
    rates = "learning_rate", "router_scale", "warmup_steps", "final_fraction", "weight_decay"
    at_least("optimizer", optimizer, 0, *rates)
    at_least("optimizer", optimizer, 0, "group_decay", "group_decay_init", "group_decay_steps")
    require(
        optimizer.router_scale == 1 or (config.router.is_trained and "router" not in optimizer.frozen_parts),
        f"config.optimizer.router_scale={optimizer.router_scale}: 1 is needed where no router learns, with "
        f"config.router.form={config.router.form!r}, config.optimizer.frozen={optimizer.frozen!r}",
    )
    for name in ("group_decay", "group_decay_init"):
        value = getattr(optimizer, name)
        require(
            optimizer.learning_rate * value <= 1,
            f"config.optimizer.{name}={value}: at most 1 / config.optimizer.learning_rate (of "
            f"{optimizer.learning_rate}) is needed; with more, layers overshoot the mean of their group",
        )
    require(
        bool(optimizer.group_decay_init) == bool(optimizer.group_decay_steps)
        and (not optimizer.group_decay_steps or 0 < optimizer.group_decay <= optimizer.group_decay_init),
        f"config.optimizer.group_decay_init={optimizer.group_decay_init}, "
        f"group_decay_steps={optimizer.group_decay_steps}, group_decay={optimizer.group_decay}: the first two "
        "must both be 0, or both above 0 with 0 < group_decay <= group_decay_init",
    )
    has_groups = not config.router.is_in_order and model.pool_size > model.num_layer_groups
    require(
        not optimizer.group_decay or (has_groups and "pool" not in optimizer.frozen_parts),
        f"config.optimizer.group_decay={optimizer.group_decay}: 0 is needed where no group has two layers that may "
        f"change, with config.router.form={config.router.form!r}, config.model.pool_size={model.pool_size}, "
        f"{told_groups(model)}, config.optimizer.frozen={optimizer.frozen!r}",
    )
    require(
        not (optimizer.group_decay and optimizer.low_rank),
        f"config.optimizer.group_decay={optimizer.group_decay} with config.optimizer.low_rank={optimizer.low_rank}: "
        "one of them must be 0, for factors have no mean",
    )
    require(0 < optimizer.b2 < 1, f"config.optimizer.b2={optimizer.b2}: between 0 and 1 is needed")
    require(optimizer.clip_norm > 0, f"config.optimizer.clip_norm={optimizer.clip_norm}: more than 0 is needed")
    is_there = {
        "prelude": model.prelude_layers > 0,
        "coda": model.coda_layers > 0,
        "router": config.router.is_trained,
        "positions": model.positions == "learned",
        "final_norm_bias": model.norm == "layer",
    }
    for name in optimizer.frozen_parts:
        one_of("config.optimizer.frozen", name, PARTS)
        require(is_there.get(name, True), f"config.optimizer.frozen={optimizer.frozen!r}: this model has no {name}")
    at_least("optimizer", optimizer, 0, "low_rank")
    require(
        not optimizer.low_rank or "pool" not in optimizer.frozen_parts,
        f"config.optimizer.low_rank={optimizer.low_rank} with config.optimizer.frozen={optimizer.frozen!r}: "
        "what is frozen does not change by any rank",
    )


def _validate_tracking(config: Sections) -> None:
    log, num_steps = config.log, config.train.num_steps
    for name in log.writer_names:
        require(
            name in WRITERS,
            f"config.log.writers={log.writers!r}: {name!r} is none of {', '.join(WRITERS)}",
        )
    require(bool(log.project), f"config.log.project={log.project!r}: a name is needed")
    if log.profile_steps:
        named = f"config.log.profile_steps={log.profile_steps!r}"
        are_two = re.fullmatch(r"\d{1,9},\d{1,9}", log.profile_steps, re.ASCII)
        require(bool(are_two), f"{named}: 'first,last', two training steps, is needed")
        first, last = log.profiled
        require(1 <= first <= last, f"{named}: a first step of at least 1 and a last one not before it are needed")
        require(last <= num_steps, f"{named}: the run ends at config.train.num_steps={num_steps}")


def _validate_mesh(config: Sections) -> None:
    mesh = config.mesh
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "pool", "tensor")}
    for axis, size in sizes.items():
        require(size == -1 or size >= 1, f"config.mesh.{axis}={size}: at least 1, or -1 for the rest, is needed")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    require(len(open_axes) <= 1, f"config.mesh: {', '.join(open_axes)} are -1; one may be, for the rest")
    one_of("config.mesh.pool_dispatch", mesh.pool_dispatch, ("auto", "gather", "exchange"))
    require(
        mesh.pool_dispatch != "exchange" or config.router.estimator != "dense" or not config.router.is_trained,
        "config.mesh.pool_dispatch='exchange' runs the chosen layer alone, config.router.estimator='dense' all of them",
    )
    check_mesh(config, sizes)
