"""Training one model in several processes under torchrun; with one process, nothing here does anything.

Each process holds the whole model and its share of every batch. Averages, and all that follows from them, are
the same in every process to the last bit. A process that fails prints one line, and torchrun ends the others.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, from 0. Process 0 writes files and reports."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Its number on its machine, and so its GPU's."""
    return int(os.environ.get("LOCAL_RANK", 0))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined(device: str) -> Iterator[None]:
    """For the length of the block the processes can communicate: by gloo on CPUs, by NCCL between GPUs."""
    if count() == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: a process that fails must not wait for the others


def another_has_ended(error: RuntimeError) -> bool:
    """Whether communication failed, because another process has ended."""
    return count() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def wait_for_all() -> None:
    if count() > 1:
        dist.barrier()


def from_all(mine: Any) -> list:
    """What each process has, by rank, in all of them."""
    everything = [mine] * count()
    if count() > 1:
        dist.all_gather_object(everything, mine)
    return everything


def own_share(items: Any) -> Any:
    """This process's share of a tensor or list that all have; it may be empty."""
    return items[rank() :: count()]


def gathered(mine: list[Tensor]) -> list[Tensor]:
    """The reverse of `own_share`: what all processes made of their shares, in order."""
    if count() == 1:
        return mine
    parts = from_all([x.cpu() for x in mine])
    return [parts[i % count()][i // count()] for i in range(sum(map(len, parts)))]


def average(x: Tensor) -> Tensor:
    """x ← its mean over the processes."""
    if count() > 1:
        dist.all_reduce(x)
        x.div_(count())
    return x


@torch.no_grad()
def average_gradients(params: Iterable[Tensor]) -> None:
    """Each `p.grad` becomes its mean over the processes, in one all-reduce; a missing one counts as 0."""
    params = list(params)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    pieces = average(flat).split([p.numel() for p in params])
    for p, piece in zip(params, pieces, strict=True):
        p.grad = piece.view(p.shape)
