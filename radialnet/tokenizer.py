"""Tokenizers: a byte-level BPE trained on the corpus; plain bytes, which is the same one without merges; words; and
those that others trained: any `tokenizer.json`, and models of SentencePiece.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from radialnet.files import write_whole
from radialnet.sections import ConfigError

# Stands before every document, so that it both ends the one before and starts the next.
SEPARATOR = "<|document|>"
# What others call it; the first one there is. A tokenizer without any gets ours besides.
_SEPARATORS = (SEPARATOR, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
BYTE_VOCAB_SIZE = 257  # All bytes and the separator.

# The ids of a tokenizer of words: the separator, one that stands for every word it doesn't have, then its words.
UNKNOWN = "<|unknown|>"
SEPARATOR_ID, FIRST_WORD_ID = 0, 2


# Characters of a text that are tokenised at once. A line of millions without a space would be one word, and the time
# that merges take grows faster than their word.
PIECE = 2**16
_PIECES_AT_A_TIME = 256


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most PIECE characters, which together are the text.

    Cut before white space, where our own tokenizers cut as well, so that the tokens are those of the whole text; within
    a word only where that alone is longer. Those of others may have a token more, or another one, at a cut.
    """
    begin = 0
    while len(text) - begin > PIECE:
        end = begin + PIECE
        while end > begin and not (text[end] in " \t\r\n" and not text[end - 1].isspace()):
            end -= 1
        end = end if end > begin else begin + PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


class Tokenizer:
    """Text to token ids and back. The ids are those of a Hugging Face `tokenizer.json`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        # So that a document which quotes the separator doesn't split in two.
        tokenizer.encode_special_tokens = True
        # Some say how inputs of their model are cut and filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        known = [name for name in _SEPARATORS if tokenizer.token_to_id(name) is not None]
        if not known:
            tokenizer.add_special_tokens([SEPARATOR])
        # By which the tokens of a corpus are known: as it was given.
        self._content = tokenizer.to_str()
        self._tokenizer = _with_names_as_text(tokenizer)
        self._names_are_text = self._tokenizer is not tokenizer
        self._is_byte_level = isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)
        names = tokenizer.get_vocab().items()
        self._byte_of = {token: int(name[3:5], 16) for name, token in names if _BYTE.fullmatch(name)}
        # Ids may have gaps.
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self.separator_id: int = tokenizer.token_to_id((*known, SEPARATOR)[0])
        self.bytes_per_token = _bytes_per_token(tokenizer, self.vocab_size)
        self.bytes_per_token[self.separator_id] = 0

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of at most `vocab_size` tokens; with BYTE_VOCAB_SIZE there is no room for a merge."""
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
        return cls(tokenizer)

    @classmethod
    def of_words(cls, words: Sequence[str]) -> "Tokenizer":
        """These words, between spaces, with ids from FIRST_WORD_ID on in their order."""
        vocabulary = {word: token for token, word in enumerate((SEPARATOR, UNKNOWN, *words))}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens([SEPARATOR])
        return cls(tokenizer)

    @classmethod
    def of_merges(cls, vocabulary: Path, merges: Path) -> "Tokenizer":
        """A byte-level BPE in the two files of GPT-2. Raises ConfigError when they can't be read."""
        try:
            tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
        except Exception as error:  # The library raises no class of its own.
            raise ConfigError(f"{vocabulary}, {merges.name}: not a byte-level BPE ({error})") from None
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens([name for name in _SEPARATORS if tokenizer.token_to_id(name) is not None])
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json`, or a `.model` of SentencePiece. Raises ConfigError when it can't be read."""
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; a run folder holds the tokenizer.json it was trained with")
        if path.suffix == ".model":
            # Here, for few need it.
            from radialnet.sentencepiece_model import converted

            return cls(converted(path))
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # The library raises no class of its own.
            raise ConfigError(f"{path}: not a tokenizer.json ({error})") from None

    def save(self, path: Path) -> None:
        """Write as `tokenizer.json`, whole or not at all."""
        write_whole(path, self._content)

    def __reduce__(self):
        # The library's own copies forget that special tokens are text.
        return Tokenizer._of_json, (self._content,)

    @classmethod
    def _of_json(cls, content: str) -> "Tokenizer":
        return cls(tokenizers.Tokenizer.from_str(content))

    @property
    def encoding(self) -> str:
        """By which tokens that were kept are known: of a unigram model they were others before names were text."""
        return self.fingerprint() + (" names as text" if self._names_are_text else "")

    def fingerprint(self) -> str:
        return hashlib.sha256(self._content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of many texts, encoded in parallel threads."""
        owner, cut = [], []
        for index, text in enumerate(texts):
            for piece in pieces(text):
                owner.append(index)
                cut.append(piece)
        found = [[np.zeros(0, np.int32)] for _ in texts]
        # A few at a time: what the library returns of a piece takes a hundred times the memory of its ids.
        for begin in range(0, len(cut), _PIECES_AT_A_TIME):
            try:
                encodings = self._tokenizer.encode_batch(
                    cut[begin : begin + _PIECES_AT_A_TIME], add_special_tokens=False
                )
            except Exception as error:  # The library raises no class of its own.
                raise ConfigError(f"config.data.tokenizer: can't encode every text ({error})") from None
            for index, encoding in zip(owner[begin : begin + _PIECES_AT_A_TIME], encodings, strict=True):
                found[index].append(np.asarray(encoding.ids, np.int32))
        return [np.concatenate(ids) for ids in found]

    def decode(self, ids: list[int], after: Sequence[int] = ()) -> str:
        """The text of some ids; what is not all of a character is U+FFFD.

        Args:
            after: the ids that stand before them, where it is to go on from theirs.
        """
        if self._is_byte_level:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        before, text = list(after), ""
        for is_bytes, run in itertools.groupby(ids, self._byte_of.__contains__):
            run = list(run)
            text += self._text_of_bytes(run, before) if is_bytes else self._text_of_pieces(run, before)
            before += run
        return text

    def _text_of_bytes(self, run: list[int], before: list[int]) -> str:
        # Not by the library: where one byte is missing it finds no character in all that stand together.
        held = list(itertools.takewhile(self._byte_of.__contains__, reversed(before)))[::-1]
        held, new = (bytes(map(self._byte_of.__getitem__, tokens)) for tokens in (held, run))
        return (held + new).decode("utf-8", "replace")[len(held.decode("utf-8", "replace")) :]

    def _text_of_pieces(self, run: list[int], before: list[int]) -> str:
        # SentencePiece writes no space before the first word of a text. What stands here before one that is not is the
        # piece that does or, after bytes, the same piece once more.
        context = before[-1:] if before and before[-1] not in self._byte_of else run[:1] if before else []
        decoded = self._tokenizer.decode(context, skip_special_tokens=True)
        return self._tokenizer.decode([*context, *run], skip_special_tokens=True)[len(decoded) :]


def _with_names_as_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same, but that text which spells the name of a special token or of a byte doesn't become it.

    A unigram model takes any text that is in its vocabulary, and these with the best score there is.
    """
    if not isinstance(tokenizer.model, tokenizers.models.Unigram):
        return tokenizer
    content = json.loads(tokenizer.to_str())
    special = {added["content"] for added in content["added_tokens"] if added["special"]}
    vocabulary, unknown = content["model"]["vocab"], content["model"]["unk_id"]
    pieces, names = {piece for piece, _ in vocabulary}, []
    for token, (name, _) in enumerate(vocabulary):
        if name in special or token == unknown or _BYTE.fullmatch(name):
            names.append(name)
            vocabulary[token][1] = _LEAST_SCORE
    changed = tokenizers.Tokenizer.from_str(json.dumps(content))
    changed.encode_special_tokens = True
    # Characters that there is no piece of have a lower score still: before them the text is cut.
    if cuts := [re.escape(name[0]) + f"(?={re.escape(name[1:])})" for name in names if name[0] not in pieces]:
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex("|".join(cuts)), "isolated")
        steps = [step for step in (changed.pre_tokenizer, cut) if step]
        changed.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    return changed


# Of a piece, the log of its probability: less than that of any pieces which a name is made of.
_LEAST_SCORE = -1e6


def _bytes_per_token(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    """Bytes of raw text that each id stands for, [V].

    Words stand for no text and count as one byte each, so that bits per byte are bits per predicted word.
    """
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    if isinstance(tokenizer.model, tokenizers.models.WordLevel):
        length = dict.fromkeys(names, 1)
    elif isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel):
        # Each character of a name stands for one byte.
        length = {token: len(name) for token, name in names.items()}
    else:
        # SentencePiece writes a space as ▁, and a byte that is no character as <0x0A>.
        length = {
            token: 1 if _BYTE.fullmatch(name) else len(name.replace("▁", " ").encode()) for token, name in names.items()
        }
        # What stands for no text, or for one that isn't known.
        special = [token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special]
        length |= dict.fromkeys(special, 0)
    return np.asarray([length.get(token, 0) for token in range(vocab_size)], np.int32)


_BYTE = re.compile("<0x[0-9A-F]{2}>")
