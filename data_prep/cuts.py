"""Scene cuts: where a picture is followed by one of another scene.

The detector compares pictures reduced to SIDE x SIDE colours. The change d_n from the one before is the mean absolute
difference of their values, 0 to 255. A cut has

    d_n >= threshold  and  d_n > RATIO * d_m  for all other changes m within NEIGHBOURS of n.

Fast motion and a moving camera change many pictures in a row, and a flash changes two. A cut changes one. Fades and
dissolves are not found; nor are cuts with NEIGHBOURS pictures or fewer between them, and those into motion
that changes pictures half as much as the cut.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

SIDE = 16
NEIGHBOURS = 3
RATIO = 2.0
THRESHOLD = 12.0  # the usual one


def mark_cuts(frames: Iterable[np.ndarray], threshold: float) -> Iterator[tuple[np.ndarray, bool]]:
    """Yields each frame, uint8 [H, W, 3], and whether a scene begins with it: never with the first one.

    A frame that is the very same object as the one before is a repetition, for the frame rate's sake: no change. What
    `frames` raises comes behind the frames before it.
    """
    waiting: deque[tuple[np.ndarray, float | None]] = deque()  # frames with their change; None: a repetition
    changes: deque[float] = deque(maxlen=2 * NEIGHBOURS + 1)  # of the last frames that are no repetitions
    ahead = 0  # how many of these are waiting
    before: np.ndarray | None = None
    small_before: np.ndarray | None = None
    error: Exception | None = None
    stream = iter(frames)
    while True:
        try:
            frame = next(stream, None)
        except Exception as raised:
            frame, error = None, raised
        if frame is not None:
            if frame is before:
                waiting.append((frame, None))
            else:
                small = reduced(frame)
                change = 0.0 if small_before is None else float(np.abs(small - small_before).mean())
                waiting.append((frame, change))
                changes.append(change)
                ahead, before, small_before = ahead + 1, frame, small
        while waiting and (frame is None or ahead > NEIGHBOURS or waiting[0][1] is None):
            first, own = waiting.popleft()
            cut = False
            if own is not None:
                place = len(changes) - ahead
                ahead -= 1
                near = [change for n, change in enumerate(changes) if n != place and abs(n - place) <= NEIGHBOURS]
                cut = own >= threshold and all(own > RATIO * change for change in near)
            yield first, cut
        if frame is None:
            break
    if error is not None:
        raise error


def reduced(frame: np.ndarray) -> np.ndarray:
    """A picture, uint8 [H, W, 3], as float32 [SIDE, SIDE, 3] of mean colours."""
    return np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)


def frames_of_cuts(cuts: Iterable[float], start: float, fps: float) -> set[int]:
    """The numbers of the frames with which scenes begin, of a video read from `start` on; `cuts` are in seconds."""
    tolerance = 0.001  # seconds: containers round their times to it
    return {max(0, int(np.ceil((cut - start - tolerance) * fps))) for cut in cuts if cut > start}
