"""A run's folder: one job writes it at a time, and what happened to the run is listed in it.

RUN/lock.json       the job that writes now: host, process, Slurm job, and a beat that it renews
RUN/events.jsonl    starts, saves, failures and ends, a line each
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from data_prep.command import printable
from data_prep.files import locked, write_json
from rf_train.engine.collectives import on_rank_0
from rf_train.engine.processes import machine, started
from rf_train.engine.stopping import Stopped

BEAT = 10.0  # seconds between two beats of a lock
SILENCE = 60.0  # seconds without a beat after which a lock on another machine counts as left behind


def job_name(environment: Mapping[str, str]) -> str | None:
    """Slurm's job id, with the number of its restarts, as in "123.2". None without Slurm."""
    job, restarts = environment.get("SLURM_JOB_ID"), environment.get("SLURM_RESTART_COUNT", "0")
    return job if job is None or restarts == "0" else f"{job}.{restarts}"


class RunLock:
    """Keeps other jobs out of a run's folder, from `__init__` until `release`. For rank 0.

    A lock that a killed job left is taken over: at once when its process was on this machine, else after `silence`
    seconds without a beat. This works on network file systems, too. Raises ValueError when the other job is alive.
    `on_lost` is called, in a thread, when another job has taken the folder all the same.
    """

    def __init__(self, run: Path, on_lost: Callable[[], object], beat: float = BEAT, silence: float = SILENCE):
        self.path, self._on_lost = run / "lock.json", on_lost
        self._beat, self._ended = beat, threading.Event()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        process = {**machine(), "pid": os.getpid(), "started": started(os.getpid())}
        self._own = {"token": uuid.uuid4().hex, **process, "job": job_name(os.environ), "time": now}
        self._take(silence)
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Lets the next job in."""
        self._ended.set()
        self._thread.join()
        if (_read(self.path) or {}).get("token") == self._own["token"]:
            self.path.unlink(missing_ok=True)

    def _take(self, silence: float) -> None:
        begin, first_beat = time.monotonic(), None
        while True:
            with locked(self.path.with_name(".lock")):
                other = _read(self.path)
                beat = (other.get("token"), other.get("beat")) if other is not None else None
                silent = beat == first_beat and time.monotonic() - begin > silence
                if other is None or is_dead(other) or silent:
                    self._write(0)
                    return
            if is_alive(other) or first_beat not in (None, beat):
                raise ValueError(f"{self.path.parent}: {owner(other)} trains in this folder; stop it, or wait for it")
            first_beat = beat
            time.sleep(min(1.0, self._beat / 2))

    def _keep(self) -> None:
        """Renews the beat."""
        number = 0
        while not self._ended.wait(self._beat):
            try:
                if (_read(self.path) or {}).get("token") != self._own["token"]:
                    self._on_lost()
                    return
                number += 1
                self._write(number)
            except OSError:  # such as a full disk; the next beat may be written
                continue

    def _write(self, beat: int) -> None:
        write_json(self.path, {**self._own, "beat": beat})


def owner(lock: dict) -> str:
    """The job of a lock, in words."""
    job = f", Slurm job {lock['job']}" if lock.get("job") else ""
    words = f"process {lock.get('pid')} on {lock.get('host')}{job}, since {lock.get('time')},"
    return printable(words)


def is_alive(lock: dict) -> bool:
    """Whether a lock's process runs on this machine."""
    return _is_here(lock) and started(lock["pid"]) == lock.get("started") is not None


def is_dead(lock: dict) -> bool:
    """Whether a lock's process was on this machine, and is gone."""
    return _is_here(lock) and not is_alive(lock)


def _is_here(lock: dict) -> bool:
    return isinstance(lock.get("pid"), int) and all(lock.get(key) == value for key, value in machine().items())


def _read(path: Path) -> dict | None:
    """The lock in a file. None without the file. One that isn't readable has no owner."""
    try:
        lock = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        lock = {}
    return lock if isinstance(lock, dict) else {}


class Events:
    """Appends to RUN/events.jsonl, on rank 0. On other ranks nothing is written."""

    def __init__(self, run: Path, active: bool):
        self.path, self.active, self.step = run / "events.jsonl", active, 0
        self._ending, self._ended = threading.Lock(), False

    def end(self, why: str) -> None:
        """Lists how the run has ended. The first reason counts: threads may see an end in several ways."""
        with self._ending:  # who comes second waits until it is written: it may end the process
            if not self._ended:
                self._ended = True
                self.write("end", self.step, why=why)

    def write(self, event: str, step: int, **more: object) -> None:
        """A line: what happened, when (UTC), after how many steps. A full disk is no reason to stop."""
        self.step = step
        if not self.active:
            return
        row = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, **more}
        try:
            with open(self.path, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # the line before was cut by a crash
                        file.write(b"\n")
                file.write(json.dumps(row).encode() + b"\n")
        except OSError:
            return


@contextmanager
def one_writer(
    run: Path, rank: int, on_lost: Callable[[], object], reason: Callable[[BaseException], str]
) -> Iterator[Events]:
    """Keeps other jobs out of a run's folder meanwhile, and yields the list of its events. A collective at its start.

    Raises ValueError, on every rank, when another job is alive there. At the end it lists how the run has ended;
    `reason` gives an error's words.
    """
    locks: list[RunLock] = []

    def enter() -> None:
        run.mkdir(parents=True, exist_ok=True)
        locks.append(RunLock(run, on_lost))

    on_rank_0(enter)
    events = Events(run, rank == 0)
    try:
        yield events
    except BaseException as error:
        events.end(error.why if isinstance(error, Stopped) else reason(error))
        raise
    finally:
        for lock in locks:
            lock.release()


def read_events(run: Path) -> list[dict]:
    """The events of a run. Lines that are not readable are left out."""
    path, rows = run / "events.jsonl", []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("event"), str):
                rows.append(row)
    return rows
