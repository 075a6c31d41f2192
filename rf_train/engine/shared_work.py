"""Work in pieces that any number of processes share, through locks in a folder. They need no network."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from data_prep.files import locked
from rf_train.engine.devices import gpu_is_usable, gpu_of_rank


class Busy(Exception):
    """Another process holds a lock."""


@contextmanager
def held(lock: Path, wait: bool = True, shared: bool = False) -> Iterator[None]:
    """Holds a lock; `shared`: together with others that share it. Raises `Busy` if others have it, unless `wait`."""

    def busy() -> None:
        if not wait:
            raise Busy

    with locked(lock, busy, shared):
        yield


def claimed(locks: Path, names: Sequence[str], first: int = 0, wait: bool = False) -> Iterator[int]:
    """Yields the number of every piece of work that no other process holds; the lock is held until the next one.

    It begins with number `first`, and goes around. With `wait`, those that others held come last, as soon as they are
    free. The operating system frees what a killed process held. Where a file system has no locks, processes with other
    `first`s at worst do some work twice.
    """
    busy = []
    for number in [*range(first, len(names)), *range(first)]:
        with ExitStack() as stack:
            try:
                stack.enter_context(held(locks / names[number], wait=False))
            except Busy:
                busy.append(number)
                continue
            yield number
    for number in busy if wait else ():
        with held(locks / names[number]):
            yield number


def this_rank() -> tuple[int, int, torch.device]:
    """(rank, ranks, device) as DeepSpeed's launcher, torchrun or Slurm's srun say. Ranks need no network."""

    def said(*names: str, default: int) -> int:
        return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)

    rank, world_size = said("RANK", "SLURM_PROCID", default=0), said("WORLD_SIZE", "SLURM_NTASKS", default=1)
    if not gpu_is_usable():
        return rank, world_size, torch.device("cpu")
    local, here = said("LOCAL_RANK", "SLURM_LOCALID", default=0), said("LOCAL_WORLD_SIZE", default=world_size)
    index = gpu_of_rank(local, here, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    torch.cuda.set_device(index)
    return rank, world_size, torch.device("cuda", index)


def ranks_here() -> int:
    """Ranks on this machine, as far as the launcher says; else all of them."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE", "SLURM_NTASKS")
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), 1)
