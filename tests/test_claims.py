"""Verdicts: what evidence says to a claim, and how evidence is taken from runs."""

import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import srlib
from srlib import checkpoints, claims, comparison, evidence, measurements
from srlib.claims import FAILS, HOLDS, INCONCLUSIVE, MIXED, NOT_MEASURABLE, NOT_RUN, ONE_SEED, Claim, Evidence, Judged

sys.path.insert(0, str(Path(__file__).parent))
from test_comparison import write_run

ROOT = Path(__file__).parent.parent
MSE = {"quantity": "score_difference", "options": {"score": "mse"}, "below": 0.0}


def claim(runs, cases=None, **given):
    return Claim("c", "It is so.", "Table 1", runs=tuple(runs), chapter="systems", cases=cases, **{**MSE, **given})


@pytest.mark.parametrize(
    "lower, upper, expected",
    [(-0.1, 0.1, HOLDS), (0.3, 0.5, FAILS), (-0.9, -0.3, FAILS), (0.1, 0.3, INCONCLUSIVE), (-1, 1, INCONCLUSIVE),
     (-math.inf, math.inf, INCONCLUSIVE), (0.2, 0.2, FAILS)],
)  # fmt: skip
def test_a_verdict_compares_two_intervals(lower, upper, expected):
    middle = 0.0 if lower == -upper else (lower + upper) / 2
    assert claims.verdict(Evidence(middle, lower, upper, "4 seeds"), -0.2, 0.2) == expected
    assert claims.verdict(Evidence(math.nan, lower, upper, "no scores"), -0.2, 0.2) == NOT_MEASURABLE


@pytest.mark.parametrize(
    "verdicts, expected",
    [((HOLDS, HOLDS, NOT_RUN), HOLDS), ((HOLDS, INCONCLUSIVE), INCONCLUSIVE), ((FAILS, NOT_RUN), FAILS), ((FAILS, INCONCLUSIVE), FAILS),
     ((HOLDS, FAILS, INCONCLUSIVE), MIXED), ((INCONCLUSIVE, NOT_RUN), INCONCLUSIVE), ((NOT_RUN, NOT_RUN), NOT_RUN),
     ((HOLDS, HOLDS + ONE_SEED), HOLDS + ONE_SEED), ((FAILS, FAILS + ONE_SEED), FAILS), ((INCONCLUSIVE, FAILS + ONE_SEED), FAILS + ONE_SEED),
     ((HOLDS, FAILS + ONE_SEED), MIXED + ONE_SEED), ((HOLDS, HOLDS + ONE_SEED, FAILS), MIXED)],
)  # fmt: skip
def test_a_claim_is_meant_for_all_of_its_cases(verdicts, expected):
    assert claims.overall([Judged(claims.Case((), ""), verdict, None) for verdict in verdicts]) == expected


@pytest.mark.parametrize(
    "call, complaint",
    [(lambda: evidence.over([], "seeds"), r"values=\[\] must be"), (lambda: evidence.over([math.nan, 1.0], "seeds"), "values hold nan"),
     (lambda: evidence.over(3, "seeds"), "values=3"), (lambda: evidence.over(["1"], "seeds"), "values hold '1'"), (lambda: claims.overall([]), r"judged=\[\]"),
     (lambda: claims.verdict(Evidence(0, -1, 1, ""), 2.0, -2.0), "above=2.0 and below=-2.0"), (lambda: claims.verdict(None, -1, 1), "evidence=None"),
     (lambda: claims.verdict(Evidence(0, 1, -1, ""), -2, 2), "lower <= upper"), (lambda: claims.verdict(Evidence(0, -1, 1, ""), None, 1), "above=None"),
     (lambda: claims.judge(None, Path()), "claim=None"), (lambda: claims.judge(claim(["a", "b"]), "here"), "results='here'")],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


def test_the_interval_is_students():
    """t of 2 degrees of freedom at 97.5 % is 4.303; the standard error of 1, 2, 3 is 1 / sqrt(3)."""
    found = evidence.over([1.0, 2.0, 3.0], "seeds")
    assert found.effect == 2 and found.of == "3 seeds"
    assert found.upper - 2 == pytest.approx(4.3027 / 3**0.5, rel=1e-4) and found.lower == pytest.approx(4 - found.upper)


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3], [0.3, 0.1 + 0.2], [0.17833748, 0.17833745, 0.17833745]])
def test_one_value_and_equal_values_have_no_interval(values):
    """The last are one move on a grid of step sizes, as three trainings in float32 have it."""
    found = evidence.over(values, "seeds")
    assert (found.lower, found.upper) == (-math.inf, math.inf)


def test_seeds_are_paired(tmp_path):
    """Seeds differ by far more than the two systems do; seed 3 is there for one of them only."""
    for seed, base in enumerate((0.03, 0.05, 0.09)):
        write_run(tmp_path, "a", mse=base - 0.002 - 1e-5 * seed, seed=seed)
        write_run(tmp_path, "b", mse=base, seed=seed)
    write_run(tmp_path, "a", mse=9.0, seed=3)
    (judged,) = claims.judge(claim(["a", "b"]), tmp_path)
    assert (
        judged.verdict == HOLDS
        and judged.evidence.effect == pytest.approx(-0.00201)
        and judged.evidence.of == "3 seeds"
    )


@pytest.mark.parametrize(
    "seeds, others", [((0, 1, 2), (0, 1, 2)), ((0, 1, 2), (0,)), ((0,), (0,)), ((0, 1, 2), (5, 6))]
)
def test_the_ledger_and_the_chapters_judge_alike(tmp_path, seeds, others):
    """Both by `comparison.gap`, whichever seeds the two systems have."""
    for name, own, base in (("short_run-digits-L3", seeds, 0.03), ("ladder_vae-digits-L3", others, 0.035)):
        for seed in own:
            mse, system = base + 0.002 * (seed % 3), name.partition("-")[0]
            mse += 1e-4 * (seed == own[0]) * (system == "short_run")  # equal differences would have no interval
            write_run(tmp_path, name, mse=mse, error=0.001, seed=seed, system=system)
    (judged,) = claims.judge(claim(["short_run-digits-L3", "ladder_vae-digits-L3"]), tmp_path)
    runs = comparison.finished_runs(tmp_path, range(9))
    ours, theirs = (
        comparison.score(runs, "digits", comparison.Row(system, 3), comparison.squared_error)
        for system in ("short_run", "ladder_vae")
    )
    found = comparison.gap(ours, theirs)
    assert judged.evidence.effect == pytest.approx(found.value)
    words = {"yes": HOLDS, "no": FAILS, "undecided": INCONCLUSIVE}
    assert judged.verdict.removesuffix(ONE_SEED) == words[found.lower]


def test_the_best_step_size_lies_inside_where_the_ends_are_worse(monkeypatch):
    """A parabola in log s whose minimum is at the run's own step size, or at the upper end of the grid: by hand."""
    system = SimpleNamespace(step_size=torch.tensor(0.02), n_steps=5, generator=SimpleNamespace(latent_dim=2))
    monkeypatch.setattr(measurements, "_posterior", lambda folder, n: (range(n), system))
    for place, expected in ((1.0, math.log(4) ** 2), (4.0, -((math.log(4) - math.log(2**1.5)) ** 2))):

        def objective(posterior, s, n_steps, estimator, rng, place=place):
            return ((s / 0.02).sqrt() / place).log().square().double().expand(len(posterior)) * 2

        monkeypatch.setattr("srlib.step_size.kl_objective", objective)
        found = measurements.interior_optimum({0: Path("a"), 1: Path("b")}, n_images=6)
        assert found.effect == pytest.approx(expected, rel=1e-5)


def test_inpainting_is_compared_with_pixels_of_training_images(monkeypatch):
    """One pixel seen, one hidden: the mean of the training images is 0 there, the one that is nearest where it is seen has -1."""
    x, mask = torch.tensor([[[[1.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    draws = {
        1: torch.tensor([[[[[1.0, 0.5]]]]]),
        8: torch.tensor([0.0, 0.5] * 4).view(8, 1, 1, 1, 1).expand(8, 1, 1, 1, 2),
    }
    training = torch.tensor([[[[255, 0]]], [[[0, 255]]]], dtype=torch.uint8)
    monkeypatch.setattr(measurements, "_inpainted", lambda folder, n, hidden, n_draws: (x, mask, draws[n_draws]))
    monkeypatch.setattr(measurements, "verified_metrics", lambda folder: {"config": {"dataset": "digits"}})
    monkeypatch.setattr("srlib.data.load", lambda name: SimpleNamespace(train=SimpleNamespace(images=training)))
    for fill, error, of_fill in (("mean", 0.75**2, 1.0), ("nearest", 0.5**2, 4.0)):
        found = measurements.inpainting_against_fill(
            {0: Path("a"), 1: Path("b")}, n_images=1, hidden="left half", fill=fill
        )
        assert found.effect == pytest.approx(error - of_fill)


@pytest.mark.parametrize(
    "gap, expected", [(0.0029, HOLDS + ONE_SEED), (0.0027, INCONCLUSIVE), (-0.003, FAILS + ONE_SEED)]
)
def test_one_seed_is_judged_by_its_errors_over_images(tmp_path, gap, expected):
    write_run(tmp_path, "a", mse=0.03, error=0.001)
    write_run(tmp_path, "b", mse=0.03 + gap, error=0.001)
    assert claims.judge(claim(["a", "b"]), tmp_path)[0].verdict == expected


def test_the_best_of_several_is_compared_and_distances_are_read(tmp_path):
    for name, fd in (("a", 5.0), ("b", 9.0), ("c", 4.0)):
        samples = {"fd_digits": fd, "fd_digits_standard_error": 0.1}
        write_run(tmp_path, name, scores={"samples_prior": samples})
    (judged,) = claims.judge(claim(["a", "b", "c"], options={"score": "fd"}), tmp_path)
    assert judged.evidence.effect == pytest.approx(1.0) and judged.verdict == FAILS + ONE_SEED


def test_runs_that_are_not_there_or_diverged_decide_nothing(tmp_path):
    write_run(tmp_path, "a-L1")
    write_run(tmp_path, "a-L3")
    (tmp_path / "b-L3-seed0").mkdir()
    checkpoints.write_json(tmp_path / "b-L3-seed0" / "diverged.json", {"reason": "it did"})
    found = claims.judge(claim(["a-L{layers}", "b-L{layers}"], cases={"layers": [1, 3]}), tmp_path)
    assert [judged.verdict for judged in found] == [NOT_RUN, claims.DIVERGED]
    assert [judged.case.title for judged in found] == ["L = 1", "L = 3"]
    write_run(tmp_path, "b-L3", seed=1)
    write_run(tmp_path, "a-L3", seed=1)
    found = claims.judge(claim(["a-L3", "b-L3"]), tmp_path)
    assert found[0].evidence.of == "1 seed against 2 (1 diverged)"


def test_step_sizes_are_compared_as_ratios_of_noise_scales(tmp_path):
    for seed, delta in enumerate((0.04, 0.05, 0.06)):
        write_run(tmp_path, "grid", scores={"noise_scale": delta}, seed=seed)
        write_run(tmp_path, "descent", scores={"noise_scale": 1.1 * delta}, seed=seed)
    seeds = {name: {s: tmp_path / f"{name}-seed{s}" for s in range(3)} for name in ("grid", "descent")}
    assert claims.end_of_search(seeds["descent"], seeds["grid"]).effect == pytest.approx(math.log(1.1))
    assert claims.end_of_search(seeds["grid"], reference=0.05).effect == pytest.approx(math.log(0.96) / 3)
    spread = claims.spread_of_ends(seeds["grid"])
    logs = torch.tensor([0.04, 0.05, 0.06]).log()
    assert spread.effect == pytest.approx(logs.std().item(), rel=1e-5)
    # chi square of 2 degrees of freedom is exponential: its quantiles are -2 log(1 - q)
    assert spread.lower == pytest.approx(spread.effect / math.sqrt(-math.log(0.025)), rel=1e-6)
    assert spread.upper == pytest.approx(spread.effect / math.sqrt(-math.log(0.975)), rel=1e-6)
    for seed in range(3):
        write_run(tmp_path, "same", scores={"noise_scale": 0.05}, seed=seed)
    equal = claims.spread_of_ends({s: tmp_path / f"same-seed{s}" for s in range(3)})
    assert (equal.lower, equal.upper) == (0.0, math.inf)  # what a grid of candidates can tell: no more than that


def test_the_share_of_the_search_is_that_of_the_seconds_of_training(tmp_path):
    folders = {}
    for seed, share in enumerate((0.1, 0.2)):
        seconds = {"training": 50.0, "step_size_search": 50 * share}
        folders[seed] = write_run(tmp_path, "a", seed=seed)
        record = checkpoints.read_json(folders[seed] / "metrics.json")
        del record["checksum"]
        checkpoints.write_json(folders[seed] / "metrics.json", record | {"seconds": seconds})
    assert claims.search_share(folders).effect == pytest.approx(0.15)


@pytest.mark.parametrize("end, moved", [(2**0.5, 2**0.5), (1, 2**0.5), (3, 3)])  # of delta, over that of the first half
def test_a_late_change_is_relative_to_the_annealed_sigma(tmp_path, end, moved):
    """s follows sigma^2 for the first half, which is no change; then s doubles, and an update after the last one of theta may move it."""
    folders = {}
    for seed in range(2):
        folders[seed] = write_run(tmp_path, "a", seed=seed)
        sigma = [0.3, 0.2, 0.15, 0.15, 0.15]
        s = [value**2 for value in sigma[:-1]] + [(2 + 1e-6 * seed) * 0.15**2]
        checkpoints.write_json(folders[seed] / "history.json", {"history": {"sigma": sigma, "step_size": s}})
        record = checkpoints.read_json(folders[seed] / "metrics.json")
        del record["checksum"]
        record["scores"]["noise_scale"] = end * (2 * 0.15**2) ** 0.5
        checkpoints.write_json(folders[seed] / "metrics.json", record)
    assert claims.late_change(folders).effect == pytest.approx(math.log(moved), rel=1e-5)


@pytest.fixture
def linear_run(monkeypatch):
    """A run whose model is linear: curvatures 1 + w^2 / sigma^2 = 2 and 5, and 4 steps of size 0.15."""
    g = srlib.LinearGenerator(torch.diag(torch.tensor([1.0, 2.0])).double(), torch.zeros(2).double())
    system = SimpleNamespace(generator=g, sigma=1.0, n_steps=4, step_size=0.15)
    images = torch.tensor([[0.5, -1.0], [2.0, 0.3]]).double().reshape(2, 2, 1, 1)
    monkeypatch.setattr(measurements, "_system", lambda folder, n, **_: (system, images[:n]))
    return {0: Path()}


def test_eigenvalues_of_a_linear_model(linear_run):
    found = measurements.smallest_eigenvalue(linear_run, n_images=2)
    assert found.effect == pytest.approx(4 * math.log10(1 - 0.15 * 5)) and found.of == "1 seed, over images"


def test_eigenvalues_below_the_rounding_of_the_product_are_found(monkeypatch):
    """Rotated, so that the product of 40 steps mixes 0.9^40 with 0.1^40 = 1e-40, which it cannot hold in 16 digits."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    step = turn @ torch.diag(torch.tensor([0.9, 0.5, 0.1]).double()) @ turn.T
    monkeypatch.setattr(measurements, "_jacobians", lambda folder, n: (None, step.expand(40, n, 3, 3)))
    assert measurements.smallest_eigenvalue({0: Path()}, n_images=2).effect == pytest.approx(-40, abs=1e-6)


def test_images_that_all_trainings_see_are_not_counted_again(linear_run):
    """What a training draws differs from the next one; three alike have no spread, and one says that it is one."""
    for quantity in (measurements.excess_of_eq_17, measurements.gradient_to_noise, measurements.start_share):
        assert quantity(linear_run, n_images=2).of == "1 seed, over images"
        assert quantity(dict.fromkeys(range(3), Path()), n_images=2).of == "3 seeds"


def test_the_share_of_the_start_in_a_linear_model(linear_run):
    """Variance (1 - s c)^2K of the start; 2 s sum (1 - s c)^2k of the noise: nothing of both together."""
    start = noise = 0.0
    for c in (2, 5):
        r = 1 - 0.15 * c
        start, noise = start + r**8, noise + 0.3 * sum(r ** (2 * k) for k in range(4))
    found = measurements.start_share(linear_run, n_images=2, n_draws=200)
    assert found.effect == pytest.approx(start / (start + noise), rel=0.2)


def test_lengths_of_the_two_terms(linear_run, monkeypatch):
    """With its last state at 0 the gradient is w x / sigma^2, here (0.5, -2)."""
    posterior, chain = measurements._short_run(Path(), 1)
    chain.trajectory[-2] = 0
    monkeypatch.setattr(measurements, "_short_run", lambda folder, n: (posterior, chain))
    expected = 0.15 * math.hypot(0.5, 2.0) / math.sqrt(2 * 0.15 * 2)
    assert measurements.gradient_to_noise(linear_run, n_images=1).effect == pytest.approx(math.log(expected))


def test_the_lead_and_the_contrast_of_layers(monkeypatch):
    """Layers from the top one down; the claims count them from the image."""
    told = {
        "a": [{"hue": 0.1, "digit": 0.5, "size": 0.2}, {"hue": 0.4, "digit": 0.7, "size": 0.6}, {"hue": 0.9, "digit": 0.3, "size": 0.1}],
        "b": [{"hue": 0.0, "digit": 0.5, "size": 0.2}, {"hue": 0.4, "digit": 0.6, "size": 0.6}, {"hue": 0.8, "digit": 0.4, "size": 0.1}],
        "c": [{"hue": 0.2, "digit": 0.2, "size": 0.2}, {"hue": 0.3, "digit": 0.4, "size": 0.6}],
    }  # fmt: skip
    monkeypatch.setattr(measurements, "_told_by_layers", lambda folder, n_images: told[folder.name])
    runs, other = {0: Path("a"), 1: Path("b")}, {1: Path("c")}
    assert measurements.layer_lead(runs, factors=["hue"], layer=1, n_probed=9).effect == pytest.approx((0.5 + 0.4) / 2)
    assert measurements.layer_lead(runs, factors=["hue", "size"], layer=3, n_probed=9).effect == pytest.approx(
        (0.15 - 0.5 + 0.1 - 0.5) / 2
    )
    found = measurements.layer_contrast(runs, first="hue", second="digit", n_probed=9)
    assert found.effect == pytest.approx((0.4 + 0.2) / 2) and found.of == "2 seeds"
    # c has its layers in one order for both factors
    against = measurements.layer_contrast(runs, other, first="hue", second="digit", n_probed=9)
    assert against.effect == pytest.approx(0.2 + 0.1) and against.of == "1 seed"


def test_layers_are_asked_for_the_factors_of_the_images_they_were_inferred_from(monkeypatch):
    """Of three layers the first is noise, the second is the hue, and the third has no place for more than the sizes."""
    known = srlib.load("colour_digits").test.factors
    hue = 6.2832 * known["hue"]
    latents = torch.stack([torch.randn(1000), hue.cos(), hue.sin(), known["size"]], 1)
    generator = SimpleNamespace(split=lambda e: e.split([1, 2, 1], 1))
    system = SimpleNamespace(generator=generator, infer=lambda x, rng: latents[: len(x)], as_input=lambda x: x)
    monkeypatch.setattr(measurements, "_system", lambda folder, n: (system, torch.zeros(n, 3, 32, 32)))
    monkeypatch.setattr(measurements, "verified_metrics", lambda folder: {"config": {"dataset": "colour_digits"}})
    top, middle, bottom = measurements._told_by_layers(Path("ladder"), 120)
    assert middle["hue"] > 0.95 > 0.2 > max(top["hue"], bottom["hue"], middle["size"])
    assert bottom["size"] > 0.95 > 0.2 > top["size"]


def test_what_eq_17_leaves_out_of_a_linear_model(linear_run):
    """With the noise's entropy q_s has variance v = A^2K + 2 s sum A^2j in each direction, without it A^2K."""
    excess = 0.0
    for c in (2, 5):
        r = 1 - 0.15 * c
        excess += 0.5 * math.log((r**8 + 0.3 * sum(r ** (2 * k) for k in range(4))) / r**8) / 2
    measurements._jacobians.cache_clear()
    assert measurements.excess_of_eq_17(linear_run, n_images=2).effect == pytest.approx(excess)


def test_what_is_no_finite_number_is_not_measurable_and_not_kept(tmp_path):
    write_run(tmp_path, "a")
    values = [[1.0, math.inf], [1.0, 2.0]]

    def diverges(folder):
        return values.pop(0)

    quantity, path = evidence.measured("nats")(diverges), tmp_path / "measurements.json"
    runs = {0: tmp_path / "a-seed0"}
    found = quantity(runs, kept=evidence.Kept(path))
    assert found.of == "values that are no finite numbers" and claims.verdict(found, 0, math.inf) == NOT_MEASURABLE
    assert not path.exists() and quantity(runs, kept=evidence.Kept(path)).effect == 1.5
    assert quantity(runs, kept=evidence.Kept(path)).effect == 1.5 and not values


def test_two_processes_keep_what_both_have_measured(tmp_path):
    write_run(tmp_path, "a")
    one, other = (evidence.Kept(tmp_path / "measurements.json") for _ in range(2))
    counted.calls = 0
    for kept, n_images in ((one, 2), (other, 3)):
        kept.values(counted, [tmp_path / "a-seed0"], {"n_images": n_images})
    whole = evidence.Kept(tmp_path / "measurements.json")
    assert [whole.find(counted, [tmp_path / "a-seed0"], {"n_images": n}) for n in (2, 3)] == [
        [0.0, 1.0],
        [0.0, 1.0, 2.0],
    ]
    checkpoints.write_json(tmp_path / "measurements.json", {"other": 3})
    with pytest.raises(checkpoints.CheckpointError, match="holds no measurements"):
        evidence.Kept(tmp_path / "measurements.json")


def test_shares_of_trainings_have_the_interval_that_holds_all_of_theirs():
    one, other = [1.0] * 3 + [0.0] * 7, [1.0] * 5 + [0.0] * 5
    alone = [evidence.share_of_images([values]) for values in (one, other)]
    both = evidence.share_of_images([one, other])
    assert (both.effect, both.of) == (pytest.approx(0.4), "10 images, 2 seeds")
    assert (both.lower, both.upper) == (alone[0].lower, alone[1].upper)


def test_fewer_images_than_were_asked_for_are_inpainted_all_the_same(monkeypatch):
    system = SimpleNamespace(generator=None)
    monkeypatch.setattr(measurements, "_system", lambda folder, n: (system, torch.zeros(min(n, 3), 1, 4, 4)))
    monkeypatch.setattr(
        "srlib.evaluation.inpainting.inpaintings", lambda system, x, mask, n, rng: x.expand(n, *x.shape)
    )
    x, mask, draws = measurements._inpainted(Path(), 200, "left half", 2)
    assert len(x) == len(mask) == draws.shape[1] == 3


@pytest.mark.parametrize("s, expected", [(0.01, 0.0), (0.3, 1.0)])
def test_folds_are_found_where_steps_are_long(monkeypatch, wave, s, expected):
    """Curvatures of the wave reach 10 at sigma = 0.5, so that 1 + s H is positive everywhere for 0.01 and has both signs for 0.3."""
    system = SimpleNamespace(generator=wave, sigma=0.5, n_steps=2, step_size=s)
    images = torch.full((3, 1, 1, 1), 0.6).double()
    monkeypatch.setattr(measurements, "_system", lambda folder, n, **_: (system, images[:n]))
    found = measurements.folding_share({0: Path()}, n_images=3, n_starts=20)
    assert found.effect == expected and found.of == "1 seed, over images"
    assert measurements.folding_share(dict.fromkeys(range(2), Path()), n_images=3, n_starts=20) == found._replace(
        of="3 images, 2 seeds"
    )
    end = 1 - 0.025 ** (1 / 3)  # of Clopper and Pearson, for none of three
    assert (found.lower, found.upper) == pytest.approx((0, end) if expected == 0 else (1 - end, 1))


def test_the_largest_rise_is_that_of_the_closed_form(linear_run, monkeypatch):
    """The second image judges the step that is the worst on the first."""
    posterior, system = measurements._posterior(Path(), 2)
    exact = srlib.ClosedForm(posterior)
    kl = torch.stack([exact.short_run_kl(system.step_size, k) for k in range(1, 5)])
    found = measurements.largest_rise(linear_run, n_images=2, n_chains=20000)
    worst = kl.diff(dim=0)[:, 0].argmax()
    assert (
        found.effect == pytest.approx(kl.diff(dim=0)[worst, 1].item(), abs=0.02) and found.of == "1 seed, over images"
    )


def test_divergences_are_paired_by_image_and_seed(monkeypatch):
    """Images and seeds differ by far more than the two updates, or the two systems, do."""
    level = {"a": 5.0, "b": 50.0, "c": 4.0, "d": 49.5}

    def divergences(folder, n_images, update=None, final=False, steps_of=None):
        return [level[folder.name] + 10 * i + (0.1 * i + 2 if update == 7 else 0) for i in range(n_images)]

    monkeypatch.setattr(measurements, "_divergences", divergences)
    monkeypatch.setattr(measurements, "_energy_gaps", lambda *given: (divergences(*given), divergences(*given)))
    metrics = {"scores": {"noise_scale": 1.0}, "config": {"snapshots": [7, 5, 3], "n_updates": 7}}
    monkeypatch.setattr(measurements, "verified_metrics", lambda folder: metrics)
    monkeypatch.setattr(claims, "verified_metrics", lambda folder: metrics)
    ours, theirs = {0: Path("a"), 1: Path("b")}, {0: Path("c"), 1: Path("d"), 2: Path("e")}
    found = measurements.change_of_divergence({0: Path("a")}, n_images=3, sigma="final")
    assert found.effect == pytest.approx(2.1) and found.of == "1 seed, over images"
    assert measurements.change_of_energy_gap({0: Path("a")}, n_images=3, sigma="final") == found
    assert measurements.disagreement_of_long_runs(ours, n_images=3, snapshot="first").effect == pytest.approx(37.5)
    assert measurements.disagreement_of_long_runs(ours, n_images=3, snapshot="last").effect == pytest.approx(39.6)
    assert measurements.divergence_difference(ours, theirs, n_images=3).effect == pytest.approx(0.75)
    assert measurements.first_divergence(ours, n_images=3).effect == pytest.approx(37.5)
    assert measurements.divergence_difference({5: Path("a")}, theirs, n_images=3).of == "no common seed"
    assert claims.end_of_search({5: Path("a")}, theirs).of == "no common seed"


@pytest.mark.parametrize("factor, same", [(1.0, True), (0.5, False)])
def test_the_numbers_that_were_chosen_are_those_that_infer(linear_run, monkeypatch, factor, same):
    """Where the run's own step size is chosen, a variant is the run itself, noise by noise."""
    system, _ = measurements._system(Path(), 1)
    posterior_of = lambda x: srlib.Posterior(system.generator, x, system.sigma)  # noqa: E731
    system.infer = lambda x, rng: srlib.short_run(posterior_of(x), system.n_steps, system.step_size, rng=rng).final
    asked = []

    def choose(few, start, free, n_steps, precision, rng, n_evaluations):
        asked.append((len(few), n_steps, n_evaluations, len(free)))
        return srlib.variants.Variant(factor**0.5 * start.step_size), None

    monkeypatch.setattr("srlib.variants.choose_variant", choose)
    runs = {0: Path("a")}, {0: Path("b")}
    found = measurements.tuned_difference(*runs, n_images=2, n_evaluations=7)
    assert (found.effect == pytest.approx(0, abs=1e-12)) == same and asked == [(2, 4, 7, 1), (2, 4, 7, 5)]


def test_what_is_the_same_after_the_last_update_is_measured_once(monkeypatch):
    metrics = {"config": {"snapshots": [7, 5, 3], "n_updates": 7}}
    monkeypatch.setattr(measurements, "verified_metrics", lambda folder: metrics)
    assert measurements._ends(Path("a"), "in force") == [(3, False), (7, False)]
    assert measurements._ends(Path("a"), "final") == [(3, True), (7, False)]
    metrics["config"]["n_updates"] = 9
    assert measurements._ends(Path("a"), "final") == [(3, True), (7, True)]


def test_images_without_factors_tell_nothing_of_layers(monkeypatch):
    monkeypatch.setattr(measurements, "_told_by_layers", lambda folder, n_images: [])
    runs = {0: Path("a")}
    for found in (
        measurements.layer_lead(runs, factors=["hue"], layer=1, n_probed=9),
        measurements.layer_contrast(runs, first="hue", second="digit", n_probed=9),
    ):
        assert found.of == "images without known factors" and claims.verdict(found, 0, math.inf) == NOT_MEASURABLE


CODE = """
from .{module} import {used}

LEVEL = {level}


def helper():
    return LEVEL


def measure(folder):
    \"\"\"{comment}\"\"\"
    return [{used}, helper()]


def {other}():
    return 0
"""


def code_hash(tmp_path, monkeypatch, name, **changed):
    """Of `measure` in a module with this text. evidence.code_hash keeps what it found by function, and this one is new each time."""
    given = {"module": "langevin", "used": "short_run", "level": 1, "comment": "It measures.", "other": "other"}
    path = tmp_path / f"{name}.py"
    path.write_text(CODE.format(**given | changed))
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(__file__=str(path)))

    def measure(folder):
        pass

    measure.__module__ = name
    return evidence.code_hash(measure)


def test_a_measurement_is_known_by_all_the_code_that_it_reaches(tmp_path, monkeypatch):
    whole = code_hash(tmp_path, monkeypatch, "whole")
    for name, changed in {"comment": {"comment": "So it does."}, "unrelated": {"other": "another"}}.items():
        assert code_hash(tmp_path, monkeypatch, name, **changed) == whole
    differ = {
        "constant": {"level": 2},
        "names": {"used": "Chain"},
        "imports": {"module": "posterior", "used": "Posterior"},
    }
    found = [code_hash(tmp_path, monkeypatch, name, **changed) for name, changed in differ.items()]
    assert len({whole, *found}) == 4
    measure = measurements.inpainting_difference.measure
    assert len({evidence.code_hash(measure, frozenset(names)) for names in ((), ("vae",), ("vae", "abp"))}) == 3
    assert len({evidence.code_hash(f.measure) for f in measurements.MEASURED.values()}) == len(measurements.MEASURED)


def counted(folder, n_images):
    """A measurement that would be noticed if it were made again."""
    counted.calls += 1
    return [float(i) for i in range(n_images)]


def test_what_was_measured_is_kept_until_run_options_or_code_change(tmp_path, monkeypatch):
    counted.calls = 0
    quantity = evidence.measured("pixels")(counted)
    monkeypatch.setitem(claims.MEASURED, "counted", quantity)
    monkeypatch.setitem(claims.QUANTITIES, "counted", quantity)
    for seed in range(2):
        write_run(tmp_path, "a", seed=seed)
    made = claim(["a"], quantity="counted", options={"n_images": 3})
    assert made.unit == "pixels"

    def measured_again():
        before, kept = counted.calls, evidence.Kept(tmp_path / "measurements.json")
        needed = claims.to_measure([made], tmp_path, kept)
        (judged,) = claims.judge(made, tmp_path, kept=kept)
        assert judged.evidence.effect == pytest.approx(statistics.fmean(range(made.options["n_images"])))
        assert len(needed) == counted.calls - before
        return counted.calls - before

    assert measured_again() == 2 and measured_again() == 0
    for changed, n in (
        ({"scores": {"mse": 0.02}}, 0),
        ({"config": {"system": "short_run", "n_steps": 3}}, 1),
        ({"files": {}}, 1),
    ):
        record = checkpoints.read_json(tmp_path / "a-seed1" / "metrics.json")
        del record["checksum"]
        checkpoints.write_json(tmp_path / "a-seed1" / "metrics.json", record | changed)
        assert measured_again() == n
    write_run(tmp_path, "a", seed=2)
    assert measured_again() == 1  # of the new seed alone
    made = claim(["a"], quantity="counted", options={"n_images": 5})
    assert measured_again() == 3 and measured_again() == 0
    monkeypatch.setattr(evidence, "code_hash", lambda measure, systems: f"other than that of {sorted(systems)}")
    assert measured_again() == 3
    monkeypatch.setattr(evidence, "has_weights", lambda folder: folder.name != "a-seed1")
    assert measured_again() == 0  # what is kept needs none
    made = claim(["a"], quantity="counted", options={"n_images": 6})
    (judged,) = claims.judge(made, tmp_path, kept=evidence.Kept(tmp_path / "measurements.json"))
    assert (judged.verdict, judged.evidence.of) == (NOT_MEASURABLE, "runs without their weights")
    path = tmp_path / "measurements.json"
    path.write_text(path.read_text().replace("2.0", "1.0", 1))
    with pytest.raises(checkpoints.CheckpointError, match="measurements.json was edited"):
        evidence.Kept(path)


def test_fields_that_no_name_has_are_options_and_a_preview_takes_few_images(tmp_path, monkeypatch):
    seen = []

    def quantity(runs, **options):
        seen.append(options)
        return Evidence(0.0, -1.0, 1.0, "2 images")

    monkeypatch.setitem(claims.QUANTITIES, "seen", quantity)
    write_run(tmp_path, "a-L3")
    options = {"n_images": 40, "n_evaluations": 24}
    made = claim(["a-L{layers}"], cases={"layers": [3], "sigma": [1, 2]}, quantity="seen", options=options)
    claims.judge(made, tmp_path)
    judged = claims.judge(made, tmp_path, 2)
    assert seen == [{"n_images": n, "n_evaluations": min(n, 24), "sigma": sigma} for n in (40, 2) for sigma in (1, 2)]
    assert judged[1].case.title == "L = 3, sigma = 2" and options == {"n_images": 40, "n_evaluations": 24}


@pytest.mark.parametrize(
    "given, complaint",
    [({"quantity": "luck"}, "quantity='luck' is unknown"), ({"whose": "nobody's"}, "whose=.* must be one of paper"), ({"below": "0"}, "claim c: below='0' must be a number"), ({"below": math.inf}, "everything"), ({"above": 1.0}, "nothing is between")],
)  # fmt: skip
def test_claims_that_cannot_be_judged_are_refused(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        claim(["a", "b"], **given)


@pytest.mark.parametrize(
    "text, complaint",
    [("", "holds None; it must be a list"), ("3", "holds 3; it must be a list"), ("- 3", "the entry 3 must be a mapping"), ("- {name: a}", "not complete"),
     ("- {name: a, statement: s, place: p, quantity: spread_of_ends, runs: xy, chapter: c, below: 1}", "runs must be a list"), ("- &a {name: a, statement: s, place: p, quantity: spread_of_ends, runs: [x], chapter: c, below: 1}\n- *a", "more than one"),
     ("- {name: a, statement: s, place: p, quantity: spread_of_ends, runs: [x], chapter: c, below: 1, verdict: holds}", "unknown entries")],
)  # fmt: skip
def test_a_ledger_that_does_not_fit_is_refused(tmp_path, text, complaint):
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        claims.load_claims(tmp_path / "claims.yaml")


def test_the_ledger_names_runs_and_chapters_that_there_are():
    """Each case is a row of the digits or of the reference matrix, so that it can be judged; typed verdicts are refused above."""
    matrices = [
        checkpoints.read_yaml(ROOT / "papermill_runs" / f"{profile}.yaml") for profile in ("digits", "reference")
    ]
    rows = {row["name"] for matrix in matrices for row in matrix["runs"]}
    for entry in claims.load_claims(ROOT / "papermill_runs" / "claims.yaml"):
        assert (ROOT / "book" / f"{entry.chapter}.md").exists()
        unknown = [run for case in entry.all_cases() for run in case.runs if run not in rows]
        assert not unknown, (entry.name, unknown)


def committed(*arguments):
    """What git says of this repository, in lines; None where there is no history, as in an archive."""
    told = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return told.stdout.splitlines() if told.returncode == 0 else None


@pytest.mark.parametrize("blind", [False, True])
def test_what_is_called_foreseen_stood_in_the_ledger_before_its_runs(blind):
    """With today's quantity, options, runs and bounds, before the commit of any run's first results.

    Rows that are marked as foreseen, with their cases too; and all rows, before the trainings that confirm them.
    """
    ledger = "papermill_runs/claims.yaml"
    if not committed("log", "-1", "--format=%H") or committed("rev-parse", "--is-shallow-repository") == ["true"]:
        pytest.skip("this copy has no history")
    rows = [entry for entry in claims.load_claims(ROOT / ledger) if entry.foreseen or blind]
    profiles = ("confirmation", "confirmation-reference") if blind else ("digits", "reference")
    unsaid = {"above": -math.inf, "below": math.inf, "options": None} | ({} if blind else {"cases": None})
    since = {}  # name -> when today's entry began to stand there, and the commit
    for line in committed("log", "--reverse", "--format=%ct %H", "--", ledger):
        entries = {e["name"]: e for e in yaml.safe_load("\n".join(committed("show", f"{line.split()[1]}:{ledger}")))}
        for entry in rows:
            then = entries.get(entry.name, {})
            given = {name: getattr(entry, name) for name in ("quantity", *unsaid)} | {"runs": list(entry.runs)}
            if all(then.get(name, unsaid.get(name)) == value for name, value in given.items()):
                since.setdefault(entry.name, line.split())
            else:
                since.pop(entry.name, None)
    judged = 0
    for entry in rows:
        for name in {run for case in entry.all_cases() for run in case.runs}:
            places = [f"papermill_runs/{profile}/{name}-seed*/metrics.json" for profile in profiles]
            for first in committed("log", "--reverse", "--diff-filter=A", "--format=%ct %H", "--", *places)[:1]:
                time, commit = first.split()
                assert int(since[entry.name][0]) < int(time) and since[entry.name][1] != commit, (entry.name, name)
                judged += 1
    assert judged
