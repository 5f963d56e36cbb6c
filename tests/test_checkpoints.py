"""Files that are either whole or refused."""

import json
import os
import stat

import pytest
import torch

from srlib import checkpoints, provenance
from srlib.checkpoints import CheckpointError


def test_tensors_and_metadata_come_back(tmp_path, device):
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.arange(6).reshape(2, 3).T,
        "c": torch.tensor(1.5, dtype=torch.float64),
    }
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    checkpoints.save(tmp_path / "x.safetensors", tensors, {"t": 3, "names": ["ä"]})
    loaded, metadata = checkpoints.load(tmp_path / "x.safetensors", str(device))
    assert metadata == {"t": 3, "names": ["ä"]}
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoints.load(path)
    checkpoints.save(path, {"a": torch.randn(100)}, {})
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-10], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="x.safetensors"):
            checkpoints.load(path)


def test_what_is_renamed_is_on_the_disk_before(tmp_path, monkeypatch):
    """A power cut leaves the old file or the new one: the content is flushed, then renamed, then the folder is flushed."""
    done, replace, fsync = [], checkpoints.os.replace, checkpoints.os.fsync

    def flushed(descriptor):
        done.append("folder" if stat.S_ISDIR(checkpoints.os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(checkpoints.os, "fsync", flushed)
    monkeypatch.setattr(checkpoints.os, "replace", lambda *paths: (done.append("rename"), replace(*paths)))
    checkpoints.atomic_write(tmp_path / "x", b"content")
    assert done == ["file", "rename", "folder"]


def test_a_changed_tensor_is_seen(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(3), "b": torch.ones(2, 2).bfloat16(), "c": torch.zeros(0)}
    checkpoints.save(path, tensors, {"t": (1, 2), 10: "a", 9: "b"})
    whole = bytearray(path.read_bytes())
    assert checkpoints.load(path)[1] == {"t": [1, 2], "10": "a", "9": "b"}
    for _ in range(5):  # the same bits each time
        checkpoints.save(path, tensors, {"t": (1, 2), 10: "a", 9: "b"})
        assert path.read_bytes() == whole
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="x.safetensors was changed"):
        checkpoints.load(path)


def test_tensors_that_share_their_memory_are_saved(tmp_path):
    a = torch.arange(6.0)
    checkpoints.save(tmp_path / "x.safetensors", {"a": a, "b": a[:3], "c": a}, {})
    assert checkpoints.load(tmp_path / "x.safetensors")[0]["b"].tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        checkpoints.save(tmp_path / "y.safetensors", {"a": a}, {"t": a})


def test_what_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """The advice to delete a file is for one that was read; a folder stands for every error of the system."""
    for name, read in (("x.json", checkpoints.read_json), ("x.safetensors", checkpoints.load)):
        (tmp_path / name).mkdir()
        with pytest.raises(IsADirectoryError):
            read(tmp_path / name)
        with pytest.raises(CheckpointError, match="there is no"):
            read(tmp_path / "nowhere" / name)
    monkeypatch.setattr(checkpoints, "LARGEST_JSON", 10)
    checkpoints.write_json(tmp_path / "y.json", {"a": 1})
    with pytest.raises(CheckpointError, match="y.json is longer than 10 bytes"):
        checkpoints.read_json(tmp_path / "y.json")


def test_a_lock_is_held_by_one_and_ends_with_it(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "new" / "x.lock"):
        for _ in range(2):
            with (
                checkpoints.locked(path, "busy"),
                pytest.raises(CheckpointError, match="busy; wait"),
                checkpoints.locked(path, "busy"),
            ):
                pass
    assert not [*(tmp_path).glob("*.lock")]

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)  # a disk that has none
    with checkpoints.locked(tmp_path, "busy"):
        pass


def test_numbers_without_end_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    for text in ("1:" * 300_000 + "1", "0x" + "f" * 5000, "9" * 5000, "1." + "0" * 5000):
        path.write_text(f"seed: {text}\n")
        with pytest.raises(CheckpointError, match=r"x.yaml .*a number of \d+ characters"):
            checkpoints.read_yaml(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    checkpoints.write_json(path, {"a": 1})

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        checkpoints.write_json(path, {"a": 2})
    assert checkpoints.read_json(path)["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_edited_results_are_refused(tmp_path):
    path = tmp_path / "metrics.json"
    checkpoints.write_json(path, {"mse": 0.031, "dims": (1, 2)})
    assert checkpoints.read_json(path)["dims"] == [1, 2]
    edited = json.loads(path.read_text()) | {"mse": 0.011}
    path.write_text(json.dumps(edited))
    with pytest.raises(CheckpointError, match=r"metrics\.json was edited"):
        checkpoints.read_json(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        checkpoints.read_json(path)
    with pytest.raises(CheckpointError, match="there is no result"):
        checkpoints.read_json(tmp_path / "other.json")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoints.write_json(path, {"mse": float("nan")})


def test_what_a_run_imports_is_found_without_importing():
    assert "srlib.plots" not in provenance.imported_modules(["srlib.experiment"])
    reached = provenance.notebook_modules(["import srlib", "srlib.short_run(posterior)"])
    assert "srlib.langevin" in reached and "srlib.closed_form" not in reached


def test_the_source_hash_is_blind_to_comments_and_sees_code(tmp_path, monkeypatch):
    import shutil

    copy = tmp_path / "srlib"
    shutil.copytree(provenance.LIBRARY, copy)
    monkeypatch.setattr(provenance, "LIBRARY", copy)
    before = provenance.source_hash(["srlib.langevin"])
    path = copy / "langevin.py"
    path.write_text("# a comment\n" + path.read_text().replace("Short run MCMC:", "Short runs:"))
    assert provenance.source_hash(["srlib.langevin"]) == before
    path.write_text(path.read_text().replace("noise_scale**2 / 2", "noise_scale**2 / 3"))
    assert provenance.source_hash(["srlib.langevin"]) != before


def test_a_failed_write_names_the_file(tmp_path):
    (tmp_path / "folder").write_text("")
    with pytest.raises(OSError, match=r"what was there before stays .*folder/x\.json"):
        checkpoints.write_json(tmp_path / "folder" / "x.json", {"a": 1})


@pytest.mark.parametrize("read", [checkpoints.read_json, checkpoints.read_yaml, checkpoints.load])
def test_a_pipe_is_refused_before_it_is_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe or a device"):
        read(tmp_path / "pipe")


def test_a_device_that_is_not_there_does_not_call_the_file_damaged(tmp_path):
    checkpoints.save(tmp_path / "x", {"a": torch.zeros(2)}, {})
    for device in ("nowhere", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=f"device='{device}'.*is whole") as told:
            checkpoints.load(tmp_path / "x", device)
        assert not isinstance(told.value, CheckpointError)
