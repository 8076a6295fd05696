"""Requests of decoding, and their texts as they are written.

A token need not be a whole character, and what ends a text may come in pieces: `Writing` shows as much of a text as no
later token can change, and cuts it at its stop strings.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from radialnet.sampling import Sampling
from radialnet.sections import ConfigError
from radialnet.tokenizer import Tokenizer

MAX_TOKENS = 2**20  # Of a request.


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue, and how.

    Attributes:
        prompt: token ids, without the separator that every row begins with.
        stop: strings at which the text ends; they are not part of it.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: tuple[str, ...] = ()

    @property
    def num_prefix(self) -> int:
        """Tokens of its row to begin with: the separator and the prompt."""
        return 1 + len(self.prompt)

    @property
    def num_tokens(self) -> int:
        """Tokens of its row at most."""
        return self.num_prefix + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Completion:
    """What became of a request.

    Attributes:
        index: of the request, in the order in which they came.
        tokens: the new ones; where a stop string cut the text, they go on to the end of the token that it was seen at.
        reason: "length", "stop" or "end" (the model ended the document).
        layer_ST: the layer that each token of the row executed at each stage, -1 for none; the separator is the first
            token. Those of the last new token are none where it was not run any more.
    """

    index: int
    text: str
    tokens: list[int]
    reason: str
    layer_ST: np.ndarray

    @property
    def ran_ST(self) -> np.ndarray:
        """`layer_ST` of the tokens that were run: the last one only to find that it ends the document."""
        return self.layer_ST if self.reason == "end" else self.layer_ST[:-1]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a text, as it is written."""

    index: int
    text: str
    completion: Completion | None  # With the last piece.


@dataclasses.dataclass
class Writing:
    """A request that is at work: its new tokens, what they executed, and the text so far.

    Attributes:
        layer_ST: `Completion.layer_ST`, with room for all new tokens.
        tokens: the new ones.
        shown: the part of the text that is in pieces already.
    """

    index: int
    request: Request
    tokenizer: Tokenizer
    layer_ST: np.ndarray
    tokens: list[int] = dataclasses.field(default_factory=list)
    shown: str = ""

    def next_piece(self, is_live: bool) -> Piece | None:
        """What of the text is sure and was not shown yet, with the completion where it has ended; None where there is
        neither. From then on it counts as shown.

        Args:
            is_live: whether the row goes on, as far as the device knows.
        """
        tokens, is_done, stops = self.tokens, not is_live, self.request.stop
        text = self._text(tokens)
        reason = "length" if len(tokens) == self.request.max_new_tokens else "end"
        if any(stop in text for stop in stops):
            # By the token that completes the first of them, so that it is the same however many tokens came at once.
            tokens = self._until_stop()
            text, is_done, reason = self._text(tokens), True, "stop"
            text = text[: min(at for at in (text.find(stop) for stop in stops) if at >= 0)]
        sure = text
        if not is_done:
            # The last characters may be a part of one that more bytes belong to, or the beginning of a stop string.
            sure = text.rstrip("\ufffd")
            sure = sure[: len(sure) - max((_overlap(sure, stop) for stop in stops), default=0)]
        new, completion = sure[len(self.shown) :], None
        if is_done:
            layer_ST = self.layer_ST[: self.request.num_prefix + len(tokens)]
            completion = Completion(self.index, text, tokens, reason, layer_ST)
        if not (completion or new):
            return None
        self.shown = sure
        return Piece(self.index, new, completion)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, after=self.request.prompt)

    def _until_stop(self) -> list[int]:
        """The new tokens up to the one that completes a stop string; what came after it is not wanted."""
        num = 1
        while not any(stop in self._text(self.tokens[:num]) for stop in self.request.stop):
            num += 1
        return self.tokens[:num]


def check_requests(requests: Iterable[Request], max_positions: int) -> None:
    """Raise ConfigError: one asks for no token, or is longer than MAX_TOKENS or the positions that were learned.

    Args:
        max_positions: 0 where there is no end to them.
    """
    # Positions beyond those that were learned stand for nothing.
    most = min(MAX_TOKENS, max_positions or MAX_TOKENS)
    for index, request in enumerate(requests):
        if request.max_new_tokens < 1:
            raise ConfigError(f"request {index}: max_new_tokens={request.max_new_tokens}: at least 1 is needed")
        if request.num_tokens > most:
            raise ConfigError(
                f"request {index}: max_new_tokens={request.max_new_tokens}: that makes {request.num_tokens} tokens "
                f"with the prompt, and at most {most} are allowed"
            )


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that a stop string begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
