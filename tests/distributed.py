"""Runs a function on several ranks (gloo, CPU), each a process of its own that reports back through a file."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

_CHILD = """
import importlib, json, os, sys
import torch.distributed as dist
module, function, arguments, out = sys.argv[1:]
result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
with open(out, "w") as file:
    json.dump(result, file)
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads, held by DeepSpeed's objects, now and then abort the process on its way out
"""


def run_distributed(function, world_size: int, timeout: float = 240, **arguments) -> list:
    """Calls `function` (of a test module) with JSON `arguments` on `world_size` ranks; returns what each rank returned. Raises with a failing rank's output."""
    for attempt in range(3):
        try:
            return _run(function, world_size, timeout, arguments)
        except AssertionError as error:  # another process may take the port between its choice and its use
            if attempt == 2 or "address already in use" not in str(error).lower():
                raise
    raise AssertionError("unreachable")


def _run(function, world_size: int, timeout: float, arguments: dict) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [sys.executable, "-c", _CHILD, function.__module__, function.__name__, json.dumps(arguments), f"{folder}/{rank}.json"]
            log = open(f"{folder}/{rank}.log", "w+")
            ranks.append((subprocess.Popen(command, env=environment, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT), log))
        try:
            codes = [process.wait(timeout) for process, _ in ranks]
        finally:
            for process, _ in ranks:
                process.kill()
        for code, (_, log) in zip(codes, ranks):
            log.seek(0)
            text = log.read()
            log.close()
            if code:
                raise AssertionError(f"a rank failed with code {code}:\n{text[-4000:]}")
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(world_size)]
