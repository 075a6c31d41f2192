"""The four ways to make a history, and the loss of a step (Algorithm 1), as functions of a velocity model.

`model` is called as `CausalWan.forward` is; nothing here knows whether it is sharded. Latents are [B, C, F, H, W].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rf_train import flow
from rf_train.chunks import Attention, Chunking
from rf_train.config import Flow, Stage
from rf_train.randomness import Draws


def stage_attention(stage: Stage) -> Attention:
    """The attention that a stage trains with."""
    if stage.attention == "window":
        return Attention("window", window=stage.window, sink=stage.sink)
    if stage.attention == "routed":
        return Attention("routed", k=stage.k)
    return Attention()


def by_frame(by_chunk: Tensor, sizes: list[int]) -> Tensor:
    """[B, N] -> [B, F]: each chunk's number on every of its frames."""
    return by_chunk.repeat_interleave(torch.tensor(sizes, device=by_chunk.device), dim=1, output_size=sum(sizes))


@torch.no_grad()
def make_history(model, x: Tensor, text: Tensor, draws: Draws, stage: Stage, chunking: Chunking) -> tuple[Tensor | None, Tensor]:
    """Degraded history x~ of chunks 1 .. N - 1, without gradient, and the level it was resampled from, [B].

    x~^N is not made: nothing reads it. None when the clip is a single chunk.
    """
    sizes = chunking.sizes(x.shape[2])
    t_s = flow.shifted(torch.sigmoid(draws.t_s_normal), stage.s)  # eq. 5
    if len(sizes) == 1:
        return None, t_s
    frames = sum(sizes[:-1])
    clean, eps = x[:, :, :frames], draws.history_noise[:, :, :frames]
    if stage.history == "clean":
        return clean, torch.zeros_like(t_s)
    if stage.history == "noise":
        return flow.interpolate(clean, eps, draws.history_uniform[:, None].expand(-1, frames)), draws.history_uniform
    x_ts = flow.interpolate(clean, eps, t_s[:, None].expand(-1, frames))  # eq. 6
    if stage.history == "parallel":
        return _resample_parallel(model, x_ts, clean, t_s, text, stage, chunking), t_s
    if stage.history == "autoregressive":
        return _resample_autoregressive(model, x_ts, t_s, text, stage, chunking), t_s
    raise ValueError(f"unknown history {stage.history!r}")


def _levels(t_s: Tensor, solver_steps: int, frames: int) -> list[Tensor]:
    """The solver's noise levels from t_s down to 0, `solver_steps` + 1 tensors [B, frames], evenly spaced."""
    return [(t_s * (1 - i / solver_steps))[:, None].expand(-1, frames) for i in range(solver_steps + 1)]


def _resample_parallel(model, x_ts: Tensor, clean: Tensor, t_s: Tensor, text: Tensor, stage: Stage, chunking: Chunking) -> Tensor:
    """Every chunk resampled on its own with clean history: no error accumulates."""
    sizes = chunking.sizes(x_ts.shape[2])
    history = clean[:, :, : sum(sizes[:-1])] if len(sizes) > 1 else None
    levels = _levels(t_s, stage.solver_steps, x_ts.shape[2])
    x_t = x_ts
    for t, t_next in zip(levels, levels[1:]):
        v = model(noisy=x_t, t=t, history=history, text=text, attention=stage_attention(stage))
        x_t = flow.euler_step(x_t, v, t, t_next)
    return x_t


def _resample_autoregressive(model, x_ts: Tensor, t_s: Tensor, text: Tensor, stage: Stage, chunking: Chunking) -> Tensor:
    """Self-resampling (eq. 7): chunk after chunk, each conditioned on the resampled ones before it, through a K/V cache.

    The pass that denoises a chunk also writes the keys and values of the one before, so that N - 1 chunks take N - 1 passes
    with one solver step, not 2 (N - 1), and the last made chunk is never written.
    """
    attention = stage_attention(stage)
    sizes = chunking.sizes(x_ts.shape[2])
    settings = model.settings
    tokens = (x_ts.shape[3] // settings.patch) * (x_ts.shape[4] // settings.patch)
    cache = model.new_cache(x_ts.shape[0], tokens, x_ts.shape[2], attention)
    made: list[Tensor] = []
    for index, x_t in enumerate(x_ts.split(sizes, dim=2)):
        levels = _levels(t_s, stage.solver_steps, sizes[index])
        for step, (t, t_next) in enumerate(zip(levels, levels[1:])):
            newest = made[-1] if made and step == 0 else None
            v = model(noisy=x_t, t=t, history=newest, text=text, attention=attention, noisy_chunk=index, cache=cache)
            x_t = flow.euler_step(x_t, v, t, t_next)
        made.append(x_t)
    return torch.cat(made, dim=2)


@dataclass
class StepLoss:
    """The loss of a micro-batch and what it is made of."""

    loss: Tensor  # scalar, with gradient
    by_chunk: Tensor  # [B, N] detached
    t: Tensor  # [B, N] noise levels of the noisy chunks


def training_loss(
    model, x: Tensor, text: Tensor, history: Tensor | None, draws: Draws, settings: Flow, stage: Stage, chunking: Chunking, present: Tensor | None = None
) -> StepLoss:
    """One parallel pass over all chunks: the flow-matching loss (eq. 4) with targets from the clean clip and history x~.

    `present`, bool [B, F], tells which latent frames of the clips are there; None: all of them.
    """
    sizes = chunking.sizes(x.shape[2])
    t = flow.level(draws.t_normal, draws.t_uniform, settings.t_distribution, settings.t_shift)
    t_frames = by_frame(t, sizes)
    x_t = flow.interpolate(x, draws.noise, t_frames)
    v = model(noisy=x_t, t=t_frames, history=history, text=text, attention=stage_attention(stage))
    by_chunk = flow.mean_over_chunks(flow.flow_loss(v, x, draws.noise), sizes, present)
    return StepLoss(flow.mean_of_present(by_chunk, sizes, present), by_chunk.detach(), t)
