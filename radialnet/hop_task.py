"""The hop task: generated rows with answers that are known to need k look-ups, one after the other.

    <|document|>  ; x f(x)  ; x f(x)  …      a permutation f of n symbols, its pairs in random order
                  x k f^k(x)  …              queries: f applied k times to x, for k = 1…K

Only the answers are trained on and counted. The token that answers is k: its target is f^k(x). What is looked up next
is known only when the look-up before is done, so that a token at k needs the more depth the larger k is. (As long as it
works alone. Tokens of the pairs see the pairs before them, and answers are seen by the queries after them: a part of
the way may have been gone already.)

Every symbol of a row is the first of one pair and the second of another. The sign before each pair tells them apart by
the token just before, where otherwise a model with relative positions would have to count from the start of the row.

The symbols of a row are drawn from the whole alphabet. So every symbol is trained with whatever n is, and a larger n in
evaluation is more of the same and not symbols that mean nothing. A number k > K was never seen and does mean nothing
until it is trained.
"""

import hashlib

import numpy as np

from radialnet.config import HOPS_ALPHABET
from radialnet.tokenizer import FIRST_WORD_ID, SEPARATOR_ID, Tokenizer

# All numbers that any K < n allows, the alphabet, and what stands before a pair.
PAIR = ";"
WORDS = (*(str(k) for k in range(1, HOPS_ALPHABET)), *(f"s{symbol}" for symbol in range(HOPS_ALPHABET)), PAIR)
FIRST_SYMBOL_ID = FIRST_WORD_ID + HOPS_ALPHABET - 1
PAIR_ID = FIRST_WORD_ID + WORDS.index(PAIR)

# Training has more rows than a run reads. The held-out ones are evaluated again and again: with the default sizes they
# have 26,624 queries, 3,328 of each k, so that an accuracy is known to 1 % or better.
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
    """Rows of S+1 tokens, made when they are asked for, a pure function of split and row: a source for Grain."""

    def __init__(self, split: str, num_symbols: int, max_hops: int, seq_len: int):
        """The rows of a split, `train` or `eval`, of sizes that `config.check_hops` lets pass."""
        self.split, self.num_symbols, self.max_hops = split, num_symbols, max_hops
        # What S+1 tokens have room for, one more if it is cut short: the last token of a row is a target only.
        self._num_queries = -(-(seq_len - 3 * num_symbols) // 3)
        in_queries_S = np.arange(seq_len + 1) - (1 + 3 * num_symbols)
        self._is_answer_S = (in_queries_S >= 0) & (in_queries_S % 3 == 2)

    def __len__(self) -> int:
        return NUM_ROWS[self.split]

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        tokens = self._tokens(np.random.default_rng((_STREAM[self.split], row)))
        seq_len = len(tokens) - 1
        return {
            "token": tokens[:-1],
            "target": tokens[1:],
            "document": np.zeros(seq_len, np.int32),
            "position": np.arange(seq_len, dtype=np.int32),
            "is_target": self._is_answer_S[1:],
        }

    def _tokens(self, rng: np.random.Generator) -> np.ndarray:
        n = self.num_symbols
        # f sends each symbol to the next on one cycle through all n. In a permutation at large half of the symbols lie
        # on cycles of at most n/2, some are fixed, and a walk of k hops that comes round again is a shorter one. Here
        # every hop leads to a symbol that the walk hasn't seen. (Backwards it is n - k hops: fewer for k > n/2.)
        cycle_n = FIRST_SYMBOL_ID + rng.permutation(HOPS_ALPHABET)[:n]
        sign_n = np.full(n, PAIR_ID)
        pairs_n3 = np.stack([sign_n, cycle_n, np.roll(cycle_n, -1)], axis=1)[rng.permutation(n)]
        # x and k are uniform, and no query comes twice before all have come: its answer could be copied, without a hop.
        query_Q = np.resize(rng.permutation(n * self.max_hops), self._num_queries)
        start_Q, hops_Q = query_Q // self.max_hops, query_Q % self.max_hops + 1
        answer_Q = cycle_n[(start_Q + hops_Q) % n]
        queries_Q3 = np.stack([cycle_n[start_Q], FIRST_WORD_ID - 1 + hops_Q, answer_Q], axis=1)
        tokens = np.concatenate([[SEPARATOR_ID], pairs_n3.ravel(), queries_Q3.ravel()])
        return tokens[: len(self._is_answer_S)].astype(np.int32)


def manifest(splits: dict[str, HopRows]) -> dict:
    """What the data of a run is known by, as `Corpus.manifest`; there are no documents.

    The hash is of the first row of each split, for another NumPy may have other random streams.
    """
    rows = [rows[0] for rows in splits.values()]
    digest = hashlib.sha256(b"".join(array.tobytes() for row in rows for array in row.values())).hexdigest()
    return {"source": "hops", "sha256": digest, "documents": []}
