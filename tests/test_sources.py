"""Each source on a small file in its own format."""

import hashlib
import importlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from configs import base, radial_small
from radialnet.config import Config
from radialnet.data import prepare
from radialnet.sections import ConfigError
from radialnet.sources import Document, evenly, fingerprint, open_held_out, open_source
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from tests.commands import lines_of, run
from tests.texts import SEQ, config_of
from tests.tiny import make_config

TEXTS = [f"text {index} é\n" * (1 + index % 5) for index in range(30)]


def write_jsonl(folder):
    lines = [json.dumps({"text": text, "n": 5}, ensure_ascii=index % 2 == 0) for index, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("\n".join(lines[:20]))
    (folder / "b.jsonl").write_text("\r\n".join(lines[20:]) + "\r\n")
    (folder / "c.txt").write_text("not one of them")


def write_text(folder):
    for index, text in enumerate(TEXTS):
        (folder / f"{index:02}.txt").write_text(text)


def write_parquet(folder):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS, "score": [1.0] * 30}).to_parquet(folder / "part.parquet")


def write_saved(folder):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)


def write_tfds(folder):
    """As TFDS writes it, without TensorFlow."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder  # Else it looks for that of a package.

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((index, {"text": text}) for index, text in enumerate(TEXTS))

    builder = Tiny(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def write_tokens(folder):
    """Rows of one length, and one row alone."""
    tokenizer = Tokenizer.train([], BYTE_VOCAB_SIZE)
    ids = [tokenizer.encode(text * 5)[:11] for text in TEXTS]
    np.save(folder / "a.npy", np.array(ids[:29], np.uint16))
    np.save(folder / "b.npy", np.array(ids[29], np.int64))


def write_lines_of_text(folder):
    (folder / "lines.txt").write_text("\n".join(text.replace("\n", " ") for text in TEXTS))
    return folder / "lines.txt"


FORMATS = {
    "text": write_text,
    "jsonl": write_jsonl,
    "hf": write_parquet,
    "hf, saved": write_saved,
    "tfds": write_tfds,
    "tokens": write_tokens,
}


@pytest.fixture(scope="module", params=FORMATS)
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return request.param.split(",")[0], FORMATS[request.param](folder) or folder


def test_a_source_has_its_documents_in_order_and_at_random(written, tmp_path):
    kind, path = written
    source = open_source(config_of(kind, path, tmp_path).data)
    assert len(source) == 30
    contents = [source[index].content for index in range(30)]
    if kind == "tokens":
        tokenizer = Tokenizer.train([], BYTE_VOCAB_SIZE)
        assert [tokenizer.decode(ids.tolist()).rstrip("�") for ids in contents] == [
            (text * 5).encode()[:11].decode("utf-8", "ignore") for text in TEXTS
        ]
    elif kind == "tfds":
        assert sorted(contents) == sorted(TEXTS), "it shuffles what it is given"
    else:
        assert contents == TEXTS
    # Another process has a copy.
    copy = pickle.loads(pickle.dumps(source))
    for index in (17, 3, 29):
        np.testing.assert_array_equal(copy[index].content, contents[index])
        assert copy[index].name == source[index].name
    assert fingerprint(copy) == fingerprint(source)


def test_rows_of_every_source_hold_its_tokens(written, tmp_path):
    kind, path = written
    dataset = prepare(config_of(kind, path, tmp_path))
    assert sum(dataset.manifest["num_documents"].values()) == 30
    found = []
    for split in (dataset.train, dataset.eval):
        rows = [split[row] for row in range(len(split))]
        token = np.concatenate([row["token"][row["document"] >= 0] for row in rows])
        # Where the last row is full, the last token of all is a target alone.
        token = np.append(token, rows[-1]["target"][-1:][rows[-1]["is_target"][-1:]])
        cuts = np.flatnonzero(token == dataset.tokenizer.separator_id)
        found += [part[1:].tolist() for part in np.split(token, cuts[1:])]
    source = open_source(config_of(kind, path, tmp_path).data)
    contents = [source[index].content for index in range(30)]
    wanted = contents if kind == "tokens" else dataset.tokenizer.encode_batch(contents)
    assert sorted(found) == sorted(ids.tolist() for ids in wanted)


def test_no_tensorflow_is_imported(tmp_path_factory):
    path = write_tfds(tmp_path_factory.mktemp("tfds"))
    code = f"""
import sys
from tests.texts import config_of
from radialnet.data import prepare
prepare(config_of("tfds", {str(path)!r}, {str(path / "cache")!r}))
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.getcwd())


def test_a_changed_document_is_another_source(tmp_path):
    write_text(tmp_path)
    # Names of files need not be text.
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("named in bytes")
    cfg = config_of("text", tmp_path, tmp_path).data
    before = fingerprint(open_source(cfg))
    assert before == fingerprint(open_source(cfg))
    (tmp_path / "13.txt").write_text(TEXTS[13].upper())
    assert fingerprint(open_source(cfg)) != before
    assert list(evenly(10, 4)) == [0, 2, 5, 7] and list(evenly(3, 4)) == [0, 1, 2]


def test_held_out_text_is_told_by_its_content():
    texts = [f"text {index}" for index in range(2000)]
    is_out = [Document(f"name {index}", text).is_held_out(0.1) for index, text in enumerate(texts)]
    assert is_out == [Document("other", text).is_held_out(0.1) for text in texts]
    assert 150 < sum(is_out) < 250
    digest = hashlib.sha256(texts[0].encode()).hexdigest()
    assert Document("", texts[0]).sha256 == digest and is_out[0] == (int(digest[:16], 16) / 2**64 < 0.1)


def test_lines_of_json_that_are_none(tmp_path):
    path = tmp_path / "documents.jsonl"
    good = "".join(json.dumps({"body": f"text {index}"}) + "\n" for index in range(30)).encode() + b"\n   \n"
    cfg = config_of("jsonl", path, tmp_path, data__text_key="body").data
    for bad in (
        b'{"other": 1}',
        b'{"body": 5}',
        b'{"body": "\xff"}',
        b"[" * 200_000,
        b'{"body": "\\ud800"}',
        b"[]",
        b"{",
    ):
        path.write_bytes(good + bad)
        for source in (open_source(cfg), open_held_out(path, "body")):
            contents = [source[index].content for index in range(len(source) - 1)]
            assert contents == [f"text {index}" for index in range(30)] + ["", ""], "an empty line is no document"
            with pytest.raises(ConfigError, match="documents.jsonl, line 33: .* a text under 'body' is needed"):
                source[len(source) - 1]


def test_lines_across_what_is_read_in_one_go(tmp_path, monkeypatch):
    write_jsonl(tmp_path)
    wanted = [document.content for document in open_source(config_of("jsonl", tmp_path, tmp_path).data)]
    for size in (1, 7, 64):
        monkeypatch.setattr("radialnet.sources._CHUNK", size)
        source = open_source(config_of("jsonl", tmp_path, tmp_path).data)
        assert [source[index].content for index in range(len(source))] == wanted == TEXTS


@pytest.mark.parametrize("kind", ["text", "jsonl", "tokens"])
def test_a_path_that_does_not_exist(kind, tmp_path):
    with pytest.raises(ConfigError, match="config.data.path=.*nowhere"):
        open_source(config_of(kind, tmp_path / "nowhere", tmp_path).data)


@pytest.mark.parametrize("kind", ["hf", "tfds"])
def test_a_data_set_that_is_not_there(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", "no_such_data_set"):
        with pytest.raises(ConfigError, match=f"config.data.path={str(path)!r}.*: no data set of"):
            open_source(config_of(kind, path, tmp_path).data)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_single_file_is_a_data_set_whatever_its_split_is_called(tmp_path, split):
    write_parquet(tmp_path)
    write_jsonl(tmp_path)
    lines = write_lines_of_text(tmp_path)
    for path, wanted in (
        (tmp_path / "part.parquet", TEXTS),
        (tmp_path / "a.jsonl", TEXTS[:20]),
        (lines, [text.replace("\n", " ") for text in TEXTS]),
    ):
        source = open_source(config_of("hf", path, tmp_path, data__split=split).data)
        assert [source[index].content for index in range(len(source))] == wanted


def test_a_path_that_nobody_reads(tmp_path):
    """`--config.data.path=my_texts` alone trained on the standard library."""
    with pytest.raises(ConfigError, match="config.data.path='my_texts': config.data.source='stdlib' reads no path"):
        make_config(data__path="my_texts")


def test_a_column_or_split_that_is_not_there(tmp_path):
    write_parquet(tmp_path)
    source = open_source(config_of("hf", tmp_path, tmp_path, data__text_key="body").data)
    with pytest.raises(ConfigError, match="config.data.text_key='body': .* no text under it; text, score are there"):
        source[0]
    source = open_source(config_of("hf", tmp_path, tmp_path, data__text_key="score").data)
    with pytest.raises(ConfigError, match="config.data.text_key='score': .*; it holds a float"):
        source[0]
    with pytest.raises(ConfigError, match="config.data.split='test'"):
        open_source(config_of("hf", tmp_path, tmp_path, data__split="test").data)


def test_pictures_beside_a_text_are_not_decoded(tmp_path):
    import datasets

    rows = {"text": TEXTS[:3], "picture": [{"bytes": b"no picture", "path": None}] * 3}
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    source = open_source(config_of("hf", tmp_path / "saved", tmp_path).data)
    assert [source[index].content for index in range(3)] == TEXTS[:3]


def test_tokens_that_are_none(tmp_path):
    cfg = config_of("tokens", tmp_path, tmp_path / "cache").data
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    with pytest.raises(ConfigError, match=r"a.npy: float64\[3, 4\]; rows of whole numbers"):
        open_source(cfg)
    (tmp_path / "a.npy").write_bytes(b"else")
    with pytest.raises(ConfigError, match="a.npy: not an array of NumPy"):
        open_source(cfg)
    np.savez(tmp_path / "a", a=np.zeros((3, 4), int))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ConfigError, match="a.npy: several arrays of NumPy"):
        open_source(cfg)
    np.save(tmp_path / "a.npy", np.zeros((3, 0), int))
    with pytest.raises(ConfigError, match=r"a.npy: int64\[3, 0\]; rows of whole numbers"):
        open_source(cfg)
    np.save(tmp_path / "a.npy", np.full((30, 9), 257))
    with pytest.raises(ConfigError, match="a.npy:0: ids of 257 to 257, but the tokenizer has 0 to 256"):
        prepare(config_of("tokens", tmp_path, tmp_path / "cache"))
    with pytest.raises(ConfigError, match="config.data.tokenizer='bpe': the one that the rows of"):
        config_of("tokens", tmp_path, tmp_path, data__tokenizer="bpe")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_pipe_is_no_file(tmp_path, kind):
    """It was waited for, for good."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path, tmp_path / "pipe.jsonl"):
        with pytest.raises(ConfigError, match="pipe.jsonl: not a regular file"):
            open_source(config_of(kind, path, tmp_path).data)


def test_more_text_than_there_is_memory_is_refused(tmp_path):
    """A file with holes: its size is what counts."""
    with (tmp_path / "enormous.txt").open("wb") as file:
        file.truncate(2**43)
    for source in (open_source(config_of("text", tmp_path, tmp_path).data), open_held_out(tmp_path, "")):
        with pytest.raises(ConfigError, match=r"to read its 8796\.1 GB of text takes 17592\.2 GB of memory"):
            source[0]


def test_line_ends_are_kept(tmp_path):
    (tmp_path / "windows.txt").write_bytes(b"one\r\ntwo\rthree\n")
    for source in (open_source(config_of("text", tmp_path, tmp_path).data), open_held_out(tmp_path, "")):
        assert source[0].content == "one\r\ntwo\rthree\n"


def test_binary_files_are_named(tmp_path):
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="image.bin: not UTF-8 text"):
        open_source(config_of("text", tmp_path, tmp_path).data)[0]


def test_standard_library():
    source = open_source(make_config().data)
    documents = [source[index] for index in range(len(source))]
    names = [document.name for document in documents]
    assert "argparse.py" in names and len(names) > 300
    assert not [name for name in names if "site-packages" in name or "/test/" in name or name.startswith("test/")]
    held_out = sum(len(document.content) for document in documents if document.is_held_out(0.05))
    assert 0.01 < held_out / sum(len(document.content) for document in documents) < 0.12


def test_a_stream_is_read_as_it_comes(tmp_path):
    import datasets

    texts = [f"text {index} " * 3 for index in range(700)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "part.parquet")
    config = config_of("hf", tmp_path, tmp_path / "cache", data__streaming=True, train__batch_size=4)
    dataset = prepare(config)
    assert dataset.manifest["num_documents"]["eval"] == 512
    batches = dataset.train.batches(4, seed=0)
    rows = [row for _ in range(400) for row in next(batches)["token"].tolist()]
    text = dataset.tokenizer.decode([token for row in rows for token in row])
    held_out = np.concatenate([dataset.eval[row]["token"] for row in range(len(dataset.eval))])
    held_out = dataset.tokenizer.decode(held_out.tolist())
    assert "text 511 " in held_out and "text 512 " not in held_out
    assert "text 699 " in text and "text 511 " not in text
    assert {row["token"].shape for row in [next(batches)]} == {(4, SEQ)}
    first = [next(dataset.train.batches(4, seed))["token"].tolist() for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    with pytest.raises(ConfigError, match="config.data.streaming=True is for config.data.source='hf'"):
        config_of("text", tmp_path, tmp_path, data__streaming=True)


def as_fineweb_edu(folder):
    import datasets

    rows = {
        "text": TEXTS,
        "id": ["<urn:1>"] * 30,
        "url": ["a"] * 30,
        "language_score": [0.9] * 30,
        "int_score": [3] * 30,
    }
    datasets.Dataset.from_dict(rows).to_parquet(folder / "000_00000.parquet")


def as_wikitext(folder):
    """Lines, most of them headings or empty."""
    import datasets

    lines = ["", " = Title = \n", "", *TEXTS, ""]
    datasets.Dataset.from_dict({"text": lines}).to_parquet(folder / "train-00000-of-00002.parquet")


@pytest.mark.parametrize(
    "name, write, num_documents",
    [
        ("fineweb_edu", as_fineweb_edu, 30),
        ("openwebtext", write_parquet, 30),
        ("wikitext103", as_wikitext, 31),
        ("lm1b", write_tfds, 30),
    ],
)
def test_the_ready_entries_read_what_is_there_in_their_format(name, write, num_documents, tmp_path):
    fields = importlib.import_module(f"configs.{name}").get_config()
    wanted = fields.data.to_dict()
    (tmp_path / "there").mkdir()
    path = write(tmp_path / "there") or tmp_path / "there"
    # What is local has no subsets, and few documents.
    fields.data.update(path=str(path), subset="", cache_dir=str(tmp_path / "cache"), vocab_size=300, eval_fraction=0.3)
    fields.train.update(batch_size=2, seq_len=SEQ)
    config = Config.from_dict(fields)
    assert config.model == Config.from_dict(radial_small.get_config()).model
    changed = {key for key, value in base.get_config().data.to_dict().items() if wanted[key] != value}
    assert changed <= {"source", "path", "subset", "eval_fraction", "vocab_size"}
    dataset = prepare(config)
    assert sum(dataset.manifest["num_documents"].values()) == num_documents
    assert 257 < dataset.tokenizer.vocab_size <= 300 and len(dataset.train) > 2


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Trains two steps on a source by the command; one cache for all, so that the program is compiled once."""
    cache = tmp_path_factory.mktemp("cache")

    def train(workdir, kind, path, num_steps=2, **more):
        fields = {"source": kind, "path": path, "tokenizer": "byte", "cache_dir": cache, "eval_fraction": 0.3, **more}
        flags = [f"--config.data.{name}={value}" for name, value in fields.items()]
        flags += ["--config.train.seq_len=16", f"--config.train.num_steps={num_steps}", "--config.log.sample_tokens=0"]
        return run(
            "train.py", "--config=configs/smoke.py", f"--workdir={workdir}", *flags, "--config.log.every_steps=1"
        )

    return train


@pytest.mark.slow
def test_every_source_trains(written, tiny_run, tmp_path):
    kind, path = written
    stdout, stderr = tiny_run(tmp_path / "run", kind, path)
    assert f"data: {kind}, " in stdout and "error" not in stderr
    assert [line["step"] for line in lines_of(tmp_path / "run") if line["split"] == "train"] == [1, 2]


@pytest.mark.slow
def test_a_mixture_and_a_stream_train_and_go_on(tiny_run, tmp_path):
    import datasets

    (tmp_path / "text").mkdir()
    write_text(tmp_path / "text")
    texts = [f"text {index} " * 9 for index in range(700)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "many.parquet")
    spec = f"0.7 hf {tmp_path / 'many.parquet'}; 0.3 text {tmp_path / 'text'}"
    stdout, _ = tiny_run(tmp_path / "mixed", "mixture", "", mixture=spec)
    assert "data: mixture, " in stdout
    stream = {"kind": "hf", "path": tmp_path / "many.parquet", "streaming": True}
    tiny_run(tmp_path / "stream", **stream)
    _, stderr = tiny_run(tmp_path / "stream", **stream, num_steps=4)
    assert "config.data.streaming=True: the data begins anew" in stderr
    assert [line["step"] for line in lines_of(tmp_path / "stream") if line["split"] == "train"] == [1, 2, 3, 4]
