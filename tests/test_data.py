import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from radialnet.data import eval_batches, prefetch, prepare, train_batches
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.shards import PADDING, PackedRows, Stream
from radialnet.sources import Document
from radialnet.tokenizer import BYTE_VOCAB_SIZE, PIECE, Tokenizer, pieces
from tests.texts import SEQ, TEXTS, config_of


@pytest.fixture(scope="module")
def byte_tokenizer():
    return Tokenizer.train([], BYTE_VOCAB_SIZE)


@pytest.fixture(scope="module")
def rows(byte_tokenizer):
    """Of documents that lie in three shards, one of them without any."""
    documents = [Document(str(index), text) for index, text in enumerate(TEXTS)]
    shards = [Stream.of(part, byte_tokenizer) for part in (documents[:3], [], documents[3:])]
    tokens, starts = (sum((getattr(shard, name) for shard in shards), ()) for name in ("tokens", "starts"))
    return PackedRows(Stream(tokens, starts, byte_tokenizer.separator_id), SEQ)


def stream_of(tokenizer):
    return np.concatenate([[tokenizer.separator_id, *tokenizer.encode(text)] for text in TEXTS])


def test_tokenizers_are_lossless_and_count_bytes(byte_tokenizer):
    bpe = Tokenizer.train(["def f(x):\n    return x\n" * 50], 270)
    assert byte_tokenizer.vocab_size == 257
    assert 258 <= bpe.vocab_size <= 270
    for tokenizer in (byte_tokenizer, bpe):
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.separator_id not in ids, "a quoted separator splits no document"
            assert tokenizer.decode(ids) == text
            assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
        assert tokenizer.bytes_per_token[tokenizer.separator_id] == 0
        assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]
    assert len(bpe.encode(TEXTS[0])) < len(byte_tokenizer.encode(TEXTS[0]))


def test_a_long_text_is_cut_where_the_tokenizer_cuts_too(monkeypatch):
    """A line of millions of characters without a space once took the trainer longer than anybody waits."""
    # Indented throughout, so that hardly a line begins with a word; and white space of all kinds.
    source = json.dumps([{"name": f"é{n}", "list": [n, "a b", -n]} for n in range(4000)], indent=2, ensure_ascii=False)
    text = source + "\n\n\n    \n\t" + source.replace("  ", "\r\n\t ") + Path(json.__file__).read_text()
    assert len(text) > 4 * PIECE
    bpe = Tokenizer.train([text], 400)
    assert "".join(pieces(text)) == text
    assert bpe.encode(text) == bpe._tokenizer.encode(text).ids and len(list(pieces(text))) > 4
    monkeypatch.setattr("radialnet.tokenizer.PIECE", len(text))
    assert Tokenizer.train([text], 400).fingerprint() == bpe.fingerprint()
    monkeypatch.undo()
    line = "a" * 2_000_000
    bpe = Tokenizer.train([line, text], 400)
    assert bpe.decode(bpe.encode(line + "b")) == line + "b"


def test_tokenizer_survives_saving(tmp_path):
    bpe = Tokenizer.train(TEXTS, 300)
    bpe.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint() == bpe.fingerprint() == Tokenizer.train(TEXTS, 300).fingerprint()
    assert loaded.encode(TEXTS[3]) == bpe.encode(TEXTS[3])
    with pytest.raises(ConfigError, match="missing.json"):
        Tokenizer.load(tmp_path / "missing.json")


def test_rows_hold_the_stream_every_token_an_input_and_a_target_once(rows, byte_tokenizer):
    stream = stream_of(byte_tokenizer)
    items = [rows[row] for row in range(len(rows))]
    inputs = np.concatenate([item["token"][item["is_target"]] for item in items])
    targets = np.concatenate([item["target"][item["is_target"]] for item in items])
    np.testing.assert_array_equal(inputs, stream[:-1])
    np.testing.assert_array_equal(targets, stream[1:])
    assert len(rows) == -(-(len(stream) - 1) // SEQ)


def test_document_ids_and_positions(rows, byte_tokenizer):
    lengths = [1 + len(byte_tokenizer.encode(text)) for text in TEXTS]
    document_of = np.repeat(np.arange(len(TEXTS)), lengths)
    for row in range(len(rows)):
        item = rows[row]
        for column in range(SEQ):
            at = row * SEQ + column
            wanted = document_of[at] if at < len(document_of) else PADDING
            assert item["document"][column] == wanted
            same = item["document"][:column] == item["document"][column]
            assert item["position"][column] == same.sum()
    assert rows[len(rows) - 1]["document"][-1] == PADDING


def test_a_stream_that_fills_its_rows_has_no_padding():
    row = PackedRows(Stream((np.array([0, 1, 2, 3, 4]),), (np.array([0]),), 0), 4)
    assert len(row) == 1
    np.testing.assert_array_equal(row[0]["token"], [0, 1, 2, 3])
    np.testing.assert_array_equal(row[0]["target"], [1, 2, 3, 4])
    np.testing.assert_array_equal(row[0]["document"], [0] * 4)
    np.testing.assert_array_equal(row[0]["position"], range(4))
    assert row[0]["is_target"].all()


def test_batches_are_a_pure_function_of_seed_and_step(rows):
    batches = [train_batches(rows, 2, seed=3) for _ in range(2)]
    for step in (5, 0, 12, 5):
        for name, array in batches[0][step].items():
            np.testing.assert_array_equal(array, batches[1][step][name])
            assert array.dtype == (bool if name == "is_target" else np.int32)
    other = train_batches(rows, 2, seed=4)
    assert any((other[step]["token"] != batches[0][step]["token"]).any() for step in range(4))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_row_once_an_epoch_in_an_order_of_its_own(rows, batch_size):
    epochs, num_rows = 3, len(rows)
    batches = train_batches(rows, batch_size, seed=1)
    seen = np.concatenate([batches[step]["token"] for step in range(-(-epochs * num_rows // batch_size))])
    known = sorted(rows[row]["token"].tolist() for row in range(num_rows))
    orders = [seen[epoch * num_rows : (epoch + 1) * num_rows].tolist() for epoch in range(epochs)]
    for order in orders:
        assert sorted(order) == known
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_any_number_of_processes_reads_the_same_batches(rows, num_processes):
    parts = np.split(np.arange(8), num_processes)
    of_process = [train_batches(rows, 8, seed=1, own=part.tolist()) for part in parts]
    whole = train_batches(rows, 8, seed=1)
    for step in (0, 3, 11):
        for name, array in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([batches[step][name] for batches in of_process]), array)


def test_a_mixture_goes_through_each_part_at_the_pace_of_its_weight(folder, tmp_path, byte_tokenizer):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"body": "x" * 40 + str(index)}) + "\n" for index in range(20)))
    spec = f"3 text {folder}; 1 jsonl '{other}' text_key=body"
    config = config_of("mixture", "", tmp_path / "cache", data__mixture=spec)
    dataset = prepare(config)
    x = byte_tokenizer.encode("x")[0]
    batches = train_batches(dataset.train, 4, seed=0)
    seen = [row.tolist() for step in range(240) for row in batches[step]["token"]]
    is_other = np.array([x in row for row in seen])
    assert is_other.mean() == 0.25
    assert (is_other.reshape(-1, 4).sum(1) == 1).all(), "in each batch, not only over all"
    # Each part goes through all of its rows before one of them comes again.
    alone = prepare(config_of("jsonl", other, tmp_path / "cache", data__text_key="body")).train
    known = Counter(tuple(alone[row]["token"].tolist()) for row in range(len(alone)))
    found = Counter(tuple(row) for row, of_it in zip(seen, is_other, strict=True) if of_it)
    assert sum(found.values()) > 3 * len(alone) and found.keys() == known.keys()
    assert all(3 * known[row] <= number <= 4 * known[row] for row, number in found.items())
    held_out = [x in dataset.eval[row]["token"] for row in range(len(dataset.eval))]
    assert np.mean(held_out) == pytest.approx(0.25, abs=0.07)
    assert [part["weight"] for part in dataset.manifest["parts"]] == [3, 1]
    tokens = [part["num_tokens"]["train"] for part in dataset.manifest["parts"]]
    assert dataset.manifest["num_tokens"]["train"] == sum(tokens)


@pytest.mark.parametrize("spec", ["text a", "0 text a", "1 text a b", "1 text a key=b", "inf text a", "1 text 'a"])
def test_a_mixture_that_cannot_be_read(spec, tmp_path):
    with pytest.raises(ConfigError, match="config.data.mixture: .*: a weight above 0, a source and its path"):
        config_of("mixture", "", tmp_path, data__mixture=f"1 text b; {spec}")


def test_a_mixture_of_what_cannot_be_mixed(tmp_path):
    with pytest.raises(ConfigError, match="config.data.mixture: source='hops': one of stdlib, text"):
        config_of("mixture", "", tmp_path, data__mixture="1 hops")
    with pytest.raises(ConfigError, match="config.data.source='text' with config.data.mixture='1 stdlib'"):
        config_of("text", "a", tmp_path, data__mixture="1 stdlib")
    with pytest.raises(ConfigError, match="config.data.path='': config.data.source='jsonl' needs a path"):
        config_of("mixture", "", tmp_path, data__mixture="1 stdlib; 1 jsonl")


def test_prefetch_goes_on_from_any_step(rows):
    batches = train_batches(rows, 2, seed=1)
    ahead = prefetch(batches, start=7)
    for step in range(7, 20):
        np.testing.assert_array_equal(next(ahead)["token"], batches[step]["token"])


def test_eval_batches_cover_the_rows_once_and_are_filled_with_padding(rows):
    batches = list(eval_batches(rows, 4, num_batches=0))
    assert {batch["token"].shape for batch in batches} == {(4, SEQ)}
    tokens = np.concatenate([batch["token"] for batch in batches])
    np.testing.assert_array_equal(tokens[: len(rows)], [rows[row]["token"] for row in range(len(rows))])
    filled = np.concatenate([batch["document"] for batch in batches])[len(rows) :]
    assert len(filled) > 0 and (filled == PADDING).all()
    assert not np.concatenate([batch["is_target"] for batch in batches])[len(rows) :].any()
    assert len(list(eval_batches(rows, 4, num_batches=2))) == 2
    assert len(list(eval_batches(rows, 4, num_batches=99))) == len(batches)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "text"
    (root / "sub").mkdir(parents=True)
    for index in range(12):
        (root / ("sub" if index % 2 else "") / f"{index:02}.txt").write_text(f"document {index}\n" * 5)
    # A copy must not be trained on while the original is held out.
    for index in range(12):
        (root / f"copy{index}.txt").write_text(f"document {index}\n" * 5)
    (root / ".hidden").write_text("not a document")
    return root


def test_splits_share_no_text_and_the_manifest_names_all(folder, tmp_path):
    dataset = prepare(config_of("text", folder, tmp_path / "cache"))
    splits = {"train": set(), "eval": set()}
    for entry in dataset.manifest["documents"]:
        text = (folder / entry["name"]).read_text()
        splits[entry["split"]].add(text)
        assert entry["sha256"] == Document("", text).sha256
    assert splits["train"] and splits["eval"] and not splits["train"] & splits["eval"]
    assert splits["train"] | splits["eval"] == {f"document {index}\n" * 5 for index in range(12)}
    assert sum(dataset.manifest["num_documents"].values()) == len(dataset.manifest["documents"]) == 24
    # As many tokens as bytes, and a separator for each document.
    assert sum(dataset.manifest["num_tokens"].values()) == sum(
        1 + path.stat().st_size for path in folder.rglob("[!.]*.txt")
    )


def test_no_token_of_the_held_out_split_reaches_training(folder, tmp_path):
    dataset = prepare(config_of("text", folder, tmp_path / "cache"))
    for split in ("train", "eval"):
        rows = getattr(dataset, split)
        ids = [token for row in range(len(rows)) for token in rows[row]["token"][rows[row]["is_target"]].tolist()]
        members = [entry for entry in dataset.manifest["documents"] if entry["split"] == split]
        joined = "".join((folder / entry["name"]).read_text() for entry in members)
        # The last token of the stream is a target only.
        assert dataset.tokenizer.decode(ids) == joined[:-1]


def test_prepared_data_is_used_again(folder, tmp_path):
    config = config_of("text", folder, tmp_path / "cache")
    first = prepare(config)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")}
    second = prepare(config)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")}
    assert len(first.train) == len(second.train)
    # Another length of rows needs no other tokens.
    assert len(prepare(config_of("text", folder, tmp_path / "cache", train__seq_len=2 * SEQ)).train) < len(first.train)
    assert files.keys() == set((tmp_path / "cache").rglob("*.*"))


@pytest.fixture
def begun(folder, tmp_path):
    """A run folder as the trainer leaves it, and its config."""
    config, run = config_of("text", folder, tmp_path / "cache"), RunFolder(tmp_path / "run")
    run.root.mkdir()
    dataset = prepare(config, run)
    assert list(run.root.iterdir()) == [], "preparing writes nothing to the run folder"
    dataset.tokenizer.save(run.tokenizer)
    run.write_manifest(dataset.manifest)
    config.save(run.config)
    return run, config


def test_a_changed_corpus_is_refused_by_an_old_run(begun, folder):
    run, config = begun
    prepare(config, run)
    (folder / "00.txt").write_text("something else")
    with pytest.raises(ConfigError, match="manifest.json"):
        prepare(config, run)


def test_an_old_run_keeps_its_tokenizer(begun):
    run, config = begun
    other = Tokenizer.train(["something else"], 300)
    other.save(run.tokenizer)
    with pytest.raises(ConfigError, match="tokenizer.json: not the tokenizer that the run was trained with"):
        prepare(config, run)
    manifest = json.loads(run.manifest.read_text())
    run.write_manifest({**manifest, "tokenizer": other.fingerprint()})
    assert prepare(config, run).tokenizer.fingerprint() == Tokenizer.load(run.tokenizer).fingerprint()
    run.config.unlink()
    assert prepare(config, run).tokenizer.vocab_size == BYTE_VOCAB_SIZE, "left over by a run that never began"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"5", b'{"sha256": 5}'])
def test_damaged_files_of_a_run_are_named(begun, content):
    run, config = begun
    for path in (run.manifest, run.tokenizer):
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=path.name):
            prepare(config, run)
        path.write_bytes(whole)


def test_damaged_shards_are_named(begun, tmp_path):
    run, config = begun
    for name in ("00000-train-tokens.npy", "00000-eval-starts.npy", "index.json"):
        path = next((tmp_path / "cache").rglob(name))
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[-9] ^= 64
        contents = (whole[:20], bytes(flipped)) if name.endswith("npy") else (whole[:20], b"[]", b"\xff")
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(ConfigError, match=f"{path.parent.name}: damaged"):
                prepare(config, run)
        path.unlink()
        if name.endswith("npy"):
            with pytest.raises(ConfigError, match=f"{path.parent.name}: damaged"):
                prepare(config, run)
        path.write_bytes(whole)
    prepare(config, run)


def test_a_cache_that_is_no_folder(folder, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match="config.data.cache_dir"):
        prepare(config_of("text", folder, tmp_path / "cache"), RunFolder(tmp_path / "run"))


def test_a_tokenizer_that_is_not_there(folder, tmp_path):
    with pytest.raises(ConfigError, match="config.data.tokenizer='~/none.json': no such file; bpe, byte, or"):
        prepare(config_of("text", folder, tmp_path, data__tokenizer="~/none.json"))


def test_what_takes_its_time_is_told(folder, tmp_path):
    told = []
    prepare(config_of("text", folder, tmp_path, data__tokenizer="bpe"), report=lambda *args: told.append(args))
    assert [what for what, done, _ in told if not done] == [
        "documents read for the tokenizer",
        f"documents of {folder} tokenised",
    ]
    assert all(done <= total for _, done, total in told)


def test_a_split_without_documents(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "only.txt").write_text("one document")
    with pytest.raises(ConfigError, match="eval_fraction=0.4 leaves . documents of"):
        prepare(config_of("text", tmp_path / "text", tmp_path / "cache"))
    (tmp_path / "text" / "only.txt").write_text("")
    with pytest.raises(ConfigError, match="config.data.path=.*no text"):
        prepare(config_of("text", tmp_path / "text", tmp_path / "cache"))


def test_less_text_than_a_batch_is_refused(folder, tmp_path):
    """Rows were repeated within a batch without a word."""
    enough = config_of("text", folder, tmp_path, train__batch_size=16)
    num_rows = len(prepare(enough, RunFolder(tmp_path)).train)
    prepare(config_of("text", folder, tmp_path, train__batch_size=num_rows), RunFolder(tmp_path))
    with pytest.raises(ConfigError, match=f"batch_size={num_rows + 1}: .* has text for {num_rows} rows"):
        prepare(config_of("text", folder, tmp_path, train__batch_size=num_rows + 1), RunFolder(tmp_path))
