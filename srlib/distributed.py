"""Data-parallel training and evaluation: several processes that act as one.

    torchrun --nproc_per_node=N -m srlib.experiment CONFIG.yaml --output DIR

Every process holds the whole system. Of a batch of m images process r works on its share, the rows r m/N, ..., (r + 1) m/N - 1.

    gradient of (1/m) sum_i loss_i = sum over processes of the gradient of (1/N) (mean of the loss over the share)

Random numbers are drawn by every process for the whole batch, from generators in the same state, and each keeps its rows
(`drawn`): image i meets the same latents and noises as in one process, so the results agree but for rounding.

This is the algorithm of torch.nn.parallel.DistributedDataParallel (synchronous gradient averaging; the first process's state
at the start). That class wants to wrap the module whose forward pass makes the loss. Here a loss comes from a
posterior, after K gradients of the same module with its weights frozen; one sum of all gradients after
`backward` says the same in three lines, and gives each system its own loss. What is lost is that communication overlaps with
the backward pass, one of K + 1.

In one process each function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

# The first process scores and writes alone while the others wait. A process that died is not waited for: its launcher ends all.
PATIENCE = timedelta(days=1)


class Share(NamedTuple):
    """A process's part of a batch."""

    n: int  # images of the whole batch
    rows: slice  # this process's
    starts: list[int]  # first row of every process; all have the same number, so the last shares may overlap


_share: Share | None = None


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; gloo carries tensors on the CPU, nccl those on GPUs.

    The first of them to fail says why, by its error; all others end in silence.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    if torch.cuda.is_available() and _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    try:
        yield
    except BaseException:
        if store.add("failures", 1) > 1:
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


def n_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and messages."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_gpu() -> torch.device:
    """The GPU of this process. Raises ValueError if its machine has fewer GPUs than processes."""
    if n_processes() == 1:
        return torch.device("cuda")
    gpu, n_gpus = _local_rank(), torch.cuda.device_count()
    if gpu >= n_gpus:
        raise ValueError(
            f"process {gpu + 1} of this machine has no GPU, there are {n_gpus}; use --nproc_per_node={n_gpus} or device: cpu"
        )
    return torch.device("cuda", gpu)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def check_divisible(batch_size: int) -> None:
    """Raises ValueError unless a batch is shared evenly: the mean over the batch is then the mean of those over the shares."""
    world = n_processes()
    if batch_size % world:
        fitting = [m for m in (batch_size // world * world, (batch_size // world + 1) * world) if m]
        raise ValueError(
            f"batch_size={batch_size} cannot be shared evenly by {world} processes; use {' or '.join(map(str, fitting))}, or "
            "another number of processes"
        )


@contextmanager
def sharing(n: int) -> Iterator[slice]:
    """Inside, this process works on its rows of a batch of n images, and noise is drawn for them (`drawn`): these rows."""
    global _share
    outer, _share = _share, None
    if n_processes() > 1:
        starts, size = shares(n, n_processes())
        start = starts[dist.get_rank()]
        _share = Share(n, slice(start, start + size), starts)
    try:
        yield _share.rows if _share else slice(0, n)
    finally:
        _share = outer


def shares(n: int, world_size: int) -> tuple[list[int], int]:
    """First rows, and number of rows, of equal shares that cover n rows; where they do not divide, the last ones overlap."""
    size = -(-n // world_size)
    return [min(rank * size, n - size) for rank in range(world_size)], size


@contextmanager
def whole(part: Tensor) -> Iterator[Tensor]:
    """Inside `sharing`, a stretch in which every process does the same for all images: all rows of `part` [n, ...]."""
    global _share
    rows, inner = gathered(part), _share
    _share = None
    try:
        yield rows
    finally:
        _share = inner


def drawn(draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
    """draw(shape); inside `sharing`, this process's rows of what one process draws for the whole batch."""
    if _share is None:
        return draw(shape)
    if shape[0] != _share.rows.stop - _share.rows.start:
        raise ValueError(
            f"noise of shape {tuple(shape)} inside a shared batch needs one row for each of this process's "
            f"{_share.rows.stop - _share.rows.start} images"
        )
    return draw((_share.n, *shape[1:]))[_share.rows]


def gathered(part: Tensor) -> Tensor:
    """Inside `sharing`: the rows of all processes [n, ...], without gradients, where `part` holds this one's."""
    if _share is None:
        return part
    part = part.detach().contiguous()
    parts = [torch.empty_like(part) for _ in _share.starts]
    dist.all_gather(parts, part)
    return torch.cat([rows[rank * len(part) - start :] for rank, (rows, start) in enumerate(zip(parts, _share.starts))])


def mapped(function: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Tensor:
    """function of each batch [n, ...], one below the other, the batches being shared by the processes."""
    parts = []
    for batch in batches:
        with sharing(len(batch)) as rows:
            parts.append(gathered(function(batch[rows])))
    return torch.cat(parts)


def from_first(make: Callable[[], T], rng: torch.Generator | None = None) -> T:
    """make() of the first process, in all of them, once it is done; an error of it is raised in all.

    So one process reads, decides or writes, and all agree. rng : what `make` draws from; goes on alike in all.
    """
    if n_processes() == 1:
        return make()
    box: list[tuple[T | None, Exception | None, Tensor | None] | None] = [None]
    if is_first():
        try:
            box = [(make(), None, None if rng is None else rng.get_state())]
        except Exception as error:
            box = [(None, error, None)]
    dist.broadcast_object_list(box)
    made, error, state = box[0]
    if error is not None:
        raise error
    if rng is not None:
        rng.set_state(state)
    return made


@torch.no_grad()
def agree(tensors: Iterable[Tensor]) -> None:
    """Give the tensors the values that they have in the first process: what all computed alike may differ by rounding."""
    if n_processes() > 1:
        for tensor in tensors:
            value = tensor.contiguous()
            dist.broadcast(value, 0)
            tensor.copy_(value)


def means(numbers: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Each number averaged over the processes: means over their shares become means over the batch."""
    values = {name: float(value) for name, value in numbers.items()}
    if n_processes() == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, (total / n_processes()).tolist()))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place."""
    if n_processes() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(total)
    for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view(gradient.shape))
