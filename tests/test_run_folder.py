import json

import pytest

from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError


def test_lines_of_later_steps_and_a_cut_one_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_metrics() == []
    lines = [{"step": step, "split": "train", "ce": 1.5} for step in (1, 2, 3)]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "sp')
    assert folder.read_metrics() == lines
    folder.drop_metrics_after(2)
    assert folder.read_metrics() == lines[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": ',
        b"[1]",
        b'{"split": "train"}',
        b'{"step": 2}',
        b'{"step": Infinity, "split": "train"}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_damaged_line_is_named(tmp_path, damaged):
    folder = RunFolder(tmp_path)
    line = b'{"step": 1, "split": "train"}\n'
    folder.metrics.write_bytes(line + damaged + b"\n" + line)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        folder.read_metrics()
