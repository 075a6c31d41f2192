"""How a generated segment of video is compared with the truth. One entry per metric in `VIDEO_METRICS`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SegmentPair:
    """A segment of a generated video, and the same seconds of the truth."""

    made: np.ndarray  # uint8 [T, H, W, 3]
    true: np.ndarray  # uint8 [T, H, W, 3]
    latent_made: np.ndarray  # [C, F, H, W]
    latent_true: np.ndarray  # [C, F, H, W]


@dataclass(frozen=True)
class VideoMetric:
    """One metric: its name, which values are good, and what it says."""

    name: str
    better: str  # "lower", "higher" or "near 1"
    meaning: str
    measure: Callable[[SegmentPair], float]

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


def colour_histogram(frames: np.ndarray, levels: int = 5) -> np.ndarray:
    """Shares of colours in uint8 [T, H, W, 3]: levels^3 numbers that sum to 1.

    Each pixel is split between the nearest levels of each channel, so that a small change of colour is a small change.
    """
    pixels = frames.reshape(-1, 3)
    pixels = pixels[:: max(1, len(pixels) // 200_000)]  # enough of large pictures
    position = pixels.T.astype(np.float32) * ((levels - 1) / 255)
    low = np.minimum(position.astype(np.int32), levels - 2)
    upper = position - low  # the share of the upper level, per channel
    shares = np.zeros(levels**3)
    for r, g, b in np.ndindex(2, 2, 2):
        weight = np.prod([u if bit else 1 - u for u, bit in zip(upper, (r, g, b))], axis=0)
        shares += np.bincount(((low[0] + r) * levels + low[1] + g) * levels + low[2] + b, weight, levels**3)
    return shares / len(pixels)


def colour_distance(pair: SegmentPair) -> float:
    """Hellinger distance of the two colour histograms: 0 for the same colours, 1 for none in common."""
    p, q = colour_histogram(pair.made), colour_histogram(pair.true)
    return float(np.sqrt(max(0.0, 1 - np.sqrt(p * q).sum())))


def gradient(frames: np.ndarray) -> float:
    """Root mean square difference between neighbouring pixels.

    The mean absolute difference would not show blur, because a blurred edge keeps its total rise.
    """
    x = frames.astype(np.float32)
    return float(np.sqrt((np.diff(x, axis=1) ** 2).mean() + (np.diff(x, axis=2) ** 2).mean()))


def change(frames: np.ndarray) -> float:
    """Mean absolute difference between neighbouring frames."""
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean()) if len(frames) > 1 else 0.0


def psnr(pair: SegmentPair) -> float:
    """Peak signal-to-noise ratio in dB."""
    mse = float(((pair.made.astype(np.float32) - pair.true) ** 2).mean())
    return 10 * np.log10(255**2 / max(mse, 1e-6))


VIDEO_METRICS = (
    VideoMetric(
        "colour_distance",
        "lower",
        "Hellinger distance between the colour histograms of the segment, generated and true: compares colours and "
        "their areas, not positions",
        colour_distance,
    ),
    VideoMetric(
        "sharpness",
        "near 1",
        "root mean square image gradient, generated over true: below 1 is blur or lost shapes, above 1 is noise",
        lambda pair: gradient(pair.made) / max(gradient(pair.true), 1e-6),
    ),
    VideoMetric(
        "flicker",
        "near 1",
        "mean absolute change between frames, generated over true",
        lambda pair: change(pair.made) / max(change(pair.true), 1e-6),
    ),
    VideoMetric(
        "psnr",
        "higher",
        "dB against the true continuation, frame by frame: falls as soon as positions differ, even if all shapes are "
        "kept; an empty picture can score better than one with shapes in other places",
        psnr,
    ),
    VideoMetric(
        "latent_mse",
        "lower",
        "mean squared distance of latents from the true continuation; like psnr, "
        "it prefers an empty picture to shapes in other places",
        lambda pair: float(((pair.latent_made - pair.latent_true) ** 2).mean()),
    ),
)


def compare(pair: SegmentPair) -> dict[str, float]:
    """All metrics of one segment, by name."""
    return {metric.name: float(metric.measure(pair)) for metric in VIDEO_METRICS}
