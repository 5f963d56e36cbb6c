"""Several processes train and score as one, whatever the system; one writes; they can be killed; the failure of one ends all.

This file is also the program that does so: `python test_distributed.py FOLDER` runs each job below in two processes.
"""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.run

from srlib import checkpoints, data, distributed, experiment, generators, training
from srlib.training import TrainingLoop, resume_file

sys.path.insert(0, str(Path(__file__).parent / "faults"))
import forks

TINY = dict(latent_dims=[2, 3], channels=4, n_steps=2, n_updates=20, batch_size=8, n_samples=40)
SYSTEMS = {
    "short_run": dict(step_size_search="grid", every=6, search_images=6),
    "tuned_short_run": dict(step_size_search="descent", every=10, search_images=6),
    "vae": {},
    "ladder_vae": {},
    "iaf": dict(options=dict(n_flows=2, hidden=8)),
    "abp": {},
    "glo": dict(latent_dims=[5], options=dict(n_pca=30, inference_steps=5, n_starts=2)),
    "glow": dict(options=dict(n_levels=1, depth=2, width=8)),
}
CONFIGS = {system: TINY | own | dict(name=system, system=system) for system, own in SYSTEMS.items()}
# What is learned by slopes of the objective, small differences of large numbers in float32, is the same with tolerances so many times larger.
LOOSER = {"tuned_short_run": 10}
KILLED_AT = 7


@functools.cache
def few_digits(name):
    """40 training images, which are 5 batches, and 31 test images, which two processes cannot share evenly."""
    digits = data.load(name)
    train, test = (replace(s, images=s.images[:n], labels=None) for s, n in ((digits.train, 40), (digits.test, 31)))
    return replace(digits, train=train, validation=test, test=test)


def run(system, output):
    return experiment.run(experiment.Config.from_dict(CONFIGS[system]), output, progress=False)


def before_update(t, act):
    """From now on the trainings of this process call `act` before update t, and save after each."""
    training.SECONDS_BETWEEN_SAVES, update = -1.0, TrainingLoop.update

    def acting(loop, loss, **monitored):
        if loop.t == t:
            act()
        update(loop, loss, **monitored)

    TrainingLoop.update = acting


# --- what two processes do -------------------------------------------------------------------------------------------


def be_killed(root):
    before_update(KILLED_AT, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with distributed.processes():
        run("short_run", root / "killed")


def train_all(root):
    with distributed.processes():
        for system in CONFIGS:
            run(system, root / system)
        one_column = torch.full((3, 2), float(torch.distributed.get_rank()))[:, 0]
        distributed.agree([one_column])
        assert (one_column == 0).all(), "the second process has another value than the first"
        before_update(KILLED_AT - 1, lambda: sys.exit("it began again"))
        run("short_run", root / "killed")


def fail_in_the_second(root):
    def diverge():
        if not distributed.is_first():
            raise FloatingPointError("the second process has met a number that is none")

    before_update(2, diverge)
    path = root / "config.yaml"
    path.write_text(json.dumps(CONFIGS["vae"]))
    experiment.main([str(path), "--output", str(root / "failed")])


def as_process(rank, port, job, root):
    os.environ |= dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank)
    )
    os.dup2(os.open(root / f"{job.__name__}.{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    if rank:
        checkpoints.atomic_write = None  # whoever calls it fails
    job(root)


def in_two_processes(job, root):
    """Their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked = multiprocessing.get_context("fork")
    pair = [forked.Process(target=as_process, args=(rank, port, job, root)) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(300)
        process.kill()
    return [process.exitcode for process in pair]


def main(root):
    experiment.load = few_digits
    # imports and images that take long, once for all: the processes are forks of this one
    import pytorch_fid.inception  # noqa: F401

    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    few_digits("digits")
    run("short_run", root / "alone")
    codes = {"be_killed": in_two_processes(be_killed, root)}
    shutil.copytree(root / "killed", root / "moved")
    for job in (train_all, fail_in_the_second):
        codes[job.__name__] = in_two_processes(job, root)
    (root / "codes.json").write_text(json.dumps(codes))


# --- what came of it -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(root)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(experiment, "load", few_digits)


def tensors_of(output):
    """The state of the system, with covariances in the place of their factors.

    Where directions spread nearly alike, rounding turns the factor that a singular value decomposition gives.
    """
    tensors = checkpoints.load(output / "model.safetensors")[0]
    return {name: t @ t.T if name.endswith("_scale") and t.ndim == 2 else t for name, t in tensors.items()}


def numbers_of(scores, prefix=""):
    """The numbers among nested scores, by their paths."""
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield prefix + name, value


def assert_same(output, expected, looser=1):
    """The run in `output` is that in `expected` but for rounding: parameters, history and scores."""
    ours, theirs = tensors_of(output), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        close = {"rtol": 0, "atol": 1e-5 * looser, "msg": lambda m, name=name: f"{name}: {m}"}
        torch.testing.assert_close(ours[name], theirs[name], **close)
    ours, theirs = (checkpoints.read_json(path / "history.json")["history"] for path in (output, expected))
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"search_seconds"}:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4 * looser), name
    ours, theirs = (checkpoints.read_json(path / "metrics.json")["scores"] for path in (output, expected))
    assert dict(numbers_of(ours)) == pytest.approx(dict(numbers_of(theirs)), rel=1e-3 * looser)


def test_another_process_gives_the_same_bits(root, tmp_path, few_images):
    """Another interpreter, whose hashes of strings, addresses and order of imports are others."""
    here, there = tmp_path, root / "alone"
    run("short_run", here)
    assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()
    for file, entry in (("history.json", "history"), ("metrics.json", "scores")):
        ours, theirs = (checkpoints.read_json(output / file)[entry] for output in (here, there))
        assert ours | {"search_seconds": 0} == theirs | {"search_seconds": 0}


def test_two_processes_are_one(root, tmp_path, few_images):
    assert json.loads((root / "codes.json").read_text())["train_all"] == [0, 0], (root / "train_all.0").read_text()
    for system in CONFIGS:
        assert run(system, tmp_path / system)["environment"]["processes"] == 1
        assert checkpoints.read_json(root / system / "metrics.json")["environment"]["processes"] == 2
        assert_same(root / system, tmp_path / system, LOOSER.get(system, 1))
        # the second process cannot write at all, see `as_process`
        assert {p.name for p in (root / system).iterdir()} == {p.name for p in (tmp_path / system).iterdir()}
    # and what was killed at update 7 of 20 went on from there: in two processes to the same bits, in one but for rounding
    assert json.loads((root / "codes.json").read_text())["be_killed"] == [-signal.SIGKILL] * 2
    whole, resumed = tensors_of(root / "short_run"), tensors_of(root / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert checkpoints.load(resume_file(root / "moved"))[1]["t"] == KILLED_AT
    run("short_run", root / "moved")
    assert_same(root / "moved", tmp_path / "short_run")


def test_one_failure_ends_all_with_its_message(root):
    assert json.loads((root / "codes.json").read_text())["fail_in_the_second"] == [1, 2]
    first, second = ((root / f"fail_in_the_second.{rank}").read_text() for rank in range(2))
    assert "Error" not in first  # nothing but a bar of progress
    assert second == "python -m srlib.experiment: the second process has met a number that is none\n"


def test_torchrun_ends_with_one_message_where_a_batch_cannot_be_shared(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(CONFIGS["vae"] | {"batch_size": 7}))
    command = ["--standalone", "--nproc_per_node=2", "-m", "srlib.experiment", str(config)]
    with open(tmp_path / "log", "w") as log:
        torchrun = forks.Fork(lambda: torch.distributed.run.main([*command, "--output", str(tmp_path / "out")]), log)
    assert torchrun.wait()
    told = "batch_size=7 cannot be shared evenly by 2 processes; use 6 or 8, or another"
    assert (tmp_path / "log").read_text().count(told) == 1


def test_torchrun_of_two_processes_ends_as_one_process(tmp_path):
    """The command of the README, from a shell's point of view: its status, its files, and the scores of one process."""
    config = CONFIGS["vae"] | {"n_updates": 4}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    there, here = tmp_path / "two", tmp_path / "one"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "srlib.experiment", str(tmp_path / "config.yaml"), "--output", str(there)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    experiment.run(experiment.Config.from_dict(config), here, progress=False)
    assert checkpoints.read_json(there / "metrics.json")["environment"]["processes"] == 2
    assert {p.name for p in there.iterdir()} == {p.name for p in here.iterdir()}
    assert_same(there, here)


@pytest.mark.parametrize("n", range(1, 12))
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shares_are_equal_and_cover_every_row_once(n, world_size, monkeypatch):
    whole, shared = torch.arange(n), []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "n_processes", lambda: world_size)
        monkeypatch.setattr(distributed.dist, "get_rank", lambda rank=rank: rank)
        with distributed.sharing(n) as rows:
            shared.append(whole[rows])
    assert len({len(rows) for rows in shared}) == 1

    def all_gather(parts, part):
        for place, rows in zip(parts, shared):
            place.copy_(rows)

    monkeypatch.setattr(distributed.dist, "all_gather", all_gather)
    with distributed.sharing(n) as rows:
        assert torch.equal(distributed.gathered(whole[rows]), whole)


def test_noise_of_a_shared_batch_is_that_of_one_process(monkeypatch):
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)
    for like in (generators.randn_like, generators.uniform_like):
        rng, twin = (torch.Generator().manual_seed(0) for _ in range(2))
        expected = [like(torch.empty(6, 3), twin) for _ in range(2)]
        with distributed.sharing(6):
            ours = [like(torch.empty(3, 3), rng) for _ in range(2)]
            with pytest.raises(ValueError, match="one row for each of this process's 3 images"):
                like(torch.empty(6, 3), rng)
        assert all(torch.equal(a, b[3:]) for a, b in zip(ours, expected))
        assert like(torch.empty(6, 3), rng).shape == (6, 3)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert experiment.Config("one").torch_device() == torch.device("cuda")
    monkeypatch.setattr(distributed, "n_processes", lambda: 4)
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        for device in ("auto", "cuda"):
            assert experiment.Config("four", device=device).torch_device() == torch.device("cuda", rank)
    with pytest.raises(ValueError, match="device='cuda:1': several processes would share one GPU"):
        experiment.Config("four", device="cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="there are 2; use --nproc_per_node=2 or device: cpu"):
        experiment.Config("four")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
