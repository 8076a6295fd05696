"""Lines of a run that goes on, and their alarms."""

import json

import jax.numpy as jnp
import pytest
import rich.console

from radialnet.cli import AlarmError
from radialnet.metrics import BatchSums
from radialnet.progress import Progress
from radialnet.run_folder import RunFolder
from radialnet.train_log import TrainLog
from radialnet.writers import MetricsWriter
from tests.runs import LINE, SICK
from tests.tiny import VOCAB, make_config, zero_sums


def lines_after(tmp_path, before, **log):
    """What a TrainLog writes of a step in which no token did anything, after the lines of before."""
    config = make_config(log__every_steps=1, train__num_steps=600, **log)
    zero, folder = jnp.float32(0), RunFolder(tmp_path)
    losses = dict.fromkeys(("loss", "ce", "loss_load", "loss_depth", "loss_router_z"), zero)
    sums = BatchSums(losses, zero + 1, zero + 1, zero_sums(3, 5).replace(num_tokens=zero + 1))
    scalars = dict.fromkeys(
        ("exit_bias", "depth_target", "grad_norm", "router_grad_norm", "lr", "skipped_steps", "skipped_in_a_row"), zero
    )
    console = rich.console.Console(quiet=True)
    with MetricsWriter(folder, config, 0) as writer, Progress(console, 0, 600) as progress:
        window = {"sums": sums, "num_steps": 0, "seconds": 0.0}
        log = TrainLog(config, VOCAB, writer, progress, sums, window, before)
        log.add(501, sums, scalars)
        log.flush()
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


SICK_LINES = [{**LINE, **SICK["load_entropy"], **SICK["depth"]}] * 5


def test_alarms_go_on_where_the_lines_before_left_them(tmp_path, capsys):
    (line,) = lines_after(tmp_path, SICK_LINES)
    # Those that the line before had raised are no news.
    assert "load_entropy" in line["alarms"] and "load_entropy" not in capsys.readouterr().err


def test_alarms_that_are_off_stay_off(tmp_path, capsys):
    (line,) = lines_after(tmp_path, SICK_LINES, log__alarms="off")
    assert line["alarms"] == [] and capsys.readouterr().err == ""


def test_alarms_that_stop(tmp_path):
    with pytest.raises(AlarmError, match="step 501: .*few layers are used"):
        lines_after(tmp_path, SICK_LINES, log__alarms="stop")


def test_memory_that_grows_is_told_but_is_none_of_the_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("radialnet.train_log.MemoryWatch.look", lambda watch: (9.0, "memory grows"))
    (line,) = lines_after(tmp_path, [LINE] * 5)
    assert line["alarms"] == [] and "warning: step 501: memory: memory grows" in capsys.readouterr().err
    with pytest.raises(AlarmError, match="memory grows"):
        lines_after(tmp_path, [LINE] * 5, log__alarms="stop")
