"""Rotary positions in three axes, as in Wan.

A head of even width D is split into time, height and width: 2 (D // 6) channels each for height and width, the rest for
time (128 = 44 + 42 + 42). The base is 10000. Tables are computed in fp64 by NumPy when they are needed: a table that is
built inside `zero.Init` would be rounded to bf16.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that encode (time, height, width)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@lru_cache(maxsize=64)
def rotary_table(first: int, frames: int, height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """The rotations of the tokens of latent frames first .. first + frames - 1, as (cosine, sine).

    `height` and `width` count tokens. Returns fp32 [frames * height * width, head_dim / 2, 2].
    """
    positions = (np.arange(first, first + frames), np.arange(height), np.arange(width))
    angles = []
    for axis, (position, channels) in enumerate(zip(positions, axis_widths(head_dim))):
        frequency = 10000.0 ** (-np.arange(0, channels, 2, dtype=np.float64) / max(channels, 1))
        shape = [1, 1, 1, len(frequency)]
        shape[axis] = len(position)
        angle = np.outer(position.astype(np.float64), frequency).reshape(shape)
        angles.append(np.broadcast_to(angle, (frames, height, width, len(frequency))))
    angle = np.concatenate(angles, axis=-1).reshape(frames * height * width, head_dim // 2)
    return torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)).to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates neighbouring pairs of channels, each pair as one complex number, in fp32.

    x [B, L, H, D]; table [L, D / 2, 2], see `rotary_table`. Returns x's shape and dtype.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler has no complex numbers
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), table[:, None].unbind(-1)
        turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None])
    return turned.flatten(-2).to(x.dtype)
