"""Each alarm on lines that raise it, and on those that just don't."""

import pytest

from radialnet.alarms import HISTORY, PATIENCE, alarms
from tests.runs import LINE, SICK
from tests.tiny import make_config


def lines_of(*changes, num_healthy=10):
    return [LINE] * num_healthy + [{**LINE, **change} for change in changes]


def test_a_healthy_run_raises_none():
    assert alarms(make_config(), lines_of()) == {}
    assert alarms(make_config(), []) == {}
    of_before = {name: value for name, value in LINE.items() if name not in ("expected_depth", "router_grad_norm")}
    assert alarms(make_config(), [of_before] * HISTORY) == {}


@pytest.mark.parametrize("name", SICK)
def test_an_alarm_is_raised_by_lines_in_a_row(name):
    config, sick = make_config(), SICK[name]
    found = alarms(config, lines_of(*[sick] * PATIENCE))
    assert list(found) == [name] and len(found[name]) > 20
    assert not alarms(config, lines_of(*[sick] * (PATIENCE - 1)))
    assert not alarms(config, lines_of(sick, sick, {}, sick))
    assert list(alarms(config, lines_of(*[sick] * PATIENCE, num_healthy=HISTORY - PATIENCE))) == [name]
    # Of a step that was skipped nothing is known.
    skipped = {**dict.fromkeys(LINE), "step": 501, "split": "train"}
    assert list(alarms(config, [*lines_of(*[sick] * PATIENCE), skipped])) == [name]


def test_the_fewest_layers_of_recursion_are_a_round():
    fields = {"model__pool_size": 2, "model__max_depth": 6, "model__min_depth": 1, "router__depth_target": 4.0}
    config = make_config(router__form="recursion", **fields)
    for depth, is_raised in ((2, True), (1, False), (4, False)):
        shares = [0.0] * 7
        shares[depth] = 1.0
        found = alarms(config, lines_of(*[{"depth_hist": shares}] * PATIENCE, num_healthy=0))
        assert ("depth" in found) == is_raised and (not is_raised or "leave after 2 layers" in found["depth"])


def test_what_a_config_asks_for_is_no_alarm():
    every = [{**SICK["depth"], "step": 15}] * PATIENCE
    warming_up = make_config(router__exit_warmup_steps=5, router__depth_ramp_steps=5)
    assert not alarms(warming_up, lines_of(*every, num_healthy=0))
    assert alarms(make_config(), lines_of(*every, num_healthy=0)), "a line after the warm-up, where there is none"
    assert not alarms(make_config(router__depth_target=1.0), lines_of(*[SICK["depth"]] * PATIENCE))
    assert not alarms(make_config(model__min_depth=3), lines_of(*[{**SICK["depth"], **SICK["soft_depth"]}] * PATIENCE))
    groups = [{"router__prior": prior, "model__pool_size": 3} for prior in ("group", "group_hash")]
    groups.append({"router__prior": "group_hash", "model__pool_size": 2, "model__num_groups": 2})
    for prior in ({"router__prior": "sequential"}, *groups):
        for steps, is_raised in ((0, False), (1000, False), (400, True)):
            config = make_config(router__prior_steps=steps, **prior)
            assert bool(alarms(config, lines_of(*[SICK["route_mi"]] * PATIENCE))) == is_raised
    # All gone before the first layer: what is divided by is 0.
    gone = {"depth": 0.0, "expected_depth": 0.0, "depth_hist": [1.0, 0.0, 0.0, 0.0]}
    assert list(alarms(make_config(model__min_depth=0), lines_of(*[gone] * PATIENCE))) == ["depth"]
    dense = make_config(router__form="sequential", model__pool_size=3)
    assert not alarms(dense, lines_of(*[{**SICK["route_mi"], **SICK["load_entropy"]}] * PATIENCE))
    benefit = make_config(router__exit_training="benefit")
    assert not alarms(benefit, lines_of(*[SICK["soft_depth"]] * PATIENCE))
    # Tokens that explore hide a collapse of the others from whoever counts all of them.
    exploring = make_config(router__explore=0.1, router__exit_training="benefit")
    assert list(alarms(exploring, lines_of(*[{"depth_hist": [0, 0.9, 0, 0.1]}] * PATIENCE))) == ["depth"]
