"""The device of this process, and what must be set before CUDA starts."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch


def gpu_is_usable() -> bool:
    """Whether to compute on a GPU. Call it before the first use of CUDA: it sets the memory allocator's mode, too.

    Raises ValueError when there are GPUs that PyTorch can't use. Else a run would go on unnoticed on the CPU.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # DeepSpeed's launcher overwrites an empty CUDA_VISIBLE_DEVICES
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(allocator_settings(os.environ))
    usable = torch.cuda.is_available()
    if not usable and gpus_offered(os.environ):
        raise ValueError(
            f"this machine has GPUs, but PyTorch {torch.__version__} can't use them: it is a build for CPUs, or the "
            'driver is too old for it (see nvidia-smi). To use the CPU all the same, set CUDA_VISIBLE_DEVICES="", or '
            "DS_ACCELERATOR=cpu with DeepSpeed's launcher"
        )
    return usable


def gpus_offered(environment: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether the machine has NVIDIA GPUs that CUDA_VISIBLE_DEVICES doesn't hide. It asks the driver's files."""
    if environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return any((root / "proc/driver/nvidia/gpus").glob("*")) or (root / "dev/nvidia0").exists()


def allocator_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that let segments of GPU memory grow, so that less is lost. The user's own come first.

    Set in code, because launchers over ssh don't pass the environment on.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # PyTorch reads both; the second is the old name
    return {} if any(name in environment for name in names) else {names[0]: "expandable_segments:True"}


def gpu_of_rank(local_rank: int, ranks_here: int, visible: int, named: str) -> int:
    """The index of a rank's GPU among its `visible` ones. `named` is CUDA_VISIBLE_DEVICES.

    Raises ValueError when there is none for it.
    """
    if visible == 1 and "," not in named:  # one GPU per task: each rank sees its own alone, as number 0
        return 0
    if local_rank >= visible:
        raise ValueError(
            f"{visible} GPUs are visible (CUDA_VISIBLE_DEVICES={named!r}), and the launcher started {ranks_here} ranks "
            "on this machine: each rank needs a GPU of its own"
        )
    return local_rank


def use_deterministic_kernels() -> None:
    """Makes PyTorch choose kernels that give the same bits every time. Call it before CUDA starts.

    On a CPU nothing changes. An operation without such a kernel raises an error: with `warn_only`, the kernels of
    attention would stay as they are, without being deterministic.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Off: it is slow, and puts NaN into the padding of ZeRO's buffers.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def clock(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Moment:
    """A moment in a device's work, noted without waiting for it."""

    def __init__(self, device: torch.device):
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._time = time.perf_counter()

    def until(self, later: "Moment") -> float:
        """The seconds to a later moment. Waits for the device to reach it."""
        if self._event is None or later._event is None:
            return later._time - self._time
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1000


def memory_of(device: torch.device, ranks_here: int) -> int:
    """Bytes of memory that a rank has: a GPU's, or its share of what the system can give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) // ranks_here
