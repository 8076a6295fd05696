"""Signs in the metrics of a run that its router goes wrong. Pure: lines of metrics.jsonl in, alarms out; no jax.

An alarm is raised by `PATIENCE` training lines in a row, so that one odd batch raises none. It follows from the lines
alone: a run that goes on with those of before raises the same ones as the run that was never stopped.
"""

import statistics
from collections.abc import Callable, Sequence

from radialnet.config import Config

PATIENCE = 3
# Lines that alarms look back on.
HISTORY = 20

# Nats of mutual information of route and token. Trained routers of docs/LOG.md have 0.8 and more.
_LEAST_ROUTE_MI = 0.02
# Of log L. A pool of L layers of which a few are used has the entropy of those few: log 4 / log 16 = 0.5.
_LEAST_LOAD_ENTROPY = 0.5
# Share of the tokens that may leave at any one bound of the depth when the target is another.
_MOST_AT_A_BOUND = 0.99
# Of the expected depth by the executed one, and the other way round.
_MOST_DRIFT = 2.0
# Mean of the squared logits. A softmax over logits of ±50 is one-hot in fp32: no gradient comes back from there.
_MOST_Z = 50.0**2
# Of the router's gradient norm, times the median of the lines before.
_MOST_GRADIENT_GROWTH = 100.0


_FIGURES = {
    "depth", "depth_hist", "expected_depth", "load", "load_entropy", "loss_router_z", "route_mi", "router_grad_norm",
}  # fmt: skip


def alarms(config: Config, lines: Sequence[dict]) -> dict[str, str]:
    """The alarms that hold at the newest of the training lines: name to what is wrong, in a line.

    Args:
        lines: the last `HISTORY` of them, or as many as there are, the newest last. Those of skipped steps, whose
            figures are None, say nothing, nor do those of runs of before there were alarms.
    """
    lines = [line for line in lines if line.get("bpb") is not None and line.keys() >= _FIGURES]
    if not config.router.is_trained or len(lines) < PATIENCE:
        return {}
    found = {}
    for name, check in _CHECKS.items():
        # Each line with those before it.
        texts = [check(config, lines[: len(lines) - back]) for back in range(PATIENCE)]
        if all(texts):
            found[name] = texts[0]
    return found


def _route_mi(config: Config, lines: Sequence[dict]) -> str | None:
    mutual_information, model, router = lines[-1]["route_mi"], config.model, config.router
    if mutual_information >= _LEAST_ROUTE_MI or router.form not in ("factored", "flat") or model.pool_size == 1:
        return None
    # A prior that leaves one layer to each step asks for just that, as long as it is there.
    in_groups_of_one = router.needs_groups and model.pool_size == model.num_layer_groups
    leaves_one = router.prior == "sequential" or in_groups_of_one
    if leaves_one and (router.prior_steps == 0 or lines[-1]["step"] < router.prior_steps):
        return None
    return f"the route is the same whatever the token: route_mi {mutual_information:.4f} nats"


def _load_entropy(config: Config, lines: Sequence[dict]) -> str | None:
    entropy = lines[-1]["load_entropy"]
    if entropy >= _LEAST_LOAD_ENTROPY:
        return None
    largest = max(lines[-1]["load"])
    return f"few layers are used: load_entropy {entropy:.2f}, the most used one has {largest:.0%} of all executions"


def _depth(config: Config, lines: Sequence[dict]) -> str | None:
    model, router = config.model, config.router
    if not _has_exits(config, lines[-1]):
        return None
    shares = lines[-1]["depth_hist"]
    # Those that explore go all the way, whatever the router says.
    fewest = model.pool_size * model.fewest_rounds if router.form == "recursion" else model.min_depth
    least = shares[fewest] / (1 - router.explore)
    for share, bound in ((least, fewest), (shares[model.max_depth], model.max_depth)):
        if share > _MOST_AT_A_BOUND and abs(router.depth_target - bound) > 0.1:
            return f"the depth has collapsed: {share:.0%} of the tokens leave after {bound} layers"
    return None


def _soft_depth(config: Config, lines: Sequence[dict]) -> str | None:
    line = lines[-1]
    if not _has_exits(config, line) or config.router.form in ("recursion", "skip") or config.router.predicts_benefit:
        return None
    smaller, larger = sorted((line["expected_depth"], line["depth"]))
    if larger <= _MOST_DRIFT * smaller:
        return None
    return (
        f"soft and hard exits drift apart: {line['expected_depth']:.2f} layers expected, {line['depth']:.2f} executed"
    )


def _router_logits(config: Config, lines: Sequence[dict]) -> str | None:
    z = lines[-1]["loss_router_z"]
    return None if z <= _MOST_Z else f"the router's logits explode: loss_router_z {z:.0f}"


def _router_gradient(config: Config, lines: Sequence[dict]) -> str | None:
    before = [line["router_grad_norm"] for line in lines[:-PATIENCE] if line["router_grad_norm"] is not None]
    norm = lines[-1]["router_grad_norm"]
    # None where the gradient was not finite.
    if norm is None or len(before) < PATIENCE:
        return None
    usual = statistics.median(before)
    if norm <= _MOST_GRADIENT_GROWTH * usual or usual == 0:
        return None
    return f"the router's gradient explodes: norm {norm:.3g}, {usual:.3g} before"


def _has_exits(config: Config, line: dict) -> bool:
    """Whether tokens have been free to leave for the whole of the line, and the target has come to rest."""
    model, router = config.model, config.router
    if model.min_depth == model.max_depth:
        return False
    return line["step"] > router.exit_warmup_steps + router.depth_ramp_steps + config.log.every_steps


_CHECKS: dict[str, Callable[[Config, Sequence[dict]], str | None]] = {
    "route_mi": _route_mi,
    "load_entropy": _load_entropy,
    "depth": _depth,
    "soft_depth": _soft_depth,
    "router_logits": _router_logits,
    "router_gradient": _router_gradient,
}
