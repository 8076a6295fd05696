"""The page of hand-made runs, read by a parser of HTML and by a browser."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from radialnet.checkpoint import Checkpoints
from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import prepare
from radialnet.environment import read_starts, record_start
from radialnet.evaluate import evaluate_trained
from radialnet.model import init_params
from radialnet.report import names_of, raised_alarms, read_run, report
from radialnet.routes import PART_OF_CHARACTER, ShownToken, shown_tokens, transitions
from radialnet.run_figures import _labels, layer_use
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.sharding import Parallel
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from radialnet.trained import load_trained
from tests.commands import run as run_command
from tests.tiny import make_config

# What a document must not do to the page that shows it.
EVIL = "<script>alert(\"1\")</script> & 'it' </p><b>\n"
CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)


def test_transitions_are_counted_by_hand():
    """Three tokens through four layers: 2 → 0 → exit, 1 → idle → 1 → exit, and one that leaves at once."""
    none = 4
    layer_TN = np.array([[2, 1, none], [0, none, none], [none, 1, none]])
    wanted = np.zeros((5, 5), int)
    start, exit_ = 0, 4
    wanted[start, [2, 1, exit_]] = 1
    wanted[1 + 2, 0] = wanted[1 + 0, exit_] = 1
    wanted[1 + 1, 1] = wanted[1 + 1, exit_] = 1
    np.testing.assert_array_equal(transitions(layer_TN, num_layers=4), wanted)


def test_a_character_of_several_tokens_stands_at_the_last_of_them():
    tokenizer = Tokenizer.train([], BYTE_VOCAB_SIZE)
    ids = [tokenizer.separator_id, *tokenizer.encode("aé€b")]
    layer_TN = np.array([[5] * len(ids), [0] + [7] * (len(ids) - 1)])
    shown = shown_tokens(tokenizer, np.array(ids), layer_TN, num_layers=7)
    part = PART_OF_CHARACTER
    assert [token.text for token in shown] == ["⟦document⟧", "a", part, "é", part, part, "€", "b"]
    assert shown[0] == ShownToken("⟦document⟧", (5, 0)) and shown[1] == ShownToken("a", (5,))


def test_words_keep_their_space():
    tokenizer = Tokenizer.of_words(["one", "two"])
    shown = shown_tokens(tokenizer, np.array(tokenizer.encode("one two two")), np.zeros((1, 3), int), 1)
    assert "".join(token.text for token in shown) == "one two two"


def line_of(config: Config, step: int, split: str, **changes) -> dict:
    """A line of metrics.jsonl, every depth and layer alike."""
    num_layers, max_depth = config.model.pool_size, config.model.max_depth
    line = dict.fromkeys(
        ("loss", "ce", "bpb", "route_mi", "load_entropy", "expected_depth", "router_grad_norm", "loss_router_z"), 1.0
    )
    return {
        **line,
        "step": step,
        "split": split,
        "depth": 2.0,
        "depth_target": 2.0,
        "depth_hist": [1 / (max_depth + 1)] * (max_depth + 1),
        "load": [1 / num_layers] * num_layers,
        "load_by_step": [[1 / num_layers] * num_layers] * max_depth,
        "flops_per_token": 1e4,
        "tokens_per_s": 1e3,
        "skipped_steps": 0,
        **changes,
    }


def test_runs_whose_names_begin_alike_have_labels_of_their_own():
    runs = [SimpleNamespace(name=f"max_depth=4+depth_target=2.0+seed={seed}") for seed in (0, 1)]
    first, second = _labels(runs)
    assert first != second and first.startswith("1 max_depth=4") and second.startswith("2 max_depth=4")
    assert _labels([SimpleNamespace(name="a"), SimpleNamespace(name="b")]) == ["a", "b"]


def write_lines(folder: RunFolder, lines: list[dict]) -> None:
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def usual_lines(config: Config) -> list[dict]:
    lines = [line_of(config, step, "train", bpb=9 / step) for step in (1, 2, 3, 4)]
    return [*lines, line_of(config, 4, "eval", bpb=2.5)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(20):
        (folder / f"{index}.txt").write_text(EVIL + f"number {index} é\n" * 3)
    return folder


@pytest.fixture(scope="module")
def config(text, tmp_path_factory):
    fields = {"source": "text", "path": str(text), "tokenizer": "byte", "eval_fraction": 0.3}
    fields["cache_dir"] = str(tmp_path_factory.mktemp("cache"))
    return make_config(**{f"data__{name}": value for name, value in fields.items()})


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The folder of a run with all that the page tells of: fresh parameters, lines, and what it was started with."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "a <b> & 'c' $x$")
    folder.root.mkdir()
    dataset = prepare(config, folder)
    dataset.tokenizer.save(folder.tokenizer)
    folder.write_manifest(dataset.manifest)
    config.save(folder.config)
    write_lines(folder, usual_lines(config))
    record_start(folder, 0, Parallel())
    params = init_params(config, dataset.tokenizer.vocab_size)[1]
    controllers = Controllers.init(config.router, config.model.pool_size)
    with Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(4, {"params": params, "controllers": controllers})
        checkpoints.check(wait=True)
    return folder


@pytest.fixture(scope="module")
def run_of(trained):
    return read_run(trained.root, trained.root.name, "", 200)


class Page(HTMLParser):
    """What stands in a page: tags with their attributes, ids, text by the tag that it is in."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.ids, self.open, self.texts = [], [], [], []
        # What has no end.
        self.void = {"meta", "input", "br", "link", "img"}
        self.feed(source)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *tags: str) -> str:
        return "".join(data for tag, data in self.texts if not tags or tag in tags)

    def num(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def check_whole(source: str) -> Page:
    """What holds for every page."""
    page = Page(source)
    assert len(page.ids) == len(set(page.ids)), "ids are unique"
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"src", "srcset", "onload", "onclick"}, tag
        for name in ("href", "xlink:href"):
            reference = attributes.get(name)
            assert reference is None or reference.startswith("data:image/png;base64,") or reference[1:] in page.ids, (
                reference
            )
    style = page.text("style")
    assert "url(" not in style and "@import" not in style
    for attributes in (attributes for tag, attributes in page.tags if tag == "svg"):
        assert attributes["role"] == "img" and set(attributes["aria-labelledby"].split()) <= set(page.ids)
    assert all(text.strip() for tag, text in page.texts if tag in ("title", "desc", "figcaption"))
    for reference in re.findall(r"url\(#([^)]+)\)", source):
        assert reference in page.ids
    return page


FIGURES = ["bpb", "loss", "route_mi", "load_entropy", "depth-0", "hist-0", "layers-0", "transitions-0"]


def test_the_page_of_a_run_has_all_figures_and_nothing_from_elsewhere(run_of):
    source, missing = report([run_of])
    page = check_whole(source)
    assert "None was raised." in page.text("p")
    assert missing == [] and not any("missing" in attributes.get("class", "") for _, attributes in page.tags)
    assert [f"{name}-title" for name in FIGURES] == [name for name in page.ids if name.endswith("-title")]
    assert page.num("svg") == page.num("figure") == page.num("figcaption") == len(FIGURES)
    # The name of the run, and the document, are text.
    assert page.num("b") == 0 and run_of.name in page.text("h1") and run_of.name in page.text("title")
    shown = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert len(shown) == len(run_of.routes.shown) > 100
    text = "".join(data for tag, data in page.texts if tag == "span")
    assert EVIL.replace("\n", "↵\n") in text and "é" in text
    assert {attributes["class"] for attributes in shown} <= {"d1", "d2", "d3"}
    assert shown[0]["title"].startswith("‘⟦document⟧’: depth ")


def test_the_coloured_text_is_what_the_model_does(run_of, config):
    """Against what evaluation says of the same rows."""
    trained, rows = load_trained(run_of.folder.root), prepare(config, run_of.folder).eval
    num_rows = 200 // config.train.seq_len
    assert num_rows < len(rows)
    found = evaluate_trained(trained, [rows[row] for row in range(num_rows)], config.model.max_depth, 0.0)
    use_TL = layer_use(run_of)
    np.testing.assert_allclose(use_TL, found["load_by_step"], atol=1e-6)
    assert np.mean([token.depth for token in run_of.routes.shown]) == pytest.approx(found["depth"])
    assert found["depth"] > 1 and (use_TL > 0).sum() > 3


def test_runs_side_by_side(run_of, config, tmp_path):
    """The other one has no checkpoint, no line, deeper tokens, and a router that is not learned."""
    other = RunFolder(tmp_path / "other")
    other.root.mkdir()
    fields = config.to_dict()
    fields["router"]["form"] = "hash"
    fields["model"] |= {"pool_size": 64, "max_depth": 12, "min_depth": 12}
    Config.from_dict(fields).save(other.config)
    for path in (run_of.folder.tokenizer, run_of.folder.manifest):
        shutil.copy(path, other.root)
    source, missing = report([run_of, read_run(other.root, "other", "", 200)])
    page = check_whole(source)
    assert page.num("svg") == len(FIGURES)
    said = page.text("p")
    for line in missing:
        assert line in said
    for what in ("depth over training", "depth histogram", "layer use", "transitions", "coloured text", "environment"):
        assert sum(line.startswith("other: ") and what in line for line in missing) == 1
    assert "no checkpoint in this run folder yet" in said and "Fixed routes" in said
    assert "2 runs" in page.text("h1")
    config_rows = "router.form", "model.pool_size", "model.max_depth", "model.min_depth"
    assert f"{len(config_rows)} of " in said
    assert page.text("th").count("≠ router.form") == 1 and "≠ model.d_model" not in page.text("th")
    # One scale of colours for both.
    assert ".d12 {" in page.text("style")


def test_large_pools_many_depths_and_figures_that_are_not_finite(config, trained, tmp_path):
    folder = RunFolder(tmp_path / "large")
    folder.root.mkdir()
    fields = config.to_dict()
    fields["model"] |= {"pool_size": 64, "max_depth": 12}
    large = Config.from_dict(fields)
    large.save(folder.config)
    nothing = dict.fromkeys(("bpb", "loss", "ce", "depth", "route_mi", "load_entropy", "depth_target"))
    lines = usual_lines(large)
    lines[1] |= nothing
    lines[2] |= {"route_mi": None, "depth_target": None, "alarms": ["route_mi"]}
    write_lines(folder, [*lines, line_of(large, 6, "train", **nothing), line_of(large, 6, "eval", **nothing)])
    source, missing = report([read_run(folder.root, "large", "", 200)])
    page = check_whole(source)
    assert page.num("svg") == len(FIGURES) - 1 and "nan" not in page.text("td", "th", "text", "desc")
    assert [line.split(":")[1] for line in missing] == [
        " transitions",
        " coloured text",
        " its environment is not known",
    ]
    assert "64 of 64 layers are used" in page.text("figcaption")

    write_lines(folder, [line_of(large, 1, "train"), line_of(large, 2, "train", **nothing)])
    _, missing = report([read_run(folder.root, "large", "", 200)])
    assert any("no held-out figures" in line for line in missing)

    write_lines(folder, [line_of(large, 2, split, **nothing) for split in ("train", "eval")])
    source, missing = report([read_run(folder.root, "large", "", 200)])
    assert check_whole(source).num("svg") == 0 and "bits per byte: no line of metrics.jsonl has a value" in missing


def test_alarms_are_told_with_what_they_said(config, tmp_path):
    folder = RunFolder(tmp_path)
    config.save(folder.config)
    raised = {"route_mi": 0.001, "alarms": ["route_mi"]}
    lines = [line_of(config, step, "train", route_mi=0.001) for step in (5, 10)]
    lines += [line_of(config, step, "train", **raised) for step in (15, 20)] + [line_of(config, 25, "train", alarms=[])]
    write_lines(folder, lines)
    found = read_run(folder.root, "run", "", 200)
    told = "the route is the same whatever the token: route_mi 0.0010 nats"
    assert raised_alarms(found) == [("route_mi", "run", 15, 20, 2, told)]
    page = check_whole(report([found])[0])
    assert told in page.text("td")


def test_a_corpus_that_is_gone_is_said_and_another_text_taken(trained, config, tmp_path, text):
    folder = RunFolder(shutil.copytree(trained.root, tmp_path / "run"))
    fields = config.to_dict()
    fields["data"]["path"] = str(tmp_path / "gone")
    Config.from_dict(fields).save(folder.config)
    without = read_run(folder.root, "run", "", 200)
    assert without.routes is None and "no such file or folder" in without.why_no_routes
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("my own text")
    shown = read_run(folder.root, "run", str(tmp_path / "mine"), 200).routes.shown
    assert "".join(token.text for token in shown).startswith("⟦document⟧my own text"[:20])
    with pytest.raises(ConfigError, match="--data=.*none: no such"):
        read_run(folder.root, "run", str(tmp_path / "none"), 200)


def test_starts_are_kept_and_a_damaged_file_is_none(tmp_path):
    folder = RunFolder(tmp_path)
    assert read_starts(folder) == []
    record_start(folder, 0, Parallel())
    record_start(folder, 7, Parallel(data=2))
    starts = read_starts(folder)
    assert [start["step"] for start in starts] == [0, 7] and starts[1]["mesh"].startswith("data=2")
    assert starts[0]["packages"].keys() >= {"jax", "flax", "numpy"} and starts[0]["device"] == "cpu"
    for damaged in ('{"a": 1}', "[", "[1]"):
        folder.environment.write_text(damaged)
        assert read_starts(folder) == []


def test_names_are_those_of_the_folders_where_they_differ(tmp_path):
    one, two, three = tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "z"
    assert names_of([one, three]) == ["run", "z"]
    assert names_of([one, two]) == [str(one), str(two)]


def test_two_runs_with_all_figures(run_of):
    source, missing = report([run_of, dataclasses.replace(run_of, name="two")])
    assert missing == [] and check_whole(source).num("svg") == len(FIGURES) + 4
    assert "No fields differ between the runs." in source


@pytest.mark.slow
def test_the_command(trained, tmp_path):
    out = tmp_path / "page.html"
    stdout, _ = run_command(
        "-m", "radialnet.report", f"--workdir={trained.root}", f"--out={out}", "--max_tokens=200", "--json"
    )
    found = json.loads(stdout.splitlines()[-1])
    assert found["report"] == str(out) and found["missing"] == []
    assert [(run["name"], run["bpb"]) for run in found["runs"]] == [(trained.root.name, 2.5)]
    assert check_whole(out.read_text()).num("svg") == len(FIGURES)


def test_what_can_not_be_reported_on(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        read_run(tmp_path, "none", "", 200)
    out = tmp_path / "none" / "page.html"
    _, stderr = run_command("-m", "radialnet.report", f"--workdir={trained.root}", f"--out={out}", code=2)
    assert stderr == f"error: --out={out}: a file in a folder that exists is needed\n"
    assert not (trained.root / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_a_browser_opens_the_page_without_an_error(run_of, tmp_path):
    """All figures are drawn: each has a size and shapes in it; and nothing is fetched."""
    from PIL import Image

    path, shot = tmp_path / "report.html", tmp_path / "shot.png"
    path.write_text(report([run_of])[0])
    # A picture of each mode of the page, from which the log of the console and what went wrong is taken as well.
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--enable-logging=stderr", "--v=0", "--window-size=1280,4000", "--hide-scrollbars"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    pictures = []
    for mode in (0, 1):
        arguments = [f"--blink-settings=preferredColorScheme={mode}", f"--screenshot={shot}", f"file://{path}"]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
        with Image.open(shot) as image:
            pictures.append(np.asarray(image.convert("L"), int))
    dark, light = pictures
    assert np.median(dark) < 60 and np.median(light) > 200
    # Where the figures are, the picture isn't blank.
    assert (abs(dark - np.median(dark)) > 40).mean() > 0.01 and (abs(light - np.median(light)) > 40).mean() > 0.01
    # What the browser makes of each figure: how large it is, and how many marks in it have a size, in and out of view.
    measure = """<script>
      for (const figure of document.querySelectorAll("svg")) {
        const box = figure.getBoundingClientRect();
        const marks = [...figure.querySelectorAll("path, line, rect, circle, polyline, text")].map((x) => x.getBBox());
        const inside = marks.filter((x) => x.width + x.height > 0 && x.x < box.width && x.y < box.height);
        const title = figure.querySelector("title").id.replace("-title", "");
        document.title += ` ${title}:${Math.round(box.width)}:${Math.round(box.height)}:${inside.length}`;
      }
    </script>"""
    path.write_text(path.read_text() + measure)
    done = subprocess.run([*command, "--dump-dom", f"file://{path}"], env=environment, capture_output=True, text=True)
    assert "CONSOLE" not in done.stderr
    figures = re.findall(r" ([\w-]+):(\d+):(\d+):(\d+)", re.search("<title>(.*?)</title>", done.stdout)[1])
    assert {name for name, *_ in figures} == set(FIGURES) and len(figures) == len(FIGURES)
    for name, width, height, num_marks in figures:
        assert int(width) > 200 and int(height) > 100 and int(num_marks) >= 8, (name, width, height, num_marks)
