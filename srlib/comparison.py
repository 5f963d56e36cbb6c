"""All systems side by side: the rows of Tables 1 and 2, read from the runs that a profile has left behind.

The runs of these tables are named SYSTEM-DATASET, with -L and the number of layers where a system has several. What a run is,
its configuration says. Its name says two things more: "-time" at the end stands for training as long as the short run system
instead of for as many updates, and "abp-persistent" for ABP with the short run system's settings instead of its own. All
other runs of a profile, such as those of the step size, belong to no table here.
"""

from __future__ import annotations

import inspect
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from . import checkpoints
from .experiment import verified_metrics

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure
    from torch import Tensor

# Names for readers, in the order of the tables.
SYSTEMS = {
    "short_run": "short run",
    "ladder_vae": "ladder VAE",
    "vae": "VAE",
    "iaf": "VAE + IAF",
    "abp": "ABP",
    "abp_persistent": "ABP, our settings",  # those of the short run
    "glo": "GLO",
    "glow": "Glow",
}
DATASETS = {
    "digits": "digits",
    "colour_digits": "colour digits",
    "mnist": "MNIST",
    "colour_mnist": "colour MNIST",
    "svhn": "SVHN",
    "celeba32": "CelebA 32",
    "celeba64": "CelebA 64",
}
# Datasets whose images, and reconstructions beside them, may be passed on; the first that was run is shown in pictures.
PICTURED = ("digits", "mnist", "colour_digits")
# Differences of fewer standard errors decide nothing; where these come from few seeds, more are needed (see `gap`).
DECISIVE = 2.0
CONFIDENCE = 0.95
ONE_SEED = "†"  # behind a number whose error is over images, not over trainings
PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"  # a number and its error stay on one line


class Row(NamedTuple):
    """A row of a table; row.name is the system's, str(row) has the number of layers too."""

    system: str  # of SYSTEMS
    n_layers: int
    equal_time: bool = False

    @property
    def name(self) -> str:
        return SYSTEMS[self.system]

    def __str__(self) -> str:
        return f"{self.name}, L = {self.n_layers}"


@dataclass(frozen=True)
class Run:
    """A finished run and what it wrote into metrics.json."""

    directory: Path
    metrics: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.metrics["config"]

    @property
    def dataset(self) -> str:
        return self.config["dataset"]

    @property
    def row(self) -> Row:
        name, system = self.config["name"], self.config["system"]
        n_layers = len(self.config["latent_dims"])
        if system == "glow":  # its levels; latent_dims means nothing to it
            n_layers = self.options["n_levels"]
        elif name.startswith("abp-persistent"):
            system = "abp_persistent"
        return Row(system, n_layers, name.endswith("-time"))

    @property
    def options(self) -> dict[str, Any]:
        """The system's own options, with the defaults of those that the configuration leaves out."""
        defaults: dict[str, Any] = {}
        if self.config["system"] == "glow":
            from .baselines.glow import DEFAULTS as defaults
        elif self.config["system"] == "glo":
            from .baselines.glo import GLO

            defaults = {name: p.default for name, p in inspect.signature(GLO).parameters.items()}
        elif self.config["system"] == "abp":
            defaults = {"test_steps": self.config["n_steps"]}
        return {**defaults, **self.config["options"]}

    @property
    def gradients_per_image(self) -> int:
        """Gradients with respect to the latents that the inference of one image takes; 0 where it is a pass of a network."""
        system = self.config["system"]
        if system == "short_run":
            return self.config["n_steps"]
        if system == "abp":
            return self.options["test_steps"]
        if system == "glo":
            return self.options["n_starts"] * self.options["inference_steps"]
        return 0


class Score(NamedTuple):
    """A mean over seeds. standard_error: over seeds where there are several, else over images; None where unknown.

    by_seed : the values that it is the mean of, where they are known.
    """

    value: float
    standard_error: float | None
    n_seeds: int
    by_seed: Mapping[int, float] = MappingProxyType({})


class Gap(NamedTuple):
    """The difference of two scores and its standard error.

    decisive : how many standard errors decide; one_seed : whether one of the two is a single training, the error of which is over images.
    """

    value: float
    standard_error: float
    decisive: float = DECISIVE
    one_seed: bool = False

    @property
    def lower(self) -> str:
        """Whether the first score is lower: "yes", "no", or "undecided" within `decisive` standard errors."""
        if abs(self.value) <= self.decisive * self.standard_error:
            return "undecided"
        return "yes" if self.value < 0 else "no"

    @property
    def answer(self) -> str:
        """`lower` as a table shows it."""
        return self.lower + ONE_SEED * (self.one_seed and self.lower != "undecided")

    def __str__(self) -> str:
        digits = 4 if abs(self.value) < 1 and self.standard_error < 0.1 else 2
        value = round(self.value, digits) + 0.0  # no -0.00
        return f"{value:+.{digits}f}{PLUS_MINUS}{self.standard_error:.{digits}f}"


Reader = Callable[[dict[str, Any]], "tuple[float, float | None] | None"]


def finished_runs(results: Path, seeds: Iterable[int]) -> list[Run]:
    """The runs in a profile's folder that belong to the tables, in their order, checksums verified."""
    known, systems, datasets = set(seeds), list(SYSTEMS), list(DATASETS)
    runs = [Run(path.parent, verified_metrics(path.parent)) for path in results.glob("*/metrics.json")]
    return sorted(
        (run for run in runs if run.config["seed"] in known and _of_the_tables(run.config)),
        key=lambda run: (
            datasets.index(run.dataset),
            run.row.equal_time,
            systems.index(run.row.system),
            run.row.n_layers,
            run.config["seed"],
        ),
    )


def diverged_runs(results: Path) -> list[Run]:
    """The runs of the tables whose training diverged, whatever their seed: configurations without scores."""
    records = [(path, checkpoints.read_json(path)) for path in sorted(results.glob("*/diverged.json"))]
    runs = [Run(path.parent, record) for path, record in records if "config" in record]
    return [run for run in runs if _of_the_tables(run.config)]


def score(runs: Iterable[Run], dataset: str, row: Row, read: Reader) -> Score | None:
    """What `read` finds in the metrics of this row's runs; None where there is none, "not run in this profile"."""
    return mean_score({r.config["seed"]: read(r.metrics) for r in runs if r.dataset == dataset and r.row == row})


def mean_score(found: Mapping[int, tuple[float, float | None] | None]) -> Score | None:
    """The score of several trainings from what a `Reader` finds in each, by seed; None where it found nothing."""
    pairs = {seed: pair for seed, pair in found.items() if pair is not None}
    if not pairs:
        return None
    values, n = {seed: value for seed, (value, _) in pairs.items()}, len(pairs)
    mean = sum(values.values()) / n
    if n == 1:
        return Score(mean, next(iter(pairs.values()))[1], 1, values)
    return Score(mean, statistics.stdev(values.values()) / n**0.5, n, values)


def gap(score: Score, other: Score) -> Gap:
    """score - other: of the seeds that both have, in pairs, with Student's quantile in the place of `DECISIVE`.

    Where they have not two seeds in common, the difference of the means as if the two were independent (for errors over the same images
    this is on the safe side); if one of them is over seeds, with the degrees of freedom of Welch (1947).
    """
    shared = score.by_seed.keys() & other.by_seed.keys()
    if len(shared) > 1:
        differences = [score.by_seed[seed] - other.by_seed[seed] for seed in shared]
        error = statistics.stdev(differences) / len(shared) ** 0.5
        return Gap(statistics.fmean(differences), error, _student(len(shared) - 1))
    both = (score, other)
    parts = [(s.standard_error or 0.0) ** 2 for s in both]
    few = sum(part**2 / (s.n_seeds - 1) for s, part in zip(both, parts) if s.n_seeds > 1)
    decisive = _student(sum(parts) ** 2 / few) if few else DECISIVE
    return Gap(score.value - other.value, sum(parts) ** 0.5, decisive, min(s.n_seeds for s in both) < 2)


def _student(freedom: float) -> float:
    """How many standard errors make Student's interval."""
    from scipy.stats import t

    return max(DECISIVE, float(t.ppf(0.5 + CONFIDENCE / 2, freedom)))


def cell(runs: Iterable[Run], diverged: Iterable[Run], dataset: str, row: Row, read: Reader, digits: int = 4) -> str:
    """A score as a table shows it, or why there is none; `ONE_SEED` where its error is over images; how many trainings diverged.

    runs, diverged : what `finished_runs` and `diverged_runs` find in the folder of a profile.
    """
    runs, lost = [*runs], [run for run in diverged if (run.dataset, run.row) == (dataset, row)]
    found = score(runs, dataset, row, read)
    if found is None:
        there = any(run.dataset == dataset and run.row == row for run in runs)
        return "no score" if there else "diverged" if lost else "not run"
    one = ONE_SEED if found.n_seeds == 1 else ""
    error = "" if found.standard_error is None else f"{PLUS_MINUS}{found.standard_error:.{digits}f}{one}"
    return f"{found.value:.{digits}f}{error}" + (f" ({len(lost)} diverged)" if lost else "")


def squared_error(metrics: dict[str, Any]) -> tuple[float, float | None] | None:
    """A `Reader` of the mean squared error per pixel of reconstructions."""
    return metrics["scores"]["mse"], metrics["scores"]["mse_standard_error"]


def distance(kind: str, source: str) -> Reader:
    """A `Reader` of the distance from the data of samples from the "prior" or the "aggregate" posterior.

    kind : "fd" or "kid" on the features of our own network, or "fid". Raises ValueError for other kinds and sources.
    """
    for name, value, known in (("kind", kind, ("fd", "kid", "fid")), ("source", source, ("prior", "aggregate"))):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")

    def read(metrics: dict[str, Any]) -> tuple[float, float | None] | None:
        found = metrics["scores"].get(f"samples_{source}_inception" if kind == "fid" else f"samples_{source}", {})
        name = distance_name(found, kind)
        return None if name is None else (found[name], found[f"{name}_standard_error"])

    return read


def distance_name(samples: dict[str, Any], kind: str) -> str | None:
    """fid, fd_<network> or kid_<network>, as `evaluate_samples` has named it; None where there is none of this kind."""
    ends = ("_standard_error", "_extrapolated", "_refused")
    return next((name for name in samples if name.split("_")[0] == kind and not name.endswith(ends)), None)


def entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a YAML file that is a list of mappings. Raises ValueError for any other."""
    found = checkpoints.read_yaml(path)
    if not isinstance(found, list):
        raise ValueError(f"{path} holds {found!r:.80}; it must be a list of entries, such as - {{name: value}}")
    for entry in found:
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: the entry {entry!r:.80} must be a mapping, such as {{name: value}}")
    return found


def paper_tables(path: Path) -> dict[tuple[int | str, str, int, str, str], float]:
    """(table, system, layers, dataset, "mse" or "fid") -> the number that the paper prints.

    Raises ValueError for a file that is no list of rows, and a row that is not complete.
    """
    found = {}
    for row in entries(path):
        try:
            where = None if "steps" in row else (row["table"], row["system"], row["layers"])
            numbers = [(d, name, value) for d in DATASETS for name, value in row.get(d, {}).items()]
        except (KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: the row {row!r} is not complete: {error}; give table, system, layers and, by dataset, {{mse: 0.1, fid: 10}}"
            ) from error
        if where is not None:
            found |= {(*where, dataset, name): value for dataset, name, value in numbers}
    return found


def table(rows: Iterable[Iterable[object]], columns: Iterable[str]) -> str:
    """A Markdown table of texts and whole numbers, as they are: texts are Markdown, whose links, formulas and HTML are shown as such.

    So texts of strangers are to be escaped (`html.escape`) before. A "|" would end a cell, and becomes "\\|" where it is not yet.
    Raises ValueError unless each row has an entry for each column.
    """
    import pandas as pd

    rows, columns = ([[*_iterated("rows", row)] for row in _iterated("rows", rows)], [*_iterated("columns", columns)])
    if wrong := [row for row in rows if len(row) != len(columns)]:
        raise ValueError(f"rows hold {wrong[0]!r}; give an entry for each of columns={columns!r}")
    shown, *cells = [
        [re.sub(r"(?<!\\)\|", r"\|", v) if isinstance(v, str) else v for v in row] for row in (columns, *rows)
    ]
    return pd.DataFrame(cells, columns=shown).to_markdown(index=False, disable_numparse=True)


def listed(names: Iterable[str]) -> str:
    """a, b and c. Raises ValueError where there is nothing to list."""
    names = [*_iterated("names", names)]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names={names!r} must be at least one text")
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def prose(text: str) -> Markdown | None:
    """Sentences of the book; None where there is nothing to say, since a page shows empty Markdown as the name of an object."""
    from IPython.display import Markdown

    return Markdown(text) if text.strip() else None


def pictures(rows: Mapping[str, Tensor]) -> Figure:
    """`plots.image_rows`, or a figure that says so where the profile has none of these runs."""
    import matplotlib.pyplot as plt

    from . import plots

    if rows:
        return plots.image_rows(rows)
    figure, axis = plt.subplots(figsize=(8, 0.8))
    axis.text(0.5, 0.5, "not run in this profile", ha="center", va="center")
    axis.set_axis_off()
    return figure


def _iterated(name: str, values: Iterable[Any]) -> Iterable[Any]:
    if not isinstance(values, Iterable):
        raise ValueError(f"{name}={values!r} must be a list")
    return values


def _of_the_tables(config: dict[str, Any]) -> bool:
    system = "abp(-persistent)?" if config["system"] == "abp" else config["system"]
    return re.fullmatch(rf"{system}-{config['dataset']}(-L\d+)?(-time)?", config["name"]) is not None
