import json
import shutil

import grain
import numpy as np
import pytest
import scipy.stats

from radialnet.checks import check_hops
from radialnet.data import eval_batches, prefetch, prepare, train_batches
from radialnet.hop_task import NUM_ROWS, PAIR, WORDS, HopRows, make_tokenizer
from radialnet.hops import query_figures, spearman
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.tokenizer import SEPARATOR, UNKNOWN, Tokenizer
from tests.commands import run
from tests.tiny import make_config

N, K, S = 7, 5, 50  # Room for 14 queries, where all symbols are used.
SIZES = [(N, K, S), (2, 1, 9), (16, 15, 70), (5, 2, 18), (5, 4, 19), (5, 4, 20), (3, 1, 43)]


def rows_of(split="train", symbols=N, max_hops=K, seq_len=S):
    return HopRows(split, symbols, max_hops, seq_len)


def words_of(tokens):
    """The words of a row by its tokenizer, the separator left out."""
    return make_tokenizer().decode(tokens.tolist()).split(" ")


def parse(item):
    """The pairs of a row and its whole queries (x, k, answer), read back from the words."""
    words = words_of(item["token"])
    symbols = words.count(PAIR)
    pairs = words[: 3 * symbols]
    assert set(pairs[::3]) == {PAIR}
    asks_S = item["is_target"]
    places = np.flatnonzero(asks_S)
    assert places.tolist() == list(range(3 * symbols + 2, len(asks_S), 2)), "every second token after the pairs"
    answers = words_of(item["target"][asks_S])
    # The separator is no word.
    queries = [(words[at - 2], words[at - 1], answer) for at, answer in zip(places, answers, strict=True)]
    return list(zip(pairs[1::3], pairs[2::3], strict=True)), queries


@pytest.mark.parametrize("symbols, max_hops, seq_len", SIZES)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_answer_is_right_by_following_the_pairs(split, symbols, max_hops, seq_len):
    rows = rows_of(split, symbols, max_hops, seq_len)
    for row in (0, 1, 57, len(rows) - 1):
        item = rows[row]
        pairs, queries = parse(item)
        table = dict(pairs)
        assert set(table) == set(table.values()) and len(table) == len(pairs), "a permutation"
        assert len(table) == symbols or (split == "train" and 2 <= len(table) < symbols)
        assert set(table) <= {f"s{i}" for i in range(16)}
        for x, k, answer in queries:
            assert 1 <= int(k) <= max_hops
            walk = [x]
            for _ in range(int(k)):
                walk.append(table[walk[-1]])
            assert walk[-1] == answer
            assert len(set(walk)) == len(walk), "no walk comes round to a shorter one"
        # As many queries as there is room for.
        assert len(queries) == (seq_len - 1 - 3 * len(table)) // 2 >= 1
        assert item["token"][0] == make_tokenizer().separator_id
        assert {array.shape for array in item.values()} == {(seq_len,)}
        assert (item["document"] == 0).all() and (item["target"][~item["is_target"]] == 0).all()
        np.testing.assert_array_equal(item["position"], range(seq_len))


def test_rows_of_training_have_sizes_of_their_own():
    parsed = [parse(rows_of()[row]) for row in range(1200)]
    sizes = np.array([len(pairs) for pairs, _ in parsed])
    counts = np.unique(sizes, return_counts=True)
    assert counts[0].tolist() == [2, 3, 4, 5, 6, 7] and abs(counts[1] / 1200 - 1 / 6).max() < 0.04
    # Of seven symbols: a largest k of 1 to 5, each as often.
    largest = [max(int(k) for _, k, _ in queries) for pairs, queries in parsed if len(pairs) == N]
    counts = np.unique(largest, return_counts=True)
    assert counts[0].tolist() == [1, 2, 3, 4, 5] and abs(counts[1] / len(largest) - 1 / 5).max() < 0.1


def test_a_row_is_a_pure_function_of_split_and_row():
    first, again = rows_of(), rows_of()
    items = {row: first[row] for row in (5, 0, 9)}
    for row in (9, 5, 0):
        for name, array in again[row].items():
            np.testing.assert_array_equal(array, items[row][name])
    with pytest.raises(IndexError):
        first[len(first)]


def test_no_two_held_out_rows_are_the_same_and_none_is_trained_on():
    held_out = {rows_of("eval")[row]["token"].tobytes() for row in range(200)}
    assert len(held_out) == 200
    assert not held_out & {rows_of("train")[row]["token"].tobytes() for row in range(1000)}


def test_symbols_and_queries_are_drawn_evenly():
    """Each symbol of the alphabet in n of 16 rows; each (place on the cycle, k) as often as any other."""
    num_rows, rows = 1000, rows_of("eval")
    parsed = [parse(rows[row]) for row in range(num_rows)]
    used = np.unique([x for pairs, _ in parsed for x, _ in pairs], return_counts=True)[1]
    assert len(used) == 16 and abs(used / num_rows - N / 16).max() < 0.06
    first = np.unique([pairs[0][0] == queries[0][0] for pairs, queries in parsed], return_counts=True)[1]
    assert abs(first[1] / num_rows - 1 / N) < 0.04, "the order of the pairs tells nothing"
    hops = np.unique([k for _, queries in parsed for _, k, _ in queries], return_counts=True)[1]
    assert len(hops) == K and abs(hops / hops.sum() - 1 / K).max() < 0.01


def test_no_query_comes_again_before_all_have_come():
    _, queries = parse(rows_of("eval")[2])
    assert len({(x, k) for x, k, _ in queries}) == len(queries)
    _, queries = parse(rows_of("eval", symbols=3, max_hops=2, seq_len=60)[2])
    assert len({(x, k) for x, k, _ in queries}) == 6 < len(queries)


def test_batches_in_the_order_of_any_epoch_and_process():
    """Against the rows themselves: which of them a step reads does not change what is in them."""
    batches = train_batches(rows_of(), 2, seed=3)
    order = grain.MapDataset.range(NUM_ROWS["train"]).shuffle(seed=3).repeat().batch(2)
    ahead = prefetch(train_batches(rows_of(), 2, seed=3), start=4)
    for step in (4, 5, 6, 2**25):
        wanted = np.stack([rows_of()[row]["token"] for row in order[step].tolist()])
        np.testing.assert_array_equal(batches[step]["token"], wanted)
        if step < 7:
            np.testing.assert_array_equal(next(ahead)["token"], wanted)
    assert (batches[0]["token"] != train_batches(rows_of(), 2, seed=4)[0]["token"]).any()


def test_held_out_rows_have_thousands_of_queries_of_each_k():
    config = make_config(data__source="hops", train__seq_len=128)
    rows = rows_of("eval", config.data.hops_symbols, config.data.hops_max, 128)
    hops = [batch["token"][batch["is_target"]] for batch in eval_batches(rows, 64, num_batches=0)]
    counts = np.unique(np.concatenate(hops), return_counts=True)[1]
    assert len(counts) == config.data.hops_max and counts.min() > 3000


def test_tokenizer_of_words(tmp_path):
    tokenizer = make_tokenizer()
    text = "s3 s15 s15 s3 s3 2 s3"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(set(tokenizer.encode(" ".join(WORDS)))) == len(WORDS) == tokenizer.vocab_size - 2
    assert tokenizer.decode(tokenizer.encode("def s3")) == f"{UNKNOWN} s3"
    assert tokenizer.decode([tokenizer.separator_id]) == "" and SEPARATOR not in WORDS
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    for one in (tokenizer, loaded):
        assert one.bytes_per_token[one.encode(text)].tolist() == [1] * 7
        assert one.bytes_per_token[one.separator_id] == 0


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"data__hops_symbols": 17}, ("config.data.hops_symbols=17", "16")),
        ({"data__hops_max": 5}, ("config.data.hops_max=5", "config.data.hops_symbols=5")),
        ({"data__hops_max": 0}, ("config.data.hops_max=0", "at least 1")),
        ({"train__seq_len": 17}, ("config.train.seq_len=17", "config.data.hops_symbols=5", "18")),
    ],
)
def test_sizes_that_cannot_work_are_named(overrides, named):
    sizes = {"data__hops_symbols": 5, "data__hops_max": 4, "train__seq_len": 18}
    make_config(data__source="hops", **sizes)
    with pytest.raises(ConfigError) as raised:
        make_config(data__source="hops", **{**sizes, **overrides})
    for part in named:
        assert part in str(raised.value)
    make_config(data__source="stdlib", **{**sizes, **overrides})
    with pytest.raises(ConfigError, match="--max_hops=9: .* --symbols=9"):
        check_hops(9, 9, 99, names=("--symbols", "--max_hops"))


def test_prepared_data_goes_with_its_run(tmp_path):
    sizes = {"data__hops_symbols": N, "data__hops_max": K, "train__seq_len": S}
    config = make_config(data__source="hops", data__cache_dir=str(tmp_path / "cache"), **sizes)
    folder = RunFolder(tmp_path / "run")
    dataset = prepare(config, folder)
    assert (dataset.train.split, dataset.eval.split) == ("train", "eval")
    folder.root.mkdir()
    folder.write_manifest(dataset.manifest)
    config.save(folder.config)
    assert prepare(config, folder).manifest == dataset.manifest
    folder.write_manifest({"sha256": "of other random streams"})
    with pytest.raises(ConfigError, match="manifest.json"):
        prepare(config, folder)


def test_figures_by_k():
    hops, is_right = np.array([1, 3, 1, 3, 1]), np.array([True, False, True, True, False])
    found = query_figures(hops, is_right, depth_Q=np.array([1, 3, 2, 4, 3]), max_hops=4)
    assert [line["queries"] for line in found["by_k"]] == [3, 0, 2, 0]
    assert found["by_k"][0] == {"k": 1, "queries": 3, "accuracy": pytest.approx(2 / 3), "depth": 2}
    assert found["by_k"][1] == {"k": 2, "queries": 0, "accuracy": None, "depth": None}
    assert found["by_k"][2] == {"k": 3, "queries": 2, "accuracy": 0.5, "depth": 3.5}
    assert (found["queries"], found["accuracy"], found["answer_depth"]) == (5, 0.6, 2.6)
    # Ranks 2, 4.5, 2, 4.5, 2 and 1, 3.5, 2, 5, 3.5.
    assert found["spearman"] == pytest.approx(6.25 / (7.5 * 9.5) ** 0.5)


def test_rank_correlation():
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 6, 300), rng.integers(0, 4, 300)
    for other in (y, y + x, -x):
        assert spearman(x, other) == pytest.approx(scipy.stats.spearmanr(x, other).statistic)
    assert spearman(x, 10 - 2 * x) == pytest.approx(-1)
    assert spearman(x, np.full(300, 3)) is None


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    return [
        "--config=configs/smoke.py",
        f"--config.data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "--config.data.source=hops",
        "--config.data.hops_symbols=5",
        "--config.data.hops_max=2",
        "--config.train.seq_len=50",
        "--config.eval.num_batches=0",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, overrides):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    # With the default prompt, of which the vocabulary knows no word.
    stdout, _ = run("train.py", f"--workdir={workdir}", *overrides, "--config.train.num_steps=6")
    return workdir, stdout


def report(workdir, *arguments):
    stdout, _ = run("-m", "radialnet.hops", f"--workdir={workdir}", *arguments)
    return json.loads(stdout.splitlines()[-1]), stdout


def test_report_of_a_run(trained):
    workdir, stdout = trained
    assert "a sample, greedily:" in stdout
    found, stdout = report(workdir)
    evaluated = json.loads(run("-m", "radialnet.evaluate", f"--workdir={workdir}")[0].splitlines()[-1])
    assert [line["k"] for line in found["by_k"]] == [1, 2]
    assert sum(line["queries"] for line in found["by_k"]) == found["queries"] == 17 * NUM_ROWS["eval"]
    assert 0 <= found["accuracy"] <= 1 and "k not trained" not in stdout
    assert found["step"] == evaluated["step"] == 6
    assert found["depth"] == pytest.approx(evaluated["depth"])


def test_report_with_more_symbols_and_hops_than_trained(trained):
    workdir, _ = trained
    found, stdout = report(workdir, "--symbols=13", "--max_hops=4", "--exit_bias=50")
    assert (found["symbols"], found["max_hops"], found["trained_symbols"], found["trained_max_hops"]) == (13, 4, 5, 2)
    assert [line["queries"] > 0 for line in found["by_k"]] == [True] * 4
    assert found["queries"] == 5 * NUM_ROWS["eval"]
    assert found["depth"] == found["answer_depth"] == 1 and found["spearman"] is None, "all leave at the first chance"
    assert stdout.count("k not trained") == 2
    found, stdout = report(workdir, "--max_depth=5", "--exit_bias=-50", "--json")
    assert len(stdout.splitlines()) == 1 and found["depth"] == 5


def test_a_run_goes_on(trained, overrides, tmp_path):
    """That it reads the rows that it would have read is `test_batches_in_the_order_of_any_epoch_and_process`."""
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    more = ["--config.train.num_steps=7", "--config.eval.num_batches=1", "--config.log.sample_prompt="]
    stdout, _ = run("train.py", f"--workdir={workdir}", *overrides, *more)
    assert "step 6 of 7" in stdout and "a sample, greedily:" not in stdout
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["split"]) == (7, "eval") and np.isfinite(last["bpb"])


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--symbols=16"], "config.train.seq_len=50: --symbols=16 needs at least 51"),
        (["--symbols=4", "--max_hops=4"], "--max_hops=4"),
        (["--max_depth=0"], "max_depth"),
        (["--symbols=many"], "symbols"),
        (["--exit_bias=nan"], "--exit_bias=nan"),
    ],
)
def test_bad_flags_of_the_report(trained, flags, named):
    workdir, _ = trained
    _, stderr = run("-m", "radialnet.hops", f"--workdir={workdir}", *flags, code=2)
    assert stderr.count("\n") == 1 and named in stderr


def test_what_has_no_report_and_no_text(trained, tmp_path):
    workdir, _ = trained
    other = shutil.copytree(workdir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "data": {**config["data"], "source": "stdlib"}}))
    _, stderr = run("-m", "radialnet.hops", f"--workdir={other}", code=2)
    assert stderr.count("\n") == 1 and "config.data.source='stdlib'" in stderr
    _, stderr = run("-m", "radialnet.copying", f"--workdir={workdir}", code=2)
    assert stderr == f"error: --workdir={workdir}: a run on config.data.source='hops': radialnet.hops is for it\n"
    _, stderr = run("-m", "radialnet.evaluate", f"--workdir={workdir}", "--data=README.md", code=2)
    assert stderr.count("\n") == 1 and "--data=README.md" in stderr
    _, stderr = run("-m", "radialnet.hops", f"--workdir={tmp_path}", code=2)
    assert stderr.count("\n") == 1 and "config.json" in stderr
