import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from configs import base
from radialnet.checks import expanded
from radialnet.config import Config
from radialnet.sections import ConfigError
from tests.tiny import TOKEN_EXITS, make_config

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "base")


RECURSION = {"router__form": "recursion", "model__pool_size": 2, "model__max_depth": 6}


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"model__num_heads": 5}, ("num_heads=5", "d_model=24")),
        ({"model__num_heads": 8}, ("num_heads=8", "odd head size of 3")),
        ({"model__num_kv_heads": 4}, ("num_kv_heads=4", "num_heads=6")),
        ({"model__min_depth": 4}, ("min_depth=4", "max_depth=3")),
        ({"model__max_depth": 0}, ("max_depth=0", "at least 1")),
        ({"model__max_depth": 1, "cache__view": "same_step"}, ("view='same_step'", "max_depth=1")),
        ({"router__form": "sequential"}, ("pool_size=5", "max_depth=3")),
        ({"router__form": "magic"}, ("form='magic'", "factored")),
        ({"router__estimator": "guess"}, ("estimator='guess'", "straight_through")),
        ({"router__prior": "group", "model__pool_size": 2}, ("pool_size=2", "max_depth=3")),
        ({"router__prior": "group_hash", "model__pool_size": 2}, ("prior='group_hash'", "pool_size=2", "max_depth=3")),
        ({"model__num_groups": 4}, ("num_groups=4", "max_depth=3")),
        ({"model__num_groups": -1}, ("num_groups=-1", "max_depth=3")),
        (
            {"model__num_groups": 2, "router__form": "sequential", "model__pool_size": 3},
            ("num_groups=2", "0 is needed"),
        ),
        (
            {"router__prior": "group_hash", "model__num_groups": 2, "model__pool_size": 1},
            ("prior='group_hash'", "pool_size=1", "num_groups=2"),
        ),
        ({"router__form": "hash_exit", "model__pool_size": 2}, ("form='hash_exit'", "pool_size=2", "max_depth=3")),
        ({"router__form": "hash_exit", "router__every": 2}, ("every=2", "form='hash_exit'")),
        ({"optimizer__router_scale": -1.0}, ("router_scale=-1.0",)),
        ({"optimizer__router_scale": 0.1, "router__form": "random"}, ("router_scale=0.1", "'random'")),
        ({"optimizer__router_scale": 0.1, "optimizer__frozen": "router"}, ("router_scale=0.1", "'router'")),
        ({"optimizer__group_decay": 400.0}, ("group_decay=400.0", "learning_rate (of 0.003)")),
        ({"optimizer__group_decay": 1.0, "optimizer__group_decay_init": 9.0}, ("init=9.0", "steps=0", "decay=1.0")),
        (
            {"optimizer__group_decay_init": 9.0, "optimizer__group_decay_steps": 5},
            ("init=9.0", "steps=5", "decay=0.0"),
        ),
        (
            {
                "optimizer__group_decay": 2.0,
                "optimizer__group_decay_init": 1.0,
                "optimizer__group_decay_steps": 5,
            },
            ("init=1.0", "steps=5", "decay=2.0"),
        ),
        (
            {
                "optimizer__group_decay": 1.0,
                "optimizer__group_decay_init": 400.0,
                "optimizer__group_decay_steps": 5,
            },
            ("group_decay_init=400.0", "learning_rate (of 0.003)"),
        ),
        ({"optimizer__group_decay": 1.0, "optimizer__frozen": "pool"}, ("group_decay=1.0", "frozen='pool'")),
        ({"optimizer__group_decay": 1.0, "model__pool_size": 3}, ("group_decay=1.0", "pool_size=3", "max_depth=3")),
        ({"optimizer__group_decay": 1.0, "router__form": "cyclic"}, ("group_decay=1.0", "form='cyclic'")),
        ({"router__form": "hash_exit", "router__load_bias_rate": 0.1}, ("load_bias_rate=0.1", "form='hash_exit'")),
        ({"router__form": "skip", "router__load_bias_rate": 0.1}, ("load_bias_rate=0.1", "form='skip'")),
        ({"router__form": "mod", "model__min_depth": 3, "router__noise": 1.0}, ("noise=1.0", "form='mod'")),
        ({**RECURSION, "router__noise": 1.0}, ("noise=1.0", "form='recursion'")),
        ({**RECURSION, "router__explore": 0.1}, ("explore=0.1", "form='recursion'")),
        (
            {**RECURSION, "model__min_depth": 5, "router__depth_target": 5.0},
            ("min_depth=5", "pool_size=2", "max_depth=6"),
        ),
        ({"data__source": "mixture", "data__mixture": "1 stdlib texts"}, ("stdlib reads no path", "'texts'")),
        ({"optimizer__group_decay": 1.0, "optimizer__low_rank": 2}, ("group_decay=1.0", "low_rank=2")),
        ({"router__noise": 1.0}, ("noise=1.0", "noise_steps=0")),
        ({"router__network": "deep"}, ("network='deep'", "low_rank")),
        ({"router__every": 0}, ("every=0", "at least 1")),
        ({"router__every": 2, "router__form": "early_exit"}, ("every=2", "form='early_exit'")),
        ({"router__hash_span": 0, "router__form": "hash"}, ("hash_span=0", "1 and")),
        ({"router__hash_span": 4, "router__form": "hash"}, ("hash_span=4", "max_depth=3")),
        ({"router__hash_span": 2, "router__form": "cyclic"}, ("hash_span=2", "form='cyclic' has none")),
        ({"router__hash_span": 2}, ("hash_span=2", "form='factored'", "prior='none'")),
        ({"router__exit_sees": "context"}, ("exit_sees='context'", "state, token")),
        ({"router__exit_sees": "token"}, ("exit_sees='token'", "exit_training='benefit'", "'gate'")),
        ({**TOKEN_EXITS, "router__explore": 0.0}, ("exit_sees='token'", "explore=0.0", "more than 0")),
        ({"router__depth_target": 3.5}, ("depth_target=3.5", "max_depth=3")),
        ({"router__depth_target": float("nan")}, ("depth_target=nan",)),
        ({"router__prior_weight": float("inf")}, ("prior_weight=inf", "finite")),
        ({"router__load_coef": -1.0}, ("load_coef=-1.0", "at least 0")),
        ({"model__init": "clones", "model__pool_size": 2}, ("init='clones'", "pool_size=2", "max_depth=3")),
        ({"model__init": "upcycle"}, ("init='upcycle'", "upcycle_from=''")),
        (
            {"model__init": "upcycle", "model__upcycle_from": "run", "router__form": "skip"},
            ("form='skip'", "pool_size=5 must equal", "max_depth=3"),
        ),
        ({"model__dtype": "float16"}, ("dtype='float16'", "bfloat16")),
        ({"cache__view": "some"}, ("view='some'", "same_layer")),
        ({"cache__capacity": 15}, ("capacity=15", "at least 16")),
        ({"data__source": "text"}, ("path=''", "source='text'")),
        ({"data__vocab_size": 100}, ("vocab_size=100", "258")),
        ({"data__eval_fraction": 1.0}, ("eval_fraction=1.0",)),
        ({"train__num_steps": 0}, ("num_steps=0", "at least 1")),
        ({"train__seed": 2**32}, ("seed=4294967296", "2**32")),
        ({"optimizer__b2": 1.0}, ("b2=1.0",)),
        ({"checkpoint__keep": 0}, ("keep=0", "at least 1")),
    ],
)
def test_values_that_cannot_work_are_named(overrides, named):
    with pytest.raises(ConfigError) as raised:
        make_config(**overrides)
    for part in named:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_home_folders_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/runs/a") == tmp_path / "runs" / "a" and expanded("runs") == Path("runs")
    with pytest.raises(ConfigError, match="~nobody-at-all/runs: "):
        expanded("~nobody-at-all/runs")


def test_unknown_missing_and_mistyped_fields():
    fields = base.get_config().to_dict()
    fields["model"]["max_dept"] = 3
    with pytest.raises(ConfigError, match="config.model.max_dept: unknown"):
        Config.from_dict(fields)
    fields = base.get_config().to_dict()
    del fields["train"]["seed"]
    with pytest.raises(ConfigError, match="config.train.seed: missing"):
        Config.from_dict(fields)
    for section, field, value in (("train", "seed", "0"), ("train", "seed", True), ("model", "dtype", 1)):
        fields = base.get_config().to_dict()
        fields[section][field] = value
        with pytest.raises(ConfigError, match=rf"config.{section}.{field}={value!r}"):
            Config.from_dict(fields)
    fields = base.get_config().to_dict()
    fields["router"]["noise_steps"], fields["router"]["noise"] = 5, 1
    assert Config.from_dict(fields).router.noise == 1.0, "a whole number will do for a float"


def test_fewer_groups_than_steps_need_a_layer_each():
    config = make_config(
        model__pool_size=2, model__num_groups=2, model__init="clones", router__prior="group_hash", model__max_depth=3
    )
    assert config.model.num_layer_groups == 2 and make_config().model.num_layer_groups == 3


def test_overrides_leave_the_fields_as_they_are():
    for fields in (base.get_config(), base.get_config().to_dict()):
        assert Config.from_dict(fields, model__pool_size=24, train__seed=7).model.pool_size == 24
        assert Config.from_dict(fields) == Config.from_dict(base.get_config())
    for name, named in {"modle__x": "config.modle", "model__x": "config.model.x", "seed": "config.seed"}.items():
        with pytest.raises(ConfigError, match=f"{named}: unknown"):
            Config.from_dict(base.get_config(), **{name: 1})


def test_saved_config_is_the_same(tmp_path):
    config = make_config(model__d_ff=28)
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text())["model"]["d_ff"] == 28
    with pytest.raises(ConfigError, match="nothing.json"):
        Config.load(tmp_path / "nothing.json")
    for content in (b"{", b"\xff"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match="not JSON"):
            Config.load(tmp_path / "config.json")


def test_a_run_of_before_a_field_was_there_is_read_as_what_it_was(tmp_path):
    """A run folder was lost to its evaluation whenever the config had grown."""
    config, path = make_config(train__seed=7), tmp_path / "config.json"
    fields = config.to_dict()
    del fields["train"]["spike_sigmas"], fields["log"]
    path.write_text(json.dumps(fields))
    assert Config.load(path) == config
    fields["train"]["unknown"] = 1
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="config.train.unknown"):
        Config.load(path)


def test_a_run_that_had_what_its_form_never_read_is_read_without(tmp_path):
    config = make_config(**RECURSION)
    fields = config.to_dict()
    fields["router"] |= {"explore": 0.1, "noise": 1.0, "load_bias_rate": 0.1}
    fields["model"]["min_depth"] = 5
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = Config.load(tmp_path / "config.json")
    assert found.router == config.router and found.model.min_depth == 6


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_says_what_it_is(name):
    module = importlib.import_module(f"configs.{name}")
    config = Config.from_dict(module.get_config())
    for word in ("Cost", "Expected", f"python train.py --config=configs/{name}.py"):
        assert word in module.__doc__, word
    assert "TBD" not in module.__doc__
    assert config != Config.from_dict(base.get_config())


def test_dense_nano_executes_as_many_layers_as_radial_nano():
    radial, dense = (
        Config.from_dict(importlib.import_module(f"configs.{name}").get_config())
        for name in ("radial_nano", "dense_nano")
    )
    assert dense.router.form == "sequential"
    assert dense.model.max_depth == dense.model.pool_size == radial.router.depth_target
    optimizer = dataclasses.replace(radial.optimizer, group_decay=0.0, group_decay_init=0.0, group_decay_steps=0)
    assert (dense.train, dense.data, dense.optimizer) == (radial.train, radial.data, optimizer)
    assert (dense.model.d_model, dense.model.d_ff) == (radial.model.d_model, radial.model.d_ff)
