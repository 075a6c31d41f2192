"""Every random number of a step, from (seed, step, sample id, purpose) and nothing else.

So they are the same at any world size, with any micro-batch, and after a resume. One sample's step can be replayed
alone. Numbers come from NumPy's Philox counter generator on the CPU, keyed by a SHA-256 of these four values.
"""

import hashlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Draw(NamedTuple):
    """Random numbers that a step reads: their distribution, and whether there is one per latent, chunk or clip."""

    distribution: Literal["normal", "uniform"]
    per: Literal["latent", "chunk", "clip"]  # "latent": one per value of the clip's latent


# What the loss and the captions read. A history names its own draws. The key is the purpose.
LOSS_DRAWS = {
    "noise": Draw("normal", "latent"),  # eps of the noisy stream
    "t": Draw("normal", "chunk"),  # for noise levels with a logit-normal distribution
    "t_uniform": Draw("uniform", "chunk"),  # for uniform noise levels
    "caption_dropout": Draw("uniform", "clip"),  # a caption is dropped when this is below the dropout rate
}


def generator(seed: int, step: int, sample: str, purpose: str) -> np.random.Generator:
    """An independent stream for each (seed, step, sample id, purpose)."""
    digest = hashlib.sha256(f"{seed}\0{step}\0{sample}\0{purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def normal(shape: tuple[int, ...], seed: int, step: int, sample: str, purpose: str) -> Tensor:
    """Standard normal fp32 numbers of `shape`, on the CPU."""
    return torch.from_numpy(generator(seed, step, sample, purpose).standard_normal(shape, dtype=np.float32))


def make_draws(
    wanted: Mapping[str, Draw], seed: int, step: int, samples: list[str], latent_shape: tuple[int, ...], chunks: int
) -> dict[str, Tensor]:
    """The `wanted` random numbers of `step` for B clips, by purpose; fp32, on the CPU.

    `samples`: the ids of the clips, each a latent of `latent_shape` [C, F, H, W] in `chunks` chunks.
    Shapes: per latent [B, C, F, H, W], per chunk [B, chunks], per clip [B].
    """
    shapes = {"latent": latent_shape, "chunk": (chunks,), "clip": ()}
    draws = {}
    for purpose, (distribution, per) in wanted.items():
        rows = []
        for sample in samples:
            stream = generator(seed, step, sample, purpose)
            make = stream.standard_normal if distribution == "normal" else stream.random
            rows.append(make(shapes[per], dtype=np.float32))
        draws[purpose] = torch.from_numpy(np.stack(rows))
    return draws
