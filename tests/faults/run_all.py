"""`run-all` as a user has it, with kernels and all, while the machine fails under it; nothing finished may be lost.

    python run_all.py SEED FOLDER       prints a JSON line with what was done

The project in FOLDER has the training notebook of this one, tiny runs and two chapters. Every scenario ends with a call that nothing
disturbs, whose results must be those of a project that was never disturbed: the same bits but for times. Where a kernel is no part of
the fault, calls and their jobs are forks of this process (`forks`), which takes a tenth of the time; they give the same bits too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import forks
import kills
import nbformat
import numpy as np
import papermill
import torch
import yaml

from srlib import checkpoints, experiment

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "papermill_runs"))
import pipeline  # noqa: E402

from srlib import plots  # noqa: E402, F401 (for the forks)

KILLS = 20  # of the whole of run-all
TINY = {"latent_dims": [4], "channels": 2, "n_steps": 2, "n_updates": 12, "batch_size": 16, "n_samples": 200}
RUNS = {
    "short": {},
    "vae": {"system": "vae"},
    "diverging": {"step_size": 50.0, "n_steps": 30, "sigma_start": 0.15},
}
# put into the training notebook: runs are small, and save after each update
SMALL = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import kills
from srlib import training
data.load = experiment.load = lambda name: kills.few_digits()
training.SECONDS_BETWEEN_SAVES = -1.0
"""
RUBBISH = (".tmp", ".partial.ipynb", ".source.ipynb", ".begun", "training.safetensors")


class Lost(Exception):
    """A fault did more harm than it may."""


def check(condition: bool, complaint: str) -> None:
    if not condition:
        raise Lost(complaint)


def new_project(root: Path) -> Path:
    """A project in `root`."""
    (root / "papermill_runs").mkdir(parents=True)
    (root / "book").mkdir()
    shutil.copy(ROOT / "papermill_runs" / "pipeline.py", root / "papermill_runs")
    notebook = (ROOT / "papermill_runs" / "train.md").read_text()
    check("plots.use_style()\n" in notebook, "the training notebook has no place for what makes it small")
    (root / "papermill_runs" / "train.md").write_text(
        notebook.replace("plots.use_style()\n", f"plots.use_style(){SMALL}")
    )
    for name in ("alone", "reader"):
        (root / "book" / f"{name}.md").write_text(
            forks.NOTEBOOK.format(title=name, parameters='profile = ""', code=f"print(profile, {len(name)})")
        )
    matrix = {
        "label": "tiny",
        "defaults": TINY,
        "runs": [{"name": name, "seconds": 5, **given} for name, given in RUNS.items()],
        "chapters": [{"notebook": "alone"}, {"notebook": "reader", "needs": ["vae"]}],
    }
    (root / "papermill_runs" / "quick.yaml").write_text(yaml.safe_dump(matrix, sort_keys=False))
    return root


def with_kernels(root: Path, jobs: int) -> subprocess.Popen[str]:
    """`pipeline.py run quick`, as a user calls it."""
    command = [sys.executable, "papermill_runs/pipeline.py", "run", "quick", "--jobs", str(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SRLIB_DATA": ""}
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)  # fmt: skip


def start(root: Path, prepare: Callable[[], object] = lambda: None, jobs: int = 2) -> forks.Fork:
    """The same call as a fork of this process; `prepare` comes before it. It prints into a file beside `root`."""

    def call() -> int:
        prepare()
        pipeline.load_profile = partial(pipeline.load_profile, root=root)
        papermill.execute_notebook = forks.execute_notebook
        return pipeline.main(["run", "quick", "--jobs", str(jobs)])

    with told(root).open("wb") as output:
        return forks.Fork(call, output, {"SRLIB_DATA": ""})


def told(root: Path) -> Path:
    return root.parent.parent / f"{root.parent.name}.out"


def called(root: Path, prepare: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """`start`, its status and what it printed."""
    return start(root, prepare).wait(), told(root).read_text()


def results(root: Path) -> dict[str, Any]:
    """Everything that came out but times: what is sealed and whole; raises what the readers say of anything else."""
    folder, found = root / "papermill_runs" / "quick", {}
    for path in sorted(folder.glob("*/metrics.json")):
        metrics = experiment.verified_metrics(path.parent)
        history = checkpoints.read_json(path.with_name("history.json"))["history"]
        weights = (path.parent / "model.safetensors").read_bytes()
        found[path.parent.name] = {
            "scores": metrics["scores"], "history": history, "weights": hashlib.sha256(weights).hexdigest(),
        }  # fmt: skip
    for path in sorted(folder.glob("*/diverged.json")):
        found[path.parent.name] = checkpoints.read_json(path)["reason"]
    for path in sorted(folder.glob("book/*.json")):
        notebook = path.with_suffix(".ipynb")
        check(
            checkpoints.read_json(path)["notebook"] == hashlib.sha256(notebook.read_bytes()).hexdigest(),
            f"{notebook} is another",
        )
        found[path.stem] = [
            cell.source for cell in nbformat.read(notebook, as_version=4).cells
        ]  # ids are drawn at random
    return found


def sealed(root: Path) -> dict[str, int]:
    """When each result was written: what was there before a fault must be there after it, untouched."""
    return {str(path): path.stat().st_mtime_ns for path in (root / "papermill_runs" / "quick").rglob("*.json") if path.name in ("job.json", "alone.json", "reader.json")}  # fmt: skip


def goes_on(root: Path, expected: dict[str, Any], before: dict[str, int]) -> None:
    """A last call finishes, with the same results as if nothing had happened, and repeats nothing that was finished."""
    status, said = called(root)
    check(status == 0, f"the last call failed:\n{said}")
    found = results(root)
    different = [name for name in expected if found.get(name) != expected[name]]
    check(
        not different and found.keys() == expected.keys(),
        f"other results of {different or found.keys() ^ expected.keys()}",
    )
    check(before.items() <= sealed(root).items(), "what was finished was made again")
    left = [str(path) for path in (root / "papermill_runs").rglob("*") if path.name.endswith(RUBBISH)]
    check(not left, f"rubbish: {left}")


def children(process: int) -> Iterator[int]:
    """The processes below `process`."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            yield int(child)
            yield from children(int(child))


def kernel_below(process: subprocess.Popen[str]) -> int:
    """A kernel that `process` has started, as soon as there is one that computes."""
    for _ in range(1200):
        for child in children(process.pid):
            with contextlib.suppress(OSError):
                if b"ipykernel" in Path(f"/proc/{child}/cmdline").read_bytes():
                    time.sleep(2)
                    return child
        time.sleep(0.1)
    raise Lost("no kernel was started")


def left_alone(root: Path) -> dict[str, Any]:
    """What comes out of a project that nothing disturbs, one job at a time; the faults that follow happen to two at a time."""
    status, said = start(root, jobs=1).wait(), told(root).read_text()
    check(status == 0 and "diverging-seed0  diverged" in said, said)
    found = results(root)
    check(
        found.keys() == {"alone", "reader", *(f"{run}-seed0" for run in RUNS)}, f"results of {[*found]} alone:\n{said}"
    )
    check(isinstance(found["diverging-seed0"], str), "the diverging run has no such record")
    return found


def kernel_killed(root: Path, expected: dict[str, Any], rng: np.random.Generator) -> int:
    """With kernels, one at a time: one is killed, its run is listed with its log, and all others are made."""
    process = with_kernels(root, 1)
    os.kill(kernel_below(process), signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
    check(process.returncode == 1 and "failed:" in said, said)
    check("its kernel was killed" in said and "/logs/" in said, f"it does not say that the kernel was killed:\n{said}")
    before = sealed(root)
    check(len(before) >= 2, f"one killed kernel stopped other runs:\n{said}")
    process = with_kernels(root, 2)
    said, _ = process.communicate(timeout=600)
    check(process.returncode == 0, said)
    found = results(root)
    check(
        all(found[run] == expected[run] for run in expected if run.endswith("seed0")),
        "with kernels, in other processes, the results are others",
    )
    goes_on(root, found, before)
    return 1


def killed(root: Path, expected: dict[str, Any], rng: np.random.Generator) -> int:
    """The whole of run-all is killed at random times until it is done, then begun anew."""
    kills = 0
    while kills < KILLS:
        before: dict[str, int] = {}
        shutil.rmtree(root / "papermill_runs" / "quick", ignore_errors=True)
        patience = 1.0
        while True:
            process = start(root)
            time.sleep(patience * rng.uniform(0.5, 4))
            patience *= 1.05  # on a busy machine it comes to an end too
            if process.poll() is not None:
                check(process.returncode == 0, told(root).read_text())
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            with (root / "papermill_runs" / "quick" / ".lock").open("a") as lock:
                fcntl.flock(
                    lock, fcntl.LOCK_EX
                )  # held by its jobs too, which look every half second whether it is there
            results(root)
            now = sealed(root)
            check(before.items() <= now.items(), "what was finished is gone")
            before = now
        goes_on(root, expected, before)
    return kills


def full_disk(root: Path, expected: dict[str, Any], rng: np.random.Generator) -> int:
    """Nothing more can be written after one job is finished, and in a second call; then there is space again."""
    process, before = start(root), {}
    while not before and process.poll() is None:
        time.sleep(0.02)
        before = sealed(root) if (root / "papermill_runs" / "quick").exists() else {}
    filler = root / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    for status, said in ((process.wait(), told(root).read_text()), called(root)):
        check(status == 1, f"a full disk was not noticed:\n{said}")
        check(
            "No space left" in said or "disk has 0 MB free" in said, f"it does not say that the disk is full:\n{said}"
        )
        results(root)
    filler.unlink()
    goes_on(root, expected, before)
    return 2


def file_size(root: Path, expected: dict[str, Any], rng: np.random.Generator) -> int:
    """Where nothing can be mounted: no file may grow beyond 2,000 bytes, which stops weights and notebooks."""
    status, said = called(root, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    check(status == 1 and "failed:" in said and "File too large" in said, said)
    goes_on(root, expected, {})
    return 1


def no_permission(root: Path, expected: dict[str, Any], rng: np.random.Generator) -> int:
    """The folder of one run, then that of all, cannot be written to."""
    folder = root / "papermill_runs" / "quick"
    (folder / "vae-seed0").mkdir(parents=True)
    (folder / "vae-seed0" / "older").touch()
    (folder / "vae-seed0").chmod(0o555)
    status, said = called(root, without_privilege)
    check(
        status == 1 and "vae-seed0: " in said and "Permission denied" in said,
        f"it does not say what is not permitted:\n{said}",
    )
    check(results(root).keys() == expected.keys() - {"vae-seed0", "reader"}, f"one folder stopped other runs:\n{said}")
    before = sealed(root)
    (folder / "vae-seed0").chmod(0o755)
    (folder / ".lock").unlink()
    folder.chmod(0o555)
    status, said = called(root, without_privilege)
    check(status == 1 and "Permission denied" in said and "Traceback" not in said, said)
    folder.chmod(0o755)
    goes_on(root, expected, before)
    return 2


def without_privilege() -> None:
    """Where this is root, which may write anywhere: give that right up (CAP_DAC_OVERRIDE, see capabilities(7))."""
    if os.getuid() == 0:
        libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capget(header, sets)
        sets[0] &= ~0b10
        check(libc.capset(header, sets) == 0, "root cannot give up its rights")


def two_at_once(root: Path, expected: dict[str, Any], rng: np.random.Generator) -> int:
    """A second call while the first is at work ends at once and says why; the first does not notice."""
    first = start(root)
    while not (root / "papermill_runs" / "quick" / "logs").exists() and first.poll() is None:
        time.sleep(0.02)
    said = told(root)
    aside = said.rename(said.with_suffix(".first"))
    status, second = called(root)
    check(status == 1 and "another run-all of the profile quick is at work" in second, second)
    check(first.wait() == 0, aside.read_text())
    goes_on(root, expected, sealed(root))
    return 1


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A file system of 4 MB at `place`, and whether there is one: where nothing may be mounted there is not."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(place)], check=True)


SCENARIOS = {
    "run-all killed": killed,
    "no permission to write": no_permission,
    "two run-alls at once": two_at_once,
    "kernel killed": kernel_killed,
}


def every_fault(seed: int, folder: Path) -> dict[str, Any]:
    """Scenario -> how many faults it survived; and how the disk was filled."""
    rng, counts = np.random.default_rng(seed), {}
    with small_disk(folder / "disk") as mounted, kills.small_and_eager(["short_run", "vae"]):
        fill, how = (full_disk, "disk full") if mounted else (file_size, "no file may grow (RLIMIT_FSIZE)")
        expected = left_alone(new_project(folder / "alone" / "project"))
        for name, scenario in {**SCENARIOS, how: fill}.items():
            place = folder / ("disk" if scenario is full_disk else name.replace(" ", "-")) / "project"
            counts[name] = scenario(new_project(place), expected, rng)
            print(f"  {name}: {counts[name]} survived", file=sys.stderr, flush=True)
    return counts


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(every_fault(int(sys.argv[1]), Path(sys.argv[2]))))


if __name__ == "__main__":
    main()
