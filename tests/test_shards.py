import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import filelock
import numpy as np
import psutil
import pytest

from radialnet import shards
from radialnet.data import prepare
from radialnet.sections import ConfigError
from radialnet.shards import PackedRows, Stream, open_streams, write_shards
from radialnet.sources import Document, JsonLines
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer
from tests.commands import ROOT, environment
from tests.texts import config_of

NUM = 90


@pytest.fixture(scope="module")
def byte_tokenizer():
    return Tokenizer.train([], BYTE_VOCAB_SIZE)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    # Every seventh is empty.
    texts = [f"text {index} " * (index % 7) for index in range(NUM)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return JsonLines(path.parent, [path], "text")


@pytest.fixture
def small(monkeypatch):
    """Shards of ten documents."""
    monkeypatch.setattr(shards, "_SHARD", 10)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def test_shards_hold_each_document_once_in_its_split(source, byte_tokenizer, tmp_path, small):
    reports = []
    index = write_shards(tmp_path / "a", source, byte_tokenizer, 0.3, report=lambda *told: reports.append(told))
    assert reports == [(10 * number, NUM) for number in range(10)]
    streams = open_streams(tmp_path / "a", index, byte_tokenizer.separator_id)
    documents = [source[number] for number in range(NUM)]
    for split, stream in streams.items():
        members = [
            document for document in documents if document.content and document.is_held_out(0.3) == (split == "eval")
        ]
        assert index["num_documents"][split] == stream.num_documents == len(members) > 5
        assert index["num_tokens"][split] == len(stream)
        # As in one piece.
        rows, whole = PackedRows(stream, 11), PackedRows(Stream.of(members, byte_tokenizer), 11)
        assert len(rows) == len(whole) > 5
        for row in range(len(rows)):
            for name, array in rows[row].items():
                np.testing.assert_array_equal(array, whole[row][name])
        assert stream.tokens[0].dtype == np.uint16
    assert [entry["name"] for entry in index["documents"]] != [] and len(index["files"]) == 4 * 9


class Tells:
    """A source that tells which processes read it."""

    def __init__(self, source, path):
        self._source, self._path = source, path

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        with self._path.open("a") as file:
            file.write(f"{os.getpid()} ")
        return self._source[index]


def test_processes_side_by_side_write_the_same(source, byte_tokenizer, tmp_path, small):
    one = write_shards(tmp_path / "one", source, byte_tokenizer, 0.3)
    told = Tells(source, tmp_path / "told")
    three = write_shards(tmp_path / "three", told, byte_tokenizer, 0.3, num_processes=3)
    processes = set((tmp_path / "told").read_text().split())
    assert processes and str(os.getpid()) not in processes
    assert one == three
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert len(list((tmp_path / "one").glob("*.npy"))) == 4 * 9


class Breaks:
    """A source that can't be read from a document on."""

    def __init__(self, source, at):
        self._source, self.at = source, at

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index >= self.at:
            raise ConfigError(f"document {index}: gone")
        return self._source[index]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_was_done_before_an_error_is_not_done_again(source, byte_tokenizer, tmp_path, small, num_processes):
    broken = Breaks(source, 35)
    with pytest.raises(ConfigError, match="document .*: gone"):
        write_shards(tmp_path / "a", broken, byte_tokenizer, 0.3, num_processes)
    assert not (tmp_path / "a" / "index.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("0*")}
    assert {path.name[:5] for path in before} >= {"00000"} and "00003.json" not in {path.name for path in before}
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".0")], "nothing half-written"
    reports = []
    (tmp_path / "a" / ".00004.json.killed").write_text("half")
    again = write_shards(tmp_path / "a", source, byte_tokenizer, 0.3, report=lambda *told: reports.append(told))
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".0")]
    assert reports[0][0] == 10 * sum(path.suffix == ".json" for path in before) > 0
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("0*")}.items()
    assert again == write_shards(tmp_path / "b", source, byte_tokenizer, 0.3)


class Unreadable(Breaks):
    def __getitem__(self, index):
        raise OSError(5, "Input/output error", "some.txt")


def test_what_can_not_be_read_is_not_what_can_not_be_written(source, byte_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="config.data: a document can't be read .*error: 'some.txt'"):
        write_shards(tmp_path / "a", Unreadable(source, 0), byte_tokenizer, 0.3)


def test_one_that_waits_for_another_says_so(source, byte_tokenizer, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    with ThreadPoolExecutor(1) as thread:
        with filelock.FileLock(tmp_path / "a" / ".lock"):
            waiting = thread.submit(write_shards, tmp_path / "a", source, byte_tokenizer, 0.3)
            said = ""
            while not said:
                time.sleep(0.01)
                said = capsys.readouterr().err
            assert not waiting.done() and not (tmp_path / "a" / "index.json").exists()
        assert waiting.result(60) == write_shards(tmp_path / "b", source, byte_tokenizer, 0.3)
    assert said.startswith(f"warning: {tmp_path}/a: another process tokenises these documents")


class Dies:
    """A source that no other process can read."""

    def __init__(self, source):
        self._source, self._owner = source, os.getpid()

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if os.getpid() != self._owner:
            os._exit(9)
        return self._source[index]


def test_a_process_that_is_ended_is_told_of(source, byte_tokenizer, tmp_path, small):
    with pytest.raises(ConfigError, match="a: a process that tokenised was ended, perhaps for want of memory"):
        write_shards(tmp_path / "a", Dies(source), byte_tokenizer, 0.3, num_processes=2)


def test_a_tokenizer_goes_to_another_process_as_it_is(source, byte_tokenizer):
    """A copy by the library splits documents that quote the separator."""
    import pickle

    copy = pickle.loads(pickle.dumps(byte_tokenizer))
    quoted = "a<|document|>b"
    assert copy.encode(quoted) == byte_tokenizer.encode(quoted)
    assert byte_tokenizer.separator_id not in copy.encode(quoted)


def test_a_stream_in_memory(byte_tokenizer):
    stream = Stream.of([Document("a", "xy"), Document("b", "z")], byte_tokenizer)
    assert stream.num_documents == 2 and len(stream) == 5
    none = Stream.of([], byte_tokenizer)
    assert len(none) == none.num_documents == 0


@pytest.mark.slow
def test_prepare_goes_on_after_a_kill(tmp_path):
    """By the command, with two processes; and training finds what it made."""
    lines = tmp_path / "lines.jsonl"
    text = "words of a line " * 8
    lines.write_text("".join(json.dumps({"text": f"{index} {text}"}) + "\n" for index in range(5 * 4096)))
    flags = ["--config=configs/smoke.py", "--config.data.source=jsonl", f"--config.data.path={lines}"]
    flags += ["--config.data.tokenizer=byte"]

    def command(cache):
        return [
            sys.executable,
            "-m",
            "radialnet.prepare",
            *flags,
            f"--config.data.cache_dir={cache}",
            "--num_processes=2",
        ]

    killed = subprocess.Popen(command(tmp_path / "a"), cwd=ROOT, env=environment())
    end = time.monotonic() + 120
    while not list((tmp_path / "a").glob("tokens-*/0*.json")):
        assert time.monotonic() < end and killed.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.wait()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert len(gone) >= 2 and not alive, "nobody goes on without the lock"
    (folder,) = (tmp_path / "a").glob("tokens-*")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("0*.json")}
    assert 0 < len(before) < 5 and not (folder / "index.json").exists()
    outputs = []
    for cache in ("a", "b"):
        done = subprocess.run(
            command(tmp_path / cache), cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
        )
        outputs.append(json.loads(done.stdout.splitlines()[-1]))
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("0*.json")}.items()
    known = [{name: value for name, value in output.items() if name != "seconds"} for output in outputs]
    assert known[0] == known[1]
    assert sum(known[0]["num_documents"].values()) == 5 * 4096
    (other,) = (tmp_path / "b").glob("tokens-*")
    assert content(folder).keys() >= content(other).keys()
    assert all(content(folder)[name] == whole for name, whole in content(other).items())
    fields = {"data__eval_fraction": 0.05, "data__tokenizer": "byte"}
    dataset = prepare(config_of("jsonl", lines, tmp_path / "a", **fields))
    assert dataset.manifest["num_tokens"] == known[0]["num_tokens"] and "documents" in dataset.manifest
    assert len(list((tmp_path / "a").glob("tokens-*"))) == 1
