"""Other short runs that cost one gradient for each step, and whose hyper-parameters the KL divergence can choose too.

    v <- a v + sqrt(1 - a^2) eps_k                                                                 momentum a, v ~ N(0, I)
    v <- v + r_k/2 score_k(e_k),    e_{k+1} = e_k + r_k v,    v <- v + r_k/2 score_k(e_{k+1})      r_k = sqrt(2 s_k)

is underdamped Langevin dynamics (the OBAB splitting of Leimkuhler & Matthews 2013). Each half-step of v ends with the gradient that the
next one begins with. Without momentum (a = 0) it is Eq. (10) itself. score_k is the score of log p(e | x) with sigma_k in the place of
sigma (annealed as in Song & Ermon 2019), and s_k may differ from latent to latent (a diagonal preconditioner).

The entropy of q is that of `linear_noise` in `entropy`, carried over to (e, v): with the Hessians of one chain the map from all its
random numbers to e_K is linearised, S is its covariance, and log q(e_K) = -1/2 log det(2 pi e S_ee). Exact for a linear generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .entropy import hessians
from .generators import check_positive, check_tensor, check_whole, given_or_fresh, randn_like
from .posterior import Posterior

# Where the search for the best variant begins to look: so far from the start in each of its (unbounded) coordinates.
FIRST_STEP = 0.4


@dataclass(frozen=True)
class Variant:
    """A short run, described by at most five numbers.

    step_size : s, the geometric mean of the s_k.
    ratio : s_0 / s_{K-1}; the s_k have a constant ratio. It is meant for K of at least 2.
    momentum : a in [0, 1), what a step keeps of the velocity; 0 for Langevin dynamics.
    heat : sigma_0 / sigma; sigma_k goes with a constant ratio to sigma_{K-1} = sigma, down where heat > 1.
    power : latent i has s_k precision_i^-power; `precision` is needed where it is not 0.

    Raises ValueError for a momentum outside [0, 1), and other numbers that are not positive and finite (power: finite).
    """

    step_size: float
    ratio: float = 1.0
    momentum: float = 0.0
    heat: float = 1.0
    power: float = 0.0

    def __post_init__(self) -> None:
        for name in ("step_size", "ratio", "heat"):
            check_positive(name, getattr(self, name))
        if not _is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum!r} must lie in [0, 1); 0 is Langevin dynamics")
        if not _is_number(self.power) or not math.isfinite(self.power):
            raise ValueError(f"power={self.power!r} must be a finite number; 0 gives all latents one step size")

    def step_sizes(self, n_steps: int, precision: Tensor | None = None) -> Tensor:
        """s_k for every latent: [K, 1, 1], or [K, 1, d] with `precision` [d]; float64."""
        tilt = torch.linspace(0.5, -0.5, n_steps, dtype=torch.float64)
        s = (self.step_size * self.ratio**tilt)[:, None, None]
        if self.power == 0:
            return s
        if precision is None:
            raise ValueError(f"power={self.power} needs the precision of the latents; see mean_precision")
        check_tensor("precision", precision)
        if precision.ndim != 1 or not (precision > 0).all():
            raise ValueError("precision must hold one positive number for each latent, [d]; see mean_precision")
        return s.to(precision.device) * precision.double() ** -self.power

    def sigmas(self, n_steps: int) -> Tensor:
        """sigma_k / sigma: [K], float64; a single step has sigma itself."""
        return self.heat ** torch.linspace(1, 0, n_steps, dtype=torch.float64) if n_steps > 1 else torch.ones(1)


def run_variant(
    posterior: Posterior,
    variant: Variant,
    n_steps: int = 25,
    precision: Tensor | None = None,
    initial: Tensor | None = None,
    noise: Tensor | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """e_0, ..., e_K of one chain for each image: [K + 1, n, d]. It takes K gradients.

    precision : [d], what `variant.power` refers to.
    initial, noise : e_0 [n, d] and eps [K, n, d]; None draws them from `rng`, in this order. Without momentum the chain is that of
        `short_run` with the same numbers.
    """
    check_whole("n_steps", n_steps)
    if not isinstance(variant, Variant):
        raise ValueError(f"variant={variant!r} must be a Variant")
    rng = given_or_fresh(rng)
    e = posterior.generator.sample_prior(len(posterior), rng) if initial is None else posterior.validated(initial)
    noise = torch.stack([randn_like(e, rng) for _ in range(n_steps)]) if noise is None else noise
    check_tensor("initial", e)
    check_tensor("noise", noise)
    shape = (n_steps, *e.shape)
    if noise.shape != shape or noise.dtype != e.dtype:
        raise ValueError(f"noise is {noise.dtype} {tuple(noise.shape)}, this chain needs {e.dtype} {shape}")
    e, noise = e.detach(), noise.detach()
    roots, warmth = _roots(variant, n_steps, precision, e)
    score, states, v = posterior.score(e), [e], torch.zeros_like(e)
    for k, (root, c) in enumerate(zip(roots, warmth)):
        kept = variant.momentum if k else 0.0  # the first velocity is fresh
        v = kept * v + math.sqrt(1 - kept**2) * noise[k]
        v = v + root / 2 * _tempered(score, e, c)
        e = e + root * v
        states.append(e)
        if k + 1 < n_steps:  # nothing depends on the last velocity
            score = posterior.score(e)
            v = v + root / 2 * _tempered(score, e, c)
    return torch.stack(states)


def variant_objective(
    posterior: Posterior,
    variant: Variant,
    n_steps: int = 25,
    precision: Tensor | None = None,
    initial: Tensor | None = None,
    noise: Tensor | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """log q(e_K) - log p(x, e_K) of one chain for each image: [n], float64; Eq. (19) without log p(x), as `kl_objective` with
    "linear_noise", which it is where momentum is 0 and heat 1. Arguments as in `run_variant`; inf where a chain diverged."""
    states = run_variant(posterior, variant, n_steps, precision, initial, noise, rng)
    if not states.isfinite().all():
        return torch.full((len(posterior),), math.inf, dtype=torch.float64, device=states.device)
    n, d = states.shape[1:]
    roots, warmth = _roots(variant, n_steps, precision, states[0].double())
    h = hessians(posterior, states[:-1])
    eye = torch.eye(d, dtype=h.dtype, device=h.device)
    # (e, v) = (position, velocity) times all random numbers; QR keeps both factors square without ever squaring them
    position, velocity = eye.expand(n, d, d), torch.zeros_like(h[0])
    for k, (root, c) in enumerate(zip(roots, warmth)):
        kept = variant.momentum if k else 0.0
        fresh = math.sqrt(1 - kept**2) * eye.expand(n, d, d)
        position = torch.cat([position, torch.zeros_like(fresh)], -1)
        velocity = torch.cat([kept * velocity, fresh], -1)
        half = root.expand(n, d)[..., None] / 2
        velocity = velocity + half * (_tempered_hessian(h[k], c) @ position)
        position = position + 2 * half * velocity
        if k + 1 < n_steps:
            velocity = velocity + half * (_tempered_hessian(h[k + 1], c) @ position)
        joint = torch.cat([position, velocity], 1)
        position, velocity = torch.linalg.qr(joint.mT, mode="r")[1].mT.split(d, 1)
    factor = torch.linalg.qr(position.mT, mode="r")[1]
    entropy = factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1) + d / 2 * math.log(2 * math.pi * math.e)
    objective = -entropy - posterior.log_joint(states[-1]).detach().double()
    return objective.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)


def mean_precision(posterior: Posterior, e: Tensor) -> Tensor:
    """The mean over images of the diagonal of -H at e [n, d], at least 1, which is the prior's: [d], float64."""
    diagonal = -posterior.hessian(posterior.validated(e)).double().diagonal(dim1=1, dim2=2)
    return diagonal.mean(0).clamp_min(1)


# What can be chosen, as a number on the whole line: from it, and to it
_COORDINATES = {
    "step_size": (math.exp, math.log),
    "ratio": (math.exp, math.log),
    "momentum": (lambda u: u**2 / (1 + u**2), lambda a: math.sqrt(a / (1 - a))),
    "heat": (math.exp, math.log),
    "power": (float, float),
}


def choose_variant(
    posterior: Posterior,
    start: Variant,
    free: Sequence[str],
    n_steps: int = 25,
    precision: Tensor | None = None,
    rng: torch.Generator | None = None,
    n_evaluations: int = 80,
) -> tuple[Variant, Tensor]:
    """The variant with the lowest mean objective over the images of `posterior`, and its objective [n].

    free : which numbers of `start` may be changed; the others stay.
    n_evaluations : of the objective, at most; Nelder and Mead's simplex (1965) goes from one to the next. All have the same random
        numbers, drawn from `rng`.
    """
    from scipy.optimize import minimize

    unknown = [name for name in free if name not in _COORDINATES]
    if unknown or not free:
        raise ValueError(f"free={tuple(free)!r} must name some of {', '.join(_COORDINATES)}")
    check_whole("n_evaluations", n_evaluations)
    rng = given_or_fresh(rng)
    e = posterior.generator.sample_prior(len(posterior), rng)
    numbers = {"initial": e, "noise": torch.stack([randn_like(e, rng) for _ in range(n_steps)])}

    def variant_at(u: Sequence[float]) -> Variant:
        return replace(start, **{name: _COORDINATES[name][0](float(x)) for name, x in zip(free, u)})

    def objective(variant: Variant) -> Tensor:
        return variant_objective(posterior, variant, n_steps, precision, **numbers)

    origin = torch.tensor([_COORDINATES[name][1](getattr(start, name)) for name in free], dtype=torch.float64)
    simplex = torch.cat([origin[None], origin + FIRST_STEP * torch.eye(len(origin), dtype=torch.float64)])
    found = minimize(
        lambda u: objective(variant_at(u)).mean().item(),
        origin.numpy(),
        method="Nelder-Mead",
        options={"initial_simplex": simplex.numpy(), "maxfev": n_evaluations, "xatol": 0.01, "fatol": 0.01},
    )
    best = variant_at(found.x)
    return best, objective(best)


def _roots(variant: Variant, n_steps: int, precision: Tensor | None, e: Tensor) -> tuple[Tensor, list[float]]:
    """r_k = sqrt(2 s_k) like e, and (sigma / sigma_k)^2."""
    s = variant.step_sizes(n_steps, precision)
    if s.shape[-1] not in (1, e.shape[1]):
        raise ValueError(f"precision holds {s.shape[-1]} numbers, there are {e.shape[1]} latents")
    roots = (2 * s).sqrt().to(e)
    return roots, variant.sigmas(n_steps).pow(-2).tolist()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tempered(score: Tensor, e: Tensor, c: float) -> Tensor:
    """The score with sigma_k, from that with sigma: only the likelihood's part, score + e, changes."""
    return c * (score + e) - e


def _tempered_hessian(h: Tensor, c: float) -> Tensor:
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return c * (h + eye) - eye
