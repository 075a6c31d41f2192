"""Flow matching (eq. 2-4), as pure functions of tensors.

Convention: t = 0 is clean, t = 1 is pure noise; x_t = (1 - t) x + t eps; the velocity is v = eps - x.
Latents are [B, C, F, H, W]; noise levels are [B, F], one a latent frame (equal inside a chunk).
"""

import torch
from torch import Tensor


def over_frames(t: Tensor) -> Tensor:
    """[B, F] -> [B, 1, F, 1, 1], ready to multiply latents."""
    return t[:, None, :, None, None]


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t eps (eq. 2). `x`, `eps` [B, C, F, H, W]; `t` [B, F]."""
    t = over_frames(t)
    return (1 - t) * x + t * eps


def target_velocity(x: Tensor, eps: Tensor) -> Tensor:
    """v = eps - x, the derivative of x_t by t."""
    return eps - x


def euler_step(x_t: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One Euler step of dx/dt = v from `t` to `t_next`, both [B, F]."""
    return x_t + over_frames(t_next - t) * v


def shifted(t: Tensor, shift: float) -> Tensor:
    """Timestep shift: s t / (1 + (s - 1) t). Monotone, keeps 0 and 1; s > 1 moves levels towards noise (eq. 5 with s < 1)."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, shift: float) -> Tensor:
    """Noise levels of a sampler: `steps` + 1 fp64 numbers from 1 down to 0, shifted."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def level(normal: Tensor, uniform: Tensor, distribution: str, shift: float) -> Tensor:
    """Training noise levels from standard draws: `sigmoid(normal)` for "logit_normal", `uniform` itself for "uniform"; then shifted."""
    if distribution == "logit_normal":
        return shifted(torch.sigmoid(normal), shift)
    if distribution == "uniform":
        return shifted(uniform, shift)
    raise ValueError(f"unknown distribution of noise levels {distribution!r}")


def flow_loss(v: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Squared error of the velocity by clip and latent frame: [B, F], fp32, mean over C, H, W (eq. 4 before its mean over chunks)."""
    return (v.float() - target_velocity(x, eps).float()).square().mean(dim=(1, 3, 4))


def mean_over_chunks(by_frame: Tensor, sizes: list[int], present: Tensor | None = None) -> Tensor:
    """[B, F] -> [B, N]: the mean over each chunk's frames, so that every chunk weighs the same, a short one too.

    `present`, bool [B, F], leaves out frames that are missing; a chunk without any is 0.
    """
    if present is None:
        return torch.stack([part.mean(dim=1) for part in by_frame.split(sizes, dim=1)], dim=1)
    kept = by_frame.where(present, 0)
    pairs = zip(kept.split(sizes, dim=1), present.split(sizes, dim=1))
    return torch.stack([part.sum(dim=1) / there.sum(dim=1).clamp(min=1) for part, there in pairs], dim=1)


def mean_of_present(by_chunk: Tensor, sizes: list[int], present: Tensor | None = None) -> Tensor:
    """The loss (eq. 4): the mean of [B, N] over each clip's chunks that have a frame `present`, then over clips."""
    if present is None:
        return by_chunk.mean()
    there = torch.stack([part.any(dim=1) for part in present.split(sizes, dim=1)], dim=1)
    return (by_chunk.where(there, 0).sum(dim=1) / there.sum(dim=1).clamp(min=1)).mean()
