"""The one interface of all seven systems, so that each table of the book is one loop.

A system is a generator with a way to infer its latents: `fit` learns both, `infer` maps images to latents e, `decode` maps
latents to images. Everything a system has learned is in its parameters and buffers, so its `state_dict` is the checkpoint.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from . import distributed
from .data import to_unit_range
from .generators import Generator, check_whole
from .posterior import check_sigma

Source = Literal["prior", "aggregate"]


# Noisy images may leave [-1, 1] a little; images on [0, 255] leave it by far.
UNSCALED = 10.0


class System(nn.Module):
    """Base of the seven systems. A new one implements `fit` and `infer`.

    Latents e are [n, d] and standard normal under the prior. Images are floats [n, C, H, W] in [-1, 1]; `fit` and
    `fit_aggregate` also take uint8, which is converted batch by batch.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        d = generator.latent_dim
        self.generator = generator
        self.register_buffer("aggregate_mean", torch.zeros(d))
        self.register_buffer("aggregate_scale", torch.zeros(d, d))  # read only where the count is positive
        self.register_buffer("aggregate_count", torch.zeros((), dtype=torch.int64))

    def infer(self, x: Tensor, mask: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
        """Latents e [n, d] for images x [n, C, H, W]; mask as in `Posterior`."""
        raise NotImplementedError

    def settings(self) -> dict[str, float]:
        """Numbers that the system has chosen beside its weights, by name; they stand with its scores."""
        return {}

    def likelihood(self, x: Tensor, rng: torch.Generator | None = None) -> dict[str, Tensor]:
        """What the system knows of log p(x) at no great cost, by name: numbers [n] for images x [n, C, H, W]."""
        return {}

    def decode(self, e: Tensor) -> Tensor:
        """The mean images g(e) [n, C, H, W] in [-1, 1] of latents e [n, d]. Raises FloatingPointError if they are no numbers."""
        with torch.no_grad():
            return of_numbers("images", self.generator(e))

    def reconstruct(self, x: Tensor, mask: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
        """decode(infer(x)): [n, C, H, W]. With a mask this is inpainting (section 5.3)."""
        return self.decode(self.infer(x, mask, rng))

    def sample(self, n: int, source: Source = "prior", rng: torch.Generator | None = None) -> Tensor:
        """n new images [n, C, H, W] in [-1, 1].

        source : "prior" decodes e ~ N(0, I), as the paper does; "aggregate" decodes draws from the Gaussian that
            `fit_aggregate` fitted to the latents inferred from the training images.
        """
        e = self.generator.sample_prior(n, rng)
        if source == "aggregate":
            if not self.aggregate_count:
                raise ValueError(
                    "source='aggregate' needs the Gaussian of the inferred latents: call fit_aggregate first"
                )
            e = self.aggregate_mean + e @ self.aggregate_scale.T
        elif source != "prior":
            raise ValueError(f"source={source!r} must be 'prior' or 'aggregate'")
        return self.decode(e)

    def fit_aggregate(self, images: Tensor, batch_size: int = 500, rng: torch.Generator | None = None) -> Tensor:
        """Fit a Gaussian to the latents inferred from `images`, the aggregate posterior; returns these latents [n, d]."""
        batches = in_batches(images, batch_size)
        n, d = len(images), self.generator.latent_dim
        if n <= d:
            raise ValueError(f"{n} images cannot fix a covariance in {d} dimensions; give at least {d + 1}")
        e = distributed.mapped(lambda batch: self.infer(self.as_input(batch), rng=rng), batches)
        scale, failed = torch.linalg.cholesky_ex(e.double().T.cov().reshape(d, d))
        if failed:
            raise FloatingPointError(
                f"the covariance of the latents inferred from {n} images is singular or not a number: the generator does not use "
                f"all of its latents; train longer, with a smaller learning rate, or with fewer than {d} latents"
            )
        self.aggregate_mean.copy_(e.mean(0))
        self.aggregate_scale.copy_(scale)
        self.aggregate_count.fill_(n)
        return e

    def as_input(self, images: Tensor) -> Tensor:
        """images as floats in [-1, 1] where the parameters are and with their dtype; uint8 is scaled, floats are kept.

        Raises ValueError for other whole numbers, for floats so far outside [-1, 1] that they were never scaled, and for those
        that are no numbers.
        """
        parameter = next(self.parameters())
        images = images.to(parameter.device)
        if not images.is_floating_point():
            return to_unit_range(images).to(parameter.dtype)
        if not images.is_meta and images.numel() and not (reach := images.abs().max()) <= UNSCALED:
            if not reach.isfinite():
                raise ValueError("images hold NaN or infinite pixels; replace them or leave these images out")
            raise ValueError(f"images reach {reach:.3g}; scale them to [-1, 1] (uint8 images are scaled here)")
        return images.to(parameter.dtype)


def of_numbers(what: str, made: Tensor) -> Tensor:
    """`made`, which a system made of finite input. Raises FloatingPointError if it holds NaN or infinite numbers."""
    if not made.is_meta and not made.isfinite().all():
        raise FloatingPointError(
            f"the {what} that this system makes hold NaN or infinite numbers: its weights do, or are far too large; train it "
            "again, with a smaller learning rate"
        )
    return made


def in_batches(images: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """images [n, C, H, W] in batches of `batch_size`, the last of what is left. Raises ValueError for what is no images."""
    check_whole("batch_size", batch_size)
    if not isinstance(images, Tensor):
        raise ValueError(f"images are a {type(images).__name__}; give a tensor [n, C, H, W]")
    if images.layout != torch.strided:
        raise ValueError(f"images are {images.layout}; give a dense tensor, images.to_dense()")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images have shape {tuple(images.shape)}; give [n, C, H, W] with n > 0")
    return images.split(batch_size)


class NoisySystem(System):
    """A `System` with the pixel noise of Eq. (2), x = g(e) + N(0, sigma^2 I), whose sigma may be annealed in training.

    Parameters
    ----------
    sigma : final standard deviation of the pixel noise.
    sigma_start, anneal_fraction : sigma goes geometrically from sigma_start to sigma over the first `anneal_fraction` of
        training ("sigma is gradually annealed to 0.15", section 7.1); sigma_start=None keeps it.
    """

    def __init__(
        self, generator: Generator, sigma: float, sigma_start: float | None = None, anneal_fraction: float = 0.5
    ) -> None:
        super().__init__(generator)
        self.sigma, self.sigma_start = sigma, sigma if sigma_start is None else sigma_start
        self.anneal_fraction = anneal_fraction
        for name in ("sigma", "sigma_start"):
            check_sigma(name, getattr(self, name), next(generator.parameters()).dtype)
        if sigma > self.sigma_start:
            raise ValueError(f"sigma={sigma} must not be above sigma_start={self.sigma_start}")
        check_fraction("anneal_fraction", anneal_fraction)

    def sigma_at(self, progress: float) -> float:
        """sigma when the fraction `progress` in [0, 1] of training is done."""
        if progress >= self.anneal_fraction:
            return self.sigma
        return self.sigma_start * (self.sigma / self.sigma_start) ** (progress / self.anneal_fraction)


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must lie in [0, 1]")
