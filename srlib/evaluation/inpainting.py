"""Inpainting (section 5.3): hidden pixels from observed ones, what it is judged by, and what needs no latents.

    m = 1: observed, m = 0: hidden
    e ~ q(e | m x),    xhat = m x + (1 - m) g(e)                                                   Eq. (10) with the masked score
    error  = sum (1 - m) (x - xhat)^2 / sum (1 - m)
    spread = (1 + 1/M) (1/(M - 1)) sum_j (xhat_j - mean)^2,    over the hidden pixels of M draws

The mean of M draws misses one more draw of the same law by the spread, in expectation: so if the truth is as good as a draw, error of
the mean and spread agree, and the truth's rank among the draws is uniform on 0, ..., M.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..generators import check_positive, check_tensor, check_whole, given_or_fresh
from ..posterior import Posterior
from ..system import System, in_batches

BATCH = 200  # images that are inpainted at once
KINDS = ("pixels", "block", "left", "right", "top", "bottom")  # of what can be hidden


def observed_mask(
    kind: str, n: int, image_shape: tuple[int, int, int], rate: float, rng: torch.Generator | None = None
) -> Tensor:
    """Masks [n, 1, H, W], True = observed, which hide exactly round(rate H W) pixels of each image, in all colours.

    kind : "pixels", anywhere; "block", a square around a random pixel, as far as it lies in the image (where it does not, it is
        larger); "left", "right", "top" or "bottom", so many columns or rows from there, the last of them in part.
    rate : share of the pixels to hide. Raises ValueError where it leaves none hidden or none observed, and for what is no shape
        or kind.
    """
    check_whole("n", n)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1:
        raise ValueError(f"rate={rate!r} must lie between 0 and 1")
    try:
        _, height, width = image_shape
        for side in image_shape:
            check_whole("side", side)
    except (TypeError, ValueError):
        raise ValueError(f"image_shape={image_shape!r} must be (C, H, W), whole numbers of at least 1") from None
    n_pixels = height * width
    n_hidden = round(rate * n_pixels)
    if not 0 < n_hidden < n_pixels:
        raise ValueError(
            f"rate={rate!r} of {height}x{width} pixels hides {n_hidden}; leave some hidden and some observed"
        )
    rng = given_or_fresh(rng)
    row, column = torch.arange(height)[:, None], torch.arange(width)
    # every kind is an order in which pixels disappear, the smallest number first
    if kind == "pixels":
        order = torch.rand(n, height, width, generator=rng)
    elif kind == "block":
        centre = torch.randint(n_pixels, (n, 1, 1), generator=rng)
        order = torch.maximum((row - centre // width).abs(), (column - centre % width).abs())
    else:
        side = {"left": column, "right": -column, "top": row, "bottom": -row}[kind]
        order = side.expand(n, height, width)
    hidden = order.flatten(1).argsort(dim=1, stable=True)[:, :n_hidden]
    return torch.ones(n, n_pixels, dtype=torch.bool).scatter(1, hidden, False).view(n, 1, height, width)


def inpaintings(
    system: System, images: Tensor, mask: Tensor, n_draws: int, rng: torch.Generator | None = None
) -> Tensor:
    """Independent draws [n_draws, n, C, H, W] of the images [n, C, H, W] in [-1, 1], observed pixels as they are.

    Each is a `system.reconstruct` that starts anew. Hidden pixels are mean images g(e) without pixel noise; those of `images`
    are not looked at, and may be NaN. Raises ValueError for a mask that does not fit, and for systems that take none.
    """
    check_whole("n_draws", n_draws)
    check_tensor("mask", mask)
    if not isinstance(system, System):
        raise ValueError(f"system={system!r} must be a System, such as srlib.ShortRun")
    in_batches(images, BATCH)  # refuses what is no images
    shown = system.as_input(images.nan_to_num())
    shown = shown.masked_fill(images.isnan().to(shown.device), torch.nan)
    posterior = Posterior(system.generator, shown, 1.0, mask)  # checks that all fits; hides
    x, observed = posterior.x, posterior.mask.expand_as(posterior.x)
    rng = given_or_fresh(rng)
    batches = zip(*(t.repeat(n_draws, 1, 1, 1).split(BATCH) for t in (x, observed)))
    drawn = torch.cat([system.reconstruct(*batch, rng) for batch in batches])
    return torch.where(observed > 0, x, drawn.view(n_draws, *x.shape))


def hidden_squared_error(images: Tensor, inpainted: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error per hidden pixel of each image: [n], on [-1, 1]. inpainted: [n, C, H, W], or draws [M, n, C, H, W] -> [M, n].

    Raises ValueError unless all fits, holds finite numbers, and every image hides something; so do the other scores.
    """
    hidden = _hidden(images, inpainted, mask)
    return (images - inpainted).square().mul(hidden).flatten(-3).sum(-1) / hidden.flatten(1).sum(1)


def hidden_spread(images: Tensor, draws: Tensor, mask: Tensor) -> Tensor:
    """The spread above of M > 1 draws [M, n, C, H, W], over the hidden pixels of each image: [n]; `images` are for their shape.

    For draws of the truth's own law its expectation is that of `hidden_squared_error` of their mean.
    """
    hidden = _hidden(images, draws, mask, "draws")
    return pixel_spread(draws).mul(hidden).flatten(1).sum(1) / hidden.flatten(1).sum(1)


def pixel_spread(draws: Tensor) -> Tensor:
    """(1 + 1/M) times the variance of M > 1 draws [M, n, C, H, W] at each pixel: [n, C, H, W]. Raises ValueError for fewer."""
    _check_floats("draws", draws)
    check_tensor("draws", draws)
    if draws.ndim != 5 or len(draws) < 2:
        raise ValueError(f"draws have shape {tuple(draws.shape)}; a spread takes [M, n, C, H, W] with M > 1")
    return (1 + 1 / len(draws)) * draws.var(0)


def rank_of_truth(
    images: Tensor, draws: Tensor, mask: Tensor, sigma: float, rng: torch.Generator | None = None
) -> Tensor:
    """How many of M draws [M, n, C, H, W] are darker than the truth in the mean over the hidden pixels: [n], 0 to M.

    The draws are mean images, and the truth has pixel noise, which the mean over h pixel values leaves with the standard deviation
    sigma / h^(1/2). They get as much of it; without, a hidden part of one grey value would decide its own rank.

    Raises ValueError for no draws, a sigma that is negative or not finite, and what does not fit.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 <= sigma <= sys.float_info.max:
        raise ValueError(f"sigma={sigma!r} must be a finite number, 0 or more")
    hidden = _hidden(images, draws, mask, "draws")
    if draws.ndim != 5 or not len(draws):
        raise ValueError(f"draws have shape {tuple(draws.shape)}; a rank takes [M, n, C, H, W] with M > 0")
    count = hidden.flatten(1).sum(1)
    truth, drawn = ((x * hidden).flatten(-3).sum(-1) / count for x in (images, draws))
    noise = torch.randn(drawn.shape, generator=given_or_fresh(rng)).to(drawn)
    return (drawn + sigma / count.sqrt() * noise < truth).sum(0)


def mean_fill(images: Tensor, mask: Tensor, training: Tensor) -> Tensor:
    """images [n, C, H, W] with hidden pixels from the mean of the training images [N, C, H, W], all floats in [-1, 1].

    Raises ValueError, as the other fills do, for images and a mask that do not fit, and for pixels that are NaN where they are seen.
    """
    return torch.where(_seen(images, mask, training), images, training.mean(0))


def nearest_fill(images: Tensor, mask: Tensor, training: Tensor) -> Tensor:
    """images [n, C, H, W] with hidden pixels from the training image [N, C, H, W] that is nearest where they are observed.

    Raises ValueError as `mean_fill` does.
    """
    seen = _seen(images, mask, training)
    observed = seen.flatten(1).to(images.dtype)
    known, candidates = torch.where(seen, images, 0).flatten(1), training.flatten(1)
    # |m (x - t)|^2 without |m x|^2, which is the same for all t
    distance = observed @ candidates.square().T - 2 * known @ candidates.T
    return torch.where(seen, images, training[distance.argmin(1)])


def linear_fill(images: Tensor, mask: Tensor, training: Tensor, ridge: float) -> Tensor:
    """images [n, C, H, W] with hidden pixels guessed linearly from the observed ones, as the training images [N, C, H, W] teach it.

        b_h + C_ho (C_oo + ridge I)^{-1} (x_o - b_o),    b and C their mean and covariance

    This is ridge regression of every hidden pixel on all observed ones, and the exact posterior mean of a linear generator of full
    rank with N(0, C) images and ridge = sigma^2. Raises ValueError as `mean_fill` does, and for a ridge that is not positive.
    """
    check_positive("ridge", ridge)
    observed = _seen(images, mask, training)
    rows = training.flatten(1).double()
    mean, covariance = rows.mean(0), rows.T.cov(correction=0)
    noisy = covariance + ridge * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    guessed = []
    for x, seen in zip(images.flatten(1).double(), observed.flatten(1)):
        weights = torch.linalg.solve(noisy[seen][:, seen], (x - mean)[seen])
        guessed.append(mean + covariance[:, seen] @ weights)
    return torch.where(observed, images, torch.stack(guessed).view_as(images).to(images.dtype))


def _hidden(images: Tensor, inpainted: Tensor, mask: Tensor, name: str = "inpainted") -> Tensor:
    """1 where a pixel value is hidden [n, C, H, W]; a ValueError unless all fits and every image hides something."""
    check_tensor("images", images)
    _check_floats(name, inpainted)
    check_tensor(name, inpainted)
    hidden = ~_observed(images, mask)
    if inpainted.shape[-4:] != images.shape or inpainted.ndim > 5:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and {name} {tuple(inpainted.shape)}; give [n, C, H, W] and the same, or "
            "several such"
        )
    if not hidden.flatten(1).any(1).all():
        raise ValueError("mask hides nothing of some image, which then has no error of hidden pixels")
    return hidden.to(images.dtype)


def _seen(images: Tensor, mask: Tensor, training: Tensor) -> Tensor:
    """True where a pixel value is observed [n, C, H, W]; a ValueError unless a fill can be made from all three."""
    observed = _observed(images, mask)
    if not images[observed].isfinite().all():
        raise ValueError(
            "images hold NaN or infinite pixels that are observed; hide them with mask = 0 or replace them"
        )
    _check_floats("training", training)
    check_tensor("training", training)
    if training.ndim != 4 or not len(training) or training.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"training has shape {tuple(training.shape)}; give at least one image like images: [N, "
            f"{', '.join(map(str, images.shape[1:]))}]"
        )
    if training.dtype != images.dtype:
        raise ValueError(f"training has dtype {training.dtype}, images {images.dtype}; convert one of them")
    return observed


def _check_floats(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}={value!r} must be a tensor")
    if not value.is_floating_point():
        raise ValueError(f"{name} has dtype {value.dtype}; scale to [-1, 1] as floats (srlib.to_unit_range does)")


def _observed(images: Tensor, mask: Tensor) -> Tensor:
    """True where a pixel value is observed [n, C, H, W]; a ValueError for what is no images or no mask for them."""
    _check_floats("images", images)
    check_tensor("mask", mask)
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images have shape {tuple(images.shape)}; give [n, C, H, W] with n > 0")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must hold 0 (hidden) and 1 (observed) only")
    try:
        return (mask > 0).expand_as(images)
    except RuntimeError:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not broadcast to images {tuple(images.shape)}"
        ) from None
