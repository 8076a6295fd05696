"""What readers of models that others trained have in common: fields of a config.json, tensors, each in its place."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from configs import base
from radialnet.config import Config
from radialnet.sections import ConfigError

# What such a model is evaluated on at a time; its own length would take much memory.
_MAX_SEQ_LEN, _BATCH_SIZE = 1024, 4

Tensors = dict[str, np.ndarray]


def needed(fields: Mapping, name: str, where: str) -> int:
    """A field that must be a whole number of at least 1. Raises ConfigError: it isn't."""
    if type(value := fields.get(name)) is not int or value < 1:
        raise ConfigError(f"{where}: {name}={value!r}, a whole number of at least 1 is needed")
    return value


def number(fields: Mapping, name: str, default: float, where: str) -> float:
    """A field that must be a number above 0, where it is there. Raises ConfigError: it is something else."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{where}: {name}={value!r}, a number above 0 is needed")
    return float(value)


def is_true(fields: Mapping, name: str, default: bool, where: str) -> bool:
    """A field that is true or false. Raises ConfigError: it is something else."""
    if not isinstance(value := fields.get(name, default), bool):
        raise ConfigError(f"{where}: {name}={value!r}, true or false is needed")
    return value


def check_representable(where: str, *fields: tuple[str, object, object]) -> None:
    """Raise ConfigError for the first of (name, value, what alone can be represented) that is something else."""
    for name, value, allowed in fields:
        if value != allowed:
            raise ConfigError(f"{where}: {name}={value!r}, only {allowed!r} can be represented")


def sequential_config(where: str, num_layers: int, longest: int, **model) -> Config:
    """The config of a `sequential` run of that many layers.

    Args:
        where: what an error message begins with.
        longest: tokens of its texts at most.
        model: further fields of `config.model`.
    """
    config = base.get_config()
    depth = dict.fromkeys(("pool_size", "max_depth", "min_depth"), num_layers)
    config.model.update(**depth, init="distinct", qk_norm=False, **model)
    config.router.form = "sequential"
    # With one step all views are one.
    config.cache.view = "same_layer" if num_layers > 1 else "latest"
    config.train.update(batch_size=_BATCH_SIZE, seq_len=min(longest, _MAX_SEQ_LEN))
    try:
        return Config.from_dict(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


class Left:
    """Tensors of which each is to be taken once."""

    def __init__(self, tensors: Mapping[str, np.ndarray], where: str):
        """
        Args:
            where: what an error message begins with.
        """
        self._left, self._where = dict(tensors), where

    def take(self, name: str, *shape: int) -> np.ndarray:
        """A tensor in fp32. Raises ConfigError: it is missing, or of another shape, or not finite."""
        if name not in self._left:
            raise ConfigError(f"{self._where}: {name} is missing")
        x = self._left.pop(name)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ConfigError(f"{self._where}: {name} is {x.dtype}, floats are needed")
        x = np.asarray(x, np.float32)
        if x.shape != shape:
            raise ConfigError(f"{self._where}: {name} is {list(x.shape)}, but its config needs {list(shape)}")
        if not np.isfinite(x).all():
            raise ConfigError(f"{self._where}: {name} has values that are not finite")
        return x

    def take_head(self, embedding_VD: np.ndarray, is_tied: bool) -> np.ndarray:
        """`lm_head.weight`, or the embedding; some files hold it twice."""
        if is_tied:
            self._left.pop("lm_head.weight", None)
            return embedding_VD
        return self.take("lm_head.weight", *embedding_VD.shape)

    def check_none(self) -> None:
        """Raise ConfigError when any is left."""
        if self._left:
            raise ConfigError(f"{self._where}: {min(self._left)}: a radial network has no such tensor")


def stacked(layers: list[Tensors]) -> dict:
    """The pool of these layers."""
    return {"block": {name: np.stack([w[name] for w in layers]) for name in layers[0]}}
