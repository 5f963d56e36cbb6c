"""Glow: exactly invertible, its log-determinants are those of autograd, its density is one, it learns and resumes."""

import math

import pytest
import torch
from torch.nn import functional as F

import srlib
from srlib.baselines import glow
from srlib.experiment import Config

COUPLINGS = pytest.mark.parametrize("coupling", glow.COUPLINGS)
EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}


def random_images(n, shape, seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def disturbed(module, seed=1, scale=0.1):
    """The module with noise on every parameter, so that nothing is zero or a rotation any more."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=rng, dtype=p.dtype).to(p.device)
    return module


def flow(shape=(1, 4, 4), **options):
    torch.manual_seed(0)
    return glow.FlowGenerator(shape, **(dict(n_levels=2, depth=2, width=6) | options))


@pytest.fixture
def new_system(device):
    def make(seed=0, shape=(1, 8, 8), **options):
        torch.manual_seed(seed)
        return glow.Glow(glow.FlowGenerator(shape, **(dict(n_levels=2, depth=2, width=8) | options))).to(device)

    return make


@pytest.fixture
def squares():
    """16 images of 8x8 pixels with a white square of 4x4 in a random place on black, uint8."""
    images = torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
    for image, (i, j) in zip(images, torch.randint(0, 5, (16, 2), generator=torch.Generator().manual_seed(0)).tolist()):
        image[:, i : i + 4, j : j + 4] = 255
    return images


def fit(system, images, n_updates=6, directory=None, seed=0, **plan):
    plan = srlib.TrainingPlan(n_updates, **(dict(batch_size=6, learning_rates=(1e-3,)) | plan))
    return system.fit(images, plan, torch.Generator().manual_seed(seed), directory, progress=False)


def layers():
    torch.manual_seed(0)
    return {
        "actnorm": glow.ActNorm(4),
        "convolution": glow.InvertibleConv(4),
        "additive": glow.Coupling(4, 6, affine=False),
        "affine": glow.Coupling(4, 6, affine=True),
    }


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("dtype", EXACT)
def test_every_layer_is_inverted_and_its_log_determinant_is_that_of_autograd(name, dtype, device):
    layer = disturbed(layers()[name].to(device, dtype))
    h = torch.randn(3, 4, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(2)).to(device)
    y, log_det = layer(h)
    assert not torch.allclose(y, h, atol=0.01)
    torch.testing.assert_close(layer.inverse(y), h, rtol=0, atol=EXACT[dtype])
    for image, claimed in zip(h, log_det):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0].flatten(), image).reshape(16, 16)
        torch.testing.assert_close(claimed, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-4, atol=EXACT[dtype])


@pytest.mark.parametrize("dtype", EXACT)
def test_a_split_is_inverted_and_its_log_determinant_is_that_of_autograd(dtype, device):
    split = disturbed(glow.SplitPrior(2).to(device, dtype))
    z, h = torch.randn(2, 3, 2, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(2)).to(device)
    e, log_det = split(z, h)
    torch.testing.assert_close(split.inverse(e, h), z, rtol=0, atol=EXACT[dtype])
    jacobian = torch.autograd.functional.jacobian(lambda v: split(v, h)[0].flatten(1), z)
    expected = torch.stack([torch.linalg.slogdet(jacobian[i, :, i].reshape(8, 8)).logabsdet for i in range(3)])
    torch.testing.assert_close(log_det, expected, rtol=1e-4, atol=EXACT[dtype])


@COUPLINGS
@pytest.mark.parametrize("learntop", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 8)])
def test_the_log_determinant_of_the_whole_is_that_of_autograd(coupling, learntop, shape, device):
    f = flow(shape, coupling=coupling, learntop=learntop).double().to(device)
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)
    f.initialise(x)
    disturbed(f)
    _, log_det = f.inverse(x)
    d = f.latent_dim
    for image, claimed in zip(x, log_det):
        jacobian = torch.autograd.functional.jacobian(lambda v: f.inverse(v[None])[0][0], image).reshape(d, d)
        torch.testing.assert_close(claimed, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-10, atol=1e-10)


@COUPLINGS
@pytest.mark.parametrize("shape, n_levels, scale, error", [((1, 2, 2), 1, 0.1, 1e-3), ((1, 4, 4), 2, 0.05, 0.02)])
def test_the_density_integrates_to_one(coupling, shape, n_levels, scale, error, device):
    """By brute force, without autograd or the change of variables: quasi-random points of a Gaussian wider than the samples."""
    f = flow(shape, n_levels=n_levels, coupling=coupling, learntop=True).double()
    rng = torch.Generator().manual_seed(0)
    f.initialise(0.4 * torch.randn(64, *shape, dtype=torch.float64, generator=rng))  # scales that are far from 1
    system = glow.Glow(disturbed(f, scale=scale)).to(device)
    with torch.no_grad():
        samples = f(f.sample_prior(4000, rng)).flatten(1)
        wider = torch.distributions.MultivariateNormal(samples.mean(0), 1.2**2 * samples.T.cov())
        u = torch.quasirandom.SobolEngine(f.latent_dim, scramble=True, seed=0).draw(2**15, dtype=torch.float64)
        x = wider.loc + torch.special.ndtri(u.clamp(1e-15, 1 - 1e-15)).to(device) @ wider.scale_tril.T
        integral = (system.log_prob(x.unflatten(1, shape)) - wider.log_prob(x)).exp().mean().item()
    assert integral == pytest.approx(1, abs=error)


@COUPLINGS
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("shape, n_levels", [((1, 28, 28), 2), ((3, 32, 32), 3)])
def test_the_whole_is_inverted_before_and_after_training(coupling, dtype, shape, n_levels, device):
    torch.manual_seed(0)
    system = glow.Glow(glow.FlowGenerator(shape, n_levels, depth=2, width=8, coupling=coupling)).to(device, dtype)
    images = random_images(4, shape)
    x = system.as_input(images).to(dtype)
    e = torch.randn(4, system.generator.latent_dim, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(device)
    for n_updates in (0, 2):
        if n_updates:
            fit(system, images, n_updates, learning_rates=(1e-2,))
            disturbed(system.generator, scale=0.01)
        torch.testing.assert_close(system.reconstruct(x), x, rtol=0, atol=EXACT[dtype])
        torch.testing.assert_close(system.infer(system.generator(e).detach()), e, rtol=0, atol=10 * EXACT[dtype])


def test_after_initialisation_actnorm_gives_mean_0_and_variance_1():
    """On the batch that initialises, at every actnorm of the flow, those inside the couplings included."""
    f = flow((3, 8, 8), coupling="affine", learntop=True).double()
    x = 5 + 3 * torch.randn(10, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f.initialise(x)
    seen = []
    norms = [m for m in f.modules() if isinstance(m, glow.ActNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda _, given, out: seen.append(out[0].transpose(0, 1).flatten(1)))
    f.inverse(x)
    assert len(seen) == len(norms) == 2 * 2 * 3 + 1
    for y in seen:
        torch.testing.assert_close(y.mean(1), torch.zeros(len(y), dtype=y.dtype), rtol=0, atol=1e-10)
        torch.testing.assert_close(y.var(1, correction=0), torch.ones(len(y), dtype=y.dtype), rtol=0, atol=1e-10)


def test_a_constant_channel_is_only_shifted():
    norm = glow.ActNorm(2)
    norm.initialise(torch.full((3, 2, 4, 4), 0.3))
    y, log_det = norm(torch.full((3, 2, 4, 4), 0.3))
    torch.testing.assert_close(y, torch.zeros_like(y))
    torch.testing.assert_close(log_det, torch.zeros(3))


def test_with_couplings_that_do_nothing_and_fitted_actnorm_it_is_the_gaussian_of_the_batch():
    """One additive step: log p(x) = sum over pixels of log N(x; mean, variance), of the pixel's place in its 2x2 square."""
    system = glow.Glow(flow((3, 6, 6), n_levels=1, depth=1)).double()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, 6, 6, dtype=torch.float64, generator=rng) * 0.4 + 0.2
    x[..., ::2] *= 3
    system.generator.initialise(x)
    channels = F.pixel_unshuffle(x, 2)
    mean, std = channels.mean((0, 2, 3), keepdim=True), channels.std((0, 2, 3), keepdim=True, correction=0)
    expected = torch.distributions.Normal(mean, std).log_prob(channels).flatten(1).sum(1)
    torch.testing.assert_close(system.log_prob(x), expected)


def test_an_affine_coupling_starts_as_a_scaling_by_sigmoid_2():
    additive, affine = (flow((3, 6, 6), n_levels=1, depth=1, coupling=c).double() for c in glow.COUPLINGS)
    affine.load_state_dict({k: v for k, v in additive.state_dict().items() if ".last." not in k}, strict=False)
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (plain, plain_log_det), (scaled, log_det) = additive.inverse(x), affine.inverse(x)
    s = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(scaled, torch.cat([plain[:, :54], s * plain[:, 54:]], 1))
    torch.testing.assert_close(log_det, plain_log_det + 54 * math.log(s))


def test_uniform_noise_costs_eight_bits_and_what_a_gaussian_wastes_on_it(device):
    """All 256 values are equally likely: 8 bits by entropy. With u in [-r, r], r = 256/255, and e = rotation of u / s:
    E[bits] = log2(s sqrt(2 pi)) + r^2 / (6 s^2 log 2) + log2(255 / 2)."""
    system = glow.Glow(flow((3, 16, 16), n_levels=1, depth=1)).double().to(device)
    images = random_images(40, (3, 16, 16))
    x, rng = system.as_input(images).double(), torch.Generator().manual_seed(0)
    r = 256 / 255
    for initialise, s in ((False, 1.0), (True, r / math.sqrt(3))):
        if initialise:
            system.generator.initialise(glow.dequantised(x, rng))
        bits = math.log2(s * math.sqrt(2 * math.pi)) + r**2 / (6 * s**2 * math.log(2)) + math.log2(127.5)
        assert system.bits_per_dimension(x, rng).mean().item() == pytest.approx(bits, abs=0.005)
    assert bits == pytest.approx(8 + 0.5 * math.log2(2 * math.pi * math.e / 12))


def test_dequantising_noise_fills_the_bins(device):
    x = srlib.to_unit_range(torch.arange(256, dtype=torch.uint8)).to(device).expand(400, -1)
    y = (glow.dequantised(x, torch.Generator().manual_seed(0)) + 1) * 127.5
    offset = y - torch.arange(256, device=device)
    assert offset.abs().max() <= 0.5 + 1e-4 and offset.min() < -0.499 and offset.max() > 0.499
    assert abs(offset.mean()) < 3 / math.sqrt(12 * offset.numel())


def test_latents_are_those_of_a_top_down_model():
    """e -> image -> halfway up again; the top latents are e_L, the others mean + standard deviation * e."""
    f = disturbed(flow((1, 8, 8), coupling="affine")).double()
    e = f.sample_prior(3, torch.Generator().manual_seed(0))
    top, low = f.latents(e)
    assert f.latent_dims == (32, 32)
    torch.testing.assert_close(top, f.split(e)[0])
    h = F.pixel_unshuffle(f(e), 2)
    for layer in f.levels[0]:
        h, _ = layer(h)
    h, z = h.chunk(2, 1)
    torch.testing.assert_close(low, z.flatten(1))
    torch.testing.assert_close(f.splits[0](z, h)[0].flatten(1), f.split(e)[1])


@COUPLINGS
def test_a_tiny_set_is_learned(new_system, coupling):
    """Images of one brightness each: pixels that agree are what an untrained flow does not know of."""
    rng = torch.Generator().manual_seed(0)
    images = 128 + 40 * torch.randn(64, 1, 1, 1, generator=rng) + 8 * torch.randn(64, 1, 4, 4, generator=rng)
    system = new_system(shape=(1, 4, 4), coupling=coupling)
    history = fit(system, images.round().clamp(0, 255).to(torch.uint8), 80, batch_size=64, learning_rates=(2e-2, 5e-3))
    assert set(history) == {"loss"} and len(history["loss"]) == 80
    assert history["loss"][0] - history["loss"][-1] > 1  # bits per pixel: 16 * log(2) = 11 nats per image
    samples = system.sample(1000, rng=torch.Generator().manual_seed(0))
    x = srlib.to_unit_range(images.round().clamp(0, 255).to(torch.uint8)).to(samples.device)
    assert (samples.mean() - x.mean()).abs() < 0.1
    for of_samples, of_images in ((samples, x), (samples.mean((1, 2, 3)), x.mean((1, 2, 3)))):
        assert of_samples.var().item() == pytest.approx(of_images.var().item(), rel=0.25)


@pytest.mark.parametrize("t", [1, 4])
def test_a_killed_run_resumes_with_the_same_bits(new_system, squares, tmp_path, killed_at, t):
    whole, resumed = new_system(), new_system()
    history = fit(whole, squares)
    with killed_at(t):
        fit(resumed, squares, directory=tmp_path)
    fresh = new_system(seed=99)
    assert fit(fresh, squares, directory=tmp_path, seed=99) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values()))


def test_a_convolution_that_became_singular_stops_at_its_update(new_system, squares):
    system = new_system()
    with torch.no_grad():
        system.generator.levels[0][1].weight[0] = 0
    with pytest.raises(FloatingPointError, match="the loss is (inf|nan) at update 0; try a smaller learning rate"):
        fit(system, squares, 3)


def test_only_the_first_training_initialises(new_system, squares, monkeypatch):
    system = new_system()
    assert not system.initialised
    fit(system, squares, 1)
    assert system.initialised
    again = new_system(seed=5)
    again.load_state_dict(system.state_dict())
    monkeypatch.setattr(glow.FlowGenerator, "initialise", None)  # calling it would be an error
    fit(again, squares, 1)


def test_one_update_is_adamax_on_the_bits(new_system, squares):
    system, twin = new_system(), new_system()
    fit(system, squares, 1)
    rng = torch.Generator().manual_seed(0)
    x = twin.as_input(squares[torch.randperm(16, generator=rng)[:6]])
    twin.generator.initialise(glow.dequantised(x, rng))
    optimizer = torch.optim.Adamax(twin.parameters(), lr=1e-3)
    e, log_det = twin.generator.inverse(glow.dequantised(x, rng))
    nats = -torch.distributions.Normal(0, 1).log_prob(e).sum(1) - log_det - 64 * math.log(2 / 255)
    (nats.mean() / (64 * math.log(2))).backward()
    optimizer.step()
    for ours, by_hand in zip(system.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)


def test_the_aggregate_is_a_diagonal_gaussian(new_system, squares):
    system = new_system()
    fit(system, squares, 3)
    with pytest.raises(ValueError, match="fit_aggregate first"):
        system.sample(2, "aggregate")
    with pytest.raises(ValueError, match="at least 2"):
        system.fit_aggregate(squares[:1])
    e = system.fit_aggregate(squares, batch_size=5)
    torch.testing.assert_close(e, system.infer(system.as_input(squares)))
    torch.testing.assert_close(system.aggregate_mean, e.mean(0))
    torch.testing.assert_close(system.aggregate_scale, e.std(0))
    assert all(buffer.numel() <= 64 for buffer in system.buffers())
    rng = torch.Generator().manual_seed(0)
    expected = system.decode(e.mean(0) + e.std(0) * system.generator.sample_prior(3, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(system.sample(3, "aggregate", rng), expected)
    with pytest.raises(ValueError, match="'prior' or 'aggregate'"):
        system.sample(2, "posterior")


def test_masks_and_images_of_another_shape_are_refused(new_system):
    system = new_system()
    with pytest.raises(ValueError, match="mask: a flow's"):
        system.reconstruct(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"generator makes \[n, 1, 8, 8\]"):
        system.infer(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize(
    "dataset, n_levels, latent_dims",
    [
        ("digits", 2, (392, 392)),
        ("svhn", 3, (768, 768, 1536)),
        ("celeba64", 3, (3072, 3072, 6144)),
        ("celeba64", 4, (1536, 1536, 3072, 6144)),
    ],
)
def test_a_configuration_makes_it(dataset, n_levels, latent_dims):
    config = Config("glow", "glow", dataset, options={"n_levels": n_levels, "depth": 1, "width": 4})
    with torch.device("meta"):
        system = config.build(srlib.data.IMAGE_SHAPES[dataset])
    assert system.generator.latent_dims == latent_dims


def test_the_paper_s_run_is_the_default():
    """3 levels of 16 steps with 512 channels, additive, N(0, I) on top."""
    with torch.device("meta"):
        f = Config("glow", "glow", "svhn").build((3, 32, 32)).generator
    assert [len(level) for level in f.levels] == [3 * 16] * 3
    coupling = f.levels[0][2]
    assert coupling.conv1.weight.shape == (512, 6, 3, 3) and coupling.last.weight.shape == (6, 512, 3, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_levels=3), "n_levels=3: each halves the sides 28 and 28, which can be done 2 times; use n_levels of at most 2"),
        (dict(n_levels=0), "n_levels=0"),
        (dict(depth=0), "depth=0"),
        (dict(width=1.5), "width=1.5"),
        (dict(coupling=0), r"coupling=0 must be one of \('additive', 'affine'\)"),
        (dict(learntop=1), "learntop=1 must be true or false"),
        (dict(levels=2), "no 'levels'; there are: n_levels, depth, width, coupling, learntop"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config("glow", "glow", "digits", options={"n_levels": 2} | options)


def test_odd_sides_and_shapes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="pad the images to even sides"):
        glow.FlowGenerator((1, 7, 8), n_levels=1)
    with pytest.raises(ValueError, match=r"must be \(C, H, W\)"):
        glow.FlowGenerator((8, 8))
