"""Grids are tested with short programs in place of training; at the end, real runs."""

import csv
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from configs import smoke
from radialnet.comparisons import SweepPoint, pareto_front, plot_sweep
from radialnet.grid import expand, parse_axis
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.sweep import check_same, command_of, row_of, train_grid
from tests.commands import ROOT, lines_of, run, text_flags

FIELDS = smoke.get_config().to_dict()
CONFIG = "--config=configs/smoke.py"
LINE = {"ce": 2.0, "bpb": 1.0, "depth": 2.5, "load_entropy": 0.9, "route_mi": 0.1, "flops_per_token": 5e4}
TIMES = {"step_ms": 100.0, "tokens_per_s": 1.0}


def cells_of(*axes):
    return expand(FIELDS, [parse_axis(text, FIELDS, "") for text in axes], {})


def finish(folder: Path, cell, **figures):
    """Write what a run leaves behind that a sweep reads."""
    folder.mkdir(parents=True, exist_ok=True)
    cell.config.save(folder / "config.json")
    num_steps = cell.config.train.num_steps
    lines = [
        {"step": num_steps // 2, "split": "train", **LINE, **TIMES},
        {"step": num_steps // 2, "split": "eval", **LINE, **TIMES, "ce": 9.0},
        {"step": num_steps, "split": "train", **LINE, **TIMES, "step_ms": 300.0},
        {"step": num_steps, "split": "eval", **LINE, **TIMES, **figures},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def stand_in(tmp_path, cell, code=0):
    """A command that counts its runs and leaves a finished run behind, or fails with a code."""
    finish(tmp_path / "prepared" / cell.name, cell)
    program = (
        "import shutil, sys; from pathlib import Path; prepared, folder, code = sys.argv[1:]\n"
        "print('was here'); open(folder + '/count', 'a').write('x')\n"
        "if code == '0': shutil.copytree(prepared, folder, dirs_exist_ok=True)\n"
        "sys.exit(int(code))"
    )
    folders = tmp_path / "prepared" / cell.name, tmp_path / "grid" / cell.name
    return [sys.executable, "-c", program, *map(str, folders), str(code)]


def sweep(tmp_path, cells, codes, jobs=1):
    commands = [stand_in(tmp_path, cell, code) for cell, code in zip(cells, codes, strict=True)]
    return train_grid(cells, commands, tmp_path / "grid", jobs, Console(file=io.StringIO()))


def counts(tmp_path, cells):
    paths = [tmp_path / "grid" / cell.name / "count" for cell in cells]
    return [len(path.read_text()) if path.exists() else 0 for path in paths]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_cell_is_reported_and_the_others_are_trained_once(tmp_path, capfd, jobs):
    cells = cells_of("train.seed=0,1,2")
    rows, num_failed = sweep(tmp_path, cells, [0, 3, 0], jobs)
    assert [row["cell"] for row in rows] == ["seed=0", "seed=2"] and num_failed == 1
    log = tmp_path / "grid" / "seed=1" / "train.log"
    assert capfd.readouterr().err == f"error: cell seed=1: ended with exit code 3, see {log}\n"
    assert log.read_text() == "was here\n"
    assert [row["seed"] for row in json.loads((tmp_path / "grid" / "sweep.json").read_text())] == [0, 2]

    rows, num_failed = sweep(tmp_path, cells, [0, 0, 0], jobs)
    assert [row["seed"] for row in rows] == [0, 1, 2] and num_failed == 0
    assert counts(tmp_path, cells) == [1, 2, 1]
    assert log.read_text() == "was here\n" * 2


def test_a_command_that_ends_well_without_a_finished_run_has_failed(tmp_path):
    (cell,) = cells_of("train.seed=0")
    console = Console(file=io.StringIO())
    assert train_grid([cell], [[sys.executable, "-c", ""]], tmp_path / "grid", 1, console) == ([], 1)
    assert not (tmp_path / "grid" / "sweep.csv").exists()


def test_a_finished_cell_of_another_config_is_refused_before_anything_is_trained(tmp_path):
    waiting, finished = cells_of("train.seed=0,1")
    finish(tmp_path / "grid" / finished.name, finished)
    (other,) = cells_of("optimizer.weight_decay=0.5")
    other.config.save(tmp_path / "grid" / finished.name / "config.json")
    with pytest.raises(ConfigError, match=r"weight_decay=0.01, but .*seed=1 has 0.5"):
        sweep(tmp_path, [waiting, finished], [0, 0])
    assert counts(tmp_path, [waiting, finished]) == [0, 0]


def test_a_half_trained_cell_of_another_config_is_refused_as_well(tmp_path):
    """Else it would go on under the new config, and its row would say that all of it was trained so."""
    (cell,) = cells_of("train.seed=0")
    (other,) = cells_of("optimizer.weight_decay=0.5")
    (tmp_path / "grid" / cell.name).mkdir(parents=True)
    other.config.save(tmp_path / "grid" / cell.name / "config.json")
    with pytest.raises(ConfigError, match="weight_decay=0.01"):
        sweep(tmp_path, [cell], [0])


def test_where_the_rows_were_packed_makes_no_other_config(tmp_path):
    (cell,) = cells_of("data.cache_dir=/here")
    (there,) = cells_of("data.cache_dir=/there")
    there.config.save(tmp_path / "config.json")
    check_same(cell, RunFolder(tmp_path))


def test_rows_come_from_the_last_evaluation_alone(tmp_path):
    cell, other = cells_of("model.max_depth=2,3", "router.depth_target=2", "train.seed=5")
    finish(tmp_path, cell, ce=1.25, route_mi=None)
    row = row_of(cell, RunFolder(tmp_path))
    # Half of 20 steps at 100 ms, half at 300; 4 rows of 64 tokens a step.
    assert row == {
        "cell": "max_depth=2+depth_target=2.0+seed=5",
        "model.max_depth": 2,
        "router.depth_target": 2.0,
        "seed": 5,
        "step": 20,
        "tokens_trained": 20 * 4 * 64,
        **LINE,
        "ce": 1.25,
        "route_mi": None,
        "seconds": pytest.approx(4.0),
        "tokens_per_s": pytest.approx(20 * 4 * 64 / 4),
    }
    # The line is written before its step is saved, and that may fail.
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    assert row_of(cell, RunFolder(tmp_path)) is None
    # Before there were checksums this said that it is.
    (tmp_path / "checkpoints" / "20" / "commit_success.txt").touch()
    assert row_of(cell, RunFolder(tmp_path)) == row
    shutil.rmtree(tmp_path / "checkpoints" / "20")
    assert row_of(cell, RunFolder(tmp_path)) == row, "emptied, by somebody who needed the room"
    text = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(text[:3]))
    assert row_of(cell, RunFolder(tmp_path)) is None
    assert row_of(other, RunFolder(tmp_path / "none")) is None


def test_csv_and_json_hold_the_rows(tmp_path):
    cells = cells_of("model.max_depth=2,3", "train.seed=0,1")
    rows, _ = sweep(tmp_path, cells, [0] * 4)
    assert json.loads((tmp_path / "grid" / "sweep.json").read_text()) == rows
    with (tmp_path / "grid" / "sweep.csv").open() as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in rows]
    assert (tmp_path / "grid" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_ended_without_a_loss_is_in_the_table_but_not_in_the_plot(tmp_path):
    (cell,) = cells_of("train.seed=0")
    finish(tmp_path / "grid" / cell.name, cell, ce=None, bpb=None)
    rows, num_failed = sweep(tmp_path, [cell], [0])
    assert rows[0]["ce"] is None and num_failed == 0
    assert (tmp_path / "grid" / "sweep.csv").exists() and not (tmp_path / "grid" / "sweep.png").exists()


def test_the_command_of_a_cell_says_all_that_differs_from_the_config_file():
    given = {"train.num_steps": 7}
    fields = smoke.get_config()
    fields.train.num_steps = 7
    fields = fields.to_dict()
    cells = expand(fields, [parse_axis("model.max_depth=2", fields, ""), [{"optimizer.clip_norm": 0.5}]], given)
    command = command_of(cells[0], "configs/smoke.py", Path("runs/some where"))
    assert command[0] == sys.executable and Path(command[1]).resolve() == ROOT / "train.py"
    assert command[2:] == [
        "--config=configs/smoke.py", "--workdir=runs/some where/max_depth=2+clip_norm=0.5+seed=0",
        "--config.train.num_steps=7", "--config.model.max_depth=2", "--config.optimizer.clip_norm=0.5",
        "--config.model.min_depth=1", "--config.router.depth_target=2.0",
    ]  # fmt: skip


@given(st.lists(st.tuples(*[st.integers(1, 6).map(float)] * 2), min_size=1))
def test_the_pareto_front_is_what_no_other_point_beats(points):
    def beats(other, point):
        return other != point and other[0] <= point[0] and other[1] <= point[1]

    expected = sorted({point for point in points if not any(beats(other, point) for other in points)})
    assert pareto_front(points) == expected


@pytest.mark.parametrize("num_series, num_depths, num_seeds, scale", [(2, 1, 1, 1), (9, 3, 2, 100), (2, 50, 1, 1.01)])
def test_the_plot_can_be_drawn_of_few_and_many_points(tmp_path, num_series, num_depths, num_seeds, scale):
    points = [
        SweepPoint(series, f"T={depth}", 1e6 * scale**depth, 2 - depth / 100 + seed / 1000)
        for series in map("seed={}".format, range(num_series))
        for depth in range(num_depths)
        for seed in range(num_seeds)
    ]
    plot_sweep(points, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_print_shows_a_command_per_cell_and_runs_nothing(tmp_path):
    command = ["-m", "radialnet.sweep", CONFIG, f"--workdir={tmp_path}/grid", "--config.train.num_steps=7"]
    stdout, _ = run(*command, "--max_depth=1,2", "--set=router.estimator=score,weighted", "--seeds=4", "--print")
    lines = stdout.splitlines()
    assert len(lines) == 4
    for line, max_depth, estimator in zip(lines, (1, 1, 2, 2), ("score", "weighted") * 2, strict=True):
        assert f"train.py {CONFIG} --workdir={tmp_path}/grid/max_depth={max_depth}+estimator={estimator}+seed=4" in line
        for override in ("train.num_steps=7", f"model.max_depth={max_depth}", "train.seed=4"):
            assert f" --config.{override}" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, named",
    [
        ([CONFIG, "--exit_bias=1"], ["--exit_bias", "--config"]),
        (["--seeds=1,2"], ["--seeds", "--config"]),
        (["--max_depth=2", "--print"], ["--print", "--config"]),
        ([], ["--config", "--max_depth"]),
        (["--max_depth=2"], ["config.json"]),
        (["--max_depth=two"], ["--max_depth=two"]),
        (["--exit_bias=nan"], ["--exit_bias=nan"]),
        ([CONFIG, "--max_depth=two"], ["--max_depth=two", "config.model.max_depth"]),
        ([CONFIG, "--seeds="], ["--seeds=", "config.train.seed"]),
        ([CONFIG, "--max_depth=2,0"], ["max_depth=0", "at least 1"]),
        ([CONFIG, "--max_depth=2,9"], ["config.model.pool_size=6", "config.model.max_depth=9"]),
        ([CONFIG, "--max_depth=2", "--target_depth=3"], ["config.router.depth_target=3.0", "max_depth=2"]),
        ([CONFIG, "--set=router.nope=1"], ["--set=router.nope=1"]),
        ([CONFIG, "--set=router.form=flat,nope"], ["form=nope", "config.router.form='nope'"]),
        ([CONFIG, "--max_depth=2", "--set=model.max_depth=3"], ["config.model.max_depth", "2 times"]),
        ([CONFIG, "--jobs=0"], ["--jobs=0"]),
        (["--config=configs/none.py"], ["--config", "none.py"]),
    ],
)
def test_bad_flags_end_with_one_line_and_exit_code_2(tmp_path, flags, named):
    _, stderr = run("-m", "radialnet.sweep", f"--workdir={tmp_path / 'grid'}", *flags, code=2)
    assert stderr.count("\n") == 1 and stderr.startswith("error: ")
    for part in named:
        assert part in stderr
    assert not (tmp_path / "grid").exists()


def test_the_parent_needs_no_jax():
    stdout, _ = run("-c", "import sys, radialnet.sweep; print({'jax', 'matplotlib.pyplot'} & set(sys.modules))")
    assert stdout.strip() == "set()"


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """The command of a grid of two depths on a little text, and its folder."""
    workdir = tmp_path_factory.mktemp("sweeps") / "grid"
    command = [
        "-m", "radialnet.sweep", CONFIG, f"--workdir={workdir}", "--max_depth=2,3", "--json",
        *text_flags(tmp_path_factory), "--config.train.num_steps=6",
        "--config.log.sample_tokens=0",
    ]  # fmt: skip
    return command, workdir


@pytest.mark.slow
def test_a_grid_of_real_runs(grid):
    command, workdir = grid
    stdout, stderr = run(*command)
    rows = json.loads(stdout)
    assert [row["cell"] for row in rows] == ["max_depth=2+seed=0", "max_depth=3+seed=0"]
    for row, max_depth in zip(rows, (2, 3), strict=True):
        folder = workdir / row["cell"]
        last = lines_of(folder)[-1]
        assert (last["step"], last["split"]) == (6, "eval")
        assert {key: last[key] for key in LINE} == {key: row[key] for key in LINE}
        assert json.loads((folder / "config.json").read_text())["model"]["max_depth"] == max_depth
        assert "held out" in (folder / "train.log").read_text()
        assert row["tokens_per_s"] > 0
    assert (workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "max_depth=3+seed=0" in stderr

    before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/**/*")}
    stdout, stderr = run(*command)
    assert json.loads(stdout) == rows and "2 of 2 cells are done" in stderr
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("*/**/*")} == before

    # With a cell that can't be trained beside them, for a folder of a run is in its way.
    (workdir / "max_depth=2+seed=1").mkdir()
    (workdir / "max_depth=2+seed=1" / "checkpoints").write_text("")
    command = [flag.replace("--max_depth=2,3", "--max_depth=2") for flag in command]
    stdout, stderr = run(*command, "--seeds=0,1", code=1)
    assert [row["seed"] for row in json.loads(stdout)] == [0]
    assert f"error: cell max_depth=2+seed=1: ended with exit code 2, see {workdir}" in stderr


@pytest.mark.slow
def test_one_run_at_many_depths_and_exit_biases(grid):
    command, workdir = grid
    run(*command)
    folder = workdir / "max_depth=3+seed=0"
    arguments = ["-m", "radialnet.sweep", f"--workdir={folder}", "--max_depth=1,3", "--exit_bias=-50,0,50"]
    stdout, _ = run(*arguments, "--json")
    rows = json.loads(stdout)
    depths = {(row["max_depth"], row["exit_bias_added"]): row["depth"] for row in rows}
    assert depths.pop((3, 0.0)) == pytest.approx(lines_of(folder)[-1]["depth"])
    assert depths == {(1, -50): 1, (1, 0): 1, (1, 50): 1, (3, -50): 3, (3, 50): 1}
    costs = {(row["max_depth"], row["exit_bias_added"]): row["flops_per_token"] for row in rows}
    assert costs[1, 0] < costs[3, 50] < costs[3, -50]
    assert json.loads((folder / "sweep.json").read_text()) == rows
    assert len((folder / "sweep.csv").read_text().splitlines()) == 7
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    stdout, _ = run(*arguments)
    assert "max_depth=3+exit_bias_added=50.0" in stdout and "load_entropy" in stdout
