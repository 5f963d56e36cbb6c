"""The short run that learns with all numbers of a variant: beside `ShortRun`, and what its line 5 does."""

import copy

import pytest
import torch

import srlib
from srlib.baselines.tuned_short_run import FIRST_MOMENTUM, TunedShortRun, descend_variant
from srlib.experiment import Config
from srlib.learning import ShortRun
from srlib.training import TrainingPlan, resume_file
from srlib.variants import Variant, choose_variant, run_variant, variant_objective

PLAN = TrainingPlan(6, 8, (1e-3,))


def generator():
    torch.manual_seed(0)
    return srlib.TopDownGenerator((2, 3), (1, 10, 10), channels=4, feature_size=5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (24, 1, 10, 10), generator=seeded(3), dtype=torch.uint8)


@pytest.mark.parametrize(("free", "share"), [(["step_size"], "all"), (["step_size", "ratio"], "step")])
def test_a_step_of_descent_is_that_of_the_step_size_search(free, share):
    nonlinear = srlib.Posterior(
        generator().double(), torch.rand(3, 1, 10, 10, generator=seeded(), dtype=torch.float64), 0.3
    )
    search = srlib.StepSizeSearch("descent", n_images=3, share=share)
    s = torch.tensor(1e-3, dtype=torch.float64) if share == "all" else torch.full((5, 1, 1), 1e-3, dtype=torch.float64)
    expected = search(nonlinear, s, 5, seeded(4))
    moved, tried, values = descend_variant(nonlinear, Variant(1e-3), free, 5, rng=seeded(4))
    found = (moved.step_sizes(5) / 1e-3).log() * len(free) ** 0.5  # the search goes a full step in each direction
    assert torch.allclose(found, (expected.step_size / 1e-3).log().expand_as(found), rtol=1e-6)
    assert torch.allclose(values, expected.values) and tried.shape == (2 * len(free),)


def test_descent_arrives_where_the_simplex_does():
    """On a linear model whose posterior is long and thin, so that momentum is worth something."""
    rng = seeded(1)
    weight = torch.linalg.qr(torch.randn(9, 4, generator=rng, dtype=torch.float64))[0] * torch.tensor([0.1, 0.3, 1, 3])
    g = srlib.LinearGenerator(weight, torch.zeros(9, dtype=torch.float64))
    x = torch.randn(3, 9, 1, 1, generator=rng, dtype=torch.float64)
    many = srlib.Posterior(g, x, sigma=0.3).repeated(40)
    best, _ = choose_variant(many, Variant(1e-3), ["step_size", "momentum"], 12, rng=seeded(), n_evaluations=200)
    variant, path = Variant(2e-4, momentum=0.1), []
    for i in range(60):
        variant, *_ = descend_variant(many, variant, ["step_size", "momentum"], 12, rng=seeded(10 + i))
        path.append(variant)
    assert variant.momentum > 0.1

    def objective(v):
        return variant_objective(many, v, 12, rng=seeded(5)).mean()

    # it does not stand still, as it has no learning rate that falls
    last = torch.stack([objective(v) for v in path[-10:]]).mean()
    assert last < objective(Variant(2e-4, momentum=0.1)) - 10 * (last - objective(best)).abs()
    assert last < objective(best) + 0.3


@pytest.mark.parametrize("free", [[], "step_size", ["friction"], ["heat", "heat"], 5, [["heat"]], {"heat"}])
def test_what_cannot_be_chosen_is_named(free):
    posterior = srlib.Posterior(generator(), torch.zeros(2, 1, 10, 10), 0.3)
    with pytest.raises(ValueError, match="free=.*must name some of step_size, ratio, momentum, heat, power, each once"):
        descend_variant(posterior, Variant(1e-3), free, 2)


def test_a_search_that_can_tell_nothing_is_an_error():
    posterior = srlib.Posterior(generator(), torch.zeros(2, 1, 10, 10), 0.3)
    with pytest.raises(ValueError, match="give at least 2"):
        descend_variant(posterior[:1], Variant(1e-3), ["heat"], 2)
    with pytest.raises(srlib.DivergenceError, match="all chains on either side of Variant.step_size=1000000"):
        descend_variant(posterior, Variant(1e6), ["heat"], 60)


def test_a_training_with_other_free_numbers_is_another_training(images, tmp_path):
    TunedShortRun(generator(), 4, free=["step_size"], every=2).fit(images, PLAN, seeded(1), tmp_path, progress=False)
    assert resume_file(tmp_path).exists()
    with pytest.raises(ValueError, match="belongs to another training, its settings differ"):
        TunedShortRun(generator(), 4, free=["heat"], every=2).fit(images, PLAN, seeded(1), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"n_steps": 1}, "leave ratio out"), ({"step_size": torch.full((4, 1, 1), 1e-3)}, "step_size=tensor")],
)
def test_what_a_variant_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TunedShortRun(generator(), **given)
    assert TunedShortRun(generator(), 1, free=["step_size", "heat"]).n_steps == 1


def test_before_line_5_it_learns_as_the_short_run(images):
    """The same random numbers, weights and chains, to rounding."""
    tuned = TunedShortRun(generator(), 4, sigma_start=0.3, free=["step_size"], every=6)
    plain = ShortRun(generator(), 4, sigma_start=0.3)
    losses = [system.fit(images, PLAN, seeded(1), progress=False)["loss"] for system in (tuned, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert tuned.step_size.item() != pytest.approx(1.25e-3, rel=0.01)  # line 5 came after the last update
    with_momentum = TunedShortRun(generator(), 4, sigma_start=0.3, every=6).fit(images, PLAN, seeded(1), progress=False)
    assert with_momentum["loss"][0] != pytest.approx(losses[1][0], rel=1e-5)


def test_line_5_moves_every_number_that_is_free_and_no_other(images):
    for free in (["step_size", "ratio", "momentum", "heat", "power"], ["step_size", "heat"]):
        system = TunedShortRun(generator(), 4, free=free, every=2)
        before = {**vars(system.variant())}
        history = system.fit(images, PLAN, seeded(1), progress=False)
        after = vars(system.variant())
        assert {name for name in before if before[name] != after[name]} == {*free}
        assert history["chosen_heat"][-1] == after["heat"] and len(history["chosen_heat"]) == 3
    assert before["momentum"] == 0
    first = TunedShortRun(generator()).variant()
    assert first == Variant(first.step_size, momentum=FIRST_MOMENTUM) and first.step_size == pytest.approx(1.25e-3)


def test_the_mean_of_the_step_sizes_is_step_size_whatever_the_precision(images):
    system = TunedShortRun(generator(), 4, every=2)
    system.fit(images, PLAN, seeded(1), progress=False)
    assert system.latent_precision.std() > 0
    s = system.variant().step_sizes(4, system.latent_precision)
    assert s.log().mean().exp() == pytest.approx(system.step_size.item())


def test_inference_uses_what_was_learned_and_the_state_holds_it(images):
    system = TunedShortRun(generator(), 4, every=2)
    system.fit(images, PLAN, seeded(1), progress=False)
    x = system.as_input(images[:5])
    found = system.infer(x, rng=seeded(2))
    again = TunedShortRun(generator(), 4, every=2)
    assert not torch.allclose(again.infer(x, rng=seeded(2)), found, atol=1e-3)
    again.load_state_dict(system.state_dict())
    assert torch.equal(again.infer(x, rng=seeded(2)), found)
    assert torch.equal(copy.deepcopy(system).infer(x, rng=seeded(2)), found)
    posterior = srlib.Posterior(system.generator, x, system.sigma)
    states = run_variant(posterior, system.variant(), 4, system.latent_precision, rng=seeded(2))
    assert torch.allclose(states[-1], found, atol=1e-5)
    assert system.settings()["momentum"] == system.variant().momentum


def test_a_divergence_is_an_error_that_names_the_step_size(images):
    with pytest.raises(srlib.DivergenceError, match="update 0: the chains diverged with step_size=1e[+]06"):
        TunedShortRun(generator(), 30, step_size=1e6, every=2).fit(images, PLAN, seeded(1), progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step_size_search": "none"}, "step_size_search='none'"),
        ({"estimator": "change_of_variables"}, "estimator='change_of_variables'"),
        ({"step_size_share": "step"}, "step_size_share='step'"),
        ({"options": {"friction": 1}}, "tuned_short_run has no 'friction'"),
        ({"options": {"free": ["friction"]}}, "free=.*friction"),
        ({"options": {"free": 5}}, "free=5 must name some"),
        ({"search_images": 1}, "n_images=1"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict({"name": "x", "system": "tuned_short_run", "step_size_search": "descent"} | given)
