"""The caller's side of one process of `decoder_worker`: its start, its pipes, and how it ended, in words."""

import contextlib
import fcntl
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_PIPE_BYTES = 1 << 20  # what Linux allows without privileges
_LINE_BYTES = 1 << 16  # no message's line is longer
_HOME = str(Path(__file__).resolve().parent.parent)  # where the package is found
MODULE = "data_prep.decoder_worker"


class WorkerProcess:
    """A process that decodes. It lives no longer than the thread that made it. Raises OSError if it can't be made.

    Whatever is asked of a process that has died raises EOFError.
    """

    def __init__(self, memory_gib: float):
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(memory_gib)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=_HOME,
            env=_environment(),
        )
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        with contextlib.suppress(AttributeError, OSError):  # not on this system, or this user's pipes are too large
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._raw = _Answers(fd)
        self._answers = io.BufferedReader(self._raw)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def send(self, request: bytes) -> None:
        """Passes a request on."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
        except BrokenPipeError:
            raise EOFError from None

    def message(self, seconds: float) -> dict:
        """The next message. Raises TimeoutError if it, with its clip, takes longer; ValueError if it is no JSON."""
        self._raw.allow(seconds)
        line = self._answers.readline(_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)

    def read_into(self, clip: np.ndarray) -> None:
        """Fills `clip`, uint8, with the bytes behind a message."""
        if self._answers.readinto(clip.data.cast("B")) < clip.nbytes:
            raise EOFError

    def kill(self) -> None:
        """Kills the process, from any thread."""
        self._process.kill()

    def was_killed(self) -> bool:
        """Whether SIGKILL ended the process, a moment ago or before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        return self._process.returncode == -signal.SIGKILL

    def end(self, patience: float = 0.0) -> None:
        """Ends the process. It has `patience` seconds to end by itself."""
        process = self._process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # longer only if it is stuck in the kernel
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def death(self, by_signal: str) -> str:
        """What ended the process, in words; `by_signal` goes before the name of a signal."""
        status = self._process.returncode
        if status is None:
            return "the decoder can't be ended"
        if status < 0:
            with contextlib.suppress(ValueError):
                return by_signal + signal.Signals(-status).name
            return f"{by_signal}signal {-status}"
        return f"the decoder ended with status {status}"


class _Answers(io.RawIOBase):
    """A worker's stdout. Reading raises TimeoutError once all waiting since `allow` exceeds its seconds.

    Waiting is counted in steps of at most 1 s. So the time in which this process itself is stopped doesn't count.
    """

    def __init__(self, fd: int):
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._seconds = 0.0

    def allow(self, seconds: float) -> None:
        self._seconds = seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._seconds > 0:
            step, began = min(1.0, self._seconds), time.monotonic()
            ready = self._poll.poll(1000 * step)
            self._seconds -= min(step, time.monotonic() - began) if ready else step
            if ready:
                return os.readv(self._fd, [buffer])
        raise TimeoutError


def _environment() -> dict[str, str]:
    """The environment of a worker: it finds this package, wherever this process was started."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([_HOME, *paths]), **threads}
