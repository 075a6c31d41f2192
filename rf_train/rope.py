"""Rotary positions in three axes, as Wan has them: an even head of width D is split into time, height and width,
with 2 (D // 6) for height and width each and the rest for time (128 = 44 + 42 + 42), base 10000.

Tables are made in fp64 by NumPy when asked for: tables built inside `zero.Init` would be rounded to bf16.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with (time, height, width)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@lru_cache(maxsize=256)
def rotary_table(first: int, frames: int, height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Unit complex numbers, complex64 [frames * height * width, head_dim / 2], of the tokens of latent frames first .. first + frames - 1."""
    positions = (np.arange(first, first + frames), np.arange(height), np.arange(width))
    angles = []
    for axis, (position, channels) in enumerate(zip(positions, axis_widths(head_dim))):
        frequency = 10000.0 ** (-np.arange(0, channels, 2, dtype=np.float64) / max(channels, 1))
        shape = [1, 1, 1, len(frequency)]
        shape[axis] = len(position)
        angle = np.outer(position.astype(np.float64), frequency).reshape(shape)
        angles.append(np.broadcast_to(angle, (frames, height, width, len(frequency))))
    angle = np.concatenate(angles, axis=-1).reshape(frames * height * width, head_dim // 2)
    return torch.from_numpy(np.exp(1j * angle).astype(np.complex64)).to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns neighbouring pairs of channels, each pair as a complex number. x [B, L, H, D]; table [L, D / 2]. Computed in fp32, returned in x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).to(x.dtype)
