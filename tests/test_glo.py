"""GLO: its codes, its projection, its descent, and the linear case, where principal components are the best."""

from dataclasses import replace

import pytest
import torch

import srlib
from srlib import checkpoints
from srlib.baselines.glo import GLO, N_PCA, projected
from srlib.experiment import Config
from srlib.training import resume_file


@pytest.fixture
def new_system(device):
    """make(seed, options of GLO): a small system whose first weights depend on the seed."""

    def make(seed=0, **options):
        torch.manual_seed(seed)
        g = srlib.TopDownGenerator((4,), (1, 16, 16), channels=6, feature_size=8)
        return GLO(g, **options).to(device)

    return make


@pytest.fixture
def linear(device):
    """A linear system with 3 latents, and 60 images of 9 pixels near a plane of 3 dimensions; float64."""
    rng = torch.Generator().manual_seed(0)
    e, weight, noise, start = (torch.randn(s, generator=rng).double() for s in ((60, 3), (9, 3), (60, 9), (9, 3)))
    x = (e @ weight.T + 1 + 0.2 * noise)[:, :, None, None].to(device)
    system = GLO(srlib.LinearGenerator(0.1 * start, torch.zeros(9).double()), code_learning_rate=1.0)
    return system.double().to(device), x


def fit(system, images, n_updates=12, directory=None, seed=0, **plan):
    plan = srlib.TrainingPlan(n_updates, **(dict(batch_size=6, learning_rates=(1e-3, 5e-4)) | plan))
    return system.fit(images, plan, torch.Generator().manual_seed(seed), directory, progress=False)


def test_training_starts_from_images_of_the_mean_colour(new_system, images):
    """Else the first updates drive the tanh of mostly black images into saturation, before the codes tell them apart."""
    black = torch.cat([images, torch.zeros(48, 1, 16, 16, dtype=torch.uint8)])
    system = new_system()
    grey = system.sample(200).mean().item()
    fit(system, black, 1, learning_rates=(1e-9,))
    mean = srlib.to_unit_range(black).mean().item()
    assert mean < -0.9 and abs(grey) < 0.2
    assert system.sample(200).mean().item() == pytest.approx(mean, abs=0.1)


def test_mostly_black_images_are_learned(device):
    """Digits at the rate of their matrix, which ended as one black image when training began from grey."""
    digits = srlib.load("digits").train.images[:256]
    torch.manual_seed(0)
    system = GLO(srlib.TopDownGenerator((32,), (1, 28, 28), channels=16, feature_size=7)).to(device)
    history = fit(system, digits, 25, batch_size=64, learning_rates=(1e-2,), betas=(0.5, 0.999))
    x = system.as_input(digits)
    assert history["mse"][-1] < 0.5 * (x - x.mean(0)).square().mean()


def latents(directory):
    return checkpoints.load(resume_file(directory))[0]["own.latents"]


def least_squares_in_the_ball(weight, y, radius):
    """argmin |y - W e|^2 with |e| <= radius: on the sphere it is a ridge regression, whose penalty is found by bisection."""

    def ridge(penalty):
        return torch.linalg.solve(weight.T @ weight + penalty * torch.eye(weight.shape[1]).to(weight), weight.T @ y)

    low, high = 0.0, 1e6
    if ridge(0.0).norm() <= radius:
        return ridge(0.0)
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if ridge(middle).norm() > radius else (low, middle)
    return ridge(high)


def test_a_linear_generator_reaches_the_error_of_principal_components(linear, tmp_path):
    """Any codes can be scaled into the ball and the weights with them, so the ball costs nothing (Eckart and Young)."""
    system, x = linear
    centred = (x - x.mean(0)).flatten(1)
    best = torch.linalg.svdvals(centred)[3:].square().sum() / x.numel()
    history = fit(system, x, 1500, tmp_path, batch_size=60, learning_rates=(3e-2, 1e-2, 1e-3, 1e-4))
    assert best * (1 - 1e-9) < history["mse"][-1] < best * 1.001
    e = latents(tmp_path)
    assert e.norm(dim=1).max() <= 3**0.5 + 1e-9
    assert history["mse"][0] > 5 * best


@pytest.mark.parametrize("masked", [False, True])
def test_inference_finds_the_constrained_least_squares_solution(linear, masked):
    system, x = linear
    weight = system.generator.weight.data.mul_(12)
    system.inference_steps = 400
    mask = torch.ones(9, 1, 1).to(x)
    if masked:
        mask[2::3] = 0
    e, seen = system.infer(torch.where(mask > 0, x, torch.nan), mask), mask.flatten() > 0
    best = torch.stack([least_squares_in_the_ball(weight[seen], y, 3**0.5) for y in x.flatten(1)[:, seen]])
    inside = best.norm(dim=1) < 3**0.5 - 1e-6
    assert inside.any() and not inside.all()  # both cases are seen

    def loss(e):
        return (x.flatten(1) - e @ weight.T)[:, seen].square().sum(1)

    torch.testing.assert_close(loss(e), loss(best), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_pca, scale", [(N_PCA, 0.01), (N_PCA, 0.2), (10, 0.2)])
def test_codes_start_as_principal_component_scores_projected_onto_the_ball(new_system, images, tmp_path, n_pca, scale):
    x = scale * srlib.to_unit_range(images).double()
    fit(new_system(code_learning_rate=1e-12, n_pca=n_pca).double(), x, 1, tmp_path)
    e = latents(tmp_path)
    chosen = x.flatten(1)[torch.randperm(16, generator=torch.Generator().manual_seed(0))[:n_pca]]
    _, _, components = torch.linalg.svd(chosen - chosen.mean(0), full_matrices=False)
    scores = (x.flatten(1) - chosen.mean(0)) @ components[:4].T
    z = scores / scores.norm(dim=1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(e @ e.T, 4 * z @ z.T, rtol=0.01, atol=1e-3)  # the signs of scores are free
    assert (z.norm(dim=1) > 0.999).any() == (scale > 0.1)


def test_a_code_goes_down_its_gradient_and_back_into_the_ball(new_system, images, tmp_path):
    """z - rate * finite differences of the batch's loss, for a rate at which the ball is left and one at which it is not."""
    start = new_system(code_learning_rate=1e-12).double()
    fit(start, images, 1, tmp_path / "start")
    before = latents(tmp_path / "start")
    order = torch.randperm(16, generator=after_pca())[:6]
    fresh = new_system().double()
    fit(fresh, images, 1, learning_rates=(1e-12,))  # its last bias starts at the mean colour
    generator = fresh.generator
    x = start.as_input(images[order])

    def loss(z):
        return (x - generator(2.0 * z.to(x))).square().mean().item()  # sqrt(d) = 2

    z, slope = before[order] / 2, torch.zeros(6, 4, dtype=torch.float64)
    for i in range(6):
        for j in range(4):
            step = torch.zeros_like(z)
            step[i, j] = 1e-5
            with torch.no_grad():
                slope[i, j] = (loss(z + step) - loss(z - step)) / 2e-5
    for rate in (0.5, 50.0):
        system = new_system(code_learning_rate=rate).double()
        fit(system, images, 1, tmp_path / str(rate))
        after = latents(tmp_path / str(rate))
        moved = z - rate * slope
        expected = moved / moved.norm(dim=1, keepdim=True).clamp_min(1)
        torch.testing.assert_close(after[order] / 2, expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(after.norm(dim=1).clamp_min(2), torch.full((16,), 2.0, dtype=torch.float64))
    unvisited = torch.tensor([i for i in range(16) if i not in order])
    torch.testing.assert_close(after[unvisited], before[unvisited])


def after_pca():
    """The random state in which a training of 16 images draws its first order: the PCA has drawn its images before."""
    rng = torch.Generator().manual_seed(0)
    torch.randperm(16, generator=rng)
    return rng


def test_projection():
    e = torch.tensor([[0.0, 0.0], [0.6, 0.8], [3.0, 4.0], [0.0, -9.0]])
    expected = torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.6 * 2**0.5, 0.8 * 2**0.5], [0.0, -(2**0.5)]])
    torch.testing.assert_close(projected(e), expected)


def test_a_tiny_set_is_learned_by_heart(new_system, images):
    system = new_system()
    x = system.as_input(images)
    history = fit(system, images, 200, batch_size=16, learning_rates=(1e-2, 3e-3))
    best_constant = (x - x.mean(0)).square().mean()
    assert history["mse"][-1] < 0.1 * best_constant
    assert (system.reconstruct(x) - x).square().mean() < 0.2 * best_constant
    assert set(history) == {"loss", "mse", "code_norm"}
    assert max(history["code_norm"]) <= 1 + 1e-6


@pytest.mark.parametrize("t", [1, 5])
def test_a_killed_run_resumes_with_the_same_bits(new_system, images, tmp_path, killed_at, t):
    whole, fresh = new_system(), new_system(seed=99)
    history = fit(whole, images, 6, tmp_path / "whole")
    with killed_at(t):
        fit(new_system(), images, 6, tmp_path / "killed")
    assert fit(fresh, images, 6, tmp_path / "killed", seed=99) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values()))
    assert torch.equal(latents(tmp_path / "whole"), latents(tmp_path / "killed"))


def test_samples_come_from_the_gaussian_of_the_codes(new_system, images, tmp_path):
    system = new_system()
    fit(system, images, directory=tmp_path)
    e = latents(tmp_path).to(system.code_mean)
    torch.testing.assert_close(system.code_mean, e.mean(0))
    torch.testing.assert_close(system.code_scale @ system.code_scale.T, e.T.cov())
    noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(e)
    expected = system.decode(e.mean(0) + noise @ system.code_scale.T)
    torch.testing.assert_close(system.sample(5, rng=torch.Generator().manual_seed(1)), expected)
    with pytest.raises(ValueError, match="fit_aggregate first"):
        system.sample(2, "aggregate")
    torch.testing.assert_close(system.fit_aggregate(images), system.infer(system.as_input(images)))
    assert system.sample(2, "aggregate").shape == (2, 1, 16, 16)


def test_more_starts_are_never_worse_and_some_are_better(new_system, images):
    system = new_system()
    fit(system, images, 60, batch_size=16, learning_rates=(1e-2,))
    system.inference_steps = 10
    x = system.as_input(images)
    once = (system.reconstruct(x) - x).square().flatten(1).mean(1)
    system.n_starts = 4
    best = (system.reconstruct(x, rng=torch.Generator().manual_seed(0)) - x).square().flatten(1).mean(1)
    assert (best <= once + 1e-6).all() and (best < 0.9 * once).any()


def test_what_does_not_fit_is_refused(new_system, images):
    config = Config("a", system="glo", latent_dims=(2,), channels=4, options={"inference_steps": 3})
    assert config.build((1, 28, 28)).inference_steps == 3 and config.build((1, 28, 28)).n_pca == N_PCA
    with pytest.raises(ValueError, match="'steps'.*code_learning_rate, n_pca"):
        replace(config, options={"steps": 3})
    with pytest.raises(ValueError, match="one layer"):
        replace(config, latent_dims=(2, 3))
    for name in ("code_learning_rate", "n_pca", "inference_steps", "inference_learning_rate", "n_starts"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            replace(config, options={name: 0})
    with pytest.raises(ValueError, match=r"4 images \(there are 16, n_pca=4\).*give at least 5"):
        fit(new_system(n_pca=4), images)
    with pytest.raises(ValueError, match="'prior' or 'aggregate'"):
        new_system().sample(2, "posterior")
    with pytest.raises(ValueError, match="n=0"):
        new_system().sample(0)
