"""Whatever a public function is given, it returns what its docstring says or raises an error that names the culprit.

Each function is called with arguments that fit, in all the forms that they may have (float32 and float64, not contiguous,
with gradients, one image, ...), and then with one argument that does not fit. Either way the caller's tensors, gradients,
modules and random state are left as they were. HYPOTHESIS_PROFILE=long goes through far more examples than `make test`.
"""

import contextlib
import functools
import inspect
import math
import re
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import srlib
from srlib import claims, comparison, entropy, evidence, measurements, plots, step_size
from srlib.brute_force import regular_axes, short_run_density
from srlib.evaluation import factors, frechet, inpainting, likelihood, mismatch, reconstruction
from srlib.samplers import hmc, long_run, mala
from srlib.variants import Variant, run_variant, variant_objective

FLOATS = (torch.float32, torch.float64)


@functools.cache
def generator(kind, dtype):
    """One latent and one pixel, two latents and four pixels, or two layers with three latents and 100 pixels."""
    if kind == "top-down":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            g = srlib.TopDownGenerator((1, 2), (1, 10, 10), channels=2, feature_size=5)
    else:
        d, shape = (1, (1, 1, 1)) if kind == "point" else (2, (1, 2, 2))
        weight, bias = torch.randn(math.prod(shape), d + 1, generator=seeded(0)).split((d, 1), 1)
        g = srlib.LinearGenerator(weight, bias[:, 0], shape)
    return g.to(dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def contexts(draw, kinds):
    """A generator, a posterior of 1 to 3 images and the lengths of a chain; some pixels may be hidden."""
    g = generator(draw(st.sampled_from(kinds)), draw(st.sampled_from(FLOATS)))
    n, seed = draw(st.integers(1, 3)), draw(st.integers(0, 99))
    dtype = next(g.parameters()).dtype
    x = 0.5 * torch.randn(n, *g.image_shape, generator=seeded(seed)).to(dtype)
    mask = draw(st.sampled_from([None, torch.ones(()), torch.rand(n, *g.image_shape, generator=seeded(seed)) < 0.5]))
    return SimpleNamespace(
        g=g,
        posterior=srlib.Posterior(g, x, 0.5, mask),
        dtype=dtype,
        n=n,
        d=g.latent_dim,
        n_steps=draw(st.integers(1, 3)),
        mode=draw(st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode])),
    )


# --- kinds of arguments: what fits (good) and what does not (bad; None: nothing is tried), given a context -------------


@dataclass(frozen=True)
class Kind:
    good: st.SearchStrategy
    bad: st.SearchStrategy | None = None

    def __call__(self, c):
        return self


def whole(least, most, default=()):
    return Kind(
        st.integers(least, most) | st.sampled_from([least, *default]),
        st.sampled_from([least - 1, -7, True, 1.5, float(most), "2", math.nan, [2], torch.tensor(2)]),
    )


def positive(low, high):
    return Kind(
        st.floats(low, high),
        st.sampled_from([0, 0.0, -1.0, math.nan, math.inf, -math.inf, True, "0.1", None, [0.1], 10**400]),
    )


def choice(*names):
    return Kind(st.sampled_from(names), st.sampled_from(["nonsense", "", None, 3, ["all"]]))


NUMBER_GENERATOR = Kind(
    st.integers(0, 99).map(seeded) | st.none(), st.sampled_from([3, 0, True, "seed", np.random.default_rng(0)])
)
FLAG = Kind(st.booleans())


def forms(numbers):
    """The same numbers in the forms that a tensor can have."""
    strided = torch.stack([numbers, torch.zeros_like(numbers)], -1)[..., 0]
    leaf = numbers.clone().requires_grad_()
    return st.sampled_from([numbers, strided, leaf, 1 * leaf.clone().detach().requires_grad_()])


def other_sizes(t):
    return [t[..., :-1], t[None], t[0], torch.zeros((), dtype=t.dtype)]


def other_shapes(t):
    return [t[:0], torch.cat([t, t[:1]]), *other_sizes(t)]


def other_types(t):
    return [t.tolist(), t.numpy(), "numbers", 1.0, t.long(), t.to(FLOATS[t.dtype == FLOATS[0]])]


def unfinite(t):
    return [torch.cat([t[:-1], torch.full_like(t[-1:], v)]) for v in (math.nan, math.inf, -math.inf)]


def tensor(shape, scale=1.0, optional=False, finite=True, shapes=other_shapes, types=other_types):
    """Floats of the context's dtype and this shape, a function of the context.

    finite : NaN and infinite numbers do not fit. shapes, types : what else does not.
    """

    def kind(c):
        sizes = shape(c)
        good = st.integers(0, 99).flatmap(
            lambda seed: forms(scale * torch.randn(sizes, generator=seeded(seed), dtype=c.dtype))
        )
        t = scale * torch.randn(sizes, generator=seeded(1), dtype=c.dtype)
        bad = shapes(t) + types(t) + (unfinite(t) if finite else []) + ([] if optional else [None])
        return Kind(good | st.none() if optional else good, st.sampled_from(bad))

    return kind


def of_steps(c):
    """A step size for K steps of n chains, as a number or a tensor."""
    shapes = [(), (c.d,), (c.n, 1), (c.n_steps, 1, 1), (c.n_steps, c.n, c.d)]
    tensors = st.sampled_from(shapes).flatmap(lambda s: forms(torch.full(s, 3e-3, dtype=c.dtype)))
    numbers = st.floats(1e-5, 1e-2)
    wrong = [torch.full((c.n_steps + 4,), 1e-3), torch.full((7, 1, 1, 1), 1e-3), torch.tensor([1e-3] * c.d) * math.nan]
    wrong += [torch.tensor(v) for v in (0.0, -1.0, math.inf, True)] + [[1e-3], np.ones(c.d)]
    return Kind(numbers | tensors, st.sampled_from(wrong) | positive(1, 1).bad.filter(lambda v: v != 10**400))


def length(c):
    return Kind(st.just(c.n_steps), whole(1, 3).bad)


CHUNK = whole(1, 4, default=[None])
LATENTS = tensor(lambda c: (c.n, c.d), finite=False)
SOME_LATENTS = tensor(
    lambda c: (c.n - 1, c.d), finite=False, shapes=lambda t: other_sizes(torch.cat([t, t, t.new_ones(1, t.shape[1])]))
)
START = tensor(lambda c: (c.n, c.d), optional=True)
NOISE = tensor(lambda c: (c.n_steps, c.n, c.d), optional=True)
SIGMA = positive(0.1, 2.0)
IMAGES = tensor(lambda c: (c.n, *c.g.image_shape), 0.5)
MASKED = tensor(  # hidden pixels may hold anything
    lambda c: (c.n, *c.g.image_shape), 0.5, finite=False, shapes=lambda t: [t[:0], *other_sizes(t)]
)


def masks(c):
    shape = (c.n, *c.g.image_shape)
    some = torch.rand(shape, generator=seeded(3)) < 0.5
    fitting = [None, some, some[:1], some[0], some.double(), some.long(), torch.zeros(()), torch.ones(1, 1)]
    wrong = [torch.ones(c.n + 1, *c.g.image_shape), torch.ones(1, *shape), torch.ones(1, 7), some.tolist(), "all", 1]
    wrong += [torch.full(shape, v) for v in (0.5, 2.0, -1.0, math.nan)]
    return Kind(st.sampled_from(fitting), st.sampled_from(wrong))


def chains(deterministic):
    """Chains of the context's posterior; `deterministic` ones fit where that is True."""

    def kind(c):
        def run(posterior, n, dtype, flat, kept):
            start = torch.randn(n, posterior.generator.latent_dim, generator=seeded(5), dtype=dtype)
            return srlib.short_run(posterior, c.n_steps, 3e-3, start, None, flat, seeded(6), kept)

        def of(kind_of_model, n, dtype):
            g = generator(kind_of_model, dtype)
            return srlib.Posterior(g, torch.zeros(n, *g.image_shape, dtype=dtype), 0.5)

        own = functools.partial(run, c.posterior, c.n, c.dtype)
        other_model = "point" if c.d > 1 else "plane"
        other_dtype = FLOATS[c.dtype == FLOATS[0]]
        same_model = {1: "point", 2: "plane", 3: "top-down"}[c.d]
        wrong = [
            run(of(same_model, c.n + 1, c.dtype), c.n + 1, c.dtype, False, True),
            run(of(other_model, c.n, c.dtype), c.n, c.dtype, False, False),
            run(of(same_model, c.n, other_dtype), c.n, other_dtype, False, True),
            own(False, True).final,
            None,
        ]
        wrong += [] if deterministic else [own(True, True), own(True, False)]
        right = st.tuples(st.booleans() if deterministic else st.just(False), st.booleans())
        return Kind(right.map(lambda flags: own(*flags)), st.sampled_from(wrong))

    return kind


CHAIN, NOISY_CHAIN = chains(deterministic=True), chains(deterministic=False)


# --- every public function ---------------------------------------------------------------------------------------------

PUBLIC = {}


def public(*, models=("point", "plane", "top-down"), refusals="nothing", **kinds):
    """Registers a function of a context and arguments, which calls a function of srlib and checks what it returns.

    refusals : what messages for arguments that fit may say.
    """

    def register(function):
        PUBLIC[function.__name__] = (function, kinds, models, refusals)
        return function

    return register


def check(t, shape, dtype=torch.float64):
    assert t.shape == shape and t.dtype == dtype and t.isfinite().all()


LAYERS = Kind(
    st.lists(st.integers(1, 2), min_size=1, max_size=3) | st.just((1, 2)),
    st.sampled_from([(), (0,), (1, -2), (1.5, 2), (True, 2), "ab", 3, None, ("1",)]),
)
SQUARE = Kind(
    st.sampled_from([(1, 10, 10), [3, 10, 10]]),
    st.sampled_from([(10, 10), (1, 10, 20), (1, 12, 12), (1, 5, 5), (1, 0, 0), (1.0, 10, 10), 10, None, "abc"]),
)


CONVOLUTIONAL = dict(
    latent_dims=LAYERS, image_shape=SQUARE, channels=whole(1, 2), feature_size=Kind(st.just(5), whole(5, 6).bad)
)


def check_generator(kind, given):
    with torch.random.fork_rng(devices=[]):
        g = kind(**given)
        check(g(g.sample_prior(2)).detach(), (2, *given["image_shape"]), torch.float32)


@public(models=["point"], **CONVOLUTIONAL)
def top_down_generator(c, **given):
    check_generator(srlib.TopDownGenerator, given)


@public(models=["point"], **CONVOLUTIONAL)
def ladder_generator(c, **given):
    check_generator(srlib.LadderGenerator, given)


@public(
    weight=tensor(lambda c: (4, c.d), shapes=lambda t: [t[:0], t[:3], t[None], t[0], t[:, :0]]),
    bias=tensor(lambda c: (4,)),
    image_shape=Kind(
        st.sampled_from([None, (1, 2, 2), [4, 1, 1]]),
        st.sampled_from([(1, 1, 1), (4,), (4, 1, -1), 4, "abcd", (2.0, 2, 1)]),
    ),
)
def linear_generator(c, **given):
    g = srlib.LinearGenerator(**given)
    check(g(g.sample_prior(2, seeded(0))).detach(), (2, *g.image_shape), c.dtype)


@public(e=SOME_LATENTS)
def forward(c, e):
    check(c.g(e).detach(), (len(e), *c.g.image_shape), c.dtype)


@public(e=SOME_LATENTS)
def latents(c, e):
    check(torch.cat(c.g.latents(e), 1).detach(), e.shape, c.dtype)


@public(n=whole(1, 3), rng=NUMBER_GENERATOR)
def sample_prior(c, **given):
    check(c.g.sample_prior(**given), (given["n"], c.d), c.dtype)


@public(x=tensor(lambda c: (c.n, *c.g.image_shape), 0.5, shapes=lambda t: [t[:0], *other_sizes(t)]))
def posterior_without_mask(c, x):
    assert len(srlib.Posterior(c.g, x, 0.5)) == c.n


@public(x=MASKED, sigma=SIGMA, mask=masks)
def posterior(c, **given):
    p = srlib.Posterior(c.g, **given)
    check(p.log_joint(torch.zeros(c.n, c.d, dtype=c.dtype)).detach(), (c.n,), c.dtype)


@public(e=LATENTS)
def log_joint(c, e):
    check(c.posterior.log_joint(e).detach(), (c.n,), c.dtype)


@public(e=LATENTS, create_graph=FLAG, chunk_size=CHUNK)
def score(c, **given):
    check(c.posterior.score(**given).detach(), (c.n, c.d), c.dtype)


@public(e=LATENTS)
def hessian(c, e):
    check(c.posterior.hessian(e), (c.n, c.d, c.d), c.dtype)


@public(e=LATENTS, v=tensor(lambda c: (c.n, c.d), finite=False, shapes=lambda t: [t[:0], *other_sizes(t)[::3], t[0]]))
def hessian_product(c, e, v):
    check(c.posterior.hessian_product(e, v), (c.n, c.d), c.dtype)


@public(n_chains=whole(1, 3))
def repeated(c, n_chains):
    assert len(c.posterior.repeated(n_chains)) == c.n * n_chains


@public(
    n_steps=length,
    step_size=of_steps,
    initial=START,
    noise=NOISE,
    rng=NUMBER_GENERATOR,
    keep_trajectory=FLAG,
    chunk_size=CHUNK,
)
def short_run(c, **given):
    chain = srlib.short_run(c.posterior, **given)
    check(chain.final.detach(), (c.n, c.d), c.dtype)
    check(chain.noise, (c.n_steps, c.n, c.d), c.dtype)
    assert (chain.trajectory is not None) == given["keep_trajectory"]


LONG = Kind(st.floats(1e-2, 1e30))  # steps that overshoot, or leave all bounds


@public(step_size=LONG, n_steps=length, refusals="diverged")
def short_run_of_long_steps(c, **given):
    check(srlib.short_run(c.posterior, rng=seeded(0), **given).final, (c.n, c.d), c.dtype)


@public(step_size=LONG, n_steps=length, estimator=choice(*step_size.ESTIMATORS), refusals="diverged|no inverse")
def kl_objective_of_long_steps(c, **given):
    check(srlib.kl_objective(c.posterior, rng=seeded(0), **given), (c.n,))


@public(models=["point", "plane"], step_size=LONG, n_steps=length)
def exact_kl_of_long_steps(c, **given):
    assert (srlib.ClosedForm(c.posterior).short_run_kl(**given) > -1e-9).all()  # inf where float64 does not hold it


@public(step_size=LONG, n_steps=length)
def metropolis_adjusted_long_steps(c, **given):
    check(mala(c.posterior, rng=seeded(0), **given).final, (c.n, c.d), c.dtype)


@public(models=["point"], noise_scale=positive(1e-3, 10.0))
def step_size_from_noise_scale(c, noise_scale):
    assert srlib.noise_scale_from_step_size(srlib.step_size_from_noise_scale(noise_scale)) == pytest.approx(noise_scale)


@public(models=["point"], step_size=positive(1e-9, 10.0))
def noise_scale_from_step_size(c, step_size):
    assert srlib.step_size_from_noise_scale(srlib.noise_scale_from_step_size(step_size)) == pytest.approx(step_size)


@public(models=["point"], first=positive(1e-9, 10.0), last=positive(1e-9, 10.0), n_steps=whole(1, 4))
def geometric_step_sizes(c, **given):
    check(srlib.geometric_step_sizes(**given), (given["n_steps"], 1, 1))


@public(chain=CHAIN, method=choice("stepwise", "row_by_row", "low_rank"), chunk_size=CHUNK)
def log_abs_det_jacobian(c, **given):
    check(srlib.log_abs_det_jacobian(c.posterior, **given), (c.n,))


@public(
    models=["top-down"],
    chain=CHAIN,
    n_products=Kind(st.integers(9, 12), whole(1, 1).bad),
    n_probes=Kind(st.just(2), whole(2, 3).bad),
    block_size=Kind(st.just(1), whole(1, 1).bad),
    rng=NUMBER_GENERATOR,
)
def low_rank_log_abs_det(c, **given):
    check(srlib.low_rank_log_abs_det(c.posterior, **given).value, (c.n,))


@public(chain=CHAIN, chunk_size=CHUNK)
def change_of_variables(c, **given):
    check(entropy.change_of_variables(c.posterior, **given), (c.n,))


@public(chain=NOISY_CHAIN, chunk_size=CHUNK)
def linear_noise(c, **given):
    check(entropy.linear_noise(c.posterior, **given), (c.n,))


@public(chain=NOISY_CHAIN)
def path(c, chain):
    check(entropy.path(c.posterior, chain), (c.n,))


@public(chain=NOISY_CHAIN, chunk_size=CHUNK)
def path_gaussian(c, **given):
    check(entropy.path_gaussian(c.posterior, **given), (c.n,))


FURTHER = tensor(lambda c: (2, c.n_steps, c.n, c.d), shapes=other_sizes)


@public(chain=NOISY_CHAIN, noises=FURTHER, chunk_size=CHUNK)
def equation_17(c, **given):
    check(entropy.equation_17(c.posterior, **given).detach(), (c.n,))


@public(chain=NOISY_CHAIN, noises=FURTHER, chunk_size=CHUNK, refusals="no inverse")
def semi_implicit(c, **given):
    check(entropy.semi_implicit(c.posterior, **given).detach(), (c.n,))


@public(
    final=tensor(lambda c: (c.n, c.d)),
    step_size=of_steps,
    noise=tensor(lambda c: (c.n_steps, c.n, c.d), shapes=lambda t: [t[:0], *other_sizes(t)]),
    tolerance=positive(1e-10, 1e-6),
    n_max=Kind(st.just(500), whole(1, 1).bad),
    refusals="no inverse",
)
def backwards(c, **given):
    check(entropy.backwards(c.posterior, **given).initial.detach(), (c.n, c.d), c.dtype)


ESTIMATOR = choice(*step_size.ESTIMATORS)
COMMON_OPTIONS = dict(n_steps=length, estimator=ESTIMATOR, rng=NUMBER_GENERATOR)
FOR_KL = dict(step_size=of_steps, initial=START, noise=NOISE, n_noise=whole(1, 2))


@public(**COMMON_OPTIONS, **FOR_KL, refusals="no inverse")
def kl_objective(c, **given):
    check(srlib.kl_objective(c.posterior, **given).detach(), (c.n,))


def pairs(c):
    """e_0 and eps for `common`."""
    e, eps = (torch.randn(s, generator=seeded(2), dtype=c.dtype) for s in ((c.n, c.d), (c.n_steps, c.n, c.d)))
    wrong = [(), (e,), (e, eps, eps), e, 3, "common", (None, eps), (e, None), (eps, e), (e, eps.tolist())]
    wrong += [(bad, eps) for bad in other_shapes(e) + other_types(e) + unfinite(e)]
    wrong += [(e, bad) for bad in other_shapes(eps)[:-1] + other_types(eps) + unfinite(eps)]
    return Kind(st.none() | st.tuples(forms(e), forms(eps)), st.sampled_from(wrong))


def grids(c):
    schedules = st.lists(forms(torch.full((c.n_steps, 1, 1), 2e-3)), min_size=1, max_size=2)
    wrong = [[], [1e-3, -1.0], [math.nan], [math.inf], [0.0], [True], ["1"], [None], [[1e-3]], 1e-3, "grid", None]
    wrong += [torch.tensor(1e-3), [1e-3, torch.ones(c.n_steps, 1, 1)], [torch.full((9, 9, 9, 9), 1e-3)]]
    numbers = st.lists(st.floats(1e-5, 1e-2), min_size=1, max_size=3)
    return Kind(numbers | numbers.map(torch.tensor) | schedules, st.sampled_from(wrong))


@public(
    **COMMON_OPTIONS, candidates=grids, share=choice("all"), n_chains=Kind(st.just(1), whole(1, 2).bad), common=pairs
)
def grid_search_step_size(c, **given):
    found = srlib.grid_search_step_size(c.posterior, **given)
    check(found.values, (len(given["candidates"]), c.n))
    check(found.step_size, found.candidates.shape[1:])


@public(
    **COMMON_OPTIONS,
    initial=Kind(
        st.floats(1e-5, 1e-2) | forms(torch.tensor(1e-3)),
        st.sampled_from([0.0, -1, math.nan, True, None, "1", [1e-3], torch.ones(9, 9), torch.tensor(True), math.inf]),
    ),
    share=choice("all", "step", "layer", "example"),
    n_iterations=whole(1, 2),
    learning_rate=positive(1e-3, 0.3),
    n_chains=Kind(st.just(1), whole(1, 2).bad),
    common=pairs,
)
def descend_step_size(c, **given):
    found = srlib.descend_step_size(c.posterior, **given)
    assert found.values.shape == (given["n_iterations"] + 1, c.n) and found.values[found.best].isfinite().all()
    check(found.step_size, found.candidates.shape[1:])


@public(
    models=["point"],
    method=choice("grid", "descent"),
    estimator=ESTIMATOR,
    n_images=whole(2, 3),
    factors=Kind(
        st.lists(st.floats(0.5, 2.0), min_size=1, max_size=2),
        st.sampled_from([(), (0.0,), (1, -1), "ab", 1.0, None, (True,), (math.nan,)]),
    ),
    width=positive(0.1, 1.0),
    learning_rate=positive(0.1, 1.0),
    rng=NUMBER_GENERATOR,
)
def step_size_search(c, rng, **given):
    check(srlib.StepSizeSearch(**given)(c.posterior, torch.tensor(1e-3), 2, rng).step_size, ())


@public(
    models=["point"],
    n_chains=Kind(st.just(12), whole(12, 13).bad),
    n_steps=whole(1, 2),
    latent_dim=whole(1, 2),
    rng=NUMBER_GENERATOR,
)
def moment_matched(c, **given):
    initial, noise = step_size.moment_matched(**given)
    check(noise, (given["n_steps"], *initial.shape))


@public(
    models=["point"],
    step_size=positive(1e-5, 1e-2),
    ratio=positive(0.2, 5.0),
    momentum=Kind(st.floats(0, 0.99), st.sampled_from([-0.1, 1.0, math.nan, math.inf, True, "0.5", None])),
    heat=positive(0.5, 3.0),
    power=Kind(st.floats(-1, 1), st.sampled_from([math.nan, math.inf, True, "1", None])),
)
def variant(c, **given):
    check(Variant(**given).step_sizes(3, torch.ones(2)).expand(3, 1, 2), (3, 1, 2))


OF_VARIANT = dict(
    n_steps=length,
    precision=lambda c: Kind(
        st.sampled_from([torch.ones(c.d), torch.full((c.d,), 3.0).double()]),
        st.sampled_from([None, [1.0], torch.zeros(c.d), torch.ones(c.d + 1), torch.ones(1, c.d), "all"]),
    ),
    initial=START,
    noise=NOISE,
    rng=NUMBER_GENERATOR,
)


@public(**OF_VARIANT)
def variant_run(c, **given):
    states = run_variant(c.posterior, Variant(1e-3, 2.0, 0.5, 1.5, 0.5), **given)
    check(states, (c.n_steps + 1, c.n, c.d), c.dtype)


@public(**OF_VARIANT)
def variant_divergence(c, **given):
    check(variant_objective(c.posterior, Variant(1e-3, 2.0, 0.5, 1.5, 0.5), **given), (c.n,))


@public(models=["point", "plane"], step_size=of_steps, n_steps=length)
def closed_form(c, **given):
    exact = srlib.ClosedForm(c.posterior)
    check(exact.short_run_kl(**given).detach(), (c.n,))
    check(exact.short_run_moments(**given)[1].detach(), (c.n, c.d, c.d))
    check(exact.log_marginal(), (c.n,))


def axes(c):
    even = torch.linspace(-8, 8, 81, dtype=torch.float64)
    wrong = [(), (even,) * (c.d + 1), even, 3, "axes", None, (even.flip(0),) * c.d, (even.exp(),) * c.d]
    wrong += [(even[:2],) * c.d, (math.nan * even,) * c.d, (None,) * c.d, (even[None],) * c.d, (even / 100,) * c.d]
    return Kind(st.just((even,) * c.d) | st.just([even.float()] * c.d), st.sampled_from(wrong))


@public(
    models=["point", "plane"],
    step_size=Kind(st.floats(0.04, 0.06), positive(1, 1).bad.filter(lambda v: v != 10**400)),
    n_steps=length,
    axes=axes,
    refusals="grid",
)
def brute_force(c, **given):
    found = short_run_density(c.posterior[:1], **given)
    assert math.isfinite(found.kl) and found.kl > -1e-6


@public(models=["point"], latent_dim=whole(1, 2), bound=positive(1.0, 9.0), n_points=whole(3, 9))
def regular(c, **given):
    check(regular_axes(**given)[-1], (given["n_points"],))


@public(n_steps=length, step_size=of_steps, initial=START, rng=NUMBER_GENERATOR, keep_trajectory=FLAG)
def metropolis_adjusted(c, **given):
    samples = mala(c.posterior, **given)
    check(samples.final, (c.n, c.d), c.dtype)
    check(samples.acceptance, (c.n,))


@public(
    n_steps=length,
    step_size=of_steps,
    n_leapfrog=whole(1, 2),
    initial=START,
    rng=NUMBER_GENERATOR,
    keep_trajectory=FLAG,
)
def hamiltonian(c, **given):
    samples = hmc(c.posterior, **given)
    check(samples.final, (c.n, c.d), c.dtype)
    check(samples.acceptance, (c.n,))


@public(n_steps=whole(2, 3), initial=START, rng=NUMBER_GENERATOR)
def self_tuned(c, **given):
    samples = long_run(c.posterior, **given)
    check(samples.final, (c.n, c.d), c.dtype)
    check(samples.acceptance, (c.n,))


ANNEALING = dict(n_chains=whole(2, 3), rng=NUMBER_GENERATOR)
PATHS = dict(n_temperatures=whole(2, 4), n_leapfrog=whole(1, 2))
EXACT = tensor(lambda c: (c.n, c.d))


@public(models=["plane"], **ANNEALING, **PATHS)
def annealed_importance_sampling(c, **given):
    found = likelihood.annealed_importance_sampling(c.posterior, **given)
    for name in ("estimate", "standard_error", "effective_sample_size"):
        check(getattr(found, name), (c.n,))


@public(models=["plane"], **ANNEALING, **PATHS, exact_sample=EXACT)
def bidirectional(c, **given):
    check(likelihood.bidirectional(c.posterior, **given).gap, (c.n,))


def paths(c):
    def annealing(n):
        return likelihood.Annealing(torch.linspace(0, 1, 4, dtype=torch.float64), torch.full((3, n), 0.3), 2)

    return Kind(st.just(annealing(c.n)), st.sampled_from([annealing(c.n + 1), None, 3, torch.ones(3)]))


@public(models=["plane"], **ANNEALING, exact_sample=EXACT, annealing=paths)
def reverse_annealed_importance_sampling(c, **given):
    check(likelihood.reverse_annealed_importance_sampling(c.posterior, **given).estimate, (c.n,))


@public(n=whole(1, 3), sigma=SIGMA, rng=NUMBER_GENERATOR)
def simulate(c, **given):
    p, e = likelihood.simulate(c.g, **given)
    check(p.x, (given["n"], *c.g.image_shape), c.dtype)
    check(e, (given["n"], c.d), c.dtype)


FEATURES = tensor(lambda c: (44, 2))


def same_columns(f):
    """Features are taken in any float type, and as many as there are."""

    def kind(c):
        t = torch.randn(44, 2, generator=seeded(1), dtype=c.dtype)
        wrong = [t[:0], t[:1], t[:, :1], t[None], t[0], t.tolist(), None, "x", *unfinite(t)]
        return Kind(f(c).good, st.sampled_from(wrong))

    return kind


REAL = dict(real=same_columns(FEATURES), generated=same_columns(FEATURES))


@public(models=["point"], **REAL)
def frechet_distance(c, **given):
    assert 0 <= frechet.frechet_distance(**given) < 10


@public(models=["point"], **REAL)
def kernel_distance(c, **given):
    assert math.isfinite(frechet.kernel_distance(**given))


@public(models=["point"], **REAL, rng=NUMBER_GENERATOR, n_bootstrap=whole(2, 3))
def bootstrap_standard_errors(c, **given):
    assert all(v >= 0 for v in frechet.bootstrap_standard_errors(**given))


@public(models=["point"], **REAL, rng=NUMBER_GENERATOR, n_halvings=whole(1, 3))
def frechet_bias(c, **given):
    assert math.isfinite(frechet.frechet_bias(**given)["extrapolated"])


@public(
    models=["point"],
    mean=lambda c: Kind(
        forms(torch.zeros(2, dtype=c.dtype)),
        st.sampled_from(
            [torch.zeros(3), torch.zeros(2, 1), torch.zeros(()), [0.0, 0.0], None, torch.tensor([0, math.nan])]
        ),
    ),
    covariance=lambda c: Kind(
        forms(torch.eye(2, dtype=c.dtype)),
        st.sampled_from([torch.eye(3), torch.ones(2), [[1.0]], None, math.nan * torch.eye(2)]),
    ),
)
def gaussian_frechet_distance(c, mean, covariance):
    other = torch.zeros(2, dtype=c.dtype), torch.eye(2, dtype=c.dtype)
    assert frechet.gaussian_frechet_distance(mean, covariance, *other) >= 0


def digits(c):
    t = torch.rand(2, 1, 28, 28, generator=seeded(0))
    wrong = [t[:0], t[0], t[..., :-1], 255 * t, t.long(), t.tolist(), None, *unfinite(t), torch.cat([t, t], 1)]
    return Kind(
        st.sampled_from([t, 2 * t - 1, (255 * t).to(torch.uint8), t[..., ::1].mT]) | forms(t), st.sampled_from(wrong)
    )


@public(models=["point"], name=choice("digits", "mnist"), images=digits, batch_size=whole(1, 3))
def features(c, **given):
    found = frechet.features(**given)
    check(found, (2, found.shape[1]))


ANY_FLOATS = tensor(lambda c: (c.n, *c.g.image_shape), 0.5, types=lambda t: other_types(t)[:-1])


@public(models=["point"], images=ANY_FLOATS, reconstructed=ANY_FLOATS)
def squared_error(c, **given):
    check(reconstruction.squared_error(**given).detach(), (c.n,), c.dtype)


def system(c):
    return srlib.ShortRun(c.g, n_steps=2, step_size=1e-3, sigma=0.5).to(c.dtype)


@public(x=MASKED, mask=masks, rng=NUMBER_GENERATOR)
def infer(c, **given):
    check(system(c).infer(**given), (c.n, c.d), c.dtype)


@public(x=MASKED, mask=masks, rng=NUMBER_GENERATOR)
def reconstruct(c, **given):
    check(system(c).reconstruct(**given), (c.n, *c.g.image_shape), c.dtype)


@public(n=whole(1, 3), source=choice("prior"), rng=NUMBER_GENERATOR)
def sample(c, **given):
    check(system(c).sample(**given), (given["n"], *c.g.image_shape), c.dtype)


def many_images(c):
    t = torch.rand(8, *c.g.image_shape, generator=seeded(0), dtype=c.dtype)
    wrong = [t[:0], t[0], t[..., :-1], 255 * t, t.long(), t.tolist(), None, math.nan * t]
    return Kind(st.sampled_from([(255 * t).to(torch.uint8), t.float(), t.double()]) | forms(t), st.sampled_from(wrong))


@public(images=many_images, batch_size=whole(1, 9), rng=NUMBER_GENERATOR)
def fit_aggregate(c, **given):
    check(system(c).fit_aggregate(**given), (8, c.d), c.dtype)


@public(images=many_images, batch_size=whole(1, 9), rng=NUMBER_GENERATOR)
def reconstructions(c, **given):
    check(reconstruction.reconstructions(system(c), **given), (8, *c.g.image_shape), c.dtype)


@public(images=many_images, batch_size=whole(1, 9))
def inference_seconds(c, **given):
    assert reconstruction.inference_seconds(system(c), **given) > 0


@public(
    models=["point"],
    images=lambda c: Kind(forms(torch.rand(3, 1, 2, 2, dtype=c.dtype, generator=seeded(0)))),
    columns=whole(1, 4),
)
def image_grid(c, **given):
    plt.close(plots.image_grid(**given))


@public(
    models=["point"],
    n_steps=whole(1, 3),
    step_size=positive(1e-4, 1.0),
    sigma=positive(0.1, 0.5),
    sigma_start=Kind(st.none() | st.floats(0.5, 1.0), st.sampled_from([0.0, -1.0, math.nan, True, "1", 0.01])),
    anneal_fraction=Kind(st.floats(0, 1), st.sampled_from([-0.1, 1.1, math.nan, True, "1", None])),
    update_step_size=Kind(st.sampled_from([None, srlib.StepSizeSearch()]), st.sampled_from([3, "grid"])),
    every=whole(1, 3),
)
def short_run_system(c, **given):
    assert srlib.ShortRun(c.g, **given).settings()["step_size"] == pytest.approx(given["step_size"])


# --- evaluation, claims and tables -------------------------------------------------------------------------------------


def batch(c, *sizes):
    """Images of four pixels; those of the context may have one, which cannot be hidden in part."""
    return 0.5 * torch.randn(*sizes, 1, 2, 2, generator=seeded(4), dtype=c.dtype)


def several(*sizes, wrong=lambda t: [], shapes=lambda t: [t[:0], t[0, ..., 0], t[..., :1]]):
    """Images, or draws of them, of which floats of any kind fit alone."""

    def kind(c):
        t = batch(c, *sizes)
        bad = [
            *shapes(t),
            (255 * t).to(torch.uint8),
            t.tolist(),
            None,
            1.0,
            *unfinite(t),
            *wrong(t),
        ]
        return Kind(forms(t), st.sampled_from(bad))

    return kind


def halves(c):
    left = torch.tensor([[True, False]])
    wrong = [torch.ones(3), torch.ones(1, 3, 1, 2, 2), [[1.0]], None, "all", 1, 0.3 * left, math.nan * left]
    return Kind(st.sampled_from([left, left.long(), left.double(), left.expand(3, 1, 2, 2)]), st.sampled_from(wrong))


PICTURES = several(3)
OF_FILL = dict(images=PICTURES, mask=halves, training=several(5, wrong=lambda t: [t.to(FLOATS[t.dtype == FLOATS[0]])]))
OF_DRAWS = dict(
    images=lambda c: Kind(PICTURES(c).good, PICTURES(c).bad.filter(lambda v: v is None or isinstance(v, list))),
    draws=several(4, 3, wrong=lambda t: [t[:, :2], t[None]]),
    mask=halves,
)


@public(
    models=["point"],
    kind=choice(*inpainting.KINDS),
    n=whole(1, 3),
    image_shape=Kind(
        st.sampled_from([(1, 3, 4), [3, 4, 4]]), st.sampled_from([(3, 4), (1, 0, 4), (1, 3.0, 4), 3, None, "abc"])
    ),
    rate=Kind(st.floats(0.2, 0.8), st.sampled_from([0, 1, -0.1, 1e-9, math.nan, math.inf, True, "0.5", None])),
    rng=NUMBER_GENERATOR,
)
def observed_mask(c, **given):
    check(inpainting.observed_mask(**given).double(), (given["n"], 1, *given["image_shape"][1:]))


@public(models=["plane"], images=PICTURES, mask=halves, n_draws=whole(1, 2), rng=NUMBER_GENERATOR)
def inpaintings(c, images, **given):
    images = images[:, :1] if isinstance(images, torch.Tensor) and images.ndim == 4 else images
    check(inpainting.inpaintings(system(c), images, **given), (given["n_draws"], 3, 1, 2, 2), c.dtype)


@public(models=["point"], images=PICTURES, inpainted=several(3, wrong=lambda t: [t[:2], t[None, None]]), mask=halves)
def hidden_squared_error(c, **given):
    check(inpainting.hidden_squared_error(**given).detach(), (3,), c.dtype)


@public(models=["point"], **OF_DRAWS)
def hidden_spread(c, **given):
    check(inpainting.hidden_spread(**given).detach(), (3,), c.dtype)


@public(models=["point"], draws=several(4, 3, shapes=lambda t: [t[:1], t[None], t[0]]))
def pixel_spread(c, draws):
    check(inpainting.pixel_spread(draws).detach(), (3, 1, 2, 2), c.dtype)


@public(
    models=["point"],
    **OF_DRAWS,
    sigma=Kind(st.floats(0, 2) | st.just(0), st.sampled_from([-1, math.nan, math.inf, True, "0.1", None, 10**400])),
    rng=NUMBER_GENERATOR,
)
def rank_of_truth(c, **given):
    ranks = inpainting.rank_of_truth(**given)
    assert ranks.shape == (3,) and ranks.min() >= 0 and ranks.max() <= 4


@public(models=["point"], **OF_FILL)
def mean_fill(c, **given):
    check(inpainting.mean_fill(**given).detach(), (3, 1, 2, 2), c.dtype)


@public(models=["point"], **OF_FILL)
def nearest_fill(c, **given):
    check(inpainting.nearest_fill(**given).detach(), (3, 1, 2, 2), c.dtype)


@public(models=["point"], **OF_FILL, ridge=positive(0.1, 2.0))
def linear_fill(c, **given):
    check(inpainting.linear_fill(**given).detach(), (3, 1, 2, 2), c.dtype)


POSTERIOR = lambda c: Kind(st.just(c.posterior), st.sampled_from([None, 3, "posterior", c.g]))  # noqa: E731
NUMBER_OR_SCHEDULE = Kind(
    st.sampled_from([1e-3, torch.tensor(1e-3), torch.full((3, 1, 1), 1e-3)]),
    st.sampled_from([0.0, -1, math.nan, True, "0.1", None, torch.ones(2, 1, 1), torch.ones(3), torch.tensor(-1.0)]),
)
OF_CHAINS = dict(posterior=POSTERIOR, n_steps=Kind(st.just(3), whole(1, 3).bad), step_size=NUMBER_OR_SCHEDULE)


@public(models=["point", "plane"], **OF_CHAINS, n_chains=whole(1, 2), rng=NUMBER_GENERATOR)
def objective_by_steps(c, **given):
    check(mismatch.objective_by_steps(**given), (4, c.n))


@public(models=["point"], **OF_CHAINS, n_chains=whole(1, 2), rng=NUMBER_GENERATOR)
def short_run_divergence(c, **given):
    check(mismatch.short_run_divergence(**given), (c.n,))


@public(models=["point"], **OF_CHAINS, n_chains=whole(1, 2), n_long=whole(2, 3), rng=NUMBER_GENERATOR)
def energy_gap(c, **given):
    check(mismatch.energy_gap(**given).gap, (c.n,))


@public(
    models=["point"],
    jacobians=tensor(
        lambda c: (3, 2, 2, 2), shapes=lambda t: [t[0], t[..., :1], t[None]], types=lambda t: other_types(t)[:-1]
    ),
    step_size=NUMBER_OR_SCHEDULE,
)
def noise_log_dets(c, **given):
    check(mismatch.noise_log_dets(**given).detach().double(), (4, 2))


@public(models=["point"], posterior=POSTERIOR, rng=NUMBER_GENERATOR)
def log_marginal(c, **given):
    check(mismatch.log_marginal(**given), (c.n,))


@public(
    models=["plane"],
    images=lambda c: several(3)(c),
    sigma=SIGMA,
    n_steps=Kind(st.just(3), whole(1, 3).bad),
    step_size=NUMBER_OR_SCHEDULE,
    n_batches=whole(2, 3),
    rng=NUMBER_GENERATOR,
)
def mean_gradients(c, **given):
    assert mismatch.mean_gradients(c.g, **given).isfinite().all()


@public(
    models=["point"],
    gradients=tensor(
        lambda c: (3, 2), shapes=lambda t: [t[:0], t[:1], t[None], t[0]], types=lambda t: other_types(t)[:-1]
    ),
)
def squared_norm_of_mean(c, gradients):
    check(mismatch.squared_norm_of_mean(gradients).detach(), (), c.dtype)


VALUES = torch.linspace(0, 1, 8)
KNOWN = factors.known_factors({"hue": VALUES, "size": VALUES, "digit": torch.arange(8) % 2})
OF_FACTORS = dict(
    factors=Kind(
        st.just(KNOWN),
        st.sampled_from([None, {}, 3, "hue", [KNOWN["hue"]], {"hue": VALUES}, {"hue": factors.Factor(VALUES)}]),
    )
)
KIND = choice("linear", "nonlinear")


def eight(c):
    """Features of eight images."""
    t = torch.randn(8, 2, generator=seeded(1), dtype=c.dtype)
    return Kind(forms(t), st.sampled_from([t[:7], t[:, :0], t[None], t[0], t.tolist(), None, "x", *unfinite(t)]))


@public(
    models=["point"],
    factors=Kind(
        st.just({"hue": VALUES, "digit": torch.arange(8)}),
        st.sampled_from(
            [
                None,
                3,
                "hue",
                {"hue": VALUES, "size": VALUES[:7]},
                {"hue": None},
                {"hue": VALUES[:1]},
                {"hue": VALUES[None]},
                {"hue": math.nan * VALUES},
            ]
        ),
    ),
    angles=Kind(st.sampled_from([(), ("hue",), ["size"]]), st.sampled_from(["hue", None, 3])),
)
def known_factors(c, **given):
    assert all(f.values.dtype == torch.float64 and len(f.values) == 8 for f in factors.known_factors(**given).values())


@public(models=["point"], **OF_FACTORS, rng=NUMBER_GENERATOR)
def shuffled(c, **given):
    assert factors.shuffled(**given).keys() == KNOWN.keys()


@public(models=["point"], features=eight, **OF_FACTORS, kind=KIND, n_folds=whole(2, 4), rng=NUMBER_GENERATOR)
def told(c, **given):
    assert factors.told(**given).keys() == KNOWN.keys()


@public(
    models=["point"],
    layers=lambda c: Kind(
        st.integers(1, 3).map(lambda n: [torch.randn(8, 2, generator=seeded(1), dtype=c.dtype)] * n),
        st.sampled_from([[], None, 3, torch.ones(2, 8, 2), [None], [torch.ones(7, 2)], [torch.ones(8)]]),
    ),
    **OF_FACTORS,
    kind=KIND,
    seed=Kind(st.integers(-3, 3), st.sampled_from(["a", None, 1.0, True, 2**64])),
)
def layer_shares(c, layers, factors, kind, seed):
    n = len(layers) if isinstance(layers, list) else 0
    check(srlib.evaluation.factors.layer_shares(layers, factors, kind, seed).of_layer, (n, 3))


@public(models=["point"], features=eight, **OF_FACTORS, kind=KIND)
def probe(c, **given):
    check(factors.Probe(**given)(given["features"])["hue"], (8, 2))


@public(images=many_images, rng=NUMBER_GENERATOR, noises=FLAG)
def inferred_layers(c, **given):
    check(torch.cat(factors.inferred_layers(system(c), **given), 1), (8, c.d), c.dtype)


def means(images):
    """What a reader sees: the mean of an image."""
    return {"size": images.flatten(1).mean(1, keepdim=True).double()}


READER = Kind(st.just(means), st.sampled_from([None, 3, "means"]))


@public(models=["point"], read=READER, factors=Kind(st.just({"size": KNOWN["size"]}), OF_FACTORS["factors"].bad))
def read_accuracy(c, **given):
    assert math.isfinite(factors.read_accuracy(images=torch.ones(8, 1, 2, 2), **given)["size"])


def seen_images(c):
    """Eight images of any side."""
    wrong = many_images(c).bad.filter(lambda t: not isinstance(t, torch.Tensor) or t.shape[-1] == c.g.image_shape[-1])
    return Kind(many_images(c).good, wrong)


@public(images=seen_images)
def mean_colour(c, images):
    check(factors.mean_colour(images)["mean colour"], (8, c.g.image_shape[0]), torch.float64)


@public(models=["top-down"], read=READER, n=whole(2, 3), rng=NUMBER_GENERATOR)
def layer_effects(c, **given):
    assert len(factors.layer_effects(c.g, **given)["size"]) == 2


@public(
    models=["point"],
    values=Kind(
        st.lists(st.floats(-1, 1), min_size=1, max_size=4),
        st.sampled_from([[], None, 3, "12", [math.nan], [math.nan, 1.0], [math.inf, 1.0], ["1"], [None, 1.0], [True]]),
    ),
)
def over(c, values):
    found = evidence.over(values, "seeds")
    assert found.lower <= found.effect + 1e-12 and found.effect <= found.upper + 1e-12


BOUND = [None, "0", True, math.nan]


@public(
    models=["point"],
    evidence=Kind(
        st.just(claims.Evidence(0.5, 0.4, 0.6, "3 seeds")), st.sampled_from([None, claims.Evidence(0.5, 0.6, 0.4, "")])
    ),
    above=Kind(st.floats(-2, 1) | st.just(-math.inf), st.sampled_from([*BOUND, math.inf])),
    below=Kind(st.floats(1.5, 2) | st.just(math.inf), st.sampled_from([*BOUND, -math.inf])),
)
def verdict(c, evidence, above, below):
    assert claims.verdict(evidence, above, below) in (claims.HOLDS, claims.FAILS, claims.INCONCLUSIVE)


@public(
    models=["point"],
    rows=Kind(st.just([("a", 1), ("b|c", 2)]), st.sampled_from([None, 3, [("a",)], [3], [("a", 1, 2)]])),
    columns=Kind(st.just(["x", "y"]), st.sampled_from([None, 3, [], ["x"]])),
)
def table(c, **given):
    assert comparison.table(**given).count("\n") == 3


@public(
    models=["point"],
    names=Kind(st.lists(st.text(), min_size=1, max_size=3), st.sampled_from([[], "", None, 3, [3], [None, "a"]])),
)
def listed(c, **given):
    assert isinstance(comparison.listed(**given), str)


@public(models=["point"], kind=choice("fd", "kid", "fid"), source=choice("prior", "aggregate"))
def distance(c, **given):
    assert comparison.distance(**given)({"scores": {}}) is None


# --- what must hold ----------------------------------------------------------------------------------------------------


def tensors(value):
    """All tensors in an argument."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    if is_dataclass(value):
        return [t for f in fields(value) for t in tensors(getattr(value, f.name))]
    return []


@contextlib.contextmanager
def untouched(c, given):
    """Fails unless tensors, gradients, modules and torch's global state are afterwards what they were.

    Parameters and leaves have gradients before, as in the middle of the caller's own update.
    """
    watched = [*c.g.parameters(), c.posterior.x, *tensors(list(given.values()))]
    before = [(t.detach().clone(), t.requires_grad, t._version) for t in watched]
    leaves = [t for t in watched if t.is_leaf and t.requires_grad]
    gradients = [torch.full_like(t, 0.5, requires_grad=False) for t in leaves]
    for t, gradient in zip(leaves, gradients):
        t.grad = gradient
    training, state = [m.training for m in c.g.modules()], torch.get_rng_state()
    try:
        yield
        for t, gradient in zip(leaves, gradients):
            assert t.grad is gradient and (gradient == 0.5).all() and gradient._version == 0
    finally:
        for t in leaves:  # generators are shared by examples
            t.grad = None
    for t, (values, requires_grad, version) in zip(watched, before):
        assert torch.equal(t.detach().nan_to_num(), values.nan_to_num()) and t.requires_grad == requires_grad
        assert t._version == version and (not t.is_leaf or t.grad is None)
    assert [m.training for m in c.g.modules()] == training and torch.get_default_dtype() == torch.float32
    assert given.get("rng", 0) is None or torch.equal(torch.get_rng_state(), state)


# Arguments that a message calls by what they are.
ALIASES = {"common": "e_0|eps", "axes": "grid", "image_shape": "image side", "images": "x", "factors": "factor"}
# Messages that could be clearer: they call the start of a chain e, and a data set by its network.
ALIASES |= {"initial": "e", "exact_sample": "e", "name": "network"}


def names(message, name, value):
    """Does the message say which argument it is, or show its value, shape or type, if these are long enough to be no chance?

    A name of one letter counts where something is said of it: n in "[n, d]" is a size of another argument.
    """
    shown = [] if value is None or isinstance(value, bool) else [repr(value), str(value)]
    for t in tensors(value):
        shown += [str(tuple(t.shape)), str(list(t.shape)), str(t.dtype)]
    known = rf"\b({name}|{ALIASES.get(name, name)})\b"
    if len(name) == 1:
        known = rf"\b{name}(=| (has|have|holds?|is|must)\b)|tensor {name}\b"
    return bool(re.search(known, message)) or any(len(s) > 3 and s in message for s in shown)


@pytest.mark.parametrize(
    "message, name, value, expected",
    [("n=0 must be", "n", 0, True), ("give [n, d], at least 0", "n", 0, False), ("rng must be", "seed", None, False), ("not 3", "mask", 3, False),
     ("None of them", "mask", None, False), ("x has shape (3, 1)", "images", torch.ones(3, 1), True), ("it is 'nonsense'", "kind", "nonsense", True),
     ("x is no tensor", "x", 3, True), ("", "kind", "", False)],
)  # fmt: skip
def test_what_names_a_culprit(message, name, value, expected):
    assert names(message, name, value) == expected


def refusal(call, c, given):
    """The message of the error that the call ends in; None if it does not."""
    with untouched(c, given), c.mode():
        try:
            call(c, **given)
        except (ValueError, srlib.DivergenceError) as error:
            return str(error)
    return None


@pytest.mark.parametrize("function", PUBLIC)
@given(data=st.data())
def test_a_result_or_an_error_that_names_the_culprit(function, data):
    call, kinds, models, refusals = PUBLIC[function]
    c = data.draw(contexts(models), "context")
    kinds = {name: kind(c) for name, kind in kinds.items()}
    culprit = data.draw(
        st.sampled_from([None, *(name for name, kind in kinds.items() if kind.bad is not None)]), "culprit"
    )
    given = {name: data.draw(kind.bad if name == culprit else kind.good, name) for name, kind in kinds.items()}
    message = refusal(call, c, given)
    if message and "torch.inference_mode" in message:
        assert c.mode is torch.inference_mode
    elif culprit is None:
        assert message is None or re.search(refusals, message), f"arguments that fit were refused: {message}"
    else:
        assert message, f"{culprit}={given[culprit]!r} was accepted"
        assert names(message, culprit, given[culprit]), message


def test_every_function_that_srlib_exports_is_here():
    exported = {name for name in srlib.__all__ if inspect.isfunction(getattr(srlib, name))}
    assert exported - {"load", "to_uint8", "to_unit_range"} <= PUBLIC.keys()  # tests/test_data.py has these


# Functions of files and of finished runs, which tests/test_claims.py and tests/test_comparison.py have; and of a large network.
OF_RUNS = {
    "load_claims",
    "judge",
    "overall",
    "paper_tables",
    "entries",
    "finished_runs",
    "diverged_runs",
    "score",
    "mean_score",
    "gap",
    "cell",
}
OF_RUNS |= {"squared_error", "distance_name", "prose", "pictures", "image_reader", *claims.QUANTITIES}
OF_RUNS |= {
    "to_measure",
    "measured",
    "mean",
    "mean_of_factors",
    "mean_over_seeds",
    "share_of_images",
    "folders_by_seed",
    "code_hash",
    "alike",
}


@pytest.mark.parametrize("module", [inpainting, mismatch, factors, claims, comparison, evidence, measurements])
def test_every_function_of_these_modules_is_here(module):
    own = {name for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    assert {name for name in own if not name.startswith("_")} - OF_RUNS <= PUBLIC.keys()
