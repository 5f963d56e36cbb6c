"""The learning rate of every system, chosen on validation images, the same budget for each; writes benchmarks/tuning.json.

    python benchmarks/tuning.py [DATASET [SYSTEM ...]]

On each dataset of BUDGETS every system is trained with the same rates for the same number of updates, everything else as in its
row of the run matrix; the rate with the lowest mean squared error on (at most) 500 validation images is taken (for Glow, whose
reconstructions are exact, the fewest bits per dimension), and a test compares the matrices with it. Test images are not touched.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

import srlib
from srlib.evaluation.reconstruction import reconstructions, squared_error
from srlib.experiment import Config

HERE = Path(__file__).parent
RESULTS = HERE / "tuning.json"
SHAPE = (1.0, 1.0, 0.3)  # the learning rate goes down to this fraction of it in the last third
N_VALIDATION = 500


class Budget(NamedTuple):
    profile: str
    n_updates: int
    rates: tuple[float, ...]


BUDGETS = {
    "digits": Budget("digits", 200, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "svhn": Budget("reference", 150, (3e-4, 1e-3, 3e-3, 1e-2)),
    "celeba32": Budget("reference", 150, (3e-4, 1e-3, 3e-3, 1e-2)),
}
SYSTEMS = ("short_run", "ladder_vae", "vae", "iaf", "abp", "glo", "glow")


def row_name(system: str, dataset: str) -> str:
    """The row whose learning rate is chosen; other numbers of layers take it over."""
    return f"{system}-{dataset}-L3" if system in ("short_run", "ladder_vae") else f"{system}-{dataset}"


def row(system: str, dataset: str) -> dict[str, Any]:
    """The row of a system in the run matrix, its defaults filled in."""
    matrix = yaml.safe_load((HERE.parent / "papermill_runs" / f"{BUDGETS[dataset].profile}.yaml").read_text())
    (found,) = (r for r in matrix["runs"] if r["name"] == row_name(system, dataset))
    return {k: v for k, v in (matrix["defaults"] | found).items() if k != "seconds"}


def learning_rates(rate: float) -> list[float]:
    return [float(f"{rate * part:.3g}") for part in SHAPE]


def validation_score(system: str, rate: float, dataset: srlib.Dataset) -> float:
    """What is to be low: MSE on [-1, 1], or Glow's bits per dimension; inf where training failed."""
    n_updates = BUDGETS[dataset.name].n_updates
    given = row(system, dataset.name) | {"n_updates": n_updates, "learning_rates": learning_rates(rate)}
    trained = Config.from_dict(given).build(dataset.image_shape)
    rng = torch.Generator().manual_seed(1)
    try:
        trained.fit(dataset.train.images, Config.from_dict(given).plan(), rng, progress=False)
    except ArithmeticError:
        return float("inf")
    x = trained.as_input(dataset.validation.images[:N_VALIDATION])
    bits = trained.likelihood(x, rng).get("bits_per_dimension")
    return (squared_error(x, reconstructions(trained, x, rng)) if bits is None else bits).mean().item()


def tune(system: str, dataset: srlib.Dataset) -> dict[str, Any]:
    """What stands in tuning.json for one system on one dataset."""
    budget = BUDGETS[dataset.name]
    scores = {f"{rate:g}": validation_score(system, rate, dataset) for rate in budget.rates}
    return {
        "n_updates": budget.n_updates,
        "n_images": min(N_VALIDATION, len(dataset.validation.images)),
        "score": "bits per dimension" if system == "glow" else "mean squared error on [-1, 1]",
        "by_learning_rate": {k: v if v < float("inf") else "diverged" for k, v in scores.items()},
        "learning_rates": learning_rates(float(min(scores, key=scores.get))),
    }


def main(given: list[str]) -> None:
    torch.set_num_threads(1)
    for name in given[:1] or BUDGETS:
        dataset = srlib.load(name)
        for system in given[1:] or SYSTEMS:
            found = tune(system, dataset)
            known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            known.setdefault(name, {})[system] = found
            RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
            print(name, system, found, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
