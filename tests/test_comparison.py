"""The rows of the tables: which run is which, what an inference costs, how scores are compared."""

from dataclasses import asdict
from pathlib import Path

import pytest

from srlib import checkpoints, comparison, data, experiment, provenance
from srlib.comparison import Gap, Row, Score

ROOT = Path(__file__).parent.parent


def write_run(results, name, mse=0.03, error=0.001, scores=None, **config):
    """A finished run without a training: metrics, and the files that they vouch for."""
    folder = results / f"{name}-seed{config.get('seed', 0)}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    metrics = {
        "config": asdict(experiment.Config(name, **config)),
        "scores": {"mse": mse, "mse_standard_error": error, **(scores or {})},
        "files": {"model.safetensors": provenance.file_hash(folder / "model.safetensors")},
    }
    checkpoints.write_json(folder / "metrics.json", metrics)
    return folder


def test_a_run_is_the_row_that_its_configuration_says(tmp_path):
    one = {"latent_dims": (8,)}
    write_run(tmp_path, "short_run-digits-L3")
    write_run(tmp_path, "ladder_vae-digits-L1-time", system="ladder_vae", **one)
    write_run(tmp_path, "abp-digits", system="abp", **one)
    write_run(tmp_path, "abp-persistent-digits", system="abp", **one)
    write_run(tmp_path, "glow-digits", system="glow", options={"n_levels": 2, "depth": 1, "width": 4})
    write_run(tmp_path, "short_run-digits-L3-K50", n_steps=50)
    write_run(tmp_path, "steps-fixed-0.05", evaluation_split="validation")
    write_run(tmp_path, "short_run-digits-L1", seed=7, **one)
    assert [run.row for run in comparison.finished_runs(tmp_path, [0])] == [
        Row("short_run", 3),
        Row("abp", 1),
        Row("abp_persistent", 1),
        Row("glow", 2),
        Row("ladder_vae", 1, equal_time=True),
    ]
    assert [run.row for run in comparison.finished_runs(tmp_path, [7])] == [Row("short_run", 1)]


def test_an_edited_result_is_refused(tmp_path):
    folder = write_run(tmp_path, "short_run-digits-L3")
    (folder / "model.safetensors").write_text("other weights")
    with pytest.raises(checkpoints.CheckpointError, match=r"model\.safetensors"):
        comparison.finished_runs(tmp_path, [0])


@pytest.mark.parametrize(
    "system, config, n",
    [
        ("short_run", {"n_steps": 7}, 7),
        ("abp", {"n_steps": 7}, 7),
        ("abp", {"n_steps": 7, "options": {"test_steps": 9}}, 9),
        ("glo", {}, 100),
        ("glo", {"options": {"inference_steps": 20, "n_starts": 3}}, 60),
        ("vae", {}, 0),
        ("iaf", {}, 0),
        ("ladder_vae", {}, 0),
        ("glow", {"options": {"n_levels": 2, "depth": 1, "width": 4}}, 0),
    ],
)
def test_gradients_of_an_inference(tmp_path, system, config, n):
    write_run(tmp_path, f"{system}-digits", system=system, latent_dims=(8,), **config)
    (run,) = comparison.finished_runs(tmp_path, [0])
    assert run.gradients_per_image == n


def test_gradients_are_those_that_inference_makes(tmp_path, monkeypatch):
    """Counted where they are made, for the three systems that make any."""
    from srlib import Posterior

    counted = []
    pull = Posterior.pull
    monkeypatch.setattr(Posterior, "pull", lambda self, e, *more: counted.append(len(e)) or pull(self, e, *more))
    settings = {"latent_dims": (4,), "channels": 2, "feature_size": 7, "n_steps": 3}
    systems = {"short_run": {}, "abp": {"test_steps": 5}, "glo": {"inference_steps": 4, "n_starts": 2}}
    for system, options in systems.items():
        write_run(tmp_path / system, f"{system}-digits", system=system, options=options, **settings)
        (run,) = comparison.finished_runs(tmp_path / system, [0])
        learned = experiment.Config.from_dict(run.config).build((1, 28, 28))
        counted.clear()
        learned.infer(data.to_unit_range(data.load("digits").test.images[:2]))
        assert sum(counted) == 2 * run.gradients_per_image, system


def test_scores_of_one_seed_and_of_several(tmp_path):
    write_run(tmp_path, "short_run-digits-L3", mse=0.03, error=0.001)
    row, read = Row("short_run", 3), comparison.squared_error
    runs = comparison.finished_runs(tmp_path, [0, 1])
    assert comparison.score(runs, "digits", row, read) == Score(0.03, 0.001, 1, {0: 0.03})
    assert comparison.score(runs, "mnist", row, read) is None
    assert comparison.cell(runs, [], "digits", row, read) == "0.0300\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.0010†"
    assert comparison.cell(runs, [], "mnist", row, read) == "not run"
    assert comparison.cell(runs, [], "digits", row, comparison.distance("fd", "prior")) == "no score"
    write_run(tmp_path, "short_run-digits-L3", mse=0.05, seed=1)
    runs = comparison.finished_runs(tmp_path, [0, 1])
    value, error, n, _ = comparison.score(runs, "digits", row, read)
    assert (value, error, n) == (pytest.approx(0.04), pytest.approx(0.01), 2)  # sd 0.01 sqrt 2, over sqrt 2


def test_a_cell_whose_trainings_all_diverged_says_so_even_where_nothing_else_was_run(tmp_path):
    row, read = Row("vae", 1), comparison.squared_error
    folder = tmp_path / "vae-digits-seed0"
    folder.mkdir()
    config = asdict(experiment.Config("vae-digits", system="vae", latent_dims=(8,)))
    checkpoints.write_json(folder / "diverged.json", {"config": config, "reason": "it did"})

    def shown(dataset):
        runs = comparison.finished_runs(tmp_path, [0, 1])
        return comparison.cell(iter(runs), comparison.diverged_runs(tmp_path), dataset, row, read)

    assert (shown("digits"), shown("mnist")) == ("diverged", "not run")
    write_run(tmp_path, "vae-digits", system="vae", latent_dims=(8,), seed=1)
    assert shown("digits").endswith("† (1 diverged)")


def test_the_distance_asked_for_is_found(tmp_path):
    ours = {
        "n_real": 400,
        "kid_digits": 0.1,
        "kid_digits_standard_error": 0.01,
        "fd_digits": 5.0,
        "fd_digits_standard_error": 0.5,
        "fd_digits_extrapolated": 4.0,
    }
    theirs = {"kid_inception": 0.2, "kid_inception_standard_error": 0.02, "fid": 50.0, "fid_standard_error": 2.0}
    metrics = {
        "scores": {"samples_prior": ours, "samples_prior_inception": theirs, "samples_aggregate": {"not_run": "why"}}
    }
    assert comparison.distance("fd", "prior")(metrics) == (5.0, 0.5)
    assert comparison.distance("kid", "prior")(metrics) == (0.1, 0.01)
    assert comparison.distance("fid", "prior")(metrics) == (50.0, 2.0)
    assert comparison.distance("fd", "aggregate")(metrics) is None
    assert comparison.distance("fid", "aggregate")(metrics) is None


def test_a_gap_is_decided_from_two_standard_errors_on_or_more_where_seeds_are_few():
    found = comparison.gap(Score(0.03, 0.003, 1), Score(0.05, 0.004, 1))
    assert found == Gap(pytest.approx(-0.02), pytest.approx(0.005), 2.0, True) and found.answer == "yes†"
    # equal errors of three seeds each have 4 degrees of freedom, those of three seeds beside none have 2
    assert comparison.gap(Score(0.0, 1.0, 3), Score(2.7, 1.0, 3)).decisive == pytest.approx(2.776, abs=1e-3)
    assert comparison.gap(Score(0.0, 1.0, 3), Score(2.7, 0.0, 1)).decisive == pytest.approx(4.303, abs=1e-3)
    assert comparison.gap(Score(0.0, 1.0, 3), Score(2.7, 1.0, 3)).answer == "undecided"
    assert comparison.gap(Score(0.0, 0.1, 3), Score(2.7, 0.1, 3)).answer == "yes"
    assert Gap(-0.02, 0.005).lower == "yes"


def test_a_gap_is_that_of_pairs_where_two_seeds_are_common():
    """Differences 1, 2, 3 whatever the seeds do; t of 2 degrees of freedom. Of seed 9 there is no pair."""
    ours, theirs = {0: 11.0, 1: 22.0, 2: 33.0}, {2: 30.0, 1: 20.0, 0: 10.0, 9: 500.0}
    found = comparison.gap(Score(22.0, 6.4, 3, ours), Score(140.0, 120.0, 4, theirs))
    assert found == Gap(2.0, pytest.approx(1 / 3**0.5), pytest.approx(4.303, abs=1e-3), False)
    assert Gap(0.02, 0.005).lower == "no"
    assert str(Gap(-0.00001, 0.001)).startswith("+0.0000")
    assert str(Gap(-12.3456, 0.5)).split("\N{NO-BREAK SPACE}") == ["-12.35", "±", "0.50"]
    assert Gap(0.02, 0.015).lower == Gap(-0.02, 0.015).lower == "undecided"


def test_lists_and_tables_are_texts():
    assert [comparison.listed("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert comparison.table([("x", "0.020", 3)], ["a", "b", "c"]).splitlines()[-1].split("|")[2].strip() == "0.020"
    assert comparison.table([(r"`a|b` *c* \| <i>d</i>", 1)], ["x|y", "n"]).splitlines() == [
        r"| x\|y                   | n   |",
        "|:-----------------------|:----|",
        r"| `a\|b` *c* \| <i>d</i> | 1   |",
    ]
    for call, message in (
        (lambda: comparison.listed([]), r"names=\[\] must be at least one text"),
        (lambda: comparison.listed(3), "names=3 must be a list"),
        (lambda: comparison.table([(1, 2)], ["a"]), r"rows hold \[1, 2\]; give an entry for each of columns=\['a'\]"),
        (lambda: comparison.table(3, ["a"]), "rows=3"),
        (lambda: comparison.distance("fdd", "prior"), "kind='fdd' must be one of fd, kid, fid"),
        (lambda: comparison.distance("fd", "posterior"), "source='posterior' must be one of prior, aggregate"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "text, complaint",
    [("", "holds None; it must be a list"), ("3", "holds 3; it must be a list"), ("{a: 1}", "holds {'a': 1}; it must be a list"),
     ("- 3", "the entry 3 must be a mapping"), ("- {table: 1, system: vae}", "row .* is not complete: 'layers'"),
     ("- {table: 1, system: vae, layers: 1, mnist: 0.1}", "row .* is not complete")],
)  # fmt: skip
def test_tables_that_are_none_are_refused(tmp_path, text, complaint):
    (tmp_path / "tables.yaml").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        comparison.paper_tables(tmp_path / "tables.yaml")


def test_the_transcribed_tables_agree_where_the_paper_prints_a_number_twice():
    paper = comparison.paper_tables(ROOT / "book/paper_tables.yaml")
    assert len(paper) == 2 + 15 + 15 + 10 + 6
    for dataset in ("svhn", "celeba32"):
        assert paper[2, "vae", 1, dataset, "fid"] == paper[1, "ladder_vae", 1, dataset, "fid"]
        assert paper[2, "short_run", 1, dataset, "fid"] == paper[1, "short_run", 1, dataset, "fid"]
    by_steps = {row.get("steps"): row for row in checkpoints.read_yaml(ROOT / "book/paper_tables.yaml")}
    assert by_steps[25]["celeba32"] == {name: paper[1, "short_run", 5, "celeba32", name] for name in ("mse", "fid")}


def test_nothing_to_say_leaves_no_trace_on_the_page():
    assert comparison.prose("") is None and comparison.prose(" ") is None
    assert comparison.prose("It holds.").data == "It holds."
