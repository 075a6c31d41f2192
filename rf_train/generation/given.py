"""What a video begins with: the first chunks of another video, or an image."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from data_prep.video import read_frames
from rf_train.generation.generator import Generator


def first_frames(generator: Generator, video: str | Path, chunks: int) -> Tensor:
    """Latent [1, C, F, H, W] of the first `chunks` chunks of a video, or as many whole ones as it has.

    Raises ValueError when it has none.
    """
    chunking, geometry, fps = generator.model.chunking, generator.geometry, generator.fps
    wanted = geometry.video_frames(chunking.start(chunks))
    pixels = []
    for frame in read_frames(video, fps, generator.size):
        pixels.append(frame)
        if len(pixels) == wanted:
            break
    while chunks > 0 and geometry.video_frames(chunking.start(chunks)) > len(pixels):
        chunks -= 1
    if chunks == 0:
        need = geometry.video_frames(chunking.first)
        raise ValueError(f"{video}: {len(pixels)} frames at {fps} fps, the first chunk needs {need}")
    kept = geometry.video_frames(chunking.start(chunks))
    return torch.from_numpy(generator.codec.encode(np.stack(pixels[:kept])))[None]


def opaque(picture: Image.Image) -> Image.Image:
    """A picture in RGB, 8 bits: on white where it is transparent; 16 bits are rounded, not cut off.

    Raises ValueError for values of which nobody knows what is white.
    """
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"it has numbers of 32 bits ({picture.mode}), and no white")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def still_image(generator: Generator, image: str | Path) -> Tensor:
    """Latent [1, C, F, H, W] of a first chunk that shows an image: resized to cover the frame, cropped at its centre.

    The first video frame alone makes latent frame 0. So a first chunk of one latent frame (`model.first_chunk=1`) is
    the image itself, and the video may move from the next frame on. A longer first chunk was trained on whole chunks:
    it gets the image repeated, and the video stands still for so long. Raises ValueError for a file that is no image.
    """
    height, width = generator.size
    try:
        with Image.open(image) as picture:
            upright = opaque(ImageOps.exif_transpose(picture))
            pixels = np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC))
    except FileNotFoundError:
        raise ValueError(f"{image}: missing") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{image}: not an image ({str(error).splitlines()[0]})") from None
    frames = generator.geometry.video_frames(generator.model.chunking.first)
    return torch.from_numpy(generator.codec.encode(np.repeat(pixels[None], frames, axis=0)))[None]
