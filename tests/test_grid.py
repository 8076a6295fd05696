import pytest
from ml_collections import ConfigDict

from configs import base, dense_nano, radial_nano
from radialnet.grid import expand, parse_axis
from radialnet.sections import ConfigError


def fields_of(module, **overrides) -> dict:
    config: ConfigDict = module.get_config()
    for name, value in overrides.items():
        section, field = name.split("__")
        config[section][field] = value
    return config.to_dict()


def cells_of(fields, *axes, given=None):
    return expand(fields, [parse_axis(text, fields, f"--set={text}") for text in axes], given or {})


def test_an_axis_is_read_by_the_types_of_its_fields():
    fields = fields_of(base)
    assert parse_axis("model.pool_size=8, 16", fields, "") == [{"model.pool_size": 8}, {"model.pool_size": 16}]
    switched = [{"router.sees_step": False}, {"router.sees_step": True}]
    assert parse_axis("router.sees_step=False,true", fields, "") == switched
    assert parse_axis("router.noise=0,1e+0", fields, "") == [{"router.noise": 0.0}, {"router.noise": 1.0}]
    assert parse_axis("data.path=a=b+c,d", fields, "") == [{"data.path": "a=b+c"}, {"data.path": "d"}]
    assert parse_axis("router.form=random,router.form=factored+model.pool_size=16", fields, "") == [
        {"router.form": "random"},
        {"router.form": "factored", "model.pool_size": 16},
    ]


@pytest.mark.parametrize(
    "text, named",
    [
        ("", "''"),
        ("4,8", "'4'"),
        ("max_depth=4", "section.field=value"),
        ("model.max_depth=4,four", "int is needed for config.model.max_depth, not 'four'"),
        ("model.max_depth=", "config.model.max_depth, not ''"),
        ("router.sees_step=no", "bool is needed for config.router.sees_step, not 'no'"),
        ("model.nope=4", "model.nope"),
        ("modle.max_depth=4", "modle.max_depth"),
        ("router.form=random,flat+model.pool_size=16", "'flat+model.pool_size=16'"),
        ("router.form=random+model.pool_size=16,flat", "'flat'"),
        ("model.pool_size=4+model.pool_size=8", "twice"),
    ],
)
def test_an_axis_that_is_none_names_the_flag(text, named):
    with pytest.raises(ConfigError, match="^--set=") as error:
        parse_axis(text, fields_of(base), f"--set={text}")
    assert named in str(error.value)


def test_cells_are_the_product_of_the_axes():
    fields = fields_of(base)
    cells = cells_of(fields, "model.pool_size=8,16", "router.form=factored,random", "train.seed=0,3")
    assert [cell.name for cell in cells] == [
        f"pool_size={size}+form={form}+seed={seed}"
        for size in (8, 16)
        for form in ("factored", "random")
        for seed in (0, 3)
    ]
    assert [(cell.config.model.pool_size, cell.config.router.form, cell.config.train.seed) for cell in cells] == [
        (size, form, seed) for size in (8, 16) for form in ("factored", "random") for seed in (0, 3)
    ]
    assert cells[1].swept == {"model.pool_size": 8, "router.form": "factored", "train.seed": 3}
    assert len({cell.series for cell in cells}) == 4


def test_the_name_of_a_cell_does_not_change_when_seeds_are_added():
    fields = fields_of(base, train__seed=7)
    assert [cell.name for cell in cells_of(fields, "model.pool_size=8")] == ["pool_size=8+seed=7"]
    assert "pool_size=8+seed=7" in [cell.name for cell in cells_of(fields, "model.pool_size=8", "train.seed=7,8")]


def test_names_are_fit_for_folders_and_tell_fields_of_the_same_name_apart():
    fields = fields_of(base, data__source="text")
    (cell,) = cells_of(fields, "data.path=/some where/é", "log.every_steps=5", "eval.every_steps=6")
    assert cell.name == "path=_some_where_é+log.every_steps=5+eval.every_steps=6+seed=0"
    with pytest.raises(ConfigError, match="two cells of the grid are path=_a_b"):
        cells_of(fields, "data.path=/a/b,/a b")
    with pytest.raises(ConfigError, match="two cells of the grid are pool_size=8"):
        cells_of(fields_of(base), "model.pool_size=8,8")


def test_depth_and_seed_are_no_part_of_the_series():
    cells = cells_of(fields_of(radial_nano), "model.max_depth=5,6", "router.depth_target=4,4.5", "train.seed=0,1")
    assert {cell.series for cell in cells} == {""}
    assert [cell.depth for cell in cells[::2]] == ["T=5 d*=4", "T=5 d*=4.5", "T=6 d*=4", "T=6 d*=4.5"]


def test_what_is_given_for_all_cells_is_in_their_commands():
    given = {"train.num_steps": 3}
    (cell,) = cells_of(fields_of(base, train__num_steps=3), "model.pool_size=8", given=given)
    assert cell.overrides == {"train.num_steps": 3, "model.pool_size": 8}
    assert cell.config.train.num_steps == 3


def test_a_max_depth_keeps_exits_off():
    for cell, max_depth in zip(cells_of(fields_of(base), "model.max_depth=2,7"), (2, 7), strict=True):
        assert cell.config.model.max_depth == cell.config.model.min_depth == max_depth
        assert cell.overrides == {"model.max_depth": max_depth, "model.min_depth": max_depth}


def test_a_max_depth_lowers_the_other_bounds_and_raises_none():
    cells = cells_of(fields_of(radial_nano, model__num_groups=4), "model.max_depth=2,4,8")
    bounds = [
        (cell.config.model.min_depth, cell.config.router.depth_target, cell.config.model.num_groups) for cell in cells
    ]
    assert bounds == [(2, 2.0, 2), (3, 4.0, 4), (3, 4.0, 4)]


def test_a_dense_run_has_as_many_layers_as_its_depth():
    assert [cell.config.model.pool_size for cell in cells_of(fields_of(dense_nano), "model.max_depth=2,6")] == [2, 6]
    of_groups = fields_of(base, model__num_groups=2)
    cells = cells_of(of_groups, "model.max_depth=6", "router.form=sequential,router.form=factored")
    cells += cells_of(of_groups, "router.form=cyclic")
    assert [cell.config.model.num_groups for cell in cells] == [0, 2, 0]
    forms = "router.form=sequential,router.form=factored+model.pool_size=16"
    cells = cells_of(fields_of(base), "model.max_depth=2,6", forms)
    assert [cell.config.model.pool_size for cell in cells] == [2, 16, 6, 16]
    assert [cell.series for cell in cells[:2]] == ["form=sequential", "form=factored+pool_size=16"]


def test_a_max_depth_leaves_alone_what_is_set():
    fields = fields_of(radial_nano)
    with pytest.raises(ConfigError, match=r"cell max_depth=2\+seed=0: config.model.min_depth=3"):
        cells_of(fields, "model.max_depth=2", given={"model.min_depth": 3})
    with pytest.raises(ConfigError, match="config.router.depth_target=4.0 is not between"):
        cells_of(fields_of(radial_nano, model__min_depth=1), "model.max_depth=3", "router.depth_target=4")


def test_one_bad_cell_is_named():
    with pytest.raises(ConfigError, match=r"^cell num_heads=3\+seed=0: config.model.num_heads=3 does not divide"):
        cells_of(fields_of(base), "model.num_heads=4,3")


@pytest.mark.parametrize("given, axes", [({}, ["train.seed=0", "train.seed=1"]), ({"train.seed": 0}, ["train.seed=1"])])
def test_a_field_is_set_in_one_place(given, axes):
    with pytest.raises(ConfigError, match="config.train.seed is set 2 times"):
        cells_of(fields_of(base), *axes, given=given)


def test_what_is_not_pulled_is_not_at_first_either():
    pull = {"optimizer__group_decay": 1.0, "optimizer__group_decay_init": 30.0, "optimizer__group_decay_steps": 9}
    fields = fields_of(radial_nano, **pull)
    (dense,) = cells_of(fields, "router.form=sequential+model.max_depth=4")
    found = []
    for cell in (dense, *cells_of(fields, "optimizer.group_decay=0,2")):
        optimizer = cell.config.optimizer
        found.append((optimizer.group_decay, optimizer.group_decay_init, optimizer.group_decay_steps))
    assert found == [(0, 0, 0), (0, 0, 0), (2, 30, 9)]


def test_the_name_of_a_cell_fits_a_folder(tmp_path):
    """Whatever is set: a value may be as long as a path, and of characters of several bytes."""
    fields, names = fields_of(base, data__source="text"), []
    for path in ("x" * 243, "x" * 244, "x" * 300 + "/a", "x" * 300 + "/b", "ä" * 130):
        (cell,) = cells_of(fields, f"data.path={path}", "train.seed=7")
        assert cell.name.startswith(f"path={path[:100]}") and cell.name.endswith("+seed=7")
        (tmp_path / cell.name).mkdir()
        names.append(cell.name)
    assert names[0] == "path=" + "x" * 243 + "+seed=7", "a name that fits is as it was"
    assert len(set(names)) == 5
