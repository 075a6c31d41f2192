"""Stopping: signals are noticed also in a collective, several at once are one, a second one ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from data_prep.command import GO_ON, INTERRUPTED
from rf_train.engine import stopping
from rf_train.engine.collectives import start_ranks
from rf_train.engine.stopping import ASKED_ELSEWHERE, GONE, LAUNCHER_DIED, SIGNALS, Stop, launchers, words
from tests.distributed import PROJECT, run_distributed

# Stands for a rank. argv: "saves" or "starts"; seconds to sleep, or "busy" in one call for minutes, as in a collective.
RANK = """
import hashlib, sys, time
from rf_train.engine.collectives import start_ranks
from rf_train.engine.stopping import ASKED_ELSEWHERE, Stop, words
stop = Stop()
stop.saves, stop.one_signal = sys.argv[1] == "saves", 0.5
with stop.listening():
    print("ready", flush=True)
    if sys.argv[2] == "busy":
        hashlib.pbkdf2_hmac("sha1", b"", b"", 1 << 30)
    time.sleep(float(sys.argv[2]))
    print(words(stop.reason) if stop.reason else "none", flush=True)
"""


@pytest.fixture
def rank():
    started = []

    def start(*arguments, ignored: int = 0) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
        environment["PYTHONPATH"] = str(PROJECT)
        command = [sys.executable, "-c", RANK, *map(str, arguments)]
        pipe = subprocess.PIPE

        def set_signals() -> None:  # a shell ignores some of them for what it starts in the background
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

        started.append(
            subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=set_signals)
        )
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_a_request_and_several_at_once_are_one(rank, number):
    process = rank("saves", 3)
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.05)
    assert process.communicate(timeout=30)[0].split() == [number.name]
    assert process.returncode == 0


def test_a_signal_that_is_ignored_stays_so(rank):
    """As `nohup` has it."""
    process = rank("saves", 1, ignored=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30)[0] == "none\n"


def test_a_second_signal_ends_the_process_also_in_a_long_call(rank):
    process, begin = rank("saves", "busy"), time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == INTERRUPTED and time.monotonic() - begin < 30
    assert said == "stopped at once by a second signal (SIGINT)\n"


def test_before_the_first_step_nothing_is_lost(rank):
    process = rank("starts", 60)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=30)[1] == "stopped by SIGUSR1, before the first step\n"
    assert process.returncode == GO_ON


def agreed_on_this_rank(reasons: list[int], elsewhere: list[bool]) -> list:
    """What ranks with these reasons agree on."""
    rank, stop = start_ranks().rank, Stop()
    stop.reason = reasons[rank]
    found = stop.agreed(elsewhere[rank])
    return [found, words(found) if found else ""]


def test_ranks_agree_on_a_reason_also_when_the_one_that_was_asked_did_not_know_it_yet():
    run = partial(run_distributed, agreed_on_this_rank, 2)
    assert run(reasons=[0, 0], elsewhere=[False, False]) == [[0, ""]] * 2
    assert run(reasons=[0, signal.SIGHUP], elsewhere=[True, False]) == [[signal.SIGHUP, "SIGHUP"]] * 2
    asked = [ASKED_ELSEWHERE, "a request to another rank"]
    assert run(reasons=[0, 0], elsewhere=[True, False]) == [asked] * 2


LAUNCHER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]])
process.wait()
"""


def test_the_end_of_the_launcher_is_noticed():
    """It is killed: it can tell nobody."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "LOCAL_RANK": "0"}
    command = [sys.executable, "-c", LAUNCHER, "-c", RANK, "saves", "4"]
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    assert launcher.stdout.read() == f"{words(LAUNCHER_DIED)}\n"  # the pipe ends with the rank
    launcher.stdout.close()
    launcher.wait()


def test_deepspeeds_runner_behind_its_launcher_is_watched_and_nobody_else(monkeypatch):
    commands = {
        10: ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"],
        9: ["python", "/usr/bin/deepspeed", "--module", "rf_train.train"],
        8: ["bash", "-c", "deepspeed --module rf_train.train"],
        20: ["torchrun", "train.py"],
    }
    parents = {10: 9, 9: 8, 8: 1, 20: 8, 11: 1, 12: 13, 1: 0}
    commands[11] = commands[12] = commands[10]  # their runners are gone, or on another machine
    own: list[str] = ["python", "train.py"]
    monkeypatch.setattr(stopping, "command", lambda pid: own if pid == os.getpid() else commands.get(pid, []))
    for own_parent, found in ((10, [10, 9]), (20, [20]), (1, [1]), (11, [11, GONE]), (12, [12])):
        monkeypatch.setattr(stopping, "parent", lambda pid, own=own_parent: parents.get(pid, own))
        assert [launcher for _, launcher in launchers()] == found
    own.append("--local_rank=1")  # DeepSpeed's launcher has started it
    monkeypatch.setattr(stopping, "parent", lambda pid: parents.get(pid, 1))
    assert launchers() == [(os.getpid(), GONE)]


def test_what_was_there_before_is_there_after():
    before = [signal.getsignal(number) for number in SIGNALS]
    threads = threading.active_count()
    with Stop().listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    end = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() == threads


@pytest.mark.parametrize("what, code", [("starts", GO_ON), ("saves", INTERRUPTED)])
def test_it_ends_also_when_nobody_reads_what_it_says(rank, what, code):
    """As after Ctrl-C of `deepspeed ... 2>&1 | tee log`."""
    process = rank(what, 60)
    os.dup2(os.open(os.devnull, os.O_RDONLY), process.stderr.fileno())  # closes the pipe's only reader
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.8)
    assert process.wait(timeout=30) == code
