"""What a checkpoint costs:  python -m rf_train.bench checkpoint

Three questions. How long does training stand still for a save, compared with writing the same bytes and waiting for
the disk? Is a checkpoint written, with its hash, as fast as `dd` writes? Is it checked as fast as `sha256sum` reads?
"""

import argparse
import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rf_train.config import Recipe, RunSettings, Stage
from rf_train.engine.collectives import start_ranks
from rf_train.engine.restoring import verified_together
from rf_train.engine.saving import Saver
from rf_train.engine.state import TrainingState
from rf_train.engine.zero import build_engine
from rf_train.model.settings import ModelSettings

MIB = 1 << 20


def bench_checkpoint(options: argparse.Namespace) -> tuple[list[str], dict]:
    """Lines for people, and the figures. Files are written into the folder `options.out`."""
    out = Path(options.out or "runs/bench_checkpoint")
    out.mkdir(parents=True, exist_ok=True)
    ranks = start_ranks()
    model = ModelSettings(dim=512, ffn_dim=2048, heads=8, layers=options.layers, text_dim=512)
    recipe = Recipe(model=model, run=RunSettings(wandb="disabled", out=str(out)), stages=(Stage(),))
    state = TrainingState(build_engine(recipe, ranks), 0.99)
    saver = Saver(out, state, keep=1, always=set())
    plain, seconds = out / "plain", defaultdict[str, list[float]](list)
    try:
        for turn in range(options.rounds + 1):
            saver.begin(turn + 1)
            saved = saver.finish()
            assert saved is not None
            if saved.error:
                raise OSError(saved.error)
            [file] = saved.folder.glob("*.safetensors")
            size, content = file.stat().st_size, file.read_bytes()
            dd = ["dd", "if=/dev/zero", f"of={plain}", "bs=1M", f"count={-(-size // MIB)}", "conv=fsync", "status=none"]
            found = {
                "stall": saved.stall - saved.waited,
                "save": saved.seconds,
                "write": timed(write_and_sync, plain, content),
                "dd": timed(subprocess.run, dd, check=True),
                "verify": timed(verified_together, saved.folder),
                "sha256sum": timed(subprocess.run, ["sha256sum", file], check=True, capture_output=True),
            }
            if turn:  # the first one makes the memory that later ones use again
                for name, value in found.items():
                    seconds[name].append(value)
    finally:
        saver.close()
        plain.unlink(missing_ok=True)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        (out / "latest").unlink(missing_ok=True)
    middle = {name: median(values) for name, values in seconds.items()}
    figures = {
        "bench": "checkpoint",
        "device": str(ranks.device),
        "threads": torch.get_num_threads(),
        "mib": saver.bytes / MIB,
        "stall_share": middle["stall"] / middle["write"],
        "write_rate_over_dd": middle["dd"] / middle["save"],
        "verify_rate_over_sha256sum": middle["sha256sum"] / middle["verify"],
    }
    rate = {name: saver.bytes / MIB / value for name, value in middle.items()}
    return [
        f"a checkpoint of {saver.bytes / MIB:.0f} MiB",
        f"  training stands still for {middle['stall']:.2f} s; written and synced at once, the same bytes take "
        f"{middle['write']:.2f} s",
        f"  copied, hashed and written at {rate['save']:.0f} MiB/s; dd writes {rate['dd']:.0f} MiB/s",
        f"  checked at {rate['verify']:.0f} MiB/s; sha256sum reads {rate['sha256sum']:.0f} MiB/s",
    ], figures


def timed(action: Callable[..., object], *arguments: Any, **named: Any) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    action(*arguments, **named)
    return time.perf_counter() - begin


def write_and_sync(path: Path, content: bytes) -> None:
    """Writes a file, and waits until it is on disk."""
    with open(path, "wb", buffering=0) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
