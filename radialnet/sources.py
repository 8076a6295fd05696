"""Where documents come from: sources with random access, and which documents are held out.

A source has a length, and its documents by their number. What it holds is known by `fingerprint`. A process that reads
a part of it gets a copy of it, so that all of them can be pickled.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil

from configs import base
from radialnet.checks import expanded
from radialnet.config import Config
from radialnet.sections import ConfigError, DataConfig

# Folders of the standard library that hold tests or are not part of it.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Memory by the bytes of a text: while a file is decoded both forms of it are there.
_READING = 2
# Bytes that are looked at in one go.
_CHUNK = 2**24
# Documents that a fingerprint is made of, all over a source; of one that has no more it is exact.
_FINGERPRINTED = 4096


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    content: str | np.ndarray  # Text, or tokens of somebody else's making.

    @functools.cached_property
    def sha256(self) -> str:
        is_text = isinstance(self.content, str)
        return hashlib.sha256(self.content.encode() if is_text else self.content.astype("<i8").tobytes()).hexdigest()

    def is_held_out(self, fraction: float) -> bool:
        """By the content, so that no copy of a held-out text is trained on."""
        return int(self.sha256[:16], 16) < fraction * 2**64


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document:
        """Raises ConfigError: it can't be read."""


def open_source(cfg: DataConfig) -> Source:
    """The documents that `data.source` and `data.path` name. What is in them is looked at when they are read.

    Raises:
        ConfigError: there are none; or a library is needed.
    """
    source = _OPEN[cfg.source](cfg)
    if not len(source):
        raise ConfigError(f"config.data.path={cfg.path!r}: no text in it")
    return source


def open_held_out(path: Path, text_key: str) -> Source:
    """A folder of text, a file of text, or a .jsonl file. Raises ConfigError as `open_source`."""
    if not path.exists():
        raise ConfigError(f"--data={path}: no such file or folder")
    if path.suffix == ".jsonl" and not path.is_dir():
        source = JsonLines(path.parent, _regular_files(path), text_key)
    else:
        source = TextFiles(path, _regular_files(path))
    if not len(source):
        raise ConfigError(f"{path}: no text in it")
    return source


def documents(data: Path | None) -> tuple[Source | list[Document], str]:
    """Text for a model that was trained elsewhere, and what it is: that of `data`, or the held-out part of the standard
    library. Raises ConfigError as `open_source`."""
    cfg = Config.from_dict(base.get_config()).data
    if data is not None:
        return open_held_out(data, cfg.text_key), f"text of {data}"
    return split_documents(
        cfg, is_held_out=True
    ), f"held-out part of the standard library of Python {platform.python_version()}"


def split_documents(cfg: DataConfig, is_held_out: bool) -> list[Document]:
    """Those of a source that no run with these fields trains on, or all others. Raises ConfigError as `open_source`."""
    source = open_source(cfg)
    documents = (document for document in map(source.__getitem__, range(len(source))) if len(document.content))
    return [document for document in documents if document.is_held_out(cfg.eval_fraction) == is_held_out]


def fingerprint(source: Source) -> str:
    """What a source is known by: its length, and documents evenly spread over it."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in evenly(len(source), _FINGERPRINTED):
        document = source[index]
        # Names of files need not be text.
        digest.update(f"{document.name}\0{document.sha256}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def evenly(total: int, most: int) -> Iterator[int]:
    """At most that many numbers of 0 to total - 1, evenly spread."""
    return (index * total // min(total, most) for index in range(min(total, most)))


class TextFiles:
    """Files of text, each a document."""

    def __init__(self, root: Path, files: list[Path], errors: str = "strict"):
        self._root, self._files, self._errors = root, files, errors

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Document:
        file = self._files[index]
        _check_size(file, file.stat().st_size)
        try:
            # Not `read_text`, which writes line ends anew: bits per byte are of the raw text.
            text = file.read_bytes().decode("utf-8", self._errors)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        return Document(file.relative_to(self._root).as_posix(), text)


class JsonLines:
    """Lines of JSON objects, each with a document under `text_key`; an empty line is an empty document."""

    def __init__(self, root: Path, files: list[Path], text_key: str):
        self._root, self._files, self._text_key = root, files, text_key
        lines = [_lines(file) for file in files]
        self._first = np.cumsum([0, *map(len, lines)])  # Of each file, its first line's number.
        self._line_D2 = np.concatenate([np.zeros((0, 2), int), *lines])

    def __len__(self) -> int:
        return len(self._line_D2)

    def __getitem__(self, index: int) -> Document:
        which = int(np.searchsorted(self._first, index, side="right")) - 1
        file, number, (begin, end) = self._files[which], 1 + index - self._first[which], self._line_D2[index].tolist()
        _check_size(file, end - begin)
        name = f"{file.relative_to(self._root).as_posix()}:{number}"
        with file.open("rb") as lines:
            lines.seek(begin)
            line = lines.read(end - begin)
        if line.isspace():
            return Document(name, "")
        try:
            text = json.loads(line)[self._text_key]
            # A lone surrogate can be written in JSON, but not as UTF-8.
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            told = f"a JSON object in UTF-8 with a text under {self._text_key!r} is needed"
            raise ConfigError(f"{file}, line {number}: {told}") from None
        return Document(name, text)


def _lines(file: Path) -> np.ndarray:
    """Begin and end of each line, [X, 2]."""
    ends, begin, last = [], 0, 0
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            ends.append(begin + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
            begin += len(chunk)
            last = ends[-1][-1] if len(ends[-1]) else last
            _check_size(file, begin - last)
    end_X = np.concatenate([np.zeros(0, int), *ends])
    if begin and (not len(end_X) or end_X[-1] < begin):
        end_X = np.append(end_X, begin)
    begin_X = np.append(0, end_X[:-1]) if len(end_X) else end_X
    return np.stack([begin_X, end_X], axis=1)


class Columns:
    """Rows with a text under a key: map-style data sets of Hugging Face, and data sources of TFDS."""

    def __init__(self, rows, name: str, text_key: str):
        self._rows, self._name, self._text_key = rows, name, text_key

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Document:
        return document_of_row(self._rows[index], f"{self._name}:{index}", self._text_key)


def document_of_row(row: dict, name: str, text_key: str) -> Document:
    """Raises ConfigError: there is no text under the key."""
    text = row.get(text_key)
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    if not isinstance(text, str):
        told = f"it holds a {type(text).__name__}" if text_key in row else f"{', '.join(row)} are there"
        raise ConfigError(f"config.data.text_key={text_key!r}: {name} has no text under it; {told}")
    return Document(name, text)


class TokenRows:
    """Arrays of token ids, one row a document: .npy files of [R, X], or of [X], which is one row."""

    def __init__(self, root: Path, files: list[Path]):
        self._root, self._files = root, files
        self._shapes = [self._open(file).shape for file in files]
        self._ends = np.cumsum([rows for rows, _ in self._shapes], dtype=int)

    def _open(self, file: Path) -> np.ndarray:
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ConfigError(f"{file}: not an array of NumPy ({error})") from None
        if not isinstance(array, np.ndarray):
            raise ConfigError(f"{file}: several arrays of NumPy; a file for each is needed")
        if array.ndim not in (1, 2) or not array.shape[-1] or not np.issubdtype(array.dtype, np.integer):
            raise ConfigError(f"{file}: {array.dtype}{list(array.shape)}; rows of whole numbers, [R, X], are needed")
        return array.reshape(-1, array.shape[-1])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Document:
        number = int(np.searchsorted(self._ends, index, side="right"))
        file, row = self._files[number], index - int(self._ends[number]) + self._shapes[number][0]
        return Document(f"{file.relative_to(self._root).as_posix()}:{row}", np.asarray(self._open(file)[row], np.int64))


def _open_stdlib(cfg: DataConfig) -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in _files(root, skip=_NOT_STDLIB) if path.suffix == ".py"]
    # A few files declare another encoding; what can't be read as UTF-8 is a stray byte in a comment.
    return TextFiles(root, files, errors="replace")


def _open_text(cfg: DataConfig) -> Source:
    path = _existing(cfg)
    return TextFiles(path if path.is_dir() else path.parent, _regular_files(path))


def _open_jsonl(cfg: DataConfig) -> Source:
    path = _existing(cfg)
    return JsonLines(path if path.is_dir() else path.parent, _regular_files(path, ".jsonl"), cfg.text_key)


def _open_tokens(cfg: DataConfig) -> Source:
    path = _existing(cfg)
    return TokenRows(path if path.is_dir() else path.parent, _regular_files(path, ".npy"))


def _path_or_name(cfg: DataConfig) -> tuple[Path, str]:
    """The path of a data set that is here, twice; of one that isn't, its name."""
    path = expanded(cfg.path, "config.data.path")
    return path, str(path) if path.exists() else cfg.path


# Of files, by the endings of their names, what the library calls them where that is something else.
_KINDS = {".jsonl": "json", ".txt": "text"}


def load_hf(cfg: DataConfig):
    """A data set of the library: map-style, or with `data.streaming` to be read once, in order. Raises ConfigError."""
    # Here, for it takes a second to import.
    import datasets

    datasets.disable_progress_bars()
    path, name = _path_or_name(cfg)
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(name)
            found = found[cfg.split] if isinstance(found, datasets.DatasetDict) else found
            return found.to_iterable_dataset() if cfg.streaming else found
        if path.is_file():
            files = {cfg.split: name}
            kind = _KINDS.get(path.suffix, path.suffix[1:])
            return datasets.load_dataset(kind, data_files=files, split=cfg.split, streaming=cfg.streaming)
        return datasets.load_dataset(name, cfg.subset or None, split=cfg.split, streaming=cfg.streaming)
    except (OSError, ValueError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        told = f"config.data.path={cfg.path!r} config.data.subset={cfg.subset!r} config.data.split={cfg.split!r}"
        raise ConfigError(f"{told}: no data set of Hugging Face ({type(error).__name__}: {reason})") from None


def _open_hf(cfg: DataConfig) -> Source:
    rows = load_hf(cfg)
    # Nothing else is read: pictures and sounds beside a text would be decoded.
    rows = rows.select_columns(cfg.text_key) if cfg.text_key in rows.column_names else rows
    return Columns(rows, Path(cfg.path).name, cfg.text_key)


def _open_tfds(cfg: DataConfig) -> Source:
    import tensorflow_datasets as tfds

    path, name = _path_or_name(cfg)
    try:
        builder = tfds.builder_from_directory(name) if path.is_dir() else tfds.builder(name)
        found = builder.as_data_source(cfg.split)
    except (OSError, ValueError, NotImplementedError, ImportError, AssertionError, LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        told = f"config.data.path={cfg.path!r} config.data.split={cfg.split!r}"
        raise ConfigError(f"{told}: no data set of TFDS in array_record ({type(error).__name__}: {reason})") from None
    return Columns(found, builder.name, cfg.text_key)


_OPEN = {
    "stdlib": _open_stdlib,
    "text": _open_text,
    "jsonl": _open_jsonl,
    "hf": _open_hf,
    "tfds": _open_tfds,
    "tokens": _open_tokens,
}


def _existing(cfg: DataConfig) -> Path:
    path = expanded(cfg.path, "config.data.path")
    if not path.exists():
        raise ConfigError(f"config.data.path={cfg.path!r}: no such file or folder")
    return path


def _regular_files(path: Path, suffix: str = "") -> list[Path]:
    """A file itself, or the files of a folder that end in `suffix`. Raises ConfigError for what isn't one."""
    files = [file for file in _files(path) if file.name.endswith(suffix)] if path.is_dir() else [path]
    for file in files:
        # Pipes and devices have no end, or nobody who writes.
        if not file.is_file():
            raise ConfigError(f"{file}: not a regular file")
    return files


def _check_size(file: Path, num_bytes: int) -> None:
    """Raise ConfigError when a document needs more memory than there is: the system would end the process silently."""
    if num_bytes < 2**26:
        return
    needed, free = _READING * num_bytes, psutil.virtual_memory().available
    if needed > free:
        told = f"to read its {num_bytes / 1e9:.1f} GB of text takes {needed / 1e9:.1f} GB of memory"
        raise ConfigError(f"{file}: {told}; {free / 1e9:.1f} are free")


def _raise(error: OSError) -> None:
    raise error


def _files(root: Path, skip: frozenset | set = frozenset()) -> list[Path]:
    """All files below a folder, sorted, hidden ones and the folders in `skip` left out."""
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)
