"""The training loop that all systems share: minibatches, Adam, learning-rate steps, history, progress, exact resume.

    for batch in TrainingLoop(system, images, plan, rng):
        ...                                  # what is particular to a system: its loss
        loop.update(loss, sigma=sigma)       # one Adam step; whatever else is named goes into the history

Everything that training depends on (parameters and buffers of the system, Adam's moments, the order of the data, the
random state, the history) is written to one file from time to time, and read back when the loop is made again with the
same directory: a run that was killed ends with the same bits as one that was not. Where torchrun started several processes,
each batch is shared by them (`distributed`), and the first alone writes.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoints, distributed, provenance
from .generators import check_whole
from .system import System, in_batches

History = dict[str, list[float]]
State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and the rest: what a training goes on from

LARGEST_RATE = 1e6
MOMENTS = {  # what an optimizer knows of each parameter
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Adamax: ("step", "exp_avg", "exp_inf"),
}
# How much work a kill may cost.
SECONDS_BETWEEN_SAVES = 60.0


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to learn.

    n_updates : T of Algorithm 1.
    batch_size : m.
    learning_rates : Adam's learning rate in equal parts of the training; the paper's (1e-4, 5e-5, 1e-5) thirds.
    betas : Adam's decay rates; the paper names none, the authors' script has beta1 = 0.5.
    snapshots : numbers of updates after which the system is saved too, as `snapshot_file` says.
    warmup_updates : over the first so many updates the learning rate rises linearly to what it is afterwards; 0 is none.
    """

    n_updates: int
    batch_size: int = 64
    learning_rates: tuple[float, ...] = (1e-4, 5e-5, 1e-5)
    betas: tuple[float, float] = (0.9, 0.999)
    snapshots: tuple[int, ...] = ()
    warmup_updates: int = 0

    def __post_init__(self) -> None:
        check_whole("n_updates", self.n_updates)
        check_whole("warmup_updates", self.warmup_updates, 0)
        check_whole("batch_size", self.batch_size)
        for name in ("learning_rates", "betas", "snapshots"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a tuple of numbers")
        if not self.learning_rates or any(not 0 < rate <= LARGEST_RATE for rate in self.learning_rates):
            raise ValueError(
                f"learning_rates={self.learning_rates} must be one or more positive numbers, at most {LARGEST_RATE:g}"
            )
        if len(self.betas) != 2 or any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be two numbers in [0, 1)")
        for t in self.snapshots:
            check_whole("snapshots", t)
        if any(not 1 <= t <= self.n_updates for t in self.snapshots):
            raise ValueError(f"snapshots={self.snapshots} must lie between 1 and n_updates={self.n_updates}")

    def learning_rate(self, t: int) -> float:
        """The learning rate of update t = 0, ..., T - 1."""
        rate = self.learning_rates[min(t * len(self.learning_rates) // self.n_updates, len(self.learning_rates) - 1)]
        return rate * min(1.0, (t + 1) / (self.warmup_updates + 1))


def stream(seed: int, purpose: Literal["weights", "training", "reconstructions", "samples"]) -> int:
    """Independent seeds for what is drawn at random in one run."""
    return seed * 1000 + ("weights", "training", "reconstructions", "samples").index(purpose)


def resume_file(directory: Path | str) -> Path:
    """What a training in `directory` goes on from."""
    return Path(directory) / "training.safetensors"


def snapshot_file(directory: Path | str, t: int) -> Path:
    """Where a training in `directory` keeps the system as it was after t updates."""
    return Path(directory) / f"snapshot-{t}.safetensors"


def training_seconds(directory: Path | str) -> float:
    """How long the training in `directory` took, all its sittings together; from `resume_file`, once it has ended."""
    return checkpoints.load(resume_file(directory))[1]["seconds"]


def check_training(system: System, images: Tensor, plan: TrainingPlan) -> None:
    """Raises ValueError for a plan or for images [n, C, H, W] that `system` cannot be trained with: now, not in a later batch."""
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in system.parameters()):
        raise ValueError(
            "fit needs gradients: call it outside of torch.no_grad(), for a system with parameters that require them"
        )
    if not isinstance(plan, TrainingPlan):
        raise ValueError(f"plan is a {type(plan).__name__}; give a srlib.TrainingPlan")
    batches = in_batches(images, 1000)
    if tuple(images.shape[1:]) != tuple(system.generator.image_shape):
        raise ValueError(
            f"images have shape {tuple(images.shape)}, the generator makes [n, {', '.join(map(str, system.generator.image_shape))}]"
        )
    for batch in batches if images.dtype != torch.uint8 else batches[:1]:
        system.as_input(batch)


class Batch(NamedTuple):
    t: int  # number of the update, from 0
    x: Tensor  # images [m, C, H, W] in [-1, 1]; of several processes each has its share of them
    index: Tensor  # their places in the training set [m]


@dataclass
class TrainingLoop:
    """Iterates over `Batch`es; call `update` once for each.

    system : what is trained; its parameters go to Adam, its state into the checkpoint.
    images : training images [n, C, H, W], uint8 or floats in [-1, 1].
    rng : CPU generator for the order of the data; systems draw their noise from it too, by `randn_like` and `uniform_like`.
    directory : where `training.safetensors` is kept while training lasts; None keeps nothing.
    progress : show a bar with loss, step size and images per second.
    optimizer_type : Adam, or Adamax.
    own : tensors that belong to the training and not to the system, by name, with a row for each training image (chains,
        codes), of which an update changes those of its batch. Resuming brings them back in place.

    Raises ValueError for images that are none, and for batches that do not divide by the number of processes; CheckpointError
    for a `resume_file` that is damaged or belongs to another training.
    """

    system: System
    images: Tensor
    plan: TrainingPlan
    rng: torch.Generator
    directory: Path | None = None
    progress: bool = True
    optimizer_type: type[torch.optim.Adam] | type[torch.optim.Adamax] = torch.optim.Adam
    own: dict[str, Tensor] = field(default_factory=dict)
    history: History = field(default_factory=dict, init=False)
    t: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        check_training(self.system, self.images, self.plan)
        self.optimizer = self.optimizer_type(
            self.system.parameters(), lr=self.plan.learning_rate(0), betas=self.plan.betas
        )
        self.batch_size = min(self.plan.batch_size, len(self.images))
        distributed.check_divisible(self.batch_size)
        self.order = torch.empty(0, dtype=torch.int64)
        self._begun = time.monotonic()
        self._given_gradients = [p.grad for p in self.system.parameters()]
        # now, since the files of the sources may be edited while a training lasts
        self._identity = self._identified() if self._writes else {}
        state = distributed.from_first(self._found)
        if state is not None:
            self._restore(*state)

    def __iter__(self) -> Iterator[Batch]:
        saved = time.monotonic()
        n_updates, m = self.plan.n_updates, self.batch_size
        hidden = not (self.progress and distributed.is_first())
        with tqdm(total=n_updates, initial=self.t, disable=hidden, unit="update") as self._bar:
            while self.t < n_updates:
                if len(self.order) < m:  # a new epoch; what is left of the last one is less than a batch
                    self.order = torch.randperm(len(self.images), generator=self.rng)
                index, self.order = self.order[:m], self.order[m:]
                with distributed.sharing(m) as rows:
                    share = index[rows]
                    yield Batch(self.t, self.system.as_input(self.images[share]), share)
                    if distributed.n_processes() > 1:
                        for value in self.own.values():
                            value[index] = distributed.gathered(value[share])
                self.t += 1
                if self._writes and self.t in self.plan.snapshots:
                    checkpoints.save(snapshot_file(self.directory, self.t), self.system.state_dict(), {"t": self.t})
                if self._writes and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    self._save()
                    saved = time.monotonic()

    def update(self, loss: Tensor, **monitored: float) -> None:
        """One Adam step down `loss`, a mean over the batch; it and what is monitored, means too, go into the history.

        Raises FloatingPointError for a loss or a gradient that is not a number, before it gets into the parameters.
        """
        monitored = distributed.means({"loss": loss.detach(), **monitored})
        self._check_finite("loss", monitored["loss"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate(self.t)
        self.optimizer.zero_grad(set_to_none=True)
        (loss / distributed.n_processes()).backward()
        distributed.sum_gradients(self.system.parameters())
        gradients = [p.grad for p in self.system.parameters() if p.grad is not None]
        self._check_finite("norm of the gradient", nn.utils.get_total_norm(gradients).item())
        self.optimizer.step()
        self.record(**monitored)
        shown = {name: f"{v:.4g}" for name, v in monitored.items()}
        rate = self._bar.format_dict["rate"]
        if rate:
            shown["images/s"] = f"{rate * self.batch_size:.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def record(self, **monitored: float) -> None:
        """Append numbers to the history, one list per name."""
        for name, value in monitored.items():
            self.history.setdefault(name, []).append(float(value))

    def finish(self) -> History:
        """The history. The end of the training is kept for resuming too: whoever keeps the result removes `resume_file`.

        Parameters get the gradients back that they had before.
        """
        for p, given in zip(self.system.parameters(), self._given_gradients, strict=True):
            p.grad = given
        if self._writes:
            self._save()
        return self.history

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {name} is {value} at update {self.t}; try a smaller learning rate than "
                f"{self.plan.learning_rate(self.t):.3g}, or a smaller step size"
            )

    @property
    def _writes(self) -> bool:
        return self.directory is not None and distributed.is_first()

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self._begun

    def _identified(self) -> dict[str, Any]:
        """What must be the same for a training to go on: plan, system with its settings, images, sources."""
        settings = {
            name: repr(value)
            for name, value in vars(self.system).items()
            if isinstance(value, (int, float, str)) or is_dataclass(value)
        }
        identity = {
            "plan": asdict(self.plan),
            "system": type(self.system).__name__,
            "settings": settings | {"training": "always"},
            "shapes": {name: tuple(value.shape) for name, value in self.system.state_dict().items()},
            "images": [*self.images.shape, zlib.crc32(self.images.cpu().contiguous().numpy())],
            "sources": provenance.source_hash(provenance.imported_modules([type(self.system).__module__])),
        }
        return json.loads(json.dumps(identity))

    def _found(self) -> State | None:
        """What to begin with, as the first process sees it: what a killed training left; without that, what it has itself."""
        if self.directory is not None:
            try:
                Path(self.directory).mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise ValueError(f"directory={str(self.directory)!r} is a file; name a folder") from error
            if resume_file(self.directory).exists():
                return self._saved()
        return self._state() if distributed.n_processes() > 1 else None

    def _state(self) -> State:
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"system.{name}": value for name, value in self.system.state_dict().items()}
        tensors |= {f"adam.{i}.{name}": value for i, state in moments.items() for name, value in state.items()}
        tensors |= {f"own.{name}": value for name, value in self.own.items()}
        tensors |= {"rng": self.rng.get_state(), "order": self.order}
        progress = {"t": self.t, "history": self.history, "seconds": self._seconds()}
        return {name: value.detach().cpu() for name, value in tensors.items()}, progress

    def _save(self) -> None:
        tensors, progress = self._state()
        checkpoints.save(resume_file(self.directory), tensors, {"identity": self._identity, **progress})

    def _saved(self) -> State:
        path = resume_file(self.directory)
        tensors, saved = checkpoints.load(path)
        then, now = saved.get("identity"), self._identity
        different = [name for name in now if not isinstance(then, dict) or then.get(name) != now[name]]
        if different:
            raise checkpoints.CheckpointError(
                f"{path} belongs to another training, its {' and '.join(different)} differ; remove it to start anew"
            )
        if damaged := self._unfit(tensors, saved):
            raise checkpoints.CheckpointError(f"{path} is damaged: {damaged}; remove it to start anew")
        return tensors, saved

    def _unfit(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> str | None:
        """What in a state is none that this training can have been in; None where all is as it must be."""
        t, seconds, history = (progress.get(name) for name in ("t", "seconds", "history"))
        if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t <= self.plan.n_updates:
            return f"t={t!r} is no number of updates of {self.plan.n_updates}"
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            return f"seconds={seconds!r} is no time"
        lists = list(history.values()) if isinstance(history, dict) else [None]
        if not all(isinstance(v, list) and all(isinstance(x, (int, float)) for x in v) for v in lists):
            return "its history is none"
        losses = history.get("loss", [])
        if len(losses) != t or not all(map(math.isfinite, losses)):
            return f"its history has {len(losses)} losses after {t} updates, or one that is no number"
        order = tensors.get("order", torch.empty(0))
        known = order.dtype == torch.int64 and order.ndim == 1 and ((order >= 0) & (order < len(self.images))).all()
        if not known or len(order.unique()) < len(order):
            return "its order of the images is none"
        wanted = {name: (value.shape, value.dtype) for name, value in self._state()[0].items()} | {
            f"adam.{i}.{moment}": (torch.Size(), torch.float32) if moment == "step" else (p.shape, p.dtype)
            for i, p in enumerate(self.system.parameters())
            for moment in MOMENTS[self.optimizer_type]
            if f"adam.{i}.step" in tensors  # a parameter that has had no gradient has none
        }
        if t > 0 and "adam.0.step" not in tensors:
            return "the moments of the optimizer are missing"
        if not all(
            (tensors[name] >= 0).all() for name in tensors if name.startswith("adam.") and name.endswith(".step")
        ):
            return "its optimizer has made a negative number of steps"
        try:
            torch.Generator().set_state(tensors.get("rng", torch.empty(0)))
        except (RuntimeError, TypeError) as error:
            return f"its random state is none ({error})"
        found = {name: (value.shape, value.dtype) for name, value in tensors.items()}
        names = [name for name in sorted({*found, *wanted} - {"order"}) if found.get(name) != wanted.get(name)]
        return f"{', '.join(names[:3])} missing, of no use, or of another shape or type" if names else None

    def _restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        self.system.load_state_dict(
            {k.removeprefix("system."): v for k, v in tensors.items() if k.startswith("system.")}
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                moments.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for name, value in self.own.items():
            value.copy_(tensors[f"own.{name}"])
        self.rng.set_state(tensors["rng"])
        self.order, self.t, self.history = tensors["order"], progress["t"], progress["history"]
        self.seconds = progress["seconds"]
