"""Videos from prompts alone. There is no truth: each one's segments are compared with its own first segment."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rf_train.evaluation.long_videos import Span, measured, pixel_frames, segments
from rf_train.evaluation.text_agreement import TextAgreement
from rf_train.evaluation.video_metrics import Segment, VideoPair
from rf_train.generation.generator import Generator
from rf_train.generation.prompts import Prompts, seed_of
from rf_train.generation.stream import Videos


@dataclass(frozen=True)
class PromptedVideos:
    """The videos of prompts: lines of a prompt file, see `Prompts.of_line`. `clips` is the number of prompts.

    Video s of a prompt has the seed that `rf_train.generate --prompts` gives it.
    """

    generator: Generator
    prompts: Sequence[str]
    seconds: float
    trained: int  # latent frames of a training clip, and of a segment
    seed: int = 0
    agreement: TextAgreement | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a prompt that is never shown."""
        self._videos(range(len(self.prompts)), 0)

    @property
    def clips(self) -> int:
        return len(self.prompts)

    @property
    def frames(self) -> int:
        return self._videos([], 0).latent_frames

    @property
    def fps(self) -> float:
        return self.generator.fps

    @property
    def spans(self) -> list[Span]:
        return segments(self.frames, 0, self.trained)

    @property
    def pixel_spans(self) -> list[slice]:
        return [pixel_frames(span, self.generator.geometry) for span in self.spans]

    @property
    def segments_seconds(self) -> list[list[float]]:
        """[begin, end] of each segment."""
        return [[pixels.start / self.fps, pixels.stop / self.fps] for pixels in self.pixel_spans]

    def made(self, indices: Sequence[int], sample: int) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Makes a video of each of these prompts. Yields a row and the frames, uint8 [T, H, W, 3], of each."""
        videos = self._videos(indices, sample)
        latents = torch.cat(list(videos.latents()), dim=2).cpu().numpy()
        for row, (index, latent) in enumerate(zip(indices, latents)):
            frames, prompt = self.generator.codec.decode(latent), self.prompts[index]
            texts = None
            if self.agreement is not None:
                texts = self.agreement.of_frames(frames, videos.text_of_frames(row, len(frames)), self.fps)
            pair = VideoPair(frames, frames, latent, latent, self.pixel_spans[0].stop, self.fps, text_made=texts)
            parts = [Segment(pair, pixels, slice(*span)) for span, pixels in zip(self.spans, self.pixel_spans)]
            parts = [Segment(pair, part.frames, part.latent_frames, first=parts[0]) for part in parts]
            yield {"prompt": prompt, "sample": sample, "seed": videos.seeds[row], **measured(parts)}, frames

    def _videos(self, indices: Sequence[int], sample: int) -> Videos:
        prompts = [self.prompts[index] for index in indices]
        seeds = [seed_of(self.seed, prompt, sample) for prompt in prompts]
        return Videos(self.generator, [Prompts.of_line(prompt) for prompt in prompts], seeds, self.seconds)
