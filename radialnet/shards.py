"""Tokenised documents on disk, in shards that parallel processes make; and rows packed of them.

A split is one stream: every document is the separator and its tokens, one after the other. Row r holds the tokens
r·S … (r+1)·S of it; the last one is only a target and the first of the next row, so that every token is read once
as an input and predicted once. Attention never crosses from one document of a row to another (`document_BS`).

A shard is a fixed part of the documents of a source, so that it does not depend on who makes it. Its arrays are of each
split: the stream's tokens, and where its documents start. `N.json`, with their checksums, is written when they are
there, and `index.json` when all shards are.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import filelock
import numpy as np

from radialnet.cli import warn
from radialnet.files import sha256_of, write_whole
from radialnet.sections import ConfigError
from radialnet.sources import Document, Source
from radialnet.tokenizer import Tokenizer

SPLITS = ("train", "eval")
PADDING = -1  # Document id of what fills up the last row.
# Documents of a shard, but for sources that would have more than so many shards.
_SHARD, _MOST_SHARDS = 4096, 2048
# A manifest names documents up to that many.
_NAMED = 10_000
# Bytes of shards whose checksums are looked at whenever they are opened; of more, their sizes.
_CHECKED = 2**32

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stream:
    """The tokens of a split: arrays of tokens, one after the other, and of where in each its documents start."""

    tokens: tuple[np.ndarray, ...]
    starts: tuple[np.ndarray, ...]
    separator_id: int

    def __len__(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def num_documents(self) -> int:
        return sum(map(len, self.starts))

    @classmethod
    def of(cls, documents: Iterable[Document], tokenizer: Tokenizer) -> "Stream":
        """In memory."""
        tokens, starts = _stream(list(documents), tokenizer)
        return cls((tokens,), (starts,), tokenizer.separator_id)


def _stream(documents: list[Document], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of documents, each after the separator, and where they start."""
    contents = [document.content for document in documents]
    if contents and isinstance(contents[0], str):
        contents = tokenizer.encode_batch(contents)
    for document, ids in zip(documents, contents, strict=True):
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            told = f"ids of {ids.min()} to {ids.max()}, but the tokenizer has 0 to {tokenizer.vocab_size - 1}"
            raise ConfigError(f"{document.name}: {told}")
    ends = np.cumsum([1 + len(ids) for ids in contents], dtype=np.int64)
    # Half of the bytes for the usual vocabulary.
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    tokens = np.full(ends[-1] if len(ends) else 0, tokenizer.separator_id, dtype)
    for ids, end in zip(contents, ends, strict=True):
        tokens[end - len(ids) : end] = ids
    return tokens, np.append(0, ends[:-1])[: len(ends)]


class PackedRows:
    """Rows of S+1 tokens of a stream: a random-access source for Grain."""

    def __init__(self, stream: Stream, seq_len: int):
        self._stream, self._seq_len = stream, seq_len
        self._ends = np.cumsum([len(tokens) for tokens in stream.tokens])
        self._first_document = np.cumsum([0, *(len(starts) for starts in stream.starts)])

    def __len__(self) -> int:
        return max(1, -(-(int(self._ends[-1]) - 1) // self._seq_len))

    def __getitem__(self, row: int) -> Batch:
        begin, size = row * self._seq_len, self._seq_len + 1
        token = np.full(size, self._stream.separator_id, np.int32)
        document = np.full(size, PADDING, np.int32)
        column = np.arange(size, dtype=np.int32)
        position = column.copy()
        shard, at = int(np.searchsorted(self._ends, begin, side="right")), 0
        while at < size and shard < len(self._ends):
            tokens, starts = self._stream.tokens[shard], self._stream.starts[shard]
            first = begin + at - (int(self._ends[shard]) - len(tokens))
            last = min(first + size - at, len(tokens))
            token[at : at + last - first] = tokens[first:last]
            # Documents that start after the first token; a row's first one may have started before.
            low, high = np.searchsorted(starts, (first + 1, last))
            cuts = np.concatenate([[first], starts[low:high], [last]]) - first + at
            number = self._first_document[shard] + low - 1
            for cut, end in itertools.pairwise(cuts.tolist()):
                document[cut:end] = number
                position[cut:end] = column[: end - cut]
                number += 1
            at, shard = at + last - first, shard + 1
        position[at:] = column[: size - at]
        return {
            "token": token[:-1],
            "target": token[1:],
            "document": document[:-1],
            "position": position[:-1],
            # A target is real where it is not padding; its input is real then, too.
            "is_target": document[1:] != PADDING,
        }


def write_shards(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    eval_fraction: float,
    num_processes: int = 1,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Tokenise the documents of a source and hold some of them out; go on with what is there already. Another process
    that does the same is waited for.

    Args:
        report: called with the numbers of documents done, and of all.

    Returns:
        The index: `sha256` of all documents and their splits, `num_documents` and `num_tokens` of each split,
        `documents` if they are not too many, and the `shards`.

    Raises:
        ConfigError: a document can't be read, or the shards can't be written.
    """
    path = folder / "index.json"
    try:
        # Before the lock, for what is there may be of somebody who lets others read alone.
        if path.exists():
            return read_index(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except filelock.Timeout:
                warn(f"{folder}: another process tokenises these documents; this one waits for it")
                stack.enter_context(lock.acquire())
            if path.exists():
                return read_index(folder)
            shards = _all_shards(folder, source, tokenizer, eval_fraction, num_processes, report)
            index = _index_of(shards)
            write_whole(path, json.dumps(index) + "\n")
            return index
    except OSError as error:
        raise ConfigError(f"{folder.parent}: the tokenised documents can't be written ({error})") from None
    except BrokenProcessPool:
        told = "a process that tokenised was ended, perhaps for want of memory; fewer at a time need less"
        raise ConfigError(f"{folder}: {told}") from None


def _all_shards(folder, source, tokenizer, eval_fraction, num_processes, report) -> list[dict]:
    # What a kill left half written.
    for partial in folder.glob(".0*"):
        partial.unlink()
    size = max(_SHARD, -(-len(source) // _MOST_SHARDS))
    parts = [range(begin, min(begin + size, len(source))) for begin in range(0, len(source), size)]
    done = [_read_shard(folder, number) for number in range(len(parts))]
    todo = [number for number, found in enumerate(done) if found is None]
    num_done = sum(len(part) for part, found in zip(parts, done, strict=True) if found)
    report(num_done, len(source))
    work = _Work(folder, source, tokenizer, eval_fraction, len(source) <= _NAMED)
    with contextlib.ExitStack() as stack:
        if min(num_processes, len(todo)) > 1:
            # Not a copy of this process, which has threads. Each of them tokenises with one thread.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(
                concurrent.futures.ProcessPoolExecutor(min(num_processes, len(todo)), context, _begin, (work,))
            )
            # What hasn't begun is not begun after an error.
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            futures = {pool.submit(_shard_of_process, number, parts[number]): number for number in todo}
            finished = ((futures[one], one.result()) for one in concurrent.futures.as_completed(futures))
        else:
            finished = ((number, work.write(number, parts[number])) for number in todo)
        for number, found in finished:
            done[number] = found
            num_done += len(parts[number])
            report(num_done, len(source))
    return done


@dataclasses.dataclass(frozen=True)
class _Work:
    """What each process has to know."""

    folder: Path
    source: Source
    tokenizer: Tokenizer
    eval_fraction: float
    names_documents: bool

    def write(self, number: int, part: range) -> dict:
        try:
            documents = [document for document in map(self.source.__getitem__, part) if len(document.content)]
        except OSError as error:
            raise ConfigError(f"config.data: a document can't be read ({error})") from None
        held_out = [document.is_held_out(self.eval_fraction) for document in documents]
        digest, found = 0, {"files": {}, "num_documents": {}, "num_tokens": {}, "documents": []}
        for split, wanted in zip(SPLITS, (False, True), strict=True):
            members = [document for document, is_out in zip(documents, held_out, strict=True) if is_out == wanted]
            tokens, starts = _stream(members, self.tokenizer)
            for what, array in (("tokens", tokens), ("starts", starts)):
                name, content = f"{number:05}-{split}-{what}.npy", _npy(array)
                write_whole(self.folder / name, content)
                found["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            found["num_documents"][split], found["num_tokens"][split] = len(members), len(tokens)
            for document in members:
                entry = {"name": document.name, "sha256": document.sha256, "split": split}
                digest += int(hashlib.sha256(json.dumps(entry).encode()).hexdigest(), 16)
                found["documents"] += [entry] if self.names_documents else []
        found["sha256"] = _hex(digest)
        write_whole(self.folder / f"{number:05}.json", json.dumps(found) + "\n")
        return found


_work = None  # Of this process.


def _begin(work: _Work) -> None:
    global _work
    # Else it would go on without the lock, or wait for good, when its parent is killed.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = work


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _shard_of_process(number: int, part: range) -> dict:
    return _work.write(number, part)


def _hex(digest: int) -> str:
    return f"{digest % 2**256:064x}"


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _read_shard(folder: Path, number: int) -> dict | None:
    """What is known of a shard that was finished."""
    try:
        return json.loads((folder / f"{number:05}.json").read_bytes())
    except (FileNotFoundError, ValueError):
        # Without a word what a power failure emptied is made again.
        return None


def _index_of(shards: list[dict]) -> dict:
    def total(name: str) -> dict[str, int]:
        return {split: sum(shard[name][split] for shard in shards) for split in SPLITS}

    return {
        # A sum, so that it does not depend on what lies in which shard.
        "sha256": _hex(sum(int(shard["sha256"], 16) for shard in shards)),
        "num_documents": total("num_documents"),
        "num_tokens": total("num_tokens"),
        "documents": [entry for shard in shards for entry in shard["documents"]],
        "files": {name: known for shard in shards for name, known in shard["files"].items()},
    }


def read_index(folder: Path) -> dict:
    """What `write_shards` returned. Raises ConfigError: there is none, or it is damaged."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        return {**index, "files": dict(index["files"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, str(error)) from None


def open_streams(folder: Path, index: dict, separator_id: int) -> dict[str, Stream]:
    """The streams of both splits, memory-mapped. Raises ConfigError when the shards are not what was written."""
    checks_all = sum(known["bytes"] for known in index["files"].values()) <= _CHECKED
    arrays = {}
    try:
        for name, known in index["files"].items():
            path = folder / name
            if path.stat().st_size != known["bytes"] or (checks_all and sha256_of(path) != known["sha256"]):
                raise _damaged(folder, name)
            # Without what memory maps of NumPy do at each slice.
            arrays[name] = np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise _damaged(folder, str(error)) from None

    def of(split: str, what: str) -> tuple[np.ndarray, ...]:
        return tuple(array for name, array in arrays.items() if name.endswith(f"-{split}-{what}.npy"))

    return {split: Stream(of(split, "tokens"), of(split, "starts"), separator_id) for split in SPLITS}


def _damaged(folder: Path, what: str) -> ConfigError:
    return ConfigError(f"{folder}: damaged ({what}); delete the folder, and the documents are tokenised again")
