"""What is measured in every training step.

Each metric is one entry in `METRICS`: its name, how it is summed, how it is plotted. To add one, write an entry there.
The sums over micro-steps and ranks, `metrics.jsonl`, wandb and the report need no change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rf_train.diffusion.batch import Batch
from rf_train.diffusion.flow_matching import mean_by_chunk
from rf_train.diffusion.loss import VelocityLoss
from rf_train.engine.collectives import gather_lines, sum_over_ranks

LEVEL_BINS = 10  # of noise levels: [0, 1] in equal parts

Value = float | int | None | list[float | None] | list[int]


@dataclass(frozen=True)
class MicroStepResult:
    """The result of one replica's micro-batch of B clips in N chunks: what metrics are computed from."""

    x: Tensor  # [B, C, F, H, W] the clean clips
    history: Tensor | None  # [B, C, F', H, W] the history that the loss was conditioned on
    history_level: Tensor  # [B] the noise level that each clip's history was made from; 0 = without noise
    loss_by_chunk: Tensor  # [B, N]
    t: Tensor  # [B, N] noise levels of the noisy chunks
    chunk_sizes: list[int]

    @classmethod
    def of(cls, batch: Batch, history: Tensor | None, level: Tensor, loss: VelocityLoss) -> "MicroStepResult":
        return cls(batch.x, history, level, loss.by_chunk, loss.t, batch.chunk_sizes)

    @property
    def finite(self) -> Tensor:
        """bool [B]: the clips whose loss is finite."""
        return self.loss_by_chunk.isfinite().all(dim=1)

    @property
    def resampled(self) -> Tensor:
        """bool [B]: those of them whose history isn't the truth itself."""
        return self.finite & (self.history_level > 0)


class Sums(NamedTuple):
    """What a micro-batch adds to a metric: totals, and the number of values in each.

    The metric is totals / counts. Without counts it is the totals.
    """

    totals: Tensor
    counts: Tensor | None = None


@dataclass(frozen=True)
class Plot:
    """How the report plots a metric that is a list."""

    title: str
    y: str
    x: Literal["chunk", "noise level"] = "chunk"
    style: Literal["line", "density"] = "line"


@dataclass(frozen=True)
class Metric:
    """One metric of the training step.

    `sums` counts the clips whose loss is `finite`, and no others. Its totals are fp64: a scalar, or one number per
    chunk or bin. It takes no numbers from the device: a GPU would have to finish its work first.
    """

    name: str
    sums: Callable[[MicroStepResult], Sums]
    plot: Plot | None = None


def over_clips(values: Tensor, clips: Tensor) -> Sums:
    """The sums for a mean of [B] or [B, N] values over the clips where `clips`, bool [B], is true."""
    counted = clips.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    return Sums(values.double().where(counted, 0).sum(0), counted.double().sum(0))


def by_level(levels: Tensor, values: Tensor, clips: Tensor) -> Sums:
    """The sums for means by noise level: LEVEL_BINS numbers. `levels` and `values` have one shape, `clips` is [B]."""
    bins = (levels.double() * LEVEL_BINS).long().clamp(0, LEVEL_BINS - 1).flatten()
    empty = torch.zeros(LEVEL_BINS, dtype=torch.float64, device=levels.device)
    counted = clips.view(-1, *[1] * (values.dim() - 1)).expand_as(values).flatten()
    values = values.double().flatten().where(counted, 0)
    return Sums(empty.index_add(0, bins, values), empty.index_add(0, bins, counted.double()))


def history_error(result: MicroStepResult) -> Tensor:
    """[B, N - 1]: root mean square distance of x~ from x, per chunk."""
    if result.history is None:
        return result.x.new_zeros(len(result.x), 0)
    clean = result.x[:, :, : result.history.shape[2]]
    square = (result.history.float() - clean).square().mean(dim=(1, 3, 4))
    return mean_by_chunk(square, result.chunk_sizes[:-1]).sqrt()


def _level_counts(result: MicroStepResult) -> Sums:
    counts = by_level(result.history_level, result.history_level, result.resampled).counts
    assert counts is not None
    return Sums(counts)


METRICS = (
    Metric("loss_by_chunk", lambda r: over_clips(r.loss_by_chunk, r.finite), Plot("loss by chunk", "loss")),
    Metric(
        "history_error_by_chunk",
        lambda r: over_clips(history_error(r), r.finite),
        Plot("how far training's history is from the truth", "rms of x\u0303 - x"),
    ),
    Metric(
        "loss_by_t",
        lambda r: by_level(r.t, r.loss_by_chunk, r.finite),
        Plot("loss by noise level", "loss", x="noise level"),
    ),
    Metric("t_s", lambda r: over_clips(r.history_level, r.resampled)),
    Metric(
        "t_s_histogram",
        _level_counts,
        Plot("noise levels that history was made from", "density", x="noise level", style="density"),
    ),
)


class StepMetrics:
    """The metrics of one step, summed over its micro-steps, then over ranks in one reduction."""

    def __init__(self) -> None:
        self._sums: dict[str, Sums] = {}
        self._clips = torch.zeros(3, dtype=torch.float64)  # with a finite loss, without, and damaged samples
        self._finite: list[tuple[list[str], Tensor]] = []  # ids and `finite` of each micro-batch

    def add(self, ids: list[str], result: MicroStepResult, damaged: int = 0) -> None:
        """Adds one micro-batch. Clips whose loss isn't finite are only counted and named.

        `damaged`: samples that could not be read for it.
        """
        finite = result.finite
        good = finite.sum()
        counts = torch.stack([good, len(ids) - good, torch.full_like(good, damaged)])
        self._clips = self._clips.to(finite.device) + counts
        self._finite.append((ids, finite))
        for metric in METRICS:
            sums, before = metric.sums(result), self._sums.get(metric.name)
            if before is not None:
                pairs = zip(before, sums)
                sums = Sums(*(None if a is None or b is None else a + b for a, b in pairs))  # type: ignore[arg-type]
            self._sums[metric.name] = sums

    def reduced(self, sequence_parallel_size: int) -> dict[str, Value]:
        """The metrics over all ranks, on every rank. A metric without any clip is None. A collective."""
        tensors = [self._clips, *(tensor for sums in self._sums.values() for tensor in sums if tensor is not None)]
        total = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors])) / sequence_parallel_size
        clips, *parts = total.split([tensor.numel() for tensor in tensors])
        values: dict[str, Value] = {}
        for name, sums in self._sums.items():
            totals = parts.pop(0).tolist()
            if sums.counts is None:
                found: list = [round(value) for value in totals]
            else:
                found = [value / count if count else None for value, count in zip(totals, parts.pop(0).tolist())]
            values[name] = found if sums.totals.dim() else found[0]
        by_chunk = values["loss_by_chunk"]
        assert isinstance(by_chunk, list)
        loss = sum(by_chunk) / len(by_chunk) if clips[0] else None  # type: ignore[arg-type]
        return {"loss": loss, **values, "clips_not_finite": round(clips[1].item()), "damaged": round(clips[2].item())}

    def clips_not_finite(self) -> list[str]:
        """The ids of the clips, on all ranks, whose loss isn't finite, in alphabetical order. A collective."""
        own = [name for ids, finite in self._finite for name, ok in zip(ids, finite.tolist()) if not ok]
        return sorted(set(gather_lines(own)))
