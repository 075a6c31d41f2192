"""Stopping in time: signals, and a launcher that has died, become a request that ranks agree on at a step boundary."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.command import GO_ON, INTERRUPTED
from rf_train.engine.collectives import RunError, current_device
from rf_train.engine.processes import command, parent

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # the last: a terminal that is gone
GONE = -1  # the number of no process
LAUNCHER_DIED, FOLDER_LOST, ASKED_ELSEWHERE = 1001, 1002, 1003  # reasons that are no signals


class Stopped(RunError):
    """The run was asked to stop, and has saved: the same command goes on. `why` is the reason, in words."""

    def __init__(self, why: str, message: str):
        super().__init__(message)
        self.why = why


class Interrupted(Exception):
    """Work between two steps was left because some rank was asked to stop; on all ranks."""


class Stop:
    """Whether this process was asked to stop, and why. `listen` begins to notice."""

    one_signal = 2.0  # seconds in which signals count as one: launchers send several
    patience = 900.0  # seconds that a save may take after the launcher has died

    def __init__(self) -> None:
        self.reason = 0
        self.saves = False  # before the first step there is nothing to save: the process ends at once
        self._first = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notices signals, also while the main thread waits in a collective, and the end of the launcher."""
        read, write = socket.socketpair()
        write.setblocking(False)
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
        before = [signal.signal(number, lambda *_: None) for number in heard]  # a thread acts on them
        fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        ended = threading.Event()
        threading.Thread(target=self._hear, args=(read,), name="signals", daemon=True).start()
        if "LOCAL_RANK" in os.environ:  # a launcher has started this process
            arguments = (launchers(), ended)
            threading.Thread(target=self._watch_launcher, args=arguments, name="launcher", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            signal.set_wakeup_fd(fd)
            for number, handler in zip(heard, before):
                signal.signal(number, handler)
            write.close()  # ends the thread that reads

    def ask(self, reason: int) -> None:
        """Asks for an end. Asked again after a while, the process ends at once."""
        now = time.monotonic()
        if not self.saves:
            only_one_says_it = os.environ.get("RANK", "0") == "0"
            _leave(f"stopped by {words(reason)}, before the first step" if only_one_says_it else "", GO_ON)
        if not self.reason:
            self.reason, self._first = reason, now
        elif now - self._first > self.one_signal:
            _leave(f"stopped at once by a second signal ({words(reason)})", INTERRUPTED)

    def agreed(self, elsewhere: bool = False) -> int:
        """The reason to stop of some rank; 0 for none. A collective, the same on all ranks.

        `elsewhere`: this rank knows that another one was asked, which may not have known it yet when it came here.
        """
        reason = self.reason or (ASKED_ELSEWHERE if elsewhere else 0)
        own = torch.tensor([reason != 0, self.reason], device=current_device())
        dist.all_reduce(own, dist.ReduceOp.MAX)
        any_rank, known = own.tolist()
        return known or (ASKED_ELSEWHERE if any_rank else 0)

    def interrupt(self) -> None:
        """Raises Interrupted if some rank was asked to stop. A collective."""
        if self.agreed():
            raise Interrupted

    def _hear(self, sockets: socket.socket) -> None:
        with sockets:
            while numbers := sockets.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self.ask(number)

    def _watch_launcher(self, alive: list[tuple[int, int]], ended: threading.Event) -> None:
        while all(parent(child) == launcher for child, launcher in alive):
            if ended.wait(1.0):
                return
        self.ask(LAUNCHER_DIED)
        if not ended.wait(self.patience):
            _leave("the launcher has died, and saving took too long", INTERRUPTED)


def words(reason: int) -> str:
    """A reason to stop, in words."""
    others = {
        LAUNCHER_DIED: "the end of its launcher",
        FOLDER_LOST: "another job that took the run's folder",
        ASKED_ELSEWHERE: "a request to another rank",
    }
    return others.get(reason) or signal.Signals(reason).name


def launchers() -> list[tuple[int, int]]:
    """(child, parent) of this process and its launcher, and of that one and DeepSpeed's runner, if it started it.

    The launcher outlives a runner that is killed. Where one of them died before this process could look, its number is
    GONE.
    """
    own, launcher = os.getpid(), parent(os.getpid())
    runner = parent(launcher)
    if not _is_deepspeed(launcher):
        by_deepspeed = any(word.startswith("--local_rank=") for word in command(own))
        return [(own, GONE if by_deepspeed else launcher)]
    if not _is_deepspeed(runner):  # over ssh it is on another machine
        return [(own, launcher), *([(launcher, GONE)] if runner == 1 else [])]
    return [(own, launcher), (launcher, runner)]


def _is_deepspeed(pid: int) -> bool:
    """Whether a process runs one of DeepSpeed's launchers."""
    return any(word.startswith("deepspeed.launcher") or Path(word).name == "deepspeed" for word in command(pid))


def _leave(message: str, code: int) -> None:
    with suppress(OSError):  # who read it is gone, as `tee` after Ctrl-C
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    os._exit(code)
