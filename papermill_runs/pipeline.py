"""Executes the runs and chapters of a profile through papermill, and builds the book from what came out.

    pipeline.py run PROFILE [--jobs N] [--seeds 0,1,2] [--only NAME ...]   everything that is not up to date
    pipeline.py list PROFILE                                               all jobs, what they may take, and their state
    pipeline.py execute PROFILE NAME                                       one job; what $LAUNCH is put before
    pipeline.py config PROFILE NAME                                        the configuration of a run, for srlib.experiment
    pipeline.py book PROFILE                                               the book, from the results as they are

A job is a training run (papermill_runs/train.md with a configuration) or a chapter (book/NAME.md). Its key is a hash of all
it depends on: the code of its notebook, parameters, the srlib modules that its code reaches, the tables beside it and the measurements that its code
names, and the results of the runs that it reads. A result whose key is unchanged is kept, so an interrupted call goes on and a change
repeats just what depends on it. Text and captions need no execution: the book has them as they are in the notebook today.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import jupytext
import nbclient.exceptions
import nbformat
import papermill
import torch
import yaml

from srlib import checkpoints, claims, data, experiment, provenance, training
from srlib.comparison import PLUS_MINUS

ROOT = Path(__file__).resolve().parent.parent
THEBE = re.compile(r"<script[^>]*>[^<]*THEBE_JS_URL[^<]*</script>|<script[^>]*sphinx-thebe\.js[^>]*></script>")
# Each job computes with one thread, so that its result does not depend on how many run side by side.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
STARTED_BY = "SRLIB_PIPELINE_PID"  # tells a job which process to end with
ENDING = (signal.SIGINT, signal.SIGTERM)
DIVERGED = ("DivergenceError", "FloatingPointError")  # errors that are a result: the same run would end so again


class PipelineError(Exception):
    """Something that the reader of the message can mend."""


ERRORS = (PipelineError, checkpoints.CheckpointError, OSError)  # the last: a full or read-only disk


@dataclass(frozen=True)
class Job:
    """One notebook to execute. `needs` are the names of the runs whose results it reads."""

    name: str
    notebook: Path
    output: Path  # the executed notebook
    result: Path  # sealed JSON beside it, holding the key; it is written last
    parameters: dict[str, Any]
    needs: tuple[str, ...] = ()
    seconds: float = 60.0
    config: experiment.Config | None = field(default=None, compare=False)
    optional: bool = field(default=False, compare=False)  # the book does without it, and says so


@dataclass(frozen=True)
class Profile:
    name: str
    label: str
    jobs: dict[str, Job]
    seeds: list[int] | None  # instead of those in the matrix
    by_priority: bool = False  # runs start in the order of the matrix; the book shows unfinished ones as such
    root: Path = ROOT
    companions: dict[str, str] = field(default_factory=dict)  # books within this one's: profile -> what it holds
    rows_of: str = ""  # the profile whose rows these are, with other seeds

    @property
    def folder(self) -> Path:
        return self.root / "papermill_runs" / self.name

    @property
    def ledger(self) -> Path:
        return self.root / "papermill_runs" / "claims.yaml"

    @property
    def command(self) -> str:
        """What makes the results of this profile."""
        seeds = f" SEEDS={','.join(map(str, self.seeds))}" if self.seeds is not None else ""
        return f"make run-all PROFILE={self.name}{seeds}"

    @property
    def runs(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.config is not None]

    @property
    def chapters(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.config is None]


def load_profile(name: str, seeds: list[int] | None = None, root: Path = ROOT, only: str | None = None) -> Profile:
    """The jobs of papermill_runs/NAME.yaml; every configuration in it is checked before anything starts.

    only : a row, run or chapter; the profile then holds it and the runs that it reads. To check a whole matrix takes seconds.
    """
    path, matrix = _read_matrix(root, name)
    if "runs_of" in matrix:
        matrix = _with_rows_of_another(path, matrix, root, seeds)
    defaults = _entry(path, matrix, "defaults", {}, dict)
    by_priority = _entry(path, matrix, "by_priority", False, bool)
    per_update = seconds_per_update(root / _entry(path, matrix, "estimates", "", str))
    folder, jobs = root / "papermill_runs" / name, {}
    runs, chapters = _entry(path, matrix, "runs", [], list), _entry(path, matrix, "chapters", [], list)
    for row in runs:
        _check_mapping(path, row, None)
    for row in chapters:
        _check_mapping(path, row, {"notebook", "needs", "seconds"})
    if only is not None:
        named_so = [row for row in chapters if row.get("notebook") == only]
        read = {only, re.sub(r"-seed\d+$", "", only)}.union(*(_needs(path, row) for row in named_so))
        rows = [row for row in runs if row.get("name") in read]
        if named_so or rows:  # of an unknown name, what there is can be told with the whole matrix
            runs, chapters = rows, named_so
    for row in runs:
        own_seeds = _entry(path, row, "seeds", [0], list)
        given = {entry: value for entry, value in row.items() if entry not in ("seeds", "seconds")}
        for seed in seeds if seeds is not None else own_seeds:
            try:
                config = experiment.Config.from_dict({**defaults, **given, "seed": seed})
            except ValueError as error:
                raise PipelineError(f"{path}, run {row.get('name')!r}: {error}") from error
            known = per_update.get(row_hash(config), 60.0 / config.n_updates) * config.n_updates
            seconds = _entry(path, row, "seconds", known, (int, float))
            run = f"{config.name}-seed{seed}"
            if run in jobs:
                raise PipelineError(f"{path}: two runs are named {run!r}, and would write one directory")
            here = folder / run
            parameters = {
                "config": json.loads(json.dumps(asdict(config))),
                "output": os.path.relpath(here, root / "papermill_runs"),
            }
            notebook = root / "papermill_runs" / "train.md"
            files = (here / "train.ipynb", here / "job.json")
            jobs[run] = Job(run, notebook, *files, parameters, (), seconds, config, by_priority)
    for row in chapters:
        chapter, wanted = _entry(path, row, "notebook", "", str), _needs(path, row)
        output, notebook = folder / "book" / f"{chapter}.ipynb", root / "book" / f"{chapter}.md"
        if not re.fullmatch(r"[\w-]+", chapter) or not notebook.exists():
            raise PipelineError(f"{path}, chapter {chapter!r}: there is no notebook {notebook}")
        if chapter in jobs:
            raise PipelineError(f"{path}: the chapter {chapter!r} stands there twice")
        needs = tuple(job for job in jobs for name in wanted if job.rpartition("-seed")[0] == name)
        if len({job.rpartition("-seed")[0] for job in needs}) != len(wanted):
            raise PipelineError(f"{path}, chapter {chapter!r} needs {wanted}; the runs are {[*jobs]}")
        # a chapter gets those of these that it has: the seeds of its runs, and the first that all of them have
        seeds_used = list(dict.fromkeys(jobs[run].config.seed for run in needs))
        shared = [seed for seed in seeds_used if all(f"{run}-seed{seed}" in jobs for run in wanted)]
        offered = {"seeds": seeds_used, **({"seed": shared[0]} if shared else {})}
        known = parameter_names(jupytext.read(notebook))
        parameters = {"profile": name} | {entry: value for entry, value in offered.items() if entry in known}
        seconds = _entry(path, row, "seconds", 30.0, (int, float))
        result = output.with_suffix(".json")
        jobs[chapter] = Job(chapter, notebook, output, result, parameters, needs, seconds, optional=by_priority)
    if not jobs:
        raise PipelineError(f"{path}: the profile has neither runs nor chapters")
    companions = _entry(path, matrix, "companions", {}, dict)
    for companion, what in companions.items():
        if companion == name or not isinstance(what, str):
            raise PipelineError(f"{path}: companions must name other profiles and say what they hold, not {companions}")
        _read_matrix(root, companion)
    rows_of = _entry(path, matrix, "runs_of", {}, dict).get("profile", "")
    return Profile(name, _entry(path, matrix, "label", "", str), jobs, seeds, by_priority, root, companions, rows_of)


def _read_matrix(root: Path, name: Any) -> tuple[Path, dict[str, Any]]:
    """The file of a profile and its entries, none of which is unknown."""
    profiles = {found.stem: found for found in (root / "papermill_runs").glob("*.yaml") if found.stem != "claims"}
    if not isinstance(name, str) or name not in profiles:
        raise PipelineError(f"unknown profile {name!r}; there are: {', '.join(sorted(profiles))}")
    try:
        matrix = checkpoints.read_yaml(profiles[name])
    except checkpoints.CheckpointError as error:
        raise PipelineError(str(error)) from error
    known = {"label", "by_priority", "companions", "estimates", "defaults", "runs", "runs_of", "chapters"}
    _check_mapping(profiles[name], matrix, known)
    return profiles[name], matrix


def _with_rows_of_another(path: Path, matrix: dict[str, Any], root: Path, seeds: list[int] | None) -> dict[str, Any]:
    """The matrix with the rows that it takes from another profile, for seeds that are new there.

    runs_of: {profile, rows}, where `rows` is a list of {names, seeds}.
    """
    taken = _entry(path, matrix, "runs_of", {}, dict)
    _check_mapping(path, taken, {"profile", "rows"})
    where, other = _read_matrix(root, taken.get("profile"))
    there = {row["name"]: row for row in other.get("runs", []) if isinstance(row, dict) and "name" in row}
    runs = []
    for given in _entry(path, taken, "rows", [], list):
        _check_mapping(path, given, {"names", "seeds"})
        names, own_seeds = (_entry(path, given, entry, [], list) for entry in ("names", "seeds"))
        if not names or not own_seeds:
            raise PipelineError(f"{path}: runs_of: {given} must give names and seeds")
        if unknown := [name for name in names if name not in [*there]]:
            raise PipelineError(
                f"{path}: runs_of names {unknown[0]!r}; the rows of {where.stem} are {', '.join(there)}"
            )
        for name in names:
            if known := [seed for seed in (seeds or own_seeds) if seed in there[name].get("seeds", [0])]:
                raise PipelineError(
                    f"{path}: {where.stem} trains {name} with seed {known[0]} already; give seeds that are new"
                )
            runs.append(there[name] | {"seeds": own_seeds})
    if not runs or {"runs", "defaults"} & matrix.keys():
        raise PipelineError(f"{path}: runs_of must give a profile and rows of it, and stands without runs and defaults")
    return matrix | {"defaults": other.get("defaults"), "runs": runs}


def _needs(path: Path, chapter: dict[str, Any]) -> list[str]:
    """The rows that a chapter reads. `needs` may hold those of other chapters as lists, since YAML cannot join them."""
    needed = _entry(path, chapter, "needs", [], list)
    names = [name for entry in needed for name in (entry if isinstance(entry, list) else [entry])]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise PipelineError(f"{path}: needs: {wrong[0]!r} must be the name of a row, or a list of names")
    return list(dict.fromkeys(names))


def seconds_per_update(path: Path) -> dict[str, float]:
    """What benchmarks/dry_run.py measured on one core: `row_hash` of a row -> seconds of an update."""
    rows = checkpoints.read_json(path)["rows"].values() if path.is_file() else []
    return {row["config"]: row["seconds_per_update"] for row in rows}


def row_hash(config: experiment.Config) -> str:
    """A hash of a row of the matrix, whatever its seed: of the entries that differ from what they are by default."""
    default = default_entries()
    given = {entry: value for entry, value in asdict(config).items() if value != default[entry] and entry != "seed"}
    return checkpoints.checksum({"name": config.name, **given})


@functools.cache  # a configuration takes a tenth of a second: its system is built, to check it
def default_entries() -> dict[str, Any]:
    """The entries of a configuration that gives nothing but its name."""
    return asdict(experiment.Config("default"))


def _check_mapping(path: Path, row: Any, known: set[str] | None) -> None:
    if not isinstance(row, dict):
        raise PipelineError(f"{path}: {row!r} must be a mapping of names to values")
    unknown = {str(entry) for entry in row if known is not None and entry not in known}
    if unknown:
        raise PipelineError(f"{path}: unknown entry {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")


def _entry(path: Path, row: dict[str, Any], name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
    """row[name], of the kind that is meant; `default` where it is left out or left empty."""
    value = row.get(name)
    if value is None:
        return default
    strange = isinstance(value, int | float) and not 0 <= value < math.inf
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind) or strange:
        wanted = {dict: "a mapping", list: "a list", str: "text", bool: "true or false"}.get(kind, "a number from 0 on")
        raise PipelineError(f"{path}: {name}: {value!r} must be {wanted}")
    return value


def key(job: Job, profile: Profile) -> str:
    """The hash of everything that the job's result depends on."""
    cells = code_cells(job.notebook.read_text())
    read = [profile.jobs[run] for run in job.needs if not absence(profile.jobs[run])]
    # which system a notebook builds is said by its configuration, or by those of the runs that it reads, not by its text
    systems = frozenset(run.config.system for run in (job, *read) if run.config is not None)
    results = [checkpoints.read_json(run.output.with_name("metrics.json"))["checksum"] for run in read]
    results += [f"{run} diverged" for run in job.needs if diverged(profile.jobs[run])]
    if profile.rows_of and job.config is None:  # a chapter may show the two side by side
        there = profile.folder.with_name(profile.rows_of)
        rows = sorted({run.rpartition("-seed")[0] for run in job.needs})
        found = [path for row in rows for path in sorted(there.glob(f"{row}-seed*/metrics.json"))]
        results += [checkpoints.read_json(path)["checksum"] for path in found]
    if job.config is None and is_ledger(job, profile):
        # it says what it could not measure, and is to be made again when it can
        unmeasured = sorted(may_load(job, profile, set()))
        results += [f"{run} has no weights" for run in unmeasured if not loadable(profile.jobs[run])]
    here = job.notebook.parent
    folders = (
        "*.yaml",
        "../papermill_runs/*.yaml",
        "../benchmarks/*.json",
        "../benchmarks/measured/*.json",
        "../README.md",
    )
    tables = [path for folder in folders for path in sorted(here.glob(folder))]
    # a file is read by its name, or, with what follows its first hyphen left open, as "peak-*.json"
    quoted = {path: (f'"{path.name}"', f'"{path.stem.split("-")[0]}-*{path.suffix}"') for path in tables}
    tables = [path for path in tables if any(name in cell for name in quoted[path] for cell in cells)]
    parts = [
        *cells,
        json.dumps(job.parameters, sort_keys=True),
        provenance.source_hash(modules_reached(cells, systems)),
        *results,
        *(path.read_text() for path in tables),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache  # asked for every job, and all runs of a system reach the same
def modules_reached(cells: tuple[str, ...], systems: frozenset[str]) -> frozenset[str]:
    """The modules of srlib that code cells reach, and runs of these systems."""
    return frozenset(provenance.notebook_modules(cells)).union(*map(experiment.modules, systems))


@functools.cache  # all runs are one notebook
def code_cells(notebook: str) -> tuple[str, ...]:
    """The code in a text notebook."""
    return tuple(cell.source for cell in jupytext.reads(notebook, "md:myst").cells if cell.cell_type == "code")


def not_run(job: Job) -> str | None:
    """Why a run could not be made on this machine, or None."""
    return _recorded(job, "not_run").get("reason")


def diverged(job: Job) -> str | None:
    """With what message a run diverged, or None. With another configuration or other sources it is to be tried again."""
    record = _recorded(job, "diverged")
    return record.get("reason") if record and record.get("key") == training_key(job) else None


def _recorded(job: Job, word: str) -> dict[str, Any]:
    """What stands beside a run that ended without a result; nothing where the file is damaged: then the run is made again."""
    path = job.output.with_name(f"{word}.json")
    if job.config is not None and path.exists():
        with contextlib.suppress(checkpoints.CheckpointError, OSError):
            return checkpoints.read_json(path)
    return {}


def absence(job: Job) -> str | None:
    """Why there is no result although nothing went wrong, or None."""
    reasons = {"not run": not_run(job), "diverged": diverged(job)}
    reason = next((f"{word}: {reason}" for word, reason in reasons.items() if reason), None)
    return "not finished" if reason is None and job.optional and not job.result.exists() else reason


def up_to_date(job: Job, profile: Profile) -> bool:
    """Whether the result is whole, unedited and made from today's sources."""
    try:
        verify(job)
        return checkpoints.read_json(job.result)["key"] == key(job, profile)
    except (PipelineError, checkpoints.CheckpointError, KeyError, OSError):
        return False


def training_key(job: Job) -> str:
    """The hash of what the training itself depends on: not how it is scored and shown, nor the style of its figures."""
    parts = {"config": job.parameters["config"], "source": experiment.training_hash(job.config.system)}
    return checkpoints.checksum(parts)


def current(job: Job, profile: Profile) -> bool:
    """Whether a result that is there comes from today's sources. Of a run its training counts, not how the notebook shows it."""
    if job.config is not None:
        return experiment.is_current(job.output.parent, job.config)
    return checkpoints.read_json(job.result)["key"] == key(job, profile)


def still_absent(job: Job) -> bool:
    """Whether a run that had no data still has none: quicker to see than by starting it. Its reason is brought up to date."""
    try:
        data.load(job.config.dataset)
    except data.DatasetUnavailable as error:
        record_not_run(job, str(error))
        return True
    except data.DataError:
        pass  # there, but damaged: the run will say so
    return False


def record_not_run(job: Job, reason: str) -> None:
    """Keep why a run could not be made, for the runs page, without a path of this machine."""
    root = os.environ.get("SRLIB_DATA")
    shown = reason.replace(str(Path(root)), "$SRLIB_DATA") if root else reason
    if not_run(job) != shown:
        checkpoints.write_json(job.output.with_name("not_run.json"), {"reason": shown})


def execute(job: Job, profile: Profile) -> None:
    """Execute one job with papermill. The result appears whole or not at all; a failed notebook is kept as *.failed.ipynb."""
    with checkpoints.locked(
        profile.folder / "logs" / f"{job.name}.lock", f"{job.name} is being executed by another process"
    ):
        _execute(job, profile)


def _execute(job: Job, profile: Profile) -> None:
    wanted, started = key(job, profile), time.monotonic()
    notebook = jupytext.read(job.notebook)
    check_parameters(notebook, job)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    failed, begun = job.output.with_suffix(".failed.ipynb"), job.output.with_suffix(".begun")
    job.output.with_name("not_run.json").unlink(missing_ok=True) if job.config else None
    if job.config is not None and not experiment.training_stands(job.output.parent, job.config):
        with checkpoints.locked(job.output.parent, f"another process trains in {job.output.parent}"):
            # An interrupted training goes on, one that was begun by hand too, or says why it cannot. What another
            # configuration or older sources left behind is no part of this one.
            by_hand = training.resume_file(job.output.parent).exists() and not begun.exists()
            if not by_hand and not (begun.exists() and begun.read_text() == training_key(job)):
                shutil.rmtree(job.output.parent)
                job.output.parent.mkdir()
            checkpoints.atomic_write(begun, training_key(job).encode())
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    source, partial = job.output.with_suffix(".source.ipynb"), job.output.with_suffix(".partial.ipynb")
    nbformat.write(notebook, source)
    try:
        papermill.execute_notebook(
            str(source),
            str(partial),
            job.parameters,
            cwd=str(job.notebook.parent),
            progress_bar=False,
            kernel_name="python3",
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == data.DatasetUnavailable.__name__:
            partial.unlink()
            if not training.resume_file(job.output.parent).exists():
                begun.unlink(missing_ok=True)
            record_not_run(job, error.evalue)
            return
        if job.config is not None and error.ename in DIVERGED:
            shutil.rmtree(job.output.parent)
            job.output.parent.mkdir()
            record = {"reason": error.evalue, "key": training_key(job), "config": job.parameters["config"]}
            checkpoints.write_json(job.output.with_name("diverged.json"), record)
            return
        partial.replace(failed)
        without = [f"{run} {reason}" for run in job.needs if (reason := absence(profile.jobs[run]))]
        told = [f"{job.name}: {error.ename}: {error.evalue} (see {failed})"]
        told += [f"{job.name} reads a run without result: {text}" for text in without]
        raise PipelineError("\n".join(told)) from error
    except nbclient.exceptions.DeadKernelError as error:
        raise PipelineError(
            f"{job.name}: its kernel was killed, perhaps for want of memory; calling again goes on where it was"
        ) from error
    finally:
        source.unlink(missing_ok=True)
    executed = without_machine_traces(nbformat.read(partial, as_version=4))
    checkpoints.atomic_write(job.output, nbformat.writes(executed).encode())
    # the last three: what a kill may have left of a training that had ended, and of a file that was being written
    unfinished = [partial, failed, begun, *job.output.parent.glob(f".{job.output.name}.*.tmp")]
    if job.config is not None:
        unfinished += [training.resume_file(job.output.parent), *job.output.parent.glob(".*.tmp")]
    for leftover in unfinished:
        leftover.unlink(missing_ok=True)
    record = {"key": wanted, "notebook": provenance.file_hash(job.output), "seconds": time.monotonic() - started}
    checkpoints.write_json(job.result, record | {"environment": provenance.environment()})


def parameter_names(notebook: nbformat.NotebookNode) -> set[str]:
    """The names that the notebook's `parameters` cell assigns."""
    cells = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return {
        name.id
        for cell in cells
        for statement in ast.parse(cell).body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for name in ast.walk(statement)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }


def check_parameters(notebook: nbformat.NotebookNode, job: Job) -> None:
    """Refuse parameters that the notebook's `parameters` cell does not have: papermill would silently ignore them."""
    known = parameter_names(notebook)
    unknown = sorted(set(job.parameters) - known)
    if unknown:
        raise PipelineError(
            f"{job.notebook.name} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )


def without_machine_traces(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without papermill's paths and without what is printed to stderr (progress bars).

    The values that papermill injected take the place of the defaults, so that a downloaded notebook shows what it ran with.
    """
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    tagged = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    if "injected-parameters" in tagged:
        injected = tagged["injected-parameters"]
        tagged["parameters"].source = injected.source.removeprefix("# Parameters\n")
        notebook.cells.remove(injected)
    return notebook


def run(profile: Profile, n_jobs: int, only: list[str]) -> dict[str, str]:
    """Bring all jobs up to date, `n_jobs` at a time; returns the names of those that failed, and how."""
    wanted = named(only, profile)
    launch = launch_words()
    chosen = [job for name, job in profile.jobs.items() if not only or name in wanted]
    # a run's result decides the keys of the chapters that read it, so runs come first
    absent = [job for job in chosen if diverged(job) or (not_run(job) and still_absent(job))]
    old = [job for job in chosen if job not in absent and (not_run(job) or not up_to_date(job, profile))]
    stale = to_execute([*old, *(job for job in chosen if only and lacks_weights(job))], chosen, profile)
    chosen = [job for job in profile.jobs.values() if job in chosen or job in stale]
    n_done = len(chosen) - len(stale) - len(absent)
    cost = f", about {_duration(sum(map(_expected, stale)))} on one CPU core" if stale else ""
    print(f"{profile.name}: {n_done} of {len(chosen)} jobs are up to date, {len(stale)} to run{cost}", flush=True)
    for job in absent:
        print(f"{job.name}  {absence(job)}", flush=True)
    if without := [job.name for job in stale if job not in old and lacks_weights(job)]:
        print(f"trained again for their weights, which are not here or not their own: {', '.join(without)}", flush=True)
    # the longest first, so that all cores have work to the end; or in the order of the matrix
    longest_first = stale if profile.by_priority else sorted(stale, key=lambda job: -_expected(job))
    waiting = sorted(longest_first, key=lambda job: job.config is None)
    logs, started = profile.folder / "logs", time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[str, tuple[Job, multiprocessing.Process, float]] = {}
    finished, failed, missing = set(), {}, set()  # missing: datasets that are not there
    before = {job.name: _outcome(job) for job in stale}
    try:
        while waiting or running:
            for job in list(waiting):
                blocked = [n for n in job.needs if n in failed]
                if blocked:
                    waiting.remove(job)
                    failed[job.name] = f"not started: {', '.join(blocked)} failed"
                    print(f"{job.name}  {failed[job.name]}", flush=True)
                elif len(running) < n_jobs and not any(profile.jobs[n] in waiting or n in running for n in job.needs):
                    waiting.remove(job)
                    try:
                        with undisturbed():
                            running[job.name] = (job, start(job, profile, launch), time.monotonic())
                    except OSError as error:  # a full disk: what runs may still come to its end
                        failed[job.name] = f"not started: {error}"
                        print(f"{job.name}  {failed[job.name]}", flush=True)
                        continue
                    print(f"[  -/{len(stale)}] {job.name}  started", flush=True)
            for name, (job, child, begun) in list(running.items()):
                if child.exitcode is None:
                    continue
                del running[name]
                finished.add(name)
                took, elapsed = time.monotonic() - begun, time.monotonic() - started
                ahead = [max(0.0, _expected(j) - (time.monotonic() - b)) for j, _, b in running.values()]
                if not_run(job):
                    missing.add(job.config.dataset)
                ahead += [_expected(j) for j in waiting if j.config is None or j.config.dataset not in missing]
                left = max([sum(ahead) / n_jobs, *ahead])
                word = "done"
                if child.exitcode:
                    failed[name] = _last_words(logs / f"{name}.log", child.exitcode)
                    word = f"FAILED, see {logs / (name + '.log')},"
                elif _outcome(job) == before[name]:
                    failed[name] = (
                        "the command came back without a result; LAUNCH must wait until it is done (srun, not sbatch)"
                    )
                    word = f"FAILED: {failed[name]},"
                elif not_run(job):
                    word = "not run (no data),"
                elif diverged(job):
                    word = "diverged,"
                print(
                    f"[{len(finished):3d}/{len(stale)}] {name}  {word} in {took:.0f} s  "
                    f"(elapsed {_clock(elapsed)}, about {_clock(left)} left)",
                    flush=True,
                )
            time.sleep(0.1)
    except KeyboardInterrupt:
        print("stopping; what is finished stays, calling again goes on", flush=True)
        raise SystemExit(130) from None
    finally:
        for _, child, _ in running.values():
            child.terminate()
        for _, child, _ in running.values():
            child.join()
    return failed


def start(job: Job, profile: Profile, launch: list[str]) -> multiprocessing.Process:
    """Execute a job in a process of its own, with the words of $LAUNCH before it; what it says goes into its log.

    The process is a fork, which has what takes seconds to import.
    """
    with (profile.folder / "logs" / f"{job.name}.log").open("w", buffering=1) as log:
        process = multiprocessing.get_context("fork").Process(target=_started, args=(job, profile, launch, log))
        process.start()
    return process


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: Python ignores what they raise while it forks, and whom it has not noted it cannot end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _started(job: Job, profile: Profile, launch: list[str], log: TextIO) -> None:
    parent = os.getppid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    sys.stdout = sys.stderr = log
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    os.environ |= ONE_THREAD | {STARTED_BY: str(parent)}
    torch.set_num_threads(1)  # those of the process above are not in its fork
    if launch:
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and what it becomes would inherit that
            signal.signal(ignored, signal.SIG_DFL)
        seeds = ["--seeds", ",".join(map(str, profile.seeds))] if profile.seeds is not None else []
        command = [*launch, sys.executable, __file__, "execute", profile.name, job.name, *seeds]
        os.execvp(command[0], command)
    end_with(parent)
    try:
        execute(job, profile)
    except ERRORS as error:
        sys.exit(f"pipeline: {error}")


def to_execute(stale: list[Job], chosen: list[Job], profile: Profile) -> list[Job]:
    """The jobs that are stale, the chosen ones that read them, and the runs whose weights these may load and which have none.

    Such a run is trained again, even if it was not chosen, and what reads it reads other numbers then: so it goes on, until nothing is added.
    """
    names = {job.name for job in stale}
    while True:
        readers = {job.name for job in chosen if names & set(job.needs)}
        read = {run for name in names | readers for run in may_load(profile.jobs[name], profile, names)}
        added = readers | {run for run in read - names if lacks_weights(profile.jobs[run])}
        if added <= names:
            return [job for job in profile.jobs.values() if job.name in names]
        names |= added


def may_load(job: Job, profile: Profile, renewed: set[str]) -> set[str]:
    """The runs whose weights a chapter may load: all that it reads; of a ledger, those of what was not measured before.

    renewed : names of the jobs that are made before it.
    """
    if not is_ledger(job, profile):
        return set(job.needs)
    kept = claims.Kept(profile.folder / "measurements.json")
    runs = renewed & {run.name for run in profile.runs}
    return set(job.needs) & claims.to_measure(claims.load_claims(profile.ledger), profile.folder, kept, runs)


def is_ledger(job: Job, profile: Profile) -> bool:
    """Whether a chapter judges the claims."""
    return any(f'"{profile.ledger.name}"' in cell for cell in code_cells(job.notebook.read_text()))


def lacks_weights(job: Job) -> bool:
    """Whether a finished run is here without its weights, or with files it did not write, and its images to train it again."""
    if job.config is None or not job.result.exists() or loadable(job):
        return False
    return images_are_here(job.config.dataset, os.environ.get("SRLIB_DATA"))


def loadable(job: Job) -> bool:
    """Whether a run is here whole, with its weights."""
    try:
        return experiment.has_weights(job.output.parent)
    except (checkpoints.CheckpointError, OSError):
        return False


@functools.cache  # reading a dataset takes seconds, and dozens of runs share it
def images_are_here(dataset: str, root: str | None) -> bool:
    """Whether the images of a dataset can be read; `root` is where: $SRLIB_DATA."""
    with contextlib.suppress(data.DatasetUnavailable, data.DataError, OSError):
        data.load(dataset, root)
        return True
    return False


def _last_words(log: Path, status: int) -> str:
    """How a job failed, in a line, and where to read more."""
    said = ""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip() and not line.startswith("[IPKernelApp]")), "")
    if said and status > 0:
        return f"{said.removeprefix('pipeline: ')} ({log})"
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status} and said nothing"
    return f"{how} ({log}); the disk has {shutil.disk_usage(log.parent).free / 1e6:.0f} MB free"


def table(profile: Profile) -> str:
    """Every job with what it may take on one core and the state of its result, in the order of the matrix."""
    width = max(map(len, profile.jobs))
    lines = [f"{profile.name}: {profile.label}"]
    for job in profile.jobs.values():
        state = absence(job) or ("up to date" if up_to_date(job, profile) else "to run")
        lines.append(f"{job.name:{width}}  {_duration(_expected(job)):>9}  {state}")
    total = _duration(sum(map(_expected, profile.jobs.values())))
    return "\n".join([*lines, f"{len(profile.jobs)} jobs, about {total} on one CPU core together"])


def named(names: list[str], profile: Profile) -> set[str]:
    """The jobs that these names mean; that of a row of the matrix, without a seed, means its runs with all seeds."""
    of_rows = {job.name: job.config.name for job in profile.runs}
    jobs = {name: {job for job in profile.jobs if name in (job, of_rows.get(job))} for name in names}
    if unknown := sorted(name for name, found in jobs.items() if not found):
        near = difflib.get_close_matches(unknown[0], {*profile.jobs, *of_rows.values()}, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(profile.jobs)}"
        raise PipelineError(f"no such run or chapter: {', '.join(unknown)}; {hint}")
    return set().union(*jobs.values())


def launch_words() -> list[str]:
    """The words of $LAUNCH, which are put before each job."""
    text = os.environ.get("LAUNCH", "")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise PipelineError(f"LAUNCH={text!r} cannot be read: {error}") from error
    if "torchrun" in map(os.path.basename, words):
        raise PipelineError(
            f"LAUNCH={text!r}: several processes cannot be one notebook; README.md says how torchrun is used"
        )
    if words and shutil.which(words[0]) is None:
        raise PipelineError(f"LAUNCH={text!r}: there is no command {words[0]!r}")
    return words


def _outcome(job: Job) -> list[int]:
    """What changes when a job has come to an end: the times at which its result, or why there is none, was written."""
    paths = (job.result, *(job.output.with_name(f"{word}.json") for word in ("not_run", "diverged")))
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]


def end_with(parent: int) -> None:
    """End this process when `parent`, which started it, is no more; its kernel then ends by itself."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() == parent:  # not through another command, such as srun, which has its own way
        threading.Thread(target=watch, daemon=True).start()


def build_book(profile: Profile) -> Path:
    """Check all results, put the book together from executed notebooks and build it, with its companions'; returns index.html."""
    target = profile.root / "book" / "_build" / profile.name
    with checkpoints.locked(
        target / ".lock", f"the book of the profile {profile.name} is being built by another process"
    ):
        made = _checked(profile)
        companions = [load_profile(name, root=profile.root) for name in profile.companions]
        made_there = [_checked(companion) for companion in companions]
        chapters = {job.name for job in made if job.config is None}
        links = {
            name: [
                f'<a href="{companion.name}/{name}.html">`{companion.name}`</a>'
                for companion, there in zip(companions, made_there)
                if any(job.name == name for job in there)
            ]
            for name in chapters
        }
        back = {name: [f'<a href="../{name}.html">`{profile.name}`</a>'] for name in chapters}
        with ThreadPoolExecutor(1) as pool:  # Sphinx is a process with one thread
            inner = [
                pool.submit(_build_book, companion, there, target / companion.name, back, within=profile)
                for companion, there in zip(companions, made_there)
            ]
            index = _build_book(profile, made, target, links)
        for companion, built in zip(companions, inner):
            shutil.copytree(built.result().parent, index.parent / companion.name)
        return index


def _checked(profile: Profile) -> list[Job]:
    """All jobs that there is a result of, once each has been verified."""
    benchmarks = profile.root / "benchmarks"
    shown = [path for name in ("dry_run", "tuning", "measured/*") for path in sorted(benchmarks.glob(f"{name}.json"))]
    for path in (*shown, *profile.folder.glob("measurements.json")):
        checkpoints.read_json(path)  # pages show what is in them; an edited one stops the build with its name
    made = [job for job in profile.jobs.values() if not absence(job)]
    parts = [job.name for job in profile.runs if job not in made and job.output.with_name("metrics.json").exists()]
    if parts:
        raise PipelineError(f"of {', '.join(parts)} there are only some files; {profile.command} makes them again")
    without = [job.name for job in made if not job.result.exists()]
    if len(without) == len(made):
        raise PipelineError(f"the profile {profile.name} has no results yet; {profile.command} makes them")
    if without:
        raise PipelineError(f"there is no result of {', '.join(without)}; {profile.command} makes what is missing")
    for job in made:
        try:
            verify(job)
        except (PipelineError, checkpoints.CheckpointError, KeyError) as error:
            raise PipelineError(f"{job.name}: {error}; {profile.command} makes it again") from error
    older = [job.name for job in made if not current(job, profile)]
    if older:
        print(f"made from older sources: {', '.join(older)}; {profile.command} makes them again")
    return made


def _build_book(
    profile: Profile, made: list[Job], target: Path, links: dict[str, list[str]], within: Profile | None = None
) -> Path:
    """The book of a profile from what it has made; links: chapter -> where other profiles have it; within: whose book this lies in."""
    book, source = profile.root / "book", target / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(book, source, ignore=shutil.ignore_patterns("_build", "*.ipynb", ".ipynb_checkpoints"))
    executed = [job for job in profile.chapters if job in made]
    for job in executed:
        (source / f"{job.name}.md").unlink()
        notebook = nbformat.read(job.output, as_version=4)
        if current(job, profile):  # today's text may speak of today's results
            notebook = with_todays_text(notebook, jupytext.read(job.notebook))
        if links.get(job.name):
            told = f"These are the runs of the profile `{profile.name}`. The same chapter for {' and '.join(links[job.name])}."
            notebook.cells.insert(1, nbformat.v4.new_markdown_cell(f"```{{seealso}}\n{told}\n```"))
        nbformat.write(notebook, source / f"{job.name}.ipynb")
    for page in source.glob("*.md"):
        if "kernelspec:" in (text := page.read_text()):  # a chapter that this profile does not execute
            title = next(line for line in text.splitlines() if line.startswith("# "))
            told = f"The profile `{profile.name}` has no results of this chapter; "
            told += f'<a href="../{page.stem}.html">`{within.name}`</a> has.' if within else "`quick` has."
            equations = re.findall(r"^```\{math\}\n:label:.*?^```$", text, re.S | re.M)  # other chapters refer to them
            page.write_text("\n\n".join([title, told, *equations]) + "\n")
    (source / "runs").mkdir()
    shown = [job for job in profile.runs if job in made]
    for job in shown:
        notebook = with_todays_text(nbformat.read(job.output, as_version=4), jupytext.read(job.notebook))
        nbformat.write(with_title(notebook), source / "runs" / f"{job.name}.ipynb")
    (source / "runs.md").write_text(runs_page(profile, within))
    if within:
        config = yaml.safe_load((source / "_config.yml").read_text())
        config["title"] += f" (profile {profile.name})"
        (source / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    toc = yaml.safe_load((source / "_toc.yml").read_text())
    for part in toc["parts"]:
        for chapter in part["chapters"]:
            if chapter["file"] == "runs" and shown:
                chapter["sections"] = [{"file": f"runs/{job.name}"} for job in shown]
    (source / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        "-n",
        "-W",
        "--keep-going",
    ]
    done = subprocess.run(
        [*command, "--path-output", str(target), str(source)], capture_output=True, text=True, cwd=target,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    if done.returncode or not (target / "_build" / "html" / "index.html").exists():
        raise PipelineError(f"the book could not be built:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    html = target / "html"
    shutil.rmtree(html, ignore_errors=True)
    (target / "_build" / "html").rename(html)
    shutil.rmtree(target / "_build")
    for page in html.rglob("*.html"):
        # Jupyter Book sets up Thebe (live code from a remote server) twice on each page; this book does not use it
        page.write_text(THEBE.sub("", page.read_text()))
    return html / "index.html"


def verify(job: Job) -> None:
    """A result that is missing or was edited stops the build with its name."""
    done = checkpoints.read_json(job.result)
    if not job.output.is_file() or done["notebook"] != provenance.file_hash(job.output):
        raise PipelineError(f"{job.output} is missing or was edited")
    if job.config is not None:
        metrics, path = experiment.verified_metrics(job.output.parent), job.output.with_name("config.yaml")
        if path.exists() and path.read_text() != yaml.safe_dump(metrics.get("config"), sort_keys=False):
            raise PipelineError(f"{path} is not the configuration that the run was trained with")


def with_todays_text(executed: nbformat.NotebookNode, today: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """What was executed, with text, captions and tags of the notebook as it is today; as it was where its code is another one."""
    ran, written = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (executed, today))
    parameters = [["parameters" in cell.metadata.get("tags", []) for cell in cells] for cells in (ran, written)]
    sources = [[c.source for c, given in zip(cells, parameters[1]) if not given] for cells in (ran, written)]
    if parameters[0] != parameters[1] or sources[0] != sources[1]:
        return executed
    for cell, done in zip(written, ran):
        cell.source, cell.outputs, cell.execution_count = done.source, done.outputs, done.execution_count
    today.metadata = executed.metadata
    return today


def with_title(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with the heading that its code printed as a cell of its own: Sphinx takes no title from an output."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            heading, _, rest = output.get("data", {}).get("text/markdown", "").partition("\n")
            if heading.startswith("# "):
                output.data["text/markdown"] = rest.lstrip()
                notebook.cells.insert(0, nbformat.v4.new_markdown_cell(heading))
                return notebook
    return notebook


def runs_page(profile: Profile, within: Profile | None = None) -> str:
    """The status page: every run with its scores, where and when it ran, and whether today's sources would repeat it."""
    lines = ["# The runs behind this book", "", f"Profile `{profile.name}`. {profile.label}", ""]
    if within:
        lines += [
            f'The chapters that are missing here are in <a href="../runs.html">the profile `{within.name}`</a>.',
            "",
        ]
    for name, what in profile.companions.items():
        lines += [f'{what}: <a href="{name}/runs.html">the profile `{name}`</a>.', ""]
    lines += [
        "| run | dataset | updates | MSE | sources | images | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    where = []
    for job in profile.runs:
        if reason := absence(job):
            lines.append(f"| {job.name} | {job.config.dataset} | | {_as_text(reason)} | | | |")
            continue
        path = job.output.with_name("metrics.json")
        try:
            row, origin = _rows(job, profile, checkpoints.read_json(path))
        except (KeyError, TypeError, ValueError) as error:
            raise PipelineError(
                f"{path} is not what a run writes ({error!r}); delete it, {profile.command} makes it again"
            ) from error
        lines.append(row)
        where.append(origin)
    lines += [
        "",
        "MSE is per pixel on $[-1, 1]$, with its standard error over the images that it was scored on; seconds are those of the training.",
        "",
        "## Where they come from",
        "",
        "| run | seed | images | code | processor | PyTorch | memory |",
        "|---|---|---|---|---|---|---|",
        *where,
        "",
        "Images and code are named by the first digits of their hashes, kept with all versions in each run's `metrics.json`. The code is that of all modules that the run can reach; comments and formatting do not count. Where code has changed since without changing a bit of the first updates of every row of the profile `digits` (`benchmarks/same_bits.py`, which compares no other), a run counts as current, and the code is that which trained it.",
        "",
        "## Chapters",
        "",
    ]
    lines += ["| chapter | seconds to execute | sources |", "|---|---|---|"]
    lines += [
        f"| {{doc}}`{job.name}` | {checkpoints.read_json(job.result)['seconds']:.0f} | {_sources(job, profile)} |"
        for job in profile.chapters
        if not absence(job)
    ]
    return "\n".join(lines) + "\n"


def _rows(job: Job, profile: Profile, metrics: dict[str, Any]) -> tuple[str, str]:
    """A run in the two tables of `runs_page`."""
    scores, config = metrics["scores"], metrics["config"]
    trained_with = [*metrics.get("same_bits", []), metrics][0]["source_hash"]
    machine, memory = metrics["environment"], metrics["peak_memory"]
    return (
        f"| [{job.name}](runs/{job.name}) | {_as_text(config['dataset'])} | {config['n_updates']:d} "
        f"| {scores['mse']:.4f}{PLUS_MINUS}{scores['mse_standard_error']:.4f} | {_sources(job, profile)} "
        f"| {scores['n_images']:d} {_as_text(scores['split'])} | {metrics['seconds']['training']:.0f} |",
        f"| {job.name} | {config['seed']:d} | {_as_code(metrics['data']['fingerprint'])} | {_as_code(trained_with[:12])} "
        f"| {_as_text(machine['processor'])} | {_as_text(machine['torch'])} | {f'{memory / 1e9:.1f} GB' if memory else ''} |",
    )


def _as_text(found: str) -> str:
    """What stood in a file, to be shown in a cell of a Markdown table as it is: no HTML, no link, no role, no other cell."""
    return " ".join(re.sub(r"[^\w\s.,:;/()%+-]", lambda sign: f"&#{ord(sign[0])};", found).split())


def _as_code(found: str) -> str:
    """The same for a hash."""
    return f"`{re.sub('[^0-9a-f]', '', found)}`"


def _sources(job: Job, profile: Profile) -> str:
    return "current" if current(job, profile) else "**changed since**"


def _expected(job: Job) -> float:
    """Seconds that the job took last time, or what the matrix says."""
    with contextlib.suppress(checkpoints.CheckpointError, OSError, KeyError, ValueError, TypeError):
        return float(checkpoints.read_json(job.result)["seconds"])
    return job.seconds


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _duration(seconds: float) -> str:
    """Rounded, in a unit that suits it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s"


def seed_list(text: str) -> list[int]:
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them, such as 0,1,2")
    return list(dict.fromkeys(map(int, text.split(","))))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("run", "list", "execute", "config", "book"):
        sub = commands.add_parser(command)
        sub.add_argument("profile")
        if command == "run":
            sub.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
            sub.add_argument("--only", nargs="*", default=[])
        if command in ("execute", "config"):
            sub.add_argument("name")
        sub.add_argument("--seeds", type=seed_list)
    given = parser.parse_args(arguments)
    if os.environ.get("SRLIB_DATA"):  # notebooks are executed in their own folders
        os.environ["SRLIB_DATA"] = str(Path(os.environ["SRLIB_DATA"]).expanduser().absolute())
    try:
        profile = load_profile(given.profile, given.seeds, only=given.name if given.command == "execute" else None)
        if given.command == "book":
            print(f"the book is at {build_book(profile)}")
            return 0
        if given.command == "list":
            print(table(profile))
            return 0
        if given.command == "config":
            runs = [job for job in profile.runs if job.name in named([given.name], profile)]
            if len(runs) != 1:
                raise PipelineError(
                    f"{given.name} means {', '.join(job.name for job in runs) or 'a chapter'}; name one run"
                )
            print(yaml.safe_dump(runs[0].parameters["config"], sort_keys=False), end="")
            return 0
        if given.command == "execute":
            wanted = named([given.name], profile)
            end_with(int(os.environ.get(STARTED_BY, 0)))
            for name in sorted(wanted):
                execute(profile.jobs[name], profile)
            return 0
        if given.jobs < 1:
            raise PipelineError(f"--jobs {given.jobs}: at least one job at a time")
        # stopped by a batch system as by Ctrl-C: the children are stopped too
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with checkpoints.locked(profile.folder / ".lock", f"another run-all of the profile {profile.name} is at work"):
            failed = run(profile, given.jobs, given.only)
        if failed:
            print("\n".join([f"{len(failed)} failed:", *(f"  {name}: {how}" for name, how in failed.items())]))
        return bool(failed)
    except ERRORS as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pipeline: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
