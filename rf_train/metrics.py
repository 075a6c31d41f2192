"""What is measured in every training step.

Each metric is one entry in `METRICS`: its name, how it is summed, how it is plotted. To add one, write an entry there.
The sums over micro-steps and ranks, `metrics.jsonl`, wandb and the report need no change.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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

    def only(self, clips: Tensor) -> "MicroStepResult":
        """The result of some clips alone: those where `clips`, bool [B], is true."""
        names = ("x", "history", "history_level", "loss_by_chunk", "t")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: x[clips] for name, x in tensors.items() if x is not None})


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

    `sums` gets the clips whose loss is finite. Its totals are fp64: a scalar, or one number per chunk or bin.
    """

    name: str
    sums: Callable[[MicroStepResult], Sums]
    plot: Plot | None = None


def over_clips(values: Tensor) -> Sums:
    """The sums for a mean over clips of [B] or [B, N] values."""
    totals = values.double().sum(0)
    return Sums(totals, torch.full_like(totals, len(values)))


def by_level(levels: Tensor, values: Tensor) -> Sums:
    """The sums for means by noise level: LEVEL_BINS numbers. `levels` and `values` have the same shape."""
    bins = (levels.double() * LEVEL_BINS).long().clamp(0, LEVEL_BINS - 1).flatten()
    empty = torch.zeros(LEVEL_BINS, dtype=torch.float64, device=levels.device)
    values = values.double().flatten()
    return Sums(empty.index_add(0, bins, values), empty.index_add(0, bins, torch.ones_like(values)))


def history_error(result: MicroStepResult) -> Tensor:
    """[B, N - 1]: root mean square distance of x~ from x, per chunk."""
    if result.history is None:
        return result.x.new_zeros(len(result.x), 0)
    clean = result.x[:, :, : result.history.shape[2]]
    square = (result.history.float() - clean).square().mean(dim=(1, 3, 4))
    return mean_by_chunk(square, result.chunk_sizes[:-1]).sqrt()


def _history_levels(result: MicroStepResult) -> Tensor:
    """The noise levels of the clips whose history isn't the truth itself."""
    return result.history_level[result.history_level > 0]


def _level_counts(result: MicroStepResult) -> Sums:
    levels = _history_levels(result)
    counts = by_level(levels, levels).counts
    assert counts is not None
    return Sums(counts)


METRICS = (
    Metric("loss_by_chunk", lambda r: over_clips(r.loss_by_chunk), Plot("loss by chunk", "loss")),
    Metric(
        "history_error_by_chunk",
        lambda r: over_clips(history_error(r)),
        Plot("how far training's history is from the truth", "rms of x\u0303 - x"),
    ),
    Metric(
        "loss_by_t",
        lambda r: by_level(r.t, r.loss_by_chunk),
        Plot("loss by noise level", "loss", x="noise level"),
    ),
    Metric("t_s", lambda r: over_clips(_history_levels(r))),
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
        self._not_finite: list[str] = []

    def add(self, ids: list[str], result: MicroStepResult, damaged: int = 0) -> None:
        """Adds one micro-batch. Clips whose loss isn't finite are only counted and named.

        `damaged`: samples that could not be read for it.
        """
        finite = result.finite
        good = finite.sum()
        counts = torch.stack([good, len(ids) - good, torch.full_like(good, damaged)])
        self._clips = self._clips.to(finite.device) + counts
        self._not_finite += [name for name, ok in zip(ids, finite.tolist()) if not ok]
        for metric in METRICS:
            sums, before = metric.sums(result.only(finite)), self._sums.get(metric.name)
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
        return sorted(set(gather_lines(self._not_finite)))
