"""How residual ratios fall with the size of a model, and what a radial network costs against a dense one and a mixture
of experts, up to a trillion parameters.

    python -m radialnet.scaling --out=DIR [--profile=FILE[,FILE2…]] [--check=CONFIG@TOPOLOGY[,…]]
                                [--active=SHARE] [--rows=N] [--json]

DIR gets scaling.json and the plots. FILE is a profile.json of `radialnet.profile`: its models of pre-norm are fitted
together with the points that papers tell. `--check` compiles training steps ahead of time and sets the model of FLOPs
and of the wire against them. docs/SCALING.md says what comes out.

The costs are of shapes that follow from the number of parameters alone, as dense models are built: layers of 12 D²
weights, D / 128 of them. A radial network and a mixture of experts execute a part of their weights: the shape of both
is that of a dense model of so many, of which the one has more layers, and the other more MLPs in each.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy import stats

from radialnet import aot, cli
from radialnet.checks import expanded
from radialnet.comparisons import plot_fit, plot_lines
from radialnet.config import Config
from radialnet.cost import weights_by_part
from radialnet.exchange import wire_bytes
from radialnet.files import write_whole
from radialnet.sections import ConfigError

# Median ratio of a whole layer, as papers and talks tell it. Of OPT-125M they disagree.
PUBLISHED = (("OPT-125M, low", 125e6, 0.20), ("OPT-125M, high", 125e6, 0.50), ("OPT-66B", 66e9, 0.05))

ASPECT = 128  # D over the number of layers, of dense models from 1 to 500 billion parameters.
KV_PART = 1 / 8  # Key and value heads over query heads.
# Weights of a layer over D²: of attention; of the MLP, which has the rest of 12.
ATTENTION = 2 + 2 * KV_PART
MLP = 12 - ATTENTION
NUM_CHOSEN = 2  # Experts that a token goes through in a layer.
TENSOR = (1, 2, 4, 8, 16)  # Devices that may share a layer's heads and hidden units.
FSDP = 8  # Devices that share the weights of a layer, where tokens go to the devices of their layers.


@dataclasses.dataclass(frozen=True)
class Use:
    """What the costs are of.

    Attributes:
        context: entries that a query sees: one of each token, as in the views `latest` and `same_step`.
        rows: that decode side by side.
        tokens: of a training step, on each device.
        devices_at: devices that a trillion parameters are trained on; fewer parameters have fewer.
    """

    context: int = 4096
    rows: int = 64
    tokens: int = 8192
    devices_at: int = 4096

    def devices(self, num_weights: float) -> float:
        return max(1.0, self.devices_at * num_weights / 1e12)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one token.

    Attributes:
        flops: of the forward pass.
        cache_bytes: that it writes.
        read_bytes: of weights and cache that are read to decode it, side by side with those of other rows.
        wire_bytes: that a device gets in a training step, over the number of its tokens.
    """

    flops: float
    cache_bytes: float
    read_bytes: float
    wire_bytes: float


def width(num_weights: float) -> float:
    """D of a dense model of so many weights: 12 D² · D / 128."""
    return (num_weights * ASPECT / 12) ** (1 / 3)


def _attention(d_model: float, depth: float, use: Use) -> tuple[float, float]:
    """FLOPs of attention, and bytes of cache, of a token that executes `depth` layers."""
    return depth * 4 * d_model * use.context, depth * 2 * 2 * KV_PART * d_model


def dense(num_weights: float, use: Use) -> Cost:
    d_model = width(num_weights)
    depth = d_model / ASPECT
    attention, cache = _attention(d_model, depth, use)
    return Cost(
        flops=2 * num_weights + attention,
        cache_bytes=cache,
        read_bytes=2 * num_weights / use.rows + cache * use.context,
        wire_bytes=_gathered(num_weights, d_model, depth, use, use.devices(num_weights)),
    )


def radial(num_weights: float, active: float, use: Use, is_grouped: bool) -> Cost:
    """Tokens go through D / 128 of the layers.

    Args:
        active: the part of the weights that a token executes.
        is_grouped: whether each step has a group of layers of its own (`router.prior="group"`, or
            `router.form="hash_exit"`), or any layer may come at any step.
    """
    d_model = width(active * num_weights)
    depth, layer = d_model / ASPECT, 12 * d_model**2
    num_layers = num_weights / layer
    attention, cache = _attention(d_model, depth, use)
    # Linear, the cheapest that routes; docs/ROUTER.md has the others.
    router = 2 * (depth + 1) * d_model * (num_layers + 1)
    choices = num_layers / depth if is_grouped else num_layers
    read = 2 * depth * layer * _distinct(choices, 1, use.rows) / use.rows
    devices = use.devices(num_weights)
    gathered = _gathered(num_weights, d_model, depth, use, devices)
    return Cost(
        flops=2 * active * num_weights + attention + router,
        cache_bytes=cache,
        read_bytes=read + cache * use.context,
        # Tokens of a step that has few layers would all go to the few devices that have those.
        wire_bytes=gathered if is_grouped else min(gathered, _exchanged(num_weights, d_model, depth, use, devices)),
    )


def mixture(num_weights: float, active: float, use: Use) -> Cost:
    """The MLPs of a layer are experts, each half as wide as a dense model's; attention is shared."""
    d_model = width(active * num_weights)
    depth, expert = d_model / ASPECT, MLP * d_model**2 / NUM_CHOSEN
    attention_weights, devices = depth * ATTENTION * d_model**2, use.devices(num_weights)
    num_experts = (num_weights - attention_weights) / depth / expert
    attention, cache = _attention(d_model, depth, use)
    read = 2 * (attention_weights + depth * expert * _distinct(num_experts, NUM_CHOSEN, use.rows)) / use.rows
    # To the experts and back, forwards and backwards, in bfloat16: the best that can be.
    tokens = depth * 4 * NUM_CHOSEN * 2 * d_model
    of_experts = _gathered_of_parts(num_weights - attention_weights, use, devices)
    return Cost(
        flops=2 * active * num_weights + attention + 2 * depth * d_model * num_experts,
        cache_bytes=cache,
        read_bytes=read + cache * use.context,
        wire_bytes=min(
            _gathered(num_weights, d_model, depth, use, devices),
            tokens + of_experts + _gathered(attention_weights, d_model, depth, use, devices),
        ),
    )


def _distinct(number: float, chosen: int, rows: int) -> float:
    """How many of so many are chosen by any of the rows, each of which chooses some by chance."""
    return number * -math.expm1(rows * math.log1p(-min(chosen / number, 1 - 1e-12)))


def _gathered(num_weights: float, d_model: float, depth: float, use: Use, devices: float) -> float:
    """Bytes of weights that come to the tokens a layer at a time, forwards and again backwards, 2 of each, and of their
    gradients, 4; shared by the number of devices of `TENSOR` that makes it least, which send sums of states, twice
    forwards and twice backwards."""

    def of(shared: int) -> float:
        weights = 8 * num_weights / shared * (1 - 1 / max(devices / shared, 1)) / use.tokens
        return weights + depth * 4 * 2 * 2 * d_model * (shared - 1)

    return min(of(shared) for shared in TENSOR if shared <= devices)


def _gathered_of_parts(num_weights: float, use: Use, devices: float) -> float:
    """Bytes of weights that lie where they are used, but for their parts on `FSDP` devices: gathered once a step, and
    their gradients."""
    shared = min(FSDP, devices)
    return 6 * num_weights / (devices / shared) * (1 - 1 / shared) / use.tokens


def _exchanged(num_weights: float, d_model: float, depth: float, use: Use, devices: float) -> float:
    """Bytes of tokens that go to the devices of their layers, as they do here (`exchange.wire_bytes`): in float32, and
    once more where the backward pass computes again."""
    token = 8 * 4 * d_model + 2 * (2 * (1 + 2 * KV_PART) + 3) * d_model
    return depth * token + _gathered_of_parts(num_weights, use, devices)


# Residual ratios


@dataclasses.dataclass(frozen=True)
class Fit:
    """log ratio = intercept + slope · log parameters, by least squares."""

    slope: float
    intercept: float
    residual_std: float
    log_sizes: tuple[float, ...]

    @classmethod
    def of(cls, points: Sequence[tuple[str, float, float]]) -> "Fit":
        """Of (name, parameters, ratio), three at least."""
        x, y = (np.log([point[index] for point in points]) for index in (1, 2))
        slope, intercept = np.polyfit(x, y, 1)
        std = math.sqrt(((y - intercept - slope * x) ** 2).sum() / (len(x) - 2))
        return cls(float(slope), float(intercept), std, tuple(x))

    def ratio(self, size: float) -> tuple[float, float, float]:
        """The ratio at a size, and the ends of the band that another point of the line's lies in with 90 %."""
        x, known = math.log(size), np.asarray(self.log_sizes)
        spread = ((x - known.mean()) ** 2) / ((known - known.mean()) ** 2).sum()
        off = stats.t.ppf(0.95, len(known) - 2) * self.residual_std * math.sqrt(1 + 1 / len(known) + spread)
        middle = self.intercept + self.slope * x
        return tuple(math.exp(value) for value in (middle, middle - off, middle + off))


def measured(paths: Sequence[Path]) -> list[tuple[str, float, float]]:
    """The pre-norm models of profiles: name, parameters, median of a whole layer. Raises ConfigError."""
    found = []
    for path in paths:
        try:
            profiles = json.loads(path.read_text())
            found += [
                (profile["model"], profile["parameters"], profile["median"]["layer"])
                for profile in profiles
                if "pre-norm" in profile["norm"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--profile={path}: {error!r}; a profile.json of radialnet.profile is needed") from None
    return found


# Against what compiles


def check(name: str, topology: str) -> dict:
    """The model of a config's training step against its program, on each device of a topology. Raises ConfigError."""
    try:
        module = importlib.import_module(f"configs.{name}")
    except ModuleNotFoundError:
        raise ConfigError(f"--check={name}@{topology}: there is no configs/{name}.py") from None
    config = aot.for_platform(Config.from_dict(module.get_config()), aot.platform_of(topology))
    try:
        found = aot.report(config, aot.devices_of(topology))
    except aot.DoesNotFitError as error:
        raise ConfigError(f"--check={name}@{topology}: does not fit: {error}") from None
    exchanges = found["dispatch"] == "exchange"
    wire_gb = wire_of(config, found["mesh"], aot.vocab_size_of(config), exchanges) / 1e9
    return {
        "config": name,
        "topology": topology,
        "tflops": found["flops"] and found["flops"] / 1e12,
        "flops_over_model": found["flops_over_ideal"],
        "wire_gb": found["wire_gb"],
        "model_wire_gb": wire_gb,
        # One device has none, and what kernels for GPUs compute is not told.
        "wire_over_model": found["wire_gb"] / wire_gb if wire_gb else None,
        "compile_s": found["compile_s"],
    }


def wire_of(config: Config, sizes: dict[str, int], vocab_size: int, exchanges: bool) -> float:
    """Bytes that a device gets in a training step: for the pool, for the other weights, for copies, for parts of
    layers."""
    model, num_rows = config.model, sizes["data"] * sizes["fsdp"] * sizes["pool"]
    weights = weights_by_part(config, vocab_size)
    split, whole = sizes["fsdp"] * sizes["pool"] * sizes["tensor"], weights["embedding"] + weights["head"]
    pool = model.pool_size * weights["layer"]
    tokens = config.train.batch_size * config.train.seq_len / num_rows
    size = jnp.dtype(model.dtype).itemsize
    # Sums of a layer: of attention and of the MLP forwards and backwards, and once more in the backward pass, of
    # attention always, of the MLP where its output is computed again.
    is_again = exchanges or (model.remat == "step" and config.router.learns_choices)
    num_sums = 6 if is_again else 5
    sums = num_sums * 2 * (1 - 1 / sizes["tensor"]) * model.max_depth * tokens * model.d_model * size
    copies = 2 * 4 * (pool + whole) / split * (1 - 1 / sizes["data"])
    return wire_bytes(config, sizes, model.max_depth)[exchanges] + 8 * whole * (1 - 1 / split) + copies + sums


def costs(use: Use, active: float) -> dict[str, list[tuple[float, Cost]]]:
    """By family, costs over the number of parameters."""
    sizes = np.geomspace(1e8, 1e12, 17)
    families = {
        "dense": lambda size: dense(size, use),
        "radial, free routes": lambda size: radial(size, active, use, False),
        "radial, a group a step": lambda size: radial(size, active, use, True),
        "mixture of experts": lambda size: mixture(size, active, use),
    }
    return {name: [(float(size), of(size)) for size in sizes] for name, of in families.items()}


def main() -> None:
    out, use, active = expanded(_OUT.value), Use(rows=_ROWS.value), _ACTIVE.value
    if not 0 < active < 1:
        raise ConfigError(f"--active={active}: more than 0 and less than 1 is needed")
    asked = [entry.partition("@") for entry in _CHECK.value]
    for name, _, topology in asked:
        if not topology:
            raise ConfigError(f"--check={name}: CONFIG@TOPOLOGY is needed, as radial_small@v5e:4x4")
    points = [*PUBLISHED, *measured([expanded(path) for path in _PROFILE.value])]
    fit, families = Fit.of(points), costs(use, active)
    found = {
        "points": points,
        "fit": dataclasses.asdict(fit),
        "ratio": {f"{size:.0e}": fit.ratio(size) for size in (1e9, 1e10, 1e11, 1e12)},
        "use": dataclasses.asdict(use) | {"active": active},
        "costs": {
            name: [{"parameters": size, **dataclasses.asdict(cost)} for size, cost in line]
            for name, line in families.items()
        },
        "checks": [check(name, topology) for name, _, topology in asked],
    }
    out.mkdir(parents=True, exist_ok=True)
    sizes = np.geomspace(5e7, 1e12, 60)
    band = [(size, *fit.ratio(size)) for size in sizes]
    plot_fit(points, band, max(point[1] for point in points), out / "ratios.png")
    panels = {
        f"{title}, {unit}": {
            name: [(size, getattr(cost, field) / scale) for size, cost in line] for name, line in families.items()
        }
        for field, title, unit, scale in (
            ("flops", "forward pass", "GFLOP", 1e9),
            ("read_bytes", f"read to decode it, {use.rows} rows", "MB", 1e6),
            ("cache_bytes", "written to the cache", "kB", 1e3),
            ("wire_bytes", "over the wire in training", "MB", 1e6),
        )
    }
    plot_lines(panels, "parameters", "Costs of a token", out / "costs.png")
    write_whole(out / "scaling.json", json.dumps(found, indent=1))
    print(json.dumps(found) if _JSON.value else _told(found))


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _told(found: dict) -> str:
    lines = ["median residual ratio (nominal 90 % band)"]
    lines += [f"{size:>8}  {mid:.3f} ({low:.3f}–{high:.3f})" for size, (mid, low, high) in found["ratio"].items()]
    lines.append(f"{'family':>20}  parameters      GFLOP    read MB   cache kB    wire MB")
    for name, line in found["costs"].items():
        for cost in line[4::4]:
            amounts = cost["flops"] / 1e9, cost["read_bytes"] / 1e6, cost["cache_bytes"] / 1e3, cost["wire_bytes"] / 1e6
            lines.append(f"{name:>20}  {cost['parameters']:>10.0e}" + "".join(f" {x:>10.3g}" for x in amounts))
    for row in found["checks"]:
        lines.append(
            f"{row['config']} on {row['topology']}, compiled / model: FLOPs {_ratio(row['flops_over_model'])}, "
            f"wire {_ratio(row['wire_over_model'])} of {row['model_wire_gb']:.1f} GB"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "A folder for scaling.json and plots.", required=True)
    _PROFILE = flags.DEFINE_list("profile", [], "Files profile.json of radialnet.profile.")
    _CHECK = flags.DEFINE_list("check", [], "Training steps to be compiled, as CONFIG@TOPOLOGY.")
    _ACTIVE = flags.DEFINE_float("active", 1 / 8, "The part of a sparse model's weights that a token executes.")
    _ROWS = flags.DEFINE_integer("rows", 64, "Rows that decode side by side.", lower_bound=1)
    _JSON = flags.DEFINE_bool("json", False, "Print a JSON line alone.")
    cli.run(main)
