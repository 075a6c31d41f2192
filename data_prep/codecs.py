"""Codecs: pixels to latents and back.

Each has its own geometry. All are causal in time, in both directions. So a longer video starts with the same
latents, and decodes to the same first frames.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_prep.card import read_card
from data_prep.default_codec import CODEC_FILE, DefaultCodec
from data_prep.geometry import LatentGeometry
from data_prep.places import Place, checked_copy, local_folder, place_of
from data_prep.wan_codec import WanCodec


class Codec(Protocol):
    """Pixels to latents and back. The attributes are what a dataset's card records."""

    name: str
    geometry: LatentGeometry
    mean: list[float]  # per channel: latents are (raw - mean) / std
    std: list[float]
    settings: dict
    hash: str  # sha256 of weights and settings
    folder: str | None  # where the weights are; None: in the dataset itself
    device: torch.device  # that it works on

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> normalised float32 [C, 1 + (T - 1) / s_t, H / s_h, W / s_w]."""

    def encode_batch(self, clips: np.ndarray) -> np.ndarray:
        """As `encode`, of B clips of one size: uint8 [B, T, H, W, 3] -> float32 [B, C, ...]. No clip sees another."""

    def decode(self, latent: np.ndarray | Tensor) -> np.ndarray:
        """Normalised float [C, T, H, W] -> uint8 [1 + s_t (T - 1), s_h H, s_w W, 3]."""

    def decoder(self) -> Callable[[np.ndarray | Tensor], np.ndarray]:
        """A function that decodes a video piece by piece, of any number of latent frames each.

        It takes a piece [C, T, H, W], and returns the piece's frames. Joined, they are those of `decode`, bit for bit.
        What it keeps between calls does not grow.
        """

    def decoder_bytes(self, height: int, width: int) -> int:
        """Bytes, about, that a `decoder` takes for a latent frame of `height` x `width` latent pixels."""


def open_codec(spec: str, device: str = "cpu", precision: str = "auto") -> Codec:
    """Opens the codec "default:FOLDER" (a dataset, or its codec.safetensors) or "wan:FOLDER".

    `precision` of the Wan VAE: bf16, fp32, or auto (bf16 on a GPU).
    """
    name, _, folder = spec.partition(":")
    if name == "default" and folder:
        path = local_folder(folder, "--codec")
        return DefaultCodec.load(path / CODEC_FILE if path.is_dir() else path)
    if name == "wan" and folder:
        return WanCodec(folder, device, {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision))
    raise ValueError(f"unknown codec {spec!r}, expected default, default:FOLDER or wan:FOLDER")


def dataset_codec(dataset: str | Place, device: str = "cpu") -> Codec:
    """Opens the codec that made a dataset, as its card says. Raises ValueError if it finds another codec there."""
    card, path = read_card(dataset), place_of(dataset) / CODEC_FILE
    recorded = card["codec"]
    codec: Codec
    if recorded["name"] == "default":
        codec = _built_in(path, card)
    elif recorded["name"] == "wan":
        codec = WanCodec(recorded["folder"], device)
    else:
        raise ValueError(f"{dataset}: made by an unknown codec {recorded['name']!r}")
    if codec.hash != recorded["hash"]:
        found = codec.folder or path
        hashes = f"hash {codec.hash[:12]}, the dataset says {recorded['hash'][:12]}"
        raise ValueError(f"{found}: not the codec that made {dataset} ({hashes})")
    return codec


def _built_in(path: Place, card: dict) -> DefaultCodec:
    """The codec.safetensors of a dataset, local or remote. Raises a one-line ValueError."""

    def is_whole(file: Path) -> bool:
        try:
            return DefaultCodec.load(file).hash == card["codec"]["hash"]
        except ValueError:
            return False

    if isinstance(path, Path):
        return DefaultCodec.load(path)
    missing, damaged = "no such file, expected a default codec", "not the codec that the card names, or damaged"
    return DefaultCodec.load(checked_copy(path, card["codec"]["hash"], is_whole, missing, damaged))
