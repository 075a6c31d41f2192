"""A worker that decodes videos: `python -m data_prep.decoder_worker MEMORY_GIB`.

It reads requests on stdin, a line of JSON each (a `Span`). To each it answers on stdout with clips, and then the end. A
message is a line of JSON; a clip's raw bytes follow its line. The first message says that the worker has started.

The JSON is plain ASCII, so that file names that are not UTF-8 pass: Python holds their bytes as surrogates.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.cuts import frames_of_cuts, mark_cuts
from data_prep.places import Place
from data_prep.tars import Region, video_at
from data_prep.video import Problem, VideoError, declared_seconds, picture_size, read_frames

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True)
class Span:
    """The part of a video to decode, as `read_frames` takes it, and how to cut it into clips."""

    path: Place
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
    cuts: tuple[float, ...] = ()  # seconds at which a scene begins: no clip goes over one
    cut_threshold: float = 0.0  # of the detector in `cuts.py`, for other cuts; 0: there is none
    only_size: bool = False  # no clip is wanted, only the size of the picture: `DecodedVideo.picture`

    def __post_init__(self) -> None:
        if not (self.fps > 0 and self.start >= 0 and (self.end is None or self.start < self.end)):
            detail = f"fps {self.fps}, start {self.start} and end {self.end}"
            raise ValueError(f"{self.path}: {detail}: need fps > 0 and 0 <= start < end")
        if any(count is not None and count < 1 for count in (self.frames, self.clips, self.stride)):
            detail = f"frames {self.frames}, clips {self.clips} and stride {self.stride}"
            raise ValueError(f"{self.path}: {detail} must be at least 1")

    @property
    def video(self) -> Path | Region:
        """What `read_frames` reads, if it is local."""
        return video_at(self.path, self.region)


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
        if span.only_size:
            size, problem = look(span, memory_gib)
            send({"problem": problem and [problem.reason, problem.detail], "left": 0, "room": 0, "picture": size})
            continue
        room = room_of(span)
        span = replace(span, start=span.start + (span.place or 0.0) * room)
        problem, left = decode(span, send, memory_gib)
        send({"problem": problem and [problem.reason, problem.detail], "left": left, "room": room})


def in_words(error: BaseException) -> str:
    """An unforeseen error, in one line of at most 500 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def room_of(span: Span) -> float:
    """Seconds in which a clip of the span can begin. 0 if nobody asks for a `place`, or the length is not known."""
    if span.place is None:
        return 0.0
    end = span.end or declared_seconds(span.video) or 0.0
    return max(0.0, end - span.start - span.frames / span.fps)


def decode(span: Span, send: Callable[..., None], memory_gib: float) -> tuple[Problem | None, int]:
    """Sends every whole clip; of those that are left out, only that they are made. Returns problem and frames left."""
    clips = filled = after = 0  # filled: frames of the next clip, below 0 before it begins; after: those after a clip
    lost = longest = 0  # frames after a clip and before a cut: all of them, and the most
    stride = span.stride or span.frames
    given = frames_of_cuts(span.cuts, span.start, span.fps)
    try:
        clip = np.empty((span.frames, *span.size, 3), np.uint8)
        frames: Any = read_frames(span.video, span.fps, span.size, span.start, span.end)
        with contextlib.closing(frames):
            marked = mark_cuts(frames, span.cut_threshold) if span.cut_threshold else zip(frames, repeat(False))
            for number, (frame, cut) in enumerate(marked):
                if cut or number in given:
                    lost, longest = lost + after, max(longest, after)
                    filled = after = 0
                    send({"clip": False})  # a sign of life: there may be many cuts, and no clip
                if filled >= 0:
                    clip[filled] = frame
                elif filled % span.frames == 0:
                    send({"clip": False})  # another, in a long gap
                filled, after = filled + 1, after + 1
                if filled == span.frames:
                    clips, filled, after = clips + 1, span.frames - stride, 0
                    if clips > span.skip:
                        send({"clip": True, "begin": number + 1 - span.frames}, clip.data.cast("B"))
                    else:
                        send({"clip": False})
                    if span.clips is not None and clips == span.skip + span.clips:
                        return None, 0
                    for n in range(filled):  # the next clip begins with these
                        clip[n] = clip[n + stride]
    except Exception as error:
        return problem_of(error, memory_gib), lost + after
    if clips:
        return None, lost + after
    between = " between cuts" if lost else ""
    return Problem("too short", f"{max(longest, after)} of {span.frames} frames{between}"), lost + after


def look(span: Span, memory_gib: float) -> tuple[tuple[int, int] | None, Problem | None]:
    """The (height, width) of the picture, or why it can't be known."""
    try:
        return picture_size(span.video), None
    except Exception as error:
        return None, problem_of(error, memory_gib)


def problem_of(error: Exception, memory_gib: float) -> Problem:
    """What an error of reading a video means."""
    if isinstance(error, MemoryError) or str(getattr(error, "detail", "")).startswith(os.strerror(errno.ENOMEM)):
        return Problem("too large", f"needs more than {memory_gib:g} GiB of memory")
    if isinstance(error, VideoError):
        return Problem(error.reason, error.detail)
    if isinstance(error, OSError):
        return Problem("unreadable", error.strerror or in_words(error))
    return Problem("undecodable", in_words(error))


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
