"""Algorithm 1: it learns, it repeats itself, it resumes with the same bits, it reports what goes wrong."""

import math

import pytest
import torch

import srlib
from srlib import provenance
from srlib.checkpoints import CheckpointError
from srlib.training import TrainingLoop, training_seconds


@pytest.fixture
def new_system(device):
    """make(seed, options of ShortRun): a small system whose first weights depend on the seed."""

    def make(seed=0, **options):
        torch.manual_seed(seed)
        g = srlib.TopDownGenerator((3, 5), (1, 16, 16), channels=8, feature_size=8)
        return srlib.ShortRun(g, **(dict(n_steps=5, step_size=2e-3, sigma=0.3) | options)).to(device)

    return make


@pytest.fixture
def images():
    """16 images of a white square in a random place, uint8."""
    rng = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 8, (16, 2), generator=rng)
    rows = (torch.arange(16) - corner[:, :1]).clamp(0, 9) % 9 > 0
    columns = (torch.arange(16) - corner[:, 1:]).clamp(0, 9) % 9 > 0
    return (rows[:, :, None] & columns[:, None, :])[:, None].to(torch.uint8) * 255


def fit(system, images, n_updates=12, directory=None, seed=0, **plan):
    plan = srlib.TrainingPlan(n_updates, **(dict(batch_size=6, learning_rates=(1e-3, 5e-4)) | plan))
    return system.fit(images, plan, torch.Generator().manual_seed(seed), directory, progress=False)


def test_a_tiny_set_is_learned_by_heart(new_system, images):
    system = new_system(n_steps=8, step_size=6e-3)
    x = system.as_input(images)
    history = fit(system, images, 50, batch_size=16, learning_rates=(4e-3, 2e-3))
    error = (system.reconstruct(x, rng=torch.Generator().manual_seed(1)) - x).square().mean()
    best_constant = (x - x.mean(0)).square().mean()
    assert error < 0.4 * best_constant
    assert sum(history["mse"][-10:]) < 0.4 * sum(history["mse"][:10])
    assert set(history) == {"loss", "step_size", "sigma", "mse", "spread"}


def test_one_update_is_adam_on_equation_21(new_system, images):
    """Lines 1 to 4 of Algorithm 1 by hand, from the same random numbers."""
    system, twin = new_system(), new_system()
    fit(system, images, n_updates=1)
    rng = torch.Generator().manual_seed(0)
    x = twin.as_input(images[torch.randperm(len(images), generator=rng)[:6]])
    posterior = srlib.Posterior(twin.generator, x, 0.3)
    e = srlib.short_run(posterior, 5, 2e-3, twin.generator.sample_prior(6, rng), rng=rng).final
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
    ((x - twin.generator(e)).square().flatten(1).sum(1).mean() / (2 * 0.3**2)).backward()
    optimizer.step()
    for ours, by_hand in zip(system.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(new_system, images):
    histories = [fit(new_system(), images, seed=seed) for seed in (3, 3, 4)]
    assert histories[0] == histories[1] != histories[2]


def test_sigma_is_annealed_geometrically_and_the_step_size_follows_its_square(new_system, images):
    history = fit(new_system(sigma=0.1, sigma_start=0.8, anneal_fraction=0.5), images, n_updates=12)
    sigma, s = torch.tensor(history["sigma"]), torch.tensor(history["step_size"])
    torch.testing.assert_close(sigma[:6], 0.8 * (0.1 / 0.8) ** (torch.arange(6) / 6))
    assert (sigma[6:] == 0.1).all()
    torch.testing.assert_close(s, 2e-3 * (sigma / 0.1) ** 2)


def test_the_step_size_is_updated_after_every_ts_parameter_updates(new_system, images):
    seen = []

    def halve(posterior, s, n_steps, rng):
        seen.append((len(posterior), posterior.sigma, float(s)))
        return srlib.StepSizeResult(s / 2, (s / 2)[None], torch.ones(1, 2))

    system = new_system(update_step_size=halve, every=5, sigma=0.2, sigma_start=0.4, anneal_fraction=0.5)
    history = fit(system, images, n_updates=12)
    assert [n for n, _, _ in seen] == [6, 6]
    assert seen[0][1] == pytest.approx(0.4 * 0.5 ** (4 / 6)) and seen[1][1] == 0.2
    in_units_of_sigma = torch.tensor(history["step_size"]) / torch.tensor(history["sigma"]) ** 2
    torch.testing.assert_close(
        in_units_of_sigma / in_units_of_sigma[0], torch.tensor([1.0] * 5 + [0.5] * 5 + [0.25] * 2)
    )
    assert system.step_size == pytest.approx(2e-3 / 4)
    assert history["chosen_at"] == [5, 10] and history["objective"] == [1, 1]
    assert history["chosen_step_size"] == pytest.approx([s / 2 for _, _, s in seen])


def test_a_warm_up_is_linear_and_ends():
    plan = srlib.TrainingPlan(100, learning_rates=(1.0, 0.5), warmup_updates=3)
    assert [plan.learning_rate(t) for t in (0, 1, 2, 3, 4, 60)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.5]


def test_learning_rates_are_used_in_equal_parts():
    plan = srlib.TrainingPlan(300_000, learning_rates=(1e-4, 5e-5, 1e-5))
    assert [plan.learning_rate(t) for t in (0, 99_999, 100_000, 199_999, 200_000, 299_999)] == [
        1e-4, 1e-4, 5e-5, 5e-5, 1e-5, 1e-5,
    ]  # fmt: skip


@pytest.mark.parametrize("t", [1, 7, 11])
def test_a_killed_run_resumes_with_the_same_bits(new_system, images, tmp_path, killed_at, t):
    whole, resumed = new_system(), new_system()
    history = fit(whole, images)
    with killed_at(t):
        fit(resumed, images, directory=tmp_path)
    fresh = new_system(seed=99)
    assert fit(fresh, images, directory=tmp_path, seed=99) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values()))


def test_a_run_killed_after_its_last_update_repeats_none(new_system, images, tmp_path, monkeypatch):
    whole = new_system()
    history = fit(whole, images, directory=tmp_path)
    monkeypatch.setattr(TrainingLoop, "update", None)  # calling it would be an error
    again = new_system(seed=99)
    assert fit(again, images, directory=tmp_path, seed=99) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_batches_of_one_image_are_refused(new_system, images):
    with pytest.raises(ValueError, match="batches of 1 image"):
        fit(new_system(), images[:1])


def test_a_checkpoint_of_another_plan_is_refused(new_system, images, tmp_path):
    fit(new_system(), images, n_updates=2, directory=tmp_path)
    with pytest.raises(CheckpointError, match="another training, its plan differ"):
        fit(new_system(), images, n_updates=3, directory=tmp_path)


@pytest.mark.parametrize(
    "options", [dict(sigma=0.2), dict(n_steps=4), dict(update_step_size=srlib.StepSizeSearch("grid"), every=2)]
)
def test_a_checkpoint_of_another_system_or_other_images_is_refused(new_system, images, tmp_path, options):
    fit(new_system(), images, n_updates=2, directory=tmp_path)
    with pytest.raises(CheckpointError, match="its settings differ; remove it"):
        fit(new_system(**options), images, n_updates=2, directory=tmp_path)
    for other in (images[:10], images.flip(0)):
        with pytest.raises(CheckpointError, match="its images differ; remove it"):
            fit(new_system(), other, n_updates=2, directory=tmp_path)


def test_a_checkpoint_of_other_sources_is_refused(new_system, images, tmp_path, monkeypatch):
    fit(new_system(), images, n_updates=2, directory=tmp_path)
    monkeypatch.setattr(provenance, "source_hash", lambda modules: "other")
    with pytest.raises(CheckpointError, match="its sources differ; remove it"):
        fit(new_system(), images, n_updates=2, directory=tmp_path)


def test_a_training_keeps_the_sources_that_it_began_with(new_system, images, tmp_path, monkeypatch, killed_at):
    """Whoever edits a file while a training lasts must not find it called the work of the edited one."""
    with monkeypatch.context() as edited, killed_at(3):
        choose = TrainingLoop.record
        edited.setattr(
            TrainingLoop,
            "record",
            lambda loop, **m: (edited.setattr(provenance, "source_hash", lambda _: "edited"), choose(loop, **m)),
        )
        fit(new_system(), images, directory=tmp_path)
    fit(new_system(), images, directory=tmp_path)


def test_the_time_of_all_sittings_is_counted(new_system, images, tmp_path, killed_at):
    with killed_at(6):
        fit(new_system(), images, directory=tmp_path)
    first = training_seconds(tmp_path)
    fit(new_system(), images, directory=tmp_path)
    assert training_seconds(tmp_path) > first > 0


def test_what_the_training_owns_comes_back_in_place(new_system, images, tmp_path):
    plan, rng = srlib.TrainingPlan(2, 4), torch.Generator()
    chains = torch.ones(3)
    loop = TrainingLoop(new_system(), images, plan, rng, tmp_path, progress=False, own={"chains": chains})
    chains += 1
    loop.finish()
    again = torch.zeros(3)
    TrainingLoop(new_system(), images, plan, rng, tmp_path, progress=False, own={"chains": again})
    assert torch.equal(again, torch.full((3,), 2.0))


def test_images_that_were_never_scaled_are_refused(new_system, images):
    for unscaled in (images.long(), images.bool()):
        with pytest.raises(ValueError, match="only uint8 images are scaled"):
            fit(new_system(), unscaled)
    with pytest.raises(ValueError, match=r"images reach 255; scale them to \[-1, 1\]"):
        fit(new_system(), images.float())


def test_a_divergence_is_told_in_terms_of_the_step_size_that_was_asked_for(new_system, images):
    """While sigma anneals, s is larger than what was asked for by (sigma / final sigma)^2."""
    system = new_system(step_size=0.5, sigma=0.1, sigma_start=0.4, n_steps=60)
    with pytest.raises(
        srlib.DivergenceError, match=r"step_size=0.5 \(which is s = 8 at sigma = 0.4.*; try step_size=0.05"
    ):
        fit(system, images)


def test_identical_images_give_no_nan(new_system, images):
    history = fit(new_system(), images[:1].expand(6, -1, -1, -1), n_updates=2)
    assert all(math.isfinite(v) for v in history["spread"])


def test_a_loss_that_is_not_a_number_stops_with_advice(new_system, images):
    system = new_system()
    with torch.no_grad():
        system.generator.output[-1].bias.fill_(math.nan)
    with pytest.raises((FloatingPointError, srlib.DivergenceError), match="learning rate"):
        fit(system, images)


def test_a_gradient_that_is_not_a_number_stops_before_it_is_in_the_parameters(new_system, images):
    system, plan = new_system(), srlib.TrainingPlan(3, 4)
    before = [p.clone() for p in system.parameters()]
    loop = TrainingLoop(system, images, plan, torch.Generator(), progress=False)
    next(iter(loop))
    loss = sum((0 * p).square().sum().sqrt() for p in system.parameters())  # 0, with the derivative 0 / 0
    with pytest.raises(
        FloatingPointError, match="norm of the gradient is nan at update 0; try a smaller learning rate"
    ):
        loop.update(loss)
    assert all(torch.equal(p, q) for p, q in zip(system.parameters(), before))


@pytest.mark.parametrize("chosen", [math.nan, math.inf, 0.0])
def test_a_search_whose_step_size_is_none_stops_at_its_update(new_system, images, chosen):
    def choose(posterior, s, n_steps, rng):
        return srlib.StepSizeResult(torch.full_like(s, chosen), s[None], torch.ones(1, 2))

    with pytest.raises(ValueError, match=rf"chose s = {chosen} after update 4; it must be positive"):
        fit(new_system(update_step_size=choose, every=5), images)


def test_a_step_size_that_its_search_made_explode_is_told_with_the_search(new_system, images):
    def explode(posterior, s, n_steps, rng):
        return srlib.StepSizeResult(1e6 * s, s[None], torch.ones(1, 2))

    system = new_system(update_step_size=explode, every=2, n_steps=60)
    with pytest.raises(srlib.DivergenceError, match=r"update 2: .* step_size=2e\+03 .* s is what the last one chose"):
        fit(system, images)


def test_latents_without_spread_are_no_gaussian(new_system, images, monkeypatch):
    for value in (1.0, math.nan):
        monkeypatch.setattr(srlib.ShortRun, "infer", lambda self, x, rng, v=value: x.new_full((len(x), 8), v))
        with pytest.raises(
            FloatingPointError, match="latents inferred from 16 images is singular .* with fewer than 8"
        ):
            new_system().fit_aggregate(images)


def test_a_collapsed_generator_is_reported(new_system, images):
    system = new_system()
    with torch.no_grad():
        system.generator.output[-1].weight.zero_()
    with pytest.warns(RuntimeWarning, match="collapsed"):
        fit(system, images, n_updates=2, learning_rates=(1e-9,))


def test_aggregate_samples_have_the_moments_of_the_inferred_latents(new_system, images):
    system = new_system()
    with pytest.raises(ValueError, match="fit_aggregate first"):
        system.sample(2, "aggregate")
    with pytest.raises(ValueError, match="at least 9"):
        system.fit_aggregate(images[:8])
    with pytest.raises(ValueError, match="'prior' or 'aggregate'"):
        system.sample(2, "posterior")
    e = system.fit_aggregate(images, rng=torch.Generator().manual_seed(0))
    torch.testing.assert_close(system.aggregate_mean, e.mean(0))
    torch.testing.assert_close(system.aggregate_scale @ system.aggregate_scale.T, e.T.cov(), rtol=1e-3, atol=1e-4)
    assert system.sample(5, "aggregate").shape == system.sample(5).shape == (5, 1, 16, 16)


def test_inpainting_never_looks_at_hidden_pixels(new_system, images):
    system = new_system()
    x = system.as_input(images)
    mask = torch.ones_like(x[:1])
    mask[..., 8:] = 0
    changed = torch.where(mask > 0, x, torch.rand_like(x))
    first, second = (system.reconstruct(y, mask, torch.Generator().manual_seed(0)) for y in (x, changed))
    assert torch.equal(first, second)


def test_a_search_that_would_never_be_done_or_gives_a_schedule_is_refused(new_system, images):
    def schedule(posterior, s, n_steps, rng):
        tried = s * torch.ones(1, n_steps, 1, 1, dtype=torch.float64)
        return srlib.StepSizeResult(tried[0], tried, torch.zeros(1, len(posterior), dtype=torch.float64))

    with pytest.raises(ValueError, match="every=9: s would never be updated in n_updates=2"):
        fit(new_system(update_step_size=schedule, every=9), images, 2)
    with pytest.raises(
        ValueError, match=r"step size of shape \(\d+, 1, 1\), the system was made with one of shape \(\)"
    ):
        fit(new_system(update_step_size=schedule, every=1), images, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sigma=0.3, sigma_start=0.1), "sigma_start"),
        (dict(sigma=-1.0), "sigma"),
        (dict(anneal_fraction=1.5), "anneal_fraction"),
        (dict(every=0), "every=0"),
        (dict(step_size=0.0), "step_size"),
        (dict(step_size=math.inf), "step_size=inf"),
        (dict(sigma=math.nan), "sigma=nan"),
        (dict(n_steps=0), "n_steps=0"),
        (dict(n_steps=2.5), "n_steps=2.5"),
        (dict(update_step_size="grid"), "update_step_size='grid' must be callable"),
    ],
)
def test_bad_options_are_refused(new_system, options, message):
    with pytest.raises(ValueError, match=message):
        new_system(**options)


@pytest.mark.parametrize(
    "plan, message",
    [
        (dict(n_updates=0), "n_updates=0"),
        (dict(n_updates=1, batch_size=0), "batch_size=0"),
        (dict(n_updates=1, learning_rates=()), "learning_rates"),
        (dict(n_updates=1, learning_rates=(1e-3, -1.0)), "learning_rates"),
        (dict(n_updates=1, betas=(0.9, 1.0)), "betas"),
        (dict(n_updates=2.5), "n_updates=2.5"),
        (dict(n_updates=1, learning_rates=1e-3), "learning_rates=0.001 must be a tuple"),
        (dict(n_updates=1, learning_rates=(math.inf,)), "learning_rates"),
        (dict(n_updates=3, snapshots=(1.5,)), "snapshots=1.5"),
        (dict(n_updates=3, warmup_updates=-1), "warmup_updates=-1"),
    ],
)
def test_bad_plans_are_refused(new_system, plan, message):
    with pytest.raises(ValueError, match=message):
        srlib.TrainingPlan(**plan)
    with pytest.raises(ValueError, match="give .* n > 0"):
        fit(new_system(), torch.zeros(0, 1, 16, 16, dtype=torch.uint8))
