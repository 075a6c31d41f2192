"""Independent parts of a CPU's work: each in one thread.

PyTorch shares one operation out among its threads. With many small operations most threads would have nothing to do.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def in_threads(function: Callable[..., Any], parts: Sequence[tuple], device: torch.device) -> list:
    """[function(*part) for each part], without gradients; on a CPU, in PyTorch's number of threads.

    With fewer parts than threads, they come one after the other, and each has all threads. So they do in a mode that
    looks at every operation, such as PyTorch's counter of FLOP: it sees those of its own thread only.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def call(part: tuple) -> Any:
        with torch.inference_mode(inference), torch.no_grad():  # a thread has its own modes
            return function(*part)

    if device.type != "cpu" or threads == 1 or len(parts) < threads or is_in_torch_dispatch_mode():
        return [call(part) for part in parts]
    return list(_pool(threads).map(call, parts))


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, in each of which PyTorch computes with this one alone."""
    pool, ready = ThreadPoolExecutor(threads), Barrier(threads + 1)

    def prepare() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that start later
        torch.get_num_threads()  # the first call in a thread would set it anew
        ready.wait()

    try:
        for _ in range(threads):
            pool.submit(prepare)
        ready.wait()
    except BaseException:  # the system gives no further thread: those that wait for it must end
        ready.abort()
        pool.shutdown()
        raise
    finally:
        torch.set_num_threads(threads)  # those that start later have all of them again
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
