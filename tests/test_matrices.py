"""The run matrices: every row can be built, is named by the rule, and stands where the paper's tables need it."""

import functools
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from srlib import checkpoints

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "papermill_runs"))
import pipeline  # noqa: E402

DATASETS = ("mnist", "svhn", "celeba32")
SINGLE_LAYER = ("vae", "iaf", "abp", "glo", "glow")  # Table 2, and Glow
IN_TABLES = ("short_run", "ladder_vae", *SINGLE_LAYER)
FULL = ("reference", "paper")
SEARCHES = {f"steps-{s}-{e}" for s in ("grid", "descent") for e in ("linear_noise", "change_of_variables")}  # Fig. 6


load_profile = functools.cache(pipeline.load_profile)


def rows(profile):
    """The first seed of each row."""
    found = {}
    for job in load_profile(profile).runs:
        found.setdefault(job.config.name, job.config)
    return found


def names_of_tables_1_and_2_and_the_celeba64_figures():
    several = {f"{s}-{d}-L{n}" for s in ("short_run", "ladder_vae") for d in (*DATASETS, "celeba64") for n in (1, 3, 5)}
    return several | {f"{s}-{d}" for s in (*SINGLE_LAYER, "abp-persistent") for d in DATASETS}


@pytest.mark.parametrize("profile", ["quick", "digits", *FULL])
def test_every_row_builds_its_system(profile):
    """A `Config` refuses what its system cannot be built from; two runs with one name are refused too."""
    assert load_profile(profile).runs


@pytest.mark.parametrize("profile", FULL)
def test_names_say_what_a_row_is(profile):
    for name, config in rows(profile).items():
        expected = f"{config.system}-{config.dataset}"
        if config.system in ("short_run", "ladder_vae"):
            expected += f"-L{len(config.latent_dims)}"
        if config.system == "abp" and config.n_steps == 25:
            expected = f"abp-persistent-{config.dataset}"
        if config.system == "short_run" and config.n_steps != 25:
            expected += f"-K{config.n_steps}"
        if config.generator == "ladder":  # Fig. 5; no row of a table
            expected = "hierarchy-ladder"
        if config.step_size_search != "none":  # Fig. 6
            expected = f"steps-{config.step_size_search}-{config.estimator}"
        assert name == expected


def table_3b(profile):
    """K = 25 is a row of Table 1; 400 steps take a GPU, in whose place the reference has the most that a processor can do."""
    return {f"short_run-celeba32-L5-K{k}" for k in (5, 10, 50, 400 if profile == "paper" else 100)}


def test_the_tables_have_their_rows():
    wanted = names_of_tables_1_and_2_and_the_celeba64_figures()
    assert set(rows("reference")) == wanted | table_3b("reference") | {"hierarchy-ladder"}
    assert set(rows("paper")) == wanted | table_3b("paper") | {"hierarchy-ladder"} | SEARCHES


@pytest.mark.parametrize("profile", FULL)
@pytest.mark.parametrize("chapter", ["systems", "reconstruction", "synthesis"])
def test_the_chapters_on_the_tables_read_all_their_rows(profile, chapter):
    read = {run.rpartition("-seed")[0] for run in load_profile(profile).jobs[chapter].needs}
    own = table_3b(profile) if chapter == "reconstruction" else set()
    assert read == names_of_tables_1_and_2_and_the_celeba64_figures() | own


def test_the_comparison_with_the_ladder_vae_has_three_seeds_on_mnist_and_celeba32():
    jobs = load_profile("reference").runs
    for name in names_of_tables_1_and_2_and_the_celeba64_figures():
        compared = re.fullmatch(r"(short_run|ladder_vae)-(mnist|celeba32)-L\d", name)
        assert [job.config.seed for job in jobs if job.config.name == name] == ([0, 1, 2] if compared else [0])


def test_the_searches_of_the_paper_differ_from_its_table_in_nothing_else():
    """Three seeds of each, as in Fig. 6, which the chapter on claims reads."""
    profile = load_profile("paper")
    plain = asdict(rows("paper")["short_run-mnist-L1"])
    for name in SEARCHES:
        assert [job.config.seed for job in profile.runs if job.config.name == name] == [0, 1, 2]
        assert {f"{name}-seed{seed}" for seed in range(3)} <= set(profile.jobs["claims"].needs)
        searched = asdict(rows("paper")[name])
        differ = {entry for entry, value in searched.items() if value != plain[entry]}
        assert differ <= {"name", "step_size_search", "estimator", "every"}
        assert searched["every"] < searched["n_updates"] / 100


@pytest.mark.parametrize("profile", FULL)
def test_the_chapters_of_figures_4_and_5_have_their_runs(profile):
    jobs = load_profile(profile).jobs
    assert jobs["hierarchy"].needs == ("hierarchy-ladder-seed0",)
    assert {"short_run-mnist-L5-seed0", "ladder_vae-mnist-L5-seed0"} <= set(jobs["inpainting"].needs)


@pytest.mark.parametrize("profile", FULL)
def test_systems_are_compared_on_equal_terms(profile):
    """Glow has a generator, decay rates and, in the paper, a batch size of its own."""
    common = ("batch_size", "betas", "channels", "feature_size")
    chains = ("n_steps", "step_size", "sigma", "sigma_start", "anneal_fraction")
    found = rows(profile)
    latents = {n: found[f"short_run-mnist-L{n}"].latent_dims for n in (1, 3, 5)}
    for name, config in found.items():
        ours = found[f"short_run-{config.dataset}-L1"]
        assert config.n_updates == ours.n_updates and config.n_samples == ours.n_samples
        if config.system != "glow":
            assert all(getattr(config, entry) == getattr(ours, entry) for entry in common), name
            assert config.latent_dims == latents[len(config.latent_dims)]
        if config.system in ("ladder_vae", "vae", "iaf"):
            assert all(getattr(config, entry) == getattr(ours, entry) for entry in chains[2:]), name
        if name.startswith("abp-persistent"):
            assert asdict(config) == asdict(ours) | {"name": name, "system": "abp"}
        if name == f"abp-{config.dataset}":  # section 7.3, with s = 0.3^2 / 2
            assert [getattr(config, entry) for entry in chains[:4]] == [40, pytest.approx(0.045), 0.3, 0.3]


def test_the_reference_begins_with_each_system_on_each_dataset():
    first = list(rows("reference").values())[: 3 * len(IN_TABLES)]
    assert {(c.system, c.dataset) for c in first} == {(s, d) for s in IN_TABLES for d in DATASETS}
    assert load_profile("reference").by_priority


def test_every_default_of_the_paper_has_its_source():
    defaults = (ROOT / "papermill_runs/paper.yaml").read_text().split("defaults:\n")[1].split("runs:\n")[0]
    for line in defaults.splitlines():
        assert re.search(r'# ([57]\.\d: "|Table 4: "|the authors\' script|our choice: )', line), line


def test_learning_rates_of_the_digits_matrix_are_those_tuned_on_validation_images():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tuning

    results = checkpoints.read_json(tuning.RESULTS)["systems"]
    systems = {c.system for c in rows("digits").values()}
    assert set(results) == set(tuning.ROWS) == systems - {"tuned_short_run"}  # which is the short run, at its rate
    for system, found in results.items():
        scores = {float(rate): score for rate, score in found["by_learning_rate"].items()}
        assert sorted(scores) == sorted(tuning.RATES)  # the same budget for all
        best = min(scores, key=lambda rate: scores[rate] if scores[rate] != "diverged" else float("inf"))
        assert found["learning_rates"] == tuning.learning_rates(best)
        assert list(rows("digits")[tuning.ROWS[system]].learning_rates) == found["learning_rates"]


def test_one_learning_rate_serves_all_systems_of_the_reference():
    assert {config.learning_rates for config in rows("reference").values()} == {(1e-3, 1e-3, 3e-4)}


def test_learning_rates_of_the_paper_are_those_of_section_7_1():
    assert {c.learning_rates for c in rows("paper").values() if c.system != "glow"} == {(1e-4, 5e-5, 1e-5)}


def test_the_dry_run_covers_the_rows_of_the_paper_as_they_are_today():
    """benchmarks/dry_run.py has trained each of them for 2 updates, and runs again what has changed."""
    measured, today = checkpoints.read_json(ROOT / "benchmarks/dry_run.json")["rows"], rows("paper")
    assert {name: row["config"] for name, row in measured.items()} == {
        name: pipeline.row_hash(config) for name, config in today.items()
    }
    for job in load_profile("paper").runs:
        row = measured[job.config.name]
        assert 0 < row["seconds_per_update"] < math.inf and row["batch_size"] == job.config.batch_size
        assert job.seconds == pytest.approx(row["seconds_per_update"] * job.config.n_updates)


def test_the_layers_are_compared_on_equal_terms():
    """Two generators, each learned by the short run and by an encoder; they differ in nothing else, and in no seed."""
    jobs = [job for job in load_profile("digits").runs if job.name in load_profile("digits").jobs["hierarchy"].needs]
    grouped = {}
    for job in jobs:
        config = asdict(job.config)
        kind = config.pop("name"), config.pop("system"), config.pop("generator")
        grouped.setdefault(kind, []).append(config)
    assert {kind[1:] for kind in grouped} == {
        ("short_run", "ladder"), ("vae", "ladder"), ("short_run", "top_down"), ("ladder_vae", "top_down")
    }  # fmt: skip
    first, *others = grouped.values()
    assert len(first) == 3 and all(other == first for other in others)


@pytest.mark.parametrize("profile", ["digits", *FULL])
def test_no_run_of_the_tables_chooses_its_step_size(profile):
    """As the chapters on claims and the report say of them."""
    found = [c for name, c in rows(profile).items() if name.startswith("short_run-")]
    assert found and all(c.step_size_search == "none" and c.step_size == pytest.approx(0.05**2 / 2) for c in found)
