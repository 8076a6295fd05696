"""The configuration: frozen dataclasses, built from a `configs/*.py` file and validated once, here.

Defaults and the meaning of each field stand in `configs/base.py`. No jax in this file.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from configs import base
from radialnet.files import write_whole
from radialnet.model_checks import validate_model, validate_router
from radialnet.run_checks import validate_run
from radialnet.sections import ConfigError, Sections


@dataclasses.dataclass(frozen=True)
class Config(Sections):
    """A whole run. Build it with `from_dict` or `load`, which validate."""

    @classmethod
    def from_dict(cls, fields: Mapping | ConfigDict, **overrides: object) -> "Config":
        """Build and validate. `fields` maps section to field to value; overrides are written `section__field=value`.

        Raises:
            ConfigError: an unknown or missing field, a wrong type, or values that don't go together.
        """
        if overrides:
            fields = {section: {**of_section} for section, of_section in fields.items()}
            for name, value in overrides.items():
                section, _, field = name.partition("__")
                fields.setdefault(section, {})[field] = value
        config = _build(cls, fields, "config")
        for validate in (validate_model, validate_router, validate_run):
            validate(config)
        return config

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Read what `save` wrote, also before a field was there: the default of a new one is what runs did without it.

        Raises:
            ConfigError: there is none, or it can't be read.
        """
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a run folder holds the config.json that train.py wrote") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: a JSON object is needed")
        if "model_type" in fields:
            raise ConfigError(f"{path}: of transformers, and of no run; radialnet.radialize makes one of it")
        for section, defaults in base.get_config().to_dict().items():
            if isinstance(found := fields.setdefault(section, {}), dict):
                fields[section] = {**defaults, **found}
        _forget_what_was_never_read(fields)
        return cls.from_dict(fields)


def _forget_what_was_never_read(fields: dict) -> None:
    """Of runs of before it was refused: what their form of router made no use of."""
    router, model = fields["router"], fields["model"]
    if not (isinstance(router, dict) and isinstance(model, dict)):
        return
    form, sizes = router["form"], [model[name] for name in ("min_depth", "max_depth", "pool_size")]
    unread = {"skip": ["load_bias_rate"], "mod": ["load_bias_rate", "noise"]}
    unread["recursion"] = [*unread["mod"], "explore"]
    router |= dict.fromkeys(unread.get(form, []), 0.0)
    if form == "recursion" and all(type(size) is int for size in sizes):
        min_depth, max_depth, pool_size = sizes
        # A single number of rounds is left.
        model["min_depth"] = max_depth if max(min_depth, 1) > max_depth - pool_size else min_depth


def _build(cls: type, fields: Mapping | ConfigDict, where: str):
    """An instance of the dataclass from a mapping, each value checked against the field's type."""
    if not isinstance(fields, Mapping | ConfigDict):
        raise ConfigError(f"{where}={fields!r}: a section with fields is needed")
    types = typing.get_type_hints(cls)
    unknown, missing = set(fields.keys()) - set(types), set(types) - set(fields.keys())
    if unknown:
        raise ConfigError(f"{where}.{min(unknown)}: unknown field; {where} has {', '.join(types)}")
    if missing:
        raise ConfigError(f"{where}.{min(missing)}: missing")
    values = {}
    for name, wanted in types.items():
        value, field = fields[name], f"{where}.{name}"
        if dataclasses.is_dataclass(wanted):
            values[name] = _build(wanted, value, field)
            continue
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise ConfigError(f"{field}={value!r}: {wanted.__name__} is needed, not {type(value).__name__}")
        # What devices count with; the seed has limits of its own.
        if wanted is int and abs(value) >= 2**31 and name != "seed":
            raise ConfigError(f"{field}={value}: less than 2**31 is needed")
        if wanted is float and not math.isfinite(value):
            raise ConfigError(f"{field}={value}: a finite number is needed")
        values[name] = value
    return cls(**values)
