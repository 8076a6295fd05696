"""What a run is trained and evaluated on, and the pure function (seed, step) -> rows that training reads.

Documents come from a source (`sources`), are tokenised and kept in `data.cache_dir` (`shards`), and packed into rows
when they are read. Rows of the hop task are not on disk: `hop_task` makes them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import grain
import numpy as np

from radialnet.checks import expanded
from radialnet.config import Config
from radialnet.files import sha256_of
from radialnet.hop_task import HopRows, make_tokenizer
from radialnet.hop_task import manifest as hop_manifest
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError, DataConfig
from radialnet.shards import PADDING, SPLITS, Batch, PackedRows, Stream, open_streams, write_shards
from radialnet.sources import Source, evenly, fingerprint, open_source
from radialnet.streaming import StreamedRows
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer

# Part of the name of what is cached: raise it when the layout of the shards changes.
LAYOUT = 3
# Documents that a BPE is trained on, all over the sources.
_TRAINS_TOKENIZER = 2**17

# Is told what takes its time, how much of it is done, and of how much.
Report = Callable[[str, int, int], None]


class MixedRows:
    """Rows of several parts, numbered one part after the other, and the weights by which they are mixed."""

    def __init__(self, parts: Sequence[PackedRows], weights: Sequence[float]):
        self._parts, self.weights = tuple(parts), tuple(weights)
        self.ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, row: int) -> Batch:
        part = int(np.searchsorted(self.ends, row, side="right"))
        return self._parts[part][row - (self.ends[part - 1] if part else 0)]

    def mixed(self, of_part: Callable[[grain.MapDataset], grain.MapDataset]) -> grain.MapDataset:
        """Numbers of rows in the proportion of the weights, of each part those that `of_part` makes of its own."""
        begins = [0, *self.ends]
        parts = [of_part(grain.MapDataset.range(begin, end)) for begin, end in zip(begins, self.ends, strict=False)]
        return grain.MapDataset.mix(parts, self.weights)


class _Interleaved:
    """Rows of all parts side by side by their weights, until one of the parts is at its end."""

    def __init__(self, rows: MixedRows):
        self._rows, self._numbers = rows, rows.mixed(lambda part: part)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row: int) -> Batch:
        return self._rows[self._numbers[row]]


Rows = PackedRows | MixedRows | _Interleaved | StreamedRows | HopRows


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows of both splits, the tokenizer, and the manifest: what they are known by."""

    train: Rows
    eval: Rows
    tokenizer: Tokenizer
    manifest: dict


def prepare(
    config: Config,
    folder: RunFolder | None = None,
    num_processes: int = 1,
    report: Report = lambda what, done, total: None,
) -> Dataset:
    """Read the documents, train the tokenizer, tokenise; what is already in `data.cache_dir` is used again.

    A run that has begun (its folder holds a config) is given its own tokenizer, and the documents must be those of its
    manifest. Nothing is written to the folder.

    Args:
        num_processes: that tokenise, side by side.
        report: called with what takes its time, how many documents are done, and of how many.

    Raises:
        ConfigError: the documents can't be read or are not those of the manifest; the cache can't be used.
    """
    cfg = config.data
    cache, has_begun = _cache_folder(cfg), folder is not None and folder.config.exists()
    if cfg.source == "hops":
        return _hops(config, folder if has_begun else None)
    if cfg.streaming:
        return _streamed(config, folder if has_begun else None)
    weights, parts = zip(*cfg.parts(), strict=True)
    sources = [open_source(part) for part in parts]
    known = [fingerprint(source) for source in sources]
    tokenizer = tokenizer_of_run(folder) if has_begun else _tokenizer(cache, cfg, sources, known, report)
    indices, streams = [], []
    for number, (part, source, of_source) in enumerate(zip(parts, sources, known, strict=True), 1):
        name = f"documents of {part.path or part.source} tokenised"
        name = f"part {number} of {len(parts)}: {name}" if len(parts) > 1 else name
        shards = cache / f"tokens-{_key(LAYOUT, of_source, tokenizer.encoding, cfg.eval_fraction)}"
        indices.append(write_shards(shards, source, tokenizer, cfg.eval_fraction, num_processes, partial(report, name)))
        streams.append(open_streams(shards, indices[-1], tokenizer.separator_id))
    manifest = {**_manifest(cfg, weights, parts, indices), "tokenizer": tokenizer.fingerprint()}
    if has_begun:
        _check_manifest(folder.manifest, manifest["sha256"], cfg)
    for part, index in zip(parts, indices, strict=True):
        if not any(index["num_documents"].values()):
            raise ConfigError(f"config.data.path={part.path!r}: no text in it")
        if not all(index["num_documents"].values()):
            raise ConfigError(
                f"config.data.eval_fraction={cfg.eval_fraction} leaves {index['num_documents']['train']} documents of "
                f"{part.path or part.source} for training and {index['num_documents']['eval']} for evaluation; "
                "both need one: more documents, or another fraction"
            )
    rows = {split: [PackedRows(of[split], config.train.seq_len) for of in streams] for split in SPLITS}
    for part, packed in zip(parts, rows["train"], strict=True):
        if len(packed) < config.train.batch_size:
            raise ConfigError(
                f"config.train.batch_size={config.train.batch_size}: {part.path or part.source} has text for "
                f"{len(packed)} rows of config.train.seq_len={config.train.seq_len} to train on, less than one batch"
            )
    if len(parts) == 1:
        return Dataset(rows["train"][0], rows["eval"][0], tokenizer, manifest)
    mixed = {split: MixedRows(of, weights) for split, of in rows.items()}
    return Dataset(mixed["train"], _Interleaved(mixed["eval"]), tokenizer, manifest)


def held_out_rows(source: Source, tokenizer: Tokenizer, seq_len: int) -> PackedRows:
    """Rows of all documents of a source, tokenised in memory. Raises ConfigError: they can't be read."""
    documents = [document for document in map(source.__getitem__, range(len(source))) if len(document.content)]
    if not documents:
        raise ConfigError(f"{source}: no text in it")
    return PackedRows(Stream.of(documents, tokenizer), seq_len)


def _manifest(cfg: DataConfig, weights: Sequence[float], parts: Sequence[DataConfig], indices: list[dict]) -> dict:
    """What the documents of a run are known by: a hash of all of them with their splits, how many they are, and, up to
    10,000, each of them by its name, SHA-256 and split."""
    sha256s = [index["sha256"] for index in indices]

    def total(name: str) -> dict[str, int]:
        return {split: sum(index[name][split] for index in indices) for split in SPLITS}

    manifest = {
        "source": cfg.source,
        "sha256": sha256s[0] if len(parts) == 1 else _key(*sha256s),
        "num_documents": total("num_documents"),
        "num_tokens": total("num_tokens"),
        "documents": [document for index in indices for document in index["documents"]],
    }
    if len(parts) > 1:
        manifest["parts"] = [
            {"source": part.source, "weight": weight, **{name: index[name] for name in ("sha256", "num_tokens")}}
            for part, weight, index in zip(parts, weights, indices, strict=True)
        ]
    return manifest


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


def _hops(config: Config, begun: RunFolder | None) -> Dataset:
    cfg = config.data
    rows = {split: HopRows(split, cfg.hops_symbols, cfg.hops_max, config.train.seq_len) for split in SPLITS}
    manifest = hop_manifest(rows)
    if begun:
        _check_manifest(begun.manifest, manifest["sha256"], cfg)
    return Dataset(tokenizer=make_tokenizer(), manifest=manifest, **rows)


def _streamed(config: Config, begun: RunFolder | None) -> Dataset:
    tokenizer = tokenizer_of_run(begun) if begun else _tokenizer(Path(), config.data)
    rows = StreamedRows(config.data, tokenizer, config.train.seq_len)
    if begun:
        _check_manifest(begun.manifest, rows.manifest["sha256"], config.data)
    return Dataset(rows, rows.held_out, tokenizer, {**rows.manifest, "tokenizer": tokenizer.fingerprint()})


def _cache_folder(cfg: DataConfig) -> Path:
    try:
        cache = expanded(cfg.cache_dir, "config.data.cache_dir")
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
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


def _tokenizer(
    cache: Path,
    cfg: DataConfig,
    sources: Sequence[Source] = (),
    known: Sequence[str] = (),
    report: Report = lambda what, done, total: None,
) -> Tokenizer:
    """That `data.tokenizer` names; a BPE of our own is trained on the sources unless it is in the cache."""
    if cfg.tokenizer == "byte":
        return Tokenizer.train([], BYTE_VOCAB_SIZE)
    if cfg.tokenizer != "bpe":
        path = expanded(cfg.tokenizer, "config.data.tokenizer")
        if not path.is_file():
            told = "no such file; bpe, byte, or the path of a tokenizer.json or of a .model of SentencePiece"
            raise ConfigError(f"config.data.tokenizer={cfg.tokenizer!r}: {told}")
        return Tokenizer.load(path)
    path = cache / f"tokenizer-{_key(cfg.vocab_size, known, cfg.eval_fraction)}.json"
    if not path.exists():
        most = _TRAINS_TOKENIZER // len(sources)
        chosen = [(source, index) for source in sources for index in evenly(len(source), most)]

        def texts() -> Iterator[str]:
            for done, (source, index) in enumerate(chosen):
                report("documents read for the tokenizer", done, len(chosen))
                document = source[index]
                if not document.is_held_out(cfg.eval_fraction):
                    yield document.content
            report("documents read for the tokenizer", len(chosen), len(chosen))

        Tokenizer.train(texts(), cfg.vocab_size).save(path)
    return Tokenizer.load(path)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def row_numbers(rows: Rows, seed: int) -> grain.MapDataset:
    """Of rows to train on, one after the other: each epoch goes through all of them once, in an order of its own; of a
    mixture, each part at the pace of its weight."""

    def endless(numbers: grain.MapDataset) -> grain.MapDataset:
        return numbers.shuffle(seed=seed).repeat()

    return rows.mixed(endless) if isinstance(rows, MixedRows) else endless(grain.MapDataset.range(len(rows)))


def train_batches(rows: Rows, batch_size: int, seed: int, own: Sequence[int] | None = None) -> grain.MapDataset:
    """The batch of every training step: `train_batches(...)[step]`, a pure function of (seed, step), however many
    processes share the rows.

    Args:
        own: which rows of each batch are read; by default all.
    """
    numbers, size = row_numbers(rows, seed), batch_size
    if own is not None and len(own) < batch_size:
        numbers, size = grain.MapDataset.source(_OwnNumbers(numbers, batch_size, own)), len(own)
    return numbers.map(rows.__getitem__).batch(size)


class _OwnNumbers:
    """Of each batch some of its numbers of rows, one batch after the other: a random-access source for Grain."""

    def __init__(self, numbers: grain.MapDataset, batch_size: int, own: Sequence[int]):
        self._numbers, self._batch_size, self._own = numbers, batch_size, tuple(own)

    def __len__(self) -> int:
        return len(self._numbers) // self._batch_size * len(self._own)

    def __getitem__(self, index: int) -> int:
        step, place = divmod(index, len(self._own))
        return int(self._numbers[step * self._batch_size + self._own[place]])


def batches_from(rows: Rows, batch_size: int, seed: int, own: Sequence[int], step: int) -> Iterator[Batch]:
    """The batches of `train_batches` from a step on; of a stream those that come."""
    if isinstance(rows, StreamedRows):
        return rows.batches(batch_size, (seed + step) % 2**32)
    return prefetch(train_batches(rows, batch_size, seed, own), step)


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
