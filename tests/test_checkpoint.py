"""Checkpoints that are broken in every way, with real files."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet import checkpoint
from radialnet.checkpoint import Checkpoints
from radialnet.run_folder import CHECKSUMS, has_checkpoint, saved_steps
from radialnet.sections import ConfigError


def trees_of(step):
    return {
        "params": {"w": jnp.arange(35, dtype=jnp.float32).reshape(5, 7) * step, "b": jnp.full(3, step, jnp.bfloat16)},
        "optimizer": {"m": jnp.full((2, 3), step, jnp.float32)},
    }


def save(folder, *steps, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, trees_of(step))


def newest(folder):
    """The newest step that is whole, after it was restored and found to be what was saved; and what was reported."""
    lines = []
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.newest(lines.append)
        if step is not None:
            restored = checkpoints.restore(step, trees_of(0))
            jax.tree.map(np.testing.assert_array_equal, restored, trees_of(step))
    return step, lines


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, 3, 5)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_what_was_saved_is_restored(folder):
    assert newest(folder) == (5, []) and saved_steps(folder) == [5, 3]


def test_a_flipped_bit_in_any_file_and_any_file_that_is_gone_or_cut_short_are_found(saved, tmp_path, caplog):
    files = sorted(path.relative_to(saved) for path in (saved / "5").rglob("*") if path.is_file())
    assert len(files) > 10 and Path("5") / CHECKSUMS in files
    rng = np.random.default_rng(0)
    for number, file in enumerate(files):
        for kind in ("bit", "gone", "short"):
            folder = shutil.copytree(saved, tmp_path / f"{number}{kind}")
            content = bytearray((folder / file).read_bytes())
            if kind == "gone":
                (folder / file).unlink()
            elif not content:
                (folder / file).write_text("x")
            elif kind == "short":
                (folder / file).write_bytes(content[: len(content) // 2])
            else:
                at = int(rng.integers(len(content)))
                content[at] ^= 1 << int(rng.integers(8))
                (folder / file).write_bytes(content)
            step, lines = newest(folder)
            assert step == 3 and len(lines) == 1 and lines[0].endswith("; step 3 is taken instead"), (file, kind)
            what = "is gone" if kind == "gone" else "is not what was saved"
            if file.name != CHECKSUMS:
                assert f"{folder / '5'}: {Path(*file.parts[1:])} {what}" in lines[0]
    assert not caplog.records, "one line for each, and Orbax adds nothing"


def test_a_flipped_bit_of_the_checksums_themselves_is_found_wherever_it_is(folder):
    """One of them makes `optimizer/…` a path from the root."""
    path = folder / "5" / CHECKSUMS
    content = path.read_bytes()
    with Checkpoints(folder) as checkpoints:
        for at in range(0, len(content), 3):
            for bit in (0, 3, 6, 7):
                broken = bytearray(content)
                broken[at] ^= 1 << bit
                path.write_bytes(broken)
                assert checkpoints.newest([].append) == 3, (at, bit, bytes(broken[max(at - 9, 0) : at + 9]))


def test_folders_that_are_no_checkpoint(folder, tmp_path):
    (folder / "9").mkdir()
    (folder / "7").write_text("a file")
    (folder / "notes").mkdir()
    shutil.copytree(folder / "5", folder / "8.bak")
    (folder / "06").mkdir()
    (folder / "²").mkdir()
    step, lines = newest(folder)
    assert step == 5 and len(lines) == 1 and "9: its save was not finished" in lines[0]
    # Nothing was ever saved to the end: a run that was killed in its first save starts anew.
    shutil.rmtree(folder / "5")
    shutil.rmtree(folder / "3")
    step, lines = newest(folder)
    assert step is None and all("there is no older one" in line for line in lines)
    assert newest(tmp_path / "nothing") == (None, [])


def test_steps_of_before_checksums_are_taken_as_they_are(folder):
    for step in (3, 5):
        (folder / str(step) / CHECKSUMS).unlink()
    (folder / "7").mkdir()
    step, lines = newest(folder)
    assert step == 5 and has_checkpoint(folder) and not saved_steps(folder)
    assert f"{folder / '5'}: has no checksums.json; taken as it is" in lines and "7: its save" in lines[1]
    save(folder, 9)
    (folder / "9" / "params" / "_METADATA").write_text("{}")
    # Where one has checksums, one without is none that was finished.
    with pytest.raises(ConfigError, match="9: params/_METADATA is not what was saved"):
        newest(folder)


def test_checksums_that_name_nothing_are_not_those_that_were_saved(folder):
    for text in ("{}", "[]", "7"):
        (folder / "5" / CHECKSUMS).write_text(text)
        step, lines = newest(folder)
        assert step == 3 and "is not what was saved" in lines[0]


def test_nothing_is_gone_on_from_when_nothing_is_whole(folder):
    for step in (3, 5):
        (folder / str(step) / "params" / "_METADATA").write_text("{}")
    with pytest.raises(ConfigError, match="5: params/_METADATA is not what was saved, and there is no older"):
        newest(folder)


def test_a_broken_step_is_saved_again(folder):
    (folder / "5" / "params" / "_METADATA").write_text("{}")
    (folder / "6").mkdir()
    (folder / "7").write_text("a file")
    save(folder, 5, 6, 7)
    assert newest(folder) == (7, []) and saved_steps(folder) == [7, 6, 5, 3]


def test_a_broken_step_is_gone_before_orbax_looks_for_it(folder, monkeypatch):
    """For each of its processes would, and one that comes too late would wait for the others for ever."""
    (folder / "5" / "params" / "_METADATA").write_text("{}")
    (folder / "6").symlink_to(folder / "3")
    there, save_async = [], checkpoint.ocp.save_checkpointables_async

    def looking(path, *args, **kwargs):
        there.append(path.exists() or path.is_symlink())
        return save_async(path, *args, **kwargs)

    monkeypatch.setattr("radialnet.checkpoint.ocp.save_checkpointables_async", looking)
    save(folder, 5, 6)
    assert there == [False, False] and newest(folder) == (6, []) and saved_steps(folder) == [6, 5, 3]


def test_which_steps_are_kept(tmp_path):
    save(tmp_path / "a", 10, 20, 25, 30, 35, keep=2, keep_every=20)
    assert saved_steps(tmp_path / "a") == [35, 30, 20] and not (tmp_path / "a" / "10").exists()
    save(tmp_path / "a", 40, keep=1)
    assert saved_steps(tmp_path / "a") == [40]


def test_a_broken_step_is_none_of_those_that_are_kept(tmp_path):
    save(tmp_path, 10, 20, 30)
    (tmp_path / "30" / "params" / "_METADATA").write_text("{}")
    (tmp_path / "15").mkdir()
    save(tmp_path, 25, keep=2)
    assert saved_steps(tmp_path) == [25, 20] and not (tmp_path / "15").exists()


def test_a_save_that_fails_is_told_at_the_next_look(folder, monkeypatch):
    with Checkpoints(folder, keep=1) as checkpoints:
        monkeypatch.setattr("radialnet.checkpoint.write_whole", failing)
        checkpoints.save(8, trees_of(8))
        with pytest.raises(ConfigError, match=r"8: can't be saved \(No space left on device\)"):
            checkpoints.check(wait=True)
        monkeypatch.undo()
    # Of what there was nothing goes for a step that was not saved.
    step, lines = newest(folder)
    assert saved_steps(folder) == [5, 3]
    assert step == 5 and "8: its save was not finished" in lines[0]


def failing(path, text):
    raise OSError(28, "No space left on device", str(path))
