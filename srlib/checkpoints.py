"""Files that are either whole or absent, and say so when they are not.

Tensors go into safetensors files, whose header carries JSON metadata; results go into JSON files. Both hold their own checksum.
Both are written to a temporary file, flushed to the disk and renamed, so an interruption leaves the old file or the new one.
Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "srlib"
LARGEST_YAML = 2**20  # bytes
LONGEST_NUMBER = 100  # characters: YAML takes time that grows with their square
LARGEST_JSON = 2**28  # bytes: the history of some million updates


class CheckpointError(ValueError):
    """A file that is missing, truncated, edited, or not one of ours."""


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path`, whose folder must exist, so that nobody ever sees a part of it.

    Raises:
        OSError: no room, no permission or no folder; the message names `path`, and what was there before stays.
    """
    path = Path(path)
    try:
        _write_and_rename(path, content)
    except OSError as error:
        told = f"it could not be written, what was there before stays ({error.strerror or error})"
        raise OSError(error.errno, told, str(path)) from error
    _flush_folder(path.parent)


def _write_and_rename(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a result is to be read by everybody
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut; systems that cannot open a folder (Windows) do it by themselves."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Save named tensors (any device, shape and dtype) and `metadata` to the safetensors file `path`.

    Raises:
        CheckpointError: JSON cannot hold `metadata`, or it has a key "checksum".
    """
    from safetensors.torch import save as to_bytes

    # copies: safetensors refuses tensors that share their memory
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    if "checksum" in metadata:
        raise CheckpointError(f'{path}: the key "checksum" is reserved')
    try:
        plain = json.loads(json.dumps(metadata))  # as a reader will find it
        text = json.dumps({**plain, "checksum": _checksum(whole, plain)}, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata cannot be written as JSON ({error})") from error
    # one entry: the order of several would differ from file to file
    atomic_write(path, to_bytes(whole, metadata={METADATA_KEY: text}))


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """The sha256 of all that a checkpoint holds."""
    import torch

    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError for a pipe or a device, whose reader might wait for ever, and OSError where there is nothing."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder the system itself says what it is
        raise CheckpointError(f"{path} is no file, but a pipe or a device; remove it")


def load(path: str | os.PathLike[str], device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on `device`, and the metadata that `save` wrote to `path`.

    Raises:
        CheckpointError: the file is missing, truncated, changed, or was not written by `save`.
        OSError: it is there, but cannot be read; it may be whole.
        ValueError: there is no such device, or it has no room for the tensors.
    """
    from safetensors import safe_open

    try:
        check_file(path)
        with open(path, "rb"):  # of what the system says safetensors makes errors of its own
            pass
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            if not isinstance(metadata, dict):
                raise CheckpointError(f"{path} has no srlib metadata: it was not written by srlib.checkpoints.save")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            # the oldest files have none
            written = metadata.pop("checksum", None)
            if written is not None and written != _checksum(tensors, metadata):
                raise CheckpointError(f"{path} was changed: its checksum does not match; delete it and run again")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # SafetensorError, and what torch and json raise for sizes and depths beyond them
        raise CheckpointError(f"{path} is truncated or no checkpoint ({error}); delete it and run again") from error
    try:
        return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r}: {error}; {path} is whole, use device='cpu'") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML takes the last, endless numbers, and aliases that stand for more than a file may hold."""

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        if root is not None and _expanded(root, {}) > LARGEST_YAML:
            raise yaml.constructor.ConstructorError(None, None, "aliases stand for too much", root.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # before merged ones are added
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        twice = sorted(key for key, count in keys.items() if count > 1)
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
            what = f"a number of {len(node.value)} characters"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        return super().construct_scalar(node)


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """The length of what `node` stands for with its aliases written out; infinite where one is inside itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        items = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 1
        known[id(node)] = own + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a YAML file.

    Raises:
        CheckpointError: it is none, gives a key twice, or is longer than `LARGEST_YAML` bytes, aliases written out.
    """
    check_file(path)
    with open(path, "rb") as file:
        content = file.read(LARGEST_YAML + 1)
    if len(content) > LARGEST_YAML:
        raise CheckpointError(f"{path} is longer than {LARGEST_YAML} bytes; a configuration is much shorter")
    try:
        return yaml.load(content, _Loader)  # a SafeLoader
    except Exception as error:  # YAMLError, and what its constructors raise for dates, numbers and depths that are none
        raise CheckpointError(f"{path} is no YAML that can be read: {error}") from error


def checksum(payload: dict[str, Any]) -> str:
    """The sha256 of the canonical JSON of `payload`, in hexadecimal, whatever the order of its keys."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: str | os.PathLike[str], payload: dict[str, Any]) -> None:
    """Write `payload` and its `checksum` to the JSON file `path`.

    Raises:
        CheckpointError: `payload` has a key "checksum", or holds what JSON cannot (a nan or infinity, a tensor, a key that is no string).
    """
    if "checksum" in payload:
        raise CheckpointError(f'{path}: the key "checksum" is reserved')
    try:
        # Through JSON and back, so that what is hashed is what a reader will find (tuples become lists, int keys strings).
        plain = json.loads(json.dumps(payload, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: this cannot be written as JSON ({error})") from error
    text = json.dumps({**plain, "checksum": checksum(plain)}, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(path, (text + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_json` wrote to `path`, "checksum" included.

    Raises:
        CheckpointError: the file is missing, no JSON, absurdly long, or differs from what was written.
        OSError: it is there, but cannot be read; it may be whole.
    """
    try:
        check_file(path)
        with open(path, "rb") as file:
            content = file.read(LARGEST_JSON + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"there is no result {path}; run what makes it") from None
    if len(content) > LARGEST_JSON:
        raise CheckpointError(f"{path} is longer than {LARGEST_JSON} bytes; delete it and run again")
    try:
        found = json.loads(content.decode())
        payload = {key: value for key, value in found.items() if key != "checksum"}
        expected = found.get("checksum")
        actual = checksum(payload)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or not JSON ({error}); delete it and run again") from error
    if expected != actual:
        raise CheckpointError(f"{path} was edited: its checksum does not match what is in it; delete it and run again")
    return found


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], refusal: str) -> Iterator[None]:
    """Only one process at a time; `path` is a folder, or a file that is made. The lock ends with its holder, however that ends.

    Raises:
        CheckpointError: another process holds it; the message begins with `refusal`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{refusal}; wait for it or stop it") from None
        except (ImportError, OSError):  # Windows and some shared disks have no such locks
            pass
        yield
    finally:
        os.close(descriptor)
