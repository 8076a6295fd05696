"""Documents: where the text comes from, and which of it is held out."""

import dataclasses
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import psutil

from radialnet.sections import ConfigError, DataConfig

# Folders of the standard library that hold tests or are not part of it.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


# Memory by the bytes of a text: while a file is decoded both forms of it are there.
_READING = 2


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in two splits. The same text is always in the same split, so none leaks through a copy."""

    source: str
    train: tuple[Document, ...]
    eval: tuple[Document, ...]

    def manifest(self) -> dict:
        """What the corpus consists of: each document with its SHA-256, size and split, and one hash of it all."""
        documents = [
            {"name": document.name, "sha256": document.sha256, "bytes": len(document.text.encode()), "split": split}
            for split in ("train", "eval")
            for document in getattr(self, split)
        ]
        digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()
        return {"source": self.source, "sha256": digest, "documents": documents}


def load_corpus(cfg: DataConfig) -> Corpus:
    """Read all documents of the source, sorted by name, and hold out `eval_fraction` of them by content hash.

    Raises:
        ConfigError: the path does not exist or can't be read as text, or a split would be empty.
    """
    readers = {"stdlib": _read_stdlib, "text": _read_folder, "jsonl": _read_jsonl}
    documents = [document for document in readers[cfg.source](cfg) if document.text]
    if not documents:
        raise ConfigError(f"config.data.path={cfg.path!r}: no text in it")
    held_out = [_is_held_out(document, cfg.eval_fraction) for document in documents]
    train = tuple(document for document, out in zip(documents, held_out, strict=True) if not out)
    evaluation = tuple(document for document, out in zip(documents, held_out, strict=True) if out)
    if not train or not evaluation:
        raise ConfigError(
            f"config.data.eval_fraction={cfg.eval_fraction} leaves {len(train)} documents of "
            f"{cfg.path or cfg.source} for training and {len(evaluation)} for evaluation; both need one"
        )
    return Corpus(cfg.source, train, evaluation)


def read_held_out(path: Path, text_key: str) -> tuple[Document, ...]:
    """All documents of a folder of text or of a .jsonl file, for evaluation. Raises ConfigError as `load_corpus`."""
    is_jsonl = path.suffix == ".jsonl" and not path.is_dir()
    reader = _jsonl_documents(*_to_read(path), text_key) if is_jsonl else _text_documents(path)
    documents = tuple(document for document in reader if document.text)
    if not documents:
        raise ConfigError(f"{path}: no text in it")
    return documents


def _is_held_out(document: Document, fraction: float) -> bool:
    return int(document.sha256[:16], 16) < fraction * 2**64


def _read_stdlib(cfg: DataConfig) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _files(root, skip=_NOT_STDLIB):
        if path.suffix == ".py":
            # A few files declare another encoding; what can't be read as UTF-8 is a stray byte in a comment.
            yield Document(path.relative_to(root).as_posix(), path.read_text("utf-8", errors="replace"))


def _read_folder(cfg: DataConfig) -> Iterator[Document]:
    return _text_documents(_existing(cfg.path))


def _read_jsonl(cfg: DataConfig) -> Iterator[Document]:
    for file in _to_read(_existing(cfg.path), ".jsonl"):
        yield from _jsonl_documents(file, cfg.text_key)


def _existing(path: str) -> Path:
    if not Path(path).exists():
        raise ConfigError(f"config.data.path={path!r}: no such file or folder")
    return Path(path)


def _to_read(path: Path, suffix: str = "") -> list[Path]:
    """A file itself, or the files of a folder that end in `suffix`. Raises ConfigError for what can't be read whole."""
    files = [file for file in _files(path) if file.name.endswith(suffix)] if path.is_dir() else [path]
    for file in files:
        # Pipes and devices have no end, or nobody who writes.
        if not file.is_file():
            raise ConfigError(f"{file}: not a regular file")
    num_bytes = sum(file.stat().st_size for file in files)
    check_memory(_READING * num_bytes, f"{path}: to read its {num_bytes / 1e9:.1f} GB of text")
    return files


def check_memory(needed: int, what: str) -> None:
    """Raise ConfigError when something needs more bytes of memory than the machine has left.

    Without a word the system would end the process.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(f"{what} takes {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} are free")


def _text_documents(path: Path) -> Iterator[Document]:
    for file in _to_read(path):
        try:
            yield Document(file.relative_to(path).as_posix(), file.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _jsonl_documents(path: Path, text_key: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_key]
                # A lone surrogate can be written in JSON, but not as UTF-8.
                text.encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ConfigError(
                    f"{path}, line {number}: a JSON object in UTF-8 with a text under {text_key!r} is needed"
                ) from None
            yield Document(f"{path.name}:{number}", text)


def _raise(error: OSError) -> None:
    raise error


def _files(root: Path, skip: frozenset | set = frozenset()) -> list[Path]:
    """All files below a folder, sorted, hidden ones and the folders in `skip` left out."""
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)
