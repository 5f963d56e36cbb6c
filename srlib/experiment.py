"""An experiment: a configuration in, a run directory out.

    python -m srlib.experiment CONFIG.yaml --output DIR

DIR then holds config.yaml, model.safetensors (the trained system), history.json, metrics.json (scores, configuration and
provenance, sealed with a checksum), snapshot-*.safetensors if asked for, and, while training lasts, what is needed to go on after a kill.

Started by torchrun, all its processes train and evaluate this one system together, see `distributed`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
import yaml
from torch import Tensor

from . import checkpoints, distributed, provenance
from .data import IMAGE_SHAPES, Dataset, DatasetUnavailable, checked_name, load
from .evaluation.reconstruction import inference_seconds
from .evaluation.scores import EvaluationSplit, evaluate
from .generators import Generator, LadderGenerator, TopDownGenerator, check_whole
from .system import System
from .training import History, TrainingPlan, resume_file, snapshot_file, stream, training_seconds

Search = Literal["none", "grid", "descent"]
KEPT = (
    "environment",
    "peak_memory",
    "files",
    "same_bits",
)  # what metrics.json says of the training when it is scored again
WEIGHTS = ".safetensors"  # the files of a run that it may be kept without
LONGEST_LIST = 1000  # snapshots, learning rates
PARTS = ("n_flows", "n_levels", "depth")
MOST_PARTS = 100  # of each of these, and of layers: building them takes time before their size is known
LARGEST_WHOLE = 2**63 - 1
LARGEST_MODEL = 2**31  # numbers in a system
N_AGGREGATE = 5000  # training images that the Gaussian of the inferred latents is fitted to, at most
GENERATORS = {"top_down": TopDownGenerator, "ladder": LadderGenerator}


def known_systems() -> dict[str, str]:
    """System -> the module with its `builder`: the files in baselines/ and the paper's system.

    Named as text, and imported where it is used: so a run's sources are the modules that its own system needs, and a new
    baseline, or a change to one, leaves the runs of all others as they are.
    """
    baselines = sorted(path.stem for path in (provenance.LIBRARY / "baselines").glob("[!_]*.py"))
    return {"short_run": "srlib.short_run_system"} | {name: f"srlib.baselines.{name}" for name in baselines}


SYSTEMS = known_systems()


def modules(system: str) -> list[str]:
    """The modules of srlib that a run of `system` depends on."""
    return provenance.imported_modules(["srlib.experiment", SYSTEMS[system]])


def training_hash(system: str) -> str:
    """The hash of the modules that the training of `system` depends on: all but srlib.evaluation, which scores it afterwards."""
    return provenance.source_hash(m for m in modules(system) if not m.startswith("srlib.evaluation"))


@dataclass(frozen=True)
class Config:
    """One training run. `step_size` is the s of Eq. (10); learning rates are used in equal parts of the training.

    generator : "top_down" is that of Table 4, "ladder" that of section 5.4.
    step_size_search, estimator, every, search_images, step_size_share : line 5 of Algorithm 1, see `StepSizeSearch`; "none"
        keeps s.
    precision, compile : how the short run system and ABP compute their chains, see `inner_loop.accelerated`.
    snapshots : numbers of updates after which the system is saved too (`load_run(..., snapshot=t)`).
    options : what only this system has, by name; the module of the system says which (the short run system has none).
    n_samples : images that are drawn from each source to be compared with as many training images, or all if there are fewer;
        also how many training images the Gaussian of the inferred latents is fitted to, up to N_AGGREGATE.
    name : of the run, and of its directory in a matrix of runs.
    """

    name: str
    system: str = "short_run"
    dataset: str = "digits"
    seed: int = 0
    generator: str = "top_down"
    latent_dims: tuple[int, ...] = (8, 16, 32)
    channels: int = 16
    feature_size: int = 7
    n_steps: int = 25
    step_size: float = 1.25e-3
    sigma: float = 0.15
    sigma_start: float = 0.6
    anneal_fraction: float = 0.5
    n_updates: int = 1500
    batch_size: int = 64
    learning_rates: tuple[float, ...] = (1e-3, 5e-4, 1e-4)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_updates: int = 0
    step_size_search: Search = "none"
    estimator: str = "linear_noise"
    every: int = 50
    search_images: int = 4
    step_size_share: str = "all"
    precision: str = "full"
    compile: bool = False
    snapshots: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    n_samples: int = 5000
    evaluation_split: EvaluationSplit = "test"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise ValueError(f"system={self.system!r} is unknown; there are: {', '.join(SYSTEMS)}")
        if self.generator not in GENERATORS:
            raise ValueError(f"generator={self.generator!r} is unknown; there are: {', '.join(GENERATORS)}")
        check_whole("n_samples", self.n_samples, 2)
        if self.evaluation_split not in get_args(EvaluationSplit):
            raise ValueError(f"evaluation_split={self.evaluation_split!r} must be one of {get_args(EvaluationSplit)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r} must be a whole number from 0 to 2^32 - 1")
        if self.step_size_search not in get_args(Search):
            raise ValueError(f"step_size_search={self.step_size_search!r} must be one of {get_args(Search)}")
        if not re.fullmatch(r"\w[\w.+-]{0,199}", self.name, re.ASCII):
            raise ValueError(
                f"name={self.name[:250]!r} must consist of at most 200 letters, digits and . _ + - only: it names a directory"
            )
        self.torch_device()
        self.plan()
        parts = {"latent_dims": len(self.latent_dims), **{key: self.options.get(key) for key in PARTS}}
        for key, count in parts.items():
            if isinstance(count, int) and count > MOST_PARTS:
                raise ValueError(f"{key}: {count} parts are more than {MOST_PARTS}; choose fewer")
        if self.step_size_search != "none" and self.every > self.n_updates:
            raise ValueError(
                f"every={self.every}: step_size_search={self.step_size_search!r} would never be done in n_updates={self.n_updates} "
                "updates; make every smaller, or use none"
            )
        try:
            state = self.state()
        except RuntimeError as error:
            raise ValueError(f"torch cannot make tensors of these sizes ({error}); choose smaller ones") from error
        if (size := sum(tensor.numel() for tensor in state.values())) > LARGEST_MODEL:
            raise ValueError(f"the system would hold {size:.3g} numbers; choose fewer latents or channels")
        if self.n_samples <= (d := sum(self.latent_dims)):
            raise ValueError(
                f"n_samples={self.n_samples}: as many images cannot fix the covariance of {d} latents; give at least {d + 1}"
            )

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Config:
        """A configuration from a mapping, as YAML holds it. Raises ValueError for unknown, missing or unfit entries."""
        known = {f.name: f for f in fields(cls)}
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"unknown configuration entry {key!r}; {hint}")
        if "name" not in given:
            raise ValueError("the configuration lacks a name")
        return cls(**{key: _converted(key, value, known[key].default) for key, value in given.items()})

    @classmethod
    def from_yaml(cls, path: Path | str) -> Config:
        """A configuration from a YAML file; errors name the file."""
        given = checkpoints.read_yaml(path)
        try:
            if not isinstance(given, dict):
                raise ValueError("it must be a mapping of names to values")
            return cls.from_dict(given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def plan(self) -> TrainingPlan:
        return TrainingPlan(
            self.n_updates, self.batch_size, self.learning_rates, self.betas, self.snapshots, self.warmup_updates
        )

    def new_generator(self, image_shape: tuple[int, int, int]) -> Generator:
        """The generator, before training; its first weights come from torch's global state."""
        return GENERATORS[self.generator](self.latent_dims, image_shape, self.channels, self.feature_size)

    def state(self) -> dict[str, Tensor]:
        """The state of the system without its numbers: every check of its parts, without memory or arithmetic."""
        with torch.device("meta"):
            return self._module().builder(self)(IMAGE_SHAPES[checked_name(self.dataset)]).state_dict()

    def build(self, image_shape: tuple[int, int, int]) -> System:
        """The untrained system; its first weights depend on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.seed, "weights"))
            return self._module().builder(self)(image_shape)

    def torch_device(self) -> torch.device:
        """Where to compute. Of several processes each has a GPU of its own, of those on its machine."""
        if self.device in ("auto", "cuda") and torch.cuda.is_available():
            return distributed.own_gpu()
        if self.device == "auto":
            return torch.device("cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r} is unknown; there are: auto, cpu, cuda, cuda:1, ...")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}: torch sees no GPU on this machine; use auto or cpu")
        if device.type == "cuda" and distributed.n_processes() > 1:
            raise ValueError(f"device={self.device!r}: several processes would share one GPU; use auto, cuda or cpu")
        return device

    def _module(self) -> ModuleType:
        return importlib.import_module(SYSTEMS[self.system])


def run(config: Config, output: Path | str, progress: bool = True) -> dict[str, Any]:
    """Train and evaluate what `config` says, write the run directory `output`, return its metrics.

    Called again after an interruption it goes on. Called again after the end it scores the training that stands there again,
    unless the sources of the training have changed, which makes it start anew.

    Raises ValueError if `output` holds a run with another configuration or another process is at work there,
    `DatasetUnavailable` if the images are not on this machine.
    """
    output, dataset = Path(output), load(config.dataset)
    with contextlib.ExitStack() as held:
        distributed.from_first(lambda: held.enter_context(_claimed(output, config)))
        return _run(config, dataset, output, progress)


def _run(config: Config, dataset: Dataset, output: Path, progress: bool) -> dict[str, Any]:
    started = time.monotonic()
    sources = modules(config.system)
    hashes = {"source_hash": provenance.source_hash(sources), "training_hash": training_hash(config.system)}
    if distributed.from_first(lambda: training_stands(output, config)):
        system, training, _ = distributed.from_first(lambda: load_run(output))
        system.to(config.torch_device())
    else:
        system, training = _train(config, dataset, output, progress)
    metrics = {
        "config": asdict(config),
        "scores": evaluate(system, dataset, config.evaluation_split, config.seed, config.n_samples),
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint, "n_train": len(dataset.train.images)},
        **{name: training[name] for name in KEPT if name in training},
        "seconds": training["seconds"] | {"last_sitting": time.monotonic() - started},
        **hashes,  # as they were at the start: files may be edited while a run lasts
        "modules": sources,
    }

    def write() -> dict[str, Any]:
        checkpoints.write_json(output / "metrics.json", metrics)
        for leftover in (resume_file(output), *output.glob(".*.tmp")):  # of writing that was killed
            leftover.unlink(missing_ok=True)
        return metrics

    return distributed.from_first(write)


def _train(config: Config, dataset: Dataset, output: Path, progress: bool) -> tuple[System, dict[str, Any]]:
    """The trained system, and what its metrics.json is to say of the training."""
    distributed.from_first(lambda: (output / "metrics.json").unlink(missing_ok=True))
    system = config.build(dataset.image_shape).to(config.torch_device())
    rng = torch.Generator().manual_seed(stream(config.seed, "training"))
    history = system.fit(dataset.train.images, config.plan(), rng, output, progress)
    system.fit_aggregate(dataset.train.images[: min(config.n_samples, N_AGGREGATE)], rng=rng)
    return system, distributed.from_first(lambda: _kept(config, dataset, output, system, history))


def _kept(config: Config, dataset: Dataset, output: Path, system: System, history: History) -> dict[str, Any]:
    """Write history.json and model.safetensors; what metrics.json is to say of the training."""
    checkpoints.write_json(output / "history.json", {"history": dict(sorted(history.items()))})
    checkpoints.save(output / "model.safetensors", system.state_dict(), {"config": asdict(config)})
    kept = (output / "model.safetensors", *(snapshot_file(output, t) for t in config.snapshots))
    return {
        "seconds": {
            "training": training_seconds(output),
            "step_size_search": sum(history.get("search_seconds", [])),
            "inference_per_image": inference_seconds(system, dataset.validation.images),
        },
        "peak_memory": provenance.peak_memory(),
        "environment": provenance.environment(str(config.torch_device())),
        "files": {path.name: provenance.file_hash(path) for path in (output / "history.json", *kept)},
    }


def training_stands(directory: Path, config: Config) -> bool:
    """Whether `directory` holds an unedited training with `config`, its weights and today's sources; its scores may be older."""
    stands = _finished(directory, config).get("training_hash") == training_hash(config.system)
    return stands and has_weights(directory)


def is_current(directory: Path, config: Config) -> bool:
    """Whether `directory` holds an unedited run with `config` and today's sources, with or without its weights."""
    return _finished(directory, config).get("source_hash") == provenance.source_hash(modules(config.system))


def _finished(directory: Path, config: Config) -> dict[str, Any]:
    """The metrics of a finished run with this configuration; empty where there is none."""
    try:
        metrics = verified_metrics(directory)
    except checkpoints.CheckpointError:
        return {}
    return metrics if metrics.get("config") == json.loads(json.dumps(asdict(config))) else {}


def verified_metrics(directory: Path) -> dict[str, Any]:
    """The metrics of a finished run, which may be kept without its weights.

    Raises:
        CheckpointError: the metrics, or another file of the run, are not what it wrote; or one that is no weights is missing.
    """
    metrics = checkpoints.read_json(directory / "metrics.json")
    files = metrics.get("files")
    if not isinstance(files, dict) or not all(re.fullmatch(r"\w[\w.-]*", name) for name in files):
        raise checkpoints.CheckpointError(
            f"{directory / 'metrics.json'} does not name the files of its run; run it again"
        )
    for name, written in files.items():
        path = directory / name
        if path.suffix == WEIGHTS and not path.exists():
            continue
        if not path.is_file() or provenance.file_hash(path) != written:
            raise checkpoints.CheckpointError(f"{path} is missing or not the one that its run wrote; run it again")
    return metrics


def has_weights(directory: Path) -> bool:
    """Whether a finished run is there with its weights, those of its snapshots too."""
    return all((directory / name).exists() for name in verified_metrics(directory)["files"])


def load_weights(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`checkpoints.load` of a file of weights in a run directory, which says what to do about a run that is there without it."""
    if not path.exists() and path.name in verified_metrics(path.parent)["files"]:
        profile, name = path.absolute().parts[-3:-1]
        raise checkpoints.CheckpointError(
            f"{path} is not there: this run was kept without its weights. Train it again, for the book by "
            f"make run-all PROFILE={profile} ONLY={name}, else by python -m srlib.experiment with its config.yaml"
        )
    return checkpoints.load(path, device)


def load_run(
    directory: Path | str, device: str = "cpu", snapshot: int | None = None
) -> tuple[System, dict[str, Any], dict[str, list[float]]]:
    """The trained system, the metrics and the history of a finished run, their checksums verified.

    snapshot : the system as it was after that many updates, one of the configuration's `snapshots`.

    Raises:
        CheckpointError: a file is missing, edited, or not what a run of this configuration writes.
    """
    directory = Path(directory)
    metrics = verified_metrics(directory)
    history = checkpoints.read_json(directory / "history.json").get("history")
    path = directory / "model.safetensors" if snapshot is None else snapshot_file(directory, snapshot)
    if not {path.name, "history.json"} <= {*metrics["files"]} or not isinstance(history, dict):
        raise checkpoints.CheckpointError(f"{directory} is no finished run with {path.name} and a history")
    tensors, _ = load_weights(path, device)
    try:
        config = Config.from_dict(metrics["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise checkpoints.CheckpointError(f"{directory / 'metrics.json'} has no configuration: {error}") from error
    found, wanted = ({n: (t.shape, t.dtype) for n, t in state.items()} for state in (tensors, config.state()))
    if found != wanted:  # before there is memory for it
        other = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        raise checkpoints.CheckpointError(f"{path} holds the weights of another system: {', '.join(other[:3])} differ")
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise checkpoints.CheckpointError(f"{path} holds NaN or infinite numbers in {', '.join(bad[:3])}")
    system = config.build(tuple(load(config.dataset).image_shape)).to(device)
    system.load_state_dict(tensors)
    return system, metrics, history


@contextlib.contextmanager
def _claimed(output: Path, config: Config) -> Iterator[None]:
    """Hold the directory and write config.yaml, unless it belongs to a run with another configuration."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{output} cannot be made a run directory ({error.strerror}); choose another --output"
        ) from error
    with checkpoints.locked(output, f"another process is at work in {output}"):
        _claim(output, config)
        yield


def _claim(output: Path, config: Config) -> None:
    path, text = output / "config.yaml", yaml.safe_dump(_plain(asdict(config)), sort_keys=False)
    begun = any((output / name).exists() for name in ("metrics.json", "model.safetensors", resume_file(output).name))
    if begun and _configuration(output, config) != config:
        raise ValueError(f"{output} holds a run with another configuration; choose another --output or remove it")
    checkpoints.atomic_write(path, text.encode())


def _configuration(output: Path, otherwise: Config) -> Config:
    """That of the run in `output`, as its config.yaml says, or without that its metrics; `otherwise` where neither does."""
    try:
        if (output / "config.yaml").exists():
            return Config.from_yaml(output / "config.yaml")
    except ValueError as error:
        raise ValueError(f"{error}; remove that file if the run is the same, else choose another --output") from error
    with contextlib.suppress(checkpoints.CheckpointError, ValueError, KeyError, TypeError):
        return Config.from_dict(checkpoints.read_json(output / "metrics.json")["config"])
    return otherwise


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _converted(key: str, value: Any, default: Any) -> Any:
    """value in the type of the entry's default. YAML reads 1e-3 as text and lists where tuples are meant."""
    if key == "options":
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"options={value!r} must be a mapping of names to values")
        return dict(value)
    kind = str if default is MISSING else type(default)
    item = kind if kind is not tuple else type(default[0]) if default else int
    try:
        if kind is tuple:
            if not isinstance(value, (list, tuple)) or len(value) > LONGEST_LIST:
                raise ValueError
            return tuple(_number(v, item) for v in value)
        if kind is bool:
            return _truth(value)
        return _number(value, item) if item in (int, float) else _text(value)
    except (TypeError, ValueError, OverflowError):
        wanted = f"a list of {item.__name__}, at most {LONGEST_LIST}" if kind is tuple else kind.__name__
        raise ValueError(f"{key}={_shown(value)} must be {wanted}") from None


def _shown(value: Any) -> str:
    """A value for a message; Python refuses to write out numbers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        text = f"a {type(value).__name__} with a number beyond all bounds"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or (kind is int and not isinstance(value, int)):
        raise ValueError
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        raise ValueError
    return kind(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m srlib.experiment", description="Train and evaluate one system.")
    parser.add_argument("config", type=Path, help="YAML file with the entries of srlib.experiment.Config")
    parser.add_argument("--output", type=Path, required=True, help="run directory to write")
    given = parser.parse_args(arguments)
    try:
        with distributed.processes():
            metrics = run(Config.from_yaml(given.config), given.output)
            if distributed.is_first():
                print(yaml.safe_dump(metrics["scores"], sort_keys=False), end="")
    except (ValueError, OSError, ArithmeticError, DatasetUnavailable) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; the same command goes on from what {given.output} keeps\n")


if __name__ == "__main__":
    main()
