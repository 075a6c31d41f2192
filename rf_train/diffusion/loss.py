"""The loss of a micro-batch: one parallel pass over all chunks (the second half of Algorithm 1)."""

from dataclasses import dataclass

from torch import Tensor

from rf_train.diffusion import flow_matching
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.model.chunks import Attention
from rf_train.model.transformer import VelocityModel


@dataclass(frozen=True)
class VelocityLoss:
    """The loss of a micro-batch and what it is made of."""

    loss: Tensor  # scalar, with gradient
    by_chunk: Tensor  # [B, N], detached
    t: Tensor  # [B, N] noise levels of the noisy chunks


def training_loss(
    model: VelocityModel, batch: Batch, history: Tensor | None, flow: FlowSettings, attention: Attention
) -> VelocityLoss:
    """The flow-matching loss (eq. 4): targets from the clean clip, conditioned on `history` x~ [B, C, F', H, W]."""
    sizes, noise = batch.chunk_sizes, batch.draws["noise"]
    t = flow_matching.training_levels(batch.draws, flow)
    t_frames = flow_matching.spread_over_frames(t, sizes)
    x_t = flow_matching.interpolate(batch.x, noise, t_frames)
    v = model(noisy=x_t, t=t_frames, history=history, text=batch.text, attention=attention)
    by_chunk = flow_matching.mean_by_chunk(flow_matching.flow_loss(v, batch.x, noise), sizes, batch.present)
    return VelocityLoss(flow_matching.mean_of_present(by_chunk, sizes, batch.present), by_chunk.detach(), t)
