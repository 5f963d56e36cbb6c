"""The step size as a variational parameter.

    KL(q_s || p(e|x)) = E_{q_s}[log q_s(e) - log p(x, e)] + log p(x)                               Eqs. (18)-(19)
    min over s of the mean over images i of KL(q_s(e_i) || p(e_i|x_i))                             Eq. (20)

log p(x) does not depend on s, so the objective is E_{q_s}[log q_s(e) - log p(x, e)], which can never be below -log p(x). How
log q_s is estimated is the subject of `entropy`. All candidates are compared under common random numbers: the same
e_0 and eps for every s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from . import entropy
from .generators import check_positive, check_rng, check_tensor, check_whole, given_or_fresh, randn_like
from .langevin import DivergenceError, short_run
from .posterior import Posterior, frozen

Share = Literal["all", "step", "layer", "example"]
SearchShare = Literal["all", "step", "layer", "step_and_layer"]
# A chain's part in a gradient is at most this many times that of the median chain: far beyond what Gaussian tails make.
CLIP = 100.0
# Adam forgets soon: far from the optimum gradients are orders of magnitude larger than near it, and remembering them would
# stop the descent half way.
ADAM_BETAS = (0.5, 0.6)
# A descent whose learning rate is absurd must find its way back from here, and float32 must hold the step size.
LOG_STEP_SIZES = (-50.0, 50.0)
# What a diverged chain's objective counts in a slope: more than any other chain's.
LARGEST = 1e100
RandomNumbers = tuple[Tensor, Tensor]
ESTIMATORS = ("change_of_variables", "equation_17", "semi_implicit", "linear_noise", "path", "path_gaussian")
N_NOISE = 10
# What a step size that is too large raises.
TOO_LARGE = (DivergenceError, entropy.NoInverseError)


def kl_objective(
    posterior: Posterior,
    step_size: float | Tensor,
    n_steps: int = 25,
    estimator: str = "change_of_variables",
    initial: Tensor | None = None,
    noise: Tensor | None = None,
    rng: torch.Generator | None = None,
    n_noise: int = N_NOISE,
) -> Tensor:
    """log q_s(e_K) - log p(x, e_K) of one chain for each image: [n], float64; its mean estimates Eq. (19) without log p(x).

    Parameters
    ----------
    step_size : s as in `short_run`; the result is differentiable with respect to it if it requires gradients.
    estimator : which estimator of log q_s, one of ESTIMATORS (see `entropy`).
    initial, noise : e_0 [n, d] and eps [K, n, d]; None draws them from `rng`, in this order.
    n_noise : J, further noise draws of "equation_17" and "semi_implicit", drawn from `rng` last.

    The same arguments give the same bits; two step sizes are compared fairly with the same `initial` and `noise`, or with
    generators of the same seed.

    Raises ValueError for arguments that do not fit, `DivergenceError` for a chain that left all bounds.
    """
    numbers = _drawn(posterior, n_steps, estimator, rng, initial, noise, n_noise)
    return _objective(posterior, step_size, estimator, numbers)


@dataclass(frozen=True)
class StepSizeResult:
    """A step size and the evidence for it.

    step_size : the s with the lowest objective (a `StepSizeSearch` by descent: where its step leads), ready for `short_run`:
        [] (share="all"), [K, 1, 1] ("step"), [d] ("layer": the same number for all latents of one layer) or [n, 1] ("example").
    candidates : what was tried, in order: the grid, or the iterates of the descent; [C, *step_size.shape].
    values : log q_s(e_K) - log p(x, e_K) for each candidate and image, its chains averaged: [C, n]; inf where an entropy (in
        a descent, also its gradient) was not finite, and where a chain diverged or a step had no inverse: for that image
        alone in a grid for each "example", for all images otherwise.
    """

    step_size: Tensor
    candidates: Tensor
    values: Tensor

    @property
    def objective(self) -> Tensor:
        """Mean over images, Eq. (20): [C]."""
        return self.values.mean(1)

    @property
    def standard_error(self) -> Tensor:
        """Standard error of `objective` over images and chains: [C]; nan for a single image."""
        return _standard_error(self.values)

    @property
    def best(self) -> int:
        """Index of the candidate with the lowest objective."""
        return int(self.objective.argmin())

    @property
    def plausible(self) -> Tensor:
        """Which candidates are within two standard errors of the best, by paired differences: [C], bool.

        For a single image, whose error is unknown, the best alone.
        """
        excess = self.values - self.values[self.best]
        return excess.mean(1) <= 2 * _standard_error(excess).nan_to_num(0.0)

    @property
    def local_minima(self) -> list[int]:
        """Indices of the candidates of a sorted grid that lie below both neighbours; its ends have one and never count."""
        inner, below, above = self.objective[1:-1], self.objective[:-2], self.objective[2:]
        return (((inner < below) & (inner < above)).nonzero().flatten() + 1).tolist()


def _standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean of each row of values [C, n]: [C]; nan where n = 1."""
    n = values.shape[1]
    return values.std(1) / n**0.5 if n > 1 else torch.full_like(values[:, 0], math.nan)


def grid_search_step_size(
    posterior: Posterior,
    candidates: Sequence[float | Tensor],
    n_steps: int = 25,
    estimator: str = "linear_noise",
    share: Literal["all", "example"] = "all",
    rng: torch.Generator | None = None,
    n_chains: int = 1,
    common: RandomNumbers | None = None,
) -> StepSizeResult:
    """The best of `candidates` for Eq. (20), each tried with the same e_0 and eps (section 5.5, Fig. 6a).

    candidates : step sizes, or schedules of one shape that broadcasts to [K, n, d].
    share : "all" takes one for all images; "example" the best for each image (numbers only).
    n_chains : chains of each image that its objective is averaged over; "example" wants more than one.
    common : e_0 [n * n_chains, d] and eps [K, n * n_chains, d] (see `moment_matched`), the chains of an image in a row;
        None draws them from `rng`.

    Raises ValueError for arguments that do not fit, DivergenceError if no candidate gives a finite objective (for "example":
    if there is an image for which none does).
    """
    tried = _stacked(candidates, posterior.x.device)
    if share not in ("all", "example") or (share == "example" and tried.ndim > 1):
        raise ValueError(
            f"share={share!r}: a grid of numbers is shared by 'all' or chosen by 'example', schedules by 'all'"
        )
    chains, numbers = _common(posterior, n_chains, n_steps, estimator, rng, common)
    values = torch.stack([_values(chains, s, estimator, numbers, n_chains, share) for s in tried])
    judged = values if share == "example" else values.mean(1, keepdim=True)
    hopeless = (~judged.isfinite().any(0)).nonzero().flatten().tolist()
    if hopeless:
        raise DivergenceError(
            f"no candidate from {tried.min():.3g} to {tried.max():.3g} gives a finite objective for "
            f"{'images ' + str(hopeless) if share == 'example' else 'all images'}; try smaller ones"
        )
    chosen = tried[judged.argmin(0)]
    return StepSizeResult(chosen[:, None] if share == "example" else chosen[0], tried, values)


@torch.enable_grad()
def descend_step_size(
    posterior: Posterior,
    initial: float | Tensor,
    n_steps: int = 25,
    share: Share = "all",
    estimator: str = "linear_noise",
    n_iterations: int = 50,
    learning_rate: float = 0.2,
    rng: torch.Generator | None = None,
    n_chains: int = 1,
    common: RandomNumbers | None = None,
) -> StepSizeResult:
    """Gradient descent on Eq. (20) over log s by Adam, through chain, determinants and all (section 5.5, Fig. 6b).

    initial : s to start from, a number, a tensor that broadcasts to the shape that `share` says, or the `step_size` of an
        earlier descent with the same `share`.
    share : one s for "all", one per "step" (section 4.3 leaves it to future work), per "layer", or per "example".
    n_iterations, learning_rate : steps of Adam, and its learning rate, which goes linearly to 0; the result holds
        n_iterations + 1 iterates, `initial` the first.
    n_chains : chains of each image that its objective is averaged over. A step size per "example" needs some dozens: with few
        it fits their noise, and the KL it was meant to lower goes up.
    common : e_0 and eps as in `grid_search_step_size`.

    e_0 and eps are the same for all iterates, so the objective is a function of s and the best iterate is the answer. If a
    chain diverges, be it of one image, the descent goes back to the best iterate with half the learning rate, for all images
    even where each has its own step size.

    Raises ValueError for arguments that do not fit, DivergenceError for an `initial` where the chain diverges.
    """
    check_whole("n_iterations", n_iterations)
    check_positive("learning_rate", learning_rate)
    chains, numbers = _common(posterior, n_chains, n_steps, estimator, rng, common)
    log_s = _shared(posterior, initial, n_steps, share).log().requires_grad_()
    optimiser = torch.optim.Adam([log_s], betas=ADAM_BETAS)
    candidates, values, best = [], [], log_s.detach().clone()

    def of_chains(s: Tensor) -> Tensor:
        return s.repeat_interleave(n_chains, 0) if share == "example" else s

    for i in range(n_iterations):
        s = _expanded(log_s.clamp(*LOG_STEP_SIZES).exp(), posterior, share)
        candidates.append(s.detach())
        value, gradient = _value_and_gradient(chains, of_chains(s), estimator, numbers)
        value = _of_images(value, n_chains)
        if not values and not value.isfinite().all():
            raise DivergenceError(f"the objective is not finite at initial={initial}; start from a smaller step size")
        values.append(value)
        if not gradient.isfinite().all():
            log_s.data.copy_(best)
            learning_rate /= 2
            optimiser = torch.optim.Adam([log_s], betas=ADAM_BETAS)
            continue
        if value.mean() <= min(v.mean() for v in values):
            best = log_s.detach().clone()
        (log_s.grad,) = torch.autograd.grad(of_chains(s), log_s, gradient)
        optimiser.param_groups[0]["lr"] = learning_rate * (1 - i / n_iterations)
        optimiser.step()
    last = _expanded(log_s.clamp(*LOG_STEP_SIZES).exp(), posterior, share).detach()  # where the last step led to
    candidates.append(last)
    values.append(_values(chains, of_chains(last), estimator, numbers, n_chains, "all"))
    means = torch.stack(values).mean(1)
    return StepSizeResult(candidates[int(means.argmin())], torch.stack(candidates), torch.stack(values))


def moment_matched(n_chains: int, n_steps: int, latent_dim: int, rng: torch.Generator | None = None) -> RandomNumbers:
    """Random numbers for n_chains chains of one image: e_0 [n, d] and eps [K, n, d], float64.

    Each number is close to standard normal, but over the n chains all (K + 1) d of them have mean 0 and covariance I exactly.
    The mean of a quadratic function over the chains is then exact, so for a linear generator the objective is free
    of Monte Carlo error at every step size.

    Raises ValueError unless all are whole numbers and n_chains is even and at least 2 (K + 1) d.
    """
    for name, value in (("n_chains", n_chains), ("n_steps", n_steps), ("latent_dim", latent_dim)):
        check_whole(name, value)
    n_numbers = (n_steps + 1) * latent_dim
    if n_chains % 2 or n_chains < 2 * n_numbers:
        raise ValueError(
            f"n_chains={n_chains} must be even and at least 2 (n_steps + 1) latent_dim = {2 * n_numbers}, so that mean and "
            "covariance can be matched"
        )
    check_rng(rng)
    half = torch.randn(n_chains // 2, n_numbers, generator=rng, dtype=torch.float64)
    half = torch.linalg.qr(half)[0] * (n_chains / 2) ** 0.5  # orthogonal columns
    numbers = torch.cat([half, -half]).unflatten(1, (n_steps + 1, latent_dim)).transpose(0, 1)
    return numbers[0], numbers[1:]


def _value_and_gradient(
    posterior: Posterior, s: Tensor, estimator: str, numbers: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """`kl_objective` [n] and the gradient of its mean with respect to s, each chain's part bounded; inf after divergence.

    Where steps overshoot the chain is chaotic, and its derivative grows with every step: single chains have derivatives
    millions of times those of the others, and tell nothing about the mean. A chain's part counts for at most
    CLIP times the median part; where the dynamics is tame, no part is that large.
    """
    shape = torch.broadcast_shapes(s.shape, (len(posterior), 1))
    own = s.detach().expand(shape).clone().requires_grad_()  # each image's own copy of s
    try:
        value = _objective(posterior, own, estimator, numbers)
        (parts,) = torch.autograd.grad(value.sum() / len(posterior), own)
    except TOO_LARGE:
        return _infinite(posterior), torch.full_like(s, math.inf)
    if not (value.isfinite().all() and parts.isfinite().all()):
        return _infinite(posterior), torch.full_like(s, math.inf)
    over_steps = tuple(i for i in range(parts.ndim) if i != parts.ndim - 2)
    sizes = parts.square().sum(over_steps, keepdim=True).sqrt()
    parts = parts * (CLIP * sizes.median() / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)).clamp_max(1)
    return value.detach(), parts.sum_to_size(s.shape)


@dataclass(frozen=True)
class StepSizeSearch:
    """Line 5 of Algorithm 1: how s is updated every T_s iterations, on a few images of the current batch.

    method : "grid" tries `factors` times the current s and takes the best. "descent" takes one step of stochastic gradient
        descent on Eq. (20) in log s, which is neither accepted nor rejected.
    share : what a descent moves. "all": one s. "step": s_0, ..., s_{K-1} with a constant ratio, by their geometric mean and their
        ratio. "layer": one s for each layer. "step_and_layer": one s for each layer, times steps with a constant ratio.
    n_images : images of the batch that the objective is measured on, with one chain each; a smaller batch is gone through
        again.
    width : a slope is the central difference over log s +- width, under the same random numbers (Kiefer & Wolfowitz 1952).
    learning_rate : the largest step in log s. As in Adam a step is mean(slope) / rms(slope) of it, with the moments over images
        in place of time: a full step where all chains agree, a short one where they do not, and no state.

    The derivative of a chain (as in `descend_step_size`) is not used in training: where steps overshoot, single chains have
    derivatives far above all others, which say nothing about the slope of the mean, and it costs more than the two values.
    """

    method: Literal["grid", "descent"] = "grid"
    estimator: str = "linear_noise"
    n_images: int = 4
    factors: tuple[float, ...] = (0.7, 1.0, 1.4)
    width: float = 0.35
    learning_rate: float = 0.5
    share: SearchShare = "all"

    def __post_init__(self) -> None:
        if self.method not in ("grid", "descent"):
            raise ValueError(f"method={self.method!r} is unknown; there are: grid, descent")
        if self.share not in get_args(SearchShare):
            raise ValueError(f"share={self.share!r} is unknown; there are: {', '.join(get_args(SearchShare))}")
        if self.method == "grid" and self.share != "all":
            raise ValueError(f"share={self.share!r} is searched by descent; a grid has one s for all")
        _checked_estimator(self.estimator)
        check_whole("n_images", self.n_images, 2)  # two give a standard error
        check_positive("width", self.width)
        check_positive("learning_rate", self.learning_rate)
        if not isinstance(self.factors, (tuple, list)) or not self.factors:
            raise ValueError(f"factors={self.factors!r} must be a tuple of positive numbers")
        for factor in self.factors:
            check_positive("factors", factor)

    def __call__(self, posterior: Posterior, step_size: Tensor, n_steps: int, rng: torch.Generator) -> StepSizeResult:
        """The updated s for the posterior's sigma, from `step_size`, with random numbers from `rng`.

        step_size : [], [K, 1, 1], [d] or [K, 1, d], as `share` says.

        The candidates of a descent are the step sizes on either side of the current one that its slopes come from.
        """
        few = posterior[torch.arange(self.n_images) % len(posterior)]
        current = torch.as_tensor(step_size, dtype=torch.float64, device=posterior.x.device).detach()
        if self.method == "grid":
            return grid_search_step_size(few, [current * f for f in self.factors], n_steps, self.estimator, rng=rng)
        directions = torch.stack(self._directions(posterior, n_steps))  # of log s
        aside = [current * (sign * self.width * v).exp() for v in directions for sign in (-1, 1)]
        tried = grid_search_step_size(few, aside, n_steps, self.estimator, rng=rng)
        below, above = tried.values.nan_to_num(posinf=LARGEST).unflatten(0, (-1, 2)).unbind(1)
        slopes = (above - below) / (2 * self.width)
        lengths = slopes.mean(1) / slopes.square().mean(1).sqrt().clamp_min(torch.finfo(slopes.dtype).tiny)
        step = torch.tensordot(lengths, directions, 1)
        return replace(tried, step_size=current * (-self.learning_rate * step).exp())

    def _directions(self, posterior: Posterior, n_steps: int) -> list[Tensor]:
        """What a descent can move log s along: level and tilt of the steps, or each layer."""
        like = {"dtype": torch.float64, "device": posterior.x.device}
        if self.share == "all":
            return [torch.ones((), **like)]
        tilt = torch.linspace(1, -1, n_steps, **like)[:, None, None]
        if self.share == "step":
            return [torch.ones_like(tilt), tilt]
        layers = [
            _expanded(layer, posterior, "layer") for layer in torch.eye(len(posterior.generator.latent_dims), **like)
        ]
        if self.share == "layer":
            return layers
        return [layer.expand(n_steps, 1, -1) for layer in layers] + [tilt.expand(-1, -1, len(layers[0]))]


def _stacked(candidates: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """The candidates of a grid as one tensor [C, ...], if they are that; a ValueError otherwise."""
    try:
        tensors = [_in_float64("candidates", s, device) for s in candidates]
    except TypeError:  # not a sequence
        raise ValueError(f"candidates={candidates!r} must be a sequence of step sizes, such as [1e-3, 2e-3]") from None
    if not tensors:
        raise ValueError(
            "candidates is empty; a usual grid is step_size_from_noise_scale(delta), delta = 0.01 ... 0.15"
        )
    shapes = sorted({tuple(s.shape) for s in tensors})
    if len(shapes) > 1:
        raise ValueError(f"candidates have shapes {shapes}; take numbers only, or schedules of one shape")
    tried = torch.stack(tensors)
    wrong = tried[~((tried > 0) & (tried < math.inf))]
    if len(wrong):
        raise ValueError(f"candidates hold {wrong[0]:.3g}; step sizes must be positive and finite, leave it out")
    return tried


def _in_float64(name: str, step_size: float | Tensor, device: torch.device) -> Tensor:
    """A step size as a tensor, without the graph it may come from; a ValueError unless it is a number or a tensor of them."""
    if isinstance(step_size, Tensor) and step_size.dtype != torch.bool and not step_size.is_complex():
        return step_size.detach().to(device, torch.float64)
    if isinstance(step_size, Real) and not isinstance(step_size, bool):
        return torch.tensor(float(step_size), dtype=torch.float64, device=device)
    raise ValueError(f"{name}: {step_size!r} must be a number or a tensor of numbers; a usual value is 1.25e-3")


def _common(
    posterior: Posterior,
    n_chains: int,
    n_steps: int,
    estimator: str,
    rng: torch.Generator | None,
    given: RandomNumbers | None,
) -> tuple[Posterior, tuple[Tensor, ...]]:
    """`n_chains` chains of each image, those of an image in a row, and the random numbers that all candidates share."""
    if given is not None and not (isinstance(given, (tuple, list)) and len(given) == 2):
        raise ValueError(
            f"common is a {type(given).__name__}, it must be the pair e_0, eps, as `moment_matched` makes it"
        )
    for name, numbers in zip(("initial (e_0)", "noise (eps)"), given or ()):
        check_tensor(name, numbers)
    check_rng(rng)
    rng = rng and rng.clone_state()  # the caller's stays where it is
    chains = posterior.repeated(n_chains)
    initial, noise, *further = _drawn(chains, n_steps, estimator, rng, *(given or (None, None)))
    return chains, (initial.detach(), noise.detach(), *further)


def _drawn(
    posterior: Posterior,
    n_steps: int,
    estimator: str,
    rng: torch.Generator | None,
    initial: Tensor | None,
    noise: Tensor | None,
    n_noise: int = N_NOISE,
) -> tuple[Tensor, ...]:
    """e_0 [n, d], eps [K, n, d] and, where the estimator takes them, further eps [J, K, n, d]; what is given is kept."""
    check_whole("n_steps", n_steps)
    check_whole("n_noise", n_noise)
    _checked_estimator(estimator)
    shape, dtype = (len(posterior), posterior.generator.latent_dim), posterior.x.dtype
    for name, given, needed in (("initial (e_0)", initial, shape), ("noise (eps)", noise, (n_steps, *shape))):
        if given is None:
            continue
        check_tensor(name, given)
        if given.shape != needed or given.dtype != dtype:
            raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}, these chains need {dtype} {needed}")
    rng = given_or_fresh(rng)
    if initial is None:
        initial = posterior.generator.sample_prior(len(posterior), rng)
    if noise is None:
        noise = torch.stack([randn_like(initial, rng) for _ in range(n_steps)])  # as `short_run` draws it
    if estimator not in ("equation_17", "semi_implicit"):
        return initial, noise
    return initial, noise, randn_like(initial.new_empty(n_noise, n_steps, *initial.shape), rng)


def _objective(posterior: Posterior, s: float | Tensor, estimator: str, numbers: tuple[Tensor, ...]) -> Tensor:
    """`kl_objective` with the random numbers that `_drawn` returned."""
    initial, noise, *further = numbers
    rng = torch.Generator()  # nothing is drawn; without it, torch's global state would move on
    with frozen(posterior.generator):
        chain = short_run(posterior, len(noise), s, initial, noise, rng=rng, keep_trajectory=True)
        return getattr(entropy, estimator)(posterior, chain, *further) - posterior.log_joint(chain.final).double()


def _values(
    posterior: Posterior, s: Tensor, estimator: str, numbers: tuple[Tensor, ...], n_chains: int, share: Share
) -> Tensor:
    """The mean of `_objective` over the `n_chains` chains of each image: [n]; inf where there is no finite value.

    A chain that diverges stops all that run with it. Where each "example" has its own s, the images are halved until that
    chain is alone with its image.
    """
    try:
        values = _objective(posterior, s, estimator, numbers)
    except TOO_LARGE:
        n_images = len(posterior) // n_chains
        if share != "example" or n_images == 1:
            return _infinite(posterior)[::n_chains]
        halves = torch.arange(len(posterior), device=posterior.x.device).tensor_split([n_images // 2 * n_chains])
        parts = [(posterior[rows], tuple(t[..., rows, :] for t in numbers)) for rows in halves]
        return torch.cat([_values(part, s, estimator, drawn, n_chains, share) for part, drawn in parts])
    return _of_images(torch.where(values.isfinite(), values, math.inf), n_chains)


def _of_images(values: Tensor, n_chains: int) -> Tensor:
    """The mean over the chains of each image, for values [n * n_chains] of a `repeated` posterior: [n]."""
    return values.unflatten(0, (-1, n_chains)).mean(1)


def _infinite(posterior: Posterior) -> Tensor:
    return torch.full((len(posterior),), math.inf, dtype=torch.float64, device=posterior.x.device)


def _checked_estimator(estimator: str) -> str:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is unknown; there are: {', '.join(ESTIMATORS)}")
    return estimator


def _expanded(s: Tensor, posterior: Posterior, share: Share) -> Tensor:
    """s of each layer [L] as one number per latent [d]; the other shapes are ready for `short_run`."""
    if share != "layer":
        return s
    return s.repeat_interleave(torch.tensor(posterior.generator.latent_dims, device=s.device))


def _shared(posterior: Posterior, initial: float | Tensor, n_steps: int, share: Share) -> Tensor:
    shapes = {
        "all": (),
        "step": (n_steps, 1, 1),
        "layer": (len(posterior.generator.latent_dims),),
        "example": (len(posterior), 1),
    }
    if share not in tuple(shapes):
        raise ValueError(f"share={share!r} is unknown; there are: {', '.join(shapes)}")
    start = _in_float64("initial", initial, posterior.x.device)
    if share == "layer" and start.shape == (posterior.generator.latent_dim,):  # as an earlier descent returned it
        firsts = torch.stack([s[0] for s in start.split(posterior.generator.latent_dims)])
        start = firsts if torch.equal(_expanded(firsts, posterior, share), start) else start
    try:
        start = start.expand(shapes[share]).clone()
    except RuntimeError:
        raise ValueError(f"initial has shape {tuple(start.shape)}, share={share!r} needs {shapes[share]}") from None
    if not ((start > 0) & (start < math.inf)).all():
        raise ValueError(f"initial={initial} must be positive and finite; a usual value is 1.25e-3")
    return start
