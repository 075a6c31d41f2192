"""The ways to make the history of a training pass, without gradient.

Each way is one class, with its settings, checks, random numbers and passes. To add one, write a class here: training,
planning, metrics, report and tests find it through `History.kinds`.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rf_train.diffusion import flow_matching
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.randomness import LOSS_DRAWS, Draw
from rf_train.diffusion.sampling import Branch, denoise_chunk
from rf_train.model.chunks import Attention, Chunk, ModelPass
from rf_train.model.transformer import VelocityModel
from rf_train.settings import Kind, require, require_at_least, require_positive


class History(Kind, ABC):
    """A way to make the history x~ of chunks 1 .. N - 1. Nothing reads x~ of the last chunk, so it isn't made."""

    label: ClassVar[str]  # its name in the report
    draws: ClassVar[Mapping[str, Draw]] = {}  # the random numbers that it reads, by purpose
    is_the_clip: ClassVar[bool] = False  # whether x~ is a view of the clip, which takes no memory

    def __init_subclass__(cls, kind: str = "", **keywords: Any) -> None:
        super().__init_subclass__(kind, **keywords)
        if kind and not hasattr(cls, "label"):
            raise TypeError(f"{cls.__name__}: a history needs a `label`, its name in the report")
        taken = sorted(set(cls.draws) & set(LOSS_DRAWS))
        if taken:
            raise TypeError(f"{cls.__name__}: the loss reads the random numbers {', '.join(taken)}; give others a name")

    def level(self, batch: Batch) -> Tensor:
        """The noise level that each clip's history is made from: [B]. 0: without noise."""
        return batch.x.new_zeros(len(batch.x))

    @abstractmethod
    def make(self, batch: Batch, level: Tensor, attention: Attention, model: VelocityModel | None) -> Tensor:
        """x~ [B, C, F', H, W], F' = `batch.history_frames`. `model` is None unless some rank needs the rollout.

        A rollout must make exactly the passes of `rollout_passes`, on every rank: under ZeRO-3 each pass is a
        collective.
        """

    def rollout_passes(self, sizes: list[int]) -> list[ModelPass]:
        """The passes of the model that `make` runs, for chunks of `sizes` latent frames; none without a rollout."""
        return []

    def needs_rollout(self, batch: Batch) -> bool:
        """Whether a clip of this rank's micro-batch needs the model. When one does on any rank, all ranks roll out."""
        return bool(self.rollout_passes(batch.chunk_sizes))

    def rollout_probability(self, clips: int) -> float:
        """The probability that at least one of `clips` clips needs the rollout."""
        return 1.0


@torch.no_grad()
def make_history(
    history: History, batch: Batch, attention: Attention, model: VelocityModel | None
) -> tuple[Tensor | None, Tensor]:
    """The history x~ [B, C, F', H, W] (None for clips of a single chunk) and the noise level it is made from, [B]."""
    if len(batch.chunk_sizes) == 1:
        return None, batch.x.new_zeros(len(batch.x))
    level = history.level(batch)
    return history.make(batch, level, attention, model), level


@dataclass(frozen=True)
class Clean(History, kind="clean"):
    """Teacher forcing: the truth."""

    label = "teacher forcing"
    is_the_clip = True

    def make(self, batch: Batch, level: Tensor, attention: Attention, model: VelocityModel | None) -> Tensor:
        return batch.x[:, :, : batch.history_frames]


@dataclass(frozen=True)
class Noise(History, kind="noise"):
    """The truth with Gaussian noise of a random level, uniform in [0, 1)."""

    label = "noise augmentation"
    draws = {"history_level": Draw("uniform", "clip"), "history_noise": Draw("normal", "latent")}

    def level(self, batch: Batch) -> Tensor:
        return batch.draws["history_level"]

    def make(self, batch: Batch, level: Tensor, attention: Attention, model: VelocityModel | None) -> Tensor:
        return _noised(batch, level)


@dataclass(frozen=True)
class Resampled(History):
    """Base of the histories that the model itself denoises, from a noise level t_s (eq. 5-7)."""

    t_shift: float = 0.6  # timestep shift of t_s
    solver_steps: int = 1  # Euler steps from t_s to 0

    draws = {"t_s": Draw("normal", "clip"), "history_noise": Draw("normal", "latent")}

    def validate(self) -> None:
        require_positive(self, "t_shift")
        require_at_least(1, self, "solver_steps")

    def level(self, batch: Batch) -> Tensor:
        """logit(t_s) ~ N(0, 1), then shifted (eq. 5); one t_s per clip, shared by its chunks."""
        return flow_matching.shifted(torch.sigmoid(batch.draws["t_s"]), self.t_shift)

    def solver_levels(self, level: Tensor) -> list[Tensor]:
        """The solver's noise levels from t_s down to 0, `solver_steps` + 1 tensors [B], evenly spaced."""
        return [level * (1 - i / self.solver_steps) for i in range(self.solver_steps + 1)]


@dataclass(frozen=True)
class Parallel(Resampled, kind="parallel"):
    """Each chunk resampled on its own, with clean history: no error accumulates."""

    label = "parallel resampling"

    def rollout_passes(self, sizes: list[int]) -> list[ModelPass]:
        chunks = _chunks(sizes[:-1])
        return [ModelPass(chunks, chunks[:-1])] * self.solver_steps if chunks else []

    def make(self, batch: Batch, level: Tensor, attention: Attention, model: VelocityModel | None) -> Tensor:
        assert model is not None
        x_t, sizes = _noised(batch, level), batch.chunk_sizes[:-1]
        clean = batch.x[:, :, : sum(sizes[:-1])] if len(sizes) > 1 else None
        levels = [t[:, None].expand(-1, sum(sizes)) for t in self.solver_levels(level)]
        for t, t_next in itertools.pairwise(levels):
            v = model(noisy=x_t, t=t, history=clean, text=batch.text, attention=attention)
            x_t = flow_matching.euler_step(x_t, v, t, t_next)
        return x_t


@dataclass(frozen=True)
class Autoregressive(Resampled, kind="autoregressive"):
    """Self-resampling (eq. 7, Algorithm 1): chunk after chunk, each conditioned on the resampled ones before it.

    The first pass of a chunk also writes the keys and values of the chunk before it. So with one solver step, N - 1
    chunks take N - 1 passes, not 2 (N - 1). The keys and values of the last one are never written.
    """

    label = "self-resampling"

    def rollout_passes(self, sizes: list[int]) -> list[ModelPass]:
        chunks = _chunks(sizes[:-1])
        return [
            ModelPass((chunk,), chunks[index - 1 : index] if index and not step else (), cache=0)
            for index, chunk in enumerate(chunks)
            for step in range(self.solver_steps)
        ]

    def make(self, batch: Batch, level: Tensor, attention: Attention, model: VelocityModel | None) -> Tensor:
        assert model is not None
        x_ts = _noised(batch, level)
        clips, _, frames, *size = x_ts.shape
        cache = model.new_kv_cache(clips, model.settings.tokens_per_frame(*size), frames, attention)
        branches, levels = [Branch(batch.text, (1.0,), cache)], self.solver_levels(level)
        made: list[Tensor] = []
        for index, x_t in enumerate(x_ts.split(batch.chunk_sizes[:-1], dim=2)):
            newest = made[-1] if made else None
            made.append(denoise_chunk(model, branches, attention, index, x_t, levels, newest))
        return torch.cat(made, dim=2)


@dataclass(frozen=True)
class Mixed(Autoregressive, kind="mixed"):
    """Per clip: self-resampling with probability `probability`, else the truth."""

    probability: float = 0.5

    label = "self-resampling, mixed with teacher forcing"
    draws = {**Resampled.draws, "history_choice": Draw("uniform", "clip")}

    def validate(self) -> None:
        super().validate()
        require(0 <= self.probability <= 1, f"probability={self.probability} is not in [0, 1]")

    def level(self, batch: Batch) -> Tensor:
        return super().level(batch).where(self._resampled(batch), 0)

    def needs_rollout(self, batch: Batch) -> bool:
        return super().needs_rollout(batch) and bool(self._resampled(batch).any())

    def rollout_probability(self, clips: int) -> float:
        return 1 - (1 - self.probability) ** clips

    def make(self, batch: Batch, level: Tensor, attention: Attention, model: VelocityModel | None) -> Tensor:
        if model is None:
            return batch.x[:, :, : batch.history_frames]
        return super().make(batch, level, attention, model)  # level 0 gives the truth itself

    def _resampled(self, batch: Batch) -> Tensor:
        """bool [B]: the clips whose history is resampled."""
        return batch.draws["history_choice"] < self.probability


def _chunks(sizes: list[int]) -> tuple[Chunk, ...]:
    return tuple(Chunk(index, size) for index, size in enumerate(sizes))


def _noised(batch: Batch, level: Tensor) -> Tensor:
    """x_{t_s} = (1 - t_s) x + t_s eps (eq. 6) of the history's chunks, fresh noise for every chunk; `level` [B]."""
    frames = batch.history_frames
    noise = batch.draws["history_noise"][:, :, :frames]
    return flow_matching.interpolate(batch.x[:, :, :frames], noise, level[:, None].expand(-1, frames))
