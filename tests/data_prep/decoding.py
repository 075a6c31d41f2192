"""What the tests of decoding in worker processes share."""

import time
from pathlib import Path

import numpy as np

from data_prep.decoder import Span
from data_prep.video import VideoError, read_frames

PROJECT = Path(__file__).resolve().parent.parent.parent
SIZE, FRAMES = (256, 384), 5  # a clip of 1.5 MB: no pipe holds one


def span(path, **more):
    return Span(**{"path": path, "fps": 25, "size": (32, 48), "frames": FRAMES, **more})


def expected(path, fps=25, size=(32, 48), frames=FRAMES, start=0.0, end=None):
    """(whole clips, frames left, reason) from reading in this process."""
    read, reason = [], None
    try:
        for frame in read_frames(path, fps, size, start, end):
            read.append(frame)
    except VideoError as error:
        reason = error.reason
    whole = len(read) // frames
    return [np.stack(read[n * frames : (n + 1) * frames]) for n in range(whole)], len(read) % frames, reason


def same(clips, others):
    return len(clips) == len(others) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(clips, others)
    )


def eventually(condition, seconds=20.0):
    """Waits until the condition holds; False if it never does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def started(pid):
    """Whether a worker has set its limits, the last thing before it serves: until then its death costs no video."""
    return str(8 << 30) in Path(f"/proc/{pid}/limits").read_text()


def gone(pid):
    """Whether a process has ended; one that nobody has collected yet has, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def pids(decoders):
    return [worker.process.pid for worker in decoders._workers if worker.process]
