"""What the benchmarks share: the device, and times that are medians of calls in turn."""

import time
from collections.abc import Callable
from statistics import median

import torch

Result = tuple[list[str], dict]  # lines for people, and the figures


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def machine(name: str) -> dict:
    """The first figures of every result: the benchmark, the device, its threads."""
    return {"bench": name, "device": str(device()), "threads": torch.get_num_threads()}


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, called in turn `rounds` times after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in seconds.items()}
