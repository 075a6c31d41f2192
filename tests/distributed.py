"""Runs a function on several ranks (gloo, CPU): each a process that reports back through a file.

Processes are forked from one server that has already imported torch and DeepSpeed, so a rank starts fast. On a machine
with a GPU they are spawned instead, because a fork fails once CUDA is initialised.
"""

import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

if Path("/dev/nvidiactl").exists():
    _processes = multiprocessing.get_context("spawn")
else:
    _processes = multiprocessing.get_context("forkserver")
    # Also what an engine imports when it is built: this takes two seconds per rank.
    late = ["torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"]
    _processes.set_forkserver_preload(["deepspeed", "rf_train.train", "rf_train.plan", *late])


def run_distributed(function: Callable, world_size: int, timeout: float = 240, **arguments) -> list:
    """Calls `function` (of a test module) with JSON `arguments` on `world_size` ranks.

    Returns what each rank returned. Raises an AssertionError with the output of every rank when one fails, or when they
    don't end in `timeout` seconds. Then the error also has the stack of each rank.
    """
    for attempt in range(3):
        try:
            return _run(function, world_size, timeout, arguments)
        except AssertionError as error:  # another process may take the port between its choice and its use
            if attempt == 2 or "address already in use" not in str(error).lower():
                raise
    raise AssertionError("unreachable")


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment variables that a launcher gives to a rank."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",  # threads that spin take the cores from the ones that work
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(function: Callable, world_size: int, timeout: float, arguments: dict) -> list:
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = []
        for rank in range(world_size):
            environment = rank_environment(rank, world_size, port)
            call = (function.__module__, function.__name__, json.dumps(arguments), environment, str(folder / str(rank)))
            ranks.append(_processes.Process(target=_rank_main, args=call, daemon=True))
        try:
            for process in ranks:
                process.start()
            ended = _wait(ranks, timeout)
            if not ended:
                _dump_stacks(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        codes = [process.exitcode for process in ranks]
        logs = [(folder / f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
        if not ended or any(codes):
            what = f"ranks ended with {codes}" if ended else f"ranks did not end in {timeout} s"
            told = "".join(f"\n----- rank {rank}\n{log[-6000:]}" for rank, log in enumerate(logs))
            raise AssertionError(f"{function.__name__}: {what}{told}")
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def _wait(ranks: list[BaseProcess], timeout: float) -> bool:
    """Whether all ranks end in time. When one fails, the others have half a minute."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            end = min(end, time.monotonic() + 30)
        if time.monotonic() > end:
            return any(process.exitcode for process in ranks)
        time.sleep(0.02)
    return True


def _dump_stacks(ranks: list[BaseProcess]) -> None:
    for process in ranks:
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1)


def _rank_main(module: str, function: str, arguments: str, environment: dict[str, str], out: str) -> None:
    log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(environment)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    code = 1
    try:
        result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
        Path(out + ".json").write_text(json.dumps(result))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit would sometimes abort in gloo's threads, which DeepSpeed's objects hold
