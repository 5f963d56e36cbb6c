"""The short form of the fault tests: `make fault-test` kills every system at every moment and damages a hundred thousand files."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))
import everything
import kills
import readers
import run_all


@pytest.mark.parametrize("name", readers.READERS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    with readers.limited_memory():
        counts = readers.fuzz(readers.READERS[name], 80, 1, tmp_path)
    assert counts.total() == 80 and counts["refused"] > 0


@pytest.mark.parametrize(
    "wrong",
    [KeyError("size"), readers.data.DataError("somewhere"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_another_ending_is_found(wrong, tmp_path):
    """The fuzzer sees an exception that is not the reader's, one that names no file, and memory asked for too early."""

    def read(path):
        try:
            raise wrong
        except MemoryError as error:
            raise readers.data.DataError(path.name) from error

    with pytest.raises((KeyError, readers.WrongEnding)):
        readers.fuzz(replace(readers.READERS["images-idx3-ubyte"], read=read), 1, 0, tmp_path)


@pytest.fixture(scope="module")
def prepared():
    with kills.small_and_eager(kills.OWN):
        yield


@pytest.mark.parametrize("system", kills.OWN)
def test_a_killed_run_ends_as_one_left_alone(system, prepared, tmp_path):
    """Killed at two moments and at a random time, in one life."""
    config, rng = kills.config_of(system), np.random.default_rng(0)
    expected, moments, seconds = kills.left_alone(config, tmp_path / "alone")
    early, late = sorted(int(n) for n in rng.integers(1, moments, 2))
    sittings = [{"last": early}, {"seconds": 0.5 * seconds}, {"last": late}]
    assert kills.survives(config, expected, tmp_path / "killed", sittings) >= 1


def test_a_run_that_goes_on_otherwise_is_found(prepared, tmp_path, monkeypatch):
    """What the fault tests are for: random numbers that are not restored end in other bits."""
    config = kills.config_of("vae")
    expected, *_ = kills.left_alone(config, tmp_path / "alone")
    restore = kills.training.TrainingLoop._restore
    monkeypatch.setattr(kills.training.TrainingLoop, "_restore", lambda loop, *saved: (restore(loop, *saved), loop.rng.manual_seed(5)))  # fmt: skip
    with pytest.raises(kills.Different):
        kills.survives(config, expected, tmp_path / "killed", [{"last": 20}])


def test_run_all_is_killed_and_goes_on(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "KILLS", 2)
    expected = run_all.left_alone(run_all.new_project(tmp_path / "alone" / "project"))
    project = run_all.new_project(tmp_path / "killed" / "project")
    assert run_all.killed(project, expected, np.random.default_rng(0)) >= 2


def test_every_program_of_the_long_form_has_its_command(tmp_path):
    work = everything.commands(0, tmp_path)
    assert {name.removeprefix("kills ") for name in work if name.startswith("kills ")} == set(kills.OWN)
    assert {name.removeprefix("reader ") for name in work if name.startswith("reader ")} == set(readers.READERS)
    assert sum(everything.shares().values()) >= 100_000
    assert all(Path(command[1]).exists() for command in work.values() if command[1] != "-m")


def test_the_choices_of_arguments_are_counted(tmp_path):
    """By what Hypothesis says today: an earlier version said it otherwise, and nothing was counted."""
    (tmp_path / "test_x.py").write_text(
        "from hypothesis import given, settings, strategies as st\n"
        "@settings(max_examples=7)\n@given(st.integers())\ndef test_a(n): pass\ndef test_b(): pass\n"
    )
    command = [*everything.PYTEST, "--hypothesis-show-statistics", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert everything.arguments(done.stdout) == {"properties": 1, "examples": 7}
    with pytest.raises(ValueError, match="has not told"):
        everything.arguments("2 passed")
