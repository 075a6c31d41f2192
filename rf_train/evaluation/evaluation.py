"""What is evaluated, cut into pieces, and what the pieces say together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.video import write_video
from rf_train.evaluation.long_videos import LongVideos, summary
from rf_train.evaluation.prompted import PromptedVideos
from rf_train.evaluation.routing_choices import RoutingChoices, counted_choices
from rf_train.generation.generator import Generator

HISTORY = "history"  # the name of a piece


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, cut into pieces: batches of clips or prompts, and the distance of training's history."""

    generator: Generator
    videos: LongVideos | PromptedVideos
    samples: int
    batch: int
    kept_videos: int
    history: Callable[[], dict | None] | None  # None: not measured

    @property
    def dataset_hash(self) -> str | None:
        return self.videos.dataset.card["hash"] if isinstance(self.videos, LongVideos) else None

    @property
    def batches(self) -> dict[str, tuple[int, range]]:
        """{name of the piece: (sample, clips)}. The first sample's are the same with any number of samples."""
        clips, size = self.videos.clips, self.batch
        return {
            f"{sample:03d}-{begin:05d}": (sample, range(begin, min(begin + size, clips)))
            for sample in range(self.samples)
            for begin in range(0, clips, size)
        }

    @property
    def names(self) -> list[str]:
        """Of the pieces, the results of which are put together in this order."""
        return [*self.batches, *([HISTORY] if self.history else [])]

    def make(self, name: str, out: Path) -> dict[str, Any]:
        """A piece, plain JSON. Videos of the first clips are written to `out`."""
        if name == HISTORY and self.history:
            return {"history": self.history()}
        sample, indices = self.batches[name]
        choices, rows = self._no_choices(), []
        with counted_choices(choices):
            if isinstance(self.videos, LongVideos):
                for index, (row, pair) in zip(indices, self.videos.continued(self.generator.chunks, indices, sample)):
                    files = {"video": ("clip", pair.made), "truth": ("truth", pair.true)}
                    rows.append({**row, **self._kept(out, index, sample, files)})
            else:
                for index, (row, frames) in zip(indices, self.videos.made(indices, sample)):
                    rows.append({**row, **self._kept(out, index, sample, {"video": ("prompt", frames)})})
        counts = [part.tolist() for part in (choices.by_distance, choices.first)]
        return {"rows": rows, "choices": counts if choices.by_distance.any() else None}

    def _kept(self, out: Path, index: int, sample: int, files: dict) -> dict[str, str]:
        """Writes the videos of the first clips. Returns their names."""
        if sample or index >= self.kept_videos:
            return {}
        names = {key: f"{name}-{index:03d}.mp4" for key, (name, _) in files.items()}
        for key, (_, frames) in files.items():
            write_video(out / names[key], frames, self.videos.fps)
        return names

    def _no_choices(self) -> RoutingChoices:
        model = self.generator.model
        chunks = len(model.chunking.sizes(self.videos.frames))
        return RoutingChoices(model.settings.layers, model.settings.heads, chunks)

    def result(self, pieces: dict[str, dict]) -> dict[str, Any]:
        """What all pieces say together: what `evaluation.json` holds, besides what was asked for."""
        videos, geometry, choices = self.videos, self.generator.geometry, self._no_choices()
        batches = [pieces[name] for name in self.batches]
        rows = [row for piece in batches for row in piece["rows"]]
        for by_distance, first in (piece["choices"] for piece in batches if piece["choices"]):
            choices.by_distance += torch.tensor(by_distance)
            choices.first += torch.tensor(first)
        given = videos.given if isinstance(videos, LongVideos) else 0
        return {
            "step": self.generator.step,
            **({"dataset": str(videos.dataset.folder)} if isinstance(videos, LongVideos) else {}),
            "clips": videos.clips,
            "samples": self.samples,
            "fps": videos.fps,
            "given_seconds": geometry.video_frames(given) / videos.fps,
            "trained_seconds": geometry.video_frames(videos.trained) / videos.fps,
            "segments_seconds": videos.segments_seconds,
            **summary(rows, len(videos.spans), self.samples),
            "routing": choices.summary(),
            "rows": [{key: value for key, value in row.items() if key != "features"} for row in rows],
            "history": pieces[HISTORY]["history"] if self.history else None,
        }
