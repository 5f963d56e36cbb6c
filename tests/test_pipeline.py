"""The pipeline on a small project of its own: what is repeated, what is refused, what survives."""

import dataclasses
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

from srlib import checkpoints

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "papermill_runs"), str(ROOT / "tests" / "faults")]
import forks  # noqa: E402
import pipeline  # noqa: E402

RUN = """from pathlib import Path
from srlib import checkpoints, provenance
from srlib.data import DatasetUnavailable
Path(output).mkdir(parents=True, exist_ok=True)
if config["dataset"] == "mnist":
    raise DatasetUnavailable("mnist: set SRLIB_DATA")
if config["n_updates"] == 666:
    raise ArithmeticError("this run fails")
if config["n_updates"] == 999:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
model = Path(output) / "model.safetensors"
model.write_text("weights")
metrics = {"n_updates": config["n_updates"], "files": {model.name: provenance.file_hash(model)}}
checkpoints.write_json(Path(output) / "metrics.json", metrics)"""


@pytest.fixture
def project(tmp_path):
    """A project with one run notebook and two chapters, of which the second reads the run."""
    (tmp_path / "papermill_runs").mkdir()
    (tmp_path / "book").mkdir()
    parameters = 'config = {}\noutput = ""'
    text = forks.NOTEBOOK.format(title="Run", parameters=parameters, code=RUN)
    (tmp_path / "papermill_runs" / "train.md").write_text(text)
    for name in ("alone", "reader"):
        text = forks.NOTEBOOK.format(title=name, parameters='profile = ""', code="print(profile)")
        (tmp_path / "book" / f"{name}.md").write_text(text)
    matrix = {
        "label": "small",
        "runs": [{"name": "tiny", "n_updates": 3, "seconds": 5}],
        "chapters": [{"notebook": "alone"}, {"notebook": "reader", "needs": ["tiny"]}],
    }
    write_matrix(tmp_path, matrix)
    return tmp_path, matrix


@pytest.fixture
def without_kernels(monkeypatch):
    """Notebooks are executed by this process instead of a kernel of their own, which takes seconds to start."""

    monkeypatch.setattr(papermill, "execute_notebook", forks.execute_notebook)


def write_matrix(root, matrix, name="quick"):
    (root / "papermill_runs" / f"{name}.yaml").write_text(yaml.safe_dump(matrix))


def code_cell(code):
    """The text that gives a notebook one more."""
    return f"\n```{{code-cell}} ipython3\n{code}\n```\n"


def execute_all(root):
    """Execute what is not up to date, in this process; returns the names."""
    profile, executed = pipeline.load_profile("quick", root=root), []
    for job in profile.jobs.values():
        if not pipeline.up_to_date(job, profile):
            pipeline.execute(job, profile)
            executed.append(job.name)
    return executed


def test_a_change_repeats_just_what_depends_on_it(project, without_kernels):
    root, matrix = project
    assert execute_all(root) == ["tiny-seed0", "alone", "reader"]
    assert execute_all(root) == []
    path = root / "book" / "alone.md"
    path.write_text(path.read_text() + "\nMore prose.\n")
    assert execute_all(root) == []
    path.write_text(path.read_text() + code_cell("1 + 1"))
    assert execute_all(root) == ["alone"]
    matrix["runs"][0]["n_updates"] = 4
    write_matrix(root, matrix)
    assert execute_all(root) == ["tiny-seed0", "reader"]
    result = root / "papermill_runs/quick/book/reader.ipynb"
    result.write_text(result.read_text().replace("quick", "other"))
    assert execute_all(root) == ["reader"]
    metrics = root / "papermill_runs/quick/tiny-seed0/metrics.json"
    metrics.write_text(metrics.read_text().replace("4", "5", 1))
    assert execute_all(root) == ["tiny-seed0"]


@pytest.mark.parametrize(
    "folder, suffix", [("book", "yaml"), ("papermill_runs", "yaml"), ("benchmarks/measured", "json")]
)
def test_a_chapter_is_repeated_when_a_table_that_it_reads_changes(project, without_kernels, folder, suffix):
    root, _ = project
    (root / folder).mkdir(parents=True, exist_ok=True)
    table, other = root / folder / f"table.{suffix}", root / folder / f"other.{suffix}"
    path = root / "book" / "alone.md"
    reading = f'from pathlib import Path\nprint(Path("../{folder}", "table.{suffix}").read_text())'
    path.write_text(path.read_text().replace("print(profile)", reading))
    table.write_text("- 1")
    assert execute_all(root) == ["tiny-seed0", "alone", "reader"]
    other.write_text("- 1")
    assert execute_all(root) == []
    table.write_text("- 2")
    assert execute_all(root) == ["alone"]


def test_a_chapter_is_repeated_when_there_is_another_table_of_those_that_it_reads(project, without_kernels):
    root, _ = project
    (measured := root / "benchmarks/measured").mkdir(parents=True, exist_ok=True)
    path = root / "book" / "alone.md"
    path.write_text(path.read_text().replace("print(profile)", 'print("table-*.json")'))
    assert execute_all(root) == ["tiny-seed0", "alone", "reader"]
    (measured / "other-x.json").write_text("{}")
    assert execute_all(root) == []
    (measured / "table-x-y.json").write_text("{}")
    assert execute_all(root) == ["alone"]


def test_results_show_their_parameters_and_no_trace_of_the_machine(project):
    root, _ = project
    execute_all(root)
    for path in (root / "papermill_runs/quick").rglob("*.ipynb"):
        assert str(root) not in path.read_text() and "injected-parameters" not in path.read_text()
    assert not list(root.rglob("*.partial.ipynb")) and not list(root.rglob("*.source.ipynb"))
    notebook = nbformat.read(root / "papermill_runs/quick/book/alone.ipynb", as_version=4)
    assert 'profile = "quick"' in notebook.cells[1].source


def test_a_finished_training_is_only_shown_again_when_its_notebook_changes(project, without_kernels):
    root, _ = project
    path = root / "papermill_runs" / "train.md"
    sealed = (
        """"config": config, "training_hash": experiment.training_hash("short_run"), "source_hash": "older", "files":"""
    )
    code = RUN.replace('"files":', sealed).replace("import checkpoints", "import checkpoints, experiment")
    path.write_text(path.read_text().replace(RUN, code))
    profile = pipeline.load_profile("quick", root=root)
    pipeline.execute(profile.jobs["tiny-seed0"], profile)
    kept = root / "papermill_runs/quick/tiny-seed0/kept"
    kept.touch()
    path.write_text(path.read_text() + code_cell("1 + 1"))
    assert not pipeline.up_to_date(profile.jobs["tiny-seed0"], profile)
    pipeline.execute(profile.jobs["tiny-seed0"], profile)
    assert kept.exists()
    metrics = kept.with_name("metrics.json")
    older = {name: value for name, value in checkpoints.read_json(metrics).items() if name != "checksum"}
    checkpoints.write_json(metrics, older | {"training_hash": "of older sources"})
    pipeline.execute(profile.jobs["tiny-seed0"], profile)
    assert not kept.exists()


def test_edited_or_missing_results_stop_the_book_with_their_name(project, without_kernels):
    root, _ = project
    execute_all(root)
    profile = pipeline.load_profile("quick", root=root)
    run = profile.jobs["tiny-seed0"]
    pipeline.verify(run)
    model = run.output.with_name("model.safetensors")
    model.write_text("other weights")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or not the one"):
        pipeline.verify(run)
    model.write_text("weights")
    config = run.output.with_name("config.yaml")
    config.write_text("name: another")
    with pytest.raises(pipeline.PipelineError, match=r"config\.yaml is not the configuration"):
        pipeline.verify(run)
    config.unlink()
    metrics = run.output.with_name("metrics.json")
    metrics.write_text(metrics.read_text().replace("3", "4", 1))
    with pytest.raises(ValueError, match=r"metrics\.json was edited"):
        pipeline.verify(run)
    metrics.unlink()
    with pytest.raises(ValueError, match=r"no result .*metrics\.json"):
        pipeline.verify(run)
    profile.jobs["alone"].output.unlink()
    with pytest.raises(pipeline.PipelineError, match=r"alone\.ipynb is missing"):
        pipeline.verify(profile.jobs["alone"])


def test_half_a_run_and_an_edited_measurement_stop_the_book_with_their_name(project, without_kernels):
    root, matrix = project
    execute_all(root)
    write_matrix(root, matrix | {"by_priority": True})  # a run may be missing, but not half of it
    profile = pipeline.load_profile("quick", root=root)
    profile.jobs["tiny-seed0"].result.unlink()
    with pytest.raises(pipeline.PipelineError, match="of tiny-seed0 there are only some files"):
        pipeline._checked(profile)
    for name in ("benchmarks/measured/peak.json", "benchmarks/tuning.json", "papermill_runs/quick/measurements.json"):
        measured = root / name
        measured.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(measured, {"seconds": 3})
        measured.write_text(measured.read_text().replace("3", "4", 1))
        with pytest.raises(checkpoints.CheckpointError, match=f"{measured.name} was edited"):
            pipeline._checked(profile)
        measured.unlink()


def test_the_book_tells_which_results_are_of_older_sources(project, without_kernels, monkeypatch, capsys):
    root, matrix = project
    write_matrix(root, {"label": "", "chapters": matrix["chapters"][:1]})
    (root / "book" / "_toc.yml").write_text("parts: []")
    monkeypatch.setattr(pipeline.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", ""))
    execute_all(root)
    changes = [
        ("", "| current |", False),
        ("\nMore prose.\n", "| current |", False),
        (code_cell("1 + 1"), "| **changed since** |", True),
        ("\nProse on that.\n", "| **changed since** |", True),
    ]
    for change, row, told in changes:
        path = root / "book" / "alone.md"
        path.write_text(path.read_text() + change)
        profile = pipeline.load_profile("quick", root=root)
        with pytest.raises(pipeline.PipelineError, match="could not be built"):  # no Sphinx in this test
            pipeline.build_book(profile)
        assert ("made from older sources: alone;" in capsys.readouterr().out) == told
        page = (root / "book/_build/quick/source/runs.md").read_text()
        assert next(line for line in page.splitlines() if "{doc}`alone`" in line).endswith(row)
        shown = (root / "book/_build/quick/source/alone.ipynb").read_text()
        # text as it is today, beside what was executed, as long as the code is the same
        assert ("More prose." in shown) == (change == "\nMore prose.\n") and "Prose on that" not in shown
        assert "profile = 'quick'" in shown and "1 + 1" not in shown


def test_text_of_today_stands_beside_what_was_executed(project):
    root, _ = project
    text = (root / "book" / "alone.md").read_text()
    executed = pipeline.jupytext.reads(text, "md:myst")
    parameters, code = (cell for cell in executed.cells if cell.cell_type == "code")
    parameters.source = 'profile = "digits"'
    code.outputs, code.execution_count = [nbformat.v4.new_output("stream", text="digits")], 2
    tagged = text.replace("{code-cell} ipython3\nprint", "{code-cell} ipython3\n:tags: [hide-input]\n\nprint")
    assert tagged != text
    shown = pipeline.with_todays_text(executed, pipeline.jupytext.reads(tagged + "\nProse.\n", "md:myst"))
    assert [cell.source for cell in shown.cells] == ["# alone", 'profile = "digits"', "print(profile)", "Prose."]
    assert shown.cells[2].outputs == code.outputs and shown.cells[2].execution_count == 2
    assert shown.cells[2].metadata.tags == ["hide-input"] and shown.metadata == executed.metadata
    retagged = tagged.replace("[hide-input]", "[parameters]").replace("print(profile)", "exit()")
    for other in (text.replace("print(profile)", "print(1)"), text + code_cell("1 + 1"), retagged):
        assert pipeline.with_todays_text(executed, pipeline.jupytext.reads(other, "md:myst")) is executed


def test_a_run_without_data_waits_for_it_and_its_reason_names_no_folder_of_this_machine(project, monkeypatch, tmp_path):
    root, matrix = project
    write_matrix(root, matrix | {"runs": [{"name": "tiny", "dataset": "mnist"}], "chapters": []})
    monkeypatch.setenv("SRLIB_DATA", str(tmp_path))
    profile = pipeline.load_profile("quick", root=root)
    (job,) = profile.runs
    job.output.parent.mkdir(parents=True)
    pipeline.record_not_run(job, "an older reason")
    assert pipeline.run(profile, 1, []) == {} and not job.output.exists()
    assert "below $SRLIB_DATA" in pipeline.not_run(job) and str(tmp_path) not in pipeline.not_run(job)
    monkeypatch.setattr(pipeline.data, "load", lambda name: None)
    assert not pipeline.still_absent(job)


def test_mistyped_names_are_refused_before_anything_starts(project):
    root, matrix = project
    for change, message in [
        ({"runs": [{"name": "tiny", "n_update": 3}]}, "run 'tiny': unknown configuration entry 'n_update'"),
        ({"run": []}, "unknown entry run"),
        ({"chapters": [{"notebook": "alone", "need": []}]}, "unknown entry need"),
        ({"chapters": [{"notebook": "alone", "needs": ["tinny"]}]}, "needs"),
        ({"chapters": [{"notebook": "nowhere"}]}, "there is no notebook"),
        ({"chapters": [{"notebook": "../book/alone"}]}, "there is no notebook"),
        ({"chapters": [{"needs": ["tiny"]}]}, "there is no notebook"),
        ({"chapters": ["alone"]}, "'alone' must be a mapping"),
        ({"runs": 3}, "runs: 3 must be a list"),
        ({"runs": ["a"]}, "'a' must be a mapping"),
        ({"runs": [{"name": "../tiny"}]}, "it names a directory"),
        ({"runs": [{"name": "tiny", "seeds": 3}]}, "seeds: 3 must be a list"),
        ({"runs": [{"name": "tiny", "seconds": "fast"}]}, "seconds: 'fast' must be a number"),
        ({"runs": [{"name": "tiny"}, {"name": "tiny"}]}, "two runs are named 'tiny-seed0'"),
        ({"defaults": [1]}, r"defaults: \[1\] must be a mapping"),
        ({"by_priority": 1}, "by_priority: 1 must be true or false"),
    ]:
        write_matrix(root, matrix | change)
        with pytest.raises(pipeline.PipelineError, match=message):
            pipeline.load_profile("quick", root=root)
    for text, message in [
        ("", "None must be a mapping"),
        ("runs: [", r"quick\.yaml is no YAML that can be read: while"),
    ]:
        (root / "papermill_runs" / "quick.yaml").write_text(text)
        with pytest.raises(pipeline.PipelineError, match=message):
            pipeline.load_profile("quick", root=root)
    for name in ("quik", "../papermill_runs/quick"):
        with pytest.raises(pipeline.PipelineError, match=f"unknown profile '{name}'; there are: quick"):
            pipeline.load_profile(name, root=root)


def test_a_job_is_the_same_whether_or_not_the_rest_of_the_matrix_is_looked_at(project, without_kernels):
    root, matrix = project
    matrix["runs"].append({"name": "other", "n_updates": 3, "seeds": [0, 1]})
    matrix["chapters"][0]["needs"] = [["tiny"], "other"]
    write_matrix(root, matrix)
    execute_all(root)
    whole, chapter = pipeline.load_profile("quick", root=root), matrix["chapters"][0]["notebook"]
    for only, runs in [
        (chapter, {"tiny-seed0", "other-seed0", "other-seed1"}),
        ("other-seed1", {"other-seed0", "other-seed1"}),
    ]:
        part = pipeline.load_profile("quick", root=root, only=only)
        assert {job.name for job in part.runs} == runs
        assert part.jobs[only] == whole.jobs[only] and pipeline.key(part.jobs[only], part) == pipeline.key(
            whole.jobs[only], whole
        )
    assert pipeline.load_profile("quick", root=root, only="unknown").jobs.keys() == whole.jobs.keys()


def test_seeds_are_whole_numbers():
    assert pipeline.seed_list("0, 1") == [0, 1] and pipeline.seed_list("2,2") == [2]
    for text in ("a", "0,", "-1", ""):
        with pytest.raises(pipeline.argparse.ArgumentTypeError, match="must be whole numbers"):
            pipeline.seed_list(text)


def test_a_launcher_that_cannot_start_or_does_not_wait_is_named(project, monkeypatch, capsys):
    root, matrix = project
    write_matrix(root, matrix | {"chapters": []})
    profile = pipeline.load_profile("quick", root=root)
    for launch, message in [
        ("nowhere -n", "no command 'nowhere'"),
        ("'", "cannot be read"),
        ("/", "no command '/'"),
        ("srun .venv/bin/torchrun --standalone", "several processes cannot be one notebook"),
    ]:
        monkeypatch.setenv("LAUNCH", launch)
        with pytest.raises(pipeline.PipelineError, match=message):
            pipeline.run(profile, 1, [])
    words = root / "words"
    words.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS thread: $@"\n')
    words.chmod(0o755)
    monkeypatch.setenv("LAUNCH", f"{words} --gres=gpu:1")
    assert [*pipeline.run(replace(profile, seeds=[0]), 1, [])] == ["tiny-seed0"]
    assert "LAUNCH must wait until it is done" in capsys.readouterr().out
    said = f"1 thread: --gres=gpu:1 {sys.executable} {pipeline.__file__} execute quick tiny-seed0 --seeds 0\n"
    assert (profile.folder / "logs" / "tiny-seed0.log").read_text() == said


def test_the_configuration_of_a_run_is_printed_for_the_command_line(tmp_path, capsys):
    run = pipeline.load_profile("quick").runs[0]
    assert pipeline.main(["config", "quick", run.name]) == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert pipeline.experiment.Config.from_yaml(path) == run.config
    for name, seeds, message in [
        (run.config.name, "0,1", "-seed1; name one run"),
        ("errata", "0", "a chapter; name one"),
    ]:
        assert pipeline.main(["config", "quick", name, "--seeds", seeds]) == 1
        assert message in capsys.readouterr().err


@pytest.fixture
def sleepers(project, monkeypatch):
    """The profile of a project whose only run sleeps."""
    root, matrix = project
    write_matrix(root, matrix | {"chapters": []})
    (root / "sleep").write_text("#!/bin/sh\nexec sleep 60\n")
    (root / "sleep").chmod(0o755)
    monkeypatch.setenv("LAUNCH", str(root / "sleep"))
    return pipeline.load_profile("quick", root=root)


def test_any_error_ends_what_is_running(sleepers, monkeypatch):
    children, start = [], pipeline.start

    def kept(*given):
        children.append(start(*given))
        return children[-1]

    def fail(seconds):
        raise OSError("no more")

    monkeypatch.setattr(pipeline, "start", kept)
    monkeypatch.setattr(pipeline.time, "sleep", fail)
    with pytest.raises(OSError, match="no more"):
        pipeline.run(sleepers, 1, [])
    assert children[0].exitcode == -signal.SIGTERM


def test_a_signal_while_a_job_is_being_started_ends_it_too(sleepers, monkeypatch):
    """Python would ignore what the signal raises while it forks."""
    children, start = [], pipeline.start

    def disturbed(*given):
        signal.raise_signal(signal.SIGINT)
        children.append(start(*given))
        return children[-1]

    monkeypatch.setattr(pipeline, "start", disturbed)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a script starts behind itself ignores Ctrl-C
    try:
        with pytest.raises(SystemExit, match="130"):
            pipeline.run(sleepers, 1, [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert [child.exitcode for child in children] == [-signal.SIGTERM]


def test_the_last_words_of_a_job_are_its_own(tmp_path):
    log = tmp_path / "log"
    log.write_text("pipeline: the disk is full\n[IPKernelApp] WARNING | a matter of taste\n\n")
    assert pipeline._last_words(log, 1) == f"the disk is full ({log})"
    assert pipeline._last_words(log, -signal.SIGKILL).startswith(f"killed by SIGKILL ({log})")
    log.write_text("")
    assert pipeline._last_words(log, 3).startswith(f"ended with status 3 and said nothing ({log})")


def test_a_job_is_executed_by_one_process(project, without_kernels):
    root, _ = project
    profile = pipeline.load_profile("quick", root=root)
    with (
        checkpoints.locked(profile.folder / "logs" / "alone.lock", "busy"),
        pytest.raises(checkpoints.CheckpointError, match="alone is being executed by another process"),
    ):
        pipeline.execute(profile.jobs["alone"], profile)
    pipeline.execute(profile.jobs["alone"], profile)


def test_a_job_ends_with_the_process_that_started_it(tmp_path):
    job = "import os, pipeline, time; pipeline.end_with(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    starter = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {job!r}]); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'papermill_runs'}"}
    parent = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, env=environment)
    assert int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == b""  # the end of file comes when the job, which holds the pipe too, has ended
    parent.stdout.close()


def test_a_run_that_diverges_is_a_result_until_its_configuration_changes(project, monkeypatch):
    root, matrix = project

    def diverge(*_, **__):
        raise papermill.PapermillExecutionError(0, 0, "", "DivergenceError", "update 3: too long", [])

    monkeypatch.setattr(papermill, "execute_notebook", diverge)
    profile = pipeline.load_profile("quick", root=root)
    job = profile.jobs["tiny-seed0"]
    pipeline.execute(job, profile)
    assert pipeline.absence(job) == "diverged: update 3: too long"
    assert [path.name for path in job.output.parent.iterdir()] == ["diverged.json"]
    assert "diverged: update 3" in pipeline.runs_page(replace(profile, jobs={job.name: job}))
    monkeypatch.setattr(pipeline, "start", None)  # nothing is started
    assert pipeline.run(profile, 1, [job.name]) == {}
    monkeypatch.undo()
    with_it = pipeline.key(profile.jobs["reader"], profile)
    (job.output.parent / "diverged.json").rename(job.output.parent / "not_run.json")
    assert pipeline.key(profile.jobs["reader"], profile) != with_it
    (job.output.parent / "not_run.json").rename(job.output.parent / "diverged.json")
    matrix["runs"][0]["n_updates"] = 4
    write_matrix(root, matrix)
    assert pipeline.absence(pipeline.load_profile("quick", root=root).jobs["tiny-seed0"]) is None


def test_a_book_without_results_names_the_command_that_makes_them(project, without_kernels):
    root, _ = project
    profile = pipeline.load_profile("quick", [1], root)
    with pytest.raises(pipeline.PipelineError, match="no results yet; make run-all PROFILE=quick SEEDS=1 makes them"):
        pipeline.build_book(profile)
    pipeline.execute(profile.jobs["alone"], profile)
    with pytest.raises(pipeline.PipelineError, match="no result of tiny-seed1, reader; make run-all PROFILE=quick"):
        pipeline.build_book(profile)


def test_a_parameter_that_the_notebook_does_not_have_is_refused(project):
    root, _ = project
    path = root / "book" / "alone.md"
    path.write_text(path.read_text().replace('profile = ""', 'profil = ""'))
    profile = pipeline.load_profile("quick", root=root)
    with pytest.raises(pipeline.PipelineError, match=r"alone\.md has no parameter profile; it has profil"):
        pipeline.execute(profile.jobs["alone"], profile)


def test_parameters_are_the_names_that_the_cell_assigns(project):
    root, _ = project
    path = root / "book" / "alone.md"
    cell = 'profile: str = (\n    ""\n)\nother, text = 1, """\nnone = 0"""\nprint(sep="")'
    path.write_text(path.read_text().replace('profile = ""', cell))
    job = pipeline.load_profile("quick", root=root).jobs["alone"]
    pipeline.check_parameters(pipeline.jupytext.read(path), job)
    for name in ("none", "sep"):
        with pytest.raises(pipeline.PipelineError, match=f"no parameter {name}; it has other, profile, text"):
            pipeline.check_parameters(
                pipeline.jupytext.read(path), replace(job, parameters={"profile": "quick", name: 1})
            )


def test_seeds_replace_those_of_the_matrix(project):
    root, _ = project
    profile = pipeline.load_profile("quick", [0, 7], root)
    assert [job.name for job in profile.runs] == ["tiny-seed0", "tiny-seed7"]
    assert profile.jobs["reader"].needs == ("tiny-seed0", "tiny-seed7")
    assert profile.jobs["tiny-seed7"].parameters["config"]["seed"] == 7


def test_the_name_of_a_row_means_its_runs_with_all_seeds(project):
    root, _ = project
    profile = pipeline.load_profile("quick", [0, 7], root)
    assert pipeline.named(["tiny"], profile) == {"tiny-seed0", "tiny-seed7"}
    assert pipeline.named(["tiny-seed7", "alone"], profile) == {"tiny-seed7", "alone"}
    with pytest.raises(pipeline.PipelineError, match="no such run or chapter: other, tiny-seed1; there are: tiny"):
        pipeline.named(["tiny-seed1", "alone", "other"], profile)


@pytest.mark.parametrize("by_priority", [False, True])
def test_the_longest_run_is_started_first_unless_the_matrix_gives_priorities(project, capsys, monkeypatch, by_priority):
    root, matrix = project
    runs = [{"name": "short", "seconds": 5}, {"name": "long", "seconds": 9000}, {"name": "longer", "seconds": 36000}]
    write_matrix(root, matrix | {"runs": runs, "chapters": [], "by_priority": by_priority})
    monkeypatch.setenv("LAUNCH", "true")  # starts nothing
    pipeline.run(pipeline.load_profile("quick", root=root), 1, [])
    told = capsys.readouterr().out
    assert "0 of 3 jobs are up to date, 3 to run, about 12.5 h on one CPU core" in told
    started = [line.split()[-2] for line in told.splitlines() if line.endswith("started")]
    assert started == ["short-seed0", "long-seed0", "longer-seed0"][:: 1 if by_priority else -1]


def test_a_matrix_with_priorities_has_a_book_before_it_is_finished(project, without_kernels, monkeypatch):
    root, matrix = project
    write_matrix(root, matrix | {"by_priority": True})
    (root / "book" / "_toc.yml").write_text("parts: []")
    monkeypatch.setattr(pipeline.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", ""))
    profile = pipeline.load_profile("quick", root=root)
    with pytest.raises(pipeline.PipelineError, match="no results yet"):
        pipeline.build_book(profile)
    pipeline.execute(profile.jobs["reader"], profile)  # it would read the run
    with pytest.raises(pipeline.PipelineError, match="could not be built"):  # no Sphinx in this test
        pipeline.build_book(profile)
    pages = {path.name: path.read_text() for path in (root / "book/_build/quick/source").iterdir() if path.is_file()}
    assert "| tiny-seed0 | digits | | not finished |" in pages["runs.md"] and "{doc}`alone`" not in pages["runs.md"]
    assert "has no results of this chapter" in pages["alone.md"] and "reader.ipynb" in pages
    assert "tiny-seed0        5 s  not finished" in pipeline.table(profile)
    pipeline.execute(profile.jobs["tiny-seed0"], profile)
    assert pipeline.absence(profile.jobs["tiny-seed0"]) is None
    assert not pipeline.up_to_date(profile.jobs["reader"], profile)  # there is more to read


def test_the_book_of_a_companion_lies_within_and_both_lead_to_each_other(project, without_kernels, monkeypatch):
    root, matrix = project
    alone, reader = matrix["chapters"]
    write_matrix(root, matrix | {"companions": {"other": "Elsewhere"}, "by_priority": True, "chapters": [alone]})
    write_matrix(root, matrix | {"label": "other", "by_priority": True, "chapters": [reader]}, "other")
    (root / "book" / "_toc.yml").write_text("parts: []")
    (root / "book" / "_config.yml").write_text("title: Short run")
    profile = pipeline.load_profile("quick", root=root)
    pipeline.execute(profile.jobs["alone"], profile)
    other = pipeline.load_profile("other", root=root)

    def sphinx(*_, cwd, **__):
        (cwd / "_build" / "html").mkdir(parents=True)
        (cwd / "_build" / "html" / "index.html").write_text(cwd.name)
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(pipeline.subprocess, "run", sphinx)
    with pytest.raises(
        pipeline.PipelineError, match="the profile other has no results yet; make run-all PROFILE=other"
    ):
        pipeline.build_book(profile)
    pipeline.execute(other.jobs["reader"], other)
    for _ in range(2):  # the second one replaces the first
        index = pipeline.build_book(profile)
    assert index.read_text() == "quick" and (index.parent / "other" / "index.html").read_text() == "other"
    target = root / "book" / "_build" / "quick"
    assert 'Elsewhere: <a href="other/runs.html">' in (target / "source" / "runs.md").read_text()
    assert '<a href="../runs.html">' in (target / "other" / "source" / "runs.md").read_text()
    assert '<a href="../alone.html">`quick`</a> has' in (target / "other" / "source" / "alone.md").read_text()
    assert "Short run (profile other)" in (target / "other" / "source" / "_config.yml").read_text()
    assert "(profile" not in (target / "source" / "_config.yml").read_text()
    assert "seealso" not in (target / "source" / "alone.ipynb").read_text()  # the other has no such chapter
    write_matrix(root, matrix | {"label": "other", "by_priority": True}, "other")
    both = pipeline.load_profile("other", root=root)
    pipeline.execute(both.jobs["alone"], both)
    pipeline.build_book(profile)
    for source, link in ((target, "other/alone.html"), (target / "other", "../alone.html")):
        cells = nbformat.read(source / "source" / "alone.ipynb", as_version=4).cells
        assert "seealso" in cells[1].source and f'<a href="{link}">' in cells[1].source
    other.jobs["reader"].output.write_text("edited")
    monkeypatch.setattr(pipeline.subprocess, "run", None)  # nothing is built before all is checked
    with pytest.raises(pipeline.PipelineError, match=r"reader: .*reader\.ipynb is missing or was edited"):
        pipeline.build_book(profile)


def test_a_profile_takes_rows_of_another_with_other_seeds(project):
    root, matrix = project
    rows = {"names": [matrix["runs"][0]["name"]], "seeds": [7]}
    taken = {"profile": "quick", "rows": [rows]}
    write_matrix(root, {"label": "again", "runs_of": taken}, "again")
    (job,) = pipeline.load_profile("again", root=root).runs
    first = pipeline.load_profile("quick", root=root).runs[0].config
    assert job.config == dataclasses.replace(first, seed=7)
    assert job.output.parent == root / "papermill_runs" / "again" / f"{first.name}-seed7"
    wrong = [
        (
            {"runs_of": taken | {"rows": [rows | {"names": ["else"]}]}},
            r"again\.yaml: runs_of names 'else'; the rows of quick are tiny",
        ),
        ({"runs_of": taken | {"rows": [rows | {"names": [["tiny"]]}]}}, r"runs_of names \['tiny'\]"),
        (
            {"runs_of": taken | {"rows": [rows | {"names": []}]}},
            r"runs_of: \{'names': \[\], .* must give names and seeds",
        ),
        ({"runs_of": taken | {"rows": [rows | {"seeds": []}]}}, "must give names and seeds"),
        ({"runs_of": taken | {"rows": []}}, "runs_of must give a profile and rows of it"),
        ({"runs_of": taken | {"rows": [rows | {"name": "a"}]}}, "unknown entry name"),
        ({"runs_of": taken | {"rows": [rows] * 2}}, "two runs are named 'tiny-seed7'"),
        ({"runs_of": taken, "defaults": {"n_updates": 7}}, "stands without runs and defaults"),
        ({"runs_of": taken | {"profile": "../quick"}}, r"unknown profile '\.\./quick'; there are: again, quick"),
        ({"runs_of": taken | {"profile": "again"}}, "the rows of again are"),
        (
            {"runs_of": taken | {"rows": [rows | {"seeds": [0]}]}},
            "quick trains tiny with seed 0 already; give seeds that are new",
        ),
        ({"companions": {"else": "what"}, **matrix}, "unknown profile 'else'"),
        ({"companions": {"quick": 3}, **matrix}, "companions must name other profiles and say what they hold"),
        ({**matrix, "chapters": [{"notebook": "reader", "needs": [{"a": 1}]}]}, r"needs: \{'a': 1\} must be the name"),
        ({**matrix, "chapters": [{"notebook": "alone"}] * 2}, "the chapter 'alone' stands there twice"),
        ({}, "neither runs nor chapters"),
    ]
    for entries, message in wrong:
        write_matrix(root, {"label": "again", **entries}, "again")
        with pytest.raises(pipeline.PipelineError, match=message):
            pipeline.load_profile("again", root=root)
    write_matrix(root, {"label": "again", "runs_of": taken}, "again")
    with pytest.raises(pipeline.PipelineError, match="trains tiny with seed 0 already"):
        pipeline.load_profile("again", [0], root=root)


def test_a_chapter_on_rows_of_another_profile_depends_on_what_they_gave_there(project):
    root, _ = project
    taken = {"profile": "quick", "rows": [{"names": ["tiny"], "seeds": [7]}]}
    chapters = [{"notebook": "reader", "needs": ["tiny"]}]
    write_matrix(root, {"label": "again", "runs_of": taken, "chapters": chapters}, "again")
    here, there = (root / "papermill_runs" / name / "metrics.json" for name in ("again/tiny-seed7", "quick/tiny-seed0"))
    for path in (here, there):
        path.parent.mkdir(parents=True)
    checkpoints.write_json(here, {"mse": 0.1})
    keys = []
    for mse in (None, 0.3, 0.4):
        if mse:
            checkpoints.write_json(there, {"mse": mse})
        profile = pipeline.load_profile("again", root=root)
        keys.append([pipeline.key(profile.jobs[name], profile) for name in ("reader", "tiny-seed7")])
    of_chapter, of_run = zip(*keys)
    assert len(set(of_chapter)) == 3 and len(set(of_run)) == 1


def test_a_row_without_seconds_is_estimated_from_those_of_its_updates(project):
    root, _ = project
    config = pipeline.experiment.Config("tiny", n_updates=3, seed=4)
    row = {"config": pipeline.row_hash(config), "seconds_per_update": 400}
    checkpoints.write_json(root / "measured.json", {"rows": {"tiny": row}})
    for n_updates, seconds, expected in [(3, None, 1200), (3, 5, 5), (2, None, 60)]:  # the last one was not measured
        rows = [{"name": "tiny", "n_updates": n_updates, "seconds": seconds}]
        write_matrix(root, {"estimates": "measured.json", "runs": rows})
        profile = pipeline.load_profile("quick", root=root)
        assert profile.jobs["tiny-seed0"].seconds == pytest.approx(expected)
    write_matrix(root, {"estimates": "measured.json", "runs": [{"name": "tiny", "n_updates": 3}]})
    assert pipeline.table(pipeline.load_profile("quick", [0, 1], root)).splitlines()[1:] == [
        "tiny-seed0     20 min  to run",
        "tiny-seed1     20 min  to run",
        "2 jobs, about 40 min on one CPU core together",
    ]


def test_a_chapter_gets_the_seeds_of_its_runs_if_it_asks_for_them(project):
    root, matrix = project
    matrix["runs"] = [{"name": "tiny", "seeds": [4, 2]}, {"name": "other", "seeds": [2, 5]}]
    matrix["chapters"][1]["needs"] = [["tiny"], "other", ["tiny"]]  # lists are those of other chapters
    write_matrix(root, matrix)
    path = root / "book" / "reader.md"
    path.write_text(path.read_text().replace('profile = ""', 'profile, seed, seeds = "", 0, [0]'))
    chapters = pipeline.load_profile("quick", root=root).jobs
    assert chapters["reader"].parameters == {"profile": "quick", "seed": 2, "seeds": [4, 2, 5]}
    assert chapters["alone"].parameters == {"profile": "quick"}
    assert pipeline.load_profile("quick", [3], root).jobs["reader"].parameters["seed"] == 3


@pytest.fixture
def run_all(project, without_kernels, monkeypatch, capsys):
    """run_all(...): the status of `pipeline.py run quick ...` on the project, and what it printed; its jobs are forks."""
    root, _ = project
    monkeypatch.setattr(pipeline, "load_profile", partial(pipeline.load_profile, root=root))
    monkeypatch.setenv("SRLIB_DATA", "")

    def run(*arguments, command="run"):
        status = pipeline.main([command, "quick", *arguments])
        return status, "".join(capsys.readouterr())

    with forks.known_sources(["short_run"]):
        yield run


def test_a_failure_stops_nothing_else_and_missing_data_is_no_failure(project, run_all, monkeypatch):
    root, matrix = project
    matrix["runs"] = [
        {"name": "broken", "n_updates": 666},
        {"name": "killed", "n_updates": 999},
        {"name": "absent", "dataset": "mnist", "n_updates": 1},
    ]
    matrix["chapters"] = [{"notebook": "alone"}, {"notebook": "reader", "needs": ["broken"]}]
    write_matrix(root, matrix)
    status, told = run_all("--jobs", "2")
    assert status == 1
    assert "broken-seed0  FAILED" in told and "absent-seed0  not run (no data)" in told
    assert "reader  not started: broken-seed0 failed" in told
    results = root / "papermill_runs/quick"
    listed = told[told.index("3 failed:") :]
    assert f"broken-seed0: ArithmeticError: this run fails (see {results}/broken-seed0/train.failed.ipynb)" in listed
    assert f"killed-seed0: killed by SIGKILL ({results}/logs/killed-seed0.log)" in listed
    assert (results / "book/alone.json").exists()
    assert (results / "broken-seed0/train.failed.ipynb").exists() and not (
        results / "broken-seed0/train.ipynb"
    ).exists()
    assert "this run fails" in (results / "logs/broken-seed0.log").read_text()
    matrix["runs"][0]["n_updates"] = matrix["runs"][1]["n_updates"] = 1
    write_matrix(root, matrix)
    status, told = run_all("--jobs", "2")
    assert status == 0, told
    assert "1 of 5 jobs are up to date, 3 to run" in told and "absent-seed0  not run: mnist" in told


def test_runs_whose_weights_are_not_here_are_trained_when_a_chapter_may_load_them(project, run_all):
    root, matrix = project
    matrix["runs"] = [{"name": name, "n_updates": 3} for name in ("tiny", "shared", "other", "unread")]
    matrix["chapters"] = [
        {"notebook": "alone", "needs": ["shared", "other"]},
        {"notebook": "reader", "needs": ["tiny", "shared"]},
    ]
    write_matrix(root, matrix)
    assert run_all()[0] == 0
    models = {job.name: job.output.with_name("model.safetensors") for job in pipeline.load_profile("quick").runs}
    for model in models.values():
        model.unlink()
    assert "6 of 6 jobs are up to date, 0 to run" in run_all()[1]
    text = (root / "book" / "reader.md").read_text()
    for more, only, told, there in [
        ("", ["--only", "unread"], ["unread-seed0"], ["unread-seed0"]),
        (
            code_cell("1 + 1"),
            ["--only", "reader"],
            ["tiny-seed0", "shared-seed0"],
            ["tiny-seed0", "shared-seed0", "unread-seed0"],
        ),
        (code_cell("1 + 2"), [], [], ["tiny-seed0", "shared-seed0", "unread-seed0"]),
    ]:
        (root / "book" / "reader.md").write_text(text + more)
        status, said = run_all(*only)
        assert status == 0, said
        assert ("trained again for their weights" in said) == bool(told)
        assert not told or f"weights, which are not here or not their own: {', '.join(told)}\n" in said
        assert sorted(name for name, model in models.items() if model.exists()) == sorted(there)


def test_what_reads_a_run_that_is_trained_again_for_its_weights_may_need_others(project, without_kernels, monkeypatch):
    root, matrix = project
    matrix["runs"] = [{"name": name} for name in ("tiny", "shared", "other", "unread", "foreign")]
    matrix["runs"][-1] |= {"dataset": "svhn", "feature_size": 8}  # its images are not here
    matrix["chapters"] = [
        {"notebook": "alone", "needs": ["shared", "other"]},
        {"notebook": "reader", "needs": ["tiny", "shared", "foreign"]},
    ]
    write_matrix(root, matrix)
    monkeypatch.delenv("SRLIB_DATA", raising=False)
    execute_all(root)
    profile = pipeline.load_profile("quick", root=root)
    for job in profile.runs:
        job.output.with_name("model.safetensors").unlink()
    profile.jobs["tiny-seed0"].output.with_name("model.safetensors").write_text("those of another run")
    found = pipeline.to_execute([profile.jobs["reader"]], [*profile.jobs.values()], profile)
    assert [job.name for job in found] == ["tiny-seed0", "shared-seed0", "other-seed0", "alone", "reader"]
    found = pipeline.to_execute([profile.jobs["reader"]], [profile.jobs["reader"]], profile)
    assert [job.name for job in found] == ["tiny-seed0", "shared-seed0", "reader"]


def test_a_ledger_has_runs_trained_again_for_what_was_not_measured_before(project, without_kernels, monkeypatch):
    root, matrix = project
    matrix["runs"] = [{"name": name} for name in ("tiny", "shared", "other")]
    matrix["chapters"] = [{"notebook": "reader", "needs": ["tiny", "shared", "other"]}]
    write_matrix(root, matrix)
    reader = root / "book" / "reader.md"
    reader.write_text(reader.read_text() + '\n```{code-cell} ipython3\nledger = "claims.yaml"\n```\n')
    entry = {
        "name": "c",
        "statement": "s",
        "place": "p",
        "chapter": "reader",
        "quantity": "divergence_difference",
        "below": 0,
    }
    ledger = [entry | {"runs": ["tiny", "shared"], "options": {"n_images": 2}}]
    (root / "papermill_runs" / "claims.yaml").write_text(yaml.safe_dump(ledger))
    execute_all(root)
    profile = pipeline.load_profile("quick", root=root)
    for job in profile.runs:
        job.output.with_name("model.safetensors").unlink()

    def names(*stale):
        found = pipeline.to_execute([profile.jobs[name] for name in stale], [*profile.jobs.values()], profile)
        return [job.name for job in found]

    assert names("reader") == [
        "tiny-seed0",
        "shared-seed0",
        "reader",
    ]  # nothing is kept; the ledger does not name the third
    monkeypatch.setattr(pipeline.claims.Kept, "find", lambda *_: [0.1, 0.2])
    assert names("reader") == ["reader"]
    assert names("other-seed0") == ["other-seed0", "reader"]
    assert names("tiny-seed0") == ["tiny-seed0", "shared-seed0", "reader"]  # a pair of which one will be another


def test_a_training_begun_by_hand_is_gone_on_with(project, without_kernels):
    """Only the run itself can say whether it fits; what is begun is never removed unsaid."""
    root, _ = project
    folder = root / "papermill_runs" / "quick" / "tiny-seed0"
    folder.mkdir(parents=True)
    (folder / "training.safetensors").write_text("begun")
    profile = pipeline.load_profile("quick", root=root)
    (root / "papermill_runs" / "train.md").write_text(
        forks.NOTEBOOK.format(
            title="Run", parameters='config = {}\noutput = ""',
            code=f"from pathlib import Path\nassert (Path(output) / 'training.safetensors').read_text() == 'begun'\n{RUN}",
        )
    )  # fmt: skip
    with (
        checkpoints.locked(folder, "by hand"),
        pytest.raises(checkpoints.CheckpointError, match="another process trains"),
    ):
        pipeline.execute(profile.jobs["tiny-seed0"], profile)
    pipeline.execute(profile.jobs["tiny-seed0"], profile)
    assert pipeline.up_to_date(profile.jobs["tiny-seed0"], profile)


def test_results_that_cannot_be_read_are_kept(project, without_kernels, monkeypatch):
    """An error of the disk is no reason to think that nothing is there."""
    root, _ = project
    execute_all(root)
    profile, read = pipeline.load_profile("quick", root=root), checkpoints.read_json
    job = profile.jobs["tiny-seed0"]

    def fail(path):
        if Path(path).name == "metrics.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(checkpoints, "read_json", fail)
    assert not pipeline.up_to_date(job, profile)
    with pytest.raises(PermissionError, match="metrics.json"):
        pipeline.execute(job, profile)
    monkeypatch.undo()
    assert (job.output.parent / "model.safetensors").exists() and pipeline.up_to_date(job, profile)


@pytest.mark.parametrize("name", ["diverged.json", "not_run.json", "job.json"])
@pytest.mark.parametrize("content", ["{", "sealed"])
def test_a_damaged_record_costs_its_own_run_alone(project, run_all, name, content):
    root, _ = project
    run_all()
    path = root / "papermill_runs" / "quick" / "tiny-seed0" / name
    path.write_text(content)
    if content == "sealed":
        checkpoints.write_json(path, {"seconds": "long"})
    status, told = run_all()
    assert status == 0, told
    profile = pipeline.load_profile("quick", root=root)
    assert pipeline.up_to_date(profile.jobs["tiny-seed0"], profile)


HOSTILE = "a` {download}`/etc/hostname` [x](javascript:alert(1)) <script> | b\nc"


def test_what_stood_in_a_file_of_others_is_shown_as_text(project):
    root, _ = project
    job = pipeline.load_profile("quick", root=root).jobs["tiny-seed0"]
    metrics = {
        "scores": {"mse": 0.1, "mse_standard_error": 0.01, "n_images": 5, "split": HOSTILE},
        "config": {"dataset": HOSTILE, "n_updates": 3, "seed": 0},
        "data": {"fingerprint": HOSTILE},
        "source_hash": HOSTILE,
        "seconds": {"training": 1.0},
        "environment": {"processor": HOSTILE, "torch": HOSTILE},
        "peak_memory": None,
    }
    rows = pipeline._rows(job, pipeline.load_profile("quick", root=root), metrics)
    for row, columns in zip(rows, (7, 7), strict=True):
        assert row.count("|") == columns + 1 and "\n" not in row
        assert not any(sign in row.replace(f"[{job.name}](runs/{job.name})", "") for sign in ("<", "{", "["))
        assert row.count("`") in (0, 4)
    with pytest.raises(KeyError):
        pipeline._rows(job, pipeline.load_profile("quick", root=root), {"scores": {}})


@pytest.mark.parametrize("seconds", [-5, float("nan"), float("inf"), "long", True])
def test_an_estimate_is_a_time(project, seconds):
    root, matrix = project
    matrix["runs"][0]["seconds"] = seconds
    write_matrix(root, matrix)
    with pytest.raises(pipeline.PipelineError, match="seconds: .* must be a number from 0 on"):
        pipeline.load_profile("quick", root=root)


def test_two_at_once_get_a_clear_message(project, run_all):
    root, _ = project
    for lock, command, message in [
        ("papermill_runs/quick/.lock", "run", "another run-all of the profile quick is at work"),
        ("book/_build/quick/.lock", "book", "the book of the profile quick is being built by another process"),
    ]:
        with checkpoints.locked(root / lock, "it is held"):
            status, told = run_all(command=command)
        assert status == 1 and message in told
