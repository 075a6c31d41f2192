"""What a run's folder tells about its health. It only reads.

Files may be missing, cut, damaged or hostile. What can't be read is a problem, and is named.
"""

import json
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.command import printable
from rf_train import config
from rf_train.config import Recipe
from rf_train.engine import checkpoint
from rf_train.engine.run_folder import SILENCE, is_dead

RECENT = 50  # rows that the speed and the loss are means of
LINE = 1 << 20  # bytes; a longer line is damage
RUN_FILES = ("recipe.yaml", "metrics.jsonl", "events.jsonl")  # a run's folder has at least one


@dataclass
class Checkpoint:
    """A run's newest checkpoint. `damage` is None when its check found none."""

    step: int
    age: float  # seconds
    check: str  # size | sha256
    damage: str | None


@dataclass
class Writer:
    """The job that writes a run, as its lock says, and whether it does so still."""

    alive: bool
    silent: float  # seconds since it renewed its lock
    host: str
    pid: int | None
    job: str | None


@dataclass
class Status:
    """What is known about a run; None where something isn't. Seconds, UTC, 1-based steps."""

    run: str
    state: str = "no job writes it"
    stage: str | None = None
    step: int = 0
    steps: int | None = None  # of the recipe
    seconds_per_step: float | None = None  # median of the recent steps
    samples_per_s: float | None = None
    loss: float | None = None  # mean of the recent steps
    loss_change: float | None = None  # against the mean of as many steps before, in the same stage
    seconds_left: float | None = None  # with the recent speed
    checkpoint: Checkpoint | None = None
    skipped: int = 0
    damaged: int = 0
    starts: int = 0
    ends: list[dict] = field(default_factory=list)  # {"time", "step", "why"} of each end
    writer: Writer | None = None
    problems: list[str] = field(default_factory=list)


def status_of(folder: Path, verify: bool = False) -> Status:
    """Reads a run's folder. Raises ValueError when it isn't one. `verify` hashes the newest checkpoint."""
    if not any((folder / name).is_file() for name in RUN_FILES):
        raise ValueError(f"{folder}: not a run, it has no {', '.join(RUN_FILES)}")
    status = Status(text(str(folder)))
    recipe = read_recipe(folder, status)
    read_metrics(folder, status)
    status.writer = read_writer(folder, status)
    read_events(folder, status)
    status.checkpoint = newest_checkpoint(folder, verify, status)
    if recipe is not None:
        status.steps = recipe.steps
        if status.seconds_per_step is not None:
            status.seconds_left = max(0, recipe.steps - status.step) * status.seconds_per_step
    status.state = state_of(status)
    return status


# ---- reading, with distrust


def number(value: Any) -> float | None:
    """A finite number of a size that can be meant; None for anything else."""
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if sound else None


def whole(value: Any) -> int:
    """A count; 0 for anything else."""
    found = number(value)
    return int(found) if found is not None and found > 0 else 0


def text(value: Any) -> str:
    """A short line that is safe to print."""
    line = printable(" ".join(value.split())) if isinstance(value, str) else "unknown"
    return line if len(line) <= 200 else f"{line[:200]}..."


def json_lines(path: Path, status: Status) -> Iterator[dict]:
    """The objects in a file of JSON lines. Lines that are none are a problem; so is not the last one, if it was cut."""
    bad = 0
    if path.is_file():
        with open(path, "rb") as file:
            while line := file.readline(LINE):
                row = parsed(line)
                if isinstance(row, dict):
                    yield row
                else:
                    bad += line.endswith(b"\n") or len(line) == LINE
    if bad:
        status.problems.append(f"{path.name}: {bad} unreadable lines")


def parsed(data: bytes) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def read_recipe(folder: Path, status: Status) -> Recipe | None:
    path = folder / "recipe.yaml"
    try:
        if path.is_file() and path.stat().st_size > LINE:
            raise ValueError(f"{path}: larger than a recipe can be")
        return config.load(path)
    except (ValueError, OSError) as error:
        status.problems.append(text(str(error)))
        return None


def read_metrics(folder: Path, status: Status) -> None:
    """Fills in what metrics.jsonl tells."""
    recent: deque[dict] = deque(maxlen=2 * RECENT)
    for row in json_lines(folder / "metrics.jsonl", status):
        status.skipped += whole(row.get("skipped"))
        status.damaged += whole(row.get("damaged"))
        recent.append(row)
    if not recent:
        return
    status.step, status.stage = whole(recent[-1].get("step")), text(recent[-1].get("stage"))
    of_stage = [row for row in recent if row.get("stage") == recent[-1].get("stage")]
    now, before = of_stage[-RECENT:], of_stage[:-RECENT]
    status.seconds_per_step = mean_of(now, "seconds", statistics.median)
    status.samples_per_s = mean_of(now, "samples_per_s", statistics.median)
    status.loss, earlier = mean_of(now, "loss"), mean_of(before, "loss")
    if status.loss is not None and earlier is not None and len(before) == RECENT:
        status.loss_change = status.loss - earlier


def mean_of(rows: list[dict], key: str, mean: Any = statistics.fmean) -> float | None:
    values = [value for row in rows if (value := number(row.get(key))) is not None]
    return mean(values) if values else None


def read_writer(folder: Path, status: Status) -> Writer | None:
    """The job that the run's lock names. It writes the lock anew with each beat."""
    path = folder / "lock.json"
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        lock = parsed(file.read(LINE))
    if not isinstance(lock, dict):
        status.problems.append("lock.json: not a lock")
        lock = {}
    silent = max(0.0, time.time() - path.stat().st_mtime)
    job = None if lock.get("job") is None else text(lock["job"])
    alive = silent < SILENCE and not is_dead(lock)
    return Writer(alive, silent, text(lock.get("host")), whole(lock.get("pid")) or None, job)


def read_events(folder: Path, status: Status) -> None:
    """Fills in the starts and how each ended. A start without an end, before another start, was killed."""
    running: dict | None = None
    failed_saves: list[str] = []
    for event in json_lines(folder / "events.jsonl", status):
        kind, why = event.get("event"), text(event.get("why"))
        about = {"time": text(event.get("time")), "step": whole(event.get("step")), "why": why}
        if kind in ("start", "end") and running is not None:
            status.ends.append(about if kind == "end" else {**running, "why": "killed"})
        if kind == "start":
            status.starts += 1
        if kind in ("start", "end"):
            running = about if kind == "start" else None
        elif kind == "saved":
            failed_saves.clear()
        elif kind == "save failed":
            failed_saves.append(f"step {about['step']}: {why}")
        elif kind == "set aside":
            status.problems.append(f"the checkpoint of step {about['step']} was damaged, and is set aside: {why}")
        if running is not None:
            running["step"] = max(running["step"], about["step"])
    if running is not None and not (status.writer and status.writer.alive):
        status.ends.append({**running, "step": max(running["step"], status.step), "why": "killed"})
    if failed_saves:
        status.problems.append(f"{len(failed_saves)} saves have failed since the last checkpoint; {failed_saves[-1]}")


def newest_checkpoint(folder: Path, verify: bool, status: Status) -> Checkpoint | None:
    """The checkpoint to go on from, checked by the size of its files and, to `verify` it, by their hash."""
    try:
        newest = checkpoint.latest(folder)
    except (ValueError, OSError) as error:
        status.problems.append(text(str(error)))
        return None
    if newest is None:
        return None
    age, damage = 0.0, None
    try:
        age = max(0.0, time.time() - newest.stat().st_mtime)
        for entry in checkpoint.read_manifest(newest)["files"]:
            if (newest / entry["file"]).stat().st_size != entry["bytes"]:
                raise ValueError(f"{newest / entry['file']}: has another size than was saved")
        if verify:
            checkpoint.verified(newest)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        damage = text(str(error))
    return Checkpoint(checkpoint.step_of(newest), age, "sha256" if verify else "size", damage)


def state_of(status: Status) -> str:
    """In a few words: whether a job writes the run, or why none does."""
    writer = status.writer
    if writer is not None and writer.alive:
        return "training"
    if status.steps is not None and status.checkpoint is not None and status.checkpoint.step >= status.steps:
        return "finished"
    if status.ends:
        return status.ends[-1]["why"]
    return Status.state
