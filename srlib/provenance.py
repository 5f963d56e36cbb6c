"""Which code made a result: the srlib modules that it can reach, their hash, and the machine and versions it ran on.

Reached is read off the source text, without importing anything, so a result depends on the modules its code names and not on the whole
library. The hash is of the syntax tree: comments, docstrings and formatting do not change it, nor does the version of Python.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

LIBRARY = Path(__file__).parent
PACKAGE = LIBRARY.name


def imported_modules(entries: Iterable[str]) -> list[str]:
    """The modules of srlib that `entries` (such as "srlib.experiment") reach by imports anywhere in their text, themselves included.

    A name that a package re-exports leads to the module that defines it, so `srlib.short_run` reaches `srlib.langevin` alone. The
    package's own `__init__` is counted only where it is used as a whole (`from srlib import *`) or defines the name itself.

    Raises:
        ValueError: an entry or an import names no module of srlib.
    """
    reached: set[str] = set()
    waiting = [module for entry in entries for module in _resolve(entry)]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += [found for name in _named(*_source(module), module) for found in _resolve(name)]
    return sorted(reached)


def notebook_modules(cells: Iterable[str]) -> list[str]:
    """The modules of srlib that the code cells of a notebook reach together; lines with IPython's % and ! are skipped."""
    lines = [line for cell in cells for line in cell.splitlines() if not line.lstrip().startswith(("%", "!"))]
    names = _names(ast.parse("\n".join(lines)), None)
    return imported_modules(sorted({module for name in names for module in _resolve(name)}))


def source_hash(modules: Iterable[str]) -> str:
    """The sha256 of the modules' code in hexadecimal, blind to comments, docstrings and formatting."""
    digest = hashlib.sha256()
    for module in sorted(modules):
        digest.update(f"({module!r}, {_code(*_source(module))})".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """The sha256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Versions, platform and hardware, to be kept with a result. `device` is the torch device that the work was done on."""
    import torch

    from . import __version__, distributed

    return {
        "python": platform.python_version(),
        "srlib": __version__,
        **{name: _version(name) for name in ("torch", "torchvision", "numpy")},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "processes": distributed.n_processes(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device),
    }


def peak_memory() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _path(module: str) -> Path | None:
    """The source file of a module of the library, None if there is no such module."""
    base = LIBRARY.joinpath(*module.split(".")[1:])
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


def _source(module: str) -> tuple[str, str]:
    """The text of a module of the library and the name of its file."""
    path = _path(module)
    if path is None:
        raise ValueError(f"there is no module {module}")
    return path.read_text(encoding="utf-8"), str(path)


# Kept, since a pipeline asks for the same modules again for each of its jobs.
_parsed = functools.cache(ast.parse)


@functools.cache
def _code(text: str, filename: str) -> str:
    return repr(_canonical(_parsed(text, filename)))


@functools.cache
def _named(text: str, filename: str, module: str) -> tuple[str, ...]:
    return tuple(_names(_parsed(text, filename), module))


def _resolve(name: str) -> set[str]:
    """The modules behind a dotted name: the module itself, or the one from which a package re-exports it."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return set()
    module = PACKAGE
    for position, part in enumerate(parts[1:], start=1):
        if not _is_package(module):
            break  # the rest are attributes of a plain module
        if _path(f"{module}.{part}"):
            module = f"{module}.{part}"
            continue
        if part.startswith("__"):
            return set()  # __version__, __file__ and the like are no code
        exported = _exports(module).get(part)
        return _resolve(".".join([exported, *parts[position + 1 :]])) if exported else {_existing(module, name)}
    return {_existing(module, name)}


def _existing(module: str, name: str) -> str:
    if _path(module) is None:
        raise ValueError(f"there is no module {module} (wanted for {name})")
    return module


def _is_package(module: str) -> bool:
    path = _path(module)
    return path is None or path.name == "__init__.py"


def _exports(package: str) -> dict[str, str]:
    """Name -> full dotted name, for what the package's `__init__` imports from its own library."""
    return {
        alias.asname or alias.name: f"{base}.{alias.name}"
        for node in _parsed(*_source(package)).body
        if isinstance(node, ast.ImportFrom) and (base := _base(node, package)).split(".")[0] == PACKAGE
        for alias in node.names
    }


def _base(node: ast.ImportFrom, module: str | None) -> str:
    """The absolute module of `from ... import`, relative ones being seen from `module`."""
    if not node.level:
        return node.module or ""
    if module is None:
        raise ValueError("a notebook cannot use relative imports")
    parts = module.split(".")
    steps = node.level - _is_package(module)
    parts = parts[: len(parts) - steps]
    return ".".join([*parts, node.module] if node.module else parts)


def _names(tree: ast.Module, module: str | None) -> Iterator[str]:
    """Every dotted name of the library that the text of `module` (None: a notebook) imports or uses."""
    aliases: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == PACKAGE or (alias.name.startswith(f"{PACKAGE}.") and not alias.asname):
                    aliases.add(alias.asname or PACKAGE)
                if alias.name.startswith(f"{PACKAGE}."):
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module)
            if base.split(".")[0] == PACKAGE:
                yield from (base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names)
    if aliases:
        yield from _attributes(tree, aliases)


def _attributes(node: ast.AST, aliases: set[str]) -> Iterator[str]:
    """The longest attribute chains on the imported package, `srlib.a.b` and not also `srlib.a`; `srlib` alone is the whole of it."""
    chain: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        chain.append(inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name) and inner.id in aliases:
        yield ".".join([PACKAGE, *reversed(chain)])
        return
    for child in ast.iter_child_nodes(node):
        yield from _attributes(child, aliases)


def _canonical(node: object) -> object:
    """A syntax tree as nested tuples without docstrings, positions and empty fields (which differ between versions of Python)."""
    if isinstance(node, ast.AST):
        fields = dict(ast.iter_fields(node))
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            fields["body"] = node.body[1:]
        kept = (
            (name, value)
            for name, value in sorted(fields.items())
            if value is not None and value != [] and name != "kind"
        )
        return (type(node).__name__, *((name, _canonical(value)) for name, value in kept))
    if isinstance(node, list):
        return tuple(_canonical(item) for item in node)
    return repr(node)
