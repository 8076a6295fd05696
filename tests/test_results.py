import json

import pytest

from configs import dense_micro, hops, radial_micro
from radialnet import results
from radialnet.config import Config
from tests.test_cli import run

SEEDS = [{"train.seed": 0}, {"train.seed": 3}]


def test_every_model_is_a_config_that_works_with_each_seed():
    for config, models in ((dense_micro, results.MODELS), (hops, results.HOP_MODELS)):
        cells = results.cells_of(config.get_config().to_dict(), models, SEEDS)
        assert list(cells) == list(models)
        for name, runs in cells.items():
            assert [cell.config.train.seed for cell in runs] == [0, 3]
            for field, value in models[name].items():
                section, key = field.split(".")
                assert all(getattr(getattr(cell.config, section), key) == value for cell in runs), field
    assert set(results.BASELINES) < set(results.MODELS)
    cells = results.cells_of(dense_micro.get_config().to_dict(), results.MODELS, SEEDS[:1])
    assert cells["radial"][0].config == Config.from_dict(radial_micro.get_config())


def row(ce, **more):
    names = ("bpb", "depth", "flops_per_token", "load_entropy", "route_mi", "tokens_trained", "seconds")
    return {"ce": ce, **dict.fromkeys(names, 1e6), **more}


def test_summary_is_mean_and_standard_deviation():
    found = results.summary([row(1.0, depth=4.0), row(1.5, depth=4.5)])
    assert found["ce"] == 1.25 and found["depth"] == 4.25
    assert found["ce_std"] == pytest.approx(0.125**0.5)
    assert results.summary([row(1.0)])["ce_std"] is None


def example():
    models = {name: results.summary([row(2.0 + index)]) for index, name in enumerate(results.MODELS)}
    by_k = [{"k": k, "queries": 9, "accuracy": 1 - k / 10, "depth": 2.0 + k} for k in (1, 2)]
    hop_runs = {name: [{"spearman": 0.5, "by_k": by_k, "depth": 3.0}] for name in results.HOP_MODELS}
    hop_runs["hops, radial"].append({"spearman": None, "by_k": by_k, "depth": 4.0})
    return models, hop_runs


# Exits off, then ever more of them.
LOSSES, DEPTHS = [2.0, 1.99, *[2.009] * 8, 2.011], [4.0, 3.5, *[3.0] * 8, 2.0]
CURVE = results.mean_curve(
    [
        [{"ce": ce + off, "depth": depth, "flops_per_token": 1e6} for ce, depth in zip(LOSSES, DEPTHS, strict=True)]
        for off in (-0.5, 0.5)
    ]
)


def test_layers_saved_counts_the_deepest_cut_that_keeps_the_loss():
    assert [row["ce"] for row in CURVE] == pytest.approx(LOSSES)
    assert [row["exit_bias"] for row in CURVE] == list(results.EXIT_BIASES)
    assert results.layers_saved(CURVE, 0.005) == 0.25
    assert results.layers_saved(CURVE, 0.0) == 0.125
    assert results.layers_saved(CURVE, 0.01) == 0.5


def test_figures_compare_what_they_say():
    models, hop_runs = example()
    found = results.figures_of(models, CURVE, hop_runs["hops, radial"])
    ce = {name: summary["ce"] for name, summary in models.items()}
    assert found["radial/dense equal depth"] == ce["radial"] / ce["dense"]
    assert found["radial learned routes/dense"] == ce["radial, learned routes"] / ce["dense"]
    assert found["radial T÷2/dense T"] == ce["radial, T/2"] / ce["dense, 6 layers"]
    assert found["radial/best baseline"] == ce["radial"] / ce["early exit"]
    assert found["hops spearman"] == 0.5
    assert results.figures_of(models, CURVE, [])["hops spearman"] is None


def test_markdown_has_a_line_for_each_model_and_figure():
    models, hop_runs = example()
    figures = results.figures_of(models, CURVE, hop_runs["hops, radial"])
    rest = {"seeds": [0, 3], "commit": "abc", "date": "2026-01-01", "machine": "x"}
    text = results.markdown({"figures": figures, "models": models, "curve": CURVE, "hops": hop_runs, **rest})
    assert "--seeds=0,3" in text and "commit abc" in text
    for name in (*results.MODELS, *figures):
        assert sum(line.startswith(f"| {name} |") for line in text.splitlines()) == 1, name
    assert "| 2 | 0.800 | 4.00 |" in text
    assert "Mean depth of all tokens 3.50." in text and "--hops=False" not in text
    text = results.markdown({"figures": figures, "models": models, "curve": CURVE, "hops": {}, **rest})
    assert "--seeds=0,3 --hops=False" in text and "Hop task" not in text


def test_bad_seeds():
    _, stderr = run("-m", "radialnet.results", "--workdir=nowhere", "--seeds=0,x", code=2)
    assert stderr.count("\n") == 1 and "--seeds=0,x" in stderr


def test_figures_are_json():
    models, hop_runs = example()
    json.dumps(results.figures_of(models, CURVE, hop_runs["hops, radial"]), allow_nan=False)
