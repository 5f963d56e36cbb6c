"""The fast forms of the inner loop against the generator they stand for."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import shutil
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import srlib
from srlib import inner_loop
from srlib.inner_loop import FourierConvolution, Spectrum, accelerated

GENERATORS = {
    "top down": lambda: srlib.TopDownGenerator((3, 5), (1, 10, 10), channels=4, feature_size=5),
    "top down, colour, wide": lambda: srlib.TopDownGenerator((3, 5), (3, 16, 16), channels=32, feature_size=8),
    "three doublings": lambda: srlib.TopDownGenerator((4,), (12, 40, 40), channels=4, feature_size=5),
    "ladder": lambda: srlib.LadderGenerator((3, 5), (1, 10, 10), channels=4, feature_size=5),
    "linear": lambda: srlib.LinearGenerator(torch.randn(9, 3), torch.randn(9)),
}


def posterior_of(generator: srlib.generators.Generator, n: int = 4, masked: bool = False) -> srlib.Posterior:
    x = generator(generator.sample_prior(n)).detach()
    mask = (torch.rand_like(x) > 0.3) if masked else None
    return srlib.Posterior(generator, x, 0.15, mask)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("worth", [1e-9, 3.0, math.inf])
def test_the_accelerated_posterior_has_the_same_scores(name, dtype, tolerance, masked, worth, monkeypatch):
    monkeypatch.setattr(inner_loop, "WORTH", worth)
    posterior = posterior_of(GENERATORS[name]().to(dtype), masked=masked)
    fast, e = accelerated(posterior), posterior.generator.sample_prior(4)
    assert relative(fast.generator(e), posterior.generator(e)) < tolerance
    assert relative(fast.score(e), posterior.score(e)) < tolerance
    assert relative(fast.score(e, chunk_size=3), posterior.score(e)) < tolerance


@pytest.mark.parametrize("side", [5, 6, 9, 16])
@pytest.mark.parametrize("k, padding", [(1, 0), (3, 1), (5, 2), (5, 0), (4, 3), (3, 0)])
def test_a_fourier_convolution_is_the_convolution(side, k, padding):
    conv = nn.Conv2d(3, 4, k, padding=padding).double()
    x = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    expected, found = conv(x), FourierConvolution(conv, Spectrum(side, k, padding))(x)
    assert relative(found, expected) < 1e-12
    v = torch.randn_like(expected)
    assert relative(torch.autograd.grad(found, x, v)[0], torch.autograd.grad(expected, x, v)[0]) < 1e-12


def test_frequencies_are_used_where_they_save_and_only_there(monkeypatch):
    monkeypatch.setattr(inner_loop, "WORTH", 3.0)
    wide = accelerated(posterior_of(srlib.TopDownGenerator((4, 4), (3, 32, 32), channels=64))).generator
    narrow = accelerated(posterior_of(GENERATORS["top down"]())).generator
    kinds = [{type(module) for module in g.modules()} for g in (wide, narrow)]
    assert FourierConvolution in kinds[0] and nn.Conv2d in kinds[0] and FourierConvolution not in kinds[1]


def test_convolutions_that_are_not_plain_stay_as_they_are():
    """Groups, dilation, circular padding, hooks, weights without bias, two sizes of input: nothing is taken for what it is not."""

    class Odd(srlib.generators.Generator):
        def __init__(self) -> None:
            super().__init__((6,), (2, 4, 4))
            self.parts = nn.Sequential(
                nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, output_padding=1),
                nn.Conv2d(4, 4, 3, padding=1, groups=2),
                nn.Conv2d(4, 4, 3, padding=2, dilation=2),
                nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
                nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
                nn.Conv2d(4, 4, 3, padding="same"),
                nn.Conv2d(4, 4, 3, padding=1, bias=False),
                nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
                nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
            )
            self.twice = nn.Conv2d(4, 4, 3, padding=1)
            self.last = nn.Conv2d(4, 2, 2, stride=1)

        def forward(self, e: torch.Tensor) -> torch.Tensor:
            h = self.parts(e[:, :, None, None])
            h = self.twice(nn.functional.interpolate(self.twice(h), size=5))
            return self.last(h)

    posterior = posterior_of(Odd())
    e = posterior.generator.sample_prior(4)
    assert relative(accelerated(posterior).score(e), posterior.score(e)) < 1e-5


def test_the_copy_takes_the_weights_of_the_moment_and_leaves_the_original_alone():
    generator = GENERATORS["top down"]()
    posterior = posterior_of(generator)
    e, before = generator.sample_prior(4), {name: p.clone() for name, p in generator.named_parameters()}
    accelerated(posterior).score(e)
    assert all(p.requires_grad and p.grad is None and p.equal(before[name]) for name, p in generator.named_parameters())
    with torch.no_grad():
        for p in generator.parameters():
            p.mul_(1.1)
    assert relative(accelerated(posterior).score(e), posterior.score(e)) < 1e-5


@pytest.mark.parametrize("worth", [1e-9, 3.0, math.inf])
def test_bfloat16_keeps_two_digits(worth, monkeypatch):
    monkeypatch.setattr(inner_loop, "WORTH_IN_BFLOAT16", worth)
    posterior = posterior_of(GENERATORS["top down, colour, wide"]())
    e = posterior.generator.sample_prior(4)
    fast = accelerated(posterior, precision="bfloat16")
    found = fast.score(e)
    assert found.dtype == torch.float32
    assert 1e-4 < relative(found, posterior.score(e)) < 0.05
    kinds = [type(module) for module in fast.generator.modules()]
    assert (FourierConvolution in kinds) == (worth < math.inf)
    assert kinds.count(nn.Linear) == len(posterior.generator.latent_dims)  # those of the heads are convolutions


def test_bfloat16_leaves_a_generator_in_float64_alone():
    posterior = posterior_of(GENERATORS["top down, colour, wide"]().double())
    e = posterior.generator.sample_prior(4)
    assert relative(accelerated(posterior, precision="bfloat16").score(e), posterior.score(e)) < 1e-12


def test_convolutions_of_the_same_images_share_their_spectrum():
    convs, x = [nn.Conv2d(3, n, 5, padding=2).double() for n in (2, 4)], torch.randn(2, 3, 6, 6, dtype=torch.float64)
    spectrum = Spectrum(6, 5, 2)
    first, second = (FourierConvolution(conv, spectrum) for conv in convs)
    for image_of in (lambda: x, x.clone, lambda: x, lambda: x.mul_(2)):  # the last is the one before, with other values
        image = image_of()
        assert relative(first(image), convs[0](image)) < 1e-12
        shared = spectrum(image)
        assert relative(second(image), convs[1](image)) < 1e-12
        assert spectrum(image) is shared


def test_a_spectrum_is_not_shared_by_what_may_differ():
    """The same tensor with and without a graph, and after a change in place: each has a spectrum of its own."""
    spectrum, x = Spectrum(6, 3, 1), torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        plain = spectrum(x)
    assert not plain.requires_grad and spectrum(x).requires_grad
    assert spectrum(x) is spectrum(x)
    with torch.no_grad():
        x.mul_(2)
        torch.testing.assert_close(spectrum(x), 2 * plain)


def test_an_accelerated_posterior_can_be_copied_after_use(monkeypatch):
    monkeypatch.setattr(inner_loop, "WORTH", 1e-9)
    posterior = posterior_of(GENERATORS["top down"]())
    fast, e = accelerated(posterior), posterior.generator.sample_prior(4).requires_grad_()
    fast.generator(e)
    torch.testing.assert_close(copy.deepcopy(fast.generator)(e), fast.generator(e), rtol=0, atol=0)


def test_weights_of_convolutions_are_in_the_order_that_processors_like(monkeypatch):
    monkeypatch.setattr(inner_loop, "WORTH", math.inf)
    fast = accelerated(posterior_of(GENERATORS["top down, colour, wide"]())).generator
    kernels = [m.weight for m in fast.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert kernels and all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@pytest.mark.parametrize(
    "maker, flags, expected",
    [
        ("AuthenticAMD", "avx2", (math.inf, 3.0)),
        ("GenuineIntel", "avx512_bf16", (3.0, 3.0)),
        ("GenuineIntel", "avx512_bf16 amx_bf16", (3.0, math.inf)),
    ],
)
def test_where_frequencies_pay_depends_on_the_processor(maker, flags, expected):
    assert inner_loop._worth(f"vendor_id\t: {maker}\nflags\t\t: fpu {flags}") == expected


def test_multiplications_that_frequencies_save():
    """5x5 on 16x16 pixels, counted by hand: N = 18, F = 10."""
    conv = nn.Conv2d(64, 32, 5, padding=2)
    direct = 25 * 16 * 16 * 64 * 32
    there, products, back = 16 * 16 * 20 + 3 * 18 * 32 * 10, 3 * 18 * 10 * 64 * 32, 32 * 54 * 10 + 16 * 16 * 20
    assert inner_loop._saving(conv, 16) == pytest.approx(direct / (64 * there + products + 32 * back))
    assert inner_loop._saving(nn.Conv2d(64, 32, 5, stride=2), 16) == 0 == inner_loop._saving(nn.GELU(), 16)


@pytest.mark.parametrize("flags, told", [("avx2", 1), ("avx512_bf16", 0)])
def test_bfloat16_that_is_imitated_is_told_once(flags, told, monkeypatch, caplog):
    inner_loop._tell_once.cache_clear()
    monkeypatch.setattr(inner_loop, "PROCESSOR", f"vendor_id : X\nflags : fpu {flags}")
    for _ in range(2):
        accelerated(posterior_of(GENERATORS["linear"]()), "bfloat16")
    assert [r.name for r in caplog.records] == ["srlib.inner_loop"] * told
    inner_loop._tell_once.cache_clear()


def test_chains_are_the_same_and_reproducible():
    posterior = posterior_of(GENERATORS["top down, colour, wide"]())

    def chain(seed: int = 1, **given) -> torch.Tensor:
        return srlib.short_run(posterior, 5, 1e-4, rng=torch.Generator().manual_seed(seed), **given).final

    start = posterior.generator.sample_prior(4, torch.Generator().manual_seed(1)).requires_grad_()
    slow = srlib.short_run(posterior, 5, 1e-4, start, chain_noise(posterior, 5)).final
    assert chain().equal(chain())
    assert relative(chain(), slow) < 1e-5
    assert relative(chain(precision="bfloat16"), slow) < 0.05


def chain_noise(posterior: srlib.Posterior, n_steps: int) -> torch.Tensor:
    """What `short_run` draws after e_0 from a generator with seed 1."""
    rng = torch.Generator().manual_seed(1)
    posterior.generator.sample_prior(4, rng)
    return torch.stack([torch.randn(4, posterior.generator.latent_dim, generator=rng) for _ in range(n_steps)])


def test_a_derivative_in_the_step_size_is_that_of_the_whole_graph():
    """`short_run` keeps only the states of a chain whose step size is differentiated; with a start that is, all of it."""
    posterior = posterior_of(GENERATORS["top down"]().double())
    initial = posterior.generator.sample_prior(4)
    noise = torch.randn(6, *initial.shape, dtype=torch.float64)
    found = []
    for start in (initial, initial.clone().requires_grad_()):
        for chunk_size in (None, 3):
            s = torch.full((6, 1, 1), 1e-4, dtype=torch.float64, requires_grad=True)
            final = srlib.short_run(posterior, 6, s, start, noise, chunk_size=chunk_size).final
            found.append(torch.autograd.grad(final.sin().sum(), s)[0])
    for other in found[:-1]:
        assert relative(other, found[-1]) < 1e-10


def test_a_chain_whose_step_size_is_differentiated_keeps_its_states_alone():
    """What a graph keeps alive, counted: for one more step a few tensors [n, d], not the generator's activations."""

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    posterior, n = posterior_of(GENERATORS["top down, colour, wide"](), 4), 4
    start = posterior.generator.sample_prior(n)

    def kept_numbers(n_steps: int, start: torch.Tensor) -> int:
        alive: weakref.WeakSet[Kept] = weakref.WeakSet()

        def keep(tensor: torch.Tensor) -> Kept:
            alive.add(kept := Kept(tensor))
            return kept

        s = torch.full((n_steps, 1, 1), 1e-4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            chain = srlib.short_run(posterior, n_steps, s, start)
        return sum(kept.tensor.numel() for kept in alive) if chain.final.requires_grad else 0

    states = start.numel()
    per_step = (kept_numbers(6, start) - kept_numbers(3, start)) / 3
    assert states <= per_step < 10 * states
    with_graph = start.clone().requires_grad_()
    assert (kept_numbers(6, with_graph) - kept_numbers(3, with_graph)) / 3 > 1000 * states


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(monkeypatch, caplog):
    def without_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here")

    posterior = posterior_of(GENERATORS["top down"]())
    e = posterior.generator.sample_prior(4)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: without_compiler)
    with caplog.at_level(logging.WARNING):
        fast = accelerated(posterior, compile=True)
    assert "no compiler here" in caplog.text
    assert relative(fast.score(e), posterior.score(e)) < 1e-5


@pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "long" or not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="compiling takes up to a minute (make fault-test), and a C++ compiler",
)
def test_compiled_scores_are_the_eager_ones(caplog):
    class Saturating(srlib.LinearGenerator):
        def forward(self, e: torch.Tensor) -> torch.Tensor:
            return torch.tanh(super().forward(e))

    posterior = posterior_of(Saturating(torch.randn(9, 3), torch.randn(9)))
    e = posterior.generator.sample_prior(4)
    fast = accelerated(posterior, compile=True)
    assert fast.generator._compiled_call_impl is not None and "left out" not in caplog.text
    assert relative(fast.score(e), posterior.score(e)) < 1e-5


def test_what_cannot_be_recorded_as_a_graph_runs_as_it_is_and_says_so_once(monkeypatch, caplog):
    """The form for a GPU, without one: recording fails at the second score."""

    @contextlib.contextmanager
    def without_graphs(_: object) -> Iterator[None]:
        raise RuntimeError("no graphs here")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", without_graphs)
    posterior = posterior_of(GENERATORS["top down"]())
    fast = accelerated(posterior)
    fast.__class__ = inner_loop._OnGraph
    for n_told in (0, 1, 1, 1):
        e = posterior.generator.sample_prior(4)
        assert relative(fast.score(e), posterior.score(e)) < 1e-5
        assert [r.getMessage() for r in caplog.records] == ["no CUDA graph: no graphs here"] * n_told
    assert fast._graph is None


@pytest.mark.parametrize("given, named", [({"precision": "half"}, "half"), ({"compile": 1}, "compile=1")])
def test_what_is_not_known_is_refused(given, named):
    posterior = posterior_of(GENERATORS["linear"]())
    with pytest.raises(ValueError, match=named):
        srlib.short_run(posterior, 2, 1e-3, **given)
    with pytest.raises(ValueError, match=named):
        srlib.ShortRun(posterior.generator, 2, 1e-3, **given)


@pytest.mark.parametrize("given", [{"precision": "bfloat16"}, {"compile": True}])
def test_a_chain_that_is_differentiated_is_not_computed_fast(given):
    posterior = posterior_of(GENERATORS["linear"]())
    with pytest.raises(ValueError, match="no_grad"):
        srlib.short_run(posterior, 2, torch.tensor(1e-3, requires_grad=True), **given)
    with torch.no_grad():
        srlib.short_run(posterior, 2, torch.tensor(1e-3, requires_grad=True), **({} if "compile" in given else given))


@pytest.mark.cuda
def test_on_a_gpu_a_graph_is_replayed():
    posterior = posterior_of(GENERATORS["top down"]().cuda())
    fast = accelerated(posterior)
    for _ in range(5):
        e = posterior.generator.sample_prior(4)
        assert relative(fast.score(e), posterior.score(e)) < 1e-4
    assert fast._graph is not None
