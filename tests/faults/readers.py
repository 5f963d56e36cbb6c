"""Random and structured damage to the files that strangers may send, and what the readers make of it.

    python readers.py READER COUNT SEED FOLDER      prints a JSON line with the counts; ends with 1 at the first wrong ending

A reader may succeed, or raise the error that it documents, with the file named in its message. Anything else ends the process:
another exception, a MemoryError behind the documented one (memory was asked for before the file was understood; the process has
`MEMORY` bytes more than it begins with), or `SECONDS` without an answer.
"""

from __future__ import annotations

import gzip
import io
import json
import resource
import signal
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from srlib import checkpoints, data, experiment

MEMORY = 2**30
SECONDS = 10
Rng = np.random.Generator


@dataclass(frozen=True)
class Reader:
    """read(path) is what is tested; seeds are whole files; tokens are put into them, such as other numbers and brackets."""

    name: str
    read: Callable[[Path], object]
    error: type[ValueError]
    seeds: Callable[[], list[bytes]]
    structured: Callable[[Rng, bytes], bytes]


def mutated(content: bytes, rng: Rng) -> bytes:
    """One to four of: flipped bits, other bytes, a cut, a piece copied elsewhere, a piece left out, a number of 1 to 8 bytes."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        n = len(content)
        if not n:
            break
        a, b = sorted(rng.integers(0, n + 1, 2))
        # headers are short, and most of what can go wrong is in them
        place = int(rng.integers(0, n) if rng.random() < 0.3 else min(n - 1, rng.exponential(60)))
        kind = rng.integers(0, 7)
        if kind == 0:
            content[place] ^= 1 << rng.integers(0, 8)
        elif kind == 1:
            content[place : place + 4] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 2:
            del content[a:]
        elif kind == 3:
            content[place:place] = content[a : min(b, a + 200)]
        elif kind == 4:
            del content[place : place + int(rng.integers(1, 40))]
        elif kind == 5:
            size = int(2 ** rng.integers(0, 4))
            value = int(rng.choice([0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1]))
            order = "little" if rng.random() < 0.5 else "big"
            content[place : place + size] = (value % 256**size).to_bytes(size, order)
        else:
            content[place:place] = content[place : place + 8] * int(rng.integers(1, 50))
    return bytes(content)


NUMBERS = [
    "0",
    "-1",
    "1e999",
    "-0.0",
    "nan",
    ".inf",
    "9" * 30,
    "9" * 5000,
    "0x" + "f" * 5000,
    "true",
    "null",
    "~",
    "1:60",
]
YAML = [
    *NUMBERS, "&a [*a]", "*a", "? [a]\n: b", "? {a: b}\n: c", "!!python/object/apply:os.system [true]", "!!int x", "!!bool x",
    "!!timestamp x", "!!binary é", "!!set {a, a}", "!!omap [a: 1]", "2001-99-99", "[" * 3000, "{a: " * 3000, "- " * 3000,
    "!!float ''", "!!int ''", "\x00", "\t", "---\n", "%YAML 9.9\n---", "'", "|\n", "<<: 3", "<<: [1]", "\ud83d", "é" * 50,
    "&b [&c [x,x,x,x,x,x,x,x,x],*c,*c,*c,*c,*c,*c,*c,*c]",
]  # fmt: skip
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
JSON = [
    *NUMBERS,
    "NaN",
    "[" * 100_000,
    '{"a":' * 50_000,
    '"\\ud800"',
    "[]",
    '""',
    '"\\u0000"',
    "{}",
    "\ufeff",
    '{"files": ["/dev/zero"]}',
]


def with_tokens(tokens: list[str]) -> Callable[[Rng, bytes], bytes]:
    """A value, a line or a piece of a text replaced by one of `tokens`."""

    def change(rng: Rng, content: bytes) -> bytes:
        text = content.decode("utf-8", "replace")
        token = str(rng.choice(tokens))
        lines = text.splitlines()
        if not lines:
            return token.encode("utf-8", "surrogatepass")
        i = int(rng.integers(0, len(lines)))
        kind = rng.integers(0, 4)
        if kind == 0:
            lines[i] = lines[i].partition(":")[0] + ": " + token
        elif kind == 1:
            lines.insert(i, token)
        elif kind == 2:
            lines[i] = lines[i].partition(": ")[2]
        else:
            place = int(rng.integers(0, len(lines[i]) + 1))
            lines[i] = lines[i][:place] + token + lines[i][place:]
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    return change


# --- configurations -----------------------------------------------------------------------------------------


def configs() -> list[bytes]:
    import yaml

    texts = [{"name": "tiny", "n_updates": 3}]
    texts += [{"name": system, "system": system, "latent_dims": [4, 6], "channels": 2} for system in experiment.SYSTEMS]
    texts += [{"name": "glow", "system": "glow", "options": {"depth": 1, "n_levels": 1}}]
    whole = experiment._plain(experiment.asdict(experiment.Config("all", step_size_search="grid", every=100)))
    return [yaml.safe_dump(text, sort_keys=False).encode() for text in [*texts, whole]] + [
        f"name: x\noptions:\n{''.join(f'  {line}' + chr(10) for line in LAUGHS.splitlines())}".encode()
    ]


# --- idx ----------------------------------------------------------------------------------------------------


def idx_files() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    return [idx(pixels), idx(pixels[:0]), idx(pixels[:1])]


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


SIZES = [0, 1, 2, 6, 28, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1]


def other_idx_header(rng: Rng, content: bytes) -> bytes:
    """Other sizes in the header; half of them absurd."""
    sizes = [int(s) for s in rng.choice(SIZES, 3)]
    return bytes([0, 0, 8, int(rng.choice([1, 2, 3, 3, 3, 255]))]) + struct.pack(">3I", *sizes) + content[16:]


def packed(change: Callable[[Rng, bytes], bytes]) -> Callable[[Rng, bytes], bytes]:
    """The same inside a whole gzip file."""
    return lambda rng, content: gzip.compress(change(rng, content), 1, mtime=0)


def read_idx(path: Path) -> object:
    return data._read_idx(path, 3)


def read_packed_idx(path: Path) -> object:
    return data._read_idx(path.with_suffix(""), 3)


# --- .mat ---------------------------------------------------------------------------------------------------


def mat_files() -> list[bytes]:
    from scipy.io import savemat

    contents = []
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 2), dtype=np.uint8)
    labels = np.array([[1], [10]], np.uint8)
    others = [
        labels.astype(float),
        np.array([["a"], ["b"]], object),
        np.zeros((2, 1), complex),
        np.array([[True], [True]]),
    ]
    for compressed in (False, True):
        for y in (labels, *others):
            file = io.BytesIO()
            savemat(file, {"X": images, "y": y}, do_compression=compressed)
            contents.append(file.getvalue())
    file = io.BytesIO()
    savemat(file, {"X": images[..., 0, 0], "y": labels}, format="4")
    return [*contents, file.getvalue()]


def other_mat_element(rng: Rng, content: bytes) -> bytes:
    """A compressed file in whose inflated elements something is changed, or one number in a plain file."""
    if content[128:132] == b"\x0f\0\0\0":
        size = struct.unpack("<I", content[132:136])[0]
        inner = bytearray(zlib.decompress(content[136 : 136 + size]))
        place = 4 * int(rng.integers(0, 20))
        inner[place : place + 4] = struct.pack(
            "<I", int(rng.choice([0, 1, 5, 9, 14, 15, 32, 2**16, 2**31 - 1, 2**32 - 1]))
        )
        if rng.random() < 0.2:
            inner += bytes(2**20)
        again = zlib.compress(bytes(inner), 1)
        return content[:132] + struct.pack("<I", len(again)) + again + content[136 + size :]
    changed, place = bytearray(content), 128 + 4 * int(rng.integers(0, 20))
    changed[place : place + 4] = struct.pack(
        "<I", int(rng.choice([0, 1, 5, 9, 14, 15, 32, 2**16, 2**31 - 1, 2**32 - 1]))
    )
    return bytes(changed)


# --- checkpoints --------------------------------------------------------------------------------------------


def safetensors_files() -> list[bytes]:
    from safetensors.torch import save

    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.zeros(0, 4),
        "c": torch.tensor(7),
        "d": torch.ones(2).bfloat16(),
    }
    return [
        save(tensors, metadata={checkpoints.METADATA_KEY: json.dumps({"t": 3, "config": {"name": "x"}})}),
        save(tensors),
        save({}, metadata={checkpoints.METADATA_KEY: "{}"}),
    ]


DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U8",
    "U16",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F4",
    "F8_E8M0",
    "C64",
    "x",
    3,
    None,
]


def other_safetensors_header(rng: Rng, content: bytes) -> bytes:
    """Another header that is JSON: shapes, types, offsets, metadata."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    for _ in range(rng.integers(1, 4)):
        name = str(rng.choice([*header, "new"]))
        if name == "__metadata__":
            text = str(rng.choice(JSON)) if rng.random() < 0.8 else json.dumps({"srlib": 3})
            header[name] = {checkpoints.METADATA_KEY: text} if rng.random() < 0.9 else JSON[int(rng.integers(0, 5))]
            continue
        entry = dict(header.get(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}))
        kind = rng.integers(0, 3)
        if kind == 0:
            entry["dtype"] = DTYPES[int(rng.integers(0, len(DTYPES)))]
        elif kind == 1:
            entry["shape"] = [int(s) for s in rng.choice([0, 0, 1, 2, 3, 2**31, 2**62], rng.integers(0, 6))]
        else:
            entry["data_offsets"] = [int(o) for o in rng.choice([0, 4, 24, 32, 36, 40, 2**40, 2**63 - 1], 2)]
        header[name] = entry
    text = json.dumps(header, ensure_ascii=bool(rng.random() < 0.5)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


# --- metrics ------------------------------------------------------------------------------------------------


def metrics_files() -> list[bytes]:
    payload = {
        "config": {"name": "x", "system": "vae", "latent_dims": [8, 16], "seed": 0},
        "scores": {"mse": 0.031, "mse_standard_error": 1e-4, "n_images": 1000, "split": "test"},
        "files": {},
        "seconds": {"training": 3.5},
    }
    plain = {"history": {"loss": [1.0, 0.5]}}
    return [
        (json.dumps({**content, "checksum": checkpoints.checksum(content)}, indent=1) + "\n").encode()
        for content in (payload, plain)
    ]


VALUES = [
    None,
    3,
    -1.5,
    "text",
    [],
    {},
    [1],
    {"a": "b"},
    "../x",
    {"../../x": "y"},
    {"/dev/zero": "0"},
    {"\0": "y"},
    {"a": 3},
    ["model"],
]


def other_sealed_metrics(rng: Rng, content: bytes) -> bytes:
    """Another content with the checksum that belongs to it, or a token in the text."""
    if rng.random() < 0.5:
        return with_tokens(JSON)(rng, content)
    payload = json.loads(content)
    payload.pop("checksum")
    place = payload
    if rng.random() < 0.3:
        place = payload[str(rng.choice([name for name in payload if isinstance(payload[name], dict)]))]
    place[str(rng.choice([*place, "files", "files"]))] = VALUES[int(rng.integers(0, len(VALUES)))]
    return json.dumps({**payload, "checksum": checkpoints.checksum(payload)}).encode()


def read_metrics(path: Path) -> object:
    checkpoints.read_json(path)
    return experiment.verified_metrics(path.parent)


# --- images -------------------------------------------------------------------------------------------------


def image_files(kind: str) -> Callable[[], list[bytes]]:
    def files() -> list[bytes]:
        contents, pixels = [], np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        for mode in ("RGB", "L"):
            for options in ({}, {"optimize": True}, {"progressive": True} if kind == "JPEG" else {"compress_level": 0}):
                file = io.BytesIO()
                Image.fromarray(pixels).convert(mode).save(file, kind, **options)
                contents.append(file.getvalue())
        return contents

    return files


def other_png(rng: Rng, content: bytes) -> bytes:
    """A PNG with whole checksums: another size or kind of pixels, a chunk changed, doubled or left out, other compressed pixels."""
    chunks = list(png_chunks(content))
    for _ in range(rng.integers(1, 3)):
        i, kind = int(rng.integers(0, len(chunks))), rng.integers(0, 6)
        name, inside = chunks[i]
        if kind < 2:
            sizes = struct.pack(">II", *(int(s) for s in rng.choice([0, 1, 32, 33, 2**16, 2**31 - 1, 2**32 - 1], 2)))
            modes = bytes(int(b) for b in rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255], 5))
            chunks[0] = (b"IHDR", (sizes if kind else chunks[0][1][:8]) + modes)
        elif kind == 2:
            chunks[i] = (OTHER_CHUNKS[int(rng.integers(0, len(OTHER_CHUNKS)))], mutated(inside, rng))
        elif kind == 3:
            chunks[i:i] = [(name, inside)] * int(rng.integers(1, 3))
        elif kind == 4 and len(chunks) > 1:
            del chunks[i]
        else:  # pixels that inflate to fewer, others or far more
            size = int(rng.choice([0, 1, 100, 3104, 3105, 2**22]))
            chunks[i] = (name, zlib.compress(rng.bytes(min(size, 4000)).ljust(size, b"\0"), 1))
    return content[:8] + b"".join(
        struct.pack(">I", len(inside)) + name + inside + struct.pack(">I", zlib.crc32(name + inside))
        for name, inside in chunks
    )


OTHER_CHUNKS = [b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"acTL", b"fdAT", b"eXIf", b"sBIT"]  # fmt: skip


def png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and inside of every chunk of a whole PNG."""
    place = 8
    while place < len(content):
        size = struct.unpack(">I", content[place : place + 4])[0]
        yield content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        place += 12 + size


def other_jpeg(rng: Rng, content: bytes) -> bytes:
    """Another width and height in the frame header of a JPEG, and perhaps more."""
    changed = bytearray(content)
    frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    changed[frame + 5 : frame + 9] = struct.pack(">HH", *(int(s) for s in rng.choice([0, 1, 32, 33, 2**16 - 1], 2)))
    return mutated(bytes(changed), rng) if rng.random() < 0.5 else bytes(changed)


def read_image(path: Path) -> object:
    return data._read_images([path], (32, 32), 32, lambda image: image)


READERS = {
    reader.name: reader
    for reader in (
        Reader("config.yaml", experiment.Config.from_yaml, ValueError, configs, with_tokens(YAML)),
        Reader("images-idx3-ubyte", read_idx, data.DataError, idx_files, other_idx_header),
        Reader("images-idx3-ubyte.gz", read_packed_idx, data.DataError, lambda: [gzip.compress(f) for f in idx_files()],
               lambda rng, content: packed(other_idx_header)(rng, gzip.decompress(content))),
        Reader("train_32x32.mat", data._read_mat, data.DataError, mat_files, other_mat_element),
        Reader("model.safetensors", checkpoints.load, checkpoints.CheckpointError, safetensors_files, other_safetensors_header),
        Reader("metrics.json", read_metrics, checkpoints.CheckpointError, metrics_files, other_sealed_metrics),
        Reader("image.png", read_image, data.DataError, image_files("PNG"), other_png),
        Reader("image.jpg", read_image, data.DataError, image_files("JPEG"), other_jpeg),
    )
}  # fmt: skip


class WrongEnding(Exception):
    """A reader ended in something else than success or its own clear error."""


def judge(reader: Reader, path: Path) -> str:
    """ "read" or "refused"; raises what else it ended in."""
    try:
        reader.read(path)
    except reader.error as error:
        if path.name not in str(error) and f"{path.parent}/" not in str(error):  # or one that it names
            raise WrongEnding("the message does not name the file") from error
        chain: BaseException | None = error
        while chain is not None:
            if isinstance(chain, MemoryError):
                raise WrongEnding("memory was asked for before the file was understood") from error
            chain = chain.__cause__ or chain.__context__
        return "refused"
    return "read"


def fuzz(reader: Reader, count: int, seed: int, folder: Path) -> Counter[str]:
    """`count` damaged files, each written to `folder` and read; the first wrong ending leaves its file there."""
    rng, seeds, counts = np.random.default_rng(seed), reader.seeds(), Counter[str]()
    path = folder / reader.name
    for content in seeds:
        path.write_bytes(content)
        in_time(reader, path)
    for _ in range(count):
        content = seeds[int(rng.integers(0, len(seeds)))]
        kind = rng.random()
        if kind < 0.1:  # two files spliced
            other = seeds[int(rng.integers(0, len(seeds)))]
            content = content[: int(rng.integers(0, len(content) + 1))] + other[int(rng.integers(0, len(other) + 1)) :]
        elif kind < 0.5:
            content = mutated(content, rng)
        else:
            content = reader.structured(rng, content)
        path.write_bytes(content)
        counts[in_time(reader, path)] += 1
    return counts


def in_time(reader: Reader, path: Path) -> str:
    """`judge`; without an answer the process is ended, whether it computes (a busy machine takes none of that time) or waits."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(30 * SECONDS)
    try:
        return judge(reader, path)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


@contextmanager
def limited_memory() -> Iterator[None]:
    """At most `MEMORY` bytes of address space more than this process has now."""
    with torch.device("meta"):
        torch.zeros(2)  # imports what it needs
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> None:
    name, count, seed, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with limited_memory():
        print(json.dumps(fuzz(READERS[name], count, seed, folder)))


if __name__ == "__main__":
    main()
