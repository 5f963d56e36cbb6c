"""What all tests share: one thread, and the models whose answers are known."""

import os
from contextlib import contextmanager

import hypothesis
import pytest
import torch

import srlib
from srlib import training

# One thread per process: results do not depend on the machine, and pytest-xdist uses the cores.
torch.set_num_threads(1)
# How far property-based tests go: `make test` takes the same few examples every time, `make fault-test` sets "long".
hypothesis.settings.register_profile("short", max_examples=6, derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("long", max_examples=200, print_blob=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
collect_ignore = ["faults"]  # programs that tests start, no tests
# On a GPU the same seed gives the same bits, and float32 is float32, only when asked for.
torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """A test that uses it, itself or through another fixture, is there twice: for the CPU and for `make test-gpu`.

    Models, images and results of such a test are on the device; generators of random numbers are on the CPU, so that
    both versions see the same numbers.
    """
    return torch.device(request.param)


@pytest.fixture
def linear_posterior(device):
    """make(n, mask): the posterior of n images of 7 pixels under a random linear model with 3 latents."""

    def make(n, mask=False, pixels=7, latents=3, sigma=0.5):
        rng = torch.Generator().manual_seed(0)
        weight, bias = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((pixels, latents), (pixels,)))
        g = srlib.LinearGenerator(weight, bias)
        with torch.no_grad():
            noise = torch.randn(n, pixels, 1, 1, generator=rng, dtype=torch.float64)
            x = g(g.sample_prior(n, rng)) + sigma * noise
        observed = torch.arange(pixels)[:, None, None].remainder(3) > 0
        mask = observed.double()[None].to(device) if mask else None
        return srlib.Posterior(g.to(device), x.to(device), sigma, mask)

    return make


@pytest.fixture
def small_posterior(device):
    """make(masked): the posterior of 4 images of 16x16 pixels under a random two-layer generator with 12 latents."""

    def make(masked):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            g = srlib.TopDownGenerator((5, 7), (1, 16, 16), channels=6, feature_size=8).double()
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            x = g(g.sample_prior(4, rng))
        mask = (torch.rand(4, 1, 16, 16, generator=rng) < 0.6).double().to(device) if masked else None
        return srlib.Posterior(g.to(device), x.to(device), 0.3, mask)

    return make


class Wave(srlib.Generator):
    """g(e) = sin(1.5 e): one latent, one pixel; steps that are long against the curvature fold."""

    def __init__(self):
        super().__init__((1,), (1, 1, 1))
        self.rate = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, e):
        return torch.sin(self.rate * e)[:, :, None, None]


class Killed(Exception):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """with killed_at(t): a training in it, which saves after every update, is stopped before update t."""
    monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", -1.0)
    update = training.TrainingLoop.update

    @contextmanager
    def kill(t):
        def killing_update(loop, loss, **monitored):
            if loop.t == t:
                raise Killed
            update(loop, loss, **monitored)

        with monkeypatch.context() as patch:
            patch.setattr(training.TrainingLoop, "update", killing_update)
            try:
                yield
            except Killed:
                return
        pytest.fail(f"the training never came to update {t}")

    return kill


@pytest.fixture
def wave():
    return Wave()


@pytest.fixture
def images():
    """16 images of a white disc in a random place, uint8."""
    centre = 4 + 8 * torch.rand(16, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    distance = (rows - centre[:, :1]).square() + (columns - centre[:, 1:]).square()
    return (distance < 16).to(torch.uint8) * 255
