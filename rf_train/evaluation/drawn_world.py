"""What can be known exactly of the drawn world: which objects a video shows, and whether they move as they should.

A plain detector, no network. The world is `data_prep.draw`'s: flat shapes of known colours on a dark ground. A pixel
belongs to the colour on whose line from the ground it lies; pixels of a colour that touch make one object. Its kind
follows from how much of its bounding box it fills, and from whether its middle is empty.

Colours differ within a video. So the largest object of a colour is followed through the frames without any matching.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.draw import BACKGROUND, KINDS, PALETTE

COVERED = 0.5  # share of a pixel that a shape must cover to count
FAR = 70.0  # RGB distance from a colour's line at which a pixel is of no colour
SMALL = 0.2  # objects below this share of the smallest expected area are specks
THERE = 1 / 3  # share of its expected area that an object must have to be there
# How much of its bounding box a kind fills, and how far from that it may be, both as found in decoded true videos.
# What fits no kind of the world is a blob.
FILLS = {"square": (0.96, 0.16), "circle": (0.785, 0.12), "cross": (0.55, 0.12)}
NEAR = 2  # pixels between two objects at which one may hide part of the other, and their colours may mix
HIDDEN_SECONDS = 2.0  # an object that vanished behind another one is lost when it is away for longer
STRIDE_SECONDS = 0.75  # over which a velocity is measured, and a position predicted
TOLERANCE = 1.5  # pixels between a predicted and a found position


@dataclass(frozen=True)
class NamedObject:
    """An object that a caption names."""

    colour: str
    kind: str


@dataclass(frozen=True)
class FoundObject:
    """An object that a picture shows. Positions and lengths are pixels, y down."""

    colour: str
    kind: str  # the kind of the world that it has; "" for a blob
    area: int
    centre: tuple[float, float]  # (x, y) of the box
    box: tuple[int, int, int, int]  # left, top, right, bottom; the last two are past the end


def named_objects(caption: str) -> list[NamedObject]:
    """The objects that a caption of the drawn world names, front to back. Raises ValueError for another caption."""
    parts = [re.match(r"an? (\w+) (\w+) moving ", part) for part in caption.split(" in front of ")]
    found = [NamedObject(*match.groups()) for match in parts if match]
    known = all(thing.colour in PALETTE and thing.kind in KINDS for thing in found)
    if len(found) != len(parts) or not known:
        raise ValueError(f"caption {caption!r}: it does not name objects of the drawn world")
    return found


def colour_masks(frames: np.ndarray) -> dict[str, np.ndarray]:
    """For each colour of the palette bool [T, H, W]: the pixels of uint8 [T, H, W, 3] that are covered by it."""
    ground = np.array(BACKGROUND, np.float32)
    pixels = frames.astype(np.float32) - ground
    cover, distance = [], []
    for colour in PALETTE.values():
        line = np.array(colour, np.float32) - ground
        share = pixels @ line / (line @ line)
        cover.append(share)
        distance.append(np.linalg.norm(pixels - np.clip(share, 0, 1)[..., None] * line, axis=-1))
    nearest = np.argmin(distance, axis=0)
    found = (np.min(distance, axis=0) < FAR) & (np.take_along_axis(np.array(cover), nearest[None], 0)[0] > COVERED)
    return {name: found & (nearest == index) for index, name in enumerate(PALETTE)}


def label_components(mask: np.ndarray) -> np.ndarray:
    """Numbers the connected parts of bool [T, H, W], frame by frame, over 4 neighbours: int64 [T, H, W], 0 outside."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = labels.copy()
        for axis in (1, 2):
            low, high = [slice(None)] * 3, [slice(None)] * 3
            low[axis], high[axis] = slice(None, -1), slice(1, None)
            np.maximum(spread[tuple(high)], labels[tuple(low)], out=spread[tuple(high)])
            np.maximum(spread[tuple(low)], labels[tuple(high)], out=spread[tuple(low)])
        spread[~mask] = 0
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def find_objects(frames: np.ndarray, smallest: float, kinds: Sequence[str] = KINDS) -> list[list[FoundObject]]:
    """The objects in each frame of uint8 [T, H, W, 3], largest first.

    smallest: least area, in pixels. kinds: those that the world has.
    """
    found: list[list[FoundObject]] = [[] for _ in frames]
    for colour, mask in colour_masks(frames).items():
        labels = label_components(mask) if mask.any() else np.zeros(1, int)
        pixels = np.flatnonzero(labels)
        pixels = pixels[np.argsort(labels.ravel()[pixels], kind="stable")]
        ends = np.flatnonzero(np.diff(labels.ravel()[pixels])) + 1
        for part in np.split(pixels, ends):
            if len(part) >= max(1, smallest):
                time, y, x = np.unravel_index(part, mask.shape)
                found[time[0]].append(_object(colour, x, y, kinds))
    return [sorted(objects, key=lambda one: -one.area) for objects in found]


def _object(colour: str, x: np.ndarray, y: np.ndarray, kinds: Sequence[str]) -> FoundObject:
    """The object that covers the pixels at columns `x` and rows `y`."""
    left, top, right, bottom = int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1
    return FoundObject(
        colour=colour,
        kind=_kind(x, y, (left, top, right, bottom), kinds),
        area=len(x),
        centre=((left + right) / 2, (top + bottom) / 2),
        box=(left, top, right, bottom),
    )


def _kind(x: np.ndarray, y: np.ndarray, box: tuple[int, int, int, int], kinds: Sequence[str]) -> str:
    """The kind of an object: a ring if its middle is empty, else the one that fills its box most alike.

    "" for a blob.
    """
    left, top, right, bottom = box
    middle = (abs(x + 0.5 - (left + right) / 2) <= 1) & (abs(y + 0.5 - (top + bottom) / 2) <= 1)
    if middle.sum() < 2 and "ring" in kinds:
        return "ring"
    fill = len(x) / ((right - left) * (bottom - top))
    misses = {kind: abs(FILLS[kind][0] - fill) for kind in kinds if kind in FILLS}
    return min((kind for kind in misses if misses[kind] <= FILLS[kind][1]), key=misses.__getitem__, default="")


def near(a: FoundObject, b: FoundObject) -> bool:
    """Whether at most NEAR pixels are between the boxes of two objects."""
    return all(a.box[i] - NEAR <= b.box[i + 2] and b.box[i] - NEAR <= a.box[i + 2] for i in (0, 1))


# ---- over a whole video


@dataclass(frozen=True)
class Track:
    """One named object through the T frames of a video."""

    named: NamedObject
    there: np.ndarray  # bool [T]: it has at least THERE of its expected area
    hidden: np.ndarray  # bool [T]: it is not there, and vanished beside another object a short time ago
    right_kind: np.ndarray  # float [T]: 1, 0, or NaN where its kind can't be told
    centre: np.ndarray  # float [T, 2]: (x, y) of its bounding box in pixels; NaN where another object is near
    half: np.ndarray  # float [2]: half the usual sides of its bounding box


@dataclass(frozen=True)
class WatchedVideo:
    """The named objects of one video of the drawn world, frame by frame."""

    tracks: list[Track]
    extra: np.ndarray  # int [T]: objects found beyond the named ones
    size: tuple[int, int]  # (width, height) in pixels
    fps: float

    @cached_property
    def stride(self) -> int:
        """Frames over which a velocity is measured."""
        return max(1, round(STRIDE_SECONDS * self.fps))


def expected_areas(true: np.ndarray, named: Sequence[NamedObject]) -> dict[str, int]:
    """For each named colour the pixels of its object where most of it is seen, in the true video [T, H, W, 3]."""
    masks = colour_masks(true)
    areas = {one.colour: masks[one.colour].sum(axis=(1, 2)) for one in named}
    return {colour: max(1, int(np.quantile(area, 0.9))) for colour, area in areas.items()}


def watch(
    frames: np.ndarray, named: Sequence[NamedObject], areas: dict[str, int], fps: float, kinds: Sequence[str]
) -> WatchedVideo:
    """Follows the named objects through a video, uint8 [T, H, W, 3]. `areas`: see `expected_areas`."""
    found = find_objects(frames, SMALL * min(areas.values()), kinds)
    # By named colour, the largest object in each frame.
    largest = [[next((o for o in objects if o.colour == one.colour), None) for one in named] for objects in found]
    longest = max(1, round(HIDDEN_SECONDS * fps))
    tracks = []
    for index, one in enumerate(named):
        own = [objects[index] for objects in largest]
        others = [[o for i, o in enumerate(objects) if o and i != index] for objects in largest]
        tracks.append(_track(one, own, others, areas[one.colour], longest))
    extra = [_count_extra(objects, [o for o in mains if o]) for objects, mains in zip(found, largest)]
    return WatchedVideo(tracks, np.array(extra), (frames.shape[2], frames.shape[1]), fps)


def _count_extra(objects: list[FoundObject], mains: list[FoundObject]) -> int:
    """Objects beyond the largest ones of each named colour. Where two of these touch, their colours mix to others."""
    rest = [one for one in objects if not any(one is main for main in mains)]
    return sum(sum(near(one, main) for main in mains) < 2 for one in rest)


def _track(
    named: NamedObject,
    own: list[FoundObject | None],
    others: list[list[FoundObject]],
    area: int,
    longest: int,
) -> Track:
    """Follows one object. `others`: the other named objects of each frame. Away for over `longest` frames it is lost.

    Its kind can't be told, and its centre isn't known, where another one is near.
    """
    count = len(own)
    there, hidden = np.zeros(count, bool), np.zeros(count, bool)
    right_kind, centre, sides = np.full(count, np.nan), np.full((count, 2), np.nan), []
    beside, away = False, longest  # whether another object was near when it was last seen; frames since then
    for t, (one, around) in enumerate(zip(own, others)):
        if one is None or one.area < THERE * area:
            away += 1
            hidden[t] = beside and away <= longest
            continue
        there[t], away, beside = True, 0, any(near(one, other) for other in around)
        if not beside:
            centre[t], right_kind[t] = one.centre, one.kind == named.kind
            sides.append((one.box[2] - one.box[0], one.box[3] - one.box[1]))
    half = np.median(np.array(sides), axis=0) / 2 if sides else np.zeros(2)
    return Track(named, there, hidden, right_kind, centre, half)


# ---- what is measured, over the frames of a segment


def kept(video: WatchedVideo, part: slice) -> float | None:
    """Share of frames in which a named object is there. Frames in which it is hidden behind another don't count."""
    return _mean([track.there[part][~track.hidden[part]] for track in video.tracks])


def shape_kept(video: WatchedVideo, part: slice) -> float | None:
    """Share of frames in which a named object is there and has its kind. Where it can't be told, it doesn't count."""
    values = [np.where(track.there, track.right_kind, 0.0)[part][~track.hidden[part]] for track in video.tracks]
    return _mean([value[np.isfinite(value)] for value in values])


def extra_objects(video: WatchedVideo, part: slice) -> float | None:
    """Mean number of objects in a frame beyond the named ones."""
    return float(video.extra[part].mean()) if len(video.extra[part]) else None


def comes_back(video: WatchedVideo, part: slice) -> float | None:
    """Share of the times that an object vanished behind another one in the segment after which it came back."""
    returns = []
    for track in video.tracks:
        starts = np.flatnonzero(track.hidden[1:] & ~track.hidden[:-1]) + 1
        for start in starts[(starts >= part.start) & (starts < part.stop)]:
            ends = np.flatnonzero(~track.hidden[start:])
            if len(ends):  # otherwise the video ends first
                returns.append(track.there[start + ends[0]])
    return _mean([np.array(returns)])


def speed(video: WatchedVideo, part: slice) -> float | None:
    """Median speed of the named objects in pixels per frame, while they touch no wall."""
    found = []
    for track in video.tracks:
        times = _times(video, part, 0, 1)
        free = times[~_touches_wall(video, track, times, times + video.stride)]
        moved = track.centre[free + video.stride] - track.centre[free]
        found.append(np.linalg.norm(moved, axis=1) / video.stride)
    values = np.concatenate(found) if found else np.zeros(0)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def goes_straight(video: WatchedVideo, part: slice) -> float | None:
    """Share of predictions that hold, away from the walls: an object goes on as it went before.

    A frozen object does that, too: see speed.
    """
    return _mean([held[~wall] for held, wall in (_predictions(video, track, part) for track in video.tracks)])


def bounces(video: WatchedVideo, part: slice) -> float | None:
    """Share of predictions that hold where an object reaches a wall: it turns back there, and nowhere else."""
    return _mean([held[wall] for held, wall in (_predictions(video, track, part) for track in video.tracks)])


def _predictions(video: WatchedVideo, track: Track, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Whether each predicted position holds, and whether a wall is on the way: two bool arrays.

    Positions at three times, a stride apart. From the first two follows the third: straight on, and mirrored at the
    walls. Only where all three are known, and where no wall was touched between the first two.
    """
    times = _times(video, part, -1, 1)
    before, now, later = (track.centre[times + k * video.stride] for k in (-1, 0, 1))
    low, high = track.half, np.array(video.size) - track.half
    straight = 2 * now - before
    folded = np.where(straight < low, 2 * low - straight, np.where(straight > high, 2 * high - straight, straight))
    known = np.isfinite(before + now + later).all(axis=1) & ~_touches_wall(video, track, times - video.stride, times)
    wall = ((straight < low) | (straight > high)).any(axis=1)
    held = (abs(folded - later) <= TOLERANCE).all(axis=1)
    return held[known], wall[known]


def _times(video: WatchedVideo, part: slice, first: int, last: int) -> np.ndarray:
    """The frames t for which t + first strides .. t + last strides lie within the segment."""
    begin, end = part.start - first * video.stride, part.stop - last * video.stride
    return np.arange(begin, max(begin, end))


def _touches_wall(video: WatchedVideo, track: Track, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """bool [n]: the object is within a pixel of a border in one of the frames begin .. end, both [n]."""
    high = np.array(video.size) - track.half
    with np.errstate(invalid="ignore"):
        touches = ((track.centre <= track.half + 1) | (track.centre >= high - 1)).any(axis=1)
    total = np.concatenate([[0], np.cumsum(touches)])
    return total[end + 1] > total[begin]


def _mean(parts: Sequence[np.ndarray]) -> float | None:
    values = np.concatenate([np.asarray(part, float) for part in parts]) if parts else np.zeros(0)
    return float(values.mean()) if len(values) else None
