import io
import re
from pathlib import Path

import numpy as np
import pytest

from radialnet.routes import PART_OF_CHARACTER, shown_tokens
from radialnet.sections import ConfigError
from radialnet.tokenizer import Tokenizer
from tests.texts import TEXTS

sentencepiece = pytest.importorskip("sentencepiece")

TEXT = [line for line in Path(__file__).with_name("test_data.py").read_text().splitlines() if line.strip()]
MORE = [*TEXT, *TEXTS, "  two  spaces\tand a tab ", "ﬁ ﬀ Å １２", "emoji 🙂 and 漢字", ""]
# What the names of pieces look like is text, and so is what stands around it.
MORE += ["x = a</s>b <s> <unk>", "a <0x41> b", "\n\nx = 1\n\n", "\tx ", "  \n x"]


def train(path, text=TEXT, **options):
    model = io.BytesIO()
    options = {"vocab_size": 400, "character_coverage": 0.999, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **options)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


CASES = {
    "unigram": {"model_type": "unigram"},
    "unigram, bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 600},
    "bpe, bytes": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 600},
    "as llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 600,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "no prefix": {"model_type": "unigram", "add_dummy_prefix": False},
    "unigram, as it is": {"model_type": "unigram", "normalization_rule_name": "identity"},
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_library(case, tmp_path):
    theirs = train(tmp_path / "tokenizer.model", **CASES[case])
    ours = Tokenizer.load(tmp_path / "tokenizer.model")
    assert ours.vocab_size == theirs.vocab_size() and ours.separator_id == theirs.eos_id()
    for text in MORE:
        assert ours.encode(text) == theirs.encode(text), text
        if "bytes" in case or case == "as llama":
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    ours.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(MORE[-2]) == theirs.encode(MORE[-2])


@pytest.mark.parametrize("has_bytes", [False, True])
def test_names_of_pieces_are_text_where_no_piece_spells_them(has_bytes, tmp_path):
    """A character that is unknown costs more than any piece, those that must not be taken too."""
    prose = [re.sub("[<>]", "", line) for line in TEXT]
    theirs = train(tmp_path / "tokenizer.model", prose, model_type="unigram", byte_fallback=has_bytes, vocab_size=600)
    ours = Tokenizer.load(tmp_path / "tokenizer.model")
    for text in ("a </s> b", "a<s>b", "a <0x41> b<unk>", "a < b"):
        assert ours.encode(text) == theirs.encode(text), text


def test_what_goes_on_keeps_its_first_space(tmp_path):
    """A new text begins without the space that its first piece has."""
    train(tmp_path / "tokenizer.model", **CASES["as llama"])
    ours = Tokenizer.load(tmp_path / "tokenizer.model")
    ids, size = ours.encode("def train config"), len(ours.encode("def"))
    assert ours.decode(ids[size:]) == "train config"
    assert ours.decode(ids[size:], after=ids[:size]) == " train config"
    assert ours.decode(ids, after=[ours.separator_id]) == "def train config"


def test_bytes_are_characters_as_soon_as_they_are_all_there(tmp_path):
    """The library reads a run of them all together; where one is missing it finds no character in it."""
    train(tmp_path / "tokenizer.model", **CASES["as llama"])
    ours = Tokenizer.load(tmp_path / "tokenizer.model")
    before, text = ours.encode("x 漢"), "🙂漢é!🙂"
    ids = ours.encode("x 漢" + text)
    assert ids[: len(before)] == before and ours.decode(ids[len(before) :], after=before) == text
    ids, ends = ids[len(before) :], np.cumsum([len(character.encode()) for character in text]).tolist()
    assert len(ids) == ends[-1]
    names = ours._tokenizer.get_vocab()
    stray = names["<0x80>"]
    assert ours.decode([*ids[:4], stray, *ids[4:7]], after=before) == "🙂\ufffd漢", "one that is none costs no other"
    shown = shown_tokens(ours, np.array([*before, *ids]), np.zeros((1, len(before) + len(ids)), int), 1)
    assert "".join(token.text for token in shown if token.text != PART_OF_CHARACTER) == "x 漢" + text
    for num in range(len(ids) + 1):
        whole = sum(end <= num for end in ends)
        found = ours.decode(ids[:num], after=before)
        assert found == text[:whole] + "\ufffd" * (num not in (0, *ends)), num


def test_bytes_are_counted(tmp_path):
    """Those of the text, and of the space before it."""
    train(tmp_path / "tokenizer.model", **CASES["as llama"])
    ours = Tokenizer.load(tmp_path / "tokenizer.model")
    for text in filter(None, MORE):
        assert ours.bytes_per_token[ours.encode(text)].sum() == 1 + len(text.encode())
    assert ours.bytes_per_token[ours.separator_id] == 0


def test_a_file_that_is_none(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    path = tmp_path / "tokenizer.model"
    for case in ("unigram", "bpe, bytes"):
        train(path, **CASES[case])
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        model.trainer_spec.unk_id = 9999
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ConfigError, match="tokenizer.model: a model of SentencePiece that goes against itself"):
            Tokenizer.load(path)
    for content in (b"", b"\xff\xff\xff", b"{}"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="tokenizer.model: "):
            Tokenizer.load(path)
