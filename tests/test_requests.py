"""Texts of requests as they are written: whole characters, and no stop string, whatever the tokens are cut at."""

import numpy as np
import pytest

from radialnet.requests import MAX_TOKENS, Request, Writing, check_requests
from radialnet.sections import ConfigError
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer

BYTES = Tokenizer.train([], BYTE_VOCAB_SIZE)
TEXT = "naïve END of it – and more"


def written(text: str, stop: tuple[str, ...], num_at_a_time: int) -> list:
    """The pieces of a text that comes so many bytes at a time, and goes on after its end."""
    tokens = BYTES.encode(text)
    request = Request((5,), len(tokens), stop=stop)
    writing = Writing(7, request, BYTES, np.arange(request.num_tokens)[:, None])
    pieces = []
    for begin in range(0, len(tokens), num_at_a_time):
        writing.tokens += tokens[begin : begin + num_at_a_time]
        piece = writing.piece(is_live=len(writing.tokens) < len(tokens))
        pieces += [piece] if piece else []
        if piece and piece.completion:
            break
    return pieces


@pytest.mark.parametrize("num_at_a_time", (1, 2, 3, 5, 100))
def test_a_text_ends_before_its_stop_string_and_none_of_it_was_shown(num_at_a_time):
    pieces = written(TEXT, ("–x", "END of", "more"), num_at_a_time)
    done = pieces[-1].completion
    assert "".join(piece.text for piece in pieces) == done.text == "naïve " and done.reason == "stop"
    assert all(piece.completion is None for piece in pieces[:-1]) and "\ufffd" not in done.text
    # The tokens go on to the one that completed it, however many came with that one.
    assert BYTES.decode(done.tokens) == "naïve END of" and len(done.tokens) == 13
    assert done.index == 7 and done.layer_ST.ravel().tolist() == list(range(2 + 13))


@pytest.mark.parametrize("num_at_a_time", (1, 2, 100))
def test_a_text_without_one_is_shown_whole(num_at_a_time):
    pieces = written(TEXT, ("ZZ",), num_at_a_time)
    assert "".join(piece.text for piece in pieces) == pieces[-1].completion.text == TEXT
    assert pieces[-1].completion.reason == "length"
    # A piece for each character where bytes come one by one; each of the 15 pairs completes one.
    assert len(pieces) == {1: len(TEXT), 2: 15, 100: 1}[num_at_a_time]


def test_what_no_row_can_hold_is_an_error():
    check_requests([Request((1, 2), 5)], max_positions=8)
    with pytest.raises(ConfigError, match=r"request 1: max_new_tokens=6: that makes 9 tokens .* at most 8 are allowed"):
        check_requests([Request((1, 2), 5), Request((1, 2), 6)], max_positions=8)
    with pytest.raises(ConfigError, match="request 0: max_new_tokens=0: at least 1 is needed"):
        check_requests([Request((1, 2), 0)], max_positions=8)
    with pytest.raises(ConfigError, match=f"at most {MAX_TOKENS} are allowed"):
        check_requests([Request((), MAX_TOKENS)], max_positions=0)
