import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from radialnet.corpus import Document, load_corpus, read_held_out
from radialnet.data import PADDING, PackedRows, eval_batches, pack, prefetch, prepare, train_batches, write_rows
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.tokenizer import BYTE_VOCAB_SIZE, PIECE, SEPARATOR, Tokenizer, pieces
from tests.tiny import make_config

SEQ = 7
TEXTS = ["def f(x):\n    return x + 1\n", "é ünïcode ☃", "a", SEPARATOR + " quoted", "lines\n" * 9]


@pytest.fixture(scope="module")
def byte_tokenizer():
    return Tokenizer.train([], BYTE_VOCAB_SIZE)


@pytest.fixture(scope="module")
def rows(tmp_path_factory, byte_tokenizer):
    folder = tmp_path_factory.mktemp("rows") / "train"
    documents = tuple(Document(str(i), text) for i, text in enumerate(TEXTS))
    write_rows(folder, documents, byte_tokenizer, SEQ)
    return PackedRows(folder)


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


def test_pack_of_a_stream_that_fills_its_rows_has_no_padding():
    tokens, documents, positions = pack([[1, 2, 3, 4]], separator=0, seq_len=4)
    np.testing.assert_array_equal(tokens, [[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(documents, [[0] * 5])
    np.testing.assert_array_equal(positions, [range(5)])


def test_batches_are_a_pure_function_of_seed_and_step(rows):
    batches = [train_batches(rows, 2, seed=3) for _ in range(2)]
    for step in (5, 0, 12, 5):
        for name, array in batches[0][step].items():
            np.testing.assert_array_equal(array, batches[1][step][name])
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


def config_of(source, path, cache, **overrides):
    fields = {"data__eval_fraction": 0.4, "data__tokenizer": "byte", "train__seq_len": SEQ, **overrides}
    return make_config(data__source=source, data__path=str(path), data__cache_dir=str(cache), **fields)


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
    corpus = load_corpus(config_of("text", folder, tmp_path).data)
    train, held_out = ({document.text for document in split} for split in (corpus.train, corpus.eval))
    assert not train & held_out
    assert train | held_out == {f"document {index}\n" * 5 for index in range(12)}
    manifest = corpus.manifest()
    assert len(manifest["documents"]) == 24
    for entry in manifest["documents"]:
        content = (folder / entry["name"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)
    assert manifest == load_corpus(config_of("text", folder, tmp_path).data).manifest()


def test_no_token_of_the_held_out_split_reaches_training(folder, tmp_path):
    config = config_of("text", folder, tmp_path / "cache")
    dataset = prepare(config, RunFolder(tmp_path))
    corpus = load_corpus(config.data)

    def text_of(rows):
        ids = [token for row in range(len(rows)) for token in rows[row]["token"][rows[row]["is_target"]].tolist()]
        return dataset.tokenizer.decode(ids)

    for split in ("train", "eval"):
        joined = "".join(document.text for document in getattr(corpus, split))
        # The last token of the stream is a target only.
        assert text_of(getattr(dataset, split)) == joined[:-1]


def test_prepared_data_is_used_again(folder, tmp_path):
    config = config_of("text", folder, tmp_path / "cache")
    first = prepare(config, RunFolder(tmp_path))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    second = prepare(config, RunFolder(tmp_path))
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert isinstance(first.train.tokens, np.memmap)


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


def test_damaged_rows_are_named(begun, tmp_path):
    run, config = begun
    for file in ("tokens.npy", "documents.npy", "positions.npy", "checksums.json"):
        path = next((tmp_path / "cache").rglob(file))
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[-9] ^= 64
        for content in (whole[:20], bytes(flipped)):
            path.write_bytes(content)
            with pytest.raises(ConfigError, match=f"{path.parent.name}: damaged"):
                prepare(config, run)
        path.unlink()
        with pytest.raises(ConfigError, match=f"{path.parent.name}: damaged"):
            prepare(config, run)
        path.write_bytes(whole)
    prepare(config, run)


def test_a_cache_that_is_no_folder(folder, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match="config.data.cache_dir"):
        prepare(config_of("text", folder, tmp_path / "cache"), RunFolder(tmp_path / "run"))


def test_jsonl(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {index}", "n": index}) + "\n" for index in range(30)))
    corpus = load_corpus(config_of("jsonl", path, tmp_path, data__text_key="body").data)
    assert {document.text for document in corpus.train + corpus.eval} == {f"text {index}" for index in range(30)}
    assert len(read_held_out(path, "body")) == 30
    good = path.read_bytes() + b"\n"
    path.write_bytes(good)
    assert len(read_held_out(path, "body")) == 30, "an empty line is no document"
    for bad in (
        b'{"other": 1}',
        b'{"body": 5}',
        b'{"body": "\xff"}',
        b"[" * 200_000,
        b'{"body": "\\ud800"}',
        b"[]",
        b"{",
    ):
        path.write_bytes(good + bad + b"\n")
        with pytest.raises(ConfigError, match="line 32.*'body'"):
            load_corpus(config_of("jsonl", path, tmp_path, data__text_key="body").data)


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_path_that_does_not_exist(source, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        load_corpus(config_of(source, tmp_path / "nowhere", tmp_path).data)


def test_a_folder_without_text(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="config.data.path=.*no text"):
        load_corpus(config_of("text", tmp_path, tmp_path).data)


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_pipe_is_no_file(tmp_path, source):
    """It was waited for, for good."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path, tmp_path / "pipe.jsonl"):
        with pytest.raises(ConfigError, match="pipe.jsonl: not a regular file"):
            load_corpus(config_of(source, path, tmp_path).data)


def test_a_split_without_documents(tmp_path):
    (tmp_path / "only.txt").write_text("one document")
    with pytest.raises(ConfigError, match="eval_fraction=0.4"):
        load_corpus(config_of("text", tmp_path, tmp_path).data)


def test_less_text_than_a_batch_is_refused(folder, tmp_path):
    """Rows were repeated within a batch without a word."""
    enough = config_of("text", folder, tmp_path, train__batch_size=16)
    num_rows = len(prepare(enough, RunFolder(tmp_path)).train)
    prepare(config_of("text", folder, tmp_path, train__batch_size=num_rows), RunFolder(tmp_path))
    with pytest.raises(ConfigError, match=f"batch_size={num_rows + 1}: .* has text for {num_rows} rows"):
        prepare(config_of("text", folder, tmp_path, train__batch_size=num_rows + 1), RunFolder(tmp_path))


def test_more_text_than_there_is_memory_is_refused(folder, tmp_path, monkeypatch):
    """Files with holes: their size is what counts."""
    with (folder / "enormous.txt").open("wb") as file:
        file.truncate(2**43)
    for read in (lambda: load_corpus(config_of("text", folder, tmp_path).data), lambda: read_held_out(folder, "")):
        with pytest.raises(ConfigError, match=r"to read its 8796\.1 GB of text takes 17592\.2 GB of memory"):
            read()
    (folder / "enormous.txt").rename(folder / "enormous.jsonl")
    with pytest.raises(ConfigError, match="enormous.jsonl: to read its"):
        load_corpus(config_of("jsonl", folder / "enormous.jsonl", tmp_path).data)
    (folder / "enormous.jsonl").unlink()
    monkeypatch.setattr("radialnet.data._PACKING", 2**50)
    with pytest.raises(ConfigError, match="cache: to pack 0.0 G tokens takes"):
        prepare(config_of("text", folder, tmp_path / "cache"), RunFolder(tmp_path))
    assert not list((tmp_path / "cache").glob("rows*"))


def test_binary_files_are_named(tmp_path):
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="image.bin"):
        load_corpus(config_of("text", tmp_path, tmp_path).data)


def test_failed_packing_leaves_nothing_behind(tmp_path, byte_tokenizer):
    with pytest.raises(ValueError):
        write_rows(tmp_path / "rows", (), byte_tokenizer, SEQ)
    assert list(tmp_path.iterdir()) == []


def test_standard_library():
    corpus = load_corpus(make_config().data)
    names = [document.name for document in corpus.train + corpus.eval]
    assert "argparse.py" in names and len(names) > 300
    assert not [name for name in names if "site-packages" in name or "/test/" in name or name.startswith("test/")]
    held_out = sum(len(document.text) for document in corpus.eval)
    assert 0.01 < held_out / sum(len(document.text) for document in corpus.train) < 0.12
