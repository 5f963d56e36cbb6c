"""What measurements of trainings say of an effect: its size, its interval, and a file that keeps what was measured.

A measurement is a function of one training, or of several with the same seed, that returns values, one per image or a single one. It may
take minutes and needs weights, which few clones have. So `measured` makes a quantity of it, which takes what `Kept` still has from an
earlier call with the same runs, options and code, and summarises the values of all seeds as `Evidence`, anew each time.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import checkpoints, provenance
from .comparison import CONFIDENCE
from .experiment import WEIGHTS, has_weights, verified_metrics
from .experiment import modules as modules_of_system

ALIKE = 1e-5  # of the largest: what float32 and sums in another order leave of equal values
Seeds = Mapping[int, Path]  # seed -> the folder of a run
Values = list[float]


class Evidence(NamedTuple):
    """An effect and its 95 % interval; of: what the interval is over, such as "3 seeds" or "1000 images"."""

    effect: float
    lower: float
    upper: float
    of: str


NO_COMMON_SEED = Evidence(math.nan, -math.inf, math.inf, "no common seed")
NO_WEIGHTS = Evidence(math.nan, -math.inf, math.inf, "runs without their weights")
NOT_FINITE = Evidence(math.nan, -math.inf, math.inf, "values that are no finite numbers")
NO_FACTORS = Evidence(math.nan, -math.inf, math.inf, "images without known factors")


def alike(values: Sequence[float]) -> bool:
    """Whether values are the same but for rounding, such as one point of a grid for all seeds: this says nothing about the next one."""
    return max(values) - min(values) <= ALIKE * max(map(abs, values))


def over(values: Sequence[float], of: str) -> Evidence:
    """The mean of independent values with Student's interval, infinite where they show no spread. of: such as "seeds".

    Raises ValueError unless there is a value, and all are finite numbers.
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"values={values!r} must be a sequence of at least one number")
    if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v)]:
        raise ValueError(f"values hold {wrong[0]!r}; leave out what is no finite number")
    from scipy.stats import t

    n = len(values)
    if n == 1 or alike(values):
        return Evidence(values[0], -math.inf, math.inf, f"{n} {of if n > 1 else of.removesuffix('s')}")
    effect = statistics.fmean(values)
    half = statistics.stdev(values) / math.sqrt(n) * float(t(n - 1).ppf(0.5 + CONFIDENCE / 2))
    return Evidence(effect, effect - half, effect + half, f"{n} {of}")


def mean(values: Sequence[Values]) -> Evidence:
    """The mean over seeds of their means over images; of one seed, whose interval is over images."""
    if len(values) > 1:
        return over([statistics.fmean(of_seed) for of_seed in values], "seeds")
    return over(values[0], "images")._replace(of="1 seed, over images")


def mean_of_factors(values: Sequence[Values]) -> Evidence:
    """The mean over seeds of one value each; images without known factors have none."""
    return mean_over_seeds(values) if all(values) else NO_FACTORS


def mean_over_seeds(values: Sequence[Values]) -> Evidence:
    """The mean over seeds of one value each."""
    return over([value for (value,) in values], "seeds")


def share_of_images(values: Sequence[Values]) -> Evidence:
    """The share of the images that have a 1 and no 0, its mean over seeds.

    The interval holds those of Clopper and Pearson, over images, of all seeds: equal shares would have none over seeds.
    """
    from scipy.stats import beta

    n, found = len(values[0]), [int(sum(of_seed)) for of_seed in values]
    low, high = min(found), max(found)
    lower = float(beta.ppf(0.5 - CONFIDENCE / 2, low, n - low + 1)) if low else 0.0
    upper = float(beta.ppf(0.5 + CONFIDENCE / 2, high + 1, n - high)) if high < n else 1.0
    of = f"{n} images, {len(values)} seeds" if len(values) > 1 else "1 seed, over images"
    return Evidence(statistics.fmean(found) / n, lower, upper, of)


class Kept:
    """Values that were measured before, in the JSON file `path`, which grows with each measurement that it does not have.

    They are used for the same measurement of the same configurations and weights, with the same options and the same code: the
    measurement's, that of the systems, and that of the modules both reach. Raises CheckpointError for a file that was edited.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = self._read()

    def _read(self) -> dict[str, Any]:
        found = checkpoints.read_json(self.path).get("entries") if self.path.exists() else {}
        if not isinstance(found, dict):
            raise checkpoints.CheckpointError(f"{self.path} holds no measurements; delete it")
        return found

    def find(
        self, measure: Callable[..., Values], folders: Sequence[Path], options: Mapping[str, Any]
    ) -> Values | None:
        """What is kept of `measure(*folders, **options)`, or None."""
        entry = self._entries.get(_name(measure, folders, options))
        return entry["values"] if entry and entry | _origin(measure, folders) == entry else None

    def values(self, measure: Callable[..., Values], folders: Sequence[Path], options: Mapping[str, Any]) -> Values:
        """`measure(*folders, **options)`, kept or measured now; what JSON cannot hold, an infinity, is not kept."""
        found = self.find(measure, folders, options)
        if found is None:
            found = measure(*folders, **options)
            if all(map(math.isfinite, found)):
                entry = {"values": found, **_origin(measure, folders)}
                # another process may have measured something else meanwhile
                self._entries = self._read() | {_name(measure, folders, options): entry}
                checkpoints.write_json(self.path, {"entries": dict(sorted(self._entries.items()))})
        return found


def measured(
    unit: str, summary: Callable[[Sequence[Values]], Evidence] = mean
) -> Callable[..., Callable[..., Evidence]]:
    """A decorator, which makes a quantity of a measurement: a function of runs, each a mapping of seeds to folders, and options.

    The quantity is over the seeds that all of the runs have; nothing is told where one has to be measured and is here without its weights.
    It has the attributes `measure`, the function itself, and `unit`.
    """

    def decorate(measure: Callable[..., Values]) -> Callable[..., Evidence]:
        @functools.wraps(measure)
        def quantity(*runs: Seeds, kept: Kept | None = None, **options: Any) -> Evidence:
            together = folders_by_seed(runs)
            if not together:
                return NO_COMMON_SEED
            if kept is None:
                values = [measure(*folders, **options) for folders in together]
            elif any(kept.find(measure, f, options) is None and not all(map(has_weights, f)) for f in together):
                return NO_WEIGHTS
            else:
                values = [kept.values(measure, folders, options) for folders in together]
            return summary(values) if all(map(math.isfinite, itertools.chain(*values))) else NOT_FINITE

        quantity.measure, quantity.unit = measure, unit  # type: ignore[attr-defined]
        return quantity

    return decorate


def folders_by_seed(runs: Sequence[Seeds]) -> list[list[Path]]:
    """The folders of several runs for each seed that all of them have."""
    shared = sorted(set.intersection(*(set(seeds) for seeds in runs)))
    return [[seeds[seed] for seeds in runs] for seed in shared]


def _name(measure: Callable[..., Values], folders: Sequence[Path], options: Mapping[str, Any]) -> str:
    told = [f"{name}={value!r}" for name, value in sorted(options.items())]
    return f"{measure.__name__}({', '.join([*(folder.name for folder in folders), *told])})"


def _origin(measure: Callable[..., Values], folders: Sequence[Path]) -> dict[str, Any]:
    systems = frozenset(verified_metrics(folder)["config"]["system"] for folder in folders)
    return {"systems": [_trained(folder) for folder in folders], "code": code_hash(measure, systems)}


def _trained(folder: Path) -> str:
    """A hash of what a run trained: its configuration and weights. Scores, times and marks may change."""
    metrics = verified_metrics(folder)
    weights = {name: written for name, written in metrics["files"].items() if name.endswith(WEIGHTS)}
    return checkpoints.checksum({"config": metrics["config"], "weights": weights})


@functools.cache
def code_hash(function: Callable[..., Any], systems: frozenset[str] = frozenset()) -> str:
    """The sha256 of a function's code: its own, that of what it names in its module, and the modules of srlib that these reach.

    Like `provenance.source_hash` it is blind to comments, docstrings and formatting; to decorators and annotations too.

    systems : which it is to measure; a configuration names them as text, so that no import leads to them.
    """
    path = sys.modules[function.__module__].__file__
    tree = ast.parse(Path(str(path)).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list, node.returns = [], None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.ImportFrom) and node.level:  # the modules of measurements lie at the top of the package
            node.module, node.level = ".".join(filter(None, [provenance.PACKAGE, node.module])), 0
    defined = {name: node for node in tree.body for name in _defines(node)}
    reached: dict[str, ast.stmt] = {}
    waiting = [function.__name__]
    while waiting:
        name = waiting.pop()
        if name in defined and name not in reached:
            reached[name] = defined[name]
            waiting += [found.id for found in ast.walk(defined[name]) if isinstance(found, ast.Name)]
    body = [node for node in tree.body if node in reached.values()]
    modules = {*provenance.notebook_modules([ast.unparse(ast.Module(body, []))])}.union(
        *map(modules_of_system, systems)
    )
    digest = hashlib.sha256(provenance.source_hash(modules).encode())
    # private, but the same reading of a tree: whatever changes it changes the hashes of all results
    digest.update(repr([provenance._canonical(node) for node in body]).encode())
    return digest.hexdigest()


def _defines(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
