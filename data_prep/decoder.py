"""Decodes videos in worker processes, ahead of whoever needs the clips.

A file that crashes FFmpeg, hangs it, or makes it eat memory ends one worker, and not the job. `Decoders` is the
caller's side. `python -m data_prep.decoder MEMORY_GIB` is a worker: it reads requests on stdin, a line of JSON each (a
`Span`). To each it answers on stdout with clips, and then the end. A message is a line of JSON; a clip's raw bytes
follow its line. The first message says that the worker has started.

The JSON is plain ASCII, so that file names that are not UTF-8 pass: Python holds their bytes as surrogates.
"""

import contextlib
import ctypes
import errno
import fcntl
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.tars import Region
from data_prep.video import VideoError, declared_seconds, read_frames

STARTS = 3  # so many workers may fail to start in a row
_START_SECONDS = 60.0  # a worker starts in about 0.2 s; a busy machine takes longer
_PIPE_BYTES = 1 << 20  # what Linux allows without privileges
_LINE_BYTES = 1 << 16  # no message's line is longer
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_MODULE = "data_prep.decoder"
_HOME = str(Path(__file__).resolve().parent.parent)  # where the package is found


@dataclass(frozen=True)
class Span:
    """The part of a video to decode, as `read_frames` takes it, and how to cut it into clips."""

    path: Path
    fps: float
    size: tuple[int, int]  # (height, width) in pixels
    frames: int  # frames of a clip
    start: float = 0.0  # seconds
    end: float | None = None
    clips: int | None = None  # at most so many clips, then the video is left alone; None: all
    skip: int = 0  # clips that are decoded and left out, before all others
    place: float | None = None  # begin at this share of the room between start and end, see `DecodedVideo.room`
    stride: int | None = None  # a clip begins every so many frames; None: where the one before ends
    region: tuple[int, int] | None = None  # (offset, size) of the video in the file; None: it is the whole file

    def __post_init__(self) -> None:
        if not (self.fps > 0 and self.start >= 0 and (self.end is None or self.start < self.end)):
            detail = f"fps {self.fps}, start {self.start} and end {self.end}"
            raise ValueError(f"{self.path}: {detail}: need fps > 0 and 0 <= start < end")
        if any(count is not None and count < 1 for count in (self.frames, self.clips, self.stride)):
            detail = f"frames {self.frames}, clips {self.clips} and stride {self.stride}"
            raise ValueError(f"{self.path}: {detail} must be at least 1")

    @property
    def video(self) -> Path | Region:
        """What `read_frames` reads."""
        return Region(self.path, *self.region) if self.region else self.path


@dataclass(frozen=True)
class Problem:
    """What ended a video early.

    reason: one of `VideoError`'s, or "too short" (for one clip), "unreadable" (the file system says no) or "too large"
    (for the worker's memory). "undecodable" is also what crashes a worker, or takes too long.
    """

    reason: str
    detail: str


class DecodedVideo:
    """The whole clips of one video, in order, each uint8 [frames, H, W, 3]. They can be iterated once.

    After the last clip, `problem` says what ended the video early, and `left` how many frames came after the last
    whole clip. After a crash `left` is 0: nobody knows.
    """

    def __init__(self, span: Span, worker: "_Worker"):
        self.span = span
        self.problem: Problem | None = None
        self.left = 0
        self.room = 0.0  # seconds in which a clip can begin, as far as the video declares its length
        self._passed = 0  # clips that the worker has given
        self._worker = worker
        # The worker's lock guards these.
        self._clips: deque[np.ndarray] = deque()  # decoded, and not yet taken
        self._wanted = False  # the consumer waits for a clip
        self._ended = False  # no clip comes after those in _clips
        self._dropped = False  # the consumer wants no more

    def _request(self) -> bytes:
        """What a worker is asked for: the clips that no worker has given yet."""
        entry = asdict(self.span) | {"path": os.fspath(Path(self.span.path).absolute())}
        entry["skip"] += self._passed
        if entry["clips"] is not None:
            entry["clips"] -= self._passed
        return json.dumps(entry).encode("ascii") + b"\n"

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        worker = self._worker
        with worker.changed:
            if self._dropped:
                raise RuntimeError(
                    f"{self.span.path}: its clips are gone, another video was taken or the iterator closed"
                )
            self._wanted = True
            worker.changed.notify_all()
            worker.changed.wait_for(lambda: self._clips or self._ended or worker.error or worker.closing)
            self._wanted = False
            if self._clips:
                worker.held -= 1
                worker.changed.notify_all()
                return self._clips.popleft()
            if self._ended:
                raise StopIteration
            raise RuntimeError(worker.error or "the decoders are closed")


class Decoders:
    """Worker processes that decode videos ahead of the consumer.

        with Decoders(workers=4) as decoders:
            for row, video in zip(rows, decoders.videos(spans)):
                for clip in video:
                    ...
                if video.problem: ...

    Videos go to the workers in turn. A worker decodes ahead until `ahead` whole clips wait for the consumer; one of
    them is the worker's own, the others are in this process. So all of it takes workers * `ahead` clips, and what the
    decoding takes. (A pipe holds 1 MiB more, which may be many tiny clips.) It looks ahead by at most `ahead` videos
    per worker.

    A worker that dies, makes no clip for `seconds_per_clip`, or needs more than `memory_gib` of address space ends its
    video with a `Problem`. A new one takes over. Time in which the worker waits for the consumer does not count. A
    worker that was killed (SIGKILL) may have died of what others did, such as filling the machine's memory. So the new
    one goes on with the same video, once.

    Leaving the `with` block kills the workers, whatever they do. They also end if this process dies.
    """

    def __init__(
        self, workers: int = 1, ahead: int = 2, seconds_per_clip: float = 300.0, memory_gib: float = 8.0
    ) -> None:
        if workers < 1 or ahead < 1:
            raise ValueError(f"{workers} workers, {ahead} clips ahead: both must be at least 1")
        if not (seconds_per_clip > 0 and memory_gib > 0):
            raise ValueError(f"{seconds_per_clip} s per clip, {memory_gib} GiB: both must be above 0")
        self._window = workers * (ahead + 1)
        self._workers = [_Worker(ahead, seconds_per_clip, memory_gib) for _ in range(workers)]
        self._pending: deque[DecodedVideo] = deque()  # the consumer's video and those after it

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join()

    def videos(self, spans: Iterable[Span]) -> Iterator[DecodedVideo]:
        """Yields one `DecodedVideo` per span, in order.

        Taking the next one drops what is left of the one before. So does closing the iterator, and so does another
        call of `videos`, for everything that this one still has. The clips are those of `read_frames`, byte for byte.

        Raises RuntimeError, one line, if workers do not start.
        """
        self._drop_pending()
        pending = self._pending = deque()
        turn, waiting = 0, iter(spans)
        try:
            while True:
                while len(pending) < self._window and (span := next(waiting, None)) is not None:
                    video = DecodedVideo(span, self._workers[turn % len(self._workers)])
                    turn += 1
                    pending.append(video)
                    video._worker.put(video)
                if not pending:
                    return
                yield pending[0]
                if self._pending is not pending:
                    raise RuntimeError("another iteration over videos began, which ends this one")
                pending[0]._worker.drop(pending[0])
                pending.popleft()
        finally:
            if self._pending is pending:
                self._drop_pending()

    def _drop_pending(self) -> None:
        # The last ones first: otherwise a worker would begin one that is dropped next.
        while self._pending:
            video = self._pending.pop()
            video._worker.drop(video)


# ---- the caller's side of one worker


class _Dropped(Exception):
    """The consumer wants no more clips of this video."""


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


class _Worker:
    """A worker process, its successors, and the thread that passes them spans and collects their clips."""

    def __init__(self, ahead: int, seconds: float, memory_gib: float):
        self.ahead, self.seconds, self.memory_gib = ahead, seconds, memory_gib
        self.process: subprocess.Popen | None = None
        # The thread starts the processes, since the kernel ends them with the thread that started them.
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._raw: _Answers
        self._answers: io.BufferedReader
        # This lock guards the fields below, the videos' fields, and the start of a process.
        self.changed = threading.Condition()
        self.queue: deque[DecodedVideo] = deque()
        self.current: DecodedVideo | None = None
        self.held = 0  # clips in this process that the consumer has not taken
        self.closing = False
        self.error: str | None = None  # why this worker can't go on

    # Called by the consumer's thread

    def put(self, video: DecodedVideo) -> None:
        """Queues a video."""
        with self.changed:
            if self.closing:
                raise RuntimeError("the decoders are closed")
            self.queue.append(video)
            self.changed.notify_all()
            if self.thread.ident is None:
                self.thread.start()

    def drop(self, video: DecodedVideo) -> None:
        """Stops work on a video, unless all its clips have been taken. Its clips are gone."""
        with self.changed:
            if video._ended and not video._clips:
                return
            video._dropped = True
            self.held -= len(video._clips)
            video._clips.clear()
            if self.current is video:
                self._kill()
            self.changed.notify_all()

    def close(self) -> None:
        """Kills the process and tells the thread to end."""
        with self.changed:
            self.closing = True
            self._kill()
            self.changed.notify_all()

    def join(self) -> None:
        """Waits until process and thread have ended. A process that the kernel can't end is not waited for."""
        if self.thread.ident is not None:
            self.thread.join(timeout=10)

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    # The worker's own thread

    def _run(self) -> None:
        try:
            while (video := self._next_video()) is not None:
                self._decode(video)
        except Exception as error:
            with self.changed:
                self.error = _one_line(error) if not isinstance(error, RuntimeError) else str(error)
                self.changed.notify_all()
        finally:
            self._stop()

    def _next_video(self) -> DecodedVideo | None:
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.closing or self.queue)
                if self.closing:
                    return None
                video = self.queue.popleft()
                if not video._dropped:
                    self.current = video
                    return video

    def _collect(self, video: DecodedVideo) -> dict:
        """Passes on the clips of a video. Returns the worker's last message. Raises EOFError when the worker dies."""
        for tries in (1, 2):
            try:
                self._send(video._request())
                while "left" not in (message := self._message(self.seconds)):
                    if message["clip"]:
                        self._wait_for_room(video)
                        self._pass_on(video)
                return message
            except EOFError:
                enough = video._passed == video.span.clips  # it died before it said that this is all
                if tries == 2 or enough or not self._was_killed():
                    raise
                self._start(video)
        raise AssertionError

    def _decode(self, video: DecodedVideo) -> None:
        """Has the process decode a video, and passes on its clips. All that goes wrong with it ends only this video."""
        problem, left, room, stop = None, 0, 0.0, False
        try:
            if self.process is None or self.process.poll() is not None:  # dead without work: no video's fault
                self._stop()
                self._start(video)
            message = self._collect(video)
            left, room = int(message["left"]), float(message["room"])
            if message["problem"] is not None:
                problem = Problem(*map(str, message["problem"]))
                stop = problem.reason == "too large"  # what it still holds is not known
        except _Dropped:
            stop = True
        except TimeoutError:
            problem, stop = Problem("undecodable", f"no clip within {self.seconds:g} s"), True
        except EOFError:
            problem = Problem("undecodable", self._death("the decoder crashed: "))
        except (ValueError, KeyError, TypeError, AttributeError):
            problem, stop = Problem("undecodable", "the decoder's answer makes no sense"), True
        with self.changed:
            self.current = None
            if not self.closing:  # otherwise it may only have been killed
                video.problem, video.left, video.room, video._ended = problem, left, room, True
            self.changed.notify_all()
            stop |= video._dropped  # then drop() has killed the process
        if stop:
            self._stop()

    def _wait_for_room(self, video: DecodedVideo) -> None:
        """Waits until one more clip may be in this process. Another is finished by then, in the worker."""
        with self.changed:
            self.changed.wait_for(lambda: self.held < self.ahead - 1 or video._wanted or video._dropped or self.closing)
            video._wanted = False
            if video._dropped or self.closing:
                raise _Dropped

    def _pass_on(self, video: DecodedVideo) -> None:
        clip = np.empty((video.span.frames, *video.span.size, 3), np.uint8)
        if self._answers.readinto(clip.data.cast("B")) < clip.nbytes:
            raise EOFError
        with self.changed:
            if video._dropped:
                raise _Dropped
            self.held += 1
            video._passed += 1
            video._clips.append(clip)
            self.changed.notify_all()

    def _send(self, request: bytes) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(request)
        except BrokenPipeError:
            raise EOFError from None

    def _message(self, seconds: float) -> dict:
        self._raw.allow(seconds)
        line = self._answers.readline(_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)

    def _start(self, video: DecodedVideo) -> None:
        """Starts a process and waits until it is ready. Raises RuntimeError if none of several starts."""
        how = ""
        for _ in range(STARTS):
            try:
                self._open(video)
                self._message(max(self.seconds, _START_SECONDS))
                return
            except EOFError:
                how = self._death("")
            except TimeoutError:
                how = "it takes too long"
            except OSError as error:  # no memory or no processes left
                how = error.strerror or str(error)
            except ValueError:
                how = "it prints something else"
            self._stop()
        command = f"{sys.executable} -m {_MODULE}"
        raise RuntimeError(f"the video decoder does not start ({how}); run `{command}` to see why")

    def _open(self, video: DecodedVideo) -> None:
        with self.changed:  # so that close() and drop() can't miss it
            if video._dropped or self.closing:
                raise _Dropped
            self.process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(self.memory_gib)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=_HOME,
                env=_environment(),
            )
            assert self.process.stdout is not None
            fd = self.process.stdout.fileno()
            with contextlib.suppress(AttributeError, OSError):  # not on this system, or this user's pipes are too large
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            self._raw = _Answers(fd)
            self._answers = io.BufferedReader(self._raw)

    def _was_killed(self) -> bool:
        """Whether SIGKILL ended the process. If so, it is put away."""
        process = self.process
        if process is None:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        if process.returncode != -signal.SIGKILL:
            return False
        self._stop()
        return True

    def _death(self, by_signal: str) -> str:
        """What ended the process, in words."""
        process = self.process
        self._stop(patience=1.0)
        status = process.returncode if process else None
        if status is None:
            return "the decoder can't be ended"
        if status < 0:
            with contextlib.suppress(ValueError):
                return by_signal + signal.Signals(-status).name
            return f"{by_signal}signal {-status}"
        return f"the decoder ended with status {status}"

    def _stop(self, patience: float = 0.0) -> None:
        """Ends the process. It has `patience` seconds to end by itself."""
        process = self.process
        if process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # longer only if it is stuck in the kernel
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        with self.changed:
            self.process = None


def _environment() -> dict[str, str]:
    """The environment of a worker: it finds this package, wherever this process was started."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([_HOME, *paths]), **threads}


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


# ---- the worker


def serve(requests: BinaryIO, answers: BinaryIO, memory_gib: float) -> None:
    """Answers every request, until there are no more."""

    def send(message: dict, data: memoryview | None = None) -> None:
        for view in (memoryview(json.dumps(message).encode("ascii") + b"\n"), data):
            while view:  # one write takes at most 2 GiB
                view = view[answers.write(view) :]

    send({"ready": True})
    for line in requests:
        entry = json.loads(line)
        span = Span(**entry | {"path": Path(entry["path"]), "size": tuple(entry["size"])})
        room = room_of(span)
        span = replace(span, start=span.start + (span.place or 0.0) * room)
        problem, left = decode(span, send, memory_gib)
        send({"problem": problem and [problem.reason, problem.detail], "left": left, "room": room})


def room_of(span: Span) -> float:
    """Seconds in which a clip of the span can begin. 0 if nobody asks for a `place`, or the length is not known."""
    if span.place is None:
        return 0.0
    end = span.end or declared_seconds(span.video) or 0.0
    return max(0.0, end - span.start - span.frames / span.fps)


def decode(span: Span, send: Callable[..., None], memory_gib: float) -> tuple[Problem | None, int]:
    """Sends every whole clip; of those that are left out, only that they are made. Returns problem and frames left."""
    clips = filled = after = 0  # filled: frames of the next clip, below 0 before it begins; after: those after a clip
    stride = span.stride or span.frames
    too_large = Problem("too large", f"needs more than {memory_gib:g} GiB of memory")
    try:
        clip = np.empty((span.frames, *span.size, 3), np.uint8)
        frames: Any = read_frames(span.video, span.fps, span.size, span.start, span.end)
        with contextlib.closing(frames):
            for frame in frames:
                if filled >= 0:
                    clip[filled] = frame
                elif filled % span.frames == 0:
                    send({"clip": False})  # a sign of life in a long gap
                filled, after = filled + 1, after + 1
                if filled == span.frames:
                    clips, filled, after = clips + 1, span.frames - stride, 0
                    if clips > span.skip:
                        send({"clip": True}, clip.data.cast("B"))
                    else:
                        send({"clip": False})
                    if span.clips is not None and clips == span.skip + span.clips:
                        return None, 0
                    for n in range(filled):  # the next clip begins with these
                        clip[n] = clip[n + stride]
    except VideoError as error:
        if error.detail.startswith(os.strerror(errno.ENOMEM)):
            return too_large, after
        return Problem(error.reason, error.detail), after
    except MemoryError:
        return too_large, after
    except OSError as error:
        return Problem("unreadable", error.strerror or _one_line(error)), after
    except Exception as error:
        return Problem("undecodable", _one_line(error)), after
    return (None if clips else Problem("too short", f"{after} of {span.frames} frames")), after


def main() -> None:
    """A worker process."""
    memory_gib = float(sys.argv[1]) if len(sys.argv) > 1 else 8.0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it; elsewhere the closed pipes end a worker
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for kind, limit in ((resource.RLIMIT_AS, int(memory_gib * 2**30)), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
            hard = resource.getrlimit(kind)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (limit, limit))
    # Whatever prints from now on, and whatever reads stdin, must not touch the two pipes.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    with contextlib.suppress(BrokenPipeError):
        serve(requests, answers, memory_gib)


if __name__ == "__main__":
    main()
