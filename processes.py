"""Several processes that train one model, as torchrun starts them; alone, nothing here does anything.

    torchrun --nproc_per_node 2 run_glue.py --task cola --batch_size 16

    with joined("cuda"):
        examples = shared(batch)            # of rank r the r-th, the (r + N)-th, …
        ...backward...
        average_gradients(params)           # one flat all-reduce

Each process has all of the model. What is averaged is the same in every process to the last bit, and with it
all that follows: parameters, posterior, scores, and which triplets are kept.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten
from torch._utils import _unflatten_dense_tensors as unflatten

T = TypeVar("T")


class Elsewhere(Exception):
    """Another process has failed, and says why."""


def _from_torchrun(name: str, alone: int) -> int:
    started = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return int(os.environ[name]) if started else alone


def rank() -> int:
    """This process's number, from 0; process 0 writes and speaks."""
    return _from_torchrun("RANK", 0)


def local_rank() -> int:
    """Its number on its machine, and so its GPU's."""
    return _from_torchrun("LOCAL_RANK", 0)


def count() -> int:
    return _from_torchrun("WORLD_SIZE", 1)


@contextmanager
def joined(device: str) -> Iterator[None]:
    """For the length of the block the processes can talk: by gloo on CPUs, by NCCL between GPUs."""
    if count() == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: a process that fails alone must not wait for others


@contextmanager
def together() -> Iterator[None]:
    """Either all get through the block, or none: the first that fails raises its error, others Elsewhere."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = from_all(error is not None)
    if any(failed):
        raise error if failed.index(True) == rank() else Elsewhere


@contextmanager
def alike() -> Iterator[None]:
    """What fails in one process fails in all of them: the first alone says why."""
    try:
        yield
    except Exception:
        if rank():
            raise Elsewhere from None
        raise


def from_all(mine: T) -> list[T]:
    """What each process has, in all of them, by rank."""
    everything = [mine] * count()
    if count() > 1:
        dist.all_gather_object(everything, mine)
    return everything


def from_first(make: Callable[[], T]) -> T:
    """What process 0 makes, numbers, strings and tensors, in all; if that fails, in all (`together`)."""
    if count() == 1:
        return make()
    content = io.BytesIO()
    with together():
        if rank() == 0:
            torch.save(make(), content)  # many views of one vector are sent as one vector
    packed = [content.getvalue()]
    dist.broadcast_object_list(packed)
    return torch.load(io.BytesIO(packed[0]), map_location="cpu", weights_only=True)


def is_of_another(error: RuntimeError) -> bool:
    """Whether talking failed, because a process has gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def shared(items: Tensor | list) -> Tensor | list:
    """This process's share of what all have; there may be nothing in it."""
    return items[rank() :: count()]


def gathered(mine: list[Tensor]) -> list[Tensor]:
    """All again, of what each process made of its share. They are on the CPU then."""
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
    """Each `p.grad` becomes its mean over the processes, in one all-reduce; none counts as 0."""
    if count() == 1:
        return
    params = list(params)
    flat = flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    for p, grad in zip(params, unflatten(average(flat), params), strict=True):
        p.grad = grad
