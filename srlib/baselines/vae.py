"""The variational auto-encoder (VAE; Kingma and Welling 2014) of the generator of Table 4, with any number of layers.

    q(e | x) = N(m(x), diag t(x)^2),    e = m(x) + t(x) * eps,    eps ~ N(0, I)
    ELBO(x)  = E_q[log p(x | e)] - KL(q(e | x) || p(e))  <=  log p(x)                              their Eq. (3)
    KL       = sum over latents of (m^2 + t^2 - 1) / 2 - log t                                     their Eq. (10)

Generator and encoder go up the ELBO together, with one draw of e for each image. The latents are the noises e of all
layers, whose prior is N(0, I); with L = 1 they are the z of the paper. With more layers this q, in which all latents are
independent given x, is the plainest one can take; `ladder_vae` has a q that follows the layers.

The pixels are N(g(e), sigma^2 I) as in the short run system, and sigma goes the same way from sigma_start to sigma, so that
the systems differ in inference alone. While it does, the bound is that of the model with the sigma of the moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..generators import Generator, check_whole, given_or_fresh, randn_like
from ..posterior import Posterior
from ..system import NoisySystem, check_fraction, of_numbers
from ..training import History, TrainingLoop, TrainingPlan
from ._encoder import BottomUpEncoder
from ._options import checked_options

if TYPE_CHECKING:
    from ..experiment import Config

# Rounds of imputation when pixels are hidden: as many as the short run's steps, K = 25.
ROUNDS = 25


class Draw(NamedTuple):
    """One draw of the latents of each image from q(e | x)."""

    e: Tensor  # [n, d]
    log_q: Tensor  # log q(e | x) [n]
    kl: Tensor  # KL(q(e | x) || p(e)) [n], or an unbiased estimate of it
    decode: Callable[[], Tensor]  # the mean image g(e) [n, C, H, W], computed when called


class VAE(NoisySystem):
    """A generator with an inference network.

    Parameters
    ----------
    generator : g_theta.
    encoder : images [n, C, H, W] -> m(x) and t(x) > 0, both [n, d].
    sigma, sigma_start, anneal_fraction : of the pixel noise, as in `NoisySystem`.
    warmup : the KL counts by a factor that goes linearly from 0 to 1 over this fraction of training (Sonderby et al. 2016);
        0 is none.
    """

    def __init__(
        self,
        generator: Generator,
        encoder: nn.Module,
        sigma: float = 0.15,
        sigma_start: float | None = None,
        anneal_fraction: float = 0.5,
        warmup: float = 0.0,
    ) -> None:
        super().__init__(generator, sigma, sigma_start, anneal_fraction)
        self.encoder, self.warmup = encoder, warmup
        check_fraction("warmup", warmup)

    def draw(self, x: Tensor, rng: torch.Generator | None = None) -> Draw:
        """One draw from q(e | x) for images x [n, C, H, W], differentiable in the weights of encoder and generator."""
        e, log_q, kl = gaussian(*self.encoder(x), rng)
        return Draw(e, log_q, kl, lambda: self.generator(e))

    def fit(
        self,
        images: Tensor,
        plan: TrainingPlan,
        rng: torch.Generator | None = None,
        directory: Path | None = None,
        progress: bool = True,
    ) -> History:
        """Go up the ELBO of training images [n, C, H, W]; arguments as in `TrainingLoop`.

        Returns the history, one number for each update: loss (-ELBO per image in nats, but for the factor of the KL), sigma, mse
        (per pixel, on [-1, 1]), kl (nats per image) and warmup (the factor of the KL).
        """
        rng = given_or_fresh(rng)
        loop = TrainingLoop(self, images, plan, rng, directory, progress=progress)
        for t, x, _ in loop:
            sigma, weight = self.sigma_at(t / plan.n_updates), self.kl_weight_at(t / plan.n_updates)
            draw = self.draw(x, rng)
            residual = x - draw.decode()
            log_likelihood = Posterior(self.generator, x, sigma).log_joint(draw.e, residual) - log_normal(draw.e)
            loss = (weight * draw.kl - log_likelihood).mean()
            mse = residual.detach().square().mean()
            loop.update(loss, sigma=sigma, mse=mse, kl=draw.kl.detach().mean(), warmup=weight)
        return loop.finish()

    def infer(self, x: Tensor, mask: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
        """One draw e [n, d] from q(e | x).

        Without some of the pixels the encoder cannot work: with a mask the hidden ones start at 0, the middle of [-1, 1],
        and `ROUNDS` times they are replaced by those of g(e), e drawn from q(e | x) (Rezende, Mohamed and Wierstra 2014). They are
        the mean image's, without pixel noise, since the encoder never saw noisy images.
        """
        posterior = Posterior(self.generator, x, self.sigma, mask)  # hidden pixels are 0
        with torch.no_grad():
            draw = self.draw(posterior.x, rng)
            if posterior.mask is not None:
                for _ in range(ROUNDS):
                    draw = self.draw(torch.where(posterior.mask > 0, posterior.x, draw.decode()), rng)
        return of_numbers("latents", draw.e)

    def elbo(self, x: Tensor, n_samples: int = 1, rng: torch.Generator | None = None) -> Tensor:
        """The lower bound of log p(x) in nats [n], with all constants and the final sigma, for images x [n, C, H, W].

        It is the mean of log p(x, e) - log q(e | x) over draws, whose variance vanishes where q is the posterior.
        """
        check_whole("n_samples", n_samples)
        posterior = Posterior(self.generator, x, self.sigma)
        total = torch.zeros_like(x[:, 0, 0, 0])
        with torch.no_grad():
            for _ in range(n_samples):
                draw = self.draw(x, rng)
                total += posterior.log_joint(draw.e, x - draw.decode()) - draw.log_q
        return total / n_samples

    def likelihood(self, x: Tensor, rng: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"elbo": self.elbo(x, 1, rng)}

    def kl_weight_at(self, progress: float) -> float:
        """The factor of the KL when the fraction `progress` in [0, 1] of training is done."""
        return 1.0 if progress >= self.warmup else progress / self.warmup


def gaussian(mean: Tensor, std: Tensor, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A draw from q = N(mean, diag std^2), both [n, d]: e [n, d], log q(e) [n] and KL(q || N(0, I)) [n]."""
    noise, log_std = randn_like(mean, rng), std.log()
    kl = (0.5 * (mean.square() + std.square() - 1) - log_std).sum(1)
    return mean + std * noise, log_normal(noise) - log_std.sum(1), kl


def log_normal(noise: Tensor) -> Tensor:
    """log N(noise; 0, I) [n] for noise [n, d]."""
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(1)


AnyVAE = TypeVar("AnyVAE", bound=VAE)


def assembler(
    config: Config, kind: type[AnyVAE], defaults: Mapping[str, Any], n_heads: int = 2
) -> Callable[[tuple[int, int, int]], AnyVAE]:
    """Image shape -> the untrained system of this kind, whose own options are those of `defaults`.

    Raises ValueError for entries of `config` that do not fit.
    """
    options = checked_options(config, defaults)
    if config.step_size_search != "none":
        raise ValueError(f"step_size_search={config.step_size_search!r}: {config.system} has no step size; use none")

    def build(image_shape: tuple[int, int, int]) -> AnyVAE:
        generator = config.new_generator(image_shape)
        encoder = BottomUpEncoder(generator, n_heads)
        return kind(generator, encoder, config.sigma, config.sigma_start, config.anneal_fraction, **options)

    return build


def builder(config: Config) -> Callable[[tuple[int, int, int]], VAE]:
    """Image shape -> the untrained system. Raises ValueError for entries of `config` that do not fit. options: warmup."""
    return assembler(config, VAE, {"warmup": 0.0})
