"""Packed rows of tokens on disk, and the pure function (seed, step) -> rows that training reads.

A split is one stream: every document is the separator and its tokens, one after the other. Row r holds the tokens
r·S … (r+1)·S of it; the last one is only a target and the first of the next row, so that every token is read once
as an input and predicted once. Attention never crosses from one document of a row to another (`document_BS`).
Rows of the hop task are not on disk: `hop_task` makes them when they are read.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from numpy.typing import ArrayLike

from radialnet.config import Config
from radialnet.corpus import Document, check_memory, load_corpus
from radialnet.files import sha256_of, write_whole
from radialnet.hop_task import HopRows, make_tokenizer
from radialnet.hop_task import manifest as hop_manifest
from radialnet.run_folder import CHECKSUMS, RunFolder
from radialnet.sections import ConfigError, DataConfig
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer

# Part of the name of what is cached: raise it when the layout of the rows changes.
LAYOUT = 2
# Bytes of memory that a token takes while rows are packed.
_PACKING = 100
PADDING = -1  # Document id of what fills up the last row.

Batch = dict[str, np.ndarray]


# The files of packed rows.
_ARRAYS = ("tokens", "documents", "positions")


class PackedRows:
    """Rows of S+1 tokens, memory-mapped: a random-access source for Grain."""

    def __init__(self, folder: Path):
        """Open what `write_rows` wrote, after all of it was read once. Raises ConfigError when it is damaged."""
        try:
            sums = json.loads((folder / CHECKSUMS).read_bytes())
            damaged = [name for name in _ARRAYS if sums[name] != sha256_of(folder / f"{name}.npy")]
            self.tokens, self.documents, self.positions = (
                np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS
            )
        except (OSError, ValueError, EOFError, KeyError, TypeError, RecursionError) as error:
            damaged = [str(error)]
        if damaged:
            raise ConfigError(
                f"{folder}: damaged ({', '.join(damaged)}); delete the folder, and the rows are packed again"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> Batch:
        tokens = np.asarray(self.tokens[row], np.int32)
        documents = np.asarray(self.documents[row])
        return {
            "token": tokens[:-1],
            "target": tokens[1:],
            "document": documents[:-1],
            "position": np.asarray(self.positions[row, :-1], np.int32),
            # A target is real where it is not padding; its input is real then, too.
            "is_target": documents[1:] != PADDING,
        }


def pack(documents: Sequence[ArrayLike], separator: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, document ids and positions of packed rows, each [R, S+1]. Positions count within row and document."""
    stream = np.concatenate([part for tokens in documents for part in ([separator], tokens)]).astype(np.int32)
    document = np.repeat(np.arange(len(documents), dtype=np.int32), [len(tokens) + 1 for tokens in documents])
    num_rows = max(1, -(-(len(stream) - 1) // seq_len))
    index = np.arange(num_rows)[:, None] * seq_len + np.arange(seq_len + 1)
    is_real = index < len(stream)
    index = np.minimum(index, len(stream) - 1)
    tokens = np.where(is_real, stream[index], separator).astype(np.int32)
    documents_RS = np.where(is_real, document[index], PADDING).astype(np.int32)
    column = np.broadcast_to(np.arange(seq_len + 1, dtype=np.int32), tokens.shape)
    starts = np.diff(documents_RS, axis=1, prepend=PADDING - 1) != 0
    positions = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    return tokens, documents_RS, positions


def write_rows(folder: Path, documents: tuple[Document, ...], tokenizer: Tokenizer, seq_len: int) -> None:
    """Tokenise, pack and save, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial", dir=folder.parent))
    try:
        ids = tokenizer.encode_batch([document.text for document in documents])
        num_tokens = sum(map(len, ids))
        check_memory(_PACKING * num_tokens, f"{folder.parent}: to pack {num_tokens / 1e9:.1f} G tokens")
        arrays = pack(ids, tokenizer.separator_id, seq_len)
        for name, array in zip(_ARRAYS, arrays, strict=True):
            np.save(partial / f"{name}.npy", array)
        sums = {name: sha256_of(partial / f"{name}.npy") for name in _ARRAYS}
        write_whole(partial / CHECKSUMS, json.dumps(sums) + "\n")
        partial.rename(folder)
    except OSError as error:
        # Another run may have packed the same rows at the same time; its copy is as good.
        if not folder.exists():
            # NumPy tells of a full disk by what it could write.
            raise ConfigError(f"{folder.parent}: the packed rows can't be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


Rows = PackedRows | HopRows


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A tokenised corpus: rows of both splits, the tokenizer, and the manifest of the documents."""

    train: Rows
    eval: Rows
    tokenizer: Tokenizer
    manifest: dict


def prepare(config: Config, folder: RunFolder) -> Dataset:
    """Read the corpus, train the tokenizer, pack the rows; what is already in `data.cache_dir` is used again.

    A run that has begun (its folder holds a config) is given its own tokenizer, and the corpus must be the one of its
    manifest. Nothing is written to the folder.

    Raises:
        ConfigError: the corpus can't be read or is not the one of the manifest; the cache can't be used.
    """
    cfg = config.data
    if cfg.source == "hops":
        return _hops(config, folder)
    corpus = load_corpus(cfg)
    manifest = corpus.manifest()
    cache = _cache_folder(cfg)
    if folder.config.exists():
        _check_manifest(folder.manifest, manifest["sha256"], cfg)
        tokenizer = tokenizer_of_run(folder)
    else:
        tokenizer = _tokenizer(cache, cfg, corpus.train)
    key = _key(LAYOUT, manifest["sha256"], tokenizer.fingerprint(), config.train.seq_len)
    rows = {}
    for split in ("train", "eval"):
        path = cache / f"rows-{key}-{split}"
        if not path.exists():
            write_rows(path, getattr(corpus, split), tokenizer, config.train.seq_len)
        rows[split] = PackedRows(path)
    if len(rows["train"]) < config.train.batch_size:
        raise ConfigError(
            f"config.train.batch_size={config.train.batch_size}: {cfg.path or cfg.source} has text for "
            f"{len(rows['train'])} rows of config.train.seq_len={config.train.seq_len} to train on, less than one batch"
        )
    return Dataset(tokenizer=tokenizer, manifest={**manifest, "tokenizer": tokenizer.fingerprint()}, **rows)


def tokenizer_of_run(folder: RunFolder) -> Tokenizer:
    """The tokenizer that a run was trained with.

    Raises:
        ConfigError: it can't be read, or is not the one that the run's manifest tells of.
    """
    tokenizer = Tokenizer.load(folder.tokenizer)
    known = _read_manifest(folder.manifest).get("tokenizer")
    # By the file's content: another version of the library may write the same tokenizer in another way.
    if known not in (None, sha256_of(folder.tokenizer)):
        raise ConfigError(
            f"{folder.tokenizer}: not the tokenizer that the run was trained with; {folder.manifest} has its SHA-256"
        )
    return tokenizer


def _hops(config: Config, folder: RunFolder) -> Dataset:
    cfg = config.data
    _cache_folder(cfg)  # Nothing to keep there, but compiled programs are put into it.
    rows = {split: HopRows(split, cfg.hops_symbols, cfg.hops_max, config.train.seq_len) for split in ("train", "eval")}
    manifest = hop_manifest(rows)
    if folder.config.exists():
        _check_manifest(folder.manifest, manifest["sha256"], cfg)
    return Dataset(tokenizer=make_tokenizer(), manifest=manifest, **rows)


def _cache_folder(cfg: DataConfig) -> Path:
    try:
        cache = Path(cfg.cache_dir).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder.
        raise ConfigError(f"config.data.cache_dir={cfg.cache_dir!r}: can't be made ({error})") from None
    return cache


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text())
        return {**manifest, "sha256": str(manifest["sha256"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{path}: not a manifest of documents with a 'sha256'") from None


def _check_manifest(path: Path, sha256: str, cfg: DataConfig) -> None:
    known = _read_manifest(path)["sha256"]
    if known != sha256:
        raise ConfigError(
            f"config.data: the documents of {cfg.path or cfg.source!r} have SHA-256 {sha256[:12]}, "
            f"but {path} was written for {known[:12]}; held-out text could be text it was trained on"
        )


def _tokenizer(cache: Path, cfg: DataConfig, documents: tuple[Document, ...]) -> Tokenizer:
    if cfg.tokenizer == "byte":
        return Tokenizer.train([], BYTE_VOCAB_SIZE)
    path = cache / f"tokenizer-{_key(cfg.vocab_size, [document.sha256 for document in documents])}.json"
    if not path.exists():
        Tokenizer.train((document.text for document in documents), cfg.vocab_size).save(path)
    return Tokenizer.load(path)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def train_batches(rows: Rows, batch_size: int, seed: int, own: Sequence[int] | None = None) -> grain.MapDataset:
    """The batch of every training step: `train_batches(...)[step]`, a pure function of (seed, step).

    Each epoch goes through all rows once, in an order of its own, however many processes share them.

    Args:
        own: which rows of each batch are read; by default all.
    """
    if own is None or len(own) == batch_size:
        return grain.MapDataset.source(rows).shuffle(seed=seed).repeat().batch(batch_size)
    return grain.MapDataset.source(_OwnRows(rows, batch_size, seed, own)).batch(len(own))


class _OwnRows:
    """Some rows of each batch, one batch after the other: a random-access source for Grain."""

    def __init__(self, rows: Rows, batch_size: int, seed: int, own: Sequence[int]):
        self._rows, self._own = rows, tuple(own)
        self._batch_size = batch_size
        self._numbers = grain.MapDataset.range(len(rows)).shuffle(seed=seed).repeat()

    def __len__(self) -> int:
        return len(self._numbers) // self._batch_size * len(self._own)

    def __getitem__(self, index: int) -> Batch:
        step, place = divmod(index, len(self._own))
        return self._rows[self._numbers[step * self._batch_size + self._own[place]]]


def train_row_numbers(rows: Rows, batch_size: int, seed: int) -> grain.MapDataset:
    """Which rows the batches of `train_batches` are made of."""
    return grain.MapDataset.range(len(rows)).shuffle(seed=seed).repeat().batch(batch_size)


def prefetch(batches: grain.MapDataset, start: int) -> Iterator[Batch]:
    """The batches from step `start` on, read ahead by threads."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(batches[start:].to_iter_dataset(options))


def eval_batches(rows: Rows, batch_size: int, num_batches: int, own: Sequence[int] | None = None) -> Iterator[Batch]:
    """The rows in order, in batches filled up with padding; `num_batches` 0 = all of them.

    Args:
        own: which rows of each batch are read; by default all.
    """
    available = -(-len(rows) // batch_size)
    own = range(batch_size) if own is None else own
    padding = {name: np.zeros_like(array) for name, array in rows[0].items()}
    padding["document"] = np.full_like(padding["document"], PADDING)
    for index in range(min(num_batches, available) if num_batches else available):
        numbers = [index * batch_size + place for place in own]
        members = [rows[number] if number < len(rows) else padding for number in numbers]
        yield {name: np.stack([member[name] for member in members]) for name in padding}
