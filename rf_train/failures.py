"""How a training run ends that can't go on: one line for people, the exit code, and peers that don't wait."""

import os
import shlex
import sys
import traceback
from contextlib import suppress

import torch
import torch.distributed as dist

from data_prep.command import BAD_INPUT, GO_ON, INTERRUPTED, UNFORESEEN, one_line, printable
from rf_train.engine.collectives import PeerLost, RunError
from rf_train.engine.stopping import Stopped
from rf_train.engine.watching import Watch
from rf_train.engine.zero import RolloutMismatch
from rf_train.planning.costs import GIB


class OutOfMemory(RunError):
    """A GPU has too little memory for the recipe."""


FORESEEN = (ValueError, RunError, OSError)  # their message is for people

# The errors of this process. Their frames hold the engine, and DeepSpeed's destructor waits for the GPU.
kept_alive: list[BaseException] = []


def report_failure(error: BaseException, rank: int, watch: Watch, recipe: list[str]) -> int:
    """Prints what ended the training. Returns the exit code. `recipe` is its part of the command line."""
    watch.close()
    if isinstance(error, Stopped):
        if rank == 0:
            with suppress(OSError):  # who read it is gone
                print(one_line(error), file=sys.stderr, flush=True)
        with suppress(RuntimeError):  # rank 0 may still clean up: its watch, or the launcher, would miss a rank
            dist.barrier()
        return GO_ON
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    if isinstance(error, torch.cuda.OutOfMemoryError):
        error = OutOfMemory(out_of_memory_message(error, recipe))
    print_error(error, rank, watch)
    return BAD_INPUT if isinstance(error, FORESEEN) and not isinstance(error, PeerLost) else UNFORESEEN


def out_of_memory_message(error: torch.cuda.OutOfMemoryError, recipe: list[str]) -> str:
    """What happened, what to look at, and what to change."""
    memory_here = f" --gpu-memory {torch.cuda.mem_get_info()[1] / GIB:.0f}" if torch.cuda.is_available() else ""
    plan = f"python -m rf_train.plan {shlex.join(recipe)} --gpus {os.environ.get('WORLD_SIZE', 1)}{memory_here}"
    said = ". ".join(one_line(error).split(". ")[:3])
    return (
        f"out of memory ({said}). This shows what the recipe needs: {plan}. Lower optimizer.micro_batch, set "
        "model.checkpointing=block, or raise run.sequence_parallel_size"
    )


def print_error(error: BaseException, rank: int, watch: Watch) -> None:
    """Prints an error in one line, after the traceback of an unforeseen one, unless a peer has failed before.

    Rank 0 prints an error that all ranks share. The others wait for it first, and the launcher may end them meanwhile.
    """
    foreseen = isinstance(error, FORESEEN)
    shared = foreseen and not isinstance(error, (PeerLost, RolloutMismatch, OutOfMemory))
    if shared and rank and watch.a_peer_fails(5.0):
        return
    lines = "" if foreseen else "".join(traceback.format_exception(error))
    trace = "".join(f"{printable(line)}\n" for line in lines.splitlines())
    kind = "" if foreseen else f"{type(error).__name__}: "
    where = f" on rank {rank}" if rank else ""
    watch.fail(f"{trace}error{where}: {kind}{one_line(error)}")
