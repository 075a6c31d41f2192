"""Every random number of a step, from (seed, step, sample id, purpose) and nothing else.

So the same run comes out at any world size, micro-batch split or after a resume, and one sample's step can be replayed alone.
Numbers come from NumPy's Philox counter generator on the CPU, keyed by a SHA-256 of the four.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, step: int, sample: str, purpose: str) -> np.random.Generator:
    """An independent stream for each (seed, step, sample id, purpose)."""
    digest = hashlib.sha256(f"{seed}\0{step}\0{sample}\0{purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def normal(shape: tuple[int, ...], seed: int, step: int, sample: str, purpose: str) -> Tensor:
    """Standard normal fp32 numbers of `shape`, on the CPU."""
    return torch.from_numpy(generator(seed, step, sample, purpose).standard_normal(shape, dtype=np.float32))


@dataclass
class Draws:
    """The random numbers of one micro-batch of B clips with N chunks; all fp32."""

    noise: Tensor  # [B, C, F, H, W] eps of the loss
    t_normal: Tensor  # [B, N] standard normal, one a chunk
    t_uniform: Tensor  # [B, N] uniform in [0, 1)
    history_noise: Tensor  # [B, C, F, H, W] eps of the degraded history, fresh for every chunk
    t_s_normal: Tensor  # [B] standard normal: the resampling level, one a clip
    history_uniform: Tensor  # [B] uniform: the level of `noise` histories
    drop_caption: Tensor  # [B] uniform in [0, 1): a caption is dropped when below the dropout rate

    def to(self, device: torch.device) -> "Draws":
        return Draws(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


def draw(seed: int, step: int, samples: list[str], latent_shape: tuple[int, ...], chunks: int) -> Draws:
    """The draws of `step` for the clips `samples` (ids), each a latent of `latent_shape` [C, F, H, W] in `chunks` chunks."""

    def stacked(purpose: str, shape: tuple[int, ...], kind: str) -> Tensor:
        rows = []
        for sample in samples:
            stream = generator(seed, step, sample, purpose)
            rows.append(stream.standard_normal(shape, dtype=np.float32) if kind == "normal" else stream.random(shape, dtype=np.float32))
        return torch.from_numpy(np.stack(rows))

    return Draws(
        noise=stacked("noise", latent_shape, "normal"),
        t_normal=stacked("t", (chunks,), "normal"),
        t_uniform=stacked("t_uniform", (chunks,), "uniform"),
        history_noise=stacked("history_noise", latent_shape, "normal"),
        t_s_normal=stacked("t_s", (), "normal"),
        history_uniform=stacked("history_level", (), "uniform"),
        drop_caption=stacked("caption_dropout", (), "uniform"),
    )
