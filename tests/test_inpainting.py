"""Inpainting against what is exact in the linear model, and its scores against what they must be."""

import math

import pytest
import torch
from torch import nn

import srlib
from srlib.baselines.glow import FlowGenerator, Glow
from srlib.baselines.vae import ROUNDS, VAE
from srlib.evaluation.inpainting import (
    KINDS,
    hidden_spread,
    hidden_squared_error,
    inpaintings,
    linear_fill,
    mean_fill,
    nearest_fill,
    observed_mask,
    pixel_spread,
    rank_of_truth,
)

SHAPE = (3, 8, 6)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# Masks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.03, 0.25, 0.5, 0.9])
def test_masks_have_the_demanded_rate_in_every_image(kind, rate):
    mask = observed_mask(kind, 20, SHAPE, rate, rng())
    assert mask.shape == (20, 1, 8, 6) and mask.dtype == torch.bool
    assert ((~mask).flatten(1).sum(1) == round(rate * 48)).all()


@pytest.mark.parametrize("kind, visible", [("left", "3:"), ("right", ":3"), ("top", "4:"), ("bottom", ":4")])
def test_half_an_image_is_half_an_image(kind, visible):
    start, _, end = visible.partition(":")
    kept = slice(int(start) if start else None, int(end) if end else None)
    expected = torch.zeros(1, 1, 8, 6, dtype=torch.bool)
    expected[(..., kept) if kind in ("left", "right") else (..., kept, slice(None))] = True
    assert torch.equal(observed_mask(kind, 1, SHAPE, 0.5), expected)


def test_a_block_is_a_square_where_it_has_room():
    hidden = ~observed_mask("block", 200, (1, 9, 9), 9 / 81, rng())[:, 0]
    spans = [torch.stack([i.max() - i.min() for i in image.nonzero().T]) + 1 for image in hidden]
    inner = [span for span, image in zip(spans, hidden) if not image[0].any() and not image[-1].any()]
    inner = [span for span in inner if (span == 3).all()]
    assert len(inner) > 50
    assert all(span.max() <= 5 for span in spans)  # around a corner pixel: 3x3 too, along a side: 2x3 and the next ring


def test_every_pixel_is_hidden_now_and_then_and_the_seed_decides():
    for kind in ("pixels", "block"):
        first, again, other = (observed_mask(kind, 300, SHAPE, 0.3, rng(s)) for s in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert ((~first).sum(0) > 0).all()
        assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("stripes", 1, SHAPE, 0.5), "kind='stripes' must be one of pixels, block"),
        (("block", 0, SHAPE, 0.5), "n=0"),
        (("block", 1, SHAPE, 0.0), "rate=0.0 must lie between 0 and 1"),
        (("block", 1, SHAPE, 1), "rate=1 must lie between 0 and 1"),
        (("block", 1, SHAPE, math.nan), "rate=nan"),
        (("block", 1, SHAPE, "half"), "rate='half'"),
        (("block", 1, SHAPE, 0.001), "hides 0"),
        (("block", 1, SHAPE, 0.999), "hides 48"),
        (("block", 1, SHAPE, 0.5, 3), "rng=3"),
    ],
)
def test_masks_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        observed_mask(*arguments)


# Inpainting


def test_a_long_chain_inpaints_with_the_exact_posterior_mean(linear_posterior):
    """In the linear model the mean of e_K has no bias from the step size, and K is long enough for it to be there."""
    posterior = linear_posterior(n=2, mask=True)
    exact = srlib.ClosedForm(posterior)
    system = srlib.ShortRun(posterior.generator, n_steps=400, step_size=0.02, sigma=posterior.sigma)
    x = torch.where(posterior.mask > 0, posterior.x, torch.nan)  # the truth is not there to be looked at
    draws = inpaintings(system, x.repeat(300, 1, 1, 1), posterior.mask, 4, rng()).reshape(1200, *x.shape)
    with torch.no_grad():
        expected = posterior.generator(exact.posterior_moments()[0])
    hidden = (posterior.mask == 0).expand_as(x)
    error = (draws.mean(0) - expected)[hidden]
    standard_error = draws.std(0)[hidden] / len(draws) ** 0.5
    assert (error.abs() < 4 * standard_error).all()
    assert (standard_error < 0.05).all()
    assert (draws[:, ~hidden] == posterior.x[~hidden]).all()


class Watched(nn.Module):
    """An encoder that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        mean = x.flatten(1)[:, :3]
        return mean, torch.ones_like(mean)


def test_imputation_by_a_vae_keeps_the_observed_pixels_in_every_round(linear_posterior):
    posterior = linear_posterior(n=4, mask=True)
    encoder = Watched()
    system = VAE(posterior.generator, encoder, posterior.sigma)
    hidden = (posterior.mask == 0).expand_as(posterior.x)
    draws = inpaintings(system, posterior.x, posterior.mask, 2, rng())
    assert len(encoder.seen) == ROUNDS + 1
    for x in (*encoder.seen, draws):
        for copy in x.view(2, *posterior.x.shape):
            assert torch.equal(copy[~hidden], posterior.x[~hidden])
    assert not torch.equal(encoder.seen[1], encoder.seen[2])
    assert not torch.equal(draws[0], draws[1])


def test_the_seed_decides_and_bad_arguments_are_refused(linear_posterior):
    posterior = linear_posterior(n=2, mask=True)
    system = srlib.ShortRun(posterior.generator, n_steps=3, step_size=0.02, sigma=posterior.sigma)
    a, b, c = (inpaintings(system, posterior.x, posterior.mask, 2, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(ValueError, match="n_draws=0"):
        inpaintings(system, posterior.x, posterior.mask, 0)
    with pytest.raises(ValueError, match="does not broadcast"):
        inpaintings(system, posterior.x, torch.ones(2, 1, 3, 1), 1)
    with pytest.raises(ValueError, match="0 \\(hidden\\) and 1 \\(observed\\)"):
        inpaintings(system, posterior.x, 0.5 * posterior.mask, 1)
    with pytest.raises(ValueError, match="mask=None"):
        inpaintings(system, posterior.x, None, 1)


def test_a_flow_cannot_inpaint():
    images = torch.zeros(1, 1, 8, 8)
    glow = Glow(FlowGenerator((1, 8, 8), n_levels=1, depth=1, width=4))
    with pytest.raises(ValueError, match="mask"):
        inpaintings(glow, images, observed_mask("left", 1, (1, 8, 8), 0.5), 1)


# Scores


def test_the_error_counts_hidden_pixels_only():
    images = torch.randn(3, *SHAPE, generator=rng())
    mask = observed_mask("pixels", 3, SHAPE, 0.25, rng())
    wrong = torch.where(mask, 7.0, images + 0.5)  # observed pixels are far off
    torch.testing.assert_close(hidden_squared_error(images, wrong, mask), torch.full((3,), 0.25))
    error = torch.randn(2, 3, *SHAPE, generator=rng(1))
    found = hidden_squared_error(images, images + error, mask.float())
    for i in range(2):
        for j in range(3):
            expected = error[i, j][:, ~mask[j, 0]].square().mean()
            torch.testing.assert_close(found[i, j], expected)


@pytest.mark.parametrize("m", [2, 9])
def test_draws_of_the_truths_own_law_are_found_to_be_calibrated(m):
    """Spread and error agree and ranks are uniform; draws of half the width are found out."""
    n = 4000
    centre, noise = torch.randn(1, n, 1, 4, 4, generator=rng()), torch.randn(m + 1, n, 1, 4, 4, generator=rng(1))
    truth, draws = (centre + noise)[0], (centre + noise)[1:]
    mask = observed_mask("block", n, (1, 4, 4), 0.5, rng())
    spread = hidden_spread(truth, draws, mask)
    error = hidden_squared_error(truth, draws.mean(0), mask)
    assert (spread - error).mean().abs() < 4 * (spread - error).std() / n**0.5
    torch.testing.assert_close(error.mean(), torch.tensor(1 + 1 / m), rtol=0.03, atol=0)
    counts = rank_of_truth(truth, draws, mask, 0.0).bincount(minlength=m + 1).double()
    expected = n / (m + 1)
    assert ((counts - expected).square() / expected).sum() < 2 * m + 10  # chi squared with m degrees of freedom
    narrow = centre[0] + 0.5 * noise[1:]
    assert hidden_spread(truth, narrow, mask).mean() < 0.5 * hidden_squared_error(truth, narrow.mean(0), mask).mean()
    ranks = rank_of_truth(truth, narrow, mask, 0.0)
    assert ((ranks == 0) | (ranks == m)).double().mean() > 1.15 * 2 / (m + 1)


def test_ranks_do_not_depend_on_observed_pixels():
    truth, draws = torch.zeros(5, 1, 4, 4), torch.ones(3, 5, 1, 4, 4)
    mask = observed_mask("left", 5, (1, 4, 4), 0.5)
    draws[:2] = torch.where(mask, 100.0, -1.0)
    assert (rank_of_truth(truth, draws, mask, 0.0) == 2).all()


def test_ranks_are_uniform_when_the_draws_lack_nothing_but_the_pixel_noise():
    """Even where all mean images are one: then noise alone decides, and without it the truth is always outside."""
    n, m, sigma = 4000, 4, 0.15
    truth = 0.2 + sigma * torch.randn(n, 1, 4, 4, generator=rng())
    draws = torch.full((m, n, 1, 4, 4), 0.2)
    mask = observed_mask("block", n, (1, 4, 4), 0.5, rng())
    counts = rank_of_truth(truth, draws, mask, sigma, rng(1)).bincount(minlength=m + 1).double()
    expected = n / (m + 1)
    assert ((counts - expected).square() / expected).sum() < 2 * m + 10
    without = rank_of_truth(truth, draws, mask, 0.0)
    assert ((without == 0) | (without == m)).all()


def test_scores_refuse_what_does_not_fit():
    images, mask = torch.zeros(2, 1, 4, 4), observed_mask("left", 2, (1, 4, 4), 0.5)
    with pytest.raises(ValueError, match="does not broadcast"):
        hidden_squared_error(images, images, mask[..., :3])
    with pytest.raises(ValueError, match="hides nothing of some image"):
        hidden_squared_error(images, images, torch.cat([mask[:1], mask[:1] | True]))
    with pytest.raises(ValueError, match="0 \\(hidden\\)"):
        hidden_squared_error(images, images, mask * 0.5)
    with pytest.raises(ValueError, match="images have shape"):
        hidden_squared_error(images, images[:1], mask)
    with pytest.raises(ValueError, match="inpainted holds NaN"):
        hidden_squared_error(images, images * math.nan, mask)
    with pytest.raises(ValueError, match="M > 1"):
        pixel_spread(images[None])
    with pytest.raises(ValueError, match="M > 1"):
        hidden_spread(images, images, mask)


# What needs no latents


def test_fills_are_the_mean_image_and_the_nearest_one_on_observed_pixels():
    training = torch.randn(30, *SHAPE, generator=rng())
    mask = observed_mask("pixels", 5, SHAPE, 0.4, rng(1))
    images = training[7:12] + 0.01 * torch.randn(5, *SHAPE, generator=rng(2))
    images = torch.where(mask, images, 1e3)  # hidden pixels play no part in the search
    nearest, mean = nearest_fill(images, mask, training), mean_fill(images, mask, training)
    assert torch.equal(nearest, torch.where(mask, images, training[7:12]))
    assert torch.equal(mean, torch.where(mask, images, training.mean(0)))
    brute = ((images - training[:, None]).square() * mask).flatten(2).sum(2).argmin(0)
    assert brute.tolist() == [7, 8, 9, 10, 11]


def test_the_linear_fill_is_the_posterior_mean_of_the_linear_model_of_full_rank():
    """g(e) = C^(1/2) e + b, whose images are N(b, C) without pixel noise; ridge is the noise's variance."""
    shape, sigma = (1, 3, 2), 0.3
    training = (
        (2 * torch.randn(500, 6, generator=rng()) @ torch.randn(6, 6, generator=rng(1))).view(-1, *shape).double()
    )
    images, mask = training[:4] + 0.1, observed_mask("pixels", 4, shape, 0.5, rng())
    variances, directions = torch.linalg.eigh(training.flatten(1).T.cov(correction=0))
    generator = srlib.LinearGenerator(directions * variances.sqrt(), training.flatten(1).mean(0))
    posterior = srlib.Posterior(generator, images.view(4, 6, 1, 1), sigma, mask.view(4, 6, 1, 1))
    with torch.no_grad():
        expected = generator(srlib.ClosedForm(posterior).posterior_moments()[0]).view(4, *shape)
    filled = linear_fill(torch.where(mask, images, torch.nan), mask, training, sigma**2)
    torch.testing.assert_close(filled, torch.where(mask, images, expected))
    with pytest.raises(ValueError, match="ridge=0"):
        linear_fill(images, mask, training, 0.0)


def test_no_other_ridge_predicts_a_gaussian_better_than_its_own_noise():
    n, sigma = 2000, 0.4
    mixing = torch.randn(6, 6, generator=rng(1)).double()
    clean = torch.randn(2 * n, 6, generator=rng()).double() @ mixing
    noisy = (clean + sigma * torch.randn(2 * n, 6, generator=rng(2)).double()).view(-1, 1, 3, 2)
    mask = observed_mask("pixels", n, (1, 3, 2), 0.5, rng(3))
    truth = clean[n:].view(-1, 1, 3, 2)

    def error(ridge):  # the training images are clean, the given ones noisy
        filled = linear_fill(noisy[n:], mask, clean[:n].view(-1, 1, 3, 2), ridge)
        return hidden_squared_error(truth, filled, mask).mean()

    assert error(sigma**2) < min(error(sigma**2 / 8), error(sigma**2 * 8))


IMAGES, HALF, TRAINING = torch.zeros(2, 1, 4, 4), observed_mask("left", 2, (1, 4, 4), 0.5), torch.randn(5, 1, 4, 4)
NAN = torch.full_like(TRAINING, math.nan)


@pytest.mark.parametrize("fill", [mean_fill, nearest_fill, lambda *given: linear_fill(*given, 0.1)])
@pytest.mark.parametrize(
    "given, message",
    [
        ((IMAGES, None, TRAINING), "mask=None must be a tensor"),
        ((IMAGES, HALF[..., :3], TRAINING), r"mask has shape \(2, 1, 4, 3\), which does not broadcast"),
        ((IMAGES, 0.3 * HALF, TRAINING), r"mask must hold 0 \(hidden\)"),
        ((IMAGES, HALF, TRAINING[..., :3]), r"training has shape \(5, 1, 4, 3\); give .* \[N, 1, 4, 4\]"),
        ((IMAGES, HALF, TRAINING[:0]), r"training has shape \(0, 1, 4, 4\); give at least one"),
        ((IMAGES, HALF, TRAINING[0]), r"training has shape \(1, 4, 4\)"),
        ((IMAGES, HALF, TRAINING.to(torch.uint8)), r"training has dtype torch.uint8; scale"),
        ((IMAGES, HALF, TRAINING.double()), r"training has dtype torch.float64, images torch.float32"),
        ((IMAGES, HALF, NAN), "training holds NaN"),
        ((IMAGES, HALF, None), "training=None"),
        ((IMAGES.to(torch.uint8), HALF, TRAINING), "images has dtype torch.uint8; scale"),
        ((IMAGES[:0], HALF[:0], TRAINING), r"images have shape \(0, 1, 4, 4\)"),
        ((NAN[:2], HALF, TRAINING), "images hold NaN or infinite pixels that are observed"),
    ],
)
def test_fills_refuse_what_does_not_fit(fill, given, message):
    with pytest.raises(ValueError, match=message):
        fill(*given)


@pytest.mark.parametrize(
    "draws, sigma, message",
    [
        *((IMAGES[None], sigma, f"sigma={sigma!r} must be") for sigma in (math.nan, -1, math.inf, "1", True, None)),
        (IMAGES[None][:0], 0.1, r"draws have shape \(0, 2, 1, 4, 4\)"),
        (IMAGES, 0.1, r"draws have shape \(2, 1, 4, 4\)"),
        (IMAGES[None][..., :3], 0.1, r"draws \(1, 2, 1, 4, 3\)"),
        (None, 0.1, "draws=None"),
    ],
)
def test_ranks_are_refused_without_draws_or_a_noise(draws, sigma, message):
    with pytest.raises(ValueError, match=message):
        rank_of_truth(IMAGES, draws, HALF, sigma)


def test_shapes_systems_and_images_that_are_none_are_refused(linear_posterior):
    for bad in (3, None, (8, 6), (1, 0, 6), (1, 8.0, 6)):
        with pytest.raises(ValueError, match="image_shape="):
            observed_mask("block", 1, bad, 0.5)
    with pytest.raises(ValueError, match="system=None"):
        inpaintings(None, IMAGES, HALF, 1)
    posterior = linear_posterior(n=2, mask=True)
    system = srlib.ShortRun(posterior.generator, n_steps=3, step_size=0.02, sigma=posterior.sigma)
    with pytest.raises(ValueError, match="images are a list"):
        inpaintings(system, [1.0], posterior.mask, 1)
