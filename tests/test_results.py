import json

import pytest

from configs import dense_micro, dense_mini, radial_micro, radial_mini
from radialnet import results, sparsity, study
from radialnet.config import Config
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from tests.commands import run

SEEDS = [{"train.seed": 0}, {"train.seed": 3}]
# The models that are compared by their loss.
LOSSES_OF = [name for table in study.TABLES for name in table.models]


def test_every_model_is_a_config_that_works_with_each_seed():
    for config, models in results.STUDIES.values():
        cells = study.cells_of(config.get_config().to_dict(), models, SEEDS)
        assert list(cells) == list(models)
        for name, runs in cells.items():
            assert [cell.config.train.seed for cell in runs] == [0, 3]
            for field, value in models[name].items():
                section, key = field.split(".")
                assert all(getattr(getattr(cell.config, section), key) == value for cell in runs), field
    assert set(study.BASELINES) < set(study.MODELS) and set(study.MINI_BASELINES) < set(study.MINI_MODELS)
    assert set(sparsity._BESIDE) < set(study.RATE_MODELS)
    assert len(set(study.ALL_MODELS)) == len(study.ALL_MODELS)
    cells = study.cells_of(dense_micro.get_config().to_dict(), study.MODELS, SEEDS[:1])
    assert cells["radial"][0].config == Config.from_dict(radial_micro.get_config())
    mini = study.cells_of(dense_mini.get_config().to_dict(), study.MINI_MODELS, SEEDS[:1])
    assert mini["BPE, radial"][0].config == Config.from_dict(radial_mini.get_config())
    four = study.cells_of(dense_mini.get_config().to_dict(), study.FOUR_MODELS, SEEDS[:1])
    for name in ("BPE, radial, 4 layers", "BPE, radial", "radial", "radial, T/2"):
        config = (cells | mini | four)[name][0].config
        bounds = config.model.min_depth, config.model.max_depth
        assert [bound - config.router.depth_target for bound in bounds] == [-1, 1]
        assert config.model.num_groups == (1 if name == "BPE, radial" else config.router.depth_target)
    assert config.router.depth_target == cells["dense, 6 layers"][0].config.model.max_depth / 2
    assert study.cells_of(dense_micro.get_config().to_dict(), {}, SEEDS) == {}


def row(ce, seed=0, **more):
    trained = {"commit": "abc", "python": "3.11.7", "device": "cpu"}
    return {"seed": seed, **trained, **dict.fromkeys(study.FIGURES, 1e6), "ce": ce, **more}


def test_summary_is_mean_and_standard_deviation():
    found = study.summary([row(1.0, depth=4.0, seed=7), row(1.5, depth=4.5, seed=2)])
    assert found["ce"] == 1.25 and found["depth"] == 4.25 and found["ce_by_seed"] == {"7": 1.0, "2": 1.5}
    assert found["ce_std"] == pytest.approx(0.125**0.5)
    assert study.summary([row(1.0)])["ce_std"] is None


# Exits off, then ever more of them.
LOSSES, DEPTHS = [2.0, 1.99, *[2.009] * 8, 2.011], [4.0, 3.5, *[3.0] * 8, 2.0]


def curve(off):
    points = zip(LOSSES, DEPTHS, strict=True)
    return [{"ce": ce + off, "depth": depth, "flops_per_token": 1e6} for ce, depth in points]


CURVE = study.mean_curve([curve(-0.5), curve(0.5)])


def example():
    """Runs of all models, two seeds of the radial ones."""
    runs = [{"model": name, **row(2.0 + index)} for index, name in enumerate(LOSSES_OF)]
    (radial,) = of(runs, "radial")
    runs.append({**radial, "seed": 3, "curve": curve(0.5)})
    radial["curve"] = curve(-0.5)
    by_k = [{"k": k, "queries": 9, "accuracy": 1 - k / 10, "depth": 2.0 + k} for k in (1, 2)]
    for name in study.HOP_MODELS:
        found = {"spearman": 0.5, "by_k": by_k, "depth": 3.0}
        runs.append({"model": name, **row(1.0), "hops": found})
    (hops_radial,) = of(runs, "hops, radial")
    runs.append({**hops_radial, "seed": 3, "hops": {"spearman": None, "by_k": by_k, "depth": 4.0}})
    return runs


def of(runs, name):
    return [run for run in runs if run["model"] == name]


def figures(runs):
    models = {name: study.summary(of(runs, name)) for name in LOSSES_OF if of(runs, name)}
    return models, study.figures_of(models, CURVE, of(runs, "hops, radial"))


def test_losses_are_compared_by_the_seeds_that_both_have():
    left = study.summary([row(1.0), row(2.0, seed=1), row(9.0, seed=2)])
    right = study.summary([row(2.0), row(3.0, seed=1), row(9.0, seed=3)])
    assert study.loss_ratio(left, right) == 3 / 5
    assert study.loss_ratio(left, study.summary([row(2.0, seed=4)])) is None


def test_layers_saved_counts_the_deepest_cut_that_keeps_the_loss():
    assert [point["ce"] for point in CURVE] == pytest.approx(LOSSES)
    assert [point["exit_bias"] for point in CURVE] == list(study.EXIT_BIASES)
    assert study.layers_saved(CURVE, 0.005) == 0.25
    assert study.layers_saved(CURVE, 0.0) == 0.125
    assert study.layers_saved(CURVE, 0.01) == 0.5


def test_figures_compare_what_they_say():
    models, found = figures(example())
    ce = {name: summary["ce"] for name, summary in models.items()}
    assert found["radial learned routes/dense"] == ce["radial, learned routes"] / ce["dense"]
    assert found["radial T÷2/dense T"] == ce["radial, T/2"] / ce["dense, 6 layers"]
    # Of the baselines, each a nat above the one before it.
    assert found["radial/best baseline"] == ce["radial"] / ce["hash, pool of 50"]
    assert found["radial/dense equal depth"] == ce["radial"] / ce["dense"]
    few = {name: models[name] for name in ("radial", "looped", "early exit")}
    assert study.figures_of(few, [], [])["radial/best baseline"] == ce["radial"] / ce["early exit"]
    for layers in ("", ", 4 layers"):
        assert found[f"BPE, radial/dense{layers}"] == ce[f"BPE, radial{layers}"] / ce[f"BPE, dense{layers}"]
    best = min(ce[name] for name in study.MINI_BASELINES)
    assert found["BPE, radial/best baseline"] == ce["BPE, radial"] / best
    assert found["hops spearman"] == 0.5
    assert study.figures_of(models, CURVE, [])["hops spearman"] is None
    few = {name: models[name] for name in ("dense", "radial")}
    found = study.figures_of(few, [], [])
    assert found["radial/dense equal depth"] and found["radial/best baseline"] is None
    assert set(study.figures_of({}, [], []).values()) == {None}


def test_runs_are_added_to_those_before(tmp_path, capsys):
    runs = [{**run, "settings": {"model": run["model"]}} for run in example()]
    settings = {run["model"]: run["settings"] for run in runs}
    results.write_results(runs[:3], tmp_path)
    before = results.earlier_runs(tmp_path / "RESULTS.json", settings)
    assert before == runs[:3]
    again = {**runs[0], "ce": 1.5}
    results.write_results(study.merged(before, [*reversed(runs[3:]), again]), tmp_path)
    written = json.loads((tmp_path / "RESULTS.json").read_text())
    assert [run["model"] for run in written["runs"] if run["seed"] == 0] == [*LOSSES_OF, *study.HOP_MODELS]
    assert len(written["runs"]) == len(runs) and written["models"]["dense"]["ce"] == 1.5
    assert set(written["models"]["radial"]["ce_by_seed"]) == {"0", "3"}
    capsys.readouterr()
    settings["dense"] = {"model": "another"}
    assert len(results.earlier_runs(tmp_path / "RESULTS.json", settings)) == len(runs) - 1
    assert "dense, seed 0: was trained with another config and is left out" in capsys.readouterr().err
    del runs[1]["python"]
    for text in ("{}", json.dumps({"runs": runs})):
        (tmp_path / "RESULTS.json").write_text(text)
        with pytest.raises(ConfigError, match="RESULTS.json: not what"):
            results.earlier_runs(tmp_path / "RESULTS.json", settings)


@pytest.mark.parametrize("name", ["dense", "radial", "looped, rate 3e-3", "BPE, dense", "hops, radial"])
def test_any_model_may_be_the_first(tmp_path, name):
    runs = [{**run, "settings": {}} for run in of(example(), name)]
    results.write_results(runs, tmp_path)
    assert (
        (tmp_path / "results.png").exists()
        == (name in study.MODELS)
        == ("results.png" in (tmp_path / "RESULTS.md").read_text())
    )


def test_models_are_compared_on_one_text_only():
    """Each table has its own."""
    runs = example()
    results.check_texts(runs)
    for of_model in runs:
        of_model["python"] = "3.12.1" if of_model["model"] in study.MINI_MODELS else "3.11.7"
    results.check_texts(runs)
    of(runs, "radial")[1]["python"] = "3.12.1"
    told = r"dense, seed 0 \(Python 3.11.7\) and radial, seed 3 \(Python 3.12.1\)"
    with pytest.raises(ConfigError, match=told):
        results.check_texts(runs)


def test_a_run_tells_what_it_was_trained_with(tmp_path):
    folder = RunFolder(tmp_path)
    assert results.trained_with(folder) == {"commit": "unknown", "python": "unknown", "device": "unknown"}
    starts = [
        {"commit": "0123456789abcdef-dirty", "python": "3.11.7", "device": "cpu"},
        {"commit": "fedcba9876543210", "python": "3.11.7", "device": "cpu"},
        {"commit": None, "python": "3.11.7", "device": "cpu"},
    ]
    folder.environment.write_text(json.dumps(starts))
    commits = "0123456-dirty and fedcba9 and unknown"
    assert results.trained_with(folder) == {"commit": commits, "python": "3.11.7", "device": "cpu"}


def test_settings_are_what_figures_follow_from():
    cells = study.cells_of(dense_micro.get_config().to_dict(), {"dense": {}}, SEEDS)["dense"]
    found = [study.settings_of(cell) for cell in cells]
    assert found[0] == found[1] and found[0]["train.num_steps"] == 3000 and found[0]["model.d_model"] == 64
    assert not any(
        name.startswith(("log.", "checkpoint.")) or name in ("train.seed", "model.max_depth") for name in found[0]
    )


def test_markdown_has_a_line_for_each_model_and_figure():
    runs = example()
    models, found = figures(runs)
    rest = {"date": "2026-01-01", "machine": "x", "models": models, "figures": found, "curve": CURVE}
    text = results.markdown({"runs": runs, **rest})
    assert "Commits of the runs: abc." in text
    for name in (*LOSSES_OF, *found):
        assert sum(line.startswith(f"| {name} |") for line in text.splitlines()) == 1, name
    assert "| radial | 0, 3 |" in text
    assert "| 2 | 0.800 | 4.00 |" in text
    assert "Mean depth of all tokens 3.50; seeds 0, 3." in text
    for table in study.TABLES:
        assert "+0.0 %" in text.split(f"| {table.dense} | 0 |")[1].splitlines()[0]
    few = results.markdown({"runs": runs[:3], **rest, "models": {"dense": models["dense"]}})
    assert "Hop task" not in few and "## Words" not in few


@pytest.mark.parametrize(
    "flag, named",
    [
        ("--seeds=0,x", "--seeds=0,x"),
        ("--model=nope", "--model=nope: one of dense;"),
        ("--jobs=0", "jobs"),
        ("--out=README.md", "--out=README.md: not a folder"),
    ],
)
def test_bad_flags(flag, named):
    _, stderr = run("-m", "radialnet.results", "--workdir=nowhere", flag, code=2)
    assert stderr.count("\n") == 1 and named in stderr


def test_figures_are_json():
    json.dumps(figures(example())[1], allow_nan=False)
