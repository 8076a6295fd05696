"""The commands, as a user runs them: by subprocess, in a folder of their own."""

import json
import math
import os
import shutil

import jax
import numpy as np
import pytest

from radialnet import cli
from radialnet.generate import SETTINGS, read_prompts, request_of
from radialnet.run_folder import CHECKSUMS
from radialnet.sampling import Sampling
from radialnet.sections import ConfigError
from radialnet.trained import load_trained
from tests.commands import environment, lines_of, run, text_flags, train

# What every line of metrics.jsonl must have.
KEYS = {
    "step", "split", "loss", "ce", "bpb", "loss_load", "loss_depth", "loss_router_z", "depth", "depth_hist", "load",
    "load_entropy", "route_mi", "exit_bias", "grad_norm", "lr", "skipped_steps", "tokens_per_s", "step_ms",
    "flops_per_token", "mfu",
}  # fmt: skip
SAMPLE = "--config.log.sample_prompt=def "


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return [*text_flags(tmp_path_factory), "--config.train.num_steps=10"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    stdout, _ = train(workdir, *text, SAMPLE)
    return workdir, stdout


def finite(value):
    return all(map(finite, value)) if isinstance(value, list) else isinstance(value, str) or math.isfinite(value)


def test_train_leaves_a_whole_run_folder(trained):
    workdir, stdout = trained
    lines = lines_of(workdir)
    assert [(line["step"], line["split"]) for line in lines] == [(5, "train"), (10, "train"), (10, "eval")]
    for line in lines:
        assert set(line) >= KEYS
        assert all(finite(line[key]) for key in KEYS - {"mfu"})
        assert line["mfu"] is None or line["mfu"] > 0
    assert lines[1]["bpb"] < lines[0]["bpb"]
    assert lines[1]["exit_bias"] != lines[2]["exit_bias"], "controllers settle on a batch to come"
    for name in ("loss", "depth", "layers"):
        assert (workdir / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())
    assert (workdir / "checkpoints" / "10").is_dir()
    assert json.loads((workdir / "config.json").read_text())["train"]["num_steps"] == 10
    assert len(json.loads((workdir / "manifest.json").read_text())["documents"]) == 40
    (start,) = json.loads((workdir / "environment.json").read_text())
    assert start["step"] == 0 and "train.py --config=configs/smoke.py" in start["command"]
    assert "held out" in stdout
    assert "def " in stdout.split("a sample, greedily:")[1]


def test_the_same_command_again_says_that_it_is_done(trained, text):
    workdir, _ = trained
    files = [workdir / "metrics.jsonl", workdir / "config.json"]
    before = [path.read_bytes() for path in files]
    stdout, _ = train(workdir, *text, SAMPLE)
    assert "done, 10 of 10 steps" in stdout
    # Nor does the config become one that nothing was trained with.
    train(workdir, *text, "--config.router.estimator=score")
    assert [path.read_bytes() for path in files] == before


def test_plots_that_a_kill_left_out_are_drawn_later(trained, text, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    drawn = (workdir / "plots" / "depth.png").read_bytes()
    (workdir / "plots" / "depth.png").unlink()
    stdout, _ = train(workdir, *text)
    assert "done, 10 of 10 steps" in stdout and (workdir / "plots" / "depth.png").read_bytes() == drawn
    assert "plots: " not in train(workdir, *text)[0]
    os.utime(workdir / "plots" / "loss.png", (0, 0))
    assert "plots: " in train(workdir, *text)[0], "older than what they show"


def test_a_checkpoint_that_lacks_a_part_is_refused(trained, text, tmp_path):
    """One without checksums is taken as it is; parameters that are not in it were replaced by fresh ones."""
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    (workdir / "checkpoints" / "10" / CHECKSUMS).unlink()
    more = "--config.train.num_steps=12"
    for part in ("recent", "window"):
        shutil.rmtree(workdir / "checkpoints" / "10" / part)
    of_before = shutil.copytree(workdir, tmp_path / "before")
    stdout, stderr = train(of_before, *text, more)
    assert "step 10 of 12" in stdout and "has no checksums.json; taken as it is" in stderr
    shutil.rmtree(workdir / "checkpoints" / "10" / "params")
    _, stderr = train(workdir, *text, more, code=2)
    assert "checkpoints/10: can't be restored" in stderr


def test_a_run_without_its_checkpoints_starts_anew_and_says_so(trained, text, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    (workdir / "checkpoints").rename(tmp_path / "gone")
    (workdir / "checkpoints").symlink_to(tmp_path / "nowhere")
    _, stderr = train(workdir, *text, code=2)
    assert stderr.count("\n") == 1 and f"{workdir}/checkpoints is not a folder" in stderr
    (workdir / "checkpoints").unlink()
    stdout, stderr = train(workdir, *text, "--config.train.num_steps=1")
    assert f"{workdir}: no checkpoint; the run starts anew, and 3 lines of its metrics go" in stderr
    assert "step 0 of 1" in stdout


def test_a_checkpoint_under_another_name_is_refused(trained, text, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    (workdir / "checkpoints" / "10").rename(workdir / "checkpoints" / "9")
    _, stderr = train(workdir, *text, code=2)
    assert stderr.count("\n") == 1 and "checkpoints/9: holds step 10" in stderr


@pytest.mark.slow
def test_more_steps_go_on_and_a_changed_shape_is_refused(tmp_path, text):
    train(tmp_path, *text, "--config.train.num_steps=4", "--config.log.every_steps=2")
    # As if it had been stopped on its way to 8.
    stopped = shutil.copytree(tmp_path, tmp_path / "stopped")
    (stopped / "config.json").write_text(
        (stopped / "config.json").read_text().replace('"num_steps": 4', '"num_steps": 8')
    )
    lines = [json.dumps(line) + "\n" for line in lines_of(stopped) if line["split"] == "train"]
    (stopped / "metrics.jsonl").write_text("".join(lines))
    _, stderr = train(stopped, *text, "--config.train.num_steps=4", code=2)
    assert "config.train.num_steps=4" in stderr and "saved at step 4 of 8" in stderr
    with (tmp_path / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 6, "split": "train"}) + "\n")
        metrics.write('{"step": 7, "spl')
    more = "--config.train.num_steps=8", "--config.log.every_steps=2"
    stdout, _ = train(tmp_path, *text, *more, "--config.model.remat=step")
    assert "config.train.num_steps is now 8, was 4" in stdout
    assert "config.model.remat is now 'step', was 'none'" in stdout, "the same, computed otherwise"
    assert "step 4 of 8" in stdout
    steps = [(line["step"], line["split"]) for line in lines_of(tmp_path)]
    assert steps == [(2, "train"), (4, "train"), (4, "eval"), (6, "train"), (8, "train"), (8, "eval")]
    _, stderr = train(tmp_path, *text, "--config.model.d_ff=40", code=2)
    assert "config.model.d_ff=40" in stderr and "48" in stderr


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, text):
    """With the schedules of the longer run from the start, for they depend on the number of steps; and while exits are
    closed, for else the exit bias settles at the first end."""
    fixed = ["--config.optimizer.final_fraction=1.0", "--config.optimizer.warmup_steps=0"]
    train(tmp_path / "whole", *text, *fixed, "--config.train.num_steps=6", "--config.log.every_steps=1")
    train(tmp_path / "halves", *text, *fixed, "--config.train.num_steps=3", "--config.log.every_steps=1")
    train(tmp_path / "halves", *text, *fixed, "--config.train.num_steps=6", "--config.log.every_steps=1")

    def figures(name):
        timed = {"tokens_per_s", "step_ms", "mfu"}
        lines = [line for line in lines_of(tmp_path / name) if line["split"] == "train" or line["step"] == 6]
        return [{key: value for key, value in line.items() if key not in timed} for line in lines]

    assert figures("whole") == figures("halves")


def test_evaluate_prints_json(trained):
    workdir, _ = trained
    stdout, _ = run("-m", "radialnet.evaluate", f"--workdir={workdir}")
    found = json.loads(stdout.splitlines()[-1])
    line = lines_of(workdir)[-1]
    assert found["step"] == 10
    assert found["max_depth"] == 3
    for key in ("ce", "bpb", "depth", "exit_bias"):
        assert found[key] == pytest.approx(line[key], rel=1e-5)


def test_evaluate_at_several_depths_and_biases(trained, tmp_path):
    workdir, _ = trained
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "def f(x):\n    return x\n" * 30}) + "\n")
    stdout, _ = run(
        "-m", "radialnet.evaluate", f"--workdir={workdir}", "--max_depth=1,2,4", "--exit_bias=-50,50",
        f"--data={tmp_path / 'other.jsonl'}", "--json",
    )  # fmt: skip
    assert len(stdout.splitlines()) == 1
    depths = {(found["max_depth"], round(found["exit_bias"]) > 0): found["depth"] for found in json.loads(stdout)}
    assert depths == {(1, False): 1, (1, True): 1, (2, False): 2, (2, True): 1, (4, False): 4, (4, True): 1}


@pytest.mark.slow
def test_lm_eval_gives_the_figures_of_evaluate(trained, tmp_path):
    pytest.importorskip("lm_eval")
    workdir, text = trained[0], "def f(x):\n    return x\n" * 60
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    task = {
        "task": "some_text", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "text.jsonl")},
        "test_split": "train", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    (tmp_path / "some_text.yaml").write_text(json.dumps(task))
    environ = {**environment(), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = ["-m", "radialnet.lm_eval", f"--workdir={workdir}", f"--include_path={tmp_path}"]
    stdout, _ = run(*command, "--tasks=some_text", "--max_depth=1,3", "--exit_bias=-50", env=environ)
    by_evaluate, _ = run(
        "-m", "radialnet.evaluate", f"--workdir={workdir}", "--max_depth=1,3", "--exit_bias=-50",
        f"--data={tmp_path / 'text.jsonl'}", "--json",
    )  # fmt: skip
    found = json.loads(stdout.splitlines()[-1])
    assert [line["depth"] for line in found] == [{"some_text": 1}, {"some_text": 3}]
    for line, expected in zip(found, json.loads(by_evaluate), strict=True):
        figures = line["results"]["some_text"]
        assert figures["bits_per_byte,none"] == pytest.approx(expected["bpb"], abs=1e-4)
        assert f"{figures['bits_per_byte,none']:.4f}" in stdout
    assert stdout.count("|depth") == 2
    _, stderr = run(*command, "--tasks=some_text,other", code=2, env=environ)
    assert "error: --tasks=some_text,other: no task 'other'\n" in stderr


def test_lm_eval_says_what_it_needs(trained, tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError(\"No module named 'lm_eval'\")")
    _, stderr = run(
        "-m", "radialnet.lm_eval", f"--workdir={trained[0]}", "--tasks=any", code=2,
        env={**environment(), "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert stderr == "error: lm-eval is needed (No module named 'lm_eval'): pip install -r requirements-eval.txt\n"


def test_generate(trained):
    workdir, _ = trained
    command = ["-m", "radialnet.generate", f"--workdir={workdir}", "--prompt=def f", "--max_new_tokens=5"]
    greedy, _ = run(*command)
    assert greedy.startswith("def f")
    command += ["--temperature=2.0", "--exit_bias=50"]
    first, second = (run(*command, f"--seed={seed}")[0] for seed in (1, 2))
    streamed, stats = run(*command, "--seed=1", "--stream", "--stats")
    assert first != second and streamed == first, "by the seed, streamed or not"
    assert "5 new tokens" in stats and "depth 1.00" in stats, "all leave at the first chance"


def test_generate_from_a_text_file_with_a_trace(trained, tmp_path):
    workdir, _ = trained
    prompt, picture = tmp_path / "prompt.txt", tmp_path / "trace.png"
    prompt.write_text("def f2(x):\n")
    command = ["-m", "radialnet.generate", f"--workdir={workdir}", f"--prompt_file={prompt}", "--max_new_tokens=6"]
    stdout, _ = run(*command, f"--trace={picture}", "--max_depth=2")
    assert stdout.startswith(prompt.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    for wrong, named in (
        ("--prompt=x", "--prompt_file"),
        ("--trace=x.txt", "--trace=x.txt"),
        ("--trace=none/x.png", "--trace=none/x.png"),
        ("--max_new_tokens=1000000000", "max_new_tokens=1000000000"),
    ):
        _, stderr = run(*command, *wrong.split(), code=2)
        assert stderr.count("\n") == 1 and named in stderr


def test_evaluate_token_by_token_gives_the_same_figures(trained):
    workdir, _ = trained
    found = {}
    for path in ("forward", "decode"):
        command = ["-m", "radialnet.evaluate", f"--workdir={workdir}", f"--path={path}", "--max_tokens=1200", "--json"]
        found[path] = json.loads(run(*command)[0])
    forward, decoded = found["forward"], found["decode"]
    # More than the 1,024 of `eval.num_batches`.
    assert 1200 <= decoded["tokens"] == forward["tokens"] < 1300
    for name in ("ce", "bpb", "depth", "depth_hist", "executed_by_step", "exit_bias", "flops_per_token"):
        assert decoded[name] == pytest.approx(forward[name], rel=1e-5), name


def test_evaluate_with_a_window(trained):
    workdir, _ = trained
    command = ["-m", "radialnet.evaluate", f"--workdir={workdir}", "--max_tokens=200", "--json"]
    whole, window = json.loads(run(*command, "--path=decode", "--capacity=4096,32")[0])
    assert whole["ce"] == pytest.approx(json.loads(run(*command)[0])["ce"], rel=1e-5)
    assert abs(window["ce"] / whole["ce"] - 1) > 1e-4
    assert (whole["capacity"], window["capacity"]) == (4096, 32) and window["cache_bytes"] < whole["cache_bytes"]
    # Two pages of keys and values of two heads of eight numbers each.
    assert window["cache_bytes"] <= 32 * 2 * 2 * 8 * 4
    for flags, named in (
        (["--capacity=64"], "--capacity=64: needs --path=decode"),
        (["--path=decode", "--capacity=64,16"], "--capacity=64,16: at least 32 entries a row are needed"),
    ):
        _, stderr = run(*command, *flags, code=2)
        assert stderr.count("\n") == 1 and named in stderr


def test_generate_for_a_file_of_prompts(trained, tmp_path):
    workdir, _ = trained
    command = ["-m", "radialnet.generate", f"--workdir={workdir}", "--max_new_tokens=4"]
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "def f"}\n\n{"prompt": "\u2028", "max_new_tokens": 2, "temperature": 1}\n{"prompt": ""}\n'
    )
    stdout, _ = run(*command, f"--prompts={file}", "--rows=2")
    found = [json.loads(line) for line in stdout.splitlines()]
    assert [line["prompt"] for line in found] == ["def f", "\u2028", ""]
    assert [len(line["tokens"]) for line in found] == [4, 2, 4] or any(line["reason"] == "end" for line in found)
    greedy, _ = run(*command, "--prompt=def f")
    assert greedy == "def f" + found[0]["text"] + "\n"


@pytest.mark.parametrize(
    "content, named",
    [
        ('{"prompt": "a"}\n{', "line 2: not JSON"),
        ('{"prompt": "a", "top_q": 1}', "line 1: 'top_q': unknown"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"prompt": "a", "temperature": 1' + "0" * 400 + "}", "line 1: temperature=1000"),
        ('{"prompt": 1}', "line 1: prompt=1: str is needed"),
        ('{"prompt": "a", "top_p": 0}', "line 1: top_p=0"),
        ("[1]", "line 1: [1]: a JSON object"),
        ("", "no prompt in it"),
    ],
)
def test_prompts_that_cannot_work_are_named(tmp_path, content, named):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError) as raised:
        for where, fields in read_prompts(str(file), {"max_new_tokens": 3, "stop": []}):
            sampling = {name: getattr(Sampling(), name) for name in SETTINGS}
            request_of(None, {**sampling, **fields}, where)
    assert named in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.slow
def test_upcycling_from_a_dense_run(tmp_path, text):
    dense = tmp_path / "dense"
    train(dense, *text, "--config.router.form=sequential", "--config.model.pool_size=3")
    overrides = ["--config.model.init=upcycle", f"--config.model.upcycle_from={dense}", "--config.model.min_depth=3"]
    # More steps than groups, of which all tokens take as many as the dense run has.
    overrides += ["--config.model.max_depth=4", "--config.model.num_groups=3", "--config.router.exit_bias_init=1000.0"]
    overrides += ["--config.router.exit_warmup_steps=0", "--config.router.exit_bias_rate=0.0"]
    overrides += ["--config.router.depth_target=3.0"]
    rate = ["--config.optimizer.learning_rate=0.0", "--config.train.num_steps=1"]
    train(tmp_path / "grown", *text, *overrides, *rate, "--config.router.prior_weight=1000.0")
    grown, original = lines_of(tmp_path / "grown")[-1], lines_of(dense)[-1]
    assert grown["depth"] == 3 and grown["ce"] == pytest.approx(original["ce"], rel=1e-4)
    of_dense, of_grown = (load_trained(path).params["pool"] for path in (dense, tmp_path / "grown"))
    group_L = np.array([0, 0, 1, 1, 2, 2])
    jax.tree.map(lambda dense, grown: np.testing.assert_array_equal(grown, dense[group_L]), of_dense, of_grown)
    dense.rename(tmp_path / "gone")
    stdout, _ = train(
        tmp_path / "grown", *text, *overrides, "--config.train.num_steps=2", "--config.router.prior_weight=1000.0"
    )
    assert "step 1 of 2" in stdout, "the dense run is needed at the start only"
    overrides[1] = f"--config.model.upcycle_from={tmp_path / 'grown'}"
    overrides += ["--config.model.max_depth=3", "--config.model.num_groups=0"]
    _, stderr = train(tmp_path / "again", *text, *overrides, code=2)
    assert "'factored' run of 6 layers" in stderr and "max_depth=3 (config.model.num_groups=0)" in stderr


@pytest.mark.parametrize(
    "flag, named",
    [
        ("--config.model.max_dept=3", ["--config.model.max_dept=3", "max_depth"]),
        ("--config.model.nope=3", ["--config.model.nope=3", "configs/base.py"]),
        ("--config.modle.d_ff=3", ["--config.modle.d_ff=3", "model"]),
        ("--config.model.max_depth=three", ["max_depth", "three"]),
        ("--config.model.num_heads=5", ["config.model.num_heads=5", "config.model.d_model=32"]),
        ("--config.router.form=sequential", ["config.model.pool_size=6", "config.model.max_depth=3"]),
        ("--confg=x", ["confg"]),
        ("surplus", ["surplus"]),
        ("--config.data.path=/nowhere", ["/nowhere"]),
    ],
)
def test_bad_configuration_ends_with_one_line_and_exit_code_2(tmp_path, flag, named):
    source = ["--config.data.source=text"] if "nowhere" in flag else []
    _, stderr = train(tmp_path / "run", flag, *source, code=2)
    assert stderr.count("\n") == 1 and stderr.startswith("error: ")
    for part in named:
        assert part in stderr
    assert not (tmp_path / "run").exists()


def test_config_is_required_and_must_exist(tmp_path):
    for arguments in ([], [f"--config={tmp_path}/none.py"]):
        _, stderr = run("train.py", *arguments, code=2)
        assert stderr.startswith("error: ") and "config" in stderr


def test_folders_that_no_run_can_be_in(tmp_path, text):
    (tmp_path / "file").write_text("")
    (tmp_path / "lost" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "lost" / "checkpoints" / "5" / CHECKSUMS).write_text("{}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "checkpoints").write_text("")
    for name in ("file", "lost", "odd"):
        _, stderr = train(tmp_path / name, *text, code=2)
        assert stderr.count("\n") == 1 and str(tmp_path / name) in stderr


def test_non_finite_loss_ends_with_exit_code_3(tmp_path, text):
    rate = "--config.optimizer.learning_rate=1e38"
    _, stderr = train(tmp_path, *text, rate, "--config.train.max_skipped_steps=3", code=3)
    assert "not finite" in stderr and "max_skipped_steps=3" in stderr
    assert lines_of(tmp_path)[-1]["skipped_steps"] >= 3


def test_bad_input_after_the_start_is_one_line_too(trained, tmp_path):
    """JAX and Orbax used to write a page of details above it."""
    workdir, _ = trained
    for flag, named in ((f"--data={tmp_path}/none", "none: no such file"), (f"--data={tmp_path}", "no text")):
        _, stderr = run("-m", "radialnet.evaluate", f"--workdir={workdir}", flag, code=2)
        assert stderr.count("\n") == 1 and named in stderr


@pytest.mark.parametrize("module", ["evaluate", "generate"])
def test_a_folder_that_is_no_run(tmp_path, module):
    _, stderr = run("-m", f"radialnet.{module}", f"--workdir={tmp_path}", code=2)
    assert stderr.count("\n") == 1 and "config.json" in stderr
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    _, stderr = run("-m", f"radialnet.{module}", f"--workdir={tmp_path}", code=2)
    assert "config.json: of transformers, and of no run" in stderr


def test_heavy_packages_are_not_imported_at_the_start():
    heavy = {"matplotlib", "datasets", "tensorflow_datasets"}
    stdout, _ = run("-c", f"import sys, radialnet.trainer; print(sorted({heavy} & set(sys.modules)))")
    assert stdout.strip() == "[]"


@pytest.mark.parametrize(
    "kind, text", [(float, "1e39"), (float, "nan"), (float, "x"), (int, "0"), (int, "99999999999"), (int, "1.5")]
)
def test_numbers_that_no_model_can_take(kind, text):
    with pytest.raises(ConfigError, match=f"--name={text}: such numbers of "):
        cli.numbers("name", [text], kind, "such numbers")
    assert cli.numbers("name", ["1", "7"], kind, "such numbers") == [1, 7]
