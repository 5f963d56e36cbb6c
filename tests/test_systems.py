"""What all seven systems refuse alike: images and plans that are none, a state of a training that is none."""

import math
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import srlib
from srlib import checkpoints, experiment, training

sys.path.insert(0, str(Path(__file__).parent / "faults"))
import kills

X = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
PLAN = training.TrainingPlan(2, 4)


@pytest.fixture(scope="module")
def systems():
    return {name: kills.config_of(name).build((1, 28, 28)) for name in kills.OWN}


def with_nan(x):
    return torch.cat([x[:-1], torch.full_like(x[-1:], torch.nan)])


NO_IMAGES = {
    "a list": (X.tolist(), "list"),
    "nothing": (None, "NoneType"),
    "whole numbers": ((100 * X).to(torch.int32), "int32"),
    "without channel": (X[:, 0], "shape"),
    "another side": (X[..., :24, :24], "shape"),
    "no image": (X[:0], "shape"),
    "not a number": (with_nan(X), "NaN"),
}


@pytest.mark.parametrize("system", kills.OWN)
@pytest.mark.parametrize("name", [*NO_IMAGES, "double precision", "elsewhere"])
def test_images_that_cannot_be_inferred_are_refused(system, name, systems):
    other = {"double precision": (X.double(), "float64"), "elsewhere": (X.to("meta"), "meta")}
    images, culprit = {**NO_IMAGES, **other}[name]
    with pytest.raises(ValueError, match=culprit):
        systems[system].infer(images)


@pytest.mark.parametrize("system", kills.OWN)
@pytest.mark.parametrize("name", [*NO_IMAGES, "unscaled"])
def test_images_that_cannot_be_learned_from_are_refused_before_the_first_update(system, name, systems):
    images, culprit = {**NO_IMAGES, "unscaled": (127 * (X + 1), "254|253")}[name]
    with pytest.raises(ValueError, match=culprit):
        systems[system].fit(images, PLAN, progress=False)


@pytest.mark.parametrize("system", kills.OWN)
def test_learning_needs_gradients_dense_images_and_a_folder(system, systems, tmp_path):
    (tmp_path / "file").touch()
    with torch.no_grad(), pytest.raises(ValueError, match="outside of torch.no_grad"):
        systems[system].fit(X, PLAN, progress=False)
    with pytest.raises(ValueError, match="to_dense"):
        systems[system].fit(X.to_sparse(), PLAN, progress=False)
    with pytest.raises(ValueError, match="file' is a file; name a folder"):
        systems[system].fit(X, PLAN, directory=tmp_path / "file", progress=False)


@pytest.mark.parametrize("system", kills.OWN)
def test_gradients_of_before_are_there_after_learning(system):
    learner = kills.config_of(system).build((1, 28, 28))
    given = [torch.ones_like(p) for p in learner.parameters()]
    for p, grad in zip(learner.parameters(), given):
        p.grad = grad
    learner.fit(X, PLAN, torch.Generator().manual_seed(0), progress=False)
    assert all(p.grad is grad and (grad == 1).all() for p, grad in zip(learner.parameters(), given))


@pytest.mark.parametrize("system", kills.OWN)
def test_weights_that_are_no_numbers_make_no_images_and_no_latents(system):
    broken = kills.config_of(system).build((1, 28, 28))
    with torch.no_grad():
        for p in broken.parameters():
            p.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="smaller learning rate"):
        broken.sample(2, rng=torch.Generator().manual_seed(0))
    with pytest.raises(ArithmeticError):
        broken.infer(X)


def test_a_training_goes_on_with_the_step_size_that_it_began_with_or_not_at_all(tmp_path):
    def learner(step_size):
        torch.manual_seed(0)
        return srlib.ShortRun(srlib.TopDownGenerator((2,), (1, 28, 28), 2, 7), 2, step_size, 0.3)

    learner(1e-3).fit(X, PLAN, torch.Generator().manual_seed(0), tmp_path, progress=False)
    with pytest.raises(checkpoints.CheckpointError, match="settings differ"):
        learner(2e-3).fit(X, PLAN, torch.Generator().manual_seed(0), tmp_path, progress=False)


@pytest.mark.parametrize("system", kills.OWN)
def test_a_plan_that_is_none_is_refused(system, systems):
    with pytest.raises(ValueError, match="dict"):
        systems[system].fit(X, {"n_updates": 2}, progress=False)


# --- a state of a training that was changed, with the checksum that belongs to it: (tensors, metadata) -> None ----------


def first(tensors, start, end=""):
    return next(name for name in tensors if name.startswith(start) and name.endswith(end) and tensors[name].ndim)


DAMAGES = {
    "t beyond the end": lambda t, m: m.update(t=10**6),
    "t negative": lambda t, m: m.update(t=-5),
    "t as text": lambda t, m: m.update(t="2"),
    "t true": lambda t, m: m.update(t=True),
    "no t": lambda t, m: m.pop("t"),
    "no seconds": lambda t, m: m.pop("seconds"),
    "seconds as text": lambda t, m: m.update(seconds="2"),
    "no history": lambda t, m: m.update(history={}),
    "a history of text": lambda t, m: m.update(history="loss"),
    "a longer history": lambda t, m: m["history"]["loss"].append(0.0),
    "identity as a list": lambda t, m: m.update(identity=[]),
    "no random state": lambda t, m: t.pop("rng"),
    "random state of floats": lambda t, m: t.update(rng=t["rng"].double()),
    "a short random state": lambda t, m: t.update(rng=t["rng"][:8].clone()),
    "no order": lambda t, m: t.pop("order"),
    "an image twice in the order": lambda t, m: t.update(order=torch.zeros(2, dtype=torch.int64)),
    "a loss that is no number": lambda t, m: m["history"]["loss"].__setitem__(0, math.nan),
    "a random state of zeros": lambda t, m: t["rng"].zero_(),
    "a negative number of steps": lambda t, m: t["adam.0.step"].fill_(-5),
    "seconds without end": lambda t, m: m.update(seconds=math.inf),
    "order out of range": lambda t, m: t.update(order=t["order"] + 1000),
    "no moments": lambda t, m: [t.pop(name) for name in list(t) if name.startswith("adam")],
    "a moment missing": lambda t, m: t.pop(first(t, "adam.0.", "exp_avg")),
    "a moment of another shape": lambda t, m: t.update({first(t, "adam.0.", "exp_avg"): torch.zeros(3, 5, 7)}),
    "a moment too much": lambda t, m: t.update({"adam.x.y": torch.zeros(3, 5, 7)}),
    "a weight missing": lambda t, m: t.pop(first(t, "system.generator")),
    "a weight of another shape": lambda t, m: t.update({first(t, "system.generator"): torch.zeros(3, 5, 7)}),
    "no chains": lambda t, m: t.pop("own.chains"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The directory of a training by ABP, which has chains, that was stopped before its last update."""
    folder, update = tmp_path_factory.mktemp("stopped") / "abp", training.TrainingLoop.update

    def until_stopped(loop, *given, **monitored):
        if loop.t == 2:
            raise KeyboardInterrupt
        update(loop, *given, **monitored)

    with (
        patch.object(experiment, "load", lambda name: kills.few_digits()),
        patch.object(training, "SECONDS_BETWEEN_SAVES", -1.0),
        patch.object(training.TrainingLoop, "update", until_stopped),
        pytest.raises(KeyboardInterrupt),
    ):
        experiment.run(kills.config_of("abp"), folder, progress=False)
    return folder


def goes_on(folder, monkeypatch):
    monkeypatch.setattr(experiment, "load", lambda name: kills.few_digits())
    return experiment.run(kills.config_of("abp"), folder, progress=False)


@pytest.fixture
def copy(stopped, tmp_path):
    import shutil

    return shutil.copytree(stopped, tmp_path / "abp")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_no_training_was_in_is_refused_and_kept(damage, copy, monkeypatch):
    path = training.resume_file(copy)
    tensors, metadata = checkpoints.load(path)
    DAMAGES[damage](tensors, metadata)
    checkpoints.save(path, tensors, metadata)
    content = path.read_bytes()
    with pytest.raises(checkpoints.CheckpointError, match=f"{path}.* remove it to start anew"):
        goes_on(copy, monkeypatch)
    assert path.read_bytes() == content and not (copy / "metrics.json").exists()


def test_a_flipped_bit_is_seen(copy, monkeypatch):
    path = training.resume_file(copy)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(checkpoints.CheckpointError, match="was changed"):
        goes_on(copy, monkeypatch)


def test_a_stopped_training_goes_on_and_leaves_no_temporary_files(copy, monkeypatch):
    (copy / ".model.safetensors.abc.tmp").write_bytes(b"left by a kill")
    assert goes_on(copy, monkeypatch)["scores"]["n_images"] == 10
    assert not [*copy.glob(".*.tmp")] and not training.resume_file(copy).exists()


def test_a_directory_in_which_another_process_trains_is_refused(copy, monkeypatch):
    with (
        checkpoints.locked(copy, "taken"),
        pytest.raises(checkpoints.CheckpointError, match=f"another process is at work in {copy}"),
    ):
        goes_on(copy, monkeypatch)
    goes_on(copy, monkeypatch)


# --- a finished run that is not what it says, with the checksums that belong to it --------------------------------------


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory):
    import shutil

    folder = shutil.copytree(stopped, tmp_path_factory.mktemp("finished") / "abp")
    with pytest.MonkeyPatch.context() as monkeypatch:
        goes_on(folder, monkeypatch)
    return folder


def nan_in(tensors):
    name = first(tensors, "generator")
    return {**tensors, name: tensors[name] * torch.nan}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t, c: (nan_in(t), c), "NaN"),
        (lambda t, c: ({n: v.to(torch.complex64) if v.is_floating_point() else v for n, v in t.items()}, c), "another system"),
        (lambda t, c: (dict(list(t.items())[1:]), c), "another system"),
        (lambda t, c: ({**t, "zz": torch.zeros(1)}, c), "zz differ"),
        (lambda t, c: (t, {**c, "channels": 1500}), "another system"),  # before its memory is asked for
        (lambda t, c: (t, {**c, "channels": 10**6}), "no configuration: the system would hold"),
        (lambda t, c: (t, {**c, "sigma": 10**400}), "no configuration: sigma"),
        (lambda t, c: (t, {**c, "nonsense": 1}), "nonsense"),
        (lambda t, c: (t, {}), "lacks a name"),
    ],
)  # fmt: skip
def test_a_run_with_other_weights_or_no_configuration_is_refused(change, told, finished, tmp_path, monkeypatch):
    import shutil

    folder = shutil.copytree(finished, tmp_path / "abp")
    monkeypatch.setattr(experiment, "load", lambda name: kills.few_digits())
    path, metrics = folder / "model.safetensors", checkpoints.read_json(folder / "metrics.json")
    tensors, metadata = checkpoints.load(path)
    tensors, metrics["config"] = change(tensors, metrics["config"])
    checkpoints.save(path, tensors, metadata)
    metrics["files"][path.name] = srlib.provenance.file_hash(path)
    metrics.pop("checksum")
    checkpoints.write_json(folder / "metrics.json", metrics)
    with pytest.raises(checkpoints.CheckpointError, match=told):
        experiment.load_run(folder)
