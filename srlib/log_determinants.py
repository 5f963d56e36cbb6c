"""log|det dF/de_0| of a short run by three methods (Eqs. 13 and 17, section 5.5).

    stepwise      sum_k log|det(I + D_k^1/2 H_k D_k^1/2)|: K determinants of symmetric matrices, K d Hessian-vector products
    row_by_row    the rows of dF/de_0 through all K steps, then its eigenvalues, as section 5.5 has it
    low_rank      as "stepwise", with each determinant estimated from a few Hessian-vector products

`entropy` uses the first alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .entropy import step_sizes, stepwise_log_abs_det, with_trajectory
from .generators import randn_like
from .langevin import Chain, short_run
from .posterior import PRODUCTS_AT_ONCE, Posterior, basis_vectors

Method = Literal["stepwise", "row_by_row", "low_rank"]

# Largest relative error of an eigenvalue of dF/de_0 that "row_by_row" passes over in silence.
TOLERATED_EIGENVALUE_ERROR = 1e-6


def log_abs_det_jacobian(
    posterior: Posterior, chain: Chain, method: Method = "stepwise", chunk_size: int | None = None
) -> Tensor:
    """log|det dF/de_0| of each chain, with its noise held fixed: [n], in float64.

    method : "stepwise" adds K determinants of symmetric d x d matrices, from the Hessians at e_0, ..., e_{K-1}.
        "row_by_row" is section 5.5: the Jacobian of all K steps, one row by one vector-Jacobian product each, then
        its eigenvalues; it loses precision with the condition number of dF/de_0 and warns when it does.
        "low_rank" takes a few directions exactly and estimates the rest (`low_rank_log_abs_det`).
    chunk_size : Hessians computed at a time ("stepwise" only); bounds the memory, changes nothing else.

    "stepwise" and "row_by_row" are differentiable with respect to a `step_size` that requires gradients.
    """
    if method == "stepwise":
        return stepwise_log_abs_det(posterior, chain, chunk_size)
    if method == "row_by_row":
        return _row_by_row(posterior, chain)
    if method == "low_rank":
        return low_rank_log_abs_det(posterior, chain).value
    raise ValueError(f"method={method!r} is unknown; there are: stepwise, row_by_row, low_rank")


def _row_by_row(posterior: Posterior, chain: Chain) -> Tensor:
    """Section 5.5 as written: rows of dF/de_0 by vector-Jacobian products through all K steps, then eigenvalues."""
    differentiable = chain.step_size.requires_grad and torch.is_grad_enabled()
    deterministic = chain.noise is None
    with torch.enable_grad():
        start = chain.initial.detach().requires_grad_()
        rng = torch.Generator()  # nothing is drawn; without it, torch's global state would move on
        final = short_run(posterior, chain.n_steps, chain.step_size, start, chain.noise, deterministic, rng).final
        basis = basis_vectors(start)
        (rows,) = torch.autograd.grad(final, start, basis, create_graph=differentiable, is_grads_batched=True)
    jacobian = rows.transpose(0, 1)
    precision = torch.finfo(jacobian.dtype).eps
    condition = torch.linalg.cond(jacobian.detach().double()).max().item()
    if condition * precision > TOLERATED_EIGENVALUE_ERROR:
        warnings.warn(
            f"dF/de_0 has condition number {condition:.1e}: in {jacobian.dtype} its small eigenvalues are lost, and "
            'log|det| with them; method="stepwise" keeps them',
            RuntimeWarning,
            stacklevel=3,
        )
    return torch.linalg.eigvals(jacobian.double()).abs().log().sum(-1)


@dataclass(frozen=True)
class LowRankLogDet:
    """What `low_rank_log_abs_det` returns.

    value, standard_error : log|det dF/de_0| and the standard error of its random part, [n] each, float64.
    n_products : Hessian-vector products spent on each chain; "stepwise" takes K d.
    """

    value: Tensor
    standard_error: Tensor
    n_products: int


def low_rank_log_abs_det(
    posterior: Posterior,
    chain: Chain,
    rank: int = 36,
    n_probes: int = 8,
    n_lanczos: int = 4,
    rng: torch.Generator | None = None,
) -> LowRankLogDet:
    """log|det dF/de_0| from a few directions exactly and the others by stochastic Lanczos quadrature.

    The spectrum of I + s H is 1 - s plus the directions that the image determines. With Q an orthonormal basis of the stiffest,
    det M = det(Q'MQ) det(S), S the Schur complement of Q'MQ. Q is found by subspace iteration along the chain, where
    each step starts from the last one's basis. log|det S| is estimated from random unit vectors u orthogonal to Q,
    (d - rank) u' log|S| u, by Gauss quadrature with `n_lanczos` Lanczos steps each (Ubaru, Chen & Saad 2017): almost without
    variance, since S is almost a multiple of the identity. Where more than `rank` directions are stiff it is not, and both the
    value and its stated error are unreliable (benchmarks/log_determinants.py measures this on trained generators).

    rank : directions in Q, at most d - 1.    n_probes : random vectors u, at least 2, which give the standard error.
    """
    n, d = chain.initial.shape
    if not 1 <= rank < d:
        raise ValueError(f"rank={rank} must lie between 1 and d - 1 = {d - 1}")
    if n_probes < 2 or not 1 <= n_lanczos <= d - rank:
        raise ValueError(f"n_probes={n_probes} must be at least 2 and n_lanczos={n_lanczos} within 1 ... {d - rank}")
    rng = rng or torch.Generator().manual_seed(0)
    states = with_trajectory(posterior, chain).trajectory[:-1].detach()
    roots = step_sizes(chain).detach().sqrt()
    q = randn_like(roots.new_empty(n, d, rank), rng)
    value, variance = roots.new_zeros(n), roots.new_zeros(n)
    for e, root in zip(states, roots):

        def multiply(v: Tensor, e: Tensor = e, root: Tensor = root[..., None]) -> Tensor:
            """M v for v [n, d, q], M = I + D^1/2 H D^1/2."""
            return v + root * _hessian_times(posterior, e, root * v)

        centre = 1 - root.square().mean(-1)[:, None, None]
        q = torch.linalg.qr(multiply(q) - centre * q)[0]
        mq = multiply(q)
        core = q.mT @ mq
        u = randn_like(roots.new_empty(n, d, n_probes), rng)
        u = u - q @ (q.mT @ u)
        estimates = (d - rank) * _log_quadrature(
            lambda v: _schur_times(multiply, q, mq, core, v),  # noqa: B023 (called within this turn of the loop)
            u / u.norm(dim=1, keepdim=True),
            n_lanczos,
        )
        value = value + torch.linalg.slogdet(core)[1] + estimates.mean(-1)
        variance = variance + estimates.var(-1) / n_probes
    return LowRankLogDet(value, variance.sqrt(), chain.n_steps * (2 * rank + n_probes * n_lanczos))


def _hessian_times(posterior: Posterior, e: Tensor, v: Tensor) -> Tensor:
    """H(e) v for v [n, d, q], PRODUCTS_AT_ONCE at a time: [n, d, q] with v's dtype."""
    size = max(1, PRODUCTS_AT_ONCE // v.shape[2])
    cuts = [slice(i, i + size) for i in range(0, len(e), size)]
    products = [posterior[c].hessian_product(e[c], v[c].permute(2, 0, 1).to(e.dtype)) for c in cuts]
    return torch.cat(products, dim=1).permute(1, 2, 0).to(v.dtype)


def _schur_times(multiply: Callable[[Tensor], Tensor], q: Tensor, mq: Tensor, core: Tensor, v: Tensor) -> Tensor:
    """S v for v orthogonal to q: S = P (M - Mq (q'Mq)^-1 q'M) P with P = I - q q'."""
    image = multiply(v) - mq @ torch.linalg.solve(core, mq.mT @ v)
    return image - q @ (q.mT @ image)


def _log_quadrature(multiply: Callable[[Tensor], Tensor], u: Tensor, n_steps: int) -> Tensor:
    """u' log|S| u for unit vectors u [n, d, q] by `n_steps` steps of Lanczos: [n, q]."""
    diagonal, off_diagonal = [], []
    previous, beta = torch.zeros_like(u), u.new_zeros(len(u), 1, u.shape[2])
    for _ in range(n_steps):
        image = multiply(u) - beta * previous
        alpha = (u * image).sum(1, keepdim=True)
        image = image - alpha * u
        beta = image.norm(dim=1, keepdim=True)
        diagonal.append(alpha.squeeze(1))
        off_diagonal.append(beta.squeeze(1))
        previous, u = u, image / beta.clamp_min(torch.finfo(u.dtype).tiny)
    between = torch.stack(off_diagonal[:-1], -1) if n_steps > 1 else u.new_zeros(*diagonal[0].shape, 0)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, -1))
    tridiagonal = tridiagonal + torch.diag_embed(between, 1) + torch.diag_embed(between, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return (vectors[..., 0, :].square() * nodes.abs().log()).sum(-1)
