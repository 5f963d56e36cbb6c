"""From a configuration to a run directory, and what is refused on the way."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import srlib
from srlib import checkpoints, experiment, provenance, training
from srlib.checkpoints import CheckpointError
from srlib.experiment import Config

sys.path.insert(0, str(Path(__file__).parent / "faults"))
import forks

TINY = dict(name="tiny", latent_dims=[2, 3], channels=4, n_steps=2, n_updates=3, batch_size=8, n_samples=400)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "tiny"
    return output, experiment.run(Config.from_dict(TINY), output, progress=False)


def some_of(digits):
    """200 digits to train on, 20 to validate with, and 100 to score."""
    parts = {
        name: replace(part, images=part.images[:n], labels=part.labels[:n], indices=part.indices[:n])
        for name, part, n in (
            ("train", digits.train, 200),
            ("validation", digits.validation, 20),
            ("test", digits.test, 100),
        )
    }
    return replace(digits, **parts)


@pytest.fixture
def few_digits(monkeypatch):
    """Runs see `some_of` the digits, and their sources are hashed once."""
    few = some_of(experiment.load("digits"))
    monkeypatch.setattr(experiment, "load", lambda name: few)
    with forks.known_sources(["short_run"]):
        yield


def without_labels(dataset):
    """The same images, which no classifier (slow to train) can be asked about."""
    return replace(dataset, **{s: replace(getattr(dataset, s), labels=None) for s in ("validation", "test")})


def test_a_run_directory_holds_everything(finished):
    output, metrics = finished
    assert sorted(p.name for p in output.iterdir()) == [
        "config.yaml",
        "history.json",
        "metrics.json",
        "model.safetensors",
    ]
    assert checkpoints.read_json(output / "metrics.json").items() >= json.loads(json.dumps(metrics)).items()
    assert metrics["scores"]["n_images"] == 1000 and 0 < metrics["scores"]["mse"] < 4
    assert {"recognised_originals", "recognised_reconstructions", "noise_scale"} <= set(metrics["scores"])
    assert metrics["config"]["seed"] == 0 and len(metrics["data"]["fingerprint"]) > 8
    assert metrics["scores"]["recognised_originals"] > 0.9
    assert "srlib.langevin" in metrics["modules"] and torch.__version__.startswith(metrics["environment"]["torch"])


def test_samples_of_both_sources_are_compared_with_training_images(finished):
    _, metrics = finished
    for source in ("prior", "aggregate"):
        scores = metrics["scores"][f"samples_{source}"]
        assert scores["n_real"] == scores["n_generated"] == TINY["n_samples"] and scores["feature_dim"] == 32
        assert scores["fd_digits"] > 10 * scores["fd_digits_standard_error"] > 0  # an untrained generator
        assert {"not_run", "fid"} & set(
            metrics["scores"][f"samples_{source}_inception"]
        )  # by whether its weights are there
    assert metrics["scores"]["samples_prior"]["fd_digits"] != metrics["scores"]["samples_aggregate"]["fd_digits"]
    assert 0 < metrics["seconds"]["inference_per_image"] < 1
    assert metrics["peak_memory"] is None or 1e8 < metrics["peak_memory"] < 1e11


@pytest.mark.parametrize("system, score", [("vae", "elbo"), ("glow", "bits_per_dimension")])
def test_what_a_system_knows_of_the_likelihood_stands_with_its_scores(system, score):
    config = Config.from_dict(
        TINY | {"system": system, "options": {"depth": 1, "n_levels": 1, "width": 8} if system == "glow" else {}}
    )
    digits = without_labels(experiment.load("digits"))
    part = replace(digits, test=replace(digits.test, images=digits.test.images[:300]))
    built = config.build((1, 28, 28))
    built.fit_aggregate(digits.train.images[:100])
    scores = experiment.evaluate(built, part, "test", 0, n_samples=100)
    rng = torch.Generator().manual_seed(training.stream(0, "samples"))
    x = built.as_input(part.test.images)
    expected = torch.cat([built.likelihood(batch, rng)[score] for batch in x.split(250)])
    assert scores[score] == pytest.approx(expected.mean().item(), rel=1e-6) and len(expected) == 300


def test_the_ladder_generator_is_a_matter_of_configuration():
    for system in ("short_run", "vae"):
        built = Config.from_dict(TINY | {"generator": "ladder", "system": system}).build((1, 28, 28))
        assert isinstance(built.generator, srlib.LadderGenerator)


def test_a_run_can_be_loaded_and_gives_the_same_reconstructions(finished):
    output, metrics = finished
    system, loaded, history = experiment.load_run(output)
    assert loaded["scores"] == metrics["scores"] and len(history["loss"]) == 3
    scores = experiment.evaluate(system, without_labels(experiment.load("digits")), "test", 0, TINY["n_samples"])
    assert scores.items() <= metrics["scores"].items() and "mse" in scores


def test_a_finished_run_is_scored_again_and_trained_again_only_where_its_training_changed(
    few_digits, tmp_path, monkeypatch
):
    copy, config = tmp_path / "run", Config.from_dict(TINY)
    metrics = experiment.run(config, copy, progress=False)
    assert metrics["scores"]["n_images"] == 100
    assert experiment.is_current(copy, config) and experiment.training_stands(copy, config)
    older = dict(metrics)
    checkpoints.write_json(copy / "metrics.json", older | {"scores": {"mse": 9.0}, "source_hash": "of older sources"})
    assert not experiment.is_current(copy, config) and experiment.training_stands(copy, config)
    weights = (copy / "model.safetensors").stat().st_mtime_ns
    again = experiment.run(config, copy, progress=False)
    assert experiment.is_current(copy, config)
    assert (copy / "model.safetensors").stat().st_mtime_ns == weights
    assert again["scores"] == metrics["scores"] and again["seconds"].keys() == metrics["seconds"].keys()
    assert again["seconds"].pop("last_sitting") != older["seconds"].pop("last_sitting")
    assert {name: again[name] for name in older} == older
    with monkeypatch.context() as changed_sources:
        changed_sources.setattr(experiment, "training_hash", lambda system: "of newer sources")
        assert not experiment.training_stands(copy, config)
        experiment.run(config, copy, progress=False)
    assert (copy / "model.safetensors").stat().st_mtime_ns != weights
    assert not experiment.training_stands(copy, Config.from_dict(TINY | {"seed": 1}))


def test_a_run_keeps_the_sources_that_it_began_with(tmp_path, monkeypatch):
    def edit_meanwhile(*_):
        monkeypatch.setattr(provenance, "source_hash", lambda _: "edited")
        return {}

    monkeypatch.setattr(experiment, "evaluate", edit_meanwhile)
    metrics = experiment.run(Config.from_dict(TINY), tmp_path, progress=False)
    assert "edited" not in (metrics["source_hash"], metrics["training_hash"])


def test_a_run_with_another_file_than_it_wrote_is_refused(finished, tmp_path):
    output, _ = finished
    for name in ("model.safetensors", "history.json"):
        copy = tmp_path / name
        shutil.copytree(output, copy)
        (copy / name).write_bytes((copy / name).read_bytes().replace(b"1", b"2", 1))
        with pytest.raises(CheckpointError, match=f"{name} is missing or not the one that its run wrote"):
            experiment.load_run(copy)


def test_a_run_without_its_weights_is_current_and_says_so_to_who_needs_them(few_digits, tmp_path):
    config, output = Config.from_dict(TINY | {"snapshots": [2]}), tmp_path / "quick" / "tiny-seed0"
    metrics = experiment.run(config, output, progress=False)
    for name in ("snapshot-2.safetensors", "model.safetensors"):
        (output / name).unlink()
        assert experiment.is_current(output, config) and not experiment.has_weights(output)
        assert not experiment.training_stands(output, config)
        with pytest.raises(CheckpointError, match=f"{name} .*PROFILE=quick ONLY=tiny-seed0"):
            experiment.load_run(output, snapshot=2 if "snapshot" in name else None)
    again = experiment.run(config, output, progress=False)
    assert experiment.has_weights(output) and again["files"] == metrics["files"]
    (output / "model.safetensors").unlink()
    (output / "history.json").unlink()
    with pytest.raises(CheckpointError, match=r"history\.json is missing"):
        experiment.verified_metrics(output)
    checkpoints.write_json(output / "metrics.json", {"config": {}})
    with pytest.raises(CheckpointError, match="does not name the files"):
        experiment.verified_metrics(output)


def test_validation_and_test_images_are_different(finished):
    output, metrics = finished
    system, _, _ = experiment.load_run(output)
    scores = experiment.evaluate(system, without_labels(experiment.load("digits")), "validation", 0, TINY["n_samples"])
    assert scores["n_images"] == 500 and scores["mse"] != metrics["scores"]["mse"]


def test_a_directory_with_another_run_is_left_alone(finished):
    output, _ = finished
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    with pytest.raises(ValueError, match="another configuration"):
        experiment.run(Config.from_dict(TINY | {"seed": 1}), output, progress=False)
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before


@pytest.mark.parametrize("left", ["nothing", "no YAML"])
def test_a_run_that_lost_its_configuration_is_not_overwritten_by_another(finished, tmp_path, left):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    (copy / "config.yaml").unlink() if left == "nothing" else (copy / "config.yaml").write_text("{")
    with pytest.raises(
        ValueError, match="another configuration" if left == "nothing" else "(?s)config.yaml.*remove that file"
    ):
        experiment.run(Config.from_dict(TINY | {"seed": 1}), copy, progress=False)
    assert (copy / "metrics.json").read_bytes() == (finished[0] / "metrics.json").read_bytes()


@pytest.mark.parametrize(
    "entries",
    [
        dict(latent_dims=[1] * 101),
        dict(system="iaf", latent_dims=[5], options=dict(n_flows=10**6)),
        dict(system="glow", options=dict(depth=10**6)),
    ],
)
def test_parts_beyond_count_are_refused_before_they_are_built(entries):
    with pytest.raises(ValueError, match="parts are more than 100"):
        Config.from_dict(TINY | entries)


def test_a_run_depends_on_the_modules_of_its_own_system_alone(tmp_path, monkeypatch):
    def sources():
        return provenance.source_hash(experiment.modules("short_run"))

    copy = tmp_path / "srlib"
    shutil.copytree(provenance.LIBRARY, copy)
    monkeypatch.setattr(provenance, "LIBRARY", copy)
    before = sources()
    other = copy / "baselines" / "other.py"
    other.parent.mkdir(exist_ok=True)
    (other.parent / "__init__.py").touch()
    for text in ("from ..plots import image_grid", "from ..learning import ShortRun"):
        other.write_text(text)
        assert sources() == before
    assert experiment.known_systems()["other"] == "srlib.baselines.other"
    monkeypatch.setitem(experiment.SYSTEMS, "other", "srlib.baselines.other")
    assert {"srlib.baselines.other", "srlib.learning", "srlib.experiment"} <= set(experiment.modules("other"))
    other.write_text("")
    assert not {"srlib.langevin", "srlib.learning", "srlib.step_size"} & set(experiment.modules("other"))
    for module in ("learning", "experiment", "entropy", "evaluation/scores", "evaluation/frechet"):
        path, trained = copy / f"{module}.py", experiment.training_hash("short_run")
        path.write_text(path.read_text() + "\nADDED = 1\n")
        assert sources() != before
        assert (experiment.training_hash("short_run") == trained) == module.startswith("evaluation")
        before = sources()


def test_seeds_decide_the_first_weights():
    first, again, other = (Config.from_dict(TINY | {"seed": s}).build((1, 28, 28)).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_step": 3}, "'n_step'; did you mean 'n_steps'"),
        ({"wholly_unknown": 3}, "known: name, system"),
        ({"system": "short_rum"}, "system='short_rum' is unknown; there are: short_run"),
        ({"n_updates": "many"}, "n_updates='many' must be int"),
        ({"n_updates": True}, "n_updates=True must be int"),
        ({"n_updates": 2.5}, "n_updates=2.5 must be int"),
        ({"latent_dims": 8}, "latent_dims=8 must be a list of int"),
        ({"learning_rates": ["1e-3", "x"]}, "must be a list of float"),
        ({"dataset": 3}, "dataset=3 must be str"),
        ({"evaluation_split": "train"}, "evaluation_split='train'"),
        ({"seed": -1}, "seed=-1"),
        ({"n_updates": 0}, "n_updates=0"),
        ({"n_steps": 0}, "n_steps=0"),
        ({"n_samples": 1}, "n_samples=1"),
        ({"n_samples": 5}, "n_samples=5:.*at least 6"),
        ({"warmup_updates": -1}, "warmup_updates=-1"),
        ({"generator": "leader"}, "generator='leader' is unknown; there are: top_down, ladder"),
        ({"generator": "ladder", "system": "ladder_vae"}, "generator='ladder': the ladder VAE merges"),
        (
            {"step_size_search": "grid", "every": 4},
            "every=4: step_size_search='grid' would never be done in n_updates=3",
        ),
        ({"dataset": "digitz"}, "did you mean 'digits'"),
        ({"device": "gpu"}, "device='gpu' is unknown; there are: auto, cpu"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"step_size": math.inf}, "step_size=inf"),
        ({"latent_dims": [8, 0]}, "latent_dims"),
        ({"feature_size": 6}, "feature_size=6"),
        ({"every": 0}, "every=0"),
        ({"estimator": "linear"}, "estimator='linear' is unknown"),
        ({"search_images": 1}, "n_images=1"),
        ({"options": {"depth": 3}}, "options={'depth': 3}"),
        ({"options": 3}, "options=3 must be a mapping"),
        ({"name": "../elsewhere"}, "it names a directory"),
        ({"name": ""}, "it names a directory"),
    ],
)
def test_mistakes_in_a_configuration_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(TINY | change)


def test_a_configuration_needs_a_name():
    with pytest.raises(ValueError, match="lacks a name"):
        Config.from_dict({})


def test_yaml_errors_name_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    for text in ("- a list", "name: [unclosed", "name: x\nsteps: 1\n", "name: x\nseed: 1\nseed: 2\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="config.yaml"):
            Config.from_yaml(path)
    path.write_text("name: x\nstep_size: 1e-3\nlearning_rates: [1e-3]\n")  # YAML reads 1e-3 as text
    assert Config.from_yaml(path).step_size == 1e-3 == Config.from_yaml(path).learning_rates[0]


@pytest.mark.parametrize("text, message", [("name: x\ndataset: nowhere\n", "nowhere"), ("name: x\nsed: 1\n", "sed")])
def test_the_command_line_ends_with_a_message_instead_of_a_traceback(tmp_path, capsys, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        experiment.main([str(path), "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_an_interrupted_command_says_how_it_goes_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", interrupted)
    path = tmp_path / "config.yaml"
    path.write_text("name: x\n")
    with pytest.raises(SystemExit) as ended:
        experiment.main([str(path), "--output", str(tmp_path / "out")])
    assert ended.value.code == 130 and "the same command goes on from what" in capsys.readouterr().err


def test_data_that_are_not_there_are_a_message_and_leave_the_directory_free(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SRLIB_DATA", raising=False)
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text("name: x\ndataset: mnist\n")
    with pytest.raises(SystemExit) as ended:
        experiment.main([str(path), "--output", str(out)])
    assert ended.value.code == 2 and "set SRLIB_DATA" in capsys.readouterr().err
    assert not out.exists()


def test_an_output_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file cannot be made a run directory"):
        experiment.run(Config.from_dict(TINY), tmp_path / "file", progress=False)


def test_a_run_that_never_began_does_not_hold_its_directory(few_digits, tmp_path):
    """Training 64 images of one batch each fails before its first update, and the mended configuration may go there."""
    with pytest.raises(ValueError, match="batches of 1 image"):
        experiment.run(Config.from_dict(TINY | {"batch_size": 1}), tmp_path, progress=False)
    experiment.run(Config.from_dict(TINY), tmp_path, progress=False)
