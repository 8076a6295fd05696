"""Texts of requests as they are written: whole characters, and no stop string, whatever the tokens are cut at."""

import numpy as np
import pytest

from radialnet.decode_requests import MAX_TOKENS, Completion, Request, Writing, check_requests
from radialnet.sections import ConfigError
from radialnet.tokenizer import BYTE_VOCAB_SIZE, Tokenizer

BYTES = Tokenizer.train([], BYTE_VOCAB_SIZE)
TEXT = "naïve END of it – and more"


def written(text: str, stop: tuple[str, ...], num_at_a_time: int, num_unused: int = 0) -> tuple[list[str], Completion]:
    """The pieces of a text that comes so many bytes at a time, and its completion.

    Args:
        num_unused: tokens that the request would allow beyond those of the text.
    """
    tokens = BYTES.encode(text)
    request = Request((5,), len(tokens) + num_unused, stop=stop)
    writing = Writing(7, request, BYTES, np.arange(request.num_tokens)[:, None])
    pieces = []
    for begin in range(0, len(tokens), num_at_a_time):
        writing.tokens += tokens[begin : begin + num_at_a_time]
        piece = writing.next_piece(is_live=len(writing.tokens) < len(tokens))
        pieces += [piece] if piece else []
        if piece and piece.completion:
            break
    *before, last = pieces
    assert {piece.index for piece in pieces} == {7} and last.completion.index == 7
    assert not any(piece.completion for piece in before) and all(piece.text for piece in before)
    assert "".join(piece.text for piece in pieces) == last.completion.text
    return [piece.text for piece in pieces], last.completion


@pytest.mark.parametrize("num_at_a_time", (1, 2, 3, 5, 100))
@pytest.mark.parametrize(
    ("stop", "expected", "num_tokens"),
    [
        # What might become the first one is held back, and shown once it doesn't.
        (("naïf", "more", "END of"), "naïve ", 13),
        # The one that is complete first, though the other begins before it.
        (("END of it", "of"), "naïve END ", 13),
        (("more", "e"), "naïv", 6),
    ],
)
def test_a_text_ends_before_its_stop_string_and_none_of_it_was_shown(num_at_a_time, stop, expected, num_tokens):
    _, done = written(TEXT, stop, num_at_a_time)
    assert (done.text, done.reason, len(done.tokens)) == (expected, "stop", num_tokens)
    # The tokens go on to the one that completed it, however many came with that one.
    assert done.tokens == BYTES.encode(TEXT)[:num_tokens]
    assert done.layer_ST.ravel().tolist() == list(range(2 + num_tokens))


def test_what_is_held_back_is_the_longest_beginning():
    pieces, done = written("caaba", ("aabc",), 1)
    assert pieces == ["c", "aaba"] and done.reason == "length"


@pytest.mark.parametrize("num_at_a_time", (1, 2, 100))
def test_a_text_without_one_is_shown_whole(num_at_a_time):
    pieces, done = written(TEXT, ("ZZ",), num_at_a_time)
    assert done.text == TEXT and done.reason == "length"
    # A piece for each character where bytes come one by one; each pair of them, and what is left, completes one.
    assert len(pieces) == {1: len(TEXT), 2: 15, 100: 1}[num_at_a_time]


def test_a_text_that_the_model_ended():
    assert written(TEXT, (), 3, num_unused=4)[1].reason == "end"


def test_half_a_character_is_shown_when_nothing_comes_after_it():
    writing = Writing(0, Request((), 1), BYTES, np.zeros((2, 1)), BYTES.encode("é")[:1])
    assert writing.next_piece(is_live=True) is None
    assert writing.next_piece(is_live=False).text == "\ufffd"


def test_words_go_on_after_the_prompt():
    """A tokenizer of words writes the space before the first new one only if it knows that something stood there."""
    words = Tokenizer.of_words(("one", "two", "three"))
    one, two, three = words.encode("one two three")
    writing = Writing(0, Request((one,), 2), words, np.zeros((4, 1)), [two, three])
    assert writing.next_piece(is_live=False).text == " two three"


def test_what_no_row_can_hold_is_an_error():
    check_requests([Request((1, 2), 5)], max_positions=8)
    with pytest.raises(ConfigError, match=r"request 1: max_new_tokens=6: that makes 9 tokens .* at most 8 are allowed"):
        check_requests([Request((1, 2), 5), Request((1, 2), 6)], max_positions=8)
    with pytest.raises(ConfigError, match="request 0: max_new_tokens=0: at least 1 is needed"):
        check_requests([Request((1, 2), 0)], max_positions=8)
    with pytest.raises(ConfigError, match=f"at most {MAX_TOKENS} are allowed"):
        check_requests([Request((), MAX_TOKENS)], max_positions=0)
