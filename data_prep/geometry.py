"""Sizes: video frames and pixels, the latents that stand for them, and the transformer's patches."""

from dataclasses import dataclass

import numpy as np

PATCH = 2  # Wan's transformer joins 2 x 2 latent pixels into a token


@dataclass(frozen=True)
class LatentGeometry:
    """How a codec's latents relate to video frames.

    `strides` = (s_t, s_h, s_w). The first frame alone makes latent frame 0; every further s_t frames make one more.
    A latent pixel stands for s_h x s_w pixels.
    """

    channels: int
    strides: tuple[int, int, int]

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[C, T, H, W] of a clip's latent. Raises ValueError, with the nearest valid sizes, if these don't fit."""
        time, rows, columns = self.strides
        if frames < 1 or (frames - 1) % time:
            below = max(1, frames - (frames - 1) % time)
            raise ValueError(f"{frames} frames: a clip must have 1 + {time}k, such as {below} or {below + time}")
        if height < rows or width < columns or height % rows or width % columns:
            multiple = f"{rows}" if rows == columns else f"{rows} and {columns}"
            raise ValueError(f"size {height}x{width}: height and width must be multiples of {multiple}")
        return self.channels, 1 + (frames - 1) // time, height // rows, width // columns

    def latent_shape_of(self, frames: np.ndarray) -> tuple[int, int, int, int]:
        """`latent_shape` of a clip of pixels. Raises ValueError unless it is uint8 [T, H, W, 3] of a valid size."""
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {frames.shape}")
        return self.latent_shape(*frames.shape[:3])

    def check_latent(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless `shape` is that of a latent, [C, T, H, W]."""
        if len(shape) != 4 or shape[0] != self.channels or 0 in shape:
            raise ValueError(f"latent must be [{self.channels}, T, H, W], not {tuple(shape)}")

    def latent_frames(self, frames: int) -> int:
        """The smallest number of latent frames that stands for at least `frames` video frames."""
        return 1 + -(-(frames - 1) // self.strides[0])

    def video_frames(self, latent_frames: int) -> int:
        """Video frames that the first `latent_frames` latent frames stand for."""
        return 1 + self.strides[0] * (latent_frames - 1) if latent_frames else 0

    def check_patches(self, height: int, width: int, patch: int = PATCH) -> None:
        """Raises ValueError, with the nearest size, when a picture's latent doesn't split into whole patches."""
        multiples = self.strides[1] * patch, self.strides[2] * patch
        if height < 1 or width < 1 or height % multiples[0] or width % multiples[1]:
            nearest = "x".join(str(max(1, round(side / m)) * m) for side, m in zip((height, width), multiples))
            of = f"{multiples[0]}" if multiples[0] == multiples[1] else f"{multiples[0]} and {multiples[1]}"
            raise ValueError(f"size {height}x{width}: must be multiples of {of}, such as {nearest}")


WAN_2_1 = LatentGeometry(channels=16, strides=(4, 8, 8))


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "480x832"."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) > 0 and int(width) > 0):
        raise ValueError(f"size {text!r}: expected HEIGHTxWIDTH, e.g. 480x832")
    return int(height), int(width)
