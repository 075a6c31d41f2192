"""A micro-batch: what one forward and backward pass of a rank reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B clips in N chunks, and their random numbers."""

    ids: list[str]  # sample and epoch, such as "000012_0001@3"
    x: Tensor  # [B, C, F, H, W] fp32, the clean latents
    text: Tensor  # [B, text_len, text_dim] fp32, zero-padded; dropped captions are already replaced by the empty one
    draws: dict[str, Tensor]  # random numbers by purpose, see `randomness.make_draws`
    chunk_sizes: list[int]  # N numbers: latent frames of each chunk
    present: Tensor | None = None  # bool [B, F]: which latent frames exist; None: all of them
    damaged: Sequence[str] = ()  # the samples that could not be read, and were replaced: a line of JSON each

    @property
    def history_frames(self) -> int:
        """Latent frames of the history stream: all chunks but the last, which nothing reads."""
        return sum(self.chunk_sizes[:-1])

    def to(self, device: torch.device) -> "Batch":
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        draws = {purpose: moved(tensor) for purpose, tensor in self.draws.items()}
        present = None if self.present is None else moved(self.present)
        return replace(self, x=moved(self.x), text=moved(self.text), draws=draws, present=present)
