"""Ranks: how they start, exchange values, and stop when they disagree."""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rf_train.engine.devices import gpu_is_usable, gpu_of_rank
from rf_train.engine.processes import machine
from rf_train.settings import differences

# What gloo and PyTorch's store say when a peer is gone, and what NCCL says.
_LOST = re.compile(r"(closed|reset) by peer|connection was likely closed", re.IGNORECASE)
_LOST_NCCL = re.compile(
    r"remote process exited|connection closed|unhandled system error|communicator was aborted|watchdog", re.IGNORECASE
)
# Where C++'s stack, or gloo's advice, begins.
_STACK = re.compile(r"Exception raised from| This is typically")

T = TypeVar("T")


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


def ranks_on_this_machine() -> int:
    """As the launcher says; DeepSpeed's and torchrun's name it differently. Without either, all ranks."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])


def start_ranks(patience: float = 0.0) -> Ranks:
    """Joins the ranks that the launcher started. Without a launcher, this process is the only rank.

    `patience`: seconds that a rank may wait for its data while its peers wait for it in a collective. Raises
    ValueError when there are GPUs, and none that this rank can use; RunError when the port to meet at is taken.
    """
    if "RANK" not in os.environ:
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        os.environ.update(alone)
    ranks_here = ranks_on_this_machine()
    on_gpu = gpu_is_usable()
    if on_gpu:
        visible, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
        index = gpu_of_rank(int(os.environ["LOCAL_RANK"]), ranks_here, visible, named)
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes its device from here
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if not on_gpu:
        __compatible_ops__["deepspeed_shm_comm"] = False  # else the first run compiles it for over a minute
    backend = "nccl" if on_gpu else "gloo"
    timeout = timedelta(minutes=30, seconds=patience)
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(_STACK.split(str(error))[0].split())
        another = "If another job uses this port, name a free one: deepspeed --master_port PORT"
        raise RunError(f"the ranks can't meet at {address} ({reason}). {another}") from error
    if not on_gpu:
        torch.set_num_threads(threads_of_rank())
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def threads_of_rank() -> int:
    """This rank's share of the cores that it may use. Slurm gives each rank cores of its own. A collective."""
    own = {"machine": machine(), "cores": sorted(os.sched_getaffinity(0))}
    everyone = [json.loads(line) for line in gather_lines([json.dumps(own)])]
    sharing = [one for one in everyone if one["machine"] == own["machine"] and set(one["cores"]) & set(own["cores"])]
    return max(1, len(own["cores"]) // len(sharing))


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Turns the error of a collective that lost another rank into `PeerLost`."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if _LOST.search(said) or ("nccl" in said.lower() and _LOST_NCCL.search(said)):
            reason = " ".join(_STACK.split(said)[0].split())
            lost = "another rank has stopped, or the network failed; see that rank's own error, if it printed one"
            raise PeerLost(f"{lost} ({reason})") from error
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


def on_rank_0(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `action` on rank 0, or a group's first rank, and returns its result, or raises its error, on every rank.

    A collective of the group, or of all ranks.
    """
    told: list = [None, None]
    first = 0 if group is None else dist.get_global_rank(group, 0)
    if dist.get_rank() == first:
        try:
            told[0] = action()
        except (ValueError, OSError, RunError) as error:
            told[1] = error
    dist.broadcast_object_list(told, src=first, group=group)
    if told[1] is not None:
        raise told[1]
    return told[0]


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
