"""Small texts, and configs that read such."""

from radialnet.tokenizer import SEPARATOR
from tests.tiny import make_config

SEQ = 7
TEXTS = ["def f(x):\n    return x + 1\n", "é ünïcode ☃", "a", SEPARATOR + " quoted", "lines\n" * 9]


def config_of(source, path, cache, **overrides):
    fields = {"data__eval_fraction": 0.4, "data__tokenizer": "byte", "train__seq_len": SEQ, **overrides}
    return make_config(data__source=source, data__path=str(path), data__cache_dir=str(cache), **fields)
