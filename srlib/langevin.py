"""Short run MCMC: K steps of Langevin dynamics from noise.

    e_0 ~ p(e),    e_{k+1} = e_k + s_k score(e_k) + sqrt(2 s_k) eps_k,    k = 0, ..., K - 1        Eqs. (10)-(12)

(Eqs. (10) and (11) of the paper count k = 1, ..., K while they start at z_0; K steps are meant.)

Two step-size conventions are in use. `step_size` is always the s of Eq. (10). The authors' released script writes
e + (delta^2 / 2) score + delta eps instead, so that s = delta^2 / 2; delta is called the noise scale here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .generators import check_positive, check_tensor, check_whole, given_or_fresh, randn_like
from .inner_loop import Precision, accelerated, check_fast
from .posterior import Posterior

# A state whose root mean square is this many standard deviations of the prior has left every posterior worth the name.
DIVERGED_RMS = 1e3


class DivergenceError(ArithmeticError):
    """A chain left all bounds. The message names the step, the step size, and a smaller one to try.

    step_size : the s that was too large; nan where no step size would have helped.
    """

    def __init__(self, message: str, step_size: float = math.nan) -> None:
        super().__init__(message)
        self.step_size = step_size


@dataclass(frozen=True)
class Chain:
    """What `short_run` returns.

    final, initial : e_K and e_0, [n, d].
    step_size : s, broadcastable to [K, n, d].
    n_steps : K.
    trajectory : e_0, ..., e_K as [K + 1, n, d] where it was asked for, else None.
    noise : eps_0, ..., eps_{K-1} as [K, n, d]: as given, or drawn again from the random state that the chain started
        with, so that a chain in training need not hold on to it. None for a deterministic chain.
    """

    final: Tensor
    initial: Tensor
    step_size: Tensor
    n_steps: int
    trajectory: Tensor | None
    _noise: Tensor | None = field(repr=False)
    _rng: torch.Generator | None = field(repr=False)

    @property
    def noise(self) -> Tensor | None:
        if self._rng is None:
            return self._noise
        rng = self._rng.clone_state()
        return torch.stack([randn_like(self.initial, rng) for _ in range(self.n_steps)])


def short_run(
    posterior: Posterior,
    n_steps: int = 25,
    step_size: float | Tensor = 1.25e-3,
    initial: Tensor | None = None,
    noise: Tensor | None = None,
    deterministic: bool = False,
    rng: torch.Generator | None = None,
    keep_trajectory: bool = False,
    chunk_size: int | None = None,
    precision: Precision = "full",
    compile: bool = False,
) -> Chain:
    """Noise-initialised short run inference of Eqs. (10)-(12), for all n images of `posterior` at once.

    Parameters
    ----------
    n_steps : K.
    step_size : s of Eq. (10): a number, or a tensor broadcastable to [K, n, d] ([K, 1, 1] one per step, [d] one per
        latent, [n, 1] one per image).
    initial : e_0 [n, d]; None draws it from the prior, as the paper always does.
    noise : eps [K, n, d]; None draws it from `rng`.
    deterministic : leave the noise term out (gradient ascent on log p(e | x)).
    rng : source of e_0 and eps, in this order; a CPU generator gives the same bits on every device. None: seeded from
        torch's global state.
    keep_trajectory : also return all states.
    chunk_size : images per gradient evaluation; bounds memory, draws the same random numbers.
    precision, compile : how scores are computed, see `inner_loop.accelerated`.

    The chain is differentiable with respect to `step_size` and `initial` if they require gradients; otherwise nothing of
    one step is kept for the next. With respect to `step_size` alone it can be differentiated once, and keeps only its states.
    The generator's parameters are frozen throughout.

    Raises ValueError for arguments that do not fit, `DivergenceError` for a chain that left all bounds.
    """
    check_whole("n_steps", n_steps)
    if deterministic and noise is not None:
        raise ValueError("noise was given for a deterministic chain; leave out one of the two")
    rng = given_or_fresh(rng)
    e = posterior.generator.sample_prior(len(posterior), rng) if initial is None else initial
    shape = (n_steps, *posterior.validated(e).shape)
    s = validated_step_size(step_size, shape, e)
    for name, given in (("initial", initial), ("noise", noise)):
        if given is not None:
            check_tensor(name, given)
    if noise is not None and (noise.shape != shape or noise.dtype != e.dtype):
        raise ValueError(f"noise is {noise.dtype} {tuple(noise.shape)}, this chain needs {e.dtype} {shape}")
    rng_before_noise = None if deterministic or noise is not None else rng.clone_state()

    start, trajectory = e, [e]
    score = _score_function(posterior, s, e, chunk_size, precision, compile)
    bounded_steps = torch.zeros((), dtype=torch.int64, device=e.device)
    for k, s_k in enumerate(s.expand(shape)):
        e = e + s_k * score(e)
        if not deterministic:
            e = e + (2 * s_k).sqrt() * (randn_like(start, rng) if noise is None else noise[k])
        # counted on the device and looked at once, after the loop: a look at every step would stall a GPU
        bounded_steps += (e.detach().square().mean(1) < DIVERGED_RMS**2).all() & (bounded_steps == k)
        if keep_trajectory:
            trajectory.append(e)
    if not e.is_meta and bounded_steps < n_steps:
        if not posterior.score(start).isfinite().all():
            raise DivergenceError(
                "the score is NaN or infinite where the chain starts: the generator's weights have left all bounds; train "
                "with a smaller learning rate"
            )
        raise _divergence(int(bounded_steps), s.expand(shape))
    kept = torch.stack(trajectory) if keep_trajectory else None
    return Chain(e, start, s, n_steps, kept, noise, rng_before_noise)


def _score_function(
    posterior: Posterior, s: Tensor, start: Tensor, chunk_size: int | None, precision: Precision, compile: bool
) -> Callable[[Tensor], Tensor]:
    """The score of a chain from `start` with step size s: as fast as it can be, or differentiable where that is asked for."""
    check_fast(precision, compile)
    if torch.is_grad_enabled() and (s.requires_grad or start.requires_grad):
        if precision != "full" or compile:
            raise ValueError(
                f"precision={precision!r}, compile={compile}: a chain that is to be differentiated is computed as it is; leave "
                "them out, or use torch.no_grad"
            )
        if start.requires_grad:  # then its Jacobian may be wanted, and the derivatives of that
            return partial(posterior.score, create_graph=True, chunk_size=chunk_size)
        return partial(posterior.differentiable_score, chunk_size=chunk_size)
    if start.is_meta:
        return partial(posterior.score, chunk_size=chunk_size)
    return partial(accelerated(posterior, precision, compile).score, chunk_size=chunk_size)


def step_size_from_noise_scale(noise_scale: float) -> float:
    """s of Eq. (10) from the delta of the authors' script: s = delta^2 / 2, so 0.05 gives 0.00125."""
    check_positive("noise_scale", noise_scale)
    return noise_scale**2 / 2


def noise_scale_from_step_size(step_size: float) -> float:
    """delta = sqrt(2 s), the inverse of `step_size_from_noise_scale`."""
    check_positive("step_size", step_size)
    return math.sqrt(2 * step_size)


def geometric_step_sizes(first: float, last: float, n_steps: int) -> Tensor:
    """A schedule s_0 = first, ..., s_{K-1} = last with a constant ratio: [K, 1, 1], float64, ready for `short_run`."""
    check_positive("first", first)
    check_positive("last", last)
    check_whole("n_steps", n_steps)
    return torch.logspace(math.log10(first), math.log10(last), n_steps, dtype=torch.float64)[:, None, None]


def validated_step_size(step_size: float | Tensor, shape: tuple[int, ...], e: Tensor) -> Tensor:
    """step_size as a tensor like e, if it is positive and broadcasts to shape [K, n, d]; a ValueError otherwise."""
    boolean = isinstance(step_size, bool) or (isinstance(step_size, Tensor) and step_size.dtype == torch.bool)
    if boolean or not isinstance(step_size, (int, float, Tensor)):
        raise ValueError(f"step_size={step_size!r} must be a number or a tensor; a usual value is 1.25e-3")
    s = torch.as_tensor(step_size, dtype=e.dtype, device=e.device)
    try:
        fits = torch.broadcast_shapes(s.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"step_size has shape {tuple(s.shape)}, which does not broadcast to [K, n, d] = {list(shape)}; "
            f"one per step is [{shape[0]}, 1, 1], one per latent [{shape[2]}]"
        )
    if not s.is_meta and not ((s > 0) & (s < math.inf)).all():
        raise ValueError(f"step_size={step_size} must be positive and finite; a usual value is 1.25e-3")
    return s


def _divergence(step: int, step_sizes: Tensor) -> DivergenceError:
    s = step_sizes[step].max().item()
    return DivergenceError(
        f"the chain diverged at step k = {step} of K = {len(step_sizes)} with step size {s:.3g} (noise scale "
        f"{math.sqrt(2 * s):.3g}); try {s / 10:.1g}. The s of Eq. (10) is the square of the authors' step size over 2.",
        s,
    )
