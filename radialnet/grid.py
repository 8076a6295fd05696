"""A grid of runs that differ in some fields: its axes, as flags write them, and its cells. Pure; no jax."""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable

from radialnet.config import Config
from radialnet.sections import IN_ORDER_FORMS, ConfigError

# The fields that bound or steer the depth of a token, and how a plot writes their values beside its points.
DEPTH_FIELDS = {"model.max_depth": "T", "router.depth_target": "d*"}

Values = dict[str, int | float | str]  # "section.field" to its value.

# Of the name of a folder, in bytes; most file systems take no longer one.
_LONGEST_NAME = 255


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str  # Readable where it is short enough, and fit to name its folder.
    series: str  # What it has in common with its likes at other depths and of other seeds.
    depth: str  # Its depth fields.
    swept: Values  # All fields that an axis of the grid sets.
    overrides: Values  # All that differs from the config file.
    config: Config


def parse_axis(text: str, fields: dict, said: str) -> list[Values]:
    """The points of an axis, separated by commas.

    `section.field=value,value` sets one field. Fields that change together are joined by a plus, and then every point
    is written in full: `router.form=sequential,router.form=factored+model.pool_size=16`.

    Args:
        fields: section to field to value; a value is read as the type that stands there.
        said: the flag as it was given, for the error.

    Raises:
        ConfigError: no axis, an unknown field, or a value of another type.
    """
    points, only = [], None
    for part in text.split(","):
        # Not at every plus: there may be one in a number or in the name of a folder.
        assignments = [_ASSIGNMENT.fullmatch(one) for one in re.split(r"\+(?=\w+\.\w+=)", part.strip())]
        if assignments == [None] and only:
            points.append({only: _typed(fields, only, part.strip(), said)})
            continue
        if None in assignments:
            raise ConfigError(f"{said}: {part!r} is not section.field=value")
        point = {match[1]: _typed(fields, match[1], match[2], said) for match in assignments}
        if len(point) < len(assignments):
            raise ConfigError(f"{said}: {part!r} sets a field twice")
        points.append(point)
        only = assignments[0][1] if len(assignments) == 1 else None
    return points


_ASSIGNMENT = re.compile(r"(\w+\.\w+)=(.*)")


def _typed(fields: dict, field: str, text: str, said: str) -> int | float | str:
    section, name = field.split(".")
    if name not in fields.get(section, {}):
        raise ConfigError(f"{said}: no field {field}; configs/base.py has all fields")
    kind = type(fields[section][name])
    try:
        # `bool` of any text but the empty one is True.
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{said}: {kind.__name__} is needed for config.{field}, not {text!r}") from None


def expand(fields: dict, axes: list[list[Values]], given: Values) -> list[Cell]:
    """All cells of the grid, validated; the last axis varies fastest.

    Args:
        fields: those of the config, `given` included: section to field to value.
        given: what the command line sets for all cells.

    Raises:
        ConfigError: a field is set twice, a cell's config can't work, or two cells would share a folder.
    """
    counts = collections.Counter(list(given))
    for axis in axes:
        counts.update({field for point in axis for field in point})
    for field, count in counts.items():
        if count > 1:
            raise ConfigError(f"config.{field} is set {count} times; an axis must be the only one to set it")
    labels = _labels([*(field for axis in axes for point in axis for field in point), "train.seed"])
    cells = {}
    for points in itertools.product(*axes):
        assigned = {field: value for point in points for field, value in point.items()}
        overrides = {**given, **assigned, **_following(fields, assigned, given)}
        others = {field: value for field, value in assigned.items() if field != "train.seed"}
        # The seed is always in the name, so that seeds can be added to a grid.
        seed = assigned.get("train.seed", _value(fields, "train.seed"))
        name = _folder_name({labels[field]: value for field, value in {**others, "train.seed": seed}.items()})
        try:
            config = Config.from_dict(fields, **{field.replace(".", "__"): value for field, value in overrides.items()})
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from None
        if name in cells:
            raise ConfigError(f"two cells of the grid are {name}; each needs a folder of its own")
        cells[name] = Cell(
            name=name,
            series=joined({labels[field]: value for field, value in others.items() if field not in DEPTH_FIELDS}),
            depth=" ".join(f"{DEPTH_FIELDS[field]}={others[field]:g}" for field in DEPTH_FIELDS if field in others),
            swept={field: _value(config.to_dict(), field) for field in labels},
            overrides=overrides,
            config=config,
        )
    return list(cells.values())


def _following(fields: dict, assigned: Values, given: Values) -> Values:
    """What a max depth, or a form, takes along where it is not set itself.

    Exits that are off stay off, what may not be more than the depth is lowered to it, a dense run has as many layers.
    Layers in order have no groups, and none that are pulled together; a pull of 0 does not begin with another one.
    """
    model, router, following = fields["model"], fields["router"], {}
    form = assigned.get("router.form", router["form"])
    if "model.max_depth" in assigned:
        max_depth = assigned["model.max_depth"]
        following["model.min_depth"] = max_depth
        if model["min_depth"] < model["max_depth"]:
            following["model.min_depth"] = min(model["min_depth"], max_depth)
            following["router.depth_target"] = min(router["depth_target"], float(max_depth))
        if model["num_groups"] > max_depth:
            following["model.num_groups"] = max_depth
        if form == "sequential":
            following["model.pool_size"] = max_depth
    pulled = form not in IN_ORDER_FORMS and assigned.get("optimizer.group_decay", True)
    if form in IN_ORDER_FORMS:
        following |= {"model.num_groups": 0} if model["num_groups"] else {}
    if not pulled:
        pull = {"group_decay": 0.0, "group_decay_init": 0.0, "group_decay_steps": 0}
        following |= {f"optimizer.{name}": zero for name, zero in pull.items() if fields["optimizer"][name]}
    return {field: value for field, value in following.items() if field not in assigned and field not in given}


def _value(fields: dict, field: str) -> int | float | str:
    section, name = field.split(".")
    return fields[section][name]


def _labels(fields: Iterable[str]) -> dict[str, str]:
    """Each field without its section, unless another has the same name."""
    fields = dict.fromkeys(fields)
    counts = collections.Counter(field.split(".")[1] for field in fields)
    return {field: field if counts[field.split(".")[1]] > 1 else field.split(".")[1] for field in fields}


def joined(values: Values) -> str:
    """`max_depth=4+seed=0`; what is better not in the name of a folder becomes an underscore."""
    return "+".join(f"{label}=" + re.sub(r"[^\w.+-]", "_", str(value)) for label, value in values.items())


def _folder_name(values: Values) -> str:
    """`joined`; where that is too long for a folder, its beginning, a hash of it and the last value, a cell's seed."""
    name = joined(values)
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    label, value = list(values.items())[-1]
    end = f"+{hashlib.sha256(name.encode()).hexdigest()[:12]}+{joined({label: value})}"
    return name.encode()[: _LONGEST_NAME - len(end.encode())].decode(errors="ignore") + end
