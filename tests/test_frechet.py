"""Fréchet and kernel distances against closed forms, scipy, pytorch-fid itself and double sums."""

import hashlib
import json
import math
import sys
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from pytorch_fid import inception
from pytorch_fid.fid_score import calculate_frechet_distance
from torch.nn import functional as F

import srlib
from srlib.evaluation import frechet

NETWORKS = sorted(path.stem for path in frechet.WEIGHTS.glob("*.safetensors"))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(n, dim, seed, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(n, dim, generator=rng(seed), dtype=torch.float64)


def covariance(dim, rank, seed):
    a = gaussian(rank, dim, seed)
    return a.T @ a / rank


# --- the Fréchet distance ---------------------------------------------------------------------------------------------


def test_gaussians_of_commuting_covariances_have_the_closed_form():
    a, b, m = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([9.0, 0.0, 1.0]), torch.tensor([1.0, -2.0, 0.5])
    expected = m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet.gaussian_frechet_distance(torch.zeros(3), a.diag(), m, b.diag())
    assert found == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("rank", [3, 8, 40])
def test_general_covariances_agree_with_scipy_and_singular_ones_too(rank):
    c, d = covariance(8, rank, 1), covariance(8, 40, 2)
    product = scipy.linalg.sqrtm((c @ d + 1e-13 * torch.eye(8)).numpy()).real
    expected = (c.trace() + d.trace()).item() - 2 * np.trace(product)
    zero = torch.zeros(8)
    assert frechet.gaussian_frechet_distance(zero, c, zero, d) == pytest.approx(
        expected, abs=1e-5 if rank < 8 else 1e-10
    )


def test_disjoint_singular_covariances_are_exact():
    """Both of rank one, on orthogonal lines: nothing is shared, and the product is zero."""
    c, d = torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 3.0]))
    assert frechet.gaussian_frechet_distance(torch.zeros(2), c, torch.zeros(2), d) == pytest.approx(5.0, rel=1e-14)


def test_features_agree_with_pytorch_fid():
    x, y = gaussian(300, 12, 0), gaussian(250, 12, 1, 0.3, 1.4) @ covariance(12, 30, 2)
    moments = [m for z in (x.numpy(), y.numpy()) for m in (z.mean(0), np.cov(z, rowvar=False))]
    assert frechet.frechet_distance(x, y) == pytest.approx(calculate_frechet_distance(*moments), rel=1e-9)


def test_a_set_has_no_distance_from_itself_even_where_its_features_are_dead():
    x = gaussian(200, 10, 0)
    x[:, 3], x[:, 4] = 0.0, x[:, 5]
    assert 0 <= frechet.frechet_distance(x, x) < 1e-12
    assert frechet.frechet_distance(torch.ones(100, 5), torch.zeros(100, 5)) == pytest.approx(5.0)


def test_rotating_both_sets_changes_nothing():
    x, y = gaussian(200, 10, 0), gaussian(200, 10, 1, 0.5, 2.0)
    q = torch.linalg.qr(gaussian(10, 10, 2)).Q
    assert frechet.frechet_distance(x @ q, y @ q) == pytest.approx(frechet.frechet_distance(x, y), rel=1e-10)
    assert frechet.kernel_distance(x @ q, y @ q) == pytest.approx(frechet.kernel_distance(x, y), rel=1e-10)


def test_too_few_images_for_the_dimension_are_refused():
    x, y = gaussian(99, 10, 0), gaussian(500, 10, 1)
    with pytest.raises(ValueError, match="99 images are too few for 10 feature dimensions: 100"):
        frechet.frechet_distance(x, y)
    assert frechet.bootstrap_standard_errors(x, y, rng(), 2)[0] is None
    assert frechet.frechet_distance(gaussian(100, 10, 0), y) > 0


# --- the kernel distance ----------------------------------------------------------------------------------------------


def double_sum(x, y):
    def k(a, b):
        return (float(a @ b) / x.shape[1] + 1) ** 3

    def within(z):
        return sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kernel_distance_is_the_double_sum(monkeypatch):
    x, y = gaussian(17, 4, 0), gaussian(23, 4, 1, 0.4)
    monkeypatch.setattr(frechet, "_rows", lambda n: (slice(i, i + 5) for i in range(0, n, 5)))
    assert frechet.kernel_distance(x, y) == pytest.approx(double_sum(x, y), rel=1e-12)


def test_an_image_drawn_twice_is_no_pair_with_itself():
    """With counts, the sum is over pairs of different images, as if the copies of one were told apart."""
    x, y = gaussian(4, 3, 0), gaussian(3, 3, 1)
    w, v = torch.tensor([[2.0, 0.0, 1.0, 1.0]]).double(), torch.ones(1, 3).double()
    k = (x @ x.T / 3 + 1) ** 3
    pairs = [(i, j) for i in (0, 0, 2, 3) for j in (0, 0, 2, 3) if i != j]
    within = sum(k[i, j] for i, j in pairs) / len(pairs)
    others = (
        double_sum(x[[0, 2]], y) - ((x[0] @ x[2] / 3 + 1) ** 3).item()
    )  # leaves within(y) - 2 between(y, x0 and x2)
    between = ((x[[0, 0, 2, 3]] @ y.T / 3 + 1) ** 3).mean() - ((x[[0, 2]] @ y.T / 3 + 1) ** 3).mean()
    assert frechet._kernel(x, y, w, v).item() == pytest.approx((within + others - 2 * between).item(), rel=1e-12)


def test_kernel_distance_has_no_bias_where_the_frechet_distance_has():
    repeats = [(gaussian(80, 8, 2 * i), gaussian(80, 8, 2 * i + 1)) for i in range(200)]
    kid = torch.tensor([frechet.kernel_distance(x, y) for x, y in repeats])
    fd = torch.tensor([frechet.frechet_distance(x, y) for x, y in repeats])
    assert abs(kid.mean()) < 3 * kid.std() / math.sqrt(200)
    assert fd.mean() > 10 * fd.std() / math.sqrt(200)


# --- uncertainty and bias ---------------------------------------------------------------------------------------------


def test_bootstrap_intervals_cover():
    """Of the kernel distance they cover its true value, of the Fréchet distance its mean at this number of images."""
    sets = [(gaussian(150, 3, 2 * i), gaussian(150, 3, 2 * i + 1, 0.6, 1.3)) for i in range(60)]
    distances = torch.tensor([(frechet.frechet_distance(x, y), frechet.kernel_distance(x, y)) for x, y in sets])
    errors = torch.tensor([frechet.bootstrap_standard_errors(x, y, rng(i), 50) for i, (x, y) in enumerate(sets)])
    covered = ((distances - distances.mean(0)).abs() < 1.96 * errors).double().mean(0)
    assert (covered > 0.86).all()
    assert (covered < 1).all()
    assert errors.mean(0).tolist() == pytest.approx(distances.std(0).tolist(), rel=0.3)


def test_the_bias_grows_as_images_go_and_the_extrapolation_removes_it():
    """Two samples of one Gaussian: the limit is 0, and the biases at n and n/2 are as 1 to 2."""
    curves = [frechet.frechet_bias(gaussian(400, 6, 2 * i), gaussian(600, 6, 2 * i + 1), rng(i)) for i in range(40)]
    values = torch.tensor([curve["value"] for curve in curves])
    assert curves[0]["n_real"] == [400, 200, 100, 50]
    assert curves[0]["n_generated"] == [600, 300, 150, 75]
    assert (values.mean(0)[1:] / values.mean(0)[:-1]).tolist() == pytest.approx([2, 2, 2], rel=0.15)
    limit = torch.tensor([curve["extrapolated"] for curve in curves])
    assert abs(limit.mean()) < 0.1 * values[:, 0].mean()


def test_too_few_images_give_no_line():
    curve = frechet.frechet_bias(gaussian(40, 6, 0), gaussian(40, 6, 1), rng())
    assert curve["n_real"] == [40]
    assert curve["extrapolated"] is None


# --- our own networks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return srlib.load("digits")


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_small_and_say_where_they_come_from(name):
    assert (frechet.WEIGHTS / f"{name}.safetensors").stat().st_size < 1_000_000
    made = frechet.network_metadata(name)
    assert made["config"]["seed"] == 0
    assert len(made["data"]["fingerprint"]) == 16
    assert made["validation"]["n_images"] > 0
    assert "accuracy" in made["validation"] or 0 < made["validation"]["mse"] < 0.3
    x = frechet.features(name, torch.randint(256, (3, *made["image_shape"]), dtype=torch.uint8, generator=rng()))
    assert x.shape == (3, made["dim"])
    assert x.dtype == torch.float64
    assert x.isfinite().all()


@pytest.mark.parametrize("name", sorted({"digits", "colour_digits"} & set(NETWORKS)))
def test_the_classifiers_never_saw_an_image_of_digits(name, digits):
    """They have learned from MNIST's training images but for the first 6,000 (benchmarks/feature_networks.py), which all digits are."""
    try:
        mnist = srlib.load("mnist").train.images.flatten(1).float() / 255
    except srlib.data.DatasetUnavailable as error:
        pytest.skip(str(error))
    assert frechet.network_metadata(name)["data"]["n_train"] == len(mnist) - 6000
    judged = digits.test.images[::10].flatten(1).float() / 255
    distances = torch.cat([torch.cdist(judged, part).square() / 784 for part in mnist.split(5000)], 1)
    assert distances[:, :6000].min(1).values.max() < 1e-3 < distances[:, 6000:].min()


@pytest.mark.parametrize("name", sorted({"digits", "colour_digits"} & set(NETWORKS)))
def test_the_classifiers_features_tell_digits_apart_that_they_never_saw(name):
    data = srlib.load(name)
    assert frechet.network_metadata(name)["validation"]["accuracy"] > 0.97
    x, y = frechet.features(name, data.train.images[:1500]), frechet.features(name, data.test.images[:500])
    nearest = torch.cdist(y, x).argmin(1)
    assert (data.train.labels[:1500][nearest] == data.test.labels[:500]).double().mean() > 0.9


@pytest.mark.parametrize("name", NETWORKS)
def test_images_blurred_noisy_or_joined_of_two_are_far_from_real_ones_and_unseen_images_near(name):
    try:
        data = srlib.load(name)
    except srlib.data.DatasetUnavailable as error:
        pytest.skip(str(error))
    unseen = srlib.to_unit_range(data.validation.images)
    half = unseen.shape[2] // 2
    damaged = {
        "blurred": F.avg_pool2d(F.pad(unseen, [2] * 4, mode="reflect"), 5, stride=1),
        "noisy": (unseen + 0.3 * torch.randn(unseen.shape, generator=rng())).clamp(-1, 1),
        "joined": torch.cat([unseen[:, :, :half], unseen.roll(1, 0)[:, :, half:]], 2),
    }
    real = frechet.features(name, data.train.images[:2000])
    x, damaged = frechet.features(name, unseen), {how: frechet.features(name, y) for how, y in damaged.items()}
    # KID's kernel is a cube, so that two pictures of one person, further out than all training images, outweigh the rest
    # of CelebA 64's; such images are few, and are judged by nothing here
    usual = x.norm(dim=1) <= real.norm(dim=1).max()
    assert usual.double().mean() > 0.99
    x, damaged = x[usual], {how: y[usual] for how, y in damaged.items()}
    assert len(data.train.images) >= frechet.IMAGES_PER_DIMENSION * real.shape[1]
    if name == "svhn":  # the images that there are without labels: too few of them are held out for more
        del damaged["joined"]
    error = frechet.bootstrap_standard_errors(real, x, rng(), 20)[1]
    for y in damaged.values():
        assert frechet.kernel_distance(real, y) > frechet.kernel_distance(real, x) + 3 * error
        if len(x) >= frechet.IMAGES_PER_DIMENSION * x.shape[1]:
            assert frechet.frechet_distance(real, y) > 3 * frechet.frechet_distance(real, x)


def test_features_have_variance_one_and_see_real_and_rounded_images_alike(digits):
    images = digits.train.images[:1000]
    x = frechet.features("digits", images)
    assert x.var(0).mean().item() == pytest.approx(1, abs=0.2)
    noise = (torch.rand(images.shape, generator=rng()) - 0.5) / 127.5 * 0.99
    assert torch.equal(x, frechet.features("mnist", srlib.to_unit_range(images) + noise, batch_size=250))


def test_samples_are_judged_in_plain_numbers(digits):
    real, other = digits.train.images[:400], digits.test.images[:350]
    scores = frechet.evaluate_samples("digits", real, other, rng(), n_bootstrap=20)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert (scores["n_real"], scores["n_generated"], scores["feature_dim"]) == (400, 350, 32)
    assert scores["fd_digits"] == frechet.frechet_distance(*(frechet.features("digits", x) for x in (real, other)))
    assert (
        scores["features_sha256"] == hashlib.sha256((frechet.WEIGHTS / "digits.safetensors").read_bytes()).hexdigest()
    )
    again = frechet.evaluate_samples("digits", real, other, rng(), n_bootstrap=20)
    assert again == scores
    damaged = frechet.evaluate_samples("digits", real, other.flip(3), rng(), n_bootstrap=20)
    for name in ("fd_digits", "kid_digits"):
        assert damaged[name] > scores[name] + 5 * scores[f"{name}_standard_error"]


def test_few_samples_get_the_kernel_distance_alone(digits):
    scores = frechet.evaluate_samples("digits", digits.train.images[:400], digits.test.images[:300], rng(), 20)
    assert "kid_digits" in scores
    assert not [name for name in scores if name.startswith("fd_")]
    assert scores["frechet_refused"].startswith("300 images")


def test_a_network_without_weights_says_how_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(frechet, "WEIGHTS", tmp_path)
    frechet._network.cache_clear()
    with pytest.raises(frechet.WeightsUnavailable, match="python benchmarks/feature_networks.py svhn"):
        frechet.features("svhn", torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(
    "name, images, message",
    [
        ("digit", torch.zeros(2, 1, 28, 28), "no network for 'digit'"),
        ("digits", torch.zeros(2, 28, 28), "give \\[n, C, H, W\\]"),
        ("digits", torch.zeros(0, 1, 28, 28), "n > 0"),
        ("digits", torch.zeros(2, 3, 32, 32), "takes \\(1, 28, 28\\)"),
        ("digits", torch.full((2, 1, 28, 28), 255.0), "reach 255"),
        ("digits", torch.full((2, 1, 28, 28), math.nan), "reach nan"),
        ("digits", torch.zeros(2, 1, 28, 28, dtype=torch.int64), "dtype torch.int64"),
    ],
)
def test_unfit_images_are_refused(name, images, message):
    with pytest.raises(ValueError, match=message):
        frechet.features(name, images)


@pytest.mark.parametrize(
    "real, generated, message",
    [
        (torch.zeros(9), torch.zeros(9, 2), "real features have shape"),
        (torch.zeros(9, 2), torch.zeros(1, 2), "generated features have shape"),
        (torch.zeros(9, 2), torch.full((9, 2), math.nan), "not all finite"),
        (torch.zeros(9, 2), torch.zeros(9, 3), "2 dimensions, generated 3"),
    ],
)
def test_unfit_features_are_refused(real, generated, message):
    for distance in (frechet.frechet_distance, frechet.kernel_distance):
        with pytest.raises(ValueError, match=message):
            distance(real, generated)


# --- FID --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A file like the published one, names and shapes, with random weights; and the network that it is of."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / inception.FID_WEIGHTS_URL.rsplit("/", 1)[-1]
    path.parent.mkdir()
    built = {}

    def keep(module, state):
        built["state"] = module.state_dict()

    with (
        mock.patch.object(inception, "load_state_dict_from_url"),
        mock.patch.object(torch.nn.Module, "load_state_dict", keep),
    ):
        network = inception.InceptionV3([0]).eval()
    torch.save(built["state"], path)
    return path, network


@pytest.fixture
def no_download(monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)


@pytest.mark.filterwarnings("ignore:Matrix is")  # scipy's, of 6 images in 64 dimensions
def test_fid_runs_through_pytorch_fid(random_inception, monkeypatch, no_download):
    path, network = random_inception
    monkeypatch.setattr(frechet, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    monkeypatch.setattr(frechet, "IMAGES_PER_DIMENSION", 0)  # 640 images would take a minute
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(path.parent.parent))
    real, generated = (torch.randint(k, (6, 3, 32, 32), dtype=torch.uint8, generator=rng(k)) for k in (256, 100))
    with mock.patch("pytorch_fid.fid_score.calculate_frechet_distance", wraps=calculate_frechet_distance) as theirs:
        scores = frechet.evaluate_samples("inception", real, generated, rng(), 3, inception_dim=64)
    assert theirs.call_count == 1
    assert scores["features_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    with torch.no_grad():
        x, y = (network(images.float() / 255)[0].mean((2, 3)).double() for images in (real, generated))
    assert torch.allclose(frechet.features("inception", real, path, 64), x, rtol=1e-5)
    assert scores["fid_64"] == pytest.approx(
        frechet._frechet(*frechet._moments(x), *frechet._moments(y)).item(), rel=1e-3
    )
    assert scores["kid_inception"] == pytest.approx(frechet.kernel_distance(x, y), rel=1e-3, abs=1e-9)


def test_the_last_layer_of_inception_has_2048_features_of_grey_images_too(random_inception, monkeypatch, no_download):
    path, _ = random_inception
    monkeypatch.setattr(frechet, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    grey = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8, generator=rng())
    x = frechet.features("inception", grey, path)
    assert x.shape == (2, 2048)
    assert torch.equal(x, frechet.features("inception", grey.expand(-1, 3, -1, -1), path))


def test_other_weights_than_the_published_ones_are_not_fid(random_inception):
    with pytest.raises(ValueError, match="is not the file that pytorch-fid publishes"):
        frechet.features("inception", torch.zeros(2, 3, 32, 32), random_inception[0])


def test_absent_weights_are_not_downloaded_but_explained(tmp_path, monkeypatch, no_download):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(frechet.WeightsUnavailable, match=r"fetch https://\S+pt_inception") as told:
        frechet.features("inception", torch.zeros(2, 3, 32, 32))
    assert str(tmp_path) not in str(told.value)  # it is kept with results that go to other machines
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pytorch_fid.inception", None)
        with pytest.raises(frechet.WeightsUnavailable, match="pip install pytorch-fid"):
            frechet.features("inception", torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="inception_dim=100 must be one of"):
        frechet.features("inception", torch.zeros(2, 3, 32, 32), inception_dim=100)
