"""What log|det dF/de_0| costs by each method (`measure`, for bench.py), and how accurate "low_rank" is at d = 416.

    python benchmarks/log_determinants.py [--n-steps K]

trains a five-layer model on `digits`, takes three checkpoints, compares "low_rank" with "stepwise" on chains of each, prints a
table and writes measured/accuracy-KK.json: in a quarter of an hour on one thread. What it has computed is kept in results/, so
that it can be stopped and goes on where it was; delete that folder to measure anew.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import measuring
import torch

import srlib
from srlib import checkpoints as files
from srlib import log_determinants
from srlib.generators import randn_like
from srlib.training import snapshot_file

HERE = Path(__file__).parent
SIGMA = 0.15
STEP_SIZE = srlib.step_size_from_noise_scale(0.05)


def top_down(latent_dims):
    torch.manual_seed(0)
    return srlib.TopDownGenerator(latent_dims, image_shape=(1, 28, 28), channels=16, feature_size=7)


# --- cost -------------------------------------------------------------------------------------------------------------

METHODS = ("stepwise", "row_by_row", "low_rank")
N_COST_CHAINS = 2


def measure(latent_dims, n_steps, method):
    """Seconds and megabytes above the chain itself, in this process."""
    g = top_down(latent_dims)
    x = g(g.sample_prior(N_COST_CHAINS, torch.Generator().manual_seed(1))).detach()
    posterior = srlib.Posterior(g, x, SIGMA)
    chain = srlib.short_run(posterior, n_steps, STEP_SIZE, rng=torch.Generator().manual_seed(2), keep_trajectory=True)
    posterior.hessian_product(chain.final, chain.final[None])  # torch's own start-up is nobody's cost
    before, started = peak_megabytes(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # row_by_row says that it is imprecise, which is known
        if method == "low_rank":
            result = srlib.low_rank_log_abs_det(posterior, chain)
            value, products = result.value, result.n_products
        else:
            value, products = srlib.log_abs_det_jacobian(posterior, chain, method), n_steps * g.latent_dim
    seconds, megabytes = time.perf_counter() - started, peak_megabytes() - before
    return dict(products=products, seconds=seconds, megabytes=megabytes, value=value.mean().item())


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- accuracy of "low_rank" -------------------------------------------------------------------------------------------

LATENT_DIMS = (64, 64, 64, 96, 128)  # the authors' script; the top layer first
RESULTS = HERE / "results" / "-".join(map(str, LATENT_DIMS))
CHECKPOINTS = (50, 150, 400)
N_CHAINS = 34  # at each checkpoint, 102 in all
AT_ONCE = 17
ERROR_PER_DIMENSION = 0.005


def checkpoints():
    """The generator after 50, 150 and 400 updates of one training run on `digits`."""
    snapshots = [snapshot_file(RESULTS, t) for t in CHECKPOINTS]
    g = top_down(LATENT_DIMS)
    if not all(file.exists() for file in snapshots):
        system = srlib.ShortRun(g, n_steps=10, step_size=STEP_SIZE, sigma=SIGMA, sigma_start=0.3)
        plan = srlib.TrainingPlan(CHECKPOINTS[-1], 32, (1e-3,), (0.5, 0.999), CHECKPOINTS)
        system.fit(srlib.load("digits").train.images, plan, torch.Generator().manual_seed(0), RESULTS)
    for t, file in zip(CHECKPOINTS, snapshots):
        state, _ = files.load(file)
        g.load_state_dict({k.removeprefix("generator."): v for k, v in state.items() if k.startswith("generator.")})
        yield t, g


def accuracy(n_steps):
    """log|det| of N_CHAINS chains at each checkpoint: exact, by "low_rank", by plain quadrature at the same cost."""
    x = srlib.to_unit_range(srlib.load("digits").test.images[:N_CHAINS])
    found = {}
    for t, g in checkpoints():
        rows = []
        for first in range(0, N_CHAINS, AT_ONCE):
            posterior = srlib.Posterior(g, x[first : first + AT_ONCE], SIGMA)
            rng = torch.Generator().manual_seed(1000 + first)
            chain = srlib.short_run(posterior, n_steps, STEP_SIZE, rng=rng, keep_trajectory=True)
            name = f"{t}-{first}-K{n_steps}"
            exact = kept(f"stepwise-{name}", partial(stepwise, posterior, chain))
            rows.append(exact | kept(f"estimates-{name}", partial(estimates, posterior, chain, rng)))
        found[t] = {name: sum(row[name] for row in rows) for name in rows[0] if name.startswith("seconds")}
        found[t] |= {name: [v for row in rows for v in row[name]] for name in rows[0] if name not in found[t]}
    return report(found, n_steps)


def stepwise(posterior, chain):
    started = time.perf_counter()
    exact = srlib.log_abs_det_jacobian(posterior, chain).tolist()
    return dict(exact=exact, seconds_stepwise=time.perf_counter() - started)


def estimates(posterior, chain, rng):
    started = time.perf_counter()
    low_rank = srlib.low_rank_log_abs_det(posterior, chain, rng=rng)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    plain = quadrature(posterior, chain, low_rank.n_products, rng)
    return dict(
        value=low_rank.value.tolist(),
        standard_error=low_rank.standard_error.tolist(),
        products=[low_rank.n_products] * len(posterior),
        quadrature=plain.tolist(),
        seconds_low_rank=seconds,
        seconds_quadrature=time.perf_counter() - started,
    )


def quadrature(posterior, chain, n_products, rng, n_lanczos=13):
    """Plain stochastic Lanczos quadrature of log|det| with random unit vectors (Ubaru, Chen & Saad 2017): [n]."""
    n, d = chain.initial.shape
    n_probes = n_products // (chain.n_steps * n_lanczos)
    total = torch.zeros(n, dtype=torch.float64)
    for e in chain.trajectory[:-1]:
        u = randn_like(total.new_empty(n, d, n_probes), rng)
        total += d * log_quadrature(posterior, e, u / u.norm(dim=1, keepdim=True), n_lanczos).mean(-1)
    return total


def log_quadrature(posterior, e, u, n_lanczos):
    """u' log|I + s H(e)| u for unit vectors u [n, d, q] by `n_lanczos` steps of Lanczos: [n, q]."""
    diagonal, off_diagonal = [], []
    previous, beta = torch.zeros_like(u), u.new_zeros(len(u), 1, u.shape[2])
    for _ in range(n_lanczos):
        image = u + STEP_SIZE * log_determinants._hessian_times(posterior, e, u) - beta * previous
        alpha = (u * image).sum(1, keepdim=True)
        image = image - alpha * u
        beta = image.norm(dim=1, keepdim=True)
        diagonal.append(alpha.squeeze(1))
        off_diagonal.append(beta.squeeze(1))
        previous, u = u, image / beta.clamp_min(torch.finfo(u.dtype).tiny)
    between = torch.stack(off_diagonal[:-1], -1)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, -1))
    tridiagonal = tridiagonal + torch.diag_embed(between, 1) + torch.diag_embed(between, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return (vectors[..., 0, :].square() * nodes.abs().log()).sum(-1)


def report(found, n_steps):
    d = sum(LATENT_DIMS)
    print(f"\nd = {d}, K = {n_steps}, {N_CHAINS} chains at each checkpoint; errors in nats for each chain")
    print(
        f"{'updates':>7} {'log|det|':>9} {'low_rank: worst':>15} {'rms':>6} {'interval':>8} {'covered':>7}"
        f" {'quadrature: worst':>17} {'rms':>6} {'seconds: stepwise':>17} {'low_rank':>8} {'quadrature':>10}"
    )
    rows = []
    for t, row in found.items():
        exact, value, standard_error, plain = (
            torch.tensor(row[k], dtype=torch.float64) for k in ("exact", "value", "standard_error", "quadrature")
        )
        error, plain_error = value - exact, plain - exact
        rows.append(
            dict(
                updates=t,
                chains=len(exact),
                exact=exact.mean().item(),
                worst=error.abs().max().item(),
                rms=error.square().mean().sqrt().item(),
                bias=error.mean().item(),
                interval=(1.96 * standard_error).mean().item(),
                covered=int((error.abs() <= 1.96 * standard_error).sum()),
                quadrature_worst=plain_error.abs().max().item(),
                quadrature_rms=plain_error.square().mean().sqrt().item(),
                products=dict(stepwise=n_steps * d, low_rank=row["products"][0]),
                seconds={name: row[f"seconds_{name}"] for name in ("stepwise", "low_rank", "quadrature")},
            )
        )
        r = rows[-1]
        print(
            f"{t:7} {r['exact']:9.2f} {r['worst']:15.3f} {r['rms']:6.3f} {r['interval']:8.3f} {r['covered']:7}"
            f" {r['quadrature_worst']:17.2f} {r['quadrature_rms']:6.2f}"
            + "".join(f" {seconds:{width}.0f}" for seconds, width in zip(r["seconds"].values(), (17, 8, 10)))
        )
    covered, worst = sum(r["covered"] for r in rows), max(r["worst"] for r in rows)
    saved = n_steps * d / max(r["products"]["low_rank"] for r in rows)
    print(
        f"worst error {worst:.3f} nats (allowed {ERROR_PER_DIMENSION * d:.2f}), by quadrature"
        f" {max(r['quadrature_worst'] for r in rows):.3f}"
    )
    print(f"95 % interval covers {covered} of {len(rows) * N_CHAINS}")
    print(f"products: {saved:.1f} times fewer than stepwise")
    return {
        "latent_dims": LATENT_DIMS,
        "d": d,
        "K": n_steps,
        "threads": 1,
        "at_once": AT_ONCE,
        "allowed": ERROR_PER_DIMENSION * d,
        "rows": rows,
    }


def kept(name, compute):
    """The result of `compute`, from the results folder where it is already there."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        files.write_json(file, compute())
        print(f"{name} done", file=sys.stderr, flush=True)
    return {k: v for k, v in files.read_json(file).items() if k != "checksum"}


def main():
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-steps", type=int, default=10, help="K of the chains")
    n_steps = parser.parse_args().n_steps
    measuring.record(HERE / "measured" / f"accuracy-K{n_steps}.json", partial(accuracy, n_steps))


if __name__ == "__main__":
    main()
