"""The learning rate of every system, chosen on validation images, the same budget for each; writes benchmarks/tuning.json.

    python benchmarks/tuning.py [SYSTEM ...]

Every system of the `digits` profile is trained on `digits` with each of RATES, for N_UPDATES updates and everything else as in
its row there; the rate with the lowest mean squared error on the 500 validation images is taken (for Glow, whose
reconstructions are exact, the fewest bits per dimension), and a test compares the matrix with it. Test images are not touched.
Rates that stand in the file already are not tried again: remove the file to begin anew.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

import srlib
from srlib import checkpoints
from srlib.evaluation.reconstruction import reconstructions, squared_error
from srlib.experiment import Config

HERE = Path(__file__).parent
RESULTS = HERE / "tuning.json"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SHAPE = (1.0, 1.0, 0.3)  # the learning rate goes down to this fraction of it in the last third
N_UPDATES = 200
ROWS = {  # system -> its row in digits.yaml
    "short_run": "short_run-digits-L3",
    "ladder_vae": "ladder_vae-digits-L3",
    "vae": "vae-digits",
    "iaf": "iaf-digits",
    "abp": "abp-digits",
    "glo": "glo-digits",
    "glow": "glow-digits",
}


def row(system: str) -> dict[str, Any]:
    """The row of a system in the digits matrix, its defaults filled in."""
    matrix = yaml.safe_load((HERE.parent / "papermill_runs" / "digits.yaml").read_text())
    (found,) = (r for r in matrix["runs"] if r["name"] == ROWS[system])
    return {k: v for k, v in (matrix["defaults"] | found).items() if k != "seconds"}


def learning_rates(rate: float) -> list[float]:
    return [float(f"{rate * part:.3g}") for part in SHAPE]


def validation_score(system: str, rate: float, dataset: srlib.Dataset) -> float:
    """What is to be low: MSE on [-1, 1], or Glow's bits per dimension; inf where training failed."""
    given = row(system) | {"n_updates": N_UPDATES, "learning_rates": learning_rates(rate)}
    trained = Config.from_dict(given).build(dataset.image_shape)
    rng = torch.Generator().manual_seed(1)
    try:
        trained.fit(dataset.train.images, Config.from_dict(given).plan(), rng, progress=False)
    except ArithmeticError:
        return float("inf")
    x = trained.as_input(dataset.validation.images)
    bits = trained.likelihood(x, rng).get("bits_per_dimension")
    return (squared_error(x, reconstructions(trained, x, rng)) if bits is None else bits).mean().item()


def main(systems: list[str]) -> None:
    torch.set_num_threads(1)
    dataset = srlib.load("digits")
    for system in systems or list(ROWS):
        known = checkpoints.read_json(RESULTS)["systems"] if RESULTS.exists() else {}
        scores = {
            k: float(v) if v != "diverged" else float("inf")
            for k, v in known.get(system, {}).get("by_learning_rate", {}).items()
        }
        scores |= {f"{rate:g}": validation_score(system, rate, dataset) for rate in RATES if f"{rate:g}" not in scores}
        best = min(scores, key=scores.get)
        # another process may have written
        known = checkpoints.read_json(RESULTS)["systems"] if RESULTS.exists() else {}
        known[system] = {
            "n_updates": N_UPDATES,
            "n_images": len(dataset.validation.images),
            "score": "bits per dimension" if system == "glow" else "mean squared error on [-1, 1]",
            "by_learning_rate": {k: v if v < float("inf") else "diverged" for k, v in scores.items()},
            "learning_rates": learning_rates(float(best)),
        }
        checkpoints.write_json(RESULTS, {"systems": dict(sorted(known.items()))})
        print(system, known[system], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
