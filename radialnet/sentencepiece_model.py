"""Models of SentencePiece (arXiv 1808.06226) as tokenizers of the library that all others are of."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from radialnet.sections import ConfigError

_SPACE = "▁"  # Which stands for one in the names of pieces.
_SPACES = (r"\A +| +\z", ""), (" {2,}", " ")


def converted(path: Path) -> tokenizers.Tokenizer:
    """A `.model` file, a unigram or BPE model, with the ids and the normalisation that it has; but pieces that a user
    defined are not kept whole where the model would write their text otherwise.

    Raises:
        ConfigError: it can't be read, or is of another kind; or the library `sentencepiece` is not there.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError:
        raise ConfigError(f"{path}: a model of SentencePiece needs `pip install sentencepiece protobuf`") from None
    model = proto.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # Of protobuf, which may be one of several implementations.
        raise ConfigError(f"{path}: not a model of SentencePiece ({error})") from None
    kinds = {proto.TrainerSpec.UNIGRAM: _unigram, proto.TrainerSpec.BPE: _bpe}
    if not model.pieces or model.trainer_spec.model_type not in kinds:
        raise ConfigError(f"{path}: a unigram or BPE model of SentencePiece is needed")
    try:
        return _built(kinds[model.trainer_spec.model_type](model), model, proto)
    except Exception as error:  # The library raises no class of its own.
        raise ConfigError(f"{path}: a model of SentencePiece that goes against itself ({error})") from None


def _built(core: models.Model, model, proto) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(core)
    spec = model.normalizer_spec
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        # Spaces alone: line ends and tabs are text.
        steps += [normalizers.Replace(tokenizers.Regex(pattern), with_) for pattern, with_ in _SPACES]
    if spec.add_dummy_prefix:
        # Here, for Metaspace adds none to a text that begins with a space.
        steps += [normalizers.Prepend(_SPACE)]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    # What the model learned of pieces across spaces it learned with the text whole.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "never", split=model.trainer_spec.split_by_whitespace)
    prepend = "always" if spec.add_dummy_prefix else "never"
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(_SPACE, prepend, split=True)])
    control = [piece.piece for piece in model.pieces if piece.type == proto.ModelProto.SentencePiece.CONTROL]
    tokenizer.add_special_tokens(control)
    return tokenizer


def _unigram(model) -> models.Unigram:
    vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    return models.Unigram(vocabulary, model.trainer_spec.unk_id, byte_fallback=model.trainer_spec.byte_fallback)


def _bpe(model) -> models.BPE:
    """Its merges are not in the file: they are all pairs of pieces that make a piece, in the order of the pieces."""
    vocabulary = {piece.piece: token for token, piece in enumerate(model.pieces)}
    merges = []
    for name, token in vocabulary.items():
        pairs = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        pairs = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        merges += [(token, vocabulary[left], vocabulary[right], left, right) for left, right in pairs]
    merges = [(left, right) for *_, left, right in sorted(merges)]
    if not 0 <= model.trainer_spec.unk_id < len(vocabulary):
        raise ValueError(f"unk_id={model.trainer_spec.unk_id} of {len(vocabulary)} pieces")
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    byte_fallback = model.trainer_spec.byte_fallback
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
