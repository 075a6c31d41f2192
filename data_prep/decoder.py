"""Decodes videos in worker processes, ahead of whoever needs the clips.

A file that crashes FFmpeg, hangs it, or makes it eat memory ends one worker, and not the job. `Decoders` is the
caller's side; `decoder_worker.py` is a worker.
"""

import contextlib
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from data_prep.decoder_process import MODULE, WorkerProcess
from data_prep.decoder_worker import Span, in_words
from data_prep.places import RemoteError
from data_prep.tars import Region, opened_here
from data_prep.video import Problem

STARTS = 3  # so many workers may fail to start in a row
_START_SECONDS = 60.0  # a worker starts in about 0.2 s; a busy machine takes longer


class DecodedVideo:
    """The whole clips of one video, in order, each uint8 [frames, H, W, 3]. They can be iterated once.

    No clip goes over a cut. After the last clip, `problem` says what ended the video early, and `left` how many frames
    are in no clip: those after the last one, and those before cuts. After a crash `left` is 0: nobody knows.
    """

    def __init__(self, span: Span, worker: "_Worker"):
        self.span = span
        self.problem: Problem | None = None
        self.left = 0
        self.begin = 0  # the number of the frame, from the span's start on, with which the last taken clip begins
        self.picture: tuple[int, int] | None = None  # (height, width), if only that was asked for
        self.room = 0.0  # seconds in which a clip can begin, as far as the video declares its length
        self._passed = 0  # clips that the worker has given
        self._worker = worker
        # The worker's lock guards these.
        self._clips: deque[tuple[np.ndarray, int]] = deque()  # decoded, and not yet taken, with their begin
        self._wanted = False  # the consumer waits for a clip
        self._ended = False  # no clip comes after those in _clips
        self._dropped = False  # the consumer wants no more

    def _request(self, local: Path | Region) -> bytes:
        """What a worker is asked for: the clips that no worker has given yet. `local`: where the video is here."""
        path, region = (local.path, (local.offset, local.size)) if isinstance(local, Region) else (local, None)
        assert isinstance(path, Path)
        entry = asdict(replace(self.span, path=path, region=region)) | {"path": os.fspath(path.absolute())}
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
                clip, self.begin = self._clips.popleft()
                return clip
            if self._ended:
                raise StopIteration
            raise worker.error or RuntimeError("the decoders are closed")


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

    A remote video is copied here first, into a file without a name in the folder for temporary files. It waits for a
    server that is away, and this does not count as time of the decoder.

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

        Raises RuntimeError, one line, if workers do not start; RemoteError, when a server stays away; OSError, when
        there is no room for the copy of a remote video.
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


# ---- one worker


class _Dropped(Exception):
    """The consumer wants no more clips of this video."""


class _NotReadable(Exception):
    """A remote video can't be copied."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.problem = problem


class _Worker:
    """A worker process, its successors, and the thread that passes them spans and collects their clips."""

    def __init__(self, ahead: int, seconds: float, memory_gib: float):
        self.ahead, self.seconds, self.memory_gib = ahead, seconds, memory_gib
        self.process: WorkerProcess | None = None
        # The thread starts the processes, since the kernel ends them with the thread that started them.
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        # This lock guards the fields below, the videos' fields, and the start of a process.
        self.changed = threading.Condition()
        self.queue: deque[DecodedVideo] = deque()
        self.current: DecodedVideo | None = None
        self.held = 0  # clips in this process that the consumer has not taken
        self.closing = False
        self.error: Exception | None = None  # why this worker can't go on
        self.copying = False  # a remote video; it may be waiting for its server

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
        """Waits until process and thread have ended, but not for the kernel or a server."""
        if self.thread.ident is not None:
            self.thread.join(timeout=0.1 if self.copying else 10)

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
                known = isinstance(error, RuntimeError | RemoteError) or getattr(error, "filename", None) is not None
                self.error = error if known else RuntimeError(in_words(error))
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

    def _collect(self, video: DecodedVideo, local: Path | Region) -> dict:
        """Passes on the clips of a video. Returns the worker's last message. Raises EOFError when the worker dies.

        `local`: where the video is here.
        """
        for tries in (1, 2):
            process = self._running()
            try:
                process.send(video._request(local))
                while "left" not in (message := process.message(self.seconds)):
                    if message["clip"]:
                        self._wait_for_room(video)
                        self._pass_on(video, int(message["begin"]))
                return message
            except EOFError:
                enough = video._passed == video.span.clips  # it died before it said that this is all
                if tries == 2 or enough or not process.was_killed():
                    raise
                self._stop()
                self._start(video)
        raise AssertionError

    def _decode(self, video: DecodedVideo) -> None:
        """Has the process decode a video, and passes on its clips. All that goes wrong with it ends only this video."""
        problem, left, room, stop = None, 0, 0.0, False
        try:
            with self._here(video) as local:
                if self.process is None or self.process.has_ended:  # dead without work: no video's fault
                    self._stop()
                    self._start(video)
                message = self._collect(video, local)
            left, room = int(message["left"]), float(message["room"])
            if message.get("picture") is not None:
                height, width = message["picture"]
                video.picture = int(height), int(width)
            if message["problem"] is not None:
                problem = Problem(*map(str, message["problem"]))
                stop = problem.reason == "too large"  # what it still holds is not known
        except _Dropped:
            stop = True
        except _NotReadable as error:
            problem = error.problem
        except RemoteError:  # the server stays away: no video's fault
            raise
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

    @contextlib.contextmanager
    def _here(self, video: DecodedVideo) -> Iterator[Path | Region]:
        """The video as a local one. Raises _NotReadable if a remote one is not as its list says."""

        def go_on() -> None:
            if video._dropped or self.closing:
                raise _Dropped

        copy = contextlib.ExitStack()
        self.copying = True
        try:
            local = copy.enter_context(opened_here(video.span.video, go_on))
        except OSError as error:
            if error.filename:  # of the copy
                raise
            reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            raise _NotReadable(Problem(reason, error.strerror or str(error))) from None
        finally:
            self.copying = False
        with copy:
            yield local

    def _wait_for_room(self, video: DecodedVideo) -> None:
        """Waits until one more clip may be in this process. Another is finished by then, in the worker."""
        with self.changed:
            self.changed.wait_for(lambda: self.held < self.ahead - 1 or video._wanted or video._dropped or self.closing)
            video._wanted = False
            if video._dropped or self.closing:
                raise _Dropped

    def _pass_on(self, video: DecodedVideo, begin: int) -> None:
        clip = np.empty((video.span.frames, *video.span.size, 3), np.uint8)
        self._running().read_into(clip)
        with self.changed:
            if video._dropped:
                raise _Dropped
            self.held += 1
            video._passed += 1
            video._clips.append((clip, begin))
            self.changed.notify_all()

    def _running(self) -> WorkerProcess:
        assert self.process is not None
        return self.process

    def _start(self, video: DecodedVideo) -> None:
        """Starts a process and waits until it is ready. Raises RuntimeError if none of several starts."""
        how = ""
        for _ in range(STARTS):
            try:
                self._open(video)
                self._running().message(max(self.seconds, _START_SECONDS))
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
        command = f"{sys.executable} -m {MODULE}"
        raise RuntimeError(f"the video decoder does not start ({how}); run `{command}` to see why")

    def _open(self, video: DecodedVideo) -> None:
        with self.changed:  # so that close() and drop() can't miss it
            if video._dropped or self.closing:
                raise _Dropped
            self.process = WorkerProcess(self.memory_gib)

    def _death(self, by_signal: str) -> str:
        """Ends the process. Returns what had ended it, in words."""
        process = self._running()
        self._stop(patience=1.0)
        return process.death(by_signal)

    def _stop(self, patience: float = 0.0) -> None:
        """Ends the process, if there is one. It has `patience` seconds to end by itself."""
        if self.process is not None:
            self.process.end(patience)
            with self.changed:
                self.process = None
