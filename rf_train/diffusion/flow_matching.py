"""Flow matching (eq. 2-4), as pure functions of tensors.

Convention: t = 0 is clean, t = 1 is pure noise; x_t = (1 - t) x + t eps; the velocity is v = eps - x.
Latents are [B, C, F, H, W]. Noise levels are [B, F], one per latent frame and equal inside a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rf_train.settings import require, require_at_least, require_positive

DISTRIBUTIONS = ("logit_normal", "uniform")
# euler: one velocity per step, first order. heun: two, second order; the last step, which ends at t = 0, is Euler's.
SOLVERS = ("euler", "heun")


@dataclass(frozen=True)
class FlowSettings:
    """The section `flow` of a recipe: noise levels of training (one t per chunk), captions, and sampling."""

    t_distribution: str = "logit_normal"  # or "uniform"
    t_shift: float = 5.0  # timestep shift of training's t
    caption_dropout: float = 0.1  # share of captions that are replaced by the empty one
    sampling_steps: int = 32  # steps of the solver per chunk
    sampling_shift: float = 5.0  # timestep shift of the sampler's noise levels
    guidance: float = 5.0  # weight of classifier-free guidance; 1 = none
    solver: str = "euler"  # of sampling: see SOLVERS

    def validate(self) -> None:
        known = self.t_distribution in DISTRIBUTIONS
        require(known, f"flow.t_distribution={self.t_distribution!r}: choose logit_normal or uniform")
        require_positive(self, "t_shift", "sampling_shift")
        require(0 <= self.caption_dropout <= 1, f"flow.caption_dropout={self.caption_dropout} is not in [0, 1]")
        require_at_least(1, self, "sampling_steps")
        require(self.solver in SOLVERS, f"flow.solver={self.solver!r}: choose euler or heun")


def over_frames(t: Tensor) -> Tensor:
    """[B, F] -> [B, 1, F, 1, 1], ready to multiply latents."""
    return t[:, None, :, None, None]


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t eps (eq. 2). `x`, `eps` [B, C, F, H, W]; `t` [B, F]."""
    t = over_frames(t)
    return (1 - t) * x + t * eps


def target_velocity(x: Tensor, eps: Tensor) -> Tensor:
    """v = eps - x, the derivative of x_t with respect to t."""
    return eps - x


def euler_step(x_t: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One Euler step of dx/dt = v from `t` to `t_next`, both [B, F]."""
    return x_t + over_frames(t_next - t) * v


def shifted(t: Tensor, shift: float) -> Tensor:
    """Timestep shift: s t / (1 + (s - 1) t).

    Monotone, keeps 0 and 1; s > 1 moves levels towards noise (eq. 5 has s < 1).
    """
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, shift: float) -> Tensor:
    """Noise levels of a sampler: `steps` + 1 fp64 numbers from 1 down to 0, shifted."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def training_levels(draws: dict[str, Tensor], settings: FlowSettings) -> Tensor:
    """The noise level t of each noisy chunk, [B, N]: logit-normal or uniform, then shifted.

    Reads the draws `t`, `t_uniform`.
    """
    uniform = settings.t_distribution == "uniform"
    return shifted(draws["t_uniform"] if uniform else torch.sigmoid(draws["t"]), settings.t_shift)


def flow_loss(v: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Squared error of the velocity, mean over C, H, W: [B, F] in fp32 (eq. 4 before its mean over chunks)."""
    return (v.float() - target_velocity(x, eps).float()).square().mean(dim=(1, 3, 4))


def spread_over_frames(by_chunk: Tensor, sizes: list[int]) -> Tensor:
    """[B, N] -> [B, F]: each chunk's number on each of its frames."""
    repeats = torch.tensor(sizes, device=by_chunk.device)
    return by_chunk.repeat_interleave(repeats, dim=1, output_size=sum(sizes))


def mean_by_chunk(by_frame: Tensor, sizes: list[int], present: Tensor | None = None) -> Tensor:
    """[B, F] -> [B, N]: the mean over each chunk's frames. So a short chunk has the same weight as a full one.

    `present`, bool [B, F], leaves out frames that are missing. A chunk without any frame gives 0.
    """
    if present is None:
        return torch.stack([part.mean(dim=1) for part in by_frame.split(sizes, dim=1)], dim=1)
    parts = by_frame.where(present, 0).split(sizes, dim=1)
    counts = [part.sum(dim=1).clamp(min=1) for part in present.split(sizes, dim=1)]
    return torch.stack([part.sum(dim=1) / count for part, count in zip(parts, counts)], dim=1)


def mean_of_present(by_chunk: Tensor, sizes: list[int], present: Tensor | None = None) -> Tensor:
    """The loss (eq. 4): the mean of [B, N] over each clip's chunks that have a frame `present`, then over clips."""
    if present is None:
        return by_chunk.mean()
    there = torch.stack([part.any(dim=1) for part in present.split(sizes, dim=1)], dim=1)
    return (by_chunk.where(there, 0).sum(dim=1) / there.sum(dim=1).clamp(min=1)).mean()
