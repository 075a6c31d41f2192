"""A run's folder: one job writes it, locks of killed jobs are taken over, and what happened is listed."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rf_train.engine.processes import machine, started
from rf_train.engine.run_folder import Events, RunLock, is_alive, is_dead, job_name, read_events
from tests.distributed import PROJECT


def lock(run: Path, **changes) -> dict:
    """Writes the lock of a job on another machine."""
    other = {"token": "t", "host": "elsewhere", "pid": 4, "started": 5, "boot": "b", "processes": 6, "job": "77.1"}
    other |= {"time": "2026-01-02T03:04:05+00:00", "beat": 3} | changes
    (run / "lock.json").write_text(json.dumps(other))
    return other


def take(run: Path, **changes) -> RunLock:
    return RunLock(run, lambda: None, **{"beat": 0.1, "silence": 1.0, **changes})


def test_a_second_job_is_refused_with_the_name_of_the_first_and_let_in_after_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    first = take(tmp_path)
    with pytest.raises(ValueError, match=rf"process {os.getpid()} on \S+, Slurm job 123.2, since .* trains in this"):
        take(tmp_path)
    first.release()
    assert not (tmp_path / "lock.json").exists()
    take(tmp_path).release()


HOLD = "import sys, time; from pathlib import Path; from rf_train.engine.run_folder import RunLock; "
HOLD += "RunLock(Path(sys.argv[1]), print); print('held', flush=True); time.sleep(600)"


def test_a_killed_job_s_lock_is_taken_over_at_once(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", HOLD, tmp_path]
    holder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} on"):
            take(tmp_path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    begin = time.monotonic()
    take(tmp_path, silence=60.0).release()
    assert time.monotonic() - begin < 5


def test_a_lock_of_another_machine_counts_as_long_as_it_beats(tmp_path):
    other = lock(tmp_path)
    assert not is_alive(other) and not is_dead(other)
    ended = threading.Event()

    def beat() -> None:
        number = 4
        while not ended.wait(0.3):
            lock(tmp_path, beat=number)
            number += 1

    beats = threading.Thread(target=beat)
    beats.start()
    try:
        with pytest.raises(ValueError, match=r"process 4 on elsewhere, Slurm job 77.1, since 2026-01-02T03:04:05"):
            take(tmp_path, silence=30.0, beat=1.0)
    finally:
        ended.set()
        beats.join()
    begin = time.monotonic()
    taken = take(tmp_path)
    assert time.monotonic() - begin > 1.0
    taken.release()


def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    own = {**machine(), "pid": os.getpid(), "started": started(os.getpid())}
    assert is_alive(own)
    assert is_dead({**own, "started": own["started"] + 1})
    assert not is_dead({**own, "processes": 1}), "in another container"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"beat": {}}', "\x00"])
def test_a_lock_that_is_not_readable_is_taken_over_after_a_silence(tmp_path, text):
    (tmp_path / "lock.json").write_text(text)
    take(tmp_path, silence=0.5).release()
    assert not (tmp_path / "lock.json").exists()


def test_a_job_that_took_over_such_a_lock_is_alive_for_the_next_one(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    threading.Timer(1.5, lambda: lock(tmp_path, beat=0)).start()
    with pytest.raises(ValueError, match="process 4 on elsewhere"):
        take(tmp_path, silence=1.2, beat=2.0)


def test_a_job_whose_folder_is_taken_all_the_same_is_told(tmp_path):
    told = threading.Event()
    mine = RunLock(tmp_path, told.set, beat=0.1)
    other = lock(tmp_path)
    assert told.wait(10)
    mine.release()
    assert json.loads((tmp_path / "lock.json").read_text()) == other  # not mine to remove


def test_events_survive_a_line_that_was_cut(tmp_path):
    events = Events(tmp_path, active=True)
    events.write("start", 0, ranks=2)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "sav')
    events.write("saved", 5, seconds=1.0)
    Events(tmp_path, active=False).write("end", 9)
    assert [(row["event"], row["step"]) for row in read_events(tmp_path)] == [("start", 0), ("saved", 5)]
    assert events.step == 5


def test_the_name_of_a_slurm_job_counts_its_restarts():
    assert job_name({}) is None
    assert job_name({"SLURM_JOB_ID": "5"}) == job_name({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "0"}) == "5"
    assert job_name({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "3"}) == "5.3"
