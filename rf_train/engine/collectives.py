"""Ranks: how they start, exchange values, and stop when they disagree."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rf_train.settings import differences


class RunError(RuntimeError):
    """A run that can't go on. The message is one line for people."""


class PeerLost(RunError):
    """Another rank has stopped, so a collective can't complete."""


@dataclass(frozen=True)
class Ranks:
    """This process among all ranks."""

    rank: int
    world_size: int
    device: torch.device


def free_port() -> int:
    """A TCP port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks() -> Ranks:
    """Joins the ranks that the launcher started. Without a launcher, this process is the only rank."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if "RANK" not in os.environ:
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        os.environ.update(alone)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        __compatible_ops__["deepspeed_shm_comm"] = False  # else the first run compiles it for over a minute
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    backend = "nccl" if on_gpu else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=30))
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Turns the error of a collective that lost another rank into `PeerLost`."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in ("closed by peer", "reset by peer")):
            reason = str(error).splitlines()[0]
            raise PeerLost(f"another rank has stopped; see its own error, if it printed one ({reason})") from error
        raise


def check_same_on_ranks(what: str, **numbers: int) -> None:
    """Raises ValueError, on every rank, when ranks don't have the same numbers.

    Without this check they could wait for one another forever.
    """
    own = torch.tensor(list(numbers.values()), dtype=torch.int64, device=current_device())
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    for name, values in zip(numbers, torch.stack(everyone, dim=1).tolist()):
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            found = f"{values[0]} on rank 0, {values[other]} on rank {other}"
            raise ValueError(f"{what}: ranks disagree on {name}: {found}; all must read the same recipe and data")


def check_same_settings(**settings: dict) -> None:
    """Raises ValueError, on every rank, that names all settings in which a rank differs from rank 0."""
    everyone = [json.loads(line) for line in gather_lines([json.dumps(settings)])]
    for rank, other in enumerate(everyone):
        found = [f"{path} is {a!r} on rank 0, {b!r} on rank {rank}" for path, a, b in differences(everyone[0], other)]
        if found:
            raise ValueError(f"ranks disagree: {'; '.join(found)}")


def gather_lines(lines: list[str]) -> list[str]:
    """All ranks' lines, on every rank, in the order of the ranks."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, lines)
    return [line for lines in everyone for line in lines]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on every rank."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def true_on_any_rank(flags: list[bool]) -> list[bool]:
    """For each position: whether the flag is true on any rank. A collective: all ranks give equally many flags."""
    found = torch.tensor(flags, dtype=torch.int32, device=current_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def current_device() -> torch.device:
    """The device that this rank computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
