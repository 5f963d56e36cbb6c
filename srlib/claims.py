"""What the paper claims, and what the runs of a profile say to it: verdicts that are computed, never typed.

A claim (`papermill_runs/claims.yaml`) names a quantity, the runs it is measured on, and the interval in which the paper would have
it. The evidence is an effect with a 95 % interval, over seeds where a run has several, else over images; the verdict compares the two
intervals. A claim may have several cases, such as data sets and numbers of layers, each of which gets its own verdict; it is meant for all of
them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import checkpoints, comparison
from .comparison import CONFIDENCE
from .evidence import ALIKE, NO_COMMON_SEED, Evidence, Kept, Seeds, alike, folders_by_seed, over
from .experiment import verified_metrics
from .measurements import MEASURED

WHOSE = ("paper", "implied", "ours")  # who says so: the paper; what it says implies; we, who would like to know
ONE_SEED = " for one seed"  # errors over images do not tell how far another training would be
LETTERS = {"layers": "L", "n_steps": "K"}
HOLDS, FAILS, INCONCLUSIVE, MIXED = "holds", "fails", "inconclusive", "mixed"
NOT_RUN, DIVERGED, NOT_MEASURABLE = "not run", "diverged", "not measurable"


@dataclass(frozen=True)
class Case:
    """One measurement of a claim: the names of its runs, and what its quantity takes beside them."""

    runs: tuple[str, ...]
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """An entry of the ledger.

    name : its own; statement : the paper's words, or ours for what it implies; place : where the paper says so; whose : of WHOSE
    quantity : one of `QUANTITIES`; options : what that takes beside the runs
    above, below : the claim holds where the effect is between them
    runs : names of runs with {fields}; cases : field -> values, all combinations of which are looked at; a field that is in no
        name is an option
    foreseen : written before any of the runs that it judges had been made
    changed : profile -> what changed here after a run that it judges had been made in that profile, whose runs were to come after
    chapter : where the book looks at it more closely
    """

    name: str
    statement: str
    place: str
    quantity: str
    runs: tuple[str, ...]
    chapter: str
    above: float = -math.inf
    below: float = math.inf
    options: Mapping[str, Any] | None = None
    cases: Mapping[str, Sequence[Any]] | None = None
    whose: str = "paper"
    foreseen: bool = False
    changed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.whose not in WHOSE:
            raise ValueError(f"claim {self.name}: whose={self.whose!r} must be one of {', '.join(WHOSE)}")
        if not isinstance(self.foreseen, bool):
            raise ValueError(f"claim {self.name}: foreseen={self.foreseen!r} must be true or false")
        if not isinstance(self.changed, dict) or any(not isinstance(text, str) for text in self.changed.values()):
            raise ValueError(f"claim {self.name}: changed={self.changed!r} must say of a profile what changed")
        if self.quantity not in QUANTITIES:
            raise ValueError(
                f"claim {self.name}: quantity={self.quantity!r} is unknown; there are: {', '.join(QUANTITIES)}"
            )
        for bound, value in (("above", self.above), ("below", self.below)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"claim {self.name}: {bound}={value!r} must be a number")
        if not self.above < self.below or (self.above == -math.inf and self.below == math.inf):
            raise ValueError(
                f"claim {self.name}: nothing is between above={self.above} and below={self.below}, or everything"
            )

    @property
    def unit(self) -> str:
        """What the effect is in."""
        if self.quantity in MEASURED:
            return MEASURED[self.quantity].unit
        given = UNITS[QUANTITIES[self.quantity]]
        return given or {"mse": "MSE", "fd": "FD", "kid": "KID"}[(self.options or {})["score"]]

    def all_cases(self) -> list[Case]:
        """Every combination of the values in `cases`, one with an empty title where there are none."""
        fields = self.cases or {}
        found = []
        for values in itertools.product(*fields.values()):
            given = dict(zip(fields, values, strict=True))
            told = ", ".join(_title(name, value) for name, value in given.items())
            others = {
                name: value for name, value in given.items() if not any(f"{{{name}}}" in run for run in self.runs)
            }
            found.append(
                Case(tuple(run.format(**given) for run in self.runs), told, {**(self.options or {}), **others})
            )
        return found


class Judged(NamedTuple):
    """A case with its verdict; evidence is None where there is none."""

    case: Case
    verdict: str
    evidence: Evidence | None


def load_claims(path: Path) -> list[Claim]:
    """The ledger. Raises ValueError for a file that is no list, and an entry that is unknown, missing or twice there."""
    claims = []
    for entry in comparison.entries(path):
        try:
            if isinstance(entry["runs"], str):
                raise TypeError("runs must be a list of names")
            claims.append(Claim(**entry | {"runs": tuple(entry["runs"])}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: the claim {entry!r} is not complete, or has unknown entries: {error}") from error
    names = [claim.name for claim in claims]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: more than one claim has the name {', '.join(twice)}")
    return claims


def judge(claim: Claim, results: Path, at_most: float = math.inf, kept: Kept | None = None) -> list[Judged]:
    """The verdict on each case, from the runs in the folder `results` of a profile.

    at_most : for a preview, of images, and of evaluations in a search; kept : what was measured on trained systems in earlier
        calls, and is not measured again.

    Raises ValueError for what is no claim or no folder.
    """
    if not isinstance(claim, Claim) or not isinstance(results, Path):
        raise ValueError(f"claim={claim!r} must be a Claim, and results={results!r} a pathlib.Path")
    judged = []
    for case in claim.all_cases():
        runs = [_seeds(results, name) for name in case.runs]
        if all(runs):
            options = {**case.options}
            options |= {name: min(options[name], at_most) for name in ("n_images", "n_evaluations") if name in options}
            if claim.quantity in MEASURED:
                options["kept"] = kept
            evidence = QUANTITIES[claim.quantity](*runs, **options)
            if lost := sum(len([*results.glob(f"{name}-seed*/diverged.json")]) for name in case.runs):
                evidence = evidence._replace(of=f"{evidence.of} ({lost} diverged)")
            found = verdict(evidence, claim.above, claim.below)
            one_seed = evidence.of.startswith("1 seed") and found in (HOLDS, FAILS)
            judged.append(Judged(case, found + ONE_SEED if one_seed else found, evidence))
        else:
            missing = [name for name, found in zip(case.runs, runs, strict=True) if not found]
            lost = all(any(results.glob(f"{name}-seed*/diverged.json")) for name in missing)
            judged.append(Judged(case, DIVERGED if lost else NOT_RUN, None))
    return judged


def to_measure(claims: Sequence[Claim], results: Path, kept: Kept, renewed: Collection[str] = ()) -> set[str]:
    """The names of the folders in `results` whose trained systems `judge` will load: of what is not `kept`.

    renewed : names of folders whose runs will be made before that, again or for the first time.
    """
    fresh = [results / name for name in renewed]

    def seeds(name: str) -> dict[int, Path]:
        own = [folder for folder in fresh if folder.name.rpartition("-seed")[0] == name]
        return _seeds(results, name) | {int(folder.name.rpartition("-seed")[2]): folder for folder in own}

    def is_kept(claim: Claim, case: Case, folders: list[Path]) -> bool:
        try:
            return kept.find(MEASURED[claim.quantity].measure, folders, case.options) is not None
        except checkpoints.CheckpointError:  # a damaged run, which is to be made again
            return False

    return {
        folder.name
        for claim in claims
        if claim.quantity in MEASURED
        for case in claim.all_cases()
        for folders in folders_by_seed([seeds(name) for name in case.runs])
        if any(folder in fresh for folder in folders) or not is_kept(claim, case, folders)
        for folder in folders
    }


def verdict(evidence: Evidence, above: float, below: float) -> str:
    """Whether the whole interval of the evidence is between `above` and `below`, all outside on one side, or neither.

    What the runs do not tell, such as of known factors where the images have none, has no effect and is not measurable. Raises ValueError for bounds, or ends of the interval, in the wrong order.
    """
    if not isinstance(evidence, Evidence) or evidence.lower > evidence.upper:
        raise ValueError(f"evidence={evidence!r} must be an Evidence with lower <= upper")
    for name, bound in (("above", above), ("below", below)):
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):
            raise ValueError(f"{name}={bound!r} must be a number, infinite for no bound")
    if not above < below:
        raise ValueError(f"nothing is between above={above} and below={below}; give the lower bound as above")
    if math.isnan(evidence.effect):
        return NOT_MEASURABLE
    if above < evidence.lower and evidence.upper < below:
        return HOLDS
    return FAILS if evidence.upper <= above or evidence.lower >= below else INCONCLUSIVE


def overall(judged: Sequence[Judged]) -> str:
    """The verdict on all cases that were run and measured: it holds where all do, fails where one does and none holds, is mixed where both happen.

    Otherwise it is inconclusive, however many cases hold. It is "for one seed" where it rests on such a case.
    Raises ValueError where there are no cases.
    """
    if not judged:
        raise ValueError(f"judged={judged!r} has no cases; give at least one, as `judge` does")
    run = [case.verdict for case in judged if case.verdict not in (NOT_RUN, DIVERGED, NOT_MEASURABLE)]
    if not run:
        return min(case.verdict for case in judged)
    held, failed = ([found for found in run if found.removesuffix(ONE_SEED) == word] for word in (HOLDS, FAILS))
    if failed:
        weak = any(all(found.endswith(ONE_SEED) for found in side) for side in (held, failed) if side)
        return (MIXED if held else FAILS) + ONE_SEED * weak
    if len(held) == len(run):
        return HOLDS + ONE_SEED * any(found.endswith(ONE_SEED) for found in held)
    return INCONCLUSIVE


# --- quantities that the results of runs tell: functions of runs, each of which is a mapping of seeds to folders -------


def score_difference(ours: Seeds, *theirs: Seeds, score: str, source: str = "prior") -> Evidence:
    """Our score minus theirs, or minus the lowest of theirs where there are several (which is chosen in their favour).

    score : "mse", or "fd" or "kid" of samples from `source`, "prior" or "aggregate". The difference and its interval are those of
    `comparison.gap`, as in the chapters.
    """
    read = comparison.squared_error if score == "mse" else comparison.distance(score, source)
    first, *others = (
        comparison.mean_score({seed: read(verified_metrics(folder)) for seed, folder in seeds.items()})
        for seeds in (ours, *theirs)
    )
    others = [found for found in others if found is not None]
    if first is None or not others:
        return Evidence(math.nan, -math.inf, math.inf, "no scores")
    best = min(others, key=lambda found: found.value)
    gap, n_pairs = comparison.gap(first, best), len(first.by_seed.keys() & best.by_seed.keys())
    # without an error, or with seeds that differ alike but for rounding, nothing is said about another training
    half = gap.decisive * gap.standard_error if gap.standard_error > ALIKE * abs(gap.value) else math.inf
    fewer, more = sorted((first.n_seeds, best.n_seeds))
    unpaired = "1 seed, over images" if more == 1 else f"{fewer} seed{'s' * (fewer > 1)} against {more}"
    of = f"{n_pairs} seeds" if n_pairs > 1 else unpaired
    return Evidence(gap.value, gap.value - half, gap.value + half, of)


def end_of_search(runs: Seeds, *others: Seeds, reference: float = 1.0) -> Evidence:
    """log of the noise scale delta = sqrt(2 s) at the end of training over `reference`, or over that of other runs, seed by seed."""

    def ends(seeds: Seeds) -> dict[int, float]:
        return {seed: verified_metrics(folder)["scores"]["noise_scale"] for seed, folder in seeds.items()}

    first = ends(runs)
    others_ends = [ends(other) for other in others]
    both = sorted(first.keys() & (others_ends[0].keys() if others else first.keys()))
    if not both:
        return NO_COMMON_SEED
    return over([math.log(first[s] / (others_ends[0][s] if others else reference)) for s in both], "seeds")


def spread_of_ends(runs: Seeds) -> Evidence:
    """Standard deviation over seeds of log delta at the end of training; its interval is that of normal samples (chi square)."""
    from scipy.stats import chi2

    ends = [math.log(verified_metrics(folder)["scores"]["noise_scale"]) for folder in runs.values()]
    if len(ends) < 2:
        return Evidence(math.nan, -math.inf, math.inf, "1 seed")
    spread, free = statistics.stdev(ends), len(ends) - 1
    if alike(ends):  # the same point of a grid for all seeds: they differ by less than the grid can tell
        return Evidence(0.0, 0.0, math.inf, f"{len(ends)} seeds")
    lower, upper = (spread * math.sqrt(free / chi2.ppf(q, free)) for q in (0.5 + CONFIDENCE / 2, 0.5 - CONFIDENCE / 2))
    return Evidence(spread, lower, upper, f"{len(ends)} seeds")


def late_change(runs: Seeds, after: float = 0.5) -> Evidence:
    """Largest minus smallest log delta after a fraction of the training, its end included; s is taken relative to sigma^2, with which
    it anneals."""
    changes = []
    for folder in runs.values():
        history = checkpoints.read_json(folder / "history.json")["history"]
        delta = [math.sqrt(2 * s) for s in history["step_size"]]
        sigma = history["sigma"]
        # s may have been updated once more, after the last update of theta
        end = verified_metrics(folder)["scores"]["noise_scale"]
        relative = [math.log(d / v) for d, v in zip([*delta, end], [*sigma, sigma[-1]], strict=True)]
        late = relative[round(after * (len(delta) - 1)) :]
        changes.append(max(late) - min(late))
    return over(changes, "seeds")


def search_share(runs: Seeds) -> Evidence:
    """Share of the seconds of training that the updates of the step size took."""
    spent = [verified_metrics(folder)["seconds"] for folder in runs.values()]
    return over([seconds["step_size_search"] / seconds["training"] for seconds in spent], "seeds")


UNITS = {  # a score has its own
    score_difference: "", end_of_search: "log δ", spread_of_ends: "log δ", late_change: "log δ", search_share: "share of time",
}  # fmt: skip
QUANTITIES: dict[str, Callable[..., Evidence]] = {f.__name__: f for f in UNITS} | MEASURED


def _seeds(results: Path, name: str) -> dict[int, Path]:
    """Seed -> folder of the finished runs with this name."""
    found = {
        path.parent.name.rpartition("-seed")[2]: path.parent for path in results.glob(f"{name}-seed*/metrics.json")
    }
    return {int(seed): found[seed] for seed in sorted(found, key=lambda seed: (len(seed), seed)) if seed.isdecimal()}


def _title(field: str, value: object) -> str:
    return (
        comparison.DATASETS.get(str(value), str(value))
        if field == "dataset"
        else f"{LETTERS.get(field, field)} = {value}"
    )
