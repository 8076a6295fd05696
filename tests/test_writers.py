"""What trackers are told, against fakes that record it; TensorBoard's files read back; the trace of some steps."""

import json
import re
import struct
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from radialnet import writers
from radialnet.model import abstract_params, init_params, place
from radialnet.optimizer import make_optimizer
from radialnet.run_folder import RunFolder
from radialnet.sections import ConfigError
from radialnet.trackers import check_trackers
from radialnet.train_step import init_state, jitted_train_step
from radialnet.writers import MetricsWriter
from tests.commands import lines_of, text_flags, train
from tests.tiny import VOCAB, make_batch, make_config


class FakeRun:
    """What both libraries give for `init`. Rows are those of the service, and outlive the run."""

    def __init__(self, name, rows, summary, fails_at):
        self.name, self.id = name, f"id of {name}"
        self.rows, self.summary, self.fails_at, self.ended_by = rows, summary, fails_at, None

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, figures, step=None):
        if self.fails_at == (figures.get("step") if step is None else step):
            raise ConnectionError("the network\nis away")
        self.rows.append(dict(figures) if step is None else {"step": step, **figures})
        self.summary.update(figures)

    def finish(self, exit_code=0):
        self.ended_by = exit_code


class Service(types.ModuleType):
    """A fake of the modules wandb and trackio: the runs that were begun, and the rows of each id or name."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.rows, self.summaries, self.runs = [], {}, {}, []
        self.fails_at, self.is_offline = None, False

    def install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, self.__name__, self)
        storage = types.ModuleType("sqlite_storage")
        storage.SQLiteStorage = self
        monkeypatch.setitem(sys.modules, f"{self.__name__}.sqlite_storage", storage)

    def get_logs(self, project, run, run_id):
        assert run_id == f"id of {run}"
        return self.rows[run]

    def Settings(self, **fields):
        return fields

    def Html(self, text):
        return text

    Markdown = Html

    def init(self, **arguments):
        self.calls.append(arguments)
        if self.fails_at == "init":
            raise TimeoutError
        who = arguments.get("id", arguments["name"])
        if self.is_offline:
            self.rows.pop(who, None), self.summaries.pop(who, None)
        rows, summary = self.rows.setdefault(who, []), self.summaries.setdefault(who, {})
        self.runs.append(FakeRun(who, rows, summary, self.fails_at))
        return self.runs[-1]


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    fake = Service(request.param)
    fake.install(monkeypatch)
    return fake


def line(step, split="train", ce=None):
    return {"step": step, "split": split, "ce": step / 2 if ce is None else ce, "depth_hist": [0.5], "mfu": None}


def write(folder, service, lines, resumed_step=0, names=None):
    config = make_config(log__writers=service.__name__ if names is None else names)
    with MetricsWriter(folder, config, resumed_step) as writer:
        for each in lines:
            writer.write(each, {"memory_gb": 1.0} if each["split"] == "train" else None)


def test_lines_that_a_kill_cost_trackio_are_told_again(tmp_path, monkeypatch):
    """It writes twice a second: a run that was killed and went on had a hole in its curve."""
    service = Service("trackio")
    service.install(monkeypatch)
    folder = RunFolder(tmp_path)
    write(folder, service, [line(2), line(4), line(4, "eval"), line(6), line(8)])
    (rows,) = service.rows.values()
    del rows[2:]
    write(folder, service, [line(6), line(6, "eval")], resumed_step=4)
    assert curve(service, "train/ce") == [(2, 1.0), (4, 2.0), (6, 3.0)]
    assert curve(service, "eval/ce") == [(4, 2.0), (6, 3.0)]


def curve(service, key):
    (rows,) = service.rows.values()
    return [(row["step"], row[key]) for row in rows if key in row]


def test_a_run_is_one_curve_by_split_and_key(tmp_path, service):
    folder = RunFolder(tmp_path)
    lines = [line(2), line(4), line(4, "eval", ce=float("nan")), line(6, "eval")]
    write(folder, service, lines)
    assert curve(service, "train/ce") == [(2, 1.0), (4, 2.0)] and curve(service, "eval/ce") == [(6, 3.0)]
    assert curve(service, "train/memory_gb") == [(2, 1.0), (4, 1.0)] and not curve(service, "train/mfu")
    (call,), (run,) = service.calls, service.runs
    identity = json.loads(folder.tracking.read_text())
    assert call["project"] == "radialnet" and call["config"]["model"]["d_model"] == 24 and call["resume"] == "allow"
    assert identity["id"] in (call.get("id"), call["name"].rsplit("-", 1)[-1])
    assert run.ended_by == 0
    assert [line["ce"] for line in folder.read_metrics()] == [1.0, 2.0, None, 3.0]


def test_a_killed_run_goes_on_in_its_curve_and_draws_no_step_twice(tmp_path, service):
    """Steps 5 to 8 are done again, in which a line of evaluation was not written before."""
    folder = RunFolder(tmp_path)
    write(folder, service, [line(2), line(4), line(4, "eval"), line(6), line(8)])
    again = [line(6, ce=99.0), line(6, "eval"), line(8, ce=99.0), line(8, "eval"), line(10)]
    write(folder, service, again[:2], resumed_step=4)
    # Killed again, when it had come less far than before.
    write(folder, service, again, resumed_step=4)
    assert curve(service, "train/ce") == [(2, 1.0), (4, 2.0), (6, 3.0), (8, 4.0), (10, 5.0)]
    assert curve(service, "eval/ce") == [(4, 2.0), (6, 3.0), (8, 4.0)]
    assert len({call.get("id", call["name"]) for call in service.calls}) == 1 < len(service.calls)
    # The truth is what was done last.
    assert [line["ce"] for line in folder.read_metrics()][3] == 99.0


def test_a_writer_that_was_not_there_gets_the_lines_of_before(tmp_path, service):
    folder = RunFolder(tmp_path)
    write(folder, service, [line(2), line(4)], names="")
    assert not service.calls and not folder.tracking.exists()
    write(folder, service, [line(6)], resumed_step=4)
    assert curve(service, "train/ce") == [(2, 1.0), (4, 2.0), (6, 3.0)]


def test_offline_each_start_of_wandb_has_the_whole_curve(tmp_path, monkeypatch):
    """What is uploaded replaces what was uploaded under the same id before: the first half of a run was lost."""
    service = Service("wandb")
    service.is_offline = True
    service.install(monkeypatch)
    folder = RunFolder(tmp_path)
    write(folder, service, [line(2), line(4), line(6)])
    write(folder, service, [line(6), line(8)], resumed_step=4)
    assert curve(service, "train/ce") == [(2, 1.0), (4, 2.0), (6, 3.0), (8, 4.0)]


@pytest.mark.parametrize("fails_at", ["init", 4])
def test_a_writer_that_fails_is_told_of_once_and_the_run_goes_on(tmp_path, service, fails_at, capsys):
    folder = RunFolder(tmp_path)
    service.fails_at = fails_at
    lines = [line(step) for step in (2, 4, 6)]
    write(folder, service, lines)
    assert folder.read_metrics() == lines
    (told,) = capsys.readouterr().err.splitlines()
    what = "TimeoutError" if fails_at == "init" else "the network is away"
    assert told == f"warning: config.log.writers: {service.__name__} fails ({what}); the run goes on without it"
    # What it missed it gets at the next start.
    service.fails_at = None
    write(folder, service, [line(8)], resumed_step=6)
    assert curve(service, "train/ce") == [(2, 1.0), (4, 2.0), (6, 3.0), (8, 4.0)]


def test_a_writer_that_hangs_holds_nobody_up(tmp_path, service, monkeypatch, capsys):
    monkeypatch.setattr(writers, "CLOSE_SECONDS", 0.1)
    folder = RunFolder(tmp_path)
    end = writers.threading.Event()
    monkeypatch.setattr(service, "init", lambda **_: end.wait())
    write(folder, service, [line(2)])
    assert f"{service.__name__} does not come to an end" in capsys.readouterr().err
    assert folder.read_metrics() == [line(2)]
    end.set()


def test_a_run_that_fails_says_so(tmp_path, service):
    config = make_config(log__writers=service.__name__)
    with pytest.raises(KeyError), MetricsWriter(RunFolder(tmp_path), config, 0):
        raise KeyError
    assert service.runs[0].ended_by == (1 if service.__name__ == "wandb" else 0)


def events(folder):
    """Step and event of all event files, in the order of writing: length, its checksum, event, its checksum."""
    found = []
    for path in sorted(folder.tensorboard.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found.append((event.step, event))
            data = data[16 + length :]
    # The first one of a file is its version.
    return [(step, event) for step, event in found if not event.file_version]


def test_tensorboard_reads_back_what_was_written(tmp_path):
    folder, config = RunFolder(tmp_path), make_config()
    assert config.log.writers == "tensorboard"
    with MetricsWriter(folder, config, 0) as writer:
        writer.write(line(2), {"memory_gb": 1.5})
        writer.write(line(4))
        writer.write_text("sample", "def f", 4)
    with MetricsWriter(folder, config, 2) as writer:
        writer.write(line(4))
    read = [
        (step, value.tag, value.simple_value if value.HasField("simple_value") else value.tensor.string_val[0])
        for step, event in events(folder)
        for value in event.summary.value
    ]
    assert read == [
        (2, "train/ce", 1.0), (2, "train/memory_gb", 1.5), (4, "train/ce", 2.0), (4, "sample/text_summary", b"def f"),
        (4, "train/ce", 2.0),
    ]  # fmt: skip
    # Readers forget what they have of the steps from such a mark on.
    marks = [step for step, event in events(folder) if event.session_log.status == SessionLog.START]
    assert marks == [1, 3] and not folder.tracking.exists()


def test_what_cannot_be_is_named(tmp_path, monkeypatch):
    for wrong, named in (
        ({"log__writers": "tensorboard,wandbb"}, ["'wandbb'", "tensorboard, wandb, trackio"]),
        ({"log__project": ""}, ["config.log.project=''"]),
        ({"log__profile_steps": "5"}, ["config.log.profile_steps='5'", "first,last"]),
        ({"log__profile_steps": "a,b"}, ["profile_steps='a,b'", "first,last"]),
        ({"log__profile_steps": "5,4"}, ["profile_steps='5,4'", "not before"]),
        ({"log__profile_steps": "0,4"}, ["profile_steps='0,4'", "at least 1"]),
        ({"log__profile_steps": "5,9", "train__num_steps": 8}, ["profile_steps='5,9'", "num_steps=8"]),
    ):
        with pytest.raises(ConfigError) as raised:
            make_config(**wrong)
        assert all(part in str(raised.value) for part in named)
    folder, config = RunFolder(tmp_path), make_config(log__writers=" trackio, tensorboard ")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"trackio can't be imported; pip install -r requirements-tracking\.txt"):
        check_trackers(folder, config)
    monkeypatch.setitem(sys.modules, "trackio", Service("trackio"))
    check_trackers(folder, config)
    folder.tracking.write_text("[]")
    with pytest.raises(ConfigError, match=r"tracking\.json: not a JSON object with an 'id'"):
        check_trackers(folder, config)


SCOPES = ["embed", "depth_step", "router", "layer", "attention", "mlp", "head", "loss", "optimizer"]


def scopes_in(names: str) -> set[str]:
    """The words that the names of operations are made of, as `a/transpose(jvp(b))/c`."""
    return set(re.findall(r"(?<=[/(\"])\w+(?=[/)])", names))


def test_operations_have_the_names_of_the_code():
    config = make_config(model__pool_size=4, mesh__pool=2, mesh__data=1, mesh__pool_dispatch="exchange")
    placement = place(config, VOCAB, jax.devices()[:2])
    graph, _ = abstract_params(config, VOCAB, placement.parallel)
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda: init_state(config, init_params(config, VOCAB)[1], optimizer))
    step = jitted_train_step(config, graph, optimizer, placement, state)
    lowered = step.lower(state, make_batch(config), jax.ShapeDtypeStruct((VOCAB,), jnp.int32))
    assert {*SCOPES, "exchange"} <= scopes_in(lowered.as_text(debug_info=True))


@pytest.mark.slow
def test_the_trace_of_some_steps_has_the_names_of_the_code_and_changes_no_figure(tmp_path, tmp_path_factory):
    flags = [*text_flags(tmp_path_factory), "--config.train.num_steps=4", "--config.log.every_steps=1"]
    flags += ["--config.eval.num_batches=1"]
    train(tmp_path / "run", *flags, "--config.log.profile_steps=2,3")
    train(tmp_path / "plain", *flags)
    (trace,) = (tmp_path / "run" / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert set(SCOPES) <= scopes_in(trace.read_bytes().decode("latin-1"))
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(trace)).planes for line in plane.lines]
    marks = [dict(event.stats) for line in lines for event in line.events if event.name == "train"]
    assert [mark["step_num"] for mark in marks] == [2, 3]

    def figures(name):
        timed = {"tokens_per_s", "step_ms", "mfu"}
        return [{key: value for key, value in line.items() if key not in timed} for line in lines_of(tmp_path / name)]

    assert figures("run") == figures("plain") and not (tmp_path / "plain" / "profile").exists()
    # A run that goes on after those steps traces none.
    train(tmp_path / "run", *flags, "--config.train.num_steps=5", "--config.log.profile_steps=2,3")
    assert [trace] == list((tmp_path / "run" / "profile").glob("plugins/profile/*/*.xplane.pb"))
