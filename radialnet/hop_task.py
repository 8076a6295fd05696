"""The hop task: generated rows with answers that are known to need k look-ups, one after the other.

    <|document|>  ; x f(x)  ; x f(x)  …      a permutation f of n symbols, its pairs in random order
                  x k  x k  …                queries: f applied k times to x, for k = 1…K

The token that answers is k: its target is f^k(x). Only answers are trained on and counted, and they don't stand in the
row, where later queries could copy them. What is looked up next is known only when the look-up before is done, so that
a token at k needs the more depth the larger k is. (As long as it works alone. Tokens of the pairs see the pairs before
them: a part of the way may have been gone already.)

Held-out rows have the n and K of the config. Each row of training has its own n, of 2 to that, and its own largest k:
a look-up among eight pairs has no gradient to begin with, among two or three it has, and four in a row are learned
after one (docs/LOG.md).

Every symbol of a row is the first of one pair and the second of another. The sign before each pair tells them apart by
the token just before, where otherwise a model with relative positions would have to count from the start of the row.

The symbols of a row are drawn from the whole alphabet. So every symbol is trained with whatever n is, and a larger n in
evaluation is more of the same and not symbols that mean nothing. A number k > K was never seen and does mean nothing
until it is trained.
"""

import hashlib

import numpy as np

from radialnet.sections import HOPS_ALPHABET
from radialnet.tokenizer import FIRST_WORD_ID, SEPARATOR_ID, Tokenizer

# All numbers that any K < n allows, the alphabet, and what stands before a pair.
PAIR = ";"
WORDS = (*(str(k) for k in range(1, HOPS_ALPHABET)), *(f"s{symbol}" for symbol in range(HOPS_ALPHABET)), PAIR)
FIRST_SYMBOL_ID = FIRST_WORD_ID + HOPS_ALPHABET - 1
PAIR_ID = FIRST_WORD_ID + WORDS.index(PAIR)

# Training has more rows than a run reads. The held-out ones are evaluated again and again: with configs/hops.py they
# have 19,456 queries, 4,864 of each k, so that an accuracy is known to 1 % or better.
NUM_ROWS = {"train": 2**24, "eval": 2**10}
# The splits' random streams. Rows of two streams have nothing in common but chance.
_STREAM = {"train": 0, "eval": 1}


def hops_of(token: np.ndarray) -> np.ndarray:
    """The numbers k that tokens stand for. Of other tokens the result means nothing."""
    return token - FIRST_WORD_ID + 1


def make_tokenizer() -> Tokenizer:
    """The tokenizer of all runs on hops: the same words whatever n and K are."""
    return Tokenizer.of_words(WORDS)


class HopRows:
    """Rows of S tokens, made when they are asked for, a pure function of split and row: a source for Grain."""

    def __init__(self, split: str, num_symbols: int, max_hops: int, seq_len: int):
        """The rows of a split, `train` or `eval`, of sizes that `config.check_hops` lets pass."""
        self.split, self.num_symbols, self.max_hops, self.seq_len = split, num_symbols, max_hops, seq_len

    def __len__(self) -> int:
        return NUM_ROWS[self.split]

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        rng = np.random.default_rng((_STREAM[self.split], row))
        n, max_hops = self.num_symbols, self.max_hops
        if self.split == "train":
            n = int(rng.integers(2, n, endpoint=True))
            max_hops = int(rng.integers(1, min(max_hops, n - 1), endpoint=True))
        token_S, target_S, is_target_S = self._tokens(rng, n, max_hops)
        return {
            "token": token_S,
            "target": target_S,
            "document": np.zeros(self.seq_len, np.int32),
            "position": np.arange(self.seq_len, dtype=np.int32),
            "is_target": is_target_S,
        }

    def _tokens(self, rng: np.random.Generator, n: int, max_hops: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, what each is to be followed by, and which of them answer, of a row of n symbols and queries to K."""
        # f sends each symbol to the next on one cycle through all n. In a permutation at large half of the symbols lie
        # on cycles of at most n/2, some are fixed, and a walk of k hops that comes round again is a shorter one. Here
        # every hop leads to a symbol that the walk hasn't seen. (Backwards it is n - k hops: fewer for k > n/2.)
        cycle_n = FIRST_SYMBOL_ID + rng.permutation(HOPS_ALPHABET)[:n]
        sign_n = np.full(n, PAIR_ID)
        pairs_n3 = np.stack([sign_n, cycle_n, np.roll(cycle_n, -1)], axis=1)[rng.permutation(n)]
        # x and k are uniform, and no query comes twice before all have come. One more than there is room for, as the
        # last one may be cut short.
        first = 1 + 3 * n
        query_Q = np.resize(rng.permutation(n * max_hops), (self.seq_len - first) // 2 + 1)
        start_Q, hops_Q = query_Q // max_hops, query_Q % max_hops + 1
        queries_Q2 = np.stack([cycle_n[start_Q], FIRST_WORD_ID - 1 + hops_Q], axis=1)
        answers_Q2 = np.stack([np.zeros_like(start_Q), cycle_n[(start_Q + hops_Q) % n]], axis=1)
        token = np.concatenate([[SEPARATOR_ID], pairs_n3.ravel(), queries_Q2.ravel()])
        target = np.concatenate([np.zeros(first, int), answers_Q2.ravel()])
        in_queries_S = np.arange(self.seq_len) - first
        is_target_S = (in_queries_S >= 0) & (in_queries_S % 2 == 1)
        return token[: self.seq_len].astype(np.int32), target[: self.seq_len].astype(np.int32), is_target_S


def manifest(splits: dict[str, HopRows]) -> dict:
    """What the data of a run is known by, with the keys of a manifest of documents, of which there are none.

    The hash is of the first row of each split, for another NumPy may have other random streams.
    """
    rows = [rows[0] for rows in splits.values()]
    digest = hashlib.sha256(b"".join(array.tobytes() for row in rows for array in row.values())).hexdigest()
    none = {"train": 0, "eval": 0}
    return {"source": "hops", "sha256": digest, "num_documents": none, "num_tokens": none, "documents": []}
