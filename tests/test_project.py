"""What holds the project together: the lock, the conda environment, the notebooks, the README."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement

from srlib import checkpoints

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(r) for r in (*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), []))]
NOTEBOOKS = [
    *(p for p in sorted((ROOT / "book").glob("*.md")) if "kernelspec" in p.read_text()),
    ROOT / "papermill_runs/train.md",
]


def locked(python):
    """name -> version of requirements.lock on Linux with this version of Python."""
    setting = {"python_full_version": f"{python}.0", "python_version": python, "sys_platform": "linux"}
    versions = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith(("#", " ")):
            name, _, rest = line.partition("==")
            version, _, marker = rest.partition(" ; ")
            if not marker or Marker(marker).evaluate(setting):
                assert name not in versions, f"{name} is locked twice for Python {python}"
                versions[name] = version.strip()
    return versions


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_satisfies_every_range_of_pyproject(python):
    versions = locked(python)
    for requirement in DIRECT:
        assert requirement.specifier.contains(versions[requirement.name], prereleases=True), requirement


def test_the_conda_environment_has_the_versions_of_the_lock():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    pairs = [entry.split("=") for entry in entries if isinstance(entry, str) and "=" in entry]
    conda = {{"pytorch": "torch"}.get(name, name): version for name, version in pairs}
    conda |= dict(entry.split("==") for entry in pip)
    versions = locked(conda.pop("python"))
    assert conda == {requirement.name: versions[requirement.name] for requirement in DIRECT}


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def test_no_file_names_a_package_host_or_a_path_of_one_machine():
    hosts = ["py" + "pi.org", "python" + "hosted", "npm" + "js", "../" + "shared", "/wo" + "rk/", "/tm" + "p/"]
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", "ignore")
        assert not [host for host in hosts if host in text], path


def test_the_weights_in_the_repository_are_few_and_those_of_the_model_that_most_chapters_load():
    weights = [path for path in tracked_files() if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) <= 10_000_000
    found = {path.relative_to(ROOT).as_posix() for path in weights}
    assert {f"papermill_runs/digits/short_run-digits-L3-seed{i}/model.safetensors" for i in range(3)} <= found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_text_notebooks_survive_a_round_trip(path, tmp_path):
    notebook = jupytext.read(path)
    assert {cell.cell_type for cell in notebook.cells} == {"code", "markdown"}
    assert any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)
    jupytext.write(notebook, tmp_path / "paired.ipynb")
    again = jupytext.read(tmp_path / "paired.ipynb")
    assert [(c.cell_type, c.source) for c in again.cells] == [(c.cell_type, c.source) for c in notebook.cells]
    text = jupytext.writes(again, fmt="md:myst")
    assert [c.source for c in jupytext.reads(text, fmt="md:myst").cells] == [c.source for c in notebook.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_of_a_notebook_has_an_alternative_text(path):
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "code" and re.search(r"plt\.show|figure = plots", cell.source):
            assert len(cell.metadata["mystnb"]["image"]["alt"]) > 20, cell.source


def test_the_ten_lines_of_the_readme_run_with_srlib_alone(tmp_path):
    """srlib/ copied into an empty folder; fewer updates, so that the test is short."""
    import shutil

    shutil.copytree(ROOT / "srlib", tmp_path / "srlib")
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert lines.count("n_updates=50") == 1
    script = lines.replace("n_updates=50", "n_updates=2").replace("n_steps=25", "n_steps=2")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test MSE" in done.stdout and "[16, 1, 28, 28]" in done.stdout


def test_the_equations_a_module_implements_stand_at_its_top():
    for name in ("generators", "posterior", "langevin", "closed_form", "learning"):
        docstring = (ROOT / "srlib" / f"{name}.py").read_text().split('"""')[1]
        assert re.search(r"Eqs?\. \(|Algorithm 1|log p", docstring), name


def test_the_readme_gives_the_minutes_that_were_measured():
    """benchmarks/timings.py measures, and the committed results say what they took; the README rounds up."""
    text, record = (ROOT / "README.md").read_text(), checkpoints.read_json(ROOT / "benchmarks/timings.json")
    minutes = {name: math.ceil(value) for name, value in record["minutes"].items()}
    digits = ROOT / "papermill_runs/digits"
    results = [*digits.glob("*/job.json"), *(digits / "book").glob("*.json")]
    seconds = [json.loads(p.read_text())["seconds"] for p in results]
    assert f"| any machine; a preview | {minutes['make run-all']} minutes |" in text
    assert f"| {math.ceil(sum(seconds) / 3600)} hours of one core, besides what the ledger measures once |" in text
    assert f"took {minutes['make setup']} minutes" in text and f"`make test` {minutes['make test']} minutes" in text
    assert f"on {record['machine']['cores']} cores of an {record['machine']['processor']}" in text


def test_the_page_on_tests_tells_of_every_file_of_tests():
    page = (ROOT / "book" / "tested.md").read_text()
    told = set(re.findall(r'^    "(\w+)": "', page.split("ORACLES = {")[1].split("\n}")[0], re.M))
    assert told == {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}


def test_what_a_chapter_reads_is_in_its_key():
    """pipeline.key looks for the bare name of a measurement or a table: a path in one piece would not be seen."""
    for page in (ROOT / "book").glob("*.md"):
        assert not re.search(r'/(measured|papermill_runs)/[\w./-]+\.(json|yaml)"', page.read_text()), page.name
