"""Held-out clips continued from their first chunks and compared with the truth, segment by segment.

A segment is as long as a training clip. What is measured of one clip is a row, a plain dict; rows of several ranks or
batches are put together by `summary`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.codecs import Codec
from data_prep.draw import KINDS
from data_prep.geometry import LatentGeometry
from rf_train.data.latent_dataset import LatentDataset
from rf_train.evaluation.drawn_world import named_objects
from rf_train.evaluation.frechet import Gaussian, frechet_distance, latent_features, sum_of
from rf_train.evaluation.statistics import mean_and_std, slope_with_interval
from rf_train.evaluation.text_agreement import TextAgreement
from rf_train.evaluation.video_metrics import VIDEO_METRICS, Segment, VideoPair, compare

Span = tuple[int, int]  # latent frames [begin, end)
# (text embeddings, latent frames, seeds, given [B, C, F, H, W]) -> latent chunks [B, C, f, H, W], the given ones first
Sampler = Callable[[list[Tensor], int, list[int], Tensor], Iterator[Tensor]]
SEEDS_APART = 1_000_000  # between the seeds of two samples of a clip


def segments(frames: int, given: int, length: int) -> list[Span]:
    """Latent frame spans of `length` that cover a clip of `frames`, without the `given` first ones.

    A remainder shorter than half a segment is joined to the last one.
    """
    spans = [(begin, min(begin + length, frames)) for begin in range(0, frames, length)]
    if len(spans) > 1 and spans[-1][1] - spans[-1][0] < length / 2:
        spans[-2:] = [(spans[-2][0], frames)]
    return [(max(begin, given), end) for begin, end in spans if end > given]


def pixel_frames(span: Span, geometry: LatentGeometry) -> slice:
    """The video frames that a span of latent frames stands for."""
    return slice(geometry.video_frames(span[0]), geometry.video_frames(span[1]))


def drawn_kinds(captions: Sequence[str]) -> tuple[str, ...]:
    """The kinds of objects that these captions name; none if one of them is not of the drawn world."""
    try:
        named = {one.kind for caption in captions for one in named_objects(caption)}
    except ValueError:
        return ()
    return tuple(kind for kind in KINDS if kind in named)


@dataclass(frozen=True)
class LongVideos:
    """The first `clips` clips of a held-out dataset, and how they are cut into segments."""

    dataset: LatentDataset
    codec: Codec
    clips: int
    given: int  # latent frames that a continuation is given
    trained: int  # latent frames of a training clip, and of a segment
    seed: int = 0  # sample s of clip i is made with seed + i + s SEEDS_APART
    agreement: TextAgreement | None = None
    kinds: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Raises ValueError when nothing is left to generate."""
        if self.given >= self.frames:
            longer = f"clips of {self.frames} latent frames are no longer than the {self.given} given ones"
            raise ValueError(f"{self.dataset.folder}: {longer}")
        captions = [self.dataset.read(index, 1)[2]["caption"] for index in range(self.clips)]
        object.__setattr__(self, "kinds", drawn_kinds(captions))

    @property
    def frames(self) -> int:
        return self.dataset.card["latent"]["frames"]

    @property
    def fps(self) -> float:
        return self.dataset.card["video"]["fps"]

    @property
    def spans(self) -> list[Span]:
        return segments(self.frames, self.given, self.trained)

    @property
    def pixel_spans(self) -> list[slice]:
        return [pixel_frames(span, self.codec.geometry) for span in self.spans]

    @property
    def segments_seconds(self) -> list[list[float]]:
        """[begin, end] of each segment."""
        return [[pixels.start / self.fps, pixels.stop / self.fps] for pixels in self.pixel_spans]

    def continued(
        self, sampler: Sampler, indices: Sequence[int], sample: int = 0
    ) -> Iterator[tuple[dict[str, Any], VideoPair]]:
        """Continues these clips together. Yields a row and the two videos for each."""
        samples = [self.dataset.read(index) for index in indices]
        true = torch.stack([latent for latent, _, _ in samples])
        seeds = [self.seed + index + sample * SEEDS_APART for index in indices]
        texts = [text for _, text, _ in samples]
        made = torch.cat(list(sampler(texts, self.frames, seeds, true[:, :, : self.given])), dim=2).cpu()
        latents = made.numpy(), true.numpy()
        for index, seed, latent_made, latent_true, (_, _, meta) in zip(indices, seeds, *latents, samples):
            caption, videos = meta["caption"], (self.codec.decode(latent_made), self.codec.decode(latent_true))
            pair = self.compared(*videos, latent_made, latent_true, caption)
            if self.agreement is not None:
                agreed = [self.agreement.of_frames(video, [caption] * len(video), self.fps) for video in videos]
                pair = replace(pair, text_made=agreed[0], text_true=agreed[1])
            row = {"clip": self.dataset.key(index), "caption": caption, "seed": seed}
            yield {**row, **self.measured(pair)}, pair

    def compared(
        self, made: np.ndarray, true: np.ndarray, latent_made: np.ndarray, latent_true: np.ndarray, caption: str
    ) -> VideoPair:
        """Two videos, uint8 [T, H, W, 3], and their latents [C, F, H, W], side by side."""
        given = self.codec.geometry.video_frames(self.given)
        return VideoPair(made, true, latent_made, latent_true, given, self.fps, caption, self.kinds)

    def measured(self, pair: VideoPair) -> dict[str, Any]:
        """The metrics of each segment, and what the Frechet distance needs."""
        return measured([Segment(pair, pixels, slice(*span)) for span, pixels in zip(self.spans, self.pixel_spans)])


def measured(parts: Sequence[Segment]) -> dict[str, Any]:
    """The metrics of each segment of a video, and what the Frechet distance needs."""
    features = [
        {"made": Gaussian.of(latent_features(part.latent_made)).record(),
         "true": Gaussian.of(latent_features(part.latent_true)).record()}
        for part in parts
    ]  # fmt: skip
    return {"segments": [compare(part) for part in parts], "features": features}


def summary(rows: Sequence[dict], count: int, samples: int = 1) -> dict[str, Any]:
    """What rows say together, for each of `count` segments.

    With several samples of each clip, all clips of the first sample come first, then those of the next one. A clip
    counts with the mean over its samples: videos of the same clip are not independent.

    "metrics": {name: [{"mean", "std"} over clips]}, of those that were measured in some clip. "frechet": the distance
    between all generated and all true latents, None if it isn't finite. "slopes": {name: change per segment, with its
    95 % interval}.
    """
    metrics, slopes, clips = {}, {}, len(rows) // samples
    frechet: list[float | None] = []
    for metric in VIDEO_METRICS:
        values = [
            [mean_and_std([row["segments"][i][metric.name] for row in rows[clip::clips]])[0] for i in range(count)]
            for clip in range(clips)
        ]
        cells = [dict(zip(("mean", "std"), mean_and_std(column))) for column in zip(*values)]
        if any(cell["mean"] is not None for cell in cells):
            metrics[metric.name] = cells
            slopes[metric.name] = slope_with_interval(values, range(count))
    for i in range(count):
        made, true = (sum_of([Gaussian(**row["features"][i][side]) for row in rows]) for side in ("made", "true"))
        distance = frechet_distance(made, true)
        frechet.append(distance if math.isfinite(distance) else None)
    return {"metrics": metrics, "frechet": frechet, "slopes": slopes}
