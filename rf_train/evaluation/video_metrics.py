"""How a generated video is compared with the truth, segment by segment. One entry per metric in `VIDEO_METRICS`.

Some metrics favour an empty or a frozen picture. Their texts say so, and name a metric that catches it. The command
`python -m rf_train.evaluate RUN --calibrate` shows how each one moves when real clips are blurred, darkened, ....
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rf_train.evaluation import drawn_world
from rf_train.evaluation.drawn_world import WatchedVideo


@dataclass(frozen=True)
class VideoPair:
    """A generated video and the true one that it continues: the same caption, the same `given` first frames."""

    made: np.ndarray  # uint8 [T, H, W, 3]
    true: np.ndarray  # uint8 [T, H, W, 3]
    latent_made: np.ndarray  # [C, F, H, W]
    latent_true: np.ndarray  # [C, F, H, W]
    given: int  # video frames that are the truth in both
    fps: float = 16.0
    caption: str = ""
    kinds: Sequence[str] = ()  # kinds of objects in this drawn world; empty for any other video
    # [T]: how well each frame agrees with its prompt, NaN for frames that were not looked at; None without an encoder
    text_made: np.ndarray | None = None
    text_true: np.ndarray | None = None

    @cached_property
    def watched_pair(self) -> tuple[WatchedVideo, WatchedVideo] | None:
        """The named objects of the generated and of the true video, for the drawn world."""
        if not self.kinds:
            return None
        named = drawn_world.named_objects(self.caption)
        areas = drawn_world.expected_areas(self.true, named)
        made, true = (drawn_world.watch(x, named, areas, self.fps, self.kinds) for x in (self.made, self.true))
        return made, true


@dataclass(frozen=True)
class Segment:
    """Some seconds of a generated video, and the same ones of the truth.

    Without a truth, `first` is the video's own first segment, with which the others are compared.
    """

    video: VideoPair
    frames: slice
    latent_frames: slice
    first: "Segment | None" = None

    @property
    def made(self) -> np.ndarray:
        return self.video.made[self.frames]

    @property
    def true(self) -> np.ndarray:
        return self.video.true[self.frames] if self.first is None else self.first.made

    @property
    def latent_made(self) -> np.ndarray:
        return self.video.latent_made[:, self.latent_frames]

    @property
    def latent_true(self) -> np.ndarray:
        return self.video.latent_true[:, self.latent_frames] if self.first is None else self.first.latent_made


@dataclass(frozen=True)
class VideoMetric:
    """One metric: its name, which values are good, what it says, and how it is measured. None: not measured here."""

    name: str
    better: str  # "lower", "higher", "near 0" or "near 1"
    meaning: str
    measure: Callable[[Segment], float | None]
    needs_truth: bool = False  # it says nothing of a segment that is compared with the video's own first one

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


def compare(segment: Segment) -> dict[str, float | None]:
    """Every metric of one segment, by name."""
    return {
        metric.name: None if metric.needs_truth and segment.first is not None else metric.measure(segment)
        for metric in VIDEO_METRICS
    }


# ---- what is measured of pictures


def colour_histogram(frames: np.ndarray, levels: int = 5) -> np.ndarray:
    """Shares of colours in uint8 [T, H, W, 3]: levels^3 numbers that sum to 1.

    Each pixel is split between the nearest levels of each channel. So a small change of a colour is a small one here.
    """
    pixels = frames.reshape(-1, 3)
    pixels = pixels[:: max(1, len(pixels) // 200_000)]  # enough of large pictures
    position = pixels.T.astype(np.float32) * ((levels - 1) / 255)
    low = np.minimum(position.astype(np.int32), levels - 2)
    upper = position - low  # the share of the upper level, by channel
    shares = np.zeros(levels**3)
    for r, g, b in np.ndindex(2, 2, 2):
        weight = np.prod([u if bit else 1 - u for u, bit in zip(upper, (r, g, b))], axis=0)
        shares += np.bincount(((low[0] + r) * levels + low[1] + g) * levels + low[2] + b, weight, levels**3)
    return shares / len(pixels)


def colour_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Hellinger distance of the colour histograms of two videos: 0 for the same colours, 1 for none in common."""
    p, q = colour_histogram(one), colour_histogram(other)
    return float(np.sqrt(max(0.0, 1 - np.sqrt(p * q).sum())))


def luminance(frames: np.ndarray) -> np.ndarray:
    """Rec. 709 luminance of uint8 [T, H, W, 3], in 0 .. 1: float32 [T, H, W]."""
    return frames.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], np.float32) / 255


def gradient(frames: np.ndarray) -> float:
    """Root mean square difference between neighbouring pixels.

    (The mean absolute difference doesn't see blur: an edge keeps its total rise.)
    """
    x = frames.astype(np.float32)
    return float(np.sqrt((np.diff(x, axis=1) ** 2).mean() + (np.diff(x, axis=2) ** 2).mean()))


def contrast(frames: np.ndarray) -> float:
    """Standard deviation of luminance within a frame, mean over frames."""
    return float(luminance(frames).std(axis=(1, 2)).mean())


def change(frames: np.ndarray, order: int) -> float:
    """Mean absolute difference between neighbouring frames (order 1), or between neighbouring differences (order 2)."""
    return float(np.abs(np.diff(frames.astype(np.float32), n=order, axis=0)).mean()) if len(frames) > order else 0.0


def psnr(segment: Segment) -> float:
    """Peak signal-to-noise ratio in dB."""
    mse = float(((segment.made.astype(np.float32) - segment.true) ** 2).mean())
    return float(10 * np.log10(255**2 / max(mse, 1e-6)))


def ratio(made: float, true: float) -> float:
    return made / max(true, 1e-6)


def difference(made: float | None, true: float | None) -> float | None:
    return None if made is None or true is None else made - true


def text_agreement(by_frame: np.ndarray | None, frames: slice) -> float | None:
    """The mean over the frames that were looked at; None without any."""
    looked_at = [] if by_frame is None else by_frame[frames][~np.isnan(by_frame[frames])]
    return float(np.mean(looked_at)) if len(looked_at) else None


def of_drawn(measure: Callable[[WatchedVideo, slice], float | None]) -> Callable[[Segment], float | None]:
    """A metric of the generated video in the drawn world; None for other videos."""

    def measured(segment: Segment) -> float | None:
        pair = segment.video.watched_pair
        return None if pair is None else measure(pair[0], segment.frames)

    return measured


def speed_ratio(segment: Segment) -> float | None:
    """The named objects' median speed in this segment, over that in the whole true video."""
    pair = segment.video.watched_pair
    if pair is None:
        return None
    made = drawn_world.speed(pair[0], segment.frames)
    true = drawn_world.speed(pair[1], slice(0, len(segment.video.true)))
    return None if made is None or true is None else ratio(made, true)


DRAWN_METRICS = (
    VideoMetric(
        "objects_kept",
        "higher",
        "share of frames in which a named object is there: its colour covers, in one piece, at least a third of its "
        "area. Frames in which it is hidden behind another don't count. A frozen picture keeps its objects: see speed",
        of_drawn(drawn_world.kept),
    ),
    VideoMetric(
        "shape_kept",
        "higher",
        "share of frames in which a named object is there and has the right shape. A frozen picture keeps it, too: "
        "see speed",
        of_drawn(drawn_world.shape_kept),
    ),
    VideoMetric(
        "extra_objects",
        "lower",
        "mean number of objects in a frame beyond the named ones. An empty picture has none: see objects kept",
        of_drawn(drawn_world.extra_objects),
    ),
    VideoMetric(
        "comes_back",
        "higher",
        "share of the times an object vanishes behind another one after which it comes back within 2 s",
        of_drawn(drawn_world.comes_back),
    ),
    VideoMetric(
        "speed",
        "near 1",
        "median speed of the named objects, generated over true: 0 is a frozen picture. An empty picture has none: see "
        "objects kept",
        speed_ratio,
    ),
    VideoMetric(
        "goes_straight",
        "higher",
        "share of frames in which an object, away from the walls, is where its motion of the 0.75 s before leads to. "
        "A frozen picture does that: see speed",
        of_drawn(drawn_world.goes_straight),
    ),
    VideoMetric(
        "bounces",
        "higher",
        "the same, where an object reaches a wall: it must turn back there. A frozen picture reaches none",
        of_drawn(drawn_world.bounces),
    ),
)

GENERAL_METRICS = (
    VideoMetric(
        "colour_distance",
        "lower",
        "Hellinger distance between the colour histograms of the segment, generated and true: colours and areas, "
        "wherever they are. A frozen picture keeps it low: see motion",
        lambda s: colour_distance(s.made, s.true),
        needs_truth=True,
    ),
    VideoMetric(
        "colour_drift",
        "lower",
        "Hellinger distance between the colour histograms of the segment and of the frames that were given. It needs "
        "no truth. A frozen picture has none: see motion",
        lambda s: colour_distance(s.made, s.video.made[: s.video.given]),
    ),
    VideoMetric(
        "exposure",
        "near 0",
        "mean luminance, generated minus true, as a share of white",
        lambda s: float(luminance(s.made).mean() - luminance(s.true).mean()),
    ),
    VideoMetric(
        "contrast",
        "near 1",
        "standard deviation of luminance within a frame, generated over true",
        lambda s: ratio(contrast(s.made), contrast(s.true)),
    ),
    VideoMetric(
        "sharpness",
        "near 1",
        "root mean square image gradient, generated over true: below 1 is blur or lost shapes, above 1 is noise",
        lambda s: ratio(gradient(s.made), gradient(s.true)),
    ),
    VideoMetric(
        "motion",
        "near 1",
        "mean absolute change between frames, generated over true: 0 is a frozen or an empty picture",
        lambda s: ratio(change(s.made, 1), change(s.true, 1)),
    ),
    VideoMetric(
        "flicker",
        "near 1",
        "mean absolute change of the change between frames, generated over true: above 1 is jitter. A frozen picture "
        "has 0: see motion",
        lambda s: ratio(change(s.made, 2), change(s.true, 2)),
    ),
    VideoMetric(
        "psnr",
        "higher",
        "dB against the true continuation, frame by frame. It falls when positions differ, even where the world is "
        "kept. An empty picture can score better than one with shapes in other places: see colour distance",
        psnr,
        needs_truth=True,
    ),
    VideoMetric(
        "latent_mse",
        "lower",
        "mean squared distance of latents from the true continuation. Like psnr it prefers nothing to something in "
        "another place",
        lambda s: float(((s.latent_made - s.latent_true) ** 2).mean()),
        needs_truth=True,
    ),
)

TEXT_METRICS = (
    VideoMetric(
        "text_agreement",
        "higher",
        "cosine of the embeddings of the prompt and of frames, mean over frames. What is good depends on the encoder: "
        "see text gap. A frozen picture keeps it: see motion",
        lambda s: text_agreement(s.video.text_made, s.frames),
    ),
    VideoMetric(
        "text_gap",
        "near 0",
        "text agreement, generated minus true",
        lambda s: difference(text_agreement(s.video.text_made, s.frames), text_agreement(s.video.text_true, s.frames)),
        needs_truth=True,
    ),
)

VIDEO_METRICS = DRAWN_METRICS + GENERAL_METRICS + TEXT_METRICS
