"""Evaluation during training: the average (EMA) continues held-out clips, which all ranks share."""

import json
import time
from collections.abc import Callable, Iterator

from torch import Tensor

from data_prep.codecs import dataset_codec
from rf_train.config import Recipe
from rf_train.data.batches import Datasets
from rf_train.data.latent_dataset import LatentDataset
from rf_train.diffusion.sampling import VideoRequest, count_passes, sample_chunks
from rf_train.engine.collectives import gather_lines, sum_over_ranks
from rf_train.engine.state import TrainingState
from rf_train.engine.zero import Engine
from rf_train.evaluation.long_videos import LongVideos, Sampler, summary
from rf_train.evaluation.routing_choices import RoutingChoices, counted_choices
from rf_train.model.chunks import attention_at_any_length


class TrainingEvaluation:
    """Evaluates a run on the first clips of its `data.evaluation`.

    Raises ValueError, before the first step, when these clips can't be continued.
    """

    def __init__(self, recipe: Recipe, engine: Engine, datasets: Datasets):
        self.recipe, self.engine = recipe, engine
        self.trained_frames = [datasets[recipe.dataset_of(stage)].clip_frames(stage) for stage in recipe.stages]
        dataset = datasets[recipe.data.evaluation]
        assert isinstance(dataset, LatentDataset)
        self.videos = LongVideos(
            dataset=dataset,
            codec=dataset_codec(dataset.folder, engine.ranks.device.type),
            clips=min(recipe.evaluation.clips, len(dataset)),
            given=engine.chunking.start(recipe.evaluation.given_chunks),
            trained=max(self.trained_frames),
        )

    def is_due(self, done: int) -> bool:
        """Whether to evaluate after `done` steps."""
        return done % self.recipe.evaluation.every == 0

    def evaluate(self, done: int, state: TrainingState, progress: Callable[[], object] = lambda: None) -> dict:
        """Evaluates the average after `done` steps. A collective. Returns the same on every rank.

        It calls `progress` before each chunk, on all ranks as often. An error of it must end the run.

        {"clips", "seconds" that it took, "segments_seconds", by segment each metric's mean over clips, and after a
        routed stage "routing", see `RoutingChoices.summary`; ranks that share clips count their heads together}
        """
        begin, rows, engine = time.perf_counter(), [], self.engine
        chunks = len(engine.chunking.sizes(self.videos.frames))
        heads = engine.settings.heads // engine.sequence_parallel_size
        choices = RoutingChoices(engine.settings.layers, heads, chunks)
        with counted_choices(choices), state.averaged_weights():
            for indices in self._batches():
                sampler = self._sampler(done, progress)
                for index, (row, _) in zip(indices, self.videos.continued(sampler, indices)):
                    rows.append(json.dumps({"index": index, **row}))
        by_clip = {row["index"]: row for row in map(json.loads, gather_lines(rows))}
        choices.by_distance, choices.first = (
            sum_over_ranks(counts.to(engine.ranks.device)).cpu() for counts in (choices.by_distance, choices.first)
        )
        found = summary([by_clip[index] for index in sorted(by_clip)], len(self.videos.spans))
        return {
            "clips": len(by_clip),
            "seconds": time.perf_counter() - begin,
            "segments_seconds": self.videos.segments_seconds,
            "frechet": found["frechet"],
            **{name: [cell["mean"] for cell in cells] for name, cells in found["metrics"].items()},
            "routing": {name: value for name, value in (choices.summary() or {}).items() if name != "mean_distance"},
        }

    def _batches(self) -> list[list[int]]:
        """This replica's clips, as many as each other replica has: where clips are too few, some are made twice."""
        clips, engine, size = self.videos.clips, self.engine, self.recipe.optimizer.micro_batch
        turns = -(-clips // engine.replicas)
        own = [(engine.replica + turn * engine.replicas) % clips for turn in range(turns)]
        return [own[begin : begin + size] for begin in range(0, len(own), size)]

    def _sampler(self, done: int, progress: Callable[[], object]) -> Sampler:
        """Samples with the engine, with the attention that fits the lengths trained so far."""
        recipe, engine = self.recipe, self.engine
        spans = [span for span in recipe.stage_spans if span.begin < done]
        frames = max(self.trained_frames[: len(spans)])
        attention = attention_at_any_length(spans[-1].stage.attention, len(engine.chunking.sizes(frames)))

        def sampler(texts: list[Tensor], frames: int, seeds: list[int], given: Tensor) -> Iterator[Tensor]:
            card, device = self.videos.dataset.card, engine.ranks.device
            request = VideoRequest.like(card, recipe.model, device, texts, frames, seeds, given)
            passes = count_passes(engine.chunking, recipe.flow, frames, given.shape[2])
            with engine.rollout(passes, recipe.run.gather_for_rollout) as model:
                progress()
                for chunk in sample_chunks(model, request, recipe.flow, attention):
                    yield chunk
                    progress()

        return sampler
