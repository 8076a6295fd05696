"""The models that docs/RESULTS.md compares, and the figures that follow from their runs. Pure; no jax."""

import dataclasses
import statistics

from configs import base
from radialnet.grid import Cell, Values, expand

_DEPTHS: Values = {
    "model.max_depth": 6,
    "model.min_depth": 2,
    "router.exit_warmup_steps": 300,
    "router.depth_ramp_steps": 700,
}
_EXITS: Values = {**_DEPTHS, "router.exit_training": "benefit", "router.explore": 0.05}
_LEARNED: Values = {"router.form": "factored"}
_PULL: Values = {
    "optimizer.group_decay": 0.03,
    "optimizer.group_decay_init": 3.0,
    "optimizer.group_decay_steps": 1800,
}
# Each token and the one before it say in turn where it goes.
_TURNS: Values = {"router.hash_span": 2}
_FOUR_OF_50: Values = {"model.pool_size": 50, "model.num_groups": 4, "cache.view": "same_step"}
_ONE_EITHER_WAY: Values = {**_EXITS, "model.max_depth": 5, "model.min_depth": 3}
_READ: Values = {"router.read_coef": 0.2}
# Routes that the token and the step give, to a layer of the step's group.
_GROUPS: Values = {"router.form": "hash_exit", "router.load_coef": 0.0, **_FOUR_OF_50}
_GROUPS_AND_EXITS: Values = {**_GROUPS, **_ONE_EITHER_WAY}
# Their layers pulled to the mean of their group, and twice as much learned from states that are read on the way.
_RADIAL: Values = {**_GROUPS_AND_EXITS, **_PULL, **_READ}
# Routes that a linear router learns by the probability of its choice; the prior keeps them in the step's group.
_LEARNED_GROUPS: Values = {
    **_LEARNED,
    "router.network": "linear",
    "router.estimator": "weighted",
    # At the learning rate of all else routes move to and fro with each step, and the loss differs by 9 % between seeds.
    "optimizer.router_scale": 0.1,
    **_FOUR_OF_50,
    **_PULL,
}
# To any layer, by a prior that leaves a router of all layers no choice: what there was before `hash_exit`.
_HASH: Values = {**_LEARNED, "router.prior": "hash", "router.prior_weight": 1000.0, "router.load_coef": 0.0}
_ANY_ORDER: Values = {**_HASH, "model.pool_size": 48, **_EXITS}
# Half the depth of six dense layers, by the same rule: as many groups as layers on average, exits from one step before
# that to one after.
_HALF: Values = {
    **_RADIAL,
    "model.max_depth": 4,
    "model.min_depth": 2,
    "model.num_groups": 3,
    "router.depth_target": 3.0,
}
_HASH_50: Values = {"router.form": "hash", "model.pool_size": 50}
_RATE: Values = {"optimizer.learning_rate": 3e-3}
_SIX: Values = {"model.pool_size": 6, "model.max_depth": 6, "model.min_depth": 6}
# What others do with the same code, 4 layers per token.
_PEERS: dict[str, Values] = {
    "early exit": {"router.form": "early_exit", "model.pool_size": 6, **_EXITS},
    "Mixture-of-Depths": {
        "router.form": "mod",
        "router.estimator": "weighted",
        # All tokens at every other step, a third of them at the steps between: 3 + 3/3 layers.
        "router.capacity": 0.3334,
        **_SIX,
        "cache.view": "same_step",
    },
    "Mixture-of-Recursions": {
        "router.form": "recursion",
        "router.estimator": "weighted",
        "router.z_coef": 0.02,
        "model.pool_size": 2,
        "model.init": "distinct",
        **_DEPTHS,
    },
    "looped": {"router.form": "cyclic", "model.pool_size": 2, "model.init": "distinct"},
    "random": {"router.form": "random", "model.pool_size": 16},
}
# Each is to execute 4 layers per token on average, but where its name says otherwise. What differs from dense_micro.
MODELS: dict[str, Values] = {
    "dense": {},
    "dense, 6 layers": _SIX,
    # configs/radial_micro.py.
    "radial": {**_RADIAL, **_TURNS},
    # As `radial` and its like were before tokens took turns.
    "radial, T/2": _HALF,
    "radial, fixed depth": {**_GROUPS, **_PULL},
    "radial, learned routes": {**_LEARNED_GROUPS, **_ONE_EITHER_WAY, **_READ},
    "radial, learned routes, fixed depth": _LEARNED_GROUPS,
    # radial_micro of 2026-11-27: neither pulled nor reading as much.
    "radial, not pulled": _GROUPS_AND_EXITS,
    "radial, exits by token, not pulled": {**_GROUPS_AND_EXITS, "router.exit_sees": "token"},
    "radial, fixed depth, not pulled": _GROUPS,
    "hash, pool of 50": _HASH_50,
    # Any layer at any step: all are pulled to one mean, and begin as clones of one.
    "hash, pool of 50, pulled": {**_HASH_50, **_PULL, "model.num_groups": 1},
    **_PEERS,
}
BASELINES = ("hash, pool of 50", "hash, pool of 50, pulled", *_PEERS)
# Random routes are so far off that all the others would be one point; what was before would cover what is.
NOT_DRAWN = (
    "random",
    "radial, not pulled",
    "radial, exits by token, not pulled",
    "radial, fixed depth, not pulled",
)
# With more seeds, pools and routes, at the learning rate that dense_micro had until 2026-11-27.
RATE_MODELS: dict[str, Values] = {
    f"{name}, rate 3e-3": {**values, **_RATE}
    for name, values in {
        "dense": {},
        "dense, 6 layers": _SIX,
        "radial, any order": _ANY_ORDER,
        "radial, any order, pool of 24": {**_ANY_ORDER, "model.pool_size": 24},
        "radial, any order, pool of 16": {**_ANY_ORDER, "model.pool_size": 16},
        "radial, any order, T/2": {**_ANY_ORDER, "router.depth_target": 3.0},
        "radial, any order, exits by token": {**_ANY_ORDER, "router.exit_sees": "token"},
        "radial, any order, exits by token, T/2": {
            **_ANY_ORDER,
            "router.exit_sees": "token",
            "router.depth_target": 3.0,
        },
        "radial, learned routes": {**_LEARNED, "model.pool_size": 24, **_EXITS},
        "radial, learned routes, fixed depth": {**_LEARNED, "model.pool_size": 16},
        # Early exit was another model then, with a router that had an output for each layer.
        **{name: values for name, values in _PEERS.items() if name != "early exit"},
        "hash": {"router.form": "hash", "model.pool_size": 16},
        "hash, pool of 24": {"router.form": "hash", "model.pool_size": 24},
        "hash, pool of 48": {"router.form": "hash", "model.pool_size": 48},
    }.items()
}
# Added to the trained exit bias (nats that another layer must take off the loss) to read one model at many depths. The
# first one switches exits off.
EXIT_BIASES = (-1e9, -0.1, -0.05, -0.03, -0.02, -0.01, 0.0, 0.01, 0.02, 0.03, 0.05)
# How hard the layers of a group are pulled where text is words, and is read twice or more: one layer for all at first,
# then less and less for 0.6 of the run.
_MINI_PULL: Values = {
    "optimizer.group_decay": 0.3,
    "optimizer.group_decay_init": 100.0,
    "optimizer.group_decay_steps": 408,
}
_FOUR_PULL: Values = {
    "optimizer.group_decay": 1.0,
    "optimizer.group_decay_init": 30.0,
    "optimizer.group_decay_steps": 720,
}
# Models of words, by what differs from configs/dense_mini.py: 2 layers per token, but where it says otherwise.
_MINI_GROUPS: Values = {
    "router.form": "hash_exit",
    "model.pool_size": 48,
    "model.num_groups": 1,
    "cache.view": "same_step",
    **_MINI_PULL,
}
_MINI_EXITS: Values = {
    "model.max_depth": 3,
    "model.min_depth": 1,
    "router.exit_training": "benefit",
    "router.read_every": 4,
    "router.explore": 0.05,
    "router.exit_warmup_steps": 80,
    "router.depth_ramp_steps": 200,
}
_MINI_HASH: Values = {"router.form": "hash", "model.pool_size": 48, "model.num_groups": 1}
MINI_MODELS: dict[str, Values] = {
    "BPE, dense": {},
    # configs/radial_mini.py.
    "BPE, radial": {**_MINI_GROUPS, **_MINI_EXITS},
    # What `BPE, radial` is with a fixed depth.
    "BPE, hash, pulled": {**_MINI_HASH, **_MINI_PULL},
    "BPE, hash": _MINI_HASH,
    # The peers of bytes. Where they have exits, those begin when the radial network's do and allow the same depths; of
    # early exit every fourth token is read on the way here too.
    "BPE, early exit": {"router.form": "early_exit", "model.pool_size": 3, **_MINI_EXITS},
    # 2.125 layers per token: all of them execute the first and the last, an eighth that between, as in its paper. With
    # 2 it would be the dense model.
    "BPE, Mixture-of-Depths": {
        **_PEERS["Mixture-of-Depths"],
        "router.capacity": 0.125,
        **dict.fromkeys(("model.pool_size", "model.max_depth", "model.min_depth"), 3),
    },
    "BPE, Mixture-of-Recursions": {
        **_PEERS["Mixture-of-Recursions"],
        "model.pool_size": 1,
        **{name: _MINI_EXITS[name] for name in _DEPTHS},
    },
    "BPE, looped": {**_PEERS["looped"], "model.pool_size": 1},
    "BPE, random": {**_PEERS["random"], "model.pool_size": 8},
}
MINI_BASELINES = ("BPE, hash, pulled", "BPE, hash", *(f"BPE, {name}" for name in _PEERS))
# Likewise with 4 layers per token; radial ones in four groups. Dense ones learn to copy what was read in every seed; of
# two it is chance.
_FOUR: Values = {
    "model.pool_size": 4,
    "model.max_depth": 4,
    "model.min_depth": 4,
    "router.depth_target": 4.0,
    "train.num_steps": 1200,
    "eval.every_steps": 600,
}
_FOUR_GROUPS: Values = {**_MINI_GROUPS, "model.num_groups": 4, **_FOUR_PULL}
_FOUR_STEPS: Values = {"router.exit_warmup_steps": 120, "router.depth_ramp_steps": 280}
_FOUR_EXITS: Values = {**_MINI_EXITS, "model.max_depth": 5, "model.min_depth": 3, **_FOUR_STEPS}
FOUR_MODELS: dict[str, Values] = {
    f"{name}, 4 layers": {**_FOUR, **values}
    for name, values in {
        "BPE, dense": {},
        "BPE, radial": {**_FOUR_GROUPS, **_FOUR_EXITS},
        "BPE, radial, fixed depth": _FOUR_GROUPS,
        "BPE, hash, pulled": {**_MINI_HASH, **_FOUR_PULL},
        **{
            # Exits begin when those of the radial network do. Early exit reads all of its tokens on the way.
            f"BPE, {name}": {**values, **(_FOUR_STEPS if "router.exit_warmup_steps" in values else {})}
            for name, values in _PEERS.items()
        },
    }.items()
}
# Models of the hop task, by what differs from configs/hops.py.
HOP_MODELS: dict[str, Values] = {
    "hops, radial": {},
    "hops, looped": {"router.form": "cyclic", "model.min_depth": 7},
    "hops, dense": {"router.form": "sequential", "model.pool_size": 7, "model.min_depth": 7},
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Models that are compared by their loss."""

    title: str
    models: dict[str, Values]
    dense: str  # The model that the others are compared with.
    said: str  # What they have in common.


TABLES = (
    Table(
        "Bytes",
        MODELS,
        "dense",
        "6 million bytes, AdamW at a learning rate of 6e-3. In `radial` alone each token and the one before it say in "
        "turn where it goes (`router.hash_span`). Exit biases have settled after the last step, on 64 batches that are "
        "not counted, in `radial`, `radial, T/2`, `radial, learned routes`, Mixture-of-Recursions and all words that "
        "have exits; the depth of other models with exits may be off its target. Routers that learn routes have a "
        "tenth of the learning rate here.",
    ),
    Table(
        "Bytes at a rate of 3e-3",
        RATE_MODELS,
        "dense, rate 3e-3",
        "6 million bytes, AdamW at a learning rate of 3e-3. Mixture-of-Recursions is of before its z-loss counted how "
        "far its scores are apart.",
    ),
    Table(
        "Words",
        MINI_MODELS,
        "BPE, dense",
        "11 million tokens of a BPE of 512; AdamW at a learning rate of 6e-3 and weight decay 1, as chosen for four "
        "dense layers; the pull and that there is one group were chosen by seed 0, the pull on Python 3.12's text. "
        "Dense seed 0 copies what it has read, 1 and 2 don't: compare rows by the same seeds. In "
        "Mixture-of-Recursions all tokens come to take two rounds of three.",
    ),
    Table(
        "Words, four layers",
        FOUR_MODELS,
        "BPE, dense, 4 layers",
        "20 million tokens of a BPE of 512; AdamW at a learning rate of 6e-3 and weight decay 1; how layers are pulled "
        "was chosen by seed 0 of this loss. Radial ones have four groups.",
    ),
)
# In the order of the tables.
ALL_MODELS = [*(name for table in TABLES for name in table.models), *HOP_MODELS]


def cells_of(fields: dict, models: dict[str, Values], seeds: list[Values]) -> dict[str, list[Cell]]:
    """The runs of each model, one for each seed."""
    if not models:
        return {}
    cells = expand(fields, [list(models.values()), seeds], {})
    return {name: cells[index * len(seeds) : (index + 1) * len(seeds)] for index, name in enumerate(models)}


def summary(runs: list[dict]) -> dict:
    """Mean of each figure over seeds, and the standard deviation of the loss; None for that of a single seed."""
    losses = [run["ce"] for run in runs]
    spread = statistics.stdev(losses) if len(losses) > 1 else None
    means = {name: statistics.fmean(run[name] for run in runs) for name in FIGURES}
    return {**means, "ce_std": spread, "ce_by_seed": {str(run["seed"]): run["ce"] for run in runs}}


def loss_ratio(model: dict, other: dict) -> float | None:
    """The loss of one model over that of another, means over the seeds that both have; None without any.

    Seeds share their order of the data: what one makes easier it makes easier for all.
    """
    left, right = model["ce_by_seed"], other["ce_by_seed"]
    common = left.keys() & right.keys()
    return sum(left[seed] for seed in common) / sum(right[seed] for seed in common) if common else None


FIGURES = ("ce", "bpb", "depth", "flops_per_token", "load_entropy", "route_mi", "tokens_trained", "seconds")


def merged(before: list[dict], now: list[dict]) -> list[dict]:
    """The runs of both in the order of `ALL_MODELS`; now's in place of earlier ones of the same model and seed."""
    runs = {(run["model"], run["seed"]): run for run in [*before, *now]}
    return sorted(runs.values(), key=lambda run: (ALL_MODELS.index(run["model"]), run["seed"]))


def settings_of(cell: Cell) -> dict:
    """What a run's figures follow from: all fields that differ from the defaults, but for the seed.

    By the difference, so that a new field with a default that changes nothing makes no other run.
    """
    defaults, fields = base.get_config().to_dict(), cell.config.to_dict()
    return {
        f"{section}.{name}": value
        for section in ("model", "router", "cache", "data", "optimizer", "train", "eval")
        for name, value in fields[section].items()
        if value != defaults[section][name] and (section, name) not in (("train", "seed"), ("data", "cache_dir"))
    }


CURVE_FIGURES = ("ce", "depth", "flops_per_token")


def mean_curve(curves: list[list[dict]]) -> list[dict]:
    """Means over seeds of what one model reads at each of `EXIT_BIASES`."""
    return [
        {"exit_bias": bias, **{name: statistics.fmean(row[name] for row in rows) for name in CURVE_FIGURES}}
        for bias, rows in zip(EXIT_BIASES, zip(*curves, strict=True), strict=True)
    ]


def layers_saved(curve: list[dict], tolerance: float) -> float:
    """The largest share of executions saved against exits off, at a loss higher by at most `tolerance` of it."""
    off = curve[0]
    return max(1 - row["depth"] / off["depth"] for row in curve if row["ce"] <= (1 + tolerance) * off["ce"])


def figures_of(models: dict[str, dict], curve: list[dict], hop_runs: list[dict]) -> dict[str, float | None]:
    """The figures that users and docs rely on; None where a run is missing for one. Ratios of losses: `loss_ratio`.

    Args:
        models: their summaries.
        curve: `mean_curve` of `radial`.
        hop_runs: those of radial networks on the hop task.
    """
    correlations = [run["hops"]["spearman"] for run in hop_runs if run["hops"]["spearman"] is not None]

    def ratio(left: str, *right: str) -> float | None:
        found = [loss_ratio(models[left], models[name]) for name in right if left in models and name in models]
        return max((ratio for ratio in found if ratio is not None), default=None)

    def of(model: str, name: str) -> float | None:
        return models[model][name] if model in models else None

    depth, dense_depth = of("radial", "depth"), of("dense", "depth")
    return {
        "radial/dense equal depth": ratio("radial", "dense"),
        "depth radial/dense": depth / dense_depth if depth and dense_depth else None,
        "radial learned routes/dense": ratio("radial, learned routes", "dense"),
        "radial T÷2/dense T": ratio("radial, T/2", "dense, 6 layers"),
        "layers saved at 0.5 % loss": layers_saved(curve, 0.005) if curve else None,
        "radial/best baseline": ratio("radial", *BASELINES),
        "BPE, radial/dense": ratio("BPE, radial", "BPE, dense"),
        "BPE, radial/best baseline": ratio("BPE, radial", *MINI_BASELINES),
        "BPE, radial/dense, 4 layers": ratio("BPE, radial, 4 layers", "BPE, dense, 4 layers"),
        "hops spearman": statistics.fmean(correlations) if correlations else None,
        "load entropy": of("radial", "load_entropy"),
        "route_mi": of("radial", "route_mi"),
    }
