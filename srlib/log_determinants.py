"""log|det dF/de_0| of a short run by three methods (Eqs. 13 and 17, section 5.5).

    stepwise      sum_k log|det(I + D_k^1/2 H_k D_k^1/2)|: symmetric matrices, K d Hessian-vector products
    row_by_row    the rows of dF/de_0 through all K steps, then its eigenvalues, as section 5.5 has it
    low_rank      as "stepwise", with each determinant estimated from a few Hessian-vector products

`entropy` uses the first alone.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .entropy import check_chain, step_sizes, stepwise_log_abs_det, with_trajectory
from .generators import check_rng, check_whole, randn_like
from .langevin import Chain, short_run
from .posterior import PRODUCTS_AT_ONCE, Posterior, basis_vectors

Method = Literal["stepwise", "row_by_row", "low_rank"]

# Largest relative error of an eigenvalue of dF/de_0 that "row_by_row" passes over in silence.
TOLERATED_EIGENVALUE_ERROR = 1e-6
# "low_rank" serves one of this many states at a time, those that need it most: one by one is slower, and hardly better.
STATES_SHARE = 5
# "low_rank" explains the remainder of a step by the steps at most so far before and after it. A stiff chain swings to and
# fro, so that every second step is alike; farther steps add nothing.
REACH = 4
# A direction that "low_rank" finds is new if more than this part of it is not in Q yet, else what is left is rounding.
SPENT = 1e-10
# The series of "low_rank" is around c and divides by it.
LEAST_CENTRE = 1e-3
# Of fewer latents a quarter of the products of "stepwise" does not pay for the 4 probes and the 2 directions that
# "low_rank" takes at least.
FEWEST_LATENTS = 24


def log_abs_det_jacobian(
    posterior: Posterior, chain: Chain, method: Method = "stepwise", chunk_size: int | None = None
) -> Tensor:
    """log|det dF/de_0| of each chain, with its noise held fixed: [n], in float64.

    method : "stepwise" adds K determinants of symmetric d x d matrices, from the Hessians at e_0, ..., e_{K-1}.
        "row_by_row" is section 5.5: the Jacobian of all K steps, one row by one vector-Jacobian product each, then
        its eigenvalues; it loses precision with the condition number of dF/de_0 and warns when it does.
        "low_rank" takes the stiff directions and estimates the rest, with a quarter of the products of "stepwise"
        (`low_rank_log_abs_det`, which tells the error; a batch shares its products, so a chain's value depends on the
        others); of fewer than FEWEST_LATENTS latents, where nothing can be saved, it is "stepwise".
    chunk_size : Hessians computed at a time ("stepwise" only); bounds the memory, changes nothing else.

    "stepwise" and "row_by_row" are differentiable with respect to a `step_size` that requires gradients, "low_rank" is not.

    Raises ValueError for an unknown method and for a chain that is not of `posterior`'s images.
    """
    check_chain(posterior, chain)
    if chunk_size is not None:
        check_whole("chunk_size", chunk_size)
    if method == "stepwise" or (method == "low_rank" and chain.initial.shape[1] < FEWEST_LATENTS):
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

    value, standard_error : log|det dF/de_0| and its standard error, [n] each, float64.
    n_products : Hessian-vector products spent for each chain, at most, on an average over them; "stepwise" takes K d.
    """

    value: Tensor
    standard_error: Tensor
    n_products: int


def low_rank_log_abs_det(
    posterior: Posterior,
    chain: Chain,
    n_products: int | None = None,
    n_probes: int | None = None,
    block_size: int = 2,
    rng: torch.Generator | None = None,
) -> LowRankLogDet:
    """log|det dF/de_0| from stiff directions and a trace for the rest, with a quarter of the products of "stepwise".

    M = I + D^1/2 H D^1/2 of one step is nearly c I, c = 1 - mean(s), outside the directions that the image determines.
    With Q an orthonormal basis of a block Krylov space of M, which finds the stiffest first,

        log|det M| = log|det Q'MQ| + log|det S|,    S = the Schur complement of Q'MQ = c (I + X),    X small,
        log|det S| = r log c + tr X - tr X^2 / 2 + tr X^3 / 3 - tr X^4 / 4 + ...,    r = d - columns of Q.

    The traces are estimated from random unit vectors u orthogonal to Q (Hutchinson 1990; deflated: Meyer, Musco, Musco
    & Woodruff 2021; in a Krylov space: Chen & Hallman 2023). X u needs M u and M Q alone. So the products with the
    probes are made once, before Q, and tell at every size of Q, for nothing, how large X still is: products go to the
    chains and steps where |X|_F is largest, so that no chain of the batch is told much worse than the others; so what an
    image is told depends on the others, too. Once Q is known, its probes move c to the mean of what is left. Pairs of probes
    have the third and fourth power from one product each: whatever E (u'v)^2 is,

        E (u'A v)(v'B u) = (alpha + beta) tr A B + beta tr A tr B,
        beta = (E (u'v)^2 - 1/r) / ((r + 2)(r - 1)),    alpha = (1 - 2 beta r) / r^2,

    since the law of u and v does not change when both are turned.

    The Hessians of near steps are alike (as Dharangutte & Musco 2021 use it), and what Q and M Q tell of theirs reaches
    beyond this step's own Q: matrices C_j, orthogonal to Q, with known traces. They serve as control variates, at no
    further product:

        tr X = sum_j b_j tr C_j + tr(X - sum_j b_j C_j),    b = argmin sum_v |X v - sum_j b_j C_j v|^2,

    and only the last trace is estimated from the probes: by u, with b from all others v.

    The standard error is that of the traces, from what the C_j leave of X and from the powers of X, with the fourth order
    for the terms left out, and rounding.

    n_products : for each chain, on an average over them; by default K d / 4.
    n_probes : probes u of each step, at least 2, which give the standard error; by default d / 20, at least 4. With 10 to
        20 steps it is d / K, so that all steps together are probed in one orthonormal basis.
    block_size : directions that Q grows by. Fewer need fewer products, more take less time, above all with few chains.
    """
    chain = with_trajectory(posterior, chain)
    n, d = chain.initial.shape
    n_steps = chain.n_steps
    n_products = n_steps * d // 4 if n_products is None else n_products
    n_probes = max(4, d // (n_steps if 10 <= n_steps <= 20 else 20)) if n_probes is None else n_probes
    for name, value in (("n_products", n_products), ("n_probes", n_probes), ("block_size", block_size)):
        check_whole(name, value)
    if not 2 <= n_probes <= d or not 1 <= block_size <= d - 2:
        raise ValueError(
            f"n_probes={n_probes} must lie within 2 ... {d}, block_size={block_size} within 1 ... {d - 2}; with few latents "
            'use method="stepwise"'
        )
    if n_products < n_steps * (n_probes + block_size):
        raise ValueError(
            f"n_products={n_products} is too few: {n_steps} steps with {n_probes} probes and a block of {block_size} "
            f'each take {n_steps * (n_probes + block_size)}; with few latents use method="stepwise"'
        )
    largest = (d - 2) // block_size * block_size  # columns of Q at most: two dimensions are left for the probes
    n_blocks = (n_products - n_steps * n_probes) // block_size
    check_rng(rng)
    rng = rng or torch.Generator().manual_seed(0)

    # state k n + i is e_k of image i
    states = chain.trajectory[:-1].detach().flatten(0, 1)
    roots = step_sizes(chain).detach().sqrt().flatten(0, 1)
    owner = torch.arange(n, device=states.device).repeat(n_steps)

    def multiply(rows: Tensor, v: Tensor) -> Tensor:
        """M v for v [len(rows), d, q], the states in `rows`."""
        root = roots[rows][..., None]
        return v + root * _hessian_times(posterior[owner[rows]], states[rows], root * v)

    u = _dealt_probes(n_steps, n, d, n_probes, roots, rng)
    mu = multiply(torch.arange(len(states), device=states.device), u)
    block = torch.linalg.qr(randn_like(roots.new_empty(len(states), d, block_size), rng))[0]
    q, mq = roots.new_zeros(2, len(states), d, 0)
    size = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    centre = 1 - roots.square().mean(-1)
    if (least := centre.abs().min().item()) < LEAST_CENTRE:
        raise ValueError(
            f'|1 - mean(step_size)|={least:g} of a step is below {LEAST_CENTRE:g}: "low_rank" divides by it; use '
            'method="stepwise"'
        )
    remainder = torch.full_like(centre, math.inf)  # |X|_F^2 with c at the mean, unknown at first
    n_together = math.ceil(n * n_steps / STATES_SHARE)
    for left in range(n * n_blocks, 0, -n_together):
        rows = remainder.topk(min(left, n_together)).indices
        rows = rows[~(remainder[rows] < 0)]
        if not len(rows):
            break
        columns = size[rows, None] + torch.arange(block_size, device=states.device)
        width = int(columns.max()) + 1
        if width > q.shape[-1]:
            q, mq = (torch.nn.functional.pad(basis, (0, width)) for basis in (q, mq))
        product = multiply(rows, block[rows])
        q[rows[:, None], :, columns] = block[rows].mT
        mq[rows[:, None], :, columns] = product.mT
        size[rows] += block_size
        basis = q[rows, :, :width]
        new, kept = torch.linalg.qr(product - basis @ (basis.mT @ product))
        spent = kept.diagonal(dim1=-2, dim2=-1).abs() < SPENT * product.norm(dim=1)
        if spent.any():
            # of an invariant subspace rounding is left, which may lie within Q: go on elsewhere
            new = torch.where(spent[:, None], randn_like(new, rng), new)
        # once more, because rounding leaves a small residual far from orthogonal
        new = torch.linalg.qr(new - basis @ (basis.mT @ new)).Q
        block[rows] = new
        _, v, xv = _deflated(basis, mq[rows, :, :width], size[rows], u[rows], mu[rows], centre[rows])
        mean = (v * xv).sum(1).mean(-1)
        remainder[rows] = (d - size[rows]) * (xv.square().sum(1).mean(-1) - mean.square())
        remainder[(size == largest) | (remainder < torch.finfo(roots.dtype).eps)] = -1  # nothing is left to find
    found = [_log_det_of_chain(*(t[i::n] for t in (q, mq, size, u, mu, centre))) for i in range(n)]
    value, variance, truncated, inverse = torch.stack(found, -1)
    # of all eigenvalues, in the type of the products; where Q finds all that is not c, nothing else is left
    rounding = d * torch.finfo(states.dtype).eps * inverse
    standard_error = (variance + truncated.square() + rounding.square()).sqrt()
    return LowRankLogDet(value, standard_error, n_steps * n_probes + n_blocks * block_size)


def _log_det_of_chain(q: Tensor, mq: Tensor, size: Tensor, u: Tensor, mu: Tensor, centre: Tensor) -> Tensor:
    """log|det dF/de_0| of one chain, its variance, its terms of fourth order, and the sum of 1 / |c|: [4].

    q, mq : Q and M Q of each step [K, d, width], zeros beyond the first `size` [K] columns.
    u, mu : probes and M u [K, d, p].    centre : c [K].
    """
    n_steps, d, p = u.shape
    q, mq = (basis[..., : int(size.max())] for basis in (q, mq))
    core, u, xu = _deflated(q, mq, size, u, mu, centre)
    r = (d - size).to(q.dtype)
    mean = 1 + (u * xu).sum(1).mean(-1)  # of what is left, in units of c: the better centre, unless it is itself near 0
    mean = torch.where(mean.abs() < 0.1, 1.0, mean)
    centre, xu = centre * mean, (u + xu) / mean[:, None, None] - u
    ux, xx = u.mT @ xu, xu.mT @ xu  # u_i'X u_j and u_i'X^2 u_j: [K, p, p]
    trace_x, square = (r * m.diagonal(dim1=-2, dim2=-1).mean(-1) for m in (ux, xx))
    apart = (1 - torch.eye(p, dtype=q.dtype, device=q.device)) / (p * (p - 1))
    overlap = (apart * (u.mT @ u).square()).sum((-2, -1))
    beta = (overlap - 1 / r) / ((r + 2) * (r - 1))
    alpha = (1 - 2 * beta * r) / r**2

    def trace_of_product(a: Tensor, trace_a: Tensor, trace_b: Tensor) -> Tensor:
        """tr A X^2 from u_i'A u_j [K, p, p]."""
        return ((apart * a * xx).sum((-2, -1)) - beta * trace_a * trace_b) / (alpha + beta)

    cube, fourth = trace_of_product(ux, trace_x, square), trace_of_product(xx, square, square)

    half = mq / centre[:, None, None] - q
    half = half - q @ (q.mT @ half) / 2
    known = half @ q.mT
    known = known + known.mT  # M / c - I where Q and M Q tell it, else 0: [K, d, d]
    outside = torch.eye(d, dtype=q.dtype, device=q.device) - q @ q.mT
    explained = torch.zeros_like(r)  # sum_j b_j tr C_j
    for k in range(n_steps):
        near = [j for j in range(max(0, k - REACH), min(n_steps, k + REACH + 1)) if j != k]
        if (p - 1) * r[k] < 10 * len(near):  # too few numbers to tell the b_j by
            continue
        cu = (outside[k] @ (known[near] @ u[k])).permute(2, 1, 0)  # C_j u_i at [i, :, j]
        gram, moment = cu.mT @ cu, cu.mT @ xu[k].mT[..., None]
        # Each probe is told by the b_j of the others: its own would learn its error, and hide it.
        gram, moment = gram.sum(0) - gram, moment.sum(0) - moment
        # steps may be so alike that their C_j are linearly dependent, or leave nothing outside Q
        scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        gram.diagonal(dim1=-2, dim2=-1).add_(1e-6 * scale + torch.finfo(gram.dtype).tiny)
        b = torch.linalg.solve(gram, moment)
        xu[k] -= (cu @ b).squeeze(-1).mT
        explained[k] = (known[near] * outside[k]).sum((-2, -1)) @ b.squeeze(-1).mean(0)
    # Of the mean of p values r u'A u: 2 |A|_F^2 / p, A = log(I + X) - sum_j b_j C_j, of whose square the terms up to the
    # fourth order are |Y|_F^2 - tr Y X^2 + 11/12 tr X^4, Y = X - sum_j b_j C_j. The values themselves are so few that their
    # own spread would often be too small by chance.
    uy = u.mT @ xu
    trace_y, energy = r * uy.diagonal(dim1=-2, dim2=-1).mean(-1), r * xu.square().sum(1).mean(-1)
    rest = r * centre.abs().log() + explained + trace_y - square / 2 + cube / 3 - fourth / 4
    variance = energy - trace_of_product(uy, trace_y, square) + 11 / 12 * fourth
    variance = 2 / p * variance.clamp_min(0)
    return torch.stack((torch.linalg.slogdet(core)[1] + rest, variance, fourth / 4, 1 / centre.abs())).sum(-1)


def _deflated(
    q: Tensor, mq: Tensor, size: Tensor, u: Tensor, mu: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Q'MQ with ones for the unused columns [R, width, width], the probes made orthogonal to Q, and X u [R, d, p].

    q, mq : Q and M Q of R states [R, d, width], zeros beyond the first `size` [R] columns.
    u, mu : probes and M u [R, d, p].    centre : c [R].
    """
    unused = torch.arange(q.shape[-1], device=q.device) >= size[:, None]
    core = q.mT @ mq + torch.diag_embed(unused.to(q.dtype))
    core = 0.5 * (core + core.mT)
    inside = q.mT @ u
    u, mu = u - q @ inside, mu - mq @ inside
    norm = u.norm(dim=1, keepdim=True)
    u, mu = u / norm, mu / norm
    su = mu - mq @ torch.linalg.solve(core, mq.mT @ u)
    return core, u, (su - q @ (q.mT @ su)) / centre[:, None, None] - u


def _dealt_probes(n_steps: int, n: int, d: int, n_probes: int, like: Tensor, rng: torch.Generator) -> Tensor:
    """Columns of random orthogonal matrices, dealt out to the steps of each chain: [K n, d, p].

    The steps' remainders resemble each other, so that probes orthogonal to the other steps' say more about the sum.
    """
    n_matrices = math.ceil(n_steps * n_probes / d)
    matrices = [torch.linalg.qr(randn_like(like.new_empty(n, d, d), rng))[0] for _ in range(n_matrices)]
    dealt = torch.cat(matrices, -1)[..., : n_steps * n_probes].unflatten(-1, (n_steps, n_probes))
    return dealt.permute(2, 0, 1, 3).flatten(0, 1)


def _hessian_times(posterior: Posterior, e: Tensor, v: Tensor) -> Tensor:
    """H(e) v for v [n, d, q], PRODUCTS_AT_ONCE at a time: [n, d, q] with v's dtype."""
    size = max(1, PRODUCTS_AT_ONCE // v.shape[2])
    cuts = [slice(i, i + size) for i in range(0, len(e), size)]
    products = [posterior[c].hessian_product(e[c], v[c].permute(2, 0, 1).to(e.dtype)) for c in cuts]
    return torch.cat(products, dim=1).permute(1, 2, 0).to(v.dtype)
