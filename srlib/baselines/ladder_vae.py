"""The ladder variational auto-encoder (Sonderby, Raiko, Maaloe, Sonderby and Winther 2016) of the generator of Table 4.

A deterministic pass upwards gives N(m_l(x), t_l(x)^2) for each layer. The pass downwards draws

    q(z_L | x)          = N(m_L, t_L^2)
    q(z_l | z_{l+1}, x) = N(m_l, t_l^2) N(mu_l, sigma_l^2) / const,    mu_l, sigma_l: the prior's, Eq. (3), at z_{l+1}
                        = N((m_l / t_l^2 + mu_l / sigma_l^2) / w, 1 / w),    w = 1 / t_l^2 + 1 / sigma_l^2

and corrects the prior by what the image says. In the noises e_l = (z_l - mu_l) / sigma_l, which `infer` returns,

    q(e_l | e_{>l}, x)  = N((m_l - mu_l) sigma_l / v, t_l^2 / v),    v = t_l^2 + sigma_l^2,    and the prior is N(0, I).

Given what is above, z_l -> e_l is affine, so KL(q || p) of a layer is the same in both. The map from all z to all e is
triangular with 1 / sigma_l on its diagonal, hence log q(e | x) = log q(z | x) + sum_l sum log sigma_l; it is computed as
sum_l log q(e_l | e_{>l}, x). A layer whose t_l is large against sigma_l is the prior: it has e_l ~ N(0, I) and KL 0.

With L = 1 nothing is merged and this is the VAE. The generator of Table 4 has no batch normalisation, which Sonderby et al.
used beside the warm-up of the KL; nor has the encoder here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..generators import TopDownGenerator
from .vae import VAE, Draw, assembler, gaussian

if TYPE_CHECKING:
    from ..experiment import Config


class LadderVAE(VAE):
    """A `VAE` whose q goes down the layers of the generator; parameters as there, the encoder's m and t being of all z_l."""

    generator: TopDownGenerator

    def draw(self, x: Tensor, rng: torch.Generator | None = None) -> Draw:
        g = self.generator
        (top, *means), (top_std, *stds) = (g.split(statistic) for statistic in self.encoder(x))
        layers = [gaussian(top, top_std, rng)]
        features = g.deterministic[0](g.project[0](layers[0][0]))
        for i, (mean, std) in enumerate(zip(means, stds)):
            prior_mean, prior_std = g.mean[i](features), F.softplus(g.raw_std[i](features))
            layers.append(gaussian(*merged(mean, std, prior_mean, prior_std), rng))
            z = prior_mean + prior_std * layers[-1][0]
            features = g.deterministic[i + 1](g.project[i + 1](z)) + features
        e, log_q, kl = zip(*layers)
        return Draw(torch.cat(e, 1), sum(log_q), sum(kl), lambda: torch.tanh(g.output(features)))


def merged(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of e = (z - prior_mean) / prior_std for z ~ N(mean, std^2) N(prior_mean, prior_std^2) / const."""
    variance = std.square() + prior_std.square()
    return (mean - prior_mean) * prior_std / variance, std / variance.sqrt()


def builder(config: Config) -> Callable[[tuple[int, int, int]], LadderVAE]:
    """Image shape -> the untrained system. Raises ValueError for entries of `config` that do not fit.

    options: warmup; that it lasts for a tenth of training unless told otherwise is our choice.
    """
    if config.generator != "top_down":
        raise ValueError(
            f"generator={config.generator!r}: the ladder VAE merges with priors that depend on the layers above; use "
            "system vae, which with this generator is the variational ladder autoencoder of Zhao et al. (2017)"
        )
    return assembler(config, LadderVAE, {"warmup": 0.1})
