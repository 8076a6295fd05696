"""What checks of a config are made of, and those that are made again where devices or flags are known.

All raise ConfigError, of one line that names the field, its value and what is needed.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from radialnet.sections import HOPS_ALPHABET, ConfigError, ModelConfig, Sections


def one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field}={value!r}: one of {', '.join(allowed)} is needed")


def at_least(section: str, values: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        if not value >= least:
            raise ConfigError(f"config.{section}.{name}={value}: at least {least} is needed")


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def expanded(path: str | Path, field: str = "") -> Path:
    """A path as it was given, with ~ for a home folder, which shells leave alone after `--workdir=`.

    Raises:
        ConfigError: it is not known whose home folder that is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        where = f"{field}={str(path)!r}" if field else path
        raise ConfigError(f"{where}: {error}") from None


def told_groups(model: ModelConfig) -> str:
    """Where their number stands, for messages."""
    if model.num_groups:
        return f"config.model.num_groups={model.num_groups}"
    return f"config.model.max_depth={model.max_depth} (config.model.num_groups=0)"


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
        require(value % product == 0, f"{told} does not divide config.{field}={value}")
    split_over = " · ".join(f"{name}={size}" for name, size in known.items() if size > 1)
    require(
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
    require(num_symbols <= HOPS_ALPHABET, f"{symbols}: at most {HOPS_ALPHABET}, the whole alphabet, is needed")
    require(1 <= max_hops < num_symbols, f"{names[1]}={max_hops}: at least 1 and less than {symbols} is needed")
    require(
        seq_len >= needed,
        f"config.train.seq_len={seq_len}: {symbols} needs at least {needed}, for the pairs and one query",
    )
