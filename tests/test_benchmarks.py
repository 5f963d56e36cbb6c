"""The benchmark compares like with like, counts operations right, and every part of it runs."""

import importlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import srlib
from srlib import checkpoints, experiment

ROOT = Path(__file__).parent.parent
# (benchmarks/ is no package: its files import each other by name, as scripts do)
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "papermill_runs"))
bench, costs, measuring, plain_loop, same_bits, speed = map(
    importlib.import_module, ("bench", "costs", "measuring", "plain_loop", "same_bits", "speed")
)


@pytest.mark.parametrize("name", ["wide", "small"])
def test_the_plain_loop_computes_the_chain_of_short_run(name, monkeypatch):
    posterior, n_steps, delta = measuring.posterior(measuring.TINY.models[name], 3), 6, 0.01
    g = posterior.generator
    initial, noise = g.sample_prior(3), torch.randn(n_steps, 3, g.latent_dim)
    pieces = iter([piece for step in noise for piece in g.split(step)])
    monkeypatch.setattr(torch, "randn_like", lambda z: next(pieces))
    plain = plain_loop.plain_short_run(g, posterior.x, g.split(initial), n_steps, delta, posterior.sigma)
    s = srlib.step_size_from_noise_scale(delta)
    ours = srlib.short_run(posterior, n_steps, s, initial, noise).final
    assert next(pieces, None) is None and (ours - initial).abs().max() > 0.01
    torch.testing.assert_close(torch.cat(plain, 1), ours, rtol=1e-4, atol=1e-4)


def test_operations_are_those_of_the_direct_form():
    """Of each weight: 2 operations forward and 2 backward for every place and image that it is used at."""
    model = measuring.Model((3,), (1, 10, 10), 4, 5)
    posterior, n = measuring.posterior(model, 2), 2
    linear = 3 * 4 * 25
    met = [sum(0 <= i + j < 5 for i in range(5) for j in range(-k, k + 1)) ** 2 for k in (2, 1)]  # not the padding
    # p_l, d_l; o_0 spreads each of 5 inputs over 4 of 10 outputs and what its padding cuts off
    spread = sum(0 <= 2 * i + j - 1 < 10 for i in range(5) for j in range(4)) ** 2
    convolutions = 16 * (2 * met[0] + met[1]) + 4 * spread
    counted = speed.operations(posterior, posterior.generator.sample_prior(n))
    assert counted == 4 * n * (linear + convolutions)


def test_fractions_of_the_peak_count_the_result_and_what_was_done_for_it():
    found = speed.of_peak(direct=600, done=200, seconds=2.0, peak=400.0)
    assert found["useful"] == 0.75 and found["done"] == 0.25


def test_a_slow_side_is_not_timed_again_and_the_first_call_does_not_count(monkeypatch):
    seconds = {"slow": iter([50.0, 4.0, 6.0]), "fast": iter([9.0, 1.0, 2.0, 4.0])}
    monkeypatch.setattr(measuring, "seconds_of", lambda side: next(side))
    found = measuring.by_turns(seconds, 3, 5.0)
    assert found["slow"] == {"warm_up": 50.0, "seconds": [4.0, 6.0], "median": 5.0}
    assert found["fast"] == {"warm_up": 9.0, "seconds": [1.0, 2.0, 4.0], "median": 2.0}


def test_a_side_may_have_a_budget_of_its_own(monkeypatch):
    monkeypatch.setattr(measuring, "seconds_of", lambda side: 1.0)
    found = measuring.by_turns({"long": None, "short": None}, 5, {"long": 9.0, "short": 1.0})
    assert [len(found[name]["seconds"]) for name in ("long", "short")] == [5, 2]


def test_ratios_take_the_best_threads_of_each_side_and_the_defaults():
    def setting(threads, same_as, **seconds):
        forms = {form: {"seconds": [s * speed.K] * 3, "copy": 0.0} for form, s in seconds.items()}
        return {"threads": threads, "timed_steps": speed.K, "same_as": same_as, "forms": forms}

    same = {"float32": "without_frequencies"}
    found = speed.ratios(
        [
            setting(1, same, plain=6.0, frozen=6.0, without_frequencies=4.0),
            setting(2, same, plain=8.0, frozen=3.0, without_frequencies=2.0),
        ]
    )
    assert found["default"]["ratio"] == 4.0
    ratios = {form: of["ratio"] for form, of in found["best"].items()}
    assert ratios == {"plain": 1.0, "frozen": 2.0, "without_frequencies": 3.0, "float32": 3.0}
    assert found["best_threads"] == {"plain": 1, "frozen": 2, "without_frequencies": 2, "float32": 2}
    gains = {form: (of["over"], of["ratio"]) for form, of in found["gains"].items()}
    assert gains == {"frozen": ("plain", 2.0), "without_frequencies": ("frozen", 1.5)}  # nothing against itself


def test_a_step_has_its_share_of_the_copy():
    form = {"seconds": [7.0, 12.0], "copy": 2.0}
    setting = {"timed_steps": 5, "same_as": {"other": "form"}, "forms": {"form": form}}
    assert speed.per_step(setting, "other") == [2.0 / speed.K + 1.0, 2.0 / speed.K + 2.0]


def test_the_interval_of_a_ratio_leaves_out_no_more_than_it_may():
    few, nine = (speed.paired([float(i + 1) for i in range(n)], [1.0] * n) for n in (3, 9))
    assert few == {"ratio": 2.0, "low": 1.0, "high": 3.0, "holds": 0.75, "rounds": 3}
    assert (nine["low"], nine["ratio"], nine["high"]) == (2.0, 5.0, 8.0)
    inside = sum(math.comb(9, i) for i in range(2, 8)) / 2**9  # the median lies above 2 to 7 of nine
    assert nine["holds"] == pytest.approx(inside) and inside > 0.95
    assert speed.paired([3.0], [2.0])["holds"] == 0


def test_forms_are_the_same_code_if_they_replace_the_same_layers_in_the_same_type():
    layers = {"without_frequencies": [], "float32": [], "frequencies_everywhere": ["a"], "bfloat16": []}
    assert speed.same_code(layers) == {"float32": "without_frequencies"}
    model = measuring.TINY.models["wide"]
    posterior = measuring.posterior(model, 2)
    everywhere = speed.fourier_layers(speed.copy_of(posterior, **speed.FORMS["frequencies_everywhere"]))
    assert everywhere and not speed.fourier_layers(speed.copy_of(posterior, **speed.FORMS["without_frequencies"]))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell who took its time")
def test_time_of_others_is_not_our_own(tmp_path):
    def busy():
        ended = time.process_time() + 0.5
        while time.process_time() < ended:
            pass

    before = measuring.seconds_of_others()
    subprocess.run([sys.executable, "-c", ""], check=True)
    taken = sum(os.times()[:4])
    busy()
    meanwhile = sum(os.times()[:4]) - taken
    assert meanwhile == pytest.approx(0.5, abs=0.1)
    measuring.record(tmp_path / "part.json", lambda: {"busy": busy()})
    written = checkpoints.read_json(tmp_path / "part.json")
    assert measuring.seconds_of_others() >= before - 0.1  # clocks tick
    assert 0 <= written["others"] <= os.cpu_count() - 0.5 / written["seconds"] + 0.2


def test_layers_of_a_run_are_what_its_latents_are_in():
    assert costs.layers({"latent_dims": [8, 16, 32], "options": {}}) == 3
    assert costs.layers({"latent_dims": [8, 16, 32], "options": {"n_levels": 2}}) == 2


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(measuring, "in_child", lambda function, *arguments, limit=None: function(*arguments))


# `compile` takes a minute, `starting` and `data_parallel` start Python anew; they are left to `make bench`.
@pytest.mark.parametrize("name", [name for name in bench.PARTS if name not in ("compile", "starting", "data_parallel")])
def test_every_part_runs(name, tmp_path, in_this_process):
    assert bench.run([name], measuring.TINY, tmp_path) == []
    results = checkpoints.read_json(tmp_path / f"{name}.json")["results"]
    if name == "inner_loop":
        measured = [{*s["forms"]} for s in results["settings"]]
        assert all(forms.isdisjoint(s["same_as"]) for forms, s in zip(measured, results["settings"]))
        in_float32 = {form for form, given in speed.FORMS.items() if "precision" not in given}
        assert {"plain", "frozen", *in_float32} <= results["ratios"]["wide"]["best"].keys()
    if name == "peak":
        (setting,) = results["settings"]
        assert sum(setting["float32"]["profile"].values()) == pytest.approx(1)
        assert setting["float32"]["direct_operations"] > 0 and setting["float32"]["done_operations"] > 0


def test_a_part_that_fails_leaves_the_others_and_its_last_result(tmp_path, in_this_process, monkeypatch):
    monkeypatch.setattr(bench, "PARTS", {"broken": lambda sizes: 1 / 0, "whole": lambda sizes: {"value": 1}})
    (tmp_path / "broken.json").write_text("as it was")
    assert bench.run(["broken", "whole"], measuring.TINY, tmp_path) == ["broken"]
    assert (tmp_path / "broken.json").read_text() == "as it was"
    assert checkpoints.read_json(tmp_path / "whole.json")["results"] == {"value": 1}


@pytest.mark.parametrize("given", [["--rounds", "5"], ["--rounds", "7", "--tiny"]])
def test_rounds_that_give_no_interval_measure_nothing(given, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(sys, "argv", ["bench.py", *given])
    with pytest.raises(SystemExit):
        bench.main()
    assert f"--rounds {given[1]}: an interval takes at least 6" in capsys.readouterr().err


def test_a_measurement_that_does_not_end_is_stopped():
    with pytest.raises(TimeoutError, match=r"sleep took more than 0\.05 seconds"):
        measuring.in_child(time.sleep, 60, limit=0.05)


def test_rows_to_be_compared_are_short_and_cover_every_system():
    configs = [job.config for job in importlib.import_module("pipeline").load_profile("digits").runs]
    rows = [experiment.Config.from_dict(row) for row in same_bits.rows(configs)]
    assert {row.system for row in rows} == set(experiment.SYSTEMS)
    assert all(row.n_updates == same_bits.N_UPDATES for row in rows)
    assert all(row.every < row.n_updates for row in rows if row.step_size_search != "none")


def test_a_system_with_another_bit_in_one_row_is_left_out():
    def said(system, bits, sources):
        return {"row": "x", "system": system, "bits": bits, "source_hash": sources, "training_hash": sources}

    failed = {"row": "x", "system": "glow", "error": "diverged"}
    old = [said("vae", "1", "a"), said("vae", "2", "a"), said("abp", "3", "a"), said("abp", "4", "a"), failed]
    new = [said("vae", "1", "b"), said("vae", "2", "b"), said("abp", "3", "b"), said("abp", "0", "b"), failed]
    found = same_bits.agreeing(old, new)
    assert [*found] == ["vae"] and found["vae"]["rows"] == 2  # of glow there is nothing to tell by


def test_a_run_of_the_compared_sources_is_marked_and_keeps_what_trained_it(tmp_path):
    metrics = {"source_hash": "a", "training_hash": "t", "scores": {}}
    found = {"rows": 2, "old": {"source_hash": "a", "training_hash": "t"}, "new": {"source_hash": "b", "training_hash": "u"}}  # fmt: skip
    checkpoints.write_json(tmp_path / "metrics.json", metrics)
    assert same_bits.mark(tmp_path, found, "c0ffee") and not same_bits.mark(tmp_path, found, "c0ffee")
    marked = checkpoints.read_json(tmp_path / "metrics.json")
    assert (marked["source_hash"], marked["training_hash"]) == ("b", "u")
    assert marked["same_bits"][0] | {"date": ""} == {
        "source_hash": "a", "training_hash": "t", "commit": "c0ffee", "rows": 2, "updates": 3, "date": "",
    }  # fmt: skip
