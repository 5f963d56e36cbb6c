"""The VAE with inverse autoregressive flow (IAF; Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling 2016).

    e_0 = m(x) + t(x) * eps,    eps ~ N(0, I)
    e_k = g_k * e_{k-1} + (1 - g_k) * a_k,    (a_k, logit g_k) = MADE_k(e_{k-1}, c(x)),    k = 1, ..., T    their Algorithm 1
    log q(e_T | x) = log N(e_0; m, diag t^2) - sum_k sum log g_k

Output i of MADE (Germain, Gregor, Murray and Larochelle 2015) depends on inputs before i alone, so de_k / de_{k-1} is
triangular with g_k on its diagonal and the density is exact. "Before" is in the order of e, top layer first, for odd k and in
the reverse order for even k. All of e is drawn at once; the way back, from e_k to e_{k-1}, goes latent by latent.

c(x) is a third statistic of the encoder. The KL has no closed form: log q(e | x) - log p(e) of the draw stands for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..generators import Generator, check_whole
from .vae import VAE, Draw, assembler, gaussian, log_normal

if TYPE_CHECKING:
    from ..experiment import Config

# logit g_k at the start of training: the flow begins close to the identity, as Kingma et al. advise (1 to 2).
FIRST_LOGIT = 2.0


class IAF(VAE):
    """A `VAE` whose q(e | x) is a Gaussian carried through T steps of inverse autoregressive flow.

    Parameters
    ----------
    generator, sigma, sigma_start, anneal_fraction, warmup : as in `VAE`.
    encoder : images [n, C, H, W] -> m(x), t(x) > 0 and c(x), each [n, d].
    n_flows : T.
    hidden : width of the two hidden layers of each MADE.
    """

    def __init__(
        self,
        generator: Generator,
        encoder: nn.Module,
        sigma: float = 0.15,
        sigma_start: float | None = None,
        anneal_fraction: float = 0.5,
        warmup: float = 0.0,
        n_flows: int = 4,
        hidden: int = 128,
    ) -> None:
        super().__init__(generator, encoder, sigma, sigma_start, anneal_fraction, warmup)
        check_whole("n_flows", n_flows)
        check_whole("hidden", hidden)
        self.flow = Flow(generator.latent_dim, generator.latent_dim, n_flows, hidden)

    def draw(self, x: Tensor, rng: torch.Generator | None = None) -> Draw:
        mean, std, context = self.encoder(x)
        initial, log_q, _ = gaussian(mean, std, rng)
        e, log_det = self.flow(initial, context)
        log_q = log_q - log_det
        return Draw(e, log_q, log_q - log_normal(e), lambda: self.generator(e))


class Flow(nn.Module):
    """T steps of inverse autoregressive flow over d latents, given a context [n, d_context]."""

    def __init__(self, d: int, d_context: int, n_flows: int, hidden: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(MADE(d, d_context, hidden, reverse=k % 2 == 1) for k in range(n_flows))

    def forward(self, e: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """e_0 [n, d] -> e_T [n, d] and log|det de_T/de_0| [n]."""
        log_det = torch.zeros_like(e[:, 0])
        for made in self.steps:
            shift, logit = made(e, context)
            gate = logit.sigmoid()
            e = gate * e + (1 - gate) * shift
            log_det = log_det + F.logsigmoid(logit).sum(1)
        return e, log_det

    def inverse(self, e: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """e_T [n, d] -> e_0 [n, d] and log|det de_T/de_0| [n]; T d passes through a MADE."""
        log_det = torch.zeros_like(e[:, 0])
        for made in reversed(self.steps):
            before = torch.zeros_like(e)
            for _ in range(e.shape[1]):  # each pass makes one more latent right, in the order of this step
                shift, logit = made(before, context)
                gate = logit.sigmoid()
                before = (e - (1 - gate) * shift) / gate
            log_det = log_det + F.logsigmoid(made(before, context)[1]).sum(1)
            e = before
        return e, log_det


class MADE(nn.Module):
    """Two numbers for each of d inputs, of which those for input i depend on the context and on inputs before i alone.

    Every unit has a degree: input i has its place 1, ..., d in the order, a hidden unit any of 0, ..., d - 1. A hidden unit
    sees what has its degree or a lower one, an output what has a lower one than its own. The first hidden layer sees all
    of the context.

    Parameters
    ----------
    d, d_context : numbers of inputs and of context variables.
    hidden : width of the two hidden layers.
    reverse : the order is that of the inputs backwards.
    """

    def __init__(self, d: int, d_context: int, hidden: int, reverse: bool = False) -> None:
        super().__init__()
        places = torch.arange(1, d + 1)
        places = places.flip(0) if reverse else places
        degrees = torch.arange(hidden) * d // hidden  # 0, ..., d - 1, evenly
        self.context = nn.Linear(d_context, hidden)
        self.first = _MaskedLinear(degrees[:, None] >= places)
        self.second = _MaskedLinear(degrees[:, None] >= degrees)
        self.shift = _MaskedLinear(places[:, None] > degrees)
        self.logit = _MaskedLinear(places[:, None] > degrees)
        for linear in (self.context, self.first, self.second, self.shift, self.logit):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        for output in (self.shift, self.logit):
            nn.init.zeros_(output.weight)
        nn.init.constant_(self.logit.bias, FIRST_LOGIT)

    def forward(self, e: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """e [n, d], context [n, d_context] -> shift a and logit of the gate, both [n, d]."""
        h = F.gelu(self.first(e) + self.context(context))
        h = F.gelu(self.second(h))
        return self.shift(h), self.logit(h)


class _MaskedLinear(nn.Linear):
    """A linear layer whose weights [out, in] count where `mask` [out, in] is true."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)  # it follows from the sizes

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def builder(config: Config) -> Callable[[tuple[int, int, int]], IAF]:
    """Image shape -> the untrained system. Raises ValueError for entries of `config` that do not fit.

    options: warmup, n_flows, hidden.
    """
    return assembler(config, IAF, {"warmup": 0.0, "n_flows": 4, "hidden": 128}, n_heads=3)
