import json

from radialnet.files import finite


def test_what_json_has_no_word_for_becomes_null():
    found = finite({"a": float("nan"), "b": [1.5, float("-inf")], "c": {"d": float("inf"), "e": "x"}, "f": 3})
    assert found == {"a": None, "b": [1.5, None], "c": {"d": None, "e": "x"}, "f": 3}
    json.dumps(found, allow_nan=False)
