"""Rows of a data set of Hugging Face that is read as it comes, for a look at one that is too large to keep.

A convenience: there is no (seed, step) -> rows, so that a run which goes on reads other rows than it would have.
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from radialnet.sections import ConfigError, DataConfig
from radialnet.shards import Batch, PackedRows, Stream
from radialnet.sources import Document, document_of_row, load_hf
from radialnet.tokenizer import Tokenizer

# Documents that are packed together, and those that are held out: the first ones.
_PACKED, _HELD_OUT = 512, 512
# Of which the next one is drawn.
_SHUFFLED = 10_000


class StreamedRows:
    """Rows to train on, without a length and without numbers."""

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer, seq_len: int):
        self._rows_of_source, self._text_key, self._name = load_hf(cfg), cfg.text_key, Path(cfg.path).name
        self._tokenizer, self._seq_len = tokenizer, seq_len
        held_out = list(self._documents(self._rows_of_source.take(_HELD_OUT)))
        if len(held_out) == 0 or next(self._documents(self._rows_of_source.skip(_HELD_OUT)), None) is None:
            raise ConfigError(f"config.data.path={cfg.path!r}: more than {_HELD_OUT} documents are needed to stream")
        self.held_out = PackedRows(Stream.of(held_out, tokenizer), seq_len)
        digest = hashlib.sha256("".join(document.sha256 for document in held_out).encode()).hexdigest()
        # How many there are to train on nobody knows.
        self.manifest = {
            "source": cfg.source,
            "sha256": digest,
            "num_documents": {"train": 0, "eval": len(held_out)},
            "num_tokens": {"train": 0, "eval": len(self.held_out) * seq_len},
            "documents": [],
        }

    def _documents(self, rows) -> Iterator[Document]:
        named = (document_of_row(row, self._name, self._text_key) for row in rows)
        return (document for document in named if document.content)

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Without an end; each time around in another order, as far as a buffer goes."""
        rows = (row for epoch in itertools.count() for row in self._rows((seed + epoch) % 2**32))
        while True:
            members = list(itertools.islice(rows, batch_size))
            yield {name: np.stack([member[name] for member in members]) for name in members[0]}

    def _rows(self, seed: int) -> Iterator[Batch]:
        documents = self._documents(self._rows_of_source.skip(_HELD_OUT).shuffle(seed, buffer_size=_SHUFFLED))
        while chunk := list(itertools.islice(documents, _PACKED)):
            packed = PackedRows(Stream.of(chunk, self._tokenizer), self._seq_len)
            # The last row is one of a few tokens.
            yield from (packed[row] for row in range(max(1, len(packed) - 1)))
